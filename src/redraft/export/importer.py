"""The inverse of the exporters: a public Eagle3 checkpoint, in either format, as a draft of ours.

Strict: every missing, extra, misshaped or non-finite tensor is named, and an option that our draft does not compute
is refused by its name rather than dropped. No pickle is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from redraft.artifact import META_FILE, check_tensors, fill, load_draft, read_json, read_tensors, settle
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, check_fit
from redraft.errors import UserError
from redraft.export.base import CONFIG_FILE, TargetInfo, check_taps, check_vocabulary_map
from redraft.target import default_taps

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
EAGLE3_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")

# Older names of the same tensors.
LEGACY = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"^layers\.0\."), "midlayer."),
    (re.compile(r"^aux_norm_low\."), "fc_norm.0."),
    (re.compile(r"^aux_norm_mid\."), "fc_norm.1."),
    (re.compile(r"^aux_norm_high\."), "fc_norm.2."),
)


def import_checkpoint(
    source: str | Path, target: Any, taps: tuple[int, ...] | None = None
) -> tuple[Eagle3Draft, dict[str, Any]]:
    """A draft from a folder or a hub id: speculators format, plain format, or redraft's own.

    ``target`` is whatever :meth:`TargetInfo.of` takes; ``taps`` overrules the checkpoint's feature ids. Tensors keep
    their dtypes. Returns the draft and its metadata: format, source, verifier, notes and the config as it was found.
    Raises ``UserError`` when the source cannot be read, is no Eagle3 checkpoint, or does not fit the target.
    """
    info, folder = TargetInfo.of(target), fetch(source)
    if (folder / META_FILE).is_file():
        draft, meta = load_draft(folder)
        check_fit(draft.config, info)
        return draft, meta | {"format": "redraft", "source": str(source), "notes": []}
    path = folder / CONFIG_FILE
    raw = read_json(path)
    notes: list[str] = []
    try:
        config = read_config(raw, info, path, notes, taps)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a value of the wrong kind: {error}") from error
    state = read_state(folder, config, notes)
    config = _with(config, own_embedding="embed_tokens.weight" in state)
    check_fit(config, info)
    check_taps(config.taps)
    draft = _untrained(config, path)
    check_tensors(state, draft.state_dict(), folder)
    check_vocabulary_map(state, config, folder)
    fill(draft, state)
    meta = {"family": "eagle3", "method": None, "format": "speculators" if _speculators(raw) else "plain"}
    meta |= {"source": str(source), "verifier": _verifier(raw), "notes": notes, "source_config": raw}
    return draft, meta


def _untrained(config: Eagle3Config, path: Path) -> Eagle3Draft:
    try:
        return Eagle3Draft(config)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} describes no draft that can be built: {type(error).__name__} {error}") from error


# -- finding the files -----------------------------------------------------------------------------------------------
def fetch(source: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (config and safetensors only). Raises ``UserError``."""
    folder = Path(source).expanduser()
    settle(folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source} is a file; name the folder of the checkpoint")
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(f"{source} does not exist; name the folder of a draft checkpoint or a model id on the hub")
    from huggingface_hub import snapshot_download

    try:
        patterns = [CONFIG_FILE, META_FILE, "*.safetensors", INDEX_FILE]
        return Path(snapshot_download(str(source), allow_patterns=patterns, etag_timeout=10))
    except Exception as error:  # the hub client raises many kinds; to the user they are one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source} is no folder here and could not be fetched as a model id ({reason}); "
            "check the name and the connection, or download the checkpoint and name its folder"
        ) from error


