"""Opening the frozen target, its head or its facts, and its tokenizer, by name.

Facts and head need no model where the checkpoint is plain: where its safetensors hold the very tensors of the model
that its config describes, or those of its single experts (:mod:`redraft.loading.stored`). Then the hash of its weights
and the head are read from the files, and nothing is built but a model without numbers, which says what is where.
Whatever else there is (quantised and converted weights, damaged files) goes through :func:`load_target`, and is refused
there where it is to be refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from redraft.arithmetic import MOST_BYTES, prepack
from redraft.artifact import read_json
from redraft.errors import UserError
from redraft.loading import quantised
from redraft.loading.adapters import Adapter, merge
from redraft.loading.changes import Changed, Changes, NotByLayer, changes
from redraft.loading.checkpoint import (
    check_code,
    check_folder,
    check_kinds,
    check_names,
    config_at,
    load_model,
    weight_files,
    without_known,
)
from redraft.loading.devices import usable
from redraft.loading.places import ADAPTER_FILE, first_line, locate, one_line, quiet, split_adapter
from redraft.loading.stored import Weight, read, stored_weights, weights_hash
from redraft.target import Facts, Head, Target
from redraft.target.facts import empty_model, final_norm, plain_embedding, text_decoder

# Files with the words of a tokenizer, of any kind.
VOCABULARIES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "tekken.json", "*.spm", "*.bpe")

MODALITY_MARK = re.compile(r"image|img|vision|video|audio", re.IGNORECASE)


def load_target(
    spec: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    taps: Sequence[int] | None = None,
    served: bool = False,
) -> Target:
    """The frozen target that ``spec`` names: a model folder, an adapter folder, a hub id or ``embedded:NAME``.

    ``adapter`` is a PEFT adapter (folder or hub id) to be merged into it. Adapters are merged in float32, a layer at a
    time where they can be, and the result is cast, so that no rounding comes between base and adapter. ``served`` says
    that the target's text comes from its server, so that the model here need only be near it; ``target.rounding`` says
    then what engines round besides. Raises ``UserError`` when anything is missing, does not fit, holds more than it
    says, is no dense causal language model, or (unless ``served``) is not the model that engines serve.
    """
    name, where = spec if adapter is None else f"{spec} + {adapter}", usable(device)
    base, adapter = split_adapter(spec, adapter)
    with quiet():
        place = locate(base)
        layered = None if adapter is None else _layered(place, base, adapter)
        # A model that an adapter is merged into as a whole takes float32, and may have no room on the device.
        as_it_is = (dtype, device) if adapter is None or layered else (torch.float32, "cpu")
        model, notes, rounds = load_model(place, base, *as_it_is)
        if rounds and not served:
            raise UserError(
                f"{base} is served with quantised {rounds}, and the model computed here rounds nothing: its text would "
                "not be the served one's; let the server answer (--server), or give the unquantised checkpoint"
            )
        if adapter is not None:
            model, more = _with_adapter(model, adapter, layered, place, base, dtype)
            notes = [*notes, *more, *_other_base(adapter, base)]
        check_finite(model.named_parameters(), name)
        tokenizer = read_tokenizer(adapter, place, base)
        notes = [*notes, *check_rows(tokenizer, model, name)]
    try:
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2:  # else it is where it belongs
            model = model.to(where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {device} cannot be used: {first_line(error)}") from error
    return Target(model, tokenizer, name, taps, notes, rounds)


def _layered(place: dict[str, Any], base: str, adapter: str) -> Changes | None:
    """What the adapter changes of a plain base, none where it must be merged as a whole. Raises ``UserError``."""
    found = _base_weights(place, base, [])
    if found is None:
        return None
    with suppress(NotByLayer):
        return changes(*found, Adapter.read(adapter))
    return None


def _with_adapter(
    model: Any, adapter: str, layered: Changes | None, place: dict[str, Any], base: str, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """The model with the adapter merged, in ``dtype``, and notes; the model is in float32 unless it is ``layered``."""
    if layered is not None:
        state = model.state_dict()
        try:
            for name in layered.names():
                state[name].copy_(layered.merged(name))
            return model, layered.notes()
        except NotByLayer:
            del state, model
            model = load_model(place, base, torch.float32)[0]
    model, notes = merge(model, Adapter.read(adapter))
    return model.to(dtype), notes


def _other_base(adapter: str, base: str) -> list[str]:
    """A note where an adapter in a folder names another base model than the one it was put on."""
    file = Path(adapter) / ADAPTER_FILE
    named = read_json(file, finite=False).get("base_model_name_or_path") if file.is_file() else None
    if not isinstance(named, str) or Path(named).name.lower() in ("", Path(base).name.lower()):
        return []
    return [f"the adapter {adapter} names {named} as its base model and was put on {base}"]


def load_tokenizer(spec: str, adapter: str | None = None) -> Any:
    """The tokenizer that belongs to ``spec``, or to it with ``adapter``. Raises ``UserError`` when there is none."""
    with quiet():
        base, adapter = split_adapter(spec, adapter)
        return read_tokenizer(adapter, locate(base), base)


def check_finite(named: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Raise ``UserError`` for a model with NaN or infinity in a parameter: its text would be token 0 for ever."""
    for parameter, tensor in named:
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        low, high = tensor.detach().aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(f"{name} holds NaN or infinity in {parameter}; is its training sound?")


