"""What Eagle1 drafts and checkpoints have alone: a bias of fc that each hand treats otherwise, EAGLE's own files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from redraft.drafts.opening import family_at, open_checkpoint
from redraft.errors import UserError
from redraft.registries import EXPORTERS

SHARED = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("export_families.py"))))
FAMILY, TARGET, refused, rewrite = SHARED.EAGLE1, SHARED.TARGET, SHARED.refused, SHARED.rewrite
make, answer, assert_same = FAMILY.make, FAMILY.answer, FAMILY.assert_same


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
    back = open_checkpoint(tmp_path / "v", TARGET).draft
    assert not back.config.fc_bias and torch.equal(answer(back), answer(draft))
    EXPORTERS.get("sglang")(draft, tmp_path / "s", TARGET)
    assert_same(open_checkpoint(tmp_path / "s", TARGET).draft, draft)


# -- refusals --------------------------------------------------------------------------------------------------------
def test_the_bias_must_be_as_the_format_has_it(tmp_path):
    EXPORTERS.get("vllm")(make(), tmp_path / "v", TARGET)
    state = load_file(tmp_path / "v" / "model.safetensors")
    rewrite(tmp_path / "v", state | {"fc.bias": torch.zeros(16)})
    with pytest.raises(UserError, match="extra fc.bias"):
        open_checkpoint(tmp_path / "v", TARGET)
    EXPORTERS.get("sglang")(make(), tmp_path / "s", TARGET)
    rewrite(tmp_path / "s", state)
    with pytest.raises(UserError, match="missing fc.bias"):
        open_checkpoint(tmp_path / "s", TARGET)


def test_eagles_own_checkpoints_are_read(tmp_path):
    """They name the target's architecture, ship its embeddings, and say of their bias nothing or ``bias``."""
    draft = make(fc_bias=True, own_embedding=True)
    folder = tmp_path / "original"
    EXPORTERS.get("sglang")(make(fc_bias=True), folder, TARGET)
    state = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in draft.state_dict().items()}
    rewrite(folder, state, architectures=["LlamaForCausalLM"])
    opened = open_checkpoint(folder, TARGET)
    back, meta = opened.draft, opened.meta
    assert_same(draft, back)
    assert meta["format"] == "original"
    rewrite(folder, bias=True)
    assert_same(draft, open_checkpoint(folder, TARGET).draft)
    rewrite(folder, bias=False)
    with pytest.raises(UserError, match="extra fc.bias"):
        open_checkpoint(folder, TARGET)
    rewrite(folder, {name: tensor for name, tensor in state.items() if name != "fc.bias"})
    assert not open_checkpoint(folder, TARGET).draft.config.fc_bias
    rewrite(folder, state | {"norm.weight": torch.zeros(16)})
    assert family_at(folder).name == "standalone"
