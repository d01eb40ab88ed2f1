"""A target small enough that the distribution of everything it can say is known, and drafts that are wrong on purpose.

The target is one attention layer over learned positions, with a module tree that :class:`redraft.target.Target` reads
like any other: its taps, caches, roll-back and masks are the package's own. What it says depends on every token before
it and on where they stand, so a key that is not rolled back or a wrong position shows.

The distribution is computed apart from all that: whole texts at once in float64, and a warping of this file's own.

Shape legend: B texts, T tokens, H hidden size, V vocabulary, L limit, P prompts, S contexts.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.settings.sampler import Sampler
from redraft.target import Target

V, END, CONTEXT, WIDTH = 12, 3, 64, 16
# Of different lengths, so that rows of a batch are padded and stand at different places.
PROMPTS = ((5, 9), (7, 2, 11, 0, 6))
# The longest answer; shorter ones are tried besides.
LIMIT = 4
SAMPLERS = (Sampler(1.0), Sampler(0.7, 0, 0.9), Sampler(1.3, 6))
DRAFTS = ("adversarial", "point mass", "uniform")
# What the uniform draft cannot say.
UNSPOKEN = (1, 8)
# In logits: a probability of exactly 0 in float32.
NEVER = -400.0


# -- the target --------------------------------------------------------------------------------------------------------
class SmallLayer(nn.Module):
    """Attention of one head, and what it adds to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BTH: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        query, key, value = (part[:, None] for part in self.read(x_BTH).chunk(3, -1))
        if cache is not None:
            key, value = cache.update(key, value, 0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x_BTH + self.write(mixed[:, 0])


class SmallDecoder(nn.Module):
    """Embeddings, positions, the layer and the final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens, self.places = nn.Embedding(V, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers, self.norm = nn.ModuleList([SmallLayer()]), nn.RMSNorm(WIDTH)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        """As a model of transformers: without a mask every token sees itself and all before it."""
        tokens, before = input_ids.shape[1], past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(before, before + tokens, device=input_ids.device)[None]
        if attention_mask is None and tokens > 1:
            seen = torch.ones(tokens, before + tokens, dtype=torch.bool, device=input_ids.device)
            attention_mask = seen.tril(before)
        x_BTH = self.embed_tokens(input_ids) + self.places(position_ids)
        states = [x_BTH, self.layers[0](x_BTH, attention_mask, past_key_values)]
        return SimpleNamespace(last_hidden_state=self.norm(states[1]), hidden_states=states)


class SmallModel(nn.Module):
    """The decoder with its head, and what :class:`redraft.target.Target` asks of a causal language model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=V,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=END,
        )
        self.config._attn_implementation = "sdpa"
        self.model, self.lm_head = SmallDecoder(self.config), nn.Linear(WIDTH, V, bias=False)
        generator = torch.Generator().manual_seed(seed)
        spread = {"embed_tokens": 1.0, "places": 0.5, "read": 0.5, "write": 0.8, "lm_head": 0.42}
        for name, parameter in self.named_parameters():
            factor = next((factor for part, factor in spread.items() if part in name), None)
            if factor is not None:
                parameter.data = torch.randn(parameter.shape, generator=generator) * factor

    @property
    def base_model(self) -> SmallDecoder:
        return self.model

    def get_decoder(self) -> SmallDecoder:
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        out = self.model(input_ids)
        return SimpleNamespace(logits=self.lm_head(out.last_hidden_state), hidden_states=out.hidden_states)


def warped(logits_SV: Tensor, sampler: Sampler) -> Tensor:
    """Probabilities [S, V] after temperature, top-k and top-p, by their definitions, in float64.

    Raises ``ValueError`` where rounding could decide whether a token is in: there nothing would be known exactly.
    """
    logits_SV = logits_SV.double() / sampler.temperature
    if sampler.top_k:
        ordered = logits_SV.sort(-1, descending=True).values
        _far_from(ordered[:, sampler.top_k - 1], ordered[:, sampler.top_k])
        logits_SV = logits_SV.masked_fill(logits_SV < ordered[:, sampler.top_k - 1, None], -math.inf)
    probs_SV = logits_SV.softmax(-1)
    if sampler.top_p < 1:
        ordered, order = probs_SV.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        _far_from(before, torch.full_like(before, sampler.top_p))
        probs_SV = torch.zeros_like(probs_SV).scatter(-1, order, ordered.masked_fill(before >= sampler.top_p, 0.0))
        probs_SV = probs_SV / probs_SV.sum(-1, keepdim=True)
    return probs_SV


