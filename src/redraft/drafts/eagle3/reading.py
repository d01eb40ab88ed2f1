"""Reading Eagle3 checkpoints of other hands: the speculators format and the plain one.

Strict: every missing, extra, misshaped or non-finite tensor is named, and an option that our draft does not compute
is refused by its name rather than dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from redraft.artifact import check_tensors
from redraft.drafts.eagle3.maps import check_vocabulary_map, read_maps
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft
from redraft.drafts.formats.base import TargetInfo
from redraft.drafts.formats.reading import Checkpoint, build_untrained, layer_faults, layer_fields, read_state
from redraft.errors import UserError
from redraft.target import default_taps

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")

# What our layer, and that of engines, does whatever ``eagle_config`` says.
EAGLE_SWITCHES = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "use_aux_norm")


def recognises(checkpoint: Checkpoint) -> bool:
    return _speculators(checkpoint.config) or bool(checkpoint.architectures & set(ARCHITECTURES))


def read(
    checkpoint: Checkpoint, target: TargetInfo, notes: list[str], taps: tuple[int, ...] | None = None
) -> tuple[Eagle3Draft, dict[str, Any]]:
    """The draft and its metadata; ``taps`` overrules the feature ids. Raises ``UserError``."""
    raw, folder = checkpoint.config, checkpoint.folder
    config = read_config(raw, target, checkpoint.path, notes, taps)
    state = read_maps(read_state(folder, notes), config, folder, notes)
    config = replace(config, own_embedding="embed_tokens.weight" in state)
    config.check_fit(target)
    check_taps(config.taps)
    draft = build_untrained(lambda: Eagle3Draft(config), checkpoint.path)
    check_tensors(state, draft.state_dict(), folder)
    check_vocabulary_map(state, config, folder)
    draft.fill(state)
    return draft, {"format": "speculators" if _speculators(raw) else "plain", "verifier": _verifier(raw)}


def check_taps(taps: tuple[int, ...]) -> None:
    """Engines collect features in layer order and once each, so ids must ascend strictly. Raises ``UserError``."""
    if not taps or any(after <= before for before, after in zip(taps, taps[1:], strict=False)):
        raise UserError(f"taps {list(taps)} do not ascend strictly; engines read each layer once and in layer order")


# -- reading the config ----------------------------------------------------------------------------------------------
def _speculators(raw: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in raw


def _verifier(raw: Mapping[str, Any]) -> str | None:
    """The target that a speculators checkpoint names."""
    nested = raw.get("speculators_config")
    verifier = nested.get("verifier") if isinstance(nested, dict) else None
    return verifier.get("name_or_path") if isinstance(verifier, dict) else None


def read_config(
    raw: dict[str, Any], target: TargetInfo, path: Path, notes: list[str], taps: tuple[int, ...] | None = None
) -> Eagle3Config:
    """Our config from either format's config.json. Raises ``UserError`` for what our draft does not compute."""
    layer = raw.get("transformer_layer_config") if _speculators(raw) else raw
    if not isinstance(layer, dict):
        raise UserError(f"{path} has no transformer_layer_config; download it again")
    eagle = raw.get("eagle_config")
    eagle = eagle if isinstance(eagle, dict) else {}
    _check_kind(raw, layer, eagle, path)
    llama = layer_fields(layer, path)
    _check_switches(raw | eagle, path)
    options: dict[str, Any] = {key: bool(raw.get(key, False)) for key in ("norm_before_fc", "fc_norm", "norm_output")}
    options["norm_before_fc"] = bool(eagle.get("norm_before_fc", options["norm_before_fc"]))
    options["fc_norm"] = options["fc_norm"] or bool(raw.get("use_aux_norm", False))
    if options["norm_before_fc"] and options["fc_norm"]:
        raise UserError(f"{path} asks for norm_before_fc and fc_norm at once; no trainer makes such a draft")
    # Absent, the switch is on in vLLM's reading of the speculators format and off in that of the plain one.
    residual = raw.get("norm_before_residual")
    if residual is None and _speculators(raw):
        notes.append("norm_before_residual is not in the config; taken as true, as vLLM does")
    theta, taken = layer.get("rope_theta"), llama["rope_parameters"].get("rope_theta")
    if theta is not None and theta != taken:
        notes.append(
            f"rope_theta {theta} and that of rope_parameters disagree; {taken} was taken, as transformers does"
        )
    vocabulary = raw.get("draft_vocab_size")
    return Eagle3Config(
        **llama,
        target_hidden_size=int(raw.get("target_hidden_size") or llama["hidden_size"]),
        draft_vocab_size=int(llama["target_vocab_size"] if vocabulary is None else vocabulary),
        taps=tuple(taps) if taps is not None else read_taps(raw, eagle, target, path, notes),
        norm_before_residual=_speculators(raw) if residual is None else bool(residual),
        **options,
    )


