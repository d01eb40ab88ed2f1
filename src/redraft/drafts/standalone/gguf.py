"""A Llama-shaped language model as one GGUF file, which llama.cpp loads: a standalone draft, or its target.

llama.cpp turns neighbouring components of a head where Hugging Face turns the two halves, so the rows of ``q_proj`` and
``k_proj`` are interleaved within each head. Norms are float32, as its kernels expect, everything else keeps the draft's
own data type.

The tokenizer is copied from the target's own file, or written from ``tokenizer.json``. Engines compare the vocabularies
of draft and target token by token, so every id must say the same in both. Written are byte-level vocabularies alone,
where llama.cpp needs nothing but tokens, merges and the name of how text is split beforehand; a name that is not known
is refused, since a wrong one splits text differently and says nothing.

Shape legend: O output rows, I input columns.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import tensors_bytes
from redraft.drafts.formats.base import ExportReport, Format
from redraft.drafts.standalone.folder import OTHER_BYTES, dense_model
from redraft.drafts.standalone.module import StandaloneDraft
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import gguf_of
from redraft.registries import EXPORTERS
from redraft.target import Facts

FILE, CARD = "model.gguf", "README.md"
# Numbers of the format: data type of a tensor, and of the file as a whole.
TYPES = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}
# Numbers of the format: types of values, and of tokens.
UINT32, INT32, BOOL, STRING, ARRAY = 4, 5, 7, 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# How a well-known family of tokenizers splits text; they differ in how many digits make a piece.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS = {r"\p{N}{1,3}".join(WORDS): "llama-bpe", r"\p{N}".join(WORDS): "qwen2"}
Fields = dict[str, tuple[Any, int, int]]
"""Metadata by key as (value, type, type of an array's items or 0)."""

EXPORTERS.register("gguf")(Format("gguf"))


class GgufWriter:
    """The format ``gguf``: one file, its tokenizer copied from the target's own GGUF file where there is one."""

    def check(self, draft: StandaloneDraft, target: Facts) -> tuple[StandaloneDraft, list[str]]:
        """The dense language model as llama.cpp computes it. Raises ``UserError`` where it would compute another."""
        if importlib.util.find_spec("gguf") is None:
            raise UserError("a GGUF file needs the package gguf: pip install redraft[quickstart]")
        dense = dense_model(draft, target)
        check_shape(dense.model.config)
        tensor_names(dense.stored(), dense.layers)
        token_fields(dense.tokenizer, dense.config.draft_vocab_size, gguf_of(target.name))
        return dense, []

    def write(self, dense: StandaloneDraft, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Read back before it is in place."""
        state, source = dense.stored(), gguf_of(target.name)
        fields = token_fields(dense.tokenizer, dense.config.draft_vocab_size, source)
        written = dict(gguf_tensors(dense.model, state))
        with atomic_folder(folder, tensors_bytes(written) + OTHER_BYTES, {FILE, CARD}) as new:
            _write(new / FILE, dense, target, written, fields)
            _check_file(new / FILE, written, fields)
        # llama.cpp's server with this draft at a fixed length: it proposes every token, however unsure it is.
        words = ["llama-server", "--model", str(source or "TARGET.gguf"), "--spec-draft-model", str(folder / FILE)]
        words += ["--spec-type", "draft-simple", "--spec-draft-n-max", str(tokens), "--spec-draft-p-min", "0"]
        written_as = f"written from tokenizer.json, text split as {fields['tokenizer.ggml.pre'][0]}"
        note = f"tokenizer: {f'copied from {source.name}' if source else written_as}"
        parameters = sum(tensor.numel() for tensor in state.values())
        size, serve = tensors_bytes(written), shlex.join(words)
        return ExportReport("gguf", folder, len(written), parameters, size, serve, (note,))


def check_shape(config: Any) -> None:
    """Raise ``UserError`` for a model that llama.cpp would compute differently under the name of a Llama."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    wanted = {
        "model_type": (config.model_type, ("llama",)),
        "hidden_act": (getattr(config, "hidden_act", "silu"), ("silu",)),
        "attention_bias": (bool(getattr(config, "attention_bias", False)), (False,)),
        "mlp_bias": (bool(getattr(config, "mlp_bias", False)), (False,)),
        "rope_type": (rope.get("rope_type", "default"), ("default", "linear", "llama3")),
    }
    faults = [f"{name} {value!r}" for name, (value, allowed) in wanted.items() if value not in allowed]
    if faults:
        raise UserError(f"a GGUF file of a plain Llama shape cannot hold {', '.join(faults)}; export hf instead")


# -- tensors ---------------------------------------------------------------------------------------------------------
def gguf_tensors(model: Any, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as the file has it. Raises ``UserError`` for one that has no place in the format."""
    config = model.config
    for name, place in tensor_names(state, config.num_hidden_layers).items():
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(place.split(".")[-2])
        kept = state[name].detach().cpu()
        if heads:
            kept = interleave(kept, heads)
        yield place, kept.float() if kept.ndim == 1 else kept.contiguous()
    if (factors := rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors


def tensor_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """The format's names of a Llama's tensors. Raises ``UserError`` for one that has no place in it."""
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = {name: known.get_name(name, try_suffixes=(".weight",)) for name in names}
    for name, place in found.items():
        if place is None or not place.endswith(".weight"):
            raise UserError(f"GGUF has no place for {name} in a Llama; export hf instead")
    return found


def interleave(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of each head from two halves to neighbouring pairs."""
    rows, columns = weight_OI.shape
    return weight_OI.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def rope_factors(model: Any) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by (llama3 angles); none for angles that its metadata describes."""
    rope = dict(model.config.rope_parameters)
    if rope.get("rope_type", "default") != "llama3":
        return None
    width = model.config.head_dim
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / model.base_model.rotary_emb.inv_freq.double().cpu()).float()


# -- the tokenizer ----------------------------------------------------------------------------------------------------
def token_fields(tokenizer: Any, rows: int, source: Path | None) -> Fields:
    """The tokenizer for a table of ``rows`` rows; ``source`` is the target's GGUF file.

    Raises ``UserError`` when the file's tokens are not the tokenizer's, or the tokenizer cannot be expressed.
    """
    if source is None:
        return _written(tokenizer, rows)
    fields = _copied(source)
    listed = fields.get("tokenizer.ggml.tokens", ([], 0, 0))[0]
    mine = _tokens(tokenizer, rows)
    wrong = next((i for i, (a, b) in enumerate(zip(listed, mine, strict=False)) if b is not None and a != b), None)
    if len(listed) != rows or wrong is not None:
        what = f"token {wrong} is {listed[wrong]!r}" if wrong is not None else f"it has {len(listed)} tokens"
        raise UserError(
            f"{source} has another vocabulary than the draft: {what}, the draft's table has {rows} rows"
            + (f" and says {mine[wrong]!r}" if wrong is not None else "")
        )
    return fields


def _tokens(tokenizer: Any, rows: int) -> list[str | None]:
    """The text of every row, as the vocabulary spells it; none for rows without a token."""
    found: list[str | None] = [None] * rows
    for token, number in tokenizer.get_vocab().items():
        if number >= rows:
            raise UserError(f"the tokenizer has a token {number} ({token!r}), the draft's table only {rows} rows")
        found[number] = token
    return found


def _copied(source: Path) -> Fields:
    import gguf

    try:
        fields = gguf.GGUFReader(source).fields
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(f"{source} is no GGUF file that can be read ({error}); remove it or copy it again") from error
    found: Fields = {}
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            kind, *part = map(int, field.types)
            found[name] = (field.contents(), kind, part[-1] if part else 0)
    return found


def _written(tokenizer: Any, rows: int) -> Fields:
    """From ``tokenizer.json``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(_unknown("it has no tokenizer.json"))
    spec = json.loads(backend.to_str())
    begin = tokenizer.bos_token_id
    added = {token["id"]: bool(token["special"]) for token in spec["added_tokens"]}
    tokens = _tokens(tokenizer, rows)
    kinds = [
        UNUSED if token is None else CONTROL if added.get(i) else USER_DEFINED if i in added else NORMAL
        for i, token in enumerate(tokens)
    ]
    texts = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    values: Fields = {
        "tokenizer.ggml.model": ("gpt2", STRING, 0),
        "tokenizer.ggml.pre": (split_name(spec), STRING, 0),
        "tokenizer.ggml.tokens": (texts, ARRAY, STRING),
        "tokenizer.ggml.token_type": (kinds, ARRAY, INT32),
        "tokenizer.ggml.merges": (merges, ARRAY, STRING),
        "tokenizer.ggml.add_space_prefix": (False, BOOL, 0),
        # Whether the tokenizer puts its first token before every text.
        "tokenizer.ggml.add_bos_token": (begin is not None and tokenizer("a")["input_ids"][:1] == [begin], BOOL, 0),
    }
    ids = {"bos": begin, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    values |= {f"tokenizer.ggml.{k}_token_id": (int(v), UINT32, 0) for k, v in ids.items() if v is not None}
    if isinstance(tokenizer.chat_template, str):
        values["tokenizer.chat_template"] = (tokenizer.chat_template, STRING, 0)
    return values


def split_name(spec: dict[str, Any]) -> str:
    """llama.cpp's name of how a ``tokenizer.json`` splits text before merging. Raises ``UserError`` for others."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    merges_bytes = spec["model"].get("type") == "BPE" and spec.get("normalizer") in (None, {"type": "NFC"})
    if not merges_bytes or kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        raise UserError(_unknown("it is no byte-level BPE"))
    by_words = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_words:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_words and steps[0].get("individual_digits"):
        return "smollm"
    pattern = str(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else ""
    if pattern in SPLITS and not by_words:
        return SPLITS[pattern]
    raise UserError(_unknown("llama.cpp's name of its splitting is not known here"))


def _unknown(why: str) -> str:
    return f"the tokenizer cannot be written into a GGUF file ({why}); put the target's own GGUF into its folder"


# -- the file --------------------------------------------------------------------------------------------------------
def _write(path: Path, draft: StandaloneDraft, target: Facts, tensors: dict[str, Tensor], fields: Fields) -> None:
    import gguf

    writer, config = gguf.GGUFWriter(path, "llama"), draft.model.config
    rope = dict(config.rope_parameters)
    try:
        writer.add_type("model")
        writer.add_name(f"draft of {target.name}" if target.name else "draft")
        # The shape, none of it left to defaults.
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        writer.add_file_type(TYPES[draft.dtype][1])
        writer.add_vocab_size(draft.config.draft_vocab_size)
        for name, (value, kind, part) in fields.items():
            writer.add_key_value(name, value, gguf.GGUFValueType(kind), gguf.GGUFValueType(part) if part else None)
        for name, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[TYPES[tensor.dtype][0]]
            # Numpy has no bfloat16; the writer takes bytes and counts the columns by the type.
            raw = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
            writer.add_tensor(name, raw.numpy(), raw_dtype=kind if raw is not tensor else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check_file(path: Path, tensors: dict[str, Tensor], fields: Fields) -> None:
    """Raise ``RuntimeError`` unless the file holds just these tensors and tokens (a defect of ours)."""
    import gguf

    reader = gguf.GGUFReader(path)
    kinds = {name: dtype for dtype, (name, _) in TYPES.items()}
    back = {}
    for found in reader.tensors:
        flat = torch.frombuffer(bytearray(found.data.tobytes()), dtype=kinds[found.tensor_type.name])
        back[found.name] = flat.view([int(size) for size in reversed(found.shape.tolist())])
    same = back.keys() == tensors.keys() and all(
        back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) for name, tensor in tensors.items()
    )
    stored = reader.fields
    told = all(name in stored and stored[name].contents() == value for name, (value, _, _) in fields.items())
    if not same or not told:
        raise RuntimeError("the gguf export does not read back as the draft that was written")
