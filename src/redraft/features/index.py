"""The index of a folder of features: a line of JSON for every shard, put behind the others when the shard is written.

Every line carries a seal that names the seal of the line before it, so that none can be lost, changed or moved unseen.
What a killed writer leaves is a torn last line, or a last shard without a line; a shard's own header says as much of it
as its line does, so both are mended. Older versions wrote one JSON object, ``index.json``, anew for every shard; it is
read, and becomes lines at the first write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError, safe_open

from redraft.artifact import atomic_write_text, read_sealed
from redraft.errors import UserError
from redraft.files import append_text
from redraft.inputs import loads, read_bytes, there, typed
from redraft.rows import TokenRow
from redraft.seals import FORM, SEAL, digest, sealed, unsealed

INDEX_FILE, OLD_INDEX = "index.jsonl", "index.json"
SCHEMA, OLD_SCHEMA = "redraft.features/2", "redraft.features/1"
# In the header of a shard: the fingerprints of its rows' features and of their tokens, and whose features they are.
CHECKSUMS, TOKENS, OWNER = "checksums", "tokens", "identity"
# The shard of every row.
Shards = dict[str, Annotated[str, Field(pattern=r"^shard-\d+\.safetensors$")]]
Sums = dict[str, str]  # the fingerprint of every row
Entries = dict[str, tuple[str, str]]  # of every row of a shard, those of its features and of its tokens


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_number(name: str) -> int:
    return int(name[6:-12])


def tokens_hash(row: TokenRow) -> str:
    """A fingerprint of the tokens that a row's features come from (16 hex digits)."""
    return hashlib.sha256(repr((list(row.prompt_ids), list(row.response_ids))).encode()).hexdigest()[:16]


