"""Writing drafts in the formats that serving engines load, and reading such checkpoints back."""

from redraft.export.base import EXPORTERS, ExportReport, TargetInfo
from redraft.export.importer import import_checkpoint

__all__ = ["EXPORTERS", "ExportReport", "TargetInfo", "import_checkpoint"]
