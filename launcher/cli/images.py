"""`image`: building the image that jobs run in, bringing it to a registry, and looking at one."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.options import json_option
from launcher.cli.out import Column, Out, clean, console

if TYPE_CHECKING:
    from rich.text import Text

    from launcher.image import Built, ImageFacts

__all__ = ["engine_lines", "image"]

_OPTIONS = "launcher.engine_options"

engine_option = click.option(
    "--engine", metavar="NAME", help="docker, podman or buildah; else the first that answers, or $CVLAUNCH_ENGINE."
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Print all lines of the engine.")


class _WithEngineOptions(click.Command):
    """All behind `--` is the engine's, also where an argument of ours is left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[_OPTIONS] = tuple(args[at + 1 :]) if at < len(args) else None
        return super().parse_args(ctx, args[:at])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- ENGINE OPTIONS...]"]


@click.group()
def image() -> None:
    """Build, push and look at the images that jobs run in.

    Docker, Podman or Buildah does it, with the log-ins that it has. `submit` builds and pushes by itself what a job
    needs; these commands are for doing it beforehand.
    """


@image.command(cls=_WithEngineOptions)
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--base", metavar="IMAGE", help="What it starts from; else $CVLAUNCH_BASE_IMAGE, or as the Dockerfile says."
)
@click.option("--name", metavar="NAME", help="Its name without tag; else cvlaunch-trainer, or the folder's.")
@click.option(
    "--file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="The Dockerfile in FOLDER."
)
@click.option("--platform", default="linux/amd64", show_default=True, metavar="OS/ARCH", help="What it will run on.")
@engine_option
@click.option("--force", is_flag=True, help="Build it even if it is there.")
@verbose_option
@json_option
def build(
    *,
    folder: Path | None,
    base: str | None,
    name: str | None,
    file: Path | None,
    platform: str,
    engine: str | None,
    force: bool,
    verbose: bool,
    out: Out,
) -> None:
    """Build an image; print its reference.

    Without FOLDER it is the trainer image of this installation; with one, that of the Dockerfile in it. The tag follows
    from all that goes in, so that an image that is there is not built again. ENGINE OPTIONS go to the engine's build:
    secrets, volumes, a network, build arguments.
    """
    from launcher.engine import find_engine
    from launcher.errors import SpecError
    from launcher.image import build as build_image
    from launcher.image import folder_recipe, trainer_recipe

    if file is not None and folder is None:
        raise SpecError("--file needs FOLDER; the trainer image has its own Dockerfile")
    options = click.get_current_context().meta[_OPTIONS]
    how = {"base": base, "name": name, "platform": platform, "options": options}
    recipe = trainer_recipe(**how) if folder is None else folder_recipe(folder, dockerfile=file, **how)
    found = find_engine(engine, builds=True)
    with engine_lines(out, verbose=verbose) as say:
        built = build_image(recipe, found, say=say, force=force)
    _print_built(built, out)


def _print_built(built: Built, out: Out) -> None:
    from launcher.quantities import format_duration, format_size

    if out.as_json:
        out.document(
            {
                "reference": built.reference,
                "config_digest": built.image.config_digest,
                "size": built.image.size,
                "layers": built.image.layers,
                "seconds": round(built.seconds, 1),
                "rebuilt": built.rebuilt,
            }
        )
        return
    size = f", {format_size(built.image.size)}" if built.image.size else ""  # Buildah does not tell it
    how = f"built in {format_duration(built.seconds)}" if built.rebuilt else "unchanged, so it was not built again"
    out.note(f"{how}: {len(built.image.layers)} layers{size}")
    out.data(built.reference)


