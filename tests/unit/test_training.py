"""The training loop on tiny models: what moves, what resumes, what is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
import runpy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft import files, provenance
from redraft.adaptation.core import run_training
from redraft.adaptation.runs import Log
from redraft.attic.aim import STEPS, aim
from redraft.drafts.eagle.unroll import collate
from redraft.drafts.groups import prepare
from redraft.errors import UserError
from redraft.inputs import typed
from redraft.rows import anchors
from redraft.seals import unsealed
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.training import loop as loop_module
from redraft.training.optimizer import make_optimizers
from redraft.training.trainer import Trainer, TrainResult, batch_order

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("training_rig.py"))))
# Nothing below changes the target, its answers or their features: they are made once.
target, rows, draft, store = RIG.target, RIG.rows, RIG.draft, RIG.store


# -- the loop --------------------------------------------------------------------------------------------------------
CONFIG = TrainConfig(epochs=4, batch_anchors=120, evaluate_every=4, learning_rate=3e-3, patience=100)


AIMED = " aimed"  # behind a method: its low-rank updates begin where the gradient is


def trainer(target, draft, store, rows, folder, method="eda+fc", config=CONFIG) -> Trainer:
    ready, _ = prepare(copy.deepcopy(draft), method.removesuffix(AIMED), PrivateSize(16, 4, aim=AIMED in method))
    return Trainer(ready, target, store, rows[:18], rows[18:], config, folder, before=aim)


@pytest.mark.parametrize("method", ["eda", "fc", "eda+fc", "lora", "full"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_only_the_trained_groups_move_and_the_loss_falls(method, optimizer, target, draft, store, rows, tmp_path):
    config = replace(CONFIG, optimizer=optimizer)
    work = trainer(target, draft, store, rows, tmp_path / "run", method, config)
    before = {n: p.detach().clone() for n, p in work.draft.named_parameters()}
    batch = collate(work.rows, store, config.unroll)
    first = float(work.objective(batch).detach())
    result = work.run()
    work.loop.checkpoint.load(work.trained, make(work))
    assert float(work.objective(batch).detach()) < first
    trained = {n for n, _ in work.trained}
    for name, parameter in work.draft.named_parameters():
        assert torch.equal(before[name], parameter.detach()) == (name not in trained), name
    assert result.steps == work.loop.total


def make(work: Trainer):
    from redraft.training.optimizer import make_optimizers

    return make_optimizers(work.trained, work.config.optimizer, work.config.weight_decay)


@pytest.mark.parametrize(("method", "optimizer"), [("eda+fc", "muon"), ("eda+fc", "adamw"), ("lora aimed", "muon")])
def test_a_killed_run_resumes_to_the_same_bits(method, optimizer, target, draft, store, rows, tmp_path):
    config = replace(CONFIG, optimizer=optimizer)
    whole = trainer(target, draft, store, rows, tmp_path / "whole", method, config=config)
    expected = whole.run()

    class Killed(BaseException):
        pass

    class Killer:
        def __init__(self, at: int) -> None:
            self.at = at

        def update(self, done, **fields) -> None:
            if fields["step"] == self.at:
                raise Killed

    for at in (2, 5, 11):
        work = trainer(target, draft, store, rows, tmp_path / "killed", method, config=config)
        with pytest.raises(Killed):
            work.run(Killer(at))
    work = trainer(target, draft, store, rows, tmp_path / "killed", method, config=config)
    result = work.run()
    assert result.history == expected.history
    for (name, a), (_, b) in zip(whole.trained, work.trained, strict=True):
        assert torch.equal(a, b), name


class KilledError(Exception):
    """Where a process would have been killed."""


class AtStepFive:
    def update(self, done, **fields) -> None:
        if fields["step"] == 5:
            raise KilledError


@pytest.fixture
def processor(monkeypatch):
    """``processor(type)``: from now on Muon takes this type where it has the choice."""
    return lambda kind: monkeypatch.setattr(loop_module, "muon_type", lambda device, precision: kind)


@pytest.fixture
def moved(target, draft, store, rows, tmp_path, processor):
    """``moved(one, other)`` -> a run on a processor where ``one`` type is fast, and a trainer that goes on with the
    same, killed after a checkpoint, where ``other`` is."""

    def make(one: str, other: str) -> tuple[Trainer, Trainer]:
        processor(one)
        whole = trainer(target, draft, store, rows, tmp_path / f"{one} whole")
        whole.run()
        with pytest.raises(KilledError):
            trainer(target, draft, store, rows, tmp_path / one).run(AtStepFive())
        processor(other)
        return whole, trainer(target, draft, store, rows, tmp_path / one)

    return make


def losses(work: Trainer) -> list[float]:
    """The losses along the run, to the last bit: they depend on every step before."""
    return [json.loads(line)["loss"] for line in work.loop.curve.read_text().splitlines()]


def test_a_run_keeps_its_arithmetic_on_another_processor(moved):
    """Muon's type, and the precision of the losses, are those that the run was begun with."""
    runs = []
    for kinds in (("float32", "bfloat16"), ("bfloat16", "float32")):
        whole, later = moved(*kinds)
        later.loop.precision = "bfloat16"  # as if the target had been opened in another type
        later.run()
        assert later.loop.precision == "float32" and losses(whole) == losses(later)
        runs.append(losses(whole))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=0.01) and runs[0] != runs[1], "the type makes a difference"


