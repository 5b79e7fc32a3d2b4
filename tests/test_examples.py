"""The examples as their READMEs run them: make the data, submit the job file, and reach what is promised."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import Run, State, submit

EXAMPLES = Path(__file__).parents[1] / "examples"


def trained(example: str, job: str, folder: Path) -> Run:
    """Runs the example in a copy of its folder."""
    copy = folder / example
    shutil.copytree(EXAMPLES / example, copy, ignore=shutil.ignore_patterns("data"))
    subprocess.run([sys.executable, str(copy / "make_data.py")], check=True, capture_output=True)
    target = {"backend": "local", "output": str(folder / "output"), "root": str(folder / "root")}
    (copy / "targets.yaml").write_text(yaml.safe_dump({"targets": {"desk": target}}))
    run = submit(copy / job, target="desk")
    assert run.wait(timeout=1800).state is State.SUCCEEDED, list(run.logs())[-5:]
    return run


@pytest.mark.parametrize(
    ("example", "job", "metric", "least"),
    [
        ("shapes", "shapes.yaml", "val/map50", 0.9),
        ("digits", "tiny.yaml", "val/accuracy", 0.8),
    ],
)
def test_an_example_reaches_what_it_promises(example: str, job: str, metric: str, least: float, tmp_path: Path) -> None:
    run = trained(example, job, tmp_path)
    assert run.metrics().best(metric)[1] >= least


def test_every_example_is_run_here_or_by_the_demo() -> None:
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.yaml")}
    assert found == {"shapes/shapes.yaml", "digits/digits.yaml", "digits/tiny.yaml"}
    assert "submit examples/digits/digits.yaml" in (EXAMPLES.parent / "Makefile").read_text()