def shard_header(identity: Any, entries: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """What the header of a shard says of its rows."""
    parts = ({key: entry[place] for key, entry in entries.items()} for place in (0, 1))
    sums, tokens = (json.dumps(part, sort_keys=True) for part in parts)
    return {CHECKSUMS: sums, TOKENS: tokens, OWNER: digest(identity), "schema": OLD_SCHEMA}


@dataclass
class Index:
    """What a folder of features says of itself: whose they are (none where there are none), the shard of every row that
    is there, the fingerprints of rows and of their tokens, and whether features are kept while responses are written
    (none where nobody has asked).

    ``name`` is the file that it was read from, ``mark`` the seal of its last line, ``whole`` the bytes of its whole
    lines where one is torn, ``shards`` how many there have been and ``unlisted`` those that no line tells of.
    """

    folder: Path
    name: str = INDEX_FILE
    identity: Any = None
    index: dict[str, str] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    kept: bool | None = None
    mark: str = ""
    whole: int | None = None
    shards: int = 0
    unlisted: dict[str, Entries] = field(default_factory=dict)

    def holds(self, row: TokenRow) -> bool:
        """Whether the features of this row are there."""
        return row.key in self.index and self.tokens.get(row.key, "") in ("", tokens_hash(row))

    # -- what is written -----------------------------------------------------------------------------------------------
    def settle(self) -> None:
        """Mend what a killed writer left, and make lines of an older index: whoever calls this writes here alone.

        Raises ``UserError`` when the disk does not take it.
        """
        if self.name == OLD_INDEX:
            self._renew()
        elif self.whole is not None:
            with open(self.folder / INDEX_FILE, "rb+") as file:
                file.truncate(self.whole)
            self.whole = None
        (self.folder / OLD_INDEX).unlink(missing_ok=True)
        for name, entries in self.unlisted.items():
            self._line({"shard": name, "rows": entries})
        self.unlisted = {}

    def begin(self, identity: Any) -> None:
        """Say whose features these are going to be. Raises ``UserError``."""
        self.identity = identity
        self._renew()

    def keep(self, kept: bool) -> None:
        """Say whether features are kept while responses are written. Raises ``UserError``."""
        self.kept = kept
        self._line({"kept": kept})

    def add(self, name: str, entries: Entries) -> None:
        """A shard that was written. Raises ``UserError``."""
        self._know(name, entries)
        self._line({"shard": name, "rows": entries})

    def _line(self, value: dict[str, Any]) -> None:
        append_text(self.folder / INDEX_FILE, self._sealed(value))

    def _renew(self) -> None:
        """The whole index as lines, in the place of any other."""
        values: list[dict[str, Any]] = [{"identity": self.identity}]
        if self.kept is not None:
            values.append({"kept": self.kept})
        by_shard: dict[str, dict[str, tuple[str, str]]] = {}
        for key, name in self.index.items():
            by_shard.setdefault(name, {})[key] = self.sums.get(key, ""), self.tokens.get(key, "")
        values += [{"shard": name, "rows": by_shard[name]} for name in sorted(by_shard, key=shard_number)]
        self.mark = ""
        atomic_write_text(self.folder / INDEX_FILE, "".join(map(self._sealed, values)))
        self.name, self.whole = INDEX_FILE, None

    def _sealed(self, value: dict[str, Any]) -> str:
        line = sealed(value, SCHEMA, self.mark)
        self.mark = _mark_of(line)
        return json.dumps(line) + "\n"

    # -- what is read --------------------------------------------------------------------------------------------------
    def _know(self, name: str, entries: Mapping[str, tuple[str, str]]) -> None:
        if shard_number(name) < self.shards:  # one of this name was deleted
            self.index = {key: other for key, other in self.index.items() if other != name}
        self.shards = max(self.shards, shard_number(name) + 1)
        for key, (total, tokens) in entries.items():
            self.index[key] = name
            for known, value in ((self.sums, total), (self.tokens, tokens)):
                if value:
                    known[key] = value
                else:
                    known.pop(key, None)

    def _take(self, value: dict[str, Any], where: str, mend: str) -> None:
        if "identity" in value:
            self.identity = value["identity"]
        elif "kept" in value:
            self.kept = typed(bool, value["kept"], f"{where} is damaged", mend)
        else:
            named = typed(Shards, {"shard": value.get("shard")}, f"{where} is damaged", mend)
            self._know(named["shard"], typed(Entries, value.get("rows"), f"{where} is damaged", mend))

    def _read_lines(self, data: bytes, mend: str) -> None:
        *lines, torn = data.split(b"\n")
        path, unsealed_before = self.folder / INDEX_FILE, False
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                value = loads(line.decode(), finite=False)
            except ValueError as error:
                raise UserError(f"{where} is damaged ({error}); {mend}") from error
            if not isinstance(value, dict) or (number == 1) != ("identity" in value):
                raise UserError(f"{where} is damaged; {mend}")
            found = FORM.fullmatch(str(value.get(SEAL, "")))
            if found is not None and not unsealed_before and (found[3] or "") != self.mark:
                raise UserError(f"{where} is damaged: it is not the line that stood here; {mend}")
            self._take(unsealed(value, where, mend, SCHEMA), where, mend)
            self.mark, unsealed_before = _mark_of(value), found is None
        if torn:
            self.whole = len(data) - len(torn)

    def _read_unlisted(self, shards: set[str]) -> None:
        """Take in the shards behind the last one that is known, as far as their headers tell of them."""
        while (name := shard_name(self.shards)) in shards:
            entries = header_entries(self.folder / name, self.identity)
            if entries is None:
                return  # the next one takes its place
            self.unlisted[name] = entries
            self._know(name, entries)


def _mark_of(line: dict[str, Any]) -> str:
    found = FORM.fullmatch(str(line.get(SEAL, "")))
    return "" if found is None else found[2]


def header_entries(path: Path, identity: Any) -> Entries | None:
    """What the header of a shard says of its rows; None where it is damaged, older or another's."""
    try:
        with safe_open(str(path), "pt") as file:
            said = file.metadata() or {}
        sums, tokens = (typed(Sums, loads(said[name]), str(path)) for name in (CHECKSUMS, TOKENS))
        if said[OWNER] != digest(identity) or sums.keys() != tokens.keys():
            return None
    except (SafetensorError, OSError, ValueError, LookupError, UserError):
        return None
    return {key: (sums[key], tokens[key]) for key in sums}


def read_index(folder: Path) -> Index:
    """The index of a folder of features. Raises ``UserError`` for a damaged one, and for shards without one."""
    found = Index(folder)
    shards = {shard.name for shard in folder.glob("shard-*.safetensors")}
    mend = f"delete the folder {folder} and give the same command again, which computes all rows anew"
    if there(folder / INDEX_FILE):
        found._read_lines(read_bytes(folder / INDEX_FILE, mend), mend)
    elif there(folder / OLD_INDEX):
        found.name = OLD_INDEX
        stored = read_sealed(folder / OLD_INDEX, OLD_SCHEMA, None, mend)
        if not {"identity", "index"} <= stored.keys():
            raise UserError(f"{folder / OLD_INDEX} is damaged; {mend}")
        typed(Shards, stored["index"], f"{folder / OLD_INDEX} is damaged", mend)
        sums, tokens = stored.get("sums", {}), stored.get("tokens", {})
        found.identity, found.kept = stored["identity"], stored.get("kept")
        found.index, found.sums, found.tokens = stored["index"], sums, tokens
    if found.identity is None and shards:
        if there(folder / INDEX_FILE):
            raise UserError(f"{folder / INDEX_FILE} is damaged: it says nothing; {mend}")
        raise UserError(f"{folder / INDEX_FILE} does not exist, and there are {len(shards)} shards beside it; {mend}")
    found.index = {key: name for key, name in found.index.items() if name in shards}
    found.shards = max(map(shard_number, found.index.values()), default=-1) + 1
    if found.name == INDEX_FILE:
        found._read_unlisted(shards)
    return found
