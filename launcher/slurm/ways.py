"""How a command runs on a node: bare, or in a container by the cluster's own tool.

The root of the run is bound to /opt/ml, and each folder of data to its place below it, so that an image finds the
folders of the contract wherever they stand on the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["WAYS", "Bind", "Way", "bad_words", "filled"]


@dataclass(frozen=True)
class Bind:
    """A folder of the node, and where it stands in the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Way:
    """Words with fields: `{image}`; `{binds}` is all of them in one word, parted by commas, and a word with `{source}`
    and `{target}` (and `{mode}`, `:ro` or nothing) stands once for each of them.

    srun: its options. prefix: words in front of the command. gpus: words that stand for `{gpus}` if there are any.
    tool: the program that has to be on the nodes. pull: how its images come (slurm.setup.PULLS); empty: the nodes fetch
    them by name. ending: of the image's file (slurm.places.image). read_only: whether binds can be.
    """

    prefix: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    tool: str = ""
    pull: str = ""
    ending: str = ""
    read_only: bool = True


def _apptainer(program: str) -> Way:
    """apptainer(1), exec: host /dev, and so its /dev/shm, is there by default; so is the environment."""
    prefix = (program, "exec", "{gpus}", "--no-home", "--pwd", "/", "--bind", "{binds}", "{image}")
    return Way(prefix, gpus=("--nv",), tool=program, pull=program, ending=".sif")


WAYS: Mapping[str, Way] = {
    "apptainer": _apptainer("apptainer"),
    "singularity": _apptainer("singularity"),
    "pyxis": Way(
        srun=(
            "--container-image={image}",
            "--container-mounts={binds}",
            "--container-workdir=/",
            "--no-container-mount-home",
            "--no-container-entrypoint",
        ),
        pull="enroot",
        ending=".sqsh",
    ),
    "charliecloud": Way(
        ("ch-run", "--set-env", "--cd=/", "--bind={source}:{target}", "{image}", "--"),
        tool="ch-run",
        pull="charliecloud",
        read_only=False,
    ),
}
"""By the word that a target writes. Sources: the manuals of Apptainer, NVIDIA/pyxis's README, ch-run(1)."""

_FIELDS = {"image", "binds", "source", "target", "mode", "gpus"}
_FIELD = re.compile(r"\{(\w+)\}")


def bad_words(words: Sequence[str]) -> str:
    """Why a target's own words can't stand in front of a command; empty if they can."""
    fields = {field for word in words for field in _FIELD.findall(word)}
    if unknown := sorted(fields - _FIELDS):
        return f"{{{unknown[0]}}} is no field; there are {', '.join(f'{{{field}}}' for field in sorted(_FIELDS))}"
    if "image" not in fields:
        return "no word has {image}"
    if not ("binds" in fields or {"source", "target"} <= fields):
        return "no word has {binds}, or {source} and {target}: the run's folder could not be seen"
    return ""


def filled(words: Sequence[str], *, image: str, binds: Sequence[Bind], gpus: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for template in words for word in _filled(template, image, binds, gpus))


def _filled(word: str, image: str, binds: Sequence[Bind], gpus: Sequence[str]) -> Iterator[str]:
    if word == "{gpus}":
        yield from gpus
    elif "{source}" in word:
        for bind in binds:
            yield _with(word, image=image, source=bind.source, target=bind.target, mode=":ro" if bind.read_only else "")
    else:
        joined = ",".join(f"{bind.source}:{bind.target}{':ro' if bind.read_only else ''}" for bind in binds)
        yield _with(word, image=image, binds=joined)


def _with(word: str, **values: str) -> str:
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), word)
