"""Drafts of SafeAILab's EAGLE: EAGLE-1 as its package eagle-llm 1.2 has it, EAGLE-3 as its repository trains it.

    python make_safeailab.py OUT [--repository CHECKOUT]

EAGLE-1 is driven by the package's own forward, as its decoding does, and saved as its trainer saves (accelerate's
state). EAGLE-3 is not in the package: CHECKOUT is the repository, whose ``eagle/traineagle3/cnets.py`` is driven and
saved as its ``main.py`` saves (DeepSpeed's 16-bit model without frozen parameters: no embedding).

Both turn queries and keys with base 10000 in training whatever ``rope_theta`` says; the repository's decoding, engines
and redraft take the config's. ``logits`` are those of the config, ``logits_trainer`` the trainer's own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import common
import torch
from accelerate import Accelerator
from eagle.model.cnets import Model as Eagle1
from eagle.model.configs import EConfig
from torch import Tensor, nn
from transformers import LlamaForCausalLM

TRAINER, VERSION = "safeailab", version("eagle_llm")
REDUCED = 40
TAPS = [2, common.LAYERS // 2, common.LAYERS - 3]

# As the configs in the repository are written, with small sizes.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": common.WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": common.VOCABULARY,
}

CASES: dict[str, dict[str, Any]] = {
    "eagle1": {},
    "eagle1-no-bias": {"config": {"bias": False}},
    "eagle1-theta": {"config": {"rope_theta": 500000.0, "bias": False}},
    "eagle1-linear": {"config": {"rope_scaling": {"type": "linear", "factor": 4.0}}},
    "eagle1-safetensors": {"config": {"bias": False}, "safetensors": True},
    # Only its first layer is without a norm before its attention.
    "eagle1-two-layers": {"config": {"num_hidden_layers": 2}},
    "eagle3": {"family": 3, "config": {"draft_vocab_size": REDUCED}},
    "eagle3-float16": {"family": 3, "config": {"draft_vocab_size": REDUCED}, "dtype": torch.float16},
    "eagle3-theta": {"family": 3, "config": {"draft_vocab_size": REDUCED, "rope_theta": 500000.0}},
    "eagle3-linear": {
        "family": 3,
        "config": {"draft_vocab_size": REDUCED, "rope_scaling": {"type": "linear", "factor": 4.0}},
    },
    # As its published drafts are named.
    "eagle3-published": {
        "family": 3,
        "config": {"draft_vocab_size": REDUCED, "architectures": ["LlamaForCausalLMEagle3"]},
    },
}


def give_base(layers: list[nn.Module], base: float) -> None:
    """Let the draft's own rotary modules take the base that the config names."""
    for layer in layers:
        old = layer.self_attn.rotary_emb
        layer.self_attn.rotary_emb = type(old)(old.dim, old.max_position_embeddings, base)


def eagle1(case: dict[str, Any], config: EConfig, target: Path, folder: Path, ids: Tensor) -> dict[str, Any]:
    """Tensors of the golden file, and the checkpoint in ``folder``."""
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    draft = Eagle1(config, bias=getattr(config, "bias", True))
    common.randomise(draft, 11)
    draft.embed_tokens.weight.data = model.get_input_embeddings().weight.data.clone()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(draft)
    accelerator.save_state(str(folder / "scratch"), safe_serialization=bool(case.get("safetensors")))
    for path in (folder / "scratch").iterdir():
        if path.suffix in (".safetensors", ".bin") and "model" in path.name:
            shutil.move(path, folder / "checkpoint" / path.name)
    shutil.rmtree(folder / "scratch")
    draft.eval()
    with torch.no_grad():
        taps = model.model(ids[None]).last_hidden_state[0, : common.LENGTH]

    def run() -> Tensor:
        return common.chained(lambda following, states: draft(states, following), model.lm_head, ids, taps)

    found = {"taps": taps, "vocabulary": torch.arange(common.VOCABULARY), "embedding": draft.embed_tokens.weight}
    found["logits"] = found["logits_trainer"] = run()
    if theta := case.get("config", {}).get("rope_theta"):
        give_base(list(draft.layers), theta)
        found["logits"] = run()
    return found


