"""Reading Eagle3 checkpoints of other hands: the speculators format and the plain one.

Strict: every missing, extra, misshaped or non-finite tensor is named, and an option that our draft does not compute
is refused by its name rather than dropped. Vocabulary maps come as several hands write them, and are brought into the
one form of this project.

Shape legend: D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import check_tensors, dtype_name
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft
from redraft.drafts.formats.reading import Checkpoint, build_untrained, check_layer, layer_fields, read_state
from redraft.errors import UserError
from redraft.target import Facts, default_taps

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")

# What our layer, and that of engines, does whatever ``eagle_config`` says.
EAGLE_SWITCHES = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}

# With this many entries or more, offsets that grow at every step would mean that no two ids of the map are
# neighbours, which maps of frequent tokens never are.
MANY = 256

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "use_aux_norm")


def recognises(checkpoint: Checkpoint) -> bool:
    return _speculators(checkpoint.config) or bool(checkpoint.architectures & set(ARCHITECTURES))


def read(
    checkpoint: Checkpoint, target: Facts, notes: list[str], taps: tuple[int, ...] | None = None
) -> tuple[Eagle3Draft, dict[str, Any]]:
    """The draft and its metadata; ``taps`` overrules the feature ids. Raises ``UserError``."""
    raw, folder = checkpoint.config, checkpoint.folder
    config = read_config(checkpoint, target, notes, taps)
    state = read_maps(read_state(folder, notes), config, folder, notes)
    config = replace(config, own_embedding="embed_tokens.weight" in state)
    config.check_fit(target)
    check_taps(config.taps)
    draft = build_untrained(lambda: Eagle3Draft(config), checkpoint.path)
    check_tensors(state, draft.state_dict(), folder)
    check_vocabulary_map(state, config, folder)
    draft.fill(state)
    verifier: Any = raw
    for key in ("speculators_config", "verifier", "name_or_path"):
        verifier = verifier.get(key) if isinstance(verifier, dict) else None
    return draft, {"format": "speculators" if _speculators(raw) else "plain", "verifier": verifier}


def check_taps(taps: tuple[int, ...]) -> None:
    """Engines collect features in layer order and once each, so ids must ascend strictly. Raises ``UserError``."""
    if not taps or any(after <= before for before, after in zip(taps, taps[1:], strict=False)):
        raise UserError(f"taps {list(taps)} do not ascend strictly; engines read each layer once and in layer order")


# -- reading the config ----------------------------------------------------------------------------------------------
def _speculators(raw: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in raw


def read_config(checkpoint: Checkpoint, target: Facts, notes: list[str], taps: tuple[int, ...] | None) -> Eagle3Config:
    """Our config from either format's config.json. Raises ``UserError`` for what our draft does not compute."""
    raw, path = checkpoint.config, checkpoint.path
    if _speculators(raw) and raw["speculators_model_type"] != "eagle3":
        raise UserError(f"{path} is a {raw['speculators_model_type']} speculator; only eagle3 can be imported")
    layer = raw.get("transformer_layer_config") if _speculators(raw) else raw
    if not isinstance(layer, dict):
        raise UserError(f"{path} has no transformer_layer_config; download it again")
    eagle = raw.get("eagle_config")
    eagle = eagle if isinstance(eagle, dict) else {}
    faults = [f"bias {layer['bias']!r}"] if layer.get("bias") else []
    faults += [f"{key} {eagle[key]!r}" for key, usual in EAGLE_SWITCHES.items() if eagle.get(key) not in (None, usual)]
    check_layer(raw, layer, ("llama", "eagle3"), path, faults)
    llama = layer_fields(layer, path)
    for key, value in ((key, (raw | eagle).get(key)) for key in SWITCHES):
        if value not in (None, True, False):  # the text "false" would count as on
            raise UserError(f"{path} has {key} {value!r}; true or false is needed")
    norm_before_fc = bool(eagle.get("norm_before_fc", raw.get("norm_before_fc")))
    fc_norm = bool(raw.get("fc_norm") or raw.get("use_aux_norm"))
    if norm_before_fc and fc_norm:
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
        taps=tuple(taps) if taps is not None else read_taps(checkpoint, eagle, target, notes),
        norm_before_residual=_speculators(raw) if residual is None else bool(residual),
        norm_before_fc=norm_before_fc,
        fc_norm=fc_norm,
        norm_output=bool(raw.get("norm_output")),
    )


def read_taps(checkpoint: Checkpoint, eagle: dict[str, Any], target: Facts, notes: list[str]) -> tuple[int, ...]:
    """Feature ids, each "after k layers". Raises ``UserError`` when they are no list of integers.

    The ids on top are those of vLLM and mean that. The ids in ``eagle_config`` are those of SGLang and of the
    trainers that write them, and mean the output of layer k, counted from zero: one less.
    """
    path, key = checkpoint.path, "eagle_aux_hidden_state_layer_ids"
    top, nested = checkpoint.config.get(key), eagle.get(key)
    for ids in (top, nested):
        if ids is not None and not (isinstance(ids, list) and all(type(k) is int for k in ids)):
            raise UserError(f"{path} has eagle_aux_hidden_state_layer_ids {ids!r}; a list of integers is needed")
    if min(top or [0]) < 0 or min(nested or [0]) < -1:
        raise UserError(f"{path} has feature ids below the first layer, {top or nested}; engines never give these")
    if top:
        if nested and [k + 1 for k in nested] != top:
            notes.append(f"the feature ids {top} (vLLM) and {nested} (SGLang, one less) disagree; {top} was taken")
        return tuple(top)
    if nested:
        notes.append(f"the feature ids {nested} are outputs of layers counted from zero; taken as one more each")
        return tuple(k + 1 for k in nested)
    if eagle.get("layer_ids"):
        raise UserError(
            f"{path} has its feature ids in eagle_config.layer_ids alone, which hands count differently; write "
            "them as eagle_aux_hidden_state_layer_ids, each the number of layers passed"
        )
    usual = default_taps(target.layers)
    if top is not None or nested is not None:
        notes.append(f"the list of feature ids is empty; taken as the default {list(usual)}")
    return usual


