"""Adapters of every kind: merged, the model computes what base and adapter did together, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.errors import UserError
from redraft.loading import load_target
from redraft.target import Target

# With the tokens that some adapters below train.
IDS = torch.tensor([[4, 9, 33, 70, 101, 5, 120]])
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
    )


def other(kind: str, **settings: Any) -> Any:
    return getattr(peft, kind)(**({"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))


@pytest.fixture
def write(tmp_path: Path, tiny_target: Callable[..., Target]) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Save a base and a random adapter on it; gives the adapter's folder and the logits of both together."""

    def make(config: Any, rows: int | None = None, architecture: str = "llama", **shape: Any) -> Any:
        target = tiny_target(architecture, **shape)
        target.save(tmp_path / "base")
        if rows is not None:
            target.model.resize_token_embeddings(rows, mean_resizing=False)
            target.tokenizer.add_tokens([f"<new{i}>" for i in range(rows - 128)])
        joined = peft.get_peft_model(target.model, config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in joined.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            expected = joined(input_ids=IDS).logits
        joined.save_pretrained(tmp_path / "adapter")
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / "base")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        if rows is not None:
            target.tokenizer.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", expected

    return make


def answers(target: Target) -> torch.Tensor:
    return target.logits(target.forward(IDS).hidden_BTH)


def holds(folder: Path, expected: torch.Tensor) -> Target:
    """The merged target, which computes this, and whose saved copy computes the same."""
    target = load_target(str(folder))
    torch.testing.assert_close(answers(target), expected, rtol=1e-4, atol=1e-4)
    target.save(folder.parent / "saved")
    assert torch.equal(answers(load_target(str(folder.parent / "saved"))), answers(target))
    return target


