"""What a draft of given fields and tensors computes, in plain torch and without a line of the package.

It is the judge's own answer: three draft steps of an EAGLE draft of either kind, from every position of a short text,
as a decoder takes them. Angles are worked out here as well.

Shape legend: T positions, J draft steps, F width of the target's states, H that of the draft, D draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 3
POSITIONS = 9


@dataclass(frozen=True)
class Input:
    """A text and what the target makes of it: ``ids`` [T + J], ``states`` [layers + 1, T, F] after each number of
    layers, its ``embedding`` [V, F] and its ``head`` [V, F]."""

    ids: Tensor
    states: Tensor
    embedding: Tensor
    head: Tensor

    @classmethod
    def drawn(cls, layers: int, embedding: Tensor, head: Tensor, seed: int = 0) -> Input:
        generator = torch.Generator().manual_seed(seed)
        rows, width = embedding.shape
        ids = torch.randint(rows, (POSITIONS + STEPS,), generator=generator)
        states = torch.randn(layers + 1, POSITIONS, width, generator=generator)
        return cls(ids, states, embedding.float(), head.float())

    def taps(self, taps: list[int]) -> Tensor:
        """The states [T, K * F] after these numbers of layers side by side; -1 is the last one's."""
        return torch.cat([self.states[tap] for tap in taps], -1)


