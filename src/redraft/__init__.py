"""redraft realigns the draft model of speculative decoding with a fine-tuned target.

    import redraft

What there is: ``dir(redraft)``, ``help(redraft.adapt)``; an overview in ``redraft.api``. Nothing is loaded before it is
used.
"""

import importlib
import os

# The CPU kernels of torch keep compiled code for every matrix shape they have met, up to 1,024 shapes in each of two
# caches; packed batches are all of different shapes, and training grew by gigabytes. Torch reads this at its first
# product.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

__version__ = "0.1.0"

# Where each name is at home. Their types stand in __init__.pyi.
_HOMES = {
    "redraft.api.runs": ("adapt", "bench", "check", "probe", "report", "study", "train"),
    "redraft.api.steps": ("export", "import_draft", "merge", "open_draft", "open_target", "regenerate", "select"),
    "redraft.drafts.opening": ("OpenDraft",),
    "redraft.adaptation.advice": ("ProbeResult",),
    "redraft.adaptation.check.result": ("CheckResult",),
    "redraft.adaptation.models": ("TargetSpec",),
    "redraft.data.regenerate": ("RegenerationReport",),
    "redraft.drafts.formats.base": ("ExportReport",),
    "redraft.reports.tables": ("Adapted", "Benchmark", "Imported", "Merged", "Page", "Study", "Trained"),
    "redraft.selection.manifest": ("Manifest",),
    "redraft.target": ("Target",),
    "redraft.errors": ("UserError",),
    "redraft.registries": ("EXPORTERS", "FAMILIES", "LOSSES", "SCORERS", "STARTS", "SUITES", "load_plugin"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    if name not in _HOME_OF:
        raise AttributeError(f"module 'redraft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
