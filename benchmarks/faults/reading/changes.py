"""One change of one good file: of its bytes, of what stands in its place, or of a value in its JSON.

A change says what may come of it. ``WRONG``: it must be refused, or make no difference. ``OTHER``: it may also be read
as what it now says, which a reading of its own then has to confirm.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutating.base import BEYOND, DEEP, DEEP_OBJECT, DIGITS, INFINITY, NAN, Raw, dumped

WRONG, OTHER = "wrong", "other"
ZEROS = gzip.compress(bytes(1 << 24), mtime=0)
HALF = Raw('"a\\ud83d"', "half a character")


@dataclass(frozen=True)
class Change:
    """``apply`` does to a file what ``what`` says."""

    kind: str
    what: str
    allows: str
    apply: Callable[[Path], None]


# -- the file as a whole -----------------------------------------------------------------------------------------------
def _bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = path.read_bytes()
        packed = path.suffix == ".gz"
        new = edit(gzip.decompress(data) if packed else data)
        path.write_bytes(gzip.compress(new, mtime=0) if packed else new)

    return apply


def _instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # addresses of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def whole(rng: random.Random, path: Path) -> Change:
    """A change of the bytes of any file, or of what lies in its place."""
    at = rng.random()

    def inserted(piece: bytes) -> Callable[[Path], None]:
        return _bytes(lambda data: data[: int(at * len(data))] + piece + data[int(at * len(data)) :])

    ways: dict[str, tuple[str, Callable[[Path], None]]] = {
        "empty": (OTHER, _instead(lambda p: p.write_bytes(b""))),
        "blank": (OTHER, _instead(lambda p: p.write_text(" \n\n"))),
        "truncated": (OTHER, lambda p: p.write_bytes(p.read_bytes()[: int(at * p.stat().st_size)])),
        "truncated by some bytes": (OTHER, lambda p: p.write_bytes(p.read_bytes()[: -1 - int(9 * at)])),
        "a mark of byte order": (OTHER, _bytes(lambda data: b"\xef\xbb\xbf" + data)),
        "UTF-16": (WRONG, _bytes(lambda data: data.decode("utf-8", "replace").encode("utf-16"))),
        "line ends of Windows": (OTHER, _bytes(lambda data: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))),
        "a zero byte": (WRONG, inserted(b"\0")),
        "bytes of no character": (WRONG, inserted(b"\xff\xfe\xe9")),
        "Latin-1": (WRONG, inserted("é ü".encode("latin-1"))),
        "noise": (WRONG, _instead(lambda p: p.write_bytes(rng.randbytes(3000)))),
        "a mebibyte of brackets": (WRONG, _instead(lambda p: p.write_text("[" * (1 << 20)))),
        "a pipe": (OTHER, _instead(os.mkfifo)),
        "a socket": (OTHER, _instead(_socket)),
        "a folder": (OTHER, _instead(os.mkdir)),
        "a link to nothing": (OTHER, _instead(lambda p: os.symlink("nowhere", p))),
        "a link to itself": (OTHER, _instead(lambda p: os.symlink(p.name, p))),
        "a device without end": (WRONG, _instead(lambda p: os.symlink("/dev/zero", p))),
        "an empty device": (WRONG, _instead(lambda p: os.symlink("/dev/null", p))),
        "gone": (OTHER, lambda p: p.unlink()),
        "a hole of a tebibyte": (WRONG, lambda p: os.truncate(p, 1 << 40)),
    }
    if path.suffix == ".gz":
        ways["packed zeros, 1.5 GB"] = WRONG, _instead(lambda p: p.write_bytes(ZEROS * 96))
        ways["not packed"] = WRONG, lambda p: p.write_bytes(gzip.decompress(p.read_bytes()))
        ways["packed twice"] = WRONG, lambda p: p.write_bytes(gzip.compress(p.read_bytes()))
    if path.suffix in (".safetensors", ".pt"):
        for name in ("a mark of byte order", "line ends of Windows", "UTF-16"):
            del ways[name]
        ways["one bit"] = OTHER, lambda p: _flip(p, at)
    what = rng.choice(list(ways))
    return Change("file", what, *ways[what])


def _flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


# -- a value within JSON -----------------------------------------------------------------------------------------------
def _spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _spots(part, (*path, key))


def _other_kinds(value: Any) -> list[Any]:
    """Values of kinds that this one's is not."""
    ways: list[Any] = [None, {}, [], {"a": [1]}, [[[]]]]
    if isinstance(value, bool):
        ways += ["true", 1, 0]
    elif isinstance(value, int | float):
        ways += [True, False, str(value), [value], "", "NaN"]
        ways += [value + 0.5] if isinstance(value, int) else []
    elif isinstance(value, str):
        ways += [0, 3.5, True, [value]]
    return [way for way in ways if not (isinstance(way, dict) and isinstance(value, dict))]


