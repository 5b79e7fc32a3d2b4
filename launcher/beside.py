"""Runs a program beside a run's command, with that command's variables and in its folder.

    python beside.py RUN_ID ROOT PROGRAM [ARGUMENT…]

Standard library only, and on its own: the text of this file is also sent into containers, whatever version of cvlaunch
they have. Linux: what a process was started with stands in /proc.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

__all__ = ["find_command", "main"]

_NOT_FOUND, _NOT_STARTED = 127, 126
"""Exit codes of a shell for a program that is not there, and for one that can't be started."""


def find_command(run_id: str, root: str) -> int | None:
    """The first process of a run's command: the runner alone gives it $CVLAUNCH_RUN_ID. None if it isn't running.

    root: the run's, by which it is told from a run of the same id that somebody else has on this machine.
    """
    wanted = {f"CVLAUNCH_RUN_ID={run_id}".encode(), os.fsencode(f"CVLAUNCH_ROOT={root}")}
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted <= {*environ.read_bytes().split(b"\0")}:
                found.append((_started(environ.with_name("stat")), int(environ.parent.name)))
    return min(found)[1] if found else None


def _started(stat: Path) -> int:
    """Clock ticks since boot (proc(5), field 22)."""
    return int(stat.read_bytes().rpartition(b") ")[2].split()[19])


def main(run_id: str, root: str, program: str, *arguments: str) -> int:
    """Becomes the program. The exit code only if there is none such."""
    pid = find_command(run_id, root)
    env = dict(os.environb)
    if pid is None:
        sys.stderr.write(f"the command of {run_id} isn't running yet; these are not its variables\n")
    else:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        env = {name: value for name, _, value in (pair.partition(b"=") for pair in pairs) if name}
        os.chdir(f"/proc/{pid}/cwd")
    try:
        os.execvpe(program, [program, *arguments], env)  # noqa: S606 - no shell is wanted
    except OSError as error:
        sys.stderr.write(f"{program}: {error.strerror}\n")
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
