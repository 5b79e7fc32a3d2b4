"""Memory at /dev/shm for an object that is there already: what to change in it, and back again.

A pod without a volume there has the 64 MiB of the container runtime. Workbenches of OpenShift AI get one only since
their dashboard adds it (opendatahub-io/kubeflow#111); older and handmade ones have none, or one at a path of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import SpecError, nearest
from launcher.kube.podspecs import (
    KINDS,
    SIDECARS,
    STOPPED,
    Form,
    Kind,
    Volume,
    annotations_of,
    is_shm,
    kind_of,
    mapping,
    mappings,
    memory_limit,
    name_of,
    owner_of,
    parse_quantity,
    shm_mount,
    volumes_of,
)
from launcher.shm import SHM, size_as_written

__all__ = ["ANNOTATION", "DEFAULT_SIZE", "Change", "effect", "plan_patch", "plan_undo", "refuse_fixed"]

Json = dict[str, Any]
Path = tuple[str | int, ...]

ANNOTATION = "cvlaunch/shm-undo"
"""Of the object: the steps that were done, the first one first, as JSON."""
DEFAULT_SIZE = 64 * 2**20
"""Of /dev/shm in a container that has no volume there: containerd, CRI-O and Docker alike."""
_VOLUME = "shm"
"""As OpenShift AI's dashboard calls it."""
_EXPECTED = ("/tmp", "/var", "/run", "/etc")  # noqa: S108 - compared with, not written to
"""What is mounted below is there because programs look for it: it is not moved."""
_HINDRANCES = ("readOnly", "subPath", "subPathExpr", "recursiveReadOnly")
"""Keys of a mount that make no shared memory of a memory volume."""
_DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"


@dataclass(frozen=True)
class Change:
    """What patching an object does. operations: a JSON patch (RFC 6902), empty if nothing is to be done.

    done, left: sentences; what was done, and what was left as it is and why. undone: it goes back.
    """

    what: str
    before: Json
    after: Json
    operations: tuple[Json, ...] = ()
    done: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    undone: bool = False


def plan_patch(
    obj: Json,
    *,
    size: int | None = None,
    container: str | None = None,
    use_volume: str | None = None,
    replace: bool = False,
) -> Change:
    """Memory at /dev/shm of one container. Pure: `obj` stays as it is; planning for the outcome gives no operations.

    size: bytes; None for no limit but the pod's memory. container: else the one that works. use_volume: mount this
    volume at /dev/shm, whatever it is. replace: take /dev/shm from another volume. SpecError where that can't be.
    """
    if size is not None and size <= DEFAULT_SIZE:
        raise SpecError(f"{size} bytes are not more than the 64Mi that there are without it; say 2Gi", key="--size")
    draft = _Draft.of(obj)
    _refuse_owned(draft)
    place = _Place.of(draft, container)
    wanted = _wanted(draft, place, use_volume, replace=replace)
    if wanted is None:
        wanted = _add_volume(draft, place, size)
    elif size is not None:
        _set_size(draft, place, wanted, size)
    _mount(draft, place, wanted)
    return draft.change()


def plan_undo(obj: Json) -> Change:
    """Back to what was before the first patch. No operations where cvlaunch has not patched."""
    draft = _Draft.of(obj)
    steps = _steps_of(obj)
    if not steps:
        draft.left.append(f"it has no annotation {ANNOTATION}: cvlaunch has not patched it")
        return draft.change()
    drop_last = [step for step in steps if step.get("made") == "annotations"]
    for step in reversed([step for step in steps if step not in drop_last]):
        _take_back(draft, step)
    draft.drop(("metadata", "annotations", ANNOTATION))
    for step in drop_last:
        _take_back(draft, step)
    draft.done.append(f"what cvlaunch had changed for {SHM} becomes as it was before")
    return dataclasses.replace(draft.change(), undone=True)


