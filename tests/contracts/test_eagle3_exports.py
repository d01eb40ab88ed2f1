"""What exports of EAGLE-3 drafts have alone: keys that engines read, and what they would compute wrongly in silence."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from redraft.drafts.eagle.writing import legacy_config, prepare
from redraft.registries import EXPORTERS

SHARED = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("export_families.py"))))
FAMILY, TARGET, LLAMA3, refused = SHARED.EAGLE3, SHARED.TARGET, SHARED.LLAMA3, SHARED.refused
make = FAMILY.make


# -- what engines read -----------------------------------------------------------------------------------------------
def test_the_speculators_config_has_every_key_that_vllm_reads(tmp_path):
    EXPORTERS.get("vllm")(make(), tmp_path / "out", TARGET, speculative_tokens=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model_type" not in config and config["speculators_model_type"] == "eagle3"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["speculators_config"]["verifier"]["name_or_path"] == TARGET.name
    assert config["norm_before_residual"] is False and config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    layer = config["transformer_layer_config"]
    assert layer["model_type"] == "llama" and layer["num_aux_hidden_states"] == 3 and layer["vocab_size"] == 40
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "layers.0.self_attn.q_proj.weight" in names and not any("midlayer" in name for name in names)


def test_the_plain_config_has_every_key_that_vllm_and_sglang_read(tmp_path):
    EXPORTERS.get("plain")(make(), tmp_path / "out", TARGET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["draft_vocab_size"] == 10 and config["tie_word_embeddings"] is False
    assert config["norm_before_residual"] is False and config["rope_theta"] == 100000.0
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state["d2t"].dtype == torch.int64 and state["t2d"].dtype == torch.bool
    assert "midlayer.mlp.down_proj.weight" in state


def legacy(**options):
    """The keys of a Llama's config.json for a draft with these options."""
    return legacy_config(prepare(make(**options), TARGET)[0], "Any")


def test_legacy_rope_keys():
    plain = legacy(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    assert (plain["architectures"], plain["rope_theta"], plain["rope_scaling"]) == (["Any"], 5.0, None)
    scaled = legacy(rope_parameters=LLAMA3)
    assert scaled["rope_theta"] == 500000.0 and scaled["rope_scaling"]["factor"] == 8.0
    assert "rope_theta" not in scaled["rope_scaling"] and "partial_rotary_factor" not in scaled
    part = legacy(rope_parameters={"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 0.67})
    # Readers look for it inside the settings or beside them.
    assert part["partial_rotary_factor"] == part["rope_scaling"]["partial_rotary_factor"] == 0.67


def test_norm_output_stands_only_where_it_is_on(tmp_path):
    """A trainer takes a false one for a draft without a norm before the head."""
    for name in ("vllm", "plain", "sglang", "specforge", "tensorrt-llm"):
        EXPORTERS.get(name)(make(), tmp_path / name, TARGET)
        assert "norm_output" not in json.loads((tmp_path / name / "config.json").read_text())
    EXPORTERS.get("plain")(make(norm_output=True), tmp_path / "on", TARGET)
    assert json.loads((tmp_path / "on" / "config.json").read_text())["norm_output"] is True
    EXPORTERS.get("specforge")(make(head_norm=False), tmp_path / "off", TARGET)
    assert json.loads((tmp_path / "off" / "config.json").read_text())["norm_output"] is False


def test_the_norm_before_a_further_layer_stands_under_both_names(tmp_path):
    draft = make(num_layers=3)
    EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for number in (1, 2):
        for name in ("input_layernorm", "hidden_norm"):
            assert torch.equal(state[f"layers.{number}.{name}.weight"], draft.later[number - 1].input_layernorm.weight)


def test_the_targets_embedding_is_shipped_for_the_speculators_package(tmp_path):
    """Which opens a file without one with zeros; engines see that it is the target's."""
    table = torch.nn.Embedding(40, 16)
    target = copy.copy(TARGET)
    target.embedding = table
    report = EXPORTERS.get("vllm")(make(), tmp_path / "out", target)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["embed_tokens.weight"], table.weight) and report.warnings == ()
    # In the draft's own type where that loses nothing.
    half = make(torch.bfloat16)
    EXPORTERS.get("vllm")(half, tmp_path / "half", target)
    assert load_file(tmp_path / "half" / "model.safetensors")["embed_tokens.weight"].dtype == torch.float32
    table.to(torch.bfloat16).to(torch.float32)
    EXPORTERS.get("vllm")(half, tmp_path / "narrow", target)
    found = load_file(tmp_path / "narrow" / "model.safetensors")["embed_tokens.weight"]
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), table.weight)
    assert any(
        "speculators package one of zeros" in line
        for line in EXPORTERS.get("vllm")(make(), tmp_path / "no", TARGET).warnings
    )


