"""The images that jobs run in: built once for each content, pushed, and pinned by digest."""

from launcher.image.build import Built, build
from launcher.image.facts import ImageFacts, image_facts
from launcher.image.pin import Wanted, pin
from launcher.image.recipe import (
    BASE_VARIABLE,
    NAME,
    OPTIONS_VARIABLE,
    PLATFORM,
    Recipe,
    folder_recipe,
    trainer_recipe,
)
from launcher.image.registry import Pushed, pull, push, recall
from launcher.image.wheel import make_wheel

__all__ = [
    "BASE_VARIABLE",
    "NAME",
    "OPTIONS_VARIABLE",
    "PLATFORM",
    "Built",
    "ImageFacts",
    "Pushed",
    "Recipe",
    "Wanted",
    "build",
    "folder_recipe",
    "image_facts",
    "make_wheel",
    "pin",
    "pull",
    "push",
    "recall",
    "trainer_recipe",
]