def frequencies(rope: Mapping[str, Any], width: int, longest: int) -> tuple[Tensor, float]:
    """Radians per position [W/2] of a head's pairs, and what cosines and sines are multiplied by."""
    kind, base = rope.get("rope_type", "default"), float(rope["rope_theta"])
    plain = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    factor = rope.get("factor")
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * share + plain / factor * (1 - share), 1.0
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or longest
        fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        ends = [width * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (fast, slow)]
        if rope.get("truncate", True):
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        start, stop = max(ends[0], 0), min(ends[1], width - 1)
        stop = stop + 0.001 if start == stop else stop
        ramp = ((torch.arange(width // 2, dtype=torch.float64) - start) / (stop - start)).clamp(0, 1)
        # The root of YaRN's temperature; two of DeepSeek's keys replace it by a quotient.
        root = lambda by: 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
        scale, over = rope.get("mscale"), rope.get("mscale_all_dim")
        told = root(scale) / root(over) if scale and over else root(1)
        given = rope.get("attention_factor")
        return plain / factor * ramp + plain * (1 - ramp), float(told if given is None else given)
    raise ValueError(f"angles of kind {kind} are not worked out here")


def turned(heads: Tensor, rope: Mapping[str, Any], longest: int) -> Tensor:
    """Heads [T, A, D] at their positions; of a partial share the first numbers turn alone."""
    width = int(heads.shape[-1] * (rope.get("partial_rotary_factor") or 1.0))
    speeds, scale = frequencies(rope, width, longest)
    angles = torch.arange(len(heads), dtype=torch.float64)[:, None] * speeds
    cosines, sines = ((part * scale).float()[:, None] for part in (angles.cos(), angles.sin()))
    left, right = heads[..., : width // 2], heads[..., width // 2 : width]
    parts = [left * cosines - right * sines, right * cosines + left * sines, heads[..., width:]]
    return torch.cat(parts, -1)


class Answer:
    """A draft by its ``fields``, as a config of the package names them, and its ``tensors`` by the package's names."""

    def __init__(self, family: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Input) -> None:
        self.family, self.fields, self.given = family, fields, given
        self.tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}

    def vocabulary(self) -> list[int]:
        """Target ids in the order of the head's rows."""
        rows = self.fields.get("draft_vocab_size", self.fields["target_vocab_size"])
        offsets = self.tensors.get("d2t")
        return [i + (int(offsets[i]) if offsets is not None else 0) for i in range(rows)]

    def norm(self, x: Tensor, name: str) -> Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.fields["rms_norm_eps"])
        return scaled * self.tensors[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def layer(self, number: int, read: Tensor, residual: Tensor) -> Tensor:
        """States [T, H] behind a layer, of what its attention reads and the residual stream."""
        place, fields = "midlayer" if number == 0 else f"later.{number - 1}", self.fields
        length, width, rope = len(read), fields["head_dim"], fields["rope_parameters"]
        heads = {}
        for name in "qkv":
            heads[name] = self.linear(read, f"{place}.self_attn.{name}_proj").view(length, -1, width)
            if name != "v":
                if fields.get("qk_norm"):
                    heads[name] = self.norm(heads[name], f"{place}.self_attn.{name}_norm")
                heads[name] = turned(heads[name], rope, fields["max_position_embeddings"])
        groups = heads["q"].shape[1] // heads["k"].shape[1]
        keys, values = (heads[name].repeat_interleave(groups, 1) for name in "kv")
        back = torch.arange(length)[:, None] - torch.arange(length)
        window = (tuple(fields.get("windows") or ()) or (0,) * (number + 1))[number]
        seen = (back >= 0) & ((back < window) if window else torch.ones_like(back, dtype=torch.bool))
        scores = torch.einsum("tad,sad->ats", heads["q"], keys) / math.sqrt(width)
        mixed = torch.einsum("ats,sad->tad", scores.masked_fill(~seen, -math.inf).softmax(-1), values)
        states = residual + self.linear(mixed.flatten(-2), f"{place}.self_attn.o_proj")
        x = self.norm(states, f"{place}.post_attention_layernorm")
        inner = F.silu(self.linear(x, f"{place}.mlp.gate_proj")) * self.linear(x, f"{place}.mlp.up_proj")
        return states + self.linear(inner, f"{place}.mlp.down_proj")

    def states(self, embeds: Tensor, states: Tensor) -> Tensor:
        """States [T, H] behind the layers."""
        if self.family == "eagle1":
            read = residual = self.linear(torch.cat([embeds, states], -1), "fc")
        else:
            normed = self.norm(states, "midlayer.hidden_norm")
            read = torch.cat([self.norm(embeds, "midlayer.input_layernorm"), normed], -1)
            residual = normed if self.fields["norm_before_residual"] else states
        states = self.layer(0, read, residual)
        for number in range(1, self.fields.get("num_layers", 1)):
            states = self.layer(number, self.norm(states, f"later.{number - 1}.input_layernorm"), states)
        return states

    def fused(self, taps: Tensor) -> Tensor:
        """What the first step takes of the target's states [T, K * F]."""
        if self.family == "eagle1":
            return taps
        if self.fields["norm_before_fc"]:
            taps = self.norm(taps, "input_norm")
        if self.fields["fc_norm"]:
            parts = taps.chunk(len(self.fields["taps"]), -1)
            taps = torch.cat([self.norm(part, f"fc_norm.{k}") for k, part in enumerate(parts)], -1)
        return self.linear(taps, "fc")

    def logits(self, states: Tensor) -> Tensor:
        if self.family == "eagle1":
            return F.linear(states, self.given.head)
        return self.linear(self.norm(states, "norm") if self.fields.get("head_norm", True) else states, "lm_head")

    @torch.inference_mode()
    def steps(self) -> Tensor:
        """Logits [J, T, D] of the steps from every position."""
        given, fields = self.given, self.fields
        table = self.tensors["embed_tokens.weight"] if fields["own_embedding"] else given.embedding
        taps = given.taps(list(fields["taps"]) if self.family == "eagle3" else [-1])
        rows = []
        for anchor in range(POSITIONS):
            states, embeds, logits = self.fused(taps[: anchor + 1]), table[given.ids[1 : anchor + 2]], []
            for step in range(STEPS):
                last = self.states(embeds, states)[-1:]
                logits.append(self.logits(last))
                carried = self.norm(last, "norm") if fields.get("norm_output") else last
                states = torch.cat([states, carried])
                embeds = torch.cat([embeds, table[given.ids[anchor + 2 + step : anchor + 3 + step]]])
            rows.append(torch.cat(logits))
        return torch.stack(rows, 1)
