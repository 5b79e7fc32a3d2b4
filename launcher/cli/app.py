"""The table of commands, and what every one of them does with an error."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from launcher._version import __version__
from launcher.errors import CvlaunchError, nearest

__all__ = ["EXIT_CODES", "SECTIONS", "Interrupted", "cli", "main"]

SECTIONS = {
    "Write a job": {
        "init": ("writing:init", "Write a job file that fits a data folder."),
        "schema": ("writing:schema", "Print the JSON Schema of job files."),
        "render": ("rendering:render", "Show what would be sent, without sending it."),
        "rehearse": ("rehearsing:rehearse", "Run a job's image here under a platform's rules."),
        "data": ("data:data", "Check, fingerprint and push data folders."),
        "image": ("images:image", "Build, push and look at the images that jobs run in."),
    },
    "Run it": {
        "submit": ("submitting:submit", "Send a job; print its handle."),
        "attach": ("attaching:attach", "Take in a run that somebody else has sent."),
        "rerun": ("submitting:rerun", "Send the job of an earlier run afresh."),
        "watch": ("following:watch", "Follow a run to its end and bring its results."),
        "wait": ("following:wait", "Wait until runs have ended."),
        "cancel": ("runs:cancel", "Stop runs for good."),
    },
    "Look at runs": {
        "runs": ("runs:runs", "List runs, the newest first."),
        "status": ("runs:status", "Say what a run is doing."),
        "logs": ("results:logs", "Print a run's log."),
        "metrics": ("results:metrics", "Print a run's metrics by epoch."),
        "diff": ("results:diff", "Say whether two runs are the same job."),
        "exec": ("executing:execute", "Run a command beside a run that is going on."),
    },
    "Results": {
        "sync": ("results:sync", "Bring a run's files to this machine."),
        "report": ("results:report", "Write an HTML page about one run or several."),
        "rm": ("runs:rm", "Forget runs, and delete what is left of them."),
    },
    "Places": {
        "targets": ("places:targets", "List, show and set up the places to run jobs."),
        "shm": ("shm:shm", "Look at and set /dev/shm of what is in a cluster already."),
        "login": ("clusters:login", "Open the way to a cluster or an account that wants somebody to log in."),
        "backends": ("places:backends", "Show what each platform can do."),
        "templates": ("places:templates", "Show a platform's template, or copy it to change it."),
        "completion": ("writing:completion", "Print the completion script of a shell."),
    },
}
"""Section of the help → command → where it is (module of this package:function) and its first line of help."""

EXIT_CODES = {
    0: "done",
    1: "the run did not succeed; `diff`, `rehearse`, `shm check` found something",
    2: "wrong input: the message names file, line and key",
    4: "no identity, or one without the permission",
    5: "no room: quota, hardware or disk",
    6: "a service did not answer; try again",
    7: "a name is taken by something else",
    8: "bytes differ from what was promised",
    70: "a bug of cvlaunch; CVLAUNCH_DEBUG=1 shows where",
    124: "`wait --timeout` ran out; the run goes on",
    130: "interrupted with Ctrl-C; a run that was followed goes on",
    141: "the reader of the output went away",
}

_COMMANDS = {name: place for section in SECTIONS.values() for name, place in section.items()}


class Interrupted(Exception):  # noqa: N818 not an error: the user asked for it
    """Ctrl-C, with a word about what goes on all the same."""


class _Commands(click.Group):
    """Imports a command when it is used; its help in the list comes from the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, function = _COMMANDS[name][0].partition(":")
        found: click.Command = getattr(importlib.import_module(f"launcher.cli.{module}"), function)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(10), text) for name, (_, text) in commands.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text.replace("`", "")) for code, text in EXIT_CODES.items()])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.version_option(__version__, prog_name="cvlaunch", message="%(prog)s %(version)s")
def cli() -> None:
    """Say a computer-vision training job once; run it on this machine, a cluster or a cloud; get one result.

    RUN is a run id, the beginning of one, a handle (slurm://hpc/1234), or `last` for the newest run.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Prints one line for an error that is not a bug."""
    _take_any_character()
    try:
        code = cli.main(arguments, prog_name="cvlaunch", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as error:  # click's own end after EPIPE, and shell completion
        return _reader_gone() if error.code == 1 else int(error.code or 0)
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted", 130)
    except Interrupted as word:
        return _say(str(word), 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _say(_usage(error), 2)
    except CvlaunchError as error:
        return _say(str(error), error.exit_code)
    except OSError as error:
        return _os_error(error)
    except Exception as error:
        return _bug(error)
    return code if isinstance(code, int) else 0


def _say(message: str, code: int) -> int:
    click.echo(f"cvlaunch: {message}", err=True)
    return code


def _usage(error: click.ClickException) -> str:
    message = error.format_message().rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{message}; see: {context.command_path} --help" if context and not message.endswith("?") else message


def _os_error(error: OSError) -> int:
    """A file of the user's that can't be read or written."""
    no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if os.environ.get("CVLAUNCH_DEBUG") == "1" or (error.filename is None and not no_room):
        return _bug(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return _say(f"{where}{error.strerror}", 5 if no_room else 2)


def _bug(error: BaseException) -> int:
    if os.environ.get("CVLAUNCH_DEBUG") == "1":
        _raise(error)
    said = f": {error}" if str(error) else ""
    return _say(
        f"unexpected {type(error).__name__}{said}; this is a bug of cvlaunch {__version__}: "
        "please report it with what the same command prints under CVLAUNCH_DEBUG=1",
        70,
    )


def _raise(error: BaseException) -> NoReturn:
    raise error


def _reader_gone() -> int:
    """`cvlaunch runs | head -1`: nobody reads on, which is no error. Python's own flush at exit must not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    return 141


def _take_any_character() -> None:
    """A terminal that can't show a character gets a `?` instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
