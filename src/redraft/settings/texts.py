"""Settings that are small texts of their own: a server's address, prompts, sources, starts, arguments of templates."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from redraft.errors import UserError
from redraft.places import without_secrets
from redraft.registries import STARTS
from redraft.settings.base import known_name

KEY_VARIABLE = "REDRAFT_API_KEY"
PORT = "{port}"  # in a command that starts a server
SELF = "self"
MATHS, DATA, SUITE = "maths", "data", "suite"
WORDS = ("true", "false", "null", "none")


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


# -- names of registries with settings of their own -----------------------------------------------------------------
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


# -- arguments of chat templates -------------------------------------------------------------------------------------
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
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if kept_as_it_is(value) else text


def kept_as_it_is(value: Any) -> bool:
    """Whether a value is the same when it is read back from the record of a run."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
