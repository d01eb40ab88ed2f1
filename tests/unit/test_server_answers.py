"""What the server engine reads in an answer and says in a request: keys, text without ids, where a response ends."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.data.generate import Completion, Request
from redraft.data.regenerate import ServerEngine
from redraft.data.server import read_completion
from redraft.data.store import Failure
from redraft.data.transport import completion_body
from redraft.errors import UserError
from redraft.sampling import Sampler

pytest.importorskip("httpx")
RIG = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("engine_rig.py"))))
EOS, Loopback = RIG.EOS, Any
choices, loopback, requests, answers = RIG.choices, RIG.loopback, RIG.requests, RIG.answers


# -- keys ------------------------------------------------------------------------------------------------------------
def test_the_key_comes_from_the_environment(
    loopback: Loopback, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDRAFT_API_KEY", " sk-hidden\n")
    answers(loopback.engine(), requests(1), tiny_tokenizer)
    assert loopback.headers == ["Bearer sk-hidden"]
    for status, kind in ((401, UserError), (400, None), (503, None)):
        loopback.rule = lambda body, status=status: (status, b"no such key: sk-hidden")  # type: ignore[misc]
        if kind is None:
            (found,) = answers(loopback.engine(), requests(1), tiny_tokenizer).values()
            assert isinstance(found, Failure) and "sk-hidden" not in found.reason
            continue
        with pytest.raises(kind, match="environment variable REDRAFT_API_KEY the right one") as caught:
            answers(loopback.engine(), requests(1), tiny_tokenizer)
        assert "no such key: ***" in str(caught.value) and "sk-hidden" not in str(caught.value)
    monkeypatch.delenv("REDRAFT_API_KEY")
    loopback.rule = lambda body: (403, b"who are you")
    with pytest.raises(UserError, match="set the server's key in the environment variable REDRAFT_API_KEY"):
        answers(loopback.engine(), requests(1), tiny_tokenizer)
    assert loopback.headers[-1] is None
    monkeypatch.setenv("REDRAFT_API_KEY", "two words")
    with pytest.raises(UserError, match="REDRAFT_API_KEY holds characters that no key has"):
        loopback.engine()


@pytest.mark.parametrize(
    "address", ["http://me:hush@h:1", "https://hush@h/v1", "http://h:1/v1?key=hush", "http://h#hush", "me:hush@h:1"]
)
def test_secrets_in_an_address_are_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UserError, match="REDRAFT_API_KEY|is no address") as caught:
        ServerEngine(address)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://", "http://h:99999", "http://[::1", "ftp://h", "http://a b", "http://a..b"]
)
def test_addresses_that_are_none(address: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="is no address|cannot be used"):
        list(ServerEngine(address, attempts=1).answer(requests(1), 8, tiny_tokenizer, (EOS,)))


# -- servers without token ids ---------------------------------------------------------------------------------------
REQUEST = Request("k", [1, 5], Sampler())


def text_answer(tokenizer: Any, text: str, reason: str = "stop", tokens: int | None = None) -> Completion:
    value: dict[str, Any] = {"choices": [{"text": text, "finish_reason": reason}]}
    if tokens is not None:
        value["usage"] = {"completion_tokens": tokens}
    return read_completion(value, REQUEST, 16, tokenizer, (EOS,))


def test_text_is_encoded_again_where_that_is_exact(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode("the hat", add_special_tokens=False)
    assert len(ids) < len("the hat")
    for tokens in (None, len(ids), len(ids) + 1):
        assert text_answer(tiny_tokenizer, "the hat", "stop", tokens).response_ids == [*ids, EOS]
    assert text_answer(tiny_tokenizer, "the hat", "length", len(ids)).response_ids == ids
    assert text_answer(tiny_tokenizer, "").response_ids == [EOS]


@pytest.mark.parametrize(
    "text,reason,tokens",
    [
        ("the hat", "stop", 7),  # the model wrote "t" and "h" apart
        ("the hat", "length", 6),
        ("caf\u00e9", "stop", None),  # no such token: encoding loses it
        ("abc\ufffd", "length", None),  # half a character
    ],
)
def test_text_that_does_not_lead_back_is_refused(
    tiny_tokenizer: Any, text: str, reason: str, tokens: int | None
) -> None:
    with pytest.raises(Exception, match="does not lead back to them exactly.*return_token_ids"):
        text_answer(tiny_tokenizer, text, reason, tokens)


def test_inexact_text_is_a_listed_failure(loopback: Loopback, tiny_tokenizer: Any) -> None:
    loopback.rule = lambda body: choices(token_ids=None, text="caf\u00e9" if body["prompt"][1] == 10 else "cafe")
    found = answers(loopback.engine(), requests(3), tiny_tokenizer)
    assert isinstance(found["r0@T0"], Failure) and found["r0@T0"].permanent
    assert isinstance(found["r1@T0"], Completion)


def test_text_that_a_stop_string_cut_is_refused(tiny_tokenizer: Any) -> None:
    value = {"choices": [{"text": "the hat", "finish_reason": "stop", "stop_reason": "\n"}]}
    with pytest.raises(Exception, match="cut the text at a stop string"):
        read_completion(value, REQUEST, 16, tiny_tokenizer, (EOS,))


# -- where a response ends -------------------------------------------------------------------------------------------
def read(tokenizer: Any, ids: list[int], reason: str = "stop", ends: tuple[int, ...] = (2, 9), **more: Any) -> Any:
    choice = {"finish_reason": reason, "token_ids": ids} | more
    found = read_completion({"choices": [choice]}, REQUEST, 4, tokenizer, ends, open_end=True)
    return found.response_ids, found.finish_reason


def test_an_end_token_is_known_or_left_out(tiny_tokenizer: Any) -> None:
    def one(*ids: int, **more: Any) -> Any:
        return read(tiny_tokenizer, list(ids), **more)

    assert one(5, EOS) == ([5, EOS], "stop")
    assert one(5, ends=(EOS,)) == ([5, EOS], "stop")  # the target has no other
    for name in ("stop_reason", "matched_stop"):
        assert one(5, **{name: 9}) == ([5, 9], "stop")
        assert one(5, 9, **{name: 9}) == ([5, 9], "stop")
        assert one(5, 11, **{name: 11}) == ([5, 11], "stop")  # an end token of the server's own, once
        assert one(5, **{name: "###"}) == one(5, ends=(EOS,), **{name: "###"}) == ([5], "stop")
    for nothing in (None, True, 1.5, [9]):
        assert one(5, stop_reason=nothing) == ([5], "stop")


def test_an_unknown_end_is_refused_where_it_matters_and_left_out_in_regeneration(
    loopback: Loopback, tiny_tokenizer: Any
) -> None:
    answer = {"choices": [{"finish_reason": "stop", "token_ids": [5, 6]}]}
    with pytest.raises(Exception, match="does not say at which of the end tokens 2, 9 it stopped"):
        read_completion(answer, REQUEST, 4, tiny_tokenizer, (2, 9))
    loopback.rule = lambda body: (200, answer)
    (found,) = loopback.engine().answer(requests(1), 8, tiny_tokenizer, (2, 9))
    assert isinstance(found, Completion) and (found.response_ids, found.finish_reason) == ([5, 6], "stop")


def test_what_is_written_behind_an_end_token_is_no_response(tiny_tokenizer: Any) -> None:
    assert read(tiny_tokenizer, [5, 9, 6, 7], "length") == ([5, 9], "stop")
    assert read(tiny_tokenizer, [5, 9], "length") == ([5, 9], "stop")


def test_an_empty_answer_with_an_unknown_end_is_refused(tiny_tokenizer: Any) -> None:
    assert read(tiny_tokenizer, [], ends=(EOS,)) == ([EOS], "stop")
    with pytest.raises(Exception, match="does not say which end token"):
        read(tiny_tokenizer, [])
    with pytest.raises(Exception, match="an answer of 0 tokens"):
        read(tiny_tokenizer, [], "length", (EOS,))


def test_a_response_that_ends_at_the_limit(tiny_tokenizer: Any) -> None:
    assert read(tiny_tokenizer, [5, 6, 7, 8], ends=(EOS,)) == ([5, 6, 7, 8], "length")


def test_ids_of_another_vocabulary_are_refused(tiny_tokenizer: Any) -> None:
    text = "the hat and then the other hat"
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)

    def read_text(said: str, shift: int = 0) -> Any:
        choice = {"finish_reason": "length", "text": said, "token_ids": [4 + (i + shift) % 100 for i in ids]}
        return read_completion({"choices": [choice]}, REQUEST, 40, tiny_tokenizer, (EOS,)).response_ids

    right = {"finish_reason": "stop", "text": text, "token_ids": [*ids, EOS]}
    for said in (text, text.upper().lower(), text.replace(" ", "  "), text + "</s>", "", "short"):
        found = read_completion({"choices": [right | {"text": said}]}, REQUEST, 40, tiny_tokenizer, (EOS,))
        assert found.response_ids == [*ids, EOS]
    with pytest.raises(Exception, match="its model has another vocabulary; serve the target"):
        read_text(text, 31)
    assert read_text("...", 31)


# -- what a request says ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sampler", "filters"),
    [
        (Sampler(0.7, 5, 0.9), {"top_k": 5, "top_p": 0.9, "min_p": 0.0}),
        (Sampler(0.7), {"top_k": -1, "top_p": 1.0, "min_p": 0.0}),  # servers fill gaps, and SGLang refuses 0
        (Sampler(), {}),
    ],
)
def test_filters_in_a_request(sampler: Sampler, filters: dict[str, Any]) -> None:
    body = completion_body(Request("k", [1, 5], sampler), "m", 8)
    assert {name: body[name] for name in ("top_k", "top_p", "min_p") if name in body} == filters
    assert body["temperature"] == sampler.temperature and body["repetition_penalty"] == 1.0
