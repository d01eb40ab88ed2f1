"""A standalone draft: a small causal LM of its own (Hugging Face's Llama and Qwen shapes) with the target's tokenizer.

It reads none of the target's states, so it works with any engine that takes a plain draft model, and a round's
proposals depend on the text alone. Goel et al. (arXiv 2403.00858) train one from nothing for a chat target that has
no small sibling; a public small sibling is the same thing.

The private part (EDA, arXiv 2603.09527) is an expert beside the MLP of *every* layer. Since a SwiGLU and one beside
it are one wider SwiGLU, it merges into a plain checkpoint of the same architecture.

Shape legend: B batch, T new tokens, G proposed tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from redraft.drafts.base import Draft, DraftConfig
from redraft.drafts.groups import attach_parts
from redraft.drafts.proposing import Pick, Reduce, alone
from redraft.drafts.standalone.objective import StandaloneObjective
from redraft.drafts.walks import TextWalk
from redraft.errors import UserError
from redraft.loading import check_tokenizers
from redraft.sampling import scale_logits
from redraft.settings.training import TrainConfig
from redraft.target import Head, KeyValueCache, Target
from redraft.target.cache import cache_argument

# What transformers writes into a config besides the model itself.
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
# Tables of embeddings are padded to round sizes: by so much two of the same tokenizer may differ.
PADDING = 512


@dataclass(frozen=True, kw_only=True)
class StandaloneConfig(DraftConfig):
    """The model's Hugging Face config as plain values, and its private parts."""

    model: dict[str, Any]

    # It reads no features of the target.
    taps: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def of(cls, config: Any) -> StandaloneConfig:
        """From a Hugging Face config."""
        return cls(model={key: value for key, value in config.to_dict().items() if key not in PASSING})

    @property
    def hidden_size(self) -> int:
        return int(self.model["hidden_size"])

    @property
    def draft_vocab_size(self) -> int:
        return int(self.model["vocab_size"])

    def check_fit(self, target: Any) -> None:
        """Raise ``UserError`` when the vocabularies cannot be of one tokenizer."""
        mine, other = self.draft_vocab_size, target.vocab_size
        if abs(mine - other) >= PADDING:
            raise UserError(
                f"this draft does not fit the target: it speaks a vocabulary of {mine}, the target has {other}; "
                "a standalone draft needs the target's own tokenizer"
            )

    def dense(self) -> Self:
        wider = self.model
        if self.private_width:
            wider = wider | {"intermediate_size": wider["intermediate_size"] + self.private_width}
        return replace(super().dense(), model=wider)

    def to_dict(self) -> dict[str, Any]:
        """The model and the private width, as they always were, and whatever else is not as in a plain draft."""
        plain = DraftConfig().to_dict()
        parts = {name: value for name, value in super().to_dict().items() if name in plain and value != plain[name]}
        return {"model": self.model, "private_width": self.private_width} | parts

    def huggingface(self) -> Any:
        """The config as transformers has it. Raises ``UserError`` for an architecture that it does not know."""
        from transformers import AutoConfig

        values = dict(self.model)
        try:
            return AutoConfig.for_model(values.pop("model_type", ""), **values)
        except ValueError as error:
            raise UserError(f"transformers does not know this architecture: {str(error).splitlines()[0]}") from error


class StandaloneProposer:
    """Chains of one request (:class:`redraft.drafts.proposing.ChainProposer`). ``verified`` counts tokens.

    It is fed tokens and nothing else, so the keys of its guesses that verification accepts are right as they are and
    are kept.
    """

    def __init__(self, draft: Any, capacity: int) -> None:
        self.draft, self.capacity, self.verified = draft, capacity, 0
        self.cache = KeyValueCache(draft.layers, capacity)

    def propose(self, ids_T: Tensor, taps_T: Tensor, gamma: int, pick: Pick) -> Tensor:
        """Feed what verification kept and the cache does not hold yet, then draft ``gamma`` tokens."""
        # Of what was kept all but the last token are guesses that were accepted; the last guess was never fed.
        held = min(self.cache.length - self.verified, len(ids_T) - 1)
        self.cache.rollback(self.verified + held)
        self.verified += len(ids_T)
        feed_T, tokens = ids_T[held:], list[Tensor]()
        for _ in range(gamma):
            feed_T = pick(self.draft.logits(self.draft.states(feed_T[None], self.cache)[0, -1:]))
            tokens.append(feed_T)
        return torch.cat(tokens)

    def rollback(self, verified: int) -> None:
        self.cache.rollback(verified)
        self.verified = verified


