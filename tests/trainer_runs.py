"""Running the trainer by hand: a root with a job.json, and `python -m cvtrainer` as a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from launcher.contract import JobFile, Layout, channel_variable

REPOSITORY = Path(__file__).parent.parent
_PATH = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "trainer_image")])
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
_DRIVER = """
import json, os, sys
from cvtrainer.__main__ import main
ours = dict(os.environ)
for environ in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(ours | environ)
    print(json.dumps({"code": main()}), flush=True)
"""


def make_root(root: Path, train: Mapping[str, object]) -> Layout:
    layout = Layout(root)
    layout.job.parent.mkdir(parents=True, exist_ok=True)
    job = JobFile(run_id="run-1", name="test", job_digest="d" * 64, output=root.as_uri(), train=train)
    layout.job.write_bytes(job.to_bytes())
    return layout


def environment(layout: Layout, channels: Mapping[str, Path]) -> dict[str, str]:
    return {
        "CVLAUNCH_ROOT": str(layout.root),
        "PYTHONPATH": _PATH,
        "HF_HUB_OFFLINE": "1",
        "HOME": str(layout.root),
        "TMPDIR": str(layout.root),
        **{channel_variable(name): str(folder) for name, folder in channels.items()},
    }


def start(layout: Layout, channels: Mapping[str, Path], *, ranks: int = 1) -> subprocess.Popen[str]:
    """The trainer as the runner starts it: by torchrun where there are several ranks."""
    torchrun = (*_TORCHRUN, str(ranks)) if ranks > 1 else ()
    environ = {**os.environ, **environment(layout, channels)}
    command = [sys.executable, *torchrun, "-m", "cvtrainer"]
    return subprocess.Popen(
        command, env=environ, cwd=layout.root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], *, expected: int = 0) -> str:
    """What it printed, after it exited as expected."""
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == expected, output
    return output


def run_each(cases: Sequence[tuple[Layout, Mapping[str, Path]]]) -> tuple[list[int], str]:
    """One process for many short runs, because importing torch takes seconds: exit codes, and all that was printed."""
    environs = json.dumps([environment(layout, channels) for layout, channels in cases])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        env={**os.environ, "PYTHONPATH": _PATH},
        input=environs,
        text=True,
        capture_output=True,
        check=True,
        timeout=600,
    )
    codes = [json.loads(line)["code"] for line in done.stdout.splitlines() if line.startswith('{"code"')]
    return codes, done.stdout + done.stderr


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(layout: Layout) -> dict[tuple[str, int], dict[str, float]]:
    """(split, step) → values, the last whole line counting, without what depends on the clock."""
    text = layout.metrics.read_text() if layout.metrics.exists() else ""
    rows = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    drop = {"images_per_second"}
    return {(r["split"], r["step"]): {k: v for k, v in r["values"].items() if k not in drop} for r in rows}


def exit_facts(layout: Layout) -> dict[str, object]:
    facts: dict[str, object] = json.loads(layout.exit.read_text())
    return facts


def draw_classes(folder: Path, counts: Mapping[str, int], *, side: int = 40) -> Path:
    """Class folders of noisy pictures; a class has a mean colour of its own."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng((number, index))
            colour = np.array([60 + 60 * number, 200 - 50 * number, 128])
            pixels = rng.normal(colour, 60, (side, side + 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")
    return folder
