"""What the weight files of a checkpoint call their tensors: two names for one tensor, experts that are not counted on.

transformers maps several spellings to one tensor and takes the last that it meets, and stacks experts in the order of
their numbers, whatever these are. Engines map and count otherwise, so such files are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from redraft.artifact import read_json
from redraft.errors import UserError

EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")
FUSED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
# Types of numbers as safetensors names them.
WHOLE_NUMBERS = ("BOOL", "I", "U")
PACKED = (*WHOLE_NUMBERS, "F8", "F4")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights of the checkpoint in this folder, as far as they are there."""
    index = folder / "model.safetensors.index.json"
    listed = read_json(index).get("weight_map", {}).values() if index.is_file() else ["model.safetensors"]
    return [folder / name for name in sorted({str(name) for name in listed}) if (folder / str(name)).is_file()]


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
