"""Fixtures that more than one file of unit tests uses."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fake() -> Iterator[Callable[..., Any]]:
    """``fake(engine, drafting, ...)`` starts a server that is stopped at the end of the test."""
    server = runpy.run_path(str(Path(__file__).with_name("fake_server.py")))["FakeServer"]
    started: list[Any] = []

    def make(*arguments: Any, **options: Any) -> Any:
        started.append(server(*arguments, **options))
        return started[-1]

    yield make
    for one in started:
        one.stop()
