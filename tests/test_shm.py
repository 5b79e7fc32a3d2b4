from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.backends.base import Feature, Job, Support, Transport
from launcher.backends.local import LocalBackend, LocalTarget
from launcher.ledger import Ledger
from launcher.plan import load_template, make_plan
from launcher.resolve import resolve
from launcher.rules import ContainerRules, Shm
from launcher.shm import (
    Loaders,
    Loading,
    allowed_loading,
    image_batch_bytes,
    loader_need,
    rounded_need,
    shm_free,
    shm_size,
    shm_words,
    size_as_written,
)
from launcher.spec import ClassifyConfig, DetectConfig, JobSpec
from launcher.targets import Selected, Targets
from tests.jobs import fixed_job

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
    ("train", "processes", "gpus", "expected_mib"),
    [
        (ClassifyConfig(task="classify", workers=0), 1, 0, 64),
        (ClassifyConfig(task="classify", batch=32, workers=2, image_size=32), 1, 0, 64),
        (ClassifyConfig(task="classify", batch=32, workers=8, image_size=224), 1, 0, 128),  # 17 × 4.6 MiB × 1.25 = 98
        (ClassifyConfig(task="classify", batch=32, workers=8, image_size=224), 8, 8, 832),  # 8 × 98 = 781
        # (33 × 18.75 + 33 × 41.3 (32 images of 672 px)) × 1.25 = 2479 MiB
        (DetectConfig(task="detect", batch=16, workers=8, image_size=640), 1, 1, 2496),
        (DetectConfig(task="detect", batch=16, workers=8, image_size=640), 1, 0, 64),  # no workers on the CPU
    ],
)
def test_the_size_that_a_platform_is_asked_for(
    train: ClassifyConfig | DetectConfig, processes: int, gpus: int, expected_mib: int
) -> None:
    loaders = Loaders.of_train(train.model_dump(), processes, gpus=gpus)

    assert rounded_need(loaders.need()) == expected_mib * MIB


class Settable(LocalBackend):
    """A platform elsewhere, where shared memory can be asked for."""

    features = {**LocalBackend.features, Feature.SHM: Support(True)}  # noqa: RUF012
    rules = ContainerRules(container=False, shm=Shm(how="--shm-size", size=64 * MIB, source="its manual"))
    transports = {"s3": Transport({"file": "path"}, LocalBackend.transports["s3"].movers)}  # noqa: RUF012


class Fixed(Settable):
    rules = ContainerRules(container=False, shm=Shm(size=64 * MIB, source="its manual"))


def resolved(folder: Path, backend: type[LocalBackend], **keys: object) -> Job:
    data = {name: f"target:/mnt/{name}" for name in ("train", "val")}
    spec = JobSpec.model_validate({"name": "x", "data": data, **keys})
    selected = Selected("far", LocalTarget(output="s3://bucket/runs"), backend, folder)  # type: ignore[arg-type]
    return resolve(spec, selected, folder=folder, targets=Targets(), scratch=folder, ledger=Ledger(folder / "ledger"))


LARGE = {"task": "classify", "workers": 8, "batch": 64, "image_size": 256}
"""255 MiB."""


@pytest.mark.parametrize(
    ("backend", "train", "resources", "expected_mib", "warning"),
    [
        (Settable, LARGE, {}, 256, ""),
        (Settable, LARGE, {"memory": "4Gi"}, 256, ""),
        (Settable, LARGE, {"memory": "510Mi"}, 255, ""),
        (
            Settable,
            LARGE,
            {"memory": "256Mi"},
            128,
            "resources.shm: 128.0 MiB, half of resources.memory, is less than the data loaders need (255.0 MiB: "
            "8 workers, prefetch 2, batches of 12.0 MiB); the runner lowers prefetch and workers",
        ),
        (Settable, LARGE, {"shm": "64Mi"}, 64, "resources.shm: 64.0 MiB is less than the data loaders need (255.0 MiB"),
        (Settable, LARGE, {"shm": "1Gi", "memory": "1Gi"}, 1024, ""),
        (Settable, {**LARGE, "workers": 0}, {"memory": "100Mi"}, 50, ""),
        (Fixed, LARGE, {"memory": "256Mi"}, 256, ""),
        (Settable, None, {}, 2048, ""),
        (Settable, None, {"memory": "1Gi"}, 512, ""),
        (Settable, None, {"memory": "1023Mi"}, None, ""),
        (Fixed, None, {}, None, ""),
        (Settable, None, {"shm": "1Gi"}, 1024, ""),
    ],
)
def test_a_job_asks_for_what_its_loaders_need_and_never_for_more_than_half_the_memory(
    tmp_path: Path,
    backend: type[LocalBackend],
    train: object,
    resources: object,
    expected_mib: int | None,
    warning: str,
) -> None:
    work = {"train": train} if train else {"command": ["true"]}
    job = resolved(tmp_path, backend, resources=resources, **work)

    assert job.shm == (None if expected_mib is None else expected_mib * MIB)
    about = [text for text in job.warnings if text.startswith("resources.shm")]
    assert len(about) == bool(warning) and all(text.startswith(warning) for text in about)


CLASSIFY = Loaders("classify", 64, 256, Loading(8, 2))
"""Batches of 12 MiB."""
DETECT = Loaders("detect", 16, 640, Loading(8, 4))


