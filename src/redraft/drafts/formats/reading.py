"""Reading checkpoints of other hands: finding their files and their tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from redraft.artifact import dtype_name, read_json, read_pickled, read_tensors
from redraft.drafts.files import META_FILE
from redraft.drafts.formats.base import CONFIG_FILE
from redraft.drafts.formats.meaning import Reading, TensorFacts
from redraft.errors import UserError
from redraft.files import settle
from redraft.loading.places import ADAPTER_FILE, EMBEDDED_PREFIX
from redraft.places import at_home
from redraft.values import Values

Built = TypeVar("Built")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "model*.bin")
PICKLED_INDEX = "pytorch_model.bin.index.json"
# Vocabulary maps in files of their own.
SIDECARS = ("d2t.pt", "t2d.pt", "d2t.npy", "t2d.npy", "vocab_mapping.pt")
TRAINING_STATE = "training_state.pt"
# Compared with the target's where a checkpoint ships one.
TOKENIZER = "tokenizer.json"
ADAPTER_WEIGHTS = "adapter_model"
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

# Keys that a config.json carries along and nothing is computed with.
BOOKKEEPING = (
    *("architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "attention_dropout", "pretraining_tp"),
    *("_name_or_path", "has_no_defaults_at_init", "is_decoder", "is_encoder_decoder", "output_attentions"),
    *("output_hidden_states", "return_dict", "chunk_size_feed_forward", "problem_type", "id2label", "label2id"),
)

# Older names of the same tensors.
LEGACY = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"^layers\.0\."), "midlayer."),
    (re.compile(r"^aux_norm_low\."), "fc_norm.0."),
    (re.compile(r"^aux_norm_mid\."), "fc_norm.1."),
    (re.compile(r"^aux_norm_high\."), "fc_norm.2."),
)


FROM_GGUF = (
    "a GGUF file is for llama.cpp and is not read back: name the checkpoint that it was made from (of an export of "
    "redraft the draft that was exported, as a run's merged folder)"
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
        if (folder / ADAPTER_FILE).is_file() and not _whole_weights(folder):
            return cls(str(source), folder)
        if (folder / META_FILE).is_file():
            meta = read_json(folder / META_FILE, finite=False)
            if not meta:
                raise UserError(f"{folder / META_FILE} is an empty object; copy the artifact again")
            return cls(str(source), folder, meta=meta)
        if not (folder / CONFIG_FILE).is_file():
            gguf = any(folder.glob("*.gguf"))
            mend = FROM_GGUF if gguf else "name the folder of a draft"
            raise UserError(f"{folder} holds no draft: no {CONFIG_FILE} and no {META_FILE}; {mend}")
        config = read_json(folder / CONFIG_FILE, finite=False)
        if not config:
            raise UserError(f"{folder / CONFIG_FILE} is an empty object; download the checkpoint again")
        named = config.get("architectures") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise UserError(f"{folder / CONFIG_FILE} has architectures {repr(named)[:60]}; a list of names is needed")
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
    folder = at_home(source)
    settle(folder)
    if os.path.isdir(folder):  # false for a name that no system takes, where the Path's own method raises
        return folder
    if os.path.exists(folder):
        mend = FROM_GGUF if folder.suffix == ".gguf" else "name the folder of the checkpoint"
        raise UserError(f"{source} is a file; {mend}")
    _private_of_run(folder)
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(f"{source} does not exist; name the folder of a draft checkpoint or a model id on the hub")
    from huggingface_hub import snapshot_download

    try:
        patterns = [CONFIG_FILE, META_FILE, "*.safetensors", INDEX_FILE, TOKENIZER, *SIDECARS]
        found = Path(snapshot_download(str(source), allow_patterns=patterns, etag_timeout=10))
        if not any(found.glob("*.safetensors")):
            found = Path(
                snapshot_download(str(source), allow_patterns=[*patterns, *PICKLED, PICKLED_INDEX], etag_timeout=10)
            )
        return found
    except Exception as error:  # the hub client raises many kinds; to the user they are one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source} is no folder here and could not be fetched as a model id ({reason}); "
            "check the name and the connection, or download the checkpoint and name its folder"
        ) from error


def _private_of_run(folder: Path) -> None:
    """Raise ``UserError`` where ``folder`` is the private part that a run did not write, and say why."""
    merged = folder.parent / "merged"
    if folder.name != "private" or not (merged / META_FILE).is_file():
        return
    guard = read_json(merged / META_FILE).get("guard")
    if isinstance(guard, dict) and guard.get("kept") == "old":
        why = "the run kept the old draft, since the trained one was no better on held-out answers"
    else:
        why = "the run trained the draft as a whole"
    raise UserError(f"{folder} was not written: {why}; give the run's draft, {merged}, which needs no base draft")


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
    safe = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(ADAPTER_WEIGHTS))
    old = sorted({file for pattern in PICKLED for file in folder.glob(pattern)})
    for index, found in ((INDEX_FILE, safe), (PICKLED_INDEX, old)):
        if (folder / index).is_file() and (found or index == INDEX_FILE):
            return _listed(folder, index)
        if found:
            return found
    pickles = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in PICKLES]
    if TRAINING_STATE in pickles:
        raise UserError(
            f"{folder} holds {TRAINING_STATE}, a state of SpecForge's training, which is more than tensors; write the "
            "draft with its own export (to_hf) and give that folder"
        )
    what = f"only {', '.join(pickles[:3])}, and pickle is never run" if pickles else "no weights"
    raise UserError(f"{folder} holds {what}; convert the weights to safetensors first")


def _whole_weights(folder: Path) -> bool:
    """Whether there are weights beside those of an adapter: ModelOpt puts one for the target beside its drafts."""
    return any(not file.name.startswith(ADAPTER_WEIGHTS) for file in folder.glob("*.safetensors"))


def _listed(folder: Path, index: str) -> list[Path]:
    """The files of an index. Raises ``UserError``."""
    listed = read_json(folder / index, finite=False).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise UserError(f"{folder / index} has no weight_map; download it again")
    outside = next((name for name in listed.values() if name in ("", ".", "..") or Path(name).name != name), None)
    if outside is not None:
        raise UserError(f"{folder / index} lists {outside!r}, which is no file of this folder; download it again")
    files = sorted({folder / name for name in listed.values()})
    whole = folder / index.removesuffix(".index.json")
    if whole.is_file() and whole not in files:
        raise UserError(f"{folder} holds {whole.name} and {index} with other files; delete the older weights")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{folder} lacks the weight file {absent[0]} that {index} lists; download it again")
    return files


# -- what all families ask of a file ---------------------------------------------------------------------------------
def facts_of(state: Mapping[str, Tensor]) -> dict[str, TensorFacts]:
    """Type and shape of every tensor."""
    return {name: TensorFacts(dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()}


def refuse_code(checkpoint: Checkpoint, reading: Reading) -> None:
    """Raise ``UserError`` for a checkpoint whose layers are Python code of its own, which is never run.

    The speculators package writes an entry without a name for its own config class, which says nothing of layers.
    """
    auto = checkpoint.config.get("auto_map")
    if auto is not None and not isinstance(auto, dict):
        raise UserError(f"{checkpoint.path} has auto_map {str(auto)[:60]!r}; an object is needed")
    named = sorted(str(key) for key in auto or {} if key)
    if named:
        raise UserError(
            f"{checkpoint.path} asks to run Python code of its own (auto_map: {named[0]}), which redraft never does; "
            "where the draft is an ordinary one, delete auto_map from the config"
        )
    for file in sorted(checkpoint.folder.glob("*.py")):
        reading.take(file.name, None, "dropped", "code of a checkpoint is never run")


def note_dropped(values: Values, read: Collection[str], reading: Reading) -> None:
    """Enter what stands in the config, or in a part of it, and is not used, but for what all checkpoints carry."""
    for key, value in values.values.items():
        if key not in read and key not in BOOKKEEPING and value is not None:
            shown = value if isinstance(value, (bool, int, float, str)) else str(value)[:60]
            reading.take(f"{values.inside}{key}", shown, "dropped", values.word(key))


def note_adapter(folder: Path, reading: Reading) -> None:
    """Enter an adapter that lies beside a draft: it is the target's, and was trained along with the draft."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        return
    about = read_json(file)
    told = {key: about.get(key) for key in ("peft_type", "r", "lora_alpha", "target_modules")}
    shown = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)[:120]
    reading.take(ADAPTER_FILE, shown, "dropped", "an adapter for the target, trained along with the draft")
    reading.notes.append(
        f"{ADAPTER_FILE} beside the draft is an adapter for the target, trained along with it (nvidia-modelopt's "
        "eagle_base_lora): the draft reads the states of the target with it, which `redraft merge-target --target BASE "
        f"--adapter {folder}` writes"
    )


def build_untrained(build: Callable[[], Built], path: Path) -> Built:
    """What ``build`` makes of a config. Raises ``UserError`` where that is no draft."""
    try:
        return build()
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} describes no draft that can be built: {type(error).__name__} {first}") from error
