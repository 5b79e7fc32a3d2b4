"""As PID 1: signals go through, orphans are reaped, the command's exit code stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.runner_world import RunnerWorld, python, until

pytestmark = pytest.mark.needs("unshare")

PID_1 = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
ORPHANS = """
import subprocess
for _ in range(50):
    subprocess.run(["sh", "-c", "sleep 0.2 & exit 0"])
"""
OTHERS = """
import contextlib
def others():
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.parent.name) not in (1, os.getppid(), os.getpid()):
                states.append(stat.read_text().rpartition(")")[2].split()[0])
    return states
end = time.monotonic() + 30
while others() and time.monotonic() < end:
    time.sleep(0.05)
"""


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path)


@pytest.mark.parametrize("code", [3, 64])
def test_exit_code_with_50_orphans_around(world: RunnerWorld, code: int) -> None:
    program = ORPHANS + OTHERS + f"print('zombies:', others().count('Z'), 'parent', os.getppid()); sys.exit({code})"
    ended = world.start(world.job(python(program)), prefix=PID_1).end()
    assert ended.code == code
    assert "zombies: 0 parent 2" in ended.output  # the runner is the child of the init
    assert world.result["exit_code"] == code


def test_term_is_passed_on(world: RunnerWorld) -> None:
    program = "signal.signal(signal.SIGTERM, lambda *_: (checkpoint(1), sys.exit(75))); ready(); time.sleep(60)"
    running = world.start(world.job(python(program)), prefix=PID_1).printed("ready")
    init = _child_of(running.process.pid)
    os.kill(init, signal.SIGTERM)
    assert running.end().code == 75


def _child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(lambda: children.read_text().split())
    return int(children.read_text().split()[0])
