"""Which target a job goes to, and every way of naming it wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.backends.local import LocalTarget
from launcher.errors import SpecError
from launcher.targets import load_targets

FILE = """\
default: desk
datasets:
  shapes: {default: s3://bucket/shapes, desk: /scratch/shapes}
  far: {hpc: /scratch/far}
targets:
  desk: {backend: local, output: runs}
  bench: {backend: local, output: /tmp/bench, notify: {command: [true]}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project/deep"
    folder.mkdir(parents=True)
    (tmp_path / "project/targets.yaml").write_text(FILE.replace("[true]", '["true"]'))
    return folder


def test_by_name_by_default_and_built_in(project: Path, tmp_path: Path) -> None:
    targets = load_targets(project)
    assert targets.select(target="bench").target.output == "/tmp/bench"
    assert targets.select().name == "desk"
    assert targets.select().folder == tmp_path / "project"
    assert load_targets(tmp_path / "elsewhere").select().name == "local"
    assert targets.select(target="local").target.backend == "local"


def test_one_target_of_a_backend_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").write_text("targets: {desk: {backend: local, output: runs}}")
    assert load_targets(tmp_path).select(backend="local").name == "desk"


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"backend": "local"}, "2 targets are of backend 'local': bench, desk"),
        (
            {"target": "dsk"},
            "unknown target 'dsk'; there are bench, .*, local, openshift, sagemaker, slurm; did you mean 'desk'",
        ),
        (
            {"backend": "locl"},
            "unknown backend 'locl'; there are .*local, openshift, sagemaker, slurm; did you mean 'local'",
        ),
        ({"target": "desk", "backend": "slurm"}, "is of backend 'local', not 'slurm'"),
    ],
)
def test_ambiguous_or_unknown_lists_what_there_is(project: Path, choice: dict[str, str], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        load_targets(project).select(**choice)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("targets: {hpc: {backend: slurmm}}", "unknown backend 'slurmm'"),
        ("targets: {hpc: {output: x}}", r"targets.yaml:1: targets.hpc.backend: the backend is missing"),
        (
            "targets:\n  hpc: {backend: local, outputt: x}",
            r"targets.yaml:2: targets.hpc.outputt: .*did you mean 'output'",
        ),
        ("target: {}", r"targets.yaml:1: target: unknown key; did you mean 'targets'"),
        ("targets:\n  hpc:\n    backend: local\n    root: here", r"targets.yaml:4: targets.hpc.root: .*absolute"),
        ("targets: [1]", "targets: expected"),
    ],
)
def test_a_wrong_file_names_file_line_and_key(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "targets.yaml").write_text(content)
    with pytest.raises(SpecError, match=says):
        load_targets(tmp_path).select(target="hpc")


def test_the_project_s_file_goes_before_the_user_s(project: Path, home: Path) -> None:
    folder = home / "config/cvlaunch"
    folder.mkdir(parents=True)
    (folder / "targets.yaml").write_text(
        "default: mine\ntargets: {desk: {backend: local, output: /u}, mine: {backend: local, output: /m}}"
    )
    targets = load_targets(project)
    assert targets.select().name == "desk"
    assert targets.select(target="desk").target.output == "runs"
    assert targets.select(target="mine").target.output == "/m"


def test_variables_override(project: Path) -> None:
    environ = {
        "CVLAUNCH_TARGETS__DESK__OUTPUT": "s3://other/runs",
        "CVLAUNCH_TARGETS__DESK__STORAGE__ENDPOINT": "https://s3.example",
        "CVLAUNCH_TARGETS__LOCAL__PYTHON": "/opt/python",
        "CVLAUNCH_DATASETS__SHAPES__DESK": "/fast/shapes",
    }
    targets = load_targets(project, environ)
    desk = targets.select(target="desk").target
    assert (desk.output, desk.storage.endpoint) == ("s3://other/runs", "https://s3.example")
    local = targets.select(target="local").target
    assert isinstance(local, LocalTarget)
    assert local.python == "/opt/python"
    assert targets.place_of("shapes", "desk") == "/fast/shapes"


@pytest.mark.parametrize("variable", ["CVLAUNCH_TARGETS__", "CVLAUNCH_TARGETS__DESK", "CVLAUNCH_TARGETS__DESK__"])
def test_a_variable_without_a_key_is_told(project: Path, variable: str) -> None:
    with pytest.raises(SpecError, match="expected CVLAUNCH_TARGETS__NAME__KEY"):
        load_targets(project, {variable: "x"})


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("TARGETS__DESK__OUTPUTT", "x", "unknown key; did you mean 'output'"),
        ("TARGETS__DESK__OUTPUT", "5", "expected text, found 5; quote it"),
        ("TARGETS__DESK__OUTPUT", "2026-99-99", "its value can't be read; quote it .*month must be in 1..12"),
        ("TARGETS__DESK__OUTPUT", "[", "its value can't be read; quote it"),
        ("TARGETS__DESK__STORAGE__ENDPOINT", "[1]", "expected text, found a list"),
        ("TARGETS__DESK__NOTIFY", "{command: []}", "expected at least 1 item"),
        ("TARGETS__DESK__BACKEND", "slurmm", "unknown backend 'slurmm'"),
        ("DATASETS__SHAPES__DESK__DEEPER", "/x", "expected CVLAUNCH_DATASETS__NAME__TARGET"),
    ],
)
def test_a_wrong_variable_is_named_not_the_file(project: Path, variable: str, value: str, says: str) -> None:
    with pytest.raises(SpecError, match=f"^CVLAUNCH_{variable}: {says}") as caught:
        load_targets(project, {f"CVLAUNCH_{variable}": value}).select(target="desk")
    assert (caught.value.file, caught.value.line) == (None, None)


def test_a_variable_has_no_part_in_what_the_file_says_wrongly(tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").write_text("targets:\n  desk: {backend: local, output: 5}")
    with pytest.raises(SpecError, match=r"targets.yaml:2: targets.desk.output: expected text, found 5"):
        load_targets(tmp_path, {"CVLAUNCH_TARGETS__DESK__PYTHON": "/opt/python"}).select(target="desk")


def test_a_dataset_s_place_in_a_variable_is_text_as_it_stands(project: Path) -> None:
    targets = load_targets(project, {"CVLAUNCH_DATASETS__SHAPES__DESK": "2026-01-01"})
    assert targets.place_of("shapes", "desk") == "2026-01-01"


def test_a_dataset_has_a_place_for_each_target(project: Path) -> None:
    targets = load_targets(project)
    assert targets.place_of("shapes", "desk") == "/scratch/shapes"
    assert targets.place_of("shapes", "bench") == "s3://bucket/shapes"
    with pytest.raises(SpecError, match="no place for target 'desk'; it has hpc"):
        targets.place_of("far", "desk")
