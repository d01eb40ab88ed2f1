"""The contract of every exporter and of the importer: exact round trips, complete or refused, one clear line."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft import artifact
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.drafts.experts import attach_low_rank, attach_private, is_private, merge_private
from redraft.errors import UserError
from redraft.export import EXPORTERS, TargetInfo, import_checkpoint
from redraft.export.base import STANDALONE_FORMATS, legacy_rope

TARGET = TargetInfo("tuned/target", hidden_size=16, layers=8, vocab_size=40, context=64)
BASE = Eagle3Config(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    target_hidden_size=16,
    target_vocab_size=40,
    draft_vocab_size=10,
    taps=(2, 4, 5),
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    max_position_embeddings=64,
)
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
# Options, and whether SGLang computes a draft that has them.
OPTIONS = {
    "bare": ({}, True),
    "full vocabulary": ({"draft_vocab_size": 40}, True),
    "norm before residual": ({"norm_before_residual": True}, False),
    "norm before fc, norm output": ({"norm_before_fc": True, "norm_output": True}, True),
    "fc norm": ({"fc_norm": True, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, True),
    "biases": ({"attention_bias": True}, False),
    "own embedding": ({"own_embedding": True}, False),
    "narrow draft": ({"hidden_size": 12, "own_embedding": True}, False),
    "four taps, llama3 rope": ({"taps": (1, 3, 5, 7), "rope_parameters": LLAMA3, "fc_norm": True}, True),
    "yarn rope, wide heads": ({"rope_parameters": YARN, "head_dim": 8, "num_key_value_heads": 4}, True),
    "everything": (
        {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True, "attention_bias": True},
        False,
    ),
}
# Formats of drafts that read the target's states; those of standalone drafts have a contract of their own.
FORMATS = [name for name in EXPORTERS.names() if name not in STANDALONE_FORMATS]
CASES = [
    pytest.param(name, options, id=f"{name}-{case}")
    for name in FORMATS
    for case, (options, sglang) in OPTIONS.items()
    if name != "sglang" or sglang
]
BARE_TENSORS = sorted(Eagle3Draft(BASE).state_dict())


def make(dtype: torch.dtype = torch.float32, **options) -> Eagle3Draft:
    config = replace(BASE, **options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(40, generator=generator)[: config.draft_vocab_size].sort().values
    draft = Eagle3Draft(config, ids)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return draft.to(dtype)


def attend(query, keys, values):
    """Causal attention over one sequence [N, heads, width]."""
    repeat = query.shape[1] // keys.shape[1]
    args = [
        x.transpose(0, 1)[None] for x in (query, keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1))
    ]
    return torch.nn.functional.scaled_dot_product_attention(*args, is_causal=True)[0].transpose(0, 1)


def logits(draft: Eagle3Draft) -> torch.Tensor:
    """Two draft steps over a fixed input, with a fixed embedding table in the target's place."""
    generator = torch.Generator().manual_seed(2)
    dtype, config = draft.lm_head.weight.dtype, draft.config
    taps = torch.randn(7, len(config.taps) * config.target_hidden_size, generator=generator).to(dtype)
    table = torch.nn.Embedding.from_pretrained(torch.randn(40, config.hidden_size, generator=generator).to(dtype))
    embeds = draft.embed(torch.arange(7), table)
    with torch.no_grad():
        first = draft(embeds, draft.fuse(taps), torch.arange(7), attend)
        return draft.logits(draft(embeds, draft.carry(first), torch.arange(7), attend))


def assert_same(left: Eagle3Draft, right: Eagle3Draft) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert left.config == right.config
    assert torch.equal(logits(left), logits(right))


def rewrite(folder, state=None, **config) -> None:
    """Change an exported checkpoint in place."""
    if state is not None:
        save_file(state, folder / "model.safetensors")
    path = folder / "config.json"
    artifact.atomic_write_json(path, json.loads(path.read_text()) | config)


@pytest.fixture(params=FORMATS)
def exported(request, tmp_path):
    draft = make()
    EXPORTERS.get(request.param)(draft, tmp_path / "out", TARGET)
    return tmp_path / "out"


# -- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_gives_the_same_tensors_and_logits(tmp_path, name, options, dtype):
    draft = make(dtype, **options)
    report = EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
    back, meta = import_checkpoint(tmp_path / "out", TARGET)
    assert_same(draft, back)
    assert meta["notes"] == []
    assert report.tensors == len(draft.state_dict()) and report.parameters == sum(p.numel() for p in draft.parameters())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert TARGET.name in report.serve and str(tmp_path / "out") in report.serve
    has_maps = {"d2t", "t2d"} <= set(load_file(tmp_path / "out" / "model.safetensors"))
    assert has_maps == (draft.config.draft_vocab_size < 40)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", ["expert", "low rank"])
