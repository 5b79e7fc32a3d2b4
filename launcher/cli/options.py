"""Arguments and options that several commands share, and what the shell completes them with."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from launcher.cli.app import Interrupted
from launcher.cli.out import Out
from launcher.errors import SpecError

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = [
    "ask",
    "complete_backends",
    "complete_runs",
    "complete_targets",
    "find_run",
    "json_option",
    "pairs",
    "place_options",
    "quiet_option",
    "run_argument",
    "runs_argument",
    "seconds",
    "target_option",
]

F = TypeVar("F", bound=Callable[..., Any])


Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completer(listed: Callable[[], Iterator[tuple[str, str]]]) -> Completer:
    """listed: gives (word, help)."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        items: list[CompletionItem] = []
        with contextlib.suppress(Exception):  # whatever is wrong is said when the command runs, not while typing
            items = [CompletionItem(word, help=text) for word, text in listed() if word.startswith(incomplete)]
        return items

    return complete


def _runs() -> Iterator[tuple[str, str]]:
    from launcher.ledger import Ledger

    yield from ((summary.run_id, str(summary.state)) for summary in Ledger().summaries())
    yield "last", "the newest run"


def _targets() -> Iterator[tuple[str, str]]:
    from launcher.targets import load_targets

    targets = load_targets(Path.cwd())
    yield from ((name, targets.source(name)) for name in targets.names())


def _backends() -> Iterator[tuple[str, str]]:
    from launcher.backends import names

    yield from ((name, "") for name in names())


def seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Callback of an option that takes 2h, 90m, 7d."""
    from launcher.quantities import parse_duration

    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


complete_runs = _completer(_runs)
complete_targets = _completer(_targets)
complete_backends = _completer(_backends)

run_argument = click.argument("run", shell_complete=complete_runs)
runs_argument = click.argument("run", nargs=-1, required=True, shell_complete=complete_runs)
target_option = click.option(
    "--target", metavar="NAME", shell_complete=complete_targets, help="A place of targets.yaml."
)
backend_option = click.option(
    "--backend", metavar="NAME", shell_complete=complete_backends, help="The one target of this platform."
)


def find_run(text: str) -> Run:
    """By id, by the beginning of one, by handle, or `last`."""
    from launcher.ledger import Ledger
    from launcher.run import Run

    ledger = Ledger()
    if text != "last":
        return Run(ledger.find(text), ledger)
    newest = next(iter(ledger.summaries()), None)
    if newest is None:
        raise SpecError("there is no run yet; submit one with: cvlaunch submit job.yaml")
    return Run(ledger.get(newest.run_id), ledger)


def ask(question: str) -> None:
    """Goes on after a yes; Interrupted after a no. SpecError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise SpecError("this needs a yes; nobody can be asked here, so give --yes")
    if not click.confirm(question, err=True):
        raise Interrupted("nothing was changed")


def place_options(command: F) -> F:
    """--backend, --target, --set: what `submit`, `rerun` and `render` take."""
    setting = click.option(
        "--set",
        "settings",
        metavar="KEY=VALUE",
        multiple=True,
        help="Change a value of the job: train.epochs=3. May be repeated.",
    )
    return backend_option(target_option(setting(command)))


def json_option(command: F) -> F:
    """--json and --quiet; the command gets them as `out`."""
    return _with_out(click.option("--json", "as_json", is_flag=True, help="Print JSON.")(_quiet(command)))


def quiet_option(command: F) -> F:
    """--quiet alone; the command gets it as `out`."""
    return _with_out(_quiet(command))


def _quiet(command: F) -> F:
    return click.option("-q", "--quiet", is_flag=True, help="Print no messages but errors.")(command)


def _with_out(command: F) -> F:
    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, as_json: bool = False, **values: Any) -> Any:
        return command(*args, out=Out(as_json=as_json, quiet=quiet), **values)

    return wrapped  # type: ignore[return-value]


def pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """`k=v` options. SpecError for anything else."""
    found = dict(text.partition("=")[::2] for text in texts)
    for text in texts:
        if "=" not in text[1:]:
            raise SpecError(f"{text!r} is not a pair; a pair looks like team=vision", key=option)
    return found
