"""Fixtures that more than one file of unit tests uses."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report page holds empty pictures: drawing them takes most of the time, and many tests read its text alone."""
    monkeypatch.setattr("redraft.reports.plots.svg", lambda figure, name, about: "<svg></svg>")


@pytest.fixture(scope="session")
def fake_server() -> Any:
    """The class of the server that answers by known rules."""
    return runpy.run_path(str(Path(__file__).with_name("fake_server.py")))["FakeServer"]


@pytest.fixture
def fake(fake_server: Any) -> Iterator[Callable[..., Any]]:
    """``fake(engine, drafting, ...)`` starts a server that is stopped at the end of the test."""
    started: list[Any] = []

    def make(*arguments: Any, **options: Any) -> Any:
        started.append(fake_server(*arguments, **options))
        return started[-1]

    yield make
    for one in started:
        one.stop()