def test_a_private_part_is_merged(tmp_path, name, part):
    if part == "expert":
        draft = attach_private(make(), 8)
        torch.nn.init.normal_(draft.midlayer.mlp.private.down_proj.weight)
    else:
        draft = attach_low_rank(make(), 2)
        for tensor, parameter in draft.named_parameters():
            if is_private(tensor):
                torch.nn.init.normal_(parameter, std=0.3)
    report = EXPORTERS.get(name)(draft, tmp_path / "out", TARGET)
    back, _ = import_checkpoint(tmp_path / "out", TARGET)
    assert report.merged_private and any("merged" in line for line in report.warnings)
    assert_same(merge_private(draft), back)
    torch.testing.assert_close(logits(back), logits(draft), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(back), logits(make()), atol=1e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_export_of_the_import_gives_the_same_files(tmp_path, name):
    EXPORTERS.get(name)(make(), tmp_path / "one", TARGET)
    back, _ = import_checkpoint(tmp_path / "one", TARGET)
    EXPORTERS.get(name)(back, tmp_path / "two", TARGET)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_our_own_format_is_imported_too(tmp_path):
    artifact.save_draft(tmp_path / "own", make(), {"method": "full"})
    back, meta = import_checkpoint(tmp_path / "own", TARGET)
    assert_same(make(), back)
    assert meta["format"] == "redraft" and meta["method"] == "full"


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


def test_legacy_rope_keys():
    assert legacy_rope({"rope_theta": 5.0, "rope_type": "default"}) == (5.0, None)
    theta, scaling = legacy_rope(LLAMA3)
    assert theta == 500000.0 and scaling is not None and scaling["factor"] == 8.0 and "rope_theta" not in scaling


# -- refused exports -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", [case for case, (_, sglang) in OPTIONS.items() if not sglang])
def test_what_sglang_would_compute_wrongly_is_refused_there_and_told_in_plain(tmp_path, case):
    draft = make(**OPTIONS[case][0])
    with pytest.raises(UserError, match="SGLang cannot run this draft"):
        EXPORTERS.get("sglang")(draft, tmp_path / "out", TARGET)
    assert list(tmp_path.iterdir()) == []
    assert any("not for SGLang" in line for line in EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET).warnings)


@pytest.mark.parametrize("taps", [(0, 4, 5), (2, 4, 8)])
def test_features_out_of_sglangs_reach(tmp_path, taps):
    with pytest.raises(UserError, match="after layers 1 to 7 only"):
        EXPORTERS.get("sglang")(make(taps=taps), tmp_path / "out", TARGET)


def refused(name, tmp_path, draft, message, target=TARGET):
    with pytest.raises(UserError, match=message) as caught:
        EXPORTERS.get(name)(draft, tmp_path / "out", target)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
class TestRefusedExports:
    @pytest.mark.parametrize("tensor", [n for n in BARE_TENSORS if n not in ("d2t", "t2d")])
    def test_nan(self, name, tmp_path, tensor):
        draft = make()
        draft.state_dict()[tensor].view(-1)[-1] = float("nan")
        refused(name, tmp_path, draft, f"{tensor} holds NaN")

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

    def test_a_target_that_does_not_fit(self, name, tmp_path):
        for change, message in (
            ({"hidden_size": 32}, "features of width 16"),
            ({"vocab_size": 41}, "vocabulary of 40"),
            ({"layers": 4}, "taps layer 5"),
        ):
            refused(name, tmp_path, make(), message, replace(TARGET, **change))

    def test_taps_that_engines_would_reorder_or_merge(self, name, tmp_path):
        refused(name, tmp_path, make(taps=(2, 2, 5)), "do not ascend strictly")
        refused(name, tmp_path, make(taps=(5, 4, 2)), "do not ascend strictly")

    def test_both_norms_of_the_features(self, name, tmp_path):
        refused(name, tmp_path, make(norm_before_fc=True, fc_norm=True), "exclude each other")

    def test_a_short_context_is_raised_or_refused(self, name, tmp_path):
        long = replace(TARGET, context=128)
        refused(name, tmp_path, make(rope_parameters=YARN), "would change the yarn rotary angles", long)
        report = EXPORTERS.get(name)(make(), tmp_path / "out", long)
        back, _ = import_checkpoint(tmp_path / "out", long)
        assert any("raised from 64" in line for line in report.warnings)
        assert back.config == replace(BASE, max_position_embeddings=128)
        assert torch.equal(logits(back), logits(make()))

    def test_a_folder_with_other_work_and_a_full_disk(self, name, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "results.csv").write_text("1,2")
        with pytest.raises(UserError, match="holds other files"):
            EXPORTERS.get(name)(make(), tmp_path / "out", TARGET)
        shutil.rmtree(tmp_path / "out")
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 1000))
        refused(name, tmp_path, make(), "no room on the disk")


