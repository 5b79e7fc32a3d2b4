"""The entry point of every job everywhere: `cvlaunch-run [-- COMMAND…]`, or `python -m launcher.runner`."""

from __future__ import annotations

from launcher.runner.main import main

__all__ = ["main"]
