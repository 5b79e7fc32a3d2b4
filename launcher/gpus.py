"""NVIDIA GPUs of this machine, through NVML."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

__all__ = ["count", "least_used"]


def count() -> int:
    """How many GPUs this machine has; 0 without a driver."""
    with _nvml() as nvml:
        return int(nvml.nvmlDeviceGetCount()) if nvml else len(list(Path("/dev").glob("nvidia[0-9]*")))


def least_used(wanted: int) -> list[str]:
    """Indexes for CUDA_VISIBLE_DEVICES: the `wanted` GPUs with the most free memory, in ascending order."""
    with _nvml() as nvml:
        if nvml is None:
            return [str(i) for i in range(wanted)]
        handles = [(nvml.nvmlDeviceGetHandleByIndex(i), i) for i in range(nvml.nvmlDeviceGetCount())]
        free = [(int(nvml.nvmlDeviceGetMemoryInfo(handle).free), i) for handle, i in handles]
    return [str(i) for i in sorted(i for _, i in sorted(free, reverse=True)[:wanted])]


@contextlib.contextmanager
def _nvml() -> Iterator[ModuleType | None]:
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
