"""A causal language model from a checkpoint, strictly: what its file holds and what its config says are the same.

transformers fills missing tensors with random numbers and drops those that the config has no place for, and only
warns. Here a checkpoint with less or more than its config says is refused, the first tensor named. What may be left
over is known by kind (:data:`LEFT_OVER`) or declared by transformers' own class of the model, and is noted.

transformers also maps several spellings to one tensor and takes the last that it meets, and stacks experts in the order
of their numbers, whatever these are. Engines map and count otherwise, so such files are refused too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from redraft.artifact import read_json
from redraft.errors import UserError
from redraft.loading import quantised
from redraft.loading.devices import placed
from redraft.loading.places import ADAPTER_FILE, hub_cached, one_line, open_config
from redraft.target.facts import empty_model, model_class
from redraft.values import Values

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"

MTP = "layers that predict further tokens (MTP)"
# Kinds of tensors that a causal language model does not read, whatever its file holds of them.
LEFT_OVER = (
    ("stored rotary angles, which follow from the config", re.compile(r"(^|\.)rotary(_pos)?_emb\.inv_freq$")),
    (MTP, re.compile(r"(^|\.)mtp(_layers|_block|_module)?s?\.")),
    (
        "scales of a quantised key and value cache",
        re.compile(r"\.([kv]_scale|[kqv]_proj\.output_scale|attn\.[kv]_scale)$"),
    ),
)
MODALITY = re.compile(
    r"(^|\.)(visual|vision\w*|vit|image\w*|audio\w*|speech\w*|mm_projector|multi_modal_projector|"
    r"embed_vision|embed_audio|talker|token2wav|code2wav)\."
)
MODALITY_CONFIGS = ("vision_config", "audio_config", "speech_config", "thinker_config")

EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")
FUSED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
# Types of numbers as safetensors names them.
WHOLE_NUMBERS = ("BOOL", "I", "U")
LENGTH = "max_position_embeddings"
# No setting of a model is as large.
BEYOND = 1e15
PACKED = (*WHOLE_NUMBERS, "F8", "F4")


def load_model(
    place: dict[str, Any], spec: str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Any, list[str], str | None]:
    """The model at ``place`` (:func:`redraft.loading.places.locate`), notes for the user, and how it is served.

    Plain weights go straight to ``device`` where transformers can put them there (:mod:`redraft.loading.devices`);
    the caller moves what it cannot.

    The third is none where the model computed here is the one that engines serve, and says in words what they round
    besides where it is not (:mod:`redraft.loading.quantised`). Raises ``UserError``.
    """
    check_folder(place, spec)
    notes: list[str] = []
    config = config_at(place, spec)
    check_code(config, spec, notes)
    plan = quantised.plan(config, spec)
    plain = plan.method is None and "gguf_file" not in place and device != "cpu"
    straight = placed(empty_model(config), dtype, device) if plain else {}
    with one_line(spec):
        model, report = model_class(config).from_pretrained(
            **place,
            **plan.arguments,
            **straight,
            trust_remote_code=False,
            dtype=dtype,
            weights_only=True,
            # a wrong shape is told by the report, and with both shapes
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # how a call answers in Python is no part of what a model computes
    for part in (model.config, model.config.get_text_config()):
        part.return_dict = True
    folder = Path(place["pretrained_model_name_or_path"])
    check_names(folder if folder.is_dir() else Path(hub_cached(spec)), spec, plan.method)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{spec} is an adapter on the hub; download it and name its folder")
    _check_report(report, config, spec, notes)
    _check_tie(model, spec)
    if plan.unpack:
        with one_line(spec):
            model = model.dequantize(dtype)
    if plan.method is not None:
        model = quantised.plain(model, plan.method, dtype, spec)
        notes.append(f"the weights were unpacked from {plan.method}; they take the room of unquantised ones")
    return model, notes, plan.rounds


# Numbers of the rotary settings, whatever the model.
ROPE = ("rope_parameters", "rope_scaling")
ROPE_NUMBERS = re.compile(r"rope_theta|factor|partial_rotary_factor|.*_(factor|fast|slow|embeddings)")


def config_at(place: dict[str, Any], spec: str) -> Any:
    """The config at ``place``, each value of the kind that its class has there. Raises ``UserError``.

    transformers takes true for 1 and a text for true, and computes something else than was meant.
    """
    with one_line(f"the config of {spec}"):
        config = open_config(place, spec)
    file = Path(place["pretrained_model_name_or_path"]) / "config.json"
    if file.is_file():
        check_kinds(read_json(file, finite=False), config, file)
    return config


def check_kinds(raw: dict[str, Any], config: Any, file: Path, inside: str = "") -> None:
    """Raise ``UserError`` for a value of the JSON of a ``config`` that is of another kind than its class has there."""
    try:
        plain = type(config)()
    except Exception:  # a class that has no default
        return
    for key, value in raw.items():
        known, part = getattr(plain, key, None), getattr(config, key, None)
        values = Values(raw, file, inside)
        if isinstance(value, dict) and isinstance(part, transformers.PretrainedConfig):
            check_kinds(value, part, file, f"{inside}{key}.")
        elif isinstance(value, dict) and key in ROPE:
            inner = Values(value, file, f"{inside}{key}.")
            for name in ("rope_type", "type"):
                inner.text(name)
            for name in filter(ROPE_NUMBERS.fullmatch, value):
                inner.number(name, 0)
        elif key in ("dtype", "torch_dtype") and not isinstance(value, str | dict | None):
            raise values.refuse(key, "the name of a type, such as bfloat16")
        elif value is None or isinstance(value, list | dict):
            continue
        elif isinstance(known, bool):
            named = "Literal" in str(getattr(type(config), "__annotations__", {}).get(key))
            if not (named and isinstance(value, str)):  # some switches have further ways, each with a name
                values.flag(key)
        elif isinstance(known, int | float) and math.isfinite(known):
            if type(value) not in (int, float) or not abs(value) < BEYOND:
                raise values.refuse(key, "a number")
            if type(known) is int and value != int(value):
                raise values.refuse(key, "a whole number")
            if known > 0 and (value < 0 and not key.endswith("_token_id") or value == 0 and key == LENGTH):
                raise values.refuse(key, "a number above 0")


def check_folder(place: dict[str, Any], spec: str) -> None:
    """Raise ``UserError`` for a folder whose weights are told in two ways, or not all there."""
    folder = Path(place["pretrained_model_name_or_path"])
    if not folder.is_dir():
        return
    whole = [name for name in WEIGHTS if (folder / name).is_file()]
    indexed = [name for name in WEIGHTS if (folder / (name + INDEX)).is_file()]
    if (folder / ADAPTER_FILE).is_file() and (whole or indexed):
        raise UserError(f"{spec} holds a whole model and an adapter ({ADAPTER_FILE}); move one of them elsewhere")
    for name in set(whole) & set(indexed):
        raise UserError(
            f"{spec} holds {name} and {name + INDEX}, and engines do not agree which one counts; delete the older"
        )
    for name in indexed[:1] if not whole else ():
        absent = sorted({file for file in _listed(folder / (name + INDEX)) if not (folder / file).is_file()})
        if absent:
            raise UserError(f"{spec} lacks the weight file {absent[0]} ({len(absent)} absent); download it again")


def check_code(config: Any, spec: str, notes: list[str]) -> None:
    """Raise ``UserError`` for a model that brings its own code and is none that transformers has itself."""
    auto = getattr(config, "auto_map", None)
    if not isinstance(auto, dict) or not any(key.startswith("AutoModel") for key in auto):
        return
    strange = [name for name in config.architectures or () if not hasattr(transformers, str(name))]
    if strange:
        raise UserError(
            f"{spec} asks to run Python code of its own for {strange[0]} (auto_map in its config.json), which redraft "
            "never does; use a model that transformers has itself"
        )
    notes.append("the checkpoint's own code (auto_map) was left aside: transformers has this model itself")


def _check_report(report: dict[str, Any], config: Any, spec: str, notes: list[str]) -> None:
    """Raise ``UserError`` unless the checkpoint holds what its config says, and no more than known extras."""
    wrong = sorted(report["mismatched_keys"], key=lambda entry: _natural(entry[0]))
    if wrong:
        name, found, wanted = wrong[0]
        raise UserError(
            f"the checkpoint {spec} does not fit its config: {name} has shape {list(found)} in the file and "
            f"{list(wanted)} by config.json{_more(wrong, 1)}; mend the config, or save the model again"
        )
    missing = sorted(report["missing_keys"], key=_natural)
    if missing:
        raise UserError(
            f"the checkpoint {spec} lacks {', '.join(missing[:3])}{_more(missing, 3)}; copy or download it again"
        )
    extra = without_known(sorted(report["unexpected_keys"], key=_natural), config, notes)
    if extra:
        raise UserError(
            f"the checkpoint {spec} has {len(extra)} tensors for which its config has no place, first {extra[0]}; "
            f"they would be left out: {_likely(extra)}"
        )


def _natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _more(names: list[Any], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _likely(names: list[str]) -> str:
    """What usually puts such tensors into a file, and how to mend it."""
    if any(".lora_" in name or ".base_layer." in name or name.startswith("base_model.") for name in names):
        return "merge the adapter and save the model again"
    if any(name.endswith(("_scale", "_scale_inv", ".qweight", ".qzeros", "_packed")) for name in names):
        return "it looks quantised; its config.json needs the quantization_config, or give the unquantised checkpoint"
    return "mend config.json so that it describes this file"


def without_known(names: list[str], config: Any, notes: list[str]) -> list[str]:
    """The names that no known kind explains; the kinds found are noted."""
    kinds = list(LEFT_OVER)
    if (layers := _mtp_layers(names, config)) is not None:
        kinds.append((MTP, layers))
    if any(getattr(config, key, None) is not None for key in MODALITY_CONFIGS):
        kinds.append(("parts for images or sound", MODALITY))
    kept: list[str] = []
    found: dict[str, str] = {}
    for name in names:
        why = next((why for why, pattern in kinds if pattern.search(name)), None)
        if why is None:
            kept.append(name)
        else:
            found.setdefault(why, name)
    notes.extend(f"left out of the target: {why}, such as {name}" for why, name in found.items())
    return kept


def _mtp_layers(names: Iterable[str], config: Any) -> re.Pattern[str] | None:
    """Layers behind the last one, as DeepSeek and GLM number those that predict further tokens."""
    text = config.get_text_config()
    last = getattr(text, "num_hidden_layers", None)
    more = getattr(text, "num_nextn_predict_layers", None) or getattr(text, "num_mtp_layers", None)
    if not isinstance(last, int):
        return None
    behind = {int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.eh_proj\.", name))}
    behind = {k for k in behind if last <= k < last + max(int(more or 0), 1)}
    return re.compile(rf"layers\.({'|'.join(map(str, sorted(behind)))})\.") if behind else None


def _check_tie(model: Any, spec: str) -> None:
    """Raise ``UserError`` where the config ties the head to the embedding and the file has two different ones.

    transformers then computes with both, and engines that follow the config drop the head.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if not getattr(model.config, "tie_word_embeddings", False) or head is None or embedding is None:
        return
    if head.data_ptr() != embedding.data_ptr():
        raise UserError(
            f"{spec} has a head of its own, and its config says that the embedding is the head; set "
            "tie_word_embeddings to false in config.json where the head is meant, else delete it from the file"
        )


