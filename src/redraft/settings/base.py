"""What all settings have in common: how one is declared, how texts become values, and how mistakes are told.

A command's settings are a :class:`Settings`; a part of a file that is a model of its own is a :class:`Part`; a recipe
(of a training, of a private part) is a frozen dataclass made by :func:`recipe`, of which a file or a flag may give
some values: a mapping marked with :class:`BlockOf`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, dataclass_transform, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from redraft.errors import UserError
from redraft.inputs import HALF
from redraft.inputs import read_yaml as read_yaml
from redraft.registries import nearest

STRICT = ConfigDict(extra="forbid", frozen=True, defer_build=True)
AUTO = "auto"
TYPES = ("bfloat16", "float32")


def setting(default: Any, help: str, *, flag: str = "", reads: str = "", argument: bool = False, **bounds: Any) -> Any:
    """Declare a setting: its default (``...`` for none), its help, and pydantic's bounds (``ge``, ``gt``, ``lt``, ...).

    ``flag`` is its flag where that is not the name with dashes. ``reads`` says what its value names that must be there
    (:mod:`redraft.cli.plans`): "file", "prompts" or "model". An ``argument`` stands without a flag.
    """
    bounds |= {"default_factory": default.copy} if isinstance(default, dict) else {"default": default}
    return Field(description=help, json_schema_extra={"flag": flag, "reads": reads, "argument": argument}, **bounds)


# -- values ------------------------------------------------------------------------------------------------------------
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}


def convert(value: Any, hint: Any) -> Any:
    """A value in the type of its setting, from a flag's text or as YAML gives it.

    YAML takes 3e-4 for a text and 1e6 for no whole number; several stand with commas between them in a flag. What is
    no plain number, text, truth value or list of these is left to pydantic. Raises ``ValueError``.
    """
    kinds = [kind for kind in choices(hint) if kind is not types.NoneType]
    if len(kinds) < len(choices(hint)) and value is None:
        return None
    kind = kinds[0]
    if get_origin(kind) is tuple and get_args(kind)[0] in (*KINDS, str):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise ValueError(f"must be a list, written [a, b], not {value!r}")
        if get_args(kind)[0] in KINDS:  # numbers of one flag may stand together
            parts = [one for part in parts for one in (part.split(",") if isinstance(part, str) else [part])]
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        return tuple(convert(part, get_args(kind)[0]) for part in parts if part != "")
    return _plain(value, kind) if kind in KINDS else value


def choices(hint: Any) -> tuple[Any, ...]:
    """The types that a setting may have."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _plain(value: Any, kind: Any) -> Any:
    if kind is bool and isinstance(value, bool | str) and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is int and (type(value) is int or (isinstance(value, str) and value.strip().isdecimal())):
        return int(value)
    try:
        number = float("nan" if isinstance(value, bool) or kind is bool else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if kind is float and not math.isnan(number):
        return number
    if kind is int and number.is_integer():
        return int(number)
    raise ValueError(f"must be {KINDS[kind]}, not {value!r}")


def check(test: Callable[[Any], Any]) -> AfterValidator:
    """A check of a setting by a function that raises ``UserError``; what it gives back is not looked at."""

    def run(value: Any) -> Any:
        try:
            test(value)
        except UserError as error:
            raise said(error) from None
        return value

    return AfterValidator(run)


def said(text: object) -> PydanticCustomError:
    """What a validator raises to tell ``text`` as it is."""
    return PydanticCustomError("said", "{text}", {"text": str(text)})


def known_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ``UserError`` for a name that is not among the ``known`` ones; it says the nearest."""
    if name not in (names := list(known)):
        raise UserError(f"unknown {kind} {name!r}{nearest(name, names)}; choose one of: {', '.join(names)}")


def one_of(kind: str, names: Callable[[], Iterable[str]]) -> AfterValidator:
    """A check that a text is one of ``names``."""
    return check(lambda value: known_name(kind, value, names()))


def check_dtype(value: str, name: str = "dtype") -> str:
    """``value`` if it names a data type or ``auto``; ``name`` is the setting's. Raises ``UserError``."""
    if value not in (*TYPES, AUTO):
        raise UserError(f"{name} must be {AUTO}, {' or '.join(TYPES)}, not {value!r}")
    return value


def _dtype(value: str, info: Any) -> str:
    try:
        return check_dtype(value, info.field_name)
    except UserError as error:
        raise PydanticCustomError("said", "{text}", {"text": str(error)}) from None


DtypeName = Annotated[str, AfterValidator(_dtype)]


# -- mistakes ----------------------------------------------------------------------------------------------------------
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
BOUNDS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be {le:g} or less",
    "finite_number": "must be finite",
    "tuple_type": "must be a list, written [a, b]",
    "dict_type": "must hold settings as `name: value` lines",
    "model_type": "must hold settings as `name: value` lines",
    "model_attributes_type": "must hold settings as `name: value` lines",
    "string_type": "must be a text, written in quotes where it looks like a number",
    "path_type": "must be a path",
    "literal_error": "must be {expected}",
    "too_short": "must have {min_length} or more",
}