# -- vocabulary maps -------------------------------------------------------------------------------------------------
def read_maps(state: dict[str, Tensor], config: Eagle3Config, where: Path, notes: list[str]) -> dict[str, Tensor]:
    """The state with ``d2t`` [D] as int64 offsets and ``t2d`` [V] as booleans, each derived from the other if absent.

    With the full vocabulary, maps that change nothing are left out: engines refuse them. What was done is noted.
    Raises ``UserError`` for maps that tell no set of target ids; what they tell is checked elsewhere.
    """
    state = dict(state)
    for name in ("d2t", "t2d"):
        if name in state:
            state[name] = _integers(name, state[name], where, notes)
    if config.draft_vocab_size == config.target_vocab_size:
        for name in [n for n in ("d2t", "t2d") if n in state and bool((state[n] == (n == "t2d")).all())]:
            notes.append(f"{name} was left out: it maps the full vocabulary onto itself")
            del state[name]
        return state
    if "d2t" not in state and "t2d" not in state:
        return state
    if "d2t" not in state:
        ids_D = state["t2d"].nonzero().flatten()
        state["d2t"] = ids_D - torch.arange(len(ids_D))
        notes.append("d2t is not in the file; derived from t2d")
    elif state["d2t"].ndim == 1:
        _settle_offsets(state, config.target_vocab_size, where, notes)
    if not state["d2t"].any():
        notes.append(f"d2t is zero throughout: the draft can say the ids 0 to {len(state['d2t']) - 1} alone")
    if "t2d" not in state and state["d2t"].ndim == 1:
        ids_D = state["d2t"] + torch.arange(len(state["d2t"]))
        if not _inside(ids_D, config.target_vocab_size):
            raise UserError(f"{where}: d2t points outside the target's vocabulary of {config.target_vocab_size}")
        state["t2d"] = torch.isin(torch.arange(config.target_vocab_size), ids_D)
        notes.append("t2d is not in the file; derived from d2t")
    return state


def _integers(name: str, tensor: Tensor, where: Path, notes: list[str]) -> Tensor:
    """The map in the type that engines read; whole numbers of any other integer type are taken, and noted."""
    wanted = torch.int64 if name == "d2t" else torch.bool
    if tensor.dtype == wanted:
        return tensor
    kind = dtype_name(tensor.dtype)
    if tensor.is_floating_point() or tensor.is_complex():
        raise UserError(f"{where}: {name} is {kind}, which does not hold every id; save it with integers")
    if name == "t2d" and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise UserError(f"{where}: t2d is {kind} with other values than 0 and 1; it must mark target ids")
    notes.append(f"{name} was {kind}; taken as {dtype_name(wanted)}")
    return tensor.to(wanted)


def _settle_offsets(state: dict[str, Tensor], rows: int, where: Path, notes: list[str]) -> None:
    """Turn a ``d2t`` of target ids into offsets where it certainly holds ids; refuse it where it may."""
    found_D = state["d2t"]
    numbers_D = torch.arange(len(found_D))
    growing = len(found_D) > 1 and bool((found_D[1:] > found_D[:-1]).all())
    if not growing or not _inside(found_D, rows):
        return  # offsets, or nothing at all
    told = state.get("t2d")
    if told is not None and told.shape == (rows,):
        sure = bool(told[found_D].all()) and int(told.sum()) == len(found_D)
    else:
        sure = not _inside(found_D + numbers_D, rows)
        if not sure and len(found_D) >= MANY:
            raise UserError(
                f"{where}: d2t grows at every step, as target ids do and offsets hardly ever; it must hold offsets "
                "(target id = i + d2t[i]), with t2d beside it where it does"
            )
    ids_D = found_D + numbers_D
    if sure and not (told is not None and _inside(ids_D, len(told)) and bool(told[ids_D].all())):
        state["d2t"] = found_D - numbers_D
        notes.append("d2t held target ids; taken as such and turned into offsets")


def check_vocabulary_map(state: Mapping[str, Tensor], config: Eagle3Config, where: str | Path) -> None:
    """The maps must describe one ascending set of target ids. Raises ``UserError``.

    ``d2t`` [D] holds offsets (target id = i + d2t[i]); ``t2d`` [V] marks the ids that the draft can say.
    """
    if config.draft_vocab_size > config.target_vocab_size:
        raise UserError(f"{where}: a draft vocabulary of {config.draft_vocab_size} exceeds the target's")
    if config.draft_vocab_size == config.target_vocab_size:
        return
    ids_D = state["d2t"] + torch.arange(config.draft_vocab_size)
    if not _inside(ids_D, config.target_vocab_size):
        raise UserError(f"{where}: d2t points outside the target's vocabulary of {config.target_vocab_size}")
    if not bool((ids_D[1:] > ids_D[:-1]).all()):
        raise UserError(f"{where}: d2t must hold offsets that give ascending target ids (id = i + d2t[i])")
    if not torch.equal(state["t2d"].nonzero().flatten(), ids_D):
        raise UserError(f"{where}: t2d does not mark the same target ids as d2t")


def _inside(ids_D: Tensor, rows: int) -> bool:
    return bool(((ids_D >= 0) & (ids_D < rows)).all())
