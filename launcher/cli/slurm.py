"""What `targets setup`, `targets probe` and `login` do with clusters of SLURM."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.out import Column, Out
from launcher.errors import CvlaunchError, SpecError, UnsupportedError

if TYPE_CHECKING:
    from launcher.backends.slurm import SlurmTarget
    from launcher.remote import Host
    from launcher.slurm.probe import Cluster, ComputeNode, Nodes, Partition
    from launcher.slurm.setup import SetUp
    from launcher.targets import Selected

__all__ = ["login", "probe", "setup"]

_NOTHING = (
    "the {} backend has nothing to set up, to look at or to log in to; targets of the backends slurm, kubernetes,"
    " openshift and sagemaker have"
)


def setup(selected: Selected, images: tuple[str, ...], *, requirements: Path | None, out: Out) -> None:
    from launcher.slurm.setup import set_up

    place = _place(selected)
    in_images = place.target.way is not None and requirements is None
    done = set_up(
        place.host,
        place.target.root,
        python=None if in_images or requirements else place.python,
        requirements=requirements,
        environment=not in_images,
        say=out.note,
        setup=place.setup,
    )
    brought = {image: _bring(place, image, out) for image in images}
    _show_set_up(done, brought, out)
    if requirements and done.python != place.target.python:
        out.note(f"jobs run in it when the target says so: write python: {done.python}")


def probe(
    name: str | None,
    selected: Selected | None,
    *,
    ssh: str | None,
    root: str | None,
    run_job: bool,
    connect: str,
    write: bool,
    out: Out,
) -> None:
    """selected: the target that NAME is; None: NAME is a new one's."""
    from launcher.remote import Host
    from launcher.slurm.probe import as_target
    from launcher.slurm.probe import probe as look_at

    known = _place(selected) if selected else None
    host = known.host if known else Host(ssh, name)
    root = root or (known.target.root if known else None)
    cluster = look_at(host)
    keys = as_target(cluster, ssh=host.ssh, root=root)
    way = keys.pop("container_command", None)
    node = _look_at_node(host, cluster, keys, connect=connect, out=out) if run_job else None
    name = name or re.sub(r"[^a-z0-9]+", "-", cluster.name.lower()).strip("-") or "hpc"
    if out.as_json:
        out.document({**_cluster_json(cluster, node), "target": {name: keys}})
    else:
        _show(cluster, node, out)
        out.data(f"\n{_yaml(name, keys, way)}".rstrip())
    if write:
        from launcher.cli.targetsfile import add_target

        out.note(f"added to {add_target(Path.cwd(), name, keys)}; next: cvlaunch targets setup {name}")


def login(selected: Selected, out: Out) -> None:
    host = _place(selected).host
    host.login()
    out.note(
        f"the connection to {host.name} is open" if host.ssh else f"{selected.name} is on this machine: no login needed"
    )


# ---- targets


@dataclasses.dataclass(frozen=True)
class _Place:
    """setup: lines of bash that jobs there start with."""

    name: str
    host: Host
    target: SlurmTarget
    setup: tuple[str, ...]

    @property
    def python(self) -> str | None:
        """None: an environment is made for it."""
        target = self.target
        return target.interpreter if target.python is not None or target.ssh is None else None


def _place(selected: Selected) -> _Place:
    """What these commands need of a target. UnsupportedError for other backends than slurm."""
    from launcher.backends.slurm import SlurmTarget
    from launcher.remote import Host

    target = selected.target
    if not isinstance(target, SlurmTarget):
        raise UnsupportedError(_NOTHING.format(selected.backend.name), key=selected.name)
    modules = (f"module load {shlex.quote(module)}" for module in target.modules)
    return _Place(selected.name, Host(target.ssh, selected.name), target, (*modules, *target.setup))


def _bring(place: _Place, image: str, out: Out) -> str:
    """Where the image is there; what `submit` would take for the same words in a job file."""
    from launcher.image import Wanted, pin
    from launcher.slurm.setup import bring_image

    target = place.target
    if target.way is None:
        raise SpecError("the target has no container_command, so that its jobs use no image", key="--image")
    wanted = Wanted(place.name, image=image, registry=target.registry, profile=target.storage.profile)
    found = pin(wanted, make=out.note)
    return bring_image(
        place.host,
        target.root,
        reference=found.reference,
        digest=found.digest,
        way=target.way.pull,
        say=out.note,
        setup=place.setup,
    )


def _show_set_up(done: SetUp, images: Mapping[str, str], out: Out) -> None:
    if out.as_json:
        out.document({**dataclasses.asdict(done), "images": images})
        return
    for line in done.done or ("all of it is there already",):
        out.note(line)
    if done.missing:
        out.warn(f"{done.python} lacks {', '.join(done.missing)}: jobs with `train` will not run in it")
    python = f"{done.python} ({done.version})" if done.python else "the image's"
    out.fields(
        {"root": done.root, "cvlaunch": done.library, "python": python, "contract": str(done.contract), **images}
    )


# ---- what a probe has seen