TABLES = {
    "LoRA on the head": lora(target_modules=["q_proj", "lm_head"]),
    "LoRA on the embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA on both": lora(target_modules=["embed_tokens", "lm_head"]),
    "a trained head": lora(modules_to_save=["lm_head"]),
    "a trained embedding": lora(modules_to_save=["embed_tokens"]),
    "both trained": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "trained tokens": lora(trainable_token_indices=[5, 120]),
    "trained tokens alone": other("TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[5, 120]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TABLES)
def test_a_head_that_shares_its_table_is_parted_before_either_is_merged(write: Any, name: str, tied: bool) -> None:
    target = holds(*write(TABLES[name], tie_word_embeddings=tied))
    same = torch.equal(target.head.weight, target.embedding.weight)
    assert same == target.config.tie_word_embeddings == (tied and name.startswith("trained tokens"))


KINDS = {
    "rank-stabilised": lora(use_rslora=True),
    "DoRA": lora(use_dora=True, target_modules="all-linear"),
    "ranks by layer": lora(
        target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}
    ),
    "norms": lora(modules_to_save=["norm", "input_layernorm"]),
    "LoHa": other("LoHaConfig", r=4, alpha=8),
    "LoKr": other("LoKrConfig", r=4, alpha=8),
    "IA3": other("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": other("OFTConfig", oft_block_size=8, r=0),
    "VeRA": other("VeraConfig", r=4),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_merge_too(write: Any, name: str) -> None:
    holds(*write(KINDS[name]))


def test_experts_and_biases(write: Any) -> None:
    experts = lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    folder, expected = write(experts, architecture="qwen3_moe", **MOE)
    torch.testing.assert_close(answers(load_target(str(folder))), expected, rtol=1e-4, atol=1e-4)


def test_trained_biases(write: Any) -> None:
    holds(*write(lora(bias="all"), architecture="qwen2"))


# -- a grown vocabulary ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "tables", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"]}]
)
def test_a_grown_vocabulary_is_grown_here_too(write: Any, tables: dict[str, Any], tied: bool) -> None:
    target = holds(*write(lora(**tables), rows=130, tie_word_embeddings=tied))
    assert target.vocab_size == 130 == len(target.tokenizer) == target.config.vocab_size
    assert "grown from 128 to 130 rows" in target.notes[0]


def test_a_vocabulary_without_its_padding(write: Any) -> None:
    target = holds(*write(lora(modules_to_save=["embed_tokens", "lm_head"]), rows=128, vocab_size=140))
    assert target.vocab_size == 128 and not target.notes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tables", [["lm_head"], ["embed_tokens"]])
def test_new_rows_that_no_file_brings_are_refused_with_both_sizes(write: Any, tables: list[str], tied: bool) -> None:
    folder, _ = write(lora(modules_to_save=tables), rows=130, tie_word_embeddings=tied)
    refused(folder, "vocabulary of 130 rows and its base model has 128")


def test_a_tokenizer_that_grew_alone_is_refused_with_both_sizes(write: Any) -> None:
    folder, _ = write(lora(), rows=130)
    refused(folder, r"ids up to 129 \('<new1>'\) and the model 128 rows")


# -- refused ---------------------------------------------------------------------------------------------------------
def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_target(str(folder))
    assert "\n" not in str(caught.value)


REFUSED = {
    "is prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "is prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "activated LoRA": lora(alora_invocation_tokens=[5, 6]),
    "init_lora_weights 'pissa', which changes its base": lora(init_lora_weights="pissa"),
    "init_lora_weights 'olora', which changes its base": lora(init_lora_weights="olora"),
    "replicates layers": lora(layer_replication=[[0, 4], [2, 6]]),
    "trained for FEATURE_EXTRACTION": lora(task_type="FEATURE_EXTRACTION"),
    "base layer has no bias": lora(lora_bias=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_weights_can_stand_for(write: Any, tmp_path: Path, message: str) -> None:
    config = REFUSED[message]
    if config.is_prompt_learning:
        write(lora())
        config.save_pretrained(tmp_path / "adapter")
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / "base")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    else:
        write(config)
    refused(tmp_path / "adapter", message)


def test_a_merge_that_gives_another_model_is_refused(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write(lora(target_modules=["q_proj", "lm_head"]), tie_word_embeddings=True)
    monkeypatch.setattr("redraft.loading.adapters._untie", lambda joined: False)
    refused(folder, "cannot be merged: the merged model's logits are .* away from those of base and adapter")


def test_an_adapter_that_changes_nothing_is_told(write: Any) -> None:
    folder, _ = write(lora())
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file, {"format": "pt"})
    assert "changes no logit" in load_target(str(folder)).notes[0]


def test_tensors_of_any_kind_without_a_place_are_refused(write: Any) -> None:
    folder, _ = write(lora(modules_to_save=["norm"]))
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.norm.bias": torch.ones(32)}, file, {"format": "pt"})
    refused(folder, "1 tensors that its base model lacks, first base_model.model.model.norm.bias")


def test_a_folder_of_several_adapters_names_one(write: Any, tmp_path: Path) -> None:
    folder, _ = write(lora())
    folder.rename(tmp_path / "all-of-them")
    (tmp_path / "many").mkdir()
    (tmp_path / "all-of-them").rename(tmp_path / "many" / "first")
    with pytest.raises(UserError, match="it holds several: name one, such as .*first"):
        load_target(str(tmp_path / "base"), adapter=str(tmp_path / "many"))


class Runs:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_an_adapter_of_the_older_kind_is_read_and_nothing_in_it_is_run(write: Any, tmp_path: Path) -> None:
    folder, expected = write(lora())
    torch.save(dict(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    holds(folder, expected)
    torch.save({"x": Runs(tmp_path / "ran")}, folder / "adapter_model.bin")
    refused(folder, "its pickle file holds more than tensors and is not read")
    assert not (tmp_path / "ran").exists()


def test_an_adapter_on_another_base_than_it_names_is_told(write: Any, tmp_path: Path) -> None:
    folder, _ = write(lora())
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    notes = load_target(str(tmp_path / "elsewhere"), adapter=str(folder)).notes
    assert len(notes) == 1 and notes[0].endswith(f"as its base model and was put on {tmp_path / 'elsewhere'}")


def test_a_module_that_was_trained_whole_and_is_not_in_the_file(write: Any) -> None:
    folder, _ = write(lora(modules_to_save=["norm"]))
    file = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "norm" not in name}, file, {"format": "pt"})
    refused(folder, "does not fit its base model: 'base_model.model.model.* is not in its file")
