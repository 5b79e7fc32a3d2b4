"""Looking at a cluster: what a login node says in one visit, and what a compute node says in a job of a minute.

SLURM's text formats, because its JSON has changed with most versions. See sinfo(1), scontrol(1), sacctmgr(1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.errors import CapacityError, SpecError, UnreachableError, UnsupportedError
from launcher.remote import Host
from launcher.slurm.scripts import script_text

__all__ = [
    "TOOLS",
    "Account",
    "Cluster",
    "ComputeNode",
    "Limits",
    "Nodes",
    "Partition",
    "Qos",
    "as_target",
    "best_partition",
    "probe",
    "probe_node",
]

TOOLS: Mapping[str, str] = {
    "pyxis": "pyxis",
    "apptainer": "apptainer",
    "singularity": "singularity",
    "ch-run": "charliecloud",
}
"""Container tool → way of a target (launcher.slurm.ways); the better first."""

_GPU_MODELS = (
    "GB300", "GB200", "B300", "B200", "GH200", "H200", "H100", "H20", "A100", "A40", "A30", "A16", "A10", "A2",
    "L40S", "L40", "L4", "V100S", "V100", "T4", "P100", "P40", "P4", "K80",
    "MI355X", "MI325X", "MI300X", "MI300A", "MI250X", "MI250", "MI210", "MI100",
)  # fmt: skip
"""As job files name them; gres types are the site's words, such as `nvidia_a100_80gb_pcie`."""
_SLICE = re.compile(r"\dg\.\d+gb")
"""Of a GPU (MIG): no whole model."""

_GONE = ("down", "drain", "fail", "maint", "power", "reboot", "unknown", "error", "future", "inval")
"""Beginnings of the states of nodes that take no jobs now."""
_ASIDE = re.compile(r"debug|test|devel|interact|preempt|scaveng|short")
"""Partitions that are not meant for long trainings."""

_ACCOUNT_LIMITS: Mapping[str, str] = {
    "GrpTRES": "{} for all jobs of the account together",
    "GrpJobs": "{} running jobs of the account",
    "MaxTRES": "{} a job",
    "MaxTRESPerNode": "{} a node",
    "MaxWall": "{} a job",
    "MaxJobs": "{} running jobs",
    "MaxSubmit": "{} jobs in the queue",
}
_QOS_LIMITS: Mapping[str, str] = {
    "GrpTRES": "{} for all jobs together",
    "MaxTRES": "{} a job",
    "MaxTRESPU": "{} for a user's jobs together",
    "MaxWall": "{} a job",
    "MaxJobsPU": "{} running jobs of a user",
    "MaxSubmitPU": "{} jobs of a user in the queue",
}
"""Field of sacctmgr → its meaning, in the order of the output."""

_ACCOUNT_FIELDS = ("Account", "Partition", "QOS", "DefaultQOS", *_ACCOUNT_LIMITS)
_QOS_FIELDS = ("Name", "Priority", "Preempt", *_QOS_LIMITS)
_NODE_FIELDS = "%P|%T|%D|%c|%m|%G|%f"


@dataclass(frozen=True)
class Nodes:
    """Of one kind and state in a partition. cpus, memory_mb, gpus: of each; gpus by gres type, `` where it has none."""

    state: str
    count: int
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]
    features: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return not self.state.startswith(_GONE)


@dataclass(frozen=True)
class Partition:
    """time_limit, default_time: as SLURM writes them (`1-00:00:00`, `UNLIMITED`). accounts, qos: empty allows all."""

    name: str
    default: bool
    up: bool
    time_limit: str
    default_time: str
    preempt_mode: str
    priority: int
    accounts: tuple[str, ...]
    qos: tuple[str, ...]
    nodes: tuple[Nodes, ...]

    @property
    def gpus(self) -> Mapping[str, int]:
        """Gres type → how many of all nodes that take jobs."""
        found: Counter[str] = Counter()
        for nodes in self.nodes:
            for kind, number in nodes.gpus.items():
                found[kind] += number * nodes.count * nodes.usable
        return {kind: number for kind, number in found.items() if number}


@dataclass(frozen=True)
class Account:
    """What this user may charge. partition: the only one that it is good for; empty: any."""

    name: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str
    limits: tuple[str, ...]


@dataclass(frozen=True)
class Qos:
    name: str
    priority: int
    preempts: tuple[str, ...]
    limits: tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """max_array_size: one more than the highest index. part_limits: EnforcePartLimits; with `NO` a job that is too long
    for its partition is taken, and waits for ever."""

    max_array_size: int
    max_job_count: int
    max_script_bytes: int
    part_limits: str
    preempt_type: str
    preempt_mode: str
    requeue: bool
    kill_wait: str
    min_job_age: str


