"""Opening the frozen target and its tokenizer by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import read_json
from redraft.errors import UserError
from redraft.loading.adapters import merge
from redraft.loading.checkpoint import load_model
from redraft.loading.places import ADAPTER_FILE, locate, split_adapter
from redraft.loading.quiet import first_line, quiet
from redraft.loading.tokenizers import check_rows, read_tokenizer
from redraft.target import Target


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
    from its server, so that the model here need only be near it; ``target.rounding`` says then what engines round
    besides. Raises ``UserError`` when anything is missing, does not fit, holds more than it says, is no dense causal
    language model, or (unless ``served``) is not the model that engines serve.
    """
    name = spec if adapter is None else f"{spec} + {adapter}"
    base, adapter = split_adapter(spec, adapter)
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
        check_finite(model.named_parameters(), name)
        tokenizer = read_tokenizer(adapter, place, base)
        notes = [*notes, *check_rows(tokenizer, model, name)]
    return Target(_to_device(model, device), tokenizer, name, taps, notes, rounds)


def _other_base(adapter: str, base: str) -> list[str]:
    """A note where an adapter in a folder names another base model than the one it was put on."""
    file = Path(adapter) / ADAPTER_FILE
    named = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    if not isinstance(named, str) or Path(named).name.lower() in ("", Path(base).name.lower()):
        return []
    return [f"the adapter {adapter} names {named} as its base model and was put on {base}"]


def load_tokenizer(spec: str) -> Any:
    """The tokenizer that belongs to ``spec``. Raises ``UserError`` when there is none."""
    with quiet():
        base, adapter = split_adapter(spec)
        return read_tokenizer(adapter, locate(base), base)


def check_finite(named: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Raise ``UserError`` for a model with NaN or infinity in a parameter: its text would be token 0 for ever."""
    for parameter, tensor in named:
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
