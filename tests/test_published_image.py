"""The real image on its way: built, pushed to a registry, pulled by digest, and a training in it that says the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import yaml

from launcher import Run, State, submit
from launcher.ledger import Ledger
from launcher.metrics import Metrics
from tests.services import image
from tests.services.podman import image_exists, locked, podman
from tests.services.registry import Registry, registry_server

pytestmark = pytest.mark.needs("podman", "debootstrap", "docker-registry")

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples/digits"
INSTALLATION = ("launcher", "templates", "trainer_image")
KEPT = platformdirs.user_cache_path("cvlaunch-tests") / "registry"
"""3.4 GB that would take two minutes to send again. Of the user who runs the tests, so that a new clone finds them."""


@pytest.fixture
def kept_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with locked("registry"), registry_server(KEPT, keep_address=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """This installation, with a line more in the trainer's code."""
    source = tmp_path / "source"
    for name in INSTALLATION:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    trainer = source / "trainer_image/cvtrainer/classify.py"
    trainer.write_text(f"{trainer.read_text()}\nCHANGED_IN = {str(tmp_path)!r}\n")
    return source


def cvlaunch(*arguments: str, source: Path = ROOT) -> str:
    """What it prints on stdout."""
    environ = {**os.environ, **image.build_environment(), "PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    done = subprocess.run(command, cwd=source, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_pushed_pulled_by_digest_and_run(
    trainer_image: str, kept_registry: Registry, changed: Path, tmp_path: Path
) -> None:
    cvlaunch("image", "push", trainer_image, f"{kept_registry.address}/cvlaunch/trainer")
    before = kept_registry.size
    with locked("images"):
        built = cvlaunch("image", "build", source=changed)
    pinned = cvlaunch("image", "push", built, f"{kept_registry.address}/cvlaunch/trainer", source=changed)
    sent = kept_registry.size - before
    print(f"whole image {before / 1e6:.0f} MB, change of the trainer {sent / 1e6:.2f} MB")
    assert 100_000 < sent < 5_000_000 < before
    config = podman("image", "inspect", "--format", "{{.Id}}", built)
    try:
        with locked("images"):
            podman("rmi", built, *_names_of(config))
        assert not image_exists(pinned)
        container = _trained(tmp_path, image=pinned, backend="container")
    finally:
        with locked("images"):
            podman("rmi", "--force", "--ignore", *_names_of(config), check=False)
    assert container.record.job["job_file"]["image"]["config_digest"] == f"sha256:{config}"
    assert not [reason for reason in container.record.plan["unpinned"] if "image" in reason]
    local = _trained(tmp_path, backend="local")
    assert [reason for reason in local.record.plan["unpinned"] if reason.startswith("image:")]
    assert _values(container.metrics()) == _values(local.metrics()) != {}, "to the last digit"


def _names_of(config: str) -> list[str]:
    return podman("images", "--no-trunc", "--filter", f"id={config}", "--format", "{{.Repository}}:{{.Tag}}").split()


def _trained(folder: Path, *, backend: str, **keys: Any) -> Run:
    """The tiny example, from files of its own."""
    project = folder / backend
    shutil.copytree(DIGITS, project, ignore=shutil.ignore_patterns("data"))
    subprocess.run([sys.executable, project / "make_data.py"], check=True, capture_output=True)
    place = {"backend": backend, "output": str(project / "output"), "root": str(project / "root")}
    container = {"engine": "podman", "network": "host"} if backend == "container" else {}
    (project / "targets.yaml").write_text(yaml.safe_dump({"targets": {"here": {**place, **container}}}))
    settings = tuple(f"{key}={value}" for key, value in keys.items())
    ledger = Ledger(folder / "ledger", folder / "cache")
    run = submit(project / "tiny.yaml", target="here", settings=settings, ledger=ledger)
    assert run.wait(timeout=600).state is State.SUCCEEDED, [line.text for line in run.logs()]
    return run


def _values(metrics: Metrics) -> Mapping[tuple[str, int | None], Mapping[str, float]]:
    """Without how fast it went."""
    return {
        (point.split, point.epoch): {n: v for n, v in point.values.items() if "per_second" not in n}
        for point in metrics.points
    }