class StandaloneDraft(Draft):
    """A causal LM as a draft. ``model`` is the plain Hugging Face module, for whoever trains or saves it."""

    family: ClassVar[str] = "standalone"
    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "private": ("*.mlp.private.*",),
        "router": ("*.mlp.router.*",),
        "norms": ("*norm*",),
        "attention": ("*attn*",),
        "head": ("*lm_head*", "*embed*"),
        "shared": ("*",),
    }
    BASE_DTYPE: ClassVar[torch.dtype | None] = torch.float32
    config: StandaloneConfig

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

    # -- what every draft is asked -----------------------------------------------------------------------------
    def check_fit(self, target: Any) -> None:
        """As of every draft; the tokenizers, where both are at hand, are compared too."""
        super().check_fit(target)
        check_tokenizers(self.tokenizer, target.tokenizer)

    def bind(self, target: Any) -> Self:
        """Propose no id that the target does not have, and stand where the target stands."""
        self._limit = min(self.config.draft_vocab_size, target.vocab_size)
        return self.to(target.device)

    def vocabulary(self) -> Tensor:
        """Target ids that the draft can say: all."""
        return torch.arange(self._limit, device=self.device)

    def restarted(self, target: Any, seed: int = 0) -> Self:
        """As of every draft; nothing of the target but its special tokens is in it."""
        config = self.merged().config
        config.check_fit(target)
        new = type(self)(untrained(config.huggingface(), seed)).inherit(self)
        return new.to(self.device, self.dtype).bind(target)

    def proposer(self, target: Target, capacity: int) -> StandaloneProposer:
        return StandaloneProposer(self, capacity)

    def walk(self, target: Head) -> TextWalk:
        return TextWalk(self, target, self.states)

    def objective(self, target: Head, settings: TrainConfig, reduce: Reduce = alone) -> StandaloneObjective:
        return StandaloneObjective(self, target, settings, reduce)

    def mlps(self) -> tuple[str, ...]:
        layers = next(name for name, part in self.named_modules() if part is self.model.base_model.layers)
        names = tuple(f"{layers}.{number}.mlp" for number in range(self.layers))
        for layer in self.model.base_model.layers:
            parts = [getattr(getattr(layer, "mlp", None), name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            whole = all(isinstance(part, nn.Linear) and part.bias is None for part in parts)
            if not whole or self.config.model.get("hidden_act") != "silu":
                raise UserError(
                    f"the MLPs of {type(self.model).__name__} are no plain SwiGLU (gate, up and down without bias, "
                    "silu), so no private expert can be merged into them; train the whole draft"
                )
        return names

    def linears(self) -> list[str]:
        """As of every draft, but for a head that is the embedding table: an update of it would be one of the table."""
        table = self.model.get_input_embeddings().weight
        return [name for name in super().linears() if self.get_parameter(f"{name}.weight") is not table]

    def rebuilt(self, config: StandaloneConfig, state: Mapping[str, Tensor]) -> Self:
        new = type(self)(untrained(config.huggingface())).to(self.device, self.dtype)
        new.load_state_dict(state)
        return new.inherit(self)

    def stored(self) -> dict[str, Tensor]:
        """The tensors of a Hugging Face checkpoint; a head that is the embedding table is left out of it."""
        state = dict(self.model.state_dict())
        shared = self.model.get_output_embeddings().weight
        names = [name for name, part in self.model.named_parameters(remove_duplicate=False) if part is shared]
        for name in names[1:]:
            del state[name]
        return state

    def fill(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(dict(state), strict=False, assign=True)
        self.model.tie_weights()

    def inherit(self, other: Any) -> Self:
        self._limit = other._limit
        self.model.generation_config = copy.deepcopy(other.model.generation_config)
        return super().inherit(other)

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


def build(values: dict[str, Any]) -> StandaloneDraft:
    """An untrained draft of this configuration, private parts included. Raises ``UserError`` where it is none."""
    config = StandaloneConfig.from_dict(values)
    return attach_parts(StandaloneDraft(untrained(config.huggingface())), config)


def untrained(config: Any, seed: int = 0) -> Any:
    """A float32 causal LM of a Hugging Face config with transformers' own start, the same for the same seed.

    Torch's global generator is left as it was.
    """
    from transformers import AutoModelForCausalLM

    # The weights are drawn on the CPU; a GPU, where there is one, is neither started nor reseeded.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
