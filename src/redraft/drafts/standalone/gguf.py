"""A Llama-shaped language model as one GGUF file, which llama.cpp loads: a standalone draft, or its target.

llama.cpp turns neighbouring components of a head where Hugging Face turns the two halves, so the rows of ``q_proj`` and
``k_proj`` are interleaved within each head. Norms are float32, as its kernels expect, everything else keeps the draft's
own data type. The tokenizer is the target's (:mod:`redraft.drafts.standalone.gguf_tokens`).

Shape legend: O output rows, I input columns.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import tensors_bytes
from redraft.drafts.formats.base import ExportReport, Format
from redraft.drafts.standalone.folder import OTHER_BYTES
from redraft.drafts.standalone.gguf_tokens import TokenFields, token_fields
from redraft.drafts.standalone.module import StandaloneDraft
from redraft.drafts.standalone.writing import dense_model
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import gguf_of
from redraft.registries import EXPORTERS
from redraft.target import Facts

FILE = "model.gguf"
ARCHITECTURE = "llama"
# Numbers of the format: data type of a tensor, and of the file as a whole.
TYPES = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}

EXPORTERS.register("gguf")(Format("gguf"))


class GgufWriter:
    """The format ``gguf``: one file, its tokenizer copied from the target's own GGUF file where there is one."""

    def check(self, draft: StandaloneDraft, target: Facts) -> tuple[StandaloneDraft, list[str]]:
        """The dense language model as llama.cpp computes it. Raises ``UserError`` where it would compute another."""
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise UserError("a GGUF file needs the package gguf: pip install gguf") from error
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
        with atomic_folder(folder, tensors_bytes(written) + OTHER_BYTES, {FILE}) as new:
            _write(new / FILE, dense, target, written, fields)
            _check_file(new / FILE, written, fields)
        parameters, serve = sum(t.numel() for t in state.values()), server_command(source, folder / FILE, tokens)
        size, notes = tensors_bytes(written), (f"tokenizer: {fields.origin}",)
        return ExportReport("gguf", folder, len(written), parameters, size, serve, notes)


def server_command(target: Path | None, draft: Path, tokens: int) -> str:
    """llama.cpp's server with this draft at a fixed length: it proposes every token, however unsure it is."""
    words = ["llama-server", "--model", str(target or "TARGET.gguf"), "--spec-draft-model", str(draft)]
    words += ["--spec-type", "draft-simple", "--spec-draft-n-max", str(tokens), "--spec-draft-p-min", "0"]
    return shlex.join(words)


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
    factors = rope_factors(model)
    if factors is not None:
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


# -- the file --------------------------------------------------------------------------------------------------------
def _write(path: Path, draft: StandaloneDraft, target: Facts, tensors: dict[str, Tensor], fields: TokenFields) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        _describe(writer, draft.model.config, f"draft of {target.name}" if target.name else "draft")
        writer.add_file_type(TYPES[draft.dtype][1])
        writer.add_vocab_size(draft.config.draft_vocab_size)
        for name, (value, kind, part) in fields.values.items():
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


def _describe(writer: Any, config: Any, name: str) -> None:
    """The shape, none of it left to defaults."""
    import gguf

    writer.add_type("model")
    writer.add_name(name)
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
    rope = dict(config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _check_file(path: Path, tensors: dict[str, Tensor], fields: TokenFields) -> None:
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
    told = all(name in stored and stored[name].contents() == value for name, (value, _, _) in fields.values.items())
    if not same or not told:
        raise RuntimeError("the gguf export does not read back as the draft that was written")
