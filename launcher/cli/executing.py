"""`exec`: a command beside a run that is going on."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

import click

from launcher.cli.options import find_run, run_argument
from launcher.errors import SpecError

__all__ = ["execute"]


@click.command("exec", context_settings={"allow_interspersed_args": False})
@run_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] COMMAND...")
def execute(*, run: str, command: tuple[str, ...]) -> int:
    """Run a command beside a run that is going on.

    It has the run's environment, folders and GPUs, and this terminal: `cvlaunch exec last -- nvidia-smi`, `cvlaunch
    exec last bash`. Exits with the command's own exit code.
    """
    command = command[1:] if command[:1] == ("--",) else command
    found = find_run(run)
    if not command:
        raise SpecError(f"no command; it stands after the run: cvlaunch exec {found.id} -- nvidia-smi")
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    with _ctrl_c_is_the_commands(tty):
        return found.exec(command, tty=tty)


@contextlib.contextmanager
def _ctrl_c_is_the_commands(tty: bool) -> Iterator[None]:
    """A shell or a debugger goes on after Ctrl-C, and so must we.

    Not SIG_IGN, which the command would inherit; a handler of ours ends with exec.
    """
    if not tty:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
