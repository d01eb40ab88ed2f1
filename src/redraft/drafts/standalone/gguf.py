"""A Llama-shaped language model as one GGUF file, which llama.cpp loads: a standalone draft, or its target."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from redraft.artifact import tensors_bytes
from redraft.drafts.formats.base import ExportReport
from redraft.drafts.formats.gguf import (
    FILE,
    FILES,
    Fields,
    general_fields,
    interleave,
    need_gguf,
    rope_factors,
    shape_fields,
    token_fields,
    tokenizer_note,
    typed,
    write_file,
)
from redraft.drafts.standalone.folder import OTHER_BYTES, dense_model
from redraft.drafts.standalone.module import StandaloneDraft
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import gguf_of
from redraft.target import Facts


class GgufWriter:
    """The format ``gguf``: one file, its tokenizer copied from the target's own GGUF file where there is one."""

    speaks = True

    def check(self, draft: StandaloneDraft, target: Facts) -> tuple[StandaloneDraft, list[str]]:
        """The dense language model as llama.cpp computes it. Raises ``UserError`` where it would compute another."""
        need_gguf()
        dense = dense_model(draft, target)
        check_shape(dense.model.config)
        tensor_names(dense.stored(), dense.layers)
        token_fields(dense.tokenizer, dense.config.draft_vocab_size, gguf_of(target.name))
        return dense, []

    def write(self, dense: StandaloneDraft, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Read back before it is in place."""
        state, source = dense.stored(), gguf_of(target.name)
        tokenizer = token_fields(dense.tokenizer, dense.config.draft_vocab_size, source)
        written = dict(gguf_tensors(dense.model, state))
        fields = general_fields(target.name, dense.dtype) | model_fields(dense) | tokenizer
        with atomic_folder(folder, tensors_bytes(written) + OTHER_BYTES, FILES) as new:
            write_file(new / FILE, "llama", fields, written)
        # llama.cpp's server with this draft at a fixed length: it proposes every token, however unsure it is.
        words = ["llama-server", "--model", str(source or "TARGET.gguf"), "--spec-draft-model", str(folder / FILE)]
        words += ["--spec-type", "draft-simple", "--spec-draft-n-max", str(tokens), "--spec-draft-p-min", "0"]
        parameters = sum(tensor.numel() for tensor in state.values())
        size, serve, note = tensors_bytes(written), shlex.join(words), tokenizer_note(tokenizer, source)
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


def gguf_tensors(model: Any, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as the file has it. Raises ``UserError`` for one that has no place in the format."""
    config = model.config
    for name, place in tensor_names(state, config.num_hidden_layers).items():
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(place.split(".")[-2])
        kept = state[name].detach().cpu()
        if heads:
            kept = interleave(kept, heads)
        yield place, kept.float() if kept.ndim == 1 else kept.contiguous()
    # Angles that no word of the metadata describes.
    if config.rope_parameters.get("rope_type", "default") == "llama3":
        yield "rope_freqs.weight", rope_factors(config.rope_parameters, model.base_model.rotary_emb.inv_freq)


def tensor_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """The format's names of a Llama's tensors. Raises ``UserError`` for one that has no place in it."""
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = {name: known.get_name(name, try_suffixes=(".weight",)) for name in names}
    for name, place in found.items():
        if place is None or not place.endswith(".weight"):
            raise UserError(f"GGUF has no place for {name} in a Llama; export hf instead")
    return found


def model_fields(draft: StandaloneDraft) -> Fields:
    """The metadata of a Llama."""
    config = draft.model.config
    rope, rows = dict(config.rope_parameters), draft.config.draft_vocab_size
    fields = shape_fields("llama", config, rows, rope, config.head_dim, config.max_position_embeddings)
    fields["llama.block_count"] = typed(config.num_hidden_layers)
    if rope.get("rope_type") == "linear":
        fields |= {
            "llama.rope.scaling.type": typed("linear"),
            "llama.rope.scaling.factor": typed(float(rope["factor"])),
        }
    return fields
