"""The token view: who proposed what, in words, on the page, and nothing that a token could do to either."""

from __future__ import annotations

import html
import re
import runpy
from pathlib import Path

import pytest

from redraft.reports import build_report
from redraft.reports.load import Trace, TraceDraft
from redraft.reports.tokens import (
    MAX_PROPOSED,
    MAX_TOKENS,
    MAX_TRACES,
    chosen,
    draft_view,
    fates,
    kinds,
    visible,
    visible_text,
)

DATA = runpy.run_path(str(Path(__file__).parents[1] / "report_data.py"))


def _round(accepted: int, kept: int, full: bool, proposed: list[str]) -> dict:
    return {"accepted": accepted, "kept": kept, "full": full, "proposed": proposed}


@pytest.mark.parametrize(
    ("accepted", "kept", "full", "expected"),
    [
        (2, 3, False, ["accepted", "accepted", "corrected"]),
        (3, 4, True, ["accepted", "accepted", "accepted", "bonus"]),
        (0, 1, False, ["corrected"]),
        (3, 2, True, ["accepted", "accepted"]),  # cut by the stop rule
        (2, 2, False, ["accepted", "accepted"]),  # cut before the corrected token
        (0, 1, True, ["bonus"]),  # a round with no room for proposals
        (0, 0, False, []),
    ],
)
def test_kinds(accepted: int, kept: int, full: bool, expected: list[str]) -> None:
    assert kinds(accepted, kept, full) == expected


def test_fates_of_a_chain() -> None:
    found = fates(1, ["a", "x"], ["a", "b", "c"], tree=False)
    assert [(p.text, p.kind) for p in found] == [("a", "accepted"), ("b", "rejected"), ("c", "unused")]
    assert [p.kind for p in fates(2, ["a", "b", "z"], ["a", "b"], tree=False)] == ["accepted", "accepted"]
    # Two were accepted, the stop rule kept one of them.
    assert [p.kind for p in fates(2, ["a"], ["a", "b", "c"], tree=False)] == ["accepted", "unused", "rejected"]


def test_fates_of_a_tree_follow_the_kept_path() -> None:
    found = fates(2, ["b", "c", "z"], ["a", "b", "b", "c", "d"], tree=True)
    assert sorted((p.text, p.kind) for p in found) == [
        ("a", "rejected"),
        ("b", "accepted"),
        ("b", "rejected"),
        ("c", "accepted"),
        ("d", "rejected"),
    ]
    assert [p.kind for p in found[:2]] == ["accepted", "accepted"]


def test_running_tau_and_shares() -> None:
    rounds = [_round(2, 3, False, ["b", "c", "x"]), _round(3, 4, True, ["e", "f", "g"]), _round(0, 1, False, ["x"] * 3)]
    view = draft_view("d", TraceDraft.model_validate({"tokens": list("abcdefghi"), "rounds": rounds}), tree=False)
    assert view.first is not None and (view.first.text, view.first.kind) == ("a", "prefill")
    assert [r.tau for r in view.rounds] == pytest.approx([3.0, 3.5, 8 / 3])
    assert [r.tokens for r in view.rounds] == [4, 8, 9]
    assert view.tau == pytest.approx(8 / 3)
    assert view.shares == pytest.approx({"accepted": 5 / 8, "corrected": 2 / 8, "bonus": 1 / 8})
    assert "".join(p.text for r in view.rounds for p in r.kept) == "bcdefghi"


def test_long_traces_are_cut_at_a_round_and_wide_trees_at_a_number() -> None:
    rounds = [_round(1, 2, False, ["a"] * 60)] * MAX_TOKENS
    draft = TraceDraft.model_validate({"tokens": ["a"] * (2 * MAX_TOKENS + 1), "rounds": rounds})
    view = draft_view("d", draft, tree=True)
    assert view.rounds[-1].tokens == MAX_TOKENS - 1 and view.total_rounds - len(view.rounds) == MAX_TOKENS - len(
        view.rounds
    )
    assert view.total_tokens == 2 * MAX_TOKENS + 1 and view.tau == 2
    assert len(view.rounds[0].proposed) == MAX_PROPOSED and view.rounds[0].hidden == 60 - MAX_PROPOSED


def test_a_response_of_one_token_and_an_empty_one() -> None:
    one = draft_view("d", TraceDraft(tokens=["a"], rounds=[]), tree=False)
    assert one.tau is None and one.first is not None and one.rounds == []
    assert draft_view("d", TraceDraft(tokens=[], rounds=[]), tree=False).first is None


