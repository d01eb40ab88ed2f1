"""Reading files that anybody may have written: the one reader of bytes, text, JSON and YAML.

Whatever is wrong with a file is one line that names it, in bounded time and memory: a pipe is not waited for, what is
packed does not unpack to any size, and JSON is read as its standard has it. Nothing here knows what the files mean;
:func:`typed` holds a value against the type that a reader asks for, before it is used.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import os
import re
import signal
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from redraft.errors import UserError
from redraft.seals import unsealed

if TYPE_CHECKING:  # what lists names asks for no types, and pydantic takes a moment
    from pydantic import TypeAdapter

# What a file may hold that is read whole, and what a packed one may unpack to.
MOST_BYTES = 1 << 30
# A packed file may unpack to so many times its size where that is more than a moment's reading: text does not pack
# tighter, and what does is made to fill a memory.
MOST_TIMES, FREELY = 200, 1 << 26
# Objects and lists within each other. Beyond it there is no meaning, and Python's own limits are near.
MOST_DEEP = 100
# A number of more digits is beyond every kind of number that is computed with.
MOST_DIGITS = 300
# JSON can write one half of a pair that makes a character; files that were cut in the middle of one do.
HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
HALF = re.compile(r"[\ud800-\udfff]")

Read = TypeVar("Read")


# -- time ------------------------------------------------------------------------------------------------------------
@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Raise ``UserError`` where the block computes longer, as templates and patterns of strangers can for ever.

    Seconds are the processor's, so that a machine that is busy, or was asleep, refuses no more than others. Python and
    its patterns are stopped, other libraries are not; nor is anything outside the main thread, or where somebody else
    waits for the same signal.
    """
    free = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGVTALRM")
    if not free or signal.getsignal(signal.SIGVTALRM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise UserError(f"{what} takes more than {seconds:g} s; it is not made to end, or to be computed here")

    signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


# -- bytes and text ----------------------------------------------------------------------------------------------------
def require_file(path: str | Path, mend: str = "") -> int:
    """The size in bytes of an ordinary file, links followed. Raises ``UserError`` for anything else, in one line.

    ``mend`` is what to do where there is none. A pipe, a device or a socket would be waited for.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist{mend and f'; {mend}'}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file (a pipe, a socket or a device)"
        raise UserError(f"{path} is {what}; put the file itself in its place")
    return found.st_size


def there(path: str | Path) -> bool:
    """Whether anything lies there: also a link to nothing, which is no absent file and is told of when it is read."""
    return os.path.lexists(path)


def room_of(path: str | Path, mend: str = "", most: int = MOST_BYTES) -> int:
    """How many bytes of a file are read at most, unpacked where its name ends in ``.gz``.

    Raises ``UserError`` as :func:`require_file`, and for a file that itself has more than ``most``.
    """
    size = require_file(path, mend)
    if size > most:
        raise UserError(f"{path} has {size:,} bytes, and at most {most:,} are read; split it")
    return min(most, max(FREELY, MOST_TIMES * size)) if str(path).endswith(".gz") else most


def read_bytes(path: str | Path, mend: str = "", most: int = MOST_BYTES) -> bytes:
    """What a file holds, unpacked where its name ends in ``.gz``.

    Raises ``UserError``, with ``mend`` where there is none; also for more than ``most`` bytes, packed or not.
    """
    most = room_of(path, mend, most)
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            data = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > most:
        raise UserError(f"{path} unpacks to more than {most:,} bytes; unpack and split it")
    return data


def read_text(path: str | Path, mend: str = "", most: int = MOST_BYTES) -> str:
    """:func:`read_bytes` as UTF-8 text, without a mark of the byte order. Raises ``UserError``, also for zeros."""
    data = read_bytes(path, mend, most)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}, line {line}); convert it to UTF-8"
        ) from error
    if (at := text.find("\0")) >= 0:
        raise UserError(f"{path} is no text: a zero in line {text.count(chr(10), 0, at) + 1}; copy it again")
    return text


# -- JSON --------------------------------------------------------------------------------------------------------------
class _Broken(ValueError):
    """What is wrong with a JSON text, in a few words."""


def loads(text: str, finite: bool = True) -> Any:
    """The value of a JSON text. Raises ``ValueError`` (``json.JSONDecodeError`` where it is no JSON at all).

    A key that stands twice with two values, half a character, more than ``MOST_DEEP`` levels and a number beyond all
    bounds are errors; so are NaN and Infinity, unless ``finite`` is false: other programs write them.
    """
    try:
        value = (_FINITE if finite else _LOOSE).decode(text)
    except RecursionError as error:
        raise _Broken("it is nested too deeply") from error
    if text.count("[") + text.count("{") > MOST_DEEP and _deep(value):
        raise _Broken(f"it is nested too deeply, beyond {MOST_DEEP} levels")
    if HALF_A_CHARACTER.search(text) and (found := HALF.search(json.dumps(value, ensure_ascii=False))):
        near = found.string[max(0, found.start() - 20) : found.start()]
        raise _Broken(
            f"\\u{ord(found[0]):04x} behind {near!r} is half a character, which no text can hold; take it out"
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these pairs. Of a key that stands twice readers take the last, whatever the first said."""
    found = dict(pairs)
    if len(found) < len(pairs):
        told: dict[str, Any] = {}
        for key, value in pairs:
            if key in told and repr(told[key]) != repr(value):
                raise _Broken(f"it has {key[:60]!r} twice, with different values; keep the right one")
            told[key] = value
    return found


def _constant(text: str) -> Any:
    raise _Broken(f"{text} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Broken(f"the number {text[:40]} is beyond what can be computed with")
    return value


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _Broken(f"a number of {len(text):,} digits is beyond what can be computed with")
    return int(text)


_FINITE = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_constant, parse_float=_float, parse_int=_int)
_LOOSE = json.JSONDecoder(object_pairs_hook=_once, parse_int=_int)


def _deep(value: Any) -> bool:
    """Whether lists and objects are within each other beyond ``MOST_DEEP`` levels."""
    level = [value]
    for _ in range(MOST_DEEP + 1):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        if not inner:
            return False
        level = [each for part in inner for each in part]
    return True


def parse_json(text: str, path: str | Path, first_line: int = 1, finite: bool = True) -> Any:
    """:func:`loads` of a text that begins on this line of a file. Raises ``UserError`` with file and line."""
    try:
        return loads(text, finite)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}:{line}: not JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:
        raise UserError(f"{path}:{first_line}: no JSON that can be read: {error}") from error


