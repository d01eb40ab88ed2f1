"""The chat template's arguments, and one date for a run however often it is stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from redraft.adaptation.claim import claim_run
from redraft.adaptation.models import settle_template
from redraft.data.generate import Completion
from redraft.data.regenerate import regenerate
from redraft.data.selfprompts import user_opening
from redraft.data.shapes import Conversation, Turns
from redraft.data.store import read_rows
from redraft.data.template import TemplateSettings, date_path, settings_of, template_ids, template_record, use_template
from redraft.data.traces import read_traces
from redraft.errors import UserError
from redraft.settings.runs import AdaptConfig
from redraft.settings.sampler import Sampler
from redraft.settings.texts import parse_template_args

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MOODY = "{% if mood is defined %}mood {{ mood }}{{ level | default(0) }}\n{% endif %}" + TURN + OPEN
DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
DATED += "on {{ date_string }}\n" + TURN + OPEN
ASK = [{"role": "user", "content": "so?"}]


def text(tokenizer: Any, messages: Sequence[Any] = ASK) -> str:
    return str(tokenizer.decode(template_ids(tokenizer, "a", messages)))


# -- arguments -------------------------------------------------------------------------------------------------------
def test_values_are_json_or_text() -> None:
    given = ["enable_thinking=false", "effort=high", "n=3", 'date="26"', "day=26 Jul", "extra={}", "none=null"]
    assert parse_template_args(given) == {
        "enable_thinking": False, "effort": "high", "n": 3, "date": "26", "day": "26 Jul", "extra": {}, "none": None,
    }  # fmt: skip


@pytest.mark.parametrize("given", ["enable_thinking", "=1", "a b=1", "on=True", "on=False", "on=None"])
def test_arguments_that_would_be_misread_are_refused(given: str) -> None:
    with pytest.raises(UserError, match="template argument"):
        parse_template_args([given])


def test_arguments_reach_every_prompt_and_a_rows_own_win(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = MOODY
    assert "mood" not in text(tiny_tokenizer)
    use_template(tiny_tokenizer, {"mood": "good", "level": 2})
    assert text(tiny_tokenizer).startswith("mood good2\n")
    assert text(tiny_tokenizer, Turns(ASK, (), {"mood": "bad"})).startswith("mood bad2\n")
    assert tiny_tokenizer.decode(user_opening(tiny_tokenizer).ids) == "mood good2\n<|im_start|>user\n"
    assert template_record(tiny_tokenizer) == {"template": {"arguments": {"mood": "good", "level": 2}, "date": None}}
    assert text(copy.deepcopy(tiny_tokenizer)).startswith("mood good2\n")


@pytest.mark.parametrize(
    ("name", "why"), [("mod", "knows no argument 'mod'"), ("tokenize", "is no argument of a chat")]
)
def test_arguments_that_do_nothing_or_harm_are_refused(tiny_tokenizer: Any, name: str, why: str) -> None:
    tiny_tokenizer.chat_template = MOODY
    with pytest.raises(UserError, match=why):
        use_template(tiny_tokenizer, {name: 1})


def test_a_saved_tokenizer_does_not_carry_a_runs_settings(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.chat_template = MOODY
    use_template(tiny_tokenizer, {"mood": "good"})
    tiny_tokenizer.save_pretrained(tmp_path)
    assert not any("redraft" in path.read_text() for path in tmp_path.iterdir())


def test_a_run_directory_belongs_to_its_arguments(tmp_path: Path) -> None:
    values = {"target": "t", "draft": "d", "prompts": "p", "out": tmp_path / "run"}
    claim_run(AdaptConfig(**values))
    config = tmp_path / "run" / "config.json"
    stored = json.loads(config.read_text())
    assert stored.pop("template_arg") == {} and stored.pop("seal")
    config.write_text(json.dumps(stored))  # a directory of before there were any
    claim_run(AdaptConfig(**values))
    other = AdaptConfig(**values | {"template_arg": {"enable_thinking": False}})
    (tmp_path / "run" / "responses.jsonl").touch()
    with pytest.raises(UserError, match="another template_arg"):
        claim_run(other)


def test_a_run_that_was_refused_before_it_began_leaves_its_directory_free(tmp_path: Path) -> None:
    values = {"target": "t", "draft": "d", "prompts": "p", "out": tmp_path / "run"}
    claim_run(AdaptConfig(**values))
    claim_run(AdaptConfig(**values | {"heldout_prompts": 4}))
    config = tmp_path / "run" / "config.json"
    assert json.loads(config.read_text())["heldout_prompts"] == 4
    config.write_text('{"target": "a file of somebody else"}')
    with pytest.raises(UserError, match="belongs to a run with another"):
        claim_run(AdaptConfig(**values))


# -- the date --------------------------------------------------------------------------------------------------------
def shown(tokenizer: Any, moment: datetime) -> str:
    use_template(tokenizer, {}, moment)
    return text(tokenizer)


FORMATS = "%d %b %Y|%Y-%m-%d|%A, %B %d|%H:%M:%S|%-d.%-m.|%j %y|%x|%D %T|%F %R|%I %p"


@pytest.mark.parametrize("form", FORMATS.split("|"))
def test_a_template_is_shown_the_moment_as_the_clock_would_show_it(tiny_tokenizer: Any, form: str) -> None:
    """The template begins with blanks and a break, which what stands in front of it must leave as they are."""
    moment, clock = datetime(2027, 3, 4, 15, 6, 7), f"{{{{ strftime_now('{form}') if strftime_now is defined }}}}"
    template = "\n  {% if messages %}\nat CLOCK <|im_end|>\n" + TURN + OPEN + "{% endif %}"
    tiny_tokenizer.chat_template = template.replace("CLOCK", clock)
    found = shown(tiny_tokenizer, moment)
    tiny_tokenizer.chat_template = template.replace("CLOCK", moment.strftime(form))
    assert found == text(tiny_tokenizer)


def test_the_hour_counts_where_the_template_writes_it(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + TURN + OPEN
    assert shown(tiny_tokenizer, datetime(2027, 3, 4, 15, 6, 7)).startswith("04 Mar 2027 15:06:07\n")
    tiny_tokenizer.chat_template = "{{ strftime_now(form) }}\n" + TURN + OPEN
    use_template(tiny_tokenizer, {"form": "%j %H"}, datetime(2027, 3, 4, 15, 6, 7))
    assert text(tiny_tokenizer).startswith("063 15\n")


class Engine:
    def answer(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        yield from (Completion(request, [9, 2], "stop") for request in requests)


@pytest.fixture
def answers(tmp_path: Path, tiny_facts: Any) -> Callable[..., Any]:
    talks = [Conversation(id, ASK) for id in "abc"]

    def call(tokenizer: Any, name: str = "r.jsonl") -> Any:
        return regenerate(Engine(), talks, tiny_facts(tokenizer), [Sampler()], tmp_path / name, 4)

    return call


def dated(builders: Any, days: int) -> Any:
    """The tokenizer as another process opens it that many days later."""
    tokenizer = builders.build_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.redraft_template = TemplateSettings(moment=datetime(2027, 3, 4) + timedelta(days))
    return tokenizer


def test_a_run_that_goes_on_another_day_keeps_its_rows_and_its_date(
    answers: Callable[..., Any], builders: Any, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    answers(dated(builders, 0))
    whole = read_rows(path)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    report = answers(tokenizer := dated(builders, 9))
    assert (report.kept, report.new) == (1, 2)
    assert sorted(read_rows(path), key=lambda row: row.id) == sorted(whole, key=lambda row: row.id)
    assert tokenizer.decode(whole[0].prompt_ids).startswith("on 04 Mar 2027\n")
    # Behind the run the process has its own date again.
    assert settings_of(tokenizer).moment == datetime(2027, 3, 13)


def test_rows_without_their_date_are_refused_by_name(
    answers: Callable[..., Any], builders: Any, tmp_path: Path
) -> None:
    answers(dated(builders, 0))
    date_path(tmp_path / "r.jsonl").unlink()
    with pytest.raises(UserError, match=r"made with another prompt \(the template writes the date: .*r\.date\.json"):
        answers(dated(builders, 9))
    date_path(tmp_path / "r.jsonl").write_text("[]")
    with pytest.raises(UserError, match=r"r\.date\.json holds no date"):
        answers(dated(builders, 9))
    (tmp_path / "r.jsonl").unlink()
    answers(dated(builders, 9))  # a new run, with a date of its own
    assert json.loads(date_path(tmp_path / "r.jsonl").read_text()) == {"date": "2027-03-13T00:00:00"}


def test_a_template_without_a_date_leaves_no_file(answers: Callable[..., Any], builders: Any, tmp_path: Path) -> None:
    answers(builders.build_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_run_directory_has_one_date_for_all_its_files(
    answers: Callable[..., Any], builders: Any, tmp_path: Path
) -> None:
    (run := tmp_path / "run").mkdir()
    (run / "date.json").write_text('{"date": "2027-03-04T10:00:00"}')
    tokenizer = dated(builders, 9)
    settle_template(tokenizer, {}, run)
    answers(tokenizer, "run/responses.jsonl")
    assert text(tokenizer).startswith("on 04 Mar 2027\n")
    assert not date_path(run / "responses.jsonl").exists()
    assert template_record(tokenizer)["template"]["date"] == "2027-03-04T10:00:00"
    plain = builders.build_tokenizer()
    settle_template(plain, {}, tmp_path)
    assert not date_path(tmp_path).exists()


def test_served_text_has_the_date_of_its_record(builders: Any, tmp_path: Path) -> None:
    path, noon = tmp_path / "log.jsonl", datetime(2026, 7, 26, 12)
    record = {"messages": ASK, "completion": "yes"}
    tokenizer = dated(builders, 0)

    def prompt(**more: Any) -> str:
        path.write_text(json.dumps(record | more) + "\n")
        return str(tokenizer.decode(read_traces(path, tokenizer, "cafe")[0].prompt_ids))

    for created in (noon.timestamp(), noon.isoformat(), noon.astimezone().isoformat()):
        assert prompt(created=created).startswith("on 26 Jul 2026\n")
    assert prompt(chat_template_kwargs={"date_string": "1 May"}).startswith("on 1 May\n")
    for created in (None, "noon", True, 1e300):
        with pytest.raises(UserError, match=r"log\.jsonl:1: .*created"):
            prompt(created=created)
    use_template(tokenizer, {"date_string": "2 May"})
    assert prompt().startswith("on 2 May\n")
