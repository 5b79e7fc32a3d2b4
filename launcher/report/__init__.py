"""A self-contained HTML page from synced run folders: one run in full, or several side by side."""

from __future__ import annotations

from launcher.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
