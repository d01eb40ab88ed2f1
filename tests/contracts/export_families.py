"""The families of drafts that read the target's states, as tests of exports and imports need them.

A family is an entry of ``FAMILIES``: a tiny config, how a draft is built of it and what it answers, its formats and
options. ``test_exporters.py`` holds each of them to one contract; what a family has alone stands in files of its own.
Test files load this one with ``runpy``, since they cannot import each other.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from redraft import artifact, registries
from redraft.drafts.base import Draft
from redraft.drafts.eagle1 import Eagle1Config, Eagle1Draft
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.errors import UserError
from redraft.registries import EXPORTERS
from redraft.target import Facts

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tiny_drafts.py")))
LLAMA3, YARN = TINY.LLAMA3, TINY.YARN


def facts(
    name: str = "tuned/target", hidden_size: int = 16, layers: int = 8, vocab_size: int = 40, context: int = 64
) -> Facts:
    """What is known of a target of these sizes."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        num_attention_heads=1,
        num_hidden_layers=layers,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        architectures=["LlamaForCausalLM"],
    )
    return Facts(name, config)


TARGET = facts()


@dataclass(frozen=True)
class Family:
    """What the contract asks of a family. ``answer`` runs two draft steps over a fixed input."""

    name: str
    config: Any
    build: Callable[[Any, torch.Generator], Draft]
    answer: Callable[[Draft], Tensor]
    # How far the answer may be from that of a private part that was not merged.
    tolerance: float
    formats: tuple[str, ...]
    # Options of a draft, and those of the formats that cannot hold them.
    options: dict[str, tuple[dict[str, Any], set[str]]]
    # What this family's files are, beyond what all are: format, draft, metadata of the import, tensors of the file.
    check_file: Callable[[str, Draft, dict[str, Any], dict[str, Tensor]], None]
    # Names of tensors that a file of the family has no place for.
    extra_tensors: tuple[str, ...]
    # Changes of the target that only this family cannot fit, and what is said of them.
    misfits: tuple[tuple[dict[str, int], str], ...] = ()

    def make(self, dtype: torch.dtype = torch.float32, **options: Any) -> Draft:
        generator = torch.Generator().manual_seed(1)
        draft = self.build(replace(self.config, **options), generator)
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
        return draft.to(dtype)

    @property
    def tensors(self) -> list[str]:
        return sorted(self.make().state_dict())

    @property
    def weights(self) -> list[str]:
        """The tensors that hold real numbers."""
        return sorted(name for name, tensor in self.make().state_dict().items() if tensor.is_floating_point())

    def exported(self, name: str, folder: Path, **options: Any) -> Path:
        """The folder, with a checkpoint in this format."""
        EXPORTERS.get(name)(self.make(**options), folder, TARGET)
        return folder

    def assert_same(self, left: Draft, right: Draft) -> None:
        a, b = left.state_dict(), right.state_dict()
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
        assert type(left) is type(right) and left.config == right.config
        assert torch.equal(self.answer(left), self.answer(right))


def refused(name: str, tmp_path: Path, draft: Draft, message: str, target: Facts = TARGET, **how: Any) -> None:
    """The export fails with one line, and nothing is left behind."""
    with pytest.raises(UserError, match=message) as caught:
        EXPORTERS.get(name)(draft, tmp_path / "out", target, **how)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def rewrite(folder: Path, state: dict[str, Tensor] | None = None, **config: Any) -> None:
    """Change an exported checkpoint in place."""
    if state is not None:
        save_file(state, folder / "model.safetensors")
    path = folder / "config.json"
    artifact.atomic_write_json(path, json.loads(path.read_text()) | config)


def theirs(folder: Path, ours: str) -> str:
    """The file's name of a tensor."""
    names = load_file(folder / "model.safetensors")
    return ours if ours in names else ours.replace("midlayer.", "layers.0.")


# -- EAGLE-3 -----------------------------------------------------------------------------------------------------------
def build_eagle3(config: Eagle3Config, generator: torch.Generator) -> Eagle3Draft:
    ids = torch.randperm(40, generator=generator)[: config.draft_vocab_size].sort().values
    return Eagle3Draft(config, ids)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention over one sequence [N, heads, width]."""
    repeat = query.shape[1] // keys.shape[1]
    args = [
        x.transpose(0, 1)[None] for x in (query, keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1))
    ]
    return torch.nn.functional.scaled_dot_product_attention(*args, is_causal=True)[0].transpose(0, 1)


def answer_eagle3(draft: Eagle3Draft) -> Tensor:
    """With a fixed embedding table in the target's place."""
    generator = torch.Generator().manual_seed(2)
    dtype, config = draft.lm_head.weight.dtype, draft.config
    taps = torch.randn(7, len(config.taps) * config.target_hidden_size, generator=generator).to(dtype)
    table = torch.nn.Embedding.from_pretrained(torch.randn(40, config.hidden_size, generator=generator).to(dtype))
    embeds = draft.embed(torch.arange(7), table)
    with torch.no_grad():
        first = draft(embeds, draft.fuse(taps), torch.arange(7), [attend] * draft.config.num_layers)
        return draft.logits(draft(embeds, draft.carry(first), torch.arange(7), [attend] * draft.config.num_layers))


