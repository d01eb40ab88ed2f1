"""An Eagle3 draft as one GGUF file, which llama.cpp loads beside its target (``--spec-type draft-eagle3``).

Facts, from llama.cpp's own loader and graph as PyPI's xllamacpp 2026.10.11549 carries them:

* it fuses exactly three features, each the stream before a layer (``target_layers``: after k layers) or, after all of
  them, before the final norm; one matrix ``fc``, behind one norm where ``norm_before_fc`` says so;
* it computes one decoder layer without biases, norms of q and k or windows, hands on the state as it was before the
  last norm, and takes logits of the state behind it;
* ``d2t`` holds target ids, not offsets, and decides the size of the head; without it the head has the target's rows;
* an embedding that is not in the file is the target's;
* a frequency is divided by its number in ``rope_freqs``, and both sines and cosines are multiplied by
  ``rope.scaling.attn_factor``: that describes the angles of any rotary kind.

A tensor that it has no place for, or misses, stops it; a word of the metadata that it does not know is passed over.
Older builds read the feature ids as ``extract_layers``, so they stand twice.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import tensors_bytes
from redraft.drafts.eagle.writing import Dense, prepare, with_biases, with_fc_bias
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft
from redraft.drafts.eagle3.writing import check_sound
from redraft.drafts.formats.base import ExportReport
from redraft.drafts.formats.gguf import (
    FILE,
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
from redraft.drafts.layers import Rotary
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import gguf_of
from redraft.target import Facts

ARCHITECTURE = "eagle3"
# Room for the tokenizer.
OTHER_BYTES = 16 << 20

PLACES = {
    "fc": "fc",
    "input_norm": "enc.output_norm",
    "embed_tokens": "token_embd",
    "midlayer.input_layernorm": "blk.0.attn_norm",
    "midlayer.hidden_norm": "blk.0.attn_norm_2",
    "midlayer.self_attn.q_proj": "blk.0.attn_q",
    "midlayer.self_attn.k_proj": "blk.0.attn_k",
    "midlayer.self_attn.v_proj": "blk.0.attn_v",
    "midlayer.self_attn.o_proj": "blk.0.attn_output",
    "midlayer.post_attention_layernorm": "blk.0.ffn_norm",
    "midlayer.mlp.gate_proj": "blk.0.ffn_gate",
    "midlayer.mlp.up_proj": "blk.0.ffn_up",
    "midlayer.mlp.down_proj": "blk.0.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}


class Eagle3GgufWriter:
    """The format ``gguf``: one file, its tokenizer copied from the target's own GGUF file where there is one."""

    def check(self, draft: Eagle3Draft, target: Facts) -> tuple[Dense, list[str]]:
        """The dense draft as llama.cpp computes it, and notes. Raises ``UserError`` where it would compute another."""
        need_gguf()
        dense, notes = prepare(draft, target)
        check_sound(dense)
        dense = with_fc_bias(with_biases(dense, attention=False, output=False), False)
        if limits := llamacpp_limits(dense.config, target):
            raise UserError(f"llama.cpp cannot run this draft: {'; '.join(limits)}; export it for vLLM instead")
        if target.tokenizer is None:
            raise UserError("the target has no tokenizer, and a GGUF file holds one; add its tokenizer.json")
        token_fields(target.tokenizer, target.vocab_size, gguf_of(target.name))
        return dense, notes

    def write(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Read back before it is in place."""
        source = gguf_of(target.name)
        tokenizer = token_fields(target.tokenizer, target.vocab_size, source)
        written = dict(gguf_tensors(dense))
        fields = general_fields(target.name, dense.dtype) | draft_fields(dense) | tokenizer
        with atomic_folder(folder, tensors_bytes(written) + OTHER_BYTES, {FILE}) as new:
            write_file(new / FILE, ARCHITECTURE, fields, written)
        # At a fixed length: it proposes every token, however unsure it is.
        words = ["llama-server", "--model", str(source or "TARGET.gguf"), "--spec-draft-model", str(folder / FILE)]
        words += ["--spec-type", "draft-eagle3", "--spec-draft-n-max", str(tokens), "--spec-draft-p-min", "0"]
        parameters = sum(tensor.numel() for tensor in dense.state.values() if tensor.is_floating_point())
        size, serve, note = tensors_bytes(written), shlex.join(words), tokenizer_note(tokenizer, source)
        return ExportReport("gguf", folder, len(written), parameters, size, serve, (note,))


def llamacpp_limits(config: Eagle3Config, target: Facts) -> list[str]:
    """What llama.cpp would not compute as the draft does."""
    narrow = [window for window in config.windows if 0 < window < target.context]
    limits = {
        f"it fuses three features, not {len(config.taps)}": len(config.taps) != 3,
        f"it computes one layer, not {config.num_layers}": config.num_layers != 1,
        "attention has no place for biases": config.attention_bias or bool(config.output_bias),
        "fc has no place for a bias": config.fc_bias,
        "queries and keys are not normed (qk_norm)": config.qk_norm,
        f"every position is seen, not the last {min(narrow, default=0)} alone": bool(narrow),
        "features are not normed one by one (fc_norm)": config.fc_norm,
        "the state is handed on as it was before the norm (norm_output)": config.norm_output,
        "logits are always of the normed state (head_norm)": not config.head_norm,
    }
    return [limit for limit, met in limits.items() if met]


def angles_of(config: Eagle3Config) -> Any:
    """The rotary embedding of a draft of this config: its frequencies and what sines and cosines are multiplied by."""
    return Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings).embedding


def gguf_tensors(dense: Dense) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as the file has it."""
    config, frequencies = dense.config, angles_of(dense.config).original_inv_freq
    heads = {"blk.0.attn_q": config.num_attention_heads, "blk.0.attn_k": config.num_key_value_heads}
    for name, tensor in dense.state.items():
        if name in ("d2t", "t2d"):
            continue
        place, kept = PLACES[name.removesuffix(".weight")], tensor.detach().cpu()
        if place in heads:
            kept = interleave(kept, heads[place], 2 * len(frequencies))
        yield f"{place}.weight", kept.float() if kept.ndim == 1 else kept.contiguous()
    if "d2t" in dense.state:
        offsets_D = dense.state["d2t"].cpu()
        yield "d2t", offsets_D + torch.arange(len(offsets_D))
    if config.rope_parameters.get("rope_type", "default") != "default":
        yield "rope_freqs.weight", rope_factors(config.rope_parameters, frequencies)


def draft_fields(dense: Dense) -> Fields:
    """The metadata of the draft, none of it left to defaults."""
    config, rotary = dense.config, angles_of(dense.config)
    turned, context = 2 * len(rotary.original_inv_freq), config.max_position_embeddings
    values = {
        "block_count": 1,
        "target_layers": list(config.taps),
        "extract_layers": list(config.taps),
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "rope.scaling.attn_factor": float(rotary.attention_scaling),
    }
    shape = shape_fields(ARCHITECTURE, config, config.target_vocab_size, config.rope_parameters, turned, context)
    return shape | {f"{ARCHITECTURE}.{key}": typed(value) for key, value in values.items()}
