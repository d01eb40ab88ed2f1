"""An Eagle3 draft as one GGUF file, which llama.cpp loads beside its target (``--spec-type draft-eagle3``).

Facts, from llama.cpp's own loader and graph as PyPI's xllamacpp 2026.10.11549 carries them:

* it fuses exactly three features, each the stream before a layer (``target_layers``: after k layers, of which there are
  fewer than all: what it takes after all of them is another state than ours, as acceptance shows); one matrix ``fc``,
  behind one norm where ``norm_before_fc`` says so;
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

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.artifact import tensors_bytes
from redraft.drafts.eagle.module import EagleDraft
from redraft.drafts.eagle.writing import Dense, with_biases, with_fc_bias
from redraft.drafts.eagle3.module import Eagle3Config
from redraft.drafts.eagle3.writing import Eagle3Writer, check_sound
from redraft.drafts.formats.base import ExportReport
from redraft.drafts.formats.gguf import (
    FILE,
    FILES,
    Fields,
    general_fields,
    interleaved,
    need_gguf,
    rope_factors,
    shape_fields,
    token_fields,
    tokenizer_note,
    typed,
    write_file,
)
from redraft.drafts.formats.meaning import Difference
from redraft.drafts.layers import Rotary
from redraft.errors import UserError
from redraft.files import atomic_folder
from redraft.loading import gguf_of
from redraft.pieces import Pieced, Table, whole
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


class GgufWriter(Eagle3Writer):
    """The format ``gguf``: one file, its tokenizer copied from the target's own GGUF file where there is one."""

    holds_tokenizer = True

    def check(self, draft: EagleDraft, target: Facts) -> tuple[Dense, list[str]]:
        """As of every writer."""
        need_gguf()
        if target.tokenizer is None:
            raise UserError("the target has no tokenizer, and a GGUF file holds one; add its tokenizer.json")
        return super().check(draft, target)

    def fitted(self, dense: Dense, target: Facts) -> tuple[Dense, list[str]]:
        """Without biases, where they are zeros."""
        check_sound(dense)
        return with_fc_bias(with_biases(dense, attention=False, output=False), False), []

    def names(self, dense: Dense) -> dict[str, str]:
        """A tensor without a place keeps its name, and is told of by the name."""
        found = {}
        for name in dense.facts:
            stem = name.removesuffix(".weight")
            if name != "t2d":
                found[f"{PLACES[stem]}.weight" if stem in PLACES else name] = name
        return found

    def config(self, dense: Dense, target: Facts, tokens: int) -> dict[str, Any]:
        """The file's metadata."""
        found = {"general.architecture": ARCHITECTURE} | metadata(dense, target)
        return {name: value[0] if isinstance(value, tuple) else value for name, value in found.items()}

    def told(self, difference: Difference, dense: Dense) -> bool:
        """A window that is as long as any text is none."""
        longest = dense.config.max_position_embeddings
        return difference.what == "windows" and all(not 0 < w < longest for w in difference.ours)

    def write(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> ExportReport:
        """Read back before it is in place."""
        fields, written = metadata(dense, target), Placed(dense, self.names(dense))
        with atomic_folder(folder, tensors_bytes(written) + OTHER_BYTES, FILES) as new:
            write_file(new / FILE, ARCHITECTURE, fields, written)
        parameters = sum(math.prod(dense.facts[n].shape) for n in dense.state if n not in ("d2t", "t2d"))
        note, size = tokenizer_note(fields, gguf_of(target.name)), tensors_bytes(written)
        serve = self.serve(dense, folder, target, tokens)
        return ExportReport(self.name, folder, len(written), parameters, size, serve, (note,))

    def serve(self, dense: Dense, folder: Path, target: Facts, tokens: int) -> str:
        """At a fixed length: it proposes every token, however unsure it is."""
        source = gguf_of(target.name) or "TARGET.gguf"
        words = ["llama-server", "--model", str(source), "--spec-draft-model", str(folder / FILE)]
        words += ["--spec-type", self.method, "--spec-draft-n-max", str(tokens), "--spec-draft-p-min", "0"]
        return shlex.join(words)


class Placed(Pieced):
    """The tensors of the file by its names, made when they are asked for; ``names`` has ours."""

    def __init__(self, dense: Dense, names: Mapping[str, str]) -> None:
        self.dense, self.names, self.rotary = dense, dict(names), angles(dense.config)
        config = dense.config
        self.heads = {"blk.0.attn_q.weight": config.num_attention_heads}
        self.heads["blk.0.attn_k.weight"] = config.num_key_value_heads
        # Plain angles need no word.
        plain = config.rope_parameters.get("rope_type", "default") == "default"
        self.more = () if plain else ("rope_freqs.weight",)

    def table(self, name: str) -> Table | Tensor:
        """See :class:`~redraft.pieces.Pieced`."""
        frequencies = self.rotary.original_inv_freq
        if name in self.more:
            return rope_factors(self.dense.config.rope_parameters, frequencies)
        found = self.dense.table(self.names[name])
        if name == "d2t":
            return whole(found) + torch.arange(len(whole(found)))
        if name in self.heads:
            return interleaved(found, self.heads[name], 2 * len(frequencies))
        return whole(found).float() if len(found.shape) == 1 else found

    def __iter__(self) -> Iterator[str]:
        return iter((*self.names, *self.more))

    def __len__(self) -> int:
        return len(self.names) + len(self.more)


def angles(config: Eagle3Config) -> Any:
    """What turns the heads of a draft of this shape: frequencies and a scale."""
    return Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings).embedding


def metadata(dense: Dense, target: Facts) -> Fields:
    """All that stands before the tensors, none of it left to defaults. Raises ``UserError``."""
    config, rotary = dense.config, angles(dense.config)
    turned, context = 2 * len(rotary.original_inv_freq), config.max_position_embeddings
    values = {
        "block_count": config.num_layers,
        "target_layers": list(config.taps),
        "extract_layers": list(config.taps),
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "rope.scaling.attn_factor": float(rotary.attention_scaling),
    }
    shape = shape_fields(ARCHITECTURE, config, config.target_vocab_size, config.rope_parameters, turned, context)
    own = shape | {f"{ARCHITECTURE}.{key}": typed(value) for key, value in values.items()}
    tokenizer = token_fields(target.tokenizer, target.vocab_size, gguf_of(target.name))
    return general_fields(target.name, dense.dtype) | own | tokenizer