def test_a_nameless_target_is_refused_where_the_format_names_it(tmp_path):
    refused("vllm", tmp_path, make(), "names the target", replace(TARGET, name=""))


@pytest.mark.parametrize("part", ["my-eagle3-run", "eagle-2", "DFlash"])
def test_a_telling_path_is_warned_of(tmp_path, part):
    report = EXPORTERS.get("vllm")(make(), tmp_path / part, TARGET)
    assert any("vLLM reads a method out of" in line for line in report.warnings)


# -- refused imports -------------------------------------------------------------------------------------------------
def theirs(folder, ours):
    """The file's name of a tensor."""
    names = load_file(folder / "model.safetensors")
    return ours if ours in names else ours.replace("midlayer.", "layers.0.")


@pytest.mark.parametrize("tensor", BARE_TENSORS)
def test_every_missing_tensor_is_named(exported, tensor):
    state = load_file(exported / "model.safetensors")
    del state[theirs(exported, tensor)]
    rewrite(exported, state)
    with pytest.raises(UserError, match=f"missing {tensor}"):
        import_checkpoint(exported, TARGET)


@pytest.mark.parametrize("tensor", BARE_TENSORS)
def test_every_misshaped_or_wrongly_typed_tensor_is_named(exported, tensor):
    whole = load_file(exported / "model.safetensors")
    name = theirs(exported, tensor)
    rewrite(exported, whole | {name: torch.cat([whole[name], whole[name][:1]])})
    with pytest.raises(UserError, match=f"{tensor} has shape"):
        import_checkpoint(exported, TARGET)
    rewrite(exported, whole | {name: whole[name].to(torch.int8)})
    with pytest.raises(UserError, match=f"{tensor} is int8"):
        import_checkpoint(exported, TARGET)


