"""Building an image once: what is there already is not built again, by nobody."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launcher.engine import BuildOptions, Engine, LocalImage
from launcher.errors import SpecError
from launcher.image.recipe import Recipe, needs_trainer, trainer_recipe
from launcher.paths import cache_folder

__all__ = ["CONTENT_LABEL", "Built", "build"]

CONTENT_LABEL = "io.cvlaunch.content"
"""Holds the recipe's whole digest."""


@dataclass(frozen=True)
class Built:
    """seconds: of the build. rebuilt: False if the image was there."""

    reference: str
    image: LocalImage
    seconds: float
    rebuilt: bool


def build(recipe: Recipe, engine: Engine, *, say: Callable[[str], None], force: bool = False) -> Built:
    """The image of a recipe, in the engine's store. say: gets the engine's lines as they come.

    Of two at once, one builds and the other one waits for it. force: build it even if it is there.
    """
    start = time.monotonic()
    with _alone(recipe.reference, say):
        image = None if force else engine.image(recipe.reference)
        if image is not None:
            return Built(recipe.reference, image, time.monotonic() - start, rebuilt=False)
        if needs_trainer(recipe):
            build(trainer_recipe(platform=recipe.platform), engine, say=say)
        start = time.monotonic()
        with recipe.context() as context:
            engine.build(context, _options(recipe), say=say)
        image = engine.image(recipe.reference)
    if image is None:
        raise SpecError(f"{engine.name} built {recipe.reference} and does not find it")
    return Built(recipe.reference, image, time.monotonic() - start, rebuilt=True)


def _options(recipe: Recipe) -> BuildOptions:
    return BuildOptions(
        tag=recipe.reference,
        dockerfile=recipe.dockerfile,
        platform=recipe.platform,
        args=recipe.args,
        labels={CONTENT_LABEL: recipe.digest},
        more=recipe.options,
    )


@contextlib.contextmanager
def _alone(reference: str, say: Callable[[str], None]) -> Iterator[None]:
    """One process of this user at a time."""
    import fcntl

    folder = cache_folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{reference.replace('/', '_')}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process builds {reference}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
