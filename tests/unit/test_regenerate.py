"""Regeneration: what is asked, what is stored, and that a killed run ends like one that was not killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.data import generate as generation
from redraft.data.generate import Completion, Request
from redraft.data.regenerate import InProcessEngine, RegenerationReport, expected_rows, regenerate
from redraft.data.shapes import Conversation
from redraft.data.store import Failure, Row, RowWriter, failures_path, read_rows
from redraft.errors import UserError
from redraft.features import FeatureStore, RowFeatures
from redraft.settings.sampler import Sampler
from redraft.target import Target

EOS = 2


def listed_failures(path: Path) -> list[Failure]:
    """What the file beside the response file ``path`` lists; nothing where there is none."""
    place = failures_path(path)
    return [Failure(**json.loads(line)) for line in place.read_text().splitlines()] if place.exists() else []


def talk(id: str, *turns: str) -> Conversation:
    """User turns with a reference answer behind each, and a system turn in front of long talks."""
    messages = [{"role": "system", "content": "be kind"}] if len(turns) > 1 else []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "REFERENCE"}]
    return Conversation(id, messages)


TALKS = [
    talk("a", "the hat"),
    talk("b", "one", "two", "three"),
    talk("c", "why is it so?", "and then"),
    talk("d", "no"),
]


class ScriptedEngine:
    """Answers by a rule of the prompt alone, last request first; ``stop_after`` and ``refuse`` make it fail."""

    def __init__(self, stop_after: int | None = None, refuse: Sequence[str] = ()) -> None:
        self.stop_after, self.refuse = stop_after, refuse
        self.asked: list[Request] = []

    def answer(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        tokenizer: Any,
        eos_ids: Sequence[int],
        among: Sequence[Request] = (),
        features: bool = False,
    ) -> Iterator[Completion | Failure]:
        for request in reversed(requests):
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            if request.key in self.refuse:
                yield Failure(request.key, "status 400")
                continue
            start = sum(request.prompt_ids) + int(10 * request.sampler.temperature)
            ids = [4 + (start + 7 * i) % 99 for i in range(1 + start % max_new_tokens)]
            stops = len(ids) < max_new_tokens
            yield Completion(request, [*ids, EOS] if stops else ids, "stop" if stops else "length")


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Any, tiny_facts: Any) -> Callable[..., RegenerationReport]:
    def call(engine: Any, conversations: Sequence[Conversation] = TALKS, **settings: Any) -> RegenerationReport:
        given: dict[str, Any] = {
            "target": tiny_facts(tiny_tokenizer),
            "samplers": [Sampler(), Sampler(0.7, 0, 0.9)],
            "out_path": tmp_path / "r.jsonl",
            "max_new_tokens": 9,
            "seed": 5,
        }
        return regenerate(engine, conversations, **(given | settings))

    return call


def by_key(rows: Sequence[Row]) -> dict[str, Row]:
    assert len({row.key for row in rows}) == len(rows)
    return {row.key: row for row in rows}


# -- what is asked and stored ----------------------------------------------------------------------------------------
def test_every_turn_under_every_sampler_is_stored(run: Callable, tmp_path: Path, tiny_tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    report = run(ScriptedEngine(), progress=lambda done, tokens: told.append((done, tokens)))
    rows = by_key(read_rows(tmp_path / "r.jsonl"))
    turns = [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("d", 0)]
    assert rows.keys() == {f"{i}@T{t}" + (f"#{n}" if n else "") for i, n in turns for t in ("0", "0.7")}
    assert report.new == len(rows) == expected_rows(TALKS, [Sampler(), Sampler(0.7)]) == 14
    assert (report.kept, report.failures) == (0, [])
    assert report.response_tokens == sum(len(row.response_ids) for row in rows.values())
    assert report.prompt_tokens == sum(len(row.prompt_ids) for row in rows.values())
    assert report.bytes_written == (tmp_path / "r.jsonl").stat().st_size
    assert told[-1] == (14, report.response_tokens) and told == sorted(told)
    assert {(row.seed, row.target_hash) for row in rows.values()} == {(5, "cafe")}
    assert rows["d@T0.7"].top_p == 0.9 and rows["d@T0"].top_p == 1.0
    assert not failures_path(tmp_path / "r.jsonl").exists()
    assert "14 responses" in report.summary()


def test_a_later_prompt_holds_the_models_own_replies(run: Callable, tmp_path: Path, tiny_tokenizer: Any) -> None:
    run(ScriptedEngine())
    rows = by_key(read_rows(tmp_path / "r.jsonl"))
    for temperature in ("0", "0.7"):
        one, two, three = (rows[f"b@T{temperature}{turn}"] for turn in ("", "#1", "#2"))
        replies = [tiny_tokenizer.decode(row.response_ids, skip_special_tokens=True) for row in (one, two)]
        text = tiny_tokenizer.decode(three.prompt_ids)
        assert text == (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
            f"<|im_start|>assistant\n{replies[0]}<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
            f"<|im_start|>assistant\n{replies[1]}<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
        )
        assert "REFERENCE" not in text and tiny_tokenizer.decode(one.prompt_ids) in text
    assert rows["b@T0#1"].prompt_ids != rows["b@T0.7#1"].prompt_ids


def test_turns_are_asked_round_by_round(run: Callable) -> None:
    engine = ScriptedEngine()
    run(engine, samplers=[Sampler()])
    turns = [int(request.key.partition("#")[2] or 0) for request in engine.asked]
    assert turns == sorted(turns) == [0, 0, 0, 0, 1, 1, 2]


# -- the target in this process --------------------------------------------------------------------------------------
@torch.inference_mode()
def greedy_stream(target: Target, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """One sequence, one token at a time."""
    cache = target.new_cache(len(prompt_ids) + max_new_tokens)
    feed, response = torch.tensor([list(prompt_ids)]), []
    while len(response) < max_new_tokens:
        token = int(target.logits(target.forward(feed, cache).hidden_BTH[:, -1]).argmax())
        response.append(token)
        if token in target.eos_ids:
            break
        feed = torch.tensor([[token]])
    return response


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_batched_greedy_equals_a_single_stream(
    run: Callable, tmp_path: Path, tiny_target: Callable[..., Target], architecture: str
) -> None:
    target = tiny_target(architecture, num_hidden_layers=2)
    # an end token that does come up, so that sequences leave the batch at different times
    reached = greedy_stream(target, [1, 90, 88, 103], 12)
    target.model.generation_config.eos_token_id = [2, reached[6]]
    many = [talk(f"p{i}", "abc def ghi"[: 1 + i], *(["more"] * (i % 3 == 0))) for i in range(11)]
    engine = InProcessEngine(target, batch_size=4)
    run(engine, many, samplers=[Sampler()], max_new_tokens=12, target=target)
    rows = read_rows(tmp_path / "r.jsonl")
    assert len(rows) == 15
    for row in rows:
        assert row.response_ids == greedy_stream(target, row.prompt_ids, 12), row.key
        assert row.finish_reason == ("stop" if row.response_ids[-1] in target.eos_ids else "length")


def test_one_long_prompt_does_not_set_the_memory_of_every_slot(
    tiny_target: Callable[..., Target], monkeypatch: Any
) -> None:
    target, rooms = tiny_target("llama", num_hidden_layers=2), list[tuple[int, int]]()

    class Counted(generation.SlotCache):
        def __init__(self, layers: int, size: int, capacity: int, device: torch.device) -> None:
            super().__init__(layers, size, capacity, device)
            rooms.append((size, capacity))

    monkeypatch.setattr(generation, "SlotCache", Counted)
    lengths = (5, 6, 9, 11, 16, 100)
    requests = [Request(f"p{n}", [1, *range(20, 19 + n)], Sampler()) for n in lengths]
    found = {each.request.key: each.response_ids for each in generation.generate(target, requests, 6, 4)}
    assert rooms == [(4, 22), (1, 106)]
    assert found == {r.key: greedy_stream(target, r.prompt_ids, 6) for r in requests}
    # What is left of a run that was stopped goes through slots of the same shape.
    rooms.clear()
    left = [each for each in requests if each.key in ("p9", "p16")]
    rest = generation.generate(target, left, 6, 4, among=requests)
    assert {each.request.key: each.response_ids for each in rest} == {each.key: found[each.key] for each in left}
    assert rooms == [(4, 22)]


def test_sampled_responses_do_not_depend_on_the_batch(
    run: Callable, tmp_path: Path, tiny_target: Callable[..., Target]
) -> None:
    target, samplers = tiny_target(num_hidden_layers=2), [Sampler(1.0), Sampler(0.7, 20), Sampler(0.3, 0, 0.9)]
    found = []
    for batch_size in (1, 5):
        path = tmp_path / f"{batch_size}.jsonl"
        run(InProcessEngine(target, batch_size), samplers=samplers, out_path=path)
        found.append(by_key(read_rows(path)))
    assert found[0] == found[1]
    other = tmp_path / "other.jsonl"
    run(InProcessEngine(target, 5), samplers=samplers, out_path=other, seed=6)
    first = [row.response_ids for row in found[0].values() if row.temperature == 1.0]
    assert [row.response_ids for row in read_rows(other) if row.temperature == 1.0] != first


# -- kills -----------------------------------------------------------------------------------------------------------
def test_cut_at_any_byte_a_run_ends_like_one_that_was_not_killed(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(ScriptedEngine())
    data, whole = path.read_bytes(), by_key(read_rows(path))
    for cut in [*range(0, len(data), 23), len(data) - 1, len(data)]:
        path.write_bytes(data[:cut])
        engine = ScriptedEngine()
        report = run(engine)
        assert by_key(read_rows(path)) == whole, cut
        assert report.new == len(engine.asked) and report.new + report.kept == 14
        # nothing whole was asked again: what is missing is at most what the cut removed
        assert report.kept == data[: cut + 1].count(b"\n")


def test_the_real_engine_resumes_to_the_same_rows(
    run: Callable, tmp_path: Path, tiny_target: Callable[..., Target]
) -> None:
    path, target = tmp_path / "r.jsonl", tiny_target()
    run(InProcessEngine(target, 4))
    data, whole = path.read_bytes(), by_key(read_rows(path))
    for cut in (0, len(data) // 3, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:cut])
        run(InProcessEngine(target, 4))
        assert by_key(read_rows(path)) == whole


def test_a_row_on_the_disk_has_its_features_there(
    run: Callable, tmp_path: Path, tiny_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, the resumed run has the bits of the whole one, which a pass made afterwards would not give."""
    path, target = tmp_path / "r.jsonl", tiny_target()
    monkeypatch.setattr("redraft.data.regenerate.FLUSH_FEATURES_BYTES", 3 * 4096)
    whole = FeatureStore(tmp_path / "whole", {})
    run(InProcessEngine(target, 4), features=whole)
    data, rows = path.read_bytes(), [row for row in read_rows(path) if len(row.response_ids) > 1]
    assert len(rows) > 9 and len(set(whole.index.values())) > 2
    for cut in (len(data) // 3, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:cut])
        store = FeatureStore(tmp_path / f"cut-{cut}", {})
        with RowWriter(path) as kept:
            store.put([RowFeatures(row, *whole.get(row)) for row in kept.rows if len(row.response_ids) > 1])
        run(InProcessEngine(target, 4), features=store)
        assert store.build(target, rows) == 0
        for row in rows:
            assert all(torch.equal(one, other) for one, other in zip(store.get(row), whole.get(row), strict=True))


def test_features_reach_the_disk_before_their_rows(
    run: Callable, tmp_path: Path, tiny_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(self: RowWriter, rows: Sequence[Row]) -> None:
        raise KeyboardInterrupt

    store = FeatureStore(tmp_path / "features", {})
    monkeypatch.setattr("redraft.data.regenerate.FLUSH_FEATURES_BYTES", 1)
    monkeypatch.setattr(RowWriter, "append", torn)
    with pytest.raises(KeyboardInterrupt):
        run(InProcessEngine(tiny_target(), 4), features=store)
    assert store.index and not (tmp_path / "r.jsonl").exists()


def test_rows_of_other_prompts_have_no_place_in_a_file_of_a_run(run: Callable, tmp_path: Path) -> None:
    run(ScriptedEngine())
    report = run(ScriptedEngine(), TALKS[1:], samplers=[Sampler()])
    assert report.kept == 6, "a file of its own may hold more"
    with pytest.raises(UserError, match="holds 8 responses that this run has no prompt for, first a@T0: .*delete"):
        run(ScriptedEngine(), TALKS[1:], samplers=[Sampler()], alone=True)
    assert len(read_rows(tmp_path / "r.jsonl")) == 14
    assert run(ScriptedEngine(), alone=True).kept == 14


@pytest.mark.parametrize("stop_after", [0, 1, 5, 8, 13])
def test_an_interrupted_run_keeps_what_was_answered(run: Callable, tmp_path: Path, stop_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(ScriptedEngine(stop_after))
    engine = ScriptedEngine()
    report = run(engine)
    assert (report.kept, report.new) == (stop_after, 14 - stop_after)
    assert len(read_rows(tmp_path / "r.jsonl")) == 14


def test_a_finished_run_asks_nothing_and_new_temperatures_are_added(run: Callable, tmp_path: Path) -> None:
    run(ScriptedEngine())
    data = (tmp_path / "r.jsonl").read_bytes()
    engine = ScriptedEngine()
    assert run(engine).kept == 14 and engine.asked == []
    assert (tmp_path / "r.jsonl").read_bytes() == data
    report = run(engine, samplers=[Sampler(), Sampler(0.7, 0, 0.9), Sampler(1.0)])
    assert (report.kept, report.new) == (14, 7)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"hash": "beef"}, "responses of another target"),
        ({"seed": 6}, "another seed"),
        ({"max_new_tokens": 8}, "another number of new tokens"),
        ({"max_new_tokens": 10}, "another number of new tokens"),
        ({"samplers": [Sampler(0.7)]}, "another top-p"),
        ({"samplers": [Sampler(0.7, 3, 0.9)]}, "another top-k"),
        ({"conversations": [talk("a", "other words")]}, "a@T0 was made with another prompt"),
    ],
)
def test_rows_of_another_run_are_refused(
    run: Callable, tmp_path: Path, tiny_facts: Any, tiny_tokenizer: Any, settings: dict[str, Any], message: str
) -> None:
    if "hash" in settings:
        settings = {"target": tiny_facts(tiny_tokenizer, **settings)}
    run(ScriptedEngine())
    data = (tmp_path / "r.jsonl").read_bytes()
    engine = ScriptedEngine()
    with pytest.raises(UserError, match=message):
        run(engine, **settings)
    assert (tmp_path / "r.jsonl").read_bytes() == data and engine.asked == []


