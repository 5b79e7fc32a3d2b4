"""The real command line as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "launcher.cli"]

LOOP = """\
import json, os, time
for epoch in range(1, {epochs} + 1):
    print("epoch", epoch, flush=True)
    line = {{"step": epoch * 10, "epoch": epoch, "time": time.time(), "split": "val",
             "values": {{"loss": 1 / epoch, "accuracy": 1 - 1 / epoch}}}}
    with open(os.environ["CVLAUNCH_OUTPUT"] + "/metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    time.sleep({pause})
raise SystemExit({code})
"""


def cli(
    *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def cli_json(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> Any:
    done = cli(*arguments, "--json", cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_loop(folder: Path, *, epochs: int = 2, pause: float = 0.0, code: int = 0, extra: str = "") -> Path:
    """A job that prints and writes metrics; extra: more lines of the job file."""
    script = LOOP.format(epochs=epochs, pause=pause, code=code)
    path = folder / "job.yaml"
    path.write_text(f"name: loop\ncommand: [{sys.executable}, -c, {json.dumps(script)}]\n{extra}")
    return path


def ledger_files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "data/cvlaunch/runs").glob("*.json"))


def user(home: Path) -> dict[str, str]:
    """The variables that make `home` the user's folder."""
    return {"HOME": str(home)} | {f"XDG_{n.upper()}_HOME": str(home / n) for n in ("data", "cache", "config", "state")}
