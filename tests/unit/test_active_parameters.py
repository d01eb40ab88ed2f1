"""What one token is multiplied with, held against what a pass of a mixture of experts really reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from redraft.target.facts import Facts, parameters_per_token, text_decoder

EXPERTS = 8
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
SMALL = {"moe_intermediate_size": 16, "num_experts": EXPERTS}
ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS},
    "granitemoe": {"num_local_experts": EXPERTS},
    "granitemoeshared": {"num_local_experts": EXPERTS, "shared_intermediate_size": 24},
    "minimax": {"num_local_experts": EXPERTS, "layer_types": ["full_attention"] * 3},
    "llama4_text": {"num_local_experts": EXPERTS, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "olmoe": {"num_experts": EXPERTS},
    "qwen2_moe": SMALL | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": SMALL,
    "qwen3_next": SMALL | LINEAR | {"shared_expert_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": [1, 2, 3]},
    "ernie4_5_moe": SMALL | {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_layer_start_index": 1},
    "deepseek_v2": ROUTED | LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 2},
    "deepseek_v3": ROUTED | LATENT | {"first_k_dense_replace": 1, "head_dim": 4},
    "glm4_moe": ROUTED | {"first_k_dense_replace": 1},
    "nemotron_h": ROUTED
    | {"layers_block_type": ["moe", "attention", "moe"], "moe_shared_expert_intermediate_size": 24, "n_groups": 1},
    "jamba": {"num_experts": EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "doge": {"num_experts": 16, "is_moe": True},
}


def built(family: str) -> Any:
    shape = SHAPE | FAMILIES[family]
    if family == "hunyuan_v1_moe":
        shape = {name: value for name, value in shape.items() if name != "num_experts_per_tok"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.2)
    return model


@torch.no_grad()
def met(model: Any) -> int:
    """Numbers that one token meets: of experts those that change its state, else all but tables; and the head."""
    decoder, ids = text_decoder(model), torch.tensor([[7]])
    tables = {name for name, module in decoder.named_modules() if isinstance(module, nn.Embedding)}
    expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
    total, generator = model.get_output_embeddings().weight.numel(), torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        place = name.rpartition(".")[0]
        if place in tables:
            continue
        if parameter.dim() < 2 or parameter.shape[0] != EXPERTS or "experts" not in name:
            total += parameter.numel()
            continue
        for k in range(EXPERTS):
            old = parameter[k].clone()
            parameter[k] += torch.randn(old.shape, generator=generator)
            moved = not torch.equal(decoder(input_ids=ids, use_cache=False).last_hidden_state, expected)
            total += moved * old.numel()
            parameter[k] = old
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_count_as_often_as_a_token_is_sent_to_them(family: str) -> None:
    model = built(family)
    assert parameters_per_token(model) == met(model)
    assert Facts("", model.config).parameters_per_token == met(model), "without numbers"
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_per_token(model) < everything - model.get_input_embeddings().weight.numel() or family == "doge"


def test_experts_without_parameters_take_their_share_of_the_tokens() -> None:
    """LongCat sends a token to 2 of 8 experts and 4 that hand on what they are given: to 4/3 of the 8, as a mean."""
    shape = SHAPE | LATENT | {"n_routed_experts": EXPERTS, "zero_expert_num": 4, "moe_topk": 2, "num_layers": 2}
    shape |= {"expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "head_dim": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("longcat_flash", **shape), dtype=torch.float32)
    routed = sum(p.numel() for name, p in model.model.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in model.parameters()) - routed - model.get_input_embeddings().weight.numel()
    assert abs(parameters_per_token(model) - rest - routed * 2 / 12) <= len(list(model.parameters()))


def test_tables_that_are_looked_up_are_no_products() -> None:
    """Of the embedding of every layer (Gemma 3n) a token takes a row."""
    decoder = nn.Module()
    decoder.lookup, decoder.linear = nn.Embedding(1000, 8), nn.Linear(8, 8)
    from redraft.target.facts import active_parameters

    assert active_parameters(decoder, AutoConfig.for_model("llama")) == 72
