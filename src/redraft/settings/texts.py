"""Settings that are small texts of their own, read and checked.

A server's address; prompts and sources; budgets of selection; scorers, starts, suites and formats by their names;
arguments of chat templates.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from redraft.errors import UserError
from redraft.inputs import loads
from redraft.places import without_secrets
from redraft.registries import EXPORTERS, SCORERS, STARTS, SUITES, nearest
from redraft.settings.base import KINDS, check, choices, convert, known_name, one_of

KEY_VARIABLE = "REDRAFT_API_KEY"
PORT = "{port}"  # in a command that starts a server
SELF = "self"
MATHS, DATA, SUITE = "maths", "data", "suite"
WORDS = ("true", "false", "null", "none")


# -- servers -----------------------------------------------------------------------------------------------------------
def check_address(url: str) -> str:
    """The address of a server without ``/v1`` at its end.

    Raises ``UserError`` for an address that is none, and for one that holds a user name, a password or a query:
    addresses stand in results, logs and on pages. What may be secret is not in the message.
    """
    shown = without_secrets(url) if "://" in url else url.rpartition("@")[2].partition("?")[0]
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        whole = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    except ValueError:
        whole, parts = False, urlsplit("")
    if not whole or any(c.isspace() or not c.isprintable() for c in url):
        raise UserError(f"server {shown!r} is no address; write it like http://127.0.0.1:8000")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise UserError(
            f"the address {shown} holds a user name, a password or a query, which results and logs would keep; "
            f"give the address alone and the key in the environment variable {KEY_VARIABLE}"
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def check_addresses(urls: Sequence[str]) -> None:
    """Raise ``UserError`` for an address that is there twice: the server would get twice the requests."""
    known = [check_address(url) for url in urls]
    if twice := next((url for url in known if known.count(url) > 1), None):
        raise UserError(f"the server {twice} is given twice; give each once")


def named_servers(given: Sequence[str]) -> dict[str, str]:
    """``NAME=ADDRESS``, ``NAME=COMMAND`` with ``{port}`` in it, or an address alone, which is called ``server``.

    Raises ``UserError`` for anything else and for a name that is there twice.
    """
    servers: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if text.startswith(("http://", "https://")):
            name, equals, place = "server", "=", text
        address = place.startswith(("http://", "https://"))
        if not equals or not name.strip() or not (address or PORT in place):
            shown = text if "://" in text else text.rpartition("@")[2]
            raise UserError(
                f"--server {without_secrets(shown)} is not understood; write NAME=http://HOST:PORT, "
                f"or NAME=COMMAND with {PORT} in it"
            )
        if name in servers:
            raise UserError(f"two servers are called {name}; write --server NAME=... with names that differ")
        servers[name] = place
    return servers


# -- prompts -----------------------------------------------------------------------------------------------------------
def self_prompts(prompts: str | None) -> int:
    """How many questions the target writes itself; 0 for a prompt file. Raises ``UserError``."""
    if prompts is None or not (prompts == SELF or prompts.startswith(f"{SELF}:")):
        return 0
    count = prompts.partition(":")[2] or "400"
    if not count.isdigit() or not int(count):
        raise UserError(f"prompts {prompts!r} is not understood; write {SELF}:400 for 400 questions")
    return int(count)


@dataclass(frozen=True)
class Source:
    """A parsed source: ``kind`` is maths, data, suite or file."""

    kind: str
    place: str
    count: int | None

    @property
    def generated(self) -> bool:
        return self.kind == MATHS


def parse_source(text: str) -> Source:
    """Raises ``UserError`` for a malformed one."""
    found = re.fullmatch(r"(?P<place>.+?)(?:@(?P<count>\d+))?", text.strip())
    if found is None:
        raise UserError("a prompt source is empty; name a file, data:FILE, suite:NAME or maths:SEED@COUNT")
    count = int(found["count"]) if found["count"] else None
    if count == 0:
        raise UserError(f"prompt source {text!r} takes 0 prompts; take 1 or more")
    kind, colon, rest = found["place"].partition(":")
    if not colon or kind not in (MATHS, DATA, SUITE):
        return Source("file", found["place"], count)
    if not rest or kind == MATHS and (not rest.isdigit() or count is None):
        raise UserError(f"prompt source {text!r} is not understood; write data:FILE, suite:NAME or maths:SEED@COUNT")
    return Source(kind, rest, count)


# -- budgets of selection ----------------------------------------------------------------------------------------------
BudgetKind = Literal["fraction", "rows", "tokens"]

BUDGET = re.compile(
    r"(?P<number>\d[\d_,]*(?:\.\d+)?|\.\d+)\s*(?P<scale>[km]?)\s*(?P<unit>%|tokens?|rows?)?", re.IGNORECASE
)
SCALES = {"": 1, "k": 1_000, "m": 1_000_000}
BUDGETS = "write a share (25% or 0.25), a number of rows (400) or of tokens (60k tokens)"


@dataclass(frozen=True)
class Budget:
    """What may be selected. ``amount`` is a share in (0, 1] for ``fraction``, else a whole number."""

    kind: BudgetKind
    amount: Decimal
    text: str

    @property
    def whole(self) -> bool:
        """Whether everything is kept, whatever its score."""
        return self.kind == "fraction" and self.amount == 1

    def rows_of(self, total: int) -> int | None:
        """Rows that the budget allows of ``total``, rounded down; ``None`` for a budget of tokens."""
        if self.kind == "tokens":
            return None
        return min(total, int(self.amount if self.kind == "rows" else self.amount * total))


def parse_budget(text: str) -> Budget:
    """Read a share (``25%``, ``0.25``), a number of rows (``400``, ``4k``) or of tokens (``60k tokens``).

    A plain whole number is rows; ``1.0`` and ``100%`` are everything. Raises ``UserError`` when it is malformed, above
    100% or zero, whatever the data.
    """
    found = BUDGET.fullmatch(text.strip())
    if found is None:
        raise UserError(f"budget {text!r} is not understood; {BUDGETS}")
    written, scale, unit = found["number"], found["scale"].lower(), (found["unit"] or "").lower().rstrip("s")
    amount = Decimal(written.replace("_", "").replace(",", "")) * SCALES[scale]
    kind: BudgetKind = "tokens" if unit == "token" else "rows"
    if unit == "%" or "." in written and not scale and not unit:
        kind, amount = "fraction", amount / (100 if unit else 1)
    if kind == "fraction" and (scale or amount > 1):
        raise UserError(f"budget {text!r} is more than everything; {BUDGETS}")
    if kind != "fraction" and amount != int(amount):
        raise UserError(f"budget {text!r} is not a whole number of {kind}; {BUDGETS}")
    if amount == 0:
        raise UserError(f"budget {text!r} selects nothing; {BUDGETS}")
    return Budget(kind, amount, text.strip())


# -- scorers with their settings, as shift:metric=l2,layer=12 ----------------------------------------------------------
def check_scorer(text: str) -> None:
    """Raise ``UserError`` for a scorer whose name is not there. Imports no scorer: its settings wait."""
    known_name("scorer", text.partition(":")[0].strip(), SCORERS.names())


def parse_scorer(text: str) -> Any:
    """The scorer that ``name`` or ``name:key=value,key=value`` means.

    ``base.key=value`` sets ``key`` of the scorer that ``base`` names: ``coverage:base=shift,base.metric=l2``
    is ``coverage`` with base ``shift:metric=l2``. Raises ``UserError`` for an unknown scorer or setting, a setting that
    is there twice or without a value, and a value of the wrong type or out of the scorer's range.
    """
    name, colon, rest = text.strip().partition(":")
    make = SCORERS.get(name.strip())
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise UserError(f"scorer {text!r} is not understood; write NAME or NAME:KEY=VALUE,KEY=VALUE")
        if key in given:
            raise UserError(f"scorer {text!r} sets {key} twice; leave one out")
        given[key] = value
    known = inspect.signature(make).parameters
    _join_inner(given, known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        choices = f"choose from: {', '.join(known)}" if known else "it has no settings"
        raise UserError(f"scorer {name} has no setting {unknown[0]!r}{nearest(unknown[0], known)}; {choices}")
    hints = typing.get_type_hints(make.__init__) if known else {}  # type: ignore[misc]
    return make(**{key: _typed(f"{name}: {key}", value, hints[key]) for key, value in given.items()})


def scorer_text(scorer: Any) -> str:
    """The text that :func:`parse_scorer` reads as this scorer, settings at their defaults left out."""
    known = inspect.signature(SCORERS.get(scorer.name)).parameters
    changed = {key: value for key, value in scorer.settings.items() if value != known[key].default}
    parts = []
    for key, value in changed.items():
        inner, colon, settings = str(value).partition(":")
        parts.append(f"{key}={inner}")
        parts += [f"{key}.{setting}" for setting in settings.split(",")] if colon else []
    return ":".join(filter(None, [scorer.name, ",".join(parts)]))


def _join_inner(given: dict[str, str], known: Mapping[str, inspect.Parameter]) -> None:
    """Fold ``outer.key`` settings into the text of the scorer that ``outer`` names."""
    for dotted in [key for key in given if "." in key]:
        outer, _, inner = dotted.partition(".")
        if outer in known:
            text = given.get(outer, str(known[outer].default))
            given[outer] = f"{text}{',' if ':' in text else ':'}{inner}={given.pop(dotted)}"


def _typed(what: str, text: str, hint: Any) -> Any:
    """``text`` as the first of the hint's types that can hold it: numbers and truth values before texts."""
    kinds = [kind for kind in (*KINDS, str) if kind in choices(hint)]
    for kind in kinds:
        try:
            return convert(text, kind)
        except ValueError:
            continue
    raise UserError(f"scorer {what} must be {' or '.join(KINDS.get(kind, 'text') for kind in kinds)}, not {text!r}")


