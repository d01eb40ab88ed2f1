"""What every exporter shares: facts about the target, the checks before a file is written, and the report.

An exporter is a function ``export(draft, folder, target, *, speculative_tokens) -> ExportReport``, registered by
name. It writes a complete checkpoint or raises ``UserError`` and leaves nothing behind: engines fill what is absent
with zeros or noise and say nothing, so completeness is checked here.

Shape legend: D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from redraft.artifact import (
    atomic_folder,
    atomic_write_json,
    check_tensors,
    tensors_bytes,
    tensors_hash,
    write_tensors,
)
from redraft.drafts.base import AnyDraft, Draft, check_fit
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.drafts.experts import merge_private
from redraft.errors import UserError
from redraft.registry import Registry

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
EXPORTED_FILES = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}

# Parts of a path that change which speculative method vLLM takes the draft for.
TELLING_PATH_PARTS = ("eagle-", "eagle3", "dflash", "dspark")

# Rotary types whose angles do not depend on max_position_embeddings, so that it may be raised.
FREE_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class TargetInfo:
    """The facts about a target that fitting, importing and exporting a draft need."""

    name: str
    hidden_size: int
    layers: int
    vocab_size: int
    context: int
    architectures: tuple[str, ...] = ("LlamaForCausalLM",)
    # Where it is at hand; language models as drafts are compared with it.
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, source: Any, name: str = "") -> TargetInfo:
        """From ``redraft.target.Facts`` (a target is one), a Hugging Face config, also of more than text, or itself."""
        if isinstance(source, TargetInfo):
            return source
        config = getattr(source, "config", source)
        # A target's config is that of its text part; engines know the model by the whole one's name.
        whole = getattr(source, "whole_config", config)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return cls(
            name=name or getattr(source, "name", "") or getattr(config, "_name_or_path", "") or "",
            hidden_size=int(text.hidden_size),
            layers=int(text.num_hidden_layers),
            vocab_size=int(text.vocab_size),
            context=int(text.max_position_embeddings),
            architectures=tuple(getattr(whole, "architectures", None) or ("LlamaForCausalLM",)),
            tokenizer=getattr(source, "tokenizer", None),
        )


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the reader should know. ``serve`` is the command that loads it."""

    format: str
    folder: Path
    tensors: int
    parameters: int
    bytes: int
    merged_private: bool
    serve: str
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "folder": str(self.folder), "warnings": list(self.warnings)}


class Exporter(Protocol):
    """``target`` is whatever :meth:`TargetInfo.of` takes."""

    # A family that the format does not hold is refused by name.
    def __call__(self, draft: Any, folder: str | Path, target: Any, *, speculative_tokens: int = 5) -> ExportReport: ...


EXPORTERS: Registry[Exporter] = Registry("export format", package="redraft.export")


Check = Callable[[Any, TargetInfo, int], tuple[Any, list[str]]]
"""Draft, target and draft length -> the dense draft to be written, and notes. Raises ``UserError``, writes nothing."""
CHECKS: dict[str, Check] = {}