def refuse_fixed(obj: Json) -> None:
    """SpecError for an object of a cluster whose pod can't be changed any more."""
    kind = kind_of(obj)
    if kind is None or not kind.fixed or owner_of(obj):
        return
    what = f"{kind.word}/{name_of(obj)}"
    raise SpecError(
        f"a cluster takes no other volumes for a {kind.name} that is there: {what} must be made anew. With its file: "
        f"cvlaunch shm patch -f {kind.word}.yaml > patched.yaml, then kubectl replace --force -f patched.yaml"
    )


def effect(obj: Json) -> str:
    """What happens to the pods of an object of a cluster when its pod spec changes."""
    kind = kind_of(obj)
    return _EFFECTS[kind.name](obj) if kind and kind.name in _EFFECTS else ""


# -- what happens then


def _of_notebook(obj: Json) -> str:
    if STOPPED in annotations_of(obj):
        return "the notebook is stopped: nothing restarts, and it has the new /dev/shm when it is started"
    return "the pod of the notebook restarts: what runs in it ends, and files that are on no volume are lost"


def _of_deployment(obj: Json) -> str:
    spec = mapping(obj, "spec")
    if spec.get("replicas") == 0:
        return _NONE_RUNS
    if spec.get("paused"):
        return "the deployment is paused: its pods are replaced when it is resumed"
    return f"{_pods(spec.get('replicas'))} replaced by new ones: what runs in them ends"


def _of_stateful_set(obj: Json) -> str:
    spec = mapping(obj, "spec")
    if spec.get("replicas") == 0:
        return _NONE_RUNS
    if mapping(spec, "updateStrategy").get("type") == "OnDelete":
        return "its pods stay as they are; each has the new /dev/shm after it was deleted (updateStrategy OnDelete)"
    return f"{_pods(spec.get('replicas'))} restarted: what runs in them ends"


def _of_daemon_set(obj: Json) -> str:
    return _of_stateful_set({"spec": {**mapping(obj, "spec"), "replicas": None}})


def _of_replica_set(obj: Json) -> str:
    return "pods that are there stay as they are; new ones have the new /dev/shm"


def _of_cron_job(obj: Json) -> str:
    return "nothing restarts: the next job has the new /dev/shm"


_NONE_RUNS = "nothing restarts: it has no pods (replicas: 0)"


def _pods(count: object) -> str:
    return "its pod is" if count in (None, 1) else f"its {count} pods are"


_EFFECTS: Mapping[str, Callable[[Json], str]] = {
    "Notebook": _of_notebook,
    "Deployment": _of_deployment,
    "StatefulSet": _of_stateful_set,
    "DaemonSet": _of_daemon_set,
    "ReplicaSet": _of_replica_set,
    "CronJob": _of_cron_job,
}


# -- a copy that remembers how it was changed


