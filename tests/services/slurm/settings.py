"""The cluster's configuration files; see slurm.conf(5), gres.conf(5) and slurmdbd.conf(5)."""

from __future__ import annotations

import os
import random
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.services.ports import free_port

__all__ = ["ACCOUNT", "NODES", "QOS", "NodeKind", "Ports", "free_ports", "write_settings"]

ACCOUNT, QOS = "vision", "limited"


@dataclass(frozen=True)
class NodeKind:
    gpu: str
    gpus: int


NODES = {"node1": NodeKind("a100", 2), "node2": NodeKind("l40s", 1)}


@dataclass(frozen=True)
class Ports:
    controller: int
    accounting: int
    nodes: tuple[int, ...]


def free_ports() -> Ports:
    """A daemon that is down must find its port free."""
    first, second, *rest = (free_port() for _ in range(2 + len(NODES)))
    return Ports(first, second, tuple(rest))


def write_settings(folder: Path, ports: Ports, *, accounting: bool, settings: Mapping[str, str]) -> Path:
    """Path of the slurm.conf; the others lie beside it."""
    for name in ("state", "dev", "log"):
        (folder / name).mkdir(parents=True)
    merged = {**_settings(folder, ports), **(_accounting(folder, ports) if accounting else {}), **settings}
    lines = [*(f"{name}={value}" for name, value in merged.items()), *_nodes(ports), *_PARTITIONS]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "gres.conf").write_text("\n".join(_gpus(folder)) + "\n")
    (folder / "hosts").write_text("127.0.0.1 " + " ".join(["localhost", socket.gethostname(), *NODES]) + "\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    if accounting:
        _write_database_settings(folder, ports)
    return folder / "slurm.conf"


def _settings(folder: Path, ports: Ports) -> dict[str, str]:
    return {
        "ClusterName": "cvtest",
        "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
        "SlurmctldPort": f"{ports.controller}",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        # a job that was requeued starts again cred_expire + 1 s later; the default of 120 s is for slow prologs
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": "/var/spool/slurmd",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "GresTypes": "gpu",
        "DefMemPerCPU": "500",
        # the nodes have more CPUs and memory than this machine
        "SlurmdParameters": "config_overrides",
        "ReturnToService": "2",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2",
        "PriorityType": "priority/basic",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        # rank 0 of a job listens at 20000 + its id: away from the ports above, and from other clusters' jobs
        "FirstJobId": f"{random.randrange(10_000, 12_500)}",
        "MaxArraySize": "301",
        "MaxJobCount": "5000",
        "MinJobAge": "60",
        "KillWait": "10",
        "SlurmctldTimeout": "30",
        "SlurmdTimeout": "15",
        "MessageTimeout": "10",
        "InactiveLimit": "0",
    }


def _accounting(folder: Path, ports: Ports) -> dict[str, str]:
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": f"{ports.accounting}",
        "AccountingStoragePass": f"{folder}/munge.socket",
        "AccountingStorageTRES": "gres/gpu",
        "AccountingStorageEnforce": "associations,limits,qos",
    }


def _nodes(ports: Ports) -> list[str]:
    shape = "CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000"
    return [
        f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} {shape} "
        f"Gres=gpu:{kind.gpu}:{kind.gpus} Feature={kind.gpu}"
        for (name, kind), port in zip(NODES.items(), ports.nodes, strict=True)
    ]


_PARTITIONS = [
    "PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=1:00:00 PriorityTier=10 PreemptMode=OFF",
    "PartitionName=low Nodes=ALL MaxTime=1-00:00:00 DefaultTime=1:00:00 PriorityTier=1 PreemptMode=REQUEUE "
    "GraceTime=10",
    "PartitionName=short Nodes=ALL MaxTime=00:05:00 DefaultTime=00:05:00 PriorityTier=10 PreemptMode=OFF",
]


def _gpus(folder: Path) -> Iterator[str]:
    """SLURM wants to see a device for each: here, further names of /dev/null."""
    for name, kind in NODES.items():
        devices = folder / "dev" / name
        devices.mkdir()
        for number in range(kind.gpus):
            os.mknod(devices / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        yield f"NodeName={name} Name=gpu Type={kind.gpu} File={devices}/nvidia[0-{kind.gpus - 1}]"


def _write_database_settings(folder: Path, ports: Ports) -> None:
    (folder / "database").mkdir()
    # with a tmpdir of its own: the files there are named after process ids, the same ones in each PID namespace
    (folder / "my.cnf").write_text(
        f"[mysqld]\nuser=root\ndatadir={folder}/database\ntmpdir={folder}/database\nsocket={folder}/mariadb.socket\n"
        f"pid-file={folder}/mariadb.pid\nskip-networking\nskip-name-resolve\n"
        "innodb_log_file_size=8M\ninnodb_buffer_pool_size=32M\n"
    )
    path = folder / "slurmdbd.conf"
    path.touch(0o600)
    path.write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket\n"
        f"DbdHost={socket.gethostname()}\nDbdAddr=127.0.0.1\nDbdPort={ports.accounting}\nSlurmUser=root\n"
        f"PidFile={folder}/slurmdbd.pid\n"
        "StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=root\nStorageLoc=slurm\n"
    )
