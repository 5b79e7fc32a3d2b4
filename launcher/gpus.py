"""NVIDIA GPUs of this machine, through NVML: how many this user may take, and which ones a run gets; old models.

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

__all__ = ["OLD_WORDS", "Gpu", "Nvml", "choose", "count", "is_old", "reserved", "usable"]

_DEVICE = re.compile(r"\d+|(GPU|MIG)-.+")
"""What CUDA takes as the name of a device; the first other word, such as -1, ends its list."""

_OLD = {
    "K20", "K40", "K80", "M4", "M10", "M40", "M60", "GP100", "P100", "P4", "P40", "P6", "GTX1080", "GTX1080TI",
    "TITANXP", "GV100", "TITANV", "V100", "V100S",
}  # fmt: skip
"""Models of Kepler, Maxwell, Pascal and Volta, below compute capability 7.5, with which CUDA 13 begins.

https://docs.nvidia.com/cuda/cuda-toolkit-release-notes and https://developer.nvidia.com/cuda-legacy-gpus
"""

OLD_WORDS = (
    "too old for the trainer image's torch (CUDA 13), which has no code for it: name a newer GPU, or in `image` an "
    "image of your own whose torch has (built with CUDA 12.6)"
)
"""For messages, after a model that `is_old`."""


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


def is_old(model: str) -> bool:
    """Whether the torch of the trainer image can't use it. model: `V100-32GB`, or a longer name such as a label's."""
    return not _OLD.isdisjoint((re.sub(r"[ _-]", "", model).upper(), *re.split(r"[ _-]", model.upper())))


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
