"""Starting, ending and disturbing the cluster."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.services.slurm.daemon import Daemon, start_daemon
from tests.services.slurm.settings import ACCOUNT, NODES, QOS, Ports, free_ports, write_settings

__all__ = ["NODES", "SlurmCluster", "slurm_cluster", "slurm_works"]

_PROGRAMS = ("unshare", "munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd", "mariadb-install-db")
# the first is for slurmd's files: its sockets' paths may have 107 characters at most, and pytest's folders use them up
_NODE_MOUNTS = ("mount -t tmpfs tmpfs /var/spool", "mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@functools.cache
def slurm_works() -> bool:
    if os.geteuid() != 0 or not all(shutil.which(name, path=_PATH) for name in _PROGRAMS):
        return False
    namespaces = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "true"]
    return subprocess.run(namespaces, capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class SlurmCluster:
    """Nodes `node1` (2 a100) and `node2` (1 l40s), 8 CPUs and 16,000 MB each; partitions `main` (the default),
    `low` (jobs in main preempt its jobs) and `short` (at most 5 minutes). With accounting, user root has the account
    `vision` and the QOS `limited` (1 GPU a user).

    Each node has a host name, processes, /dev/shm and mounts of its own, and the rest in common with this machine.
    """

    folder: Path
    ports: Ports
    accounting: bool
    daemons: dict[str, Daemon]

    @property
    def environment(self) -> dict[str, str]:
        """What the commands' environment needs."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path, stdin: str = "", check: bool = True) -> str:
        """What it prints on stdout, without the line end. AssertionError with what it said if it fails."""
        environ = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environ, input=stdin, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
        return done.stdout.rstrip("\n")

    def submit(self, script: str, *options: str) -> int:
        """Job id of a bash script given without its first line. What it prints is nobody's."""
        text = f"#!/bin/bash\n{script}\n"
        return int(self.run("sbatch", "--parsable", "--output=/dev/null", *options, stdin=text))

    def state(self, job: int | str) -> str:
        """SLURM's word, of the first element of an array; empty if it does not know the job (any more)."""
        return self.run("squeue", "-h", "-t", "all", "-j", str(job), "-o", "%T", check=False).partition("\n")[0]

    def wait_for_state(self, job: int | str, *states: str, seconds: float = 180) -> str:
        found = _eventually(lambda: self.state(job) in states, seconds)
        assert found, f"job {job} is {self.state(job)!r}, not {' or '.join(states)}, after {seconds:g} s"
        return self.state(job)

    def stop_controller(self) -> None:
        """In order, its state saved. Jobs run on."""
        self.run("scontrol", "shutdown", "slurmctld")
        self.daemons["slurmctld"].wait_for_end()

    def kill_controller(self) -> None:
        self.daemons["slurmctld"].kill()

    def start_controller(self) -> None:
        """Returns when it answers; does nothing if it runs."""
        if not self._runs("slurmctld"):
            daemon = self._start("slurmctld", ["slurmctld", "-D"])
            daemon.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "answering")

    def kill_node(self, node: str) -> None:
        """Cuts the power: nothing on it runs on. The controller notices within half a minute; `put_down` tells it."""
        self.daemons[node].kill()

    def start_node(self, node: str) -> None:
        """Returns when the controller counts on it; does nothing if it runs."""
        if not self._runs(node):
            hosts = f"mount --bind '{self.folder}/hosts' /etc/hosts"
            prepare = "\n".join([f"hostname {node}", hosts, *_NODE_MOUNTS])
            self._start(node, ["slurmd", "-D", "-N", node], prepare)
        self.daemons[node].wait_until(lambda: self._counted_on(node), "up")

    def node_state(self, node: str) -> str:
        """Such as `idle`, `idle+drain`, `down*`. Not by sinfo, which after a restart of the controller may show for
        minutes what no longer holds."""
        found = re.search(r" State=(\S+)", self.run("scontrol", "--oneliner", "show", "node", node, check=False))
        return found[1].lower() if found else ""

    def drain(self, node: str, reason: str = "a test") -> None:
        """Jobs on it run on, none starts there."""
        self.run("scontrol", "update", f"nodename={node}", "state=drain", f"reason={reason}")

    def put_down(self, node: str, reason: str = "a test") -> None:
        """At once, and so that its jobs fail with NODE_FAIL or are requeued."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", f"reason={reason}")

    def resume(self, node: str) -> None:
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def wait_idle(self, seconds: float = 180) -> None:
        """Until no job waits or runs, and all nodes are idle."""

        def idle() -> bool:
            states = {self.node_state(node) for node in NODES}
            return states == {"idle"} and not self.run("squeue", "-h", "-o", "%i %T", check=False)

        assert _eventually(idle, seconds), self.run("squeue") + "\n" + self.run("sinfo", "-N", "-l")

    def clear(self) -> None:
        """Ends all jobs, starts what was stopped: as new for the next test, but for the old jobs' records. Takes
        KillWait, 10 s, if a job ignores SIGTERM."""
        self.start_controller()
        self.run("scancel", "--user=root", check=False)
        for node in NODES:
            # refused where there is nothing to resume
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            self.start_node(node)
        self.wait_idle()

    def _counted_on(self, node: str) -> bool:
        known = re.fullmatch(r"(idle|mixed|allocated)(\+completing)?", self.node_state(node))
        return known is not None and _accepts(self.ports.nodes[list(NODES).index(node)])

    def _runs(self, name: str) -> bool:
        return name in self.daemons and self.daemons[name].running

    def _start(self, name: str, command: list[str], prepare: str = "") -> Daemon:
        environment = {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "MYSQL_UNIX_PORT": f"{self.folder}/mariadb.socket",
            **self.environment,
        }
        log = self.folder / "log" / f"{name}.log"
        if name in self.daemons:
            self.daemons[name].kill()
        daemon = start_daemon(name, command, log=log, environment=environment, prepare=prepare)
        self.daemons[name] = daemon
        return daemon


@contextlib.contextmanager
def slurm_cluster(folder: Path, *, accounting: bool, settings: Mapping[str, str] = {}) -> Iterator[SlurmCluster]:
    """All of it below `folder`, which is made; ended, whatever happens, with all jobs. settings: for slurm.conf,
    such as {"MinJobAge": "2"}."""
    ports = free_ports()
    write_settings(folder, ports, accounting=accounting, settings=settings)
    cluster = SlurmCluster(folder, ports, accounting, {})
    try:
        _start_munge(cluster)
        if accounting:
            _start_accounting(cluster)
        cluster.start_controller()
        if accounting:
            _add_associations(cluster)
        for node in NODES:
            cluster.start_node(node)
        yield cluster
    finally:
        for daemon in reversed(cluster.daemons.values()):
            daemon.kill()


def _start_munge(cluster: SlurmCluster) -> None:
    folder = cluster.folder
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    files = [f"--{option}={folder / name}" for option, name in names.items()]
    # --force: it warns of folders that others can't read or can write to, instead of giving up
    daemon = cluster._start("munged", ["munged", "--foreground", "--force", *files])
    daemon.wait_until(lambda: _accepts(folder / "munge.socket"), "listening")


def _start_accounting(cluster: SlurmCluster) -> None:
    folder = cluster.folder
    # in memory that only this daemon sees: ten times as fast, and gone with it
    install = (
        f"mariadb-install-db --defaults-file='{folder}/my.cnf' --skip-test-db --auth-root-authentication-method=normal"
    )
    prepare = f"mount -t tmpfs tmpfs '{folder}/database'\n{install} >/dev/null"
    database = cluster._start("mariadbd", ["mariadbd", f"--defaults-file={folder}/my.cnf"], prepare)
    database.wait_until(lambda: _accepts(folder / "mariadb.socket"), "listening")
    accounting = cluster._start("slurmdbd", ["slurmdbd", "-D"])
    accounting.wait_until(lambda: _accepts(cluster.ports.accounting), "listening")


def _add_associations(cluster: SlurmCluster) -> None:
    """Once the controller has told the database of itself and of its GPUs."""

    def known() -> bool:
        return "gpu" in cluster.run("sacctmgr", "--noheader", "show", "tres", "format=name", check=False)

    assert _eventually(known, 60), cluster.daemons["slurmctld"].last_words()
    for command in (
        f"add qos {QOS} set MaxTRESPerUser=gres/gpu=1",
        f"add account {ACCOUNT} Description=tests Organization=tests",
        f"add user root Account={ACCOUNT} QOS=normal,{QOS} DefaultQOS=normal",
        f"modify user root set DefaultAccount={ACCOUNT}",
    ):
        cluster.run("sacctmgr", "--immediate", *command.split())


def _accepts(address: Path | int) -> bool:
    unix = isinstance(address, Path)
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as probe:
        return probe.connect_ex(str(address) if unix else ("127.0.0.1", address)) == 0


def _eventually(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