def read_state(folder: Path, config: Eagle3Config, notes: list[str]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint under our names, from one or several safetensors files. Raises ``UserError``."""
    if (folder / INDEX_FILE).is_file():
        listed = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise UserError(f"{folder / INDEX_FILE} has no weight_map; download it again")
        files = sorted({folder / Path(name).name for name in listed.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in PICKLES]
        found = f"only {', '.join(pickles[:3])}, and pickle is never read" if pickles else "no weights"
        raise UserError(f"{folder} holds {found}; convert the weights to safetensors first")
    state: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            ours = rename(name)
            if ours.endswith("rotary_emb.inv_freq"):
                notes.append(f"{name} was left out: the angles follow from the config")
                continue
            if ours in state:
                raise UserError(f"{file} holds {name} a second time (as {ours}); keep one of them")
            state[ours] = tensor
    return _drop_identity_maps(state, config, notes)


def rename(name: str) -> str:
    """Our name of a tensor."""
    for pattern, ours in LEGACY:
        name = pattern.sub(ours, name)
    return name


def _drop_identity_maps(state: dict[str, Tensor], config: Eagle3Config, notes: list[str]) -> dict[str, Tensor]:
    """With the full vocabulary, maps that change nothing are left out: engines refuse them."""
    if config.draft_vocab_size != config.target_vocab_size:
        return state
    for name, identity in (("d2t", lambda t: not t.any()), ("t2d", lambda t: bool(t.all()))):
        if name in state and identity(state[name]):
            notes.append(f"{name} was left out: it maps the full vocabulary onto itself")
            del state[name]
    return state


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
    llama = _llama(layer, path)
    options: dict[str, Any] = {key: bool(raw.get(key, False)) for key in ("norm_before_fc", "fc_norm", "norm_output")}
    options["norm_before_fc"] = bool(eagle.get("norm_before_fc", options["norm_before_fc"]))
    options["fc_norm"] = options["fc_norm"] or bool(raw.get("use_aux_norm", False))
    if options["norm_before_fc"] and options["fc_norm"]:
        raise UserError(f"{path} asks for norm_before_fc and fc_norm at once; no trainer makes such a draft")
    # Absent, the switch is on in vLLM's reading of the speculators format and off in that of the plain one.
    residual = raw.get("norm_before_residual")
    if residual is None and _speculators(raw):
        notes.append("norm_before_residual is not in the config; taken as true, as vLLM does")
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
        rope_parameters=_rope(llama.rope_parameters),
        max_position_embeddings=llama.max_position_embeddings,
        attention_bias=bool(llama.attention_bias),
        norm_before_residual=_speculators(raw) if residual is None else bool(residual),
        **options,
    )


def _check_kind(raw: dict[str, Any], layer: dict[str, Any], eagle: dict[str, Any], path: Path) -> None:
    """Raise ``UserError`` unless this is an Eagle3 draft of one dense Llama layer that our draft computes alike."""
    if _speculators(raw):
        if raw["speculators_model_type"] != "eagle3":
            raise UserError(f"{path} is a {raw['speculators_model_type']} speculator; only eagle3 can be imported")
    elif not set(raw.get("architectures") or ()) & set(EAGLE3_ARCHITECTURES):
        known = ", ".join(EAGLE3_ARCHITECTURES)
        raise UserError(f"{path} has architectures {raw.get('architectures')}; an Eagle3 draft has one of {known}")
    bias = layer.get("attention_bias", False)
    wanted = {
        "model_type": (layer.get("model_type") or "llama", ("llama", "eagle3")),
        "num_hidden_layers": (layer.get("num_hidden_layers", 1), (1,)),
        "hidden_act": (layer.get("hidden_act") or "silu", ("silu",)),
        "mlp_bias": (bool(layer.get("mlp_bias")), (False,)),
        "bias": (bool(layer.get("bias")), (False,)),
        "qkv_bias": (bool(layer.get("qkv_bias", bias)), (bool(bias),)),
        "sliding_attention": ("sliding_attention" in (layer.get("layer_types") or ()), (False,)),
        "logit_scale": (layer.get("logit_scale") or 1.0, (1.0,)),
        "use_aux_hidden_state": (eagle.get("use_aux_hidden_state", True), (True,)),
        "quantization_config": (bool(raw.get("quantization_config")), (False,)),
        "partial_rotary_factor": (_partial_rotary(layer), (1.0,)),
    }
    faults = [f"{key} {value!r}" for key, (value, allowed) in wanted.items() if value not in allowed]
    if faults:
        raise UserError(f"{path} asks for what redraft does not compute: {', '.join(faults)}")


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Without the older key ``type`` and the older name ``su``; transformers has merged all else."""
    ours = {key: value for key, value in parameters.items() if key != "type"}
    return ours | {"rope_type": "longrope" if ours.get("rope_type") == "su" else ours.get("rope_type", "default")}


def _partial_rotary(layer: dict[str, Any]) -> float:
    places = (layer, layer.get("rope_parameters") or {}, layer.get("rope_scaling") or {})
    return next((place["partial_rotary_factor"] for place in places if place.get("partial_rotary_factor")), 1.0)


def _llama(layer: dict[str, Any], path: Path) -> Any:
    """The layer's keys through transformers' own Llama config: engines fill absent keys with the same defaults."""
    values = copy.deepcopy(layer)
    values["model_type"] = "llama"
    values["architectures"] = None
    try:
        return LlamaConfig.from_dict(values)
    except Exception as error:  # validation raises several kinds; all mean a bad value in the file
        raise UserError(f"{path} is not a usable config: {' '.join(str(error).split())[:200]}") from error


def read_taps(
    raw: dict[str, Any], eagle: dict[str, Any], target: TargetInfo, path: Path, notes: list[str]
) -> tuple[int, ...]:
    """Feature ids, each "after k layers". Raises ``UserError`` when they are no list of integers.

    The ids on top are those of vLLM and mean that. The ids in ``eagle_config`` are those of SGLang and of the
    trainers that write them, and mean the output of layer k, counted from zero: one less.
    """
    top, nested = raw.get("eagle_aux_hidden_state_layer_ids"), eagle.get("eagle_aux_hidden_state_layer_ids")
    for ids in (top, nested):
        if ids is not None and not (isinstance(ids, list) and ids and all(type(k) is int for k in ids)):
            raise UserError(f"{path} has eagle_aux_hidden_state_layer_ids {ids!r}; a list of integers is needed")
    if top is not None:
        if nested is not None and [k + 1 for k in nested] != top:
            notes.append(f"the feature ids {top} (vLLM) and {nested} (SGLang, one less) disagree; {top} was taken")
        return tuple(top)
    if nested is not None:
        notes.append(f"the feature ids {nested} are outputs of layers counted from zero; taken as one more each")
        return tuple(k + 1 for k in nested)
    return default_taps(target.layers)


def _with(config: Eagle3Config, **changes: Any) -> Eagle3Config:
    return Eagle3Config(**{**config.__dict__, **changes})
