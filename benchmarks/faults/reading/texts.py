"""Readers of what a user brings: responses, prompts, logs, settings, trees, plugins, cards."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from faults.reading import judge as readings
from faults.reading.base import ASKED, MESSAGES, RUN, Outcome, Reader, by, files, written
from redraft.adaptation.cards import _card_of
from redraft.data.prompts import read_conversations
from redraft.data.suites import load_suite
from redraft.data.traces import read_traces
from redraft.loading import load_tokenizer
from redraft.reports.card import licence_of
from redraft.settings.shapes import StaticTree, parse_shape


# -- rows and prompts --------------------------------------------------------------------------------------------------
def _select(name: str) -> Callable[[Path], list[str]]:
    return lambda place: [
        *("select", "--responses", str(place / name), "--scorer", "length", "--budget", "50%"),
        *("--out", str(place / "m.json")),
    ]


def _entries(place: Path, said: str) -> Outcome:
    found = json.loads((place / "m.json").read_text())
    return [[e["key"], e["tokens"], e["selected"]] for e in found["entries"]]


def _packed_rows(place: Path) -> None:
    (place / "r.jsonl.gz").write_bytes(gzip.compress((RUN / "run" / "responses.jsonl").read_bytes(), mtime=0))


SHAREGPT = [
    {"id": n, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
    for n, (q, a) in enumerate(ASKED)
]
ALPACA = [{"instruction": q, "input": "this" * (n % 2), "output": a} for n, (q, a) in enumerate(ASKED)]
PLAIN = [{"id": f"q{n}", "prompt": q} for n, (q, _) in enumerate(ASKED)]
SHAPES: dict[str, tuple[str, str, Any]] = {
    "messages": ("p.jsonl", "lines", MESSAGES),
    "sharegpt": ("p.jsonl", "lines", SHAREGPT),
    "alpaca": ("p.jsonl.gz", "lines", ALPACA),
    "plain": ("p.jsonl", "lines", PLAIN),
    "array": ("p.json", "json", json.dumps(MESSAGES, indent=1)),
    "text": ("p.txt", "bytes", "".join(q.replace("\n", " ") + "\n" for q, _ in ASKED)),
}


def _prompts(name: str) -> Callable[[Path], Outcome]:
    return lambda place: [
        [one.id, [[m["role"], m["content"]] for m in one.messages]] for one in read_conversations(place / name)
    ]


def _prompt_readers() -> list[Reader]:
    return [
        Reader(f"prompts: {shape}", {name: form}, written(name, data), _prompts(name), None, by(readings.prompts, name))
        for shape, (name, form, data) in SHAPES.items()
    ]


@cache
def _tokenizer() -> Any:
    return load_tokenizer(str(RUN / "target"))


def _traffic(place: Path) -> Outcome:
    found = read_traces(place / "log.jsonl", _tokenizer(), "hash", vocab_size=len(_tokenizer()))
    return [[row.key, row.prompt_ids, row.response_ids, row.temperature, row.finish_reason] for row in found]


SERVED: list[dict[str, Any]] = [
    {"id": "a", "prompt_ids": [5, 6, 7], "response_ids": [8, 9, 10], "finish_reason": "length", "temperature": 0.7},
    {"id": "b", "messages": MESSAGES[0]["messages"], "created": 1_790_000_000, "finish_reason": "stop"},
    {"id": "c", "prompt_token_ids": [5], "choices": [{"token_ids": [9, 9], "finish_reason": "length"}], "top_p": 0.9},
]


def _served(path: Path) -> Outcome:
    """Of records with ids alone: what must be said of a log, where no record has text any more."""
    found = []
    for record in readings.lines_of(path):
        choice = record.get("choices")
        flat = record | (choice[0] if choice else {})
        prompt = flat.get("prompt_ids") or flat.get("prompt_token_ids")
        response = flat.get("response_ids") or flat.get("token_ids")
        if prompt is None:
            base = next(iter(_traffic_base()))
            prompt, response = base
        readings.demand(all(readings.whole(i, 0, len(_tokenizer()) - 1) for i in [*prompt, *response]))
        drawn = 1.0 if flat.get("temperature") is None else flat["temperature"]
        readings.demand(readings.number(drawn, 0) and (flat.get("id") is None or isinstance(flat["id"], str | int)))
        readings.demand(not isinstance(flat.get("id"), bool))
        id = flat.get("id") if flat.get("id") not in (None, "") else None
        finish = flat.get("finish_reason") or ("stop" if response[-1] == _tokenizer().eos_token_id else "length")
        found.append([id, prompt, response, float(drawn), "length" if finish == "length" else "stop"])
    return found


def _traffic_base() -> list[tuple[list[int], list[int]]]:
    asked = MESSAGES[0]["messages"]
    ids = list(_tokenizer().apply_chat_template(asked[:1], add_generation_prompt=True, return_dict=False))
    whole = list(_tokenizer().apply_chat_template(asked, return_dict=False))
    end = _tokenizer().eos_token_id
    answer = whole[len(ids) :]
    return [(ids, answer[: answer.index(end) + 1] if end in answer else answer)]


def _named(path: Path) -> Outcome:
    """The records under the keys of their rows."""
    return [[f"{f'log/{n}' if id is None else id}@traffic", *rest] for n, (id, *rest) in enumerate(_served(path), 1)]


# -- settings ----------------------------------------------------------------------------------------------------------
ADAPT = """\
target: {run}/target
draft: {run}/draft
prompts: {run}/prompts.jsonl
out: {place}/out
method: eda
gamma: 4
max-new-tokens: 32
batch-size: 4
heldout-prompts: 4
bench-prompts: 3
budget: 50%
dtype: float32
train:
  epochs: 2
  learning_rate: 0.002