def test_a_checkpoint_of_before_muon_had_a_choice_goes_on_in_bfloat16(moved):
    whole, later = moved("bfloat16", "float32")
    path = later.loop.checkpoint.path
    stored = json.loads(path.read_text())
    assert stored["state"].pop("arithmetic") == {"precision": "float32", "muon": "bfloat16"}
    del stored["seal"]  # nor was there one then
    path.write_text(json.dumps(stored))
    later.run()
    assert losses(whole) == losses(later)


def test_low_rank_updates_are_aimed_once_before_the_first_step(target, draft, store, rows, tmp_path):
    """At the start the draft says what it said; what aiming cost is counted; a trained part is not aimed again."""
    work = trainer(target, draft, store, rows, tmp_path / "aimed", "lora" + AIMED)
    drawn = {n: p.detach().clone() for n, p in work.trained}
    batches = list(islice(work.batches(0), STEPS))
    before = [float(work.objective(batch).detach()) for batch, _ in batches]
    assert aim(work) == sum(size for _, size in batches)
    assert [float(work.objective(batch).detach()) for batch, _ in batches] == pytest.approx(before)
    turned = {n for n, p in work.trained if not torch.equal(p.detach(), drawn[n])}
    assert turned == {n for n in drawn if n.endswith("inner")}
    assert aim(work) == 0
    result = trainer(target, draft, store, rows, tmp_path / "run", "lora" + AIMED).run()
    plain = trainer(target, draft, store, rows, tmp_path / "plain", "fc").run()
    assert result.anchors == plain.anchors + sum(size for _, size in batches)
    again = trainer(target, draft, store, rows, tmp_path / "run", "lora" + AIMED)
    assert again.run() == result, "what a checkpoint brought back is not aimed again"


def test_a_run_directory_of_another_draft_is_refused(target, draft, store, rows, tmp_path):
    """The names of what is trained are the same, and the weights would be put into another draft."""
    ready = {
        name: prepare(copy.deepcopy(draft), "lora", size)[0]
        for name, size in {
            "rank 4": PrivateSize(rank=4),
            "rank 8": PrivateSize(rank=8),
            "alpha": PrivateSize(rank=4, alpha=8),
        }.items()
    }

    def work(name: str, origin: str = "old") -> Trainer:
        return Trainer(ready[name], target, store, rows[:18], rows[18:], CONFIG, tmp_path / "run", origin)

    work("rank 4").run()
    assert work("rank 4").run().steps
    for name, origin, what in (
        ("rank 8", "old", "draft, shapes"),
        ("alpha", "old", "draft"),
        ("rank 4", "new", "old draft"),
    ):
        with pytest.raises(UserError, match=f"belongs to a run with another {what}; give"):
            work(name, origin)


@pytest.mark.parametrize("named", ["", None])
def test_a_run_that_did_not_name_its_old_draft_goes_on(named, target, draft, store, rows, tmp_path):
    def work(origin: str) -> Trainer:
        return Trainer(copy.deepcopy(draft), target, store, rows[:18], rows[18:], CONFIG, tmp_path / "run", origin)

    result = work("").run()
    path = tmp_path / "run" / "state.json"
    stored = json.loads(path.read_text())
    del stored["identity"]["old draft"], stored["seal"]  # what was written before there were checksums
    stored["identity"] |= {} if named is None else {"old draft": named}
    path.write_text(json.dumps(stored))
    for place in path.parent.glob("*.safetensors"):
        save_file(load_file(place), place)
    curve = path.with_name("curve.jsonl")
    lines = [unsealed(json.loads(line), curve) for line in curve.read_text().splitlines()]
    curve.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = work("some draft")
    assert again.run() == result
    optimizers = make_optimizers(again.trained, CONFIG.optimizer, CONFIG.weight_decay)
    again.loop.save(optimizers, stored["state"])  # what it goes on to write is its own at the next start too
    again.loop.checkpoint.save_best(again.trained, stored["state"]["best_step"])
    assert work("some draft").run() == result
    stored["identity"]["old draft"] = "another"
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="another old draft"):
        work("some draft")


