"""Submissions per second to a SLURM cluster, and polls of a thousand runs, beside submitit's on the same cluster.

    python benchmarks/slurm.py [ROUNDS]

Starts a cluster of its own (root, and Debian's packages as tests/services/install has them) whose nodes take nothing,
so that only submitting is measured, and installs submitit into a scratch environment. Both have one job for each of a
thousand numbers; submitit's arrays are cut by hand into parts that the cluster takes (MaxArraySize), as ours cuts them.
The two take turns; medians. Exits with 1 where submitit is faster at what both do: one submission after another
(ours with resolving, check and ledger), handing over an array, a poll. The row "all of it" has no peer: submitit keeps
no ledger, so after a crash nobody knows what was sent.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher import submit, submit_many
from launcher.submission import prepare
from tests.services.slurm import NODES, SlurmCluster, slurm_cluster, slurm_works

PEER = "submitit==1.5.4"
ELEMENTS, LARGEST, SINGLES = 1000, 301, 10
JOB = f"name: bench\ncommand: [{sys.executable}, -c, 'pass']\n"
SINGLE, ARRAY, ALL, POLL = (
    "one after another",
    "an array of 1,000, handed over",
    "the same, all of it",
    "a poll of 1,000",
)
"""All of it: resolved, checked, rendered, durable in the ledger before it is sent and after."""

DRIVER = """
import json, sys, time
import submitit

def job(number):
    return number

def timed(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin

executor = submitit.SlurmExecutor(folder=sys.argv[1])
elements, largest, singles = map(int, sys.argv[2:5])
executor.update_parameters(time=60, mem="100MB")
each = [timed(lambda: executor.submit(job, number)) for number in range(singles)]
executor.update_parameters(array_parallelism=elements)
jobs = []

def array():
    for first in range(0, elements, largest):
        jobs.extend(executor.map_array(job, range(first, min(first + largest, elements))))

sent = timed(array)

def poll():
    jobs[0].watcher.update()
    assert all(job.state for job in jobs)

print(json.dumps({"single": each, "array": sent, "poll": [timed(poll) for _ in range(3)]}))
"""


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    if not slurm_works():
        print("benchmarks/slurm.py: not run here; it needs root and SLURM's packages (tests/services/install)")
        return 0
    with tempfile.TemporaryDirectory() as scratch, slurm_cluster(Path(scratch) / "cluster", accounting=True) as cluster:
        root = Path(scratch)
        os.environ |= {**cluster.environment, "HOME": scratch}
        os.environ |= {f"XDG_{name}_HOME": str(root / name.lower()) for name in ("DATA", "CACHE", "CONFIG", "STATE")}
        for node in NODES:
            cluster.drain(node)
        peer = peer_environment(root / "peer")
        ours, theirs = measure(root, cluster, peer, rounds)
    return tell(ours, theirs)


Times = dict[str, list[float]]
"""Seconds by what was done; of one submission, of all elements, of one poll."""


def measure(root: Path, cluster: SlurmCluster, peer: Path, rounds: int) -> tuple[Times, Times]:
    """After one round that fills the caches."""
    ours: Times = defaultdict(list)
    theirs: Times = defaultdict(list)
    (root / "job.yaml").write_text(JOB)
    (root / "targets.yaml").write_text(json.dumps({"targets": {"hpc": {"backend": "slurm", "root": f"{root}/root"}}}))
    for number in range(rounds + 1):
        if number == 1:
            ours.clear()
            theirs.clear()
        note(ours, our_round(root, cluster))
        clear(cluster)
        note(theirs, peer_round(root / f"submitit-{number}", peer))
        clear(cluster)
    return ours, theirs


def note(times: Times, found: Mapping[str, list[float]]) -> None:
    for what, seconds in found.items():
        times[what] += seconds


def clear(cluster: SlurmCluster) -> None:
    cluster.run("scancel", "--user=root")
    time.sleep(1)  # until the controller has its breath back


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def our_round(root: Path, cluster: SlurmCluster) -> dict[str, list[float]]:
    job = root / "job.yaml"
    singles = [timed(lambda: submit(job, target="hpc")) for _ in range(SINGLES)]
    everything = timed(lambda: submit_many(job, [[f"env.N={n}"] for n in range(ELEMENTS)], target="hpc"))
    clear(cluster)
    with prepare(job, target="hpc") as prepared:
        name = secrets.token_hex(4)
        plans = [prepared.plan(f"b{name}-{number}") for number in range(ELEMENTS)]
        handed_over = timed(lambda: prepared.backend.submit_many(plans, {}))
        found = prepared.backend.find([plan.run_id for plan in plans])
        handles = [found[plan.run_id] for plan in plans]
        polls = [timed(lambda: prepared.backend.status(handles)) for _ in range(3)]
    return {SINGLE: singles, ARRAY: [handed_over], ALL: [everything], POLL: polls}


def peer_environment(folder: Path) -> Path:
    """Its python."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv") or "uv"
    python = folder / "bin/python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, PEER], check=True)
    return python


def peer_round(folder: Path, python: Path) -> dict[str, list[float]]:
    command = [python, "-c", DRIVER, folder, str(ELEMENTS), str(LARGEST), str(SINGLES)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {SINGLE: found["single"], ARRAY: [found["array"]], POLL: found["poll"]}


def tell(ours: Times, theirs: Times) -> int:
    slower = False
    print(f"{'':<34}{'cvlaunch':>16}{PEER.replace('==', ' '):>18}")
    for what in (SINGLE, ARRAY, ALL, POLL):
        mine, peer = statistics.median(ours[what]), statistics.median(theirs.get(what) or [0.0])
        ratio = f"   × {peer / mine:.2f}" if peer else ""
        slower |= bool(peer) and peer < mine
        print(f"{what:<34}{shown(what, mine):>16}{shown(what, peer) if peer else '–':>18}{ratio}")
    return int(slower)


def shown(what: str, seconds: float) -> str:
    if what == POLL:
        return f"{seconds * 1000:.0f} ms"
    return f"{(1 if what == SINGLE else ELEMENTS) / seconds:,.1f} /s"


if __name__ == "__main__":
    sys.exit(main())
