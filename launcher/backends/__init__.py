"""The registry: names of backends as strings, imported when one is used."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points

from launcher.backends.base import Backend
from launcher.errors import SpecError, UnsupportedError, nearest

__all__ = ["GROUP", "load_backend", "names"]

GROUP = "cvlaunch.backends"
"""Entry points of this group add backends: `name = "package.module:Class [extra]"`."""

_BUILT_IN = {
    "container": "launcher.backends.container:ContainerBackend",
    "kubernetes": "launcher.backends.kubernetes:KubernetesBackend",
    "local": "launcher.backends.local:LocalBackend",
    "openshift": "launcher.backends.kubernetes:OpenShiftBackend",
    "sagemaker": "launcher.backends.sagemaker:SageMakerBackend",
    "slurm": "launcher.backends.slurm:SlurmBackend",
}


def names() -> list[str]:
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def load_backend(name: str) -> type[Backend]:
    """The class of a backend. SpecError for an unknown name, UnsupportedError where its packages are missing."""
    point = _point(name)
    try:
        loaded: type[Backend] = getattr(importlib.import_module(point.module), point.attr)
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == point.module.split(".")[0]:
            raise
        extra = f"'cvlaunch[{name}]'" if name in _BUILT_IN else (point.dist.name if point.dist else point.module)
        raise UnsupportedError(f"the {name} backend needs {error.name}: pip install {extra}") from error
    return loaded


def _point(name: str) -> EntryPoint:
    if name in _BUILT_IN:
        return EntryPoint(name, _BUILT_IN[name], GROUP)
    for point in entry_points(group=GROUP, name=name):
        return point
    raise SpecError(f"unknown backend {name!r}; there are {', '.join(names())}{nearest(name, names())}", key="backend")