@dataclass(frozen=True)
class _Draft:
    """A copy of an object on its way to the patched one. steps: for the annotation."""

    kind: Kind
    before: Json
    obj: Json
    operations: list[Json] = field(default_factory=list)
    steps: list[Json] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, obj: Json) -> _Draft:
        kind = kind_of(obj)
        if kind is None:
            known = ", ".join(kind.name for kind in KINDS)
            raise SpecError(f"{obj.get('apiVersion')} {obj.get('kind')} can't be patched; what can: {known}")
        return cls(kind, obj, _copied(obj))

    @property
    def what(self) -> str:
        return f"{self.kind.word}/{name_of(self.obj) or '(no name)'}"

    def at(self, path: Path) -> Any:
        found: Any = self.obj
        for part in path:
            found = found[part]
        return found

    def mapping_at(self, path: Path) -> Json:
        """SpecError if one of the keys is missing or has no keys."""
        found = self.obj
        for i, part in enumerate(path):
            inner = found.get(str(part))
            if not isinstance(inner, dict):
                raise SpecError("keys and values were expected", key=".".join(map(str, path[: i + 1])))
            found = inner
        return found

    def put(self, path: Path, value: Any) -> None:
        """Sets a key."""
        parent = self.at(path[:-1])
        self._note("replace" if path[-1] in parent else "add", path, value)
        parent[path[-1]] = _copied(value)

    def append(self, path: Path, value: Any) -> None:
        self._note("add", (*path, "-"), value)
        self.at(path).append(_copied(value))

    def drop(self, path: Path) -> None:
        """Of a list or of keys."""
        self.operations.append({"op": "remove", "path": _pointer(path)})
        del self.at(path[:-1])[path[-1]]

    def extend(self, path: Path, value: Any, made: Json) -> None:
        """Appends to a list that may not be there yet. made: how the step that makes it is remembered."""
        parent, key = self.at(path[:-1]), path[-1]
        if parent.get(key) is None:
            self.steps.append({"made": key, **made, "was": "null" if key in parent else "absent"})
            self.put(path, [value])
        else:
            self.append(path, value)

    def _note(self, op: str, path: Path, value: Any) -> None:
        self.operations.append({"op": op, "path": _pointer(path), "value": value})

    def change(self) -> Change:
        if self.steps:
            self._remember()
        version = mapping(self.before, "metadata").get("resourceVersion")
        test = [{"op": "test", "path": "/metadata/resourceVersion", "value": version}] if version else []
        operations = (*test, *self.operations) if self.operations else ()
        return Change(self.what, self.before, self.obj, operations, tuple(self.done), tuple(self.left))

    def _remember(self) -> None:
        metadata = self.mapping_at(("metadata",))
        steps = [*_steps_of(self.before), *self.steps]
        if metadata.get("annotations") is None:
            steps.append({"made": "annotations", "was": "null" if "annotations" in metadata else "absent"})
        text = json.dumps(steps, separators=(",", ":"))
        if metadata.get("annotations") is None:
            self.put(("metadata", "annotations"), {ANNOTATION: text})
        else:
            self.put(("metadata", "annotations", ANNOTATION), text)


def _copied(value: Any) -> Any:
    """All of it, also where the same list stands in two places."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _pointer(path: Path) -> str:
    """RFC 6901."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _steps_of(obj: Json) -> list[Json]:
    text = annotations_of(obj).get(ANNOTATION)
    if text is None:
        return []
    try:
        steps = json.loads(text)
        if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
            return steps
    except (TypeError, ValueError):
        pass
    raise SpecError(f"the annotation {ANNOTATION} is not what cvlaunch wrote: remove it by hand")


# -- forth


def _refuse_owned(draft: _Draft) -> None:
    owner = owner_of(draft.obj)
    if owner and owner.kind:
        way = f"cvlaunch shm patch {owner.kind.word}/{owner.name}"
        raise SpecError(f"{draft.what} is made by {owner}, which would undo the change; patch that: {way}")
    if owner:
        draft.left.append(f"it is made by {owner}, which may undo the change or make new ones without it")


@dataclass(frozen=True)
class _Place:
    """The container that it is about, in its pod. pod, path: ways to the pod's spec and to the container."""

    pod: Path
    path: Path
    name: str
    container: Json
    volumes: Mapping[str, Volume]

    @classmethod
    def of(cls, draft: _Draft, wanted: str | None) -> _Place:
        pod = draft.kind.pod_spec
        spec = draft.mapping_at(pod)
        index, container = _working(draft, spec, wanted)
        claims = mappings(mapping(draft.obj, "spec"), "volumeClaimTemplates")
        name = str(container.get("name"))
        return cls(pod, (*pod, "containers", index), name, container, volumes_of(spec, claims))

    @property
    def mounts(self) -> list[Json]:
        return mappings(self.container, "volumeMounts")

    def mounted_elsewhere(self, volume: Volume) -> list[int]:
        """Places in `volumeMounts`."""
        return [i for i, mount in enumerate(self.mounts) if mount.get("name") == volume.name and not is_shm(mount)]

    def words(self, volume: Volume) -> str:
        paths = [str(self.mounts[i].get("mountPath")) for i in self.mounted_elsewhere(volume)]
        return f"is at {', '.join(paths)}" if paths else "is not mounted"


