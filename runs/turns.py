"""Several engines, each in a process of its own, take the same prompts in turn.

Loaded one after another and then asked prompt by prompt, in an order that changes, they meet the same minutes of the
machine: its clock and its neighbours change within the quarter of an hour that one engine after the other would take,
and a speed-up would be as much a figure of that as of the draft.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redraft.errors import UserError

LOG_LINES = 25
# Threads of the engine that has just answered wait for more in a busy loop; they must not do so in another's time.
PAUSE = 0.3
# Seconds that an engine which has answered everything may take to end.
ENDING = 60.0


class Worker:
    """One engine's process (``worker.py``). Its output goes to a log beside its record."""

    def __init__(self, failure: str, command: list[str], record: Path, environment: dict[str, str]) -> None:
        """``failure`` begins what is said where it fails. The process sees its own environment of packages alone."""
        self.failure, self.record, self.log = failure, record, record.with_suffix(".log")
        record.unlink(missing_ok=True)
        seen = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
        self.told, tells = os.pipe()
        self.heard = b""
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [*command, "--turns", str(tells)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=seen,
                pass_fds=(tells,),
            )
        os.close(tells)

    def wait(self) -> None:
        """Wait until the worker tells that it is ready, or done with its turn. Raises ``UserError`` when it ends."""
        while b"\n" not in self.heard:
            if select.select([self.told], [], [], 1.0)[0]:
                heard = os.read(self.told, 4096)
                self.heard += heard
                if not heard:
                    self.process.wait()
            if b"\n" not in self.heard and self.process.poll() is not None:
                raise self.failed()
        self.heard = self.heard.partition(b"\n")[2]

    def turn(self) -> None:
        """Let the worker answer its next prompt. Raises ``UserError`` when it ends instead."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()
            raise self.failed() from None
        self.wait()

    def finish(self) -> dict[str, Any]:
        """What the worker left. Raises ``UserError`` when that is nothing.

        A record is whole once it is there: an engine that hangs while it ends has no more to say.
        """
        try:
            self.process.wait(ENDING)
        except subprocess.TimeoutExpired:
            if not self.record.is_file():
                raise UserError(f"{self.failure}: it neither ends nor leaves a record; see {self.log}") from None
        else:
            if self.process.returncode or not self.record.is_file():
                raise self.failed()
        return json.loads(self.record.read_text())

    def failed(self) -> UserError:
        tail = " | ".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        return UserError(f"{self.failure} (exit {self.process.returncode}); the end of {self.log}: {tail}")

    def close(self) -> None:
        """End the process if it has not ended by itself."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(ENDING)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        os.close(self.told)


def take_turns(
    start: Mapping[str, Callable[[], Worker]], prompts: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """The records of all workers, each prompt answered by one after the other. Raises ``UserError``."""
    workers: dict[str, Worker] = {}
    try:
        for name, begin in start.items():
            say(f"{name}: starting ...")
            workers[name] = begin()
            workers[name].wait()
        names = list(workers)
        for number in range(prompts):
            for name in (*names[number % len(names) :], *names[: number % len(names)]):
                time.sleep(PAUSE)
                workers[name].turn()
            say(f"prompt {number + 1} of {prompts}: answered by {', '.join(names)}")
        return {name: worker.finish() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