def test_what_ended_before_is_read_and_not_paid_for_again(target, draft, store, rows, tmp_path):
    def run() -> tuple[provenance.Ledger, TrainResult]:
        ledger = provenance.Ledger()
        return ledger, run_training(trainer(target, draft, store, rows, tmp_path / "run"), Log(ledger, lambda _: None))

    (first, result), (second, again) = run(), run()
    assert again == result and first.stages[0].tokens == result.anchors > 0 and first.stages[0].flops > 0
    assert not second.stages[0].tokens and not second.stages[0].flops


def flip(path: Path, place: int) -> None:
    """Change one byte of a file, counted from its end where ``place`` is negative."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["state.json", "best.safetensors", "state-*.safetensors"])
def test_a_damaged_checkpoint_is_one_clear_line(file, target, draft, store, rows, tmp_path):
    trainer(target, draft, store, rows, tmp_path / "run").run()
    place = next((tmp_path / "run").glob(file))
    place.write_bytes(place.read_bytes()[:40])
    with pytest.raises(UserError, match="is not JSON|missing or damaged"):
        trainer(target, draft, store, rows, tmp_path / "run").run()


@pytest.mark.parametrize("file", ["best.safetensors", "state-*.safetensors"])
@pytest.mark.parametrize("byte", [20, -1])  # in the header, in the last number
def test_one_changed_byte_of_a_checkpoint_is_named(file, byte, target, draft, store, rows, tmp_path):
    trainer(target, draft, store, rows, tmp_path / "run").run()
    place = next((tmp_path / "run").glob(file))
    flip(place, byte)
    with pytest.raises(UserError, match=f"{place.name} is .*damaged.*delete the folder {tmp_path / 'run'}"):
        trainer(target, draft, store, rows, tmp_path / "run").run()


def test_one_changed_digit_of_a_checkpoint_is_named(target, draft, store, rows, tmp_path):
    trainer(target, draft, store, rows, tmp_path / "run").run()
    path = tmp_path / "run" / "state.json"
    value = json.loads(path.read_text())
    value["state"]["step"] -= 1
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="state.json is damaged"):
        trainer(target, draft, store, rows, tmp_path / "run")


def test_a_checkpoint_of_the_days_before_checksums_goes_on(target, draft, store, rows, tmp_path):
    first = trainer(target, draft, store, rows, tmp_path / "run").run()
    path = tmp_path / "run" / "state.json"
    value = json.loads(path.read_text())
    del value["seal"]
    path.write_text(json.dumps(value, indent=2))
    for place in (tmp_path / "run").glob("*.safetensors"):
        save_file(load_file(place), place)  # no fingerprint in the header
    assert trainer(target, draft, store, rows, tmp_path / "run").run() == first


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(target, draft, store, rows, tmp_path, monkeypatch):
    folder, saved = tmp_path / "run", []

    def fills_up(path):
        if str(path).endswith(f".safetensors.{os.getpid()}.redraft-new"):
            saved.append(path)
            if len(saved) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        known(path)

    known = files.sync
    monkeypatch.setattr(files, "sync", fills_up)
    with pytest.raises(UserError, match=r"no room on the disk for .*safetensors: [\d.]+ MB are free"):
        trainer(target, draft, store, rows, folder).run()
    assert not list(folder.glob(".*")), "nothing half-written is left"
    monkeypatch.undo()
    whole = trainer(target, draft, store, rows, tmp_path / "whole").run()
    again = trainer(target, draft, store, rows, folder).run()
    assert again.history == whole.history


def test_a_curve_that_is_gone_or_torn_is_gone_on_with(target, draft, store, rows, tmp_path):
    trainer(target, draft, store, rows, tmp_path / "run").run()
    curve = tmp_path / "run" / "curve.jsonl"
    whole = curve.read_text()
    curve.write_text(whole + '{"step": 99, "lo')
    trainer(target, draft, store, rows, tmp_path / "run").run()
    assert curve.read_text() == whole
    curve.unlink()
    trainer(target, draft, store, rows, tmp_path / "run").run()
    other = replace(CONFIG, learning_rate=2e-3)
    trainer(target, draft, store, rows, tmp_path / "other", config=other).run()
    curve.write_bytes((tmp_path / "other" / "curve.jsonl").read_bytes())
    with pytest.raises(UserError, match="curve.jsonl:1 belongs to another run; delete"):
        trainer(target, draft, store, rows, tmp_path / "run").run()


@pytest.mark.parametrize(
    "wrong", [{"optimizer": "sgd"}, {"clip": 0}, {"weight_decay": -1}, {"loss": "kll"}, {"warmup": 1.0}]
)
def test_settings_that_cannot_be_are_refused_when_they_are_read(wrong):
    with pytest.raises(UserError, match="unknown|must be"):
        TrainConfig(**wrong)


def test_a_result_of_training_has_figures(tmp_path):
    told = {"best_tau": 1.5, "start_tau": 1.2, "steps": 4, "anchors": 40, "seconds": 1.0, "stopped_early": False}
    assert typed(TrainResult, told | {"history": [[0, 1.2], [4, 1.5]]}, "train.json", "delete it").history[1] == (
        4,
        1.5,
    )
    with pytest.raises(UserError, match=r"train\.json: history\.1\.1"):
        typed(TrainResult, told | {"history": [[0, 1.2], [4, float("nan")]]}, "train.json", "delete it")


def test_only_float32_is_trained(target, draft, store, rows, tmp_path):
    ready, _ = prepare(copy.deepcopy(draft).bfloat16(), "fc", PrivateSize())
    with pytest.raises(ValueError, match="float32"):
        Trainer(ready, target, store, rows, rows, CONFIG, tmp_path / "run")


def test_a_run_directory_of_another_config_is_refused(target, draft, store, rows, tmp_path):
    trainer(target, draft, store, rows, tmp_path / "run").run()
    with pytest.raises(UserError, match="another config"):
        trainer(target, draft, store, rows, tmp_path / "run", config=replace(CONFIG, seed=1))
    with pytest.raises(UserError, match="another draft, shapes, trained"):
        trainer(target, draft, store, rows, tmp_path / "run", method="fc")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(target, draft, store, rows, tmp_path, monkeypatch):
    work = trainer(target, draft, store, rows, tmp_path / "run")
    parameter = work.trained[0][1]
    monkeypatch.setattr(type(work.objective), "__call__", lambda self, batch: parameter.sum() * float("nan"))
    with pytest.raises(UserError, match="loss became nan at step 0"):
        work.run()
    assert (tmp_path / "run" / "state.json").exists()
    assert all(torch.isfinite(p).all() for p in work.draft.parameters())


def test_a_gradient_that_is_not_finite_stops_before_a_weight_moves(target, draft, store, rows, tmp_path, monkeypatch):
    """A finite loss may have an infinite gradient: clipping would spread it over every weight."""
    work = trainer(target, draft, store, rows, tmp_path / "run")
    weight = work.trained[0][1]
    steep = lambda self, batch: (weight - weight.detach()).abs().sqrt().sum()  # noqa: E731
    monkeypatch.setattr(type(work.objective), "__call__", steep)
    before = [p.detach().clone() for _, p in work.trained]
    with pytest.raises(
        UserError, match=r"gradient became (inf|nan) at step 0 .*last good checkpoint is that of step 0"
    ):
        work.run()
    assert all(torch.equal(a, p.detach()) for a, (_, p) in zip(before, work.trained, strict=True))


def test_a_run_saves_between_evaluations(target, draft, store, rows, tmp_path):
    """A kill costs what came after the last save, not everything since the last evaluation."""
    config = replace(CONFIG, save_seconds=0.0, evaluate_every=1000)

    class Stop(BaseException):
        pass

    class Stopper:
        def update(self, done, **fields) -> None:
            if fields["step"] == 5:
                raise Stop

    work = trainer(target, draft, store, rows, tmp_path / "run", config=config)
    with pytest.raises(Stop):
        work.run(Stopper())
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"]["step"] == 4


def test_early_stop_keeps_the_best_weights(target, draft, store, rows, tmp_path):
    config = replace(CONFIG, learning_rate=10.0, patience=1, epochs=50)
    work = trainer(target, draft, store, rows, tmp_path / "run", config=config)
    result = work.run()
    assert result.stopped_early
    assert work.evaluate() == pytest.approx(result.best_tau)
    assert result.best_tau == max(tau for _, tau in result.history)


def test_batches_cover_every_row_once_an_epoch(rows):
    for epoch in range(3):
        keys = [r.key for batch in batch_order(rows, CONFIG, epoch) for r in batch]
        assert sorted(keys) == sorted(r.key for r in rows if anchors(r))
    orders = [[[r.key for r in batch] for batch in batch_order(rows, CONFIG, epoch)] for epoch in range(8)]
    assert len({str(order) for order in orders}) > 1
    assert batch_order(rows, CONFIG, 1) == batch_order(list(reversed(rows)), CONFIG, 1)


def test_no_rows_to_train_on_is_one_clear_line(target, draft, store, rows, tmp_path):
    short = [replace(r, response_ids=r.response_ids[:1]) for r in rows]
    ready, _ = prepare(copy.deepcopy(draft), "fc", PrivateSize(16))
    with pytest.raises(UserError, match="two or more response tokens"):
        Trainer(ready, target, store, short, rows, CONFIG, tmp_path / "run")