# -- facts and head --------------------------------------------------------------------------------------------------
def read_facts(
    spec: str, tokenizer: bool = True, device: str | torch.device = "cpu", adapter: str | None = None
) -> Facts:
    """What the config and the tokenizer of ``spec`` say; its weights may be elsewhere, and the hash is the config's.

    ``tokenizer``: whether it is read too; ``device``: where drafts for it belong; ``adapter`` as of
    :func:`load_target`. Raises ``UserError``.
    """
    name = spec if adapter is None else f"{spec} + {adapter}"
    base, adapter = split_adapter(spec, adapter)
    with quiet():
        place = locate(base)
        config = read_config(place, base)
        words = read_tokenizer(adapter, place, base) if tokenizer else None
    return Facts(name, config, words, generation=_generation(place, config), device=usable(device))


def open_facts(spec: str, adapter: str | None = None, dtype: torch.dtype = torch.float32) -> Facts:
    """The facts of a target whose weights are here, their hash among them.

    ``dtype`` is that of the model, where it must be opened. Raises ``UserError``.
    """
    plain = plain_target(spec, adapter)
    return plain.facts if plain is not None else load_target(spec, dtype, "cpu", adapter, (), True).facts


def open_head(
    spec: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    served: bool = False,
) -> Head:
    """The head of a target, with the arguments of :func:`redraft.loading.load_target`. Raises ``UserError``."""
    plain = plain_target(spec, adapter, device)
    found = plain.head(dtype) if plain is not None else None
    return found or load_target(spec, dtype, device, adapter, taps=(), served=served).head_part


def read_config(place: dict[str, Any], spec: str) -> Any:
    """The config at ``place`` (:func:`redraft.loading.places.locate`). Raises ``UserError``."""
    return config_at(place, spec)


def _generation(place: dict[str, Any], config: Any) -> Any:
    """The generation config beside a config, or what the config alone makes of one."""
    where = {key: place[key] for key in ("pretrained_model_name_or_path", "local_files_only")}
    name = where.pop("pretrained_model_name_or_path")
    file = Path(name) / "generation_config.json"
    if Path(name).is_dir() and not file.is_file():  # many checkpoints have none
        return transformers.GenerationConfig.from_model_config(config)
    if not file.is_file():
        try:
            return transformers.GenerationConfig.from_pretrained(name, **where, trust_remote_code=False)
        except (OSError, ValueError):
            return transformers.GenerationConfig.from_model_config(config)
    raw = read_json(file, finite=False)
    with one_line(str(file)):
        found = transformers.GenerationConfig.from_pretrained(name, **where, trust_remote_code=False)
    check_kinds(raw, found, file)
    return found