def check_eagle3_file(name: str, draft: Eagle3Draft, meta: dict[str, Any], state: dict[str, Tensor]) -> None:
    assert meta["format"] == ("speculators" if name == "vllm" else "plain")
    assert len(state) == len(draft.state_dict())
    assert ({"d2t", "t2d"} <= set(state)) == (draft.config.draft_vocab_size < 40)


EVERY_SWITCH = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True, "attention_bias": True}
EAGLE3 = Family(
    name="eagle3",
    config=TINY.EAGLE3,
    build=build_eagle3,
    answer=answer_eagle3,
    tolerance=1e-5,
    # A GGUF file is read by llama.cpp alone: test_eagle3_gguf.py.
    formats=tuple(name for name in registries.FAMILIES.get("eagle3").writers if name != "gguf"),
    options={
        "bare": ({}, set()),
        "full vocabulary": ({"draft_vocab_size": 40}, set()),
        "norm before residual": ({"norm_before_residual": True}, {"sglang"}),
        "norm before fc, norm output": ({"norm_before_fc": True, "norm_output": True}, set()),
        "fc norm": (
            {"fc_norm": True, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            set(),
        ),
        "biases": ({"attention_bias": True}, {"sglang"}),
        "own embedding": ({"own_embedding": True}, {"sglang"}),
        "narrow draft": ({"hidden_size": 12, "own_embedding": True}, {"sglang"}),
        "four taps, llama3 rope": ({"taps": (1, 3, 5, 7), "rope_parameters": LLAMA3, "fc_norm": True}, set()),
        "yarn rope, wide heads": ({"rope_parameters": YARN, "head_dim": 8, "num_key_value_heads": 4}, set()),
        "everything": (EVERY_SWITCH, {"sglang"}),
    },
    check_file=check_eagle3_file,
    extra_tensors=("fc.bias", "layers.1.mlp.up_proj.weight", "mask_hidden", "midlayer.self_attn.q_norm.weight"),
    misfits=(({"layers": 4}, "taps layer 5"),),
)


# -- EAGLE-1 -----------------------------------------------------------------------------------------------------------
def build_eagle1(config: Eagle1Config, generator: torch.Generator) -> Eagle1Draft:
    return Eagle1Draft(config)


def answer_eagle1(draft: Eagle1Draft) -> Tensor:
    """Each token sees itself alone, and the head is a fixed one."""
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(40, 16, generator=generator).to(draft.fc.weight)
    head = torch.nn.Linear(16, 40, bias=False)
    head.weight = torch.nn.Parameter(torch.randn(40, 16, generator=generator).to(draft.fc.weight))
    draft.bind(SimpleNamespace(head=head, scale_logits=lambda x: x))
    embeds = draft.embed(torch.arange(7), torch.nn.Embedding.from_pretrained(table))
    found = draft.fuse(torch.randn(7, 16, generator=generator).to(draft.fc.weight))
    with torch.no_grad():
        for _ in range(2):
            alone = lambda query, keys, values: values.repeat_interleave(query.shape[1] // keys.shape[1], 1)  # noqa: E731
            found = draft(embeds, draft.carry(found), torch.arange(7), [alone] * draft.config.num_layers)
        return draft.logits(found)


def check_eagle1_file(name: str, draft: Eagle1Draft, meta: dict[str, Any], state: dict[str, Tensor]) -> None:
    assert meta["format"] == name
    assert not any("lm_head" in tensor or "input_layernorm" in tensor or tensor == "norm.weight" for tensor in state)
    assert ("fc.bias" in state) == (name == "sglang")
    if "fc.bias" in state and not draft.config.fc_bias:
        assert state["fc.bias"].shape == (16,) and not state["fc.bias"].any()
    assert all(tensor.startswith(("fc.", "layers.0.", "embed_tokens.")) for tensor in state)


EAGLE1 = Family(
    name="eagle1",
    config=TINY.EAGLE1,
    build=build_eagle1,
    answer=answer_eagle1,
    tolerance=1e-4,
    formats=("vllm", "sglang"),
    options={
        "bare": ({}, set()),
        "attention bias": ({"attention_bias": True}, set()),
        "yarn rope": ({"rope_parameters": YARN, "num_key_value_heads": 4}, set()),
        "fc bias": ({"fc_bias": True}, {"vllm"}),
        "own embedding": ({"own_embedding": True}, {"sglang"}),
    },
    check_file=check_eagle1_file,
    extra_tensors=(
        "lm_head.weight",
        "layers.0.input_layernorm.weight",
        "layers.1.mlp.up_proj.weight",
        "norm.weight",
    ),
)

FAMILIES = (EAGLE1, EAGLE3)
