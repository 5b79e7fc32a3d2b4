"""How long `cvlaunch runs` takes with many past runs, with the index and without.

    python benchmarks/ledger.py [RUNS]

Makes 10,000 run files of the usual size in a scratch folder. Exits with 1 above 1 s with the index or 5 s without.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.ledger import RunRecord, new_run_id
from launcher.status import State

LIMITS = {"with the index": 1.0, "without": 5.0}
ENDS = (State.SUCCEEDED, State.SUCCEEDED, State.SUCCEEDED, State.FAILED, State.CANCELLED)


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_runs(root / "data/cvlaunch/runs", count)
        environ = {**os.environ, "HOME": scratch}
        environ |= {f"XDG_{name.upper()}_HOME": str(root / name) for name in ("data", "cache", "config")}
        without = [timed(environ, root, fresh=True) for _ in range(3)]
        indexed = [timed(environ, root, fresh=False) for _ in range(5)]
    seconds = {"with the index": statistics.median(indexed), "without": statistics.median(without)}
    for name, value in seconds.items():
        print(f"cvlaunch runs, {count} past runs, {name:<15} {value:.2f} s   limit {LIMITS[name]:g} s")
    return int(any(value > LIMITS[name] for name, value in seconds.items()))


def make_runs(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    chance = random.Random(0)
    for number in range(count):
        created = 1_790_000_000 + number * 60.0
        run_id = new_run_id(f"sweep {number % 7}", now=created, randomness=chance.getrandbits(13))
        (folder / f"{run_id}.json").write_text(json.dumps(record(run_id, created, chance).to_json(), indent=1))


def record(run_id: str, created: float, chance: random.Random) -> RunRecord:
    job = {"spec": {"train": {"task": "classify", "epochs": 3}, "data": {"train": "digits/train"}}, "folder": "/work"}
    return RunRecord(
        run_id=run_id,
        name="sweep",
        created=created,
        state=chance.choice(ENDS),
        backend="local",
        target_name="local",
        target={"backend": "local"},
        output="file:///runs",
        owner={"host": "login1", "boot": "", "pid": 1, "start": 1},
        plan={
            "text": json.dumps({"argv": ["x" * 40] * 40}),  # as long as a rendered job with its job.json
            "plan_sha": "0" * 64,
            "job_digest": "0" * 64,
            "files": [],
            "outputs": [],
            "unpinned": [],
            "warnings": [],
        },
        job=job,
        handle=f"local://local/{run_id}",
        tags={"sweep": str(chance.randrange(20))},
    )


def timed(environ: dict[str, str], root: Path, *, fresh: bool) -> float:
    if fresh:
        shutil.rmtree(root / "cache", ignore_errors=True)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launcher.cli", "runs"], check=True, env=environ, capture_output=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