def test_tasks_take_turns() -> None:
    drafts = {"d": {"tokens": ["a"], "rounds": []}}
    given = [
        Trace.model_validate({"id": str(i), "task": "many" if i < 30 else "few", "drafts": drafts}) for i in range(32)
    ]
    shown = chosen(given)
    assert len(shown) == MAX_TRACES and {"30", "31"} <= {trace.id for trace in shown}
    assert [int(t.id) for t in shown] == sorted(int(t.id) for t in shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a", " a"),
        ("\n\n", "\u21b5\n\u21b5\n"),
        ("\t", "\u21e5\t"),
        ("\x1b[31m", "\u27e8U+001B\u27e9[31m"),
        ("\x9b", "\u27e8U+009B\u27e9"),
        ("\r\x08\x00\x7f", "\u27e8U+000D\u27e9\u27e8U+0008\u27e9\u27e8U+0000\u27e9\u27e8U+007F\u27e9"),
        ("\u202egnp", "\u27e8U+202E\u27e9gnp"),
        ("\u2028", "\u27e8U+2028\u27e9"),
        ("\ud83d", "\ufffd"),
        ("", "\u25ab"),
        ("\u00e9\u65e5\U0001f600\u200d", "\u00e9\u65e5\U0001f600\u200d"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_visible_without_breaks_and_running_text() -> None:
    assert visible("a\n\tb", breaks=False) == "a\u21b5\u21e5b"
    assert visible_text("a\n\tb\x1b") == "a\n\tb\u27e8U+001B\u27e9"


# -- on the page -----------------------------------------------------------------------------------------------------
def _page(folder: Path, result: dict) -> str:
    return build_report([DATA["fabricate"](folder, result)["bench.json"]], folder / "r.html").read_text("utf-8")


def _flow(page: str, trace: int, column: int) -> str:
    """One column's markup."""
    body = page[page.index(f'id="r0-trace-{trace}"') :]
    body = body[: body.index("</details>")]
    return body.split('<div class="flow">')[column + 1].split("</div>")[0]


@pytest.mark.usefixtures("no_pictures")
def test_the_page_holds_every_token_in_order_with_its_kind(tmp_path: Path) -> None:
    result = DATA["rich_bench"]()
    page = _page(tmp_path, result)
    for number, trace in enumerate(result["traces"]):
        for column, draft in enumerate(trace["drafts"].values()):
            flow = re.sub(
                r"<span class=.proposed. hidden>.*?</span></span>", "", _flow(page, number, column), flags=re.S
            )
            shown = re.findall(r'<span class="t (\w+)">([^<]*)</span>', flow)
            assert [html.unescape(text) for _, text in shown] == [visible(text) for text in draft["tokens"]]
            labels = ["prefill"]
            for r in draft["rounds"]:
                labels += kinds(r["accepted"], r["kept"], r["full"])
            assert [kind for kind, _ in shown] == labels
            # Nothing but the spans: stray spaces would stand in the text.
            assert re.sub(r"<[^>]*>", "", flow) == "".join(text for _, text in shown)


@pytest.mark.usefixtures("no_pictures")
def test_no_token_acts(tmp_path: Path) -> None:
    result = DATA["rich_bench"]()
    result["traces"] = [DATA["hostile_trace"]()]
    result["drafts"]["</td><script>alert(3)</script>"] = result["drafts"].pop("aligned")
    result["setup"]["target"] = result["setup"]["picked"] = '"><script>alert(4)</script>'
    result["per_prompt"][0]["id"] = "<script>alert(5)</script>"
    page = _page(tmp_path, result)
    assert page.count("<script>") == 1 and page.count("</script>") == 1 and "<!--" not in page
    assert "<img" not in page and "<b>hostile" not in page
    assert "&lt;/script&gt;" in page and "&lt;script&gt;alert(2)&lt;/script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)


@pytest.mark.usefixtures("no_pictures")
def test_notes_say_what_is_left_out(tmp_path: Path) -> None:
    result = DATA["rich_bench"]()
    result["traces"] = DATA["traces"](MAX_TRACES + 3)
    long = _round(1, 2, False, ["x"] * 5)
    result["traces"][0]["drafts"]["stale"] = {"tokens": ["x"] * 1201, "rounds": [long] * 600}
    result["traces"][1]["prompt"] = "w" * 5000
    page = _page(tmp_path, result)
    assert f"holds {MAX_TRACES + 3} outputs" in page and f"shows {MAX_TRACES} of them" in re.sub(r"\s+", " ", page)
    assert "301 more rounds are not shown" in page and "(cut)" in page
    assert page.count('class="trace"') == MAX_TRACES


@pytest.mark.usefixtures("no_pictures")
def test_a_tree_is_told_from_a_chain(tmp_path: Path) -> None:
    result = DATA["rich_bench"]()
    result["setup"]["shape"] = "dynamic tree, depth 2, top-k 3, 6 nodes"
    rounds = [_round(1, 2, False, ["no", "yes", "nor", "neither", "what", "why"])]
    result["traces"] = [
        {"id": "t", "prompt": "p", "drafts": {"stale": {"tokens": ["a", "yes", "b"], "rounds": rounds}}}
    ]
    page = _page(tmp_path, result)
    assert "1 accepted, a tree of 6 proposed" in page
    assert '<span class="t accepted">yes</span><span class="t rejected">no</span>' in page