# -- what can be wrong -----------------------------------------------------------------------------------------------
def test_failures_are_listed_with_the_turns_behind_them_and_tried_again(run: Callable, tmp_path: Path) -> None:
    report = run(ScriptedEngine(refuse=["b@T0", "d@T0.7"]))
    path = tmp_path / "r.jsonl"
    assert {f.key for f in report.failures} == {"b@T0", "b@T0#1", "b@T0#2", "d@T0.7"}
    assert listed_failures(path) == report.failures
    assert {f.key: f.reason for f in report.failures}["b@T0#2"] == "an earlier turn failed (b@T0)"
    assert report.new == 10 and "4 failed, listed in" in report.summary()
    assert run(ScriptedEngine()).new == 4
    assert listed_failures(path) == [] and len(read_rows(path)) == 14


def test_when_nothing_is_answered_the_reason_is_said(run: Callable, tmp_path: Path) -> None:
    refuse = [f"{c.id}@T{t}" for c in TALKS for t in ("0", "0.7")]
    with pytest.raises(UserError, match="none of the prompts could be answered; the first: status 400"):
        run(ScriptedEngine(refuse=refuse))
    assert len(listed_failures(tmp_path / "r.jsonl")) == 14


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_asked(
    run: Callable, tiny_facts: Any, tiny_tokenizer: Any
) -> None:
    engine = ScriptedEngine()
    with pytest.raises(UserError, match=r"prompt long@T0 has \d+ tokens; .*context of 64"):
        run(
            engine,
            [*TALKS, talk("long", "x" * 60)],
            target=tiny_facts(tiny_tokenizer, max_position_embeddings=64),
        )
    assert engine.asked == []


