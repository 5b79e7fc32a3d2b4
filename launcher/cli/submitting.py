"""`submit` and `rerun`: the handle alone on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.app import Interrupted
from launcher.cli.images import engine_lines
from launcher.cli.options import complete_runs, find_run, json_option, pairs, place_options, run_argument
from launcher.cli.out import Out, clean
from launcher.errors import SpecError

if TYPE_CHECKING:
    from launcher.compare import Comparison
    from launcher.run import Run

__all__ = ["rerun", "submit"]

_AUTO = "auto"
_FOUND_AGAIN = ("code", "data", "image")
"""Facts of a job that stand in no job file: they are read where it points."""


class _Submit(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--push-data` may stand alone, before the job file, too; then the place follows from the target."""
        return super().parse_args(ctx, [f"--push-data={_AUTO}" if arg == "--push-data" else arg for arg in args])


follow_option = click.option("-f", "--follow", is_flag=True, help="Show it until it has ended, then bring its results.")
sync_option = click.option(
    "--sync", "sync_to", type=click.Path(path_type=Path), metavar="FOLDER", help="Where --follow brings them: runs."
)


@click.command(cls=_Submit)
@click.argument("job", type=click.Path(path_type=Path), required=False)
@place_options
@click.option("--tag", "tags", metavar="KEY=VALUE", multiple=True, help="Mark the run. May be repeated.")
@click.option("--run-id", metavar="ID", help="Choose the run's id.")
@click.option(
    "--sweep",
    "sweeps",
    metavar="KEY=VALUE,VALUE",
    multiple=True,
    help="Send one run for each value: train.seed=0,1,2. Repeated: for each combination.",
)
@click.option("--push-data", metavar="[=URI]", help="First push folders of this machine to where the target sees them.")
@click.option(
    "--resume",
    shell_complete=complete_runs,
    metavar="RUN",
    help="Instead of JOB: send again what did not arrive or was lost.",
)
@follow_option
@sync_option
@json_option
def submit(
    *,
    job: Path | None,
    settings: tuple[str, ...],
    tags: tuple[str, ...],
    sweeps: tuple[str, ...],
    resume: str | None,
    follow: bool,
    sync_to: Path | None,
    out: Out,
    **how: str | None,
) -> int:
    """Send a job; print its handle.

    The handle stands alone on stdout, so that a script can take it; all else goes to stderr. The same job file goes to
    every target: --target or --backend chooses.

    With --sweep it sends one run for each combination of values, up to 1000, and prints a handle a line: arrays on
    SLURM, a Job each on Kubernetes; on this machine all of them start at once. `cvlaunch runs --tag sweep=ID` lists
    them with their values; --tag sweep=NAME chooses the ID.
    """
    if (job is None) == (resume is None):
        raise SpecError("give a job file, or --resume RUN")
    if resume is not None:
        _refuse_with_resume(settings, tags, {"sweep": sweeps, **how})
        return _announce(find_run(resume).resume(), out, follow=follow, sync_to=sync_to)
    assert job is not None  # noqa: S101 for mypy
    settings += _tag_settings(tags)
    push_to = how.pop("push_data")
    if push_to is not None:
        settings += _push(job, push_to, settings, how["backend"], how["target"], out)
    if sweeps:
        return _sweep(job, settings, sweeps, out, follow=follow or sync_to is not None, **how)
    run = _submit(job, settings, out, **how)
    return _announce(run, out, follow=follow, sync_to=sync_to)


@click.command()
@run_argument
@place_options
@follow_option
@sync_option
@json_option
def rerun(
    *,
    run: str,
    settings: tuple[str, ...],
    backend: str | None,
    target: str | None,
    follow: bool,
    sync_to: Path | None,
    out: Out,
) -> int:
    """Send the job of an earlier run afresh.

    It goes to the same target unless --target or --backend says otherwise, and to a run of its own; `cvlaunch submit
    --resume RUN` goes on with the old one instead. The code is that of the earlier run, unless --set code.root=FOLDER
    names a folder. Says whether it still is the identical job, or what has changed.
    """
    earlier = find_run(run)
    with _sending(), engine_lines(out) as progress:
        again = earlier.rerun(backend=backend, target=target, settings=settings, progress=progress)
    facts = _compare(earlier, again, settings, out)
    return _announce(again, out, follow=follow, sync_to=sync_to, facts=facts)


def _refuse_with_resume(settings: tuple[str, ...], tags: tuple[str, ...], how: Mapping[str, object]) -> None:
    given = [name for name, value in {"set": settings, "tag": tags, **how}.items() if value]
    if given:
        raise SpecError(f"--resume sends the stored job as it is; leave out --{given[0].replace('_', '-')}")


def _tag_settings(tags: tuple[str, ...]) -> tuple[str, ...]:
    found = pairs(tags, "--tag")
    for key in found:
        if "." in key:
            raise SpecError(f"the key {key!r} has a dot; write it in the job file, under tags", key="--tag")
    return tuple(f"tags.{key}={value}" for key, value in found.items())


