"""The test cluster itself: what other tests take for granted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services.slurm import NODES, SlurmCluster, slurm_cluster

pytestmark = pytest.mark.needs("slurm")


def _output(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_job_has_its_gpus_its_node_s_name_and_the_environment_of_its_submitter(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOUR", "blue green")
    job = slurm.submit(
        f'echo "$(hostname) $CUDA_VISIBLE_DEVICES $COLOUR" > {tmp_path}/out', "--gres=gpu:2", "--constraint=a100"
    )
    slurm.wait_for_state(job, "COMPLETED")
    assert _output(tmp_path / "out") == ["node1 0,1 blue green"]


def test_a_job_without_any_environment_finds_the_commands_and_its_cluster(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = f"srun --export=ALL hostname > {tmp_path}/out\nscontrol show hostnames | wc -l >> {tmp_path}/out"
    slurm.wait_for_state(slurm.submit(script, "--nodes=2", "--export=NONE"), "COMPLETED")
    assert sorted(_output(tmp_path / "out")) == ["2", "node1", "node2"]


def test_nodes_reach_each_other_by_name(slurm: SlurmCluster, tmp_path: Path) -> None:
    slurm.wait_for_state(slurm.submit(f"srun getent hosts node1 node2 > {tmp_path}/out", "--nodes=2"), "COMPLETED")
    assert {line.split()[0] for line in _output(tmp_path / "out")} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--account=nobody"], "Invalid account or account/partition combination"),
        (["--partition=nowhere"], "invalid partition specified"),
        (["--qos=gold"], "Invalid qos specification"),
        (["--gres=gpu:3"], "Requested node configuration is not available"),
        (["--array=0-301"], "Invalid job array specification"),
    ],
)
def test_what_it_can_t_do_it_refuses(slurm: SlurmCluster, options: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        slurm.submit("true", *options)


def test_a_user_s_limit_holds_the_second_job(slurm: SlurmCluster) -> None:
    options = ["--qos=limited", "--account=vision", "--gres=gpu:1"]
    first, second = (slurm.submit("sleep 60", *options) for _ in range(2))
    slurm.wait_for_state(first, "RUNNING")
    assert slurm.state(second) == "PENDING"
    _until(lambda: slurm.run("squeue", "-h", "-j", f"{second}", "-o", "%r") == "QOSMaxGRESPerUser")


def test_a_job_of_main_has_one_of_low_signalled_and_put_back(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = f"trap 'echo USR1 >> {tmp_path}/out; exit' USR1\necho start >> {tmp_path}/out\nsleep 60 & wait"
    options = ["--partition=low", "--signal=B:USR1@60", "--nodes=2", "--exclusive", "--requeue"]
    slurm.submit(script, *options)
    _until((tmp_path / "out").exists)
    main = slurm.submit("sleep 1", "--nodes=2", "--exclusive")
    slurm.wait_for_state(main, "COMPLETED")
    assert _output(tmp_path / "out")[:2] == ["start", "USR1"]


def test_a_job_that_requeues_itself_starts_again_within_seconds(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = (
        f'echo "${{SLURM_RESTART_COUNT:-0}}" >> {tmp_path}/out\n'
        '[ -n "${SLURM_RESTART_COUNT:-}" ] || { scontrol requeue "$SLURM_JOB_ID"; sleep 60; }'
    )
    slurm.wait_for_state(slurm.submit(script, "--requeue"), "COMPLETED", seconds=90)
    assert _output(tmp_path / "out") == ["0", "1"]


def test_jobs_outlive_the_controller(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = slurm.submit(f"touch {tmp_path}/started; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; exit 3")
    slurm.wait_for_state(job, "RUNNING")
    slurm.stop_controller()
    assert "is DOWN" in slurm.run("scontrol", "ping", check=False)
    (tmp_path / "go").touch()
    slurm.start_controller()
    slurm.wait_for_state(job, "FAILED")


def test_nothing_of_a_job_survives_its_node_which_comes_back(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = f"srun bash -c 'while :; do date +%s%N > {tmp_path}/alive; sleep 0.1; done'"
    job = slurm.submit(script, "--no-requeue", "--nodelist=node2")
    slurm.wait_for_state(job, "RUNNING")
    slurm.kill_node("node2")
    written = [path.read_text() for path in tmp_path.glob("alive")]
    slurm.put_down("node2")
    slurm.wait_for_state(job, "NODE_FAIL")
    assert [path.read_text() for path in tmp_path.glob("alive")] == written
    slurm.start_node("node2")
    slurm.wait_idle()


def test_clear_ends_all_jobs_and_starts_what_was_stopped(slurm: SlurmCluster) -> None:
    slurm.submit("sleep 60", "--array=0-40")
    slurm.drain("node1")
    slurm.kill_node("node2")
    slurm.stop_controller()
    slurm.clear()
    assert [slurm.node_state(node) for node in NODES] == ["idle", "idle"]
    assert slurm.run("squeue", "-h") == ""


def test_accounting_knows_how_jobs_ended(slurm: SlurmCluster) -> None:
    job = slurm.submit("exit 75", "--account=vision")
    slurm.wait_for_state(job, "FAILED")
    line = f"{job}|FAILED|75:0|vision"
    told = ["sacct", "-X", "-n", "-P", "-j", f"{job}", "-o", "JobID,State,ExitCode,Account"]
    _until(lambda: slurm.run(*told) == line)


def test_a_cluster_without_accounting_has_jobs_but_no_sacct(slurm_without_accounting: SlurmCluster) -> None:
    cluster = slurm_without_accounting
    cluster.wait_for_state(cluster.submit("true", "--account=nobody"), "COMPLETED")
    with pytest.raises(AssertionError, match="accounting storage is disabled"):
        cluster.run("sacct")


def test_a_daemon_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"(?s)slurmctld: ended with 1.*Can't find plugin for select/none"),
        slurm_cluster(tmp_path / "cluster", accounting=False, settings={"SelectType": "select/none"}),
    ):
        pass


def test_nothing_is_left_when_pytest_is_killed(tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\nfrom tests.services.slurm import slurm_cluster\n"
        f"with slurm_cluster(Path({str(tmp_path / 'cluster')!r}), accounting=True) as cluster:\n"
        "    job = cluster.submit('sleep 600')\n    cluster.wait_for_state(job, 'RUNNING')\n"
        "    print('up', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        assert _mentioning(str(tmp_path))
        os.kill(process.pid, signal.SIGKILL)
    _until(lambda: not _mentioning(str(tmp_path)))
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def _mentioning(text: str) -> list[str]:
    """Processes whose environment has it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
