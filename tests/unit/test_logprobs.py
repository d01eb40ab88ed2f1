"""Log-probabilities of stored responses from a server: exact positions, resumption, and servers that give none."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.data.server import ServerEngine, ask_tops, read_top_file
from redraft.data.store import Row
from redraft.errors import UserError

LOOPBACK = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loopback.py"))))
ROWS = [Row(str(i), [5 + i, 6], [7, 8, 9 + i][: 2 + i % 2], 0.0, 0, 1.0, 0, "length", "h") for i in range(6)]


def scored(body: dict[str, Any]) -> list[dict[str, Any] | None]:
    """For every token but the first: itself with -(its id) / 100, and the next id with -5."""
    entries = [
        {str(i): {"logprob": -i / 100, "rank": 1}, str(i + 1): {"logprob": -5.0, "rank": 2}} for i in body["prompt"]
    ]
    return [None, *entries[1:]]


class Server:
    """Answers completions with what ``rule`` makes of the body: the prompt's figures, or (status, text)."""

    def __init__(self, rule: Callable[[dict[str, Any]], Any] = scored) -> None:
        self.rule, self.asked = rule, list[dict[str, Any]]()
        fake = self

        class Handler(LOOPBACK.Handler):
            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "tiny"}]})

            def do_POST(self) -> None:
                body = self.body()
                fake.asked.append(body)
                found = fake.rule(body)
                if isinstance(found, tuple):
                    self.reply(found[0], {"error": found[1]})
                else:
                    self.reply(200, {"choices": [{"prompt_logprobs": found, "text": "", "finish_reason": "length"}]})

            def reply(self, status: int, value: Any) -> None:
                self.out(status, json.dumps(value).encode())

        self.http = LOOPBACK.Server(Handler)
        self.url = self.http.url


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.stop()


def engine(server: Server) -> ServerEngine:
    return ServerEngine(server.url, None, 2, attempts=2, backoff=0.01)


def test_figures_belong_to_the_tokens_after_the_first(server: Server, tmp_path: Path) -> None:
    found = ask_tops(engine(server), 2, ROWS, tmp_path / "tops.jsonl")
    assert set(found) == {row.key for row in ROWS}
    ids, values = found[ROWS[1].key]
    assert ids == [[8, 9], [10, 11]] and values == [[-0.08, -5.0], [-0.1, -5.0]]
    assert all(body["prompt_logprobs"] == 2 for body in server.asked)
    assert read_top_file(tmp_path / "tops.jsonl", ROWS) == found


def test_what_is_there_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "tops.jsonl"
    ask_tops(engine(server), 2, ROWS[:3], path)
    path.write_text(path.read_text() + '{"key": "torn')
    server.asked.clear()
    found = ask_tops(engine(server), 2, ROWS, path)
    assert len(server.asked) == 3 and len(found) == 6
    assert len(path.read_text().splitlines()) == 6


def test_a_server_without_them_is_told_in_one_line(server: Server, tmp_path: Path) -> None:
    server.rule = lambda body: None
    with pytest.raises(UserError, match="gives no log-probabilities of a prompt"):
        ask_tops(engine(server), 2, ROWS, tmp_path / "tops.jsonl")


def test_requests_that_fail_are_counted_and_the_rest_is_kept(server: Server, tmp_path: Path) -> None:
    server.rule = lambda body: (400, "at most 20") if body["prompt"][0] == 6 else scored(body)
    with pytest.raises(UserError, match="1 of 6 responses got no log-probabilities, first 1@T0: status 400"):
        ask_tops(engine(server), 2, ROWS, tmp_path / "tops.jsonl")
    assert len(read_top_file(tmp_path / "tops.jsonl", ROWS)) == 5
    server.rule = lambda body: scored(body)[:-1]
    with pytest.raises(UserError, match="log-probabilities of"):
        ask_tops(engine(server), 2, ROWS[:2], tmp_path / "other.jsonl")


def test_one_refusal_ends_no_run(server: Server, tmp_path: Path) -> None:
    refused = []

    def rule(body: dict[str, Any]) -> Any:
        if body["prompt"][0] == 6 and not refused:
            refused.append(body)
            return 400, "odd"
        return scored(body)

    server.rule = rule
    assert len(ask_tops(engine(server), 2, ROWS, tmp_path / "tops.jsonl")) == 6 and len(server.asked) == 7


def test_damage_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tops.jsonl"
    path.write_text(json.dumps({"key": ROWS[0].key, "top": [[[1]], [[0.1, 0.2]]]}) + "\n")
    with pytest.raises(UserError, match=r"tops\.jsonl:1: not 1 positions"):
        read_top_file(path, ROWS)
