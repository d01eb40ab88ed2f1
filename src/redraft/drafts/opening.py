"""Opening a draft of any family from wherever it lies: redraft's own format, a private part, a public checkpoint.

Strict: every missing, extra, misshaped or non-finite tensor is named, and an option that our draft does not compute
is refused by its name rather than dropped. No pickle is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from redraft.drafts.base import Draft, Family, is_private
from redraft.drafts.files import load_draft, load_private
from redraft.drafts.formats import others
from redraft.drafts.formats.meaning import Reading
from redraft.drafts.formats.reading import TOKENIZER, Checkpoint
from redraft.errors import UserError
from redraft.loading import one_line, tokenizer_hash
from redraft.registries import FAMILIES
from redraft.shown import Shown, lines
from redraft.target import Facts

# Keys that a mixture of experts has.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass
class OpenDraft(Shown):
    """A draft with what is known of it. ``base_hash`` identifies the tensors as they were on disk, in ``source``.

    ``reading`` says of a checkpoint of other hands what each value is taken from; none of a draft of our own format.
    """

    draft: Draft = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    base_hash: str
    source: str = ""
    reading: Reading | None = field(default=None, repr=False)

    def __rich__(self) -> Any:
        size = sum(parameter.numel() for parameter in self.draft.parameters())
        known = [f"{self.draft.family} draft of {size:,} parameters", *self.meta.get("notes", [])]
        return lines(f"{self.source or 'draft'}: {'; '.join(known)}")


AnyDraft = str | Path | OpenDraft
"""A draft by name (a folder in any format, a hub id), or opened."""


def family_at(source: AnyDraft) -> Family:
    """The family of the draft in a folder of any kind, at a hub id or ``embedded:NAME``; no weights are loaded.

    Raises ``UserError`` when it cannot be read or is no draft.
    """
    if isinstance(source, OpenDraft):
        return _family(Checkpoint(source.source, meta={"family": source.draft.family}))
    return _family(Checkpoint.at(source))


def open_checkpoint(
    source: AnyDraft,
    target: Facts | None = None,
    base: AnyDraft | None = None,
    dtype: torch.dtype | None = None,
    needs_target: bool = True,
    **options: Any,
) -> OpenDraft:
    """A draft of any family from a folder or a hub id, in ``dtype`` or in the types of its file.

    ``target`` must fit it; checkpoints of drafts that read its states are not read without, unless ``needs_target`` is
    false and the file tells all. A private part needs ``base``, the draft that it was trained on. ``options`` are for
    the family: ``taps`` overrules the feature ids of an Eagle3 checkpoint, ``trainer`` who wrote it. The metadata of a
    checkpoint of other hands holds family, format, source, verifier (the teacher that its trainer wrote down), notes
    and the config as it was found. A draft that is open is taken as it is. Raises ``UserError`` when the source cannot
    be read, is no draft, does not fit the target, or was made for another tokenizer.
    """
    if isinstance(source, OpenDraft):
        return source
    checkpoint = Checkpoint.at(source)
    if checkpoint.meta.get("kind") == "private":
        if base is None:
            raise UserError(f"{source} is a private part; name the draft that it belongs to with --base-draft")
        opened = open_checkpoint(base, target, None, dtype)
        joined = _joined(checkpoint.folder, opened, target, dtype, copy=opened is base)
        return replace(joined, source=str(source))
    if checkpoint.meta:
        draft, meta = load_draft(checkpoint.folder)
        FAMILIES.get(draft.family).check_usable(draft, str(source))
        meta = meta | {"format": "redraft", "source": str(source), "notes": []}
        if target is not None:
            draft.check_fit(target)
    else:
        draft, meta = _read(checkpoint, target, options, needs_target)
    reading = meta.pop("reading", None)
    if target is not None:
        meta["notes"] = [*meta["notes"], *FAMILIES.get(draft.family).remarks(draft, str(source), target)]
    tokenizer = None if target is None or draft.tokenizer is not None else target.tokenizer
    if tokenizer is not None and meta.get("tokenizer_hash") not in (None, "", tokenizer_hash(tokenizer)):
        raise UserError(f"{source} was made for another tokenizer than the target's; give a draft of this model family")
    base_hash = draft.base_hash()
    return OpenDraft(draft if dtype is None else draft.to(dtype), meta, base_hash, str(source), reading)


def _read(
    checkpoint: Checkpoint, target: Facts | None, options: dict[str, Any], needs_target: bool
) -> tuple[Draft, dict[str, Any]]:
    """A draft from a checkpoint of other hands."""
    family, notes = _family(checkpoint), list[str]()
    options = {name: value for name, value in options.items() if value is not None}
    if strange := sorted(set(options) - set(family.options)):
        raise UserError(
            f"{checkpoint.source} is a draft of family {family.name}, which has no {strange[0]}; leave it out"
        )
    if target is None and family.reads_states and needs_target:
        raise UserError(f"{checkpoint.source} is not in redraft's own format; give --target, whose sizes it must fit")
    if family.reads_states and target is not None:
        _check_tokenizer(checkpoint, target, notes)
    try:
        draft, meta = family.read(checkpoint, target, notes, **options)
    except RecursionError as error:  # values are checked where they are taken: any other error is a defect of ours
        raise UserError(f"{checkpoint.path} nests values too deeply; download it again") from error
    about = {"family": family.name, "method": None, "source": checkpoint.source, "notes": notes}
    return draft, about | {"source_config": checkpoint.config} | meta


def _check_tokenizer(checkpoint: Checkpoint, target: Facts, notes: list[str]) -> None:
    """Raise ``UserError`` where the tokenizer beside a draft is another than the target's; renamed tokens are noted.

    Another: a token has another id in it, or most ids are other tokens.
    """
    file = checkpoint.folder / TOKENIZER
    if not file.is_file():
        return
    if target.tokenizer is None:
        notes.append(f"{TOKENIZER} beside the draft was not compared: the target has no tokenizer at hand")
        return
    with one_line(str(file)):
        own = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    other, wrong = target.tokenizer.get_vocab(), f"{checkpoint.source} was made for another tokenizer than the target's"
    for token, number in sorted(own.items(), key=lambda item: item[1]):
        if other.get(token, number) != number:
            raise UserError(
                f"{wrong}: {token!r} is {number} in it and {other[token]} in the target's; give a draft of this model "
                "family"
            )
    named, told = ({number: token for token, number in words.items()} for words in (own, other))
    both = sorted(named.keys() & told.keys())
    renamed = [number for number in both if named[number] != told[number]]
    if 2 * len(renamed) >= len(both):
        raise UserError(
            f"{wrong}: {len(renamed)} of {len(both)} ids are other tokens; give a draft of this model family"
        )
    if renamed:
        first = renamed[0]
        notes.append(
            f"{TOKENIZER} beside the draft has other tokens than the target's at {len(renamed)} of {len(both)} ids, "
            f"first {first}: {named[first]!r}, which the target calls {told[first]!r}"
        )


def _joined(folder: Path, base: OpenDraft, target: Facts | None, dtype: torch.dtype | None, copy: bool) -> OpenDraft:
    """The draft that a private part makes of its base; ``copy`` of one that somebody else has."""
    shared = base.draft
    kept = next(shared.parameters()).dtype
    wide = shared.BASE_DTYPE
    draft, meta = load_private(folder, shared if wide is None else shared.to(wide), base.base_hash, copy)
    for name, parameter in draft.named_parameters():
        kept = torch.promote_types(kept, parameter.dtype) if is_private(name) else kept
    if dtype is not None or wide is not None:
        draft = draft.to(dtype or kept)
    if target is not None:
        draft.check_fit(target)
    return OpenDraft(draft, meta, draft.base_hash())


def _family(checkpoint: Checkpoint) -> Family:
    """Raises ``UserError`` where no family knows the checkpoint; one that takes any language model is asked last."""
    if checkpoint.meta:
        family: Family = FAMILIES.get(str(checkpoint.meta.get("family")))
        return family
    known = sorted((family for _, family in FAMILIES.items()), key=lambda family: family.takes_any)
    for family in known:
        # What takes any language model is not asked for a draft of a kind that is known by its name.
        if family.takes_any and others.of_name(checkpoint.architectures) is not None:
            continue
        if family.recognises(checkpoint):
            return family
    raw = checkpoint.config
    other = others.of_name(checkpoint.architectures)
    if (merged := checkpoint.path.parent / "merged").is_dir():
        raise UserError(f"{checkpoint.source} is a run directory; its draft is {merged}")
    experts = next((f" with {key} {raw[key]!r}, a mixture of experts" for key in EXPERTS if raw.get(key)), "")
    kind = "" if other is None else f"it is {other[0]}, which is not read: {other[1]}; "
    names = ", ".join(name for family in known for name in family.architectures)
    raise UserError(
        f"{checkpoint.path} has architectures {raw.get('architectures')}{experts}; {kind}a draft that reads the "
        f"target's states has one of {names}, any other is a causal language model"
    )
