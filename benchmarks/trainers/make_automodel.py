"""Drafts as NVIDIA's NeMo Automodel 0.7 writes them, with what its own model says.

    python make_automodel.py OUT

The draft's config is derived from the target's as the package's recipes do it, the package's registry names the draft's
class, its target wrapper collects the features, its trainer module runs three steps of the training-time test, and its
checkpointer writes the consolidated folder.

The folder says little of the draft: ``model_type`` and ``num_hidden_layers`` are the target's, ``architectures`` is the
same for every kind of layer, and the tapped layers are nowhere.
"""

from __future__ import annotations

import argparse
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
from nemo_automodel.components.checkpoint.checkpointing import CheckpointingConfig
from nemo_automodel.components.speculative.eagle.core import Eagle3TrainerModule
from nemo_automodel.components.speculative.eagle.core_v12 import EagleTrainerModule
from nemo_automodel.components.speculative.eagle.registry import resolve_eagle1_draft_spec, resolve_eagle3_draft_spec
from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel
from nemo_automodel.components.speculative.eagle.target_v12 import HFEagleTargetModel
from nemo_automodel.recipes.llm.train_eagle3 import TrainEagle3Recipe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, Phi3Config, Qwen3MoeConfig

TRAINER, VERSION = "automodel", version("nemo_automodel")
REDUCED = 40

# Targets that the draft's shape is taken from. The llama one is the common one.
TARGETS: dict[str, dict[str, Any]] = {
    "target": {},
    "target-qwen3": {"kind": "qwen3"},
    "target-bias": {"attention_bias": True},
    "target-mlp-bias": {"mlp_bias": True},
    "target-theta": {"rope_parameters": common.ROPES["theta"]},
    "target-llama3": {"rope_parameters": common.ROPES["llama3"]},
    "target-yarn": {"rope_parameters": common.ROPES["yarn"]},
    "target-linear": {"rope_parameters": common.ROPES["linear"]},
    "target-dynamic": {"rope_parameters": common.ROPES["dynamic"], "max_position_embeddings": 64},
}

# The recipe's arguments that change the draft, alone and together.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "reduced": {"vocabulary": REDUCED},
    "fc-norm": {"recipe": {"fc_norm": True}},
    "norm-output": {"recipe": {"norm_output": True}},
    "eagle31": {"recipe": {"fc_norm": True, "norm_output": True}, "vocabulary": REDUCED},
    "given-taps": {"recipe": {"aux_layer_ids": [0, 3, 6]}, "given": {"taps": [1, 4, 7]}},
    "attention-bias": {"target": "target-bias"},
    "qwen3": {"target": "target-qwen3", "vocabulary": REDUCED},
    "theta": {"target": "target-theta"},
    "llama3": {"target": "target-llama3"},
    "yarn": {"target": "target-yarn"},
    "linear": {"target": "target-linear"},
    "dynamic": {"target": "target-dynamic"},
    "phi3": {"target": "target-phi3"},
    "qwen3-moe": {"target": "target-qwen3-moe"},
    # Its target has windows on every second layer, in the config that the draft takes over; the draft itself has none.
    "gpt-oss": {"target": "target-gpt-oss"},
    "deepseek": {"target": "target-deepseek", "refused": "latent attention"},
    # What no engine's chain of a Llama draft computes.
    "mlp-bias": {"target": "target-mlp-bias", "refused": "mlp_bias"},
    "parallel": {
        "recipe": {"parallel_drafting": True, "mask_token_id": 95, "num_depths": 3, "num_draft_layers": 2},
        "refused": "P-EAGLE",
    },
    "eagle1": {"family": 1, "refused": "LlamaEagleDraftModel"},
    "eagle1-two-layers": {"family": 1, "recipe": {"draft_num_hidden_layers": 2}, "refused": "LlamaEagleDraftModel"},
}

# Targets of other makes, whose configs the draft's takes over.
OTHERS: dict[str, tuple[type, dict[str, Any]]] = {
    "target-phi3": (Phi3Config, {"pad_token_id": 0, "head_dim": None}),
    "target-qwen3-moe": (
        Qwen3MoeConfig,
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "target-gpt-oss": (
        GptOssConfig,
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 4,
            "attention_bias": True,
            "rope_parameters": common.ROPES["yarn"] | {"truncate": False},
        },
    ),
    "target-deepseek": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "first_k_dense_replace": 8,
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 1,
        },
    ),
}


def config_of(target: Any, recipe: dict[str, Any], kept: int) -> Any:
    """The draft's config, as the recipe of EAGLE-3 derives it from the target's."""
    raw = target.to_dict()
    raw |= {"draft_vocab_size": kept, "target_hidden_size": target.hidden_size}
    raw |= {"architectures": ["LlamaEagle3DraftModel"], "tie_word_embeddings": False, "attn_implementation": "eager"}
    raw |= {key: bool(recipe.get(key, False)) for key in ("fc_norm", "norm_output", "parallel_drafting")}
    if raw["parallel_drafting"]:
        TrainEagle3Recipe._configure_peagle_draft_config(None, recipe, raw, target)
    return type(target).from_dict(raw)


def config_of_eagle1(target: Any, recipe: dict[str, Any]) -> Any:
    raw = target.to_dict()
    raw |= {"architectures": ["LlamaEagleDraftModel"]}
    return type(target).from_dict(raw | {"draft_num_hidden_layers": recipe.get("draft_num_hidden_layers", 1)})


