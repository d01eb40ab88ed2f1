"""Coverage counted by hand and against the simulator, refreshes that keep what they should, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from redraft.acceptance.simulate import simulate_greedy_chain, tau_of
from redraft.artifact import tensors_hash, write_tensors
from redraft.cli.main import app
from redraft.data.store import Row, RowWriter
from redraft.drafts.eagle3 import Eagle3Draft, fresh_draft
from redraft.drafts.files import META_FILE, PRIVATE_FILE, load_draft, load_private, save_draft, save_private
from redraft.drafts.groups import attach_low_rank
from redraft.drafts.walks import run_lengths
from redraft.errors import UserError
from redraft.loading import tokenizer_hash
from redraft.starts.apply import StartContext
from redraft.starts.vocabulary import Refresh, choose_swaps, coverage, refresh_vocabulary
from redraft.target import Target

IDS = [2, *range(10, 50)]


def make_row(name: str, response: list[int]) -> Row:
    return Row(name, [4, 5, 6], response, 0.0, 0, 1.0, 0, "length", "hash")


def text(seed: int = 0, low: int = 5, high: int = 60, count: int = 12) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    return [
        make_row(f"{seed}-{i}", torch.randint(low, high, (15,), generator=generator).tolist()) for i in range(count)
    ]


@pytest.fixture
def target(tiny_target: Callable[..., Target]) -> Target:
    return tiny_target(taps=(1, 3, 5))


@pytest.fixture
def draft(target: Target) -> Eagle3Draft:
    return fresh_draft(target, IDS, intermediate=32)


# -- coverage ----------------------------------------------------------------------------------------------------------
def test_coverage_by_hand(draft: Eagle3Draft) -> None:
    """The first token comes from prefill; of the others, 60 twice and 70 once cannot be said."""
    rows = [make_row("a", [70, 10, 11, 60, 12]), make_row("b", [10, 60, 13, 14, 70, 15]), make_row("c", [10])]
    found = coverage(draft, rows, gamma=2)
    assert (found.tokens, found.missing, found.size) == (9, ((60, 2), (70, 1)), 41)
    assert found.share == pytest.approx(6 / 9)
    # Run lengths, cut at two: 2 1 0 1 and 0 2 1 0 1; seven anchors have two tokens left.
    assert found.positions == pytest.approx((6 / 9, 2 / 7))
    # Rounds: 2+1, 1 and 0+1, 2+1, 1; without a limit 2+1, 1 and 2+1, 2.
    assert coverage(draft, rows, gamma=6).positions[-1] is None, "nothing is a share of nothing"
    assert found.tau_cap == pytest.approx(9 / 5) and found.tau_whole == pytest.approx(9 / 4)


def refresh(draft: Eagle3Draft, target: Target, rows: Sequence[Row]) -> tuple[Any, Refresh]:
    found = refresh_vocabulary(draft, StartContext(target, rows=rows))
    return found.draft, found


def test_the_cap_is_reached_by_a_draft_that_is_right_wherever_it_can_be(
    target: Target, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rounds as the simulator walks when every proposal that can be right is."""

    class Oracle:
        def runs(self, rows: Sequence[Row], store: object, gamma: int) -> Iterator[tuple[Row, list[int]]]:
            for row in rows:
                yield row, run_lengths(draft.t2d[torch.tensor(row.response_ids[1:])].tolist(), gamma)

    rows = text()
    monkeypatch.setattr(draft, "walk", lambda target: Oracle())
    rounds = simulate_greedy_chain(draft, target, rows, None, 4)
    assert coverage(draft, rows, 4).tau_cap == pytest.approx(tau_of(rounds, rows))


def test_a_whole_vocabulary_covers_everything(target: Target) -> None:
    whole = fresh_draft(target, list(range(target.vocab_size)), intermediate=32)
    found = coverage(whole, text())
    assert found.share == 1 and found.missing == () and found.tau_cap == found.tau_whole
    same, report = refresh(whole, target, text())
    assert same is whole and "the whole of it" in report.notes[0]


