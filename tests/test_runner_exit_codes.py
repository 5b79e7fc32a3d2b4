"""What a run's end is called, and which code the runner exits with."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from launcher.contract import Layout
from launcher.runner.result import End, Word, judge, read_exit_file, write_failure
from launcher.runner.stop import Reason
from tests.runner_world import RunnerWorld, python
from tests.s3_fixtures import Bucket


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path)


@pytest.mark.parametrize(
    ("end", "stop", "state", "code"),
    [
        (End(0), None, "SUCCEEDED", 0),
        (End(3), None, "FAILED", 3),
        (End(137), None, "FAILED", 137),
        (End(64), None, "FAILED", 64),
        (End(75), None, "PREEMPTED", 75),
        (End(1, (75, "")), None, "PREEMPTED", 75),
        (End(1, (64, "bad epochs")), None, "FAILED", 64),
        (End(1, (0, "")), None, "SUCCEEDED", 0),
        (End(0), Reason.CANCELLED, "CANCELLED", 143),
        (End(1, (75, "")), Reason.CANCELLED, "CANCELLED", 143),
        (End(0), Reason.TIMEOUT, "TIMED_OUT", 1),
        (End(143, None, True), Reason.TIMEOUT, "TIMED_OUT", 1),
        (End(0, (0, "")), Reason.TIMEOUT, "SUCCEEDED", 0),
        (End(1, (75, "")), Reason.PREEMPTED, "PREEMPTED", 75),
        (End(143, None, True), Reason.PREEMPTED, "PREEMPTED", 75),
        (End(0, None, True), Reason.PREEMPTED, "PREEMPTED", 75),
        (End(143), Reason.PREEMPTED, "PREEMPTED", 143),
        (End(0), Reason.PREEMPTED, "SUCCEEDED", 0),
        (End(0, (0, ""), True), Reason.PREEMPTED, "SUCCEEDED", 0),
        (End(64), Reason.PREEMPTED, "FAILED", 64),
    ],
)
def test_table(end: End, stop: Reason | None, state: str, code: int) -> None:
    outcome = judge(end, stop, timeout_s=5)
    assert (outcome.state, outcome.exit_code) == (Word(state), code)


@pytest.mark.parametrize(
    ("program", "code", "state", "reason"),
    [
        ("print('fine')", 0, "SUCCEEDED", ""),
        ("print('no such model'); sys.exit(3)", 3, "FAILED", "exit code 3"),
        ("sys.exit(64)", 64, "FAILED", "bad configuration (exit code 64)"),
        ("sys.exit(75)", 75, "PREEMPTED", "preempted with a checkpoint"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "FAILED", "killed by SIGKILL (out of memory?)"),
        ("leave(64, 'epochs is 0'); sys.exit(1)", 64, "FAILED", "epochs is 0"),
    ],
)
def test_of_a_command(world: RunnerWorld, program: str, code: int, state: str, reason: str) -> None:
    assert world.end(world.job(python(program))).code == code
    result = world.result
    assert (result["state"], result["exit_code"], result["reason"]) == (state, code, reason)
    assert result["contract"] == 1 and result["upload"] == "in_place" and result["started"] <= result["ended"]


@pytest.mark.parametrize("env", [{}, {"CVLAUNCH_NATIVE_ID": "4711"}])
def test_result_names_the_job_of_the_platform(world: RunnerWorld, env: dict[str, str]) -> None:
    world.end(world.job(("true",)), env=env)
    assert world.result["native_id"] == env.get("CVLAUNCH_NATIVE_ID", "")


def test_failure_tells_the_last_lines_and_metrics_the_last_values(world: RunnerWorld) -> None:
    program = "metrics(1, accuracy=0.5); metrics(2, accuracy=0.75, loss=float('nan')); raise ValueError('no class 11')"
    world.end(world.job(python(program)))
    failure = world.read("output/failure")
    assert failure.startswith("exit code 1\n") and failure.endswith("ValueError: no class 11") and len(failure) <= 1024
    assert world.result["metrics"] == {"val/accuracy": 0.75, "val/loss": None}


def test_failure_of_one_very_long_line_keeps_its_end(tmp_path: Path) -> None:
    write_failure(tmp_path / "failure", "exit code 1", ["x" * 5000 + "the reason"])
    text = (tmp_path / "failure").read_text()
    assert len(text) == 1024 and text.startswith("exit code 1\n") and text.endswith("the reason")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"code": "75"}', '{"code": 700}', '{"reason": "x"}'])
def test_exit_file_that_says_nothing_is_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "exit.json").write_text(content)
    assert read_exit_file(tmp_path / "exit.json") is None


def test_command_that_is_not_there(world: RunnerWorld) -> None:
    ended = world.end(world.job(("no-such-program",)))
    assert ended.code == 64 and "'no-such-program' can't be started: No such file" in ended.output
    assert world.result["state"] == "FAILED"


def test_crashes_are_restarted_in_place_and_counted(world: RunnerWorld) -> None:
    program = "n = len(list(ml.output.glob('try*'))); (ml.output / f'try{n}').touch(); sys.exit(7 if n < 1 else 0)"
    assert world.end(world.job(python(program), retries=2)).code == 0
    assert world.result["restarts"] == 1
    assert "restart 1 of 2" in world.log()


@pytest.mark.parametrize(("code", "runs"), [(9, 2), (64, 1), (75, 1)])
def test_restarts_end(world: RunnerWorld, code: int, runs: int) -> None:
    program = f"print('another run', flush=True); sys.exit({code})"
    assert world.end(world.job(python(program), retries=1)).code == code
    assert world.log().count("another run") == runs


def test_exit_file_of_an_earlier_start_does_not_count(world: RunnerWorld) -> None:
    program = "first = not (ml.output / 'x').exists(); (ml.output / 'x').touch()\nif first: leave(5)\nsys.exit(0)"
    assert world.end(world.job(python(program), retries=1)).code == 0


def test_timeout_counts_all_attempts(world: RunnerWorld) -> None:
    program = python("checkpoint(1) if not (ml.checkpoints / '1').exists() else 0; ready(); time.sleep(60)")
    first = world.start(world.job(program, timeout_s=100)).printed("ready")
    assert first.signal().end().code == 75
    used = json.loads(world.read("heartbeat"))["elapsed_s"]
    assert used > 0
    job = world.job(program, timeout_s=2.5)
    second = world.start(job, env={"CVLAUNCH_ATTEMPT": "2"}).end()
    assert second.code == 1 and world.result["state"] == "TIMED_OUT" and "2s is used up" in world.result["reason"]
    total = json.loads(world.read("heartbeat"))["elapsed_s"]
    assert 2.5 <= total < max(2.5, used) + 30
    third = world.end(job, env={"CVLAUNCH_ATTEMPT": "3"})
    assert third.code == 1 and "ready" not in third.output


def test_result_of_an_earlier_attempt_is_gone_while_the_next_runs(world: RunnerWorld) -> None:
    world.end(world.job(python("sys.exit(9)")))
    running = world.start(world.job(python("ready(); time.sleep(60)")), env={"CVLAUNCH_ATTEMPT": "2"}).printed("ready")
    assert not (world.run / "output/result.json").exists() and not Layout(world.run).failure.exists()
    running.signal(signal.SIGINT).end()


def test_more_attempts_than_allowed(world: RunnerWorld) -> None:
    ended = world.end(world.job(python("print('ran')"), max_attempts=2), env={"CVLAUNCH_ATTEMPT": "3"})
    assert ended.code == 64 and "attempt 3 is more than max_attempts, 2" in ended.output


# -- before there is an attempt ---------------------------------------------------------------------------------------


def job_text(world: RunnerWorld, **changes: object) -> str:
    raw = json.loads(world.job(("echo", "it ran")).to_bytes())
    return json.dumps({**raw, **changes})


NEWER = {"name": "a", "uri": "file:///", "access": "path", "since": "the next minor change"}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"new": 1, "channels": [NEWER], "code": None}, 0, "it ran"),
        ({"code": {"sha256": "0", "size": 1, "new": 1}}, 64, "code"),
        ({"channels": [{"name": "a"}]}, 64, "missing 1 required positional argument: 'uri'"),
        ({"channels": [5]}, 64, "not iterable"),
        ({"channels": 5}, 64, "not iterable"),
        ({"code": ["sha256"]}, 64, "must be integers"),
        ({"contract": 9}, 64, "contract version 9"),
    ],
)
def test_job_file(world: RunnerWorld, changes: dict[str, object], code: int, message: str) -> None:
    ended = world.end(world.job(), env={"CVLAUNCH_JOB_JSON": job_text(world, **changes)})
    assert ended.code == code and message in ended.output and "Traceback" not in ended.output


@pytest.mark.parametrize("text", ["{", "[]", "\udcff{}"])
def test_job_file_that_is_none(world: RunnerWorld, text: str) -> None:
    ended = world.end(world.job(), env={"CVLAUNCH_JOB_JSON": text})
    assert ended.code == 64 and "$CVLAUNCH_JOB_JSON" in ended.output and "Traceback" not in ended.output


@pytest.mark.parametrize("place", ["{bucket}/no/job.json", "/no/job.json", "file:///no/job.json", "file://host/job"])
def test_job_file_that_is_not_there(world: RunnerWorld, moto_bucket: Bucket, place: str) -> None:
    """In a store, too."""
    env = {**moto_bucket.server.environment, "CVLAUNCH_JOB": place.format(bucket=moto_bucket.uri)}
    ended = world.end(world.job(), env={**env, "AWS_ENDPOINT_URL": moto_bucket.server.options.endpoint or ""})
    assert ended.code == 64 and "job" in ended.output and "Traceback" not in ended.output


def test_job_file_with_a_quoted_path(world: RunnerWorld) -> None:
    path = world.folder / "my job.json"
    path.write_text(job_text(world))
    assert world.end(world.job(), env={"CVLAUNCH_JOB": path.as_uri()}).code == 0


def test_error_before_the_attempt_leaves_failure(tmp_path: Path) -> None:
    """A file in the way of a folder, on a machine that has the output folder already."""
    world = RunnerWorld(tmp_path, in_place=False)
    (world.root / "output").mkdir(parents=True)
    (world.root / "checkpoints").touch()
    ended = world.end(world.job(("true",)))
    assert ended.code == 1 and "Traceback" in ended.output
    assert (world.root / "output/failure").read_text().startswith("FileExistsError: ")