@pytest.mark.parametrize(
    ("loaders", "free_mib", "expected"),
    [
        (CLASSIFY, 1024, Loading(8, 2)),
        (CLASSIFY, 255, Loading(8, 2)),  # 17 × 12 MiB × 1.25
        (CLASSIFY, 254, Loading(8, 1)),
        (CLASSIFY, 64, Loading(3, 1)),
        (CLASSIFY, 30, Loading(1, 1)),
        (CLASSIFY, 29, Loading(0, 1)),
        (CLASSIFY, 0, Loading(0, 1)),
        (DETECT, 2479, Loading(8, 4)),
        (DETECT, 2478, Loading(8, 2)),
        (DETECT, 1300, Loading(8, 1)),
        (DETECT, 512, Loading(3, 1)),
        (DETECT, 64, Loading(0, 1)),
        (Loaders("classify", 64, 256, Loading(8, 2), processes=4), 255, Loading(3, 1)),
    ],
)
def test_prefetch_goes_first_and_then_workers(loaders: Loaders, free_mib: int, expected: Loading) -> None:
    assert loaders.fitting(free_mib * MIB) == expected


@given(
    task=st.sampled_from(["classify", "detect"]),
    batch=st.integers(1, 512),
    side=st.integers(8, 2048),
    workers=st.integers(0, 64),
    processes=st.integers(1, 8),
    free=st.integers(0, 2**36),
)
def test_what_is_chosen_fits_and_is_never_more_than_asked(
    task: str, batch: int, side: int, workers: int, processes: int, free: int
) -> None:
    loaders = Loaders(task, batch, side, Loading(workers, 2), processes)
    chosen = loaders.fitting(free)

    assert loaders.need(chosen) <= free
    assert chosen.workers <= workers and 1 <= chosen.prefetch <= 2
    assert chosen == loaders.asked or loaders.need() > free
    assert loaders.fitting(rounded_need(loaders.need())) == loaders.asked  # what is asked of a platform is enough


def test_what_the_runner_allows_reaches_the_trainer() -> None:
    asked = Loading(8, 2)

    assert allowed_loading({}, asked) == asked
    assert allowed_loading({"HOME": "/", **Loading(0, 1).to_environment()}, asked) == Loading(0, 1)


@pytest.mark.parametrize(
    ("size", "text"), [(64 * MIB, "64Mi"), (1024 * MIB, "1Gi"), (1, "1Mi"), (1088 * MIB, "1088Mi")]
)
def test_sizes_as_a_job_file_says_them(size: int, text: str) -> None:
    assert size_as_written(size) == text


SETTABLE = {"how": "--shm-size", "size": 64 * MIB, "source": "docker run"}
FIXED = {"how": "", "size": 64 * MIB, "source": "no field in its API"}
UNKNOWN = {"how": "", "size": None, "source": "the machine's"}


@pytest.mark.parametrize(
    ("need_mib", "facts", "expected"),
    [
        (512, SETTABLE, "/dev/shm: 512 MiB, set by --shm-size"),
        (None, SETTABLE, "/dev/shm: 64 MiB; resources.shm sets it by --shm-size"),
        (None, {**SETTABLE, "size": None}, "/dev/shm: as the platform gives it; resources.shm sets it by --shm-size"),
        (
            512,
            FIXED,
            "/dev/shm can't be set on sagemaker (no field in its API): 64 MiB must be expected and the loaders need "
            "512 MiB; the runner lowers prefetch and workers",
        ),
        (64, FIXED, "/dev/shm can't be set on sagemaker (no field in its API): 64 MiB, enough for the loaders' 64 MiB"),
        (None, FIXED, "/dev/shm can't be set on sagemaker (no field in its API): 64 MiB must be expected"),
        (
            1536,
            UNKNOWN,
            "/dev/shm can't be set on sagemaker (the machine's): its size is not known; if the loaders' 1.5 GiB don't "
            "fit, the runner lowers prefetch and workers",
        ),
        (None, UNKNOWN, "/dev/shm can't be set on sagemaker (the machine's): its size is not known"),
        (None, {**UNKNOWN, "source": ""}, "/dev/shm can't be set on sagemaker: its size is not known"),
    ],
)
def test_words_for_plans(need_mib: int | None, facts: dict[str, Any], expected: str) -> None:
    assert shm_words(None if need_mib is None else need_mib * MIB, "sagemaker", **facts) == expected


def test_size_and_room_are_those_of_dev_shm() -> None:
    if Path("/dev/shm").is_dir():
        stat = os.statvfs("/dev/shm")
        assert shm_size() == stat.f_blocks * stat.f_frsize
        assert 0 < (shm_free() or 0) <= stat.f_blocks * stat.f_frsize
    else:
        assert shm_size() is None and shm_free() is None


@pytest.mark.parametrize(
    ("there", "words", "warned"),
    [
        (Shm(how="--shm-size"), "/dev/shm: 512 MiB, set by --shm-size", False),
        (Shm(size=64 << 20, source="the manual"), "the loaders need 512 MiB", True),
        (Shm(size=1 << 30, source="the manual"), "1 GiB, enough for the loaders' 512 MiB", False),
        (Shm(source="nobody says it"), "its size is not known", False),
    ],
)
def test_a_plan_says_who_sets_it_and_warns_where_it_is_known_to_be_too_small(
    there: Shm, words: str, warned: bool
) -> None:
    class Elsewhere(LocalBackend):
        rules = ContainerRules(shm=there)

    backend = Elsewhere(LocalTarget(), "there")
    job = dataclasses.replace(fixed_job("classify", backend.target, "there", "file:///out"), shm=512 << 20)
    plan = make_plan(job, backend, "run-0000000000", template=load_template(LocalBackend))
    assert words in plan.shm
    assert (plan.shm in plan.warnings) == warned
