"""What is sent to login nodes: bash, a file each."""

from __future__ import annotations

from pathlib import Path

__all__ = ["script_text"]


def script_text(*names: str) -> str:
    """The text of these, one after another."""
    return "".join((Path(__file__).parent / f"{name}.sh").read_text(encoding="utf-8") for name in names)