def _look_at_node(
    host: Host, cluster: Cluster, keys: Mapping[str, object], *, connect: str, out: Out
) -> ComputeNode | None:
    """A node that can't be had takes nothing from the rest."""
    from launcher.slurm.probe import probe_node

    account = str(keys["account"]) if "account" in keys else None
    out.note("waiting for a node, 5 minutes at most")
    try:
        return probe_node(host, cluster, account=account, root=str(keys["root"]), connect=connect)
    except CvlaunchError as error:
        out.warn(str(error))
        return None


def _cluster_json(cluster: Cluster, node: ComputeNode | None) -> dict[str, Any]:
    return {"cluster": dataclasses.asdict(cluster), "compute_node": dataclasses.asdict(node) if node else None}


def _show(cluster: Cluster, node: ComputeNode | None, out: Out) -> None:
    out.fields(dict(_facts(cluster)))
    if node:
        out.data("")
        out.fields(dict(_node_facts(node)))
    out.data("")
    out.table(_PARTITION_COLUMNS, [row for partition in cluster.partitions for row in _partition_rows(partition)])
    if cluster.accounts:
        out.data("")
        rows = [(a.name, a.partition or "any", ", ".join(a.qos), "; ".join(a.limits)) for a in cluster.accounts]
        out.table([Column("ACCOUNT"), Column("PARTITION"), Column("QOS"), Column("LIMITS", whole=False)], rows)
    limited = [(q.name, str(q.priority), "; ".join(q.limits)) for q in cluster.qos if q.limits]
    if limited:
        out.data("")
        out.table([Column("QOS"), Column("PRIORITY", right=True), Column("LIMITS", whole=False)], limited)


_PARTITION_COLUMNS = [
    Column("PARTITION"),
    Column("TIME"),
    Column("NODES", right=True),
    Column("READY", right=True),
    Column("GPUS A NODE"),
    Column("CPUS", right=True),
    Column("MEMORY", right=True),
    Column("FEATURES", whole=False),
    Column("PREEMPTED"),
]


def _partition_rows(partition: Partition) -> Iterator[tuple[str, ...]]:
    """One for each kind of node."""
    kinds: dict[tuple[str, ...], list[Nodes]] = {}
    for nodes in partition.nodes:
        gpus = ", ".join(f"{number} {kind or 'gpu'}" for kind, number in nodes.gpus.items())
        kinds.setdefault((gpus, str(nodes.cpus), _memory(nodes), ", ".join(nodes.features)), []).append(nodes)
    name = f"{partition.name}{' *' if partition.default else ''}{'' if partition.up else ' (down)'}"
    limit = "none" if partition.time_limit == "UNLIMITED" else partition.time_limit
    preempted = "" if partition.preempt_mode == "OFF" else partition.preempt_mode.lower()
    for kind, found in (kinds or {("", "", "", ""): []}).items():
        count = sum(nodes.count for nodes in found)
        ready = sum(nodes.count for nodes in found if nodes.usable)
        yield name, limit, str(count), str(ready), *kind, preempted


def _memory(nodes: Nodes) -> str:
    from launcher.quantities import format_size

    return format_size(nodes.memory_mb << 20)


def _facts(cluster: Cluster) -> Iterator[tuple[str, str]]:
    from launcher.quantities import format_size

    limits = cluster.limits
    yield "cluster", cluster.name
    yield "SLURM", cluster.version
    yield "accounting", _accounting(cluster)
    yield "arrays", f"up to {limits.max_array_size} elements"
    yield "jobs", f"up to {limits.max_job_count} in the queue of all users"
    yield "script", f"up to {format_size(limits.max_script_bytes)}"
    yield "too long for its partition", "waits for ever" if limits.part_limits == "NO" else "is refused"
    yield (
        "preemption",
        "none" if limits.preempt_type == "none" else f"{limits.preempt_mode.lower()}, {limits.preempt_type}",
    )
    yield "containers", ", ".join(cluster.tools) or "no tool found on the login node; `module avail` may know one"
    yield "modules", cluster.modules or "none"
    yield "python", f"{cluster.python or 'none'} on the login node"


def _accounting(cluster: Cluster) -> str:
    if not cluster.accounting:
        return "off: no sacct"
    return "on, an account is required" if cluster.accounts_enforced else "on"


def _node_facts(node: ComputeNode) -> Iterator[tuple[str, str]]:
    from launcher.quantities import format_size

    yield "compute node", f"{node.name}, partition {node.partition}"
    yield "network", f"{'yes' if node.connects else 'no'}{', through a proxy (HTTPS_PROXY)' if node.proxy else ''}"
    yield "shared memory", format_size(node.shm)
    yield "root", "writable" if node.root_writable else "can't be written there: choose one that all nodes share"
    yield "temporary space", f"{format_size(node.tmp)} free"
    yield "system python", node.python or "none"
    yield "NVIDIA driver", node.driver or "none"


def _yaml(name: str, keys: Mapping[str, object], way: object) -> str:
    """For targets.yaml. way: jobs run in an environment until the user decides for images."""
    from launcher.cli.targetsfile import target_block

    note = f"    # container_command: {way}   # runs jobs in their image instead of an environment\n" if way else ""
    return f"# targets.yaml\ntargets:\n{target_block(name, keys)}{note}"
