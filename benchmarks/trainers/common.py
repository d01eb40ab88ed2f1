"""What all makers of trainers' drafts share: the tiny targets, seeded weights, and the form of a case.

Run inside a trainer's own environment, so it needs torch, safetensors and transformers and nothing of redraft. A case
is a folder ``<trainer>-<version>-<case>``:

- ``checkpoint/``: the draft as the package itself saves it;
- ``golden.safetensors``: ``ids`` [T + 3], ``taps`` [T, K*F] (features of positions 0 .. T - 1), ``logits`` [3, T, D],
  ``vocabulary`` [D] (target ids), ``embedding`` [V, H]; ``logits_trainer`` [3, T, D] beside them where the package's
  own forward is not what engines compute from its file (``logits`` is then the engines');
- ``case.json``: trainer, version, options, taps (layers passed), target (a folder beside it), notes; ``refused``, a
  word of the refusal, where redraft does not compute the draft (then there may be no golden file); ``ask``, the
  trainer's name for redraft, where the file alone does not tell who wrote it and two would mean different things by it.

Step j at anchor t: logits behind the pair (features_t, x_{t+1}) and j further draft steps over the tokens x_{t+2} ..
x_{t+1+j}, on the model's own states.

Shape legend: T positions, K taps, F target width, H draft width, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

# Positions that are compared, and how many further draft steps.
LENGTH, STEPS = 20, 3
VOCABULARY, WIDTH, LAYERS = 96, 32, 8

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta": PLAIN | {"rope_theta": 500000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "partial": PLAIN | {"partial_rotary_factor": 0.5},
}


def make_target(out: Path, name: str = "target", kind: str = "llama", **changes: Any) -> Path:
    """A seeded target of ``kind`` "llama" or "qwen3" in ``out/name``; one that is there is taken as it is."""
    folder = out / name
    if not folder.exists():
        torch.manual_seed(7)
        shape = SHAPE | {"rope_parameters": PLAIN} | changes
        model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
        randomise(model, 7)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(model: nn.Module, seed: int, keep: Sequence[str] = ()) -> None:
    """Seeded weights that leave nothing trivial: norms around one, biases that are not zero. ``keep`` names parts left.

    The buffers are left as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(tuple(keep)):
            continue
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * drawn if "norm" in name else 0.2 * drawn)
        else:
            parameter.copy_(drawn * (0.7 if "embed" in name else parameter.shape[1] ** -0.5))


