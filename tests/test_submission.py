"""Exactly once: many at a time, killed at any moment, sent again by force."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher import Run, State, submit
from launcher.errors import AuthError, SpecError
from launcher.ledger import Ledger
from launcher.process import ProcessId
from launcher.run import refresh
from launcher.supervisor import SupervisorFolder

SUBMIT = """
import sys
from launcher import submit
for _ in range(int(sys.argv[2])):
    print("ready", flush=True)
    print(submit(sys.argv[1], target="desk").id, flush=True)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose job leaves a mark for each start."""
    (tmp_path / "marks").mkdir()
    target = {"backend": "local", "output": str(tmp_path / "output"), "root": str(tmp_path / "local")}
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"desk": target}}))
    mark = ["mktemp", f"{tmp_path}/marks/ran-XXXXXXXX"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "once", "command": mark}))
    return tmp_path


@pytest.fixture
def ledger(project: Path) -> Iterator[Ledger]:
    """The user's own, because other processes submit, too; the test ends when all runs have."""
    ledger = Ledger()
    yield ledger
    for run_id in ledger.ids():
        if not ledger.get(run_id).state.terminal:
            Run(run_id, ledger).cancel()


def submitting(project: Path, times: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SUBMIT, str(project / "job.yaml"), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def settle(ledger: Ledger) -> None:
    """Until every run has ended, asking as `cvlaunch runs` does."""
    deadline = time.monotonic() + 120
    while not all(ledger.get(run_id).state.terminal for run_id in ledger.ids()):
        assert time.monotonic() < deadline
        refresh(ledger.all(), ledger=ledger)
        time.sleep(0.2)


def test_200_submissions_from_8_processes(project: Path, ledger: Ledger) -> None:
    processes = [submitting(project, 25) for _ in range(8)]
    printed = [line for process in processes for line in process.communicate()[0].split() if line != "ready"]
    assert [process.returncode for process in processes] == [0] * 8
    assert len(set(printed)) == 200
    assert sorted(printed) == ledger.ids()
    settle(ledger)
    assert {ledger.get(run_id).state for run_id in printed} == {State.SUCCEEDED}
    assert len(list((project / "marks").iterdir())) == 200


def test_killed_at_20_moments(project: Path, ledger: Ledger) -> None:
    process = submitting(project)
    assert process.stdout is not None
    process.stdout.readline()
    start = time.monotonic()
    process.stdout.readline()
    whole = time.monotonic() - start
    process.communicate()
    for moment in range(20):
        process = submitting(project)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(whole * moment / 18)
        process.kill()
        process.communicate()
    settle(ledger)
    states = [ledger.get(run_id).state for run_id in ledger.ids()]
    assert set(states) <= {State.SUCCEEDED, State.NOT_SUBMITTED}
    assert State.SUCCEEDED in states
    started = {folder.name for folder in (project / "local").iterdir() if SupervisorFolder(folder).record()}
    assert started == {run_id for run_id in ledger.ids() if ledger.get(run_id).state is State.SUCCEEDED}
    assert len(list((project / "marks").iterdir())) == len(started)


def cut_off(ledger: Ledger, run_id: str, state: State) -> None:
    """As if the submitting process had died in this state."""
    dead = subprocess.Popen(["true"])
    owner = ProcessId.of(dead.pid).to_json()
    dead.wait()
    ledger.update(run_id, state=state, handle=None, status={}, owner=owner)


def test_a_submission_that_arrived_is_adopted(project: Path, ledger: Ledger) -> None:
    run = submit(project / "job.yaml", target="desk", ledger=ledger)
    cut_off(ledger, run.id, State.SENDING)
    assert run.wait(timeout=60).state is State.SUCCEEDED
    assert str(run.handle) == f"local://desk/{run.id}"


@pytest.mark.parametrize("state", [State.PREPARING, State.SENDING])
def test_a_submission_that_did_not_arrive_is_sent_by_resume_alone(project: Path, ledger: Ledger, state: State) -> None:
    run = submit(project / "job.yaml", target="desk", ledger=ledger)
    run.wait(timeout=60)
    run._open_backend().remove(run.handle)  # type: ignore[arg-type]
    (Path(run.store().local_path() or "") / "owner").unlink()
    cut_off(ledger, run.id, state)
    assert Run(run.id, ledger).status().state is State.NOT_SUBMITTED
    assert Run(run.id, ledger).resume().wait(timeout=60).state is State.SUCCEEDED
    assert len(list((project / "marks").iterdir())) == 2


def test_a_living_owner_is_left_alone(project: Path, ledger: Ledger) -> None:
    run = submit(project / "job.yaml", target="desk", ledger=ledger)
    run.wait(timeout=60)
    ledger.update(run.id, state=State.SENDING, handle=None, owner=ProcessId.of().to_json())
    assert Run(run.id, ledger).status().state is State.SENDING
    with pytest.raises(SpecError, match="needs no resuming"):
        Run(run.id, ledger).resume()
    ledger.update(run.id, state=State.SUCCEEDED)


def test_a_run_that_succeeded_is_not_resumed(project: Path, ledger: Ledger) -> None:
    run = submit(project / "job.yaml", target="desk", ledger=ledger)
    run.wait(timeout=60)
    with pytest.raises(SpecError, match="is SUCCEEDED and needs no resuming"):
        run.resume()


def test_a_refused_submission_says_why_and_leaves_no_run_going(project: Path, ledger: Ledger) -> None:
    with pytest.raises(SpecError, match="this machine has"):
        submit(project / "job.yaml", target="desk", settings=["resources.gpus=64"], ledger=ledger)
    assert ledger.ids() == []


def test_a_secret_that_others_can_read_is_refused(project: Path, ledger: Ledger) -> None:
    token = project / "token"
    token.write_text("x")
    token.chmod(0o644)
    with pytest.raises(AuthError, match="chmod 600"):
        submit(project / "job.yaml", target="desk", settings=[f"secrets.TOKEN=file:{token}"], ledger=ledger)
    assert ledger.ids() == []
