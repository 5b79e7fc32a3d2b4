"""Checkpoints in a folder that SageMaker's agent syncs: its markers come and go, and files are half restored."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import pytest

from launcher.contract import check_checkpoint, complete_checkpoint, newest_checkpoint
from launcher.paths import trainer_folder

UPLOADING, UPLOADED = ".sagemaker-uploading", ".sagemaker-uploaded"


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The trainer's module, which stands in the image and in no package of this environment."""
    monkeypatch.syspath_prepend(str(trainer_folder()))
    from cvtrainer import checkpoints

    return checkpoints


def write(folder: Path) -> None:
    (folder / "state.pt").write_bytes(b"state" * 1000)
    (folder / "best.pt").write_bytes(b"best" * 1000)


def whole(root: Path, *steps: int) -> None:
    for step in steps:
        (root / str(step)).mkdir(parents=True)
        write(root / str(step))
        complete_checkpoint(root / str(step), step=step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_markers_are_no_files_of_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path)
    for marker in (f"state.pt{UPLOADING}", f"best.pt{UPLOADED}"):
        (tmp_path / marker).touch()
    complete_checkpoint(tmp_path, step=1)
    for marker in tmp_path.glob("*.sagemaker-*"):
        marker.unlink()
    facts = check_checkpoint(tmp_path)
    assert facts is not None and set(facts["files"]) == {"state.pt", "best.pt"}


@contextmanager
def agent(root: Path) -> Iterator[None]:
    """Puts markers beside all that it finds and takes them away, as fast as it can."""
    over = threading.Event()

    def mark() -> None:
        while not over.is_set():
            for folder, _, files in os.walk(root):
                for file in files:
                    with suppress(OSError):
                        Path(folder, file.partition(".sagemaker-")[0] + UPLOADED).touch()
                    with suppress(OSError):
                        Path(folder, file.partition(".sagemaker-")[0] + UPLOADED).unlink()

    threads = [threading.Thread(target=mark) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_saving_and_pruning_while_the_agent_works(checkpoints: ModuleType, tmp_path: Path) -> None:
    with agent(tmp_path):
        for step in range(1, 151):
            checkpoints.save(tmp_path, step, write, epoch=step, metric=None)
            checkpoints.prune(tmp_path, best=10)
            assert newest_checkpoint(tmp_path) == tmp_path / str(step)
    checkpoints.prune(tmp_path, best=10)
    assert names(tmp_path) == ["10", "149", "150"]


HALF: dict[str, Callable[[Path], None]] = {
    "a file is missing": lambda folder: (folder / "state.pt").unlink(),
    "the end is missing": lambda folder: (folder / "complete.json").unlink(),
    "a file is shorter": lambda folder: os.truncate(folder / "best.pt", 10),
}


@pytest.mark.parametrize("what", HALF)
def test_what_was_half_synced_is_none_of_the_last_two(checkpoints: ModuleType, tmp_path: Path, what: str) -> None:
    """An instance was taken away while 5 and 7 were sent or removed: it resumed from 3, and 6 is new."""
    whole(tmp_path, 3, 5, 7)
    (tmp_path / ".8.part").mkdir()
    for step in (5, 7):
        HALF[what](tmp_path / str(step))
    assert newest_checkpoint(tmp_path) == tmp_path / "3"
    checkpoints.save(tmp_path, 6, write, epoch=1, metric=None)
    checkpoints.prune(tmp_path, best=None)
    assert names(tmp_path) == ["3", "6"]


def test_what_is_being_sent_is_removed_later(checkpoints: ModuleType, tmp_path: Path) -> None:
    whole(tmp_path, 1, 2, 3, 4)
    (tmp_path / ".5.part").mkdir()
    for left in ("1/state.pt", ".5.part/state.pt"):
        (tmp_path / left).touch()
        (tmp_path / f"{left}{UPLOADING}").touch()
    (tmp_path / f"2/gone.pt{UPLOADING}").touch()
    checkpoints.prune(tmp_path, best=None)
    assert names(tmp_path) == [".5.part", "1", "3", "4"]
    for left in ("1/state.pt", ".5.part/state.pt"):
        (tmp_path / f"{left}{UPLOADED}").touch()
    checkpoints.prune(tmp_path, best=None)
    assert names(tmp_path) == ["3", "4"]


def test_an_unfinished_checkpoint_of_the_step_gives_way(checkpoints: ModuleType, tmp_path: Path) -> None:
    for folder in ("4", ".4.part"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old.pt").touch()
        (tmp_path / folder / f"old.pt{UPLOADING}").touch()
    (tmp_path / f"4{UPLOADED}").touch()
    checkpoints.save(tmp_path, 4, write, epoch=1, metric=0.5)
    facts = check_checkpoint(tmp_path / "4")
    assert facts is not None and set(facts["files"]) == {"state.pt", "best.pt"}
    assert checkpoints.best_step(tmp_path) == 4
