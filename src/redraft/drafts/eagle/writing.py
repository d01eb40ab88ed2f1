"""Writing drafts of one decoder layer: a config.json with a Llama's keys, and safetensors.

Shared by the families whose drafts are such a layer. Facts: vLLM 0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from redraft.artifact import check_tensors, tensors_bytes, tensors_hash, write_tensors
from redraft.drafts.eagle.module import EagleDraft
from redraft.drafts.formats.base import CONFIG_FILE, WEIGHTS_FILE, ExportReport, TargetInfo
from redraft.drafts.formats.reading import LAYER_FIELDS
from redraft.drafts.opening import read_draft
from redraft.errors import UserError
from redraft.files import atomic_folder, atomic_write_json

EXPORTED_FILES = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}

# Rotary types whose angles do not depend on max_position_embeddings, so that it may be raised.
FREE_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class LayerWriter:
    """A format of such drafts: a :class:`redraft.drafts.formats.base.Writer`.

    ``check`` gives the dense draft and notes, ``config`` the whole config.json, ``serve`` the command; ``extra`` are
    tensors that the format asks for and the draft does not have.
    """

    name: str
    check: Callable[[Any, TargetInfo], tuple[Any, list[str]]]
    config: Callable[[Any, TargetInfo, int], dict[str, Any]]
    serve: Callable[[Path, TargetInfo, int], str]
    rename: Callable[[str], str] = str
    extra: Callable[[Any], Mapping[str, Tensor]] | None = None
    warnings: Callable[[Path], list[str]] | None = None

    def write(self, dense: Any, folder: Path, target: TargetInfo, tokens: int) -> ExportReport:
        """Write config and weights, read them back as any checkpoint is read, and only then put the folder in place.

        Raises ``UserError`` on a full disk or a folder that holds other files, and ``RuntimeError`` when reading does
        not give the same draft (a defect of ours).
        """
        state = dense.state_dict()
        renamed = {self.rename(key): tensor for key, tensor in state.items()}
        renamed |= self.extra(dense) if self.extra else {}
        with atomic_folder(folder, tensors_bytes(renamed), EXPORTED_FILES) as new:
            write_tensors(new / WEIGHTS_FILE, renamed)
            atomic_write_json(new / CONFIG_FILE, self.config(dense, target, tokens))
            back, _ = read_draft(new, target)
            if back.config != dense.config or tensors_hash(back.state_dict()) != tensors_hash(state):
                raise RuntimeError(f"the {self.name} export does not read back as the draft that was written")
        parameters = sum(parameter.numel() for parameter in dense.parameters())
        warnings = self.warnings(folder.absolute()) if self.warnings else []
        return ExportReport.of(self.name, folder, renamed, parameters, self.serve(folder, target, tokens), warnings)


# -- checks ----------------------------------------------------------------------------------------------------------
def prepare(draft: EagleDraft, target: TargetInfo) -> tuple[Any, list[str]]:
    """A dense draft that fits ``target`` and is sound in every tensor, and notes. Raises ``UserError``."""
    dense = draft.merged()
    dense.check_fit(target)
    state = {name: tensor.detach().cpu() for name, tensor in dense.state_dict().items()}
    check_tensors(state, type(dense)(dense.config).state_dict(), "the draft to be exported")
    return cover_context(dense, target)


def cover_context(draft: EagleDraft, target: TargetInfo) -> tuple[EagleDraft, list[str]]:
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
    return draft.rebuilt(replace(config, max_position_embeddings=target.context), draft.state_dict()), [note]


# -- config.json -----------------------------------------------------------------------------------------------------
def layer_config(draft: EagleDraft) -> dict[str, Any]:
    """The keys that describe the decoder layer in the terms of a Hugging Face Llama config, none left to defaults."""
    return {ours.removeprefix("target_"): getattr(draft.config, ours) for ours in LAYER_FIELDS} | {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def dtype_name(draft: EagleDraft) -> str:
    return str(draft.fc.weight.dtype).removeprefix("torch.")


def legacy_rope(parameters: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """``rope_theta`` and ``rope_scaling``, which older engines read and newer ones turn into ``rope_parameters``."""
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = rest.get("rope_type", "default") == "default" and set(rest) <= {"rope_type"}
    return parameters.get("rope_theta", 10000.0), None if plain else rest


def to_layers(name: str) -> str:
    """This format numbers its layers: ``midlayer.x`` is ``layers.0.x``."""
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
