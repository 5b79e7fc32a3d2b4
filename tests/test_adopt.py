"""`attach`: scripts that were sent by hand, taken in as runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from launcher import ConflictError, SpecError, State, UnsupportedError, attach, submit
from launcher.ledger import Ledger
from tests.cli_tool import cli
from tests.services.slurm import SlurmCluster
from tests.worlds.slurm import SlurmWorld

pytestmark = pytest.mark.needs("slurm")


@pytest.fixture
def project(tmp_path: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job and a target, in the current folder."""
    world = SlurmWorld(tmp_path / "world", slurm)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"hpc": {**world.target}}}))
    job = {
        "name": "by hand",
        "command": [world.python(), "-c", "print('sent by hand')"],
        "resources": {"timeout": "1h"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.chdir(folder)
    return folder


def sent_by_hand(project: Path, run_id: str, *options: str) -> str:
    """SLURM's id."""
    script = cli("render", "job.yaml", "--target", "hpc", "--run-id", run_id, cwd=project)
    assert script.returncode == 0, script.stderr
    (project / "job.sh").write_text(script.stdout)
    sent = subprocess.run(
        ["sbatch", "--parsable", *options, "job.sh"], cwd=project, capture_output=True, text=True, check=True
    )
    return sent.stdout.strip()


def test_a_script_sent_by_hand_is_a_run_like_any_other(project: Path, slurm: SlurmCluster, tmp_path: Path) -> None:
    native = sent_by_hand(project, "by-hand-1")
    slurm.wait_for_state(native, "COMPLETED")
    done = cli("attach", native, "--target", "hpc", cwd=project)
    assert (done.returncode, done.stdout) == (0, f"slurm://hpc/{native}.by-hand-1\n"), done.stderr
    run = attach("by-hand-1", target="hpc")
    assert run.status().state is State.SUCCEEDED
    assert "sent by hand" in [line.text for line in run.logs()]
    assert (run.sync(tmp_path / "home").path / "output/result.json").exists()
    assert cli("status", f"slurm://hpc/{native}", cwd=project).returncode == 0
    again = run.rerun()
    assert run.diff(again).identical
    assert again.wait(timeout=60).state is State.SUCCEEDED


def test_a_job_that_waits_is_taken_in_and_cancelled(project: Path, slurm: SlurmCluster) -> None:
    native = sent_by_hand(project, "by-hand-2", "--hold")
    run = attach("by-hand-2", target="hpc")
    assert str(run.handle) == f"slurm://hpc/{native}.by-hand-2"
    status = run.status()
    assert (status.state, "held" in status.reason) == (State.QUEUED, True)
    run.cancel()
    assert run.wait(timeout=60).state is State.CANCELLED


def test_a_colleague_s_run_needs_no_ledger_of_ours(project: Path, tmp_path: Path) -> None:
    theirs = submit("job.yaml", target="hpc", ledger=Ledger(tmp_path / "theirs", tmp_path / "cache"))
    assert theirs.wait(timeout=60).state is State.SUCCEEDED
    ours = attach(theirs.id, target="hpc")
    assert (ours.handle, ours.status().state) == (theirs.handle, State.SUCCEEDED)
    assert ours.record.plan["job_digest"] == theirs.record.plan["job_digest"]


def test_what_can_t_be_taken_in_is_told(project: Path, slurm: SlurmCluster) -> None:
    for name in ("99999", "nobody-1", "../../etc"):
        with pytest.raises(SpecError, match=f"no job '{name}'"):
            attach(name, target="hpc")
    foreign = slurm.submit("#!/bin/bash\ntrue\n", "--output=/dev/null")
    with pytest.raises(SpecError, match="holds no job of cvlaunch"):
        attach(str(foreign), target="hpc")
    with pytest.raises(UnsupportedError, match="see: cvlaunch runs"):
        attach("by-hand-1", target="local")


def test_another_run_of_the_same_id_is_not_overwritten(project: Path, slurm: SlurmCluster, tmp_path: Path) -> None:
    ours = submit("job.yaml", target="hpc", run_id="by-hand-3")
    assert ours.wait(timeout=60).state is State.SUCCEEDED
    elsewhere = SlurmWorld(tmp_path / "elsewhere", slurm)
    (project / "targets.yaml").write_text(yaml.safe_dump({"targets": {"hpc": {**elsewhere.target}}}))
    native = sent_by_hand(project, "by-hand-3")
    slurm.wait_for_state(native, "COMPLETED")
    with pytest.raises(ConflictError, match="there is a run 'by-hand-3' already"):
        attach("by-hand-3", target="hpc")


def test_rendering_says_what_has_to_be_there_first(project: Path) -> None:
    (project / "train.py").write_text("print('hello')\n")
    done = cli("render", "job.yaml", "--target", "hpc", "--set", "code.root=.", cwd=project)
    assert "input/code.tar.gz has to be in file://" in done.stderr