def test_bad_rows_are_one_line(draft: Eagle3Draft) -> None:
    with pytest.raises(UserError, match="no token that a draft is asked for"):
        coverage(draft, [make_row("a", [10])])
    with pytest.raises(UserError, match="token id 500"):
        coverage(draft, [make_row("a", [10, 500])])


# -- swaps -------------------------------------------------------------------------------------------------------------
def member(*ids: int) -> torch.Tensor:
    mask = torch.zeros(20, dtype=torch.bool)
    mask[list(ids)] = True
    return mask


def test_the_least_used_leave_for_those_that_are_used_more() -> None:
    rows = [make_row("a", [0, 9, 9, 9, 8, 8, 7, 1, 1, 2])]
    # 1 twice, 2 once, 3 and 4 never: 9 takes the place of 4 (the higher id), 8 that of 3; 7 gains nothing over 2.
    assert choose_swaps(member(1, 2, 3, 4), rows, [], ()) == ([9, 8], [4, 3])
    assert choose_swaps(member(1, 2, 3, 4), rows, [make_row("g", [0, 4])], ()) == ([9, 8], [3, 4])
    assert choose_swaps(member(1, 2, 3, 4), rows, [], (4, 3)) == ([9], [2])
    assert choose_swaps(member(1, 2, 7, 8, 9), rows, [], ()) == ([], [])


def test_a_refresh_carries_rows_and_covers_more(target: Target, draft: Eagle3Draft) -> None:
    rows = text()
    with torch.no_grad():
        draft.lm_head.weight += 0.01 * torch.randn(
            draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    old = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    renewed, report = refresh(draft, target, rows)
    ids = renewed.vocabulary()
    assert len(ids) == len(IDS) and bool((ids[1:] > ids[:-1]).all()) and 2 in ids
    assert torch.equal(renewed.t2d.nonzero().flatten(), ids)
    assert report.after.share > report.before.share and report.after.tau_cap >= report.before.tau_cap
    assert set(ids.tolist()) == set(IDS) - set(report.evicted) | set(report.added)
    # Logits of kept tokens are the same bits; the draft that was given is as it was.
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    kept = sorted(set(IDS) - set(report.evicted))
    before = draft.lm_head.weight[[IDS.index(id) for id in kept]]
    after = renewed.lm_head.weight[[ids.tolist().index(id) for id in kept]]
    assert torch.equal(before, after) and renewed.logits(states).shape == (3, len(IDS))
    assert all(torch.equal(tensor, old[name]) for name, tensor in draft.state_dict().items())
    # The head began as the target's, so a new row must nearly be the target's own.
    new = renewed.lm_head.weight[[ids.tolist().index(id) for id in report.added]]
    wanted = target.head.weight[list(report.added)]
    assert (new - wanted).norm() < 0.2 * wanted.norm()
    assert report.changed == ("lm_head.weight", "d2t", "t2d")


def test_a_covered_text_changes_nothing(target: Target, draft: Eagle3Draft) -> None:
    same, report = refresh(draft, target, text(low=10, high=50))
    assert (
        same is draft and report.added == () and report.before is report.after and "stays as it is" in report.notes[0]
    )


def test_a_head_with_a_private_update_is_refused(target: Target, draft: Eagle3Draft) -> None:
    with pytest.raises(UserError, match="merge the draft first"):
        refresh(attach_low_rank(draft, 2, ("lm_head",)), target, text())


def test_refreshed_drafts_are_stored_whole_and_as_a_private_part(
    tmp_path: Path, target: Target, draft: Eagle3Draft
) -> None:
    renewed, report = refresh(draft, target, text())
    save_draft(tmp_path / "whole", renewed, {})
    base_hash = tensors_hash(draft.state_dict())
    save_private(tmp_path / "part", renewed, report.changed, base_hash, {})
    for loaded in (load_draft(tmp_path / "whole")[0], load_private(tmp_path / "part", draft, base_hash)[0]):
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in renewed.state_dict().items())


