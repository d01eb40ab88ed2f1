"""Checkpoints of every hand: the model that they hold, or one line; nothing left out without a word, no code run."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from redraft.errors import UserError
from redraft.loading import load_target, load_tokenizer, locate, quiet
from redraft.loading.checkpoint import load_model
from redraft.target import Target

IDS = torch.tensor([[4, 9, 33, 70, 101, 5, 120]])
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LAYER = "model.layers.0.self_attn"


class Checkpoint:
    """A folder with a checkpoint, and ways to spoil it."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder, self.target = folder, target
        target.save(folder)

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in load_file(self.folder / "model.safetensors").items()}

    def write(self, state: dict[str, Tensor]) -> None:
        save_file(state, self.folder / "model.safetensors", {"format": "pt"})

    def add(self, *names: str, shape: tuple[int, ...] = (4,)) -> None:
        self.write(self.state | {name: torch.ones(shape) for name in names})

    def config(self, file: str = "config.json", **values: Any) -> None:
        path = self.folder / file
        found = json.loads(path.read_text()) | values
        found.pop("layer_types", None)
        path.write_text(json.dumps(found))

    def refused(self, message: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_target(str(self.folder), **settings)
        assert "\n" not in str(caught.value)

    def holds(self, **settings: Any) -> Target:
        """Opened, it computes what was saved."""
        opened = load_target(str(self.folder), **settings)
        assert torch.equal(answers(opened), answers(self.target))
        return opened


def answers(target: Target) -> Tensor:
    return target.logits(target.forward(IDS).hidden_BTH)


@pytest.fixture
def saved(tmp_path: Path, tiny_target: Callable[..., Target]) -> Callable[..., Checkpoint]:
    return lambda architecture="llama", **shape: Checkpoint(tmp_path / "model", tiny_target(architecture, **shape))


# -- more than the config says ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"{LAYER}.q_proj.lora_A.weight", f"{LAYER}.q_proj.lora_B.weight"], "2 tensors .* first .*lora_A.*merge the"),
        ([f"{LAYER}.q_proj.bias"], f"1 tensors .* first {LAYER}.q_proj.bias; they would be left out: mend config"),
        ([f"{LAYER}.q_norm.weight"], "q_norm"),
        (["model.layers.10.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"], "first model.layers.9"),
        ([f"{LAYER}.q_proj.weight_scale"], "looks quantised"),
        (["model.visual.patch_embed.weight"], "visual"),
        (["score.weight"], "score"),
    ],
)
def test_tensors_without_a_place_are_refused_the_first_named(saved: Any, names: list[str], message: str) -> None:
    found = saved()
    found.add(*names)
    found.refused(message)


def test_layers_experts_and_rows_that_the_config_does_not_count(saved: Any) -> None:
    found = saved()
    found.config(num_hidden_layers=4)
    found.refused("18 tensors for which its config has no place, first model.layers.4.")
    found.config(num_hidden_layers=6, vocab_size=120)
    found.refused(r"lm_head.weight has shape \[128, 32\] in the file and \[120, 32\] by config.json and 1 more")
    found.config(vocab_size=160)
    found.refused(r"lm_head.weight has shape \[128, 32\] in the file and \[160, 32\] by config.json")


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_experts(saved: Any, count: int) -> None:
    found = saved("qwen3_moe", **MOE)
    key = next(key for key in json.loads((found.folder / "config.json").read_text()) if key.endswith("l_experts"))
    found.config(**{key: count})
    found.refused(rf"experts.* has shape \[4, .* in the file and \[{count}, ")


@pytest.mark.parametrize(
    ("names", "settings", "note"),
    [
        ([f"{LAYER}.rotary_emb.inv_freq"], {}, None),
        (["mtp.layers.0.fc.weight", "model.mtp.norm.weight"], {}, "predict further tokens .* such as m"),
        (
            ["model.layers.6.eh_proj.weight", "model.layers.6.mlp.up_proj.weight"],
            {"num_nextn_predict_layers": 1},
            "MTP",
        ),
        ([f"{LAYER}.k_scale", f"{LAYER}.v_scale"], {}, "scales of a quantised key and value cache"),
        (["model.visual.x.weight", "audio_tower.x.weight"], {"vision_config": {}}, "images or sound"),
    ],
)
def test_known_extras_are_left_out_and_noted(saved: Any, names: list[str], settings: Any, note: str | None) -> None:
    found = saved()
    found.add(*names)
    found.config(**settings)
    notes = found.holds().notes
    assert len(notes) == (note is not None)
    assert note is None or re.search(note, notes[0])


