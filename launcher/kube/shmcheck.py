"""Which pods have too little shared memory for what they do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.kube.gpus import is_gpu
from launcher.kube.podspecs import (
    SIDECARS,
    Form,
    mapping,
    mappings,
    memory_limit,
    name_of,
    owner_of,
    parse_quantity,
    shm_mount,
    volumes_of,
)
from launcher.kube.shmpatch import DEFAULT_SIZE
from launcher.shm import size_as_written

__all__ = ["Finding", "check_pod"]

Json = dict[str, Any]

_IMAGE = re.compile(r"torch|ultralytics|yolo|cuda|cvlaunch", re.IGNORECASE)
"""In the name of an image: it is one that trains."""
_COMMAND = re.compile(r"\btorch|\bultralytics|\byolo\b|cvlaunch-run", re.IGNORECASE)
_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Finding:
    """The /dev/shm of a container. owner: what to patch, as `notebook/my-workbench`.

    form: `default` (the runtime's 64 MiB), `memory`, `node`, or what else is mounted. size: bytes; None if nobody has
    set it. loads: why it is taken for something that loads data with PyTorch; empty if nothing speaks for it.
    """

    pod: str
    container: str
    owner: str
    form: str
    words: str
    size: int | None
    loads: str
    too_little: bool


def check_pod(pod: Json, *, least: int | None = None) -> Iterator[Finding]:
    """Each working container of a pod that has not ended. least: bytes that a PyTorch workload shall have."""
    if mapping(pod, "status").get("phase") in _ENDED:
        return
    spec = mapping(pod, "spec")
    for container in mappings(spec, "containers"):
        if container.get("name") in SIDECARS:
            continue
        form, words, size = _shm(spec, container)
        loads = _loads(pod, container)
        enough = size is None or (size > DEFAULT_SIZE if least is None else size >= least)
        yield Finding(
            pod=name_of(pod),
            container=str(container.get("name")),
            owner=_owner(pod),
            form=form,
            words=words,
            size=size,
            loads=loads,
            too_little=bool(loads) and not enough,
        )


def _owner(pod: Json) -> str:
    owner = owner_of(pod)
    if owner is None:
        return f"pod/{name_of(pod)}"
    return f"{owner.kind.word}/{owner.name}" if owner.kind else str(owner)


def _shm(spec: Json, container: Json) -> tuple[str, str, int | None]:
    """What it is, in a word and in words, and its bytes."""
    mount = shm_mount(container)
    if mount is None:
        default = "node", "the node's (hostIPC)", None
        return default if spec.get("hostIPC") else ("default", "64 MiB by default", DEFAULT_SIZE)
    volume = volumes_of(spec).get(str(mount[1].get("name")))
    if volume is None or volume.form is not Form.MEMORY:
        return str(volume.form if volume else Form.MISSING), volume.words if volume else "a missing volume", None
    limits = [size for size in (parse_quantity(volume.limit), _pod_limit(spec)) if size is not None]
    words = f"{size_as_written(min(limits))} of memory" if limits else "memory without a limit"
    return str(volume.form), words, min(limits, default=None)


def _pod_limit(spec: Json) -> int | None:
    """A memory volume is no larger than what all containers together may use; None where one has no limit."""
    limits = [memory_limit(container) for container in mappings(spec, "containers")]
    known = [limit for limit in limits if limit is not None]
    return sum(known) if len(known) == len(limits) else None


def _loads(pod: Json, container: Json) -> str:
    resources = mapping(container, "resources")
    wanted = [*mapping(resources, "limits"), *mapping(resources, "requests")]
    gpu = next((name for name in wanted if is_gpu(name)), "")
    if gpu:
        return gpu
    if mapping(mapping(pod, "metadata"), "labels").get("notebook-name"):
        return "workbench"
    image = str(container.get("image")).rpartition("@")[0] or str(container.get("image"))
    if _IMAGE.search(image):
        return f"image {image.rpartition('/')[2]}"
    words = " ".join(map(str, [*_words(container, "command"), *_words(container, "args")]))
    found = _COMMAND.search(words)
    return f"command {found[0]}" if found else ""


def _words(container: Json, key: str) -> Sequence[object]:
    found = container.get(key)
    return found if isinstance(found, list) else ()