@dataclass(frozen=True)
class Plain:
    """A target that need not be opened: its facts, its model without numbers, and its weights as they lie."""

    facts: Facts
    model: Any
    weights: dict[str, Weight]

    def head(self, dtype: torch.dtype) -> Head | None:
        """Its ends in ``dtype``, where its facts say that it belongs; none where the model keeps one in another type.

        Raises ``UserError`` where they hold NaN or infinity.
        """
        model, weights, device = self.model, self.weights, self.facts.device
        decoder, head = text_decoder(model), model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        table, norm = decoder.get_input_embeddings(), final_norm(decoder)
        exact = [getattr(model, f"_keep_in_fp32_modules{kind}", None) or () for kind in ("", "_strict")]
        if any(word in names[id(part)] for part in (table, norm, head) for word in [*exact[0], *exact[1]]):
            return None

        def filled(module: nn.Module, name: str, **known: Tensor) -> Any:
            unread = [key for key in module.state_dict() if key not in known]
            found = {key: read(weights[f"{name}.{key}"], dtype, device) for key in unread}
            check_finite(((f"{name}.{key}", tensor) for key, tensor in found.items()), self.facts.name)
            copied = copy.deepcopy(module)  # without numbers, as the model stays
            copied.load_state_dict(found | known, assign=True)
            return copied.eval().requires_grad_(False)

        embedding = filled(plain_embedding(table), names[id(table)])
        tied = names[id(head)] + ".weight" in model.all_tied_weights_keys
        own = filled(head, names[id(head)], **({"weight": embedding.weight} if tied else {}))
        if tied:
            own.weight = embedding.weight
        # As the whole model's head would be: packed, or plain because the model is too large for it.
        numbers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
        packed = prepack(own) if numbers * dtype.itemsize <= MOST_BYTES else own
        return Head(self.facts, embedding, filled(norm, names[id(norm)]), packed)


def plain_target(spec: str, adapter: str | None = None, device: str | torch.device = "cpu") -> Plain | None:
    """The target where its checkpoint is plain (:mod:`redraft.loading.stored`), none where it is not.

    ``device`` is where drafts for it belong. Raises ``UserError``.
    """
    with quiet():
        return _plain(spec, adapter, usable(device))


def _plain(spec: str, adapter: str | None, device: torch.device) -> Plain | None:
    name = spec if adapter is None else f"{spec} + {adapter}"
    base, adapter = split_adapter(spec, adapter)
    place, notes = locate(base), list[str]()
    found = _base_weights(place, base, notes)
    if found is None:
        return None
    model, weights = found
    try:
        changed = None if adapter is None else changes(model, weights, Adapter.read(adapter))
        if changed is not None:
            weights = weights | {key: Changed(weights[key], changed, key) for key in changed.names()}
        known = weights_hash(weights)
    except NotByLayer:
        return None
    if changed is not None and adapter is not None:
        notes += [*changed.notes(), *_other_base(adapter, base)]
    tokenizer = read_tokenizer(adapter, place, base)
    notes += check_rows(tokenizer, model, name)
    config, generation = model.config, _generation(place, model.config)
    told = {"generation": generation, "notes": tuple(notes), "device": device}
    return Plain(Facts(name, config, tokenizer, fingerprint=lambda: known, **told), model, weights)


def _base_weights(place: dict[str, Any], spec: str, notes: list[str]) -> tuple[Any, dict[str, Weight]] | None:
    """The model of a plain checkpoint, without numbers, and its weights; none where it is not plain.

    Raises ``UserError``.
    """
    folder = Path(place["pretrained_model_name_or_path"])
    files = weight_files(folder)
    if not files:
        return None
    check_folder(place, spec)
    config = read_config(place, spec)
    check_code(config, spec, notes)
    if quantised.plan(config, spec).method is not None:
        return None
    check_names(folder, spec, None)
    model = empty_model(config)
    weights = stored_weights(files, model, lambda names: without_known(names, config, notes))
    return None if weights is None else (model, dict(weights))


