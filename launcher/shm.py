"""How much shared memory a training job's data loaders need in /dev/shm, and how they load where there is less.

A PyTorch data loader hands batches over in /dev/shm. Its peak is (workers × prefetch + 1) × batch bytes: measured with
torch 2.15 on a tmpfs, batch 32×3×224×224 float32, prefetch 2: 2 workers 92 MiB, 4 workers 165 MiB, 8 workers 312 MiB;
`benchmarks/shm.py` measures our own loader. Containers get 64 MiB unless someone asks for more, and a loader that runs
out dies with a bus error. The trainer's images are bytes until they are on the device, so nothing is left to shrink
but the number of batches.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.quantities import format_size

__all__ = [
    "SHM",
    "TORCH_PREFETCH",
    "ULTRALYTICS_PREFETCH",
    "Loaders",
    "Loading",
    "allowed_loading",
    "image_batch_bytes",
    "loader_need",
    "of_command",
    "rounded_need",
    "shm_free",
    "shm_size",
    "shm_words",
    "size_as_written",
]

SHM = "/dev/shm"  # noqa: S108 - asked for its size; nothing is written
TORCH_PREFETCH = 2
"""torch's default prefetch_factor."""
ULTRALYTICS_PREFETCH = 4
"""Its training loader's (ultralytics 8.4, data/build.py, build_dataloader); validation has torch's default."""
_VALIDATION_MARGIN = 32
"""Pixels that Ultralytics pads validation images by: half a stride, rounded up (data/base.py, set_rectangle)."""

_UNIT = 64 * 2**20
_USUAL, _LEAST = 2 * 2**30, 512 * 2**20
"""What a command gets where its memory is not known, and what is left to its processes at least."""
_HEADROOM = 1.25
_WORKERS, _PREFETCH = "CVLAUNCH_LOADER_WORKERS", "CVLAUNCH_LOADER_PREFETCH"


@dataclass(frozen=True)
class Loading:
    """The training loader of one process. prefetch: batches that each worker is ahead."""

    workers: int
    prefetch: int

    def to_environment(self) -> dict[str, str]:
        """How the runner tells the trainer."""
        return {_WORKERS: str(self.workers), _PREFETCH: str(self.prefetch)}

    def __str__(self) -> str:
        if not self.workers:
            return "no workers"
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}, prefetch {self.prefetch}"


def allowed_loading(environ: Mapping[str, str], asked: Loading) -> Loading:
    """What the runner found to fit, `asked` where no runner has spoken."""
    return Loading(int(environ.get(_WORKERS, asked.workers)), int(environ.get(_PREFETCH, asked.prefetch)))


