"""Names that differ between the releases of transformers that are supported (5.16 and up)."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


@cache
def _takes_cache(kind: Any) -> bool:
    # The decorator that still takes the old name keeps the signature of what it wraps.
    return "cache" in inspect.signature(kind.forward).parameters


def cache_argument(module: Any, held: Any) -> dict[str, Any]:
    """Arguments that hand a key-value cache (or ``None``, none) to a decoder's forward.

    5.24 calls it ``cache`` and warns of the older ``past_key_values``, which 5.40 will refuse.
    """
    name = "cache" if _takes_cache(module.__class__) else "past_key_values"
    return {name: held, "use_cache": held is not None}


def dequantized() -> dict[str, Any]:
    """Arguments that have ``from_pretrained(gguf_file=...)`` give plain weights.

    5.16 knows no other way; later releases may keep them packed, and have a config that says not to.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config is not None else {}
