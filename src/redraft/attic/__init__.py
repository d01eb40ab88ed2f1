"""What was explored and is not recommended, still reachable by name: its files register themselves like any other.

``ridge`` and ``delta`` are starts that gain less than they cost (docs/starts.md), ``coverage`` a scorer that chose no
better than the one it is built on (docs/studies/selection.md), and low-rank updates that are aimed before training
(:mod:`redraft.attic.aim`) began faster and ended no better (docs/studies/learning-rates.md).
"""
