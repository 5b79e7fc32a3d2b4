"""Folders behind ssh beyond a store's promises (test_stores.py): cut connections, full disks, links, errors there."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import AuthError, CapacityError, IntegrityError, SpecError, UnreachableError
from launcher.remote import Host
from launcher.stores import open_store
from launcher.stores.remote import RemoteStore
from tests.distant_stores import *  # noqa: F403 what is promised of both kinds
from tests.services.sshd import ALIAS, Sshd

pytestmark = pytest.mark.needs("sshd", "root")

BIG = 8 << 30
"""Bytes of a sparse file that takes longer to travel than a connection takes to be cut."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "it's $HOME `id` é" / "runs"


@pytest.fixture
def store(ssh_host: Host, root: Path) -> RemoteStore:
    return RemoteStore(ssh_host, str(root))


def sparse(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(BIG)
    return path


def part_files(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part")) if folder.exists() else []


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def some_arrived(folder: Path) -> bool:
    return any(part.stat().st_size for part in part_files(folder))


# -- what is where ----------------------------------------------------------------------------------------------------


def test_uri_and_place(store: RemoteStore, root: Path) -> None:
    assert store.uri == f"ssh://{ALIAS}{root}"
    assert store.local_path() is None
    assert store.local_path("a") is None


@pytest.mark.parametrize("root", ["", "/", "runs", "~/runs", "/a/../b", "/a//b", "/a\nb"])
def test_a_root_is_absolute_and_plain(root: str) -> None:
    with pytest.raises(SpecError, match="is not a folder on login1"):
        RemoteStore(Host("login1"), root)


def test_entries_are_those_of_the_folder_itself(store: RemoteStore, root: Path) -> None:
    for path in ("output/a", ".hidden", "output/.b.part/c"):
        store.write(path, b"12345")
    for number in range(100):
        (root / f"at-{number}").touch()
        os.utime(root / f"at-{number}", ns=(0, 1_600_000_000_000_000_001 + number * 12_345_678_901_234_567))
    assert list(store.list()) == list(open_store(str(root)).list())
    assert store.head("output/a") == open_store(str(root)).head("output/a")
    assert store.head("output") is None


def test_part_files_and_what_vanishes_are_not_listed(store: RemoteStore, root: Path) -> None:
    (root / "sub").mkdir(parents=True)
    (root / ".metrics.jsonl.1-2.part").write_text("half")
    (root / "file").write_text("1")
    assert [entry.path for entry in store.list()] == ["file"]
    assert list(store.list("file")) == []
    assert list(store.list("no/such")) == []


def test_thousands_of_files(store: RemoteStore, root: Path) -> None:
    for number in range(3000):
        path = root / f"{number % 7}/{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths = [entry.path for entry in store.list()]
    assert len(paths) == 3000
    store.delete(paths)
    assert list(store.list()) == []


def test_hostile_names_there_are_refused(store: RemoteStore, root: Path) -> None:
    root.mkdir(parents=True)
    (root / "a\nb").touch()
    with pytest.raises(IntegrityError, match="can't be brought to a folder"):
        list(store.list())


def test_links_lead_nowhere_else(store: RemoteStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (root / "data").mkdir(parents=True)
    (root / "data/real").write_text("1")
    (root / "inner").symlink_to("data/real")
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to("loop")
    assert [entry.path for entry in store.list()] == ["data/real"]
    assert store.read("inner") == b"1"
    calls: list[Callable[[], object]] = [
        lambda: store.read("file"),
        lambda: store.read("link/secret"),
        lambda: store.head("link/secret"),
        lambda: list(store.list("link")),
        lambda: store.download("file", tmp_path / "x"),
        lambda: store.write("link/x", b""),
        lambda: store.delete(["link/secret"]),
    ]
    for call in calls:
        with pytest.raises(SpecError, match="symbolic link"):
            call()
    store.write("file", b"replaces the link")
    assert [path.read_text() for path in outside.iterdir()] == ["secret"]
    assert store.read("file") == b"replaces the link"


def test_the_root_itself_may_be_a_link(ssh_host: Host, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "home").symlink_to("scratch")
    store = RemoteStore(ssh_host, str(tmp_path / "home"))
    store.write("a/b", b"1")
    assert [entry.path for entry in store.list()] == ["a/b"]
    assert (tmp_path / "scratch/a/b").read_bytes() == b"1"


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_upload_that_breaks_leaves_nothing(ssh_server: Sshd, store: RemoteStore, root: Path, tmp_path: Path) -> None:
    store.write("big", b"old")
    source = sparse(tmp_path / "source")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(store.write, "big", source)
        wait_for(lambda: some_arrived(root))
        ssh_server.cut()
        with pytest.raises(UnreachableError, match="the connection broke"):
            call.result(120)
    wait_for(lambda: not part_files(root))
    assert store.read("big") == b"old"


def test_a_download_that_breaks_leaves_nothing(
    ssh_server: Sshd, store: RemoteStore, root: Path, tmp_path: Path
) -> None:
    sparse(root / "big")
    home = tmp_path / "home"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(store.download, "big", home / "big")
        wait_for(lambda: some_arrived(home))
        ssh_server.cut()
        with pytest.raises(UnreachableError, match="the connection broke"):
            call.result(120)
    assert list(home.iterdir()) == []


def test_a_file_that_shrinks_meanwhile_is_no_upload(store: RemoteStore, root: Path, tmp_path: Path) -> None:
    source = sparse(tmp_path / "source")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(store.write, "big", source)
        wait_for(lambda: some_arrived(root))
        os.truncate(source, 0)
        with pytest.raises(IntegrityError, match=r"'big' in ssh://cluster/.* was cut short"):
            call.result(120)
    assert list(root.iterdir()) == []


def test_a_file_that_shrinks_meanwhile_is_no_download(store: RemoteStore, root: Path, tmp_path: Path) -> None:
    sparse(root / "big")
    home = tmp_path / "home"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(store.download, "big", home / "big")
        wait_for(lambda: some_arrived(home))
        os.truncate(root / "big", 0)
        with pytest.raises(IntegrityError, match="was cut short"):
            call.result(120)
    assert list(home.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_on_either_side(small_disk: Path, ssh_host: Host, store: RemoteStore) -> None:
    there = RemoteStore(ssh_host, str(small_disk / "runs"))
    for if_absent in (False, True):
        with pytest.raises(CapacityError, match=r"/runs/big: the disk is full: make room"):
            there.write("big", bytes(3 << 20), if_absent=if_absent)
    assert list((small_disk / "runs").iterdir()) == []
    store.write("big", bytes(3 << 20))
    with pytest.raises(CapacityError, match="the disk is full"):
        store.download("big", small_disk / "home/big")
    assert list((small_disk / "home").iterdir()) == []


def test_a_folder_of_somebody_else(csh_host: Host, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "a").write_text("1")
    store = RemoteStore(csh_host, str(private))
    calls: list[Callable[[], object]] = [
        store.check_writable,
        lambda: store.read("a"),
        lambda: store.head("a"),
        lambda: list(store.list()),
        lambda: store.download("a", tmp_path / "x"),
        lambda: store.delete(["a"]),
    ]
    for call in calls:
        with pytest.raises(AuthError, match="no permission on this folder: ask its owner"):
            call()


def test_a_read_only_file_system(small_disk: Path, ssh_host: Host) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(AuthError, match="this file system is read-only: choose another folder"):
        RemoteStore(ssh_host, str(small_disk / "runs")).check_writable()


def test_names_that_read_like_errors(store: RemoteStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("xx: Permission denied/yy: Is a directory")
    assert store.head("xx: Permission denied") is None
    assert list(store.list("xx: File exists")) == []


def test_files_and_folders_in_the_way(store: RemoteStore, root: Path, ssh_host: Host, tmp_path: Path) -> None:
    store.write("file", b"")
    store.write("folder/x", b"")
    calls: list[Callable[[], object]] = [
        lambda: store.write("file/x", b""),
        lambda: store.write("folder", b""),
        lambda: store.read("folder"),
        lambda: store.read("file/x"),
        lambda: store.delete(["folder"]),
        lambda: store.download("folder", tmp_path / "x"),
        lambda: store.write("n" * 300, b""),
    ]
    for call in calls:
        with pytest.raises((SpecError, FileExistsError)):
            call()
    with pytest.raises(FileExistsError):
        store.write("folder", b"", if_absent=True)
    assert [entry.path for entry in store.list()] == ["file", "folder/x"]
    assert part_files(root) == []


def test_an_unreachable_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ssh_host: Host) -> None:
    store = RemoteStore(Host("no-such-host.invalid"), "/scratch")
    for call in (lambda: store.read("a"), lambda: store.write("a", b""), lambda: list(store.list())):
        with pytest.raises(UnreachableError, match="no host of this name"):
            call()