def _check_switches(values: dict[str, Any], path: Path) -> None:
    """Raise ``UserError`` for a switch that is neither on nor off: the text "false" would count as on."""
    for key in SWITCHES:
        if values.get(key) not in (None, True, False):
            raise UserError(f"{path} has {key} {values[key]!r}; true or false is needed")


def _check_kind(raw: dict[str, Any], layer: dict[str, Any], eagle: dict[str, Any], path: Path) -> None:
    """Raise ``UserError`` unless this is an Eagle3 draft of one dense Llama layer that our draft computes alike."""
    if _speculators(raw):
        if raw["speculators_model_type"] != "eagle3":
            raise UserError(f"{path} is a {raw['speculators_model_type']} speculator; only eagle3 can be imported")
    faults = layer_faults(raw, layer, ("llama", "eagle3"))
    if layer.get("bias"):
        faults.append(f"bias {layer['bias']!r}")
    faults += [f"{key} {eagle[key]!r}" for key, usual in EAGLE_SWITCHES.items() if eagle.get(key) not in (None, usual)]
    if faults:
        raise UserError(f"{path} asks for what redraft does not compute: {', '.join(faults)}")


def read_taps(
    raw: dict[str, Any], eagle: dict[str, Any], target: TargetInfo, path: Path, notes: list[str]
) -> tuple[int, ...]:
    """Feature ids, each "after k layers". Raises ``UserError`` when they are no list of integers.

    The ids on top are those of vLLM and mean that. The ids in ``eagle_config`` are those of SGLang and of the
    trainers that write them, and mean the output of layer k, counted from zero: one less.
    """
    top, nested = raw.get("eagle_aux_hidden_state_layer_ids"), eagle.get("eagle_aux_hidden_state_layer_ids")
    for ids in (top, nested):
        if ids is not None and not (isinstance(ids, list) and all(type(k) is int for k in ids)):
            raise UserError(f"{path} has eagle_aux_hidden_state_layer_ids {ids!r}; a list of integers is needed")
    if min(top or [0]) < 0 or min(nested or [0]) < -1:
        raise UserError(f"{path} has feature ids below the first layer, {top or nested}; engines never give these")
    if not top and not nested:
        usual = default_taps(target.layers)
        if top is not None or nested is not None:
            notes.append(f"the list of feature ids is empty; taken as the default {list(usual)}")
        if eagle.get("layer_ids"):
            raise UserError(
                f"{path} has its feature ids in eagle_config.layer_ids alone, which hands count differently; write "
                "them as eagle_aux_hidden_state_layer_ids, each the number of layers passed"
            )
        return usual
    top, nested = top or None, nested or None
    if top is not None:
        if nested is not None and [k + 1 for k in nested] != top:
            notes.append(f"the feature ids {top} (vLLM) and {nested} (SGLang, one less) disagree; {top} was taken")
        return tuple(top)
    notes.append(f"the feature ids {nested} are outputs of layers counted from zero; taken as one more each")
    return tuple(k + 1 for k in nested or ())
