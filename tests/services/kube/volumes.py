"""The volumes of a pod, as folders of this machine: memory where Kubernetes has memory."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.services.kube.environment import expand, field_value, resource_value
from tests.services.kube.objects import Store
from tests.services.kube.times import parse_quantity, whole

__all__ = ["MountError", "PodFolders", "host_path", "make_volumes"]

Json = dict[str, Any]

_making = threading.Lock()
"""Folders of a claim, which several pods may mount at a time."""


class MountError(Exception):
    """FailedMount: the kubelet tries again."""


@dataclass(frozen=True)
class PodFolders:
    """memory: on a tmpfs, for what must not reach a disk. disk: for emptyDir, logs and the rest."""

    memory: Path
    disk: Path

    def make(self) -> None:
        for folder in (self.memory, self.disk):
            folder.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        mounts = Path("/proc/mounts").read_text().splitlines() if self.memory.exists() else []
        for line in mounts:
            if (target := line.split()[1]).startswith(f"{self.memory}/"):
                subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
        for folder in (self.memory, self.disk):
            shutil.rmtree(folder, ignore_errors=True)


def make_volumes(store: Store, pod: Json, folders: PodFolders, *, token: str) -> dict[str, Path]:
    """Volume → its folder. MountError where something is missing. token: of service accounts."""
    found: dict[str, Path] = {}
    context = pod["spec"]["securityContext"]
    group, patient = context.get("fsGroup"), context.get("fsGroupChangePolicy") == "OnRootMismatch"
    for volume in pod["spec"].get("volumes", ()):
        found[volume["name"]] = _volume(store, pod, volume, folders, token=token)
        root, kept = found[volume["name"]], patient and "persistentVolumeClaim" in volume
        if group is not None and "hostPath" not in volume and not (kept and _is_of_group(root, group)):
            _give_to_group(root, group, read_only=_read_only(volume))
    return found


def _read_only(volume: Json) -> bool:
    return any(kind in volume for kind in ("secret", "configMap", "downwardAPI", "projected"))


def _volume(store: Store, pod: Json, volume: Json, folders: PodFolders, *, token: str) -> Path:
    name = volume["name"]
    if "emptyDir" in volume:
        return _empty(pod, volume["emptyDir"], name, folders)
    if "persistentVolumeClaim" in volume:
        return _claimed(store, pod, volume["persistentVolumeClaim"]["claimName"])
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    if not _read_only(volume):
        raise MountError(f"Unable to attach or mount volumes: unmounted volumes=[{name}]: no plugin matched")
    folder = folders.memory / name
    if not folder.exists():
        try:
            files = list(_files(store, pod, volume, token))
        except MountError as error:
            raise MountError(f'MountVolume.SetUp failed for volume "{name}" : {error}') from None
        _write_atomically(folder, files)
    return folder


def _empty(pod: Json, source: Json, name: str, folders: PodFolders) -> Path:
    memory = source.get("medium") == "Memory"
    folder = (folders.memory if memory else folders.disk / "volumes") / name
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    if memory:
        size = _memory_size(pod, source)
        options = ["-o", f"mode=0777{f',size={size}' if size else ''}"]
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True, capture_output=True)
    return folder


def _memory_size(pod: Json, source: Json) -> int | None:
    """The smaller one of sizeLimit and the memory limits of all containers, as the kubelet has it."""
    limits = [c["resources"].get("limits", {}).get("memory") for c in pod["spec"]["containers"]]
    sizes = [whole(sum(parse_quantity(limit) for limit in limits if limit))] if all(limits) else []
    if limit := source.get("sizeLimit"):
        sizes.append(whole(parse_quantity(limit)))
    return min(sizes, default=None)


def _claimed(store: Store, pod: Json, name: str) -> Path:
    claim = store.get(("persistentvolumeclaims", pod["metadata"]["namespace"], name))
    volume = store.get(("persistentvolumes", "", claim["spec"].get("volumeName", ""))) if claim else None
    if volume is None:
        raise MountError(f'persistentvolumeclaim "{name}" not found')
    return Path(volume["spec"]["hostPath"]["path"])


File = tuple[str, bytes, int]
"""(path, content, mode)"""


def _files(store: Store, pod: Json, volume: Json, token: str) -> Iterator[File]:
    if "projected" in volume:
        mode = volume["projected"]["defaultMode"]
        for source in volume["projected"].get("sources", ()):
            for kind, inner in source.items():
                yield from _source(store, pod, kind, {**inner, "defaultMode": mode}, token)
        return
    for kind in ("secret", "configMap", "downwardAPI"):
        if kind in volume:
            yield from _source(store, pod, kind, volume[kind], token)


def _source(store: Store, pod: Json, kind: str, source: Json, token: str) -> Iterator[File]:
    mode = source["defaultMode"]
    if kind == "serviceAccountToken":
        yield source["path"], token.encode(), mode
    elif kind == "downwardAPI":
        for item in source.get("items", ()):
            yield item["path"], _downward(pod, item).encode(), item.get("mode", mode)
    else:
        data = _data(store, pod, kind, source)
        items = source.get("items") or [{"key": key, "path": key} for key in sorted(data)]
        for item in items:
            if item["key"] in data:
                yield item["path"], data[item["key"]], item.get("mode", mode)
            elif not source.get("optional"):
                raise MountError(f"references non-existent {kind.lower()} key: {item['key']}")


def _downward(pod: Json, item: Json) -> str:
    if "fieldRef" in item:
        return field_value(pod, item["fieldRef"]["fieldPath"])
    reference = item["resourceFieldRef"]
    container = next(c for c in pod["spec"]["containers"] if c["name"] == reference["containerName"])
    return resource_value(container, reference)


def _data(store: Store, pod: Json, kind: str, source: Json) -> dict[str, bytes]:
    name = source.get("secretName") or source.get("name", "")
    found = store.get(("secrets" if kind == "secret" else "configmaps", pod["metadata"]["namespace"], name))
    if found is None:
        if source.get("optional"):
            return {}
        raise MountError(f'{kind.lower()} "{name}" not found')
    if kind == "secret":
        return {key: base64.b64decode(value) for key, value in found.get("data", {}).items()}
    binary = {key: base64.b64decode(value) for key, value in found.get("binaryData", {}).items()}
    return {**{key: value.encode() for key, value in found.get("data", {}).items()}, **binary}


def _write_atomically(folder: Path, files: list[File]) -> None:
    """As the kubelet does: the names are links through `..data` to a folder of this moment."""
    moment = time.strftime("..%Y_%m_%d_%H_%M_%S.0", time.gmtime())
    (folder / moment).mkdir(parents=True)
    for path, content, mode in files:
        target = folder / moment / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)
        first = Path(path).parts[0]
        if not (folder / first).is_symlink():
            (folder / first).symlink_to(f"..data/{first}")
    (folder / "..data").symlink_to(moment)
    folder.chmod(0o777)


def _give_to_group(root: Path, group: int, *, read_only: bool) -> None:
    """fsGroup: files and folders belong to the group, which may at least read them (write, too, if not read_only)."""
    mask = 0o440 if read_only else 0o660
    for folder, folders, names in os.walk(root):
        for path in [Path(folder), *(Path(folder) / name for name in (*folders, *names))]:
            with contextlib.suppress(FileNotFoundError):  # another pod of the claim has just removed it
                _give_one(path, group, mask)


def _is_of_group(root: Path, group: int) -> bool:
    """What OnRootMismatch looks at (pkg/volume/volume_linux.go, requiresPermissionChange)."""
    facts = root.stat()
    return facts.st_gid == group and facts.st_mode & 0o2770 == 0o2770


def _give_one(path: Path, group: int, mask: int) -> None:
    if path.is_symlink():
        os.chown(path, -1, group, follow_symlinks=False)
        return
    os.chown(path, -1, group)
    extra = 0o2110 if path.is_dir() else 0
    path.chmod(path.stat().st_mode & 0o7777 | mask | extra)


def host_path(folder: Path, mount: Json, values: dict[str, str]) -> Path:
    """What of a volume's folder a mount shows: a subPath is made if it is not there, with the volume's mode."""
    sub = mount.get("subPath") or expand(mount.get("subPathExpr", ""), values)
    path, facts = folder, folder.stat()
    mode, group = facts.st_mode & 0o7777, facts.st_gid
    for part in Path(sub).parts:
        path /= part
        with _making:
            if not path.exists():
                path.mkdir()
                if mode & 0o2000:
                    os.chown(path, -1, group)
                path.chmod(mode)
    return path
