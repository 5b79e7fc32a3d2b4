"""A run's folder that is put together from places of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import SpecError, UnsupportedError
from launcher.stores import FolderStore, PlacesStore


@pytest.fixture
def store(tmp_path: Path) -> PlacesStore:
    for path in ("theirs/model.tar.gz", "theirs/data/a.txt", "elsewhere/1.pt", "elsewhere-too/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    places = {"artifacts/job/output": "theirs", "checkpoints": "elsewhere", "checkpoints-2": "elsewhere-too"}
    return PlacesStore("s3://b/theirs", {into: FolderStore(tmp_path / name) for into, name in places.items()})


ALL = [
    "artifacts/job/output/data/a.txt",
    "artifacts/job/output/model.tar.gz",
    "checkpoints-2/x",
    "checkpoints/1.pt",
]


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("", ALL),
        ("artifacts", ALL[:2]),
        ("artifacts/job/output/data", ALL[:1]),
        ("checkpoints", ALL[3:]),
        ("check", []),
        ("output", []),
        ("artifacts/another", []),
    ],
)
def test_lists_what_stands_below_a_folder(store: PlacesStore, prefix: str, found: list[str]) -> None:
    assert [entry.path for entry in store.list(prefix)] == found


def test_files_are_read_by_their_paths_in_the_run(store: PlacesStore, tmp_path: Path) -> None:
    assert store.read("checkpoints/1.pt") == b"elsewhere/1.pt"
    assert store.read_range("checkpoints/1.pt", 10, 12) == b"1."
    entry = store.download("artifacts/job/output/data/a.txt", tmp_path / "home")
    assert (entry, (tmp_path / "home").read_bytes()) == (store.head(entry.path), b"theirs/data/a.txt")
    assert store.head("checkpoints/2.pt") is None and store.head("output/result.json") is None
    for path in ("checkpoints/2.pt", "output/result.json", "checkpoints"):
        with pytest.raises(FileNotFoundError):
            store.read(path)
    with pytest.raises(SpecError, match="empty part"):
        store.read("checkpoints/../elsewhere-too/x")


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.write("checkpoints/1.pt", b""),
        lambda store: store.write("control/cancel", b"", if_absent=True),
        lambda store: store.delete(["checkpoints/1.pt"]),
        lambda store: store.check_writable(),
    ],
)
def test_nothing_is_changed(store: PlacesStore, change: Callable[[PlacesStore], None]) -> None:
    with pytest.raises(UnsupportedError, match="s3://b/theirs is not cvlaunch's: it is read, never changed"):
        change(store)
    assert [entry.path for entry in store.list()] == ALL and store.local_path("checkpoints") is None
