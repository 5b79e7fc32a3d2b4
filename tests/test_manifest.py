"""Manifests: a fixed line format, idempotent pushes that survive interruption, hostile manifests refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import manifest as manifests
from launcher.contract import MANIFEST, Channel
from launcher.errors import IntegrityError, SpecError
from launcher.manifest import FileFact, Manifest, check_staged, push, scan
from launcher.stores import Entry, Store, open_store
from tests.s3_fixtures import Bucket


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    for path, text in {"train/a.png": "aaa", "train/b.png": "bb", "labels é.txt": "x", "empty": ""}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.fixture(params=["folder", "moto", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "pushed"))
    bucket: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return bucket.store("data/shapes")


class Recorder:
    """A store that notes what is written, and breaks off after so many data files, as a killed push would."""

    def __init__(self, inner: Store, *, files: int = 10**9) -> None:
        self.inner, self.left, self.written = inner, files, list[str]()

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        if not path.startswith("."):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.written.append(path)
        self.inner.write(path, data, if_absent=if_absent)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def sent(recorder: Recorder) -> list[str]:
    return sorted(path for path in recorder.written if not path.startswith("."))


# -- the format -----------------------------------------------------------------------------------


def test_the_fingerprint_is_what_the_docstring_says() -> None:
    files = [FileFact("b", 2, "1" * 64), FileFact('a "é', 1, "0" * 64)]
    lines = f'["a \\"é",1,"{"0" * 64}"]\n["b",2,"{"1" * 64}"]\n'
    assert Manifest.of(files).fingerprint == hashlib.sha256(lines.encode()).hexdigest()
    assert Manifest.of([]).fingerprint == hashlib.sha256(b"").hexdigest()


def test_the_same_content_has_the_same_fingerprint(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    for path in sorted(data.rglob("*"), reverse=True):
        if path.is_file():
            to = other / path.relative_to(data)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    assert scan(other) == scan(data)
    (other / "empty").rename(other / "empty2")
    assert scan(other).fingerprint != scan(data).fingerprint


def test_a_manifest_reads_back(data: Path) -> None:
    manifest = scan(data)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert (manifest.count, manifest.size) == (4, 6)
    assert [file.path for file in manifest.files] == ["empty", "labels é.txt", "train/a.png", "train/b.png"]
    assert manifest.files[2].sha256 == hashlib.sha256(b"aaa").hexdigest()
    assert json.loads(manifest.to_bytes())["fingerprint"] == manifest.fingerprint


def _forged(rows: list[list[object]], **changes: object) -> bytes:
    """A manifest whose fingerprint is right for its rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    return json.dumps({"version": 1, "fingerprint": digest.hexdigest(), "files": rows, **changes}).encode()


SHA = "0" * 64
HOSTILE = {
    "not json": b"\x89PNG",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "up": _forged([["../x", 1, SHA]]),
    "absolute": _forged([["/etc/passwd", 1, SHA]]),
    "backslash": _forged([["a\\..\\b", 1, SHA]]),
    "number as path": _forged([[1, 1, SHA]]),
    "twice": _forged([["a", 1, SHA], ["a", 1, SHA]]),
    "unsorted": _forged([["b", 1, SHA], ["a", 1, SHA]]),
    "negative": _forged([["a", -1, SHA]]),
    "size as text": _forged([["a", "1", SHA]]),
    "true as size": _forged([["a", True, SHA]]),
    "short hash": _forged([["a", 1, "00"]]),
    "row too long": _forged([["a", 1, SHA, 1]]),
    "newer": _forged([["a", 1, SHA]], version=2),
    "other fingerprint": _forged([["a", 1, SHA]], fingerprint=SHA),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match=r"s3://b/\.cvlaunch"):
        Manifest.from_bytes(HOSTILE[name], place="s3://b/.cvlaunch-manifest.json")


def test_a_forged_manifest_that_is_right_is_taken() -> None:
    assert Manifest.from_bytes(_forged([["a", 1, SHA]])).count == 1


# -- reading a folder -----------------------------------------------------------------------------


def test_what_belongs_to_a_channel(data: Path, tmp_path: Path) -> None:
    for hidden in (".cvlaunch-manifest.json", ".git/config", "train/.a.png.1-2.part", ".DS_Store"):
        (data / hidden).parent.mkdir(exist_ok=True)
        (data / hidden).write_text("hidden")
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "c.png").write_text("from the pool")
    (data / "train" / "c.png").symlink_to(pool / "c.png")
    (data / "pool").symlink_to(pool)
    (data / "train" / "up").symlink_to(data)
    names = [file.path for file in scan(data).files]
    assert names == ["empty", "labels é.txt", "pool/c.png", "train/a.png", "train/b.png", "train/c.png"]


@pytest.fixture
def as_nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_read_is_named(data: Path) -> None:
    (data / "gone.png").symlink_to(data / "nowhere")
    with pytest.raises(SpecError, match=r"gone.png is a link that points nowhere"):
        scan(data)
    (data / "gone.png").unlink()
    os.mkfifo(data / "pipe")
    with pytest.raises(SpecError, match=r"pipe is neither file nor folder"):
        scan(data)
    (data / "pipe").unlink()
    (data / "a\nb").write_text("")
    with pytest.raises(SpecError, match="rename the file"):
        scan(data)
    with pytest.raises(SpecError, match="can't be read"):
        scan(data / "missing")


def test_a_file_without_permission_is_named(tmp_path: Path, as_nobody: None) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    with pytest.raises(SpecError, match=r"/proc/1.* can't be read"):
        scan(Path("/proc/1"))


