"""Readings of the files by this folder's own few lines, with Python's JSON alone: what the package must say of them.

Each gives what its reader's outcome is, or raises where the file says nothing that could be meant.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "gpt": "assistant"}
KNOWN = ("system", "developer", "user", "assistant", "tool", "function")


class Nothing(Exception):
    """The file says nothing that could be meant."""


def demand(right: bool) -> None:
    if not right:
        raise Nothing


def text_of(path: Path) -> str:
    demand(path.is_file())
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in text_of(path).split("\n") if line.strip()]


def whole(value: Any, least: float = 0, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def text(value: Any) -> bool:
    return isinstance(value, str)


# -- rows --------------------------------------------------------------------------------------------------------------
def seal(row: dict[str, Any]) -> str:
    """The checksum of a row, as docs/formats.md has it."""
    plain = {key: value for key, value in row.items() if key != "checksum"}
    told = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a response file."""
    found = lines_of(path)
    for row in found:
        demand(isinstance(row, dict) and row.get("checksum") == seal(row))
        for name in ("prompt_ids", "response_ids"):
            demand(isinstance(row[name], list) and bool(row[name]) and all(whole(i, 0, 2**31 - 1) for i in row[name]))
        demand(all(text(row[name]) for name in ("id", "finish_reason", "target_hash")))
        demand(row["finish_reason"] in ("stop", "length", "context"))
        demand(number(row["temperature"], 0) and whole(row["top_k"]) and number(row["top_p"], 0, 1))
        demand(type(row["seed"]) is int and whole(row["turn"]))
        demand(row.get("source", "target") in ("target", "reference", "traffic"))
        drawn = row.get("source", "target")
        drawn = f"T{row['temperature']:g}" if drawn == "target" else drawn
        row["key"] = f"{row['id']}@{drawn}" + (f"#{row['turn']}" if row["turn"] else "")
    demand(bool(found) and len({row["key"] for row in found}) == len(found))
    return found


