"""Which node this is, and where rank 0 is: one table for all platforms."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import SpecError, UnreachableError
from launcher.quantities import format_duration

__all__ = ["Ranks", "find_ranks", "first_host", "wait_for_master"]

_PORT = 29500
_PATIENCE_S = 300.0
"""How long a name that should be there from the start may not resolve."""
_TELL_EVERY_S = 60.0


@dataclass(frozen=True)
class Ranks:
    """interface: network interface between the nodes, where the platform names one.

    late: nodes start one by one, and the name of rank 0 is there once its node is, which may take hours.
    """

    node_rank: int = 0
    nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = _PORT
    interface: str | None = None
    late: bool = False


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
    """BACKENDS §1.3; rank N is `algo-<N + 1>`, as in the names of its log streams."""
    path = root / "input/config/resourceconfig.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text())
    hosts = _by_number(config["hosts"])
    interface = config.get("network_interface_name")
    return Ranks(hosts.index(config["current_host"]), len(hosts), hosts[0], interface=interface, late=True)


def _by_number(hosts: Sequence[str]) -> list[str]:
    """SageMaker sorts `algo-10` before `algo-2`. Names of another form stay as they are given."""
    numbers = [re.fullmatch(r"algo-(\d+)", host) for host in hosts]
    found = {number[0]: int(number[1]) for number in numbers if number}
    return sorted(hosts, key=found.__getitem__) if len(found) == len(hosts) else [*hosts]


def _vertex(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks | None:
    """BACKENDS §2.2: pool 0 has one replica, the other nodes are pool 1."""
    if "CLUSTER_SPEC" not in environ:
        return None
    spec = json.loads(environ["CLUSTER_SPEC"])
    first, workers = spec["cluster"]["workerpool0"], spec["cluster"].get("workerpool1", [])
    task = spec["task"]
    index = int(task["index"]) + (len(first) if task["type"] == "workerpool1" else 0)
    address, port = _address(first[0])
    return Ranks(index, len(first) + len(workers), address, port, late=True)


def _kubernetes(nodes: int, environ: Mapping[str, str], root: Path) -> Ranks | None:
    """BACKENDS §4.1: an indexed Job behind a headless service, which has a pod's name once that has an address."""
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    address, port = _address(environ["CVLAUNCH_MASTER"])
    count = int(environ.get("CVLAUNCH_NODES", nodes))
    return Ranks(int(environ["JOB_COMPLETION_INDEX"]), count, address, port, late=True)


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


def _resolve(name: str) -> object:
    """Some clusters have IPv6 alone."""
    return socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)


def wait_for_master(
    ranks: Ranks,
    abort: threading.Event,
    say: Callable[[str], None],
    *,
    time_left: Callable[[], float] = lambda: math.inf,
    every_s: float = 2.0,
    resolve: Callable[[str], object] = _resolve,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Until the name of rank 0 resolves, `abort` is set, or no time is left (seconds); says once a minute why it waits.

    UnreachableError, after some minutes, if the platform announces no names late.
    """
    since, told = clock(), 0
    while why := _unresolved(ranks.master_addr, resolve):
        waited = clock() - since
        if waited >= _PATIENCE_S and not ranks.late:
            patience = format_duration(_PATIENCE_S)
            raise UnreachableError(f"the name of node 0, {ranks.master_addr}, did not resolve in {patience}: {why}")
        if waited >= told * _TELL_EVERY_S:
            name = f"its name, {ranks.master_addr}, does not resolve"
            say(f"waiting for node 0, for {format_duration(waited)} so far; {name}: {why}")
            told += 1
        if time_left() <= 0 or abort.wait(min(every_s, time_left())):
            return


def _unresolved(name: str, resolve: Callable[[str], object]) -> str:
    """Why; empty if it has an address."""
    try:
        resolve(name)
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""
