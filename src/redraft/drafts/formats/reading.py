"""Reading checkpoints of other hands: finding their files, their tensors, and their one Llama layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from redraft.artifact import read_json, read_pickled, read_tensors
from redraft.drafts.files import META_FILE
from redraft.drafts.formats.base import CONFIG_FILE, WEIGHTS_FILE
from redraft.errors import UserError
from redraft.files import settle
from redraft.loading.places import ADAPTER_FILE, EMBEDDED_PREFIX

Built = TypeVar("Built")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
INDEX_FILE = "model.safetensors.index.json"
PICKLED = "pytorch_model*.bin"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# Fields of the layer that a Llama config has under the same name, but for ``target_``.
LAYER_FIELDS = (
    "target_vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
)

# Older names of the same tensors.
LEGACY = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"^layers\.0\."), "midlayer."),
    (re.compile(r"^aux_norm_low\."), "fc_norm.0."),
    (re.compile(r"^aux_norm_mid\."), "fc_norm.1."),
    (re.compile(r"^aux_norm_high\."), "fc_norm.2."),
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a draft lies, and what its JSON files say before any weight is read.

    ``meta`` is redraft.json and ``config`` config.json; both are empty for an embedded model, which lies in no folder,
    and for an adapter of a language model.
    """

    source: str
    folder: Path = Path()
    meta: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, source: str | Path) -> Checkpoint:
        """Look at a folder, a hub id, which is downloaded, or ``embedded:NAME``. Raises ``UserError``."""
        if str(source).startswith(EMBEDDED_PREFIX):
            return cls(str(source))
        folder = fetch(source)
        if (folder / ADAPTER_FILE).is_file():
            return cls(str(source), folder)
        if (folder / META_FILE).is_file():
            return cls(str(source), folder, meta=read_json(folder / META_FILE))
        config = read_json(folder / CONFIG_FILE)
        named = config.get("architectures") or []
        if not isinstance(named, list):
            raise UserError(f"{folder / CONFIG_FILE} has architectures {named!r}; a list of names is needed")
        return cls(str(source), folder, config=config)

    @property
    def path(self) -> Path:
        """The config.json, for messages."""
        return self.folder / CONFIG_FILE

    @property
    def architectures(self) -> set[str]:
        return {name for name in self.config.get("architectures") or () if isinstance(name, str)}


# -- finding the files -----------------------------------------------------------------------------------------------
def fetch(source: str | Path) -> Path:
    """The local folder of a checkpoint; of a hub id, config and weights are downloaded. Raises ``UserError``.

    Weights of torch's older kind are downloaded only where there are no safetensors.
    """
    if not isinstance(source, str | Path):
        raise UserError(f"{source!r} is no draft; name its folder or a model id on the hub")
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
        found = Path(snapshot_download(str(source), allow_patterns=patterns, etag_timeout=10))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(source), allow_patterns=[*patterns, PICKLED], etag_timeout=10))
        return found
    except Exception as error:  # the hub client raises many kinds; to the user they are one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source} is no folder here and could not be fetched as a model id ({reason}); "
            "check the name and the connection, or download the checkpoint and name its folder"
        ) from error


def read_state(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint under our names, from one or several files. Raises ``UserError``."""
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            notes.append(f"{file.name} was read through torch's reader of tensors alone")
        for name, tensor in (read_pickled(file) if file.suffix == ".bin" else read_tensors(file)).items():
            ours = name
            for pattern, new in LEGACY:
                ours = pattern.sub(new, ours)
            if ours.endswith("rotary_emb.inv_freq"):
                notes.append(f"{name} was left out: the angles follow from the config")
                continue
            if ours in state:
                raise UserError(f"{file} holds {name} a second time (as {ours}); keep one of them")
            state[ours] = tensor
    return state


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files: those of its index, else all safetensors, else torch's older kind.

    Raises ``UserError`` where there are none, or where an index and a whole file tell two sets of weights.
    """
    if (folder / INDEX_FILE).is_file():
        listed = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise UserError(f"{folder / INDEX_FILE} has no weight_map; download it again")
        files = sorted({folder / Path(name).name for name in listed.values()})
        if (folder / WEIGHTS_FILE).is_file() and folder / WEIGHTS_FILE not in files:
            raise UserError(
                f"{folder} holds {WEIGHTS_FILE} and {INDEX_FILE} with other files; delete the older weights"
            )
    else:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob(PICKLED))
    if not files:
        pickles = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in PICKLES]
        found = f"only {', '.join(pickles[:3])}, and pickle is never run" if pickles else "no weights"
        raise UserError(f"{folder} holds {found}; convert the weights to safetensors first")
    return files


