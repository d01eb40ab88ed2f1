"""A mark on what a run keeps for its later stages: what kind of file it is, of which run, and a fingerprint of it all.

A seal is one key of a JSON object, ``"seal": "redraft.train/1 0123456789abcdef 89abcdef01234567"``: schema, fingerprint
of everything else in the object, and (where it matters) of the run that it belongs to. Objects of older versions have
none and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redraft.errors import UserError

SEAL = "seal"
FORM = re.compile(r"(redraft\.[a-z-]+/\d+) ([0-9a-f]{16})(?: ([0-9a-f]{16}))?")
MEND = "delete it and give the command that wrote it again"


def digest(value: Any) -> str:
    """A fingerprint of a JSON value (16 hex digits); the order of keys plays no part."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """A fingerprint of a file's bytes (16 hex digits). Raises ``OSError``."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def sealed(value: Mapping[str, Any], kind: str, of: str = "") -> dict[str, Any]:
    """The JSON object with its seal. ``kind`` is its schema, ``of`` the :func:`digest` of what it belongs to."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return plain | {SEAL: " ".join(filter(None, [kind, digest([kind, of, plain]), of]))}


def unsealed(
    value: dict[str, Any], where: str | Path, mend: str = MEND, kind: str | None = None, of: str | None = None
) -> dict[str, Any]:
    """The object without its seal; one that has none is given back as it is.

    Raises ``UserError`` that names the file and says ``mend`` where the fingerprint is another, and where ``kind`` or
    ``of`` is asked for and the seal names another.
    """
    if SEAL not in value:
        if any(isinstance(one, str) and FORM.fullmatch(one) for one in value.values()):
            raise UserError(f"{where} is damaged: the name of its seal is another; {mend}")
        return value
    plain = {key: one for key, one in value.items() if key != SEAL}
    found = FORM.fullmatch(str(value[SEAL]))
    if found is None or digest([found[1], found[3] or "", plain]) != found[2]:
        raise UserError(f"{where} is damaged: it no longer holds what was written; {mend}")
    if kind is not None and found[1] != kind:
        raise UserError(f"{where} holds {found[1]} where {kind} is read: another file's, or another version's; {mend}")
    if of is not None and found[3] is not None and found[3] != of:
        raise UserError(f"{where} belongs to another run; {mend}")
    return plain
