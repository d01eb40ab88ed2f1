"""``python -m redraft``, and ``torchrun -m redraft``: the command line."""

from redraft.cli.main import main

main()
