"""Counters of servers with several engines, schedulers and processes; and counts that cannot be."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.errors import UserError
from redraft.evaluate.counters import Counts, contradiction, difference, drafted_share, parse_metrics
from redraft.reports.load import read_bench
from redraft.reports.tables import acceptance_table, bench_table

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("server_rig.py"))))
PROMPTS, LIMIT, run, plans = RIG.PROMPTS, RIG.LIMIT, RIG.run, RIG.plans

Make = Callable[..., Any]
ROUNDS = "vllm:spec_decode_num_drafts_total"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that will never agree are not waited for as long as real ones."""
    monkeypatch.setattr("redraft.evaluate.load.SETTLE_SECONDS", 0.1)


def lines(*samples: str) -> str:
    return "".join(f"{sample}\n" for sample in samples)


# -- several engines, schedulers and processes -----------------------------------------------------------------------
def test_engines_of_a_data_parallel_server_are_added_up() -> None:
    text = lines(*(f'{ROUNDS}{{engine="{i}",model_name="m"}} {10 + i}' for i in range(4)))
    assert parse_metrics(text).rounds == 10 + 11 + 12 + 13


def test_schedulers_that_share_the_work_count_it_once() -> None:
    name = "sglang:spec_verify_calls_total"
    shared = [f'{name}{{model_name="m",dp_rank="{d}",tp_rank="{t}",pp_rank="0"}} {v}' for d, t, v in
              (("0", "0", 7), ("0", "1", 7), ("1", "2", 5), ("1", "3", 4))]  # fmt: skip
    assert parse_metrics(lines(*shared)).rounds == 7 + 5
    assert parse_metrics(lines(f'{name}{{tp_rank="0"}} 7', f'{name}{{tp_rank="1"}} 7')).rounds == 7


def test_two_spellings_are_one_counter_and_two_samples_alike_are_refused() -> None:
    bare = ROUNDS.removesuffix("_total")
    assert parse_metrics(lines(f'{bare}{{engine="0"}} 6', f'{ROUNDS}{{engine="0"}} 6')).rounds == 6
    with pytest.raises(UserError, match=r'show vllm:.*_total\{engine="0"\} twice: counters of several processes') as it:
        parse_metrics(lines(f'{ROUNDS}{{engine="0"}} 6', f'{ROUNDS}{{engine="0"}} 2'))
    assert "\n" not in str(it.value)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1"])
def test_values_that_no_counter_has(value: str) -> None:
    with pytest.raises(UserError, match="not in the Prometheus text format: .* is "):
        parse_metrics(lines(f"{ROUNDS} {value}"))


