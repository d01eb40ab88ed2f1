"""What every registered suite must keep; a new suite inherits these tests by being registered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from redraft.data.suites import DATA_VARIABLE, Suite, load_suite, suite_of
from redraft.evaluate.quality import RULES, kind_of, score
from redraft.registries import SUITES

DATA = Path(os.environ.get(DATA_VARIABLE) or Path(__file__).resolve().parents[2].parent / "shared" / "data")


@pytest.fixture(params=SUITES.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def suite(name: str) -> Suite:
    if SUITES.get(name).make is None and not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA}; name one with {DATA_VARIABLE}")
    return load_suite(name, DATA)


def test_says_what_it_is_and_how_it_is_scored(name: str) -> None:
    definition = SUITES.get(name)
    assert definition.about and definition.licence and definition.home
    assert definition.make is not None or (definition.file and definition.convert)
    assert not definition.scoring or definition.scoring in RULES
    assert suite_of(name) == name and kind_of(name) == definition.scoring


def test_items_ask_the_user_last_and_have_ids_tasks_and_a_source(suite: Suite, name: str) -> None:
    assert len(suite.items) >= 60 and suite.licence and suite.source
    assert len({item.id for item in suite.items}) == len(suite.items)
    for item in suite.items:
        roles = [message["role"] for message in item.conversation.messages]
        assert roles[-1] == "user" and "assistant" not in roles
        assert item.conversation.id == item.id
        assert suite_of(item.task) == name


def test_references_stay_out_of_the_prompts(suite: Suite) -> None:
    for item in suite.items:
        # the reference of a code suite is the function's name, which the prompt must hold
        if item.reference is not None and kind_of(item.task) != "parses":
            assert item.reference not in [message["content"] for message in item.conversation.messages]


def test_a_scored_suite_has_a_reference_everywhere(suite: Suite) -> None:
    rule = kind_of(suite.name)
    for item in suite.items if rule else []:
        assert item.reference is not None
        assert score(rule, "", item.reference) is False


def test_the_order_depends_on_the_seed_and_a_limit_takes_its_beginning(suite: Suite, name: str) -> None:
    assert load_suite(name, DATA).items == suite.items
    other = load_suite(name, DATA, seed=1)
    assert other.items != suite.items
    assert sorted(i.id for i in other.items) == sorted(i.id for i in suite.items)
    assert load_suite(name, DATA, limit=7).items == suite.items[:7]


def test_stands_in_the_documentation_with_licence_and_data_set(name: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "suites.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    assert SUITES.get(name).licence in line and SUITES.get(name).hub in line
    assert (SUITES.get(name).scoring or "|  |") in line.replace("| |", "|  |")
