"""What the container backend promises beyond the suite of all backends: with real podman and the real image."""

from __future__ import annotations

import json
import os
import re
import secrets as random_source
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launcher import Run, State, submit
from launcher.attempts import Order
from launcher.backends.base import Handle
from launcher.containers import known_id, options
from launcher.engine import Engine, find_engine
from launcher.errors import CvlaunchError
from launcher.ledger import Ledger
from launcher.manifest import scan, write
from launcher.stores import open_store
from launcher.supervisor import Record, SupervisorFolder, start
from launcher.testing.conformance import STOPPABLE, files_with, job, ledger, own_id, run_job, text_of, until
from tests.cli_tool import COMMAND, user
from tests.s3_fixtures import Bucket
from tests.services.podman import podman
from tests.test_local import execute
from tests.worlds.container import ContainerWorld

__all__ = ["job", "ledger", "run_job"]

pytestmark = pytest.mark.needs("podman", "debootstrap")

SLEEP = "import time; print('sleeping', flush=True); time.sleep(600)"
UNTIL_GO = """
    import os, pathlib, sys, time
    print('sleeping', flush=True)
    while not pathlib.Path(os.environ["CVLAUNCH_OUTPUT"], "go").exists():
        time.sleep(0.05)
    print('rested', flush=True)
    sys.exit(3)
"""
"""Sleeps until `let_go`."""


@pytest.fixture
def world(tmp_path: Path, trainer_image: str) -> ContainerWorld:
    return ContainerWorld(tmp_path / "world", trainer_image)


@pytest.fixture(autouse=True)
def no_container_is_left(run_job: Callable[..., Run], tmp_path: Path) -> Iterator[None]:
    yield
    for known in {path.read_text() for path in tmp_path.rglob("container.id")} - {""}:
        find_engine("podman").signal(known, "KILL")
        find_engine("podman").remove(known)


