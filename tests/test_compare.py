"""Records made by the real path from job to plan, one fact changed at a time."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import manifest
from launcher.compare import Comparison, Surroundings, compare
from launcher.ledger import RunRecord
from launcher.spec import JobSpec
from launcher.stores import open_store
from launcher.submission import prepare, record_of
from tests.cli_tool import cli

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
            return record_of(prepared, prepared.plan(run_id), {})

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


# ---- what they had around them

GPU = {"name": "NVIDIA H200", "memory": 143771 << 20, "uuid": "GPU-1", "driver": "570.1"}
ENVIRONMENT: dict[str, object] = {
    "cvlaunch": "0.1.0",
    "kind": "container",
    "image": {"reference": "r/trainer:1", "digest": "sha256:1", "config_digest": "sha256:c"},
    "code": {"sha256": "f" * 64, "commit": "c0ffee", "dirty": False},
    "torch": "2.15.0+cu132",
    "cuda": "13.2",
    "cudnn": "9.26",
    "nccl": None,
    "hostname": "a1b2c3",
    "node": "gpu-01",
    "user": {"uid": 1000},
    "cpu": "EPYC",
    "cpus": 8,
    "memory": 64 << 30,
    "gpus": [GPU, {**GPU, "uuid": "GPU-2"}],
    "driver": "570.1",
    "cuda_driver": "12.8",
    "packages_changed": None,
    "packages": {"numpy": "2.0.0", "torch": "2.15.0"},
}

AROUND: dict[str, tuple[dict[str, object], dict[str, tuple[str, str]]]] = {
    "nothing": ({}, {}),
    "another container on the same node": ({"hostname": "d4e5f6", "user": {"uid": 0}}, {}),
    "another card of the kind": ({"gpus": [GPU, {**GPU, "uuid": "GPU-9"}]}, {}),
    "fewer GPUs": ({"gpus": [GPU]}, {"gpus": ("2 × NVIDIA H200 (140.4 GiB)", "NVIDIA H200 (140.4 GiB)")}),
    "no GPU": (
        {"gpus": [], "driver": None},
        {"gpus": ("2 × NVIDIA H200 (140.4 GiB)", "none"), "driver": ("570.1", "-")},
    ),
    "driver": (
        {"driver": "580.2", "cuda_driver": "13.0"},
        {"driver": ("570.1", "580.2"), "cuda_driver": ("12.8", "13.0")},
    ),
    "CUDA and cuDNN": (
        {"cuda": "12.6", "cudnn": "9.1", "torch": "2.15.0+cu126"},
        {"cuda": ("13.2", "12.6"), "cudnn": ("9.26", "9.1"), "torch": ("2.15.0+cu132", "2.15.0+cu126")},
    ),
    "image": (
        {"image": {"reference": "r/trainer:1", "digest": "sha256:2"}},
        {"image.digest": ("sha256:1", "sha256:2")},
    ),
    "processor and memory": (
        {"cpu": "Xeon", "memory": 32 << 30},
        {"cpu": ("EPYC", "Xeon"), "memory": ("64.0 GiB", "32.0 GiB")},
    ),
    "commit": (
        {"code": {"sha256": "f" * 64, "commit": "beef", "dirty": True}},
        {"code.commit": ("c0ffee", "beef"), "code.dirty": ("false", "true")},
    ),
    "of another version": (
        {"image": "r/trainer:1", "gpus": "none", "memory": "much", "cpus": [1, 2], "packages": ["numpy"]},
        {
            "memory": ("64.0 GiB", "much"),
            "image.reference": ("r/trainer:1", "-"),
            "image.digest": ("sha256:1", "-"),
            "image": ("-", "r/trainer:1"),
            "cpus": ("8", "[1, 2]"),
            "gpus": ("2 × NVIDIA H200 (140.4 GiB)", "-"),
        },
    ),
}


@pytest.mark.parametrize("case", AROUND)
def test_other_surroundings_leave_the_job_identical(case: str, record: Callable[..., RunRecord]) -> None:
    change, expected = AROUND[case]
    one = record(COMMAND)
    around = Surroundings.from_json(ENVIRONMENT), Surroundings.from_json({**ENVIRONMENT, **change})
    found = compare(one, one, around)
    assert found.identical and not found.not_compared
    assert {d.key: (d.a, d.b) for d in found.surroundings} == expected


def test_packages_are_told_apart_and_once(record: Callable[..., RunRecord]) -> None:
    one = record(COMMAND)
    other = {**ENVIRONMENT, "torch": "2.14", "packages": {"torch": "2.14", "pillow": "12", "numpy": "2.1.0"}}
    found = compare(one, one, (Surroundings.from_json(ENVIRONMENT), Surroundings.from_json(other)))
    assert [str(d) for d in found.packages] == ["numpy: 2.0.0 → 2.1.0", "pillow: - → 12"]
    assert [str(d) for d in found.surroundings] == ["torch: 2.15.0+cu132 → 2.14"]


def test_surroundings_that_nobody_knows_are_no_failure(record: Callable[..., RunRecord]) -> None:
    one = record(COMMAND)
    found = compare(one, one, (Surroundings.from_json(ENVIRONMENT), Surroundings(why_not="pets-1: none")))
    assert (found.identical, found.surroundings, found.not_compared) == (True, (), ("pets-1: none",))


def test_diff_of_real_runs(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"name: pets\ncommand: [{sys.executable}, -c, pass]\noutput: results\n")
    for run_id in "one", "two":
        assert cli("submit", "job.yaml", "--run-id", run_id, "--follow", cwd=tmp_path).returncode == 0
    same = cli("diff", "one", "two", cwd=tmp_path)
    assert (same.returncode, same.stdout.splitlines()) == (
        0, ["identical job", "unpinned: image: a process runs in an environment that no digest covers"]
    )  # fmt: skip

    path = tmp_path / "results/two/output/environment.json"
    facts = json.loads(path.read_text())
    count = len(facts["packages"])
    few = {**facts["packages"], "numpy": "0.1"}
    path.write_text(json.dumps({**facts, "cpu": "Z80\x1b[31m", "node": "gpu-03", "packages": few}))
    told = cli("diff", "one", "two", cwd=tmp_path)
    assert (told.returncode, told.stdout.splitlines()[1:5]) == (
        0,
        [
            "same job, other surroundings:",
            f"  cpu: {facts['cpu']} → Z80",
            "  node: - → gpu-03",
            f"  package numpy: {facts['packages']['numpy']} → 0.1",
        ],
    )
    path.write_text(json.dumps({**facts, "packages": dict.fromkeys(facts["packages"], "0")}))
    differing = count - sum(name in facts for name in facts["packages"])
    folded = cli("diff", "one", "two", cwd=tmp_path).stdout
    assert f"  packages: {differing} differ; --all names them\n" in folded
    assert cli("diff", "one", "two", "--all", cwd=tmp_path).stdout.count("\n  package ") == differing
    assert len(json.loads(cli("diff", "one", "two", "--json", cwd=tmp_path).stdout)["packages"]) == differing

    here = tmp_path / "results/two"
    assert cli("sync", "two", "home", cwd=tmp_path).returncode == 0
    here.rename(tmp_path / "results/elsewhere")
    assert "differ; --all" in cli("diff", "one", "two", cwd=tmp_path).stdout  # by the synced folder
    (tmp_path / "home/two/output/environment.json").unlink()
    missing = cli("diff", "one", "two", cwd=tmp_path)
    reason = f"surroundings not compared: two: no output/environment.json in file://{tmp_path}/results/two"
    assert (missing.returncode, missing.stdout.splitlines()[:2]) == (0, ["identical job", reason])
    assert json.loads(cli("diff", "one", "two", "--json", cwd=tmp_path).stdout)["not_compared"]
