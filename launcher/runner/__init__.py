"""The entry point of every job everywhere: `cvlaunch-run [-- COMMAND…]`, or `python -m launcher.runner`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from launcher.runner.init import stand_aside_as_init

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """PID 1 is left before anything else is imported: it stays small, and signals count from here on."""
    stand_aside_as_init()
    from launcher.credentials.aws import region_variables
    from launcher.runner.main import run

    environ = dict(os.environ)
    os.environ.update(region_variables(environ))  # where stores and SDKs look
    run(sys.argv[1:] if arguments is None else arguments, environ)