def chosen(path: Path) -> list[Any]:
    """What a budget of half of the rows keeps of the longest answers: key, length, whether it is in; by rank."""
    found = sorted(rows(path), key=lambda row: (-len(row["response_ids"]), row["key"]))
    return [[row["key"], len(row["response_ids"]), rank < len(found) // 2] for rank, row in enumerate(found)]


# -- prompts -----------------------------------------------------------------------------------------------------------
def _turn(turn: Any) -> list[str]:
    role, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLES.get(role, role)
    demand(role in KNOWN and text(said))
    return [role, said]


def _turns(item: Any) -> list[list[str]]:
    if text(item):
        return [["user", item]]
    demand(isinstance(item, dict))
    for key in ("messages", "conversations"):
        if item.get(key) is not None:
            demand(isinstance(item[key], list))
            return [_turn(turn) for turn in item[key]]
    if "instruction" in item:
        nothing = ("", None, [], {})
        given = {
            key: item[key]
            for key in ("input", "output")
            if not any(item.get(key) is v or item.get(key) == v and type(item.get(key)) is type(v) for v in nothing)
        }
        parts = [item["instruction"], *([given["input"]] if "input" in given else [])]
        demand(all(map(text, parts)))
        answer = [["assistant", given["output"]]] if "output" in given else []
        demand(all(text(said) for _, said in answer))
        return [["user", "\n\n".join(filter(None, parts))], *answer]
    demand(text(item["prompt"]))
    return [["user", item["prompt"]]]


def prompts(path: Path) -> list[Any]:
    """Id and turns of every prompt of a file."""
    plain, found, stem = text_of(path), [], path.name.split(".")[0]
    if path.name.endswith(".txt"):
        items = [(n, line.strip()) for n, line in enumerate(plain.split("\n"), 1) if line.strip()]
    elif plain.lstrip().startswith("["):
        items = list(enumerate(json.loads(plain), 1))
    else:
        items = [(n, json.loads(line)) for n, line in enumerate(plain.split("\n"), 1) if line.strip()]
    for n, item in items:
        turns = _turns(item)
        asked = [said.strip() for role, said in turns if role == "user"]
        demand(bool(asked) and all(asked))
        id = item.get("id") if isinstance(item, dict) else None
        demand(id is None or text(id) or whole(id, -math.inf))
        found.append([f"{stem}/{n}" if id in (None, "") else str(id), turns])
    demand(bool(found) and len({id for id, _ in found}) == len(found))
    return found


# -- objects -----------------------------------------------------------------------------------------------------------
def manifest(path: Path) -> Any:
    found = json.loads(text_of(path))
    demand(found["schema"] == "redraft.selection/1" and text(found["scorer"]) and text(found["order"]))
    demand(isinstance(found["settings"], dict) and isinstance(found["budget"], dict))
    demand(all(found[name] is None or text(found[name]) for name in ("source", "source_sha256")))
    for rank, entry in enumerate(found["entries"], 1):
        demand(text(entry["key"]) and number(entry["score"]) and entry["rank"] == rank and whole(entry["tokens"], 1))
        demand(isinstance(entry["selected"], bool) and text(entry["reason"]))
    return [[e["key"], e["score"], e["tokens"], e["selected"]] for e in found["entries"]]


COUNTS = ("tokens", "flops", "peak_memory_bytes", "bytes_written")


def ledger(path: Path) -> Any:
    """Stages of a cost ledger; a count that is not there is nothing."""
    demand(path.exists() or not path.is_symlink())
    found = []
    for entry in json.loads(text_of(path))["stages"] if path.exists() else []:
        counts = [entry.get(name, 0) for name in COUNTS]
        demand(text(entry["stage"]) and all(map(whole, counts)) and number(entry.get("seconds", 0.0), 0))
        demand(text(entry.get("formula", "")))
        found.append([entry["stage"], *counts, float(entry.get("seconds", 0.0)), entry.get("formula", "")])
    return found


def curve(path: Path) -> Any:
    """Points of a training curve by step; a torn last line is none."""
    *before, last = text_of(path).split("\n")
    found = [json.loads(line) for line in before if line.strip()]
    if last.strip():
        try:
            found.append(json.loads(last))
        except ValueError:
            demand(last.lstrip().startswith("{"))
    points = {}
    for one in found:
        demand(whole(one["step"]) and (one["step"] == 0 or number(one["loss"])) and whole(one.get("tokens", 0)))
        demand(number(one.get("seconds", 0.0), 0))
        tau = one.get("heldout_tau")
        demand(tau is None or number(tau))
        loss = one.get("loss")
        demand(loss is None or number(loss))
        figures = [None if value is None else float(value) for value in (loss, tau)]
        points[one["step"]] = [one["step"], figures[0], one.get("tokens", 0), figures[1]]
    return [points[step] for step in sorted(points)]


def index(path: Path, identity: Any) -> Any:
    """The shard of every row whose shard is there, where the features are of this target."""
    if not path.exists():
        demand(not path.is_symlink())
        return {}
    found = json.loads(text_of(path))
    demand(found["identity"] == identity)
    demand(all(re.fullmatch(r"shard-\d+\.safetensors", name) for name in found["index"].values()))
    there = {shard.name for shard in path.parent.glob("shard-*.safetensors")}
    return {key: name for key, name in found["index"].items() if name in there}


def paths(path: Path) -> Any:
    """Paths of a static tree, each behind the one that leads to it."""
    found = json.loads(text_of(path))
    demand(isinstance(found, list) and bool(found) and all(isinstance(p, list) and p for p in found))
    demand(all(whole(k) for p in found for k in p))
    every = {tuple(p) for p in found}
    demand(len(every) == len(found))
    for p in every:
        demand(len(p) == 1 or p[:-1] in every)
        demand(p[-1] == 0 or (*p[:-1], p[-1] - 1) in every)
    return sorted(map(list, every), key=lambda p: (len(p), p))


def result(path: Path) -> Any:
    """What a training came to."""
    found = json.loads(text_of(path))
    floats, counts = ("best_tau", "start_tau", "seconds"), ("steps", "anchors")
    demand(all(number(found[name]) for name in floats) and all(whole(found[name], -math.inf) for name in counts))
    demand(isinstance(found["stopped_early"], bool))
    demand(all(len(pair) == 2 and whole(pair[0], -math.inf) and number(pair[1]) for pair in found["history"]))
    return [*(float(found[name]) for name in floats), *(found[name] for name in counts), found["history"]]