def test_a_conversation_that_outgrows_the_context_is_listed(
    run: Callable, tiny_tokenizer: Any, tiny_facts: Any
) -> None:
    talks = [talk("grows", *["x" * 30] * 4), talk("d", "no")]
    first = len(
        tiny_tokenizer.apply_chat_template(talks[0].messages[:2], add_generation_prompt=True, return_dict=False)
    )
    facts = tiny_facts(tiny_tokenizer, max_position_embeddings=2 * first)
    report = run(ScriptedEngine(), talks, samplers=[Sampler()], target=facts)
    assert report.new == 2
    assert [f.key for f in report.failures] == ["grows@T0#1", "grows@T0#2", "grows@T0#3"]
    assert "does not fit into the context" in report.failures[0].reason


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"samplers": []}, "at least one temperature"),
        ({"samplers": [Sampler(0.7), Sampler(0.7, 5)]}, "every temperature once"),
        ({"conversations": []}, "no prompts"),
        ({"conversations": [TALKS[0], TALKS[0]]}, "same id"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
    ],
)
def test_arguments_that_make_no_sense(run: Callable, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(ScriptedEngine(), **settings)


@pytest.mark.parametrize(
    "template,message", [(None, "no chat template"), ("{{ raise_exception('no system') }}", "no system")]
)
def test_chat_templates_that_do_not_work(
    run: Callable, tiny_tokenizer: Any, tiny_facts: Any, template: str | None, message: str
) -> None:
    tiny_tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        run(ScriptedEngine(), target=tiny_facts(tiny_tokenizer))


# -- the history of a later turn -------------------------------------------------------------------------------------
class Speaks:
    """Answers everything with one text."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.ids = list(tokenizer(text, add_special_tokens=False).input_ids)

    def answer(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> Iterator[Completion]:
        yield from (Completion(request, self.ids, "stop") for request in requests)


def test_thoughts_in_special_marks_are_no_part_of_the_history(
    run: Callable, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": ["[THINK]", "[/THINK]"]})
    engine = Speaks(tiny_tokenizer, "[THINK]a secret[/THINK]yes<|im_end|>")
    run(engine, [TALKS[2]], samplers=[Sampler()], max_new_tokens=99)
    first, second = read_rows(tmp_path / "r.jsonl")
    assert "secret" in tiny_tokenizer.decode(first.response_ids)
    assert "assistant\nyes<|im_end|>" in tiny_tokenizer.decode(second.prompt_ids)
    assert "secret" not in tiny_tokenizer.decode(second.prompt_ids)


def test_turns_behind_a_reply_that_is_not_clear_are_listed(run: Callable, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    report = run(Speaks(tiny_tokenizer, "so<x>user<|im_end|>"), [TALKS[1]], samplers=[Sampler()])
    assert [row.key for row in read_rows(tmp_path / "r.jsonl")] == ["b@T0"]
    failures = listed_failures(tmp_path / "r.jsonl")
    assert [failure.key for failure in failures] == ["b@T0#1", "b@T0#2"] and failures == report.failures
    assert "(b@T0) cannot be put into its history: it holds the special token <x>" in failures[0].reason
    again = run(Speaks(tiny_tokenizer, "so<x>user<|im_end|>"), [TALKS[1]], samplers=[Sampler()])
    assert (again.kept, again.new, again.failures) == (1, 0, failures)


def test_a_turn_behind_a_tools_result_is_listed(run: Callable, tmp_path: Path) -> None:
    messages = [*TALKS[0].messages, {"role": "tool", "content": "noon"}, {"role": "user", "content": "and?"}]
    run(ScriptedEngine(), [Conversation("t", messages)], samplers=[Sampler()])
    assert [row.key for row in read_rows(tmp_path / "r.jsonl")] == ["t@T0"]
    (failure,) = listed_failures(tmp_path / "r.jsonl")
    assert failure.key == "t@T0#1" and "the result of a tool stands before this turn" in failure.reason


# -- waves ------------------------------------------------------------------------------------------------------------
def test_waves_change_nothing_but_the_order(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ScriptedEngine(), out_path=tmp_path / "whole.jsonl")
    monkeypatch.setattr("redraft.data.regenerate.WAVE", 3)
    engine = ScriptedEngine()
    report = run(engine)
    assert by_key(read_rows(tmp_path / "r.jsonl")) == by_key(read_rows(tmp_path / "whole.jsonl"))
    assert report.new == 14 and len(engine.asked) == 14
    assert [request.key.partition("@")[0] for request in engine.asked[:3]] == ["c", "b", "a"]
    with pytest.raises(KeyboardInterrupt):
        run(ScriptedEngine(stop_after=9), out_path=tmp_path / "killed.jsonl")
    again = run(ScriptedEngine(), out_path=tmp_path / "killed.jsonl")
    assert (again.kept, again.new) == (9, 5)
    assert by_key(read_rows(tmp_path / "killed.jsonl")) == by_key(read_rows(tmp_path / "whole.jsonl"))


def test_a_prompt_of_a_later_wave_that_does_not_fit_is_refused_before_anything_is_asked(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redraft.data.regenerate.WAVE", 1)
    engine = ScriptedEngine()
    with pytest.raises(UserError, match="last"):
        run(engine, [*TALKS, talk("last", "and " * 2000)])
    assert engine.asked == []


def test_a_server_that_stops_leaves_later_waves_in_the_list(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(ScriptedEngine):
        def answer(self, requests: Sequence[Request], *limits: Any, **how: Any) -> Iterator[Completion | Failure]:
            for number, outcome in enumerate(super().answer(requests, *limits, **how)):
                if number == 1:
                    raise UserError("the server is gone")
                yield outcome

    monkeypatch.setattr("redraft.data.regenerate.WAVE", 2)
    with pytest.raises(UserError, match="the server is gone; 1 responses are kept, the same command goes on"):
        run(Gone(), samplers=[Sampler()])
    assert [failure.key for failure in listed_failures(tmp_path / "r.jsonl")] == ["a@T0", "c@T0", "d@T0"]
