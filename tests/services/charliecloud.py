"""An image of podman's as a folder that charliecloud runs, on the nodes of a test's cluster.

`ch-convert` would write 6.5 GB of it; instead its layers are mounted, one over the other, as podman mounts them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.services.podman import podman
from tests.services.slurm import NODES, SlurmCluster

__all__ = ["image_folder"]


@contextlib.contextmanager
def image_folder(cluster: SlurmCluster, reference: str, folder: Path) -> Iterator[Path]:
    """`folder`, which is made here and is the image on all nodes, read-only.

    Each node has mounts of its own, which end with it: a node that was started anew has an empty folder there.
    """
    folder.mkdir(parents=True)
    layers = ":".join([str(_environment(reference, folder.with_name(f"{folder.name}.ch"))), *_layers(reference)])
    mounted: list[str] = []
    try:
        for node in NODES:
            done = _on(cluster, node, "mount", "-t", "overlay", "-o", f"ro,lowerdir={layers}", "image", str(folder))
            assert done.returncode == 0, done.stderr
            mounted.append(node)
        yield folder
    finally:
        for node in mounted:
            if cluster.daemons[node].running:
                _on(cluster, node, "umount", "--lazy", str(folder))


def _environment(reference: str, layer: Path) -> Path:
    """A layer with the image's variables, as ch-convert writes them and `ch-run --set-env` reads them."""
    variables: list[str] = json.loads(podman("image", "inspect", "--format={{json .Config.Env}}", reference))
    (layer / "ch").mkdir(parents=True)
    (layer / "ch/environment").write_text("".join(f"{variable}\n" for variable in variables))
    return layer


def _layers(reference: str) -> list[str]:
    """Folders on this machine, the uppermost first."""
    driver = json.loads(podman("image", "inspect", "--format={{json .GraphDriver}}", reference))
    assert driver["Name"] == "overlay", f"podman keeps images by {driver['Name']}, whose layers can't be mounted"
    return [driver["Data"]["UpperDir"], *driver["Data"]["LowerDir"].split(":")]


def _on(cluster: SlurmCluster, node: str, *command: str) -> subprocess.CompletedProcess[str]:
    """In the node's namespace of mounts, which the first process of its daemon has."""
    pid = cluster.daemons[node].process.pid
    enter = ["nsenter", f"--target={pid}", "--mount", "--wd=/", "--", *command]
    return subprocess.run(enter, capture_output=True, text=True, check=False)