def test_a_position_that_is_none_is_refused() -> None:
    for label in ("", '{position="first"}'):
        with pytest.raises(UserError, match="not in the Prometheus text format"):
            parse_metrics(lines(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{label} 3"))


def reading(*engines: int, made: float = 5.0) -> Any:
    samples = [f'{ROUNDS}{{engine="{i}"}} {n}' for i, n in enumerate(engines)]
    return parse_metrics(lines(*samples, f'vllm:spec_decode_num_drafts_created{{engine="0"}} {made}'))


def test_one_engine_of_several_that_begins_anew_is_noticed_although_the_sum_grows() -> None:
    assert difference(reading(50, 50), reading(60, 55), "x").rounds == 15
    assert difference(reading(50), reading(60, 55), "x").rounds == 65  # an engine's first sample
    for after in (reading(3, 120), reading(160), reading(60, 60, made=6.0)):
        with pytest.raises(UserError, match="went backwards: it was restarted; measure again .where several processes"):
            difference(reading(50, 50), after, "x")


# -- counts that cannot be -------------------------------------------------------------------------------------------
def counts(rounds: int = 10, drafted: int | None = 30, accepted: int | None = 12, places: Any = (6, 4, 2)) -> Counts:
    return Counts("vllm:", rounds, drafted, accepted, list(places), None, None)


def test_counts_that_contradict_each_other() -> None:
    assert contradiction(counts()) == "" == contradiction(counts(drafted=None, accepted=None, places=()))
    assert "13 accepted of 12 drafted" in contradiction(counts(drafted=12, accepted=13, places=(7, 4, 2)))
    assert "12 accepted tokens by position, 13 in all" in contradiction(counts(accepted=13))
    assert "more tokens accepted at a position" in contradiction(counts(places=(4, 6, 2)))
    assert "10 rounds, then [11, 1, 0]" in contradiction(counts(places=(11, 1, 0)))


def test_how_much_of_its_positions_a_server_drafted() -> None:
    assert drafted_share(counts()) == 1 and drafted_share(counts(drafted=15)) == 0.5
    assert drafted_share(counts(drafted=None)) is None and drafted_share(counts(rounds=0)) is None


def test_a_server_whose_counters_contradict_each_other(fake: Make) -> None:
    server = fake()
    count = server.count

    def twice(tokens: int, accepted: list[int]) -> None:
        count(tokens, accepted)
        server.accepted += 1

    server.count = twice
    with pytest.raises(UserError, match="the server new at .* contradict each other: .* by position"):
        run({"new": server})


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_counters_of_one_process_of_several_are_refused(fake: Make, engine: str, concurrency: int) -> None:
    server = fake(engine)
    count, turn = server.count, 0

    def every_other(tokens: int, accepted: list[int]) -> None:
        nonlocal turn
        turn += 1
        if turn % 2:
            count(tokens, accepted)

    server.count = every_other
    with pytest.raises(UserError, match="tokens that it sent: they are not those of all its processes"):
        run({"new": server}, concurrencies=(concurrency,))


def test_counters_that_vanish_half_way(fake: Make) -> None:
    server = fake()
    times = 0

    def vanish(body: dict[str, Any]) -> None:
        nonlocal times
        times += body["max_tokens"] == LIMIT
        if times == 4:
            server.engine = "bare"

    server.rule = vanish
    with pytest.raises(UserError, match="stopped giving its counters: .* status 404"):
        run({"new": server})


# -- what a reader must know -----------------------------------------------------------------------------------------
def test_rounds_of_failed_requests_are_not_taken_for_those_of_answers(fake: Make) -> None:
    def spoil(server: Any) -> Any:
        bad = PROMPTS[5].ids
        server.rule = lambda body: "no end" if body["prompt"] == bad and body["max_tokens"] == LIMIT else None
        return server

    options = {"concurrencies": (2,), "tolerated": 0.2}
    with pytest.raises(
        UserError, match="1 requests to the server new at .* failed at concurrency 2.*tau cannot be told"
    ):
        run({"new": spoil(fake("sglang"))}, **options)
    result = run({"new": spoil(fake("vllm"))}, **options)
    assert "tau_after_cut" not in result["drafts"]["new"]
    rounds, accepted = sum(len(a) for _, a in plans()), sum(sum(a) for _, a in plans())
    assert result["drafts"]["new"]["tau_pooled"]["value"] == pytest.approx(1 + accepted / rounds)
    assert any("1 requests failed; their time and their rounds" in note for note in result["server"]["notes"])


def test_identical_texts_are_counted_of_those_compared(fake: Make, tmp_path: Path) -> None:
    new = fake()
    new.rule = lambda body: (400, "no") if body["prompt"] == PROMPTS[5].ids and body["max_tokens"] == LIMIT else None
    result = run({"plain": fake("vllm", False), "new": new}, tolerated=0.2)
    draft = result["drafts"]["new"]
    assert (draft["compared"], draft["identical_to_plain"], result["setup"]["prompts"]) == (7, 7, 8)
    assert "7 of 7" in list(bench_table(result).columns[-1].cells)


def test_rounds_that_draft_less_than_they_may_are_noted(fake: Make) -> None:
    server = fake()
    whole = server.metrics

    def fewer() -> str:
        now = 2 * server.rounds  # of three positions two are drafted
        return "".join(
            f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {now}\n'
            if line.startswith("vllm:spec_decode_num_draft_tokens_total") and 'engine="0"' in line
            else ""
            if line.startswith("vllm:spec_decode_num_draft_tokens_total")
            else f"{line}\n"
            for line in whole().splitlines()
        )

    server.metrics = fewer
    server.count = lambda tokens, accepted: type(server).count(server, tokens, [min(2, a) for a in accepted])
    notes = run({"new": server})["server"]["notes"]
    assert any("rounds drafted 67% of their positions on average" in note for note in notes)


def test_answers_that_go_on_behind_an_end_token_are_noted(fake: Make) -> None:
    ids = [RIG.FAKE.plan(prompt.ids, LIMIT)[0] for prompt in PROMPTS]
    end = ids[0][1]
    behind = sum(end in answer[:-1] for answer in ids)
    notes = run({"new": fake()}, eos_ids=(end,))["server"]["notes"]
    said = f"{behind} answers go on behind an end token of the target; does the server know them all?"
    assert notes == [f"new at concurrency 1: {said}"]
    assert run({"new": fake()}, eos_ids=(2,))["server"]["notes"] == []


def test_a_level_that_runs_out_of_prompts_is_noted(fake: Make) -> None:
    server = fake()
    last = PROMPTS[-1].ids

    def slow(body: dict[str, Any]) -> None:
        if body["prompt"] == last and body["max_tokens"] == LIMIT:
            server.release.wait(0.6)

    server.rule = slow
    result = run({"new": server}, concurrencies=(4,))
    assert 1 <= result["server"]["levels"][0]["new"]["in_flight"] < 2.8
    assert any("requests were under way on average" in note for note in result["server"]["notes"])


def test_plain_decoding_alone_has_tables_and_no_page(fake: Make, tmp_path: Path) -> None:
    result = run({"plain": fake("vllm", False)})
    assert len(bench_table(result).rows) == 1 and acceptance_table(result).row_count == 0
    (tmp_path / "r.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="it has no drafts, only plain decoding"):
        read_bench(tmp_path / "r.json")
