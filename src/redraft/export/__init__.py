"""Writing drafts in the formats that serving engines load, and reading such checkpoints back."""

from redraft.export.base import ExportReport, TargetInfo
from redraft.export.importer import import_checkpoint

__all__ = ["ExportReport", "TargetInfo", "import_checkpoint"]
