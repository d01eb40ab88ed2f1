"""A key and what stands in addresses reach no file, page or line of a run, even where a server repeats them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.places import without_secrets
from redraft.reports import build_report

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
UNIT = Path(__file__).resolve().parents[1] / "unit"
RIG = SimpleNamespace(**runpy.run_path(str(UNIT / "engine_rig.py")))
SECRET = "sk-planted-4f2a9c81d7"
SERVE = """
import os, runpy, sys, threading
print("non-default args:", sys.argv[1:], os.environ.get("REDRAFT_API_KEY"), flush=True)
fake = runpy.run_path({fake!r})
server = fake["FakeServer"]("vllm", {drafting})
import socket, http.server
port = int(sys.argv[sys.argv.index("--port") + 1])
again = fake["LOOPBACK"].Server(server.server.RequestHandlerClass, port)
threading.Event().wait(120)
"""


@pytest.fixture
def place(tmp_path: Path, tiny_target: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_target().save(tmp_path / "target")
    lines = [json.dumps({"id": f"p{i}", "messages": [{"role": "user", "content": f"question {i}"}]}) for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("REDRAFT_API_KEY", SECRET)
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def leaks(folder: Path, out: str) -> list[str]:
    """Where the secret stands."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if SECRET.encode() in path.read_bytes()] + [SECRET] * (SECRET in out)


def test_a_key_that_a_server_repeats_is_in_no_file(place: Path, redraft: Any) -> None:
    loopback, seen = RIG.Loopback(), list[str]()

    def rule(body: dict[str, Any]) -> Any:
        number = len(seen)
        seen.append(loopback.headers[-1] or "")
        spoiled = [
            (400, f"no such key {SECRET}".encode()),
            (200, {"error": {"message": f"{SECRET} is busy"}}),
            (404, {"detail": "x" * 110 + SECRET}),
            RIG.choices(finish_reason=SECRET),
            (200, {"model": SECRET, "choices": [{"text": "a", "token_ids": [5, 2], "finish_reason": "stop"}]}),
        ]
        return spoiled[number] if number < len(spoiled) else RIG.good(body)

    loopback.rule = rule
    url = f"http://127.0.0.1:{loopback.port}"
    words = ["regenerate", "--target", str(place / "target"), "--prompts", str(place / "prompts.jsonl")]
    words += ["--server", url, "--out", str(place / "out" / "rows.jsonl"), "--max-new-tokens", "8", "--batch-size", "1"]
    code, out, err = redraft(words)
    loopback.stop()
    assert code == 0, err
    assert seen and set(seen) == {f"Bearer {SECRET}"}
    assert leaks(place, out + err) == []
    failures = (place / "out" / "rows.failures.jsonl").read_text()
    assert "no such key ***" in failures


@pytest.mark.parametrize("status", [401, 307])
def test_a_run_that_ends_does_not_say_the_key(place: Path, redraft: Any, status: int) -> None:
    loopback = RIG.Loopback()
    loopback.raw = (
        f"HTTP/1.1 {status} X\r\nLocation: https://me:{SECRET}@other/v1?key={SECRET}\r\n"
        f"Content-Length: {len(SECRET)}\r\n\r\n{SECRET}"
    ).encode()
    words = ["regenerate", "--target", str(place / "target"), "--prompts", str(place / "prompts.jsonl")]
    words += ["--server", f"http://127.0.0.1:{loopback.port}", "--out", str(place / "rows.jsonl")]
    code, out, err = redraft(words)
    loopback.stop()
    assert code == 2 and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert leaks(place, out + err) == []


def test_keys_of_started_servers_are_in_no_file(place: Path, redraft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDRAFT_API_KEY")
    words = ["bench", "--target", str(place / "target"), "--prompts", str(place / "prompts.jsonl")]
    words += ["--out", str(place / "out" / "bench.json"), "--max-new-tokens", "8"]
    for name, drafting in (("plain", False), ("new", True)):
        script = place / f"serve-{name}.py"
        script.write_text(SERVE.format(fake=str(UNIT / "fake_server.py"), drafting=drafting))
        words += ["--server", f"{name}={sys.executable} {script} --api-key {SECRET} --port {{port}}"]
    (place / "out").mkdir()
    code, out, err = redraft(words)
    assert code == 0, err
    build_report([place / "out" / "bench.json"], place / "out" / "page.html")
    assert leaks(place / "out", out + err) == []
    assert "'***'" in (place / "out" / "bench-new.log").read_text()


@pytest.mark.parametrize(
    "text",
    [
        f"serve --api-key {SECRET}",
        f"serve --api_key={SECRET}",
        f"curl -H 'Authorization: Bearer {SECRET}' x",
        f"https://me:{SECRET}@host/x",
        f"https://host/x?token={SECRET}",
        f"VLLM_API_KEY={SECRET} serve",
        f"something {SECRET} else",
    ],
)
def test_what_is_hidden_in_a_command(text: str) -> None:
    assert SECRET not in without_secrets(text) and "***" in without_secrets(text)
