"""Every setting there is, each declared once: its type, default, bounds and help.

Keys of YAML files, flags, ``--help``, checks and the template of ``redraft config`` follow from the models here.
Nothing in this room imports torch or transformers.
"""
