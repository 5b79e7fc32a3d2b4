"""The command line. `main` is the script `cvlaunch`; each command's module is imported when the command is used."""

from __future__ import annotations

from launcher.cli.app import main

__all__ = ["main"]