def complaints(error: ValidationError, known: Iterable[str] = (), block: str = "") -> list[str]:
    """Every mistake that pydantic found, in one sentence each; ``known`` names are looked through for the nearest.

    ``block`` names what holds the settings. Unknown names come first: they tell more than that one like them is
    missing.
    """
    found = sorted(error.errors(include_url=False), key=lambda one: one["type"] not in UNKNOWN)
    return list(dict.fromkeys(_sentence(one, list(known), block) for one in found))


def _sentence(one: Any, known: list[str], block: str) -> str:
    kind, context = one["type"], one.get("ctx", {})
    parts = [*filter(None, [block]), *map(str, one["loc"])]
    place = parts[0].replace("_", "-") if len(parts) == 1 else " ".join(parts)
    if kind == "said":
        # Which one of a list it is its own words tell.
        place = " ".join(part for part in parts if not part.isdecimal()).replace("_", "-")
        return f"{place}: {context['text']}" if len(one["loc"]) > 1 else str(context["text"])
    if kind in UNKNOWN:
        *outer, name = place.split(" ")
        inside = f" in {' '.join(outer)}" if outer else ""
        near = nearest(name, known if outer else [other.replace("_", "-") for other in known])
        return f"unknown setting {name}{near}{inside}"
    of_a_list = bool(one["loc"]) and isinstance(one["loc"][-1], int)
    if kind == "missing" or (one["input"] is None and kind in ("string_type", "path_type") and not of_a_list):
        return f"{place} is missing"
    if kind == "value_error":
        return f"{place} {context['error']}".strip()
    said = BOUNDS[kind].format(**context) if kind in BOUNDS else one["msg"][:1].lower() + one["msg"][1:]
    return f"{place} {said}, not {one['input']!r}"


# -- recipes -----------------------------------------------------------------------------------------------------------
Kind = TypeVar("Kind")


@dataclass_transform(frozen_default=True)
def recipe(kind: type[Kind]) -> type[Kind]:
    """A frozen dataclass of settings. Made with wrong ones it raises ``UserError`` that tells all mistakes."""
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(kind)
    plain = made.__init__

    def __init__(self: Any, *arguments: Any, **values: Any) -> None:
        try:
            plain(self, *arguments, **values)
        except ValidationError as error:
            raise UserError("; ".join(complaints(error, made.__dataclass_fields__))) from error

    made.__init__ = __init__
    return made


@recipe
class Recipe:
    """Reads every value as people write it."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        return convert(value, cls.__pydantic_fields__[info.field_name].annotation)  # type: ignore[attr-defined]


class BlockOf:
    """Marks a mapping as holding some settings of the recipe ``kind``; each gets its type."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return AfterValidator(self._typed).__get_pydantic_core_schema__(source, handler)

    def _typed(self, given: dict[str, Any], info: Any) -> dict[str, Any]:
        try:
            made = self.kind(**given)
        except UserError as error:
            assert isinstance(error.__cause__, ValidationError)
            raise said(
                "; ".join(complaints(error.__cause__, self.kind.__dataclass_fields__, info.field_name))
            ) from None
        return {key: getattr(made, key) for key in given}


# -- models ------------------------------------------------------------------------------------------------------------
def _check_texts(value: Any, names_a_place: bool) -> None:
    """Raise ``ValueError`` for a text that no file can be called and no server told; also for none where one is to
    name a place."""
    for text in map(str, value if isinstance(value, list | tuple) else [value]):
        if not text and names_a_place:
            raise ValueError("is empty; name one, or leave it out")
        if "\0" in text or HALF.search(text):
            raise ValueError(f"holds a character that is none of UTF-8, or a zero: {text[:100]!a}")