# -- the layer -------------------------------------------------------------------------------------------------------
def check_layer(
    raw: dict[str, Any], layer: dict[str, Any], model_types: tuple[str, ...], path: Path, more: Sequence[str] = ()
) -> None:
    """Raise ``UserError`` for a config whose layer no draft of ours computes; ``raw`` is the whole file at ``path``.

    ``more`` are faults that a family found itself, in words.
    """
    bias, theta = layer.get("attention_bias", False), layer.get("rope_theta", 1.0)
    rope, scaling = layer.get("rope_parameters") or {}, layer.get("rope_scaling") or {}
    told = isinstance(rope, dict) and isinstance(scaling, dict)
    places = (layer, rope, scaling) if told else ()
    partial = [place["partial_rotary_factor"] for place in places if place.get("partial_rotary_factor")]
    wanted = {
        "model_type": (layer.get("model_type") or "llama", model_types),
        "num_hidden_layers": (layer.get("num_hidden_layers", 1), (1,)),
        "hidden_act": (layer.get("hidden_act") or "silu", ("silu",)),
        "mlp_bias": (bool(layer.get("mlp_bias")), (False,)),
        "qkv_bias": (bool(layer.get("qkv_bias", bias)), (bool(bias),)),
        "sliding_attention": ("sliding_attention" in (layer.get("layer_types") or ()), (False,)),
        "logit_scale": (layer.get("logit_scale") or 1.0, (1.0,)),
        "quantization_config": (bool(raw.get("quantization_config")), (False,)),
        "partial_rotary_factor": ((partial or [1.0])[0], (1.0,)),
    }
    faults = [f"{key} {value!r}" for key, (value, allowed) in wanted.items() if value not in allowed]
    # Rotary settings that tell no one set of angles.
    if not told:
        faults.append(f"rotary settings {rope!r} and {scaling!r}")
    else:
        if any(isinstance(value, dict) for value in rope.values()):
            faults.append("rope_parameters by kinds of layers")
        named = [place.get("rope_type") or place.get("type") for place in (rope, scaling)]
        kinds = {str(kind) for kind in named if kind}
        faults += [f"rope_type {kind!r}" for kind in sorted(kinds - {"default", "su"} - set(ROPE_INIT_FUNCTIONS))]
        if len(kinds) > 1:
            faults.append(f"rope_parameters and rope_scaling of different types, {' and '.join(sorted(kinds))}")
        if theta is None and not rope.get("rope_theta"):
            faults.append("rope_theta None")
    if faults or more:
        raise UserError(f"{path} asks for what redraft does not compute: {', '.join([*faults, *more])}")


def layer_fields(layer: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of :class:`redraft.drafts.eagle.module.EagleConfig` that a Llama config tells. Raises ``UserError``.

    Through transformers' own Llama config: engines fill absent keys with the same defaults. Rotary settings are without
    the older key ``type`` and the older name ``su``; transformers has merged all else.
    """
    values = copy.deepcopy(layer)
    values["model_type"] = "llama"
    values["architectures"] = None
    try:
        llama = LlamaConfig.from_dict(values)
    except Exception as error:  # validation raises several kinds; all mean a bad value in the file
        raise UserError(f"{path} is not a usable config: {' '.join(str(error).split())[:200]}") from error
    rope = {key: value for key, value in llama.rope_parameters.items() if key != "type"}
    kind = rope.get("rope_type", "default")
    fields = {ours: getattr(llama, ours.removeprefix("target_")) for ours in LAYER_FIELDS}
    exact = {"rms_norm_eps": float(llama.rms_norm_eps), "attention_bias": bool(llama.attention_bias)}
    return fields | exact | {"rope_parameters": rope | {"rope_type": "longrope" if kind == "su" else kind}}


def build_untrained(build: Callable[[], Built], path: Path) -> Built:
    """What ``build`` makes of a config. Raises ``UserError`` where that is no draft."""
    try:
        return build()
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} describes no draft that can be built: {type(error).__name__} {error}") from error
