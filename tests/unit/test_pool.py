"""Several servers as one: who gets work, leaves and comes back, and that every row is there once whatever happens."""

from __future__ import annotations

import runpy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.data import pool
from redraft.data.generate import Completion
from redraft.data.regenerate import ServerEngine, regenerate
from redraft.data.server import ask_tops
from redraft.data.store import Failure, failures_path, read_rows
from redraft.errors import UserError
from redraft.settings.sampler import Sampler

pytest.importorskip("httpx")
HERE = Path(__file__)
RIG = SimpleNamespace(**runpy.run_path(str(HERE.with_name("engine_rig.py"))))
SERVED = SimpleNamespace(**runpy.run_path(str(HERE.with_name("test_server.py"))))
EOS, Loopback, good, reply_ids, requests = RIG.EOS, Any, RIG.good, RIG.reply_ids, RIG.requests
TALKS, known = SERVED.TALKS, SERVED.known
Rule = Callable[[dict[str, Any]], Any]


class Two:
    """Two servers, ``a`` and ``b``, and what is said of them."""

    def __init__(self) -> None:
        self.a, self.b = RIG.Loopback(), RIG.Loopback()
        self.said: list[str] = []

    def engine(self, **settings: Any) -> ServerEngine:
        given: dict[str, Any] = {"concurrency": 3, "timeout": 10.0, "attempts": 2, "backoff": 0.001}
        urls = [self.url(self.a), self.url(self.b)]
        return ServerEngine(urls, say=self.said.append, **(given | settings))

    def url(self, server: Loopback) -> str:
        return f"http://127.0.0.1:{server.port}"

    def told(self, text: str) -> list[str]:
        return [line for line in self.said if text in line]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    monkeypatch.setattr(pool, "HEARD_SECONDS", 0.02)
    monkeypatch.setattr(pool, "AWAY_SECONDS", 0.05)
    found = Two()
    yield found
    for server in (found.a, found.b):
        server.release.set()
        server.stop()


def after(count: int, then: Rule, before: Rule = good) -> Rule:
    """A rule that is another one behind so many requests."""
    lock, left = threading.Lock(), count

    def rule(body: dict[str, Any]) -> Any:
        nonlocal left
        with lock:
            left -= 1
            now = before if left >= 0 else then
        return now(body)

    return rule


def slow(body: dict[str, Any]) -> Any:
    time.sleep(0.05)
    return good(body)


def drop(body: dict[str, Any]) -> None:
    return None


def whole(two: Two, engine: ServerEngine, tokenizer: Any, count: int = 24) -> None:
    """Every request is answered, once, and rightly."""
    asked = requests(count)
    found = list(engine.answer(asked, 8, tokenizer, (EOS,)))
    assert sorted(one.request.key for one in found) == sorted(one.key for one in asked)
    assert all(one.response_ids == reply_ids(list(one.request.prompt_ids)) for one in found)


# -- who gets work -----------------------------------------------------------------------------------------------------
def test_each_server_has_so_many_requests_under_way(two: Two, tiny_tokenizer: Any) -> None:
    lock, gate = threading.Lock(), threading.Event()
    now, most = {"a": 0, "b": 0}, {"a": 0, "b": 0}

    def counting(name: str) -> Rule:
        def rule(body: dict[str, Any]) -> Any:
            with lock:
                now[name] += 1
                most[name] = max(most[name], now[name])
                if now == {"a": 3, "b": 3}:
                    gate.set()
            assert gate.wait(10), "six requests are never under way together"
            with lock:
                now[name] -= 1
            return good(body)

        return rule

    two.a.rule, two.b.rule = counting("a"), counting("b")
    whole(two, two.engine(), tiny_tokenizer)
    assert most == {"a": 3, "b": 3} and two.said == []
    assert len(two.a.bodies) + len(two.b.bodies) == 24


def test_a_slow_server_gets_less(two: Two, tiny_tokenizer: Any) -> None:
    gate = threading.Event()
    two.b.rule = lambda body: good(body) if gate.wait(10) else None

    def rule(body: dict[str, Any]) -> Any:
        if len(two.a.bodies) == 20:
            gate.set()
        return good(body)

    two.a.rule = rule
    whole(two, two.engine(), tiny_tokenizer)
    assert len(two.b.bodies) <= 4 + 3 and len(two.a.bodies) >= 17


# -- who leaves --------------------------------------------------------------------------------------------------------
GONE: dict[str, Rule] = {
    "drops every connection": drop,
    "says status 500": lambda body: (500, b"no"),
    "says nonsense": lambda body: (200, b"<html>"),
}