def test_a_layer_behind_the_last_is_no_mtp_layer_without_its_marks(saved: Any) -> None:
    found = saved()
    found.config(num_nextn_predict_layers=1)
    found.add("model.layers.6.mlp.up_proj.weight")
    found.refused("first model.layers.6.mlp.up_proj.weight")
    found.add("model.layers.8.eh_proj.weight")
    found.refused("2 tensors")


def test_a_head_beside_a_tied_embedding(saved: Any) -> None:
    found = saved(tie_word_embeddings=True)
    table = found.state["model.embed_tokens.weight"]
    found.write(found.state | {"lm_head.weight": table.clone()})
    found.holds()
    found.write(found.state | {"lm_head.weight": table + 1})
    found.refused("has a head of its own, and its config says that the embedding is the head")


def test_rows_without_a_token_are_padding_and_tokens_without_a_row_are_refused(saved: Any) -> None:
    assert saved(vocab_size=160).holds().vocab_size == 160
    saved(vocab_size=120).refused("ids up to 127 .* and the model 120 rows in its embedding and head")


def test_a_mark_of_images_beyond_the_last_row_is_noted(saved: Any) -> None:
    found = saved()
    found.target.tokenizer.add_tokens(["<image_soft_token>"])
    found.target.tokenizer.save_pretrained(found.folder)
    assert "<image_soft_token> and the model no row" in found.holds().notes[0]
    found.target.tokenizer.chat_template = "{{ '<image_soft_token>' }}"
    found.target.tokenizer.save_pretrained(found.folder)
    found.refused("ids up to 128 .* and the model 128 rows")


# -- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("second", ["layers.0.self_attn.q_proj.weight", "model.model.layers.0.self_attn.q_proj.weight"])
def test_one_tensor_under_two_names(saved: Any, second: str) -> None:
    found = saved()
    found.add(second, shape=(32, 32))
    found.refused(f"one tensor under two names, .*{re.escape(second)}")


def test_names_without_the_prefix_are_the_same_model(saved: Any) -> None:
    found = saved()
    found.write({name.removeprefix("model."): tensor for name, tensor in found.state.items()})
    found.holds()


def test_experts_that_do_not_count_from_nought_or_are_there_twice(saved: Any) -> None:
    found = saved("qwen3_moe", **MOE)
    state = found.state
    found.write({name.replace("layers.0.mlp.experts.3.", "layers.0.mlp.experts.5."): t for name, t in state.items()})
    found.refused("numbers the experts of model.layers.0.mlp.experts as 0, 1, 2, 5")
    found.write(state | {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 32, 32)})
    found.refused("holds its experts twice")


def test_numbers_that_are_no_weights(saved: Any) -> None:
    found = saved()
    state = found.state
    found.write(state | {"model.norm.weight": torch.full((32,), float("nan"))})
    found.refused("holds NaN or infinity in model.norm.weight")
    found.write(state | {f"{LAYER}.q_proj.weight": torch.ones(32, 32, dtype=torch.int8)})
    found.refused(f"holds whole numbers in {LAYER}.q_proj.weight")


def test_a_type_that_is_no_name(saved: Any) -> None:
    found = saved()
    for key in ("dtype", "torch_dtype"):
        found.config(**{key: 3.5})
        found.refused(f"config.json.*{key} is 3.5.*the name of a type, such as bfloat16")
        found.config(**{key: "float32"})


def test_a_kind_of_rotary_angles_that_is_no_name(saved: Any) -> None:
    found = saved()
    found.config(rope_parameters={"rope_type": True, "rope_theta": 10000.0})
    found.refused(r"config.json.*rope_parameters\.rope_type.*a text")


