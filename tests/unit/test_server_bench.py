"""The server benchmark against servers on the loopback whose every round is known beforehand."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from redraft.errors import UserError
from redraft.evaluate.counters import Reading, difference, parse_metrics
from redraft.evaluate.load import ServerConfig
from redraft.evaluate.server import bench_servers
from redraft.evaluate.speed import Prompt
from redraft.pipeline.bench import How
from redraft.pipeline.questions import Questions
from redraft.pipeline.server_bench import bench_servers_on, launched, named_servers
from redraft.pipeline.steps import TargetSpec
from redraft.report.load import read_bench
from redraft.sampling import Sampler

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

FAKE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fake_server.py"))))
PROMPTS = [Prompt(f"p{i}", [1, 10 + i, 20 + 3 * i], "maths" if i % 2 else "general") for i in range(8)]
LIMIT = 12

Make = Callable[..., Any]


@pytest.fixture
def fake() -> Iterator[Make]:
    """``fake(engine, drafting, ...)`` starts a server that is stopped at the end of the test."""
    started: list[Any] = []

    def make(*arguments: Any, **options: Any) -> Any:
        started.append(FAKE.FakeServer(*arguments, **options))
        return started[-1]

    yield make
    for server in started:
        server.stop()


def settings(**options: Any) -> ServerConfig:
    return ServerConfig(**({"max_new_tokens": LIMIT, "timeout": 10.0} | options))


def run(servers: dict[str, Any], prompts: list[Prompt] = PROMPTS, **options: Any) -> dict[str, Any]:
    places = {name: getattr(server, "url", server) for name, server in servers.items()}
    return bench_servers(places, prompts, settings(**options), "my-target", {"seed": 0})


def plans(prompts: list[Prompt] = PROMPTS) -> list[tuple[int, list[int]]]:
    """(tokens, accepted tokens of the rounds) of every prompt."""
    found = [FAKE.plan(p.ids, LIMIT) for p in prompts]
    return [(len(ids), accepted) for ids, accepted in found]


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
    assert server.most == 4 and result["server"]["levels"][0]["new"]["failed"] == 0
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


def test_a_plain_server_that_drafts_and_a_draft_that_does_not(fake: Make) -> None:
    with pytest.raises(UserError, match="is called plain but drafts; start it without speculation"):
        run({"plain": fake()})
    idle = fake()
    idle.count = lambda tokens, accepted: None
    with pytest.raises(UserError, match="counted no round of speculation; does it run with its draft"):
        run({"new": idle}, PROMPTS[:1])


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
    assert reading.rounds == 10 and reading.per_position == {1: 2, 0: 8} and reading.accepted is None
    declared = parse_metrics("# TYPE sglang:spec_verify_calls_total counter\n")
    assert declared.prefix == "sglang:" and declared.rounds == 0
    assert parse_metrics("<html>404</html>") == Reading() == parse_metrics("")
    with pytest.raises(UserError, match="not in the Prometheus text format"):
        parse_metrics("vllm:spec_decode_num_drafts{engine=0 four\n")


def test_counters_that_vanish_or_appear() -> None:
    some = Reading("vllm:", rounds=3.0, per_position={0: 2.0})
    with pytest.raises(UserError, match="went backwards"):
        difference(some, Reading("vllm:"), "x")
    with pytest.raises(UserError, match="went backwards"):
        difference(some, Reading("vllm:", rounds=5.0, per_position={0: 1.0}), "x")
    gained = difference(Reading("sglang:"), Reading("sglang:", rounds=4.0), "x")
    assert gained.rounds == 4 and gained.tau_tokens(13, 1) == 12
    grown = difference(some, Reading("vllm:", rounds=5.0, accepted=7.0, per_position={0: 3.0, 1: 1.0}), "x")
    assert grown.per_position == [1, 1] and grown.tau_tokens(13, 1) == 9


# -- servers that count or stream otherwise ------------------------------------------------------------------------
@pytest.mark.parametrize("counts", ["usage", "ids"])
def test_tokens_are_counted_by_usage_or_by_ids(fake: Make, counts: str) -> None:
    result = run({"new": fake(counts=counts)})
    assert [line["drafts"]["new"]["tokens"] for line in result["per_prompt"]] == [t for t, _ in plans()]


@pytest.mark.parametrize("options", [{"streaming": False}, {"counts": None}])
def test_without_streams_or_counts_in_them(fake: Make, options: dict[str, Any]) -> None:
    server = fake(**options)
    if options.get("counts", 0) is None:
        with pytest.raises(UserError, match="refuses a request: the stream has neither usage nor token ids"):
            run({"new": server})
        return
    result = run({"new": server})
    level = result["server"]["levels"][0]["new"]
    assert level["ttft_ms"] is None and level["inter_token_ms"] is None and "ttft" not in level
    assert level["tokens"] == sum(t for t, _ in plans()) and level["request_ms"]["p50"] > 0
    assert any(
        "does not stream with token counts (status 400: no streams here)" in n for n in result["server"]["notes"]
    )


# -- failures --------------------------------------------------------------------------------------------------------
FAULTS: dict[str, tuple[Any, str]] = {
    "connection dropped": ("break", "the stream broke off before its end"),
    "no end mark": ("no end", "the stream broke off before its end"),
    "no finish reason": ("no reason", "ended without a finish reason"),
    "error in the stream": ("error event", "the server reports .*out of memory"),
    "nonsense in the stream": ("not json", "an answer that is not JSON: '{oops'"),
    "status 500": ((500, "bad day"), "status 500"),
    "status 400": ((400, "too long"), "status 400: too long"),
    "time-out": ("hang", "no answer within 0.5 s"),
}


@pytest.mark.parametrize(("spoiled", "reason"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("concurrency", [1, 2])
def test_failures_are_counted_listed_and_never_tried_again(
    fake: Make, spoiled: Any, reason: str, concurrency: int
) -> None:
    plain, new = fake("vllm", False), fake()
    bad = PROMPTS[5]

    def rule(body: dict[str, Any]) -> Any:
        return spoiled if body["prompt"] == bad.ids and body["max_tokens"] == LIMIT else None

    new.rule = rule
    options = {"concurrencies": (concurrency,), "timeout": 0.5}
    result = run({"plain": plain, "new": new}, tolerated=0.2, **options)
    assert sum(b["prompt"] == bad.ids and b["max_tokens"] == LIMIT for b in new.seen) == 1
    failures = result["server"]["failures"]
    assert [(f["server"], f["concurrency"], f["id"]) for f in failures] == [("new", concurrency, "p5")]
    level = result["server"]["levels"][0]
    assert (level["new"]["requests"], level["new"]["failed"], level["plain"]["failed"]) == (8, 1, 0)
    good = [t for i, (t, _) in enumerate(plans()) if i != 5]
    assert level["new"]["tokens"] == sum(good)
    if concurrency == 1:
        assert [line["id"] for line in result["per_prompt"]] == [p.id for p in PROMPTS if p is not bad]
        assert level["plain"]["tokens"] == sum(good), "the failed prompt is in no pair"
    with pytest.raises(UserError, match=f"1 of 8 requests to the server new at .* failed, more than 3%; .*{reason}"):
        run({"plain": plain, "new": new}, **options)


def test_a_server_that_dies(fake: Make) -> None:
    server = fake()
    times = 0

    def dying(body: dict[str, Any]) -> Any:
        nonlocal times
        times += body["max_tokens"] == LIMIT
        return (500, "") if times > 3 else None

    server.rule = dying
    with pytest.raises(UserError, match="of 8 requests .* failed.*status 500"):
        run({"new": server}, concurrencies=(2,))
    assert sum(b["max_tokens"] == LIMIT for b in server.seen) < 8, "the run went on asking"


def test_servers_that_cannot_be_used(fake: Make) -> None:
    gone = FAKE.FakeServer()
    gone.stop()
    with pytest.raises(UserError, match="the server new at http.* cannot be used: no connection.*is it up"):
        run({"new": gone})
    with pytest.raises(UserError, match="is no address"):
        run({"new": "localhost:8000"})
    with pytest.raises(UserError, match="no server to measure"):
        run({})
    several = fake(models=["one", "two"])
    with pytest.raises(UserError, match="serves one, two; name one of them"):
        run({"new": several})
    with pytest.raises(UserError, match="the server new at .* serves one, two, not three"):
        run({"new": several}, models={"new": "three"})
    run({"new": several}, models={"new": "two"})
    assert several.seen[-1]["model"] == "two"
    for status, text in ((401, "who are you"), (404, "no such path")):
        refusing = fake()
        refusing.rule = lambda body, reply=(status, text): reply
        with pytest.raises(UserError, match=f"status {status}: {text}"):
            run({"new": refusing})
    choosy = fake()
    choosy.rule = lambda body: (422, "unknown field")
    with pytest.raises(UserError, match="refuses a request: status 422: unknown field"):
        run({"new": choosy})


# -- servers that are started for the run ----------------------------------------------------------------------------
def test_started_servers_run_one_after_another_and_are_stopped() -> None:
    up: list[str] = []
    log: list[tuple[str, str]] = []

    def starter(name: str) -> Callable[[], Any]:
        @contextmanager
        def start() -> Iterator[str]:
            assert not up, "two servers at once"
            server = FAKE.FakeServer("vllm", name != "plain")
            up.append(name)
            log.append(("start", name))
            try:
                yield server.url
            finally:
                server.stop()
                up.remove(name)
                log.append(("stop", name))

        return start

    result = run({"plain": starter("plain"), "new": starter("new")}, concurrencies=(1, 2))
    assert log == [("start", "plain"), ("stop", "plain"), ("start", "new"), ("stop", "new")]
    assert result["setup"]["order"].startswith("one server after another")
    draft = result["drafts"]["new"]
    assert draft["speedup"]["low"] is not None and draft["identical_to_plain"] == 8
    with pytest.raises(UserError, match="is called plain but drafts"):
        run({"plain": starter("new")})
    assert not up and log[-1] == ("stop", "new")


SERVE = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"data": [{"id": str(os.getpid())}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
print("starting", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def served_pid(url: str) -> int:
    import httpx

    return int(httpx.get(f"{url}/v1/models").json()["data"][0]["id"])


def test_a_launched_server_is_gone_afterwards(tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    command = f"sh -c '{sys.executable} {script} {{port}}; exit 0'"  # a child of a child, as engines have them
    with pytest.raises(ZeroDivisionError), launched(command, tmp_path / "log") as url:
        pid = served_pid(url)
        assert alive(pid)
        raise ZeroDivisionError
    assert not alive(pid) and "starting" in (tmp_path / "log").read_text()


def test_a_server_that_does_not_come_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(UserError, match="cannot be run: No such file"), launched("/no/such/server {port}", log):
        pass
    command = f"{sys.executable} -c \"import sys; print('no memory'); sys.exit(3)\" {{port}}"
    with pytest.raises(UserError, match="ended with exit code 3; the end of .*no memory"), launched(command, log):
        pass
    sleeper = f'{sys.executable} -c "import time; time.sleep(600)" {{port}}'
    with pytest.raises(UserError, match="did not answer within 0.3 s"), launched(sleeper, log, start_seconds=0.3):
        pass


def test_a_signal_stops_the_launched_server_too(tmp_path: Path) -> None:
    script, marker = tmp_path / "serve.py", tmp_path / "url"
    script.write_text(SERVE)
    program = (
        "import pathlib, time\n"
        "from redraft.pipeline.server_bench import launched\n"
        f"with launched({f'{sys.executable} {script} {{port}}'!r}, pathlib.Path({str(tmp_path / 'log')!r})) as url:\n"
        f"    pathlib.Path({str(marker)!r} + '.new').write_text(url)\n"
        f"    pathlib.Path({str(marker)!r} + '.new').rename({str(marker)!r})\n"
        "    time.sleep(600)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not marker.exists():
            assert runner.poll() is None
            time.sleep(0.05)
        pid = served_pid(marker.read_text())
        runner.send_signal(signal.SIGTERM)
        assert runner.wait() == 128 + signal.SIGTERM
    finally:
        runner.kill()
    assert not alive(pid)


def test_how_servers_are_named() -> None:
    assert named_servers(["plain=http://a:1", "new=serve --port {port}"]) == {
        "plain": "http://a:1",
        "new": "serve --port {port}",
    }
    assert named_servers(["http://a:1/?x=y"]) == {"server": "http://a:1/?x=y"}
    for wrong in ("plain", "=http://a", "new=serve", "a:1"):
        with pytest.raises(UserError, match="is not understood; write NAME=http"):
            named_servers([wrong])
    with pytest.raises(UserError, match="two servers are called a"):
        named_servers(["a=http://x", "a=http://y"])


# -- from files ------------------------------------------------------------------------------------------------------
@pytest.fixture
def weightless(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A target without weights: tokenizer and config are all that is needed."""
    folder = tmp_path / "target"
    tiny_tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 6, "vocab_size": 128, "max_position_embeddings": 128}
    AutoConfig.for_model("llama", **shape, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_files_in_and_a_file_out(
    fake: Make, weightless: Path, tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "deep" / "bench.json"
    prompts.write_text("".join(f"question {i}\n" for i in range(6)))
    server = fake()
    servers = {"plain": fake("vllm", False).url, "new": server.url}
    how = How(max_new_tokens=LIMIT)
    result = bench_servers_on(TargetSpec(str(weightless)), servers, Questions(str(prompts), limit=4), out, how, (1, 2))
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert result["setup"]["prompts"] == 4 and result["provenance"]["seed"] == 0
    turn = [{"role": "user", "content": "question 0"}]
    wanted = tiny_tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert server.seen[0]["prompt"] == list(wanted)
    assert "bench: 100%" in capsys.readouterr().err
    assert server.url not in json.dumps({k: v for k, v in result.items() if k != "provenance"})
    prompts.write_text("word " * 60)
    with pytest.raises(UserError, match="does not fit into the context of 128"):
        bench_servers_on(TargetSpec(str(weightless)), servers, Questions(str(prompts)), out, How())


def test_a_failed_run_leaves_the_old_result_alone(fake: Make, weightless: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "bench.json"
    prompts.write_text("a question\n")
    out.write_text("old")
    with pytest.raises(UserError, match="no counters of speculation"):
        servers, how = {"new": fake("bare").url}, How(max_new_tokens=LIMIT)
        bench_servers_on(TargetSpec(str(weightless)), servers, Questions(str(prompts)), out, how)
    assert out.read_text() == "old"
