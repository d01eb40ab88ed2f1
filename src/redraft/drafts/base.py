"""What all draft families have in common, so that decoding, simulation and training take any of them.

A family is a torch module with

- ``config``: sizes, ``taps`` of the target that it reads, ``draft_vocab_size``, what private parts it has;
- ``fuse(taps)``: states from the target's taps; ``embed(ids, target_embedding)``: embeddings of tokens;
- ``forward(embeds, states, positions, attend)``: the states of the next step; ``carry(states)``: what the step
  after takes in place of the target's features; ``logits(states)`` over the ``vocabulary()`` of the draft;
- ``midlayer``: the one decoder layer, with ``inputs`` and ``finish`` around its attention, and an ``mlp`` that holds
  private experts; ``fc``, ``rotary``, ``parameters_per_token``, ``reduced``, ``restarted``, ``extra_loss``.

A standalone draft (:mod:`redraft.drafts.standalone`) is no such module: it is a language model of its own, which
reads text and no states. What takes it too is typed ``Proposer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from redraft.drafts import eagle1, eagle3, standalone
from redraft.drafts.eagle1 import Eagle1Config, Eagle1Draft, fresh_eagle1
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.standalone import StandaloneConfig, StandaloneDraft
from redraft.errors import UserError

Draft: TypeAlias = Eagle3Draft | Eagle1Draft
DraftConfig: TypeAlias = Eagle3Config | Eagle1Config
AnyDraft = TypeVar("AnyDraft", bound=Eagle3Draft | Eagle1Draft)
Proposer: TypeAlias = Eagle3Draft | Eagle1Draft | StandaloneDraft
AnyProposer = TypeVar("AnyProposer", bound=Eagle3Draft | Eagle1Draft | StandaloneDraft)


def family_of(draft: Proposer) -> str:
    """The name under which the draft's family is registered and saved."""
    if isinstance(draft, StandaloneDraft):
        return draft.family
    return "eagle1" if isinstance(draft, Eagle1Draft) else "eagle3"


def check_fit(config: DraftConfig | StandaloneConfig, target: Any) -> None:
    """Raise ``UserError`` when a draft of this shape cannot sit on ``target``."""
    if isinstance(config, StandaloneConfig):
        return standalone.check_fit(config, target)
    if isinstance(config, Eagle1Config):
        eagle1.check_fit(config, target)
    else:
        eagle3.check_fit(config, target)


def bind(draft: AnyProposer, target: Any) -> AnyProposer:
    """The same draft with what it borrows of ``target`` in place. Whoever asks for logits has it bound before."""
    if isinstance(draft, Eagle1Draft | StandaloneDraft):
        draft.bind(target)
    return draft


def use_target_embedding(draft: Draft, target: Any) -> Draft:
    """The same draft on the target's own embeddings, where the widths allow it."""
    if draft.embed_tokens is None or draft.config.hidden_size != target.hidden_size:
        return draft
    if isinstance(draft, Eagle1Draft):
        return eagle1.without_embedding(draft)
    state = {k: v for k, v in draft.state_dict().items() if k != "embed_tokens.weight"}
    bare = Eagle3Draft(replace(draft.config, own_embedding=False), draft.vocabulary())
    bare.load_state_dict(state)
    return bare


def fresh(family: str, target: Any, vocabulary: Sequence[int], seed: int = 0, intermediate: int | None = None) -> Draft:
    """A new draft of a family for ``target``; ``vocabulary`` concerns families that have one of their own.

    Raises ``UserError`` for an unknown family.
    """
    if family == "eagle3":
        return fresh_draft(target, vocabulary, seed, intermediate)
    if family == "eagle1":
        return fresh_eagle1(target, seed, intermediate)
    raise UserError(f"unknown draft family {family!r}; choose one of: eagle1, eagle3")
