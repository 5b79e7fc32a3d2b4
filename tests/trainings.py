"""Real trainings of the digits example, and the same ones at home to compare them with.

Tests of a platform import the fixtures `digits` and `at_home` by their names.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import Metrics, Run, State, manifest, submit
from launcher.ledger import Ledger
from launcher.stores import open_store
from launcher.submission import push_channels
from launcher.testing.conformance import text_of
from tests.services.podman import locked, podman

__all__ = [
    "at_home",
    "digits",
    "in_training",
    "rank_0_port",
    "resumed_in_the_middle",
    "series",
    "tagged",
    "train",
    "write_target",
]

DIGITS = Path(__file__).parents[1] / "examples/digits"

Series = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its data, in a folder of its own."""
    folder = tmp_path_factory.mktemp("digits")
    for name in ("make_data.py", "tiny.yaml"):
        (folder / name).write_bytes((DIGITS / name).read_bytes())
    subprocess.run([sys.executable, str(folder / "make_data.py")], check=True, capture_output=True)
    for name in ("tiny-train", "tiny-val"):
        data = folder / "data" / name
        manifest.write(open_store(str(data)), manifest.scan(data))
    return folder


@pytest.fixture(scope="module")
def at_home(digits: Path) -> Callable[..., Run]:
    """The same training on this machine, not interrupted; once for each change of it."""

    @functools.cache
    def trained(changes: tuple[tuple[str, str], ...]) -> Run:
        where = {"backend": "local", "output": str(digits / "output"), "root": str(digits / "root")}
        write_target(digits, where)
        settings = [f"{key}={value}" for key, value in changes]
        run = submit(digits / "tiny.yaml", target="there", settings=settings, ledger=Ledger(digits / "ledger"))
        assert run.wait(timeout=600).state is State.SUCCEEDED
        return run

    return lambda **changes: trained(tuple(changes.items()))


@pytest.fixture
def rank_0_port() -> Iterator[None]:
    """For two nodes that stand on this machine: one job at a time can have rank 0's port."""
    with locked("rank-0-port"):
        yield


def write_target(folder: Path, target: Mapping[str, Any]) -> None:
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"there": {**target}}}))


def train(
    digits: Path,
    target: Mapping[str, Any],
    ledger: Ledger,
    changes: Mapping[str, str] = {},
    *,
    settings: Sequence[str] = (),
) -> Run:
    """The tiny job where the target is, with its data brought there. changes: keys of the job."""
    write_target(digits, target)
    settings = [*settings, *(f"{key}={value}" for key, value in changes.items())]
    to = f"{target['output']}/_data"
    pushed = push_channels(digits / "tiny.yaml", backend=None, target="there", settings=settings, to=to)
    return submit(digits / "tiny.yaml", target="there", settings=[*settings, *pushed], ledger=ledger)


def series(metrics: Metrics) -> Series:
    """All that does not depend on the clock."""
    return {name: metrics.series(name) for name in metrics.names if not name.endswith("per_second")}


def in_training(run: Run, *, every: float = 0.1) -> None:
    """Returns in the first epoch, or a later one."""
    deadline = time.monotonic() + 300
    while not run.metrics().points:
        assert not run.status().state.terminal and time.monotonic() < deadline, text_of(run)
        run.store().write("control/watch", str(time.time()).encode())  # as `cvlaunch watch` says
        time.sleep(every)


def resumed_in_the_middle(run: Run) -> bool:
    """Of an epoch, once."""
    lines = [line for line in text_of(run).splitlines() if line.startswith("resuming from step")]
    return len(lines) == 1 and "step 0 in it" not in lines[0]


@contextmanager
def tagged(image: str, repository: str) -> Iterator[str]:
    """The image by a digest, as one that was pulled from a registry."""
    name = f"{repository}:{image.rpartition(':')[2]}"
    with locked("images"):
        podman("tag", image, name)
    try:
        yield f"{repository}@{podman('image', 'inspect', '--format={{.Digest}}', image)}"
    finally:
        with locked("images"):
            podman("untag", image, name, check=False)
