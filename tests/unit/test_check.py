"""The check names what is wrong: every fault here is really there, in a draft's file or in a server, one at a time."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import redraft as api
from redraft.adaptation.check.causes import CAUSES

pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("check_rig.py"))))
TARGET = str(RIG.PAIR / "target")


@pytest.fixture
def check() -> Callable[..., Any]:
    """``check(draft, ...)`` -> the result, on the twelve prompts."""

    def run(draft: Any, **more: Any) -> Any:
        given = {"prompts": RIG.ASKS, "limit": RIG.PROMPTS, "max_new_tokens": RIG.TOKENS, "gamma": RIG.GAMMA}
        return api.check(draft, api.TargetSpec(TARGET, "float32"), **(given | more))

    return run


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    started: list[Any] = []

    def make(**fault: Any) -> Any:
        started.append(RIG.Engine(**fault))
        return started[-1]

    yield make
    for one in started:
        one.stop()


# -- planted ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RIG.FILES)
def test_what_is_wrong_with_a_file_is_named(name: str, check: Any, tmp_path: Path) -> None:
    planted = RIG.FILES[name]
    asked = {"prompts": RIG.other_prompts(tmp_path / "other.jsonl")} if planted.other else {}
    found = check(planted.write(tmp_path / "draft"), **planted.more, **asked)
    assert found.cause == planted.cause, found


@pytest.mark.parametrize("name", RIG.ENGINES)
def test_what_is_wrong_at_a_server_is_named(name: str, check: Any, engine: Any) -> None:
    cause, fault = RIG.ENGINES[name]
    found = check(RIG.PAIR / "aligned", server=engine(**fault).url)
    assert found.cause == cause, found


def test_enough_causes_are_told_apart() -> None:
    planted = {each.cause for each in RIG.FILES.values()} | {cause for cause, _ in RIG.ENGINES.values()}
    assert len(planted - {None}) >= 20 and planted - {None} <= set(CAUSES)
