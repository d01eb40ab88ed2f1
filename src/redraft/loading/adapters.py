"""Merging a PEFT adapter into its base model, so that the result is an ordinary model that computes the same.

Right or refused: the logits of the merged model are compared with those that the adapter gave on top of its base.
Two things are done on the way that PEFT leaves to its caller: a vocabulary that was grown in training is grown
here, and a head that shares its table with the embedding gets a table of its own before either is merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redraft.errors import UserError
from redraft.inputs import read_json, within
from redraft.loading.checkpoint import check_kinds
from redraft.loading.places import ADAPTER_FILE, check_files, first_line, hub_cached, like_hub_id, on_hub, reason_of
from redraft.places import at_home

# Starting values that leave the base as it is. The others (pissa, olora, corda, loftq, ...) change it.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Of the logits' norm: what rounding may put between two orders of the same float32 sums.
ROUNDING = 1e-4
# Of the norm of what the adapter changes.
CHANGE = 1e-2


@dataclass
class Adapter:
    """A PEFT adapter as its files have it: ``name`` as it was given, ``config`` and ``state`` as PEFT reads them."""

    name: str
    place: str
    config: Any
    state: dict[str, Tensor]

    @classmethod
    def read(cls, adapter: str) -> Adapter:
        """``adapter`` is a folder or a hub id. Raises ``UserError`` for one that cannot be read or merged at all."""
        try:
            import peft
        except ImportError as error:
            raise UserError(f"the adapter {adapter} needs the package peft: pip install redraft[peft]") from error
        place = _place(adapter)
        with _fitting(adapter):
            if Path(place).is_dir():
                check_files(Path(place))
            config = peft.PeftConfig.from_pretrained(place)
            if (file := Path(place) / ADAPTER_FILE).is_file():
                check_kinds(read_json(file, finite=False), config, file)
            _check_kind(config, adapter)
            return cls(adapter, place, config, peft.load_peft_weights(place, device="cpu"))

    def grown(self, model: Any) -> bool:
        """Whether it was trained with another number of rows than the model has in its embedding and head."""
        return bool(_asked(model, self.state) - {int(model.get_input_embeddings().weight.shape[0])})

    def join(self, model: Any) -> Any:
        """PEFT's model of both, with all tensors of the file in their places. Raises ``UserError``."""
        import peft

        mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        with _fitting(self.name):
            _check_patterns(self.config, model, self.name)
            joined = peft.PeftModel.from_pretrained(model, self.place).eval()
            # Once more, for its report: PEFT itself drops what has no place, and keeps what is missing at its start.
            report = joined.load_adapter(self.place, "default", key_mapping=mapping)
        if report.missing_keys:
            raise UserError(
                f"the adapter {self.name} lacks tensors for its base model, first {sorted(report.missing_keys)[0]}; is "
                "it whole, and is this its base?"
            )
        # A grown vocabulary makes PEFT write such a table twice, the second time under a name that it does not read.
        extra = sorted(key for key in report.unexpected_keys if not _written_twice(key, self.state))
        if extra:
            raise UserError(
                f"the adapter {self.name} has {len(extra)} tensors that its base model lacks, first {extra[0]}"
            )
        return joined.eval()


@contextmanager
def _fitting(adapter: str) -> Iterator[None]:
    """Raise whatever PEFT makes of a file that it does not expect as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of every kind
        reason = f"{error} is not in its file" if isinstance(error, KeyError) else reason_of(error)
        raise UserError(f"the adapter {adapter} does not fit its base model: {reason}") from error


def merge(model: Any, adapter: Adapter) -> tuple[Any, list[str]]:
    """The float32 ``model`` with the adapter's change in its weights, and notes for the user.

    Raises ``UserError`` where it does not fit, cannot be merged, or where the merged model would not compute what the
    adapter does.
    """
    own, name = int(model.get_input_embeddings().weight.shape[0]), adapter.name
    with _fitting(name):
        grown = _resize(model, adapter.state, name)
    model, notes = _merged(adapter.join(model), adapter.config, name, grown)
    if grown:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if not torch.isfinite(table.weight[own:]).all():
                raise UserError(
                    f"the adapter {name} was trained with a vocabulary of {grown} rows and its base model has "
                    f"{own}; it must bring the new rows: save it with embedding and head in it (modules_to_save), or "
                    "name a base model that has these rows"
                )
        notes.append(f"the vocabulary was grown from {own} to {grown} rows, as the adapter {name} was trained")
    return model, notes


# What the patterns of an adapter may take on all names of its base model.
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")
PATTERN_SECONDS = 10.0


def _check_patterns(config: Any, model: Any, adapter: str) -> None:
    """Raise ``UserError`` for a pattern of modules that is none, or that does not come to an end on a name."""
    values = [getattr(config, name, None) for name in PATTERNS]
    texts = [one for value in values for one in ([value] if isinstance(value, str) else value or ())]
    with within(PATTERN_SECONDS, f"a pattern of modules of the adapter {adapter}"):
        for pattern in map(re.compile, filter(lambda text: isinstance(text, str), texts)):
            for name, _ in model.named_modules():
                pattern.fullmatch(name), pattern.search(name)


def _written_twice(key: str, state: dict[str, Tensor]) -> bool:
    plain = key.replace(".modules_to_save.", ".")
    return key in state and plain != key and plain in state and torch.equal(state[key], state[plain])


def _place(adapter: str) -> str:
    """The folder of the adapter, or its hub id where the hub can be reached."""
    folder = at_home(adapter)
    if folder.is_dir() and not (folder / ADAPTER_FILE).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_FILE}"))
        hint = f"; it holds several: name one, such as {folder / inside[0]}" if inside else ""
        raise UserError(f"{adapter} holds no {ADAPTER_FILE}; name the folder of a PEFT adapter{hint}")
    if not folder.is_dir() and (folder.exists() or not like_hub_id(adapter)):
        raise UserError(f"the adapter {adapter} does not exist; name the folder of a PEFT adapter or a hub id")
    return str(folder) if folder.is_dir() else adapter if on_hub(adapter) else hub_cached(adapter)


def _check_kind(config: Any, adapter: str) -> None:
    """Raise ``UserError`` for adapters that no weights can stand for, or whose base is not the model they name."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    task = getattr(config.task_type, "value", config.task_type)
    start = getattr(config, "init_lora_weights", None)
    reason = None
    if config.is_prompt_learning or kind in ("ADAPTION_PROMPT", "XLORA", "POLY", "SHADOW"):
        reason = f"is {kind.lower().replace('_', ' ')}, which works beside the weights"
    elif task not in (None, "CAUSAL_LM"):
        reason = f"was trained for {task}, not for a causal language model"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "is an activated LoRA, which works behind its invocation tokens only"
    elif getattr(config, "layer_replication", None):
        reason = "replicates layers of its base (layer_replication)"
    elif start not in PLAIN_STARTS:
        reason = (
            f"was started with init_lora_weights {start!r}, which changes its base model too, and engines add it to "
            "the unchanged base; save it converted to a plain LoRA (path_initial_model_for_weight_conversion)"
        )
    if reason:
        raise UserError(f"the adapter {adapter} cannot be merged: it {reason}")


