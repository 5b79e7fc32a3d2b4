"""Looking at clusters: the real one of the suite, and the words of others behind programs with SLURM's names."""

from __future__ import annotations

import socket
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import CapacityError, SpecError, UnreachableError, UnsupportedError
from launcher.remote import Host
from launcher.slurm.probe import TOOLS, Cluster, as_target, best_partition, probe, probe_node
from launcher.slurm.setup import PULLS
from launcher.slurm.ways import WAYS
from tests.services.slurm import SlurmCluster
from tests.services.sshd import ALIAS, sshd

HERE = Host()

# -- the real one


@pytest.mark.needs("slurm")
def test_a_real_cluster(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    cluster = probe(HERE)
    assert (cluster.name, cluster.user, cluster.accounting, cluster.accounts_enforced) == ("cvtest", "root", True, True)
    assert cluster.version in slurm.run("sbatch", "--version")
    assert [(p.name, p.default, p.time_limit, p.preempt_mode) for p in cluster.partitions] == [
        ("main", True, "1-00:00:00", "OFF"),
        ("low", False, "1-00:00:00", "REQUEUE"),
        ("short", False, "00:05:00", "OFF"),
    ]
    nodes = cluster.partitions[0].nodes
    assert [(n.count, n.cpus, n.memory_mb, n.gpus, n.features) for n in nodes] == [
        (1, 8, 16000, {"a100": 2}, ("a100",)),
        (1, 8, 16000, {"l40s": 1}, ("l40s",)),
    ]
    limits = cluster.limits
    assert (limits.max_array_size, limits.max_job_count, limits.max_script_bytes) == (301, 5000, 4 << 20)
    assert (limits.part_limits, limits.preempt_type, limits.preempt_mode) == ("NO", "partition_prio", "REQUEUE")
    assert {account.name: account.qos for account in cluster.accounts}["vision"] == ("limited", "normal")
    assert {qos.name: qos.limits for qos in cluster.qos}["limited"] == ("at most 1 gpu for a user's jobs together",)
    assert cluster.folders[0] == str(tmp_path)
    target = as_target(cluster, ssh=None, root=None)
    assert target.pop("container_command", "charliecloud") == "charliecloud"
    assert target == {
        "backend": "slurm",
        "root": f"{tmp_path}/cvlaunch",
        "partition": "main",
        "spot_partition": "low",
        "time": "24h",
        "gpu_types": {"L40S": "l40s", "A100": "a100"},
    }


@pytest.mark.needs("slurm")
def test_without_accounting(slurm_without_accounting: SlurmCluster) -> None:
    cluster = probe(HERE)
    assert (cluster.accounting, cluster.accounts, cluster.qos) == (False, (), ())
    assert [p.name for p in cluster.partitions] == ["main", "low", "short"]


@pytest.mark.needs("slurm")
def test_a_node_that_is_down_counts_for_nothing(slurm: SlurmCluster) -> None:
    slurm.drain("node1")
    deadline = time.monotonic() + 300  # after a restart of the controller, sinfo may be late
    while sorted(slurm.run("sinfo", "-h", "-p", "main", "-o", "%T").split()) != ["drained", "idle"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    main = probe(HERE).partitions[0]
    assert main.gpus == {"l40s": 1}
    assert {nodes.state: nodes.usable for nodes in main.nodes} == {"drained": False, "idle": True}


@pytest.fixture
def listener() -> Iterator[str]:
    """HOST:PORT of something that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.needs("slurm")
def test_a_compute_node_by_a_job(slurm: SlurmCluster, tmp_path: Path, listener: str) -> None:
    cluster = probe(HERE)
    node = probe_node(HERE, cluster, account="vision", root=f"{tmp_path}/not made yet", connect=listener)
    assert (node.name, node.partition, node.connects, node.root_writable) == ("node1", "main", True, True)
    assert node.shm == 2 << 30
    assert node.tmp > 1 << 20
    other = probe_node(HERE, cluster, partition="short", root="/proc", connect="127.0.0.1:9")
    assert (other.partition, other.connects, other.root_writable) == ("short", False, False)


@pytest.mark.needs("slurm")
def test_no_compute_node_is_free(slurm: SlurmCluster) -> None:
    cluster = probe(HERE)
    slurm.wait_for_state(slurm.submit("sleep 60", "--nodes=2", "--exclusive"), "RUNNING")
    with pytest.raises(CapacityError, match="no node of partition main on this machine was free within 2 s"):
        probe_node(HERE, cluster, root="/tmp", wait_s=2)
    slurm.run("scancel", "--user=root")
    slurm.wait_idle()
    assert not slurm.run("squeue", "-h", "-n", "cvlaunch-probe")


@pytest.mark.needs("slurm")
def test_a_test_job_that_is_not_taken(slurm: SlurmCluster) -> None:
    cluster = probe(HERE)
    with pytest.raises(SpecError, match=r"the test job in partition main on this machine failed: .*Invalid account"):
        probe_node(HERE, cluster, account="nobodys", root="/tmp")
    with pytest.raises(SpecError, match=r"'pypi.org' is no place to connect to; one looks like pypi.org:443"):
        probe_node(HERE, cluster, root="/tmp", connect="pypi.org")


@pytest.mark.needs("slurm")
def test_a_controller_that_is_away(slurm: SlurmCluster) -> None:
    slurm.stop_controller()
    with pytest.raises(UnreachableError, match=r"SLURM's controller does not answer on this machine: .*; try again"):
        probe(HERE)


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("bash", "id", "timeout", "cat", "head"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="sbatch is not on the PATH of a login shell of this machine"):
        probe(HERE)


@pytest.mark.needs("slurm", "sshd")
def test_behind_ssh(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path / "sshd", variables=slurm.environment) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("SLURM_CONF")
        host = Host(ALIAS)
        cluster = probe(host)
        assert cluster.name == "cvtest"
        assert as_target(cluster, ssh=host.ssh, root="/scratch/me")["ssh"] == ALIAS
        assert probe_node(host, cluster, root="/tmp").name == "node1"


# -- the words of others

SITE = {
    "sbatch": "slurm 24.05.3",
    "scontrol config": """\
        ClusterName             = Big Site
        MaxArraySize            = 10001
        MaxJobCount             = 200000
        SchedulerParameters     = bf_window=7200,max_script_size=8388608,batch_sched_delay=3
        AccountingStorageType   = accounting_storage/slurmdbd
        AccountingStorageEnforce = associations,limits
        EnforcePartLimits       = ALL
        PreemptType             = preempt/qos
        PreemptMode             = CANCEL
        JobRequeue              = 0
    """,
    "scontrol partitions": """\
        PartitionName=cpu AllowAccounts=ALL Default=YES MaxTime=2-00:00:00 State=UP PreemptMode=OFF
        PartitionName=gpu AllowAccounts=vision,lab7 Default=NO MaxTime=UNLIMITED State=UP PreemptMode=OFF
        PartitionName=gpu-debug AllowAccounts=ALL Default=NO MaxTime=00:30:00 State=UP PreemptMode=OFF
        PartitionName=gpu-big AllowAccounts=board Default=NO MaxTime=UNLIMITED State=UP PreemptMode=OFF
        PartitionName=gpu-old AllowAccounts=ALL Default=NO MaxTime=UNLIMITED State=DOWN PreemptMode=OFF
    """,
    "sinfo": """\
        cpu*|allocated|900|128|515000|(null)|milan
        gpu|mixed-|12|64|1031000|gpu:nvidia_a100_80gb_pcie:4(S:0-1,3),nvme:1|a100,ib
        gpu|down*|3|64|1031000|gpu:nvidia_a100_80gb_pcie:4(S:0-1)|a100,ib
        gpu|idle~|2|96|2000000|gpu:h100:8(S:0,1)|h100,ib
        gpu|idle|1|64|1031000|gpu:nvidia_a100-sxm4-40gb:8|a100
        gpu|idle|1|64|1031000|gpu:a100_1g.5gb:7|mig
        gpu-debug|idle|40|64|1031000|gpu:4|t4
        gpu-big|idle|99|64|1031000|gpu:h200:8|h200
        gpu-old|idle|99|64|1031000|gpu:v100:8|v100
    """,
    "sacctmgr assoc": "lab7||gpu,normal|gpu|cpu=512,gres/gpu=16||gres/gpu=4||3-00:00:00|8|100",
    "sacctmgr qos": "gpu|100|scavenger|||gres/gpu=4,cpu=64|2-00:00:00||\nnormal|0|||||||",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Programs that say what another cluster's say."""
    words = {name: textwrap.dedent(text) for name, text in SITE.items()}
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in words.items():
        (folder / f"{name}.txt").write_text(text)
    scripts = {
        "sbatch": 'cat "$0.txt"',
        "sinfo": 'cat "$0.txt"',
        "scontrol": 'case $* in *partition) cat "$0 partitions.txt";; *) cat "$0 config.txt";; esac',
        "sacctmgr": 'case $* in *assoc*) cat "$0 assoc.txt";; *) cat "$0 qos.txt";; esac',
        "srun": 'echo "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("LMOD_VERSION", "8.7.37")
    return probe(HERE)


def test_the_words_of_a_large_site(site: Cluster) -> None:
    assert (site.name, site.version, site.modules) == ("Big Site", "24.05.3", "Lmod 8.7.37")
    limits = site.limits
    assert (limits.max_array_size, limits.max_script_bytes, limits.part_limits) == (10001, 8 << 20, "ALL")
    assert (limits.preempt_type, limits.preempt_mode, limits.requeue) == ("qos", "CANCEL", False)
    cpu, gpu, debug, *_ = site.partitions
    assert (cpu.default, cpu.gpus, gpu.accounts, gpu.time_limit) == (True, {}, ("vision", "lab7"), "UNLIMITED")
    assert gpu.gpus == {"nvidia_a100_80gb_pcie": 48, "h100": 16, "nvidia_a100-sxm4-40gb": 8, "a100_1g.5gb": 7}
    assert debug.gpus == {"": 160}
    (account,) = site.accounts
    assert (account.name, account.qos, account.default_qos) == ("lab7", ("gpu", "normal"), "gpu")
    assert account.limits == (
        "at most 512 cpu, 16 gpu for all jobs of the account together",
        "at most 4 gpu a job",
        "at most 3-00:00:00 a job",
        "at most 8 running jobs",
        "at most 100 jobs in the queue",
    )
    assert [(qos.name, qos.priority, qos.preempts) for qos in site.qos] == [
        ("gpu", 100, ("scavenger",)),
        ("normal", 0, ()),
    ]
    assert "pyxis" in site.tools


def test_a_target_takes_the_best_partition_that_is_ours(site: Cluster) -> None:
    """Not the default without GPUs, not the one for tests, not another account's, not one that is down."""
    best = best_partition(site)
    assert best is not None
    assert best.name == "gpu"
    assert as_target(site, ssh="login1", root="/scratch/me/cvlaunch") == {
        "backend": "slurm",
        "ssh": "login1",
        "root": "/scratch/me/cvlaunch",
        "partition": "gpu",
        "account": "lab7",
        "gpu_types": {"A100": "nvidia_a100_80gb_pcie", "H100": "h100"},
        "container_command": "pyxis",
    }


def test_gpus_without_types_are_told_apart_by_features(site: Cluster) -> None:
    (debug,) = (partition for partition in site.partitions if partition.name == "gpu-debug")
    target = as_target(replace(site, partitions=(debug,)), ssh=None, root="/x")
    assert (target["gpu_features"], target.get("gpu_types"), target.get("time")) == ({"T4": "t4"}, None, None)


def test_every_way_that_a_probe_proposes_is_one() -> None:
    assert set(TOOLS.values()) <= set(WAYS)
    assert {way.pull for way in WAYS.values()} <= set(PULLS)
    assert all(way.ending == PULLS[way.pull].ending for way in WAYS.values())
