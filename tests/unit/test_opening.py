"""Nothing is opened that is not needed: weights read as they lie, runs without the model, layers merged one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.adaptation import merged_target
from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.models import Parts, TargetSpec
from redraft.artifact import read_layout
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.errors import UserError
from redraft.loading import changes, devices, targets
from redraft.loading.stored import Stored, read
from redraft.loading.targets import load_target, plain_target
from redraft.settings.runs import AdaptConfig
from redraft.target import Head, Target
from redraft.target.facts import tensors_fingerprint

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, opening a model fails."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was opened")

    return lambda: monkeypatch.setattr(targets, "load_model", refuse)


@pytest.fixture
def adapted(tmp_path: Path, tiny_target: Callable[..., Target]) -> Callable[..., Path]:
    """``adapted(config, architecture, dtype, shard, **shape)`` -> the folder of an adapter on a saved base."""

    def make(config: Any, architecture: str, dtype: torch.dtype, shard: str = "1GB", **shape: Any) -> Path:
        target = tiny_target(architecture, **shape)
        target.model.to(dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
        target.tokenizer.save_pretrained(tmp_path / "base")
        joined = peft.get_peft_model(target.model, config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in filter(lambda one: one.requires_grad, joined.parameters()):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        joined.save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
        return tmp_path / "adapter"

    return make


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | settings))


# -- weights as they lie ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1, 2, 7, 100, 5000, 40000])
def test_every_so_manieth_number_is_that_of_the_whole_tensor(tmp_path: Path, step: int) -> None:
    """Of a tensor, and of several behind each other, whichever way they are read."""
    tensors = {"a": torch.randn(300, 41), "b": torch.randn(7, 41), "c": torch.randn(900, 41)}
    save_file(tensors, tmp_path / "x.safetensors")
    with open(tmp_path / "x.safetensors", "rb") as file:
        layout = read_layout(file)
    for names in ("a", "ab", "bbc", "cab"):
        whole = torch.cat([tensors[name] for name in names])
        weight = Stored(whole.shape, tuple((tmp_path / "x.safetensors", layout[name]) for name in names))
        assert torch.equal(weight.samples(step), whole.reshape(-1)[::step])
        assert torch.equal(torch.cat(list(weight.pieces())), whole.reshape(-1))
        assert torch.equal(read(weight, torch.bfloat16), whole.to(torch.bfloat16))


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(300, 41)}, path)
    with open(path, "rb") as file:
        entry = read_layout(file)["a"]
    path.write_bytes(path.read_bytes()[:-1000])
    weight = Stored(entry.shape, ((path, entry),))
    for take in (lambda: weight.samples(1), lambda: weight.samples(4000)[2], lambda: read(weight, torch.float32)):
        with pytest.raises(UserError, match="cannot be read .it ends too early.; copy or download it again"):
            take()
            weight.samples(entry.shape.numel() - 1)


# -- runs ------------------------------------------------------------------------------------------------------------
def test_text_from_a_server_and_free_scores_need_no_model(
    tmp_path: Path, tiny_target: Callable[..., Target], fake: Callable[..., Any], no_model: Callable[[], None]
) -> None:
    """Neither do training and judging on stored features; and all is as with a target that was open from the start."""
    target, server = tiny_target(), fake()
    target.save(tmp_path / "target")
    save_draft(tmp_path / "draft", fresh_draft(target, range(100), seed=2), {"method": "full"})
    prompts = [{"id": f"q{i}", "prompt": f"what is {i} and {i * i}?"} for i in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    given: dict[str, Any] = {
        "target": str(tmp_path / "target"),
        "draft": str(tmp_path / "draft"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "heldout_prompts": 4,
        "max_new_tokens": 12,
        "server": server.url,
        "server_model": "tiny",
        "dtype": "float32",
        "budget": "50%",
        "scorer": "length",
        "train": {"epochs": 1, "batch_anchors": 64},
        "exports": ["vllm"],
        "bench_prompts": 0,
    }

    def run(out: str, **more: Any) -> AdaptRun:
        return AdaptRun(AdaptConfig(**given, out=tmp_path / out), lambda text: None, **more)

    first = run("run", target=target)
    first.check(), first.source.write(), first.select(), first.train()
    no_model()
    second = run("run")
    (tmp_path / "run" / "train.json").unlink()
    for part in ("merged", "train"):
        (tmp_path / "run" / part).rename(tmp_path / part)
    assert second.run() == {} and not (tmp_path / "run" / "bench.json").exists()
    assert not isinstance(second.parts.head, Target)
    ours, theirs = (
        load_file(folder / "draft.safetensors") for folder in (tmp_path / "run/merged", tmp_path / "merged")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    third = run("other", target=None)
    third.check(), third.source.write(), third.select()
    for name in ("responses.jsonl", "heldout.jsonl"):  # rows come in any order
        ours, theirs = ((tmp_path / place / name).read_bytes().splitlines() for place in ("other", "run"))
        assert sorted(ours) == sorted(theirs)
    with pytest.raises(AssertionError, match="the model was opened"):
        third.train()


def test_what_is_open_serves_for_what_is_less(tmp_path: Path, tiny_target: Callable[..., Target]) -> None:
    target = tiny_target()
    target.save(tmp_path)
    parts = TargetSpec(str(tmp_path), "float32").parts()
    parts.tap((1, 2))
    facts, head = parts.facts, parts.head
    assert type(head) is Head and parts.head is head and facts.content_hash() == target.content_hash()
    assert parts.model.taps == (1, 2) and parts.head is parts.model and parts.facts is facts
    alone = Parts.of(target.head_part)
    assert alone.facts.content_hash() == facts.content_hash()
    with pytest.raises(ValueError, match="no more of .* is here than was opened"):
        alone.model.forward(torch.zeros(1, 1, dtype=torch.long))


def test_a_device_that_is_not_there_is_told_before_anything_is_read(
    tmp_path: Path, tiny_target: Callable[..., Target], no_model: Callable[[], None]
) -> None:
    tiny_target().save(tmp_path)
    no_model()
    for opened in (load_target, plain_target):
        with pytest.raises(UserError, match="the device nonsense cannot be used"):
            opened(str(tmp_path), device="nonsense")


def test_weights_go_straight_to_a_device(tmp_path: Path, tiny_target: Callable[..., Target]) -> None:
    """``meta`` stands for one: it takes what it is given without a copy here."""
    from redraft.loading.checkpoint import load_model
    from redraft.loading.places import locate

    tiny_target().save(tmp_path)
    model, _, _ = load_model(locate(str(tmp_path)), str(tmp_path), torch.float32, "meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_several_devices_take_layers_by_their_room(tiny_target: Callable[..., Target]) -> None:
    """In order, and what is no layer is on the first, where drafts are."""
    model = tiny_target(num_hidden_layers=8).model
    for name, free in (("equal", [10**6] * 2), ("unequal", [10**6, 3 * 10**6]), ("one", [10**6])):
        places = devices.spread(model, torch.float32, free)
        layers = [places.pop(f"model.layers.{k}") for k in range(8)]
        assert layers == sorted(layers) and set(layers) == set(range(len(free))), name
        assert {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"} == places.keys()
        assert set(places.values()) == {0}
        named = [*places, *(f"model.layers.{k}" for k in range(8))]
        assert all(any(weight.startswith(f"{part}.") for part in named) for weight in model.state_dict()), name
    assert sum(devices.spread(model, torch.float32, [10**6, 10**7])[f"model.layers.{k}"] for k in range(8)) >= 7
    with pytest.raises(
        UserError, match=r"no room for 0\.\d GB of weights: 0\.0 GB are free on the device; name another"
    ):
        devices.spread(model, torch.float32, [10**4])


def test_without_an_accelerator_all_of_them_are_the_cpu(tmp_path: Path, tiny_target: Callable[..., Target]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are some")
    target = tiny_target()
    target.save(tmp_path)
    spec = TargetSpec(str(tmp_path), device="auto")
    assert spec.open().device.type == spec.parts().facts.device.type == spec.known().device.type == "cpu"


# -- adapters --------------------------------------------------------------------------------------------------------
CASES: list[tuple[Any, str, dict[str, Any]]] = [
    (lora(), "llama", {}),
    (lora(use_dora=True, target_modules="all-linear", modules_to_save=["norm"]), "llama", {}),
    (lora(bias="all"), "qwen2", {"tie_word_embeddings": True}),
    (lora(target_modules=["q_proj"]), "qwen3_moe", MOE),
    (lora(target_modules=["lm_head", "embed_tokens"]), "llama", {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_layers_merged_one_by_one_are_the_model_merged_as_a_whole(
    case: int, dtype: torch.dtype, adapted: Callable[..., Path], no_model: Callable[[], None], monkeypatch: Any
) -> None:
    """In every bit, hash and head included, and for these the model is not opened."""
    config, architecture, shape = CASES[case]
    folder = str(adapted(config, architecture, dtype, "20KB", **shape))
    by_layer = load_target(folder, torch.bfloat16)
    with monkeypatch.context() as whole:
        whole.setattr(targets, "_layered", lambda *args: None)
        expected = load_target(folder, torch.bfloat16)
    ours, theirs = by_layer.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert by_layer.notes == expected.notes
    no_model()
    plain = plain_target(folder, None)
    assert plain is not None and plain.facts.content_hash() == tensors_fingerprint(theirs)
    head = plain.head(torch.bfloat16)
    assert head is not None and torch.equal(head.head.weight, expected.head.weight)
    assert torch.equal(head.embedding.weight, expected.embedding.weight)


def test_a_layer_that_would_be_another_is_left_to_the_whole_merge(
    adapted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which compares logits, and finds this one in order."""
    folder = str(adapted(lora(), "llama", torch.float32))
    expected = load_target(folder)
    monkeypatch.setattr(changes, "ROUNDING", -1.0)
    monkeypatch.setattr(changes, "CHANGE", -1.0)
    assert plain_target(folder, None) is None
    again = load_target(folder)
    assert torch.equal(again.head.weight, expected.head.weight) and again.content_hash() == expected.content_hash()