# -- tokenizers ------------------------------------------------------------------------------------------------------
def read_tokenizer(adapter: str | None, place: dict[str, Any], spec: str) -> Any:
    """The adapter's own tokenizer where it ships one, else the base model's. Raises ``UserError``."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        place, spec = place | {"pretrained_model_name_or_path": adapter, "local_files_only": True}, adapter
    # The tokenizer is read with the config beside it, and a config of an unknown kind is no fault of a tokenizer.
    where = {key: place[key] for key in ("pretrained_model_name_or_path", "local_files_only")}
    with one_line(f"the tokenizer of {spec}"):
        settings = get_tokenizer_config(**where)
        if type(longest := settings.get("model_max_length")) not in (int, float, type(None)):
            raise UserError(f"the tokenizer of {spec} has model_max_length {longest!r:.60}; a number is needed")
        auto = settings.get("auto_map")
        named = str(settings.get("tokenizer_class") or "")
        if auto and not any(hasattr(transformers, name) for name in (named, named + "Fast") if name):
            raise UserError(
                f"the tokenizer of {spec} asks to run Python code of its own (auto_map, {named or 'no class named'}), "
                "which redraft never does; save it as a tokenizer.json that transformers reads itself"
            )
    folder = Path(where["pretrained_model_name_or_path"])
    if folder.is_dir() and not any(True for name in VOCABULARIES for _ in folder.glob(name)):
        # transformers makes a tokenizer of a few special tokens then, and says nothing
        raise UserError(f"{spec} has no tokenizer that can be loaded: there is no tokenizer.json or other vocabulary")
    try:
        return transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except Exception as error:  # tokenizer files of strangers raise every kind of error
        raise UserError(f"{spec} has no tokenizer that can be loaded: {first_line(error)}") from error


def tokenizer_hash(tokenizer: Any) -> str:
    """A fingerprint of what token ids mean: every token with its id, and which of them are special (16 hex digits).

    The chat template and the choice of end and padding tokens are left out: fine-tuning changes them, and a draft
    that guesses ids does not mind.
    """
    added = tokenizer.added_tokens_decoder if hasattr(tokenizer, "added_tokens_decoder") else {}
    special = sorted(int(id) for id, token in added.items() if token.special)
    text = json.dumps([sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])), special])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_tokenizers(draft: Any, target: Any) -> None:
    """Raise ``UserError`` that names the first difference between two tokenizers; what one lacks cannot be compared."""
    if draft is None or target is None or draft is target or tokenizer_hash(draft) == tokenizer_hash(target):
        return
    mine, other = draft.get_vocab(), target.get_vocab()
    wrong = sorted((i, token) for token, i in other.items() if mine.get(token) != i)
    if wrong:
        number, token = wrong[0]
        where = f"{token!r} is {number} in the target's and {mine.get(token, 'absent')} in the draft's"
    else:
        where = f"the draft's has {len(mine)} tokens and the target's {len(other)}, or they mark others as special"
    raise UserError(f"the draft has another tokenizer than the target: {where}; give a draft of this model family")


def check_rows(tokenizer: Any, model: Any, name: str) -> list[str]:
    """Raise ``UserError`` for a tokenizer with ids that the model has no row for; rows without a token are padding.

    Marks of images and sound beyond the last row, as the text-only Gemma 3 has one, are noted instead: no text has
    them, and no head of this size says them.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    rows = min(int(part.weight.shape[0]) for part in (head, embedding) if part is not None)
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if not beyond:
        return []
    template = str(tokenizer.chat_template or "")
    if all(MODALITY_MARK.search(token) and token not in template for _, token in beyond):
        return [f"the tokenizer of {name} has {beyond[0][1]} and the model no row for it; prompts must not hold it"]
    last, token = beyond[-1]
    raise UserError(
        f"the tokenizer of {name} has ids up to {last} ({token!r}) and the model {rows} rows in its embedding and "
        f"head; resize the model to at least {last + 1} rows and train them, or take its first tokenizer"
    )
