"""The inverse of the exporters: a public Eagle3 or Eagle1 checkpoint, in any of their formats, as a draft of ours.

Strict: every missing, extra, misshaped or non-finite tensor is named, and an option that our draft does not compute
is refused by its name rather than dropped. No pickle is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redraft.artifact import META_FILE, check_tensors, fill, load_draft, read_json
from redraft.drafts.base import Draft, check_fit
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.drafts.standalone import StandaloneDraft
from redraft.errors import UserError
from redraft.export import eagle1_format
from redraft.export.base import CONFIG_FILE, TargetInfo, check_taps, check_vocabulary_map
from redraft.export.maps import read_maps
from redraft.export.reading import build_untrained, fetch, layer_faults, read_layer, read_rope, read_state
from redraft.loading import ADAPTER_FILE, EMBEDDED_PREFIX
from redraft.target import default_taps

EAGLE3_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")

# Keys that a mixture of experts has.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# What our layer, and that of engines, does whatever ``eagle_config`` says.
EAGLE_SWITCHES = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "use_aux_norm")


def is_language_model(source: str | Path) -> bool:
    """Whether a draft is a causal LM of its own, a standalone draft, and none that reads the target's states.

    ``source`` is a folder of any kind, a hub id or ``embedded:NAME``. Raises ``UserError`` when it cannot be read.
    """
    if str(source).startswith(EMBEDDED_PREFIX) or (Path(source) / ADAPTER_FILE).is_file():
        return True
    folder = fetch(source)
    if (folder / META_FILE).is_file():
        return read_json(folder / META_FILE).get("family") == StandaloneDraft.family
    raw = read_json(folder / CONFIG_FILE)
    named = [name for name in raw.get("architectures") or () if isinstance(name, str)]
    if _speculators(raw) or set(named) & set(EAGLE3_ARCHITECTURES):
        return False
    # EAGLE's own checkpoints, of one layer, name their target's architecture.
    if raw.get("num_hidden_layers", 1) == 1 and eagle1_format.kind_of(raw, folder):
        return False
    return any(name.endswith("ForCausalLM") and name not in eagle1_format.ARCHITECTURES for name in named)


def import_checkpoint(
    source: str | Path, target: Any, taps: tuple[int, ...] | None = None
) -> tuple[Draft, dict[str, Any]]:
    """A draft from a folder or a hub id: an Eagle3 one in the speculators or plain format, an Eagle1 one as vLLM,
    SGLang or EAGLE's own code has them, or redraft's own format.

    ``target`` is whatever :meth:`TargetInfo.of` takes; ``taps`` overrules the feature ids of an Eagle3 checkpoint.
    Tensors keep their dtypes. Returns the draft and its metadata: family, format, source, verifier, notes and the
    config as it was found. Raises ``UserError`` when the source cannot be read, is no such checkpoint, or does not fit
    the target.
    """
    info, folder = TargetInfo.of(target), fetch(source)
    if (folder / META_FILE).is_file():
        if read_json(folder / META_FILE).get("family") == "standalone":
            raise UserError(f"{source} is a standalone draft, where one that reads the target's states is needed")
        found, meta = load_draft(folder)
        check_fit(found.config, info)
        return found, meta | {"format": "redraft", "source": str(source), "notes": []}
    path = folder / CONFIG_FILE
    raw = read_json(path)
    notes: list[str] = []
    draft: Draft
    try:
        _check_architectures(raw, path)
        if kind := eagle1_format.kind_of(raw, folder):
            draft = eagle1_format.read(raw, kind, info, folder, notes)
            meta = {"family": "eagle1", "format": kind, "verifier": None}
        else:
            draft = _read_eagle3(raw, info, folder, notes, taps)
            meta = {"family": "eagle3", "format": "speculators" if _speculators(raw) else "plain"}
            meta["verifier"] = _verifier(raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a value of the wrong kind: {error}") from error
    return draft, meta | {"method": None, "source": str(source), "notes": notes, "source_config": raw}


def _read_eagle3(
    raw: dict[str, Any], info: TargetInfo, folder: Path, notes: list[str], taps: tuple[int, ...] | None
) -> Eagle3Draft:
    path = folder / CONFIG_FILE
    config = read_config(raw, info, path, notes, taps)
    state = read_maps(read_state(folder, notes), config, folder, notes)
    config = _with(config, own_embedding="embed_tokens.weight" in state)
    check_fit(config, info)
    check_taps(config.taps)
    draft = build_untrained(lambda: Eagle3Draft(config), path)
    check_tensors(state, draft.state_dict(), folder)
    check_vocabulary_map(state, config, folder)
    fill(draft, state)
    return draft


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
    llama = read_layer(layer, path)
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
    theta, taken = layer.get("rope_theta"), llama.rope_parameters.get("rope_theta")
    if theta is not None and theta != taken:
        notes.append(
            f"rope_theta {theta} and that of rope_parameters disagree; {taken} was taken, as transformers does"
        )
    vocabulary = raw.get("draft_vocab_size")
    return Eagle3Config(
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        target_hidden_size=int(raw.get("target_hidden_size") or llama.hidden_size),
        target_vocab_size=llama.vocab_size,
        draft_vocab_size=int(llama.vocab_size if vocabulary is None else vocabulary),
        taps=tuple(taps) if taps is not None else read_taps(raw, eagle, target, path, notes),
        rms_norm_eps=float(llama.rms_norm_eps),
        rope_parameters=read_rope(llama.rope_parameters),
        max_position_embeddings=llama.max_position_embeddings,
        attention_bias=bool(llama.attention_bias),
        norm_before_residual=_speculators(raw) if residual is None else bool(residual),
        **options,
    )


def _check_architectures(raw: dict[str, Any], path: Path) -> None:
    if not isinstance(raw.get("architectures") or [], list):
        raise UserError(f"{path} has architectures {raw['architectures']!r}; a list of names is needed")


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
    elif not set(raw.get("architectures") or ()) & set(EAGLE3_ARCHITECTURES):
        known = ", ".join(EAGLE3_ARCHITECTURES)
        experts = next((f" with {key} {raw[key]!r}, a mixture of experts" for key in EXPERTS if raw.get(key)), "")
        raise UserError(
            f"{path} has architectures {raw.get('architectures')}{experts}; a dense Eagle3 draft has one of {known}, "
            f"an Eagle1 draft one of {', '.join(eagle1_format.ARCHITECTURES)}"
        )
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


def _with(config: Eagle3Config, **changes: Any) -> Eagle3Config:
    return Eagle3Config(**{**config.__dict__, **changes})