def json_value(rng: random.Random, text: str) -> tuple[Change, str]:
    """A change somewhere in a JSON text, and the text then. The first keys are as likely as what is deep down."""
    top = json.loads(text)
    spots = list(_spots(top))
    short = [spot for spot in spots if len(spot) <= 2]
    spot = rng.choice(short if short and rng.random() < 0.5 else spots) if spots else ()
    inner = top
    for key in spot[:-1]:
        inner = inner[key]
    old = inner[spot[-1]] if spot else top
    named = ".".join(map(str, spot)) or "the whole"
    free = spot[:1] == ("provenance",)  # a record that is shown as it is, whatever it holds
    how = rng.choice(
        ["kind"] * 5 + ["number"] * 4 + ["gone", "gone", "more", "twice", "twice", "half", "deep", "top", "list"]
    )
    number = isinstance(old, int | float) and not isinstance(old, bool)
    if how == "number" and not number:
        how = "kind"
    if not spot or how == "top":
        new = rng.choice([[], "text", 3, None, True, [top], {"a": top}, {}])
        return Change("value", f"{new!r:.40} as the whole", OTHER, lambda p: None), dumped(new)
    allows = WRONG
    if how == "gone":
        del inner[spot[-1]]
        return Change("value", f"{named} gone", OTHER, lambda p: None), dumped(top)
    if how == "more":
        place = inner if isinstance(inner, dict) else top
        if not isinstance(place, dict):
            place = next((each for each in top if isinstance(each, dict)), {})
        place["a key of no meaning"] = rng.choice([1, "x", {}, None])
        return Change("value", f"one key more beside {named}", OTHER, lambda p: None), dumped(top)
    if how == "twice" and isinstance(inner, dict):
        same = rng.random() < 0.3
        mark = "a name that stands nowhere else"
        second = old if same else rng.choice([None, 7, "other"])
        new_inner = {mark: second, **inner}
        inner.clear()
        inner.update(new_inner)
        what = f"{named} twice, {'the same' if same else f'first {second!r}'}"
        return (
            Change("value", what, OTHER if same else WRONG, lambda p: None),
            dumped(top).replace(json.dumps(mark), json.dumps(spot[-1]), 1),
        )
    if how == "half" and isinstance(old, str):
        new: Any = HALF
    elif how == "deep":
        new = rng.choice([DEEP, DEEP_OBJECT])
    elif how == "list" and isinstance(old, list) and old:
        new, allows = rng.choice([(old[:-1], OTHER), (old + old[-1:], OTHER), ([], OTHER)])
    elif how == "number":
        ways = [NAN, INFINITY, BEYOND, DIGITS, Raw("1e999"), Raw("-" + "9" * 400)]
        plain = [-1, 0, -(2**63), 2**63, 10**30, 1e300, 5e-324, old * 2 + 1]
        new = rng.choice(ways + plain)
        allows = WRONG if isinstance(new, Raw) else OTHER
    else:
        new = rng.choice(_other_kinds(old))
        allows = OTHER if new is None or free else WRONG
    inner[spot[-1]] = new
    shown = repr(new) if len(repr(new)) < 40 else f"{repr(new)[:37]}..."
    return Change("value", f"{named} is {shown} instead of {old!r:.40}", allows, lambda p: None), dumped(top)


def in_json(rng: random.Random, path: Path) -> Change:
    """A change of a value of a JSON file."""
    change, text = json_value(rng, path.read_text())
    return Change(change.kind, change.what, change.allows, lambda p: _put(p, text))


def in_lines(rng: random.Random, path: Path, seal: Callable[[dict[str, Any]], str] | None = None) -> Change:
    """A change of a value in a line of JSON; ``seal`` works out the ``checksum`` anew where it can."""
    packed = path.suffix == ".gz"
    text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
    lines = text.split("\n")
    number = rng.choice([i for i, line in enumerate(lines) if line.strip()])
    if seal is None or rng.random() < 0.3:
        change, line = json_value(rng, lines[number])
    else:
        value = json.loads(lines[number])
        value.pop("checksum", None)
        change, line = json_value(rng, json.dumps(value))
        try:
            again = json.loads(line)
            line = json.dumps(again | {"checksum": seal(again)}) if isinstance(again, dict) else line
            change = Change("sealed value", change.what, change.allows, change.apply)
        except (ValueError, RecursionError):
            pass
    lines[number] = " ".join(line.split("\n"))
    if rng.random() < 0.1:
        lines.insert(number, lines[number])
        change = Change(change.kind, f"{change.what}, and the line twice", change.allows, change.apply)
    return Change(change.kind, f"line {number + 1}: {change.what}", change.allows, lambda p: _put(p, "\n".join(lines)))


def _put(path: Path, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


# -- settings as YAML --------------------------------------------------------------------------------------------------
LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 7))]
)
VALUES = (
    *("", "null", "true", "3", "-1", "0", "1e999", ".nan", ".inf", "[]", "{}", "[1, 2]", "{a: b}", "'3'", "text"),
    *("9" * 400, "0x10", "1_000", "!!python/name:os.getcwd", "*nowhere", "&a [*a]", "2001-01-01", "on", "~"),
)


def in_yaml(rng: random.Random, path: Path) -> Change:
    """A change of a line of a YAML file, or around it."""
    lines = path.read_text().split("\n")
    number = rng.choice([i for i, line in enumerate(lines) if ":" in line])
    name, _, old = lines[number].partition(":")
    ways: list[tuple[str, list[str]]] = [
        ("a key twice", [*lines, f"{name.strip()}: 7"]),
        ("a key of no meaning", [*lines, "no_such_setting: 1"]),
        ("a tab", [*lines[:number], f"\t{lines[number]}", *lines[number + 1 :]]),
        ("aliases that come to millions", [*lines, LAUGHS]),
        ("nested lists", [*lines[:number], f"{name}: {'[' * 3000}", *lines[number + 1 :]]),
        ("a list as the whole", ["- 1"]),
        ("two documents", [*lines, "---", *lines]),
        ("a value without a name", [*lines, "just text"]),
    ]
    if rng.random() < 0.35:
        what, new = rng.choice(ways)
        allows = WRONG
    else:
        value = rng.choice(VALUES)
        what, new = f"{name.strip()} is {value[:30]} instead of{old[:30]}", list(lines)
        new[number], allows = f"{name}: {value}", OTHER
    return Change("settings", what, allows, lambda p: p.write_text("\n".join(new)))
