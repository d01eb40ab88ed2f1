"""Writing drafts of one decoder layer: a config.json with a Llama's keys, and safetensors.

Shared by the families whose drafts are such a layer. Facts: vLLM 0.32, SGLang 0.5.23; docs/formats.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from redraft.artifact import check_tensors, dtype_name, tensors_bytes, tensors_hash, write_tensors
from redraft.drafts.eagle.module import EagleDraft
from redraft.drafts.formats.base import CONFIG_FILE, WEIGHTS_FILE, ExportReport, path_warnings, serve_command
from redraft.drafts.formats.reading import LAYER_FIELDS
from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.files import atomic_folder, atomic_write_json
from redraft.target import Facts

EXPORTED_FILES = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}

# Rotary types whose angles do not depend on max_position_embeddings, so that it may be raised.
FREE_ROPE_TYPES = ("default", "linear", "llama3")


class LayerWriter(ABC):
    """A format of such drafts: a :class:`redraft.drafts.formats.base.Writer`. A family says what its files hold."""

    def __init__(self, name: str, method: str, warns: bool = False) -> None:
        """``method`` is what the engine calls the way in which it drafts; ``warns`` of paths that tell it another."""
        self.name, self.method, self.warns = name, method, warns

    @abstractmethod
    def check(self, draft: Any, target: Facts) -> tuple[Any, list[str]]:
        """The dense draft as the format's engine computes it, and notes. Raises ``UserError``."""

    @abstractmethod
    def config(self, draft: Any, target: Facts, tokens: int) -> dict[str, Any]:
        """The whole config.json."""

    @abstractmethod
    def tensors(self, draft: Any) -> dict[str, Tensor]:
        """The tensors by the format's names, with those that it asks for and the draft does not have."""

    def write(self, dense: Any, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Write config and weights, read them back as any checkpoint is read, and only then put the folder in place.

        Raises ``UserError`` on a full disk or a folder that holds other files, and ``RuntimeError`` when reading does
        not give the same draft (a defect of ours).
        """
        written = self.tensors(dense)
        with atomic_folder(folder, tensors_bytes(written), EXPORTED_FILES) as new:
            write_tensors(new / WEIGHTS_FILE, written)
            atomic_write_json(new / CONFIG_FILE, self.config(dense, target, tokens))
            back = open_checkpoint(new, target).draft
            if back.config != dense.config or tensors_hash(back.state_dict()) != tensors_hash(dense.state_dict()):
                raise RuntimeError(f"the {self.name} export does not read back as the draft that was written")
        parameters = sum(parameter.numel() for parameter in dense.parameters())
        warnings = path_warnings(folder.absolute()) if self.warns else []
        serve = serve_command(folder, target, tokens, self.method, self.name)
        size = tensors_bytes(written)
        return ExportReport(self.name, folder, len(written), parameters, size, serve, tuple(warnings))


# -- checks ----------------------------------------------------------------------------------------------------------
def prepare(draft: EagleDraft, target: Facts) -> tuple[Any, list[str]]:
    """A dense draft that fits ``target`` and is sound in every tensor, and notes. Raises ``UserError``.

    Its ``max_position_embeddings`` are raised to the target's where that changes no angle, and refused elsewhere.
    """
    dense = draft.merged()
    dense.check_fit(target)
    state = {name: tensor.detach().cpu() for name, tensor in dense.state_dict().items()}
    check_tensors(state, type(dense)(dense.config).state_dict(), "the draft to be exported")
    config, context = dense.config, int(target.config.max_position_embeddings)
    if config.max_position_embeddings >= context:
        return dense, []
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in FREE_ROPE_TYPES:
        raise UserError(
            f"the draft covers {config.max_position_embeddings} positions and the target {context}; raising it "
            f"would change the {kind} rotary angles, so train the draft with the target's length"
        )
    note = f"max_position_embeddings was raised from {config.max_position_embeddings} to the target's {context}"
    return dense.rebuilt(replace(config, max_position_embeddings=context), dense.state_dict()), [note]


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


def legacy_config(draft: EagleDraft, architecture: str) -> dict[str, Any]:
    """The keys of a config.json that is a Llama's.

    Its rotary settings are ``rope_theta`` and ``rope_scaling``, which older engines read and newer ones turn into
    ``rope_parameters``.
    """
    rest = dict(draft.config.rope_parameters)
    theta = rest.pop("rope_theta", 10000.0)
    plain = rest.get("rope_type", "default") == "default" and set(rest) <= {"rope_type"}
    return {
        "architectures": [architecture],
        **layer_config(draft),
        "rope_theta": theta,
        "rope_scaling": None if plain else rest,
        "torch_dtype": dtype_name(draft.fc.weight.dtype),
    }


def in_layers(draft: EagleDraft) -> dict[str, Tensor]:
    """The tensors by the names of formats that number their layers: ``midlayer.x`` is ``layers.0.x``."""
    return {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in draft.state_dict().items()}
