"""`render`: the text that would be sent, alone on stdout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.options import json_option, place_options
from launcher.cli.out import Column, Out

if TYPE_CHECKING:
    from launcher.backends.base import Plan, Problem
    from launcher.submission import Prepared

__all__ = ["render"]


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@place_options
@click.option("--resolve", is_flag=True, help="Also read what is not on this machine: manifests in stores, images.")
@click.option("--check", is_flag=True, help="Also ask the platform whether it would take the job.")
@click.option("--explain", is_flag=True, help="Print files, digests, outputs and who moves what instead of the text.")
@click.option(
    "--out", "to", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the text there."
)
@click.option("--run-id", metavar="ID", help="Another than render-0000000000, to send the text by hand.")
@json_option
def render(
    *,
    job: Path,
    backend: str | None,
    target: str | None,
    settings: tuple[str, ...],
    resolve: bool,
    check: bool,
    explain: bool,
    to: Path | None,
    run_id: str | None,
    out: Out,
) -> int:
    """Show what would be sent, without sending it.

    Byte for byte what `submit` sends, but for the run id. Without --resolve nothing outside this machine is asked;
    what can't be known stays as written and is listed on stderr.
    """
    from launcher.ledger import valid_run_id
    from launcher.submission import prepare

    chosen = {"run_id": valid_run_id(run_id)} if run_id else {}
    online = resolve or check
    with prepare(job, backend=backend, target=target, settings=settings, online=online) as prepared:
        plan = prepared.plan(**chosen)
        problems = list(_problems(prepared)) if check else []
        if to is not None:
            to.write_bytes(plan.text.encode())
        _print(prepared, plan, problems, explain=explain, written=to is not None, out=out)
    for note in plan.notes:
        out.note(note)
    for warning in plan.warnings:
        out.warn(warning)
    for path in plan.files:
        out.note(f"{path} has to be in {plan.outputs[0].uri} first, if this is sent by hand")
    for problem in problems:
        click.echo(f"{'refused' if problem.fatal else 'warning'}: {problem}", err=True)
    if check and not problems:
        out.note(f"target {prepared.job.target_name} would take this job")
    return 2 if any(problem.fatal for problem in problems) else 0


def _problems(prepared: Prepared) -> Iterator[Problem]:
    from launcher.backends.base import Examines

    backend, job = prepared.backend, prepared.job
    yield from backend.check(job)
    if isinstance(backend, Examines):
        yield from backend.examine(job)


def _print(prepared: Prepared, plan: Plan, problems: list[Problem], *, explain: bool, written: bool, out: Out) -> None:
    if out.as_json:
        out.document({"text": plan.text, **_explained(prepared, plan), "problems": [vars(p) for p in problems]})
    elif explain:
        _print_explanation(_explained(prepared, plan), out)
    elif not written:
        click.echo(plan.text, nl=not plan.text.endswith("\n"))


def _explained(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    from launcher.plan import transport_of

    job = prepared.job
    transport = transport_of(prepared.backend, job.output)
    channels = [
        {
            "name": c.name,
            "uri": c.uri,
            "access": c.access,
            "fingerprint": c.fingerprint,
            "files": c.files,
            "size": c.size,
        }
        for c in job.channels
    ]
    return {
        "backend": plan.backend,
        "target": job.target_name,
        "job_digest": plan.job_digest,
        "plan_sha": plan.plan_sha,
        "outputs": [vars(output) for output in plan.outputs],
        "files": [{"path": path, "size": _size(content)} for path, content in plan.files.items()],
        "channels": channels,
        "movers": dict(transport.movers),
        "secrets": sorted(job.spec.secrets),
        "shm": plan.shm,
        "notes": list(plan.notes),
        "unpinned": list(plan.unpinned),
        "warnings": list(plan.warnings),
    }


def _size(content: bytes | str) -> int:
    return len(content) if isinstance(content, bytes) else Path(content).stat().st_size


_ACCESS = {
    "path": "read where it is",
    "mounted": "mounted by the platform",
    "staged": "copied by the runner before the start",
}
_MOVERS = {
    "in_place": "written in place: the folder is the output",
    "runner": "uploaded by the runner while it runs",
    "platform": "moved by the platform",
}


def _print_explanation(facts: dict[str, Any], out: Out) -> None:
    out.fields(
        {
            "backend": facts["backend"],
            "target": facts["target"],
            "job digest": facts["job_digest"],
            "plan digest": facts["plan_sha"],
            "output": ", ".join(output["uri"] for output in facts["outputs"]),
            "secrets": ", ".join(facts["secrets"]),
            "shared memory": facts["shm"],
        }
    )
    out.data("")
    out.table([Column("WHAT"), Column("WHERE", whole=False), Column("HOW", whole=False)], list(_transport_rows(facts)))
    for reason in facts["unpinned"]:
        out.data(f"unpinned: {reason}")


def _transport_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    from launcher.quantities import format_size

    for channel in facts["channels"]:
        print_ = f"; fingerprint {channel['fingerprint'][:12]}" if channel["fingerprint"] else "; no fingerprint"
        yield f"data {channel['name']}", channel["uri"], _ACCESS[channel["access"]] + print_
    for path in facts["files"]:
        yield (
            f"file {path['path']}",
            facts["outputs"][0]["uri"],
            f"put there before the call, {format_size(path['size'])}",
        )
    for mover in dict.fromkeys(facts["movers"].values()):
        folders = [folder for folder, moved_by in facts["movers"].items() if moved_by == mover]
        yield ", ".join(folders), facts["outputs"][0]["uri"], _MOVERS[mover]
