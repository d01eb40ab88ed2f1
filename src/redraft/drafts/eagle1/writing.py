"""How Eagle1 drafts are written: for vLLM (method ``eagle``) and for SGLang (algorithm EAGLE).

Neither file holds a head or, unless the draft has its own, an embedding: both engines lend the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from redraft.drafts.eagle.writing import (
    Dense,
    LayerWriter,
    legacy_config,
    numbered,
    output_biased,
    with_biases,
    with_fc_bias,
)
from redraft.drafts.eagle1.engines import meaning_of, read_as
from redraft.drafts.formats.base import serve_command
from redraft.drafts.formats.meaning import Difference, Reading, TensorFacts
from redraft.target import Facts

ARCHITECTURES = {"EagleLlamaForCausalLM": "vllm", "LlamaForCausalLMEagle": "sglang"}


class Eagle1Writer(LayerWriter):
    """The files of one engine."""

    family = "eagle1"

    def read_as(self, reader: str, config: Any, tensors: Mapping[str, TensorFacts], target: Facts) -> Reading:
        return read_as(reader, config, tensors, target)

    def meaning(self, config: Any) -> dict[str, Any]:
        return meaning_of(config)

    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        """Both engines have all biases of the attention or none. SGLang's ``fc`` always has one, vLLM's never."""
        biased = bool(dense.config.attention_bias) or output_biased(dense.config)
        dense, notes = with_biases(dense, attention=biased, output=biased), list[str]()
        if self.name == "vllm":
            without = with_fc_bias(dense, False)
            notes += ["the bias of fc, all zero, was left out"] if without is not dense else []
            return without, notes
        zeros = torch.zeros_like(dense.state["fc.weight"][:, 0])
        return (dense if dense.config.fc_bias else dense.with_extra({"fc.bias": zeros})), notes

    def told(self, difference: Difference, dense: Dense) -> bool:
        return difference.what == "fc_bias" and "fc.bias" in dense.extra

    def names(self, dense: Dense) -> dict[str, str]:
        return {numbered(name): name for name in dense.facts}

    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        architecture = next(architecture for architecture, kind in ARCHITECTURES.items() if kind == self.name)
        config = legacy_config(dense, architecture) | ({} if dense.config.fc_bias else {"bias": False})
        return config | {"model_type": "llama"}

    def serve(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> str:
        return serve_command(folder, target, tokens, self.method, self.name)


WRITERS = {
    "vllm": Eagle1Writer("vllm", "eagle", ("vllm-0.32", "vllm-0.33")),
    "sglang": Eagle1Writer("sglang", "EAGLE", ("sglang",)),
}
