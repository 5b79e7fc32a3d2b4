"""A cluster behind a real ssh, from a machine without SLURM: what a user does there, and connections that break."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher import Run, State, render, runs, submit
from launcher.errors import UnreachableError
from launcher.remote import Host
from launcher.slurm import places
from tests.cli_tool import COMMAND, cli, ledger_files
from tests.services.slurm import SlurmCluster
from tests.services.sshd import ALIAS, Sshd, close_connections
from tests.worlds.slurm import SlurmWorld

pytestmark = pytest.mark.needs("slurm", "sshd")

COUNT = """\
import json, os, pathlib
channels = {name: pathlib.Path(os.environ[f"CVLAUNCH_DATA_{name}"]) for name in ("NUMBERS", "BEFORE")
            if f"CVLAUNCH_DATA_{name}" in os.environ}
total = sum(int(path.read_text()) for folder in channels.values() for path in folder.glob("*.txt"))
print("total", total)
pathlib.Path(os.environ["CVLAUNCH_MODEL"], "total.txt").write_text(str(total))
line = {"step": 1, "epoch": 1, "time": 0, "split": "val", "values": {"total": total}}
pathlib.Path(os.environ["CVLAUNCH_OUTPUT"], "metrics.jsonl").write_text(json.dumps(line) + "\\n")
"""
WAITS = "import time; print('ready', flush=True); time.sleep(600)"


@dataclass(frozen=True)
class Hpc:
    """project: the user's folder here. root: the target's, on the cluster."""

    project: Path
    root: Path
    cluster: SlurmCluster
    server: Sshd

    def cli(self, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return cli(*arguments, cwd=self.project, stdin=stdin)

    def good(self, *arguments: object) -> str:
        """What it prints on stdout."""
        done = self.cli(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def write(self, script: str, **keys: object) -> Path:
        path = self.project / "job.yaml"
        path.write_text(yaml.safe_dump({"name": "far", "command": [sys.executable, "-u", "-c", script], **keys}))
        return path

    def submit(self, script: str = WAITS, **keys: object) -> Run:
        return submit(self.write(script, **keys), target="hpc")

    def jobs(self, run_id: str) -> list[str]:
        """Ids of the jobs that SLURM has had of a run."""
        return self.cluster.run("squeue", "-h", "-t", "all", "-n", run_id, "-o", "%i").split()


@pytest.fixture
def hpc(
    slurm_session: SlurmCluster, slurm_login: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hpc]:
    world = SlurmWorld(tmp_path / "cluster", slurm_session, ssh=slurm_login)
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    project = tmp_path / "project"
    project.mkdir()
    targets = {"targets": {"hpc": dict(world.target), "local": {"backend": "local", "output": str(tmp_path / "here")}}}
    (project / "targets.yaml").write_text(yaml.safe_dump(targets))
    yield Hpc(project, tmp_path / "cluster/root", slurm_session, slurm_login)
    slurm_session.clear()


@pytest.fixture
def numbers(hpc: Hpc) -> Path:
    """A folder of this machine with a job that adds up what is in it, by code of its own."""
    folder = hpc.project / "my numbers"
    folder.mkdir()
    for number in (1, 20, 300):
        (folder / f"{number}.txt").write_text(str(number))
    (hpc.project / "code").mkdir()
    (hpc.project / "code/count.py").write_text(COUNT)
    job = {"name": "far", "command": [sys.executable, "count.py"], "code": {"root": "code"}}
    (hpc.project / "job.yaml").write_text(yaml.safe_dump({**job, "data": {"numbers": folder.name}}))
    return folder


def until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def text_of(run: Run) -> str:
    return "\n".join(line.text for line in run.logs())


def ready(run: Run) -> Run:
    until(lambda: "ready" in text_of(run))
    return run


def digest(hpc: Hpc, target: str, *settings: str) -> str:
    return render(hpc.project / "job.yaml", target=target, settings=settings, online=True).job_digest


# -- what a user does -------------------------------------------------------------------------------------------------


def test_from_pushed_data_to_results_at_home(hpc: Hpc, numbers: Path) -> None:
    place = hpc.root / "data/numbers"
    pushed = hpc.good("data", "push", numbers, f"ssh://{ALIAS}{place}")
    assert pushed == hpc.good("data", "fingerprint", numbers)
    by_path, by_uri = f"data.numbers=target:{place}", f"data.numbers=ssh://{ALIAS}{place}"
    here = digest(hpc, "local")
    assert [digest(hpc, "hpc", by_path), digest(hpc, "hpc", by_uri)] == [here, here]

    done = hpc.cli("submit", "job.yaml", "--target", "hpc", "--set", by_uri, "--follow", "--sync", "home")
    assert done.returncode == 0, done.stderr
    run = runs()[0]
    assert done.stdout == f"{run.handle}\n"
    assert "total 321" in done.stderr and f"{run.id} SUCCEEDED" in done.stderr
    assert (hpc.project / "home" / run.id / "model/total.txt").read_text() == "321"
    assert run.record.plan["job_digest"] == here
    assert (Path(places.runs(str(hpc.root))) / run.id / "model/total.txt").exists()

    assert "321" in hpc.good("metrics", run.id)
    assert "total 321" in hpc.good("logs", run.id)
    hpc.good("report", run.id, "--out", "page.html")
    assert "321" in (hpc.project / "page.html").read_text()
    assert "0 files" in hpc.cli("sync", run.id, "home").stderr

    again = hpc.cli(
        "submit",
        "job.yaml",
        "--target",
        "hpc",
        "--set",
        by_uri,
        "--set",
        f"data.before=run://{run.id}/model",
        "--follow",
    )
    assert again.returncode == 0, again.stderr
    assert "total 642" in again.stderr

    record = Path(places.record(str(hpc.root), run.id))
    assert record.exists()
    hpc.good("rm", run.id, "--remote", "--yes")
    assert not record.exists() and run.id not in [other.id for other in runs()]
    assert [path for path in Path(places.runs(str(hpc.root)), run.id).rglob("*") if path.is_file()] == []


def test_a_folder_of_this_machine_is_pushed_as_the_message_says(hpc: Hpc, numbers: Path) -> None:
    refused = hpc.cli("submit", "job.yaml", "--target", "hpc")
    assert refused.returncode == 2 and "data.numbers" in refused.stderr and ledger_files(Path.home()) == []
    command = shlex.split(refused.stderr[refused.stderr.index("cvlaunch data push") :])
    assert command[:3] == ["cvlaunch", "data", "push"]
    hpc.good(*command[1:])
    run = submit(hpc.project / "job.yaml", target="hpc", settings=[f"data.numbers={command[-1]}"])
    assert run.wait(timeout=240).state is State.SUCCEEDED
    assert "total 321" in text_of(run)


def test_push_data_brings_it_beside_the_runs(hpc: Hpc, numbers: Path) -> None:
    done = hpc.cli("submit", "job.yaml", "--target", "hpc", "--push-data", "--follow")
    assert done.returncode == 0, done.stderr
    assert f"pushed data.numbers to ssh://{ALIAS}{hpc.root}/runs/_data/" in done.stderr
    assert "total 321" in done.stderr
    assert runs()[0].record.plan["unpinned"] == ["image: a process runs in an environment that no digest covers"]


def test_beside_a_run_that_goes_on(hpc: Hpc) -> None:
    run = ready(hpc.submit(env={"LEVEL": "it's 3"}))
    follower = subprocess.Popen(
        [*COMMAND, "logs", run.id, "--follow"], cwd=hpc.project, stdout=subprocess.PIPE, text=True
    )
    told = hpc.cli("exec", run.id, "--", "sh", "-c", 'echo "$LEVEL $CVLAUNCH_RUN_ID"; cat; exit 7', stdin="through\n")
    assert (told.returncode, told.stdout) == (7, f"it's 3 {run.id}\nthrough\n"), told.stderr
    assert in_terminal(hpc.project, "exec", run.id, "--", "sh", "-c", "tty; exit 5").splitlines()[-1] == "5"
    hpc.good("cancel", run.id)
    assert run.wait(timeout=240).state is State.CANCELLED
    assert "ready" in follower.communicate(timeout=240)[0]
    assert follower.returncode == 0


def in_terminal(folder: Path, *arguments: str) -> str:
    """What the command line shows in a terminal, and its exit code in the last line. It has to show one of its own."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        os.execve(COMMAND[0], [*COMMAND, *arguments], dict(os.environ))
    text = b""
    with contextlib.suppress(OSError):  # EIO is the end
        while block := os.read(terminal, 4096):
            text += block
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    assert re.search(rb"/dev/pts/\d+", text), text
    return f"{text.decode()}\n{code}"