def test_a_private_part_holds_only_the_new_rows_of_a_refreshed_head(
    tmp_path: Path, target: Target, draft: Eagle3Draft
) -> None:
    renewed, report = refresh(draft, target, text())
    assert 0 < len(report.added) < draft.config.draft_vocab_size / 2
    base, base_hash = draft.state_dict(), tensors_hash(draft.state_dict())
    names = [*report.changed, "norm.weight"]
    save_private(tmp_path / "part", renewed, names, base_hash, {}, base)
    stored = load_file(tmp_path / "part" / PRIVATE_FILE)
    assert "lm_head.weight" not in stored and len(stored["lm_head.weight.rows"]) <= len(report.added)
    loaded = load_private(tmp_path / "part", draft, base_hash)[0].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in renewed.state_dict().items())


@pytest.mark.parametrize("spoil", ["rows", "source", "beyond"])
def test_rows_that_do_not_fit_the_base_are_refused(
    spoil: str, tmp_path: Path, target: Target, draft: Eagle3Draft
) -> None:
    renewed, report = refresh(draft, target, text())
    base_hash, path = tensors_hash(draft.state_dict()), tmp_path / "part" / PRIVATE_FILE
    save_private(tmp_path / "part", renewed, report.changed, base_hash, {}, draft.state_dict())
    stored = load_file(path)
    if spoil == "rows":
        stored["lm_head.weight.rows"] = stored["lm_head.weight.rows"][:-1].clone()
    elif spoil == "source":
        del stored["lm_head.weight.source"]
    else:
        stored["lm_head.weight.source"][0] = 10_000
    write_tensors(path, stored)
    meta = tmp_path / "part" / META_FILE
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"content_hash": tensors_hash(stored)}))
    with pytest.raises(UserError, match="rows of lm_head.weight"):
        load_private(tmp_path / "part", draft, base_hash)


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path: Path, target: Target, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch) -> Path:
    target.save(tmp_path / "target")
    save_draft(tmp_path / "draft", draft, {"tokenizer_hash": tokenizer_hash(target.tokenizer)})
    for name, rows in (("responses", text()), ("covered", text(low=10, high=50)), ("general", text(seed=1))):
        with RowWriter(tmp_path / f"{name}.jsonl") as writer:
            writer.append(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, line.split())
    return result.output, result.exception


ASK = "vocabulary --target target --draft draft --dtype float32 --responses"


def test_the_command_reports(place: Path) -> None:
    out, error = run(f"{ASK} responses.jsonl --report report.json --general general.jsonl --worst 3")
    assert error is None and "can be said by the 41" in out and "missing tokens" in out
    report = json.loads((place / "report.json").read_text())
    assert report["schema"] == "redraft.vocabulary/1" and report["general"]["share"] < 1
    first = report["coverage"]["missing"][0]
    assert first["text"] and first["count"] >= report["coverage"]["missing"][-1]["count"]
    assert "refresh" not in report and first["share"] == first["count"] / report["coverage"]["tokens"]


def test_the_command_refreshes(place: Path) -> None:
    out, error = run(f"{ASK} responses.jsonl --refresh --out new --report report.json --general general.jsonl")
    assert error is None and "tokens replaced" in out
    renewed, meta = load_draft(place / "new")
    report = json.loads((place / "report.json").read_text())["refresh"]
    assert meta["vocabulary"]["replaced"] == report["replaced"] == len(set(renewed.vocabulary().tolist()) - set(IDS))
    assert report["coverage"]["share"] > 0.8 and {"id", "text"} == set(report["evicted"][0])
    again, error = run("vocabulary --target target --draft new --dtype float32 --responses responses.jsonl")
    assert error is None and f"{report['coverage']['share']:.2%} of" in again


def test_the_command_writes_no_draft_where_nothing_is_gained(place: Path) -> None:
    out, error = run(f"{ASK} covered.jsonl --refresh --out new")
    assert error is None and "stays as it is" in out and not (place / "new").exists()


def test_the_command_asks_for_both_or_none(place: Path) -> None:
    assert isinstance(run(f"{ASK} responses.jsonl --refresh")[1], UserError)
    assert isinstance(run(f"{ASK} responses.jsonl --out new")[1], UserError)
