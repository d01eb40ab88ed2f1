"""Opening targets: folders, adapters, the unpacked embedded model, and everything that can be wrong with a name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from redraft import loading
from redraft.errors import UserError
from redraft.loading import adapter_base, load_target, load_tokenizer, tokenizer_hash
from redraft.target import Target

IDS = torch.tensor([[4, 9, 33, 70, 101, 5]])


def outputs(target: Target) -> torch.Tensor:
    return target.logits(target.forward(IDS).hidden_BTH)


@pytest.fixture
def saved(tmp_path: Path, tiny_target: Callable[..., Target]) -> tuple[Path, Target]:
    """A checkpoint folder and the target that it holds."""
    target = tiny_target()
    target.save(tmp_path / "base")
    return tmp_path / "base", target


def make_adapter(base: Target, folder: Path, base_name: str, **settings: Any) -> Any:
    """A strong random LoRA over ``base``, saved; gives the PEFT model itself (which changes ``base.model``)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings), task_type="CAUSAL_LM")
    adapted = get_peft_model(base.model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    adapted.save_pretrained(folder)
    entry = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(entry | {"base_model_name_or_path": base_name}))
    return adapted.eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_saved_target_comes_back(tmp_path: Path, tiny_target: Callable[..., Target], architecture: str) -> None:
    target = tiny_target(architecture)
    target.save(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o044, "a server of somebody else may read it"
    again = load_target(str(tmp_path / "m"), torch.float32, taps=(1, 3))
    assert torch.equal(outputs(again), outputs(target))
    assert again.taps == (1, 3) and again.name == str(tmp_path / "m")
    assert again.content_hash() == target.content_hash()
    assert tokenizer_hash(again.tokenizer) == tokenizer_hash(target.tokenizer)
    half = load_target(str(tmp_path / "m"), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.content_hash() == target.content_hash()


@torch.inference_mode()
def test_base_and_adapter_equal_the_adapted_model(saved: tuple[Path, Target], tmp_path: Path) -> None:
    base, target = saved
    plain = outputs(target)
    adapted = make_adapter(target, tmp_path / "adapter", str(base))
    expected = adapted(IDS).logits
    assert (expected - plain).abs().max() > 0.5, "the adapter changes nothing"
    alone = load_target(str(tmp_path / "adapter"), torch.float32)
    torch.testing.assert_close(outputs(alone), expected, rtol=1e-4, atol=1e-4)
    beside = load_target(str(base), torch.float32, adapter=str(tmp_path / "adapter"))
    assert torch.equal(outputs(beside), outputs(alone))
    assert alone.content_hash() == beside.content_hash() != load_target(str(base)).content_hash()
    assert not any("lora" in name for name in alone.model.state_dict())


@torch.inference_mode()
def test_an_adapter_is_merged_before_the_cast(saved: tuple[Path, Target], tmp_path: Path) -> None:
    base, target = saved
    make_adapter(target, tmp_path / "adapter", str(base))
    exact = load_target(str(tmp_path / "adapter"), torch.float32).model.state_dict()
    half = load_target(str(tmp_path / "adapter"), torch.bfloat16).model.state_dict()
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in exact.items())


@torch.inference_mode()
def test_an_adapted_target_has_taps_and_a_cache_like_any_other(saved: tuple[Path, Target], tmp_path: Path) -> None:
    base, target = saved
    adapted = make_adapter(target, tmp_path / "adapter", str(base))
    streams = adapted(IDS, output_hidden_states=True).hidden_states
    merged = load_target(str(tmp_path / "adapter"), torch.float32, taps=(2, 5))
    cache = merged.new_cache(8)
    steps = [merged.forward(IDS[:, :4], cache), merged.forward(IDS[:, 4:], cache)]
    taps = torch.cat([step.taps_BTKH for step in steps], 1)
    torch.testing.assert_close(taps, torch.cat([streams[2], streams[5]], -1), rtol=1e-4, atol=1e-4)


def test_the_base_of_an_adapter(tmp_path: Path) -> None:
    def base(value: Any) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": value}))
        return adapter_base(tmp_path)

    (tmp_path / "beside").mkdir()
    assert base("beside") == str(tmp_path / "beside")
    assert base("embedded:smollm2-135m-instruct") == "embedded:smollm2-135m-instruct"
    assert base("org/model") == "org/model"
    for nothing in (None, "", 5):
        with pytest.raises(UserError, match="names no base model"):
            base(nothing)


def test_the_tokenizer_of_an_adapter_is_its_own_or_the_bases(saved: tuple[Path, Target], tmp_path: Path) -> None:
    base, target = saved
    make_adapter(target, tmp_path / "adapter", "../base")
    assert load_tokenizer(str(tmp_path / "adapter")).chat_template == target.tokenizer.chat_template
    target.tokenizer.chat_template = "{{ 'own' }}"
    target.tokenizer.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(str(tmp_path / "adapter")).chat_template == "{{ 'own' }}"
    assert load_target(str(tmp_path / "adapter")).tokenizer.chat_template == "{{ 'own' }}"


def test_the_tokenizer_hash_sees_ids_and_not_templates(tiny_tokenizer: Any) -> None:
    first = tokenizer_hash(tiny_tokenizer)
    tiny_tokenizer.chat_template = "another"
    tiny_tokenizer.pad_token = "<|im_end|>"
    assert tokenizer_hash(tiny_tokenizer) == first
    tiny_tokenizer.add_tokens(["newword"])
    longer = tokenizer_hash(tiny_tokenizer)
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert len({first, longer, tokenizer_hash(tiny_tokenizer)}) == 3


# -- what can be wrong -----------------------------------------------------------------------------------------------
def refused(spec: Any, message: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_target(str(spec), torch.float32, **settings)
    assert "\n" not in str(caught.value)


def test_names_of_nothing(tmp_path: Path) -> None:
    refused(tmp_path / "none", "does not exist; name a model folder, a hub id or embedded:")
    refused("./none", "does not exist")
    refused(tmp_path, "holds no config.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")
    refused("embedded:nothing", "no embedded model 'nothing'; known: smollm2-135m-instruct")


def test_a_hub_id_off_line_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("nobody/no-such-model", "not in the local hub cache, and no hub can be reached; name a model folder")


def test_a_hub_that_cannot_be_reached_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    asked = []

    def unreachable(self: Any, spec: str, timeout: float) -> None:
        asked.append(timeout)
        raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the hub was asked again and again"))
    refused("nobody/no-such-model", "no hub can be reached")
    assert asked == [loading.places.HUB_SECONDS]


def test_damaged_checkpoints(saved: tuple[Path, Target], tmp_path: Path) -> None:
    base, _ = saved
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not a view of the file
    weights.write_bytes(whole[: len(whole) // 2])
    refused(base, "base")
    save_file({k: v for k, v in state.items() if "layers.3.mlp" not in k}, weights, {"format": "pt"})
    refused(base, r"lacks model\.layers\.3\.mlp")
    save_file(state | {"lm_head.weight": torch.zeros(128, 8)}, weights, {"format": "pt"})
    refused(base, r"lm_head.weight has shape \[128, 8\] in the file and \[128, 32\] by config.json")
    weights.unlink()
    refused(base, "cannot be loaded")
    weights.write_bytes(whole)
    for name in base.glob("tokenizer*"):
        name.unlink()
    (base / "chat_template.jinja").unlink(missing_ok=True)
    refused(base, "no tokenizer that can be loaded")
    (base / "config.json").write_text("{")
    refused(base, "config.json is not JSON: line 1")


def test_models_of_another_kind(tmp_path: Path) -> None:
    encoder = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("distilbert", n_layers=1, dim=8, n_heads=2, hidden_dim=8, vocab_size=16)
    )
    encoder.save_pretrained(tmp_path / "encoder")
    refused(tmp_path / "encoder", "no causal language model")
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(UserError, match="not a dense decoder"):
        Target(other)


def test_adapters_that_do_not_fit(
    saved: tuple[Path, Target], tmp_path: Path, tiny_target: Callable[..., Target]
) -> None:
    base, target = saved
    make_adapter(target, tmp_path / "adapter", str(base))
    tiny_target(hidden_size=64).save(tmp_path / "wide")
    refused(tmp_path / "wide", "does not fit its base model", adapter=str(tmp_path / "adapter"))
    tiny_target(num_hidden_layers=4).save(tmp_path / "short")
    refused(tmp_path / "short", "tensors that its base model lacks", adapter=str(tmp_path / "adapter"))
    tiny_target(num_hidden_layers=8).save(tmp_path / "tall")
    refused(tmp_path / "tall", "lacks tensors for its base model", adapter=str(tmp_path / "adapter"))
    refused(base, "adapter_config.json", adapter=str(base))
    refused(base, "does not exist", adapter=str(tmp_path / "nowhere"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    refused(tmp_path / "adapter", "does not fit its base model")


def test_packages_that_are_not_installed(saved: tuple[Path, Target], tmp_path: Path, monkeypatch: Any) -> None:
    base, target = saved
    make_adapter(target, tmp_path / "adapter", str(base))
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(tmp_path / "adapter", r"pip install redraft\[peft\]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("embedded:smollm2-135m-instruct", r"pip install redraft\[quickstart\]")


def test_a_device_that_is_not_there(saved: tuple[Path, Target]) -> None:
    if not torch.cuda.is_available():
        refused(saved[0], "device cuda cannot be used", device="cuda")
    refused(saved[0], "device nonsense cannot be used", device="nonsense")


# -- the embedded model ----------------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with a stand-in for a GGUF file, whose own module cannot be imported."""
    folder = tmp_path / "site" / "tiny_gguf_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('this package must not be imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF stand-in")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setitem(loading.places.EMBEDDED, "tiny", folder.name)
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", gguf := ModuleType("gguf"))
    gguf.__spec__ = importlib.util.spec_from_loader("gguf", None)
    return folder


def test_an_embedded_model_is_unpacked_once_into_whole_folders(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_target: Callable[..., Target]
) -> None:
    """The GGUF reader itself is transformers'; what is tested here is everything around it."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, unpacked = tiny_target(), []
    model_reader, tokenizer_reader = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def read_model(*args: Any, **kwargs: Any) -> Any:
        if "gguf_file" not in kwargs:
            return model_reader(*args, **kwargs)
        packed_is_known = hasattr(transformers, "GgufConfig")  # 5.16 knows plain weights alone
        assert kwargs["dtype"] == torch.float32 and ("quantization_config" in kwargs) == packed_is_known
        assert not packed_is_known or kwargs["quantization_config"].dequantize
        unpacked.append(kwargs["gguf_file"])
        if len(unpacked) == 1:
            raise KeyboardInterrupt  # a kill half-way
        return target.model

    def read_tokenizer(*args: Any, **kwargs: Any) -> Any:
        return target.tokenizer if "gguf_file" in kwargs else tokenizer_reader(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read_model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        load_target("embedded:tiny")
    assert not list((tmp_path / "cache").rglob("config.json"))
    for _ in range(2):
        loaded = load_target("embedded:tiny", torch.float32)
        assert torch.equal(outputs(loaded), outputs(target)) and loaded.name == "embedded:tiny"
    assert unpacked == ["tiny.gguf"] * 2, "the second load came from the cache"
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(weights).values())
    # an adapter may name an embedded base
    make_adapter(tiny_target(), tmp_path / "adapter", "embedded:tiny")
    assert load_target(str(tmp_path / "adapter")).content_hash() != target.content_hash()
    # another release of the package has another file and gets a folder of its own
    (package / "tiny.gguf").write_bytes(b"another one")
    load_target("embedded:tiny")
    assert len(unpacked) == 3
    shutil.rmtree(tmp_path / "cache")
