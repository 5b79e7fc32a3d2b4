"""`rehearse`: what a platform would make of an image, tried on this machine."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from launcher.cli.options import json_option, seconds
from launcher.cli.out import Column, Out

if TYPE_CHECKING:
    from launcher.findings import Finding
    from launcher.rehearse import Report

__all__ = ["rehearse"]

_STYLES = {"kept": "green", "broken": "bold red", "not tried": "dim"}


def _platforms(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from launcher.rules import RULES

    return [CompletionItem(name) for name in RULES if name.startswith(incomplete)]


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option(
    "--like",
    "platform",
    metavar="PLATFORM",
    required=True,
    shell_complete=_platforms,
    help="sagemaker, vertex, ovh, openshift, kubernetes or slurm.",
)
@click.option("--image", metavar="IMAGE", help="This image instead of the job's.")
@click.option("--steps", type=click.IntRange(min=1), default=1, show_default=True, help="Of training.")
@click.option(
    "--seconds",
    "limit",
    metavar="TIME",
    default="60s",
    show_default=True,
    callback=seconds,
    help="How long a command may run, and how long a training has until its first checkpoint.",
)
@click.option("--network", is_flag=True, help="Let it reach the network, and fetch data that is in a store.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a value of the job: data.train=small. May be repeated.",
)
@json_option
def rehearse(
    *,
    job: Path,
    platform: str,
    image: str | None,
    steps: int,
    limit: float,
    network: bool,
    settings: tuple[str, ...],
    out: Out,
) -> int:
    """Run a job's image here under a platform's rules.

    User, folders, environment, shared memory, read-only parts, no network, stop signal: each rule is kept or broken,
    with the way out. A training does a few steps; then it starts again and is stopped. Exits with 1 if one is broken.
    """
    from launcher.rehearse import Request
    from launcher.rehearse import rehearse as play

    request = Request(job, platform, image, settings, steps, limit, network)
    with _removing_what_runs():
        report = play(request, out.note)
    _print(report, out)
    return 0 if report.kept else 1


@contextlib.contextmanager
def _removing_what_runs() -> Iterator[None]:
    """A terminal that closes and a `kill` clean up as Ctrl-C does."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(report: Report, out: Out) -> None:
    if out.as_json:
        out.document({**asdict(report), "kept": report.kept})
        return
    out.fields({"platform": report.platform, "image": report.image, "user": report.user})
    for note in report.notes:
        out.data(f"here: {note}")
    for assumption in report.assumed:
        out.data(f"assumed of {report.platform}: {assumption}")
    out.data("")
    columns = [Column("RULE"), Column("VERDICT", style=lambda word: _STYLES[word]), Column("SEEN", whole=False)]
    out.table(columns, [(finding.rule, str(finding.verdict), finding.seen) for finding in report.findings])
    broken = [finding for finding in report.findings if finding.way_out]
    _print_ways_out(broken, out)
    if report.log:
        out.data("\nIts last lines:")
        for line in report.log:
            out.data(f"  {line}")


def _print_ways_out(broken: list[Finding], out: Out) -> None:
    if broken:
        out.data("\nWays out:")
    for finding in broken:
        out.data(f"  {finding.rule}: {finding.way_out}")
