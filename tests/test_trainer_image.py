"""The trainer image, real, in podman: what is in it, who may run it, and what a change builds anew."""

from __future__ import annotations

import base64
import dataclasses
import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from launcher.contract import CONTRACT, Channel, JobFile, Layout
from tests.runner_world import IN_PLACE, RUNNER, UPLOADED
from tests.services.image import layers
from tests.services.podman import image_exists, locked, podman
from tests.trainer_runs import REPOSITORY, metrics

pytestmark = pytest.mark.needs("podman", "debootstrap")

DIGITS = REPOSITORY / "examples/digits"
READ_ONLY = ("--read-only", "--read-only-tmpfs=false")
USERS: Mapping[str, tuple[int, int, tuple[str, ...]]] = {
    "root": (0, 0, ()),
    "kubernetes": (1000, 0, ()),
    "ovh": (42420, 42420, ()),
    "openshift": (1000730000, 0, READ_ONLY),
}
"""Platform → user, group, podman's options. Without the read-only disk /opt/ml is the image's own."""
OPEN = ("/opt/ml", "/tmp", "/var/tmp", "/results", "/job.json")
"""What a run may change, and the mount points of a test."""


@dataclass(frozen=True)
class Done:
    code: int
    output: str
    changed: list[str]


def run_image(image: str, arguments: Sequence[str] = (), *, options: Sequence[str | Path] = ()) -> Done:
    """Without a network. changed: paths that differ from the image afterwards."""
    name = f"cvlaunch-test-{os.getpid()}"
    whole = ["podman", "run", "--name", name, "--network=none", *map(str, options), image, *arguments]
    try:
        done = subprocess.run(
            whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False
        )
        changed = [line.split(" ", 1)[1] for line in podman("diff", name).splitlines()]
    finally:
        podman("rm", "--force", "--ignore", name)
    return Done(done.returncode, done.stdout, changed)


def python_in(image: str, code: str, *options: str) -> str:
    return podman("run", "--rm", "--network=none", *options, "--entrypoint=python", image, "-c", code)


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_configuration(trainer_image: str) -> None:
    config = json.loads(podman("image", "inspect", "--format={{json .Config}}", trainer_image))
    assert config["Entrypoint"] == ["cvlaunch-run"] and not config.get("Cmd") and not config.get("User")
    labels = config["Labels"]
    assert labels["io.cvlaunch.contract"] == str(CONTRACT)
    assert {"Apache-2.0", "AGPL-3.0-only"} <= set(labels["org.opencontainers.image.licenses"].split(" AND "))
    assert all(labels[f"org.opencontainers.image.{name}"] for name in ("title", "description", "version"))
    variables = dict(variable.split("=", 1) for variable in config["Env"])
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "HOME" not in variables and "UV_CACHE_DIR" not in variables


