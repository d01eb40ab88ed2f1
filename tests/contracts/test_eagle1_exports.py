"""Eagle1 drafts through every exporter and back: the same tensors, or one clear line."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft import artifact
from redraft.drafts.eagle1 import Eagle1Config, Eagle1Draft
from redraft.drafts.experts import attach_low_rank, attach_private, is_private, merge_private
from redraft.errors import UserError
from redraft.export import EXPORTERS, TargetInfo, import_checkpoint

TARGET = TargetInfo("tuned/target", hidden_size=16, layers=8, vocab_size=40, context=64)
BASE = Eagle1Config(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    target_vocab_size=40,
    rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    max_position_embeddings=64,
)
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
# Options, and the formats that hold them; every other exporter refuses by one line.
OPTIONS: dict[str, tuple[dict, set[str]]] = {
    "bare": ({}, {"vllm", "sglang"}),
    "attention bias": ({"attention_bias": True}, {"vllm", "sglang"}),
    "yarn rope": ({"rope_parameters": YARN, "num_key_value_heads": 4}, {"vllm", "sglang"}),
    "fc bias": ({"fc_bias": True}, {"sglang"}),
    "own embedding": ({"own_embedding": True}, {"vllm"}),
}
FORMATS = ("vllm", "sglang")
EVERY = [(name, case) for name in EXPORTERS.names() for case in OPTIONS]
TENSORS = sorted(Eagle1Draft(BASE).state_dict())


def make(dtype: torch.dtype = torch.float32, **options) -> Eagle1Draft:
    generator = torch.Generator().manual_seed(1)
    draft = Eagle1Draft(replace(BASE, **options))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return draft.to(dtype)


def states(draft: Eagle1Draft) -> torch.Tensor:
    """Two draft steps over a fixed input, each token seeing itself alone, through a fixed head."""
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
            found = draft(embeds, draft.carry(found), torch.arange(7), alone)
        return draft.logits(found)


def assert_same(left: Eagle1Draft, right: Eagle1Draft) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert set(a) == set(b) and left.config == right.config
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert torch.equal(states(left), states(right))


def rewrite(folder: Path, state=None, **config) -> None:
    if state is not None:
        save_file(state, folder / "model.safetensors")
    path = folder / "config.json"
    artifact.atomic_write_json(path, json.loads(path.read_text()) | config)


@pytest.fixture(params=FORMATS)
def exported(request, tmp_path):
    EXPORTERS.get(request.param)(make(), tmp_path / "out", TARGET)
    return tmp_path / "out"


# -- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "case"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_round_trip_gives_the_same_tensors_or_one_line(tmp_path, name, case, dtype):
    options, formats = OPTIONS[case]
    draft = make(dtype, **options)
    if name not in formats:
        with pytest.raises(UserError, match="SGLang|vLLM|vllm") as caught:
            EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
        return
    report = EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
    back, meta = import_checkpoint(tmp_path / "out", TARGET)
    assert isinstance(back, Eagle1Draft)
    assert_same(draft, back)
    assert meta["family"] == "eagle1" and meta["format"] == name and meta["notes"] == []
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert report.tensors == len(state) and report.parameters == sum(p.numel() for p in draft.parameters())
    assert not any("lm_head" in tensor or "input_layernorm" in tensor or tensor == "norm.weight" for tensor in state)
    assert ("fc.bias" in state) == (name == "sglang")
    if "fc.bias" in state and not draft.config.fc_bias:
        assert state["fc.bias"].shape == (16,) and not state["fc.bias"].any()
    assert all(name.startswith(("fc.", "layers.0.", "embed_tokens.")) for name in state)
    assert TARGET.name in report.serve and str(tmp_path / "out") in report.serve


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", ["expert", "low rank"])
def test_a_private_part_is_merged(tmp_path, name, part):
    draft = attach_private(make(), 8) if part == "expert" else attach_low_rank(make(), 2)
    with torch.no_grad():
        for tensor, parameter in draft.named_parameters():
            if is_private(tensor):
                torch.nn.init.normal_(parameter, std=0.3)
    report = EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
    back, _ = import_checkpoint(tmp_path / "out", TARGET)
    assert report.merged_private and any("merged" in line for line in report.warnings)
    assert_same(merge_private(draft), back)
    torch.testing.assert_close(states(back), states(draft), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(states(back), states(make()), atol=1e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_export_of_the_import_gives_the_same_files(tmp_path, name):
    EXPORTERS.get(name)(make(), tmp_path / "one", TARGET)
    back, _ = import_checkpoint(tmp_path / "one", TARGET)
    EXPORTERS.get(name)(back, tmp_path / "two", TARGET)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_our_own_format_is_imported_too(tmp_path):
    artifact.save_draft(tmp_path / "own", make(fc_bias=True), {"method": "full"})
    back, meta = import_checkpoint(tmp_path / "own", TARGET)
    assert_same(make(fc_bias=True), back)
    assert meta["format"] == "redraft" and meta["family"] == "eagle1"


# -- what engines read -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "architecture"), [("vllm", "EagleLlamaForCausalLM"), ("sglang", "LlamaForCausalLMEagle")]
)
def test_the_config_is_a_llama_config_without_traps(tmp_path, name, architecture):
    report = EXPORTERS.get(name)(make(), tmp_path / "out", TARGET, speculative_tokens=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture] and config["model_type"] == "llama"
    assert config["num_hidden_layers"] == 1 and config["vocab_size"] == 40 and config["hidden_size"] == 16
    assert config["tie_word_embeddings"] is False and config["rope_theta"] == 100000.0
    # Both engines read a true `bias` as biases of the attention.
    assert config["bias"] is False and config["attention_bias"] is False
    assert "draft_vocab_size" not in config and "num_aux_hidden_states" not in config
    assert ('"method": "eagle"' in report.serve) == (name == "vllm")
    assert ("--speculative-algorithm EAGLE " in report.serve) == (name == "sglang")
    biased = make(fc_bias=True)
    EXPORTERS.get("sglang")(biased, tmp_path / "biased", TARGET)
    assert "bias" not in json.loads((tmp_path / "biased" / "config.json").read_text())


def test_a_bias_of_zeros_is_left_out_for_vllm_and_kept_for_sglang(tmp_path):
    draft = make(fc_bias=True)
    torch.nn.init.zeros_(draft.fc.bias)
    report = EXPORTERS.get("vllm")(draft, tmp_path / "v", TARGET)
    assert any("bias of fc" in line for line in report.warnings)
    back, _ = import_checkpoint(tmp_path / "v", TARGET)
    assert not back.config.fc_bias and torch.equal(states(back), states(draft))
    EXPORTERS.get("sglang")(draft, tmp_path / "s", TARGET)
    assert_same(import_checkpoint(tmp_path / "s", TARGET)[0], draft)


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMATS)
class TestRefusedExports:
    def refused(self, name, tmp_path, draft, message, target=TARGET, **how):
        with pytest.raises(UserError, match=message) as caught:
            EXPORTERS.get(name)(draft, tmp_path / "out", target, **how)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []

    def test_nan_and_misfits(self, name, tmp_path):
        draft = make()
        draft.state_dict()["midlayer.mlp.up_proj.weight"][0, 0] = float("nan")
        self.refused(name, tmp_path, draft, "up_proj.weight holds NaN")
        self.refused(name, tmp_path, make(), "features of width 16", replace(TARGET, hidden_size=32))
        self.refused(name, tmp_path, make(), "vocabulary of 40", replace(TARGET, vocab_size=41))
        self.refused(name, tmp_path, make(), "must be 1 or more", speculative_tokens=0)

    def test_routed_experts(self, name, tmp_path):
        self.refused(name, tmp_path, attach_private(make(), 8, experts=2), "eda-moe")

    def test_a_short_context_is_raised_or_refused(self, name, tmp_path):
        long = replace(TARGET, context=128)
        self.refused(name, tmp_path, make(rope_parameters=YARN), "would change the yarn rotary angles", long)
        report = EXPORTERS.get(name)(make(), tmp_path / "out", long)
        back, _ = import_checkpoint(tmp_path / "out", long)
        assert any("raised from 64" in line for line in report.warnings)
        assert back.config == replace(BASE, max_position_embeddings=128)

    def test_a_full_disk(self, name, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 1000))
        self.refused(name, tmp_path, make(), "no room on the disk")


@pytest.mark.parametrize("tensor", TENSORS)
def test_every_missing_and_misshaped_tensor_is_named(exported, tensor):
    whole = load_file(exported / "model.safetensors")
    theirs = tensor.replace("midlayer.", "layers.0.")
    rewrite(exported, {name: value for name, value in whole.items() if name != theirs})
    with pytest.raises(UserError, match=f"missing {tensor}"):
        import_checkpoint(exported, TARGET)
    rewrite(exported, whole | {theirs: torch.cat([whole[theirs], whole[theirs][:1]])})
    with pytest.raises(UserError, match=f"{tensor} has shape"):
        import_checkpoint(exported, TARGET)


def test_extra_tensors_and_other_layers_are_named(exported):
    whole = load_file(exported / "model.safetensors")
    for extra in ("lm_head.weight", "layers.0.input_layernorm.weight", "layers.1.mlp.up_proj.weight", "norm.weight"):
        rewrite(exported, whole | {extra: torch.zeros(3)})
        with pytest.raises(UserError, match=f"extra {extra.replace('layers.0', 'midlayer')}"):
            import_checkpoint(exported, TARGET)
    rewrite(exported, whole)
    for change, message in (
        ({"num_hidden_layers": 2}, "num_hidden_layers 2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_hidden_layers": 1, "hidden_act": "silu", "hidden_size": "wide"}, "not a usable config"),
    ):
        rewrite(exported, **change)
        with pytest.raises(UserError, match=message):
            import_checkpoint(exported, TARGET)


def test_the_bias_must_be_as_the_format_has_it(tmp_path):
    EXPORTERS.get("vllm")(make(), tmp_path / "v", TARGET)
    state = load_file(tmp_path / "v" / "model.safetensors")
    rewrite(tmp_path / "v", state | {"fc.bias": torch.zeros(16)})
    with pytest.raises(UserError, match="extra fc.bias"):
        import_checkpoint(tmp_path / "v", TARGET)
    EXPORTERS.get("sglang")(make(), tmp_path / "s", TARGET)
    rewrite(tmp_path / "s", state)
    with pytest.raises(UserError, match="missing fc.bias"):
        import_checkpoint(tmp_path / "s", TARGET)


def test_eagles_own_checkpoints_are_read(tmp_path):
    """They name the target's architecture, ship its embeddings, and say of their bias nothing or ``bias``."""
    draft = make(fc_bias=True, own_embedding=True)
    folder = tmp_path / "original"
    EXPORTERS.get("sglang")(make(fc_bias=True), folder, TARGET)
    state = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in draft.state_dict().items()}
    rewrite(folder, state, architectures=["LlamaForCausalLM"])
    back, meta = import_checkpoint(folder, TARGET)
    assert_same(draft, back)
    assert meta["format"] == "original"
    rewrite(folder, bias=True)
    assert_same(draft, import_checkpoint(folder, TARGET)[0])
    rewrite(folder, bias=False)
    with pytest.raises(UserError, match="extra fc.bias"):
        import_checkpoint(folder, TARGET)
    rewrite(folder, {name: tensor for name, tensor in state.items() if name != "fc.bias"})
    assert not import_checkpoint(folder, TARGET)[0].config.fc_bias
    rewrite(folder, state | {"norm.weight": torch.zeros(16)})
    with pytest.raises(UserError, match="an Eagle1 draft one of EagleLlamaForCausalLM, LlamaForCausalLMEagle"):
        import_checkpoint(folder, TARGET)
