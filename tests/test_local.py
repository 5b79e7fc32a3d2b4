"""What the local backend promises beyond the suite of all backends."""

from __future__ import annotations

import contextlib
import json
import os
import secrets as random_source
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher import Run, State, submit
from launcher.errors import CapacityError, ConflictError, SpecError
from launcher.ledger import Ledger
from launcher.process import ProcessId, descendants, with_variable
from launcher.supervisor import SupervisorFolder, start
from launcher.testing.conformance import STOPPABLE, files_with, holders, job, ledger, run_job, text_of, until
from tests.s3_fixtures import Bucket
from tests.worlds.local import LocalWorld

__all__ = ["job", "ledger", "run_job"]

SLEEP = "import time; print('sleeping', flush=True); time.sleep(600)"


@pytest.fixture
def world(tmp_path: Path) -> LocalWorld:
    return LocalWorld(tmp_path / "world")


def supervisor(run: Run) -> SupervisorFolder:
    return SupervisorFolder(Path(run.record.target["root"]) / run.id)


def record_of(run: Run) -> tuple[ProcessId, ProcessId]:
    """The supervisor and the runner."""
    deadline = time.monotonic() + 60
    while (record := supervisor(run).record()) is None or record.runner is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return record.supervisor, record.runner


def change_record(run: Run, **changes: str) -> None:
    """As another boot or another machine would have written it."""
    path = supervisor(run).path / "supervisor.json"
    record = json.loads(path.read_text())
    for part in ("supervisor", "runner"):
        record[part] |= changes
    path.write_text(json.dumps(record))


def kill_all(run: Run, *, command: bool = True) -> None:
    """SIGKILL to the supervisor and the runner; command: and to all below them."""
    parent, runner = record_of(run)
    below = [p.pid for p in descendants(parent.pid) if command or p.pid == runner.pid]
    killed = [ProcessId.of(pid) for pid in (parent.pid, *below)]
    for process in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    while supervisor(run).locked() or any(process.alive for process in killed):
        time.sleep(0.02)


