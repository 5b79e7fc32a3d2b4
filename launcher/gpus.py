"""NVIDIA GPUs of this machine, through NVML: how many this user may take, and which ones a run gets.

A GPU goes by its UUID, because CUDA's numbers (the fastest card first) and NVML's (the order of the PCI bus) differ.
A number that the user wrote in CUDA_VISIBLE_DEVICES is passed on as it stands: CUDA counts for the run as for them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Gpu", "Nvml", "choose", "count", "reserved", "usable"]

_DEVICE = re.compile(r"\d+|(GPU|MIG)-.+")
"""What CUDA takes as the name of a device; the first other word, such as -1, ends its list."""


class Nvml(Protocol):
    """What is used of the module pynvml."""

    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802

    def nvmlDeviceGetUUID(self, handle: Any) -> str | bytes: ...  # noqa: N802

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: N802


@dataclass(frozen=True)
class Gpu:
    """device: its word in CUDA_VISIBLE_DEVICES. uuid: what it goes by for all. free: bytes of its memory."""

    device: str
    uuid: str
    free: int = 0


def count() -> int:
    """How many GPUs of this machine the user's processes can use; 0 without a driver."""
    with _driver() as nvml:
        return len(usable(nvml, os.environ))


@contextlib.contextmanager
def reserved(wanted: int, folder: Path) -> Iterator[Sequence[Gpu]]:
    """`wanted` GPUs, fewer if there are fewer, held inside the block against all who lock files in `folder`."""
    if not wanted:
        yield ()
        return
    with _driver() as nvml:
        gpus = usable(nvml, os.environ)
    with contextlib.ExitStack() as locks:
        yield choose(gpus, wanted, folder, locks=locks)


def usable(nvml: Nvml | None, environ: Mapping[str, str]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order; all of the machine without it. nvml: None if there is none.

    A device that NVML doesn't list, such as a slice of one (MIG), counts with no free memory.
    """
    gpus = _listed(nvml) if nvml else [Gpu(str(i), f"{os.uname().nodename}-{i}") for i in range(_device_files())]
    if "CUDA_VISIBLE_DEVICES" not in environ:
        return gpus
    words = (word.strip() for word in environ["CUDA_VISIBLE_DEVICES"].split(","))
    named = [_named(word, gpus) for word in itertools.takewhile(_DEVICE.fullmatch, words)]
    return [gpu for gpu in itertools.takewhile(bool, named) if gpu]


def _listed(nvml: Nvml) -> list[Gpu]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    texts = [uuid.decode() if isinstance(uuid, bytes) else uuid for uuid in uuids]  # bytes in old releases of pynvml
    memory = [int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles]
    return [Gpu(uuid, uuid, free) for uuid, free in zip(texts, memory, strict=True)]


def _named(word: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """The GPU of a number or of the beginning of a UUID; None for a number that there isn't."""
    if word.isdecimal():
        return Gpu(word, gpus[int(word)].uuid, gpus[int(word)].free) if int(word) < len(gpus) else None
    found = [gpu for gpu in gpus if gpu.uuid.startswith(word)]
    return found[0] if len(found) == 1 else Gpu(word, word)


def _device_files() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def choose(gpus: Sequence[Gpu], wanted: int, folder: Path, *, locks: contextlib.ExitStack) -> list[Gpu]:
    """Those that no other run holds go first, then those with the most free memory; in the order of `gpus`.

    Each one that is chosen is held by a lock until `locks` closes. If all are held, runs share: it was asked for.
    """
    by_room = sorted(gpus, key=lambda gpu: -gpu.free)
    ours: list[Gpu] = []
    for gpu in by_room:
        if len(ours) < wanted and _hold(folder / f"{gpu.uuid.replace('/', '_')}.lock", locks):
            ours.append(gpu)
    shared = [gpu for gpu in by_room if gpu not in ours]
    ours += shared[: wanted - len(ours)]
    return [gpu for gpu in gpus if gpu in ours]


def _hold(path: Path, locks: contextlib.ExitStack) -> bool:
    """Whether it is ours until `locks` closes. The lock ends with the process, however that ends."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    locks.enter_context(file)
    return True


@contextlib.contextmanager
def _driver() -> Iterator[Nvml | None]:
    """pynvml, initialised; None where it is not installed or finds no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or one of pynvml's generated NVMLError classes
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
