"""The server benchmark against servers on the loopback whose every round is known beforehand."""

from __future__ import annotations

import json
import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.errors import UserError
from redraft.evaluate.counters import Reading, difference, parse_metrics
from redraft.reports.load import read_bench
from redraft.settings.sampler import Sampler

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("server_rig.py"))))
FAKE, PROMPTS, LIMIT, settings, run, plans = RIG.FAKE, RIG.PROMPTS, RIG.LIMIT, RIG.settings, RIG.run, RIG.plans

Make = Callable[..., Any]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that will never agree are not waited for as long as real ones."""
    monkeypatch.setattr("redraft.evaluate.load.SETTLE_SECONDS", 0.1)


# -- a paired run ----------------------------------------------------------------------------------------------------
def test_figures_come_from_differences_of_the_counters(fake: Make) -> None:
    plain, aligned = fake("vllm", False), fake("vllm")
    aligned.count(999, [3, 3, 3, 0, 1])  # what was counted before the run is nobody's business
    result = run({"plain": plain, "aligned": aligned})
    known = plans()
    rounds, accepted = sum(len(a) for _, a in known), sum(sum(a) for _, a in known)
    tokens = sum(t - 1 for t, _ in known)
    assert accepted + rounds > tokens, "the plan holds no round that the stop rule cuts"
    draft = result["drafts"]["aligned"]
    assert draft["tau_pooled"]["value"] == pytest.approx(1 + accepted / rounds)
    assert draft["tau_pooled"]["low"] < draft["tau_pooled"]["value"] < draft["tau_pooled"]["high"]
    assert "counters" in draft["tau_source"] and "cuts count in full" in draft["tau_source"]
    assert draft["tau_after_cut"]["value"] == pytest.approx(tokens / rounds)
    macro = sum(1 + sum(a) / len(a) for _, a in known) / len(known)
    assert draft["tau_macro"]["value"] == pytest.approx(macro)
    assert (draft["rounds"], draft["tokens"], draft["drafted"]) == (rounds, tokens, FAKE.GAMMA * rounds)
    taken = [sum(a > j for _, accepts in known for a in accepts) for j in range(FAKE.GAMMA)]
    assert draft["acceptance_unconditional"] == pytest.approx([t / rounds for t in taken])
    reached = [rounds, *taken]
    assert draft["acceptance_conditional"] == pytest.approx([t / r for t, r in zip(taken, reached, strict=False)])
    assert result["setup"] | {"gamma": 3, "batch": 1, "server": "vLLM 9.9", "sampler": "greedy"} == result["setup"]
    assert draft["identical_to_plain"] == len(PROMPTS)


def test_speed_is_paired_and_complete(fake: Make) -> None:
    result = run({"plain": fake("vllm", False), "aligned": fake()})
    lines = result["per_prompt"]
    assert [line["id"] for line in lines] == [p.id for p in PROMPTS] and lines[1]["task"] == "maths"
    speeds = {}
    for name, entries in (
        ("plain", [line["plain"] for line in lines]),
        ("aligned", [line["drafts"]["aligned"] for line in lines]),
    ):
        assert [e["tokens"] for e in entries] == [t for t, _ in plans()]
        assert all(0 < e["ttft"] <= e["seconds"] for e in entries)
        speeds[name] = sum(e["tokens"] for e in entries) / sum(e["seconds"] for e in entries)
    draft = result["drafts"]["aligned"]
    assert draft["tokens_per_second"]["value"] == pytest.approx(speeds["aligned"], rel=0.05)
    assert result["plain"]["fastest"] == "server"
    assert result["plain"]["server"]["tokens_per_second"]["value"] == pytest.approx(speeds["plain"], rel=0.05)
    ratio = draft["tokens_per_second"]["value"] / result["plain"]["server"]["tokens_per_second"]["value"]
    assert draft["speedup"]["value"] == pytest.approx(ratio)
    assert draft["by_task"].keys() == {"general", "maths"} and draft["by_task"]["maths"]["prompts"] == 4
    odd = [a for _, a in plans()[1::2]]
    tau = draft["by_task"]["maths"]["tau_pooled"]["value"]
    assert tau == pytest.approx(1 + sum(map(sum, odd)) / sum(map(len, odd)))
    assert [lines[0]["drafts"]["aligned"][key] for key in ("rounds", "accepted_tokens")] == [
        len(plans()[0][1]),
        sum(plans()[0][1]),
    ]


def test_every_server_gets_every_prompt_in_rotation_after_the_warm_up(fake: Make) -> None:
    order: list[tuple[str, list[int], int]] = []
    servers = {name: fake("vllm", name != "plain") for name in ("plain", "old", "new")}
    for name, server in servers.items():
        server.rule = lambda body, name=name: order.append((name, body["prompt"], body["max_tokens"]))
    result = run(servers, warmup=3, warmup_tokens=5)
    asked = [(name, ids) for name, ids, limit in order if limit == LIMIT]
    assert len(asked) == 3 * len(PROMPTS)
    names = list(servers)
    for index, prompt in enumerate(PROMPTS):
        turn = asked[3 * index : 3 * index + 3]
        assert [ids for _, ids in turn] == [prompt.ids] * 3
        first = index % 3
        assert [name for name, _ in turn] == names[first:] + names[:first]
    warm = [limit for _, _, limit in order if limit != LIMIT]
    assert sorted(warm) == [4] * 3 + [5] * 9
    assert "in rotation" in result["setup"]["order"]
    gain = result["gains"]["new over old"]
    assert gain["tau"]["value"] == pytest.approx(0) and gain["speed"]["low"] <= gain["speed"]["value"]


def test_the_sampler_and_a_seed_for_every_prompt_are_sent(fake: Make) -> None:
    server = fake()
    run({"new": server}, sampler=Sampler(0.7, 5, 0.9), seed=3)
    timed = [body for body in server.seen if body["max_tokens"] == LIMIT]
    assert {(b["temperature"], b["top_k"], b["top_p"], b["stream"]) for b in timed} == {(0.7, 5, 0.9, True)}
    assert timed[0]["stream_options"] == {"include_usage": True} and timed[0]["model"] == "tiny"
    assert len({b["seed"] for b in timed}) == len(PROMPTS)


def test_without_a_plain_server_nothing_is_said_of_speed_up(fake: Make) -> None:
    result = run({"new": fake()})
    draft = result["drafts"]["new"]
    assert "plain" not in result and not {"speedup", "identical_to_plain"} & draft.keys()
    assert "speedup" not in draft["by_task"]["maths"] and "plain" not in result["per_prompt"][0]
    assert draft["tau_pooled"]["value"] > 1


@pytest.mark.parametrize("with_plain", [True, False])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_report_reads_the_result(fake: Make, tmp_path: Path, with_plain: bool, engine: str) -> None:
    servers = {"old": fake(engine), "new": fake(engine)}
    if with_plain:
        servers = {"plain": fake(engine, False), **servers}
    path = tmp_path / "bench.json"
    result = run(servers, concurrencies=(1, 3))
    path.write_text(json.dumps(result, allow_nan=False))
    read = read_bench(path)
    assert (read.plain is not None) == with_plain and list(read.drafts) == ["old", "new"]
    assert read.drafts["new"].tau_pooled.value == result["drafts"]["new"]["tau_pooled"]["value"]
    assert read.server is not None and [level.concurrency for level in read.server.levels] == [1, 3]
    assert list(read.server.levels[1].contestants) == list(servers)
    load = read.server.levels[1].contestants["new"]
    assert load.ttft is not None and load.tau is not None and load.failed == 0


# -- levels ----------------------------------------------------------------------------------------------------------
def test_levels_keep_their_number_of_requests_under_way(fake: Make) -> None:
    server = fake()
    result = run({"plain": fake("vllm", False), "new": server}, concurrencies=(4, 1, 2))
    levels = {entry["concurrency"]: entry for entry in result["server"]["levels"]}
    assert list(levels) == [1, 2, 4] == result["setup"]["concurrency"]
    assert server.most <= 4
    known = plans()
    rounds, accepted = sum(len(a) for _, a in known), sum(sum(a) for _, a in known)
    for number, level in levels.items():
        new = level["new"]
        assert (new["requests"], new["failed"], new["rounds"], new["accepted"]) == (8, 0, rounds, accepted)
        assert new["tokens"] == sum(t for t, _ in known) and new["tau"]["value"] == pytest.approx(1 + accepted / rounds)
        rate = new["tokens"] / new["seconds"]
        assert new["tokens_per_second"]["value"] == pytest.approx(rate)
        assert (new["tau"]["low"] is None) == (new["speedup"]["low"] is None) == (number > 1)
        assert new["ttft"]["value"] == pytest.approx(new["ttft_ms"]["p50"] / 1000)
        assert new["ttft_ms"]["p50"] <= new["ttft_ms"]["p99"] <= new["request_ms"]["p99"]
        assert new["inter_token_ms"]["mean"] > 0
        plain = level["plain"]
        assert "tau" not in plain and "speedup" not in plain and plain["tokens"] == new["tokens"]
        assert new["speedup"]["value"] == pytest.approx(rate / plain["tokens_per_second"]["value"])


def test_n_workers_ask_at_a_time(fake: Make) -> None:
    server = fake()
    barrier = threading.Barrier(4)

    def together(body: dict[str, Any]) -> None:
        if body["max_tokens"] == LIMIT:
            barrier.wait(20)  # breaks, and fails the request, unless four are under way

    server.rule = together
    result = run({"new": server}, concurrencies=(4,))
    assert server.most in (4, 5)  # an answer may be there before the server has done with its request
    assert result["server"]["levels"][0]["new"]["failed"] == 0
    assert result["setup"]["batch"] == 4 and result["per_prompt"] == [] and result["gains"] == {}
    assert result["drafts"]["new"]["tau_pooled"]["low"] is None


def test_more_workers_than_prompts_are_refused(fake: Make) -> None:
    with pytest.raises(UserError, match="9 requests at a time need as many prompts, and there are 8"):
        run({"new": fake()}, concurrencies=(1, 9))
    for wrong in ((), (0,), (2, 2)):
        with pytest.raises(UserError, match="different whole numbers from 1 on"):
            settings(concurrencies=wrong)


# -- counters --------------------------------------------------------------------------------------------------------
def test_sglang_counts_rounds_and_the_client_counts_tokens(fake: Make) -> None:
    server = fake("sglang")
    result = run({"new": server}, concurrencies=(1, 2))
    known = plans()
    rounds, tokens = sum(len(a) for _, a in known), sum(t - 1 for t, _ in known)
    draft = result["drafts"]["new"]
    assert draft["tau_pooled"]["value"] == pytest.approx(tokens / rounds) and "SGLang" in draft["tau_source"]
    assert draft["tau_pooled"] == draft["tau_after_cut"]
    assert draft["acceptance_unconditional"] == [] and draft["drafted"] is None
    assert result["setup"]["shape"] == "as each server is set up" and "gamma" not in result["setup"]
    for level in result["server"]["levels"]:
        assert level["new"]["tau"]["value"] == pytest.approx(tokens / rounds)
        assert level["new"]["gauges"]["sglang:spec_accept_length"] == 2.5
        assert "not a difference" in level["new"]["gauges"]["what"]


@pytest.mark.parametrize(
    ("engine", "drafting", "reason"),
    [
        ("bare", True, "metrics are missing"),
        ("vllm", False, "vLLM shows no vllm:spec_decode_num_drafts: it runs without a draft"),
        ("gauges", True, "only gauges .sglang:spec_accept_length., of which no difference"),
    ],
)
def test_a_draft_needs_counters(fake: Make, engine: str, drafting: bool, reason: str) -> None:
    server = fake(engine, drafting)
    with pytest.raises(UserError, match=f"has no counters of speculation: .*{reason}.*call it plain=http"):
        run({"new": server})
    assert len(server.seen) <= 3, "measuring began although nothing could come of it"


def test_the_plain_server_needs_none(fake: Make) -> None:
    result = run({"plain": fake("bare", False), "new": fake()})
    assert any("plain has no counters: its speed alone" in note for note in result["server"]["notes"])
    assert result["drafts"]["new"]["speedup"]["value"] > 0
    alone = run({"plain": fake("vllm", False)})
    assert alone["drafts"] == {} and alone["plain"]["server"]["tokens_per_second"]["value"] > 0


@pytest.mark.usefixtures("hurried")
def test_a_plain_server_that_drafts_and_a_draft_that_does_not(fake: Make) -> None:
    with pytest.raises(UserError, match="is called plain but drafts; start it without speculation"):
        run({"plain": fake()})
    idle = fake()
    idle.count = lambda tokens, accepted: None
    with pytest.raises(UserError, match="counted no round of speculation; does it run with its draft"):
        run({"new": idle}, PROMPTS[:1])


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("how", ["smaller counts", "another process"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_restart_in_between_is_noticed(fake: Make, how: str, concurrency: int) -> None:
    server = fake()
    server.count(10_000, [3] * 1000)
    times = 0

    def restart(body: dict[str, Any]) -> None:
        nonlocal times
        times += body["max_tokens"] == LIMIT
        if times == 5:
            if how == "smaller counts":
                server.reset()
            server.started += how == "another process"

    server.rule = restart
    with pytest.raises(UserError, match="went backwards: it was restarted; measure again"):
        run({"new": server}, concurrencies=(concurrency,))


def test_other_work_and_a_warm_cache_are_noted(fake: Make) -> None:
    server = fake()

    def busy(body: dict[str, Any]) -> None:
        server.other_tokens += 50
        server.cached += 3

    server.rule = busy
    notes = run({"new": server})["server"]["notes"]
    received = sum(t for t, _ in plans())
    assert any(f"generated {received + 8 * 50} tokens, this run received {received}" in n for n in notes)
    assert any("24 prompt tokens came from the prefix cache" in n for n in notes)
    assert run({"new": fake()})["server"]["notes"] == []


def test_names_labels_and_positions_of_the_text_format() -> None:
    text = (
        "# HELP vllm:spec_decode_num_drafts rounds\n# TYPE vllm:spec_decode_num_drafts counter\n"
        'vllm:spec_decode_num_drafts{engine="0"} 4\nvllm:spec_decode_num_drafts{engine="1"} 6.0\n'
        'vllm:spec_decode_num_accepted_tokens_per_pos{position="1",engine="0"} 2\n'
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0",engine="0"} 3 1700000000\n'
        'vllm:spec_decode_num_accepted_tokens_per_pos{position="0",engine="1"} 5\n'
        'vllm:spec_decode_num_drafts_created{engine="0"} 1.7e9\n'
    )
    reading = parse_metrics(text)
    assert reading.rounds == 10 and reading.per_position == [8, 2] and reading.accepted is None
    declared = parse_metrics("# TYPE sglang:spec_verify_calls_total counter\n")
    assert declared.prefix == "sglang:" and declared.rounds == 0
    assert parse_metrics("<html>404</html>") == Reading() == parse_metrics("")
    with pytest.raises(UserError, match="not in the Prometheus text format"):
        parse_metrics("vllm:spec_decode_num_drafts{engine=0 four\n")


def test_counters_that_vanish_or_appear() -> None:
    some = Reading("vllm:", rounds=3.0, per_position=[2.0])
    with pytest.raises(UserError, match="went backwards"):
        difference(some, Reading("vllm:"), "x")
    with pytest.raises(UserError, match="went backwards"):
        difference(some, Reading("vllm:", rounds=5.0, per_position=[1.0]), "x")
    gained = difference(Reading("sglang:"), Reading("sglang:", rounds=4.0), "x")
    assert gained.rounds == 4 and gained.tau_tokens(13, 1) == 12
    grown = difference(some, Reading("vllm:", rounds=5.0, accepted=7.0, per_position=[3.0, 1.0]), "x")
    assert grown.per_position == [1, 1] and grown.tau_tokens(13, 1) == 9
