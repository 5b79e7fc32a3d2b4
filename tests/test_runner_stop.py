"""Stops: by signal, by mark, in every phase, within the grace time."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from launcher.contract import Channel
from tests.runner_world import RunnerWorld, python, until

OBEDIENT = """
def stop(*_):
    print("told:", json.loads(ml.stop.read_text())["reason"], flush=True)
    checkpoint(2); leave(75); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
ready()
time.sleep(60)
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)"


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_preempts_with_a_checkpoint(world: RunnerWorld, number: int) -> None:
    ended = world.start(world.job(python(OBEDIENT))).printed("ready").signal(number).end()
    assert ended.code == 75 and "told: preempted" in ended.output and ended.seconds < 30
    assert world.result["state"] == "PREEMPTED"


def test_signal_with_the_mark_cancels(world: RunnerWorld) -> None:
    running = world.start(world.job(python(OBEDIENT), retries=3)).printed("ready")
    (world.run / "control").mkdir()
    (world.run / "control/cancel").touch()
    assert running.signal().end().code == 143
    assert world.result["state"] == "CANCELLED"


def test_mark_alone_cancels_and_nothing_starts_again(world: RunnerWorld) -> None:
    running = world.start(world.job(python(OBEDIENT), retries=3)).printed("ready")
    (world.run / "control").mkdir()
    (world.run / "control/cancel").touch()
    ended = running.end()
    assert ended.code == 143 and "told: cancelled" in ended.output
    again = world.end(world.job(python("print('it ran')")), env={"CVLAUNCH_ATTEMPT": "2"})
    assert again.code == 143 and "it ran" not in again.output


def test_command_without_a_checkpoint_keeps_its_code(world: RunnerWorld) -> None:
    ended = world.start(world.job(python("ready(); time.sleep(60)"), retries=3)).printed("ready").signal().end()
    assert ended.code == 143 and world.result["state"] == "PREEMPTED" and world.result["restarts"] == 0


SLEEP = "ready(); time.sleep(60)"


@pytest.mark.parametrize(
    ("program", "cancel", "timeout", "code", "state", "own"),
    [
        (SLEEP, False, None, 75, "PREEMPTED", 143),
        (OBEDIENT, False, None, 75, "PREEMPTED", 75),
        (SLEEP, True, None, 143, "CANCELLED", 143),
        (SLEEP, False, 1.0, 1, "TIMED_OUT", 1),
        ("ready(); sys.exit(143)", False, None, 143, "FAILED", 143),
        ("ready(); sys.exit(255)", False, None, 1, "FAILED", 255),
    ],
)
def test_code_for_a_platform_that_goes_by_codes(
    world: RunnerWorld, program: str, cancel: bool, timeout: float | None, code: int, state: str, own: int
) -> None:
    """What is taken away is to be started again, with a checkpoint or without; our accounts have the command's code."""
    word = world.folder / "word"
    job = world.job(python(program), timeout_s=timeout)
    running = world.start(job, env={"CVLAUNCH_TERMINATION": str(word)})
    if cancel:
        running.printed("ready")
        (world.run / "control").mkdir()
        (world.run / "control/cancel").touch()
    elif state == "PREEMPTED":
        running.printed("ready").signal()
    assert running.end().code == code
    said = json.loads(word.read_text())
    assert (said["state"], said["exit_code"], world.result["exit_code"]) == (state, own, own)


def test_command_that_ignores_term_is_killed_within_its_share(world: RunnerWorld) -> None:
    ended = world.start(world.job(python(STUBBORN), grace_s=25)).printed("ready").signal().end()
    assert ended.code == 137 and 15 <= ended.seconds < 25
    assert world.result["state"] == "PREEMPTED"


