"""What each trainer's word makes of an Eagle3 checkpoint, what files beside it tell, and what is refused by name."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.files import save_draft
from redraft.drafts.formats.embeddings import is_targets
from redraft.drafts.formats.meaning import differences
from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.registries import EXPORTERS

SHARED = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("export_families.py"))))
FAMILY, TARGET, rewrite = SHARED.EAGLE3, SHARED.TARGET, SHARED.rewrite
make, assert_same = FAMILY.make, FAMILY.assert_same

# The keys that a trainer of the plain form writes; the four of engines are not among them.
PLAIN_KEYS = (
    *("architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "rms_norm_eps", "vocab_size", "draft_vocab_size", "num_hidden_layers"),
    *("rope_theta", "rope_scaling", "attention_bias", "hidden_act"),
)


@pytest.fixture
def plain(tmp_path):
    """A folder as SafeAILab and SpecForge write it, over the taps (2, 4, 5), which are the default ones."""
    folder = tmp_path / "plain"
    EXPORTERS.get("plain")(make(), folder, TARGET)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in PLAIN_KEYS}))
    return folder


def refused(folder, message, target=TARGET, **options):
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder, target, **options)
    assert "\n" not in str(caught.value)


# -- on whose word -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("trainer", "value", "carried", "normed"),
    [
        ("specforge", True, False, True),
        ("specforge", False, False, False),
        ("specforge-main", True, True, True),
        ("specforge-main", False, False, True),
        ("plain", True, True, True),
    ],
)
def test_a_key_that_trainers_read_differently_is_asked_for(plain, trainer, value, carried, normed):
    rewrite(plain, norm_output=value)
    refused(plain, f"norm_output {value}.*--trainer specforge, specforge-main or plain")
    found = open_checkpoint(plain, TARGET, trainer=trainer).draft.config
    assert (found.norm_output, found.head_norm) == (carried, normed)


def test_a_trainer_that_there_is_not_or_whose_files_are_others_is_told(plain):
    refused(plain, r"unknown trainer 'specforg' \(did you mean specforge\?\)", trainer="specforg")
    refused(plain, "not of the speculators format", trainer="speculators")


def test_the_keys_of_engines_leave_nothing_to_ask(plain):
    rewrite(plain, norm_output=True, norm_before_residual=False)
    assert open_checkpoint(plain, TARGET).draft.config.norm_output


def test_what_automodel_takes_over_from_its_target_is_dropped(plain):
    more = {"model_type": "qwen3_moe", "num_hidden_layers": 8, "layer_types": ["sliding_attention"] * 8}
    more |= {"sliding_window": 4, "num_local_experts": 4, "norm_output": True, "parallel_drafting": False}
    rewrite(plain, architectures=["LlamaEagle3DraftModel"], **more)
    opened = open_checkpoint(plain, TARGET)
    config, reading = opened.draft.config, opened.reading
    assert (config.num_layers, config.windows, config.norm_output) == (1, (), True)
    assert reading.reader == "NeMo Automodel" and any("--taps" in note for note in reading.notes)
    dropped = {entry.what for entry in reading.entries if entry.how == "dropped"}
    assert {"num_hidden_layers", "num_local_experts"} <= dropped
    rewrite(plain, parallel_drafting=True)
    refused(plain, "P-EAGLE")


def test_ids_in_each_convention(plain):
    rewrite(plain, aux_hidden_states_layer_ids=[0, 2, 5])
    assert open_checkpoint(plain, TARGET).draft.config.taps == (1, 3, 6)
    ids = {"eagle_aux_hidden_state_layer_ids": [0, 1, 6], "next_layer_regular": True}
    rewrite(plain, aux_hidden_states_layer_ids=None, eagle_config=ids)
    opened = open_checkpoint(plain, TARGET)
    assert opened.draft.config.taps == (1, 2, 7) and opened.reading.reader == "nvidia-modelopt"
    assert "norms the state twice" in opened.meta["notes"][0]


def test_every_value_is_entered_and_agrees_with_the_draft(plain):
    opened = open_checkpoint(plain, TARGET)
    assert not differences(opened.reading, {k: v for k, v in opened.draft.config.__dict__.items() if k != "windows"})
    assert {entry.how for entry in opened.reading.entries} <= {"read", "derived", "defaulted", "target", "dropped"}
    assert "reading" not in opened.meta


def test_sizes_that_the_config_does_not_tell_are_those_of_the_tensors(plain):
    path = plain / "config.json"
    config = json.loads(path.read_text())
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "head_dim",
        "draft_vocab_size",
        "vocab_size",
    ):
        del config[key]
    path.write_text(json.dumps(config))
    opened = open_checkpoint(plain, TARGET)
    assert_same(make(), opened.draft)
    assert {e.what for e in opened.reading.entries if e.how == "derived"} >= {"hidden_size", "head_dim"}
    del config["num_attention_heads"]
    path.write_text(json.dumps(config))
    refused(plain, "no num_attention_heads, which no tensor tells")


def test_a_count_of_layers_that_is_the_targets(plain):
    rewrite(plain, num_hidden_layers=32)
    opened = open_checkpoint(plain, TARGET)
    assert opened.draft.config.num_layers == 1 and "num_hidden_layers 32 is not the draft's" in opened.meta["notes"][0]
    rewrite(plain, num_hidden_layers=2)
    refused(plain, "num_hidden_layers 2 and the file holds 1")
    assert open_checkpoint(plain, TARGET, trainer="specforge").draft.config.num_layers == 1


def test_layers_windows_norms_and_biases_of_the_speculators_format(tmp_path):
    options = {"num_layers": 3, "windows": (5, 0, 7), "qk_norm": True, "fc_bias": True, "output_bias": True}
    draft = make(**options)
    EXPORTERS.get("plain")(make(), tmp_path / "out", TARGET)
    names = {name: tensor for name, tensor in draft.state_dict().items()}
    state = {
        name.replace("midlayer.", "layers.0.").replace("later.0.", "layers.1.").replace("later.1.", "layers.2."): tensor
        for name, tensor in names.items()
    }
    layer = json.loads((tmp_path / "out" / "config.json").read_text())
    layer = {
        key: layer[key] for key in PLAIN_KEYS if key not in ("architectures", "draft_vocab_size", "attention_bias")
    }
    layer |= {"model_type": "qwen3", "num_hidden_layers": 3, "sliding_window": 5}
    layer["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {"speculators_model_type": "eagle3", "speculators_version": "0.9.0", "transformer_layer_config": layer}
    config |= {"auto_map": {"": "config.Eagle3SpeculatorConfig"}, "draft_vocab_size": 10, "norm_before_residual": False}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "config.py").write_text("raise SystemExit")
    save_file(state, tmp_path / "out" / "model.safetensors")
    found = open_checkpoint(tmp_path / "out", TARGET)
    assert found.draft.config.windows == (5, 0, 5) and found.draft.config.num_layers == 3
    assert found.draft.config.qk_norm and found.draft.config.fc_bias and found.draft.config.output_bias
    assert found.reading.reader == "speculators 0.9.0"
    del state["layers.2.self_attn.k_norm.weight"]
    save_file(state, tmp_path / "out" / "model.safetensors")
    refused(tmp_path / "out", "missing later.1.self_attn.k_norm.weight")


# -- embeddings --------------------------------------------------------------------------------------------------------
def test_an_embedding_of_its_own_is_kept_unless_it_is_the_targets(tmp_path):
    draft = make(own_embedding=True)
    EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET)
    table = torch.nn.Embedding(40, 16)
    lender = SHARED.facts()
    lender.embedding = table
    opened = open_checkpoint(tmp_path / "out", lender)
    assert opened.draft.borrowing(lender) is opened.draft
    assert opened.meta["notes"] == ["the draft keeps the embedding that it ships: it is not the target's"]
    with torch.no_grad():
        table.weight.copy_(draft.embed_tokens.weight)
    opened = open_checkpoint(tmp_path / "out", lender)
    assert opened.meta["notes"] == [] and opened.reading.meaning["embedding"] == "target"
    assert opened.draft.borrowing(lender).embed_tokens is None


def test_the_targets_embedding_is_read_in_its_folder_without_a_model(tmp_path):
    table = torch.randn(40, 16)
    (tmp_path / "config.json").write_text("{}")
    save_file({"model.embed_tokens.weight": table.bfloat16()}, tmp_path / "model.safetensors")
    target = SHARED.facts(name=str(tmp_path))
    assert is_targets(table, target) and is_targets(table.bfloat16(), target)
    assert is_targets(table + 1, target) is False and is_targets(table[:8], target) is False
    assert is_targets(table, TARGET) is None


# -- vocabularies ------------------------------------------------------------------------------------------------------
def with_state(folder, change, **config):
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.contiguous() for name, tensor in change(state).items() if tensor is not None}
    rewrite(folder, state, **config)
    return folder


def longer(state):
    return state | {"t2d": torch.cat([state["t2d"], torch.zeros(4, dtype=torch.bool)])}


def test_padded_vocabularies_of_draft_and_target(plain):
    whole = load_file(plain / "model.safetensors")
    with_state(plain, longer, vocab_size=44)
    opened = open_checkpoint(plain, TARGET)
    assert_same(make(), opened.draft)
    assert "44 rows and the target's 40; 4 rows of padding" in opened.meta["notes"][0]
    grown = SHARED.facts(vocab_size=44)
    with_state(plain, lambda _: whole, vocab_size=40)
    found = open_checkpoint(plain, grown).draft
    assert torch.equal(found.vocabulary(), make().vocabulary()) and len(found.t2d) == 44
    refused(plain, "a vocabulary of 40", SHARED.facts(vocab_size=56))
    with_state(plain, lambda s: longer(s) | {"t2d": torch.ones(44, dtype=torch.bool)}, vocab_size=44)
    refused(plain, "t2d marks ids beyond the target's vocabulary")


def test_a_full_vocabulary_of_a_target_that_was_padded_is_a_reduced_one(tmp_path):
    EXPORTERS.get("plain")(make(draft_vocab_size=40, own_embedding=True), tmp_path / "out", TARGET)
    found = open_checkpoint(tmp_path / "out", SHARED.facts(vocab_size=44)).draft
    assert torch.equal(found.vocabulary(), torch.arange(40)) and found.config.draft_vocab_size == 40
    assert found.embed_tokens.weight.shape[0] == 44 and not found.embed_tokens.weight[40:].any()
    small = open_checkpoint(tmp_path / "out", SHARED.facts(vocab_size=36)).draft
    assert not small.reduced and small.lm_head.weight.shape[0] == 36


def test_maps_in_files_beside_the_weights(plain):
    state = load_file(plain / "model.safetensors")
    maps = {name: state.pop(name) for name in ("d2t", "t2d")}
    with_state(plain, lambda _: state)
    refused(plain, "missing d2t, t2d")
    torch.save(maps, plain / "vocab_mapping.pt")
    opened = open_checkpoint(plain, TARGET)
    assert_same(make(), opened.draft)
    assert "d2t was read from vocab_mapping.pt" in opened.meta["notes"][0]
    (plain / "vocab_mapping.pt").unlink()
    torch.save(maps["d2t"], plain / "d2t.pt")
    numpy.save(plain / "t2d.npy", maps["t2d"].numpy())
    assert_same(make(), open_checkpoint(plain, TARGET).draft)
    torch.save(SimpleNamespace(a=1), plain / "d2t.pt")
    refused(plain, "d2t.pt cannot be read as tensors alone")
    torch.save(maps["d2t"] + 1, plain / "d2t.pt")
    with_state(plain, lambda s: s | maps)
    refused(plain, "d2t in the weights and in d2t.pt disagree")


# -- refused -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_theta": -10000.0}, "rope_theta is -10000.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "key heads must divide"),
        ({"head_dim": 5}, "each 5 wide"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_type is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config"),
        ({"auto_map": {"AutoModel": "modeling.Draft"}}, "asks to run Python code of its own"),
        ({"vision_config": {}}, "a draft for pictures"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"target_hidden_size": 32}, "fc.weight has shape|features of width"),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "latent attention"),
        ({"architectures": ["PEagleDraftModel"]}, "P-EAGLE"),
        ({"architectures": ["DFlashDraftModel"]}, "block-parallel"),
        ({"architectures": ["MedusaModel"]}, "Medusa"),
        ({"architectures": ["Qwen3_5MTP"]}, "MTP"),
        ({"architectures": ["GptOssForCausalLMEagle3"]}, "mixture of experts"),
    ],
)
def test_values_and_kinds_that_are_no_draft_of_ours_are_one_line(plain, change, message):
    rewrite(plain, **change)
    refused(plain, message)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("midlayer.self_attn.kv_b_proj.weight", "latent attention"),
        ("midlayer.mlp.experts.0.up_proj.weight", "experts"),
        ("midlayer.mlp.up_proj.weight_scale", "it is quantised"),
        ("midlayer.mlp.up_proj.lora_A.weight", "an adapter's tensors"),
    ],
)
def test_tensors_of_other_drafts_say_what_it_is(plain, tensor, message):
    with_state(plain, lambda state: state | {tensor: torch.zeros(3)})
    refused(plain, message)


def test_a_state_of_training_says_how_to_export_it(plain):
    (plain / "model.safetensors").rename(plain / "training_state.pt")
    refused(plain, "a state of SpecForge's training.*its own export")


def test_shards_of_the_older_kind_with_an_index(plain):
    state = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, plain / file)
    listed = {name: file for file, part in parts.items() for name in part}
    (plain / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    assert_same(make(), open_checkpoint(plain, TARGET).draft)
    (plain / "pytorch_model-2.bin").unlink()
    refused(plain, "lacks the weight file pytorch_model-2.bin")


def test_options_are_refused_where_a_family_has_none(tmp_path):
    SHARED.EAGLE1.exported("vllm", tmp_path / "out")
    refused(tmp_path / "out", "family eagle1, which has no taps", taps=(1, 2, 3))


# -- our own format ----------------------------------------------------------------------------------------------------
def test_our_own_maps_are_held_to_the_same(tmp_path):
    draft = make()
    draft.d2t[0] += 1
    save_draft(tmp_path / "own", draft, {})
    refused(tmp_path / "own", "t2d does not mark the same target ids as d2t")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", True, "no schema number"),
        ("content_hash", 3, "a content_hash that is no text"),
        ("provenance", [], "a provenance that is no JSON object"),
    ],
)
def test_our_own_metadata_of_wrong_kinds(tmp_path, key, value, message):
    save_draft(tmp_path / "own", make(), {})
    path = tmp_path / "own" / "redraft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(tmp_path / "own", message)


def test_an_untrained_draft_takes_no_room_until_it_is_filled():
    draft = make(num_layers=2)
    empty = Eagle3Draft.untrained(draft.config)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())
    empty.fill(draft.state_dict())
    assert_same(draft, empty)
