"""How long `cvlaunch --help` and `cvlaunch render` take, as multiples of `python -c "import click, pydantic"`.

    python benchmarks/startup.py [ROUNDS]

Medians; the commands take turns, so that a busy machine slows all of them. Exits with 1 above the limits.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOB = "name: startup\ncommand: [python, -c, pass]\n"
LIMITS = {"cvlaunch --help": 2.5, "cvlaunch render": 6.0}


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.yaml"
        job.write_text(JOB)
        base = "python -c 'import click, pydantic'"
        commands = {
            base: [sys.executable, "-c", "import click, pydantic"],
            "cvlaunch --help": [sys.executable, "-m", "launcher.cli", "--help"],
            "cvlaunch render": [sys.executable, "-m", "launcher.cli", "render", str(job)],
            "cvlaunch runs": [sys.executable, "-m", "launcher.cli", "runs"],
        }
        environ = {**os.environ, "HOME": scratch, "XDG_DATA_HOME": scratch, "XDG_CACHE_HOME": scratch}
        seconds = measure(commands, rounds, environ)
    failed = False
    for name, value in seconds.items():
        ratio = value / seconds[base]
        limit = LIMITS.get(name)
        failed |= limit is not None and ratio > limit
        print(f"{name:<36} {value * 1000:6.0f} ms   × {ratio:.2f}" + (f"   limit {limit}" if limit else ""))
    return int(failed)


def measure(commands: dict[str, list[str]], rounds: int, environ: dict[str, str]) -> dict[str, float]:
    """Median wall time by name, after one round that fills the caches."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())