def _working(draft: _Draft, spec: Json, wanted: str | None) -> tuple[int, Json]:
    """The container to change, and where it stands."""
    containers = {str(one.get("name")): (i, one) for i, one in enumerate(mappings(spec, "containers"))}
    if not containers:
        raise SpecError(f"{draft.what} has no containers")
    found = containers.get(wanted) if wanted is not None else _obvious(draft, containers)
    if found is None and wanted is not None:
        there = f"{nearest(wanted, containers) or ';'} it has {', '.join(containers)}"
        raise SpecError(f"{draft.what} has no container {wanted!r}{there}", key="--container")
    if found is None:
        raise SpecError(f"{draft.what} has several containers: {', '.join(containers)}; choose one", key="--container")
    return found


def _obvious(draft: _Draft, containers: Mapping[str, tuple[int, Json]]) -> tuple[int, Json] | None:
    template = draft.mapping_at(draft.kind.template) if draft.kind.template else draft.obj
    says = str(annotations_of(template).get(_DEFAULT_CONTAINER))
    working = [name for name in containers if name not in SIDECARS] or list(containers)
    named = [name for name in (says, name_of(draft.obj)) if name in containers]
    names = named or (working if len(working) == 1 else [])
    return containers[names[0]] if names else None


def _wanted(draft: _Draft, place: _Place, use_volume: str | None, *, replace: bool) -> Volume | None:
    """The volume that /dev/shm shall be; None for a new one."""
    there = _there(place)
    if use_volume is None and there and there.form is Form.MEMORY:
        return there
    wanted = _memory_volume(draft, place) if use_volume is None else _volume_named(draft, place, use_volume)
    if there and there.name != (wanted and wanted.name) and not replace:
        raise SpecError(
            f"container {place.name} of {draft.what} has something else at {SHM}: volume {there.name}, {there.words}; "
            f"--replace takes {SHM} from it"
        )
    _explain_left(draft, place, wanted)
    return wanted


def _there(place: _Place) -> Volume | None:
    mount = shm_mount(place.container)
    if mount is None:
        return None
    name = str(mount[1].get("name"))
    return place.volumes.get(name, Volume(name, Form.MISSING, "which is not defined"))


def _volume_named(draft: _Draft, place: _Place, name: str) -> Volume:
    if name not in place.volumes:
        there = f"{nearest(name, place.volumes) or ';'} it has {', '.join(place.volumes) or 'none'}"
        raise SpecError(f"{draft.what} has no volume {name!r}{there}", key="--use-volume")
    return place.volumes[name]


def _memory_volume(draft: _Draft, place: _Place) -> Volume | None:
    """One that is there for shared memory by its name; else the only one that nothing else is known to use."""
    memory = [volume for volume in place.volumes.values() if volume.form is Form.MEMORY]
    named = [volume for volume in memory if volume.meant_for_shm]
    free = named or [volume for volume in memory if not _in_use(draft, place, volume)]
    if len(free) > 1:
        free = [volume for volume in free if place.mounted_elsewhere(volume)] or free
    if len(free) > 1:
        names = ", ".join(volume.name for volume in free)
        raise SpecError(f"{draft.what} has several volumes of memory: {names}; choose one", key="--use-volume")
    return free[0] if free else None


def _in_use(draft: _Draft, place: _Place, volume: Volume) -> bool:
    """Another container has it, too, or it stands where programs look for a folder."""
    paths = [str(place.mounts[i].get("mountPath")) for i in place.mounted_elsewhere(volume)]
    if any(path == folder or path.startswith(f"{folder}/") for path in paths for folder in _EXPECTED):
        return True
    spec = draft.mapping_at(place.pod)
    others = [*mappings(spec, "containers"), *mappings(spec, "initContainers")]
    return any(
        mount.get("name") == volume.name
        for other in others
        if other is not place.container
        for mount in mappings(other, "volumeMounts")
    )