# -- names of tensors ------------------------------------------------------------------------------------------------
def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights of the checkpoint in this folder, as far as they are there."""
    index = folder / "model.safetensors.index.json"
    listed = _listed(index) if index.is_file() else {"model.safetensors"}
    return [folder / name for name in sorted(listed) if (folder / name).is_file()]


def _listed(index: Path) -> set[str]:
    """The weight files of an index. Raises ``UserError`` for one that lists none, or files of another folder."""
    listed = read_json(index, finite=False).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index} has no weight_map; copy or download it again")
    if outside := next((file for file in listed.values() if Path(file).name != file), None):
        raise UserError(f"{index} lists {outside!r}, which is no file of this folder; copy or download it again")
    return set(listed.values())


def check_names(folder: Path, spec: str, method: str | None) -> None:
    """Raise ``UserError`` for safetensors in this folder that tell a tensor twice, skip an expert, or lack a scale.

    ``method`` is the quantisation that the config names; without one, whole numbers are no weights. Files of other
    kinds are left to their reader.
    """
    types: dict[str, str] = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as opened:
                types |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        except MemoryError as error:
            size = file.stat().st_size
            raise UserError(f"{file} has {size:,} bytes, more than this machine maps; is it whole?") from error
        except (SafetensorError, OSError, ValueError):
            return  # the reader of the weights says what is wrong with it
    _check_twice(types, spec)
    _check_experts(types, spec)
    _check_types(types, spec, method)


def _check_types(types: dict[str, str], spec: str, method: str | None) -> None:
    if method and types and not any(kind.startswith(PACKED) for kind in types.values()):
        raise UserError(
            f"{spec} says that it is quantised with {method} and holds plain weights, which engines would round when "
            "they load it; remove quantization_config from config.json where the plain weights are the model"
        )
    for name, kind in types.items():
        if not name.endswith(".weight") or not kind.startswith(PACKED):
            continue
        if not method and kind.startswith(WHOLE_NUMBERS):
            raise UserError(
                f"{spec} holds whole numbers in {name} ({kind}) and its config says nothing of quantisation; give the "
                "unquantised checkpoint"
            )
        # Where the scale is absent, transformers takes the bare numbers for the weights.
        if method and kind.startswith("F8") and not {name + "_scale", name + "_scale_inv"} & set(types):
            raise UserError(f"{spec} holds {name} in {kind} without its scale; copy or download it again")


def _check_twice(names: Iterable[str], spec: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"^(model\.)+", "", name)
        if plain in seen:
            raise UserError(f"{spec} holds one tensor under two names, {seen[plain]} and {name}; keep the right one")
        seen[plain] = name


def _check_experts(names: Iterable[str], spec: str) -> None:
    numbers: dict[tuple[str, str], set[int]] = {}
    fused: dict[str, str] = {}
    for name in names:
        if found := EXPERT.match(name):
            numbers.setdefault((found[1], found[3]), set()).add(int(found[2]))
        elif found := FUSED.match(name):
            fused[found[1]] = name
    for (place, part), counted in numbers.items():
        if counted != set(range(len(counted))):
            raise UserError(
                f"{spec} numbers the experts of {place} as {_short(counted)} in {part}, and they must count from 0 "
                "without a gap; number them anew"
            )
        if place in fused:
            raise UserError(f"{spec} holds its experts twice, one by one and as {fused[place]}; keep the right ones")


def _short(numbers: set[int]) -> str:
    listed = [str(k) for k in sorted(numbers)]
    return ", ".join(listed if len(listed) <= 8 else [*listed[:4], "...", *listed[-3:]])