@pytest.mark.parametrize("fault", GONE.values(), ids=GONE.keys())
def test_one_of_two_dies_in_the_middle(
    two: Two, tiny_tokenizer: Any, tmp_path: Path, fault: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "AWAY_SECONDS", 60.0)
    two.a.rule, two.b.rule = slow, after(4, fault)
    path = tmp_path / "r.jsonl"
    report = regenerate(two.engine(), TALKS, known(tiny_tokenizer), [Sampler()], path, 8)
    rows = read_rows(path)
    assert (report.new, report.failures) == (20, []) and not failures_path(path).exists()
    assert sorted(row.id for row in rows) == sorted(talk.id for talk in TALKS)
    assert all(row.response_ids == reply_ids(row.prompt_ids) for row in rows)
    assert len(two.a.bodies) == 16, "what one answered the other is not asked"
    (line,) = two.said
    assert line.startswith(f"the server at {two.url(two.b)} stopped answering (")
    assert line.endswith("its requests are asked of the other servers, and it is tried again in 60 s")


def test_who_hangs_holds_a_request_once(two: Two, tiny_tokenizer: Any) -> None:
    two.b.rule = lambda body: good(body) if two.b.release.wait(60) else None
    whole(two, two.engine(timeout=0.3, attempts=5), tiny_tokenizer)
    held = [body["seed"] for body in two.b.bodies]
    assert len(held) == len(set(held)) and len(two.told("no answer within 0.3 s")) == 1


