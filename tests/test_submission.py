"""Exactly once: many at a time, killed at any moment, sent again by force."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launcher import Run, State, submit
from launcher.errors import AuthError, CapacityError, CvlaunchError, SpecError, UnreachableError
from launcher.ledger import Ledger
from launcher.process import ProcessId
from launcher.run import refresh
from launcher.supervisor import SupervisorFolder, start
from tests.doubtful import install

SUBMIT = """
import sys
from launcher import submit
for _ in range(int(sys.argv[2])):
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
    deadline = time.monotonic() + 600
    while not all(ledger.get(run_id).state.terminal for run_id in ledger.ids()):
        assert time.monotonic() < deadline
        refresh(ledger.all(), ledger=ledger)
        time.sleep(0.2)


def test_200_submissions_from_8_processes(project: Path, ledger: Ledger) -> None:
    processes = [submitting(project, 25) for _ in range(8)]
    printed = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0] * 8
    assert len(set(printed)) == 200
    assert sorted(printed) == ledger.ids()
    settle(ledger)
    assert {ledger.get(run_id).state for run_id in printed} == {State.SUCCEEDED}
    assert len(list((project / "marks").iterdir())) == 200


def once(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Waits, as finely as Python can, until it is so, or until the process has ended."""
    while not condition() and process.poll() is None:
        pass


def newest(ledger: Ledger, before: list[str]) -> str | None:
    return next((run_id for run_id in ledger.ids() if run_id not in before), None)


def in_state(ledger: Ledger, before: list[str], state: State) -> bool:
    run_id = newest(ledger, before)
    return run_id is not None and ledger.get(run_id).state is state


def killed_submission(project: Path, ledger: Ledger, moment: int) -> State | None:
    """`cvlaunch submit`, killed; the state in which it left its run."""
    before = ledger.ids()
    local = project / "local"
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "submit", str(project / "job.yaml"), "--target", "desk"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    moments: list[Callable[[], object]] = [
        lambda: time.sleep(0.05 * moment) or True,
        lambda: newest(ledger, before),
        lambda: in_state(ledger, before, State.SENDING),
        lambda: (run_id := newest(ledger, before)) and (local / run_id / "plan.json").exists(),
        lambda: (run_id := newest(ledger, before)) and (local / run_id / "supervisor.json").exists(),
    ]
    once(moments[moment % len(moments)], process)
    process.kill()
    process.wait()
    run_id = newest(ledger, before)
    return ledger.get(run_id).state if run_id else None


def test_killed_at_20_moments(project: Path, ledger: Ledger) -> None:
    left = [killed_submission(project, ledger, moment) for moment in range(20)]
    for moment, state in ((1, State.PREPARING), (2, State.SENDING)):
        while state not in left:  # on a busy machine some come too late
            assert len(left) < 100
            left.append(killed_submission(project, ledger, moment))
    settle(ledger)
    states = [ledger.get(run_id).state for run_id in ledger.ids()]
    assert set(states) == {State.SUCCEEDED, State.NOT_SUBMITTED}
    started = {folder.name for folder in (project / "local").iterdir() if SupervisorFolder(folder).record()}
    assert started == {run_id for run_id in ledger.ids() if ledger.get(run_id).state is State.SUCCEEDED}
    assert len(list((project / "marks").iterdir())) == len(started)


@pytest.fixture
def doubtful(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A project whose target fails as it is told to."""
    install(project / "site")
    monkeypatch.syspath_prepend(str(project / "site"))

    def write(**keys: object) -> Path:
        target = {"backend": "doubtful", "output": str(project / "output"), "root": str(project / "local"), **keys}
        (project / "targets.yaml").write_text(yaml.safe_dump({"targets": {"desk": target}}))
        return project / "job.yaml"

    return write


@pytest.mark.parametrize("error", ["unreachable", "reset", "interrupted"])
@pytest.mark.parametrize("arrives", [True, False], ids=["arrives", "is lost"])
def test_in_doubt_nothing_is_sent_again(
    doubtful: Callable[..., Path], project: Path, ledger: Ledger, error: str, arrives: bool
) -> None:
    job = doubtful(error=error, arrives=arrives)
    with pytest.raises((UnreachableError, KeyboardInterrupt)):
        submit(job, target="desk", ledger=ledger)
    (run_id,) = ledger.ids()
    assert ledger.get(run_id).state is State.SENDING
    if arrives:
        assert Run(run_id, ledger).wait(timeout=60).state is State.SUCCEEDED
    else:
        assert Run(run_id, ledger).status().state is State.SENDING
        seen = ledger.get(run_id).unseen_since
        assert seen is not None
        refresh([ledger.get(run_id)], ledger=ledger, now=lambda: seen + 299)
        assert ledger.get(run_id).state is State.SENDING
        refresh([ledger.get(run_id)], ledger=ledger, now=lambda: seen + 301)
        assert ledger.get(run_id).state is State.NOT_SUBMITTED
    assert len(list((project / "marks").iterdir())) == int(arrives)


@pytest.mark.parametrize("error", ["no room", "no identity"])
def test_a_refusal_is_no_doubt(doubtful: Callable[..., Path], project: Path, ledger: Ledger, error: str) -> None:
    job = doubtful(error=error)
    with pytest.raises((CapacityError, AuthError)) as refused:
        submit(job, target="desk", ledger=ledger)
    (record,) = ledger.all()
    assert (record.state, record.status["reason"]) == (State.NOT_SUBMITTED, str(refused.value))
    assert list((project / "marks").iterdir()) == []


def test_cancelled_in_doubt_it_does_not_run_when_it_appears(
    doubtful: Callable[..., Path], project: Path, ledger: Ledger
) -> None:
    job = doubtful(error="unreachable")
    with pytest.raises(UnreachableError):
        submit(job, target="desk", ledger=ledger)
    (run_id,) = ledger.ids()
    assert Run(run_id, ledger).cancel().state is State.SENDING
    record = ledger.get(run_id)
    start(SupervisorFolder(project / "local" / run_id), record.plan["text"], {})
    assert Run(run_id, ledger).wait(timeout=60).state is State.CANCELLED
    assert list((project / "marks").iterdir()) == []


def test_files_that_can_t_be_stored_leave_nothing_sent(project: Path, ledger: Ledger) -> None:
    (project / "src").mkdir()
    (project / "src/train.py").touch()
    (project / "output").write_text("a file in the way")
    with pytest.raises((CvlaunchError, OSError)):
        submit(project / "job.yaml", target="desk", settings=["code.root=src"], ledger=ledger)
    (record,) = ledger.all()
    assert record.state is State.NOT_SUBMITTED


def test_two_resumes_at_once_send_it_once(project: Path, ledger: Ledger) -> None:
    run = submit(project / "job.yaml", target="desk", ledger=ledger)
    run.wait(timeout=60)
    ledger.update(run.id, state=State.LOST)
    command = [sys.executable, "-m", "launcher.cli", "submit", "--resume", run.id]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair].count(0) == 1, answers
    Run(run.id, ledger).wait(timeout=60)
    assert len(list((project / "marks").iterdir())) == 2


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
    for claim in Path(run.store().local_path() or "").glob("owner*"):
        claim.unlink()
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