# -- what breaks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_sbatch(hpc: Hpc, tmp_path: Path) -> Iterator[Path]:
    """A folder: `arrived` appears when sbatch is called on the cluster, which goes on when `go` appears."""
    gate = tmp_path / "gate"
    gate.mkdir()
    script = gate / "sbatch"
    script.write_text(
        f'#!/bin/sh\ntouch {gate}/arrived\nwhile [ ! -e {gate}/go ]; do sleep 0.05; done\nexec /usr/bin/sbatch "$@"\n'
    )
    script.chmod(0o755)
    profile = hpc.server.home / ".bash_profile"
    profile.write_text(f"PATH={gate}:$PATH\n")
    yield gate
    (gate / "go").touch()
    profile.unlink()


def test_a_connection_cut_in_the_middle_of_a_submission_loses_and_doubles_nothing(hpc: Hpc, slow_sbatch: Path) -> None:
    hpc.write("print('once')")
    sender = subprocess.Popen(
        [*COMMAND, "submit", "job.yaml", "--target", "hpc", "--run-id", "far-cut"],
        cwd=hpc.project, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until((slow_sbatch / "arrived").exists)
    hpc.server.cut()
    _, said = sender.communicate(timeout=240)
    assert sender.returncode == 6
    assert "whether far-cut was submitted is not known" in said and "cvlaunch submit --resume far-cut" in said
    assert "SENDING" in hpc.good("runs")  # asked, and not there yet
    (slow_sbatch / "go").touch()
    until(lambda: Run("far-cut").status().state is not State.SENDING)
    assert Run("far-cut").wait(timeout=240).state is State.SUCCEEDED
    assert len(hpc.jobs("far-cut")) == 1


def test_a_submission_that_was_cut_off_is_sent_again_and_waits_for_itself(hpc: Hpc, slow_sbatch: Path) -> None:
    """Nor does it take a job of the same name for its own, which may be a run's below another root."""
    foreign = str(hpc.cluster.submit("true", "--job-name=far-again"))
    hpc.cluster.wait_for_state(foreign, "COMPLETED")
    hpc.write("print('once')")
    sender = subprocess.Popen(
        [*COMMAND, "submit", "job.yaml", "--target", "hpc", "--run-id", "far-again"],
        cwd=hpc.project, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until((slow_sbatch / "arrived").exists)
    hpc.server.cut()
    assert sender.wait(240) == 6
    again = subprocess.Popen([*COMMAND, "submit", "--resume", "far-again"], cwd=hpc.project, stdout=subprocess.DEVNULL)
    until(lambda: Run("far-again").record.owner_alive)  # soon it waits for the first one, which still has the lock
    (slow_sbatch / "go").touch()
    assert again.wait(240) == 0
    assert Run("far-again").wait(timeout=240).state is State.SUCCEEDED
    assert len(set(hpc.jobs("far-again")) - {foreign}) == 1


def test_a_script_that_comes_in_half_is_no_job(hpc: Hpc) -> None:
    record = str(hpc.root / "jobs/far-half")
    text = (Path(places.__file__).parent / "scripts/submit.sh").read_text()
    done = Host(ALIAS).run(text, record, "far-half", "1", "1000", "0", stdin=b"#!/bin/bash\n")
    assert (done.code, done.out) == (46, b"")
    assert hpc.jobs("far-half") == []
    assert not Path(record).exists()


def test_watching_goes_on_after_the_connection_broke(hpc: Hpc, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = ready(
        hpc.submit(
            f"import os, time; print('ready')\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)\nprint('after')"
        )
    )
    watcher = subprocess.Popen(
        [*COMMAND, "watch", run.id], cwd=hpc.project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert watcher.stdout is not None
    for line in watcher.stdout:
        if "ready" in line:
            break
    hpc.server.cut()
    go.touch()
    rest = watcher.stdout.read()
    assert watcher.wait(240) == 0, rest
    assert "after" in rest and "ready" not in rest and "SUCCEEDED" in rest
    watcher.stdout.close()


def test_a_host_that_is_down_hides_nothing_that_was_seen(
    hpc: Hpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ready(hpc.submit())
    assert run.status().state is State.RUNNING
    with down(hpc, tmp_path, monkeypatch):
        listed = hpc.cli("runs")
        assert listed.returncode == 0
        assert re.search(rf"{run.id} +RUNNING .* hpc \(slurm\)", listed.stdout)
        assert f"target hpc could not be asked: {ALIAS}: nothing answers at its port" in listed.stderr
        status = hpc.cli("status", run.id)
        assert "RUNNING" in status.stdout and "this is what was last seen" in status.stderr
        with pytest.raises(UnreachableError):
            run.status()
        refused = hpc.cli("submit", "job.yaml", "--target", "hpc")
        assert refused.returncode == 6 and f"{ALIAS}: nothing answers at its port" in refused.stderr
        assert ledger_files(Path.home()) == [f"{run.id}.json"]
    assert run.status().state is State.RUNNING


@contextlib.contextmanager
def down(hpc: Hpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody listens, and no connection stands."""
    close_connections(hpc.server.runtime)
    script = tmp_path / "bin/ssh"
    script.parent.mkdir()
    config = hpc.server.config.read_text().replace(f"Port {hpc.server.port}", "Port 9")
    (tmp_path / "ssh_config").write_text(config)
    script.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp_path / "ssh_config"} "$@"\n')
    script.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        yield


def test_few_round_trips(hpc: Hpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow line, each is a second. Every `ssh` that is started writes a line."""
    script, count = tmp_path / "bin/ssh", tmp_path / "count"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho >> {count}\nexec {hpc.server.bin}/ssh "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    def trips(action: Callable[[], object]) -> int:
        count.write_text("")
        action()
        return len(count.read_text())

    hpc.write(WAITS)
    assert trips(lambda: submit(hpc.project / "job.yaml", target="hpc")) <= 2
    run = ready(runs()[0])
    cursor = list(run.logs())[-1].cursor
    assert trips(run.status) == 1
    assert trips(lambda: list(run.logs(since=cursor))) <= 3
    assert trips(run.metrics) == 1
    assert trips(run.cancel) <= 5  # one more if it has ended at once
    run.wait(timeout=240)