def test_the_size_of_an_export_says_how_much_of_it_is_the_targets(tmp_path):
    target = copy.copy(TARGET)
    target.embedding = torch.nn.Embedding(40, 16)
    report, alone = (EXPORTERS.get(name)(make(), tmp_path / name, target) for name in ("vllm", "plain"))
    assert report.copied == 40 * 16 * 4 and alone.copied == 0
    assert report.parameters == alone.parameters and report.bytes - report.copied == alone.bytes
    assert "of which 0.0 MB are a copy of the target's embedding" in str(report) and "copy of" not in str(alone)


def test_the_command_of_tensorrt_names_the_features_counted_from_zero(tmp_path):
    report = EXPORTERS.get("tensorrt-llm")(make(taps=(1, 3, 5, 7)), tmp_path / "out", TARGET, speculative_tokens=4)
    assert '"eagle3_layers_to_capture": [0, 2, 4, 6]' in report.serve and '"max_draft_len": 4' in report.serve


def test_what_the_command_of_specforge_must_say(tmp_path):
    report = EXPORTERS.get("specforge")(make(own_embedding=True), tmp_path / "out", TARGET)
    assert '"load_target_embedding": false' in report.serve and str(tmp_path / "out") in report.serve
    assert any("counts a new vocabulary map" in line for line in report.warnings)


# -- refused exports -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "case", [c for c, (_, unable) in FAMILY.options.items() if "sglang" in unable and "plain" not in unable]
)
def test_what_sglang_would_compute_wrongly_is_refused_there_and_told_in_plain(tmp_path, case):
    draft = make(**FAMILY.options[case][0])
    refused("sglang", tmp_path, draft, "SGLang cannot run this draft")
    assert any("not for SGLang" in line for line in EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET).warnings)


@pytest.mark.parametrize("taps", [(0, 4, 5), (2, 4, 8)])
def test_features_out_of_sglangs_reach(tmp_path, taps):
    refused("sglang", tmp_path, make(taps=taps), "after layers 1 to 7 only")


@pytest.mark.parametrize("name", FAMILY.formats)
class TestRefusedExports:
    def test_maps_that_lie(self, name, tmp_path):
        draft = make()
        draft.t2d[int(draft.vocabulary()[0])] = False
        refused(name, tmp_path, draft, "t2d does not mark the same")
        draft = make()
        draft.d2t.copy_(draft.vocabulary())
        refused(name, tmp_path, draft, "outside the target's vocabulary|must hold offsets|does not mark")
        draft = make()
        draft.d2t[-1] += 40
        refused(name, tmp_path, draft, "outside the target's vocabulary")

    def test_taps_that_engines_would_reorder_or_merge(self, name, tmp_path):
        refused(name, tmp_path, make(taps=(2, 2, 5)), "do not ascend strictly")
        refused(name, tmp_path, make(taps=(5, 4, 2)), "do not ascend strictly")

    def test_both_norms_of_the_features(self, name, tmp_path):
        refused(name, tmp_path, make(norm_before_fc=True, fc_norm=True), "exclude each other")


def test_a_nameless_target_is_refused_where_the_format_names_it(tmp_path):
    refused("vllm", tmp_path, make(), "names the target", SHARED.facts(name=""))


@pytest.mark.parametrize("part", ["my-eagle3-run", "eagle-2", "DFlash"])
def test_a_telling_path_is_warned_of(tmp_path, part):
    report = EXPORTERS.get("vllm")(make(), tmp_path / part, TARGET)
    assert any("vLLM reads a method out of" in line for line in report.warnings)
