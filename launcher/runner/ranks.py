"""Which node this is, and where rank 0 is: one table for all platforms."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import SpecError, UnreachableError

__all__ = ["Ranks", "find_ranks", "first_host", "wait_for_master"]

_PORT = 29500


@dataclass(frozen=True)
class Ranks:
    """interface: network interface between the nodes, where the platform names one."""

    node_rank: int = 0
    nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = _PORT
    interface: str | None = None


def find_ranks(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks:
    """SpecError if the platform doesn't say which of `nodes` this is, or counts them differently.

    A job of one node is one wherever it runs, also inside a larger allocation.
    """
    if nodes == 1:
        return Ranks()
    for name, read in _PLATFORMS.items():
        try:
            ranks = read(nodes, environ, root)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise SpecError(f"the ranks of {name} can't be read ({type(error).__name__}: {error})") from error
        if ranks is None:
            continue
        if ranks.nodes != nodes or not 0 <= ranks.node_rank < nodes:
            raise SpecError(f"the job wants {nodes} nodes; {name} says node {ranks.node_rank} of {ranks.nodes}")
        return ranks
    raise SpecError(f"nothing says which of {nodes} nodes this is; set CVLAUNCH_NODE_RANK and CVLAUNCH_MASTER")


def _explicit(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks | None:
    if "CVLAUNCH_NODE_RANK" not in environ:
        return None
    address, port = _address(environ["CVLAUNCH_MASTER"])
    count = int(environ.get("CVLAUNCH_NODES", nodes))
    return Ranks(int(environ["CVLAUNCH_NODE_RANK"]), count, address, port, environ.get("CVLAUNCH_INTERFACE"))


def _sagemaker(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks | None:
    """BACKENDS §1.3; `hosts` is sorted, and rank 0 is the first."""
    path = root / "input/config/resourceconfig.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text())
    hosts = config["hosts"]
    return Ranks(
        hosts.index(config["current_host"]), len(hosts), hosts[0], interface=config.get("network_interface_name")
    )


def _vertex(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks | None:
    """BACKENDS §2.2: pool 0 has one replica, the other nodes are pool 1."""
    if "CLUSTER_SPEC" not in environ:
        return None
    spec = json.loads(environ["CLUSTER_SPEC"])
    first, workers = spec["cluster"]["workerpool0"], spec["cluster"].get("workerpool1", [])
    task = spec["task"]
    index = int(task["index"]) + (len(first) if task["type"] == "workerpool1" else 0)
    address, port = _address(first[0])
    return Ranks(index, len(first) + len(workers), address, port)


def _kubernetes(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks | None:
    """BACKENDS §4.1: an indexed Job behind a headless service."""
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    address, port = _address(environ["CVLAUNCH_MASTER"])
    return Ranks(int(environ["JOB_COMPLETION_INDEX"]), int(environ.get("CVLAUNCH_NODES", nodes)), address, port)


def _slurm(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks | None:
    """BACKENDS §5.4: one task a node. The port follows from the job, as jobs share nodes."""
    if "SLURM_NODEID" not in environ:
        return None
    default = 20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000
    master = environ.get("CVLAUNCH_MASTER") or first_host(environ["SLURM_JOB_NODELIST"])
    address, port = _address(master, default)
    interface = environ.get("CVLAUNCH_INTERFACE")
    return Ranks(int(environ["SLURM_NODEID"]), int(environ["SLURM_NNODES"]), address, port, interface)


_PLATFORMS: Mapping[str, Callable[[int, Mapping[str, str], Path], Ranks | None]] = {
    "CVLAUNCH_NODE_RANK": _explicit,
    "SageMaker (resourceconfig.json)": _sagemaker,
    "Vertex (CLUSTER_SPEC)": _vertex,
    "Kubernetes (JOB_COMPLETION_INDEX)": _kubernetes,
    "SLURM (SLURM_NODEID)": _slurm,
}
"""Asked in this order; the first that answers counts."""


def _address(text: str, default_port: int = _PORT) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    return (host, int(port)) if colon else (text, default_port)


def first_host(nodelist: str) -> str:
    """`gpu-03` of SLURM's `gpu-[03-05,9],login1`; `r1n2` of `r[1-2]n[2-4]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodelist


def wait_for_master(
    ranks: Ranks,
    abort: threading.Event,
    *,
    tries: int = 150,
    every_s: float = 2.0,
    resolve: Callable[[str], object] = socket.gethostbyname,
) -> None:
    """Until the name of rank 0 resolves, which platforms announce late. UnreachableError after `tries`."""
    for _ in range(tries):
        try:
            resolve(ranks.master_addr)
        except OSError:
            if abort.wait(every_s):
                return
        else:
            return
    raise UnreachableError(f"the name of node 0, {ranks.master_addr}, did not resolve in {tries * every_s:.0f} s")
