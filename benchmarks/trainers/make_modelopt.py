"""Drafts as nvidia-modelopt 0.47 writes them, with what its own model says and what engines say.

    python make_modelopt.py OUT

The package converts a target, its own forward in training mode (the training-time test) gives the logits of three
steps, and its own exporter writes the checkpoint.

What engines compute from the file is another function than what was trained, in two ways, and both are stored:

- the layer norms the state twice, ``hidden_norm(input_layernorm(state))``, since the decoder layer's own first norm
  still runs before the hook that puts embedding and state side by side; engines compute ``hidden_norm(state)``;
- a draft trained with plain rotary angles is exported with yarn ones (factor 32), unless that is turned off.

``logits`` are those of the same package code with the first of the two norms passed over and the angles of the exported
config; ``logits_trainer`` are the package's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import common
import modelopt
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import modelopt.torch.speculative as mtsp
import torch
from modelopt.torch.speculative.config import eagle3_default_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

mto.enable_huggingface_checkpointing()

TRAINER, VERSION = "modelopt", modelopt.__version__

# The package's defaults are of an 8B model; the sizes alone are made small.
SIZES: dict[str, Any] = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
REDUCED = 40
OPTIONS = ("architecture", "export_rope", "config", "quantised")

# Every option that the package's configuration has and its Hugging Face flow reads, alone and together.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no-yarn": {"export_rope": {}},
    "reduced": {"architecture": {"draft_vocab_size": REDUCED}},
    "own-head": {"architecture": {"has_lm_head": True}},
    "two-layers": {"architecture": {"num_hidden_layers": 2}, "export_rope": {}},
    "attention-bias": {"architecture": {"attention_bias": True}, "export_rope": {}},
    "head-dim": {"architecture": {"head_dim": 16}, "export_rope": {}},
    "four-taps": {"architecture": {"eagle_aux_hidden_state_layer_ids": [0, 2, 4, 7]}, "export_rope": {}},
    "one-tap": {"architecture": {"eagle_aux_hidden_state_layer_ids": [3]}, "export_rope": {}},
    "theta": {"architecture": {"rope_scaling": common.ROPES["theta"], "rope_theta": 500000.0}, "export_rope": {}},
    "llama3": {"architecture": {"rope_scaling": common.ROPES["llama3"], "rope_theta": 100.0}, "export_rope": {}},
    "yarn": {"architecture": {"rope_scaling": common.ROPES["yarn"], "rope_theta": 100.0}, "export_rope": {}},
    "linear": {"architecture": {"rope_scaling": common.ROPES["linear"]}, "export_rope": {}},
    "mtp-layernorm": {"architecture": {"use_mtp_layernorm": True}, "export_rope": {}},
    "qwen3-target": {"target": "target-qwen3", "export_rope": {}},
    "qwen3-target-yarn": {"target": "target-qwen3"},
    "all": {
        "architecture": {
            "draft_vocab_size": REDUCED,
            "num_hidden_layers": 2,
            "attention_bias": True,
            "head_dim": 16,
            "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
        }
    },
    # The target itself was trained too: its adapter is exported beside the draft, whose target is base and adapter.
    "base-lora": {
        "config": {"eagle_base_lora": True, "eagle_base_lora_rank": 2, "eagle_base_lora_target_modules": ["q_proj"]},
        "export_rope": {},
    },
    "fp8": {"quantised": "FP8_DEFAULT_CFG", "export_rope": {}, "refused": "quantised"},
    # What no engine's Llama draft computes.
    "mlp-bias": {"architecture": {"mlp_bias": True}, "export_rope": {}, "refused": "mlp_bias"},
    "gelu": {"architecture": {"hidden_act": "gelu"}, "export_rope": {}, "refused": "hidden_act"},
    "no-taps": {"architecture": {"use_aux_hidden_state": False}, "export_rope": {}, "refused": "use_aux_hidden_state"},
}


class SecondCallOnly(nn.Module):
    """``norm`` where it is called for the second time in a forward; the first call hands its input through.

    The layer calls its first norm on the state, and the attention's hook calls it on the embedding afterwards.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.called = norm, False

    def forward(self, states: Tensor) -> Tensor:
        self.called = not self.called
        return states if self.called else self.norm(states)