@pytest.mark.parametrize("case", [0, 2, 3])
def test_a_merged_target_is_written_shard_by_shard(
    case: int, adapted: Callable[..., Path], tmp_path: Path, no_model: Callable[[], None], monkeypatch: Any
) -> None:
    """The same tensors and settings as those of the merged model that is saved, in the files of its base."""
    config, architecture, shape = CASES[case]
    folder = str(adapted(config, architecture, torch.bfloat16, "20KB", **shape))
    with monkeypatch.context() as whole:
        whole.setattr(merged_target, "plain_target", lambda *args: None)
        merged_target.merge_target_folder(folder, None, tmp_path / "old")
    expected = load_target(str(tmp_path / "old"), torch.bfloat16)
    with monkeypatch.context() as closed:
        closed.setattr(targets, "load_model", None)
        merged_target.merge_target_folder(folder, None, tmp_path / "new")
    files = {place: list((tmp_path / place).glob("*.safetensors")) for place in ("base", "old", "new")}
    assert {file.name for file in files["new"]} == {file.name for file in files["base"]} and len(files["new"]) > 1
    ours, theirs = ({k: v for file in files[place] for k, v in load_file(file).items()} for place in ("new", "old"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "new" / name).read_text()) == json.loads((tmp_path / "old" / name).read_text())
    assert load_target(str(tmp_path / "new"), torch.bfloat16).content_hash() == expected.content_hash()


def test_a_merged_target_with_numbers_that_are_none_is_not_written(
    adapted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = adapted(lora(), "llama", torch.float32)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinity in model.norm.weight"):
        merged_target.merge_target_folder(str(folder), None, tmp_path / "new")
    assert not (tmp_path / "new").exists()