def test_no_grandchild_survives(world: RunnerWorld) -> None:
    """A shell dies of TERM and leaves its program behind, which gets TERM of its own and then KILL."""
    program = python(f"Path(ml.output / 'pid').write_text(str(os.getpid())); {STUBBORN}")
    world.folder.mkdir(exist_ok=True)
    script = world.folder / "program.py"
    script.write_text(program[2])
    command = ("sh", "-c", f"{program[0]} {script}; true")
    world.start(world.job(command, grace_s=2)).printed("ready").signal().end()
    pid = int(world.read("output/pid"))
    until(lambda: not _alive(pid))


def test_what_a_finished_command_leaves_behind_does_not_hold_the_run(world: RunnerWorld) -> None:
    ended = world.end(world.job(("sh", "-c", "sleep 600 & echo $!; exit 3")))
    assert ended.code == 3 and ended.seconds < 60
    pid = next(int(line) for line in ended.output.splitlines() if line.isdigit())
    until(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_term_during_the_back_off(world: RunnerWorld) -> None:
    running = world.start(world.job(python("sys.exit(9)"), retries=9)).printed("restart 4 of 9")
    ended = running.signal().end()
    assert ended.seconds < 6 and world.result["state"] == "PREEMPTED" and world.result["restarts"] == 4


@pytest.mark.needs("linux")
def test_term_while_the_preparation_hangs(tmp_path: Path) -> None:
    """A pipe that nobody writes to stands for a store that does not answer."""
    world = RunnerWorld(tmp_path)
    pipe = tmp_path / "secrets"
    os.mkfifo(pipe, 0o600)
    job = world.job(python("print('ran')"), secrets={"TOKEN": "file:token"})
    running = world.start(job, env={"CVLAUNCH_SECRETS_FILE": str(pipe)}).printed("attempt 1")
    ended = running.signal().end()
    assert ended.code == 75 and ended.seconds < 30 and "ran" not in ended.output
    assert world.result["state"] == "PREEMPTED"


def test_term_between_any_two_steps(tmp_path: Path) -> None:
    """Wherever it comes, the runner ends soon and says 75, or 143 where the command had no time to save."""
    for number, delay in enumerate((0.2, 0.35, 0.5)):
        world = RunnerWorld(tmp_path / str(number))
        running = world.start(world.job(python("time.sleep(60)")))
        threading.Event().wait(delay)
        ended = running.signal().end()
        assert ended.seconds < 30 and ended.code in (75, 143, -signal.SIGTERM), ended
        if ended.code == -signal.SIGTERM:  # Python itself was still starting
            assert not (world.run / "owner").exists()
        elif (world.run / "output/result.json").exists():
            assert world.result["state"] == "PREEMPTED"


def test_stop_file_of_an_earlier_attempt_is_gone(world: RunnerWorld) -> None:
    job = world.job(python("ready() if not ml.stop.exists() else print('stale'); time.sleep(60)"))
    world.start(job).printed("ready").signal().end()
    assert json.loads(world.read("input/control/stop")) == {"reason": "preempted"}
    world.start(job, env={"CVLAUNCH_ATTEMPT": "2"}).printed("ready").signal().end()


@pytest.mark.parametrize(("cancel", "code"), [(False, 75), (True, 143)])
def test_stop_that_can_not_be_written_still_stops_gently(world: RunnerWorld, cancel: bool, code: int) -> None:
    """A file in place of the folder stands for a full disk."""
    program = """
def stop(*_):
    checkpoint(2); leave(75); print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
ml.stop.parent.rmdir()
ml.stop.parent.touch()
ready()
time.sleep(60)
"""
    running = world.start(world.job(python(program))).printed("ready")
    if cancel:
        (world.run / "control").mkdir()
        (world.run / "control/cancel").touch()
    ended = running.signal().end()
    assert ended.code == code and "saved" in ended.output and "control/stop could not be written" in ended.output
    assert world.result["state"] == ("CANCELLED" if cancel else "PREEMPTED")


def test_unused_channel_type_is_an_error(world: RunnerWorld) -> None:
    job = world.job(python("pass"), channels=(Channel("train", "s3://b/x", access="mounted"),))
    ended = world.end(job)
    assert ended.code == 64 and "channel train: the platform mounted nothing" in ended.output
