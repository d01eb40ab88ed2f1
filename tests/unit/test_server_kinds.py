"""Every kind of fault that the fault runs know (``benchmarks/faults/answering``): no wrong row, no lost run."""

from __future__ import annotations

import time
from typing import Any

import pytest
from faults.answering import honest, kinds

from redraft.data.generate import Completion, Request
from redraft.data.regenerate import ServerEngine
from redraft.data.store import Failure
from redraft.data.transport import Connection, Transient
from redraft.errors import UserError
from redraft.evaluate.load import ServerConfig
from redraft.evaluate.server import bench_servers
from redraft.evaluate.speed import Prompt
from redraft.settings.sampler import Sampler

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
BY_NAME = {kind.name: kind for kind in kinds.every_kind()}
# What takes its time by nature is left to the fault runs, but for one of each sort.
SLOW = {"no byte", "comments and no answer", "a byte of the header now and then", "a second answer behind the first"}
QUICK = [name for name, kind in BY_NAME.items() if kind.door == "answer" and not kind.scored and name not in SLOW]
PROMPTS = [[1, 10 + i, 4, 30, 31, 32, 33, 34 + i] for i in range(6)]
LIMIT = 12


def asked(front: Any, **settings: Any) -> dict[str, Any]:
    engine = ServerEngine(front.url, concurrency=3, attempts=4, backoff=0.001, vocab_size=128, **settings)
    requests = [Request(f"r{i}", prompt, Sampler()) for i, prompt in enumerate(PROMPTS)]
    found = list(engine.answer(requests, LIMIT, honest.TOKENIZER, (2,)))
    return {one.key if isinstance(one, Failure) else one.request.key: one for one in found}


def wrong(found: dict[str, Any]) -> list[str]:
    """Answers that are not the honest server's."""
    right = {f"r{i}": honest.answer(prompt, LIMIT)[:2] for i, prompt in enumerate(PROMPTS)}
    done = {key: one for key, one in found.items() if isinstance(one, Completion)}
    return [key for key, one in done.items() if (one.response_ids, one.finish_reason) != right[key]]


def test_there_are_kinds_enough() -> None:
    assert len(BY_NAME) == len(kinds.every_kind()) >= 90


@pytest.mark.parametrize("name", QUICK)
def test_one_odd_answer_costs_no_row(name: str) -> None:
    front = honest.Front(BY_NAME[name], 1.0, 1, most=1)
    found = asked(front, timeout=2.0)
    front.stop()
    assert front.odd == 1 and len(found) == len(PROMPTS) and wrong(found) == []
    lost = [one for one in found.values() if isinstance(one, Failure)]
    assert len(lost) <= 1, lost


@pytest.mark.parametrize("name", QUICK[::3])
def test_nothing_but_odd_answers_leave_no_wrong_row(name: str) -> None:
    front = honest.Front(BY_NAME[name], 1.0, 1)
    try:
        assert wrong(asked(front, timeout=0.5)) == []
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    front.stop()


@pytest.mark.parametrize("name", ["a byte now and then", "a byte of the header now and then", "comments and no answer"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_its_time_as_a_whole(name: str, stream: bool) -> None:
    front = honest.Front(BY_NAME[name], 1.0, 1)
    connection = Connection(front.url, timeout=0.4)
    connection.open()
    body: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": LIMIT, "stream": stream}
    began = time.monotonic()
    with pytest.raises(Transient, match=r"no answer within 0\.4 s"):
        if stream:
            list(connection.events("/v1/completions", body))
        else:
            connection.json("POST", "/v1/completions", body)
    assert time.monotonic() - began < 5
    front.stop()
    connection.close()
    with pytest.raises(Transient, match="closed"):
        connection.json("GET", "/v1/models")


PAGES = [name for name, kind in BY_NAME.items() if kind.door == "metrics" and "no byte" not in name]


@pytest.mark.parametrize("name", PAGES)
def test_one_odd_page_of_counters_changes_no_figure(name: str) -> None:
    front = honest.Front(BY_NAME[name], 1.0, 1)
    at = iter([False] * 9 + [True] + [False] * 999)
    draw = front.draw
    front.draw = lambda door, what: draw(door, what) if door == "metrics" and next(at) else None
    prompts = [Prompt(f"p{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    config = ServerConfig(max_new_tokens=LIMIT, timeout=5.0, warmup=1)
    result = bench_servers({"new": front.url}, prompts, config, "tiny", {})
    front.stop()
    assert front.odd == 1
    for line, prompt in zip(result["per_prompt"], PROMPTS, strict=True):
        ids, _, accepted = honest.answer(prompt, LIMIT)
        told = line["drafts"]["new"]
        assert (told["tokens"], told["rounds"], told["accepted_tokens"]) == (len(ids), len(accepted), sum(accepted))


def test_models_are_asked_again() -> None:
    for name in (name for name, kind in BY_NAME.items() if kind.door == "models" and "no byte" not in name):
        front = honest.Front(BY_NAME[name], 0.5, 3)
        try:
            assert wrong(asked(front, timeout=2.0)) == []
        except UserError as error:
            assert front.odd > 1, (name, str(error))
        front.stop()
