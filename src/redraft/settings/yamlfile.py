"""Settings in YAML files, read as people mean them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from redraft.errors import UserError
from redraft.settings.base import Settings

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


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The settings of a file, named ``what`` where it is missing. Raises ``UserError``."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a subclass of the safe loader
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a YAML file with {what}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} must hold settings as `name: value` lines")
    return values


def read_settings(path: Path, command: str) -> dict[str, Any]:
    """The settings of ``command`` in a YAML file, dashes in their names as underscores. Raises ``UserError``."""
    return underscored(read_yaml(path, f"the settings of `redraft {command}`"), str(path))


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


Kind = TypeVar("Kind", bound=Settings)


def read(kind: type[Kind], path: Path | None, given: Mapping[str, Any] | None = None) -> Kind:
    """The settings of a command from a YAML file (if any); ``given`` flags win, key by key. Raises ``UserError``."""
    return kind(**merged(read_settings(path, kind.COMMAND) if path else {}, given or {}))
