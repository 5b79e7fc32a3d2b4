"""A daemon in namespaces of its own: when it is stopped, nothing that it or its children started is left."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Daemon", "start_daemon"]

# The first process of the PID namespace: the kernel kills all others when it ends. It ends with the daemon, at a line
# on its stdin, or when nobody holds the other end of that any more: also if pytest was killed.
# Bash starts what is in the background with SIGINT ignored, which the jobs of a slurmd would inherit.
_FIRST_PROCESS = """\
exec 3<&0
{prepare}
env --default-signal "$@" 3<&- </dev/null &
read -r _ <&3 &
wait -n
"""


@dataclass(frozen=True)
class Daemon:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, ready: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """AssertionError with the end of its log if it ends before, or is not ready in that time."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            if ready():
                return
            time.sleep(0.02)
        why = f"not {what} in {seconds:g} s" if self.running else f"ended with {self.process.returncode}"
        raise AssertionError(f"{self.name}: {why}:\n{self.last_words()}")

    def wait_for_end(self, seconds: float = 120) -> None:
        self.process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """As if the power were cut. Returns when all of its processes are gone; they may be already."""
        if self.process.stdin and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(b"\n")
            self.process.stdin.close()
        self.process.wait(120)

    def last_words(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def start_daemon(
    name: str, command: list[str], *, log: Path, environment: Mapping[str, str], prepare: str = ""
) -> Daemon:
    """The command must stay in the foreground. `prepare`: bash that runs before, in the daemon's own namespaces of
    mounts and of the host's name.

    Ctrl-C does not reach it; pytest ends it.
    """
    script = _FIRST_PROCESS.format(prepare=prepare)
    namespaces = ["unshare", "--pid", "--fork", "--mount-proc", "--uts"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*namespaces, "bash", "-ec", script, name, *command],
            stdin=subprocess.PIPE,
            bufsize=0,
            stdout=out,
            stderr=out,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    return Daemon(name, process, log)
