"""Which GPUs a run gets: the user's own, none twice, by names that CUDA and NVML both know."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.gpus import Gpu, choose, count, reserved, usable


@dataclass(frozen=True)
class Memory:
    free: int


@dataclass(frozen=True)
class Machine:
    """What NVML says of a machine with these GPUs, by (UUID, free memory), in the order of its PCI bus."""

    gpus: Sequence[tuple[str | bytes, int]]

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802
        return self.gpus[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Memory:  # noqa: N802
        return Memory(self.gpus[handle][1])


FOUR = Machine([("GPU-a1", 10), ("GPU-b2", 40), (b"GPU-c3", 30), ("GPU-d4", 20)])


def devices(gpus: Sequence[Gpu]) -> list[str]:
    return [gpu.device for gpu in gpus]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, ["GPU-a1", "GPU-b2", "GPU-c3", "GPU-d4"]),
        ("GPU-c3,GPU-a1", ["GPU-c3", "GPU-a1"]),
        ("GPU-c, GPU-a", ["GPU-c3", "GPU-a1"]),
        ("2,1", ["2", "1"]),
        ("3,7,1", ["3"]),
        ("1,-1,2", ["1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("MIG-77,1", ["MIG-77", "1"]),
    ],
)
def test_only_what_the_user_may_see(written: str | None, expected: list[str]) -> None:
    environ = {} if written is None else {"CUDA_VISIBLE_DEVICES": written}
    assert devices(usable(FOUR, environ)) == expected


def test_a_number_keeps_its_gpu() -> None:
    (gpu,) = usable(FOUR, {"CUDA_VISIBLE_DEVICES": "2"})
    assert gpu == Gpu("2", "GPU-c3", 30)


@pytest.mark.parametrize(
    ("written", "wanted", "expected"),
    [
        (None, 1, ["GPU-b2"]),
        (None, 3, ["GPU-b2", "GPU-c3", "GPU-d4"]),
        (None, 9, ["GPU-a1", "GPU-b2", "GPU-c3", "GPU-d4"]),
        ("3,0,2", 2, ["3", "2"]),
        ("0", 1, ["0"]),
    ],
)
def test_the_most_free_memory_goes_first(tmp_path: Path, written: str | None, wanted: int, expected: list[str]) -> None:
    gpus = usable(FOUR, {} if written is None else {"CUDA_VISIBLE_DEVICES": written})
    with contextlib.ExitStack() as locks:
        assert devices(choose(gpus, wanted, tmp_path, locks=locks)) == expected


def test_two_runs_share_no_gpu_as_long_as_there_are_enough(tmp_path: Path) -> None:
    gpus = usable(FOUR, {})
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second, contextlib.ExitStack() as third:
        assert devices(choose(gpus, 2, tmp_path, locks=first)) == ["GPU-b2", "GPU-c3"]
        numbers = usable(FOUR, {"CUDA_VISIBLE_DEVICES": "0,1,2"})  # the same ones under other names
        assert devices(choose(numbers, 1, tmp_path, locks=second)) == ["0"]
        assert devices(choose(gpus, 2, tmp_path, locks=third)) == ["GPU-b2", "GPU-d4"]
        first.close()
        third.close()
        assert devices(choose(gpus, 2, tmp_path, locks=first)) == ["GPU-b2", "GPU-c3"]


HOLDER = """
import contextlib, sys, time
from pathlib import Path
from launcher.gpus import Gpu, choose
with contextlib.ExitStack() as locks:
    choose([Gpu("GPU-a1", "GPU-a1", 2)], 1, Path(sys.argv[1]), locks=locks)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout as printed:
        printed.readline()
    gpus = [Gpu("GPU-a1", "GPU-a1", 2), Gpu("GPU-b2", "GPU-b2", 1)]
    with contextlib.ExitStack() as locks:
        assert devices(choose(gpus, 1, tmp_path, locks=locks)) == ["GPU-b2"]
    holder.kill()
    holder.wait()
    with contextlib.ExitStack() as locks:
        assert devices(choose(gpus, 1, tmp_path, locks=locks)) == ["GPU-a1"]


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it has: without a driver the same calls say none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    there = count()
    with reserved(there, tmp_path) as gpus:
        assert len(gpus) == there
    with reserved(0, tmp_path) as gpus:
        assert list(gpus) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count() == 0
