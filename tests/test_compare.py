"""Records made by the real path from job to plan, one fact changed at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import manifest
from launcher.compare import Comparison, compare
from launcher.ledger import RunRecord
from launcher.spec import JobSpec
from launcher.stores import open_store
from launcher.submission import _record, prepare

TRAIN: dict[str, Any] = {
    "name": "pets",
    "train": {"task": "classify", "epochs": 3},
    "data": {"train": "data/train", "val": "data/val"},
}
COMMAND: dict[str, Any] = {"name": "pets", "command": ["python", "train.py"], "env": {"A": "1"}}


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., RunRecord]:
    (tmp_path / "targets.yaml").write_text("targets:\n  here: {backend: local, output: /elsewhere}\n")
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            (tmp_path / "data" / part / name / "1.png").write_bytes(b"x")

    def make(job: dict[str, Any], *, target: str = "local", run_id: str = "pets-1") -> RunRecord:
        spec = JobSpec.model_validate(job)
        with prepare(spec, folder=tmp_path, target=target) as prepared:
            return _record(prepared, prepared.plan(run_id))

    return make


def pin(folder: Path) -> None:
    manifest.write(open_store(str(folder)), manifest.scan(folder))


def keys(found: Comparison) -> dict[str, tuple[str, str]]:
    return {d.key: (d.a, d.b) for d in found.differences}


def test_one_job_in_two_places_is_identical(record: Callable[..., RunRecord]) -> None:
    found = compare(record(TRAIN), record({**TRAIN, "name": "again"}, target="here", run_id="pets-2"))
    assert found.identical
    assert found.differences == ()
    assert {d.key: d.b for d in found.elsewhere} == {"target": "here", "name": "again", "output": "file:///elsewhere"}
    assert [reason.partition(":")[0] for reason in found.unpinned] == ["data.train", "data.val", "image"]


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, tuple[str, str]]]] = {
    "epochs": (TRAIN, {"train": {"task": "classify", "epochs": 5}}, {"train.epochs": ("3", "5")}),
    "model": (
        TRAIN,
        {"train": {"task": "classify", "epochs": 3, "model": "x"}},
        {"train.model": ("resnet18", "x")},
    ),
    "command": (COMMAND, {"command": ["python"]}, {"command": ('["python", "train.py"]', '["python"]')}),
    "env": (COMMAND, {"env": {"B": "1"}}, {"env.A": ("1", "-"), "env.B": ("-", "1")}),
    "secrets": (COMMAND, {"secrets": {"TOKEN": "env:X"}}, {"secrets": ("-", '["TOKEN"]')}),
    "processes": (COMMAND, {"resources": {"processes": 2}}, {"processes": ("1", "2")}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_each_fact_of_the_job_is_named(case: str, record: Callable[..., RunRecord]) -> None:
    before, change, expected = CHANGES[case]
    found = compare(record(before), record({**before, **change}))
    assert not found.identical
    assert keys(found) == expected


def test_data_and_code_count_by_content(record: Callable[..., RunRecord], tmp_path: Path) -> None:
    pin(tmp_path / "data/train")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text("print(1)\n")
    job = {**TRAIN, "code": {"root": "code"}}
    before = record(job)
    (tmp_path / "data/train/cat/1.png").write_bytes(b"y")
    pin(tmp_path / "data/train")
    (tmp_path / "code/train.py").write_text("print(2)\n")
    found = keys(compare(before, record(job)))
    assert set(found) == {"code", "data.train"}
    assert all(a != b for a, b in found.values())
    assert found["data.train"][0].startswith("fingerprint ")


def test_what_the_digest_leaves_out_is_told_apart(record: Callable[..., RunRecord]) -> None:
    changed = {**COMMAND, "resources": {"cpus": 4, "timeout": "1h"}, "retries": 2, "tags": {"team": "x"}}
    found = compare(record(COMMAND), record(changed))
    assert found.identical
    assert {d.key: d.b for d in found.elsewhere} == {
        "resources.cpus": "4",
        "resources.timeout": "3600.0",
        "retries": "2",
        "tags.team": "x",
    }


def test_digests_that_differ_for_no_known_reason_are_still_different(record: Callable[..., RunRecord]) -> None:
    one = record(COMMAND)
    other = dataclasses.replace(one, plan={**one.plan, "job_digest": "f" * 64})
    found = compare(one, other)
    assert not found.identical
    assert keys(found) == {"job digest": (one.plan["job_digest"][:12], "f" * 12)}
    assert found.to_json()["differences"][0]["key"] == "job digest"
