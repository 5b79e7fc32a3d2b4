"""From a job file to a frozen Job: places of data, features, pins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from launcher import manifest
from launcher.backends.base import Job, Plan, Transport
from launcher.backends.local import LocalBackend, LocalTarget
from launcher.errors import SpecError
from launcher.ledger import Ledger
from launcher.resolve import resolve
from launcher.spec import JobSpec
from launcher.stores import Store, file_uri, open_store
from launcher.submission import prepare
from launcher.targets import Selected, Targets
from tests.s3_fixtures import Bucket

TARGETS = """\
datasets:
  shapes: {default: s3://bucket/shapes, desk: DATA}
  elsewhere: {hpc: /scratch/x}
  gone: {default: /no/such/place}
targets:
  desk: {backend: local, output: out}
  far: {backend: local, output: s3://bucket/runs, storage: {endpoint: http://ENDPOINT, region: us-east-1}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(b"not looked into")
    (tmp_path / "targets.yaml").write_text(TARGETS.replace("DATA", str(tmp_path / "data")))
    return tmp_path


def resolved(project: Path, *, target: str = "desk", online: bool = True, **keys: object) -> tuple[Job, Plan]:
    path = project / "job.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "command": ["true"], **keys}))
    with prepare(path, target=target, online=online, ledger=Ledger(project / "ledger")) as prepared:
        return prepared.job, prepared.plan()


TRAIN = {"command": None, "train": {"task": "classify"}, "data": {"train": "data/train", "val": "data/val"}}


@pytest.mark.parametrize(
    ("written", "uri"),
    [
        ("data/train", "file://{project}/data/train"),
        ("./data/train", "file://{project}/data/train"),
        ("{project}/data/train", "file://{project}/data/train"),
        ("shapes/train", "file://{project}/data/train"),
        ("shapes", "file://{project}/data"),
        ("target:{project}/data", "file://{project}/data"),
        ("file://{project}/data", "file://{project}/data"),
    ],
)
def test_a_place_becomes_a_uri(project: Path, written: str, uri: str) -> None:
    job, _ = resolved(project, data={"train": written.format(project=project)})
    assert [(c.name, c.uri, c.access) for c in job.channels] == [("train", uri.format(project=project), "path")]


def test_the_home_folder_is_meant(project: Path, home: Path) -> None:
    (home / "images").mkdir()
    job, _ = resolved(project, data={"train": "~/images"})
    assert job.channels[0].uri == f"file://{home}/images"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"data": {"train": "dta/train"}},
            "job.yaml:4: data.train: 'dta/train' is neither a folder in .* nor a dataset",
        ),
        ({"data": {"train": "shaps/train"}}, "nor a dataset; did you mean 'shapes'"),
        ({"data": {"train": "elsewhere/x"}}, "data.train: dataset 'elsewhere' has no place for target 'desk'"),
        ({"data": {"train": "ftp://host/x"}}, "data.train: ftp://host/x can't be read by target 'desk'; it reads"),
        ({"data": {"train": "target:relative"}}, "needs an absolute path after target:"),
        ({"data": {"train": "run://nobody-0000000000/model"}}, "data.train: there is no run 'nobody-0000000000'"),
        ({**TRAIN, "data": {"train": "data/train", "val": "data/train/cat"}}, "data.val: .*train/cat holds"),
        (
            {**TRAIN, "train": {"task": "classify", "init": "nowhere"}},
            "job.yaml:\\d+: train.init: 'nowhere' is neither",
        ),
        (
            {**TRAIN, "train": {"task": "classify", "init": "target:relative"}},
            "job.yaml:\\d+: train.init: .* needs an absolute",
        ),
        ({"data": {"x": "file:///no/such"}}, "job.yaml:4: data.x: no folder /no/such"),
        ({"data": {"x": "target:/no/such"}}, "data.x: no folder /no/such"),
        ({"data": {"x": "gone"}}, "data.x: no folder /no/such/place"),
        ({**TRAIN, "data": {"train": "shapes/train", "val": "shapes/val/cat"}}, "data.val: .*val/cat holds"),
        ({**TRAIN, "train": {"task": "classify", "init": "file:///no/such"}}, "train.init: no folder /no/such"),
        (
            {"image": "busybox", "runner": "none"},
            "runner: the local backend has no container image: a process is not a container",
        ),
        ({"resources": {"nodes": 2}}, "the local backend has no multi-node: this is one machine"),
        ({"resources": {"shm": "1Gi"}}, "write resources.shm: auto"),
        ({"resources": {"spot": True}}, "write resources.spot: false"),
        ({"secrets": {"A": "store:x"}}, "write env:NAME or file:PATH"),
        ({"native": {"slurm": {"x": 1}}}, "native settings of slurm, so it can't go to local"),
        ({"output": "ftp://x/y"}, "output: the local backend can't write to ftp://x/y; it knows file, gs, s3"),
    ],
)
def test_what_can_t_be_resolved_names_the_key(project: Path, keys: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        resolved(project, **keys)


@pytest.mark.parametrize(
    ("keys", "ignored"),
    [
        ({"image": "trainer"}, ["image"]),
        ({"build": "docker"}, ["build"]),
        (
            {"resources": {"cpus": 4, "memory": "8GB", "disk": "1GB"}},
            ["resources.cpus", "resources.memory", "resources.disk"],
        ),
        ({"resources": {"disk": "auto", "timeout": "1h", "processes": 2}}, []),
    ],
)
def test_what_has_no_effect_is_told(project: Path, keys: dict[str, object], ignored: list[str]) -> None:
    _, plan = resolved(project, **keys)
    assert [text.split(" has no effect on the local backend: ")[0] for text in plan.warnings] == ignored


@pytest.mark.parametrize(("written", "starts_at"), [("mine", "jobs"), (None, "."), ("../up", ".")])
def test_a_relative_output_starts_where_it_is_written(project: Path, written: str | None, starts_at: str) -> None:
    (project / "jobs").mkdir()
    job = JobSpec.model_validate({"name": "x", "command": ["true"], "output": written})
    ledger = Ledger(project / "ledger")
    with prepare(job, target="desk", folder=project / "jobs", ledger=ledger) as prepared:
        name = (written or "out").removeprefix("../")
        assert prepared.job.output == file_uri(project / starts_at / name)


def test_a_folder_that_only_the_target_sees_is_not_looked_for(tmp_path: Path) -> None:
    class Remote(LocalBackend):
        transports = {"s3": Transport({"file": "path"}, LocalBackend.transports["s3"].movers)}  # noqa: RUF012

    target = LocalTarget(output="s3://bucket/runs")
    selected = Selected("far", target, Remote, tmp_path)  # type: ignore[arg-type] a table as any backend has
    spec = JobSpec.model_validate({"name": "x", "command": ["true"], "data": {"x": "target:/mnt/never/looked/at"}})
    ledger = Ledger(tmp_path / "ledger")
    job = resolve(spec, selected, folder=tmp_path, targets=Targets(), scratch=tmp_path, ledger=ledger)
    assert job.channels[0].uri == "file:///mnt/never/looked/at"


def test_nothing_is_pinned_without_manifests(project: Path) -> None:
    job, _ = resolved(project, **TRAIN)
    assert [text.split(":")[0] for text in job.unpinned] == ["data.train", "data.val", "image"]


def test_a_command_to_copy_can_be_pasted(project: Path) -> None:
    (project / "my data").mkdir()
    job, _ = resolved(project, data={"train": "my data"})
    assert job.unpinned[0].endswith(f"cvlaunch data fingerprint '{project}/my data'")


def test_a_manifest_pins_and_content_counts_not_place(project: Path) -> None:
    for split in ("train", "val"):
        store = open_store(str(project / "data" / split))
        manifest.write(store, manifest.scan(project / "data" / split))
    first, _ = resolved(project, **TRAIN)
    assert [text.split(":")[0] for text in first.unpinned] == ["image"]
    assert first.channels[0].files == 2
    (project / "data").rename(project / "moved")
    moved, _ = resolved(project, **{**TRAIN, "data": {"train": "moved/train", "val": "moved/val"}})
    assert moved.digest == first.digest
    (project / "moved/val/cat/2.png").write_bytes(b"one more")
    store = open_store(str(project / "moved/val"))
    manifest.write(store, manifest.scan(project / "moved/val"))
    other, _ = resolved(project, **{**TRAIN, "data": {"train": "moved/train", "val": "moved/val"}})
    assert other.digest != first.digest


def test_init_is_a_channel(project: Path) -> None:
    (project / "weights").mkdir()
    job, _ = resolved(project, **{**TRAIN, "train": {"task": "classify", "init": "weights"}})
    assert {c.name: c.uri for c in job.channels}["weights"] == f"file://{project}/weights"
    assert job.train is not None
    assert job.train["init"] == "weights"
    assert "train.init" in [text.split(":")[0] for text in job.unpinned]


def test_offline_what_is_not_here_stays_as_written(project: Path) -> None:
    job, plan = resolved(project, target="far", online=False, data={"train": "shapes/train"})
    assert job.channels[0].uri == "s3://bucket/shapes/train"
    assert any("s3://bucket/shapes/train was not looked at" in text for text in plan.warnings)
    assert job.unpinned[0] == "data.train: it was not looked at; --resolve reads its fingerprint"


def test_data_on_a_claim_is_pushed_through_its_target_and_takes_no_disk(tmp_path: Path) -> None:
    place = open_store(str(tmp_path / "claim"))

    class Remote(LocalBackend):
        transports = {"pvc": Transport({"pvc": "mounted"}, LocalBackend.transports["file"].movers)}  # noqa: RUF012

        def store(self, uri: str) -> Store:
            return place

    (tmp_path / "data").mkdir()
    (tmp_path / "data/large").write_bytes(bytes(5 << 20))
    selected = Selected("ocp", LocalTarget(output="pvc://runs/x"), Remote, tmp_path)  # type: ignore[arg-type] as above

    def found(data: str) -> Job:
        spec = JobSpec.model_validate({"name": "x", "command": ["true"], "data": {"x": data}})
        ledger = Ledger(tmp_path / "ledger")
        return resolve(spec, selected, folder=tmp_path, targets=Targets(), scratch=tmp_path, ledger=ledger)

    to = "pvc://runs/x/_data/x-x --target ocp"
    with pytest.raises(SpecError, match=f"cvlaunch data push {tmp_path}/data {to}"):
        found("data")
    assert found("pvc://data/x").unpinned[0].endswith("cvlaunch data push FOLDER pvc://data/x --target ocp")
    manifest.push(tmp_path / "data", place)
    pushed = found("pvc://data/x")
    assert (pushed.channels[0].size, pushed.disk) == (5 << 20, 20 << 30)


def test_online_the_manifest_in_the_store_is_read(project: Path, moto_bucket: Bucket) -> None:
    text = TARGETS.replace("DATA", str(project / "data")).replace(
        "http://ENDPOINT", moto_bucket.server.options.endpoint or ""
    )
    (project / "targets.yaml").write_text(text.replace("s3://bucket", moto_bucket.uri))
    pushed = manifest.push(
        project / "data/train", open_store(f"{moto_bucket.uri}/shapes/train", moto_bucket.server.options)
    )
    job, _ = resolved(project, target="far", data={"train": "shapes/train"})
    assert job.channels[0] == dataclasses.replace(
        job.channels[0], fingerprint=pushed.fingerprint, files=2, access="staged"
    )


def test_code_is_archived_and_counts(project: Path) -> None:
    (project / "src").mkdir()
    (project / "src/train.py").write_text("print(1)")
    first, plan = resolved(project, code={"root": "src"})
    assert list(plan.files) == ["input/code.tar.gz"]
    (project / "src/train.py").write_text("print(2)")
    second, _ = resolved(project, code={"root": "src"})
    assert first.digest != second.digest