def test_a_tokenizer_without_its_words(saved: Any) -> None:
    found = saved()
    (found.folder / "tokenizer.json").unlink()
    found.config("tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    found.refused("no tokenizer that can be loaded: there is no tokenizer.json")


# -- files -----------------------------------------------------------------------------------------------------------
def test_shards(saved: Any) -> None:
    found = saved()
    (found.folder / "model.safetensors").unlink()
    found.target.model.save_pretrained(found.folder, max_shard_size="60kB")
    found.holds()
    shard = sorted(found.folder.glob("model-*"))[1]
    whole = shard.read_bytes()
    shard.unlink()
    found.refused(rf"lacks the weight file {shard.name}")
    shard.write_bytes(whole)
    (found.folder / "model.safetensors").write_bytes(whole)
    found.refused("holds model.safetensors and model.safetensors.index.json")
    (found.folder / "model.safetensors").unlink()
    (found.folder / "model.safetensors.index.json").write_text("{}")
    found.refused("has no weight_map")


class Runs:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_weights_of_the_older_kind_are_read_and_nothing_in_them_is_run(saved: Any, tmp_path: Path) -> None:
    found = saved()
    state = found.state
    (found.folder / "model.safetensors").unlink()
    torch.save(state, found.folder / "pytorch_model.bin")
    found.holds()
    torch.save(state | {"x": Runs(tmp_path / "ran")}, found.folder / "pytorch_model.bin")
    found.refused("its pickle file holds more than tensors and is not read")
    assert not (tmp_path / "ran").exists()


def test_a_model_and_an_adapter_in_one_folder(saved: Any) -> None:
    found = saved()
    (found.folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(found.folder)}))
    found.refused("holds a whole model and an adapter")


def test_files_of_llama_cpp(tmp_path: Path) -> None:
    (tmp_path / "tuned.gguf").write_bytes(b"GGUF")
    for spec in (tmp_path, tmp_path / "tuned.gguf"):
        with pytest.raises(UserError, match="GGUF file.*the checkpoint it was made from"):
            load_target(str(spec))


