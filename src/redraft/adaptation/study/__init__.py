"""``redraft study``: a grid of methods, data, selections, losses, starts and seeds on the same footing.

:mod:`targets` reads the prompts and makes what cells share, :mod:`cells` runs one of them, :mod:`run` all of them, and
:mod:`figures` works out and writes what came of it. See docs/studies/README.md.
"""