def _explain_left(draft: _Draft, place: _Place, wanted: Volume | None) -> None:
    for volume in place.volumes.values():
        if wanted and volume.name == wanted.name:
            continue
        if volume.form is Form.CLAIM and volume.meant_for_shm:
            draft.left.append(
                f"volume {volume.name} {place.words(volume)} and stays so: it is {volume.words}, mostly a disk on the "
                f"network, and as shared memory every batch would travel there and back; --use-volume {volume.name} "
                f"mounts it at {SHM} all the same"
            )
        elif volume.form is Form.MEMORY and wanted is None:
            draft.left.append(
                f"volume {volume.name} {place.words(volume)} and stays so: it is memory, but something else uses it; "
                f"--use-volume {volume.name} mounts it at {SHM} all the same"
            )


def _add_volume(draft: _Draft, place: _Place, size: int | None) -> Volume:
    name = next(name for name in _names() if name not in place.volumes)
    source = {"medium": "Memory"} | ({"sizeLimit": size_as_written(size)} if size is not None else {})
    _check_memory(draft, place, size)
    draft.extend((*place.pod, "volumes"), {"name": name, "emptyDir": source}, {})
    draft.steps.append({"volume": name})
    most = "without a size of its own" if size is None else f"at most {size_as_written(size)}"
    draft.done.append(f"volume {name} is new: memory, {most}{_counted(place, size)}")
    return Volume(name, Form.MEMORY, "memory")


def _names() -> Iterator[str]:
    yield _VOLUME
    yield from (f"{_VOLUME}-{number}" for number in range(2, 10**6))


def _set_size(draft: _Draft, place: _Place, volume: Volume, size: int) -> None:
    written = size_as_written(size)
    if volume.index is None or volume.form is not Form.MEMORY:
        raise SpecError(f"the size of volume {volume.name} is not set here: it is {volume.words}", key="--size")
    _check_memory(draft, place, size)
    if volume.limit is not None and parse_quantity(volume.limit) == parse_quantity(written):
        return
    path = (*place.pod, "volumes", volume.index, "emptyDir", "sizeLimit")
    known = [step for step in [*_steps_of(draft.before), *draft.steps] if step.get("volume") == volume.name]
    if not known:
        draft.steps.append({"volume": volume.name, "sizeLimit": draft.at(path[:-1]).get("sizeLimit", _ABSENT)})
    draft.put(path, written)
    before = f"{volume.limit} before" if volume.limit is not None else "no limit before"
    draft.done.append(f"volume {volume.name} has at most {written}, {before}{_counted(place, size)}")


_ABSENT = False
"""In a step: there was no such key. No quantity, and not null."""


def _check_memory(draft: _Draft, place: _Place, size: int | None) -> None:
    limit = memory_limit(place.container)
    if size is None or limit is None:
        return
    if size > limit:
        raise SpecError(
            f"container {place.name} of {draft.what} may use {size_as_written(limit)} of memory, and what is written "
            f"to {SHM} counts into it: {size_as_written(size)} don't fit; raise its resources.limits.memory, or ask "
            "for less",
            key="--size",
        )


def _counted(place: _Place, size: int | None) -> str:
    limit = memory_limit(place.container)
    if limit is not None:
        return f"; it counts into the {size_as_written(limit)} of container {place.name}"
    return "; it can grow to the memory of the node, and --size limits it" if size is None else ""


def _mount(draft: _Draft, place: _Place, volume: Volume) -> None:
    mount = shm_mount(place.container)
    elsewhere = place.mounted_elsewhere(volume)
    if mount is not None:
        _change_mount(draft, place, mount[0], volume)
    elif len(elsewhere) == 1:
        _change_mount(draft, place, elsewhere[0], volume)
    else:
        draft.extend((*place.path, "volumeMounts"), {"name": volume.name, "mountPath": SHM}, {"container": place.name})
        draft.steps.append({"mount": place.name})
        draft.done.append(f"volume {volume.name} ({volume.words}) is mounted at {SHM} in container {place.name}")


