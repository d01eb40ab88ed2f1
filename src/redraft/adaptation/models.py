"""Opening what a job works on: the target by name or as it is, in its data types; the draft in any format; the prompts
by purpose."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from redraft.arithmetic import choose_dtype
from redraft.data.overlap import same_text, without_overlap
from redraft.data.prompts import Conversation, check_length, prompt_messages
from redraft.data.template import kept_moment, settings_of, template_ids, use_template, writes_date
from redraft.drafts.formats.embeddings import table_of
from redraft.drafts.opening import AnyDraft, OpenDraft, family_at, open_checkpoint
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.features import FeatureProducer
from redraft.loading.places import same_place, split_adapter
from redraft.loading.targets import (
    Plain,
    load_target,
    load_tokenizer,
    open_facts,
    open_head,
    plain_target,
    read_facts,
)
from redraft.selection import PromptRow
from redraft.settings.base import AUTO, TYPES
from redraft.target import Facts, Head, Target


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


def tell_about(name: str, target: Target, say: Callable[[str], None], told: Sequence[str] = ()) -> None:
    """Say what was made of the target called ``name``, and what its opening has noted and was not ``told`` before."""
    say(f"target {name}: {target.verdict()}")
    for note in target.notes:
        if note not in told:
            say(f"note on {name}: {note}")


def settle_template(tokenizer: Any, template_args: Mapping[str, Any] | None = None, run: Path | None = None) -> None:
    """Give a tokenizer's template its arguments and the date of a ``run`` directory. Raises ``UserError``."""
    known = use_template(tokenizer, template_args)
    if run is not None and writes_date(tokenizer):
        use_template(tokenizer, template_args, kept_moment(run, known.moment))


@dataclass(frozen=True)
class TargetSpec:
    """A target by name, with how to open it. ``opened`` is the target itself where it is open already.

    ``name`` is a folder, a hub id or the folder of a PEFT adapter, ``dtype`` bfloat16, float32 or auto, ``device`` a
    torch device, ``adapter`` a PEFT adapter to merge in, ``template_args`` arguments of the chat template.
    """

    name: str
    dtype: str = AUTO
    device: str = "cpu"
    adapter: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    opened: Target | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, target: AnyTarget) -> TargetSpec:
        """A name in the default settings, an opened target in its own, or the spec that it is already."""
        if isinstance(target, TargetSpec):
            return target
        if not isinstance(target, Target):
            return cls(str(target))
        name, _, adapter = target.name.partition(" + ")  # as loading calls a base with its adapter
        dtype = str(target.dtype).removeprefix("torch.")
        arguments = settings_of(target.tokenizer).arguments
        return cls(name, dtype, str(target.device), adapter or None, arguments, target)

    def open(self, dtype: str | None = None, served: bool = False) -> Target:
        """Load it, in another ``dtype`` if one is given; ``served`` as :func:`open_target`. Raises ``UserError``."""
        if self.opened is not None and dtype in (None, self.dtype):
            return self.opened
        chosen = choose_dtype(dtype or self.dtype, self.device, print)
        target = open_target(self.name, chosen, self.device, self.adapter, self.template_args, served=served)
        if dtype is None:
            tell_about(self.name, target, functools.partial(print, flush=True))
        return target

    def head(self, dtype: str | None = None) -> Head:
        """Its head alone, for who computes with stored states. Raises ``UserError``."""
        dtype = dtype or self.dtype
        if self.opened is not None:
            return self.open(dtype)
        found = open_head(self.name, getattr(torch, choose_dtype(dtype, self.device, print)), self.device, self.adapter)
        settle_template(found.tokenizer, self.template_args)
        return found

    def parts(self, dtype: str | None = None) -> Parts:
        """Its parts, the model in another ``dtype`` if one is given."""
        return Parts(self, lambda: self.open(dtype), dtype or self.dtype)

    def known(self) -> Facts:
        """What config and tokenizer say of it, and no hash of its weights. Raises ``UserError``."""
        if self.opened is not None:
            return self.opened.facts
        found = read_facts(self.name, device=self.device, adapter=self.adapter)
        settle_template(found.tokenizer, self.template_args)
        return found

    def facts(self) -> Facts:
        """What is known of it, where nothing is computed with it here. Raises ``UserError``."""
        if self.opened is not None:
            return self.opened.facts
        found = open_facts(self.name, self.adapter)
        settle_template(found.tokenizer, self.template_args)
        return found


