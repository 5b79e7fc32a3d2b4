"""What each platform does to a container: read by plans, by rehearsal and by the test worlds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ContainerRules", "Shm"]


@dataclass(frozen=True)
class Shm:
    """Shared memory on a platform. how: the platform's words for setting it; empty if it can't be set.

    size: bytes without a setting; None if no source says it. source: who says so.
    """

    how: str = ""
    size: int | None = None
    source: str = ""


@dataclass(frozen=True)
class ContainerRules:
    """One platform's. Sizes in bytes, times in seconds.

    uid: None is the caller's, `random` a high one that is in no /etc/passwd. gid: None is the user's own.
    groups: further groups of the user. root: where the contract's folders are. writable: folders that can be written;
    all others may be lost, or read-only (`read_only_root`). env: what the platform sets. grace_s: between the stop
    signal and the kill; None is what the job asks for. network: whether a container reaches others. container: False
    runs a process instead. sources: name of a rule → who says so.
    """

    uid: int | Literal["random"] | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    root: str = "/opt/ml"
    writable: tuple[str, ...] = ("/opt/ml", "/tmp")  # noqa: S108 names folders of the container
    read_only_root: bool = False
    shm: Shm = Shm()
    env: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = "SIGTERM"
    grace_s: float | None = None
    network: bool = True
    container: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)
