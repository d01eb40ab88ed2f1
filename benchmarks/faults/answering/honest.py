"""An honest server for the fault runs: every answer is a function of the prompt and the token limit alone.

It stands on the made-up servers of the tests (``tests/unit/loopback.py`` and ``fake_server.py``): their plan of tokens
and rounds, and their counters. A kind of fault (``kinds.py``) may spoil what it says.
"""

from __future__ import annotations

import json
import math
import random
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).resolve().parents[3] / "tests"
FAKE = SimpleNamespace(**runpy.run_path(str(TESTS / "unit" / "fake_server.py")))
MODELS = SimpleNamespace(**runpy.run_path(str(TESTS / "tiny_models.py")))
LOOPBACK = FAKE.LOOPBACK
END, MODEL = 2, "tiny"
TOKENIZER = MODELS.build_tokenizer()


def answer(prompt: list[int], limit: int) -> tuple[list[int], str, list[int]]:
    """Token ids, finish reason, and accepted tokens of the rounds."""
    ids, accepted = FAKE.plan(prompt, limit)
    if len(ids) == limit:
        return ids, "length", accepted
    return [*ids[:-1], END], "stop", accepted


def scores(ids: list[int], count: int) -> list[dict[str, Any] | None]:
    """Log-probabilities of the tokens of a text: none of the first, then its own and ``count - 1`` others."""
    found: list[dict[str, Any] | None] = [None]
    for token in ids[1:]:
        others = [i for i in range(4, 4 + count) if i != token][: count - 1]
        found.append({str(i): {"logprob": math.log(0.5 / (n + 1))} for n, i in enumerate([token, *others])})
        found[-1] = {key: {"logprob": math.log((0.6, 0.2, 0.1, 0.05)[n])} for n, key in enumerate(found[-1] or {})}
    return found


class Front:
    """The server: ``kind`` spoils the share ``rate`` of what it says, drawn for every prompt and how often that was
    asked, so that threads play no part, and ``most`` of it at most. ``odd`` counts what was spoiled."""

    def __init__(self, kind: Any, rate: float, seed: int, drafting: bool = True, most: int | None = None) -> None:
        self.kind, self.rate, self.seed, self.most = kind, rate, seed, most
        self.tokenizer = TOKENIZER
        self.book = FAKE.FakeServer("vllm", drafting)
        self.odd, self.times, self.lock = 0, dict[str, int](), threading.Lock()
        self.gone = threading.Event()
        front = self

        class Handler(_Handler):
            server_of = front

        self.server = LOOPBACK.Server(Handler)
        self.url = self.server.url

    def stop(self) -> None:
        """Let go of whoever waits, and end."""
        self.gone.set()
        self.server.stop()
        self.book.stop()

    def draw(self, door: str, what: str) -> random.Random | None:
        """The numbers that spoil this answer; None where it stays honest."""
        if self.kind is None or self.kind.door != door:
            return None
        with self.lock:
            self.times[what] = self.times.get(what, 0) + 1
            numbers = random.Random(f"{self.seed}|{self.kind.name}|{what}|{self.times[what]}")
            if numbers.random() >= self.rate or self.odd == self.most:
                return None
            self.odd += 1
        return numbers

    def read(self, body: dict[str, Any]) -> list[int]:
        """The prompt's token ids, however it was given."""
        if "messages" in body:
            how = {"add_generation_prompt": True, "return_dict": False}
            return list(self.tokenizer.apply_chat_template(body["messages"], **how))
        prompt = body["prompt"]
        return self.tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt

    def event(self, prompt: list[int] | None, ids: list[int], reason: str | None) -> dict[str, Any]:
        """An answer, or a part of one."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": reason, "stop_reason": None}
        return {"model": MODEL, "choices": [choice | ({} if prompt is None else {"prompt_token_ids": prompt})]}


class _Handler(LOOPBACK.Handler):
    server_of: Front
    protocol_version = "HTTP/1.1"
    # a header that waits for the client's word before its body follows would cost 40 ms an answer
    disable_nagle_algorithm = True
    timeout = 20

    def do_GET(self) -> None:
        front = self.server_of
        if self.path == "/v1/models":
            self.say("models", "models", json.dumps({"data": [{"id": MODEL}]}))
        elif self.path == "/metrics":
            with front.book.lock:
                text = front.book.metrics()
            self.say("metrics", "metrics", text)
        elif self.path == "/version":
            self.out(200, b'{"version": "9.9"}')
        else:
            self.out(404, b"not found")

    def do_POST(self) -> None:
        front, body = self.server_of, self.body()
        prompt = front.read(body)
        ids, reason, accepted = answer(prompt, body["max_tokens"])
        front.book.count(len(ids), accepted)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        asked = f"{prompt}|{body['max_tokens']}"
        if body.get("stream"):
            self.stream(front, asked, ids, reason, accepted, usage)
            return
        value = front.event(prompt, ids, reason) | {"usage": usage}
        if body.get("prompt_logprobs"):
            value["choices"][0]["prompt_logprobs"] = scores(prompt, body["prompt_logprobs"])
        self.say("answer", asked, json.dumps(value))

    def say(self, door: str, what: str, text: str) -> None:
        """One body, spoiled or not."""
        front = self.server_of
        numbers = front.draw(door, what)
        if numbers is None:
            self.out(200, text.encode())
        elif front.kind.raw is not None:
            front.kind.raw(self, text.encode())
            self.close_connection = True
        else:
            self.out(200, front.kind.said(text, numbers))

    def stream(
        self, front: Front, asked: str, ids: list[int], reason: str, accepted: list[int], usage: dict[str, int]
    ) -> None:
        """A chunk for prefill's token, then one a round. A fault of the text spoils one event, or that of counts."""
        numbers = front.draw("answer", asked)
        cuts = [0, 1]
        for taken in accepted:
            cuts.append(min(len(ids), cuts[-1] + taken + 1))
        parts = [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
        events = [front.event(None, part, reason if n == len(parts) - 1 else None) for n, part in enumerate(parts)]
        said = [json.dumps(event) for event in [*events, {"model": MODEL, "choices": [], "usage": usage}]]
        lines = [text.encode() for text in said]
        if numbers is not None and front.kind.raw is not None:
            front.kind.raw(self, b"".join(b"data: " + line + b"\n\n" for line in lines))
            self.close_connection = True
            return
        if numbers is not None:
            place = len(lines) - 1 if front.kind.counts else len(lines) - 2
            lines[place] = front.kind.said(said[place], numbers)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in [*lines, b"[DONE]"]:
            data = b"data: " + line + b"\n\n"
            self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")