def make_target(out: Path, name: str) -> None:
    if name in TARGETS:
        common.make_target(out, name, **TARGETS[name])
    elif not (out / name).exists():
        kind, changes = OTHERS[name]
        shape = {"rope_parameters": common.PLAIN, **common.SHAPE, **changes}
        config = kind(**{key: value for key, value in shape.items() if value is not None})
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out / name)


def vocabulary_of(rows: int, kept: int) -> Tensor:
    """Target ids [D] of the draft vocabulary."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(5))[:kept].sort().values


def save(draft: nn.Module, target: Path, folder: Path) -> None:
    """The consolidated folder of the package's own checkpointer."""
    scratch = folder / "scratch"
    checkpointer = CheckpointingConfig(
        enabled=True,
        checkpoint_dir=str(scratch),
        model_save_format="safetensors",
        model_repo_id=str(target),
        model_cache_dir=str(scratch),
        save_consolidated=True,
        is_peft=False,
        model_state_dict_keys=list(draft.state_dict()),
    ).build(dp_rank=0, tp_rank=0, pp_rank=0, moe_mesh=None)
    checkpointer.save_model(draft, str(scratch), is_final_checkpoint=True)
    shutil.move(scratch / "model" / "consolidated", folder / "checkpoint")
    shutil.rmtree(scratch)
    common.tidy(folder / "checkpoint", target)


def make_eagle3(
    model: nn.Module, case: dict[str, Any], ids: Tensor
) -> tuple[nn.Module, Tensor, Tensor, Tensor, list[int]]:
    """Draft, features [T, K*F], logits [3, T, D], vocabulary [D] and the layers passed."""
    recipe, rows = case.get("recipe", {}), model.config.vocab_size
    vocabulary = vocabulary_of(rows, case.get("vocabulary", rows))
    spec = resolve_eagle3_draft_spec(model.config.architectures)
    draft = spec.draft_cls(config_of(model.config, recipe, len(vocabulary))).to(torch.float32)
    common.randomise(draft, 11)
    draft.copy_embeddings_from_target(model.get_input_embeddings())
    draft.set_vocab_mapping(vocabulary)
    wrapper = HFEagle3TargetModel(model, recipe.get("aux_layer_ids"))
    ones = torch.ones_like(ids[None])
    batch = wrapper.generate_batch(ids[None], ones, ones)
    selected = torch.isin(torch.arange(rows), vocabulary)
    trainer = Eagle3TrainerModule(
        draft, selected_token_ids=vocabulary, selected_token_mask=selected, ttt_steps=common.STEPS
    )
    with common.Heard(draft.lm_head) as heard, torch.no_grad():
        trainer(**batch.to_trainer_inputs())
    return (
        draft,
        batch.aux_hidden_states[0, : common.LENGTH],
        heard.steps(),
        vocabulary,
        [k + 1 for k in wrapper.aux_layer_ids],
    )


def make_eagle1(
    model: nn.Module, case: dict[str, Any], ids: Tensor
) -> tuple[nn.Module, Tensor, Tensor, Tensor, list[int]]:
    """The same for the recipe of EAGLE-1, whose draft predicts the final state that the target's head reads."""
    spec = resolve_eagle1_draft_spec(model.config.architectures)
    draft = spec.draft_cls(config_of_eagle1(model.config, case.get("recipe", {}))).to(torch.float32)
    common.randomise(draft, 11)
    draft.copy_embeddings_from_target(model.get_input_embeddings())
    wrapper = HFEagleTargetModel(model)
    trainer = EagleTrainerModule(draft, target_lm_head=wrapper.get_lm_head())
    ones = torch.ones_like(ids[None])
    states = wrapper.generate_batch(ids[None], ones, ones).input_hidden_states[:, : common.LENGTH]

    def forward(following: Tensor, taken: Tensor) -> Tensor:
        return draft(following, taken, torch.ones_like(following))

    logits = common.chained(forward, trainer.compute_logits, ids, states[0])
    return draft, states[0], logits, torch.arange(model.config.vocab_size), [-1]


def make(out: Path, name: str, case: dict[str, Any]) -> None:
    folder = common.new_case(out, TRAINER, VERSION, name)
    target = case.get("target", "target")
    model = AutoModelForCausalLM.from_pretrained(out / target, dtype=torch.float32, attn_implementation="eager")
    ids, _ = common.inputs(1)
    build = make_eagle1 if case.get("family") == 1 else make_eagle3
    draft, taps, logits, vocabulary, passed = build(model, case, ids)
    save(draft, out / target, folder)
    about = {
        "trainer": TRAINER,
        "version": VERSION,
        "options": {**case.get("recipe", {}), "draft_vocab_size": len(vocabulary), "target": target},
        "taps": passed,
        "target": target,
        "notes": "the tapped layers are not in the folder; these are "
        + ("given ones" if "given" in case else "the package's default"),
    }
    about |= {key: case[key] for key in ("refused", "given") if key in case}
    embedding = draft.get_submodule("embed_tokens" if case.get("family") == 1 else "model.embed_tokens").weight
    common.finish_case(folder, about, ids, taps, logits, vocabulary, embedding)
    print(f"{folder.name}: taps {passed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="one case")
    arguments = parser.parse_args()
    for name, case in CASES.items():
        if arguments.only in (None, name):
            target = case.get("target", "target")
            make_target(arguments.out, target)
            shutil.rmtree(arguments.out / f"{TRAINER}-{VERSION}-{name}", ignore_errors=True)
            make(arguments.out, name, case)


if __name__ == "__main__":
    main()
