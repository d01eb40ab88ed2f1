"""Engines' workers take prompts in turn, and what goes wrong in one is shown and ends them all."""

from __future__ import annotations

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

from redraft.errors import UserError

ROOT = Path(__file__).resolve().parents[2] / "runs"
turns = runpy.run_path(str(Path(__file__).with_name("scripts.py")))["script"]("turns")

# An engine that answers with its own name and the time, and writes every call down; the second prompt kills "dies".
ENGINE = """
import signal, sys, threading, time
sys.path.insert(0, {root!r})
from worker import work, worker_parser

def start(options):
    def answer(prompt_ids, tokens):
        if options.draft == "dies" and prompt_ids == [2]:
            sys.exit("no more of this")
        with open({diary!r}, "a") as file:
            file.write(f"{{options.draft}} {{prompt_ids[0]}} {{tokens}}\\n")
        return {{"ids": prompt_ids, "rounds": 1, "seconds": 0.0}}
    return {{"engine": options.draft}}, answer

if "mute" in sys.argv:
    work = lambda *_: None
if "hangs" in sys.argv or "mute" in sys.argv:
    threading.Thread(target=time.sleep, args=(600,)).start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
work(start, worker_parser(None).parse_args())
"""


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``begin("a", "b")`` -> what starts workers of these names, on three prompts."""
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    (tmp_path / "engine.py").write_text(ENGINE.format(root=str(ROOT), diary=str(tmp_path / "diary")))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"id": i, "prompt_ids": [i]}) + "\n" for i in (1, 2, 3)))

    def worker(name: str):
        record = tmp_path / f"{name}.json"
        command = [sys.executable, str(tmp_path / "engine.py"), "--target", "t", "--draft", name]
        command += ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(record), "--warmup", "1"]
        command += ["--speculative-tokens", "3", "--max-new-tokens", "5"]
        return turns.Worker(f"{name} failed", command, record, {})

    return lambda *names: {name: partial(worker, name) for name in names}


def test_every_prompt_goes_to_one_after_the_other_in_a_changing_order(begin, tmp_path: Path) -> None:
    said: list[str] = []
    found = turns.take_turns(begin("a", "b"), 3, said.append)
    assert [(name, each["engine"], [row["id"] for row in each["prompts"]]) for name, each in found.items()] == [
        ("a", "a", [1, 2, 3]),
        ("b", "b", [1, 2, 3]),
    ]
    # Warm-up first, each by itself; then in turns.
    assert (tmp_path / "diary").read_text().split("\n")[:-1] == [
        *("a 1 5", "b 1 5"),
        *("a 1 5", "b 1 5", "b 2 5", "a 2 5", "a 3 5", "b 3 5"),
    ]
    assert said[0] == "a: starting ..." and said[-1] == "prompt 3 of 3: answered by a, b"


def test_a_worker_that_dies_is_shown_with_its_log_and_ends_the_others(begin, tmp_path: Path) -> None:
    started = []

    def watched(start):
        started.append(start())
        return started[-1]

    with pytest.raises(UserError, match=r"dies failed \(exit 1\); the end of .*dies.log: .* \| no more of this"):
        turns.take_turns({name: partial(watched, start) for name, start in begin("a", "dies").items()}, 3)
    assert all(worker.process.poll() is not None for worker in started)
    assert not (tmp_path / "a.json").exists() and not (tmp_path / "dies.json").exists()


def test_a_worker_that_hangs_while_it_ends_is_ended(begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "ENDING", 0.5)
    started = begin("hangs", "a")
    worker = started["hangs"]()
    found = turns.take_turns({"hangs": lambda: worker, "a": started["a"]}, 3)
    assert [len(each["prompts"]) for each in found.values()] == [3, 3]
    assert worker.process.poll() is not None
    mute = begin("mute")["mute"]()
    with pytest.raises(UserError, match="mute failed: it neither ends nor leaves a record"):
        mute.finish()
    mute.close()
    assert mute.process.poll() is not None


def test_a_worker_ends_when_nobody_gives_turns(begin) -> None:
    worker = begin("a")["a"]()
    worker.wait()
    worker.process.stdin.close()
    assert worker.process.wait(timeout=20) == 1 and "whoever gives the turns is gone" in worker.log.read_text()
    worker.close()