def _change_mount(draft: _Draft, place: _Place, index: int, volume: Volume) -> None:
    """Changes no more than is needed, so that a file's comments stay."""
    mount, path = dict(place.mounts[index]), (*place.path, "volumeMounts", index)
    changes = {} if is_shm(mount) else {"mountPath": SHM}
    changes |= {} if mount.get("name") == volume.name else {"name": volume.name}
    fresh = "name" in changes or volume.form is Form.MEMORY
    hindrances = [key for key in _HINDRANCES if fresh and mount.get(key)]
    if not changes and not hindrances:
        return
    for key, value in changes.items():
        draft.put((*path, key), value)
    for key in hindrances:
        draft.drop((*path, key))
    draft.steps.append({"mount": place.name, "was": {key: mount[key] for key in [*changes, *hindrances]}})
    draft.done.append(_words_of_mount(place, volume, mount, hindrances))


def _words_of_mount(place: _Place, volume: Volume, before: Json, hindrances: Sequence[str]) -> str:
    without = f", without {', '.join(hindrances)}" if hindrances else ""
    here = f"in container {place.name}{without}"
    if before.get("name") != volume.name:
        also = place.words(volume).removeprefix("is ") if place.mounted_elsewhere(volume) else ""
        return (
            f"volume {volume.name} ({volume.words}) is mounted at {SHM} {here}, in place of {before.get('name')}, "
            f"which is not mounted there any more{f'; it is {also}, too' if also else ''}"
        )
    if is_shm(before):
        return f"volume {volume.name} is mounted at {SHM} {here}"
    return f"volume {volume.name} ({volume.words}) is mounted at {SHM} {here}; it was at {before.get('mountPath')}"


# -- and back


def _take_back(draft: _Draft, step: Json) -> None:
    try:
        if "made" in step:
            _take_back_list(draft, step)
        elif "volume" in step:
            _take_back_volume(draft, step)
        else:
            _take_back_mount(draft, step)
    except (AttributeError, LookupError, TypeError, StopIteration) as error:
        raise SpecError(
            f"{draft.what} has changed since cvlaunch patched it, and {json.dumps(step)} can't be taken back: change "
            f"it by hand, and remove the annotation {ANNOTATION}"
        ) from error


def _take_back_list(draft: _Draft, step: Json) -> None:
    """Only what is empty: somebody may have added to it."""
    path = _list_path(draft, step)
    if draft.at(path):
        return
    if step["was"] == "null":
        draft.put(path, None)
    else:
        draft.drop(path)


def _list_path(draft: _Draft, step: Json) -> Path:
    if step["made"] == "annotations":
        return ("metadata", "annotations")
    if step["made"] == "volumes":
        return (*draft.kind.pod_spec, "volumes")
    return (*_container_path(draft, step["container"]), "volumeMounts")


def _container_path(draft: _Draft, name: str) -> Path:
    path: Path = (*draft.kind.pod_spec, "containers")
    return (*path, _index(draft.at(path), lambda one: one["name"] == name))


def _take_back_volume(draft: _Draft, step: Json) -> None:
    path: Path = (*draft.kind.pod_spec, "volumes")
    path = (*path, _index(draft.at(path), lambda one: one["name"] == step["volume"]))
    if "sizeLimit" not in step:
        draft.drop(path)
    elif step["sizeLimit"] is _ABSENT:
        draft.drop((*path, "emptyDir", "sizeLimit"))
    else:
        draft.put((*path, "emptyDir", "sizeLimit"), step["sizeLimit"])


def _take_back_mount(draft: _Draft, step: Json) -> None:
    path: Path = (*_container_path(draft, step["mount"]), "volumeMounts")
    path = (*path, _index(draft.at(path), is_shm))
    if "was" not in step:
        draft.drop(path)
        return
    for key, value in step["was"].items():
        draft.put((*path, key), value)


def _index(items: Sequence[Json], fits: Callable[[Json], bool]) -> int:
    return next(i for i, item in enumerate(items) if fits(item))
