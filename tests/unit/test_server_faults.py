"""The server benchmark where servers stream otherwise, fail or are started in turn, and from files to a file."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from redraft.adaptation.models import TargetSpec
from redraft.adaptation.server_bench import bench_servers_on
from redraft.errors import UserError
from redraft.settings.steps import BenchSettings
from redraft.settings.texts import named_servers

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("server_rig.py"))))
FAKE, PROMPTS, LIMIT, settings, run, plans = RIG.FAKE, RIG.PROMPTS, RIG.LIMIT, RIG.settings, RIG.run, RIG.plans

Make = Callable[..., Any]


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
    run({"plain": plain, "new": new}, **options)  # one odd answer says nothing of a server
    worse = [PROMPTS[5].ids, PROMPTS[6].ids]
    new.rule = lambda body: spoiled if body["prompt"] in worse and body["max_tokens"] == LIMIT else None
    with pytest.raises(UserError, match=f"2 of 8 requests to the server new at .* failed, more than 3%; .*{reason}"):
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
        run({"new": several}, model="three")
    run({"new": several}, model="two")
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
    options: dict[str, Any] = {"target": str(weightless), "prompts": str(prompts), "out": out, "seed": 0}
    servers = (f"plain={fake('vllm', False).url}", f"new={server.url}")
    asked = BenchSettings(**options, server=servers, limit=4, concurrency=(1, 2), max_new_tokens=LIMIT)
    result = bench_servers_on(asked, TargetSpec(str(weightless)))
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert result["setup"]["prompts"] == 4 and result["provenance"]["seed"] == 0
    turn = [{"role": "user", "content": "question 0"}]
    wanted = tiny_tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert server.seen[0]["prompt"] == list(wanted)
    assert "bench: 100%" in capsys.readouterr().err
    assert server.url not in json.dumps({k: v for k, v in result.items() if k != "provenance"})
    prompts.write_text("word " * 60)
    with pytest.raises(UserError, match="does not fit into the context of 128"):
        bench_servers_on(BenchSettings(**options, server=servers), TargetSpec(str(weightless)))


def test_a_failed_run_leaves_the_old_result_alone(fake: Make, weightless: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "bench.json"
    prompts.write_text("a question\n")
    out.write_text("old")
    with pytest.raises(UserError, match="no counters of speculation"):
        options: dict[str, Any] = {"target": str(weightless), "prompts": str(prompts), "out": out}
        asked = BenchSettings(**options, server=(f"new={fake('bare').url}",), max_new_tokens=LIMIT)
        bench_servers_on(asked, TargetSpec(str(weightless)))
    assert out.read_text() == "old"