def plain_draft(width: int, inner: int, head_dim: int, kept: int, counts: Mapping[int, int]) -> dict[str, Tensor]:
    """Tensors of a draft in the plain form, over the ``kept`` most frequent ids of ``counts``; no embedding."""
    heads, key_heads = SHAPE["num_attention_heads"] * head_dim, SHAPE["num_key_value_heads"] * head_dim
    shapes = {
        "fc": (width, 3 * width),
        "norm": (width,),
        "lm_head": (kept, width),
        "midlayer.input_layernorm": (width,),
        "midlayer.hidden_norm": (width,),
        "midlayer.post_attention_layernorm": (width,),
        "midlayer.self_attn.q_proj": (heads, 2 * width),
        "midlayer.self_attn.k_proj": (key_heads, 2 * width),
        "midlayer.self_attn.v_proj": (key_heads, 2 * width),
        "midlayer.self_attn.o_proj": (width, heads),
        "midlayer.mlp.gate_proj": (inner, width),
        "midlayer.mlp.up_proj": (inner, width),
        "midlayer.mlp.down_proj": (width, inner),
    }
    generator, state = torch.Generator().manual_seed(17), {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        state[f"{name}.weight"] = 1 + 0.3 * drawn if len(shape) == 1 else drawn * shape[1] ** -0.5
    ids = torch.tensor(sorted(sorted(counts, key=lambda i: (-counts[i], i))[:kept]))
    state["d2t"] = ids - torch.arange(kept)
    state["t2d"] = torch.isin(torch.arange(VOCABULARY), ids)
    return state


def inputs(fused: int, seed: int = 3, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Token ids [T + 3] and features [T, ``fused``]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (LENGTH + STEPS,), generator=generator)
    return ids, torch.randn(LENGTH, fused, generator=generator)


def padded(ids: Tensor, taps: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The next tokens [1, ``length``] and features [1, ``length``, K*F] of a forward that is longer than is compared.

    What stands behind the compared positions is seen by none of them but for the tokens of later steps.
    """
    following = torch.zeros(1, length, dtype=torch.long)
    following[0, : len(ids) - 1] = ids[1:]
    features = torch.zeros(1, length, taps.shape[1])
    features[0, : len(taps)] = taps
    return following, features


class Heard:
    """What a module gives back, call by call, while it is listened to."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.outputs = module, list[Tensor]()

    def __enter__(self) -> Heard:
        self.hook = self.module.register_forward_hook(lambda _m, _i, output: self.outputs.append(output.detach()))
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def steps(self, length: int = LENGTH) -> Tensor:
        """Logits [3, T, D] of the first three calls, at the first ``length`` positions."""
        return torch.stack([output.reshape(-1, output.shape[-1])[:length].float() for output in self.outputs[:STEPS]])


def new_case(out: Path, trainer: str, version: str, case: str) -> Path:
    """The folder of a case, empty."""
    folder = out / f"{trainer}-{version}-{case}"
    folder.mkdir(parents=True)
    return folder


def tidy(checkpoint: Path, target: Path) -> None:
    """Take out of a saved draft where it was made, and whatever source text the package put beside it."""
    for path in checkpoint.glob("*.json"):
        path.write_text(path.read_text().replace(str(target), target.name))
    for path in checkpoint.glob("*.py"):
        path.write_text("# The package puts a copy of its own source here.\n")


def refused_case(folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``case.json`` for a draft that redraft does not compute; ``about`` has a word of the refusal."""
    assert about["refused"]
    (folder / "case.json").write_text(
        json.dumps({"target": "target", "taps": [], "notes": "", **about}, indent=2) + "\n"
    )


def finish_case(
    folder: Path,
    about: Mapping[str, Any],
    ids: Tensor,
    taps: Tensor,
    logits: Tensor,
    vocabulary: Tensor,
    embedding: Tensor,
    logits_trainer: Tensor | None = None,
) -> None:
    """Write ``golden.safetensors`` and ``case.json`` (``about``) beside the checkpoint."""
    golden = {"ids": ids, "taps": taps, "logits": logits, "vocabulary": vocabulary.long(), "embedding": embedding}
    if logits_trainer is not None:
        golden["logits_trainer"] = logits_trainer
    assert all(bool(tensor.isfinite().all()) for tensor in golden.values()), folder
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in golden.items()}
    save_file(whole, folder / "golden.safetensors")
    (folder / "case.json").write_text(json.dumps({"target": "target", **about}, indent=2) + "\n")


@torch.no_grad()
def chained(
    forward: Callable[[Tensor, Tensor], Tensor], head: Callable[[Tensor], Tensor], ids: Tensor, taps: Tensor
) -> Tensor:
    """Logits [3, T, D] of a model without a training-time test, driven as decoding drives it, anchor by anchor.

    ``forward`` gives the states [1, S, H] behind next tokens [1, S] and states [1, S, F]; ``head`` their logits. The
    model's last state takes the place of the next position's feature.
    """
    rows = []
    for anchor in range(LENGTH):
        states, logits = taps[None, : anchor + 1], []
        for step in range(STEPS):
            following = ids[None, 1 : anchor + 2 + step]
            last = forward(following, states)[:, -1:]
            logits.append(head(last)[0, 0].float())
            states = torch.cat([states, last], 1)
        rows.append(torch.stack(logits))
    return torch.stack(rows, 1)