def until_running(run: Run) -> None:
    deadline = time.monotonic() + 60
    while "sleeping" not in text_of(run):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_after_a_reboot_a_run_is_lost_and_can_go_on(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job(STOPPABLE)
    until(lambda: "starts from None" in text_of(run), world)
    kill_all(run)
    change_record(run, boot="an-earlier-boot")
    status = run.status()
    assert (status.state, status.reason.split(";")[0]) == (State.LOST, "the machine was restarted")
    again = run.resume()
    until(lambda: text_of(again).count("starts from None") == 2, world)
    assert again.status().attempt == 2
    assert again.cancel().state in (State.STOPPING, State.CANCELLED)
    assert again.wait(timeout=60).state is State.CANCELLED


def test_the_same_number_as_another_process_is_not_the_run(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job(SLEEP)
    until(lambda: "sleeping" in text_of(run), world)
    kill_all(run)
    path = supervisor(run).path / "supervisor.json"
    record = json.loads(path.read_text())
    record["supervisor"]["pid"] = record["runner"]["pid"] = os.getpid()
    path.write_text(json.dumps(record))
    status = run.status()
    assert (status.state, "was killed" in status.reason) == (State.LOST, True)


def test_a_run_on_another_machine_is_unknown_here(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job(SLEEP)
    until(lambda: "sleeping" in text_of(run), world)
    original = (supervisor(run).path / "supervisor.json").read_text()
    change_record(run, host="other-host", boot="its-own-boot")
    status = run.status()
    assert (status.state, status.reason) == (State.UNKNOWN, "it runs on other-host; ask there")
    (supervisor(run).path / "supervisor.json").write_text(original)
    change_record(run, space="pid:[1]")
    assert run.status().native == "elsewhere", "a container of this machine, whose numbers are others"
    (supervisor(run).path / "supervisor.json").write_text(original)


def test_a_machine_with_a_new_name_is_this_one(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job(SLEEP)
    until(lambda: "sleeping" in text_of(run), world)
    change_record(run, host="the-name-before")
    assert run.status().state is State.RUNNING
    kill_all(run)
    assert run.status().state is State.LOST


def test_a_runner_without_its_supervisor_is_followed_to_its_end(
    run_job: Callable[..., Run], world: LocalWorld, tmp_path: Path
) -> None:
    run = run_job(f"""
        import pathlib, time
        print("started", flush=True)
        while not pathlib.Path({str(tmp_path / "go")!r}).exists():
            time.sleep(0.05)
    """)
    until(lambda: "started" in text_of(run), world)
    parent, _ = record_of(run)
    os.kill(parent.pid, signal.SIGKILL)
    until(lambda: not parent.alive and not supervisor(run).locked(), world)
    status = run.status()
    assert (status.state, status.native) == (State.RUNNING, "unsupervised")
    (tmp_path / "go").touch()
    assert run.wait(timeout=60).state is State.SUCCEEDED


def test_a_stopped_supervisor_stops_the_job_with_its_checkpoint(run_job: Callable[..., Run], world: LocalWorld) -> None:
    """As at a shutdown of the machine: the job is not started again by a process that is itself to end."""
    run = run_job(STOPPABLE)
    until(lambda: "starts from None" in text_of(run), world)
    parent, _ = record_of(run)
    os.kill(parent.pid, signal.SIGTERM)
    status = run.wait(timeout=60)
    assert (status.state, status.exit_code) == (State.FAILED, 75)
    started = status.started
    status = run.resume().wait(timeout=60)
    assert (status.state, status.attempt, status.started) == (State.SUCCEEDED, 2, started)
    assert "starts from 1" in text_of(run)


def test_a_command_that_ignores_the_signal_is_killed_with_all_it_started(
    run_job: Callable[..., Run], world: LocalWorld
) -> None:
    run = run_job(
        """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print("pids", os.getpid(), child.pid, flush=True)
        time.sleep(600)
        """,
        resources={"grace": "2s"},
    )
    until(lambda: "pids" in text_of(run), world)
    (line,) = [line for line in text_of(run).splitlines() if line.startswith("pids")]
    run.cancel()
    assert run.wait(timeout=60).state is State.CANCELLED
    for pid in line.split()[1:]:
        assert not Path(f"/proc/{pid}").exists()


def test_the_timeout_counts_all_attempts(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job(SLEEP, resources={"timeout": "2s", "grace": "5s"}, retries=3)
    status = run.wait(timeout=60)
    assert status.state is State.TIMED_OUT
    assert "2" in status.reason


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["resources.gpus=64"], "resources.gpus: 64 wanted, this machine has"),
        (["name=x", "resources.gpu=A100"], "gpu names a model but gpus is 0"),
    ],
)
def test_more_than_the_machine_has_is_refused(job: Callable[..., Path], settings: list[str], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        submit(job("print(1)"), target="world", settings=settings)


def test_a_python_that_can_t_train_is_refused(job: Callable[..., Path], world: LocalWorld, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    path = job("print(1)")
    for python, says in (
        ("/no/such/python", "correct the target's key `python`"),
        (f"{bare}/bin/python", "lacks launcher"),
    ):
        target = {**world.target, "python": python}
        (path.parent / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": target}}))
        with pytest.raises(SpecError, match=says):
            submit(path, target="world")
    assert Ledger().ids() == []


def test_a_killed_runner_is_called_that(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job(SLEEP)
    until(lambda: "sleeping" in text_of(run), world)
    _, runner = record_of(run)
    os.kill(runner.pid, signal.SIGKILL)
    status = run.wait(timeout=60)
    assert (status.state, status.exit_code) == (State.FAILED, 137)
    assert status.reason == "the runner was killed by signal 9 (Killed)"


def test_what_outlived_its_runner_is_known_and_can_be_ended(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job("import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)")
    until(lambda: "pid" in text_of(run), world)
    (line,) = [line for line in text_of(run).splitlines() if line.startswith("pid")]
    kill_all(run, command=False)
    assert run.status().native == "unsupervised"
    run.cancel()
    until(lambda: not Path(f"/proc/{line.split()[1]}").exists(), world)
    assert run.status().state is State.CANCELLED


def test_what_runs_without_any_record_is_no_lost_run(run_job: Callable[..., Run], world: LocalWorld) -> None:
    run = run_job("import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)")
    until(lambda: "pid" in text_of(run), world)
    (line,) = [line for line in text_of(run).splitlines() if line.startswith("pid")]
    kill_all(run, command=False)
    (supervisor(run).path / "supervisor.json").unlink()
    assert (run.status().state, run.status().native) == (State.RUNNING, "unsupervised")
    run.cancel()
    until(lambda: not Path(f"/proc/{line.split()[1]}").exists(), world)
    assert run.status().state is State.LOST


def test_a_run_that_can_t_be_recorded_does_not_go_on(
    run_job: Callable[..., Run], world: LocalWorld, tmp_path: Path
) -> None:
    """A folder in the way of the record stands for a full disk."""
    (tmp_path / "world/local/promise-unrecorded/supervisor.json").mkdir(parents=True)
    run = run_job(SLEEP, run_id="promise-unrecorded")
    status = run.wait(timeout=60)
    assert (status.state, "its supervisor failed: " in status.reason) == (State.FAILED, True)
    assert with_variable("CVLAUNCH_ROOT", str(supervisor(run).root)) == []


def test_a_runner_that_can_t_answer_is_killed_and_the_run_is_cancelled(
    run_job: Callable[..., Run], world: LocalWorld
) -> None:
    run = run_job("import time; print('sleeping', flush=True); time.sleep(300)", resources={"grace": "1s"})
    until(lambda: "sleeping" in text_of(run), world)
    _, runner = record_of(run)
    os.kill(runner.pid, signal.SIGSTOP)
    run.cancel()
    status = run.wait(timeout=60)
    assert (status.state, status.exit_code) == (State.CANCELLED, 137)


def test_a_run_that_is_started_again_can_be_cancelled_at_any_moment(
    run_job: Callable[..., Run], world: LocalWorld
) -> None:
    """The record is still that of the dead supervisor, while the new one has its lock."""
    for delay in (0.0, 0.1, 0.2, 0.3):
        run = run_job(SLEEP)
        until(lambda run=run: "sleeping" in text_of(run), world)
        kill_all(run)
        assert run.status().state is State.LOST
        again = run.resume()
        time.sleep(delay)
        again.cancel()
        assert again.wait(timeout=60).state is State.CANCELLED


def test_what_was_run_before_is_not_run_again_and_no_success(
    job: Callable[..., Path], world: LocalWorld, ledger: Ledger
) -> None:
    path = job("print('hello')")
    run = submit(path, target="world", run_id="promise-same", ledger=ledger)
    assert run.wait(timeout=60).state is State.SUCCEEDED
    run.remove()
    with pytest.raises(ConflictError, match="promise-same was run here before"):
        submit(path, target="world", run_id="promise-same", ledger=ledger)
    assert State.SUCCEEDED not in {ledger.get(run_id).state for run_id in ledger.ids()}


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    ("script", "state", "reason"),
    [
        (SLEEP, State.ERROR, "another submission runs this run"),
        ("print('hello')", State.FAILED, "belongs to another job of the same name"),
    ],
)
def test_the_same_run_id_from_elsewhere_is_no_success(
    job: Callable[..., Path],
    ledger: Ledger,
    tmp_path: Path,
    moto_bucket: Bucket,
    far: bool,
    script: str,
    state: State,
    reason: str,
) -> None:
    """Another ledger and another folder of records, but the same output."""
    output = {"output": str(tmp_path / "output")}
    if far:
        storage = {"endpoint": moto_bucket.server.endpoint, "region": "us-east-1"}
        output = {"output": f"{moto_bucket.uri}/runs", "storage": storage}

    def send(script: str, name: str, ledger: Ledger) -> Run:
        path = job(script)
        target = {"backend": "local", "root": str(tmp_path / name), **output}
        (path.parent / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": target}}))
        return submit(path, target="world", run_id="promise-shared", ledger=ledger)

    first = send(SLEEP, "first", ledger)
    until_running(first)
    second = send(script, "second", Ledger(tmp_path / "ledger-2", tmp_path / "cache-2"))
    status = second.wait(timeout=60)
    assert (status.state, reason in status.reason) == (state, True), status
    if state is State.ERROR:
        with pytest.raises(SpecError, match="is run by another submission"):
            second.resume()
    first.cancel()
    assert first.wait(timeout=60).state is State.CANCELLED
    assert second.status().state is state


def test_python_is_the_target_s(
    tmp_path: Path, world: LocalWorld, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"desk": world.target}}))
    command = ["python", "-c", "import sys; print('python is', sys.executable)"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "x", "command": command}))
    run = submit(tmp_path / "job.yaml", target="desk", ledger=ledger)
    assert run.wait(timeout=60).state is State.SUCCEEDED
    assert Path(text_of(run).split("python is ")[1].split()[0]).parent == Path(sys.executable).parent


def test_two_ranks_keep_the_meaning_of_exit_codes(run_job: Callable[..., Run], world: LocalWorld) -> None:
    script = """
        import json, os, pathlib, sys, time
        print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
        output = pathlib.Path(os.environ["CVLAUNCH_OUTPUT"])
        (output / f"rank-{os.environ['RANK']}").touch()
        while len(list(output.glob("rank-*"))) < 2:  # torchrun ends the others with the first
            time.sleep(0.02)
        if os.environ["RANK"] == "0":
            path = output / "exit.json"
            path.with_suffix(".part").write_text(json.dumps({"code": 64, "reason": "a wrong key"}))
            path.with_suffix(".part").rename(path)
        while not (output / "exit.json").exists():
            time.sleep(0.02)
        sys.exit(64)
    """
    run = run_job(script, resources={"processes": 2}, retries=3)
    status = run.wait(timeout=300)
    assert (status.state, status.exit_code, status.reason) == (State.FAILED, 64, "a wrong key")
    assert text_of(run).count("rank 0 of 2") == 1
    assert text_of(run).count("rank 1 of 2") == 1


def test_an_object_store_takes_the_results(
    tmp_path: Path, moto_bucket: Bucket, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that every cloud backend goes: the runner uploads, the client reads the store."""
    storage = {"endpoint": moto_bucket.server.endpoint, "region": "us-east-1"}
    target = {
        "backend": "local",
        "output": f"{moto_bucket.uri}/runs",
        "root": str(tmp_path / "root"),
        "storage": storage,
    }
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"far": target}}))
    script = "\n".join(
        [
            "import json, os, pathlib, time",
            "print('hello', flush=True)",
            "line = {'step': 1, 'epoch': 1, 'time': 0, 'split': 'val', 'values': {'accuracy': 0.75}}",
            "pathlib.Path(os.environ['CVLAUNCH_OUTPUT'], 'metrics.jsonl').write_text(json.dumps(line) + '\\n')",
            "pathlib.Path(os.environ['CVLAUNCH_MODEL'], 'model.bin').write_bytes(b'weights')",
            "time.sleep(2)",
        ]
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "far", "command": [sys.executable, "-c", script]}))
    run = submit(tmp_path / "job.yaml", target="far", ledger=ledger)
    seen = [type(event).__name__ for event in run.follow()]
    assert {"LogLine", "Point", "Status"} <= set(seen)
    assert run.status().state is State.SUCCEEDED
    assert run.metrics().summary() == {"val/accuracy": 0.75}
    folder = run.sync(tmp_path / "home").path
    assert (folder / "model/model.bin").read_bytes() == b"weights"
    assert json.loads((folder / "input/config/job.json").read_text())["run_id"] == run.id
    assert json.loads((folder / "output/result.json").read_text())["upload"] == "complete"
    assert not list(run.store().list("segments"))
    started = time.monotonic()
    assert run.sync(tmp_path / "home").files == 0
    assert time.monotonic() - started < 30


def test_a_folder_that_can_t_be_written_ends_with_64_before_data_is_staged(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / "file").write_text("in the way")
    target = {"backend": "local", "output": str(tmp_path / "file/runs"), "root": str(tmp_path / "root")}
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"blocked": target}}))
    (tmp_path / "data").mkdir()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "x", "command": ["true"], "data": {"train": "data"}}))
    run = submit(tmp_path / "job.yaml", target="blocked", ledger=ledger)
    status = run.wait(timeout=60)
    assert (status.state, status.exit_code) == (State.FAILED, 64)
    assert "file" in status.reason
    lines = list(run.logs())
    assert lines
    assert "file" in lines[-1].text
    assert list(run.logs(since=lines[-1].cursor)) == []


@pytest.mark.needs("root")
def test_a_full_disk_keeps_the_exit_code(tmp_path: Path, ledger: Ledger) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        target = {"backend": "local", "output": str(disk / "out"), "root": str(tmp_path / "root")}
        (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"full": target}}))
        script = "import os; open(os.environ['CVLAUNCH_OUTPUT'] + '/big', 'wb').write(b'x' * 3_000_000)"
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "x", "command": ["python", "-c", script]}))
        run = submit(tmp_path / "job.yaml", target="full", ledger=ledger)
        status = run.wait(timeout=60)
        assert (status.state, status.exit_code) == (State.FAILED, 1)
        assert "result.json could not be written: No space left on device" in text_of(run)
        assert text_of(run).count("attempt 1") == 1
        with pytest.raises(CapacityError, match=str(disk)):
            Ledger(disk / "runs").create(run.record)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


POLL = """
import sys
from pathlib import Path
from launcher.supervisor import SupervisorFolder
folder = SupervisorFolder(Path(sys.argv[1]))
print("polling", flush=True)
while True:
    folder.locked()
"""


def test_asking_whether_it_runs_keeps_nobody_from_starting_it(tmp_path: Path) -> None:
    folder = SupervisorFolder(tmp_path / "run")
    plan = {"argv": ["true"], "env": {"CVLAUNCH_ROOT": str(tmp_path / "root")}, "cwd": "/", "job": {}}
    text = json.dumps({**plan, "limits": {"gpus": 0, "attempts": 1, "grace_s": 1}})
    assert start(folder, text, {})
    pollers = [subprocess.Popen([sys.executable, "-c", POLL, folder.path], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for poller in pollers:
            assert poller.stdout is not None
            poller.stdout.readline()
        for _ in range(10):
            while (record := folder.record()) is None or not folder.exit() or record.supervisor.alive:
                time.sleep(0.02)
            assert not folder.locked(), "another one that asks is no supervisor"
            assert start(folder, text, {}, again=True)
    finally:
        for poller in pollers:
            poller.kill()
            poller.communicate()


def test_a_second_start_is_no_start(tmp_path: Path) -> None:
    folder = SupervisorFolder(tmp_path / "run")
    plan = {"argv": ["sleep", "60"], "env": {"CVLAUNCH_ROOT": str(tmp_path / "root")}, "cwd": "/", "job": {}}
    text = json.dumps({**plan, "limits": {"gpus": 0, "attempts": 1, "grace_s": 1}})
    assert start(folder, text, {})
    for again in (False, True):
        assert not start(folder, text, {}, again=again)
        with pytest.raises(ConflictError, match="taken by another job"):
            start(folder, text + " ", {}, again=again)
    while (record := folder.record()) is None or record.runner is None:
        time.sleep(0.02)
    os.kill(record.supervisor.pid, signal.SIGTERM)
    while folder.exit() is None or record.supervisor.alive:
        time.sleep(0.02)
    with pytest.raises(ConflictError, match="was run here before"):
        start(folder, text, {})


def test_a_supervisor_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"the supervisor of run did not start: .*Error"):
        start(SupervisorFolder(tmp_path / "run"), "no plan", {})


def test_secrets_touch_no_disk_and_are_gone_with_their_processes(
    run_job: Callable[..., Run], world: LocalWorld, tmp_path: Path, home: Path
) -> None:
    canary = f"canary-{random_source.token_hex(8)}"
    token = tmp_path / "token"
    token.write_text(canary)
    token.chmod(0o600)
    run = run_job(f"import os; print('length', len(os.environ['TOKEN'])); {SLEEP}", secrets={"TOKEN": f"file:{token}"})
    until(lambda: f"length {len(canary)}" in text_of(run), world)
    assert len(holders(canary)) == 1, "the command has it"
    kill_all(run)
    token.unlink()
    assert holders(canary) == {}
    assert files_with(canary, since=0.0, folders=[tmp_path, home]) == set()
    assert run.status().state is State.LOST
    token.write_text(canary)
    token.chmod(0o600)
    again = run.resume()
    until(lambda: text_of(again).count(f"length {len(canary)}") == 2, world)


def test_every_attempt_gets_the_secrets(run_job: Callable[..., Run], world: LocalWorld, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("canary" * 15_000)  # more than a pipe holds
    token.chmod(0o600)
    script = "print('secret of', len(__import__('os').environ['TOKEN']))\n" + textwrap.dedent(STOPPABLE)
    run = run_job(script, secrets={"TOKEN": f"file:{token}"})
    until(lambda: "starts from None" in text_of(run), world)
    assert run.handle is not None
    world.preempt(run.handle)
    assert run.wait(timeout=60).state is State.SUCCEEDED
    assert text_of(run).count("secret of 90000") == 2


SHOW = "import os; print(os.environ['CVLAUNCH_RUN_ID'], os.environ['MINE'], os.environ['TOKEN'], os.getcwd())"


def execute(run: Run, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`Backend.exec` in a process of its own, whose standard streams are pipes."""
    script = (
        "import json, sys; from launcher.backends import load_backend; from launcher.backends.base import Handle\n"
        "name, target, handle, command = json.loads(sys.argv[1]); kind = load_backend(name)\n"
        "backend = kind(kind.Target.model_validate(target), 'world')\n"
        "sys.exit(backend.exec(Handle.parse(handle), command, tty=False))"
    )
    facts = json.dumps([run.record.backend, run.record.target, run.record.handle, command])
    return subprocess.run(
        [sys.executable, "-c", script, facts], input=stdin, capture_output=True, text=True, check=False
    )


def test_a_command_runs_beside_the_job(run_job: Callable[..., Run], world: LocalWorld, tmp_path: Path) -> None:
    """With the variables of the run's own command, in its folder, on our standard streams."""
    token = tmp_path / "token"
    token.write_text("of-the-job")
    token.chmod(0o600)
    script = f"import os; os.chdir({str(tmp_path)!r}); {SLEEP}"
    run = run_job(script, env={"MINE": "a 'quoted' value"}, secrets={"TOKEN": f"file:{token}"})
    other = run_job(SLEEP, env={"MINE": "another's"})
    for each in (run, other):
        until_running(each)
    done = execute(run, "python", "-c", SHOW)
    assert done.stdout == f"{run.id} a 'quoted' value of-the-job {tmp_path}\n", done.stderr
    assert execute(run, "sh", "-c", "cat; exit 7", stdin="to it").returncode == 7
    assert execute(run, "cat", stdin="to it").stdout == "to it"
    assert execute(run, "sh", "-c", "kill -9 $$").returncode == 137
    missing = execute(run, "no-such-program")
    assert (missing.returncode, missing.stderr) == (127, "no-such-program: No such file or directory\n")
    run.cancel()
    assert run.wait(timeout=60).state is State.CANCELLED
    assert "is CANCELLED; nothing runs there any more" in execute(run, "true").stderr
