"""`attach`: a run that this machine has not sent."""

from __future__ import annotations

import click

from launcher.cli.options import complete_backends, complete_targets, json_option
from launcher.cli.out import Out

__all__ = ["attach"]


@click.command()
@click.argument("name")
@click.option("--target", metavar="NAME", shell_complete=complete_targets)
@click.option("--backend", metavar="NAME", shell_complete=complete_backends)
@json_option
def attach(*, name: str, target: str | None, backend: str | None, out: Out) -> None:
    """Take in a run that somebody else has sent.

    NAME is its run id, or the platform's own id of the job: `cvlaunch render` gives a script that can be sent by hand,
    here or by a colleague. All commands then know the run. On SageMaker it may also be the name or ARN of a job that
    was made without cvlaunch, which can be watched, synced and cancelled.
    """
    from launcher.cli.shapes import run_json
    from launcher.run import attach as take_in

    run = take_in(name, target=target, backend=backend)
    if out.as_json:
        out.document(run_json(run.record))
        return
    out.data(str(run.handle))
    out.note(f"run {run.id}, output: {run.output}")
    for note in run.record.plan.get("notes", ()):
        out.note(note)
    out.note(f"follow it: cvlaunch watch {run.id}")
