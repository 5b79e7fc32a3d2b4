"""Ranks from the variables that each platform sets, and torchrun around the command."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import SpecError, UnreachableError
from launcher.paths import trainer_folder
from launcher.runner.command import build_command
from launcher.runner.ranks import Ranks, find_ranks, first_host, wait_for_master
from tests.runner_world import RunnerWorld, Running, python, until
from tests.services.ports import free_port

VERTEX = {
    "cluster": {
        "workerpool0": ["cmle-training-workerpool0-a1b2-0:2222"],
        "workerpool1": ["cmle-training-workerpool1-a1b2-0:2222", "cmle-training-workerpool1-a1b2-1:2222"],
    },
    "environment": "cloud",
    "task": {"type": "workerpool1", "index": 1, "trial": ""},
    "job": "{}",
}
SAGEMAKER = {
    "current_host": "algo-2",
    "current_instance_type": "ml.g5.xlarge",
    "current_group_name": "homogeneousCluster",
    "hosts": ["algo-1", "algo-2"],
    "network_interface_name": "eth0",
}
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu-[03,07-09]"}


@pytest.mark.parametrize(
    ("nodes", "environ", "ranks"),
    [
        (3, {"CLUSTER_SPEC": json.dumps(VERTEX)}, Ranks(2, 3, "cmle-training-workerpool0-a1b2-0", 2222, late=True)),
        (
            4,
            {"JOB_COMPLETION_INDEX": "3", "CVLAUNCH_MASTER": "shapes-1-0.shapes-1:29500", "CVLAUNCH_NODES": "4"},
            Ranks(3, 4, "shapes-1-0.shapes-1", 29500, late=True),
        ),
        (2, SLURM, Ranks(1, 2, "gpu-03", 24711)),
        (2, {**SLURM, "CVLAUNCH_MASTER": "gpu-03.cluster"}, Ranks(1, 2, "gpu-03.cluster", 24711)),
        (
            2,
            {
                "CVLAUNCH_NODE_RANK": "1",
                "CVLAUNCH_NODES": "2",
                "CVLAUNCH_MASTER": "10.0.0.1:4000",
                "CVLAUNCH_INTERFACE": "ib0",
            },
            Ranks(1, 2, "10.0.0.1", 4000, "ib0"),
        ),
        (1, SLURM, Ranks()),
        (1, {}, Ranks()),
    ],
)
def test_platforms(tmp_path: Path, nodes: int, environ: dict[str, str], ranks: Ranks) -> None:
    assert find_ranks(nodes, environ, tmp_path) == ranks


def test_sagemaker(tmp_path: Path) -> None:
    assert _sagemaker(tmp_path, SAGEMAKER) == Ranks(1, 2, "algo-1", 29500, "eth0", late=True)


def test_sagemaker_counts_as_the_names_of_its_hosts_do(tmp_path: Path) -> None:
    """Which it gives in lexicographic order: algo-1, algo-10, algo-11, algo-2, …"""
    hosts = sorted(f"algo-{number}" for number in range(1, 12))
    for host in hosts:
        ranks = _sagemaker(tmp_path, {**SAGEMAKER, "hosts": hosts, "current_host": host})
        assert f"algo-{ranks.node_rank + 1}" == host and ranks.master_addr == "algo-1"


def test_sagemaker_with_names_of_another_form(tmp_path: Path) -> None:
    hosts = ["worker-9", "algo-2", "algo-1"]
    ranks = _sagemaker(tmp_path, {**SAGEMAKER, "hosts": hosts, "current_host": "algo-1"})
    assert (ranks.node_rank, ranks.master_addr) == (2, "worker-9")


def _sagemaker(root: Path, config: Mapping[str, Any]) -> Ranks:
    (root / "input/config").mkdir(parents=True, exist_ok=True)
    (root / "input/config/resourceconfig.json").write_text(json.dumps(config))
    return find_ranks(len(config["hosts"]), {}, root)


@pytest.mark.parametrize(
    ("nodes", "environ", "message"),
    [
        (2, {}, "nothing says which of 2 nodes this is"),
        (4, SLURM, "wants 4 nodes; SLURM (SLURM_NODEID) says node 1 of 2"),
        (2, {"CLUSTER_SPEC": "{"}, "the ranks of Vertex (CLUSTER_SPEC) can't be read"),
        (2, {"JOB_COMPLETION_INDEX": "0"}, "CVLAUNCH_MASTER"),
        (2, {"CVLAUNCH_NODE_RANK": "2", "CVLAUNCH_MASTER": "a"}, "says node 2 of 2"),
    ],
)
def test_platform_that_makes_no_sense(tmp_path: Path, nodes: int, environ: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        find_ranks(nodes, environ, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu[01-04]", "gpu01"),
        ("gpu-[3,5-9],login1", "gpu-3"),
        ("a1,a2", "a1"),
        ("r[1-2]n[07,9]-ib,x", "r1n07-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


class Announcer:
    """Resolves a name at the call number `at`; each call takes ten seconds."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self.said = at, 0, list[str]()

    def __call__(self, name: str) -> None:
        self.calls += 1
        if self.calls < self.at:
            raise OSError(-2, f"{name} is not known")

    def clock(self) -> float:
        return 10.0 * self.calls

    def wait(self, ranks: Ranks, *, time_left: float = float("inf"), abort: bool = False) -> None:
        event = threading.Event()
        if abort:
            event.set()
        wait_for_master(
            ranks, event, self.said.append,
            time_left=lambda: time_left - self.clock(), every_s=0.0001, resolve=self, clock=self.clock,
        )  # fmt: skip


