"""Rows that a step does not hold: spans hold every position once, and see all that stands in front of them."""

from __future__ import annotations

import copy
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from redraft.adaptation.core import run_training
from redraft.adaptation.runs import Log
from redraft.data.store import Row
from redraft.drafts.eagle.unroll import collate, supervised
from redraft.drafts.groups import prepare
from redraft.errors import UserError
from redraft.provenance import Ledger
from redraft.registries import LOSSES
from redraft.rows import Span, anchors, cut
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.training.trainer import Trainer, batch_order

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("training_rig.py"))))
target, rows, draft, store = RIG.target, RIG.rows, RIG.draft, RIG.store
J = 3
CONFIG = TrainConfig(
    epochs=2, batch_anchors=9, evaluate_every=4, learning_rate=3e-3, unroll=J, optimizer="adamw", patience=0
)


def test_spans_hold_every_position_once_and_all_that_stands_in_front() -> None:
    row = Row("long", [1, 2, 3], list(range(10, 33)), 0.0, 0, 1.0, 0, "length", "hash")
    short = Row("short", [1], [5, 6, 7], 0.0, 0, 1.0, 0, "length", "hash")
    pieces = cut([short, row], 6)
    assert pieces[0] is short and [piece.key for piece in pieces[1:]] == [row.key] * 4
    assert [anchors(piece) for piece in pieces[1:]] == [5, 6, 5, 6]
    whole = [*row.prompt_ids, *row.response_ids]
    for piece in pieces[1:]:
        seen = [*piece.prompt_ids, *piece.response_ids]
        assert seen == whole[: len(seen)]
    # A piece's first response token is the last supervised one of the piece before.
    assert [i for piece in pieces[1:] for i in piece.response_ids[1:]] == list(row.response_ids[1:])


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", ["kl", "tvdpp", "acceptance"])
def test_the_loss_of_a_row_is_that_of_its_spans(name, weighed, target, draft, store, rows) -> None:
    """At every step of every position, also where a chain goes on into the next span."""
    row = max(rows, key=anchors)
    pieces = cut([row], 7)
    assert len(pieces) > 2 and all(isinstance(piece, Span) for piece in pieces)
    generator = torch.Generator().manual_seed(1)
    weights = {row.key: torch.rand(anchors(row), J, generator=generator)} if weighed else None
    objective = draft.objective(target, TrainConfig(unroll=J, loss=name))
    batches = [collate([row], store, J, weights), collate(pieces, store, J, weights)]
    counts = [supervised(draft, batch).sum(0) for batch in batches]
    assert torch.equal(*counts) and int(counts[0][-1]) > 0
    losses = [objective(batch) for batch in batches]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)
    trained = [p for p in draft.parameters() if p.requires_grad]
    for one, other in zip(*(torch.autograd.grad(loss, trained) for loss in losses), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def trainer(target, draft, store, rows, folder, config=CONFIG) -> Trainer:
    ready, _ = prepare(copy.deepcopy(draft), "fc", PrivateSize())
    return Trainer(ready, target, store, rows[:9], rows[9:12], config, folder)


def test_a_run_counts_every_position_once_and_says_how_many_rows_were_cut(target, draft, store, rows, tmp_path):
    work = trainer(target, draft, store, rows, tmp_path / "run")
    long = [row for row in rows[:9] if anchors(row) > 9]
    assert long and work.cut_rows == len(long)
    batches = batch_order(work.pieces, CONFIG, 0)
    assert all(sum(map(anchors, batch)) <= 9 for batch in batches)
    lines: list[str] = []
    result = run_training(work, Log(Ledger(tmp_path / "ledger.json"), lines.append))
    assert result.anchors == 2 * sum(map(anchors, rows[:9]))
    said = [line for line in lines if "spans" in line]
    assert len(said) == 1 and f"{len(long)} of 9 rows have more than the 9 supervised positions" in said[0]


def test_a_killed_run_in_spans_ends_with_the_same_bits(target, draft, store, rows, tmp_path) -> None:
    whole = trainer(target, draft, store, rows, tmp_path / "whole")
    whole.run()
    parts = [trainer(target, draft, store, rows, tmp_path / "parts") for _ in range(2)]
    done, steps = 0, parts[0].loop.advance

    def killed(*given) -> None:
        nonlocal done
        done += 1
        if done == 7:
            raise KeyboardInterrupt
        steps(*given)

    parts[0].loop.advance = killed
    with pytest.raises(KeyboardInterrupt):
        parts[0].run()
    parts[1].run()
    for one, other in zip(whole.draft.parameters(), parts[1].draft.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_begun_with_whole_rows_goes_on_with_whole_rows(target, draft, store, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("redraft.training.trainer.cut", lambda rows, longest: list(rows))
    old = trainer(target, draft, store, rows, tmp_path / "run")
    old.run()
    monkeypatch.undo()
    again = trainer(target, draft, store, rows, tmp_path / "run")
    assert not again.cut_rows and not again.said_of_spans()
    again.run()
    assert again.loop.done_before
    with pytest.raises(UserError, match="another config"):
        trainer(target, draft, store, rows, tmp_path / "run", replace(CONFIG, batch_anchors=8))


def test_losses_that_are_not_named_above_are_of_the_same_kinds() -> None:
    """Plain, with statistics, over chains: one of each is enough."""
    kinds = {(hasattr(loss, "statistics"), hasattr(loss, "chain")) for _, loss in LOSSES.items()}
    assert kinds == {(False, False), (True, False), (False, True)}