@dataclass(frozen=True)
class Loaders:
    """The data loaders of one node. processes: training processes, which share its /dev/shm.

    batch: images per step and process. image_size: side in pixels. asked: what the job says.
    """

    task: str
    batch: int
    image_size: int
    asked: Loading
    processes: int = 1

    @classmethod
    def of_train(cls, train: Mapping[str, Any], processes: int, *, gpus: int) -> Loaders:
        """train: the job file's, with its defaults filled in. On the CPU Ultralytics loads without workers."""
        detect = train["task"] == "detect"
        workers = 0 if detect and not gpus else int(train["workers"])
        asked = Loading(workers, ULTRALYTICS_PREFETCH if detect else TORCH_PREFETCH)
        return cls(train["task"], int(train["batch"]), int(train["image_size"]), asked, processes)

    def __str__(self) -> str:
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return f"{format_size(self.need())}: {self.asked}{each}, batches of {format_size(self.batch_bytes)}"

    @property
    def batch_bytes(self) -> int:
        """Of the training loader; uint8."""
        return image_batch_bytes(self.batch, self.image_size)

    def need(self, loading: Loading | None = None) -> int:
        """Bytes with a quarter of headroom, loaded as asked or in another way; 0 where nothing is shared."""
        loading = loading or self.asked
        peak = self._detect_peak(loading) if self.task == "detect" else self._classify_peak(loading)
        return math.ceil(peak * self.processes * _HEADROOM)

    def _classify_peak(self, loading: Loading) -> int:
        """Training and evaluation take turns."""
        return loader_need(loading.workers, loading.prefetch, batch_bytes=self.batch_bytes)

    def _detect_peak(self, loading: Loading) -> int:
        """Ultralytics keeps both loaders filled; validation has twice the workers and twice the batch."""
        val_bytes = image_batch_bytes(2 * self.batch, self.image_size + _VALIDATION_MARGIN)
        return loader_need(loading.workers, loading.prefetch, batch_bytes=self.batch_bytes) + loader_need(
            2 * loading.workers, min(loading.prefetch, TORCH_PREFETCH), batch_bytes=val_bytes
        )

    def fitting(self, free: int) -> Loading:
        """As asked if that fits into so many bytes; else a lower prefetch, then fewer workers, at last none."""
        loading = self.asked
        while loading.workers and self.need(loading) > free:
            if loading.prefetch > 1:
                loading = replace(loading, prefetch=loading.prefetch // 2)
            else:
                loading = replace(loading, workers=loading.workers - 1)
        return loading


def image_batch_bytes(batch: int, image_size: int, *, channels: int = 3, bytes_per_value: int = 1) -> int:
    """Bytes of one batch of square images; 1 byte a value is uint8, 4 are float32."""
    return batch * channels * image_size * image_size * bytes_per_value


def loader_need(workers: int, prefetch: int, *, batch_bytes: int) -> int:
    """Peak bytes of one data loader; 0 without workers, as then nothing is shared."""
    return (workers * prefetch + 1) * batch_bytes if workers else 0


def of_command(memory: int | None) -> int | None:
    """Bytes for a command whose loaders nobody knows; None where its memory is too little to be shared.

    memory: the container's limit, of which shared memory is a part.
    """
    if memory is None:
        return _USUAL
    return memory // 2 if memory >= 2 * _LEAST else None


def rounded_need(need: int) -> int:
    """Up to 64 MiB, and never less: the size to ask a platform for."""
    return max(math.ceil(need / _UNIT), 1) * _UNIT


def size_as_written(size: int) -> str:
    """As a job file says it: `512Mi`, `2Gi`; rounded up."""
    mebibytes = math.ceil(size / 2**20)
    return f"{mebibytes}Mi" if mebibytes % 1024 else f"{mebibytes // 1024}Gi"


def shm_size() -> int | None:
    """Size of this machine's /dev/shm in bytes, None where there is none; 0 is a tmpfs without a limit of its own."""
    stat = _stat()
    return stat and stat.f_blocks * stat.f_frsize


def shm_free() -> int | None:
    """Bytes that are free in /dev/shm, None where there is none that this user can write in."""
    stat = _stat()
    if stat is None or not os.access(SHM, os.W_OK | os.X_OK):
        return None
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else sys.maxsize


def _stat() -> os.statvfs_result | None:
    try:
        return os.statvfs(SHM)
    except (OSError, AttributeError):
        return None


def shm_words(need: int | None, backend: str, *, how: str, size: int | None, source: str) -> str:
    """One line of a plan. need: bytes, None for a command that nobody knows.

    how: the platform's words for setting it (`--shm-size`), empty if it is fixed. size: what is there if it is fixed or
    not set, None if unknown. source: where it stands that it is fixed.
    """
    if how and need is not None:
        return f"{SHM}: {_short(need)}, set by {how}"
    if how:
        return f"{SHM}: {_short(size) if size else 'as the platform gives it'}; resources.shm sets it by {how}"
    fixed = f"{SHM} can't be set on {backend}" + (f" ({source})" if source else "")
    if need is None:
        return f"{fixed}: {_short(size) + ' must be expected' if size else 'its size is not known'}"
    if size is None:
        return f"{fixed}: its size is not known; if the loaders' {_short(need)} don't fit, {_LOWERS}"
    if need <= size:
        return f"{fixed}: {_short(size)}, enough for the loaders' {_short(need)}"
    return f"{fixed}: {_short(size)} must be expected and the loaders need {_short(need)}; {_LOWERS}"


_LOWERS = "the runner lowers prefetch and workers"


def _short(size: int) -> str:
    """`512 MiB`, `1.5 GiB`."""
    return format_size(size).replace(".0 ", " ")