def read_json(path: str | Path, finite: bool = True) -> dict[str, Any]:
    """:func:`read_object` without the seal (:mod:`redraft.seals`). Raises ``UserError``, also where it was broken."""
    return unsealed(read_object(path, finite), path)


def read_object(path: str | Path, finite: bool = True) -> dict[str, Any]:
    """One JSON object from a file, as :func:`loads` reads it. Raises ``UserError`` with the file and line."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty; it must hold a JSON object")
    try:
        value = loads(text, finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def json_lines(path: str | Path, finite: bool = True, torn: bool = False) -> Iterator[tuple[int, Any]]:
    """Number and value of every line of JSON that is not blank. Raises ``UserError`` with file and line.

    With ``torn`` a last line that lacks its end is left out where it is the beginning of an object: a killed writer
    leaves one.
    """
    # split("\n"), not splitlines(): JSON text may hold U+2028 and its like unescaped
    *lines, last = _torn_text(path).split("\n") if torn else read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, parse_json(line, path, number, finite)
    if last.strip():
        try:
            value = parse_json(last, path, len(lines) + 1, finite)
        except UserError:
            if torn and last.lstrip().startswith("{"):  # the beginning of an object, or what a disk made of its end
                return
            raise
        yield len(lines) + 1, value


def _torn_text(path: str | Path) -> str:
    """The text of a file of lines whose last one may end within a character, or in zeros that were never written."""
    data = read_bytes(path)
    whole, _, rest = data.rpartition(b"\n")
    try:
        return f"{(whole + _).decode('utf-8-sig')}{rest.decode(errors='replace')}"
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from error


# -- types -------------------------------------------------------------------------------------------------------------
@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def typed(kind: Callable[..., Read], value: Any, where: str, mend: str = "copy it again") -> Read:
    """A JSON value as ``kind``, any type that pydantic knows, strictly: true is no number, and a text is none.

    Raises ``UserError`` that begins with ``where`` and names the first part that does not fit, and ends with ``mend``.
    """
    from pydantic import ValidationError

    try:
        adapter = _adapter(kind)  # type: ignore[arg-type]
        found: Read = adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        part = ".".join(map(str, first["loc"]))[:120] or "the whole"
        raise UserError(f"{where}: {part}: {first['msg']}; {mend}") from error
    return found


# -- YAML --------------------------------------------------------------------------------------------------------------
BOOLEAN = "tag:yaml.org,2002:bool"
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
TIMESTAMP = "tag:yaml.org,2002:timestamp"


class Loader(yaml.SafeLoader):
    """YAML that refuses a key that is there twice (the first would be lost), and where ``on`` is a word.

    Booleans are true and false alone, and a date or a time (``12:30``) is a text, as YAML 1.2 has it.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in found if tag not in (BOOLEAN, TIMESTAMP)]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _number(loader: Loader, node: yaml.ScalarNode) -> Any:
    """A number, unless it is written with colons: in base 60 nobody counts."""
    if ":" in node.value:
        return node.value
    return loader.construct_yaml_int(node) if node.tag == NUMBERS[0] else loader.construct_yaml_float(node)


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


Loader.add_implicit_resolver(BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for kind in NUMBERS:
    Loader.add_constructor(kind, _number)
Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


# Settings are read in moments; a larger file is another kind of file.
MOST_YAML = 1 << 18
# What a file comes to once every alias stands for what it names.
MOST_NODES = 100_000


def _refuse_bombs(top: yaml.Node | None) -> None:
    """Raise ``ValueError`` where aliases make more of a file than it holds, or hold themselves."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise ValueError("an alias stands within what it names")
            return sizes[id(node)]
        sizes[id(node)], total = 0, 1
        if isinstance(node, yaml.SequenceNode | yaml.MappingNode):
            for part in node.value:
                total += sum(map(size, part)) if isinstance(part, tuple) else size(part)
        if total > MOST_NODES:
            raise ValueError(f"its aliases come to more than {MOST_NODES:,} values; write out what is meant")
        sizes[id(node)] = total
        return total

    if top is not None:
        size(top)


IN_TEXT = 'in "<unicode string>",'  # what yaml calls a file whose text it is given


def load_yaml(text: str) -> Any:
    """The value of a YAML text; none of an empty one. Raises ``ValueError`` that says in a line what is wrong with it.

    A key that stands twice, tags of other programs, and aliases that come to more than ``MOST_NODES`` are errors.
    """
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            _refuse_bombs(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # numbers and nesting that it cannot read
        raise _Broken(" ".join(str(error).split()).replace(IN_TEXT, "at")) from error


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The settings of a file, named ``what`` where it is missing. Raises ``UserError``."""
    text = read_text(path, f"give a YAML file with {what}", MOST_YAML)
    try:
        values = load_yaml(text)
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} must hold settings as `name: value` lines")
    return values