def _push(
    job: Path, to: str, settings: Sequence[str], backend: str | None, target: str | None, out: Out
) -> tuple[str, ...]:
    from launcher.stores import is_uri, join_uri
    from launcher.submission import push_channels
    from launcher.targets import load_targets

    selected = load_targets(job.absolute().parent).select(target=target, backend=backend)
    if to == _AUTO:
        output = selected.target.output or ""
        if selected.target.reached_by and output.startswith("/"):
            output = f"{selected.target.reached_by}{output}"
        if not is_uri(output):
            raise SpecError(f"target {selected.name!r} has no output in a store; write --push-data=URI")
        below = join_uri(output, "_data")  # no run id starts with _
    elif not is_uri(to):
        raise SpecError(f"{to!r} is not a place in a store; it looks like s3://bucket/folder", key="--push-data")
    else:
        below = to
    pushed = push_channels(job, backend=backend, target=target, settings=settings, to=below, by_content=to == _AUTO)
    for setting in pushed:
        out.note(f"pushed {setting.replace('=', ' to ', 1)}")
    return tuple(pushed)


def _submit(
    job: Path, settings: tuple[str, ...], out: Out, *, backend: str | None, target: str | None, run_id: str | None
) -> Run:
    from launcher.run import submit

    with _sending(), engine_lines(out) as progress:
        return submit(job, settings=settings, backend=backend, target=target, run_id=run_id, progress=progress)


def _sweep(
    job: Path,
    settings: tuple[str, ...],
    sweeps: tuple[str, ...],
    out: Out,
    *,
    follow: bool,
    backend: str | None,
    target: str | None,
    run_id: str | None,
) -> int:
    from launcher.cli.shapes import run_json
    from launcher.run import submit_many
    from launcher.sweep import SWEEP_TAG, combinations

    if follow:
        raise SpecError("a sweep is many runs; follow one of them: cvlaunch watch RUN", key="--follow")
    if run_id:
        raise SpecError("each run of a sweep has an id of its own; name the sweep: --tag sweep=NAME", key="--run-id")
    each = [[*settings, *own] for own in combinations(sweeps)]
    with _sending(), engine_lines(out) as progress:
        runs = submit_many(job, each, backend=backend, target=target, progress=progress)
    records = [run.record for run in runs]
    sweep = records[0].tags[SWEEP_TAG]
    out.note(f"sweep {sweep}: {len(runs)} runs on target {records[0].target_name}")
    for note, times in Counter(note for record in records for note in record.plan.get("notes", ())).items():
        out.note(f"{note} (each of {times} runs)" if times > 1 else note)
    for reason in dict.fromkeys(reason for record in records for reason in record.plan["unpinned"]):
        out.note(f"unpinned: {reason}")
    for warning in dict.fromkeys(warning for record in records for warning in record.plan["warnings"]):
        out.warn(warning)
    if out.as_json:
        out.document([run_json(record) for record in records])
    else:
        out.data("\n".join(str(run.handle) for run in runs))
    out.note(f"list them: cvlaunch runs --tag {SWEEP_TAG}={shlex.quote(sweep)}")
    return 0


@contextlib.contextmanager
def _sending() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted while submitting; `cvlaunch runs` says whether it was sent") from None


def _announce(
    run: Run, out: Out, *, follow: bool, sync_to: Path | None, facts: Mapping[str, object] | None = None
) -> int:
    """Prints what was submitted; then follows it, if that is wanted. facts: more of them for --json."""
    from launcher.cli.shapes import run_json

    if sync_to is not None and not follow:
        out.warn("--sync has no effect without --follow; later: cvlaunch sync")
    record = run.record
    out.note(f"run {run.id} on target {record.target_name}")
    out.note(f"output: {run.output}")
    for note in record.plan.get("notes", ()):  # older run files have none
        out.note(note)
    for reason in record.plan["unpinned"]:
        out.note(f"unpinned: {reason}")
    for warning in record.plan["warnings"]:
        out.warn(warning)
    if not follow:
        _print_handle(run, out, {**run_json(record), **(facts or {})})
        out.note(f"follow it: cvlaunch watch {run.id}")
        return 0
    from launcher.cli.following import follow_run

    _print_handle(run, out, {"type": "submitted", **run_json(record), **(facts or {})}, line=True)
    return follow_run(run, out, sync_to=sync_to or Path("runs"), data_on_stderr=not out.as_json)


def _compare(earlier: Run, again: Run, settings: Sequence[str], out: Out) -> dict[str, object]:
    """Says whether it still is the same job; facts about that for --json."""
    from launcher.compare import compare

    found = compare(earlier.record, again.record)
    _say_how_alike(found, earlier.id, settings, out)
    code = again.record.job["job_file"].get("code")
    if code and not any(difference.key == "code" for difference in found.differences):
        root = again.record.job["spec"]["code"]["root"]
        out.note(clean(f"code: as it was sent then; --set code.root={root} takes it as it is now", colours=False))
    return {"identical": found.identical, "differences": found.to_json()["differences"]}


def _say_how_alike(found: Comparison, earlier: str, settings: Sequence[str], out: Out) -> None:
    asked = {setting.partition("=")[0].partition(".")[0] for setting in settings}
    if found.identical:
        out.note(f"identical job: that of {earlier}")
        return
    out.note(f"not the same job as {earlier}:")
    for difference in found.differences:
        root = difference.key.partition(".")[0]
        since = " changed since" if root in _FOUND_AGAIN and root not in asked else ""
        out.note(clean(f"  {difference.key}{since}: {difference.a} → {difference.b}", colours=False))


def _print_handle(run: Run, out: Out, value: dict[str, Any], *, line: bool = False) -> None:
    if not out.as_json:
        out.data(str(run.handle))
    elif line:
        out.json_line(value)
    else:
        out.document(value)