def test_names_that_resolve_late() -> None:
    """After an hour, of which the log tells each minute; a stop and the end of the job's time end it, too."""
    announcer = Announcer(360)
    announcer.wait(Ranks(1, 2, "algo-1", late=True))
    assert announcer.calls == 360 and len(announcer.said) == 60
    assert announcer.said[1].startswith("waiting for node 0, for 1m 00s so far; its name, algo-1, does not resolve: ")
    stopped, over = Announcer(360), Announcer(360)
    stopped.wait(Ranks(1, 2, "algo-1", late=True), abort=True)
    over.wait(Ranks(1, 2, "algo-1", late=True), time_left=100)
    assert (stopped.calls, over.calls) == (1, 10)


def test_names_that_should_be_there() -> None:
    """Where nodes start together, a name that is not known is a wrong one."""
    announcer = Announcer(360)
    with pytest.raises(UnreachableError, match=r"gpu-03, did not resolve in 5m 00s: gpu-03 is not known"):
        announcer.wait(Ranks(1, 2, "gpu-03"))


def test_name_with_nothing_but_an_ipv6_address() -> None:
    wait_for_master(Ranks(1, 2, "[::1]"), threading.Event(), pytest.fail, time_left=lambda: 0)


def test_built_in_trainer_and_torchrun_between_nodes(tmp_path: Path) -> None:
    job = RunnerWorld(tmp_path).job(train={"task": "classify"}, nodes=2, processes=4)
    ranks = Ranks(1, 2, "gpu-03", 24711)
    command = build_command(job, None, env={}, ranks=ranks, code=None, scratch=tmp_path)
    assert command.argv[-4:] == ("--no-python", sys.executable, "-m", "cvtrainer")
    assert " ".join(command.argv[3:15]) == (
        "--nnodes 2 --node-rank 1 --master-addr gpu-03 --master-port 24711 --rdzv-conf timeout=86400 --nproc-per-node 4"
    )
    assert (trainer_folder() / "cvtrainer/__main__.py").is_file()


# -- torchrun, on the CPU with two ranks ------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path)


def test_two_ranks(world: RunnerWorld) -> None:
    """torchrun itself says 1 whatever its ranks say; the first one's exit.json is heard."""
    program = """
rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
print(f"rank {rank} of {size}", sys.flags.dev_mode, flush=True)
(ml.output / f"rank-{rank}").touch()
while len(list(ml.output.glob("rank-*"))) < 2: time.sleep(0.02)  # torchrun ends the others with the first
if rank == "0": leave(64, "epochs is 0")
while not ml.exit.exists(): time.sleep(0.02)
sys.exit(64)
"""
    command = (sys.executable, "-X", "dev", *python(program)[1:])
    ended = world.end(world.job(command, processes=2, retries=3), env={"RANK": "7", "WORLD_SIZE": "9"})
    assert ended.code == 64 and world.result["reason"] == "epochs is 0" and world.result["restarts"] == 0
    assert "[0] rank 0 of 2 True" in world.log() and "[1] rank 1 of 2 True" in world.log()
    assert "\nrank 0 of 2" in ended.output


