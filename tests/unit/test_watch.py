"""``redraft watch``: colours or brackets, running figures, single tokens' text, and bad input."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from redraft.cli import commands
from redraft.decode.requests import Generation, Round, TokenText, trace
from redraft.errors import UserError
from redraft.reports.live import Watcher, coloured, legend, paint
from redraft.reports.tokens import Piece
from redraft.settings.steps import WatchSettings


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8; like some real ones it drops a leading space."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode("utf-8", "replace").removeprefix(" ")


def encode(text: str) -> list[int]:
    return list(text.encode())


def _rounds() -> list[Round]:
    """Prefill's token, then two accepted and a correction, then a full round, then one cut by the stop rule."""
    return [
        Round([], 0, encode("T"), 0.0, 0.0),
        Round(encode("hex"), 2, encode("he "), 0.1, 0.2),
        Round(encode("cat"), 3, encode("cat\n"), 0.1, 0.2),
        Round(encode("\x1b[x"), 3, encode("\x1b["), 0.1, 0.2),
    ]


def _console(colour: bool, **options: object) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=colour,
        color_system="256" if colour else None,
        width=100,
        height=24,
        highlight=False,
        **options,  # type: ignore[arg-type]
    )


def _show(console: Console, rejected: bool = False) -> tuple[str, Watcher]:
    ticks = iter(range(100))
    watcher = Watcher(console, TokenText(Bytes(), encode("prompt")), rejected, clock=lambda: float(next(ticks)))
    with watcher:
        for record in _rounds():
            watcher.on_round(record)
    return console.file.getvalue(), watcher  # type: ignore[attr-defined]


def test_brackets_where_there_is_no_colour() -> None:
    text, watcher = _show(_console(colour=False))
    assert text.startswith("(T)[he]< >[cat]{\u21b5\n}[\u27e8U+001B\u27e9[]\n")
    assert "\x1b" not in text
    assert watcher.tau == pytest.approx(9 / 3)
    last = text.strip().splitlines()[-1]
    # Clock: constructed at 0, entered at 1, rounds at 2, 3, 4 and 5.
    assert last == "round 3   10 tokens   tau 3.00   2.5 tokens/s   (accepted 78%, corrected 11%, bonus 11%)"


def test_rejected_proposals_on_demand() -> None:
    text, _ = _show(_console(colour=False), rejected=True)
    assert text.startswith("(T)[he]~x~< >[cat]")


def test_a_rejected_line_break_breaks_no_line() -> None:
    shown = paint([Piece("a\n", "accepted"), Piece("\n", "rejected"), Piece("b", "corrected")], colour=False)
    assert shown.plain == "[a\u21b5\n]~\u21b5~<b>"


