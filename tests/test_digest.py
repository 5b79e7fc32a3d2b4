"""The job digest covers what decides the result and nothing of where it runs, the same from release to release."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.backends.base import BaseTarget
from launcher.contract import Channel, Code
from launcher.digest import job_digest
from tests.conftest import Golden
from tests.jobs import SPECS, fixed_job

BASE = {
    "command": ("python", "x.py"),
    "train": None,
    "env": {"A": "1"},
    "secrets": ("TOKEN",),
    "channels": (Channel("train", "s3://b/train", "staged", "f" * 64, 3, 9),),
    "code": Code("c" * 64, 10),
    "image": "e" * 64,
    "nodes": 1,
    "gpus": 1,
    "processes": 1,
}


def test_digests_are_kept_from_release_to_release(golden: Golden) -> None:
    target = BaseTarget(backend="local")
    lines = [f"{fixed_job(name, target, 'any', 's3://b/runs').digest}  {name}\n" for name in SPECS]
    golden.check("digests.txt", "".join(lines))


@pytest.mark.parametrize(
    "change",
    [
        {"command": ("python", "y.py")},
        {"command": None, "train": {"task": "classify"}},
        {"env": {"A": "2"}},
        {"env": {}},
        {"secrets": ("TOKEN", "OTHER")},
        {"channels": (Channel("train", "s3://b/train", "staged", "0" * 64),)},
        {"channels": (Channel("val", "s3://b/train", "staged", "f" * 64),)},
        {"code": Code("0" * 64, 10)},
        {"code": None},
        {"image": None},
        {"nodes": 2},
        {"gpus": 2},
        {"processes": 2},
    ],
    ids=str,
)
def test_what_decides_the_result_changes_it(change: dict[str, object]) -> None:
    assert job_digest(**{**BASE, **change}) != job_digest(**BASE)  # type: ignore[arg-type]


def test_where_it_runs_does_not(golden: Golden) -> None:
    moved = tuple(
        dataclasses.replace(c, uri="gs://x/y", access="path", files=None, size=None) for c in BASE["channels"]
    )  # type: ignore[attr-defined]
    same_code = Code("c" * 64, 10, commit="abc", dirty=True)
    assert job_digest(**{**BASE, "channels": moved, "code": same_code}) == job_digest(**BASE)  # type: ignore[arg-type]
