"""Facts and head of a target: what the whole target says and computes, read without its model."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.acceptance.simulate import simulate_greedy_chain
from redraft.data.store import Row
from redraft.drafts.eagle3 import fresh_draft
from redraft.errors import UserError
from redraft.features import FeatureStore
from redraft.loading import targets
from redraft.loading.targets import load_target, open_facts, open_head, read_facts
from redraft.settings.training import TrainConfig
from redraft.target import Facts, Head, Target
from redraft.training.trainer import Trainer

FACTS = ("hidden_size", "layers", "vocab_size", "context", "eos_ids", "parameters_per_token", "architectures", "name")


@pytest.fixture
def saved(tiny_target: Callable[..., Target], tmp_path: Path) -> Callable[..., str]:
    """``saved(architecture, shard="1GB", **config)`` -> a folder with a checkpoint and its tokenizer."""

    def save(architecture: str = "llama", shard: str = "1GB", **config: Any) -> str:
        target, folder = tiny_target(architecture, **config), tmp_path / "target"
        target.model.generation_config.eos_token_id = [2, 7]
        target.model.save_pretrained(folder, max_shard_size=shard)
        target.tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a model fails."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(targets, "load_target", refuse)


def agree(one: Facts, other: Facts) -> None:
    assert {name: getattr(one, name) for name in FACTS} == {name: getattr(other, name) for name in FACTS}
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab() and one.content_hash() == other.content_hash()


KINDS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"shard": "20KB"}),
    ("qwen3", {"tie_word_embeddings": True, "shard": "20KB"}),
    ("gemma2", {"tie_word_embeddings": True, "final_logit_softcapping": 3.0}),
    ("phi", {}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shard": "20KB"}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "shape"), KINDS)
def test_a_plain_checkpoint_gives_facts_and_head_as_they_are_in_the_target(
    architecture: str, shape: dict[str, Any], dtype: torch.dtype, saved: Callable[..., str], no_model: None
) -> None:
    folder = saved(architecture, **shape)
    assert bool(list(Path(folder).glob("*.index.json"))) == ("shard" in shape)
    whole = load_target(folder, dtype)
    facts, head = open_facts(folder), open_head(folder, dtype)
    assert type(head) is Head and type(facts) is Facts
    agree(facts, whole)
    agree(head, whole)
    assert facts.eos_ids == (2, 7) and head.dtype == dtype
    for part in ("embedding", "norm", "head"):
        mine, theirs = getattr(head, part), getattr(whole, part)
        assert type(mine) is type(theirs) and not mine.training
        expected = theirs.state_dict()
        assert mine.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.state_dict().items())
        assert not any(p.requires_grad for p in mine.parameters())
    assert (head.head.weight is head.embedding.weight) == bool(shape.get("tie_word_embeddings"))
    states = torch.randn(3, whole.hidden_size).to(dtype)
    assert torch.equal(head.logits(states), whole.logits(states))
    assert torch.equal(head.norm(states), whole.norm(states))


def test_facts_alone_need_no_weights(saved: Callable[..., str], no_model: None) -> None:
    folder = saved()
    (Path(folder) / "model.safetensors").unlink()
    facts, bare = read_facts(folder), read_facts(folder, tokenizer=False)
    assert facts.vocab_size == 128 and facts.eos_ids == (2, 7) and facts.tokenizer is not None
    assert facts.content_hash().startswith("served-") and facts.content_hash() == bare.content_hash()
    assert bare.tokenizer is None and facts.facts is facts


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def tied_twice(folder: Path) -> None:
    """A tied table that is in the file under both names."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("architecture", "change"), [("llama", pickled), ("llama", tied_twice), ("gpt_neox", lambda folder: None)]
)
def test_what_is_not_plain_comes_from_the_model(
    architecture: str, change: Callable[[Path], None], saved: Callable[..., str]
) -> None:
    """The last one's tensors have other names in the file than in the model."""
    folder = saved(architecture, tie_word_embeddings=True)
    change(Path(folder))
    whole = load_target(folder)
    facts, head = open_facts(folder), open_head(folder)
    assert type(head) is Head and type(facts) is Facts
    agree(facts, whole)
    agree(head, whole)
    assert torch.equal(head.head.weight, whole.head.weight)


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def infinite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def config(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors at all")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (config(vocab_size=64), "does not fit its config"),
        (config(quantization_config={"quant_method": "awq"}), "quantised with awq"),
        (damaged, "is damaged"),
        (infinite, "NaN or infinity in model.norm.weight"),
    ],
)
def test_what_opening_the_model_refuses_is_refused(
    change: Callable[[Path], None], why: str, saved: Callable[..., str]
) -> None:
    folder = saved()
    change(Path(folder))
    for opened in (load_target, open_head):
        with pytest.raises(UserError, match=why):
            opened(folder)


# -- the head alone --------------------------------------------------------------------------------------------------
def test_a_head_lets_go_of_the_layers(tiny_target: Callable[..., Target]) -> None:
    target = tiny_target()
    layers, head = weakref.ref(target.backbone.layers), target.head_part
    expected = target.content_hash()
    del target
    gc.collect()
    assert layers() is None and head.content_hash() == head.facts.content_hash() == expected


def test_stored_features_are_trained_on_with_a_head_alone(tiny_target: Callable[..., Target], tmp_path: Path) -> None:
    """To the same bits as with the target, its held-out evaluation included."""
    target = tiny_target()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(4, 128, (30,), generator=generator).tolist() for _ in range(6)]
    rows = [Row(f"r{i}", t[:5], t[5 : 12 + 3 * i], 0.0, 0, 1.0, 0, "length", "hash") for i, t in enumerate(texts)]
    store = FeatureStore(tmp_path / "features", {})
    store.build(target, rows)
    draft, settings = fresh_draft(target, range(100), seed=2), TrainConfig(epochs=2, batch_anchors=40, evaluate_every=2)
    runs = []
    for name, part in (("whole", target), ("head", target.head_part)):
        trainer = Trainer(copy.deepcopy(draft), part, store, rows, rows, settings, tmp_path / name)
        runs.append((trainer.run().history, [parameter for _, parameter in trainer.trained]))
        assert simulate_greedy_chain(trainer.draft, part, rows, store, 2).keys() == {row.key for row in rows}
    assert runs[0][0] == runs[1][0] and all(map(torch.equal, runs[0][1], runs[1][1]))
