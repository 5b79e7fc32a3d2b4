"""An image of podman's as a folder that charliecloud runs, on the nodes of a test's cluster.

`ch-convert` would write 6.5 GB of it; instead its layers are mounted, one over the other, as podman mounts them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.services.podman import podman
from tests.services.slurm import NODES, SlurmCluster

__all__ = ["mount_image"]


def mount_image(cluster: SlurmCluster, reference: str, at: Path | None = None) -> Path:
    """A folder that is the image on all nodes, read-only; below the cluster's own unless `at` names one.

    Each node has mounts of its own, which end with it, whatever ends it. So this is done anew where a test may have
    started a node again; on the others it does nothing.
    """
    folder = at or cluster.folder / "image"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [node for node in NODES if _on(cluster, node, "mountpoint", "--quiet", folder).returncode]
    if missing:
        layers = ":".join([str(_variables(reference, cluster.folder / "image.ch")), *_layers(reference)])
        for node in missing:
            done = _on(cluster, node, "mount", "-t", "overlay", "-o", f"ro,lowerdir={layers}", "image", folder)
            assert done.returncode == 0, done.stderr
    return folder


def _variables(reference: str, layer: Path) -> Path:
    """A layer with the image's variables, as ch-convert writes them and `ch-run --set-env` reads them."""
    found: list[str] = json.loads(podman("image", "inspect", "--format={{json .Config.Env}}", reference))
    (layer / "ch").mkdir(parents=True, exist_ok=True)
    (layer / "ch/environment").write_text("".join(f"{variable}\n" for variable in found))
    return layer


def _layers(reference: str) -> list[str]:
    """Folders on this machine, the uppermost first."""
    driver = json.loads(podman("image", "inspect", "--format={{json .GraphDriver}}", reference))
    assert driver["Name"] == "overlay", f"podman keeps images by {driver['Name']}, whose layers can't be mounted"
    return [driver["Data"]["UpperDir"], *driver["Data"]["LowerDir"].split(":")]


def _on(cluster: SlurmCluster, node: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """In the node's namespace of mounts, which the first process of its daemon has."""
    pid = cluster.daemons[node].process.pid
    enter = ["nsenter", f"--target={pid}", "--mount", "--wd=/", "--", *command]
    return subprocess.run(enter, capture_output=True, text=True, check=False)
