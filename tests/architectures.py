"""Tiny random targets of the architectures that people serve, and drafts that are right and wrong on purpose.

Windows are 16 tokens wide and chunks too, so that short texts are past them. Tests and the table of
``benchmarks/architectures.py`` load this file with ``runpy``, since test files cannot import each other.
"""

from __future__ import annotations

from typing import Any

import torch
from batched import BatchedChainDecoder, _Proposal
from transformers import AutoConfig, AutoModelForCausalLM

from redraft.decode.engine import ChainDecoder
from redraft.decode.tree import Proposal, Topology, TreeDecoder

WINDOW = {"sliding_window": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GEMMA = {"query_pre_attn_scalar": 16, **WINDOW}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# What a row of the table is called -> the model type, and how its config differs from SHAPE.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama4_text": ("llama4_text", {**EXPERTS, "attention_chunk_size": 16, "intermediate_size_mlp": 128}),
    "mistral": ("mistral", WINDOW),
    "ministral": ("ministral", WINDOW),
    "mixtral": ("mixtral", {**EXPERTS, **WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, use_sliding_window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, **WINDOW}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", SMALL_EXPERTS),
    "qwen3_next": ("qwen3_next", {**LINEAR, **SMALL_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_5_text": ("qwen3_5_text", LINEAR),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("gemma3_text", GEMMA),
    "gemma3": ("gemma3", GEMMA),
    "gpt_oss": ("gpt_oss", {**EXPERTS, **WINDOW}),
    "gpt_oss, sinks alone": ("gpt_oss", {**EXPERTS, "sliding_window": 1024}),
    "cohere2": ("cohere2", WINDOW),
    "phi3": ("phi3", WINDOW),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "attention_multiplier": 0.1},
    ),
    "smollm3": ("smollm3", {}),
    "glm4": ("glm4", {}),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, **LATENT, "num_key_value_heads": 4, "head_dim": 8}),
}
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}


def build(name: str, spread: float = 0.3, seed: int = 0) -> Any:
    """The float32 model of a row; ``spread`` is the width of its random weights."""
    kind, extra = ARCHITECTURES[name]
    text = SHAPE | {"initializer_range": spread} | extra
    if kind == "gemma3":
        config = AutoConfig.for_model(kind, text_config=text, vision_config=SIGHT, mm_tokens_per_image=4)
        config.eos_token_id = 2
    else:
        config = AutoConfig.for_model(kind, **text)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if kind == "gemma2":
        model.set_attn_implementation("eager")  # older releases compute it without its soft cap otherwise
    model.generation_config.eos_token_id = 2
    return model


def texts(count: int, length: int) -> list[list[int]]:
    """Prompts of about ``length`` random tokens, each a little longer than the one before."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 128, (length + 3 * i,), generator=generator).tolist() for i in range(count)]


@torch.inference_mode()
def own_answers(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """transformers' own greedy generation, one prompt at a time, without an end token."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 3}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        found.append(out[0, len(prompt) :].tolist())
    return found


class Planted:
    """Stands in for a decoder's drafting: the true continuation, with a wrong token at changing places."""

    def __init__(self, decoder: Any, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self.truth = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
        self.order, self.answers = list(answers), answers
        self.count = 0
        if isinstance(decoder, TreeDecoder):
            decoder.proposals, decoder.propose = 8, self.tree
        elif isinstance(decoder, BatchedChainDecoder):
            self.gamma, decoder._propose = decoder.gamma, self.batch
        elif isinstance(decoder, ChainDecoder):
            self.gamma, decoder.propose = decoder.gamma, self.chain
        self.answer: list[int] = []

    def start(self, answer: list[int]) -> None:
        """The next text that is decoded, one at a time, continues so."""
        self.answer = answer

    def _next(self, done: int, depth: int, answer: list[int]) -> list[int]:
        self.count += 1
        right = (answer[done : done + depth] + [5] * depth)[:depth]
        wrong = self.count % (depth + 2)
        return [(token + 1) % 128 if place == wrong else token for place, token in enumerate(right)]

    def chain(self, request: Any) -> tuple[list[int], None]:
        return self._next(len(request.ids), min(self.gamma, request.room), self.answer), None

    def tree(self, request: Any) -> Proposal:
        """Two nodes a level, of which the second is the likelier to be right, and goes on."""
        good = self._next(len(request.ids), min(4, request.room), self.answer)
        tokens, parents, parent = [], [], 0
        for token in good:
            tokens += [(token + 7) % 128, token]
            parents += [parent, parent]
            parent = len(tokens)
        return Proposal(tokens, Topology(parents))

    def batch(self, flight: Any, rooms: dict[int, int]) -> _Proposal:
        width = max(min(self.gamma, room) for room in rooms.values())
        ids = torch.zeros(len(flight.rows), width, dtype=torch.long)
        counts = [0] * len(flight.rows)
        for row, one in flight.active():
            counts[row] = min(self.gamma, rooms[row])
            found = self._next(len(one.generation.ids), counts[row], self.answers[one.index])
            ids[row, : counts[row]] = torch.tensor(found, dtype=torch.long)
        return _Proposal(ids, counts, None)
