"""What an image is, and whether the runner in it can work with this version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.contract import CONTRACT
from launcher.engine import Engine, LocalImage, Step
from launcher.errors import SpecError
from launcher.image.recipe import PLATFORM
from launcher.image.registry import pushed_as

__all__ = ["ImageFacts", "image_facts"]

_CONTRACT_LABEL = "io.cvlaunch.contract"
_PACKAGES = "/opt/cvlaunch/packages.json"
_RUNNER = "cvlaunch-run"


@dataclass(frozen=True)
class ImageFacts:
    """pinned: references by digest, as registries know them. layers: those steps that made one, the newest first.

    contract: of the runner inside; None if the image doesn't say. packages: their number; None without a list.
    """

    reference: str
    image: LocalImage
    pinned: tuple[str, ...]
    layers: tuple[Step, ...]
    contract: str | None
    packages: int | None
    warnings: tuple[str, ...]


def image_facts(engine: Engine, reference: str) -> ImageFacts:
    """Of an image in the engine's store; SpecError if it isn't there."""
    image = engine.image(reference)
    if image is None:
        pull = f"; {engine.name} pull {reference} brings it" if not reference.startswith("localhost/") else ""
        raise SpecError(f"{engine.name} has no image {reference}{pull}", key="IMAGE")
    known = {pushed.pinned for pushed in pushed_as(image.config_digest)}
    own = {digest for digest in image.digests if not digest.startswith("localhost/")}
    return ImageFacts(
        reference=reference,
        image=image,
        pinned=tuple(sorted(known or own)),
        layers=tuple(step for step in engine.steps(reference) if step.size),
        contract=image.labels.get(_CONTRACT_LABEL),
        packages=_packages(engine, reference),
        warnings=tuple(_warnings(image)),
    )


def _packages(engine: Engine, reference: str) -> int | None:
    content = engine.file_in(reference, _PACKAGES)
    try:
        return None if content is None else len(json.loads(content))
    except (ValueError, TypeError):
        return None


def _warnings(image: LocalImage) -> Iterator[str]:
    contract = image.labels.get(_CONTRACT_LABEL)
    if image.entrypoint[:1] != (_RUNNER,) and image.entrypoint[:1] != (f"/opt/venv/bin/{_RUNNER}",):
        yield f"its entry point is not {_RUNNER}: a job can use it with `runner: none` only"
    elif contract != str(CONTRACT):
        says = f"speaks contract {contract}" if contract else "does not say which contract it speaks"
        yield f"it {says}, this cvlaunch speaks {CONTRACT}: rebuild it with cvlaunch image build"
    if image.platform != PLATFORM:
        yield f"it is for {image.platform}; platforms with GPUs run {PLATFORM}"
    if image.user:
        yield f"it sets USER {image.user}: platforms choose the user themselves, and this one may lack their rights"
