"""`exec`: real commands beside real runs, here and in a container."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher import JobSpec, Run, State, submit
from launcher.errors import SpecError, UnsupportedError
from launcher.ledger import Ledger
from launcher.testing import World
from launcher.testing.conformance import job, ledger, run_job
from tests import doubtful
from tests.cli_tool import COMMAND, cli, user
from tests.worlds.container import ContainerWorld
from tests.worlds.local import LocalWorld

__all__ = ["job", "ledger", "run_job"]

WAITS = "import time; print('ready', flush=True); time.sleep(600)"
NAP, PAST = f"nap-{os.getpid()}", f"past-{os.getpid()}"
"""Run ids that no other test process of this machine has."""

TELL = "import os, sys; print(os.environ['LEVEL'], os.environ['CVLAUNCH_RUN_ID']); sys.exit(7)"


@pytest.fixture(
    scope="session",
    params=["local", pytest.param("container", marks=pytest.mark.needs("podman", "debootstrap"))],
)
def make_world(request: pytest.FixtureRequest) -> Callable[[Path], World]:
    if request.param == "local":
        return LocalWorld
    return functools.partial(ContainerWorld, image=request.getfixturevalue("trainer_image"))


@pytest.fixture
def world(make_world: Callable[[Path], World], tmp_path: Path) -> World:
    return make_world(tmp_path / "world")


def ready(run: Run, seconds: float = 240.0) -> Run:
    deadline = time.monotonic() + seconds
    while not any(line.text == "ready" for line in run.logs()):
        assert time.monotonic() < deadline, run.status()
        time.sleep(0.1)
    return run


def test_a_command_beside_a_run_has_its_environment_and_its_own_exit_code(
    run_job: Callable[..., Run], world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ready(run_job(WAITS, env={"LEVEL": "it's 3"}))
    capfd.readouterr()
    assert run.exec([world.python(), "-c", TELL], tty=False) == 7
    assert capfd.readouterr().out == f"it's 3 {run.id}\n"
    assert run.exec(["no-such-program"], tty=False) == 127
    assert run.exec(["sh", "-c", "kill -9 $$"], tty=False) == 137
    assert run.status().state is State.RUNNING
    run.cancel()
    run.wait(timeout=world.patience)
    with pytest.raises(SpecError, match=f"{run.id} has ended: CANCELLED"):
        run.exec(["true"])


def test_a_run_of_the_same_id_elsewhere_is_another(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = []
    for number, place in enumerate(("one", "two")):
        job = JobSpec(name="nap", command=(sys.executable, "-u", "-c", WAITS), env={"LEVEL": str(number)})
        target = {"backend": "local", "output": str(tmp_path / place), "root": str(tmp_path / place / "root")}
        (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": target}}))
        ledger = Ledger(tmp_path / place / "ledger", tmp_path / place / "cache")
        runs.append(ready(submit(job, target="world", run_id=NAP, folder=tmp_path, ledger=ledger)))
    capfd.readouterr()
    for run in runs:
        assert run.exec([sys.executable, "-c", TELL], tty=False) == 7
        run.cancel()
    assert capfd.readouterr().out == f"0 {NAP}\n1 {NAP}\n"


# ---- the command line, on this machine


@dataclass(frozen=True)
class Napping:
    """A user with a run NAP that is going on, and one, PAST, that has ended."""

    folder: Path
    home: Path

    def cli(self, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return cli(*arguments, cwd=self.folder, env=user(self.home), stdin=stdin)

    @property
    def run(self) -> Run:
        return Run(NAP, Ledger(self.home / "data/cvlaunch/runs", self.home / "cache/cvlaunch"))


@pytest.fixture(scope="module")
def napping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Napping]:
    world = Napping(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("home"))
    for name, script in (NAP, WAITS), (PAST, "pass"):
        text = f"name: {name}\ncommand: [{sys.executable}, -c, {script!r}]\nenv: {{LEVEL: 3}}\n"
        (world.folder / f"{name}.yaml").write_text(text)
        assert world.cli("submit", f"{name}.yaml", "--run-id", name).returncode == 0
    world.cli("wait", PAST)
    ready(world.run)
    yield world
    world.cli("cancel", NAP)
    world.cli("wait", NAP)


def test_the_command_line(napping: Napping) -> None:
    told = napping.cli("exec", NAP, "--", sys.executable, "-c", TELL)
    assert (told.returncode, told.stdout, told.stderr) == (7, f"3 {NAP}\n", "")
    options = napping.cli("exec", NAP, "echo", "-n", "--help", "--", "x")
    assert (options.returncode, options.stdout) == (0, "--help -- x")
    piped = napping.cli("exec", NAP, "cat", stdin="through\n")
    assert piped.stdout == "through\n"
    for arguments, message in (
        ((PAST, "true"), f"{PAST} has ended: SUCCEEDED; a command runs only beside a run that is going on"),
        ((NAP,), f"no command; it stands after the run: cvlaunch exec {NAP} -- nvidia-smi"),
        ((NAP, "--"), f"no command; it stands after the run: cvlaunch exec {NAP} -- nvidia-smi"),
        ((f"{NAP}s", "true"), f"there is no run '{NAP}s'; did you mean '{NAP}'?"),
        ((), "Missing argument 'RUN'"),
    ):
        done = napping.cli("exec", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"cvlaunch: {message}")


def test_a_shell_has_the_terminal_and_survives_ctrl_c(napping: Napping) -> None:
    """A job shell of its own session: its Ctrl-C reaches cvlaunch, too."""
    import pty

    pid, terminal = pty.fork()
    if not pid:
        os.chdir(napping.folder)
        os.execve(
            COMMAND[0], [*COMMAND, "exec", NAP, "--", "env", "PS1=ask> ", "sh"], {**os.environ, **user(napping.home)}
        )
    typed = iter(["tty; echo ready-$LEVEL\n", "sleep 100; :\n", "\x03", "echo still-$LEVEL\n", "exit 5\n"])
    text = expect(terminal, "ask> ")
    os.write(terminal, next(typed).encode())
    text += expect(terminal, "ready-3")
    os.write(terminal, next(typed).encode())
    time.sleep(1)
    os.write(terminal, next(typed).encode())
    time.sleep(0.5)
    os.write(terminal, next(typed).encode())
    text += expect(terminal, "still-3")
    os.write(terminal, next(typed).encode())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    os.close(terminal)
    assert "/dev/pts/" in text and "Traceback" not in text


def expect(terminal: int, words: str, seconds: float = 240.0) -> str:
    """What the terminal shows, up to these words."""
    import select

    text, deadline = "", time.monotonic() + seconds
    while words not in text:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], text
        text += os.read(terminal, 4096).decode()
    return text


def test_what_is_no_command_is_refused(napping: Napping) -> None:
    for command in ([], "nvidia-smi"):
        with pytest.raises(SpecError, match="is not a command"):
            napping.run.exec(command)


def test_a_backend_that_can_t_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in; its reason is said before anything is asked about the run."""
    doubtful.install(tmp_path / "plugin")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugin"), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path / "plugin"))
    (tmp_path / "job.yaml").write_text("name: nap\ncommand: ['true']\n")
    assert cli("submit", "job.yaml", "--backend", "doubtful", "--run-id", NAP, cwd=tmp_path).returncode == 0
    done = cli("exec", NAP, "true", cwd=tmp_path)
    reason = "the doubtful backend runs no command beside a run: it is not sure where it runs; look at its logs"
    assert (done.returncode, done.stderr) == (2, f"cvlaunch: {reason}\n")
    with pytest.raises(UnsupportedError):
        Run(NAP, Ledger()).exec(["true"])


def test_nothing_is_printed_by_us(napping: Napping) -> None:
    """Bytes of a command go through as they are, so that `exec RUN -- tar c .` can be unpacked."""
    program = "import sys; sys.stdout.buffer.write(bytes(range(256)))"
    done = subprocess.run(
        [*COMMAND, "exec", NAP, "--", sys.executable, "-c", program],
        cwd=napping.folder,
        env={**os.environ, **user(napping.home)},
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (bytes(range(256)), b"")