def training_module(repository: Path) -> ModuleType:
    """The repository's trainer, on a target of transformers that gives the states its own one gives."""

    class Target(LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, path: str, **_: Any) -> Target:
            return super().from_pretrained(path, dtype=torch.float32)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            outputs = super().forward(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            # What is collected there before the layers 2, n // 2 and n - 3 run.
            return SimpleNamespace(hidden_states=[outputs.hidden_states[k] for k in TAPS], logits=outputs.logits)

    stand_in = ModuleType("modeling_llama_kv")
    stand_in.LlamaForCausalLM = Target
    sys.modules["modeling_llama_kv"] = stand_in
    sys.path.insert(0, str(repository / "eagle" / "traineagle3"))
    import cnets

    return cnets


def eagle3(case: dict[str, Any], config: EConfig, target: Path, folder: Path, ids: Tensor, cnets: ModuleType) -> dict:
    """The same for EAGLE-3."""
    draft = cnets.Model(config, None, SimpleNamespace(gradient_checkpointing=False), load_emb=False, path=str(target))
    draft.length = common.STEPS
    common.randomise(draft, 11, ["target_model."])
    draft.embed_tokens.weight.data = draft.target_model.get_input_embeddings().weight.data.clone()
    order = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(5))
    vocabulary = order[: config.draft_vocab_size].sort().values
    draft.register_buffer("d2t", vocabulary - torch.arange(len(vocabulary)))
    draft.register_buffer("t2d", torch.isin(torch.arange(config.vocab_size), vocabulary))
    dtype = case.get("dtype", torch.float32)
    trained = {name for name, parameter in draft.named_parameters() if parameter.requires_grad}
    kept = {}
    for name, tensor in draft.state_dict().items():
        if name in trained:
            tensor.copy_(tensor.to(dtype))  # so that the file holds what was computed with
            kept[name] = tensor.to(dtype)
        elif name in ("d2t", "t2d"):
            kept[name] = tensor
    torch.save(kept, folder / "checkpoint" / "pytorch_model.bin")
    draft.eval()
    ones = torch.ones_like(ids[None])

    def run() -> Tensor:
        with torch.no_grad(), common.Heard(draft.lm_head) as heard:
            draft(input_ids=ids[None], attention_mask=ones, loss_mask=ones)
        return heard.steps()

    with torch.no_grad():
        taps, *_ = draft.dataprepare(ids[None], ones, ones)
    found = {"taps": taps[0, : common.LENGTH], "vocabulary": vocabulary, "embedding": draft.embed_tokens.weight}
    found["logits"] = found["logits_trainer"] = run()
    if theta := case["config"].get("rope_theta"):
        give_base([draft.midlayer], theta)
        found["logits"] = run()
    return found


def make(out: Path, name: str, case: dict[str, Any], cnets: ModuleType | None) -> None:
    folder = common.new_case(out, TRAINER, VERSION, name)
    (folder / "checkpoint").mkdir()
    written = CONFIG | case.get("config", {})
    path = folder / "checkpoint" / "config.json"
    path.write_text(json.dumps(written, indent=2) + "\n")
    ids, _ = common.inputs(1)
    ids = ids.clamp(min=1)  # 0 is the padding row of the package's embedding
    arguments = (case, EConfig.from_pretrained(str(path.parent)), out / "target", folder, ids)
    found = eagle3(*arguments, cnets) if case.get("family") == 3 else eagle1(*arguments)
    apart = float((found["logits_trainer"] - found["logits"]).abs().max())
    if not apart:
        del found["logits_trainer"]
    about = {
        "trainer": TRAINER,
        "version": VERSION if case.get("family") != 3 else "3 (repository)",
        "options": case.get("config", {}),
        "taps": TAPS if case.get("family") == 3 else [-1],
        "target": "target",
        "notes": "the trainer takes base 10000 whatever rope_theta says; logits are those of the saved config",
    }
    if "refused" in case:
        about["refused"] = case["refused"]
    common.finish_case(folder, about, ids, **found)
    print(f"{folder.name}: taps {about['taps']}, trained and served differ by {apart:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repository", type=Path, help="checkout of SafeAILab/EAGLE; without it EAGLE-1 alone is made")
    parser.add_argument("--only", help="one case")
    arguments = parser.parse_args()
    common.make_target(arguments.out)
    cnets = training_module(arguments.repository) if arguments.repository else None
    for name, case in CASES.items():
        if arguments.only in (None, name) and (cnets or case.get("family") != 3):
            shutil.rmtree(arguments.out / f"{TRAINER}-{VERSION}-{name}", ignore_errors=True)
            make(arguments.out, name, case, cnets)


if __name__ == "__main__":
    main()