@image.command(cls=_WithEngineOptions)
@click.argument("places", metavar="[IMAGE] TO", nargs=-1)
@engine_option
@verbose_option
@json_option
def push(*, places: tuple[str, ...], engine: str | None, verbose: bool, out: Out) -> None:
    """Bring an image to a registry; print its reference by digest.

    Without IMAGE it is the trainer image of this installation, which must have been built. TO looks like
    registry.example.com/team/trainer, with a tag if it shall not be IMAGE's. If the engine is not logged in to ECR or
    Artifact Registry, cvlaunch does it with the identity that is found here. ENGINE OPTIONS go to the engine's push.
    """
    from launcher.engine import find_engine
    from launcher.image import push as push_image
    from launcher.image import trainer_recipe

    if not 1 <= len(places) <= 2:
        raise click.UsageError("give [IMAGE] TO", click.get_current_context())
    options = click.get_current_context().meta[_OPTIONS] or ()
    source = places[0] if len(places) == 2 else trainer_recipe().reference
    found = find_engine(engine, builds=True)
    with engine_lines(out, verbose=verbose) as say:
        pushed = push_image(found, source, places[-1], say=say, options=options)
    if out.as_json:
        out.document({**vars(pushed), "pinned": pushed.pinned})
    else:
        out.note(f"pushed {pushed.reference}")
        out.data(pushed.pinned)


@image.command()
@click.argument("name", metavar="IMAGE")
@engine_option
@json_option
def inspect(*, name: str, engine: str | None, out: Out) -> None:
    """Say what an image of this machine is, and whether jobs can run in it.

    `cvlaunch-trainer` is the trainer image of this installation.
    """
    from launcher.engine import find_engine
    from launcher.image import NAME, image_facts, trainer_recipe

    found = find_engine(engine, builds=True)
    facts = image_facts(found, trainer_recipe().reference if name == NAME else name)
    if out.as_json:
        out.document(_facts_json(facts))
        return
    out.fields(_facts_text(facts))
    if facts.layers:
        out.data("")
        out.table([Column("LAYER", right=True), Column("MADE BY", whole=False)], list(_layer_rows(facts)))
    for warning in facts.warnings:
        out.warn(warning)


def _facts_json(facts: ImageFacts) -> dict[str, Any]:
    found = facts.image
    return {
        "reference": facts.reference,
        "config_digest": found.config_digest,
        "pinned": facts.pinned,
        "names": found.names,
        "platform": found.platform,
        "size": found.size,
        "layers": [vars(layer) for layer in facts.layers],
        "user": found.user,
        "entrypoint": found.entrypoint,
        "labels": dict(found.labels),
        "contract": facts.contract,
        "packages": facts.packages,
        "warnings": facts.warnings,
    }


def _facts_text(facts: ImageFacts) -> dict[str, str]:
    from launcher.quantities import format_size

    found = facts.image
    return {
        "image": facts.reference,
        "config digest": found.config_digest,
        "in registries": ", ".join(facts.pinned),
        "platform": found.platform,
        "size": format_size(found.size) if found.size else "",
        "user": found.user or "root",
        "entry point": " ".join(found.entrypoint),
        "contract": facts.contract or "",
        "packages": "" if facts.packages is None else str(facts.packages),
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(found.labels.items())),
    }


def _layer_rows(facts: ImageFacts) -> Iterator[tuple[str, str]]:
    from launcher.quantities import format_size

    for layer in facts.layers:
        command = " ".join(layer.made_by.replace("/bin/sh -c #(nop)", "").replace("/bin/sh -c", "").split())
        yield format_size(layer.size), command if len(command) <= 100 else f"{command[:99]}…"


@contextlib.contextmanager
def engine_lines(out: Out, *, verbose: bool = False) -> Iterator[Callable[[str], None]]:
    """What to do with the lines of an engine: one live line on a terminal, else all of them, on stderr."""
    if verbose or not sys.stderr.isatty() or out.quiet:
        yield lambda line: out.note(clean(line, colours=False))
        return
    from rich.live import Live

    shown = _Status()
    with Live(get_renderable=shown.line, console=console(sys.stderr), transient=True, refresh_per_second=4):
        yield shown.take


class _Status:
    """The last line, and for how long this goes on; nothing before the first one."""

    def __init__(self) -> None:
        self._start, self._last = time.monotonic(), ""

    def take(self, line: str) -> None:
        self._last = clean(line, colours=False) or self._last

    def line(self) -> Text:
        from rich.text import Text

        from launcher.quantities import format_duration

        if not self._last:
            return Text()
        return Text(
            f"{format_duration(time.monotonic() - self._start)} · {self._last}", no_wrap=True, overflow="ellipsis"
        )
