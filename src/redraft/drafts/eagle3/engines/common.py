"""What readers of Eagle3 checkpoints share: the switches, the tensors that a meaning asks for, our own meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redraft.drafts.eagle.look import LATER_NORM, Look, layer_meaning, layer_tensors
from redraft.target import Facts

TRAINER_TENSORS = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight")


def meaning_of(config: Any) -> dict[str, Any]:
    """What a draft with this :class:`redraft.drafts.eagle3.Eagle3Config` means, in the terms of a ``Reading``."""
    own = ("target_hidden_size", "draft_vocab_size", "taps", "norm_before_residual", "norm_before_fc", "fc_norm")
    switches = ("norm_output", "fc_bias", "head_norm")
    return layer_meaning(config) | {name: getattr(config, name) for name in (*own, *switches)}


def vocabulary(look: Look, whose: str) -> None:
    """``draft_vocab_size``, the target's where the file has none."""
    if not look.take("draft_vocab_size", None, whose, look.top("draft_vocab_size")):
        look.reading.take("draft_vocab_size", look.meaning.get("target_vocab_size"), "defaulted", whose)


def wanted(
    meaning: Mapping[str, Any], later_norm: str = LATER_NORM, maps: bool | None = None, head: bool = True
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a draft that means this, as ``layers.N.*``.

    ``maps``: both maps are asked for, or none, or, where it is none, ``d2t`` where the vocabulary is reduced.
    """
    hidden, width, taps = (meaning[k] for k in ("hidden_size", "target_hidden_size", "taps"))
    rows, all_rows = int(meaning["draft_vocab_size"]), int(meaning["target_vocab_size"])
    found: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, width * len(taps)), "norm.weight": (hidden,)}
    if meaning["fc_bias"]:
        found["fc.bias"] = (hidden,)
    if meaning["norm_before_fc"]:
        found["input_norm.weight"] = (width * len(taps),)
    if meaning["fc_norm"]:
        found |= {f"fc_norm.{k}.weight": (width,) for k in range(len(taps))}
    if head:
        found["lm_head.weight"] = (rows, hidden)
    if maps or (maps is None and rows != all_rows):
        found["d2t"] = (rows,)
    if maps:
        found["t2d"] = (all_rows,)
    if meaning["embedding"] == "own":
        found["embed_tokens.weight"] = (all_rows, hidden)
    return found | layer_tensors(meaning, True, later_norm)


def fused_width(look: Look, whose: str) -> None:
    """Engines skip ``fc`` where what it reads is as wide as what it writes, since they tell features by their width."""
    meaning = look.meaning
    if len(meaning["taps"]) * meaning["target_hidden_size"] == meaning["hidden_size"]:
        look.stop(f"{whose} skips fc where its input is as wide as its output")


def number_of_features(look: Look, told: Any, whose: str) -> None:
    """Complain where the number of features that ``fc`` is built for is not that of the feature ids."""
    if int(told) != len(look.meaning["taps"]):
        look.stop(f"{whose} builds fc for {told} features and collects {len(look.meaning['taps'])}")


def same_vocabulary(look: Look, target: Facts) -> None:
    if look.meaning.get("target_vocab_size") != target.vocab_size:
        look.stop(f"vocab_size {look.meaning.get('target_vocab_size')} is not the target's {target.vocab_size}")
