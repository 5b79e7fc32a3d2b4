"""What the slurm backend says of runs when things go wrong, on a real cluster, beyond the suite of all backends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from launcher.testing.conformance import STOPPABLE, holders, job, ledger, own_id, run_job, text_of, until
from launcher.watch import UNSEEN_LIMIT_S
from tests.services.slurm import NODES, SlurmCluster
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


def hold_back(run: Run, cluster: SlurmCluster, *nodes: str) -> None:
    """Puts off its next start, which is due in seconds: whoever looks may take longer. Until now the nodes that could
    take it were drained."""
    cluster.wait_for_state(job_of(run), "PENDING")
    cluster.run("scontrol", "update", f"JobId={job_of(run)}", "StartTime=now+600")
    for node in nodes:
        cluster.resume(node)


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
    run = run_job(STOPPABLE, retries=3, resources={"grace": "60s"})
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
    assert time.monotonic() - begun < 300  # KillWait of the cluster is 10 s


def test_a_run_that_waits_for_its_next_start_is_cancelled(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    run = run_job(STOPPABLE, **secret)
    until(lambda: "starts from None" in text_of(run), world)
    for node in NODES:
        slurm.drain(node)
    stop_early(run, world, slurm)
    hold_back(run, slurm, *NODES)
    until(lambda: reason_of(run).startswith("waiting for its earliest start"), world)
    assert run.status().state is State.RESTARTING
    assert run.cancel().state is State.CANCELLED
    assert secrets_left(run) == []
    assert starts(run) == 1


# -- nodes that fail --------------------------------------------------------------------------------------------------


def test_a_run_whose_node_dies_goes_on_elsewhere(run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster) -> None:
    run = run_job(RESUMES)
    until(lambda: "starts from None" in text_of(run), world)
    node = run.status().node
    (other,) = set(NODES) - {node}
    slurm.drain(other)
    slurm.kill_node(node)
    slurm.put_down(node)  # as the controller would find out by itself
    hold_back(run, slurm, other)
    until(lambda: run.status().state is State.RESTARTING, world)
    slurm.run("scontrol", "update", f"JobId={job_of(run)}", "StartTime=now")
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


# -- a controller that is away ----------------------------------------------------------------------------------------

UNTIL_GO = """
    import pathlib, sys, time
    number = 0
    while not pathlib.Path({go!r}).exists():
        print("line", number, flush=True)
        number += 1
        time.sleep(0.1)
