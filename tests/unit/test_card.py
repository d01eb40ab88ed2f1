"""Model cards: what is known stands in them, what is not is called so, and no name is markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from redraft.errors import UserError
from redraft.reports.card import CardFacts, block, cell, clean, code, licence_of, model_card, write_card

ROOT = Path(__file__).resolve().parents[2]
BENCH = json.loads((ROOT / "benchmarks/results/quickstart-bench.json").read_text())
LEDGER = json.loads((ROOT / "benchmarks/results/quickstart-ledger.json").read_text())


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_what_is_not_known_is_called_so() -> None:
    card = model_card(CardFacts(family="eagle3", format="vllm"))
    assert front(card) == {"library_name": "vllm", "tags": ["speculative-decoding", "draft-model", "eagle3"]}
    assert "# license: unknown: fill in" in card and "# base_model: unknown: fill in" in card
    assert "Not measured." in card and "Not on record." in card and "Target: unknown: fill in" in card
    assert not any(character.isdigit() for character in card.replace("eagle3", ""))


def test_what_is_known_stands_there_with_what_makes_it_comparable() -> None:
    guard = {"old": 1.7, "new": 2.5, "gamma": 3, "prompts": 24, "kept": "new"}
    facts = CardFacts(
        family="eagle3",
        format="vllm",
        target="someone/tuned",
        target_hash="0123456789abcdef",
        base_draft="someone/draft",
        hub_ids=frozenset({"someone/tuned", "someone/draft"}),
        method="lora",
        serve=["vllm serve someone/tuned --speculative-config '{}'"],
        data={"answers": 344, "temperatures": [0.0, 0.7], "served answers": None},
        settings={"method": "lora", "rank": 84, "replay": 0, "learning rate": 0.001},
        licences={"target": {"license": "apache-2.0"}, "base draft": {"license": "apache-2.0"}},
        bench=BENCH,
        guard=guard,
        ledger=LEDGER,
    )
    card = model_card(facts)
    assert front(card)["base_model"] == "someone/tuned" and front(card)["license"] == "apache-2.0"
    tau = BENCH["drafts"]["aligned"]["tau_pooled"]
    assert f"| `aligned` | {tau['value']:.2f} | {tau['low']:.2f} to {tau['high']:.2f} |" in card
    assert "greedy, chain of 3, 16 prompts" in card and "24 held-out prompts" in card and "1.700 before" in card
    assert "- answers: 344" in card and "- temperatures: 0, 0.7" in card and "served answers" not in card
    assert "- replay: 0" in card and "- learning rate: 0.001" in card
    assert "| `total` |" in card and "vllm serve someone/tuned" in card
    assert "unchanged" not in card
    kept = model_card(CardFacts(family="eagle3", format="merged", guard=guard | {"kept": "old"}))
    assert "this is the base draft, unchanged" in kept


def test_licences_are_taken_and_never_made_up() -> None:
    def told(**licences: dict[str, str]) -> str:
        named = {name.replace("_", " "): value for name, value in licences.items()}
        return model_card(CardFacts(family="eagle3", format="vllm", licences=named))

    apart = told(target={"license": "llama3.1"}, base_draft={"license": "mit"})
    assert "license" not in front(apart) and "differ" in apart and "`llama3.1`" in apart and "`mit`" in apart
    alone = told(target={"license": "other", "license_name": "own", "license_link": "LICENSE"}, base_draft={})
    assert front(alone)["license_name"] == "own" and "Of the base draft: unknown: fill in" in alone


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x\n", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n# x\n", {"license": "mit"}),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\nlicense: [mit, apache-2.0]\nlicense_name: 3\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", {}),
        ("---\nlicense: 'mit\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_licences_are_read_from_front_matter_alone(card: str, found: dict[str, str]) -> None:
    assert licence_of(card) == found


HOSTILE = [
    "a`b``c",
    "`",
    "</script><img src=x onerror=alert(1)>",
    "x\n---\nlicense: mit",
    "[click](javascript:alert(1)) | **bold** https://example.org",
    "quote\" ' \\ {{ 7*7 }} &amp; $x$ #tag @name",
    "\u202egnp.exe \u200b\x1b[31m",
    "- [ ] yes: no",
    "```\n# heading",
    "null",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_no_markup(name: str) -> None:
    """Rendered, the name stands in code alone; in the front matter it is one text; no line begins with it."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    facts = CardFacts(
        family="eagle3",
        format=name,
        target=name,
        base_draft=name,
        hub_ids=frozenset({name}),
        method=name,
        serve=[f"vllm serve {name}"],
        data={"prompts": name},
        licences={"target": {"license": name}},
        bench=BENCH | {"drafts": {name: BENCH["drafts"]["aligned"]}, "setup": BENCH["setup"] | {"sampler": name}},
        ledger=LEDGER | {"stages": [LEDGER["stages"][0] | {"stage": name}]},
        notes=[name],
    )
    card = model_card(facts)
    assert front(card)["base_model"] == clean(name)
    assert set(front(card)) == {"library_name", "tags", "base_model", "license"}
    body = card.split("---\n", 2)[2]
    inside = {"html_inline", "html_block", "image"}
    for token in markdown.parse(body):
        assert token.type not in inside and token.tag != "h3"
        for part in token.children or []:
            assert part.type not in {*inside, "link_open", "strong_open", "em_open"}, part
            if part.type == "text":
                assert "onerror" not in part.content and "javascript" not in part.content
    tables = [token for token in markdown.parse(body) if token.type == "td_open"]
    rows = [token for token in markdown.parse(body) if token.type == "tr_open"]
    assert len(rows) == 2 + 3 and len(tables) == 4 + 2 * 5


@pytest.mark.parametrize("name", HOSTILE)
def test_spans_and_fences_hold_what_they_are_given(name: str) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    (paragraph,) = [token for token in markdown.parse(f"is {code(name)}.") if token.type == "inline"]
    spans = [part.content for part in paragraph.children if part.type == "code_inline"]
    assert spans == [clean(name)]
    (fence,) = [token for token in markdown.parse(block([name, "end"])) if token.type == "fence"]
    assert fence.content == f"{clean(name)}\nend\n"
    assert cell("a|b") == "`a\\|b`"


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held-out figures: new"):
        write_card(tmp_path, CardFacts(family="eagle3", format="vllm", guard={"old": 1.0}))
    with pytest.raises(UserError, match="benchmark result: setup"):
        write_card(tmp_path, CardFacts(family="eagle3", format="vllm", bench={"drafts": {}}))
    assert list(tmp_path.iterdir()) == []