# -- a grown vocabulary ----------------------------------------------------------------------------------------------
def _resize(model: Any, state: dict[str, Tensor], adapter: str) -> int | None:
    """Give the model as many rows in its embedding and head as the adapter was trained with; the number if it grew.

    New rows are NaN until the adapter fills them. Raises ``UserError`` where its tables have different sizes.
    """
    asked = _asked(model, state)
    own = int(model.get_input_embeddings().weight.shape[0])
    if asked <= {own}:
        return None
    if len(asked) > 1:
        raise UserError(f"the adapter {adapter} has tables of {sorted(asked)} rows for one vocabulary, its base {own}")
    rows = asked.pop()
    model.resize_token_embeddings(rows, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if table is not None:
            table.weight.data[own:] = float("nan")
    return rows if rows > own else None


def _asked(model: Any, state: dict[str, Tensor]) -> set[int]:
    """The rows of the model's embedding and head as the adapter's file has them."""
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    return {count for name in names for count in _rows(state, name)}


def _rows(state: dict[str, Tensor], name: str) -> set[int]:
    """Rows of the table ``name`` as the adapter's file has it: whole, or as a low-rank change."""
    found = set()
    for key, tensor in state.items():
        if f".{name}." not in f".{key}":
            continue
        if key.endswith(".lora_embedding_A"):
            found.add(int(tensor.shape[1]))
        elif key.endswith((".lora_B.weight", f"{name}.weight", ".base_layer.weight", ".original_module.weight")):
            found.add(int(tensor.shape[0]))
    return found


# -- merging ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def _merged(joined: Any, config: Any, adapter: str, grown: int | None) -> tuple[Any, list[str]]:
    ids = _test_ids(joined, config, grown)
    try:
        expected = joined(input_ids=ids, use_cache=False).logits
        with joined.disable_adapter():
            change = float((expected - joined(input_ids=ids, use_cache=False).logits).norm())
        ties = dict(getattr(joined.get_base_model(), "all_tied_weights_keys", {}))
        shared = _untie(joined)
        model = joined.merge_and_unload()
    except Exception as error:
        raise UserError(f"the adapter {adapter} cannot be merged: {first_line(error)}") from error
    if shared:
        _tie_again(model, ties)
    if not expected.isfinite().all():
        return model, []  # rows that the adapter did not fill; the caller names them
    got = model(input_ids=ids, use_cache=False).logits
    away, scale = float((got - expected).norm()), float(expected.norm())
    # With a grown vocabulary the base alone has no numbers to compare with.
    if not away <= max(ROUNDING * scale, 0.0 if grown else CHANGE * change):
        raise UserError(
            f"the adapter {adapter} ({getattr(config.peft_type, 'value', config.peft_type)}) cannot be merged: the "
            f"merged model's logits are {away / scale:.1e} of their norm away from those of base and adapter"
        )
    return model, [] if change else [f"the adapter {adapter} changes no logit of {ids.numel()} tokens that were tried"]


def _test_ids(joined: Any, config: Any, grown: int | None) -> Tensor:
    """A few tokens [1, T]: spread over the vocabulary, its last ones, and those that the adapter names."""
    table = joined.get_input_embeddings()
    rows = int(grown or getattr(table, "num_embeddings", 0) or table.weight.shape[0])
    named = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    listed = [i for one in (named.values() if isinstance(named, dict) else [named]) for i in one]
    ids = [*range(1, rows, max(1, rows // 12)), *range(max(0, rows - 4), rows), *listed[:16]]
    return torch.tensor([ids], device=joined.device)


def _untie(joined: Any) -> bool:
    """Give every table that shares its numbers with the embedding numbers of its own; whether there was one."""
    seen, shared = set[int](), False
    for module in joined.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Embedding | nn.Linear) else None
        if weight is None:
            continue
        if weight.data_ptr() in seen and weight.numel():
            module._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
            shared = True
        seen.add(weight.data_ptr())
    return shared


def _tie_again(model: Any, ties: dict[str, str]) -> None:
    """Let head and embedding share one table where they still are the same, else say in the config that they do not.

    ``ties`` is what transformers knew as tied before: it decides what a saved checkpoint leaves out.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    same = torch.equal(head.weight, embedding.weight)
    if same:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = same
    model.all_tied_weights_keys = ties if same else {}
