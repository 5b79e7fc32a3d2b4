"""The machine as a run finds it: system, processor, memory and their limits, GPUs, node."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.process import machine_memory
from launcher.shm import shm_size

__all__ = ["Gpus", "Limits", "describe_machine", "read_gpus", "read_limits"]

_NODE_NAMES = ("CVLAUNCH_NODE", "NODE_NAME", "SLURMD_NODENAME", "SM_CURRENT_HOST")
"""Variables in which a platform names the node: ours, Kubernetes' by custom (spec.nodeName), SLURM's, SageMaker's."""

_GPU_FIELDS = ("name", "memory.total", "driver_version", "uuid", "index")
_CUDA = re.compile(r"CUDA (?:UMD )?Version *: *([0-9.]+)")
"""In the heading of nvidia-smi's table: what the driver can do, not what torch was built for."""


def describe_machine(environ: Mapping[str, str]) -> dict[str, object]:
    """JSON values; sizes in bytes. cpus: those that this process may run on; cpu_limit: how many's worth of time."""
    system, limits, gpus = os.uname(), read_limits(), read_gpus(environ)
    return {
        "os": _os_name(),
        "kernel": f"{system.sysname} {system.release} {system.machine}",
        "user": {"uid": os.geteuid(), "gid": os.getegid(), "groups": sorted(os.getgroups())},
        "hostname": socket.gethostname(),
        "node": next((environ[name] for name in _NODE_NAMES if environ.get(name)), None),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_limit": limits.cpus,
        "memory": min(machine_memory(), limits.memory or machine_memory()),
        "shm": shm_size(),
        "gpus": list(gpus.cards),
        "driver": gpus.driver,
        "cuda_driver": gpus.cuda,
    }


def _os_name() -> str:
    """Of the container, where this is one."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


# ---- control groups


@dataclass(frozen=True)
class Limits:
    """memory: bytes. cpus: processors' worth of time. None: no limit that can be seen from here."""

    memory: int | None
    cpus: float | None


def read_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Limits:
    """The lowest of this process's control group and of those above it, of version 1 or 2.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    folders = list(_control_groups(root, own))
    memory = [value for folder in folders for value in _memory_limits(folder)]
    cpus = [value for folder in folders for value in _cpu_limits(folder)]
    return Limits(min(memory, default=None), min(cpus, default=None))


def _control_groups(root: Path, own: Path) -> Iterator[Path]:
    """A container sees its own group as the root; there the path, if it is the host's, leads nowhere."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / controllers
        folder = base if ".." in path.split("/") else base / path.strip("/")
        while folder != base:
            yield folder
            folder = folder.parent
        yield base


def _memory_limits(folder: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.limit_in_bytes"):  # version 1 writes 2^63, less a page, for no limit
        if (numbers := _numbers(folder / name)) and numbers[0] < 2**62:
            yield numbers[0]


def _cpu_limits(folder: Path) -> Iterator[float]:
    together = _numbers(folder / "cpu.max")
    apart = [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]
    for numbers in (together, apart):
        if len(numbers) == 2 and numbers[0] > 0 and numbers[1] > 0:
            yield numbers[0] / numbers[1]


def _numbers(path: Path) -> list[int]:
    """Empty for a file that is not there, and for `max`."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


# ---- GPUs


@dataclass(frozen=True)
class Gpus:
    """cards: name, memory (bytes), uuid and driver of each. driver, cuda: versions; None without a GPU."""

    cards: tuple[Mapping[str, object], ...] = ()
    driver: str | None = None
    cuda: str | None = None


def read_gpus(environ: Mapping[str, str]) -> Gpus:
    """Those that CUDA_VISIBLE_DEVICES leaves, by UUID or by number; all without it. Takes seconds on a slow driver."""
    query = _nvidia_smi(f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in query.splitlines()]
    found = [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]
    cards = [card for card in found if _visible(card, environ.get("CUDA_VISIBLE_DEVICES"))]
    if not cards:
        return Gpus()
    cuda = _CUDA.search(_nvidia_smi())
    return Gpus(tuple(map(_card, cards)), cards[0]["driver_version"], cuda[1] if cuda else None)


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; empty where there is none, or no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _visible(card: Mapping[str, str], devices: str | None) -> bool:
    """A slice (MIG-…) is of a card that nvidia-smi doesn't tell from its name: then all that it lists are shown."""
    if devices is None:
        return True
    words = [word.strip() for word in devices.split(",") if word.strip()]
    return any(card["index"] == word or card["uuid"].startswith(word) or word.startswith("MIG-") for word in words)


def _card(card: Mapping[str, str]) -> dict[str, object]:
    """nvidia-smi counts in MiB, and writes [N/A] for a memory that is the machine's own."""
    size = card["memory.total"]
    memory = int(size) << 20 if size.isdecimal() else None
    return {"name": card["name"], "memory": memory, "uuid": card["uuid"], "driver": card["driver_version"]}
