"""Ranks from the variables that each platform sets, and torchrun around the command."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from launcher.errors import SpecError, UnreachableError
from launcher.paths import trainer_folder
from launcher.runner.command import build_command
from launcher.runner.ranks import Ranks, find_ranks, first_host, wait_for_master
from tests.runner_world import RunnerWorld, python, until

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
        (3, {"CLUSTER_SPEC": json.dumps(VERTEX)}, Ranks(2, 3, "cmle-training-workerpool0-a1b2-0", 2222)),
        (
            4,
            {"JOB_COMPLETION_INDEX": "3", "CVLAUNCH_MASTER": "shapes-1-0.shapes-1:29500", "CVLAUNCH_NODES": "4"},
            Ranks(3, 4, "shapes-1-0.shapes-1", 29500),
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
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/resourceconfig.json").write_text(json.dumps(SAGEMAKER))
    assert find_ranks(2, {}, tmp_path) == Ranks(1, 2, "algo-1", 29500, "eth0")


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


def test_names_that_resolve_late() -> None:
    answers = [OSError, OSError, "10.0.0.1"]

    def resolve(name: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, str):
            return answer
        raise answer(name)

    ranks = Ranks(1, 2, "algo-1")
    wait_for_master(ranks, threading.Event(), every_s=0.001, resolve=resolve)
    assert not answers
    answers = [OSError] * 3
    with pytest.raises(UnreachableError, match="algo-1, did not resolve"):
        wait_for_master(ranks, threading.Event(), tries=3, every_s=0.001, resolve=resolve)


def test_built_in_trainer_and_torchrun_between_nodes(tmp_path: Path) -> None:
    job = RunnerWorld(tmp_path).job(train={"task": "classify"}, nodes=2, processes=4)
    ranks = Ranks(1, 2, "gpu-03", 24711)
    command = build_command(job, None, env={}, ranks=ranks, code=None, scratch=tmp_path)
    assert command.argv[-4:] == ("--no-python", sys.executable, "-m", "cvtrainer")
    assert " ".join(command.argv[3:13]) == (
        "--nnodes 2 --node-rank 1 --master-addr gpu-03 --master-port 24711 --nproc-per-node 4"
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


def test_other_commands_see_no_ranks(world: RunnerWorld) -> None:
    job = world.job(("env",), processes=2)
    output = world.end(job, env={"RANK": "7", "MASTER_ADDR": "x", "LOCAL_RANK": "0"}).output
    names = {line.partition("=")[0] for line in output.splitlines()}
    assert not names & {"RANK", "LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"}
    assert "CVLAUNCH_NODES=1" in output