@dataclass(frozen=True)
class ComputeNode:
    """What a job saw. shm, tmp: bytes, all of the first, free of the second. connects: to the host that was asked for.

    driver: NVIDIA's, empty without.
    """

    name: str
    partition: str
    shm: int
    tmp: int
    python: str
    driver: str
    connects: bool
    proxy: bool
    root_writable: bool


@dataclass(frozen=True)
class Cluster:
    """accounting: whether sacct and accounts are there. tools: container tool → path on the login node.

    folders: that this user may write, on the login node; those for data first. python: of the login node.
    """

    name: str
    version: str
    user: str
    partitions: tuple[Partition, ...]
    limits: Limits
    accounting: bool
    accounts_enforced: bool
    accounts: tuple[Account, ...] = ()
    qos: tuple[Qos, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)
    modules: str = ""
    folders: tuple[str, ...] = ()
    python: str = ""


def probe(host: Host, *, timeout_s: float = 300) -> Cluster:
    """In one visit. UnsupportedError if there is no SLURM, UnreachableError if it doesn't answer."""
    done = host.run(
        script_text("probe"), _NODE_FIELDS, ",".join(_ACCOUNT_FIELDS), ",".join(_QOS_FIELDS), timeout_s=timeout_s
    )
    sections = dict(_sections(done.out.decode(errors="replace")))
    if "version" not in sections:
        raise UnsupportedError(
            f"sbatch is not on the PATH of a login shell of {host.name}: name a login node of a cluster"
        )
    for name in ("config", "partitions", "nodes"):
        if not sections[name].good:
            said = " / ".join(sections[name].lines[-2:])
            raise UnreachableError(f"SLURM's controller does not answer on {host.name}: {said}; try again")
    config = _config(sections["config"].lines)
    accounting = config.get("AccountingStorageType", "").endswith(("slurmdbd", "mysql")) and sections["accounts"].good
    facts = sections["facts"].lines
    tools = [line.split(" ", 2) for line in facts if line.startswith("tool ")]
    return Cluster(
        name=config.get("ClusterName", ""),
        version=sections["version"].lines[0].split()[-1],
        user=_fact(facts, "user"),
        partitions=tuple(_partitions(sections["partitions"].lines, sections["nodes"].lines)),
        limits=_limits(config),
        accounting=accounting,
        accounts_enforced="associations" in config.get("AccountingStorageEnforce", ""),
        accounts=tuple(_accounts(sections["accounts"].lines)) if accounting else (),
        qos=tuple(_qos(sections["qos"].lines)) if accounting and sections["qos"].good else (),
        tools={words[1]: words[2] if len(words) > 2 else "" for words in tools},
        modules=_fact(facts, "modules"),
        folders=tuple(line.partition(" ")[2] for line in facts if line.startswith("folder ")),
        python=_fact(facts, "python"),
    )


def probe_node(
    host: Host,
    cluster: Cluster,
    *,
    partition: str | None = None,
    account: str | None = None,
    root: str,
    connect: str = "pypi.org:443",
    wait_s: int = 300,
) -> ComputeNode:
    """What a job of at most two minutes sees on a compute node, with a GPU where the partition has any.

    root: the target's, or, before it is made, the folder that it will be in. connect: HOST:PORT that it tries to reach.
    CapacityError if nothing is free within `wait_s`.
    """
    name, _, port = connect.rpartition(":")
    if not name or not port.isdecimal():
        raise SpecError(f"{connect!r} is no place to connect to; one looks like pypi.org:443")
    chosen = next((p for p in cluster.partitions if p.name == partition), None) or best_partition(cluster)
    if chosen is None:
        raise CapacityError(f"no partition of {host.name} takes jobs now: try again later")
    words = ["--job-name=cvlaunch-probe", f"--immediate={wait_s}", "--time=2", "--nodes=1", "--ntasks=1", "--quiet"]
    words += [f"--partition={chosen.name}", *([f"--account={account}"] if account else [])]
    words += ["--gres=gpu:1"] if chosen.gpus else []
    done = host.run(
        script_text("probe_srun"), script_text("probe_node"), name, port, root, *words, timeout_s=wait_s + 180
    )
    lines = done.out.decode(errors="replace").splitlines()
    if done.code or not _fact(lines, "node"):
        raise _no_node(done.err, host, chosen, wait_s)
    return ComputeNode(
        name=_fact(lines, "node"),
        partition=chosen.name,
        shm=int(_fact(lines, "shm") or 0),
        tmp=int(_fact(lines, "tmp") or 0),
        python=_fact(lines, "python"),
        driver=_fact(lines, "driver"),
        connects=_fact(lines, "network") == "yes",
        proxy=_fact(lines, "proxy") == "yes",
        root_writable=_fact(lines, "root") == "yes",
    )