def test_what_is_under_way_at_one_that_leaves_goes_to_the_other(
    two: Two, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four are given up one after another while another waits for its answer."""
    monkeypatch.setattr(pool, "AWAY_SECONDS", 60.0)
    two.a.rule = slow
    two.b.rule = lambda body: good(body) if body["prompt"][1] == 13 and two.b.release.wait(60) else (500, b"")
    began = time.monotonic()
    whole(two, two.engine(timeout=60.0, concurrency=4), tiny_tokenizer)
    assert time.monotonic() - began < 20 and len(two.told("stopped answering (status 500, 2 attempts)")) == 1


def test_all_are_gone(two: Two, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    two.a.rule, two.b.rule = after(5, drop), after(2, drop)

    def run() -> Any:
        return regenerate(two.engine(), TALKS, known(tiny_tokenizer), [Sampler()], path, 8)

    with pytest.raises(UserError) as caught:
        run()
    assert all(f"the server at {two.url(one)} stopped answering" in str(caught.value) for one in (two.a, two.b))
    assert "7 responses are kept, the same command goes on" in str(caught.value)
    kept = read_rows(path)
    assert len(kept) == 7
    two.a.rule = two.b.rule = good
    asked = len(two.a.bodies) + len(two.b.bodies)
    report = run()
    assert (report.kept, report.new) == (7, 13) and len(two.a.bodies) + len(two.b.bodies) == asked + 13
    assert read_rows(path)[:7] == kept and {row.id for row in read_rows(path)} == {talk.id for talk in TALKS}


# -- who comes back ----------------------------------------------------------------------------------------------------
def test_a_server_that_is_ill_for_a_while_comes_back(two: Two, tiny_tokenizer: Any) -> None:
    two.a.rule, two.b.rule = slow, after(8, good, lambda body: (500, b""))
    whole(two, two.engine(), tiny_tokenizer, 60)
    assert two.told("stopped answering") and two.said[-1] == f"the server at {two.url(two.b)} answers again"
    assert len(two.a.bodies) < 60


def test_a_server_that_is_started_again_comes_back(two: Two, tiny_tokenizer: Any) -> None:
    back = threading.Event()

    def rule(body: dict[str, Any]) -> Any:
        if len(two.a.bodies) == 8:
            two.b.start()
        back.wait(5 if len(two.a.bodies) > 12 else 0.02)
        return good(body)

    def again(body: dict[str, Any]) -> Any:
        back.set()
        return good(body)

    two.a.rule, two.b.rule = rule, again
    two.b.stop()
    whole(two, two.engine(), tiny_tokenizer, 40)
    assert back.is_set() and len(two.told("cannot be used: no connection")) == 1 and len(two.told("answers again")) == 1


def test_one_that_comes_back_as_another_model_stays_out(two: Two, tiny_tokenizer: Any) -> None:
    def dying(body: dict[str, Any]) -> Any:
        two.b.models = (200, {"data": [{"id": "other"}]})
        return 500, b""

    two.a.rule, two.b.rule = slow, after(2, dying)
    whole(two, two.engine(), tiny_tokenizer, 40)
    assert len(two.told("serves other and not tiny")) == 1, "said once, however often it is tried"
    assert two.said[-1].endswith("it stays out of the pool") and len(two.a.bodies) == 38


def test_who_is_away_stays_so_between_two_rounds(
    two: Two, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "AWAY_SECONDS", 60.0)
    two.b.stop()
    engine = two.engine()
    for _ in range(3):
        whole(two, engine, tiny_tokenizer, 4)
    assert len(two.said) == 1


# -- who is not of the target ------------------------------------------------------------------------------------------
def test_another_model_is_refused_by_name_before_anything_is_asked(two: Two, tiny_tokenizer: Any) -> None:
    two.b.models = (200, {"data": [{"id": "base"}]})
    for model, says in ((None, "serves base and the one at .* tiny"), ("tiny", "serves base and not tiny")):
        with pytest.raises(UserError, match=f"the server at {two.url(two.b)} {says}"):
            list(two.engine(model=model).answer(requests(9), 8, tiny_tokenizer, (EOS,)))
    two.b.models = (200, {"data": [{"id": "base"}, {"id": "tiny"}]})
    with pytest.raises(UserError, match="serves base, tiny; name one"):
        list(two.engine().answer(requests(9), 8, tiny_tokenizer, (EOS,)))
    assert two.a.bodies == two.b.bodies == []
    whole(two, two.engine(model="tiny"), tiny_tokenizer)
    two.b.models = (404, b"no list here")
    whole(two, two.engine(model="tiny"), tiny_tokenizer)


ODD: dict[str, tuple[Rule, str]] = {
    "another key": (lambda body: (401, b"who are you, secret?"), "status 401: .* REDRAFT_API_KEY the right one"),
    "another model in its answers": (
        lambda body: (200, good(body)[1] | {"model": "base"}),
        "answers as the model base",
    ),
    "another vocabulary": (
        lambda body: RIG.choices(text="entirely different words stand here", token_ids=[5, 6, EOS]),
        r"refuses what the one at \S+ answers \(the server's text",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_server_ends_the_run_and_adds_no_row(
    two: Two, tiny_tokenizer: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDRAFT_API_KEY", "secret")
    rule, says = ODD[kind]
    two.a.rule, two.b.rule = slow, rule
    path = tmp_path / "r.jsonl"
    with pytest.raises(UserError, match=f"the server at {two.url(two.b)} .*{says}") as caught:
        regenerate(two.engine(), TALKS, known(tiny_tokenizer), [Sampler()], path, 8)
    assert "secret" not in f"{caught.value}{two.said}{path.read_text() if path.exists() else ''}"
    rows = read_rows(path) if path.exists() and path.stat().st_size else []
    assert all(row.response_ids == reply_ids(row.prompt_ids) for row in rows)
    two.b.rule = good
    report = regenerate(two.engine(), TALKS, known(tiny_tokenizer), [Sampler()], path, 8)
    assert report.kept + report.new == 20 and report.failures == []


# -- requests that fail ------------------------------------------------------------------------------------------------
def test_what_one_refuses_another_may_answer(two: Two, tiny_tokenizer: Any) -> None:
    two.b.rule = lambda body: (400, b"too long") if body["prompt"][1] % 2 else good(body)
    whole(two, two.engine(), tiny_tokenizer)


@pytest.mark.parametrize(("status", "says"), [(400, "status 400: no"), (500, "status 500, 2 attempts")])
def test_what_all_refuse_or_give_up_has_failed(two: Two, tiny_tokenizer: Any, status: int, says: str) -> None:
    two.a.rule = two.b.rule = lambda body: (status, b"no") if body["prompt"][1] == 12 else good(body)
    found = list(two.engine().answer(requests(12), 8, tiny_tokenizer, (EOS,)))
    (lost,) = (one for one in found if isinstance(one, Failure))
    assert lost == Failure("r2@T0", says, permanent=status == 400)
    assert sum(isinstance(one, Completion) for one in found) == 11
    tried = [sum(body["prompt"][1] == 12 for body in server.bodies) for server in (two.a, two.b)]
    assert tried == ([1, 1] if status == 400 else [2, 2])


def test_failures_that_differ_are_told_with_their_places(two: Two, tiny_tokenizer: Any) -> None:
    two.a.rule = lambda body: (400, b"no") if body["prompt"][1] == 12 else good(body)
    two.b.rule = lambda body: (500, b"") if body["prompt"][1] == 12 else good(body)
    (lost,) = (one for one in two.engine().answer(requests(9), 8, tiny_tokenizer, (EOS,)) if isinstance(one, Failure))
    assert not lost.permanent and set(lost.reason.split("; ")) == {
        f"{two.url(two.a)}: status 400: no",
        f"{two.url(two.b)}: status 500, 2 attempts",
    }


def test_log_probabilities_come_from_several_too(two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "AWAY_SECONDS", 60.0)
    scored = SimpleNamespace(**runpy.run_path(str(HERE.with_name("test_logprobs.py"))))

    def rule(body: dict[str, Any]) -> Any:
        return 200, {"choices": [{"text": "", "finish_reason": "length", "prompt_logprobs": scored.scored(body)}]}

    two.a.rule, two.b.rule = rule, after(1, drop, rule)
    found = ask_tops(two.engine(concurrency=1), 2, scored.ROWS, tmp_path / "tops.jsonl")
    assert set(found) == {row.key for row in scored.ROWS} and 1 <= len(two.b.bodies) <= 1 + 3 * 2
    assert len((tmp_path / "tops.jsonl").read_text().splitlines()) == len(scored.ROWS)
