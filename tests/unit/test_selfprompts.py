"""The target writes users' questions itself: the opening, what is kept, and that a killed run ends like a whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft.data import selfprompts
from redraft.data.generate import Completion
from redraft.data.selfprompts import NearDuplicates, self_prompts, unusable, user_opening
from redraft.data.store import read_rows
from redraft.errors import UserError
from redraft.settings.sampler import Sampler
from redraft.target import Target

CHATML_OPENING = "<|im_start|>user\n"


# -- the opening -----------------------------------------------------------------------------------------------------
def test_the_opening_is_what_the_template_writes_before_a_user(tiny_tokenizer: Any) -> None:
    opening = user_opening(tiny_tokenizer)
    assert tiny_tokenizer.decode(opening.ids) == CHATML_OPENING
    assert opening.stop_ids == (2,) and opening.ending == "<|im_end|>"


def test_an_end_without_a_token_of_its_own_is_found_in_the_text(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    opening = user_opening(tiny_tokenizer)
    assert (opening.stop_ids, opening.ending) == ((), "[/INST]")
    assert tiny_tokenizer.decode(opening.ids) == "[INST] "


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", "cannot be told"),
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}", "cannot be told"),
        ("{% for m in messages %}<|im_start|>{{ m['content'][::-1] }}<|im_end|>{% endfor %}", "cannot be told"),
        ("{% for m in messages %}> {{ m['content'] }} | {{ m['content'] }} <{% endfor %}", "cannot be told"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses conversation with a lone user turn: roles must alternate",
        ),
    ],
)
def test_templates_without_an_opening_are_refused(template: str | None, text: str, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = template
    with pytest.raises(UserError, match=text) as caught:
        user_opening(tiny_tokenizer)
    assert "\n" not in str(caught.value)


# -- what is of use --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("Hello there", "empty"),
        ("?!? ... --", "empty"),
        ("What is the capital of France?", None),
        ("Solve 2 + 2", None),
        ("Tell me <|im_start|> about it", "marked"),
        ("Tell me about caf\ufffd today", "marked"),
        ("the same words " * 12, "repetitive"),
        ("no no no no no no no no no no", "repetitive"),
        ("Write a short story about a dragon that learns to bake bread for the people of a village.", None),
    ],
)
def test_what_is_of_use(text: str, reason: str | None) -> None:
    assert unusable(text, ("<|im_start|>", "<|im_end|>")) == reason


def test_near_duplicates_are_told_from_other_questions() -> None:
    kept = NearDuplicates()
    story = "Write a short story about a dragon that learns to bake bread in the village"
    assert kept.add(story)
    assert not kept.add(story.upper() + "!")
    assert not kept.add(story.replace("short", "long"))
    assert not kept.add("Please, for me: " + story)
    assert kept.add("Write a poem about a cat that learns to swim")
    assert kept.add("What is the capital of France?") and kept.add("What is the capital of Italy?")
    problem = "A train of {} cars leaves the station with {} people in it, how many people leave?"
    assert kept.add(problem.format(4, 90)) and kept.add(problem.format(6, 80))
    assert not kept.add(problem.format(6, 80).replace("station", "town"))
    assert kept.add("why so?") and not kept.add("Why so")


# -- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def lax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes noise: nothing but its ends and its doubles is judged."""
    monkeypatch.setattr(selfprompts, "LEAST_WORDS", 1)


@pytest.fixture
def target(tiny_target: Callable[..., Target]) -> Target:
    found = tiny_target()
    # a random model hardly ever ends a turn, so many tokens do here
    found.model.generation_config.eos_token_id = [2, *range(40, 60)]
    return found


def ask(target: Target, path: Path, count: int = 8, seed: int = 3, **settings: Any) -> Any:
    return self_prompts(target, count, seed, path, **({"batch_size": 5, "max_new_tokens": 20} | settings))


