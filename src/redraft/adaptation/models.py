"""Opening what a job works on: the target in its data types, the draft in any format, the prompts by purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from redraft.arithmetic import choose_dtype
from redraft.data.overlap import same_text, without_overlap
from redraft.data.prompts import Conversation, check_length, prompt_messages
from redraft.data.template import kept_moment, template_ids, use_template, writes_date
from redraft.drafts.opening import AnyDraft, OpenDraft, family_at, open_checkpoint
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.loading import load_target
from redraft.selection import PromptRow
from redraft.settings.base import AUTO, TYPES
from redraft.target import Head, Target


def open_target(
    spec: str,
    dtype: str,
    device: str,
    adapter: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    run: Path | None = None,
    served: bool = False,
) -> Target:
    """The target, its chat template with these arguments and, in a ``run`` directory, with the date of that run.

    ``dtype`` may be ``auto``; ``served``: its text comes from a server (:func:`redraft.loading.load_target`). Raises
    ``UserError`` when it cannot be loaded, or its template does not know an argument.
    """
    target = load_target(spec, getattr(torch, choose_dtype(dtype, device)), device, adapter=adapter, served=served)
    settle_template(target.tokenizer, template_args, run)
    return target


def settle_template(tokenizer: Any, template_args: Mapping[str, Any] | None = None, run: Path | None = None) -> None:
    """Give a tokenizer's template its arguments and the date of a ``run`` directory. Raises ``UserError``."""
    known = use_template(tokenizer, template_args)
    if run is not None and writes_date(tokenizer):
        use_template(tokenizer, template_args, kept_moment(run, known.moment))


def open_draft(source: AnyDraft, target: Head, base: AnyDraft | None = None) -> OpenDraft:
    """A draft that reads the target's states, in float32, checked against the target's sizes and tokenizer.

    Notes of an import go along in ``meta``. For who takes standalone drafts too there is :func:`open_proposer`.

    A folder with a private part needs ``base``, the draft that it was trained on. An embedding that a public
    checkpoint ships is dropped where the target's own fits: the teacher is always the target at hand.
    One that is open already comes back as it is. Raises ``UserError``.
    """
    if not family_at(source).reads_states:
        raise UserError(
            f"{source} is a language model of its own, where a draft that reads the target's states is needed; "
            "align it with redraft distill --draft"
        )
    return open_any(source, target, base)


def open_proposer(source: AnyDraft, target: Head, base: AnyDraft | None = None) -> tuple[Any, dict[str, Any]]:
    """Any draft in float32, a standalone one too, and its metadata: for decoding and measuring.

    A private part needs ``base``. Raises ``UserError``.
    """
    opened = open_any(source, target, base)
    return opened.draft, opened.meta


def open_any(source: AnyDraft, target: Head, base: AnyDraft | None = None) -> OpenDraft:
    """A draft of any family in float32, bound to the target. Raises ``UserError``."""
    opened = open_checkpoint(source, target, base, torch.float32)
    opened.draft = opened.draft.borrowing(target).bind(target)
    return opened


def split_prompts(
    conversations: Sequence[Conversation], heldout: int, evaluation: int, seed: int
) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """(train, heldout, evaluation), disjoint in text, by a hash of the text: the order of the file plays no part.

    Prompts that nearly are evaluation prompts are not trained on. Raises ``UserError`` when too few prompts are left
    to train on.
    """
    unique = {same_text(c): c for c in reversed(conversations)}

    def place(conversation: Conversation) -> str:
        turns = [" ".join(m["content"].split()) for m in conversation.messages if m["role"] == "user"]
        return hashlib.sha256("\n".join([f"{seed}|{turns[0]}", *turns[1:]]).encode()).hexdigest()

    ordered = sorted(unique.values(), key=place)
    measured = ordered[heldout : heldout + evaluation]
    rest = without_overlap(ordered[heldout + evaluation :], measured)
    if len(rest) < max(8, heldout // 4):
        raise UserError(
            f"{len(ordered)} different prompts are too few: {heldout} are held out for early stopping and {evaluation} "
            f"for the benchmark, {len(rest)} are left to train on; give more prompts, or fewer --heldout-prompts"
        )
    return rest, ordered[:heldout], measured


def template_prompts(conversations: Sequence[Conversation], target: Target, new_tokens: int) -> list[Prompt]:
    """First turns through the target's chat template. Raises ``UserError`` for one that leaves no room to answer."""
    found = []
    for conversation in conversations:
        ids = template_ids(target.tokenizer, conversation.id, prompt_messages(conversation, ()))
        check_length(conversation.id, len(ids), new_tokens, target.context)
        found.append(Prompt(conversation.id, ids))
    return found


def prompt_rows(conversations: Sequence[Conversation], target: Target) -> list[PromptRow]:
    """First turns as rows without a response. Raises ``UserError`` for one that leaves no room to answer."""
    return [PromptRow(prompt.id, prompt.ids) for prompt in template_prompts(conversations, target, 1)]


def contestants(target: Target, dtype: str, open_as: Callable[[str], Target]) -> dict[str, Target]:
    """The target by the data types that compete: both for ``auto`` on a CPU, else the one that it is open in."""
    own = str(target.dtype).removeprefix("torch.")
    if target.device.type != "cpu" or dtype != AUTO:
        return {own: target}
    return {own: target} | {other: open_as(other) for other in TYPES if other != own}
