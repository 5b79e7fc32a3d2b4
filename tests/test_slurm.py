"""What the slurm backend says of runs when things go wrong, on a real cluster, beyond the suite of all backends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import Run, State, submit
from launcher.backends.base import Handle, LogLine
from launcher.errors import ConflictError, SpecError, UnreachableError
from launcher.ledger import Ledger
from launcher.run import refresh
from launcher.slurm import places
from launcher.status import Status
from launcher.submission import backend_of
from launcher.testing.conformance import STOPPABLE, job, ledger, run_job, text_of, until
from launcher.watch import UNSEEN_LIMIT_S
from tests.services.slurm import SlurmCluster
from tests.worlds.slurm import SlurmWorld

__all__ = ["job", "ledger", "run_job"]

pytestmark = pytest.mark.needs("slurm")

SLEEP = "import time; print('sleeping', flush=True); time.sleep(600)"
STUBBORN = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print('sleeping', flush=True)
    time.sleep(600)
"""
TOKEN = "canary-of-the-slurm-tests"

StartRun = Callable[..., Run]


def target(**keys: Any) -> pytest.MarkDecorator:
    """The test's target has these keys."""
    return pytest.mark.parametrize("world", [keys], indirect=True, ids=[""])


HELD, NOT_BACK = target(sbatch=["--hold"]), target(sbatch=["--no-requeue"])


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, slurm: SlurmCluster) -> SlurmWorld:
    return SlurmWorld(tmp_path / "world", slurm, **getattr(request, "param", {}))


@pytest.fixture
def secret(tmp_path: Path) -> dict[str, Any]:
    """Key of a job file: TOKEN is a secret."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return {"secrets": {"TOKEN": f"file:{file}"}}


def job_of(run: Run) -> str:
    assert run.handle is not None
    return run.handle.native.partition(".")[0]


def record(run: Run) -> Path:
    return Path(places.record(run.record.target["root"], run.id))


def secrets_left(run: Run) -> list[Path]:
    return [p for p in record(run).iterdir() if p.is_file() and TOKEN in p.read_text(errors="replace")]


def until_sleeping(run: Run, world: SlurmWorld, times: int = 1) -> None:
    until(lambda: text_of(run).count("sleeping") >= times, world)


def stop_early(run: Run, world: SlurmWorld, cluster: SlurmCluster) -> None:
    """As SLURM warns a job of its end."""
    until(lambda: "starts from None" in text_of(run), world)
    cluster.run("scancel", "--batch", "--signal=USR1", job_of(run))


def end_of(run: Run, world: SlurmWorld) -> Status:
    return run.wait(timeout=world.patience)


def starts(run: Run) -> int:
    return text_of(run).count("starts from")


# -- cancelling -------------------------------------------------------------------------------------------------------


def test_scancel_of_a_running_job_is_told_and_it_stays_so(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    run = run_job(STOPPABLE, retries=3)
    until(lambda: "starts from None" in text_of(run), world)
    slurm.run("scancel", job_of(run))
    status = end_of(run, world)
    assert (status.state, status.native, status.reason) == (State.CANCELLED, "CANCELLED", "cancelled with scancel")
    assert starts(run) == 1
    assert "Restarts=0" in slurm.run("scontrol", "-o", "show", "job", job_of(run))


@HELD
def test_scancel_of_a_waiting_job_leaves_no_secrets(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    run = run_job(SLEEP, **secret)
    status = run.status()
    assert (status.state, status.reason) == (State.QUEUED, "held; let it go with: scontrol release JOBID")
    assert secrets_left(run)
    slurm.run("scancel", job_of(run))
    assert run.status().state is State.CANCELLED
    assert secrets_left(run) == []


@HELD
def test_a_waiting_run_is_cancelled_and_leaves_no_secrets(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    run = run_job(SLEEP, **secret)
    assert run.cancel().state is State.CANCELLED
    assert secrets_left(run) == []
    assert slurm.state(job_of(run)) == "CANCELLED"
    assert run.cancel().state is State.CANCELLED


def test_a_cancelled_run_saves_its_checkpoint_in_its_grace(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    run = run_job(STOPPABLE, retries=3, resources={"grace": "10s"})
    until(lambda: "starts from None" in text_of(run), world)
    run.cancel()
    status = end_of(run, world)
    assert (status.state, status.exit_code) == (State.CANCELLED, 143)
    assert run.store().head("checkpoints/1/state") is not None
    assert slurm.state(job_of(run)) != "PENDING"
    assert starts(run) == 1


def test_cancelled_twice_it_does_not_use_up_its_grace(run_job: StartRun, world: SlurmWorld) -> None:
    run = run_job(STUBBORN, resources={"grace": "10m"})
    until_sleeping(run, world)
    assert not run.cancel().state.terminal
    begun = time.monotonic()
    run.cancel()
    status = end_of(run, world)
    assert status.state is State.CANCELLED
    assert time.monotonic() - begun < 45  # KillWait of the cluster is 10 s


def test_a_run_that_waits_for_its_next_start_is_cancelled(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    run = run_job(STOPPABLE, **secret)
    stop_early(run, world, slurm)
    until(lambda: slurm.state(job_of(run)) == "PENDING", world)
    status = run.status()
    assert status.state is State.RESTARTING
    assert run.cancel().state is State.CANCELLED
    assert secrets_left(run) == []
    assert starts(run) == 1


# -- nodes that fail --------------------------------------------------------------------------------------------------


def test_a_run_whose_node_is_put_down_goes_on(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    run = run_job(STOPPABLE)
    until(lambda: "starts from None" in text_of(run), world)
    slurm.put_down(run.status().node)
    until(lambda: run.status().state is State.RESTARTING, world)
    status = end_of(run, world)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2)


def test_a_run_whose_node_dies_goes_on_elsewhere(run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster) -> None:
    run = run_job(RESUMES)
    until(lambda: "starts from None" in text_of(run), world)
    node = run.status().node
    slurm.kill_node(node)
    slurm.put_down(node)  # as the controller would find out by itself
    status = end_of(run, world)
    assert (status.state, status.attempt, status.node != node) == (State.SUCCEEDED, 2, True)
    assert "starts from 1" in text_of(run)


RESUMES = """
    import sys, time
    from launcher.contract import Layout, complete_checkpoint, newest_checkpoint
    layout = Layout.from_environment()
    newest = newest_checkpoint(layout.checkpoints)
    if newest is None:
        step = layout.checkpoints / "1"
        step.mkdir(parents=True)
        (step / "state").write_text("half way")
        complete_checkpoint(step, step=1)
    print("starts from", newest.name if newest else None, flush=True)
    time.sleep(0 if newest else 600)
"""


def test_a_run_with_secrets_whose_node_is_put_down_says_how_to_go_on(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    """Its script could not keep them for the next start, and nobody else has them."""
    run = run_job(RESUMES, **secret)
    until(lambda: "starts from None" in text_of(run), world)
    slurm.put_down(run.status().node)
    status = end_of(run, world)
    assert status.state is State.FAILED
    assert status.reason == f"its secrets are gone; send it again: cvlaunch submit --resume {run.id}"
    again = run.resume()
    assert end_of(again, world).state is State.SUCCEEDED
    assert "starts from 1" in text_of(again)


@NOT_BACK
def test_a_run_whose_node_fails_and_may_not_go_back_names_the_node(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    run = run_job(SLEEP)
    until_sleeping(run, world)
    node = run.status().node
    slurm.put_down(node)
    status = end_of(run, world)
    assert (status.state, status.native, status.node) == (State.ERROR, "NODE_FAIL", node)
    assert status.reason == f"its node failed: {node}"
