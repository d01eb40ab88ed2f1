"""Progress: rates, time left and the plain lines, on a clock that the test turns."""

from __future__ import annotations

import io

import pytest

from redraft.progress import Meter, PlainProgress, clock, fields_text, progress_bar


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_meter_counts_from_the_first_report() -> None:
    now = Clock()
    meter = Meter(1000, now)
    assert meter.rate is None and meter.text("tokens") == ""
    meter.update(400)  # a resumed run starts here
    now.time += 4
    meter.update(600)
    assert meter.rate == 50
    assert meter.text("tokens") == "50 tokens/s, 0:08 left"
    meter.update(1200)
    assert meter.text("tokens").endswith("0:00 left")


def test_what_goes_before_the_work_does_not_count() -> None:
    now = Clock()
    meter = Meter(1000, now)
    for _ in range(3):  # answers are written, nothing is trained yet
        meter.update(0)
        now.time += 60
    meter.update(0)
    now.time += 4
    meter.update(40)
    assert meter.text("units") == "10 units/s, 1:36 left"
    assert meter.text("") == "1:36 left"


def test_meter_without_total_gives_the_rate_only() -> None:
    now = Clock()
    meter = Meter(None, now)
    meter.update(0)
    now.time += 10
    meter.update(25)
    assert meter.text("rows") == "2.5 rows/s"


def test_plain_lines_come_at_their_pace() -> None:
    now, stream = Clock(), io.StringIO()
    progress = PlainProgress("train", 100, "tokens", stream, every=10, now=now)
    for second in range(25):
        now.time = 100.0 + second
        progress.update(4 * second, loss=1.5, heldout_tau=None)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "train: 8%  4.0 tokens/s, 0:23 left  loss 1.500"
    assert lines[1] == "train: 48%  4.0 tokens/s, 0:13 left  loss 1.500"


def test_rows_tell_their_tokens_a_second_too() -> None:
    now, stream = Clock(), io.StringIO()
    progress = PlainProgress("regenerate", 40, "rows", stream, every=10, now=now)
    progress.update(0, tokens=0)
    now.time += 5
    progress.update(10, tokens=400)
    assert stream.getvalue() == "regenerate: 25%  80 tokens/s, 2.0 rows/s, 0:15 left  tokens 400\n"


def test_work_of_unknown_size_says_that_it_ended() -> None:
    stream = io.StringIO()
    with progress_bar("start vocabulary", None, "tokens", stream):
        pass
    assert stream.getvalue() == "start vocabulary: done\n"


@pytest.mark.parametrize(("seconds", "text"), [(7.9, "0:07"), (187, "3:07"), (3729, "1:02:09")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_fields() -> None:
    assert fields_text({"step": 3, "heldout_tau": 2.1, "loss": None}) == "step 3  held-out tau 2.100"


def test_a_pipe_gets_a_last_line() -> None:
    stream = io.StringIO()
    with progress_bar("answer", 10, "rows", stream) as progress:
        progress.update(10, failed=0)
    assert stream.getvalue() == "answer: 100%  failed 0\n"


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress_bar("answer", 10, "rows", stream) as progress:
        progress.update(10, heldout_tau=2.5)
    assert "answer" in stream.getvalue() and "100%" in stream.getvalue() and "held-out tau 2.500" in stream.getvalue()