def _far_from(these: Tensor, those: Tensor) -> None:
    if float((these - those).abs().min()) < 1e-6:
        raise ValueError("a token stands on the edge of top-k or top-p; take another seed of the target")


# -- what is known of it -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class World:
    """The target and the logits of every context that it can come into."""

    target: Target
    # By number of tokens answered: [P, V ** tokens, V], in float64.
    logits: tuple[Tensor, ...]

    @cached_property
    def likeliest(self) -> Tensor:
        """Whether token v is ever the likeliest one after token u: boolean [V, V]."""
        found_VV = torch.zeros(V, V, dtype=torch.bool)
        for last_S, likely_S in self.by_last(lambda logits_SV: logits_SV.argmax(-1)):
            found_VV[last_S, likely_S] = True
        return found_VV

    @cached_property
    def mean_logits(self) -> Tensor:
        """Mean logits [V, V] over all contexts that end in a token."""
        total_VV, count_V = torch.zeros(V, V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
        for last_S, logits_SV in self.by_last(lambda logits_SV: logits_SV):
            total_VV.index_add_(0, last_S, logits_SV)
            count_V.index_add_(0, last_S, torch.ones(len(last_S), dtype=torch.float64))
        return total_VV / count_V[:, None]

    def by_last(self, what: Any) -> Any:
        """For the contexts of each answer's length, their last tokens [S] and ``what`` of their logits [S, V]."""
        for answered, logits_PSV in enumerate(self.logits[1:], 1):
            last_S = torch.arange(V**answered) % V
            yield last_S.repeat(len(PROMPTS)), what(logits_PSV.flatten(0, 1))

    def probs(self, sampler: Sampler) -> list[Tensor]:
        """By number of tokens answered: the target's probabilities [P, V ** tokens, V] under a sampler."""
        return [warped(logits.flatten(0, 1), sampler).view(logits.shape) for logits in self.logits]


@functools.cache
def make_world(seed: int = 0, device: str = "cpu") -> World:
    """The target of this seed, on a device, and all its logits, of whole texts on the CPU, without any cache."""
    model = SmallModel(seed).to(device)
    target, exact = Target(model, name="small", taps=(1,)), SmallModel(seed).double()
    logits = []
    with torch.inference_mode():
        for answered in range(LIMIT):
            answers = (
                torch.tensor(list(itertools.product(range(V), repeat=answered))).long().view(V**answered, answered)
            )
            texts = [torch.cat([torch.tensor(p).expand(len(answers), -1), answers], 1) for p in PROMPTS]
            logits.append(torch.stack([exact(text).logits[:, -1] for text in texts]))
    return World(target, tuple(logits))


# -- the drafts --------------------------------------------------------------------------------------------------------
class TableDraft(Eagle3Draft):
    """A draft that knows the last token alone and looks up what to say after it, in the proposers of its family."""

    table: Tensor

    def embed(self, ids: Tensor, target_embedding: nn.Module) -> Tensor:
        return F.one_hot(ids, V).to(self.table.dtype)

    def fuse(self, taps: Tensor) -> Tensor:
        return taps[..., :V]

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attends: Any) -> Tensor:
        return embeds

    def through(self, embeds: Tensor, states: Tensor, rope: Any, attends: Any) -> Tensor:
        return embeds

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.table


def make_draft(kind: str, world: World) -> TableDraft:
    """One of ``DRAFTS``: logits by the last token.

    "adversarial" turns the target's mean logits round and never says what is likeliest in any context that ends in
    this token. "point mass" is certain of one token, the second likeliest on average. "uniform" gives all tokens the
    same, but for two that it cannot say.
    """
    spoken = [token for token in range(V) if kind != "uniform" or token not in UNSPOKEN]
    config = Eagle3Config(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        target_vocab_size=V,
        target_hidden_size=WIDTH,
        draft_vocab_size=len(spoken),
        taps=(1,),
        max_position_embeddings=CONTEXT,
    )
    draft = TableDraft(config, torch.tensor(spoken))
    if kind == "adversarial":
        table = -world.mean_logits.masked_fill(world.likeliest, -NEVER)
    elif kind == "point mass":
        second_V = world.mean_logits.topk(2, -1).indices[:, 1]
        table = torch.full((V, V), NEVER).scatter(1, second_V[:, None], 0.0)
    elif kind == "uniform":
        table = torch.zeros(V, len(spoken))
    else:
        raise ValueError(f"there is no draft {kind!r}; known: {', '.join(DRAFTS)}")
    draft.register_buffer("table", table.float())
    return draft.requires_grad_(False)
