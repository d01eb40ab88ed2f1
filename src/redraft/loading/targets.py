"""Opening the frozen target, its head or its facts, and its tokenizer, by name.

Facts and head need no model where the checkpoint is plain: where its safetensors hold, by the very names and shapes,
the tensors of the model that its config describes. Then the hash of its weights and the head can be read from the files
as they lie, and nothing is built but a model without numbers, which says what is where. Whatever else there is
(adapters, quantised and converted weights, damaged files) goes through :func:`load_target`, and is refused there where
it is to be refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from redraft.artifact import read_json
from redraft.errors import UserError
from redraft.loading import quantised
from redraft.loading.adapters import merge
from redraft.loading.checkpoint import check_code, check_folder, check_names, load_model, weight_files
from redraft.loading.places import ADAPTER_FILE, first_line, locate, one_line, quiet, split_adapter
from redraft.loading.tokenizers import check_rows, read_tokenizer
from redraft.prepack import MOST_BYTES, prepack
from redraft.target import Facts, Head, Target
from redraft.target.facts import empty_model, final_norm, plain_embedding, tensors_fingerprint, text_decoder


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


# -- facts and head --------------------------------------------------------------------------------------------------
def read_facts(spec: str, tokenizer: bool = True, device: str | torch.device = "cpu") -> Facts:
    """What the config and the tokenizer of ``spec`` say; its weights may be elsewhere, and the hash is the config's.

    ``tokenizer``: whether it is read too; ``device``: where drafts for it belong. Raises ``UserError``.
    """
    base, adapter = split_adapter(spec)
    with quiet():
        place = locate(base)
        config = read_config(place, base)
        words = read_tokenizer(adapter, place, base) if tokenizer else None
    return Facts(spec, config, words, generation=_generation(place, config), device=device)


def open_facts(spec: str, adapter: str | None = None, dtype: torch.dtype = torch.float32) -> Facts:
    """The facts of a target whose weights are here, their hash among them.

    ``dtype`` is that of the model, where it must be opened. Raises ``UserError``.
    """
    with quiet():
        plain = PlainCheckpoint.at(spec, adapter)
    return plain.facts if plain is not None else load_target(spec, dtype, "cpu", adapter, (), True).facts


def open_head(
    spec: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapter: str | None = None,
    served: bool = False,
) -> Head:
    """The head of a target, with the arguments of :func:`redraft.loading.load_target`. Raises ``UserError``."""
    with quiet():
        plain = PlainCheckpoint.at(spec, adapter)
    if plain is not None:
        return plain.head(dtype, device)
    return load_target(spec, dtype, device, adapter, taps=(), served=served).head_part


def read_config(place: dict[str, Any], spec: str) -> Any:
    """The config at ``place`` (:func:`redraft.loading.places.locate`). Raises ``UserError``."""
    from transformers import AutoConfig

    with one_line(f"the config of {spec}"):
        return AutoConfig.from_pretrained(**place)


def _generation(place: dict[str, Any], config: Any) -> Any:
    """The generation config beside a config, or what the config alone makes of one."""
    from transformers import GenerationConfig

    where = {key: place[key] for key in ("pretrained_model_name_or_path", "local_files_only")}
    try:
        return GenerationConfig.from_pretrained(where.pop("pretrained_model_name_or_path"), **where)
    except (OSError, ValueError):  # many checkpoints have none
        return GenerationConfig.from_model_config(config)


class PlainCheckpoint:
    """A folder whose files hold the tensors of its model as they are called there."""

    def __init__(self, facts: Facts, model: Any, tensors: dict[str, Tensor]) -> None:
        """``model`` has no numbers; ``tensors`` are views of the files by the names of the model's state."""
        self.facts, self.model, self.tensors = facts, model, tensors

    @classmethod
    def at(cls, spec: str, adapter: str | None = None) -> PlainCheckpoint | None:
        """The plain checkpoint that ``spec`` names; none where it is not plain. Raises ``UserError``."""
        base, adapter = split_adapter(spec, adapter)
        place = locate(base)
        folder, notes = Path(place["pretrained_model_name_or_path"]), list[str]()
        files = weight_files(folder)
        if adapter is not None or not files:
            return None
        check_folder(place, spec)
        config = read_config(place, base)
        check_code(config, spec, notes)
        if quantised.plan(config, spec).method is not None:
            return None
        check_names(folder, spec, None)
        model = empty_model(config)
        tensors = _tensors(files, model)
        if tensors is None:
            return None
        tokenizer = read_tokenizer(None, place, base)
        notes += check_rows(tokenizer, model, spec)
        known = tensors_fingerprint(tensors)
        generation = _generation(place, config)
        facts = Facts(spec, config, tokenizer, generation=generation, notes=tuple(notes), fingerprint=lambda: known)
        return cls(facts, model, tensors)

    def head(self, dtype: torch.dtype, device: str | torch.device) -> Head:
        """The ends of the model in ``dtype``. Raises ``UserError`` where they hold NaN or infinity."""
        decoder, head = text_decoder(self.model), self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        table, norm = decoder.get_input_embeddings(), final_norm(decoder)
        tied = names[id(head)] + ".weight" in self.model.all_tied_weights_keys

        def fill(module: nn.Module, name: str) -> Any:
            found = {key: self.tensors[f"{name}.{key}"].to(device, dtype) for key in module.state_dict()}
            module.load_state_dict(found, assign=True)
            check_finite(((f"{name}.{key}", tensor) for key, tensor in found.items()), self.facts.name)
            return module.eval().requires_grad_(False)

        embedding = fill(plain_embedding(table), names[id(table)])
        filled = fill(head, names[id(head)])
        if tied:
            filled.weight = embedding.weight
        # As the whole model's head would be: packed, or plain because the model is too large for it.
        numbers = sum(layer.weight.numel() for layer in self.model.modules() if isinstance(layer, nn.Linear))
        packed = prepack(filled) if numbers * dtype.itemsize <= MOST_BYTES else filled
        return Head(self.facts, embedding, fill(norm, names[id(norm)]), packed)


def _tensors(files: list[Path], model: Any) -> dict[str, Tensor] | None:
    """Views of the files by the names of the model's state; none where names or shapes are not those of the files."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}
        except Exception:  # a damaged file: whoever opens the model says what is wrong with it
            return None
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != {n: s for n, s in wanted.items() if n not in tied}:
        return None
    exact = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    return None if exact else found | {name: found[source] for name, source in tied.items()}
