"""`targets setup`, `targets probe`, `login`: making a cluster ready, looking at one, opening the way to it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.options import complete_targets, json_option, quiet_option
from launcher.cli.out import Column, Out
from launcher.errors import CvlaunchError, SpecError, UnsupportedError

if TYPE_CHECKING:
    from launcher.backends.slurm import SlurmTarget
    from launcher.remote import Host
    from launcher.slurm.probe import Cluster, ComputeNode, Nodes, Partition
    from launcher.slurm.setup import SetUp
    from launcher.targets import Selected

__all__ = ["login", "probe", "setup"]

_NOTHING = "the {} backend has nothing to set up, to look at or to log in to; targets of the backend slurm have"


@click.command()
@click.argument("name", shell_complete=complete_targets)
@click.option("--image", "images", metavar="IMAGE", multiple=True, help="Bring this image there, too. May be repeated.")
@click.option(
    "--requirements",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Lock file with hashes to make the environment from; else the trainer image's.",
)
@json_option
def setup(*, name: str, images: tuple[str, ...], requirements: Path | None, out: Out) -> None:
    """Make target NAME ready for jobs: cvlaunch itself, a Python environment, images.

    All of it stands below the target's `root`. May be repeated: it does what is missing. A target with `python`, or on
    this machine, gets no environment: its Python is checked. One with `container_command` needs none.
    """
    from launcher.slurm.setup import set_up

    place = _place(_select(name))
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


@click.command()
@click.argument("name", required=False, shell_complete=complete_targets)
@click.option("--ssh", metavar="HOST", help="A login node, as your ssh knows it, instead of a target that is there.")
@click.option("--root", metavar="FOLDER", help="Folder of the cluster for the new target: absolute, seen by all nodes.")
@click.option("--run-job", is_flag=True, help="Look at a compute node, too, in a job of a minute.")
@click.option(
    "--connect", metavar="HOST:PORT", default="pypi.org:443", show_default=True, help="What --run-job tries to reach."
)
@click.option("--write", is_flag=True, help="Add the target to targets.yaml.")
@json_option
def probe(
    *, name: str | None, ssh: str | None, root: str | None, run_job: bool, connect: str, write: bool, out: Out
) -> None:
    """Look at a cluster and write a target for it.

    The cluster of target NAME; or the one behind --ssh, or without both that of this machine, and then NAME is the new
    target's name.
    """
    from launcher.remote import Host
    from launcher.slurm.probe import as_target, probe

    known = _place(_select(name)) if name is not None and ssh is None and _is_there(name) else None
    host = known.host if known else Host(ssh, name)
    root = root or (known.target.root if known else None)
    cluster = probe(host)
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


@click.command()
@click.argument("name", shell_complete=complete_targets)
@quiet_option
def login(name: str, out: Out) -> None:
    """Open the connection to a cluster that asks for a password.

    Or for a code of a second factor, or whether its host key is right. All commands use the connection of target NAME
    then, until it has not been used for 12 hours.
    """
    host = _place(_select(name)).host
    host.login()
    out.note(f"the connection to {host.name} is open" if host.ssh else f"{name} is on this machine: no login needed")


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


def _select(name: str) -> Selected:
    from launcher.targets import load_targets

    return load_targets(Path.cwd()).select(target=name)


def _is_there(name: str) -> bool:
    """False is a new name for the cluster of this machine; where there is none, it is a wrong one."""
    from launcher.targets import load_targets

    return name in load_targets(Path.cwd()).names() or shutil.which("sbatch") is None


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
