"""redraft from Python: what the command line does, as functions. ``import redraft`` offers all of them.

    import redraft

    target = redraft.open_target("my-model")
    print(redraft.probe(target, "old-draft", prompts="prompts.jsonl"))
    run = redraft.adapt(target, "old-draft", "run", prompts="prompts.jsonl")
    redraft.export(run.draft, target, "vllm", "draft-for-vllm")

Wherever a target is asked for, its name does (a folder, a hub id, the folder of a PEFT adapter), a :class:`TargetSpec`
(a name with data type, device, adapter and template arguments), or what :func:`open_target` gave. Wherever a draft is
asked for: a folder in any format, a hub id, or what :func:`open_draft` gave. Keywords are named as the flags and the
keys of the YAML files are. Lengths count tokens. Results print well, and show well in a notebook.

Every function raises ``redraft.UserError`` for bad input: one line that says what is wrong, where, and how to mend it.
"""
