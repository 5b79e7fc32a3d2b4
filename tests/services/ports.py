"""Ports for servers that can't choose one themselves, or that come back to the same one."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Iterator

__all__ = ["free_port"]

_NUMBERS = range(10_000, 20_000)
"""Below those that the kernel gives to whoever asks for any, and those at which the nodes of a job meet."""


def free_port() -> int:
    """Another one with each call, and in each worker of pytest: who asks may take its time to listen there."""
    return next(_free)


def _free_numbers() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    numbers = list(_NUMBERS[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))])
    random.shuffle(numbers)
    for number in numbers:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", number))
            yield number


_free = _free_numbers()