def checks(name: str) -> Callable[[Check], Check]:
    """Decorator: what the exporter ``name`` refuses, apart from its writing."""

    def file_under(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return file_under


def check_export(name: str, draft: Any, target: Any, speculative_tokens: int = 5) -> None:
    """Raise ``UserError`` where the exporter ``name`` would refuse this draft, before anything is spent on it."""
    EXPORTERS.get(name)
    if name in CHECKS:
        CHECKS[name](draft, TargetInfo.of(target), speculative_tokens)


# Formats of standalone drafts; all others hold drafts that read the target's states.
STANDALONE_FORMATS: set[str] = set()


def holds_standalone(name: str) -> Callable[[Exporter], Exporter]:
    """Decorator: file an exporter under ``name`` as a format of standalone drafts."""
    STANDALONE_FORMATS.add(name)
    return EXPORTERS.register(name)


def check_formats(names: Sequence[str], family: str) -> None:
    """Raise ``UserError`` for a format that there is not, or that holds no draft of this family."""
    for name in names:
        EXPORTERS.get(name)
        if family == "standalone" and name not in STANDALONE_FORMATS:
            raise UserError(
                f"{name} is for drafts that read the target's states; a standalone draft is a language model of its "
                "own, which every engine loads as hf; export hf"
            )
        if family != "standalone" and name in STANDALONE_FORMATS:
            raise UserError(
                f"this draft reads the target's states and is no language model, which {name} is for; export it for "
                "vllm or sglang"
            )
        if family == "eagle1" and name == "plain":
            raise UserError("an Eagle1 draft has no file that all engines load alike; export it for vllm or for sglang")


# -- checks ----------------------------------------------------------------------------------------------------------
def prepare(draft: AnyDraft, target: TargetInfo) -> tuple[AnyDraft, list[str]]:
    """A dense draft that fits ``target`` and is sound in every tensor, and notes. Raises ``UserError``."""
    notes = []
    if draft.config.private_width:
        notes.append(f"the private expert of width {draft.config.private_width} was merged into the MLP")
    if draft.config.low_rank:
        notes.append(f"the low-rank updates (rank {draft.config.low_rank}) were merged into their matrices")
    dense = merge_private(draft)
    check_fit(dense.config, target)
    if isinstance(dense, Eagle3Draft):
        check_features(dense.config)
    state = {name: tensor.detach().cpu() for name, tensor in dense.state_dict().items()}
    check_tensors(state, _untrained(dense, dense.config).state_dict(), "the draft to be exported")
    if isinstance(dense, Eagle3Draft):
        check_vocabulary_map(state, dense.config, "the draft to be exported")
    dense, raised = cover_context(dense, target)
    return dense, notes + raised


def _untrained(draft: AnyDraft, config: Any) -> AnyDraft:
    """A draft of the same family and of this config, for tensors to be put into."""
    family: Any = type(draft)
    return family(config)


def check_features(config: Eagle3Config) -> None:
    """Raise ``UserError`` for taps or norms of the features that no engine computes alike."""
    check_taps(config.taps)
    if config.norm_before_fc and config.fc_norm:
        raise UserError("norm_before_fc and fc_norm exclude each other in every engine; train a draft with one of them")


def check_taps(taps: tuple[int, ...]) -> None:
    """Engines collect features in layer order and once each, so ids must ascend strictly. Raises ``UserError``."""
    if not taps or any(after <= before for before, after in zip(taps, taps[1:], strict=False)):
        raise UserError(f"taps {list(taps)} do not ascend strictly; engines read each layer once and in layer order")


def check_vocabulary_map(state: Mapping[str, Tensor], config: Eagle3Config, where: str | Path) -> None:
    """The maps must describe one ascending set of target ids. Raises ``UserError``.

    ``d2t`` [D] holds offsets (target id = i + d2t[i]); ``t2d`` [V] marks the ids that the draft can say.
    """
    if config.draft_vocab_size > config.target_vocab_size:
        raise UserError(f"{where}: a draft vocabulary of {config.draft_vocab_size} exceeds the target's")
    if config.draft_vocab_size == config.target_vocab_size:
        return
    ids_D = state["d2t"] + torch.arange(config.draft_vocab_size)
    if int(ids_D.min()) < 0 or int(ids_D.max()) >= config.target_vocab_size:
        raise UserError(f"{where}: d2t points outside the target's vocabulary of {config.target_vocab_size}")
    if not bool((ids_D[1:] > ids_D[:-1]).all()):
        raise UserError(f"{where}: d2t must hold offsets that give ascending target ids (id = i + d2t[i])")
    member_V = torch.zeros(config.target_vocab_size, dtype=torch.bool)
    member_V[ids_D] = True
    if not torch.equal(member_V, state["t2d"].bool()):
        raise UserError(f"{where}: t2d does not mark the same target ids as d2t")


def cover_context(draft: AnyDraft, target: TargetInfo) -> tuple[AnyDraft, list[str]]:
    """Raise ``max_position_embeddings`` to the target's where that changes no angle; else raise ``UserError``."""
    config = draft.config
    if config.max_position_embeddings >= target.context:
        return draft, []
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in FREE_ROPE_TYPES:
        raise UserError(
            f"the draft covers {config.max_position_embeddings} positions and the target {target.context}; raising it "
            f"would change the {kind} rotary angles, so train the draft with the target's length"
        )
    note = f"max_position_embeddings was raised from {config.max_position_embeddings} to the target's {target.context}"
    longer = _untrained(draft, replace(config, max_position_embeddings=target.context))
    longer.load_state_dict(draft.state_dict(), strict=True, assign=True)
    return longer, [note]


def path_warnings(folder: Path) -> list[str]:
    """vLLM guesses the method from the draft's path when none is given."""
    found = [part for part in TELLING_PATH_PARTS if part in str(folder).lower()]
    if not found:
        return []
    return [f"vLLM reads a method out of the {', '.join(found)} in this path; give the method or rename the folder"]


def check_tokens(speculative_tokens: int) -> None:
    """Raise ``UserError`` for a draft length below 1."""
    if speculative_tokens < 1:
        raise UserError(f"speculative tokens must be 1 or more, not {speculative_tokens}")


# -- writing ---------------------------------------------------------------------------------------------------------
def layer_config(draft: Draft) -> dict[str, Any]:
    """The keys that describe the decoder layer in the terms of a Hugging Face Llama config, none left to defaults."""
    config = draft.config
    return {
        "model_type": "llama",
        "vocab_size": config.target_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def options(config: Eagle3Config) -> dict[str, bool]:
    """The four switches, always written: their defaults differ between the formats."""
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return {name: getattr(config, name) for name in names}


def dtype_name(draft: Draft) -> str:
    return str(draft.fc.weight.dtype).removeprefix("torch.")


def legacy_rope(parameters: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """``rope_theta`` and ``rope_scaling``, which older engines read and newer ones turn into ``rope_parameters``."""
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = rest.get("rope_type", "default") == "default" and set(rest) <= {"rope_type"}
    return parameters.get("rope_theta", 10000.0), None if plain else rest


def serve_command(folder: Path, target: TargetInfo, tokens: int, method: str = "eagle3") -> str:
    """The vLLM command that serves the target with this draft."""
    draft = json.dumps({"model": str(folder), "method": method, "num_speculative_tokens": tokens})
    return shlex.join(["vllm", "serve", target.name, "--speculative-config", draft])


def sglang_command(folder: Path, target: TargetInfo, tokens: int, algorithm: str) -> str:
    """The SGLang command that serves the target with this draft."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", target.name, "--speculative-algorithm", algorithm]
    words += ["--speculative-draft-model-path", str(folder), "--speculative-num-steps", str(tokens)]
    words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(tokens + 1)]
    return shlex.join(words)


def to_layers(name: str) -> str:
    """This format numbers its layers: ``midlayer.x`` is ``layers.0.x``."""
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


def write_checkpoint(
    name: str,
    draft: Draft,
    folder: Path,
    target: TargetInfo,
    config: dict[str, Any],
    rename: Callable[[str], str],
    read_back: Callable[[Path, TargetInfo], tuple[Draft, dict[str, Any]]],
    extra: Mapping[str, Tensor] | None = None,
) -> tuple[int, int, int]:
    """Write config and weights, read them back with the importer, and only then put the folder in place.

    ``extra`` are tensors that the format asks for and the draft does not have. Returns the counts of tensors,
    parameters and bytes. Raises ``UserError`` on a full disk or a folder that holds other files, and ``RuntimeError``
    when the importer does not give the same draft (a defect of ours).
    """
    state = draft.state_dict()
    renamed = {rename(key): tensor for key, tensor in state.items()} | dict(extra or {})
    with atomic_folder(folder, tensors_bytes(renamed), EXPORTED_FILES) as new:
        write_tensors(new / WEIGHTS_FILE, renamed)
        atomic_write_json(new / CONFIG_FILE, config)
        back, _ = read_back(new, target)
        if back.config != draft.config or tensors_hash(back.state_dict()) != tensors_hash(state):
            raise RuntimeError(f"the {name} export does not read back as the draft that was written")
    parameters = sum(p.numel() for p in draft.parameters())
    return len(renamed), parameters, tensors_bytes(renamed)