def test_the_same_seed_gives_the_same_questions(lax: None, target: Target, tmp_path: Path) -> None:
    found, report = ask(target, tmp_path / "a.jsonl")
    again, _ = ask(target, tmp_path / "b.jsonl", batch_size=3)
    other, _ = ask(target, tmp_path / "c.jsonl", seed=4)
    assert len(found) == 8 == len({c.messages[0]["content"] for c in found})
    assert found == again and {c.messages[0]["content"] for c in found} != {c.messages[0]["content"] for c in other}
    assert all(c.id.startswith("self/3/") and [m["role"] for m in c.messages] == ["user"] for c in found)
    assert report.draws == 8 + sum(report.dropped.values()) and "8 of" in report.summary()
    rows = read_rows(tmp_path / "a.jsonl")
    assert report.new == len(rows) >= report.draws
    assert report.tokens == sum(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    assert {target.tokenizer.decode(row.prompt_ids) for row in rows} == {CHATML_OPENING}
    # what is kept is what was drawn, without its end
    texts = {row.id: target.tokenizer.decode(row.response_ids[:-1]).strip() for row in rows}
    assert all(texts[f"self/{c.id.rpartition('/')[2]}"] == c.messages[0]["content"] for c in found)


def test_a_killed_run_ends_like_a_whole_one(
    lax: None, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = ask(target, tmp_path / "whole.jsonl")
    real = selfprompts.generate

    def killed(*args: Any, **kwargs: Any) -> Any:
        for number, done in enumerate(real(*args, **kwargs)):
            if number == 4:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(selfprompts, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(target, tmp_path / "killed.jsonl")
    kept = len(read_rows(tmp_path / "killed.jsonl"))
    monkeypatch.setattr(selfprompts, "generate", real)
    resumed, report = ask(target, tmp_path / "killed.jsonl")
    assert kept == 4 and resumed == whole
    assert report.new == len(read_rows(tmp_path / "killed.jsonl")) - kept
    # a finished run asks for nothing, and more questions begin with those of fewer
    again, report = ask(target, tmp_path / "killed.jsonl")
    assert again == whole and report.new == 0
    more, _ = ask(target, tmp_path / "killed.jsonl", count=11)
    assert more[:8] == whole


def test_draws_end_at_the_templates_end_of_turn(
    lax: None, tiny_target: Callable[..., Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model's own end tokens are others; and at a marked end that is no token."""
    target = tiny_target()
    stops: list[Any] = []

    def scripted(target: Target, requests: Any, *args: Any, stop_ids: Any) -> Any:
        stops.append(tuple(stop_ids))
        for n, request in enumerate(requests):
            ids = target.tokenizer(f"so it is {n} [/INST] yes", add_special_tokens=False).input_ids
            yield Completion(request, [*ids, 3] if n % 2 else ids, "stop" if n % 2 else "length")

    monkeypatch.setattr(selfprompts, "generate", scripted)
    found, report = ask(target, tmp_path / "a.jsonl", count=2, max_new_tokens=200)
    assert stops == [(2,)] and [c.messages[0]["content"] for c in found] == [
        "so it is 1 [/INST] yes",
        "so it is 3 [/INST] yes",
    ]
    assert report.dropped == {"unfinished": 2}
    target.tokenizer.chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    found, _ = ask(target, tmp_path / "b.jsonl", count=2, max_new_tokens=200)
    assert [c.messages[0]["content"] for c in found] == ["so it is 0", "so it is 1"]


def test_what_cannot_work_is_refused(lax: None, target: Target, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="1 or more"):
        ask(target, path, count=0)
    with pytest.raises(UserError, match="all the same"):
        ask(target, path, sampler=Sampler())
    with pytest.raises(UserError, match="context of 512"):
        ask(target, path, max_new_tokens=512)
    with pytest.raises(UserError, match=r"only \d+ different questions came out of 13 draws, 1 are asked for"):
        ask(target, path, count=1, max_new_tokens=1)
    ask(target, tmp_path / "b.jsonl")
    for settings in ({"seed": 4}, {"sampler": Sampler(0.7)}, {"max_new_tokens": 12}):
        with pytest.raises(UserError, match="draws of another target, template, sampler, seed or length"):
            ask(target, tmp_path / "b.jsonl", **settings)
