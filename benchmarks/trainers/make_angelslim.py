"""Drafts as AngelSlim 0.5 trains and writes them.

    python make_angelslim.py OUT

The package's online trainer runs three steps of the training-time test on the features that its own target wrapper
collects, and saves the folder.

Its training layer turns queries and keys with base 10000 whatever ``rope_theta`` says, while the folder keeps
``rope_theta`` (1000000 in the package's own configs for Qwen3) and engines take it. ``logits`` are those of the same
package code with the angles of the saved config; ``logits_trainer`` are the package's own, in training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def without_init(*names: str) -> None:
    """Let packages be imported from without their ``__init__``, which ask for what is not in the wheel."""
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations
        module = ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = module


without_init("angelslim", "angelslim.compressor", "angelslim.compressor.speculative")

from angelslim.compressor.speculative.train.data.data_utils import process_token_dict_to_mappings  # noqa: E402
from angelslim.compressor.speculative.train.models.draft import draft_model_factory as factory  # noqa: E402
from angelslim.compressor.speculative.train.models.target.target_model_wrapper import TransformersBackend  # noqa: E402
from angelslim.compressor.speculative.train.trainer.online_eagle3_trainer import OnlineEagle3Trainer  # noqa: E402

TRAINER, VERSION = "angelslim", version("angelslim")
REDUCED = 40

# As the package's own configs for drafts are written, with small sizes.
CONFIG: dict[str, Any] = {
    "architectures": ["Eagle3LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": common.WIDTH,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": common.VOCABULARY,
    "draft_vocab_size": REDUCED,
}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "full": {"config": {"draft_vocab_size": common.VOCABULARY}},
    "theta": {"config": {"rope_theta": 1000000}},
    "linear": {"config": {"rope_scaling": {"type": "linear", "factor": 4.0}}},
    "dynamic": {"config": {"rope_scaling": {"type": "dynamic", "factor": 4.0}}},
    "head-dim": {"config": {"head_dim": 16}},
    "given-taps": {"config": {"aux_hidden_states_layer_ids": [0, 3, 6]}},
    "without-embedding": {"drop": "embed"},
    # Written in the config, and not built by the package: its layers have no bias and no window, and there is one.
    "bias-in-config-alone": {"config": {"attention_bias": True}},
    "layers-in-config-alone": {"config": {"num_hidden_layers": 4}},
    # For models of pictures: three position numbers a token.
    "mrope": {
        "config": {
            "rope_scaling": {
                "type": "mrope",
                "mrope_interleaved": True,
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000,
            }
        },
        "refused": "mrope",
    },
}


class FromConfig(nn.Module):
    """The angles that engines read from the saved config, as the package's layer asks for them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        rope = config.rope_parameters
        if rope["rope_type"] == "default":
            exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
            self.inverse = 1.0 / rope["rope_theta"] ** exponents
        else:
            self.inverse, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))

    def forward(self, states: Tensor, seq_len: int, **_: object) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(seq_len).float(), self.inverse)
        both = torch.cat([angles, angles], -1)[None, None]
        return both.cos(), both.sin()


def steps(trainer: OnlineEagle3Trainer, ids: Tensor, length: int = common.LENGTH) -> Tensor:
    ones = torch.ones_like(ids[None])
    with common.Heard(trainer.draft_model.lm_head) as heard:
        trainer.compute_loss(trainer.draft_model, {"input_ids": ids[None], "attention_mask": ones, "loss_mask": ones})
    return heard.steps(length)


def set_vocabulary(draft: nn.Module) -> Tensor:
    """Target ids [D], by the package's own count over a made-up text."""
    ids = torch.randperm(draft.vocab_size, generator=torch.Generator().manual_seed(5))
    counts = {int(token): draft.vocab_size - place for place, token in enumerate(ids)}
    d2t, t2d = process_token_dict_to_mappings(Counter(counts), draft.draft_vocab_size, draft.vocab_size)
    draft.d2t.copy_(d2t)
    draft.t2d.copy_(t2d)
    return d2t + torch.arange(len(d2t))


def prepared(target: Path, written: dict[str, Any], scratch: Path) -> tuple[OnlineEagle3Trainer, Tensor]:
    """The package's trainer with a draft of its own making, and the target ids [D] of the draft's vocabulary."""
    path = scratch / "config.json"
    path.write_text(json.dumps(written))
    config = factory.DraftModelConfig.from_file(path)
    draft = factory.create_draft_model(config).float()
    draft.midlayer.self_attn._init_rope()  # it came in bfloat16, its table of angles too
    draft.load_embed_weights(str(target), "model.embed_tokens.weight")
    wrapper = TransformersBackend.__new__(TransformersBackend)
    wrapper.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    trainer = OnlineEagle3Trainer(
        draft_model=draft,
        target_model=wrapper,
        length=common.STEPS,
        draft_model_config=config,
        args=TrainingArguments(output_dir=str(scratch), use_cpu=True, report_to=[]),
    )
    return trainer, set_vocabulary(draft)


def make(out: Path, name: str, case: dict[str, Any]) -> None:
    folder = common.new_case(out, TRAINER, VERSION, name)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, vocabulary = prepared(out / "target", CONFIG | case.get("config", {}), Path(scratch))
        draft, wrapper = trainer.draft_model, trainer.target_model
        common.randomise(draft, 11, ["embed_tokens."])
        ids, _ = common.inputs(1)
        trained = steps(trainer, ids)
        if "drop" in case:  # what the package's DeepSpeed path saves
            kept = {key: value for key, value in draft.state_dict().items() if case["drop"] not in key}
            draft.save_pretrained(folder / "checkpoint", state_dict=kept)
        else:
            trainer.save_model(str(folder / "checkpoint"))
    for path in (folder / "checkpoint").glob("*.bin"):
        path.unlink()  # the settings of the training run
    common.tidy(folder / "checkpoint", out / "target")
    logits = trained
    if name != "mrope":  # its three numbers a token have no place in a chain of text
        draft.midlayer.self_attn.rotary_emb = FromConfig(LlamaConfig.from_pretrained(folder / "checkpoint"))
        logits = steps(trainer, ids)
    layers = getattr(draft.config, "aux_hidden_states_layer_ids", None) or wrapper._get_default_aux_layer_ids(
        common.LAYERS
    )
    taps, _ = wrapper.get_hidden_states_and_logits(ids[None], aux_hidden_states_layer_ids=layers)
    apart = float((trained - logits).abs().max())
    about = {
        "trainer": TRAINER,
        "version": VERSION,
        "options": case.get("config", {}),
        "taps": [k + 1 for k in layers],
        "target": "target",
        "notes": "the package trains with base 10000 whatever rope_theta says; logits are those of the saved config",
    }
    if "refused" in case:
        about["refused"] = case["refused"]
    common.finish_case(
        folder,
        about,
        ids,
        taps[0, : common.LENGTH],
        logits.detach(),
        vocabulary,
        draft.embed_tokens.weight,
        trained if apart else None,
    )
    print(f"{folder.name}: taps {about['taps']}, trained and served differ by {apart:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="one case")
    arguments = parser.parse_args()
    common.make_target(arguments.out)
    for name, case in CASES.items():
        if arguments.only in (None, name):
            shutil.rmtree(arguments.out / f"{TRAINER}-{VERSION}-{name}", ignore_errors=True)
            make(arguments.out, name, case)


if __name__ == "__main__":
    main()
