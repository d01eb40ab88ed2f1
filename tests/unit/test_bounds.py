"""The oldest environment that is tested is the oldest that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([\w-]+)==([\w.]+)$", re.M)
# No bound of their own, checkers of the code, or pinned elsewhere (constraints-cpu.txt); datasets is in no environment.
ELSEWHERE = {"types-PyYAML", "ruff", "mypy", "torch", "datasets"}
# The site's generator has an environment of its own (make docs), beside none of our code: no test can lean on it.
APART = {"docs"}


def bounds() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name not in APART}
    wanted = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    found: dict[str, str] = {}
    for text in wanted:
        name, _, rest = text.partition(">=")
        if name not in ELSEWHERE:
            assert found.setdefault(name, rest.split(",")[0]) == rest.split(",")[0], f"two bounds of {name}"
    return found


def parts(version: str) -> list[int]:
    numbers = [int(part) for part in version.split(".")]
    return numbers + [0] * (4 - len(numbers))


def test_every_lower_bound_is_what_the_oldest_environment_has() -> None:
    pins = dict(PIN.findall((ROOT / "constraints-oldest.txt").read_text()))
    wanted = bounds()
    assert pins.keys() == wanted.keys()
    assert [name for name in pins if parts(pins[name]) != parts(wanted[name])] == []
