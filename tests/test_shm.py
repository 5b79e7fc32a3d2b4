from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.shm import image_batch_bytes, loader_need, need_of, shm_size
from launcher.spec import ClassifyConfig, DetectConfig

MIB = 2**20


@pytest.mark.parametrize(("workers", "measured_mib"), [(2, 92), (4, 165), (8, 312)])
def test_loader_need_is_what_was_measured(workers: int, measured_mib: int) -> None:
    batch = image_batch_bytes(32, 224, bytes_per_value=4)

    assert loader_need(workers, 2, batch_bytes=batch) / MIB == pytest.approx(measured_mib, abs=1)


def test_no_workers_share_nothing() -> None:
    assert loader_need(0, 2, batch_bytes=10**9) == 0


@pytest.mark.parametrize(
    ("batch", "size", "options", "expected"),
    [(1, 10, {}, 300), (2, 10, {"channels": 1}, 200), (2, 10, {"bytes_per_value": 4}, 2400)],
)
def test_image_batch_bytes(batch: int, size: int, options: dict[str, int], expected: int) -> None:
    assert image_batch_bytes(batch, size, **options) == expected


@pytest.mark.parametrize(
    ("train", "processes", "expected_mib"),
    [
        (None, 1, None),
        (ClassifyConfig(task="classify", workers=0), 1, 64),
        (ClassifyConfig(task="classify", batch=32, workers=2, image_size=32), 1, 64),
        (ClassifyConfig(task="classify", batch=32, workers=8, image_size=224), 1, 128),  # 17 × 4.6 MiB × 1.25 = 98
        (ClassifyConfig(task="classify", batch=32, workers=8, image_size=224), 8, 832),  # 8 × 98 = 781
        (DetectConfig(task="detect", batch=16, workers=8, image_size=640), 1, 2368),  # 3 × 33 × 18.75 MiB × 1.25 = 2320
    ],
)
def test_need_of(train: ClassifyConfig | DetectConfig | None, processes: int, expected_mib: int | None) -> None:
    need = need_of(train, processes)

    assert need == (None if expected_mib is None else expected_mib * MIB)


def test_shm_size_is_the_size_of_dev_shm() -> None:
    if Path("/dev/shm").is_dir():
        stat = os.statvfs("/dev/shm")
        assert shm_size() == stat.f_blocks * stat.f_frsize
    else:
        assert shm_size() is None