def converted(target: Path, case: dict[str, Any]) -> nn.Module:
    """The target with a seeded draft in it, as the package builds it."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    config: dict[str, Any] = {
        "eagle_architecture_config": copy.deepcopy(eagle3_default_config | SIZES | case.get("architecture", {})),
        "eagle_use_torch_compile": False,
    }
    config |= case.get("config", {})
    if "export_rope" in case:
        config["eagle_export_rope_scaling"] = case["export_rope"]
    mtsp.convert(model, [("eagle", config)])
    if case.get("seeded", True):
        common.randomise(model.eagle_module, 11)
    if "config" in case:
        common.randomise(model, 13, [n for n, _ in model.named_parameters() if "lora_" not in n])
    if "quantised" in case:
        mtq.quantize(model, getattr(mtq, case["quantised"]), lambda m: steps(m, common.inputs(1)[0]))
    return model


def set_vocabulary(model: nn.Module) -> Tensor:
    """Target ids [D] of the draft vocabulary, handed to the package in the file that it reads."""
    rows, kept = model.eagle_config.vocab_size, model.eagle_config.draft_vocab_size
    if kept == rows:
        return torch.arange(rows)
    ids_D = torch.randperm(rows, generator=torch.Generator().manual_seed(5))[:kept].sort().values
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d2t.pt"
        torch.save(ids_D - torch.arange(kept), path)
        model.load_draft_vocab_cache(model, str(path))
    return ids_D


def steps(model: nn.Module, ids: Tensor, length: int = common.LENGTH) -> Tensor:
    """Logits [3, T, D] at the first ``length`` positions of the package's training-time test.

    It hands the states on to the right instead of the tokens to the left: step j at anchor t stands at t + j.
    """
    head = getattr(model.eagle_module, "lm_head", None) or model._base_model_lm_head
    model.train()
    model._cached_attn_blk_masks.clear()  # kept by step alone, whatever the length
    with common.Heard(head) as heard, torch.no_grad():
        model(input_ids=ids[None])
    found = heard.outputs[-common.STEPS :]  # the target's own head may be the same module, and is called first
    return torch.stack([found[j][0, j : j + length] for j in range(common.STEPS)])


def taps_of(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[int]]:
    """Features [T, K*F] as the package collects them, and how many layers each has passed."""
    model.eval()
    kept = list[Tensor]()
    hook = None
    if hasattr(model.eagle_module, "fc"):
        hook = model.eagle_module.fc.register_forward_pre_hook(lambda _m, args: kept.append(args[0].detach()))
    with torch.no_grad():
        outputs = model(input_ids=ids[None])
    if hook is None:
        return outputs.hidden_states[0][: common.LENGTH], [-1]
    hook.remove()
    states = list[Tensor]()
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: states.append(output.detach()))
        for layer in model._base_model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids[None])
    for each in hooks:
        each.remove()
    parts = kept[0][0].split(common.WIDTH, dim=-1)
    passed = [1 + next(i for i, state in enumerate(states) if torch.equal(state[0], part)) for part in parts]
    return kept[0][0, : common.LENGTH], passed


def as_engines(model: nn.Module, exported: dict[str, Any]) -> None:
    """Change the package's own modules into what engines compute from the exported file."""
    module = model.eagle_module
    if model.eagle_config.use_aux_hidden_state:
        module.layers[0].input_layernorm = SecondCallOnly(module.layers[0].input_layernorm)
    rope = dict(exported["rope_scaling"] or {"rope_type": "default"})
    rope.setdefault("rope_theta", exported["rope_theta"])
    config = AutoConfig.for_model(
        "llama",
        hidden_size=exported["hidden_size"],
        num_attention_heads=exported["num_attention_heads"],
        head_dim=exported["head_dim"],
        max_position_embeddings=exported["max_position_embeddings"],
        rope_parameters=rope,
    )
    module.rotary_emb = LlamaRotaryEmbedding(config)


def make(out: Path, name: str, case: dict[str, Any]) -> None:
    folder = common.new_case(out, TRAINER, VERSION, name)
    target = case.get("target", "target")
    model = converted(out / target, case)
    vocabulary = set_vocabulary(model)
    ids, _ = common.inputs(1)
    logits = trained = steps(model, ids)
    taps, passed = taps_of(model, ids)
    model.get_exporter().export(folder / "checkpoint")
    if "quantised" not in case:  # after the export its weights are codes
        as_engines(model, json.loads((folder / "checkpoint" / "config.json").read_text()))
        logits = steps(model, ids)
    about = {
        "trainer": TRAINER,
        "version": VERSION,
        "options": {key: case[key] for key in OPTIONS if key in case},
        "taps": passed,
        "target": target,
        "notes": "logits are those of engines, which norm the state once and take the exported angles; logits_trainer "
        "are the package's own, which norm it twice",
    }
    if "refused" in case:
        about["refused"] = case["refused"]
    embedding = model._base_model_embeddings.weight
    common.finish_case(folder, about, ids, taps, logits, vocabulary, embedding, trained)
    print(f"{folder.name}: taps {passed}, trained and served differ by {float((trained - logits).abs().max()):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="one case")
    arguments = parser.parse_args()
    common.make_target(arguments.out)
    common.make_target(arguments.out, "target-qwen3", "qwen3")
    for name, case in CASES.items():
        if arguments.only in (None, name):
            shutil.rmtree(arguments.out / f"{TRAINER}-{VERSION}-{name}", ignore_errors=True)
            make(arguments.out, name, case)


if __name__ == "__main__":
    main()
