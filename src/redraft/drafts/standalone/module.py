"""A standalone draft: a small causal LM of its own (Hugging Face's Llama and Qwen shapes) with the target's tokenizer.

It reads none of the target's states, so it works with any engine that takes a plain draft model, and a round's
proposals depend on the text alone. Goel et al. (arXiv 2403.00858) train one from nothing for a chat target that has
no small sibling; a public small sibling is the same thing.

The private part (EDA, arXiv 2603.09527) is an expert beside the MLP of *every* layer. Since a SwiGLU and one beside
it are one wider SwiGLU, it merges into a plain checkpoint of the same architecture.

Shape legend: B batch, T new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from redraft.artifact import FAMILIES
from redraft.compat import cache_argument
from redraft.drafts.experts import SharedPrivateMLP, is_private, start_private
from redraft.drafts.glue import Glue
from redraft.errors import UserError
from redraft.sampling import scale_logits

# What transformers writes into a config besides the model itself.
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
# Tables of embeddings are padded to round sizes: by so much two of the same tokenizer may differ.
PADDING = 512


@dataclass(frozen=True)
class StandaloneConfig:
    """The model's Hugging Face config as plain values, and the inner width of each layer's private expert."""

    model: dict[str, Any]
    private_width: int = 0

    # It reads no features of the target and has no low-rank updates.
    taps: ClassVar[tuple[int, ...]] = ()
    low_rank: ClassVar[int] = 0

    @classmethod
    def of(cls, config: Any, private_width: int = 0) -> StandaloneConfig:
        """From a Hugging Face config."""
        kept = {key: value for key, value in config.to_dict().items() if key not in PASSING}
        return cls(kept, private_width)

    @property
    def hidden_size(self) -> int:
        return int(self.model["hidden_size"])

    @property
    def draft_vocab_size(self) -> int:
        return int(self.model["vocab_size"])

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "private_width": self.private_width}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StandaloneConfig:
        """Raises ``UserError`` for keys that are missing or unknown."""
        unknown = sorted(set(values) - {"model", "private_width"})
        if unknown or "model" not in values:
            raise UserError(f"the config of a standalone draft has no model or unknown keys {unknown}")
        return cls(dict(values["model"]), int(values.get("private_width", 0)))

    def huggingface(self) -> Any:
        """The config as transformers has it. Raises ``UserError`` for an architecture that it does not know."""
        from transformers import AutoConfig

        values = dict(self.model)
        try:
            return AutoConfig.for_model(values.pop("model_type", ""), **values)
        except ValueError as error:
            raise UserError(f"transformers does not know this architecture: {str(error).splitlines()[0]}") from error


class StandaloneDraft(Glue, nn.Module):
    """A causal LM as a draft. ``model`` is the plain Hugging Face module, for whoever trains or saves it."""

    family: ClassVar[str] = "standalone"
    reduced: ClassVar[bool] = False

    def proposer(self, target, capacity):
        from redraft.drafts.standalone.proposer import StandaloneProposer

        return StandaloneProposer(self, capacity)

    def walk(self, target):
        from redraft.drafts.textwalk import TextWalk

        return TextWalk(self, target, self.states)

    def objective(self, target, settings, reduce=lambda sums: sums):
        from redraft.drafts.standalone.objective import StandaloneObjective

        return StandaloneObjective(self, target, settings, reduce)

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        """Raises ``UserError`` for a model that is no dense decoder."""
        super().__init__()
        if not hasattr(model, "base_model") or not hasattr(model.base_model, "layers"):
            raise UserError(
                f"{type(model).__name__} is no dense decoder with .layers; a standalone draft is a Llama-, Qwen- or "
                "similarly shaped causal LM"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = StandaloneConfig.of(model.config)
        # How many ids it may propose: a table padded further than the target's ends where the target's does.
        self._limit = int(model.get_output_embeddings().weight.shape[0])

    # -- what it shares with the other families ----------------------------------------------------------------
    def bind(self, target: Any) -> StandaloneDraft:
        """Propose no id that the target does not have."""
        self._limit = min(self.config.draft_vocab_size, target.vocab_size)
        return self

    def vocabulary(self) -> Tensor:
        """Target ids that the draft can say: all."""
        return torch.arange(self._limit, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.model.get_output_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_output_embeddings().weight.dtype

    @property
    def layers(self) -> int:
        return len(self.model.base_model.layers)

    @property
    def parameters_per_token(self) -> int:
        """Parameters that one token's forward pass multiplies: all but the embedding table, plus the head."""
        body = sum(p.numel() for p in self.model.base_model.parameters())
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        return body - table.numel() + head.numel()

    # -- forward -----------------------------------------------------------------------------------------------
    def states(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Final-norm states [B, T, H] of new tokens after those in ``cache``; padding belongs on the right."""
        backbone = self.model.base_model
        return backbone(input_ids=ids_BT, **cache_argument(backbone, cache)).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., V] of final-norm states [..., H], as the model itself scales them."""
        return scale_logits(self.model.get_output_embeddings()(states), self.model.config)[..., : self._limit]

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] over whole texts."""
        return self.logits(self.states(ids_BT))

    # -- module ------------------------------------------------------------------------------------------------
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandaloneDraft:
        """As torch's, but rotary frequencies stay in float32: rounded to bfloat16 they are other angles."""
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, leaf, buffer.to(getattr(module, leaf).device))
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a head that is the embedding table stays that table."""
        found = super().load_state_dict(state_dict, strict, assign)
        self.model.tie_weights()
        return found


@FAMILIES.register("standalone")
def build(config: dict[str, Any]) -> StandaloneDraft:
    """An untrained draft of this configuration, private experts included, for a loader to fill."""
    known = StandaloneConfig.from_dict(config)
    draft = StandaloneDraft(untrained(known.huggingface()))
    return attach_experts(draft, known.private_width) if known.private_width else draft


def untrained(config: Any, seed: int = 0) -> Any:
    """A float32 causal LM of a Hugging Face config with transformers' own start, the same for the same seed.

    Torch's global generator is left as it was.
    """
    from transformers import AutoModelForCausalLM

    # The weights are drawn on the CPU; a GPU, where there is one, is neither started nor reseeded.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def check_fit(config: StandaloneConfig, target: Any) -> None:
    """Raise ``UserError`` when the vocabularies cannot be of one tokenizer."""
    mine, other = config.draft_vocab_size, target.vocab_size
    if abs(mine - other) >= PADDING:
        raise UserError(
            f"this draft does not fit the target: it speaks a vocabulary of {mine}, the target has {other}; "
            "a standalone draft needs the target's own tokenizer"
        )


# -- private experts -------------------------------------------------------------------------------------------------
def attach_experts(draft: StandaloneDraft, width: int, seed: int = 0) -> StandaloneDraft:
    """A copy with a private expert of inner width ``width`` beside the MLP of every layer; it starts at exactly zero.

    What to train are the parameters for which :func:`redraft.drafts.experts.is_private` holds. Raises ``UserError``
    when there are private experts already, for a width that is not positive, and for MLPs that are no plain SwiGLU.
    """
    if draft.config.private_width:
        raise UserError("the draft has private experts already; merge them first")
    if width <= 0:
        raise UserError(f"the width of the private experts is {width}; give a positive number")
    split = copy.deepcopy(draft)
    for number, layer in enumerate(split.model.base_model.layers):
        old = layer.mlp
        _check_gated(split, old)
        inner, hidden = old.gate_proj.weight.shape
        mlp = SharedPrivateMLP(hidden, inner, width).to(old.gate_proj.weight)
        start_private(mlp, old, torch.Generator().manual_seed(1000 * seed + number))
        layer.mlp = mlp
    split.config = replace(draft.config, private_width=width)
    return split


def _check_gated(draft: StandaloneDraft, mlp: Any) -> None:
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    whole = all(isinstance(part, nn.Linear) and part.bias is None for part in parts)
    if not whole or draft.config.model.get("hidden_act") != "silu":
        raise UserError(
            f"the MLPs of {type(draft.model).__name__} are no plain SwiGLU (gate, up and down without bias, silu), so "
            "no private expert can be merged into them; train the whole draft"
        )


def merge_experts(draft: StandaloneDraft) -> StandaloneDraft:
    """An equal plain draft: each layer's private expert becomes part of one wider MLP. Unchanged without any."""
    width = draft.config.private_width
    if not width:
        return draft
    config = copy.deepcopy(draft.model.config)
    config.intermediate_size += width
    state, merged = draft.model.state_dict(), {}
    for name, tensor in state.items():
        if is_private(name):
            continue
        part = state.get(name.replace(".mlp.", ".mlp.private."))
        if ".mlp." in name and part is not None:
            tensor = torch.cat([tensor, part], 1 if ".down_proj." in name else 0)
        merged[name] = tensor.detach().clone()
    dense = StandaloneDraft(untrained(config), draft.tokenizer).to(draft.device, draft.dtype)
    dense.load_state_dict({f"model.{name}": tensor for name, tensor in merged.items()})
    dense.model.generation_config = copy.deepcopy(draft.model.generation_config)
    return dense
