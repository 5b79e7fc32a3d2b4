"""`init`, `schema`, `completion`: texts that help to write and to type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from launcher.cli.options import quiet_option
from launcher.cli.out import Out
from launcher.errors import SpecError

__all__ = ["completion", "init", "job_schema", "schema"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option("--out", "to", type=click.Path(path_type=Path, dir_okay=False), default=Path("job.yaml"),
              show_default=True, metavar="FILE", help="Where the job file is written.")  # fmt: skip
@click.option("--name", help="The job's name; else that of the folder.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@quiet_option
def init(*, folder: Path, to: Path, name: str | None, force: bool, out: Out) -> None:
    """Write a job file that fits a data folder.

    Class folders make a classification job, a YOLO data.yaml a detection job. Prints the file's path.
    """
    from launcher.starter import starter_job

    if to.exists() and not force:
        raise SpecError("is there already; --force writes over it, --out FILE goes elsewhere", file=to)
    text = starter_job(folder, name=name, relative_to=to.absolute().parent)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(text.encode())
    out.data(str(to))
    out.note(f"look at it, then: cvlaunch submit {to} --backend local --follow")


@click.command()
def schema() -> None:
    """Print the JSON Schema of job files.

    For editors: save it, and begin the job file with `# yaml-language-server: $schema=job.schema.json`.
    """
    click.echo(json.dumps(job_schema(), indent=2))


def job_schema() -> dict[str, Any]:
    """Draft 2020-12."""
    from launcher.spec import JobSpec

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobSpec.model_json_schema(),
        "title": "cvlaunch job",
    }


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  cvlaunch completion bash >> ~/.bashrc
    zsh:   cvlaunch completion zsh >> ~/.zshrc
    fish:  cvlaunch completion fish > ~/.config/fish/completions/cvlaunch.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 the choices above are click's own
    complete = kind(ctx.find_root().command, {}, "cvlaunch", "_CVLAUNCH_COMPLETE")
    click.echo(complete.source())