class Parts:
    """A target of which no more is opened than is asked for: its facts, its head, or the model.

    What is open serves for what is less. Where a checkpoint must be opened whole for its facts, the model is kept.
    """

    def __init__(
        self,
        spec: TargetSpec,
        load: Callable[[], Target],
        dtype: str = AUTO,
        run: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``load`` opens the model; ``dtype`` is that of the head, ``run`` the run directory whose date the template
        shows (:func:`settle_template`). ``say`` is told what is noted of a target that is not opened whole."""
        self.spec, self.dtype, self.run, self.say = spec, dtype, run, say
        self.producer: FeatureProducer | None = None  # what computes features where the model does not
        self.told: tuple[str, ...] = ()
        self._load = load
        self._taps: tuple[int, ...] | None = None
        self._plain: Plain | None = None
        self._facts: Facts | None = None
        self._head: Head | None = spec.opened

    @classmethod
    def of(cls, target: Facts | Parts) -> Parts:
        """What is open of a target, of which there is no more here; of an opened one, all."""
        if isinstance(target, Parts):
            return target

        def load() -> Target:
            raise ValueError(f"no more of {target.name} is here than was opened")

        found = cls(TargetSpec(target.name), load)
        found._head = target if isinstance(target, Head) else None
        found._facts = None if isinstance(target, Head) else target
        return found

    @property
    def model(self) -> Target:
        """The target itself. Raises ``UserError``."""
        if not isinstance(self._head, Target):
            self._plain = None
            self._head = None  # the model brings its own
            self._head = loaded = self._load()
            if self._taps is not None:
                loaded.tap(self._taps)
        return self._head

    @property
    def head(self) -> Head:
        """The target without its layers, or with them where they are there. Raises ``UserError``."""
        if self._head is None:
            plain = self._known()
            dtype = choose_dtype(self.dtype, self.spec.device, print) if plain is not None else ""
            self._head = plain.head(getattr(torch, dtype)) if plain is not None else None
        return self._head or self.model

    @property
    def facts(self) -> Facts:
        """What is known of it. Raises ``UserError``."""
        if self._facts is None:
            plain = self._known() if self._head is None else None
            self._facts = plain.facts if plain is not None else (self._head or self.model).facts
        return self._facts

    @property
    def shown(self) -> Facts:
        """The target for who reads or writes a draft beside it: its facts, or where its embedding cannot be read from
        its files, its head. Raises ``UserError``."""
        return self.facts if table_of(self.facts) is not None else self.head

    def _known(self) -> Plain | None:
        if self._plain is None and self._facts is None:
            self._plain = plain_target(self.spec.name, self.spec.adapter, self.spec.device)
            if self._plain is not None:
                settle_template(self._plain.facts.tokenizer, self.spec.template_args, self.run)
                if self.say is not None:
                    self.told = self._plain.facts.notes
                    for note in self.told:
                        self.say(f"note on {self.spec.name}: {note}")
        return self._plain

    def tap(self, taps: Sequence[int]) -> None:
        """Tap the model where a draft reads it, now or when it is opened."""
        self._taps = tuple(taps)
        if isinstance(self._head, Target):
            self._head.tap(self._taps)


AnyTarget = str | Path | TargetSpec | Target
"""A target by name, with settings of its own, or opened."""


def target_info(target: AnyTarget) -> Facts:
    """The facts about a target that a draft must fit, without loading its weights. Raises ``UserError``.

    Its tokenizer is among them where it has one.
    """
    spec = TargetSpec.of(target)
    if spec.opened is not None:
        return spec.opened.facts
    found = read_facts(spec.name, tokenizer=False, adapter=spec.adapter)
    with suppress(UserError):  # who needs one says what is wrong with it
        found.tokenizer = load_tokenizer(spec.name, spec.adapter)
    return found


# -- drafts and prompts ------------------------------------------------------------------------------------------------
def open_draft(source: AnyDraft, target: Facts, base: AnyDraft | None = None) -> OpenDraft:
    """A draft that reads the target's states, in float32, checked against the target's sizes and tokenizer.

    Notes of an import go along in ``meta``. For who takes standalone drafts too there is :func:`open_any`.

    A folder with a private part needs ``base``, the draft that it was trained on. An embedding that a public
    checkpoint ships is dropped where the target's own fits: the teacher is always the target at hand.
    One that is open already comes back as it is. Raises ``UserError``.
    """
    if not family_at(source).reads_states:
        if isinstance(source, str | Path) and same_place(source, target.name):
            raise UserError(f"{source} is the target itself; give the draft that was made for it or for its base model")
        if isinstance(source, str | Path) and (base := split_adapter(str(source))[0]) != str(source):
            raise UserError(
                f"{source} is an adapter of {base}, where a draft that reads the target's states is needed; give the "
                "draft here, and an adapter that belongs to the target with --adapter"
            )
        raise UserError(
            f"{source} is a language model of its own, where a draft that reads the target's states is needed; "
            "align it with redraft distill --draft"
        )
    return open_any(source, target, base)


def open_any(source: AnyDraft, target: Facts, base: AnyDraft | None = None) -> OpenDraft:
    """A draft of any family in float32, bound to the target: for decoding and measuring. A private part needs ``base``.

    Raises ``UserError``.
    """
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
            f"for the benchmark, {len(rest)} are left to train on; give more prompts, or "
            "smaller --heldout-prompts and --bench-prompts"
        )
    return rest, ordered[:heldout], measured


def template_prompts(conversations: Sequence[Conversation], target: Facts, new_tokens: int) -> list[Prompt]:
    """First turns through the target's chat template. Raises ``UserError`` for one that leaves no room to answer."""
    found = []
    for conversation in conversations:
        ids = template_ids(target.tokenizer, conversation.id, prompt_messages(conversation, ()))
        check_length(conversation.id, len(ids), new_tokens, target.context)
        found.append(Prompt(conversation.id, ids))
    return found


def prompt_rows(conversations: Sequence[Conversation], target: Facts) -> list[PromptRow]:
    """First turns as rows without a response. Raises ``UserError`` for one that leaves no room to answer."""
    return [PromptRow(prompt.id, prompt.ids) for prompt in template_prompts(conversations, target, 1)]


def contestants(
    target: Target, dtype: str, open_as: Callable[[str], Target], taps: Sequence[int] | None = None
) -> dict[str, Target]:
    """The target by the data types that compete: both for ``auto`` on a CPU, else the one that it is open in.

    Each is tapped at ``taps``, where such are given.
    """
    own = str(target.dtype).removeprefix("torch.")
    compete = target.device.type == "cpu" and dtype == AUTO
    found = {own: target} | {other: open_as(other) for other in TYPES if compete and other != own}
    if taps is not None:
        for each in found.values():
            each.tap(taps)
    return found


def check_output(path: Path, suffix: str = "") -> None:
    """Raise ``UserError`` before any work when ``path`` cannot be the file that the work ends with."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file{f' ending in {suffix}' if suffix else ''}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