def test_extra_tensors_and_nan_are_named(exported):
    whole = load_file(exported / "model.safetensors")
    for extra in ("fc.bias", "layers.1.mlp.up_proj.weight", "mask_hidden", "midlayer.self_attn.q_norm.weight"):
        rewrite(exported, whole | {extra: torch.zeros(3)})
        with pytest.raises(UserError, match=f"extra {extra}"):
            import_checkpoint(exported, TARGET)
    whole["norm.weight"][3] = float("inf")
    rewrite(exported, whole)
    with pytest.raises(UserError, match="norm.weight holds NaN or infinity"):
        import_checkpoint(exported, TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "features of width 16"),
        ({"vocab_size": 48}, "vocabulary of 40"),
        ({"layers": 4}, "taps layer 5"),
    ],
)
def test_a_draft_that_does_not_fit_the_target(exported, change, message):
    with pytest.raises(UserError, match=message):
        import_checkpoint(exported, replace(TARGET, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3'"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"hidden_size": "wide"}, "not a usable config"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "config.json"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
    ],
)
def test_layers_that_we_do_not_compute_are_refused_by_name(exported, change, message):
    config = json.loads((exported / "config.json").read_text())
    if "transformer_layer_config" in config:
        change = {"transformer_layer_config": config["transformer_layer_config"] | change}
    rewrite(exported, **change)
    with pytest.raises(UserError, match=message) as caught:
        import_checkpoint(exported, TARGET)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_before_fc": True, "fc_norm": True}, "norm_before_fc and fc_norm at once"),
        ({"draft_vocab_size": "many"}, "wrong kind"),
        ({"eagle_aux_hidden_state_layer_ids": [1, "2"]}, "a list of integers"),
        ({"eagle_aux_hidden_state_layer_ids": [5, 4, 2]}, "do not ascend strictly"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_options_that_we_do_not_compute_are_refused_by_name(exported, change, message):
    rewrite(exported, **change)
    with pytest.raises(UserError, match=message):
        import_checkpoint(exported, TARGET)


def test_other_kinds_of_checkpoint_are_refused(tmp_path):
    EXPORTERS.get("vllm")(make(), tmp_path / "v", TARGET)
    rewrite(tmp_path / "v", speculators_model_type="dflash")
    with pytest.raises(UserError, match="dflash speculator"):
        import_checkpoint(tmp_path / "v", TARGET)
    EXPORTERS.get("plain")(make(), tmp_path / "p", TARGET)
    rewrite(tmp_path / "p", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match="an Eagle3 draft has one of"):
        import_checkpoint(tmp_path / "p", TARGET)


def test_sources_that_cannot_be_read(tmp_path, exported, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        import_checkpoint(tmp_path / "no" / "such" / "folder", TARGET)
    with pytest.raises(UserError, match="is a file"):
        import_checkpoint(exported / "config.json", TARGET)
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin, and pickle is never read; convert the weights"):
        import_checkpoint(exported, TARGET)
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON: line 1"):
        import_checkpoint(exported, TARGET)


def test_a_hub_id_with_no_hub_in_reach_gives_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("cannot reach the hub\nwith a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="could not be fetched as a model id .cannot reach the hub.") as caught:
        import_checkpoint("nobody/no-such-draft", TARGET)
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_without_pickle(tmp_path, monkeypatch):
    import huggingface_hub

    EXPORTERS.get("plain")(make(), tmp_path / "snapshot", TARGET)
    asked = {}

    def download(name, allow_patterns, **kwargs):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    back, _ = import_checkpoint("someone/some-draft", TARGET)
    assert_same(make(), back)
    assert asked["name"] == "someone/some-draft" and not any("bin" in p for p in asked["patterns"])


# -- older and other hands -------------------------------------------------------------------------------------------
def test_older_tensor_names_and_shards_are_read(tmp_path):
    draft = make(fc_norm=True)
    EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET)
    state = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    for k, old in enumerate(("low", "mid", "high")):
        state[f"aux_norm_{old}.weight"] = state.pop(f"fc_norm.{k}.weight")
    state = {
        ("model." if i % 2 else "") + n.replace("midlayer.", "layers.0."): t for i, (n, t) in enumerate(state.items())
    }
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / "out" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    artifact.atomic_write_json(tmp_path / "out" / "model.safetensors.index.json", index)
    back, _ = import_checkpoint(tmp_path / "out", TARGET)
    assert_same(draft, back)
    save_file(
        {"fc.weight": draft.fc.weight.detach(), "model.fc.weight": draft.fc.weight.detach() + 1},
        tmp_path / "out" / "a.safetensors",
    )
    with pytest.raises(UserError, match="a second time"):
        import_checkpoint(tmp_path / "out", TARGET)


def test_identity_maps_of_a_full_vocabulary_are_left_out_and_told(tmp_path):
    draft = make(draft_vocab_size=40)
    EXPORTERS.get("plain")(draft, tmp_path / "out", TARGET)
    state = load_file(tmp_path / "out" / "model.safetensors")
    state |= {"d2t": torch.zeros(40, dtype=torch.int64), "t2d": torch.ones(40, dtype=torch.bool)}
    rewrite(tmp_path / "out", state)
    back, meta = import_checkpoint(tmp_path / "out", TARGET)
    assert_same(draft, back)
    assert len(meta["notes"]) == 2
    state["d2t"][3] = 1
    rewrite(tmp_path / "out", state)
    with pytest.raises(UserError, match="extra d2t"):
        import_checkpoint(tmp_path / "out", TARGET)


def test_feature_ids_in_every_place_they_are_written(tmp_path):
    EXPORTERS.get("plain")(make(taps=(2, 4, 5)), tmp_path / "out", TARGET)

    def taps(**config):
        path = tmp_path / "out" / "config.json"
        values = json.loads(path.read_text())
        for key in ("eagle_aux_hidden_state_layer_ids", "eagle_config"):
            values.pop(key, None)
        artifact.atomic_write_json(path, values | config)
        draft, meta = import_checkpoint(tmp_path / "out", TARGET)
        return draft.config.taps, meta["notes"]

    assert taps() == ((2, 4, 5), [])
    nested, notes = taps(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 6]})
    assert nested == (1, 3, 7) and len(notes) == 1
    both, notes = taps(
        eagle_aux_hidden_state_layer_ids=[1, 3, 6], eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}
    )
    assert both == (1, 3, 6) and "disagree" in notes[0]
    draft, _ = import_checkpoint(tmp_path / "out", TARGET, taps=(1, 2, 3))
    assert draft.config.taps == (1, 2, 3)


def test_absent_switches_take_each_formats_own_default(tmp_path):
    for name, expected in (("vllm", True), ("plain", False)):
        EXPORTERS.get(name)(make(), tmp_path / name, TARGET)
        path = tmp_path / name / "config.json"
        values = json.loads(path.read_text())
        del values["norm_before_residual"]
        artifact.atomic_write_json(path, values)
        draft, meta = import_checkpoint(tmp_path / name, TARGET)
        assert draft.config.norm_before_residual is expected and len(meta["notes"]) == int(expected)


def test_facts_are_taken_from_a_huggingface_config():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_hidden_layers=8,
        vocab_size=40,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    assert TargetInfo.of(config, "tuned/target") == TARGET
