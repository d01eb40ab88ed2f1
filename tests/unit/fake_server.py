"""A server on the loopback that speaks the OpenAI completions dialect, streams, speculates by plan, and counts."""

from __future__ import annotations

import json
import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOOPBACK = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("loopback.py"))))
GAMMA = 3
Rule = Callable[[dict[str, Any]], str | tuple[int, str] | None]


def plan(prompt: list[int], limit: int) -> tuple[list[int], list[int]]:
    """(tokens of the answer, accepted tokens of its rounds): a function of the prompt and the token limit alone."""
    accepted: list[int] = []
    length, wanted = 1, min(limit, 6 + sum(prompt) % 9)
    while length < wanted:
        accepted.append((sum(prompt) + 2 * len(accepted)) % (GAMMA + 1))
        length += accepted[-1] + 1
    return [4 + (sum(prompt) + 7 * i) % 90 for i in range(wanted)], accepted


class FakeServer:
    """``engine``: "vllm", "sglang", "gauges" (an old SGLang) or "bare" (no metrics). ``rule`` may spoil a request: it
    returns a status with a text, or one of "break", "no end", "no reason", "error event", "not json", "hang"."""

    def __init__(self, engine: str = "vllm", drafting: bool = True, **options: Any) -> None:
        self.engine, self.drafting = engine, drafting
        self.counts: str | None = options.pop("counts", "both")  # "usage", "ids", "both" or None
        self.streaming: bool = options.pop("streaming", True)
        self.models: list[str] = options.pop("models", ["tiny"])
        assert not options
        self.rule: Rule = lambda body: None
        self.other_tokens, self.cached, self.started = 0, 0, 1000.0
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.seen: list[dict[str, Any]] = []
        self.now, self.most = 0, 0
        self.reset()
        fake = self

        class Handler(_Handler):
            server_of = fake

        self.server = LOOPBACK.Server(Handler)
        self.url = self.server.url

    def reset(self) -> None:
        """All counters to zero, as after a restart."""
        self.rounds = self.accepted = self.tokens = 0
        self.per_position = [0] * GAMMA

    def stop(self) -> None:
        self.release.set()
        self.server.stop()

    def count(self, tokens: int, accepted: list[int]) -> None:
        with self.lock:
            self.tokens += tokens
            if self.drafting:
                self.rounds += len(accepted)
                self.accepted += sum(accepted)
                for position in range(GAMMA):
                    self.per_position[position] += sum(a > position for a in accepted)

    def metrics(self) -> str:
        if self.engine == "vllm":
            return self._vllm()
        lines = ["# TYPE sglang:generation_tokens_total counter"]
        lines += [f'sglang:generation_tokens_total{{model_name="tiny"}} {self.tokens + self.other_tokens}']
        if self.drafting:
            lines += ["# TYPE sglang:spec_accept_length gauge", 'sglang:spec_accept_length{tp_rank="0"} 2.5']
        if self.drafting and self.engine == "sglang" and self.rounds:
            lines += ["# TYPE sglang:spec_verify_calls_total counter"]
            lines += [f'sglang:spec_verify_calls_total{{model_name="tiny"}} {self.rounds}']
        return "\n".join(lines) + "\n"

    def _vllm(self) -> str:
        """Two engines, between which the counts are split unevenly."""
        lines = [f"process_start_time_seconds {self.started}"]

        def counter(name: str, value: int, label: str = "") -> None:
            lines.append(f"# TYPE vllm:{name}_total counter")
            for engine, part in (("0", value // 3), ("1", value - value // 3)):
                lines.append(f'vllm:{name}_total{{engine="{engine}",model_name="tiny"{label}}} {float(part)}')

        counter("generation_tokens", self.tokens + self.other_tokens)
        counter("prefix_cache_hits", self.cached)
        if self.drafting:
            counter("spec_decode_num_drafts", self.rounds)
            counter("spec_decode_num_draft_tokens", GAMMA * self.rounds)
            counter("spec_decode_num_accepted_tokens", self.accepted)
            for position, value in enumerate(self.per_position):
                counter("spec_decode_num_accepted_tokens_per_pos", value, f',position="{position}"')
        return "\n".join(lines) + "\n"


class _Handler(LOOPBACK.Handler):
    server_of: FakeServer

    def do_GET(self) -> None:
        fake = self.server_of
        if self.path == "/v1/models":
            self.say(200, json.dumps({"data": [{"id": name} for name in fake.models]}))
        elif self.path == "/metrics" and fake.engine != "bare":
            with fake.lock:
                self.say(200, fake.metrics())
        elif self.path == "/version":
            self.say(200, json.dumps({"version": "9.9"}))
        else:
            self.say(404, "not found")

    def do_POST(self) -> None:
        fake = self.server_of
        body = self.body()
        with fake.lock:
            fake.seen.append(body)
            fake.now += 1
            fake.most = max(fake.most, fake.now)
        try:
            self.answer(body, fake.rule(body))
        finally:
            with fake.lock:
                fake.now -= 1

    def answer(self, body: dict[str, Any], spoiled: str | tuple[int, str] | None) -> None:
        fake = self.server_of
        if isinstance(spoiled, tuple):
            self.say(*spoiled)
            return
        if spoiled == "hang":
            fake.release.wait(30)
            return
        ids, accepted = plan(body["prompt"], body["max_tokens"])
        reason = "length" if len(ids) == body["max_tokens"] else "stop"
        if not body["stream"]:
            fake.count(len(ids), accepted)
            self.say(200, json.dumps(self.event(ids, reason, True)))
        elif not fake.streaming:
            self.say(400, "no streams here")
        else:
            self.stream(ids, accepted, reason, spoiled)

    def stream(self, ids: list[int], accepted: list[int], reason: str, spoiled: str | None) -> None:
        """A chunk for prefill's token, then one a round."""
        fake = self.server_of
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        cuts = [0, 1]
        for count in accepted:
            cuts.append(min(len(ids), cuts[-1] + count + 1))
        chunks = [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        self.line(": a comment, as some proxies send")
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            if spoiled == "break" and number == 1:
                self.connection.close()
                return
            if spoiled == "error event" and number == 1:
                self.line('data: {"error": {"message": "out of memory"}}')
                break
            if spoiled == "not json" and number == 1:
                self.line("data: {oops")
            event = self.event(chunk, reason if last and spoiled != "no reason" else None, False)
            self.line("data: " + json.dumps(event))
        fake.count(len(ids), accepted)
        if fake.counts in ("usage", "both"):
            self.line("data: " + json.dumps({"choices": [], "usage": {"completion_tokens": len(ids)}}))
        if spoiled != "no end":
            self.line("data: [DONE]")

    def event(self, ids: list[int], reason: str | None, whole: bool) -> dict[str, Any]:
        fake = self.server_of
        choice: dict[str, Any] = {"index": 0, "text": "".join(f"<{i}>" for i in ids), "finish_reason": reason}
        if fake.counts in ("ids", "both"):
            choice["token_ids"] = ids
        event: dict[str, Any] = {"choices": [choice]}
        if whole and fake.counts is not None:
            event["usage"] = {"completion_tokens": len(ids)}
        return event

    def line(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\n\n")
        self.wfile.flush()

    def say(self, status: int, text: str) -> None:
        self.out(status, text.encode())
