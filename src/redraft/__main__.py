"""``python -m redraft``, and ``torchrun -m redraft``: the command line."""

from redraft.cli.entry import main

if __name__ == "__main__":
    main()
