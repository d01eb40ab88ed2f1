"""Turns result files into pages, pictures and terminal tables. Reads JSON only; runs no model."""

from redraft.reports.page import build_report, headline_png

__all__ = ["build_report", "headline_png"]