def _no_node(said: str, host: Host, partition: Partition, wait_s: int) -> CapacityError | SpecError:
    words = " / ".join(line.removeprefix("srun: error: ") for line in said.splitlines() if line.strip())
    if re.search(r"busy|immediate|timed out|Requested node configuration is not available", said, re.IGNORECASE):
        return CapacityError(
            f"no node of partition {partition.name} on {host.name} was free within {wait_s} s ({words})"
        )
    return SpecError(f"the test job in partition {partition.name} on {host.name} failed: {words or 'it said nothing'}")


def best_partition(cluster: Cluster) -> Partition | None:
    """For trainings: it has GPUs, is meant for long jobs, is the site's default, has most GPUs; in this order."""

    def rank(partition: Partition) -> tuple[bool, bool, bool, int]:
        gpus = sum(partition.gpus.values())
        return bool(gpus), not _ASIDE.search(partition.name.lower()), partition.default, gpus

    taking = [p for p in cluster.partitions if p.up and any(nodes.usable for nodes in p.nodes) and _open(p, cluster)]
    return max(taking, key=rank, default=None)


def _open(partition: Partition, cluster: Cluster) -> bool:
    """Whether one of the user's accounts may go there."""
    return not partition.accounts or bool({a.name for a in cluster.accounts} & set(partition.accounts))


def as_target(cluster: Cluster, *, ssh: str | None, root: str | None) -> dict[str, object]:
    """Keys of a target for it. root: None takes the first folder that the user may write."""
    partition = best_partition(cluster)
    keys = {
        "backend": "slurm",
        "ssh": ssh,
        "root": root or f"{cluster.folders[0] if cluster.folders else ''}/cvlaunch",
        **(_of_partition(partition, cluster) if partition else {}),
        "container_command": next((TOOLS[name] for name in TOOLS if name in cluster.tools), None),
    }
    return {key: value for key, value in keys.items() if value}


def _of_partition(partition: Partition, cluster: Cluster) -> dict[str, object]:
    accounts = {account.name for account in cluster.accounts if account.partition in ("", partition.name)}
    if partition.accounts:
        accounts &= set(partition.accounts)
    return {
        "partition": partition.name,
        "spot_partition": _preempted(cluster, partition),
        "account": accounts.pop() if len(accounts) == 1 else None,
        "time": _longest(partition.time_limit),
        "gpu_types": _gpu_types(partition),
        "gpu_features": _gpu_features(partition),
    }


def _preempted(cluster: Cluster, best: Partition) -> str | None:
    """The partition whose jobs make room for those of others, and start again."""
    if cluster.limits.preempt_type != "partition_prio":
        return None
    lower = [p for p in cluster.partitions if p.preempt_mode == "REQUEUE" and p.priority < best.priority and p.up]
    return next((p.name for p in lower if sum(p.gpus.values()) and _open(p, cluster)), None)


def _longest(limit: str) -> str | None:
    """`1-12:00:00` → `36h`; None for one that is none, or too short for a training."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", limit)
    if not found:
        return None
    days, hours, minutes = (int(number or 0) for number in found.groups())
    return f"{24 * days + hours}h{f'{minutes}m' if minutes else ''}" if days or hours else None


def _gpu_types(partition: Partition) -> dict[str, str]:
    """Our name of a model → the site's; of several, the one that there is most of."""
    kinds = sorted(partition.gpus, key=lambda kind: partition.gpus[kind])
    return {model: kind for kind in kinds if (model := _model(kind))}


def _gpu_features(partition: Partition) -> dict[str, str]:
    """Our name of a model → the feature of its nodes, where the site gives its GPUs no types."""
    features = (name for nodes in partition.nodes if "" in nodes.gpus for name in nodes.features)
    return {model: name for name in features if (model := _model(name))}


def _model(kind: str) -> str | None:
    words = set(re.split(r"[^A-Z0-9]+", kind.upper()))
    return None if _SLICE.search(kind) else next((model for model in _GPU_MODELS if model in words), None)


# ---- reading