def test_packages_are_those_of_the_lock(trainer_image: str) -> None:
    written, found = json.loads(
        python_in(
            trainer_image,
            "import importlib.metadata, json, pathlib; print(json.dumps(["
            "json.loads(pathlib.Path('/opt/cvlaunch/packages.json').read_text()),"
            "{d.name: d.version for d in importlib.metadata.distributions()}]))",
        )
    )
    assert written == {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}
    assert list(written) == sorted(written)
    lock = (REPOSITORY / "trainer_image/requirements.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, flags=re.MULTILINE))
    ours = written.pop("cvlaunch")
    assert ours and written == {name: version for name, version in locked.items() if name != "uv"}


def test_torch_has_cuda(trainer_image: str) -> None:
    assert python_in(trainer_image, "import torch; print(torch.version.cuda is not None)") == "True"


def test_folders(trainer_image: str) -> None:
    listed = python_in(
        trainer_image,
        "import pathlib\nfor p in [pathlib.Path('/opt/ml'), *pathlib.Path('/opt/ml').rglob('*')]:\n"
        "    s = p.stat(); print(p, s.st_uid, s.st_gid, oct(s.st_mode & 0o7777))",
    )
    folders = [line.split(" ", 1)[0] for line in listed.splitlines()]
    inside = Layout(Path("/opt/ml"))
    wanted = {inside.root, inside.root / "input", inside.root / "input/data", inside.job.parent, inside.stop.parent}
    assert set(folders) == {str(p) for p in (*wanted, inside.checkpoints, inside.model, inside.output)}
    assert {line.split(" ", 1)[1] for line in listed.splitlines()} == {"42420 0 0o775"}


def test_nothing_that_only_the_build_needs(trainer_image: str) -> None:
    stray = ("/tools", "/lock", "/requirements.lock", "/usr/bin/gcc", "/root/.cache", "/var/lib/apt/lists/lock")
    listed = python_in(
        trainer_image, f"import os; print([p for p in {stray} if os.path.exists(p)], os.listdir('/mnt'))"
    )
    assert listed == "[] []"


# -- who may run it ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny example's data, readable by every user."""
    folder = tmp_path_factory.mktemp("digits")
    shutil.copytree(DIGITS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("data"))
    subprocess.run([sys.executable, folder / "make_data.py"], check=True, capture_output=True)
    return _readable({"train": folder / "data/tiny-train", "val": folder / "data/tiny-val"})


def _readable(data: dict[str, Path]) -> dict[str, Path]:
    for folder in data.values():
        subprocess.run(["chmod", "--recursive", "a+rX", folder], check=True)
    return data


def job_of(train: Mapping[str, Any], data: Mapping[str, Path], *, output: str, in_place: bool) -> JobFile:
    channels = tuple(Channel(name, f"file:///elsewhere/{name}", "mounted") for name in data)
    movers = IN_PLACE if in_place else UPLOADED
    return JobFile(
        run_id="tiny-1", name="tiny", job_digest="0" * 64, output=output, train=train, channels=channels, movers=movers
    )


def train_in(image: str, user: str, folder: Path, *, train: Mapping[str, Any], data: Mapping[str, Path]) -> Layout:
    """One run as one platform has it. On a read-only disk /opt/ml is the run's folder; else results are uploaded."""
    uid, gid, options = USERS[user]
    in_place = bool(options)
    results, job_file = folder / "results", folder / "job.json"
    run = results / "tiny-1"
    run.mkdir(parents=True)
    points = [run / "input/data" / name for name in data if in_place]  # else the engine makes them, as root
    for path in (results, run, run / "input", run / "input/data", *points):
        path.mkdir(exist_ok=True)
        os.chown(path, uid, gid)
    job = job_of(train, data, output="file:///results", in_place=in_place)
    job_file.write_bytes(job.to_bytes())
    mounts = {job_file: "/job.json:ro", (run if in_place else results): "/opt/ml" if in_place else "/results"}
    mounts |= {path: f"/opt/ml/input/data/{name}:ro" for name, path in data.items()}
    volumes = [f"--volume={source}:{place}" for source, place in mounts.items()]
    environ = ["--env=CVLAUNCH_JOB=/job.json", *(["--env=CVLAUNCH_ROOT=/opt/ml"] if in_place else [])]
    done = run_image(image, options=[f"--user={uid}:{gid}", *options, *volumes, *environ])
    assert done.code == 0, done.output
    assert not (wrong := [path for path in done.changed if not _may_change(path)]), wrong
    return Layout(run)


def _may_change(path: str) -> bool:
    """Podman itself makes mount points, and counts a folder as changed that holds something changed."""
    of_podman = (
        "/etc",
        "/etc/mtab",
        "/etc/passwd",
        "/etc/group",
        "/run",
        "/run/secrets",
        "/opt",
        "/var",
        "/sys",
        "/dev",
        "/proc",
    )
    return path in of_podman or any(Path(path).is_relative_to(folder) for folder in OPEN)


@pytest.fixture(scope="module")
def here(digits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Metrics of the tiny example on this machine, without a container."""
    folder = tmp_path_factory.mktemp("here")
    job = job_of(tiny(), digits, output=folder.as_uri(), in_place=True)
    channels = tuple(Channel(name, path.as_uri(), "path") for name, path in digits.items())
    (folder / "job.json").write_bytes(dataclasses.replace(job, channels=channels).to_bytes())
    environ = {**os.environ, "CVLAUNCH_JOB": str(folder / "job.json"), "CVLAUNCH_ROOT": str(folder / "tiny-1")}
    done = subprocess.run(RUNNER, env=environ, cwd="/", capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(Layout(folder / "tiny-1"))


@functools.cache
def tiny() -> dict[str, Any]:
    train: dict[str, Any] = yaml.safe_load((DIGITS / "tiny.yaml").read_text())["train"]
    return train


@pytest.mark.parametrize("user", USERS)
def test_the_same_metrics_under_every_user(
    trainer_image: str, user: str, digits: dict[str, Path], here: dict[Any, Any], tmp_path: Path
) -> None:
    layout = train_in(trainer_image, user, tmp_path, train=tiny(), data=digits)
    found = metrics(layout)
    assert found == here and {split for split, _ in found} == {"train", "val"}, (
        "to the last digit: one thread, the same packages, the same machine"
    )
    assert json.loads((layout.root / "output/result.json").read_text())["state"] == "SUCCEEDED"
    uid, gid, _ = USERS[user]
    owned = {(path.stat().st_uid, path.stat().st_gid) for path in layout.output.rglob("*") if path.is_file()}
    assert owned == {(uid, gid)}


def test_detection_offline_on_a_read_only_disk(trainer_image: str, tmp_path: Path) -> None:
    """With workers, whose sockets need a place; Ultralytics looks for fonts, settings and updates at its start."""
    spec = importlib.util.spec_from_file_location("make_shapes", REPOSITORY / "examples/shapes/make_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_shapes(tmp_path / "data", {"train": 8, "val": 8})
    data = _readable({"train": tmp_path / "data/train", "val": tmp_path / "data/val"})
    train = {
        "task": "detect", "model": "yolo11n", "pretrained": False, "image_size": 64, "epochs": 1, "batch": 8,
        "workers": 2, "threads": 1,
    }  # fmt: skip
    layout = train_in(trainer_image, "openshift", tmp_path, train=train, data=data)
    assert (layout.model / "model.pt").stat().st_size > 1_000_000
    assert not list(layout.root.glob(".scratch*")), "what the runner needs in between is removed"


@pytest.mark.parametrize("user", USERS)
def test_a_command_finds_a_home_and_a_place_for_sockets(trainer_image: str, user: str, tmp_path: Path) -> None:
    uid, gid, options = USERS[user]
    code = """
import getpass, multiprocessing, os, pathlib, tempfile, torch
print("user", getpass.getuser())
for name in ("HOME", "TORCH_HOME", "HF_HOME", "MPLCONFIGDIR", "YOLO_CONFIG_DIR", "XDG_CACHE_HOME", "TMPDIR"):
    if name in os.environ:
        (pathlib.Path(os.environ[name]) / "x").touch()
tempfile.TemporaryFile()
def work(queue): queue.put(torch.ones(3))
context = multiprocessing.get_context("fork")
queue = context.Queue()
context.Process(target=work, args=(queue,)).start()
print("manager", context.Manager().list([1]), "tensor", torch.multiprocessing.get_sharing_strategy())
"""
    run = tmp_path / "tiny-1"
    run.mkdir()
    os.chown(run, uid, gid)
    job = job_of({}, {}, output="file:///results", in_place=True)
    job = dataclasses.replace(job, train=None, command=("python", "-c", code))
    (tmp_path / "job.json").write_bytes(job.to_bytes())
    volumes = [f"--volume={run}:/opt/ml", f"--volume={tmp_path / 'job.json'}:/job.json:ro"]
    environ = ["--env=CVLAUNCH_JOB=/job.json", "--env=CVLAUNCH_ROOT=/opt/ml"]
    done = run_image(trainer_image, options=[f"--user={uid}:{gid}", *options, *volumes, *environ])
    assert done.code == 0 and "manager [1]" in done.output, done.output


def test_without_a_job_it_says_what_it_needs(trainer_image: str) -> None:
    done = run_image(trainer_image, options=["--user=1000730000:0", *READ_ONLY])
    assert done.code == 64 and "/opt/ml/input/config/job.json" in done.output
    assert "Traceback" not in done.output


def test_a_folder_that_the_platform_made_is_named(trainer_image: str, digits: dict[str, Path], tmp_path: Path) -> None:
    """An engine makes the folders above a mount point as root, and the run's user can't write there."""
    run = tmp_path / "tiny-1"
    run.mkdir()
    os.chown(run, 1000730000, 0)
    job = job_of(tiny(), {"train": digits["train"]}, output="file:///results", in_place=True)
    (tmp_path / "job.json").write_bytes(job.to_bytes())
    mounts = {run: "/opt/ml", tmp_path / "job.json": "/job.json:ro", digits["train"]: "/opt/ml/input/data/train:ro"}
    volumes = [f"--volume={source}:{place}" for source, place in mounts.items()]
    environ = ["--env=CVLAUNCH_JOB=/job.json", "--env=CVLAUNCH_ROOT=/opt/ml"]
    done = run_image(trainer_image, options=["--user=1000730000:0", *READ_ONLY, *volumes, *environ])
    assert done.code == 64, done.output
    assert "uid 1000730000 can't make /opt/ml/input/config: /opt/ml/input belongs to uid 0" in done.output
    assert "Traceback" not in done.output


# -- what a change builds anew ----------------------------------------------------------------------------------------

LOCKS = {"torch": ["six"], "packages": ["click", "idna"]}
"""A lock of the same form, with packages of a few kilobytes."""
PASSWORD = "canary-of-the-index"


@dataclass
class Index:
    """A package index on 127.0.0.1 that asks for a password. asked: the programs that gave it."""

    url: str
    asked: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    folder = tmp_path_factory.mktemp("index")
    names = ["uv", *LOCKS["torch"], *LOCKS["packages"]]
    wanted = [f"{name}=={version}" for name in names for version in [_locked(name)]]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", folder / "all", *wanted], check=True)
    for wheel in (folder / "all").iterdir():
        place = folder / "simple" / wheel.name.split("-")[0]
        place.mkdir(parents=True)
        wheel.rename(place / wheel.name)
    found = Index("")
    login = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != login:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="index"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            found.asked.add(self.headers.get("User-Agent", "").split("/")[0])
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.url = f"http://me:{quote(PASSWORD)}@127.0.0.1:{server.server_port}/simple"
        yield found
        server.shutdown()


def _entry(name: str) -> str:
    """A package of the real lock, with its hashes."""
    lock = (REPOSITORY / "trainer_image/requirements.lock").read_text()
    found = re.search(rf"^{name}==.*(?:\n    .*)*\n", lock, flags=re.MULTILINE)
    assert found, name
    return found[0]


def _locked(name: str) -> str:
    return _entry(name).split("==")[1].split()[0]


@dataclass
class Small:
    """Builds of the real Dockerfile with a small lock; tags are removed at the end."""

    base: str
    index: Index
    folder: Path
    tags: list[str] = field(default_factory=list)

    def build(
        self, locks: Mapping[str, Sequence[str]], *, code: str = "", instead: Mapping[str, str] = {}
    ) -> list[str]:
        """Digests of its layers, the lowest first. code: a line more in the wheel. instead: name → what to lock."""
        number = len(self.tags)
        context, tag = self.folder / f"context-{number}", f"localhost/cvlaunch-test-small:{os.getpid()}-{number}"
        context.mkdir()
        _write_wheel(context, code)
        shutil.copy(REPOSITORY / "trainer_image/Dockerfile", context)
        parts = {"tools": ["uv"], **locks}
        lines = ["# a lock\n"]
        for part, names in parts.items():
            lines += [f"# --- {part}\n", *(instead.get(name) or _entry(name) for name in names)]
        (context / "requirements.lock").write_text("".join(lines))
        (self.folder / "pip.conf").write_text(f"[global]\nindex-url = {self.index.url}\n")
        options = [
            f"--build-arg=BASE={self.base}",
            "--network=host",
            f"--secret=id=pip.conf,src={self.folder}/pip.conf",
        ]
        self.tags.append(tag)
        with locked("images"):
            for stage in ("lock", *(["tools"] if "uv" in instead else [])):  # by a name they can be removed
                podman("build", "--layers", *options, f"--target={stage}", f"--tag={tag}-{stage}", context)
            podman("build", "--layers", *options, f"--tag={tag}", context)
        return json.loads(podman("image", "inspect", "--format={{json .RootFS.Layers}}", tag))


def _write_wheel(folder: Path, code: str) -> None:
    """A wheel with one module, as `cvlaunch` is named."""
    import zipfile

    about = "Metadata-Version: 2.1\nName: cvlaunch\nVersion: 0.0.1\n"
    with zipfile.ZipFile(folder / "cvlaunch-0.0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("launcher.py", f"value = 1\n{code}\n")
        wheel.writestr("cvlaunch-0.0.1.dist-info/METADATA", about)
        wheel.writestr(
            "cvlaunch-0.0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("cvlaunch-0.0.1.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def small(base_image: str, index: Index, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    builds = Small(base_image, index, tmp_path_factory.mktemp("small"))
    yield builds
    with locked("images"):
        for tag in reversed(builds.tags):
            podman("rmi", "--force", tag, f"{tag}-lock", f"{tag}-tools", check=False)


@pytest.fixture(scope="module")
def first(small: Small) -> list[str]:
    return small.build(LOCKS)


TORCH = 4
"""Base, Python, torch's part of the lock, torch."""


def test_torch_s_layer_stays_when_other_packages_change(small: Small, first: list[str]) -> None:
    other = small.build({**LOCKS, "packages": ["click"]})
    assert other[:TORCH] == first[:TORCH] and other[TORCH + 1] != first[TORCH + 1]
    instructions = [instruction for _, instruction in layers(small.tags[0])]
    assert "lock/torch" in instructions[TORCH - 1] and "lock/packages" in instructions[TORCH + 1]


def test_a_change_of_code_builds_the_last_layers_alone(small: Small, first: list[str]) -> None:
    other = small.build(LOCKS, code="value = 2")
    assert len(other) == len(first) and other[:-2] == first[:-2] and other[-1] != first[-1]
    sizes = [size for size, _ in layers(small.tags[-1])]
    assert sum(sizes[-2:]) < 5_000_000


def test_a_change_of_torch_builds_its_layer(small: Small, first: list[str]) -> None:
    other = small.build({"torch": ["idna"], "packages": ["click", "six"]})
    assert other[: TORCH - 2] == first[: TORCH - 2] and other[TORCH - 1] != first[TORCH - 1]


def test_credentials_of_the_index_serve_the_build_and_stay_outside(small: Small, index: Index, tmp_path: Path) -> None:
    index.asked.clear()
    new = {name: f"# {tmp_path}\n{_entry(name)}" for name in ("uv", "six")}  # so that no layer is there already
    small.build(LOCKS, instead=new)
    assert index.asked == {"pip", "uv"}, "both asked, with the password"
    podman("save", "--output", tmp_path / "image.tar", small.tags[-1])
    with tarfile.open(tmp_path / "image.tar") as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                assert PASSWORD.encode() not in file.read(), member.name


def test_a_package_that_is_not_the_locked_one_is_refused(small: Small) -> None:
    wrong = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, _entry("six"))
    with pytest.raises(AssertionError, match=r"[Hh]ash mismatch"):
        small.build(LOCKS, instead={"six": wrong})
    assert not image_exists(small.tags[-1])


@pytest.mark.needs("docker-registry")
def test_pin_base(base_image: str, registry: str, tmp_path: Path) -> None:
    name = f"{registry}/debian:12-slim"
    podman("push", "--quiet", base_image, name)
    shutil.copy(REPOSITORY / "trainer_image/pin-base", tmp_path)
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(f"# one\nARG BASE={name}\nFROM ${{BASE}}\n")
    try:
        for _ in range(2):  # a base that is pinned already is pinned anew
            done = subprocess.run([tmp_path / "pin-base"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            pinned = dockerfile.read_text().splitlines()[1].removeprefix("ARG BASE=")
            assert re.fullmatch(rf"{re.escape(name)}@sha256:[0-9a-f]{{64}}", pinned)
    finally:
        podman("untag", base_image, name, check=False)


def test_pin_base_without_a_registry(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "trainer_image/pin-base", tmp_path)
    (tmp_path / "Dockerfile").write_text("ARG BASE=127.0.0.1:1/debian:12-slim\n")
    done = subprocess.run([tmp_path / "pin-base"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "can't pull 127.0.0.1:1/debian:12-slim; is there a network" in done.stderr
    assert "@" not in (tmp_path / "Dockerfile").read_text()