"""
GRID = """\
name: small
targets:
  t:
    target: {run}/target
    draft: {run}/draft
    prompts: {run}/prompts.jsonl
    evaluation:
      domain: {run}/prompts.jsonl
methods:
  fast:
    method: fc
    learning_rate: 0.002
grid:
  - methods: [none, fast]
    seeds: [0, 1]
gamma: 3
evaluation_tokens: 16
"""


def _yaml(name: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(text.format(run=RUN, place=place)) and None


def _dry(place: Path, said: str) -> Outcome:
    settings = said.replace(str(place), "PLACE").partition("costs:")[0]
    return [line for line in settings.splitlines() if not line.startswith(("adapt:", "study:"))]


def _told(place: Path, found: Outcome) -> bool:
    """Whether every setting of the file stands among those that are printed, with the value of the file."""

    def plain(value: Any) -> str:
        return re.sub(r"[\s'\"]", "", str(value).replace("%", "")).lower()

    values = yaml.safe_load((place / "c.yaml").read_text())
    printed = plain("".join(found)).replace(plain(place), "place")
    for name, value in values.items():
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        for key, one in inner:
            key = key.replace("-", "_")
            if one is None or isinstance(one, list | dict):
                continue
            number = isinstance(one, int | float) and not isinstance(one, bool)
            ways = [plain(one), plain(float(one)), plain(int(one))] if number and abs(one) < 1e15 else [plain(one)]
            shown = [way.replace(plain(place), "place") for way in ways]
            if not any(plain(f"{key}:{way}") in printed for way in shown):
                return False
    return True


def _listed(place: Path, found: Outcome) -> bool:
    """Whether the cells are those of the file as it stands: a grid that lost its last seeds is a smaller one."""
    values, before = (yaml.safe_load(text) for text in ((place / "g.yaml").read_text(), GRID.format(run=RUN)))
    if any(values[key] != before[key] for key in values.keys() - {"grid"}):
        return False
    cells = [
        [target, method, str(seed)]
        for target in values["targets"]
        for block in values["grid"]
        for method in block["methods"]
        for seed in (block.get("seeds", [0])[:1] if method == "none" else block.get("seeds", [0]))
    ]
    parts = [re.split(r"[|\s]+", line.strip()) for line in found]
    return sorted(cells) == sorted([part[1], part[2], part[-1]] for part in parts)


def _plugin(place: Path) -> list[str]:
    return ["--plugin", str(place / "mine.py"), "select", "--help"]


PLUGIN = '''"""A start that does nothing."""
from redraft.registries import STARTS
@STARTS.register("nothing-at-all")
class Nothing:
    needs = frozenset()
    def run(self, draft, context):
        return draft
'''

CARD = "---\nlicense: apache-2.0\nlicense_name: x\ntags:\n- a\n---\n# A model\n"


def _card(place: Path) -> Outcome:
    return licence_of(_card_of(str(place)))


def _licence(place: Path, found: Outcome) -> bool:
    """A card is a page for people: what it says of a licence is taken where it is text, and nothing else."""
    return all(isinstance(value, str) for value in found.values())


_licence.typed = True  # type: ignore[attr-defined]


def _static(shape: Any) -> Any:
    assert isinstance(shape, StaticTree)
    return shape.paths


def texts() -> list[Reader]:
    """All of them."""
    return [
        Reader(
            "responses",
            {"responses.jsonl": "rows"},
            files("run/responses.jsonl"),
            _select("responses.jsonl"),
            _entries,
            by(readings.chosen, "responses.jsonl"),
            ("m.json",),
            weight=10,
        ),
        Reader(
            "responses, packed",
            {"r.jsonl.gz": "rows"},
            _packed_rows,
            _select("r.jsonl.gz"),
            _entries,
            by(readings.chosen, "r.jsonl.gz"),
            ("m.json",),
            weight=5,
        ),
        *_prompt_readers(),
        Reader(
            "served traffic",
            {"log.jsonl": "lines"},
            written("log.jsonl", SERVED),
            _traffic,
            None,
            by(_named, "log.jsonl"),
            weight=8,
        ),
        Reader(
            "suite",
            {"s.jsonl": "lines"},
            written("s.jsonl", MESSAGES),
            lambda place: sorted([i.id, i.task] for i in load_suite(f"gsm8k={place / 's.jsonl'}").items),
            None,
            by(lambda path: sorted([id, "gsm8k"] for id, _ in readings.prompts(path)), "s.jsonl"),
        ),
        Reader(
            "static tree",
            {"tree.json": "json"},
            written("tree.json", "[[0],[1],[0,0],[0,1],[1,0]]"),
            lambda place: [list(p) for p in _static(parse_shape(str(place / "tree.json")))],
            None,
            by(readings.paths, "tree.json"),
        ),
        Reader(
            "settings of adapt",
            {"c.yaml": "yaml"},
            _yaml("c.yaml", ADAPT),
            lambda place: ["adapt", "--config", str(place / "c.yaml"), "--dry-run"],
            _dry,
            _told,
            ("out",),
            weight=5,
        ),
        Reader(
            "settings of a study",
            {"g.yaml": "yaml"},
            _yaml("g.yaml", GRID),
            lambda place: ["study", str(place / "g.yaml"), "--list"],
            _dry,
            _listed,
            weight=4,
        ),
        Reader(
            "plugin",
            {"mine.py": "bytes"},
            written("mine.py", PLUGIN),
            _plugin,
            lambda place, said: "Usage" in said,
            weight=2,
        ),
        Reader("card of a model", {"README.md": "bytes"}, written("README.md", CARD), _card, None, _licence, weight=2),
    ]
