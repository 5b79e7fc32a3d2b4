"""From what a job says of its image to one exact image, which is built, pulled or pushed where that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.backends.base import Image
from launcher.engine import Engine, LocalImage, find_engine
from launcher.errors import CvlaunchError, SpecError
from launcher.image.build import build
from launcher.image.recipe import NAME, Recipe, folder_recipe, trainer_recipe
from launcher.image.registry import config_known, digest_in, note_config, pull, push, recall

__all__ = ["Wanted", "pin"]


@dataclass(frozen=True)
class Wanted:
    """image or folder: of the job file. here: the platform takes images from this machine's engine.
    files: an absolute path is an image there, of which nothing is known here.

    registry: `host/repository` that the platform takes built images from. engine: its name, None for any.
    profile: AWS profile for the registry's log-in. target: for messages.
    """

    target: str
    image: str | None = None
    folder: Path | None = None
    here: bool = False
    files: bool = False
    registry: str | None = None
    engine: str | None = None
    profile: str | None = None

    @property
    def is_built(self) -> bool:
        return self.folder is not None or self.image == NAME


def pin(wanted: Wanted, *, make: Callable[[str], None] | None = None) -> Image:
    """The image with as much of its digests as is known.

    make: builds, pulls and pushes what is missing, and gets the engine's lines. None: only looks, on this machine,
    and an engine that is missing or doesn't answer is no error.
    """
    if wanted.is_built:
        recipe = folder_recipe(wanted.folder) if wanted.folder is not None else trainer_recipe()
        return _built_here(wanted, recipe, make) if wanted.here else _built_for_registry(wanted, recipe, make)
    assert wanted.image is not None  # noqa: S101 for mypy
    if wanted.files and wanted.image.startswith("/"):
        return Image(wanted.image)
    return _named_here(wanted, wanted.image, make) if wanted.here else _named(wanted, wanted.image, make)


def _built_here(wanted: Wanted, recipe: Recipe, make: Callable[[str], None] | None) -> Image:
    if make is None:
        return _image(recipe.reference, None, _look(wanted, recipe.reference))
    return _image(recipe.reference, None, build(recipe, _engine(wanted), say=make).image)


def _built_for_registry(wanted: Wanted, recipe: Recipe, make: Callable[[str], None] | None) -> Image:
    if wanted.registry is None:
        if make is None:
            return _image(recipe.reference, None, _look(wanted, recipe.reference))
        raise SpecError(
            f"target {wanted.target!r} does not say where built images are pushed; add registry: HOST/REPOSITORY to it",
            key="image" if wanted.folder is None else "build",
        )
    to = f"{wanted.registry}:{recipe.tag}"
    known = recall(to)
    if make is None:
        if known:
            return Image(known.pinned, known.digest, known.config_digest)
        return _image(to, None, _look(wanted, recipe.reference))
    engine = _engine(wanted)
    if known is None or engine.image(recipe.reference) is not None:  # sends nothing that the registry has
        build(recipe, engine, say=make)
        known = push(engine, recipe.reference, to, say=make, profile=wanted.profile)
    return Image(known.pinned, known.digest, known.config_digest)


def _named_here(wanted: Wanted, reference: str, make: Callable[[str], None] | None) -> Image:
    digest = digest_in(reference)
    found = _look(wanted, reference) if make is None else _engine(wanted).image(reference)
    if found is None and make is not None:
        found = pull(_engine(wanted), reference, say=make, profile=wanted.profile)
    return _image(reference, digest, found)


def _named(wanted: Wanted, reference: str, make: Callable[[str], None] | None) -> Image:
    """What a platform will pull. The local image of the same tag may be another one, so a tag alone pins nothing
    unless we pushed it; a digest does, and an image of that digest here has the same configuration."""
    if make is not None and reference.startswith("localhost/"):
        raise SpecError(
            f"{reference} is on this machine only; push it: cvlaunch image push {reference} TO", key="image"
        )
    if known := recall(reference):
        return Image(known.pinned, known.digest, known.config_digest)
    digest = digest_in(reference)
    return Image(reference, digest, _config_of(wanted, reference) if digest else None)


def _config_of(wanted: Wanted, reference: str) -> str | None:
    """Of an image by digest. An engine is asked once: that takes longer than all else of a submission."""
    if known := config_known(reference):
        return known
    found = _look(wanted, reference)
    if found is None:
        return None
    note_config(reference, found.config_digest)
    return found.config_digest


def _image(reference: str, digest: str | None, found: LocalImage | None) -> Image:
    return Image(reference, digest, found.config_digest if found else None)


def _engine(wanted: Wanted) -> Engine:
    return find_engine(wanted.engine, builds=not wanted.here)


def _look(wanted: Wanted, reference: str) -> LocalImage | None:
    try:
        return _engine(wanted).image(reference)
    except CvlaunchError:
        return None