class Part(BaseModel):
    """A part of a file of settings. Unknown names are mistakes; cross-checks are :meth:`conflicts`."""

    model_config = STRICT

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        extra: Any = cls.model_fields[info.field_name].json_schema_extra
        _check_texts(value, bool((extra or {}).get("reads")))
        return convert(value, cls.model_fields[info.field_name].annotation)

    @model_validator(mode="after")
    def _agree(self) -> Any:
        found: dict[str, None] = {}
        try:
            for conflict in self.conflicts():
                found[conflict] = None
        except UserError as error:
            found[str(error)] = None
        if found:
            raise said("; ".join(found))
        return self

    def conflicts(self) -> Iterator[str]:
        """What does not go together, a sentence each; may raise ``UserError`` instead."""
        yield from ()


class Settings(Part):
    """All settings of a command. Made with wrong ones it raises ``UserError`` that tells all mistakes.

    ``ONCE`` are settings that stand in a block too: block -> {name on top: name in the block}. A value that stands in
    one of the blocks ``LIFTED`` alone holds on top too, so that a run has one of it throughout.
    """

    COMMAND: ClassVar[str] = ""
    ONCE: ClassVar[dict[str, dict[str, str]]] = {}
    LIFTED: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **values: Any) -> None:
        given, mistakes = self._once({key.replace("-", "_"): value for key, value in values.items()})
        try:
            super().__init__(**given)
        except ValidationError as error:
            mistakes += complaints(error, type(self).model_fields)
        if mistakes:
            raise UserError(f"{'; '.join(mistakes)}; see `redraft {self.COMMAND} --help`")

    def blocks(self) -> dict[str, Any]:
        """The settings that its blocks come to, defaults and settings on top counted in: block -> recipe."""
        return {}

    @classmethod
    def _once(cls, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The values with one of each of ``ONCE``, and a sentence for each that has two."""
        found, mistakes = dict(values), []
        for block, names in cls.ONCE.items():
            inner = values[block] if isinstance(values.get(block), Mapping) else {}
            for outer, own in names.items():
                value, there = inner.get(own), found.get(outer)
                if value is None:
                    continue
                if there is None:
                    found |= {outer: value} if block in cls.LIFTED else {}
                elif not cls._same(outer, value, there):
                    flag = outer.replace("_", "-")
                    two = f"{flag} is {there} and {block} {own} is {value}"
                    mistakes.append(f"{two}: two values of one setting; give it once")
        return found, mistakes

    @classmethod
    def _same(cls, name: str, one: Any, other: Any) -> bool:
        """Whether two values of a setting are one; what is wrong with one of them is told as such."""
        hint = cls.model_fields[name].annotation
        try:
            return bool(convert(one, hint) == convert(other, hint))
        except ValueError:
            return True


# -- YAML files --------------------------------------------------------------------------------------------------------
Asked = TypeVar("Asked", bound=Settings)


def underscored(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings with underscores in their names, also within blocks. Raises ``UserError`` for one in both forms."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise UserError(f"{where} has {name} twice, as {name} and with a dash; keep one")
        # what an argument of a template holds is the template's own
        inner = isinstance(value, dict) and not where.endswith(": template_arg")
        found[name] = underscored(value, f"{where}: {name}") if inner else value
    return found


def merged(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file under those of flags, which win; blocks key by key.

    Raises ``UserError`` for something else than a block in the file where the flags give one.
    """
    found = {**values, **given}
    for name, value in given.items():
        old = values.get(name)
        if isinstance(value, dict) and old is not None:
            if not isinstance(old, dict):
                raise UserError(f"{name} must hold settings as `name: value` lines, not {old!r}")
            found[name] = {**old, **value}
    return found


def read(kind: type[Asked], path: Path | None, given: Mapping[str, Any] | None = None) -> Asked:
    """The settings of a command from a YAML file (if any); ``given`` flags win, key by key. Raises ``UserError``."""
    values = read_yaml(path, f"the settings of `redraft {kind.COMMAND}`") if path else {}
    try:
        return kind(**merged(underscored(values, str(path)), given or {}))
    except UserError as error:
        if path is None or str(path) in str(error):
            raise
        raise UserError(f"{path}{' and flags' if given else ''}: {error}") from error