@pytest.fixture
def foreign(world: ContainerWorld, base_image: str, tmp_path: Path, ledger: Ledger) -> Callable[..., Run]:
    """Submits an image that knows nothing of us, with a shell script as its arguments."""

    def start(script: str, **keys: object) -> Run:
        (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": {**world.target}}}))
        spec = {"name": "foreign", "image": base_image, "runner": "none", "command": ["sh", "-c", script], **keys}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
        return submit(tmp_path / "job.yaml", target="world", ledger=ledger)

    return start


def supervisor(run: Run) -> SupervisorFolder:
    return SupervisorFolder(Path(run.record.target["root"]) / run.id)


def record_of(run: Run) -> Record:
    record = supervisor(run).record()
    assert record is not None
    return record


def kill_client(run: Run) -> None:
    client = record_of(run).runner
    assert client is not None
    os.kill(client.pid, signal.SIGKILL)


def kill_supervisor(run: Run) -> None:
    process = record_of(run).supervisor
    os.kill(process.pid, signal.SIGKILL)
    while process.alive or supervisor(run).locked():
        time.sleep(0.02)


def container_of(run: Run) -> dict[str, object]:
    (found,) = json.loads(podman("container", "inspect", known_id(supervisor(run).path)))
    return dict(found)


def until_sleeping(run: Run, world: ContainerWorld) -> None:
    until(lambda: "sleeping" in text_of(run), world)


def let_go(run: Run, folder: str = "output") -> None:
    root = run.store().local_path()
    assert root is not None
    (root / folder / "go").touch()


# -- whoever is killed


@pytest.mark.parametrize("victims", [["client"], ["supervisor"], ["client", "supervisor"], ["supervisor", "client"]])
def test_the_end_is_known_whoever_was_killed(
    run_job: Callable[..., Run], world: ContainerWorld, victims: list[str]
) -> None:
    run = run_job(UNTIL_GO)
    until_sleeping(run, world)
    for victim in victims:
        {"client": kill_client, "supervisor": kill_supervisor}[victim](run)
    status = run.status()
    assert status.state is State.RUNNING
    assert status.native == ("unsupervised" if "supervisor" in victims else "running")
    let_go(run)
    status = run.wait(timeout=240)
    assert (status.state, status.exit_code, status.attempt) == (State.FAILED, 3, 1)
    assert "rested" in text_of(run)


def test_the_end_outlives_the_container(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    """Nobody looked between the end of the job and the removal of its container."""
    run = run_job(UNTIL_GO)
    until_sleeping(run, world)
    kill_supervisor(run)
    let_go(run)
    podman("wait", run.id)
    podman("rm", run.id)
    status = run.status()
    assert (status.state, status.exit_code) == (State.FAILED, 3)


@pytest.mark.parametrize("code", [0, 7])
def test_an_engine_s_word_is_enough(foreign: Callable[..., Run], world: ContainerWorld, code: int) -> None:
    """Without a supervisor, and without a runner that would leave a result."""
    run = foreign(f"echo sleeping; while [ ! -e /opt/ml/go ]; do sleep 0.1; done; exit {code}")
    until_sleeping(run, world)
    kill_supervisor(run)
    let_go(run, folder=".")
    status = run.wait(timeout=240)
    assert (status.state, status.exit_code) == (State.FAILED if code else State.SUCCEEDED, code)


def test_containers_are_gone_after_their_end(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job("print('hello')")
    assert run.wait(timeout=240).state is State.SUCCEEDED
    until(lambda: not record_of(run).supervisor.alive, world)
    assert podman("ps", "--all", "--quiet", "--filter", f"label=cvlaunch.run={run.id}") == ""


def test_a_container_says_whose_it_is(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(SLEEP)
    until_sleeping(run, world)
    container = container_of(run)
    assert container["Name"] == run.id
    assert container["Config"]["Labels"]["cvlaunch.run"] == run.id
    assert container["Config"]["Labels"]["cvlaunch.plan"] == run.record.plan["plan_sha"]


def test_a_removed_container_is_a_failure(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(SLEEP)
    until_sleeping(run, world)
    podman("rm", "--force", "--time", "0", run.id)
    status = run.wait(timeout=240)
    assert (status.state, status.exit_code) == (State.FAILED, 137)
    assert status.reason in ("its container was removed", "its container was killed by signal 9 (Killed)")


def test_a_removed_container_without_a_supervisor_is_lost_and_can_go_on(
    run_job: Callable[..., Run], world: ContainerWorld
) -> None:
    run = run_job(STOPPABLE)
    until(lambda: "starts from None" in text_of(run), world)
    kill_supervisor(run)
    podman("rm", "--force", "--time", "0", run.id)
    status = run.status()
    assert (status.state, "was killed; go on with" in status.reason) == (State.LOST, True)
    again = run.resume()
    until(lambda: text_of(again).count("starts from None") == 2, world)
    assert again.status().attempt == 2
    assert podman("container", "inspect", "--format", "{{.State.Status}}", f"{run.id}-2") == "running"
    again.cancel()
    assert again.wait(timeout=240).state is State.CANCELLED


def test_what_a_dead_supervisor_left_is_cleared_away(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(SLEEP)
    until_sleeping(run, world)
    kill_supervisor(run)
    podman("kill", run.id)
    assert run.wait(timeout=240).state is State.FAILED
    again = run.resume()
    until(lambda: text_of(again).count("sleeping") == 2, world)
    assert podman("ps", "--all", "--format", "{{.Names}}", "--filter", f"label=cvlaunch.run={run.id}") == f"{run.id}-2"


def test_after_a_reboot_a_run_is_lost(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(SLEEP)
    until_sleeping(run, world)
    kill_supervisor(run)
    podman("kill", run.id)
    path = supervisor(run).path / "supervisor.json"
    record = json.loads(path.read_text())
    record["supervisor"]["boot"] = record["runner"]["boot"] = "an-earlier-boot"
    path.write_text(json.dumps(record))
    status = run.status()
    assert (status.state, status.reason.split(";")[0]) == (State.LOST, "the machine was restarted")


def test_a_killed_container_is_a_failure(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(SLEEP)
    until_sleeping(run, world)
    podman("kill", run.id)
    status = run.wait(timeout=240)
    assert (status.state, status.exit_code) == (State.FAILED, 137)
    assert status.reason == "its container was killed by signal 9 (Killed)"


@pytest.mark.parametrize("whole", [False, True], ids=["the-command", "all"])
def test_a_lack_of_memory_is_called_that(
    run_job: Callable[..., Run], foreign: Callable[..., Run], world: ContainerWorld, whole: bool
) -> None:
    if whole:  # the first process, so that nobody is left to say so
        run = foreign("exec tail /dev/zero", resources={"memory": "64MiB"})
    else:
        run = run_job("x = bytearray(500 << 20)", resources={"memory": "256MiB"})
    status = run.wait(timeout=240)
    assert (status.state, status.exit_code) == (State.FAILED, 137)
    assert f"at its memory limit, {'64.0' if whole else '256.0'} MiB (resources.memory)" in status.reason


def test_a_run_that_can_t_be_recorded_does_not_go_on(
    run_job: Callable[..., Run], world: ContainerWorld, tmp_path: Path
) -> None:
    """A folder in the way of the record stands for a full disk."""
    run_id = own_id("unrecorded")
    (tmp_path / f"world/container/{run_id}/supervisor.json").mkdir(parents=True)
    run = run_job(SLEEP, run_id=run_id)
    status = run.wait(timeout=240)
    assert (status.state, "its supervisor failed: " in status.reason) == (State.FAILED, True)
    assert podman("ps", "--all", "--quiet", "--filter", f"label=cvlaunch.run={run_id}") == ""


def test_ctrl_c_leaves_the_run_alone(job: Callable[..., Path], world: ContainerWorld, home: Path) -> None:
    path = job(SLEEP)
    image = [f"--set={setting}" for setting in world.settings]
    run_id = own_id("ctrl-c")
    command = [*COMMAND, "submit", str(path), "--target", "world", "--run-id", run_id, "--follow", *image]
    follower = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **user(home)}, process_group=0
    )
    run = None
    try:
        until(lambda: run_id in Ledger().ids() and "sleeping" in text_of(Run(run_id)), world)
        run = Run(run_id)
        os.killpg(follower.pid, signal.SIGINT)
        follower.communicate(timeout=120)
        time.sleep(0.5)
        assert run.status().state is State.RUNNING
    finally:
        follower.kill()
        follower.communicate()
        if run:
            run.cancel()
            assert run.wait(timeout=240).state is State.CANCELLED


# -- cancel


@pytest.mark.parametrize("supervised", [True, False])
def test_a_stop_reaches_the_first_process_once_and_a_kill_follows(
    foreign: Callable[..., Run], world: ContainerWorld, supervised: bool
) -> None:
    script = "trap 'echo told' TERM; echo sleeping; while :; do sleep 0.2; done"
    run = foreign(script, resources={"grace": "1s"})
    until_sleeping(run, world)
    if not supervised:
        kill_supervisor(run)
    began = time.monotonic()
    run.cancel()
    assert run.status().state in (State.STOPPING, State.CANCELLED)
    assert run.wait(timeout=240).state is State.CANCELLED
    lasted = time.monotonic() - began
    assert lasted > 15 if supervised else lasted < 120
    assert [line.text for line in run.logs()].count("told") == 1


def test_a_run_without_a_supervisor_is_cancelled(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(STOPPABLE)
    until(lambda: "starts from None" in text_of(run), world)
    kill_supervisor(run)
    run.cancel()
    assert run.wait(timeout=240).state is State.CANCELLED
    assert text_of(run).count("starts from") == 1


@pytest.mark.parametrize("delay", [0.0, 0.25, 0.35, 0.45, 0.6, 0.9])
def test_a_cancellation_counts_at_any_moment_of_the_start(
    run_job: Callable[..., Run], world: ContainerWorld, delay: float
) -> None:
    run = run_job(SLEEP)
    time.sleep(delay)
    run.cancel()
    assert run.wait(timeout=240).state is State.CANCELLED
    until(lambda: not record_of(run).supervisor.alive, world)
    assert podman("ps", "--all", "--quiet", "--filter", f"label=cvlaunch.run={run.id}") == ""


def test_a_cancellation_counts_where_the_engine_is_slow(
    foreign: Callable[..., Run], world: ContainerWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor is asked before it can say who it is; a foreign image reads no mark."""
    slow = tmp_path / "bin" / "podman"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n[ "$1" = info ] && sleep 8\nexec {shutil.which("podman")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    run = foreign("sleep 600", resources={"grace": "1s"})
    run.cancel()
    assert run.wait(timeout=240).state is State.CANCELLED
    until(lambda: not record_of(run).supervisor.alive, world)


# -- what can't be started


def plan_of(world: ContainerWorld, tmp_path: Path, **changes: object) -> str:
    """A small plan of its own, past all checks of the client."""
    root = {"source": str(tmp_path / "ml"), "target": "/opt/ml", "read_only": False}
    limits = {"gpus": 0, "cpus": None, "memory": None, "attempts": 1, "grace_s": 1, "timeout_s": None}
    plan = {"run_id": own_id("plan"), "engine": "podman", "image": world.settings[0].partition("=")[2]}
    plan |= {"argv": [], "arguments": ["true"], "env": {}, "inherit": [], "mounts": [root], "user": None, "shm": None}
    return json.dumps({**plan, "network": "host", "read_only": False, "limits": limits, "job": {}, **changes})


@pytest.mark.parametrize(
    ("changes", "state", "code", "says"),
    [
        ({"image": "127.0.0.1:1/nothing:here"}, "ERROR", 125, "podman run: .*connection refused; the registry does"),
        ({"engine": "docker"}, "ERROR", 1, "docker info: .*; start it .*, or name another engine in CVLAUNCH_ENGINE"),
        ({"argv": ["no-such-program"]}, "FAILED", 127, "not found.*; the image has no no-such-program: build it from"),
        ({"argv": ["/etc"]}, "FAILED", 126, "permission denied"),
        ({"mounts": [{"source": "/no/such", "target": "/data", "read_only": True}]}, "ERROR", 125, "no such file"),
    ],
    ids=["image", "engine", "program", "folder", "mount"],
)
def test_what_can_t_be_started_says_why(
    world: ContainerWorld, tmp_path: Path, changes: dict[str, object], state: str, code: int, says: str
) -> None:
    folder = SupervisorFolder(tmp_path / "promise-plan")
    assert start(folder, plan_of(world, tmp_path, **changes), {})
    until(folder.exit, world)
    end = folder.exit() or {}
    assert (end["state"], end["code"]) == (state, code), end
    assert re.search(says, str(end["reason"]), re.DOTALL | re.IGNORECASE), end["reason"]


@pytest.mark.parametrize(
    ("target", "keys", "says"),
    [
        ({"engine": "docker"}, {}, "docker info: .*CVLAUNCH_ENGINE"),
        ({}, {"resources": {"cpus": 1000}}, "resources.cpus: 1000 wanted, this machine has"),
        ({}, {"resources": {"memory": "100TiB"}}, "resources.memory: .* wanted, this machine has"),
        ({}, {"resources": {"gpus": 64}}, "resources.gpus: 64 wanted, this machine has"),
        ({}, {"runner": "none", "retries": 1}, "retries: a foreign image"),
        ({}, {"runner": "none", "secrets": {"A": "env:HOME"}}, "secrets: a foreign image"),
        ({"output": "s3://bucket/runs"}, {"runner": "none"}, "output: a foreign image"),
        (
            {"output": "s3://b/r", "storage": {"profile": "lab"}},
            {},
            "storage.profile: .*export-credentials --profile lab",
        ),
    ],
)
def test_what_can_t_go_well_is_refused_before(
    job: Callable[..., Path],
    world: ContainerWorld,
    trainer_image: str,
    target: dict[str, object],
    keys: dict[str, object],
    says: str,
) -> None:
    path = job("print(1)", **{"image": trainer_image, **keys})
    (path.parent / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": {**world.target, **target}}}))
    with pytest.raises(CvlaunchError, match=says):
        submit(path, target="world")
    assert Ledger().ids() == []


def test_a_tag_that_moved_is_not_the_job_s_image(
    job: Callable[..., Path], world: ContainerWorld, ledger: Ledger, base_image: str, trainer_image: str
) -> None:
    tag = f"localhost/cvc-moving:{random_source.token_hex(4)}"
    podman("tag", trainer_image, tag)
    try:
        run = submit(job(STOPPABLE, image=tag), target="world", ledger=ledger)
        until(lambda: "starts from None" in text_of(run), world)
        podman("tag", base_image, tag)
        world.preempt(Handle("container", "world", run.id))
        status = run.wait(timeout=240)
        assert (status.state, status.attempt) == (State.SUCCEEDED, 2), "the image itself is still here"
    finally:
        podman("untag", tag, tag)


def test_the_same_run_id_from_elsewhere_is_no_success(
    job: Callable[..., Path], world: ContainerWorld, ledger: Ledger, tmp_path: Path, trainer_image: str
) -> None:
    path = job(SLEEP, image=trainer_image)
    first = submit(path, target="world", run_id=own_id("shared"), ledger=ledger)
    until_sleeping(first, world)
    target = {**world.target, "root": str(tmp_path / "second")}
    (path.parent / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": target}}))
    second = submit(path, target="world", run_id=first.id, ledger=Ledger(tmp_path / "ledger-2"))
    status = second.wait(timeout=240)
    assert (status.state, status.reason.split(":")[0]) == (State.ERROR, "another submission runs this run")
    assert first.status().state is State.RUNNING
    first.cancel()
    assert first.wait(timeout=240).state is State.CANCELLED


# -- what the container has


def test_limits_are_set(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(
        "import os, time; s = os.statvfs('/dev/shm'); print('shm', s.f_blocks * s.f_frsize); print('sleeping');"
        "time.sleep(600)",
        resources={"shm": "96MiB", "memory": "512MiB", "cpus": 1},
    )
    until_sleeping(run, world)
    assert f"shm {96 << 20}" in text_of(run)
    host = container_of(run)["HostConfig"]
    assert (host["Memory"], host["NanoCpus"], host["ShmSize"]) == (512 << 20, 10**9, 96 << 20)


@pytest.mark.parametrize("memory", ["512MiB", None])
def test_an_unknown_command_gets_half_of_the_memory_to_share(
    run_job: Callable[..., Run], world: ContainerWorld, memory: str | None
) -> None:
    resources = {"memory": memory} if memory else {}
    run = run_job(
        "import os; s = os.statvfs('/dev/shm'); print('shm', s.f_blocks * s.f_frsize >> 20)", resources=resources
    )
    assert run.wait(timeout=240).state is State.SUCCEEDED
    half = 256 if memory else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 >> 20
    assert f"shm {half}" in text_of(run)


WRITES = """
    import json, os, pathlib, socket, tempfile, torch
    layout = {name: pathlib.Path(os.environ["CVLAUNCH_" + name]) for name in ("CHECKPOINTS", "MODEL", "OUTPUT")}
    for folder in layout.values():
        (folder / "written").write_text("by the job")
    line = {"step": 1, "epoch": 1, "time": 0, "split": "val", "values": {"accuracy": 0.5}}
    (layout["OUTPUT"] / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
    tempfile.mkdtemp()
    pathlib.Path.home().joinpath("x").write_text("home")
    print("user", os.getuid(), os.getgid())
    try:
        pathlib.Path("/opt/x").write_text("")
        print("wrote /opt")
    except OSError as error:
        print("refused", error.strerror)
"""


@pytest.mark.parametrize("user", [None, "1000730000:0", "42420:42420"])
def test_any_user_on_a_read_only_root_leaves_results(
    job: Callable[..., Path], world: ContainerWorld, ledger: Ledger, trainer_image: str, user: str | None
) -> None:
    path = job(WRITES, image=trainer_image)
    target = {**world.target, "user": user, "read_only": True}
    (path.parent / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": target}}))
    run = submit(path, target="world", ledger=ledger)
    assert run.wait(timeout=240).state is State.SUCCEEDED, text_of(run)
    uid, gid = map(int, (user or f"{os.geteuid()}:{os.getegid()}").split(":"))
    assert f"user {uid} {gid}" in text_of(run)
    assert "refused Read-only file system" in text_of(run)
    folder = run.store().local_path()
    assert folder is not None
    for name in ("checkpoints/written", "model/written", "output/metrics.jsonl", "output/result.json"):
        assert (folder / name).stat().st_uid == uid
    assert run.metrics().summary() == {"val/accuracy": 0.5}


def test_the_job_s_own_code_runs_in_the_image_s_python(
    job: Callable[..., Path], world: ContainerWorld, ledger: Ledger
) -> None:
    path = job("import mine; print('from', mine.__file__)", code={"root": "own"})
    (path.parent / "own").mkdir()
    (path.parent / "own/mine.py").write_text("")
    run = submit(path, target="world", settings=world.settings, ledger=ledger)
    assert run.wait(timeout=240).state is State.SUCCEEDED, text_of(run)
    assert "from /opt/ml/code/mine.py" in text_of(run)


def test_channels_are_mounted_read_only(
    job: Callable[..., Path], world: ContainerWorld, ledger: Ledger, tmp_path: Path, trainer_image: str
) -> None:
    data = tmp_path / 'a folder, with "signs"'
    data.mkdir()
    (data / "file").write_text("content")
    write(open_store(str(data)), scan(data))
    script = """
        import os, pathlib
        train = pathlib.Path(os.environ["CVLAUNCH_DATA_TRAIN"])
        print("read", (train / "file").read_text())
        try:
            (train / "file").write_text("changed")
        except OSError as error:
            print("refused", error.strerror)
    """
    run = submit(job(script, image=trainer_image, data={"train": str(data)}), target="world", ledger=ledger)
    assert run.wait(timeout=240).state is State.SUCCEEDED, text_of(run)
    assert "read content" in text_of(run)
    assert "refused Read-only file system" in text_of(run)
    assert (data / "file").read_text() == "content"
    assert run.status().state is State.SUCCEEDED


def test_an_object_store_takes_the_results_and_gives_the_data(
    job: Callable[..., Path], world: ContainerWorld, ledger: Ledger, moto_bucket: Bucket, trainer_image: str
) -> None:
    storage = {"endpoint": moto_bucket.server.endpoint, "region": "us-east-1"}
    name = moto_bucket.uri.removeprefix("s3://")
    moto_bucket.server.client().put_object(Bucket=name, Key="data/train/file", Body=b"far content")
    path = job(STOPPABLE, image=trainer_image, data={"train": f"{moto_bucket.uri}/data/train"})
    target = {**world.target, "output": f"{moto_bucket.uri}/runs", "storage": storage}
    (path.parent / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": target}}))
    run = submit(path, target="world", ledger=ledger)
    until(lambda: "starts from None" in text_of(run), world)
    world.preempt(Handle("container", "world", run.id))
    status = run.wait(timeout=240)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2), text_of(run)
    assert "starts from 1" in text_of(run)
    assert json.loads(run.store().read("output/result.json"))["upload"] == "complete"
    assert [e.path for e in run.store().list("checkpoints")] == ["checkpoints/1/complete.json", "checkpoints/1/state"]


def test_secrets_stand_in_no_engine_and_every_attempt_gets_them(
    run_job: Callable[..., Run], world: ContainerWorld, tmp_path: Path, home: Path
) -> None:
    canary = f"canary-{random_source.token_hex(8)}"
    since = time.time() - 1
    token = tmp_path / "token"
    token.write_text(canary * 5_000)  # more than a pipe holds
    token.chmod(0o600)
    run = run_job(
        "import os; print('secret of', len(os.environ['TOKEN']), flush=True)\n" + textwrap.dedent(STOPPABLE),
        secrets={"TOKEN": f"file:{token}"},
    )
    until(lambda: "starts from None" in text_of(run), world)
    assert canary not in podman("container", "inspect", run.id)
    assert canary not in podman("ps", "--all", "--no-trunc", "--format", "json")
    storage = Path(podman("info", "--format", "{{.Store.GraphRoot}}"))
    config = storage / "overlay-containers" / known_id(supervisor(run).path)
    assert config.is_dir()
    assert files_with(canary, since=since, folders=[tmp_path, home, config, Path("/run/containers")]) == {token}
    world.preempt(Handle("container", "world", run.id))
    assert run.wait(timeout=240).state is State.SUCCEEDED
    assert text_of(run).count(f"secret of {len(canary) * 5_000}") == 2


def test_nothing_of_the_shell_gets_in(
    run_job: Callable[..., Run], world: ContainerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("OF_MY_SHELL", "yes")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "not-needed-here")
    run = run_job("import os; print('HAS', *os.environ)")
    assert run.wait(timeout=240).state is State.SUCCEEDED
    (line,) = [line for line in text_of(run).splitlines() if line.startswith("HAS")]
    assert not {"CUDA_VISIBLE_DEVICES", "OF_MY_SHELL", "AWS_ACCESS_KEY_ID"} & set(line.split())


def test_gpus_go_by_the_engine_s_own_words(world: ContainerWorld, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    plan = json.loads(plan_of(world, tmp_path))
    order = Order(tmp_path, plan, 2, "native", ["GPU-1", "GPU-2"])
    docker, podman_here = Engine("docker", "docker"), Engine("podman", "podman")
    for engine, words, visible in (
        (docker, ["--gpus", '"device=GPU-1,GPU-2"'], "GPU-1,GPU-2"),
        (podman_here, ["--device", "nvidia.com/gpu=GPU-1", "--device", "nvidia.com/gpu=GPU-2"], "void"),
    ):
        command = engine.run_command(options(order, engine))
        assert any(command[i : i + len(words)] == words for i in range(len(command)))
        assert f"NVIDIA_VISIBLE_DEVICES={visible}" in command
        assert command[command.index("--name") + 1] == f"{plan['run_id']}-2"
    none = docker.run_command(options(Order(tmp_path, plan, 1, "native"), docker))
    assert "NVIDIA_VISIBLE_DEVICES=void" in none
    assert "--gpus" not in none


# -- foreign images


def test_a_foreign_image_runs_as_it_is(foreign: Callable[..., Run], world: ContainerWorld) -> None:
    run = foreign(
        "echo first; echo $GREETING ${CVLAUNCH_RUN_ID:-none}; printf model > /opt/ml/m; sleep 2; printf torn; exit 4",
        env={"GREETING": "hello"},
    )
    handle = run.handle
    assert handle is not None
    followed = [line.text for line in run.logs(follow=True)]
    assert followed == ["first", "hello none", "torn"]
    status = run.status()
    assert (status.state, status.exit_code) == (State.FAILED, 4)
    lines = list(run.logs())
    assert list(run.logs(since=lines[0].cursor)) == lines[1:]
    assert run.store().read("m") == b"model"


def test_a_foreign_image_s_own_command_and_its_timeout(
    foreign: Callable[..., Run], world: ContainerWorld, trainer_image: str
) -> None:
    run = foreign("trap 'exit 0' TERM; sleep 60 & wait", resources={"timeout": "2s"})
    status = run.wait(timeout=240)
    assert (status.state, status.reason) == (State.TIMED_OUT, "the timeout (resources.timeout) is used up")
    run = foreign("", image=trainer_image, command=None)  # its entry point finds no job.json
    status = run.wait(timeout=240)
    assert (status.state, status.exit_code) == (State.FAILED, 64)
    assert "set CVLAUNCH_JOB to a job.json" in text_of(run)


# -- exec


SHOW = "import os; print(os.environ['CVLAUNCH_MODEL'], os.environ['SM_MODEL_DIR'], os.environ['MINE'], os.getcwd())"


def test_a_command_runs_beside_the_job(run_job: Callable[..., Run], world: ContainerWorld) -> None:
    run = run_job(SLEEP, env={"MINE": "a 'quoted' value"})
    until_sleeping(run, world)
    done = execute(run, "python", "-c", SHOW)
    assert done.stdout == "/opt/ml/model /opt/ml/model a 'quoted' value /\n", done.stderr
    assert execute(run, "sh", "-c", "cat; exit 7", stdin="to it").returncode == 7
    assert execute(run, "cat", stdin="to it").stdout == "to it"
    missing = execute(run, "no-such-program")
    assert (missing.returncode, missing.stderr) == (127, "no-such-program: No such file or directory\n")
    run.cancel()
    assert run.wait(timeout=240).state is State.CANCELLED
    assert "is CANCELLED; nothing runs there any more" in execute(run, "true").stderr


def test_a_command_runs_beside_a_foreign_image(foreign: Callable[..., Run], world: ContainerWorld) -> None:
    run = foreign("trap 'exit 0' TERM; echo sleeping; sleep 60 & wait", env={"MINE": "x"})
    until_sleeping(run, world)
    assert execute(run, "sh", "-c", "echo $MINE").stdout == "x\n"
    run.cancel()
