"""Scorers with their settings as texts: ``shift:metric=l2,layer=12``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

from redraft.errors import UserError
from redraft.registries import SCORERS, nearest
from redraft.settings.base import known_name


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


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _typed(what: str, text: str, hint: Any) -> Any:
    """``text`` as the first of the hint's types, in the order of ``_KINDS``, that can hold it."""
    kinds = [kind for kind in _KINDS if kind in (typing.get_args(hint) or (hint,))]
    for kind in kinds:
        try:
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            return kind(text)
        except (KeyError, ValueError):
            continue
    raise UserError(f"scorer {what} must be {' or '.join(_KINDS[kind] for kind in kinds)}, not {text!r}")