def test_colours_on_a_terminal_and_none_when_they_are_unwanted() -> None:
    text, _ = _show(_console(colour=True))
    # The tokens' own escape sequence is shown, not obeyed; the colours' are.
    assert "\x1b[38;5;16;48;5;153mh\x1b[0m" in text and "\u27e8U+001B\u27e9" in text
    plain, _ = _show(_console(colour=True, no_color=True))
    assert "[he]< >[cat]" in plain and "48;5" not in plain


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_the_environment_switches_colour_off(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured(Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setenv(variable, value)
    assert not coloured(Console(file=io.StringIO(), force_terminal=True))
    assert not coloured(Console(file=io.StringIO()))


def test_legend_names_every_mark() -> None:
    assert legend(False, False).plain == "[accepted]  <corrected>  {bonus}  (prefill)"
    assert legend(False, True).plain.endswith("~rejected~")
    assert legend(True, False).plain == "accepted  corrected  bonus  prefill"


def test_a_failure_in_the_middle_leaves_the_terminal_whole() -> None:
    console = _console(colour=True)
    with pytest.raises(RuntimeError, match="broken"):
        with Watcher(console, TokenText(Bytes())) as watcher:
            watcher.on_round(_rounds()[0])
            raise RuntimeError("broken")
    assert watcher.live is None
    assert console.file.getvalue().count("\x1b[?25l") == console.file.getvalue().count("\x1b[?25h")  # type: ignore[attr-defined]


def test_long_text_shows_its_end_while_it_grows() -> None:
    console = _console(colour=True)
    watcher = Watcher(console, TokenText(Bytes()))
    watcher.on_round(Round([], 0, encode("a"), 0.0, 0.0))
    for number in range(40):
        watcher.on_round(Round(encode("\n1"), 2, encode(f"\n{number % 10}\n"), 0.0, 0.0))
    lines = watcher._screen().renderables
    assert len(lines) <= console.size.height and "round 40" in str(lines[-1])


# -- the text of single tokens ---------------------------------------------------------------------------------------
def test_pieces_join_to_the_text() -> None:
    text = "d\u00e9j\u00e0 vu \u65e5\u672c \U0001f600 end"
    stream = TokenText(Bytes(), encode("before"))
    found = [stream.push(token) for token in encode(text)]
    assert "".join(found) == text
    assert found[1] == "" and found[2] == "\u00e9"


def test_a_leading_space_is_kept_after_a_context() -> None:
    assert TokenText(Bytes(), encode("x")).push(ord(" ")) == " "


def test_bytes_that_never_make_a_character_are_shown_in_the_end() -> None:
    stream = TokenText(Bytes())
    found = [stream.push(0xFF) for _ in range(20)]
    assert "\ufffd" in "".join(found)
    assert "".join([*found, *(stream.push(token) for token in encode("ok"))]).endswith("ok")


def test_peeking_changes_nothing() -> None:
    stream = TokenText(Bytes(), encode("a"))
    assert stream.peek(encode("bc")) == ["b", "c"]
    assert [stream.push(token) for token in encode("bc")] == ["b", "c"]


def test_trace_of_a_generation() -> None:
    rounds = _rounds()[1:]
    ids = encode("T") + [token for record in rounds for token in record.kept]
    found = trace(Bytes(), encode("prompt"), Generation(ids, "stop", 0.1, 0.5, rounds))
    assert found["tokens"] == ["T", "h", "e", " ", "c", "a", "t", "\n", "\x1b", "["]
    assert [(r["accepted"], r["kept"], r["full"]) for r in found["rounds"]] == [
        (2, 3, False),
        (3, 4, True),
        (3, 2, True),
    ]
    assert found["rounds"][0]["proposed"] == ["h", "e", "x"]


def test_a_trees_proposals_stand_alone() -> None:
    record = Round([*"\u00e9".encode(), ord("a")], 1, encode("a"), 0.0, 0.0, depth=2)
    assert TokenText(Bytes(), encode("x")).proposed(record) == ["", "", "a"]


# -- the command -----------------------------------------------------------------------------------------------------
def test_one_prompt_or_a_file() -> None:
    for given in ({}, {"prompt": "a", "prompts": "file"}):
        with pytest.raises(UserError, match="--prompt"):
            WatchSettings(target="t", draft="d", **given)
    with pytest.raises(UserError, match="empty"):
        WatchSettings(target="t", draft="d", prompt=" ")
    with pytest.raises(UserError, match="cube:3"):
        WatchSettings(target="t", draft="d", prompt="x", shape="cube:3")


def test_the_command_prints_what_the_decoder_says(tiny_target, tmp_path, monkeypatch, capsys) -> None:
    """With a decoder that plays back rounds: the command's own part, from prompt to summary."""
    from redraft.drafts.eagle3 import fresh_draft
    from redraft.drafts.files import save_draft
    from redraft.loading import tokenizer_hash

    target = tiny_target("llama", taps=(1, 3, 5))
    target.save(tmp_path / "target")
    meta = {"target": {"name": "t", "hash": target.content_hash()}, "tokenizer_hash": tokenizer_hash(target.tokenizer)}
    save_draft(tmp_path / "draft", fresh_draft(target, range(0, 120), seed=1), meta)
    ids = target.tokenizer("One two", add_special_tokens=False)["input_ids"]

    class Playback:
        def generate(self, prompt_ids, max_new_tokens, seed=0, on_round=None):
            on_round(Round([], 0, ids[:1], 0.0, 0.0))
            on_round(Round(ids[1:3], 1, ids[1:3], 0.1, 0.1))
            return Generation(ids[:3], "length", 0.1, 0.2, [])

    monkeypatch.setattr("redraft.decode.auto.make_decoder", lambda *args: Playback())
    places = {"target": str(tmp_path / "target"), "draft": str(tmp_path / "draft")}
    commands.watch(WatchSettings(**places, prompt="one \x1b two", dtype="float32", max_new_tokens=3))
    shown = capsys.readouterr().out
    assert "greedy, chain of 5, seed 0" in shown and "[accepted]  <corrected>" in shown
    assert "(O)[n]<e>" in shown.replace("\n", "") and "tau 2.00" in shown
    assert "\x1b" not in shown
