"""``redraft study``: a grid of methods, data, selections, losses, starts and seeds on the same footing.

:mod:`config` reads the YAML file, :mod:`sources` the prompts, :mod:`shared` makes what cells share, :mod:`cells` runs
one of them, :mod:`run` runs all of them and writes the results. See docs/studies/README.md.
"""