"""


def forget_all_jobs(cluster: SlurmCluster, while_away: Callable[[], object] = lambda: None) -> None:
    """As after MinJobAge, at once. Its next job gets an id that no node remembers."""
    latest = int(re.findall(r"NEXT_JOB_ID\s*=\s*(\d+)", cluster.run("scontrol", "show", "config"))[0])
    cluster.stop_controller()
    while_away()
    shutil.rmtree(cluster.folder / "state")
    (cluster.folder / "state").mkdir()
    with (cluster.folder / "slurm.conf").open("a") as file:
        file.write(f"FirstJobId={latest + 1}\n")
    cluster.start_controller()


@pytest.fixture
def world_without_accounting(tmp_path: Path, slurm_without_accounting: SlurmCluster) -> SlurmWorld:
    return SlurmWorld(tmp_path / "world", slurm_without_accounting)


def test_followed_through_a_restart_of_the_controller_no_line_is_lost(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, tmp_path: Path
) -> None:
    run = run_job(UNTIL_GO.format(go=str(tmp_path / "go")))
    seen: list[object] = []
    follower = threading.Thread(target=lambda: seen.extend(run.follow()))
    follower.start()
    until(lambda: "line 3" in text_of(run), world)
    slurm.stop_controller()
    slurm.start_controller()
    (tmp_path / "go").touch()
    follower.join(world.patience)
    assert not follower.is_alive()
    states = [item.state for item in seen if isinstance(item, Status)]
    assert states[-1] is State.SUCCEEDED
    assert set(states) <= {State.QUEUED, State.STARTING, State.RUNNING, State.FINALIZING, State.SUCCEEDED}
    numbers = [item.text for item in seen if isinstance(item, LogLine) and item.text.startswith("line ")]
    assert numbers == [f"line {number}" for number in range(len(numbers))]
    assert len(numbers) > 3


def test_a_run_that_ends_while_the_controller_is_away_has_its_end_in_its_record(
    job: Callable[..., Path],
    ledger: Ledger,
    world_without_accounting: SlurmWorld,
    slurm_without_accounting: SlurmCluster,
    tmp_path: Path,
) -> None:
    """Even if the controller has forgotten it by then, and nobody keeps accounts."""
    world, cluster = world_without_accounting, slurm_without_accounting
    run = submit(job(UNTIL_GO.format(go=str(tmp_path / "go"))), target="world", ledger=ledger)
    until(lambda: run.status().state is State.RUNNING and "line 3" in text_of(run), world)
    ends: list[Status] = []
    waiting = threading.Thread(target=lambda: ends.append(Run(run.id, ledger).wait(timeout=world.patience)))

    def while_away() -> None:
        with pytest.raises(UnreachableError, match=r"target world could not be asked: .*squeue failed"):
            run.status()
        waiting.start()
        (tmp_path / "go").touch()
        until(lambda: list(record(run).glob("status-*.json")), world)
        assert Run(run.id, ledger).record.state is State.RUNNING

    forget_all_jobs(cluster, while_away)
    waiting.join(world.patience)
    assert [(status.state, status.exit_code, status.reason) for status in ends] == [(State.SUCCEEDED, 0, "")]


# -- the time limit, and how often it starts --------------------------------------------------------------------------


@target(time="2m")
def test_a_time_that_leaves_none_to_train_is_refused(run_job: StartRun, world: SlurmWorld, ledger: Ledger) -> None:
    with pytest.raises(SpecError, match="2m leaves no time to train: the job's grace needs 2m 10s of it"):
        run_job(SLEEP, resources={"grace": "10s"})
    assert ledger.ids() == []


def test_a_run_at_its_time_limit_goes_on_in_its_next_start(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    script = f"import os; print('token', len(os.environ['TOKEN']))\n{textwrap.dedent(STOPPABLE)}"
    run = run_job(script, resources={"grace": "20s"}, **secret)
    until(lambda: "starts from None" in text_of(run), world)
    assert secrets_left(run) == []
    limit_time(run, slurm, minutes_left=1)  # its warning is due 80 s before that
    until(lambda: " Restarts=1 " in slurm.run("scontrol", "-o", "show", "job", job_of(run)), world)
    limit_time(run, slurm, minutes_left=60)
    status = end_of(run, world)
    assert (status.state, status.attempt, status.exit_code) == (State.SUCCEEDED, 2, 0)
    assert "starts from 1" in text_of(run)
    assert text_of(run).count(f"token {len(TOKEN)}") == 2
    assert secrets_left(run) == []


def limit_time(run: Run, cluster: SlurmCluster, *, minutes_left: int) -> None:
    """At least 30 s of the first minute are left: that long SLURM may take to look at the time."""
    facts = cluster.run("scontrol", "-o", "show", "job", job_of(run))
    (runs_for,) = re.findall(r" RunTime=00:(\d\d):(\d\d) ", facts)
    minutes, seconds = map(int, runs_for)
    limit = minutes + (seconds >= 30) + minutes_left
    cluster.run("scontrol", "update", f"JobId={job_of(run)}", f"TimeLimit={limit}")


def test_after_its_last_attempt_it_does_not_go_back(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    run = run_job(STOPPABLE, max_attempts=1, **secret)
    stop_early(run, world, slurm)
    status = end_of(run, world)
    assert (status.state, status.exit_code) == (State.FAILED, 75)
    assert status.reason.startswith("preempted with a checkpoint, and not put back into the queue: max_attempts")
    assert slurm.state(job_of(run)) == "FAILED"
    assert secrets_left(run) == []


@NOT_BACK
def test_a_site_that_lets_nothing_go_back_keeps_the_checkpoint(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    run = run_job(STOPPABLE, **secret)
    stop_early(run, world, slurm)
    status = end_of(run, world)
    assert (status.state, status.exit_code) == (State.FAILED, 75)
    assert status.reason.startswith("preempted with a checkpoint, and not put back into the queue")
    assert secrets_left(run) == []
    again = run.resume()
    assert end_of(again, world).state is State.SUCCEEDED
    assert "starts from 1" in text_of(again)


# -- killed -----------------------------------------------------------------------------------------------------------


def processes_of(run: Run) -> dict[str, int]:
    """What a job consists of → its process: `script`, `srun`, `runner`."""
    found: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if f"SLURM_JOB_ID={job_of(run)}" not in environ or f"SLURM_JOB_NAME={run.id}" not in environ:
                continue
            if "".join(words[-2:-1]).endswith("slurm_script"):
                found.setdefault("script", int(folder.name))
            elif words[0] == "srun":
                found.setdefault("srun", int(folder.name))
            elif words[1:3] == ["-m", "launcher.runner"]:
                found.setdefault("runner", int(folder.name))
    return found


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("script", "its script was killed by signal 9 (Killed)"),
        ("srun", "the runner or srun was killed by signal 9 (Killed)"),
        ("runner", "the runner or srun was killed by signal 9 (Killed)"),
    ],
)
def test_whatever_of_it_is_killed_it_has_not_succeeded(
    who: str, reason: str, run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    run = run_job(SLEEP)
    until_sleeping(run, world)
    os.kill(processes_of(run)[who], signal.SIGKILL)
    status = end_of(run, world)
    assert (status.state, status.reason) == (State.FAILED, reason)


def test_what_nobody_knows_any_more_is_lost_after_a_while(
    job: Callable[..., Path],
    ledger: Ledger,
    world_without_accounting: SlurmWorld,
    slurm_without_accounting: SlurmCluster,
) -> None:
    """Its script was killed, the controller has forgotten it, and nobody keeps accounts."""
    run = submit(job(SLEEP), target="world", ledger=ledger)
    until_sleeping(run, world_without_accounting)
    os.kill(processes_of(run)["script"], signal.SIGKILL)
    slurm_without_accounting.wait_for_state(job_of(run), "FAILED")
    forget_all_jobs(slurm_without_accounting)
    status = run.status()
    assert (status.state, status.native) == (State.UNKNOWN, "gone")
    later = time.time() + UNSEEN_LIMIT_S + 1
    assert refresh([run.record], ledger=ledger, now=lambda: later) == []
    lost = Run(run.id, ledger).record
    assert (lost.state, "it left no word in its record" in lost.last_status.reason) == (State.LOST, True)


@pytest.mark.parametrize("script", [SLEEP, "print('sleeping')"], ids=["running", "ended"])
def test_an_id_that_is_another_job_s_by_now_is_not_asked_and_not_cancelled(
    script: str, run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    run, other = run_job(SLEEP), run_job(script)
    for each in (run, other):
        until_sleeping(each, world)
    other.status() if script == SLEEP else end_of(other, world)
    reused = Handle("slurm", "world", f"{job_of(other)}.{run.id}")
    backend = backend_of(run.record)
    assert backend.status([reused])[reused].state is State.UNKNOWN
    (record(other) / f"status-{job_of(other)}.json").unlink(missing_ok=True)
    backend.cancel(reused)
    assert other.status().state is (State.RUNNING if script == SLEEP else State.SUCCEEDED)


# -- why it waits -----------------------------------------------------------------------------------------------------


def reason_of(run: Run) -> str:
    return run.status().reason


def test_a_run_that_waits_for_others_says_so_and_when_it_may_start(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    other = slurm.submit("sleep 600", "--exclusive", "--nodes=2", "--time=10")
    slurm.wait_for_state(other, "RUNNING")
    first, second = run_job(SLEEP), run_job(SLEEP)
    expected = r"waiting for resources; SLURM expects to start it in (10m|[1-9]m \d\ds)( 00s)?"
    until(lambda: re.fullmatch(expected, reason_of(first)), world)
    until(lambda: reason_of(second).startswith("waiting for priority: other jobs come first"), world)
    assert first.status().state is State.QUEUED


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        ({"sbatch": ["--partition=short", "--time=10"]},
         "will never start: it asks for more time than the partition gives (PartitionTimeLimit)"),
        ({"sbatch": ["--nodelist=node2"]}, "a node that it needs is not available: down, drained or reserved"),
    ],
    indirect=["world"],
    ids=["partition", "node"],
)  # fmt: skip
def test_a_run_that_can_t_start_says_why(
    reason: str, run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster
) -> None:
    slurm.drain("node2")
    run = run_job(SLEEP)
    until(lambda: reason_of(run) == reason, world)  # its first word for the partition's is another
    assert run.status().state is State.QUEUED


@target(partition="main", account="vision", qos="limited")
def test_a_run_that_a_qos_keeps_waiting_says_so(run_job: StartRun, world: SlurmWorld) -> None:
    first, second = (run_job(SLEEP, resources={"gpus": 1}) for _ in range(2))
    until_sleeping(first, world)
    until(lambda: re.search("QOS.*GPU", reason_of(second)), world)


# -- submitted once ---------------------------------------------------------------------------------------------------


def jobs_named(run_id: str, cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "-h", "-t", "all", "--name", run_id, "-o", "%i").split()


@pytest.fixture
def sbatch_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a bash script in front of sbatch, in which $SBATCH is the real one; returns it, to be removed."""

    def make(script: str) -> Path:
        programs = tmp_path / "programs"
        programs.mkdir()
        file = programs / "sbatch"
        file.write_text(f"#!/bin/bash\nSBATCH={shutil.which('sbatch')}\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return file

    return make


@pytest.mark.parametrize(
    "script",
    [
        '"$SBATCH" "$@" > /dev/null; kill -KILL 0',
        '"$SBATCH" "$@" > /dev/null; echo "sbatch: error: Batch job submission failed: Socket timed out on '
        'send/recv operation" >&2; exit 1',
    ],
    ids=["cut", "timed out"],
)
@HELD
def test_a_job_that_arrived_though_nobody_heard_of_it_is_adopted(
    script: str,
    run_job: StartRun,
    world: SlurmWorld,
    slurm: SlurmCluster,
    ledger: Ledger,
    sbatch_that: Callable[[str], Path],
    secret: dict[str, Any],
) -> None:
    wrapper, run_id = sbatch_that(script), own_id("doubt")
    with pytest.raises(UnreachableError, match=f"whether {run_id} was submitted is not known"):
        run_job(SLEEP, run_id=run_id, **secret)
    wrapper.unlink()
    run = Run(run_id, ledger)
    assert (run.record.state, run.handle) == (State.SENDING, None)
    with pytest.raises(SpecError, match="is QUEUED and needs no resuming"):
        run.resume()
    run = Run(run_id, ledger)
    assert run.status().state is State.QUEUED
    assert [job_of(run)] == jobs_named(run.id, slurm)
    assert secrets_left(run), "it will need them"
    slurm.run("scontrol", "release", job_of(run))
    until_sleeping(run, world)
    run.cancel()
    assert end_of(run, world).state is State.CANCELLED


def test_a_job_that_did_not_arrive_is_sent_by_resume_and_only_once(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, ledger: Ledger, sbatch_that: Callable[[str], Path]
) -> None:
    wrapper = sbatch_that("kill -KILL 0")
    with pytest.raises(UnreachableError):
        run_job("print('hello')", run_id="promise-cut")
    wrapper.unlink()
    run = Run("promise-cut", ledger)
    assert run.status().state is State.SENDING
    later = time.time() + 61
    refresh([run.record], ledger=ledger, now=lambda: later)
    run = Run("promise-cut", ledger)
    assert (run.record.state, jobs_named(run.id, slurm)) == (State.NOT_SUBMITTED, [])
    again = run.resume()
    assert end_of(again, world).state is State.SUCCEEDED
    assert len(jobs_named(run.id, slurm)) == 1


def test_two_who_submit_the_same_at_once_have_one_job(
    job: Callable[..., Path], world: SlurmWorld, slurm: SlurmCluster, tmp_path: Path
) -> None:
    """With a ledger each, as on two machines."""
    path = job(SLEEP)
    ledgers = [Ledger(tmp_path / f"ledger-{number}", tmp_path / "cache") for number in range(3)]
    with ThreadPoolExecutor() as pool:
        sent = [
            pool.submit(submit, path, target="world", run_id="promise-twice", ledger=ledger)
            for ledger in [*ledgers, ledgers[0]]
        ]
    failed = [type(each.exception()) for each in sent if each.exception()]
    assert failed == [ConflictError]
    runs = [each.result() for each in sent if not each.exception()]
    assert {job_of(run) for run in runs} == set(jobs_named("promise-twice", slurm))
    assert len(jobs_named("promise-twice", slurm)) == 1
    until_sleeping(runs[0], world)
    runs[0].cancel()
    assert end_of(runs[1], world).state is State.CANCELLED


# -- secrets, exec, logs ----------------------------------------------------------------------------------------------


def test_secrets_are_in_no_place_where_others_look(
    run_job: StartRun, world: SlurmWorld, slurm: SlurmCluster, secret: dict[str, Any], tmp_path: Path
) -> None:
    run = run_job(SLEEP, **secret)
    until_sleeping(run, world)
    slurm.run("scontrol", "write", "batch_script", job_of(run), tmp_path / "copy")
    for text in (slurm.run("scontrol", "show", "job", "-d", job_of(run)), (tmp_path / "copy").read_text()):
        assert job_of(run) in text or run.id in text
        assert TOKEN not in text
    assert [pid for pid, words in holders(TOKEN).items() if TOKEN in words] == []
    assert secrets_left(run) == []


def test_a_command_beside_a_run_has_its_variables_and_its_folder(
    run_job: StartRun, world: SlurmWorld, tmp_path: Path
) -> None:
    run = run_job("import os, time; print(os.getcwd()); print('sleeping', flush=True); time.sleep(600)")
    until_sleeping(run, world)
    out = tmp_path / "out"
    code = f"import os; open({str(out)!r}, 'w').write(os.environ['CVLAUNCH_RUN_ID'] + ' ' + os.getcwd()); exit(7)"
    assert run.exec(["python3", "-c", code], tty=False) == 7
    run_id, folder = out.read_text().split()
    assert run_id == run.id
    assert folder in text_of(run).splitlines()


@HELD
def test_no_command_runs_beside_a_run_that_waits(run_job: StartRun, world: SlurmWorld) -> None:
    run = run_job(SLEEP)
    with pytest.raises(SpecError, match="is QUEUED; a command runs only beside a run that is going on"):
        run.exec(["true"], tty=False)


@pytest.mark.parametrize(
    ("world", "code", "reason"),
    [
        ({"setup": ["echo before", "false"]}, 64, "this line of the target's `setup` failed: false"),
        ({"modules": ["nothing/1.0"]}, 64, "no module nothing/1.0"),
        ({"python": shutil.which("false")}, 1, "srun: error: node1: task 0: Exited with exit code 1"),
    ],
    indirect=["world"],
    ids=["setup", "module", "python"],
)
def test_what_ends_before_the_runner_shows_what_slurm_printed(
    code: int, reason: str, run_job: StartRun, world: SlurmWorld
) -> None:
    run = run_job("print('never')")
    status = end_of(run, world)
    assert (status.state, status.exit_code, status.reason) == (State.FAILED, code, reason)
    lines = [line.text for line in run.logs(follow=True)]
    assert any(reason in line for line in lines)
    again = list(run.logs(since=next(iter(run.logs())).cursor))
    assert [line.text for line in again] == lines[1:]


def test_lines_of_two_nodes_say_which(run_job: StartRun, world: SlurmWorld) -> None:
    run = run_job("import os; print('hello from', os.environ['CVLAUNCH_NODE_RANK'])", resources={"nodes": 2})
    assert end_of(run, world).state is State.SUCCEEDED
    said = {(line.node, line.text) for line in run.logs() if line.text.startswith("hello")}
    assert said == {(0, "hello from 0"), (1, "hello from 1")}