# -- code ------------------------------------------------------------------------------------------------------------
CODE = """
open({path!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "odd"
class Model(LlamaForCausalLM):
    pass
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = saved()
    (found.folder / "code.py").write_text(CODE.format(path=str(tmp_path / "ran")))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question on the terminal"))
    yield found
    assert not (tmp_path / "ran").exists(), "the checkpoint's code ran"


AUTO = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize("kind", ["odd", "llama"])
def test_a_model_with_code_of_its_own_is_refused_without_a_question(with_code: Any, kind: str) -> None:
    with_code.config(auto_map=AUTO, model_type=kind, architectures=["Model"])
    with_code.refused("asks to run Python code of its own")


def test_code_beside_a_model_that_transformers_has_is_left_aside(with_code: Any) -> None:
    with_code.config(auto_map=AUTO)
    assert "left aside" in with_code.holds().notes[0]


@pytest.mark.parametrize("auto", [{"AutoTokenizer": [None, "code.Words"]}, {"AutoTokenizer": ["code.Words", None]}])
def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(with_code: Any, auto: Any) -> None:
    with_code.config("tokenizer_config.json", auto_map=auto, tokenizer_class="Words")
    with_code.refused("the tokenizer of .* asks to run Python code of its own")
    with pytest.raises(UserError, match="code of its own"):
        load_tokenizer(str(with_code.folder))
    with_code.config("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with_code.holds()


# -- quantised -------------------------------------------------------------------------------------------------------
def linears(state: dict[str, Tensor]) -> list[str]:
    return [name for name in state if name.endswith("_proj.weight")]


def blocks_of_fp8(found: Checkpoint) -> None:
    """Rewrite a checkpoint as fp8 with a scale for every 128 x 128 numbers, and its target as what that means."""
    state, means = found.state, {}
    for name in linears(state):
        rows, columns = state[name].shape
        cut = state[name].view(rows // 128, 128, columns // 128, 128)
        scale = cut.abs().amax((1, 3)) / 448
        codes = (cut / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        means[name] = (codes.float() * scale[:, None, :, None]).view(rows, columns)
        state[name], state[name + "_scale_inv"] = codes.view(rows, columns).contiguous(), scale
    found.write(state)
    found.target.model.load_state_dict(found.target.model.state_dict() | means)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    found.config(quantization_config=settings)


def test_a_model_that_engines_round_further_is_for_servers_alone(saved: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = saved(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    blocks_of_fp8(found)
    found.refused("is served with quantised input activations.*let the server answer")
    near = found.holds(served=True)
    assert near.rounding == "input activations" and "unpacked from fp8" in near.notes[0]
    near.save(tmp_path / "plain")
    again = load_target(str(tmp_path / "plain"))
    assert torch.equal(answers(again), answers(near)) and again.rounding is None


def test_a_scale_that_is_not_there_and_a_file_that_is_not_quantised(saved: Any) -> None:
    pytest.importorskip("accelerate")
    found = saved(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    plain = found.state
    blocks_of_fp8(found)
    lost = "model.layers.3.mlp.up_proj.weight_scale_inv"
    found.write({name: tensor for name, tensor in found.state.items() if name != lost})
    found.refused("holds model.layers.3.mlp.up_proj.weight in F8_E4M3 without its scale", served=True)
    found.write(plain)
    found.refused("says that it is quantised with fp8 blocks and holds plain weights", served=True)


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """Two codes a byte, the low one first; a block of 32 shares a power of two. Only weights are rounded."""
    pytest.importorskip("accelerate")
    with quiet():
        model = gpt_oss_in_mxfp4(tmp_path / "model")
        opened, notes, rounds = load_model(locate(str(tmp_path / "model")), "x", torch.float32)
    assert rounds is None and "mxfp4" in notes[0]
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, model(IDS).logits)


def gpt_oss_in_mxfp4(folder: Path) -> Any:
    """Write such a checkpoint; gives the model that it means."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", num_local_experts=4, **shape)).eval()
    model.save_pretrained(folder)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([numbers, -numbers])
    state, means = dict(load_file(folder / "model.safetensors")), {}
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, into, out = state.pop(name).shape
        codes = torch.randint(0, 16, (experts, out, into // 32, 32))
        powers = torch.randint(120, 126, (experts, out, into // 32), dtype=torch.uint8)
        means[name] = (
            (numbers[codes] * 2.0 ** (powers.float() - 127)[..., None]).view(experts, out, into).mT.contiguous()
        )
        pairs = codes.view(experts, out, into // 32, 16, 2)
        state[name + "_blocks"], state[name + "_scales"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), powers
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    model.load_state_dict(model.state_dict() | means)
    return model


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}


def compressed(**scheme: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return COMPRESSED | {"config_groups": {"group_0": group | scheme}, "quantization_status": "compressed"}


def test_compressed_tensors(saved: Any) -> None:
    pytest.importorskip("compressed_tensors")
    found = saved(hidden_size=64)
    state, means = found.state, {}
    for name in linears(state):
        scale = state[name].abs().amax(1, keepdim=True) / 448
        codes = (state[name] / scale).to(torch.float8_e4m3fn)
        state[name], state[name + "_scale"], means[name] = codes, scale, codes.float() * scale
    found.write(state)
    found.target.model.load_state_dict(found.target.model.state_dict() | means)
    found.config(quantization_config=compressed())
    assert found.holds().rounding is None
    tokens = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    found.config(quantization_config=compressed(input_activations=tokens))
    found.refused("is served with quantised input activations")
    assert found.holds(served=True).rounding == "input activations"


@pytest.mark.parametrize("method", ["compressed-tensors", "bitsandbytes"])
def test_a_package_that_is_not_there_is_named(saved: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    found = saved()
    found.config(quantization_config={"quant_method": method, "load_in_4bit": method == "bitsandbytes"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found.refused(f"is quantised with {method}: pip install {method}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_status": "frozen"}, "quantization_status frozen"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config"),
    ],
)
def test_what_is_more_than_packed_weights(saved: Any, monkeypatch: Any, settings: Any, message: str) -> None:
    found = saved()
    found.config(quantization_config=compressed() | settings)
    monkeypatch.setattr("redraft.loading.quantised.PACKAGES", {"compressed-tensors": ()})
    found.refused(f"and {message}, which is not unpacked here")


@pytest.mark.parametrize("method", ["gptq", "awq", "modelopt", "hqq", None])
def test_formats_that_are_not_computed_here_are_refused_by_name(saved: Any, method: str | None) -> None:
    found = saved()
    found.config(quantization_config={"quant_method": method, "bits": 4})
    found.refused(f"is quantised with {method or 'a method that its config does not name'}, which cannot be computed")
