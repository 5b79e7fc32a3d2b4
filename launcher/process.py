"""This machine: its memory, and its processes, told apart from others that later get the same number."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Process",
    "ProcessId",
    "adopt_orphans",
    "descendants",
    "exit_code",
    "kill_descendants",
    "machine_memory",
    "processes",
    "send_kill",
    "signal_group",
    "with_variable",
]


@dataclass(frozen=True)
class ProcessId:
    """host: name of the machine. boot: its boot id. start: clock ticks since boot (proc(5), field 22).

    space: the container's numbering of processes (pid_namespaces(7)); empty if the system has none.
    """

    host: str
    boot: str
    pid: int
    start: int
    space: str = ""

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessId:
        pid = os.getpid() if pid is None else pid
        return cls(socket.gethostname(), _boot_id(), pid, _start_ticks(pid) or 0, _pid_space())

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ProcessId:
        pid, start = int(value["pid"]), int(value["start"])
        return cls(str(value["host"]), str(value["boot"]), pid, start, str(value.get("space", "")))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def here(self) -> bool:
        """Whether this process can know of that one. A machine keeps its boot id when it gets another name."""
        if self.boot and self.boot == _boot_id():
            return self.space == _pid_space()
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """False for a process of an earlier boot, for a number that is another process by now, and for a zombie."""
        return self.boot == _boot_id() and _start_ticks(self.pid) == self.start


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return ""


def _pid_space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return ""


def _start_ticks(pid: int) -> int | None:
    try:
        fields = _stat_fields(Path(f"/proc/{pid}/stat"))
    except OSError:
        return None if Path("/proc/self/stat").exists() else _exists(pid)
    return None if fields[0] in "ZX" else int(fields[19])


def _stat_fields(path: Path) -> list[str]:
    """From the state on (proc(5)); the name before it may hold spaces, parentheses and any bytes."""
    return path.read_bytes().rpartition(b") ")[2].decode("ascii").split()


def _exists(pid: int) -> int | None:
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return 0


def machine_memory() -> int:
    """Bytes, whatever limits there are."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def exit_code(code: int) -> int:
    """A shell's: 128 + n for the -n that Python says of a process that died of signal n."""
    return code if code >= 0 else 128 - code


def signal_group(group: int, number: signal.Signals) -> None:
    """To every process of the group; one that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans (Linux), so that none escapes `kill_descendants`."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Process:
    """A living process. group: its process group."""

    pid: int
    parent: int
    group: int


def processes() -> Iterator[Process]:
    """All of this machine, zombies aside (proc(5), stat)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, parent, group = _stat_fields(stat)[:3]
            if state not in "ZX":
                yield Process(int(stat.parent.name), int(parent), int(group))


def descendants(pid: int) -> list[Process]:
    """Every process below `pid`, in other sessions too; not `pid` itself."""
    everything = list(processes())
    found: list[Process] = []
    parents = {pid}
    while parents:
        below = [p for p in everything if p.parent in parents]
        found += below
        parents = {p.pid for p in below}
    return found


def with_variable(name: str, value: str) -> list[int]:
    """Our own processes that were started with this environment variable (Linux)."""
    wanted = f"{name}={value}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def send_kill(pid: int) -> bool:
    """SIGKILL to all below `pid`; whether there were any.

    Reaps nothing, so a signal handler may call it while `Popen.wait` waits: that takes a child which somebody else
    has reaped for one that ended well.
    """
    below = descendants(pid)
    for child in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    return bool(below)


def kill_descendants(pid: int) -> None:
    """SIGKILL to all below `pid`, again until none is left (new ones may be born meanwhile); reaps our own."""
    for _ in range(100):
        some = send_kill(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not some:
            return
        time.sleep(0.01)
