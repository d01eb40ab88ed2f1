"""The scripts of ``runs/`` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RUNS = Path(__file__).resolve().parents[2] / "runs"


def script(name: str) -> ModuleType:
    """A script as Python runs it: with its own folder on the path."""
    sys.path.insert(0, str(RUNS))
    try:
        spec = importlib.util.spec_from_file_location(name, RUNS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RUNS))
    return module