def test_two_ranks_are_told_to_stop(world: RunnerWorld) -> None:
    program = """
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it again when the other rank has ended
    time.sleep(0.3)  # the step is finished
    if os.environ["RANK"] == "0": checkpoint(1); leave(75)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
ready()
while True: time.sleep(0.1)
"""
    running = world.start(world.job(python(program), processes=2))
    until(lambda: running.log.read_text().splitlines().count("ready") == 2)
    ended = running.signal().end()
    assert ended.code == 75 and ended.seconds < 30
    assert "[0] saved" in world.log() and "[1] saved" in world.log()
    assert world.result["state"] == "PREEMPTED"


POD = {"JOB_COMPLETION_INDEX": "1", "CVLAUNCH_NODES": "2", "CVLAUNCH_MASTER": "shapes-1-0.shapes-1.invalid:29500"}


def second_node(world: RunnerWorld) -> dict[str, Any]:
    return json.loads(world.read("nodes/1/output/result.json"))


def test_stop_while_a_pod_waits_for_the_first(world: RunnerWorld) -> None:
    running = world.start(world.job(("true",), nodes=2), env=POD).printed("waiting for node 0, for 0s so far")
    ended = running.signal().end()
    assert ended.code == 75 and ended.seconds < 30
    result = second_node(world)
    assert (result["state"], result["reason"]) == ("PREEMPTED", "preempted before the command started")


def test_time_that_ends_while_a_pod_waits_for_the_first(world: RunnerWorld) -> None:
    """It counts, and all attempts together."""
    ended = world.end(world.job(("echo", "it ran"), nodes=2, timeout_s=3), env=POD)
    assert ended.code == 1 and "waiting for node 0" in ended.output and "it ran" not in ended.output
    assert (second_node(world)["state"], second_node(world)["reason"]) == ("TIMED_OUT", "the timeout of 3s is used up")
    assert json.loads(world.read("nodes/1/heartbeat"))["elapsed_s"] >= 3


STEPS_TOGETHER = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
attempt = torch.tensor([int(os.environ["CVLAUNCH_ATTEMPT"])])
dist.all_reduce(attempt, dist.ReduceOp.MAX)
while attempt.item() < 2:  # of all nodes
    print("a step", flush=True)
    time.sleep(0.05)
    dist.all_reduce(attempt, dist.ReduceOp.MAX)
dist.barrier()
"""


@pytest.mark.parametrize("taken", [0, 1])
def test_command_of_two_nodes_of_which_one_is_taken_away(tmp_path: Path, taken: int) -> None:
    """The other's fails with it, by its connection and at once, and its next try waits for the node to come back."""
    where = {"CVLAUNCH_NODES": "2", "CVLAUNCH_MASTER": f"127.0.0.1:{free_port()}", "GLOO_SOCKET_IFNAME": "lo"}
    worlds = [RunnerWorld(tmp_path, in_place=False, name=str(node)) for node in (0, 1)]
    job = worlds[0].job(python(STEPS_TOGETHER), nodes=2, retries=1)

    def start(node: int, attempt: int) -> Running:
        pod = {"JOB_COMPLETION_INDEX": str(node), "CVLAUNCH_ATTEMPT": str(attempt), "CVLAUNCH_TERMINATION": "/dev/null"}
        return worlds[node].start(job, env={**where, **pod})

    nodes = [start(node, 1) for node in (0, 1)]
    for node in nodes:
        node.printed("a step")
    assert nodes[taken].signal().end().code == 75
    survivor = nodes[1 - taken].printed("restart 1 of 1")
    assert start(taken, 2).end().code == 0
    assert survivor.end().code == 0


def test_other_commands_see_no_ranks(world: RunnerWorld) -> None:
    job = world.job(("env",), processes=2)
    output = world.end(job, env={"RANK": "7", "MASTER_ADDR": "x", "LOCAL_RANK": "0"}).output
    names = {line.partition("=")[0] for line in output.splitlines()}
    assert not names & {"RANK", "LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"}
    assert "CVLAUNCH_NODES=1" in output
