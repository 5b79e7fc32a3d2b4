"""Objects of the API that have a pod in them: which kinds there are, their volumes, mounts and sizes."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from typing import Any

from launcher.errors import SpecError, nearest
from launcher.shm import SHM

__all__ = [
    "KINDS",
    "SIDECARS",
    "STOPPED",
    "Form",
    "Kind",
    "Owner",
    "Volume",
    "annotations_of",
    "is_shm",
    "kind_named",
    "kind_of",
    "mapping",
    "mappings",
    "memory_limit",
    "name_of",
    "owner_of",
    "parse_quantity",
    "shm_mount",
    "volumes_of",
]

Json = dict[str, Any]

STOPPED = "kubeflow-resource-stopped"
"""Annotation of a Notebook that is stopped; its value is the time."""
SIDECARS = frozenset(
    [
        *("cloud-sql-proxy", "envoy", "gke-gcsfuse-sidecar", "istio-proxy", "kube-rbac-proxy"),
        *("linkerd-proxy", "oauth-proxy", "vault-agent"),
    ]
)
"""Containers that webhooks and operators put beside the one that works."""


@dataclass(frozen=True)
class Kind:
    """template: the way to the pod's metadata and spec. aliases: what kubectl takes as well.

    fixed: a cluster takes no other pod spec once the object is there.
    """

    name: str
    group: str
    resource: str
    aliases: tuple[str, ...]
    template: tuple[str, ...] = ("spec", "template")
    fixed: bool = False

    @property
    def word(self) -> str:
        """As in `notebook/my-workbench`."""
        return self.name.lower()

    @property
    def pod_spec(self) -> tuple[str, ...]:
        return (*self.template, "spec")


KINDS: Sequence[Kind] = (
    Kind("Notebook", "kubeflow.org", "notebooks", ("nb",)),
    Kind("Deployment", "apps", "deployments", ("deploy",)),
    Kind("StatefulSet", "apps", "statefulsets", ("sts",)),
    Kind("DaemonSet", "apps", "daemonsets", ("ds",)),
    Kind("ReplicaSet", "apps", "replicasets", ("rs",)),
    Kind("Job", "batch", "jobs", (), fixed=True),
    Kind("CronJob", "batch", "cronjobs", ("cj",), ("spec", "jobTemplate", "spec", "template")),
    Kind("Pod", "", "pods", ("po",), (), fixed=True),
)
_WORDS = {word: kind for kind in KINDS for word in (kind.word, kind.resource, *kind.aliases)}


def kind_named(word: str) -> Kind:
    """As kubectl takes it: `notebook`, `sts`, `deployments.apps`. SpecError for any other word."""
    kind = _WORDS.get(word.lower().partition(".")[0])
    if kind is None:
        known = ", ".join(kind.word for kind in KINDS)
        raise SpecError(f"{word!r} is no kind with a pod{nearest(word.lower(), _WORDS) or ';'} there are {known}")
    return kind


def kind_of(obj: object) -> Kind | None:
    """None for what has no pod, or one that is not known here."""
    if not isinstance(obj, Mapping):
        return None
    api = obj.get("apiVersion")
    group = api.rpartition("/")[0] if isinstance(api, str) else None
    return next((kind for kind in KINDS if kind.name == obj.get("kind") and kind.group == group), None)


def name_of(obj: Json) -> str:
    """Or `generateName`, where the cluster makes the name."""
    metadata = mapping(obj, "metadata")
    return str(metadata.get("name") or metadata.get("generateName") or "")


def annotations_of(obj: Json) -> Mapping[str, Any]:
    return mapping(mapping(obj, "metadata"), "annotations")


@dataclass(frozen=True)
class Owner:
    """What keeps an object as it is. kind: None for one that is not known here."""

    api_kind: str
    name: str
    kind: Kind | None

    def __str__(self) -> str:
        return f"{self.api_kind} {self.name}"


def owner_of(obj: Json) -> Owner | None:
    """The controller above; of a Deployment's pod it is the Deployment, of a workbench's the Notebook."""
    metadata = mapping(obj, "metadata")
    found = next((one for one in mappings(metadata, "ownerReferences") if one.get("controller")), None)
    if found is None:
        return None
    labels = mapping(metadata, "labels")
    kind, name = kind_of(found), str(found.get("name"))
    suffix = f"-{labels.get('pod-template-hash')}"
    if kind and kind.name == "ReplicaSet" and name.endswith(suffix):
        return Owner("Deployment", name.removesuffix(suffix), kind_named("deployment"))
    if kind and kind.name == "StatefulSet" and labels.get("notebook-name") == name:
        return Owner("Notebook", name, kind_named("notebook"))
    return Owner(str(found.get("kind")), name, kind)


# -- volumes and mounts


class Form(StrEnum):
    """What is behind a volume."""

    MEMORY = "memory"
    DISK = "an emptyDir on the node's disk"
    CLAIM = "PersistentVolumeClaim"
    OTHER = "other"
    MISSING = "missing"


@dataclass(frozen=True)
class Volume:
    """index: in `volumes`; None for a claim template of a StatefulSet. limit: as written; only emptyDirs have one."""

    name: str
    form: Form
    words: str
    index: int | None = None
    limit: str | None = None

    @property
    def meant_for_shm(self) -> bool:
        """By its name, or that of its claim."""
        return "shm" in self.name or (self.form is Form.CLAIM and "shm" in self.words)


def volumes_of(spec: Json, claims: Sequence[Json] = ()) -> dict[str, Volume]:
    """By name. spec: of a pod. claims: `volumeClaimTemplates`."""
    templates = (name_of(claim) for claim in claims)
    listed = enumerate(mappings(spec, "volumes"))
    return {
        **{name: Volume(name, Form.CLAIM, f"the {Form.CLAIM} {name}") for name in templates},
        **{str(volume.get("name")): _volume(volume, i) for i, volume in listed},
    }


def _volume(volume: Json, index: int) -> Volume:
    name = str(volume.get("name"))
    source = next((key for key in volume if key != "name"), "")
    inner = mapping(volume, source) if source else {}
    if source == "emptyDir":
        limit = inner.get("sizeLimit")
        form = Form.MEMORY if inner.get("medium") == "Memory" else Form.DISK
        words = "memory" if form is Form.MEMORY else str(form)
        return Volume(name, form, words, index, None if limit is None else str(limit))
    if source in ("persistentVolumeClaim", "ephemeral"):
        return Volume(name, Form.CLAIM, f"the {Form.CLAIM} {inner.get('claimName', name)}", index)
    return Volume(name, Form.OTHER, f"a volume of type {source or 'nothing'}", index)


def shm_mount(container: Json) -> tuple[int, Json] | None:
    """The mount at /dev/shm, with its place in `volumeMounts`."""
    listed = enumerate(mappings(container, "volumeMounts"))
    return next(((i, mount) for i, mount in listed if is_shm(mount)), None)


def is_shm(mount: Json) -> bool:
    """Whether it is at /dev/shm, however that is written."""
    return posixpath.normpath(str(mount.get("mountPath"))) == SHM


def mapping(parent: Json, key: str) -> Json:
    """Empty where there is none. SpecError for anything else than keys and values."""
    found = parent.get(key)
    if found is not None and not isinstance(found, dict):
        raise SpecError("keys and values were expected", key=key)
    return found or {}


def mappings(parent: Json, key: str) -> list[Json]:
    """A list of objects; empty where there is none. SpecError for anything else."""
    found = parent.get(key) or []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise SpecError("a list of objects was expected", key=key)
    return found


# -- sizes

_UNITS = {
    **{"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1)},
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
}
_QUANTITY = re.compile(r"\+?(\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE]([+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i)?)")


def parse_quantity(value: object) -> int | None:
    """Bytes of `1.5Gi`, `2e9`, `128974848000m`; None for what is no quantity (kubernetes.io, "Quantity")."""
    match = _QUANTITY.fullmatch(str(value).strip())
    if not match:
        return None
    number, exponent, unit = match.groups()
    factor = Decimal(10) ** int(exponent) if exponent else _UNITS[unit or ""]
    return int((Decimal(number) * factor).to_integral_value(ROUND_CEILING))


def memory_limit(container: Json) -> int | None:
    """Bytes that the container may use in all; None without a limit."""
    limit = mapping(mapping(container, "resources"), "limits").get("memory")
    return None if limit is None else parse_quantity(limit)
