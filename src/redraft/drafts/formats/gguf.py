"""What the GGUF files of all families share: the tokenizer, rotary angles, and the file itself, written and read back.

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
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from redraft.artifact import goes_on
from redraft.errors import UserError
from redraft.pieces import Table, pieces, table, whole

FILE = "model.gguf"
# What a folder of this format may hold, a model card besides.
FILES = {FILE, "README.md"}
# Numbers of the format: data type of a tensor, and of the file as a whole.
TYPES = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32), torch.int64: ("I64", 0)}
# Numbers of the format: types of values, and of tokens.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# How the numbers of the format stand in a file, by the number of their type, and on what tensors begin.
FORMS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
ALIGNMENT = 32

# How a well-known family of tokenizers splits text; they differ in how many digits make a piece.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS = {r"\p{N}{1,3}".join(WORDS): "llama-bpe", r"\p{N}".join(WORDS): "qwen2"}
Fields = dict[str, tuple[Any, int, int]]
"""Metadata by key as (value, type, type of an array's items or 0)."""


def need_gguf() -> None:
    """Raise ``UserError`` where the package that writes such files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("a GGUF file needs the package gguf: pip install redraft[quickstart]")


# -- the layers ------------------------------------------------------------------------------------------------------
def interleave(weight_OI: Tensor, heads: int, turned: int = 0) -> Tensor:
    """Rows of each head from two halves to neighbouring pairs, of its first ``turned`` rows alone where given."""
    rows, columns = weight_OI.shape
    turned = turned or rows // heads
    parts = weight_OI.view(heads, rows // heads, columns)
    pairs = parts[:, :turned].reshape(heads, 2, turned // 2, columns).transpose(1, 2).reshape(heads, turned, columns)
    return torch.cat([pairs, parts[:, turned:]], 1).reshape(rows, columns)


def interleaved(weight_OI: Table | Tensor, heads: int, turned: int = 0) -> Table:
    """:func:`interleave`, head by head."""

    def make() -> Iterator[Tensor]:
        return (interleave(head, 1, turned) for head in whole(weight_OI).detach().cpu().chunk(heads))

    return Table(weight_OI.dtype, weight_OI.shape, make)


def rope_factors(rope: Mapping[str, Any], frequencies: Tensor) -> Tensor:
    """What llama.cpp divides each plain rotary frequency by to come to ``frequencies`` [turned / 2], in float32."""
    turned = 2 * len(frequencies)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    return (plain / frequencies.double().cpu()).float()


def shape_fields(
    architecture: str, layer: Any, rows: int, rope: Mapping[str, Any], turned: int, context: int
) -> Fields:
    """The shape of a stack of Llama layers, none of it left to defaults.

    ``layer`` has a Llama config's names of its widths; ``rows`` is the size of the vocabulary and ``turned`` how many
    components of a head the positions turn.
    """
    values = {
        "context_length": context,
        "embedding_length": layer.hidden_size,
        "feed_forward_length": layer.intermediate_size,
        "attention.head_count": layer.num_attention_heads,
        "attention.head_count_kv": layer.num_key_value_heads,
        "attention.key_length": layer.head_dim,
        "attention.value_length": layer.head_dim,
        "attention.layer_norm_rms_epsilon": float(layer.rms_norm_eps),
        "rope.dimension_count": turned,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": rows,
    }
    return {f"{architecture}.{key}": typed(value) for key, value in values.items()}


def typed(value: Any) -> tuple[Any, int, int]:
    """A value with its type in the format; whole numbers are unsigned, those in lists signed."""
    if isinstance(value, list):
        return value, ARRAY, INT32
    kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}
    return value, kinds[type(value)], 0


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
    splits = split_name(spec)
    if not spec["model"]["merges"]:
        raise UserError(_unknown("it merges nothing, and llama.cpp asks for merges"))
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
        "tokenizer.ggml.pre": (splits, STRING, 0),
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


def tokenizer_note(fields: Fields, source: Path | None) -> str:
    """Where the tokenizer of a file is from, for whoever exports it."""
    written_as = f"written from tokenizer.json, text split as {fields['tokenizer.ggml.pre'][0]}"
    return f"tokenizer: {f'copied from {source.name}' if source else written_as}"


def _unknown(why: str) -> str:
    return f"the tokenizer cannot be written into a GGUF file ({why}); put the target's own GGUF into its folder"


# -- the file --------------------------------------------------------------------------------------------------------
def write_file(path: Path, architecture: str, fields: Fields, tensors: Mapping[str, Tensor]) -> None:
    """Write the file and read it back. Raises ``RuntimeError`` where that differs (a defect of ours).

    ``tensors`` may make each when it is asked for it, whole or piece by piece: no more than one piece is in memory.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    listed = {name: table(tensors, name) for name in tensors}
    try:
        for name, (value, kind, part) in fields.items():
            writer.add_key_value(name, value, gguf.GGUFValueType(kind), gguf.GGUFValueType(part) if part else None)
        for name, tensor in listed.items():
            number = gguf.GGMLQuantizationType[TYPES[tensor.dtype][0]]
            # The type of numpy's numbers counts for nothing beside the number of the type.
            writer.add_tensor_info(name, tensor.shape, numpy.dtype("float32"), tensor.nbytes, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in listed.values():
            writer.write_tensor_data(_Numbers(tensor))
    finally:
        writer.close()
    if not reads_back(path, {"general.architecture": typed(architecture)} | fields, listed):
        raise RuntimeError("the gguf export does not read back as the draft that was written")


class _Numbers:
    """A tensor as the library's writer takes one: its size, and its bytes into a file."""

    def __init__(self, tensor: Table | Tensor) -> None:
        self.tensor, self.nbytes = tensor, tensor.nbytes

    def tofile(self, file: BinaryIO) -> None:
        for piece in pieces(self.tensor):
            file.write(piece.view(torch.uint8).numpy().data)


# -- reading back ----------------------------------------------------------------------------------------------------
def reads_back(path: Path, fields: Fields, tensors: Mapping[str, Table | Tensor]) -> bool:
    """Whether a file holds these metadata and tensors and nothing else, as far as its types can hold them.

    It is gone through once and compared on the way. The library's reader makes two arrays of every string, which for a
    large vocabulary is more than the draft.
    """
    with path.open("rb") as file:
        magic, _, count, keys = _unpacked(file, "<4sIQQ")
        if (magic, count, keys) != (b"GGUF", len(tensors), len(fields)):
            return False
        for _ in range(keys):
            name, (kind,) = _text(file), _unpacked(file, "<I")
            if name not in fields or not _same_value(file, kind, *fields[name]):
                return False
        starts: dict[str, int] = {}
        for _ in range(count):
            name, (axes,) = _text(file), _unpacked(file, "<I")
            *shape, kind, start = _unpacked(file, f"<{axes}QIQ")
            if name not in tensors or not _same_kind(tensors[name], shape[::-1], kind):
                return False
            starts[name] = start
        data = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        for name, start in starts.items():
            file.seek(data + start)
            if not goes_on(file, tensors[name]):
                return False
    return starts.keys() == tensors.keys()


def _unpacked(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    return file.read(_unpacked(file, "<Q")[0]).decode()


def _same_kind(tensor: Table | Tensor, shape: Sequence[int], kind: int) -> bool:
    import gguf

    return list(tensor.shape) == list(shape) and gguf.GGMLQuantizationType(kind).name == TYPES[tensor.dtype][0]


def _same_value(file: BinaryIO, found: int, value: Any, kind: int, part: int) -> bool:
    """Whether the value that stands next in the file is this one of this type."""
    if found != kind:
        return False
    if kind == STRING:
        return _text(file) == value
    if kind != ARRAY:
        return bool(_unpacked(file, FORMS[kind])[0] == _held(value, kind))
    of, length = _unpacked(file, "<IQ")
    return (of, length) == (part, len(value)) and all(_same_value(file, of, each, part, 0) for each in value)


def _held(value: Any, kind: int) -> Any:
    """A number as its type can hold it."""
    return torch.tensor(value, dtype=torch.float32).item() if kind == FLOAT32 else value


def general_fields(target_name: str, dtype: torch.dtype) -> Fields:
    """What stands at the head of every file."""
    name = f"draft of {target_name}" if target_name else "draft"
    values = {"general.type": "model", "general.name": name, "general.file_type": TYPES[dtype][1]}
    return {key: typed(value) for key, value in values.items()}
