"""Rotary settings in one form: what is turned by how much, whoever reads them.

Two settings of one form turn every pair of every position alike. Readers differ in the keys that they look for, in what
they do with ``dynamic`` angles, and in how they scale those of ``yarn`` and ``longrope``: :class:`Rules` says how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rules:
    """How a reader makes angles of rotary settings.

    ``partial``: it turns the first part of a head alone where ``partial_rotary_factor`` says so. ``dynamic``: angles
    within the trained length are the plain ones, or they are those of a text as long as the ``table``, or of one
    ``factor`` times as long. ``attention`` is the key of the factor that overrules yarn's own scale; ``zero_scales``: a
    zero among yarn's ``mscale`` and ``mscale_all_dim`` is a number, where others take it for absent; ``truncate``: its
    bounds may be fractions; not ``bare_yarn``: it must have all of these. ``factors_by``: longrope's long factors are
    for long texts, or for a long ``table``. ``kinds`` are the types that it knows.
    """

    partial: bool = True
    dynamic: Literal["plain", "table", "stretched"] = "plain"
    attention: str | None = "attention_factor"
    zero_scales: bool = False
    truncate: bool = True
    kinds: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
    bare_yarn: bool = True
    factors_by: Literal["text", "table"] = "text"


OURS = Rules()

# By so many positions is the table of a reader longer that goes by it.
SLACK = 20


def merged(layer: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """The rotary settings of a config.json as transformers merges them, which all readers start from.

    ``rope_scaling`` goes before ``rope_parameters``, what stands inside before what stands beside it; ``theta`` is the
    base where none is named. Raises ``ValueError`` where they are no settings at all.
    """
    inside = layer.get("rope_scaling") or layer.get("rope_parameters") or {}
    if not isinstance(inside, Mapping) or any(isinstance(value, Mapping) for value in inside.values()):
        raise ValueError(f"rotary settings {inside!r} are not one set of numbers")
    found = {key: value for key, value in inside.items() if key != "type" and value is not None}
    kind = inside.get("rope_type") or inside.get("type") or "default"
    found["rope_type"] = "longrope" if kind == "su" else kind
    for key, usual in (("rope_theta", theta), ("partial_rotary_factor", None)):
        value = found.get(key, layer.get(key, usual))
        if value is not None:
            found[key] = value
    if found["rope_type"] in ("yarn", "llama3", "longrope"):
        beside = layer.get("original_max_position_embeddings") or layer.get("max_position_embeddings")
        found.setdefault("original_max_position_embeddings", beside)
    return found


def angles(rope: Mapping[str, Any], head_dim: int, length: int, rules: Rules = OURS) -> dict[str, Any]:
    """The one form of ``rope``, merged settings, for heads of this width and ``max_position_embeddings`` ``length``.

    Raises ``ValueError`` for a kind that the reader does not know, and ``KeyError`` for a number that is not there.
    """
    kind = rope.get("rope_type", "default")
    if kind not in rules.kinds:
        raise ValueError(f"rope_type {kind!r}")
    form: dict[str, Any] = {"rope_type": kind, "rope_theta": float(rope.get("rope_theta", 10000.0))}
    part = float(rope.get("partial_rotary_factor", 1.0))
    if rules.partial and part != 1.0:
        form["partial_rotary_factor"] = part
    width = int(head_dim * part) if rules.partial else head_dim
    if kind == "dynamic":
        return form | {"rope_type": "default", "rope_theta": _dynamic(form["rope_theta"], rope, width, length, rules)}
    if kind in ("linear", "llama3", "yarn"):
        form["factor"] = float(rope["factor"])
    if kind in ("llama3", "yarn", "longrope"):
        form["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    if kind == "llama3":
        form |= {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        form |= _yarn(rope, form["factor"], rules)
    elif kind == "longrope":
        form |= _longrope(rope, length, rules)
    return form


def _dynamic(theta: float, rope: Mapping[str, Any], width: int, length: int, rules: Rules) -> float:
    """The base that dynamic angles have within the trained length."""
    factor = float(rope["factor"])
    stretch = {"plain": 1.0, "table": (length + SLACK) / length, "stretched": factor}[rules.dynamic]
    return theta * (factor * stretch - (factor - 1)) ** (width / (width - 2)) if stretch != 1.0 else theta


def _yarn(rope: Mapping[str, Any], factor: float, rules: Rules) -> dict[str, Any]:
    if not rules.bare_yarn:
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            rope[key]
    found = {"beta_fast": float(rope.get("beta_fast") or 32), "beta_slow": float(rope.get("beta_slow") or 1)}
    found["truncate"] = bool(rope.get("truncate", True)) if rules.truncate else True
    over, top, bottom = rope.get(rules.attention or ""), rope.get("mscale"), rope.get("mscale_all_dim")
    told = top is not None and bottom is not None if rules.zero_scales else bool(top and bottom)
    scale = _magnitude(factor, float(top or 0)) / _magnitude(factor, float(bottom or 0)) if told else None
    if scale is None:
        scale = _magnitude(factor, 1.0)
    if over is not None:
        # One reader multiplies its own scale by the factor where the others put the factor in its place.
        scale = scale * float(over) if rules.attention == "attn_factor" else float(over)
    return found | {"scale": round(scale, 6)}


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Mapping[str, Any], length: int, rules: Rules) -> dict[str, Any]:
    """Angles of a text within the original length, or, by the table, of a long one."""
    original = int(rope["original_max_position_embeddings"])
    factor, over = rope.get("factor"), rope.get(rules.attention or "")
    factor = float(factor) if factor is not None and rules.attention else length / original
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    kind = "long_factor" if rules.factors_by == "table" and length > original else "short_factor"
    scale = float(over) if over is not None else scale
    return {"factors": tuple(map(float, rope[kind])), "scale": round(scale, 6)}
