"""The examples: their data come out the same each time, their job files are valid."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from launcher.spec import JobSpec

EXAMPLES = Path(__file__).parent.parent / "examples"
JOBS = sorted(EXAMPLES.glob("*/*.yaml"))


def make(example: str, folder: Path) -> dict[str, str]:
    """Path → SHA-256 of what the script writes."""
    subprocess.run([sys.executable, str(EXAMPLES / example / "make_data.py"), str(folder)], check=True, timeout=120)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("digits")
    return folder, make("digits", folder)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("shapes")
    return folder, make("shapes", folder)


def test_the_same_data_each_time(
    digits: tuple[Path, dict[str, str]], shapes: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Into the same folders again, with a leftover in one of them."""
    (digits[0] / "val/3/leftover.png").write_bytes(b"old")
    assert make("digits", digits[0]) == digits[1]
    assert make("shapes", tmp_path) == shapes[1]


def test_digits_splits(digits: tuple[Path, dict[str, str]]) -> None:
    folder, files = digits
    images = {split: {Path(f).name for f in files if f.startswith(f"{split}/")} for split in ("train", "val")}
    assert len(images["train"]) + len(images["val"]) == 1797
    assert not images["train"] & images["val"]
    for split, count in (("tiny-train", 240), ("tiny-val", 60)):
        names = {Path(f).name for f in files if f.startswith(f"{split}/")}
        assert len(names) == count
        assert names <= images[split.removeprefix("tiny-")]
    with Image.open(folder / next(iter(files))) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


def test_shapes_labels_lie_in_the_picture(shapes: tuple[Path, dict[str, str]]) -> None:
    folder, files = shapes
    assert sum(name.endswith(".png") for name in files) == 320
    for path in folder.rglob("labels/*.txt"):
        for line in path.read_text().splitlines():
            number, x, y, width, height = (float(word) for word in line.split())
            assert number in (0, 1, 2)
            assert width / 2 <= x <= 1 - width / 2
            assert height / 2 <= y <= 1 - height / 2


@pytest.mark.parametrize("path", JOBS, ids=[path.stem for path in JOBS])
def test_job_files_are_valid(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=../../docs/job.schema.json\n")
    job = JobSpec.model_validate(yaml.safe_load(text))
    assert job.train is not None
    assert job.resources.gpus == 0
    assert set(job.data.values()) <= {"data/train", "data/val", "data/tiny-train", "data/tiny-val"}


def test_there_are_examples() -> None:
    assert {path.stem for path in JOBS} >= {"digits", "tiny", "shapes"}
