"""Opening the frozen target and its tokenizer by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from redraft.artifact import read_json
from redraft.errors import UserError
from redraft.loading.adapters import merge
from redraft.loading.checkpoint import load_model
from redraft.loading.places import ADAPTER_FILE, adapter_base, locate
from redraft.loading.quiet import first_line, quiet
from redraft.loading.tokenizers import check_rows, read_tokenizer
from redraft.target import Target

# What is known of an opened model travels on it, since a target is made of a model in many places.
_NOTES, _ROUNDS = "redraft_notes", "redraft_rounds"


def load_target(
    spec: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    taps: Sequence[int] | None = None,
    served: bool = False,
) -> Target:
    """The frozen target that ``spec`` names: a model folder, an adapter folder, a hub id or ``embedded:NAME``.

    ``adapter`` is a PEFT adapter (folder or hub id) to be merged into it. Adapters are merged in float32 and the
    result is cast, so that no rounding comes between base and adapter. ``served`` says that the target's text comes
    from its server, so that the model here need only be near it: see :func:`served_otherwise`. Raises ``UserError``
    when anything is missing, does not fit, holds more than it says, is no dense causal language model, or (unless
    ``served``) is not the model that engines serve.
    """
    if adapter is None and (Path(spec) / ADAPTER_FILE).is_file():
        adapter, base = spec, adapter_base(spec)
        name = spec
    else:
        base, name = spec, spec if adapter is None else f"{spec} + {adapter}"
    with quiet():
        place = locate(base)
        model, notes, rounds = load_model(place, base, dtype if adapter is None else torch.float32)
        if rounds and not served:
            raise UserError(
                f"{base} is served with quantised {rounds}, and the model computed here rounds nothing: its text would "
                "not be the served one's; let the server answer (--server), or give the unquantised checkpoint"
            )
        if adapter is not None:
            model, more = merge(model, adapter)
            model, notes = model.to(dtype), [*notes, *more, *_other_base(adapter, base)]
        _check_finite(model, name)
        tokenizer = read_tokenizer(adapter, place, base)
        notes = [*notes, *check_rows(tokenizer, model, name)]
    setattr(model, _NOTES, tuple(notes))
    setattr(model, _ROUNDS, rounds)
    return Target(_to_device(model, device), tokenizer, name=name, taps=taps)


def _other_base(adapter: str, base: str) -> list[str]:
    """A note where an adapter in a folder names another base model than the one it was put on."""
    file = Path(adapter) / ADAPTER_FILE
    named = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    if not isinstance(named, str) or Path(named).name.lower() in ("", Path(base).name.lower()):
        return []
    return [f"the adapter {adapter} names {named} as its base model and was put on {base}"]


def notes_of(target: Target) -> tuple[str, ...]:
    """What was noted when this target was opened, in sentences for the user."""
    return tuple(getattr(target.model, _NOTES, ()))


def served_otherwise(target: Target) -> str | None:
    """What engines round when they serve this target and the model here does not; none where both are the same.

    Who generates or measures in process must refuse a target with an answer.
    """
    return getattr(target.model, _ROUNDS, None)


def load_tokenizer(spec: str) -> Any:
    """The tokenizer that belongs to ``spec``. Raises ``UserError`` when there is none."""
    with quiet():
        if (Path(spec) / ADAPTER_FILE).is_file():
            base = adapter_base(spec)
            return read_tokenizer(spec, locate(base), base)
        return read_tokenizer(None, locate(spec), spec)


def _check_finite(model: Any, name: str) -> None:
    """Raise ``UserError`` for a model with NaN or infinity in a parameter: its text would be token 0 for ever."""
    for parameter, tensor in model.named_parameters():
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        low, high = tensor.detach().aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(f"{name} holds NaN or infinity in {parameter}; is its training sound?")


def _to_device(model: Any, device: str | torch.device) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {device} cannot be used: {first_line(error)}") from error
