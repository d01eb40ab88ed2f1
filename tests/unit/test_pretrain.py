"""Pretraining on tiny text: it learns, a kill changes no bit, memory is flat, and a broken loss changes no weight."""

from __future__ import annotations

import copy
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from redraft.data.packed import PackedText, TextSource
from redraft.drafts.standalone import objective as causal_module
from redraft.drafts.standalone.objective import CausalModel
from redraft.errors import UserError
from redraft.settings.training import PretrainConfig
from redraft.training.causal import perplexity, pretrain
from redraft.training.loop import Checkpoint

build_model = runpy.run_path(str(Path(__file__).parents[1] / "tiny_models.py"))["build_model"]
CONFIG = PretrainConfig(
    tokens=12 * 128, length=32, batch_tokens=128, micro_tokens=64, heldout_tokens=128, evaluate_every=5,
    precision="float32", learning_rate=3e-3, save_seconds=0.0,
)  # fmt: skip


def small(**overrides):
    return build_model(num_hidden_layers=2, initializer_range=0.05, **overrides)


@pytest.fixture
def text(tmp_path: Path, tiny_tokenizer) -> PackedText:
    lines = [json.dumps({"text": f"{i} he sat there and then he sat " * (1 + i % 3)}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return PackedText(TextSource([str(tmp_path / "a.jsonl")]), tiny_tokenizer, 32, heldout_share=0.1)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_learns_and_ends_with_the_best_weights(text: PackedText, tmp_path: Path) -> None:
    model = small(tie_word_embeddings=True)
    result = pretrain(model, text, CONFIG, tmp_path / "run")
    assert result.steps == CONFIG.steps == 12 and result.tokens == 12 * 128
    assert result.best < 0.7 * result.start and not result.stopped_early
    assert [step for step, _ in result.history] == [0, 5, 10, 12]
    held = text.heldout(4)
    assert perplexity(CausalModel(model), held, 2) == pytest.approx(result.best, rel=1e-6)
    curve = [json.loads(line) for line in (tmp_path / "run/curve.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in curve] == [5, 10, 12] and curve[-1]["heldout_perplexity"] == result.history[-1][
        1
    ]


@pytest.mark.parametrize(("optimizer", "kill"), [("adamw", 3), ("muon", 7)])
def test_a_killed_run_ends_with_the_same_bits(
    text: PackedText, tmp_path: Path, kill: int, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, optimizer=optimizer, tokens=8 * 128)
    whole = small()
    first = pretrain(whole, text, config, tmp_path / "whole")
    saves, save = [], Checkpoint.save

    def dying(self, trained, optimizers, state):
        save(self, trained, optimizers, state)
        saves.append(state["step"])
        if len(saves) == kill:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain(small(), text, config, tmp_path / "killed")
    monkeypatch.setattr(Checkpoint, "save", save)
    resumed = small()
    second = pretrain(resumed, text, config, tmp_path / "killed")
    assert saves[-1] == kill - 1 and second.history == first.history
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())

    def curve(name: str) -> list[dict]:
        entries = [json.loads(line) for line in (tmp_path / name / "curve.jsonl").read_text().splitlines()]
        return [{k: v for k, v in entry.items() if k not in ("seconds", "seal")} for entry in entries]

    assert curve("whole") == curve("killed")


def test_micro_batches_add_up_to_the_whole(text: PackedText, tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=3 * 128)
    one, many = small(), small()
    pretrain(one, text, replace(config, micro_tokens=128), tmp_path / "one")
    pretrain(many, text, replace(config, micro_tokens=32), tmp_path / "many")
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(many)[name], value, rtol=1e-3, atol=2e-5)


def test_the_loss_is_that_of_transformers_in_any_portions() -> None:
    model = small()
    ids = torch.randint(4, 128, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, labels=ids).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for numbers in (128, 128 * 5, 10**6):
        loss = CausalModel(model, numbers).block_loss(ids) / (3 * 16)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        for found, right in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_packed_rows_do_not_see_each_other() -> None:
    model = small()
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
    states = CausalModel(model).states(rows)
    alone = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_no_tensor_grows_with_vocabulary_times_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest matrix of logits is that of a portion, whatever the length of the text."""
    seen: list[int] = []
    real = F.cross_entropy
    monkeypatch.setattr(
        causal_module.F, "cross_entropy", lambda x, *a, **k: (seen.append(x.numel()), real(x, *a, **k))[1]
    )
    for length in (33, 257):
        ids = torch.randint(4, 128, (2, length), generator=torch.Generator().manual_seed(0))
        CausalModel(small(), 128 * 16).block_loss(ids).backward()
    assert max(seen) == 128 * 16 and sum(seen) == 128 * 2 * (32 + 256)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    text: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = small(), []
    real = CausalModel.block_loss

    def breaking(self, block_BT):
        loss = real(self, block_BT)
        if torch.is_grad_enabled():
            calls.append(1)
        return loss * math.nan if len(calls) > 14 else loss

    monkeypatch.setattr(CausalModel, "block_loss", breaking)
    with pytest.raises(UserError, match=r"the loss became nan at step 7 of 12; .* step 7 in .*run.*learning rate"):
        pretrain(model, text, CONFIG, tmp_path / "run")
    assert all(bool(value.isfinite().all()) for value in weights(model).values())
    monkeypatch.setattr(CausalModel, "block_loss", real)
    again, whole = small(), small()
    pretrain(again, text, CONFIG, tmp_path / "run")
    pretrain(whole, text, CONFIG, tmp_path / "whole")
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(
    text: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    before = copy.deepcopy(weights(model))
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"the gradient became (nan|inf) at step 0"):
        pretrain(model, text, CONFIG, tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_another_run_in_the_same_folder_is_refused(text: PackedText, tmp_path: Path) -> None:
    pretrain(small(), text, replace(CONFIG, tokens=128), tmp_path / "run")
    with pytest.raises(UserError, match="belongs to a run with another config, steps"):
        pretrain(small(), text, CONFIG, tmp_path / "run")
    with pytest.raises(UserError, match="precision must be"):
        replace(CONFIG, precision="float16")


def test_held_out_text_of_its_own(text: PackedText, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("an hour later he sat on the stone\n" * 30)
    held = PackedText(TextSource([str(tmp_path / "held.txt")]), text.tokenizer, 32)
    result = pretrain(small(), text, CONFIG, tmp_path / "run", heldout_text=held)
    assert result.best < result.start
