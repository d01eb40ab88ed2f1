"""What each reader makes of an Eagle3 checkpoint: engines that serve it and packages that train it on.

Written after their own code, key by key and tensor by tensor. The exporters read their own files so before they write
them, ``redraft check`` says so of anybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from redraft.drafts.eagle.kinds import guarded
from redraft.drafts.eagle3.engines import llamacpp, packages, sglang, tensorrt, vllm
from redraft.drafts.eagle3.engines.common import meaning_of as meaning_of
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.errors import UserError
from redraft.target import Facts

Reader = Callable[[Mapping[str, Any], Mapping[str, TensorFacts], Facts], Reading]

READERS: dict[str, Reader] = {
    "vllm-0.32": partial(vllm.read, "0.32"),
    "vllm-0.33": partial(vllm.read, "0.33"),
    "sglang": sglang.read,
    "speculators": packages.speculators,
    "specforge": packages.specforge,
    "modelopt": packages.modelopt,
    "tensorrt-llm": tensorrt.read,
    "llama.cpp": llamacpp.read,
}


def read_as(engine: str, config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
    """What ``engine`` makes of this config.json and these tensors beside ``target``; nothing is loaded.

    The rotary settings of the meaning are in the one form of :mod:`redraft.drafts.eagle.angles`, as
    :func:`meaning_of` gives them. Values of the wrong kind are a reason to stop. Raises ``UserError`` for a reader
    that there is not.
    """
    if engine not in READERS:
        raise UserError(f"no reader {engine!r} is known; there are {', '.join(READERS)}")
    return guarded(engine, config, lambda: READERS[engine](config, tensors, target))