@dataclass(frozen=True)
class _Section:
    lines: tuple[str, ...]
    good: bool


def _sections(text: str) -> Iterator[tuple[str, _Section]]:
    for name, body, code in re.findall(r"^@@ (\w+)\n(.*?)^@@ = (\d+)$", text, re.MULTILINE | re.DOTALL):
        yield name, _Section(tuple(line for line in body.splitlines() if line.strip()), code == "0")


def _fact(lines: Sequence[str], name: str) -> str:
    return next((line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")), "")


def _config(lines: Sequence[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _limits(config: Mapping[str, str]) -> Limits:
    script = re.search(r"max_script_size=(\d+)", config.get("SchedulerParameters", ""))
    return Limits(
        max_array_size=_number(config.get("MaxArraySize", ""), 1001),
        max_job_count=_number(config.get("MaxJobCount", ""), 10_000),
        max_script_bytes=int(script[1]) if script else 4 << 20,  # slurm.conf(5)
        part_limits=config.get("EnforcePartLimits", "NO"),
        preempt_type=config.get("PreemptType", "preempt/none").removeprefix("preempt/"),
        preempt_mode=config.get("PreemptMode", "OFF"),
        requeue=config.get("JobRequeue", "1") == "1",
        kill_wait=config.get("KillWait", ""),
        min_job_age=config.get("MinJobAge", ""),
    )


def _partitions(lines: Sequence[str], nodes: Sequence[str]) -> Iterator[Partition]:
    rows = [line.split("|") for line in nodes]
    for line in lines:
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = values["PartitionName"]
        yield Partition(
            name=name,
            default=values.get("Default") == "YES",
            up=values.get("State") == "UP",
            time_limit=values.get("MaxTime", "UNLIMITED"),
            default_time=values.get("DefaultTime", "NONE"),
            preempt_mode=values.get("PreemptMode", "OFF"),
            priority=_number(values.get("PriorityTier", ""), 1),
            accounts=_names(values.get("AllowAccounts", "ALL")),
            qos=_names(values.get("AllowQos", "ALL")),
            nodes=tuple(_nodes(row) for row in rows if len(row) == 7 and row[0].rstrip("*") == name),
        )


def _nodes(row: Sequence[str]) -> Nodes:
    _, state, count, cpus, memory, gres, features = row
    return Nodes(
        state=state.rstrip("*~#!%$@+^-"),
        count=_number(count, 0),
        cpus=_number(cpus, 0),
        memory_mb=_number(memory, 0),
        gpus=_gpus(gres),
        features=_names(features),
    )


def _gpus(gres: str) -> dict[str, int]:
    """`gpu:a100:4(S:0-1),gpu:2,nvme:1` → {a100: 4, ``: 2}."""
    found: Counter[str] = Counter()
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.split(":")
        if name == "gpu":
            *kind, number = rest if rest and rest[-1].isdecimal() else (*rest, "1")
            found[":".join(kind)] += int(number)
    return dict(found)


def _accounts(lines: Sequence[str]) -> Iterator[Account]:
    for row in _rows(lines, _ACCOUNT_FIELDS):
        limits = tuple(_words(row, _ACCOUNT_LIMITS))
        yield Account(row["Account"], row["Partition"], _names(row["QOS"]), row["DefaultQOS"], limits)


def _qos(lines: Sequence[str]) -> Iterator[Qos]:
    for row in _rows(lines, _QOS_FIELDS):
        limits = tuple(_words(row, _QOS_LIMITS))
        yield Qos(row["Name"], _number(row["Priority"], 0), _names(row["Preempt"]), limits)


def _rows(lines: Sequence[str], fields: Sequence[str]) -> Iterator[dict[str, str]]:
    for line in lines:
        cells = line.split("|")
        if len(cells) == len(fields):
            yield dict(zip(fields, cells, strict=True))


def _words(row: Mapping[str, str], limits: Mapping[str, str]) -> Iterator[str]:
    """`gres/gpu=4,cpu=64` → `4 gpu, 64 cpu for a user's jobs together`."""
    for name, sentence in limits.items():
        if row[name]:
            pairs = (part.partition("=") for part in row[name].split(","))
            amounts = ", ".join(f"{value} {kind.removeprefix('gres/')}" if value else kind for kind, _, value in pairs)
            yield f"at most {sentence.format(amounts)}"


def _names(text: str) -> tuple[str, ...]:
    return () if text in ("", "ALL", "(null)", "N/A") else tuple(text.split(","))


def _number(text: str, otherwise: int) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else otherwise