def test_progress_ends_at_the_total(data: Path) -> None:
    seen = list[tuple[int, int]]()
    scan(data, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    assert seen == sorted(seen)


# -- pushing --------------------------------------------------------------------------------------


def test_push_sends_what_differs_and_the_manifest_last(data: Path, store: Store) -> None:
    first = Recorder(store)
    manifest = push(data, first)
    assert sent(first) == [file.path for file in manifest.files]
    assert first.written[-1] == MANIFEST
    assert manifests.read(store) == manifest == scan(data)
    assert {entry.path for entry in store.list()} == {MANIFEST, *(file.path for file in manifest.files)}

    second = Recorder(store)
    assert push(data, second) == manifest
    assert second.written == []

    (data / "train/a.png").write_text("AAA")  # the same size
    third = Recorder(store)
    changed = push(data, third)
    assert sent(third) == ["train/a.png"]
    assert manifests.read(store) == changed
    assert store.read("train/a.png") == b"AAA"


def test_an_interrupted_push_continues(data: Path, store: Store) -> None:
    for n in range(30):
        (data / f"more-{n:02}").write_text(str(n))
    manifest = push(data, store)
    for n in range(30):
        (data / f"more-{n:02}").write_text(f"new {n}")
    broken = Recorder(store, files=12)
    with pytest.raises(KeyboardInterrupt):
        push(data, broken)
    assert manifests.read(store) is None  # half of it is new: no job may take it for the old or the new data
    again = Recorder(store)
    renewed = push(data, again)
    assert len(sent(again)) == 30 - len(sent(broken))
    assert manifests.read(store) == renewed != manifest
    assert all(store.read(f"more-{n:02}") == f"new {n}".encode() for n in range(30))
    assert [entry.path for entry in store.list() if entry.path.startswith(".")] == [MANIFEST]


def test_what_was_lost_or_cut_in_the_store_is_sent_again(data: Path, store: Store) -> None:
    push(data, store)
    store.delete(["empty"])
    store.write("train/a.png", b"cut")
    store.write("train/b.png", b"")
    again = Recorder(store)
    push(data, again)
    assert sent(again) == ["empty", "train/b.png"]  # size, not content: hashing the store would mean reading it all


def test_files_of_somebody_else_are_not_deleted_unasked(data: Path, store: Store) -> None:
    push(data, store)
    store.write("extra.png", b"1")
    with pytest.raises(SpecError, match=r"1 files .*extra.png.*--prune"):
        push(data, store)
    assert store.head("extra.png") is not None
    manifest = push(data, store, prune=True)
    assert store.head("extra.png") is None
    assert manifests.read(store) == manifest


def test_a_file_that_changes_while_it_is_sent(data: Path, store: Store) -> None:
    class Writer(Recorder):
        def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
            super().write(path, data, if_absent=if_absent)
            if path == "train/a.png" and isinstance(data, Path):
                data.write_text("zzz")

    with pytest.raises(SpecError, match=r"a.png changed while it was sent"):
        push(data, Writer(store))
    assert manifests.read(store) is None
    push(data, store)
    assert store.read("train/a.png") == b"zzz"


def test_push_in_place_writes_the_manifest_only(data: Path) -> None:
    recorder = Recorder(open_store(str(data)))
    manifest = push(data, recorder)
    assert recorder.written == [MANIFEST]
    assert manifests.read(recorder) == manifest == scan(data)


def test_reading_a_manifest_reads_one_object(data: Path, store: Store) -> None:
    assert manifests.read(store) is None
    push(data, store)

    class OneRead(Recorder):
        def list(self, prefix: str = "") -> Iterator[Entry]:
            raise AssertionError("a million keys must not be listed")

    assert manifests.read(OneRead(store)) == scan(data)


# -- checking what was staged ---------------------------------------------------------------------


def test_staged_data_is_compared_by_names_and_sizes(data: Path) -> None:
    manifest = push(data, open_store(str(data)))
    channel = Channel("train", "file:///x", "mounted", manifest.fingerprint, manifest.count, manifest.size)
    for expected in (manifest, channel):
        assert check_staged(data, expected) == []
    (data / "train/a.png").unlink()
    (data / "train/b.png").write_text("longer")
    (data / "extra").write_text("1")
    for expected in (manifest, channel):
        assert check_staged(data, expected) == [
            "extra: not in the manifest",
            "train/a.png: missing",
            "train/b.png: 6 bytes, the manifest says 2",
        ]


def test_staged_data_of_another_fingerprint(data: Path) -> None:
    push(data, open_store(str(data)))
    differences = check_staged(data, Channel("train", "file:///x", "mounted", SHA, 4, 6))
    assert differences[0].startswith("fingerprint: ")
    assert SHA in differences[0]


def test_staged_data_without_a_manifest_is_counted(data: Path) -> None:
    assert check_staged(data, Channel("train", "x", "staged", None, 4, 6)) == []
    assert check_staged(data, Channel("train", "x", "staged", None, None, None)) == []
    assert check_staged(data, Channel("train", "x", "staged", None, 5, 7)) == [
        "files: 4 are there, the job was submitted with 5",
        "bytes: 6 are there, the job was submitted with 7",
    ]


def test_only_ten_differences_are_listed(tmp_path: Path) -> None:
    manifest = Manifest.of(FileFact(f"{n:03}", 1, SHA) for n in range(100))
    assert len(check_staged(tmp_path, manifest)) == 10