# -- starts ------------------------------------------------------------------------------------------------------------
def parse_start(text: str) -> list[str]:
    """The names in ``ridge`` or ``vocabulary+ridge``. Raises ``UserError`` for an unknown name or one given twice."""
    names = [part.strip() for part in text.split("+")]
    for name in names:
        known_name("start", name, STARTS.names())
    if len(set(names)) < len(names):
        raise UserError(f"start {text!r} names a start twice; give each once")
    return names


def start_needs(text: str) -> frozenset[str]:
    """What the starts that ``text`` names need of the context. Raises ``UserError`` for an unknown name."""
    return frozenset().union(*(STARTS.get(name).needs for name in parse_start(text)))


def start_runs_target(text: str) -> bool:
    """Whether one of the starts that ``text`` names runs the target. Raises ``UserError`` for an unknown name."""
    return any(STARTS.get(name).runs_target for name in parse_start(text))


# -- arguments of chat templates ---------------------------------------------------------------------------------------
def parse_template_args(given: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as template arguments; a value is JSON, or else a text. Raises ``UserError``."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UserError(f"template argument {text!r} is not understood; write NAME=VALUE, as enable_thinking=false")
        if value not in WORDS and value.strip().lower() in WORDS:
            raise UserError(f"template argument {text!r}: write true, false or null, or it would be the text {value!r}")
        told = _value(value)
        if name in found and found[name] != told:
            raise UserError(f"template argument {name} is given twice, as {found[name]!r} and {told!r}; give it once")
        found[name] = told
    return found


def _value(text: str) -> Any:
    """JSON, or else a text. NaN and Infinity are no JSON, and would equal nothing that was kept of a run."""
    try:
        value = loads(text)
    except ValueError:
        return text
    return value if kept_as_it_is(value) else text


def kept_as_it_is(value: Any) -> bool:
    """Whether a value is the same when it is read back from the record of a run."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


# -- types of settings -------------------------------------------------------------------------------------------------
def _rows(value: Any) -> Any:
    return str(value) if type(value) is int else value  # a number of rows, as YAML reads it


def _apart(value: Any) -> Any:
    """Names that stand in one flag with commas between them, as several."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        return value
    return [part.strip() if isinstance(part, str) else part for one in given for part in _parts(one)]


def _parts(value: Any) -> list[Any]:
    return value.split(",") if isinstance(value, str) else [value]


def _addresses(value: Any) -> Any:
    """Servers as several; files of settings that are older than that name one, or null."""
    return () if value is None else _apart(value)


def _suite(text: str) -> None:
    known_name("suite", text.partition("=")[0].partition(":")[0].strip(), SUITES.names())


PromptsName = Annotated[str, check(self_prompts)]
StartName = Annotated[str, check(parse_start)]
ScorerName = Annotated[str, check(check_scorer)]
BudgetText = Annotated[str, BeforeValidator(_rows), check(parse_budget)]
Address = Annotated[str, check(check_address)]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(_addresses), check(check_addresses)]
FormatName = Annotated[str, one_of("export format", EXPORTERS.names)]
FormatNames = Annotated[tuple[FormatName, ...], BeforeValidator(_apart)]
# Who reads checkpoints of drafts in ways that are known here; a family says for which of them (Family.readers).
ENGINES = ("vllm-0.32", "vllm-0.33", "sglang", "speculators", "specforge", "modelopt", "tensorrt-llm", "llama.cpp")
EngineName = Annotated[str, one_of("engine", lambda: ENGINES)]
SuiteName = Annotated[str, check(_suite)]
