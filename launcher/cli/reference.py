"""docs/cli.md, made from the commands themselves: `python -m launcher.cli.reference > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from launcher.cli.app import EXIT_CODES, SECTIONS, cli

__all__ = ["reference"]

_HEAD = """\
# The command line

This page is made by `python -m launcher.cli.reference > docs/cli.md`; a test keeps it current.

RUN is a run id, the beginning of one, a handle (`slurm://hpc/1234`), or `last` for the newest run.

**Output.** Data goes to stdout, messages and progress to stderr. On a terminal, tables are coloured (unless `NO_COLOR`
is set) and fitted to its width; in a pipe they are plain aligned text. `--json` prints one document, or an object a
line where a command follows something; its keys only ever get more. `--quiet` leaves out all messages but errors.

**Variables.** `CVLAUNCH_TARGETS__<TARGET>__<KEY>` changes a key of a target, `CVLAUNCH_DATASETS__<NAME>__<TARGET>` a
dataset's place. `CVLAUNCH_DEBUG=1` shows the traceback of an unexpected error.
"""


def reference() -> str:
    """Markdown."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "## Exit codes\n"
    yield from (
        "| code | meaning |",
        "| --- | --- |",
        *(f"| {code} | {text} |" for code, text in EXIT_CODES.items()),
        "",
    )
    context = click.Context(cli, info_name="cvlaunch", **cli.context_settings)
    for title, names in SECTIONS.items():
        yield f"## {title}\n"
        for name in names:
            command = cli.get_command(context, name)
            if command is not None:
                yield from _command(command, name, context)


def _command(command: click.Command, name: str, above: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=above, terminal_width=100, max_content_width=100)
    yield f"### {context.command_path}\n"
    yield f"```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            if found is not None:
                yield from _command(found, inner, context)


if __name__ == "__main__":
    click.echo(reference(), nl=False)
