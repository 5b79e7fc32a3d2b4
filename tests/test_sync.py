"""Bringing runs home: one layout, incremental, resumable after a kill; following a file; tar files."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import CapacityError, IntegrityError, SpecError
from launcher.stores import Store, open_store
from launcher.sync import Cursor, read_appended, segment_path, sync_run, unpack_tar
from tests.s3_fixtures import Bucket


@pytest.fixture(params=["folder", "moto", "rclone"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "runs" / "shapes-1"))
    bucket: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return bucket.store()


TREE = {
    "started.json": b"{}",
    "output/result.json": b"{}",
    "output/logs/rank-0.txt": b"line\n",
    "model/weights.pt": b"w" * 5000,
    "checkpoints/10/complete.json": b"{}",
    "nodes/1/logs/rank-1.txt": b"line\n",
    "input/config/job.json": b"{}",
}
NOT_HOME = {
    "owner": b"me",
    "heartbeat": b"1",
    "control/cancel": b"",
    "input/data/train/a.png": b"png",
    "code/train.py": b"",
}


def fill(run: Store, tree: dict[str, bytes]) -> None:
    for path, content in tree.items():
        run.write(path, content)


def home(dest: Path) -> dict[str, bytes]:
    files = (path for path in dest.rglob("*") if path.is_file() and path.name != ".cvlaunch-sync.json")
    return {path.relative_to(dest).as_posix(): path.read_bytes() for path in files}


class Counter:
    """A store that counts what is fetched from it, and may do something before each."""

    def __init__(self, inner: Store, *, before: Callable[[str], None] = lambda path: None) -> None:
        self.inner, self.fetched, self.before = inner, list[str](), before

    def download(self, path: str, to: Path) -> Any:
        self.before(path)
        self.fetched.append(path)
        return self.inner.download(path, to)

    def read(self, path: str) -> bytes:
        self.before(path)
        self.fetched.append(path)
        return self.inner.read(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


# -- sync_run -------------------------------------------------------------------------------------


def test_a_run_comes_home_in_one_layout(run: Store, tmp_path: Path) -> None:
    fill(run, TREE | NOT_HOME)
    seen = list[tuple[int, int]]()
    report = sync_run(run, tmp_path / "home", progress=lambda done, total: seen.append((done, total)))
    assert home(tmp_path / "home") == TREE
    total = sum(map(len, TREE.values()))
    assert (report.files, report.bytes, report.skipped, report.path) == (len(TREE), total, 0, tmp_path / "home")
    assert seen[-1] == (total, total)


def test_only_what_is_new_is_fetched(run: Store, tmp_path: Path) -> None:
    dest = tmp_path / "home"
    fill(run, TREE)
    sync_run(run, dest)
    (dest / "notes.txt").write_text("mine")
    again = Counter(run)
    report = sync_run(again, dest)
    assert (report.files, report.skipped, again.fetched) == (0, len(TREE), [])

    time.sleep(0.01)
    run.write("output/result.json", b"[]")  # the same size
    run.write("checkpoints/20/complete.json", b"{}")
    run.delete(["checkpoints/10/complete.json"])
    (dest / "model/weights.pt").write_bytes(b"cut")
    renewed = Counter(run)
    sync_run(renewed, dest)
    assert sorted(renewed.fetched) == ["checkpoints/20/complete.json", "model/weights.pt", "output/result.json"]
    expected = TREE | {"output/result.json": b"[]", "checkpoints/20/complete.json": b"{}", "notes.txt": b"mine"}
    assert home(dest) == expected  # what the run deleted stays here


def test_include_and_exclude(run: Store, tmp_path: Path) -> None:
    fill(run, TREE)
    sync_run(run, tmp_path / "a", include=["model", "output/*.json"])
    assert sorted(home(tmp_path / "a")) == ["model/weights.pt", "output/result.json"]
    sync_run(run, tmp_path / "b", exclude=["checkpoints/", "*/rank-?.txt"])
    kept = ["input/config/job.json", "model/weights.pt", "output/result.json", "started.json"]
    assert sorted(home(tmp_path / "b")) == kept
    sync_run(run, tmp_path / "b")
    assert home(tmp_path / "b") == TREE


def segments(path: str, start: int, *blocks: bytes) -> dict[str, bytes]:
    """Segments that follow each other from `start` on."""
    tree = {}
    for block in blocks:
        tree[segment_path(path, start)] = block
        start += len(block)
    return tree


def test_segments_are_joined_as_far_as_they_follow(run: Store, tmp_path: Path) -> None:
    dest, path = tmp_path / "home", "output/metrics.jsonl"
    lines = [f"line {n}\n".encode() for n in range(4)]
    parts = segments(path, 0, *lines)
    late = segment_path(path, 14)
    fill(run, {name: block for name, block in parts.items() if name != late})
    fill(run, segments("nodes/1/logs/x", 0, b"n1") | segments("input/x", 0, b"no") | segments("output/y", 1, b"z"))
    sync_run(run, dest)
    assert home(dest) == {path: b"line 0\nline 1\n", "nodes/1/logs/x": b"n1"}

    run.write(late, lines[2])
    new = Counter(run)
    sync_run(new, dest)
    assert new.fetched == list(parts)[2:]
    assert home(dest)[path] == b"".join(lines)
    assert sync_run(run, dest).files == 0

    (dest / path).write_bytes(b"damaged")
    sync_run(run, dest)
    assert home(dest)[path] == b"".join(lines)

    run.write(path, b"the whole file\n")  # wins, segments or not
    sync_run(run, dest)
    assert home(dest)[path] == b"the whole file\n"
    run.delete(parts)
    assert sync_run(run, dest).files == 0


def test_segments_go_on_where_the_whole_file_ends(run: Store, tmp_path: Path) -> None:
    """An attempt was preempted and joined its file; the next one adds to it."""
    dest, path = tmp_path / "home", "output/metrics.jsonl"
    fill(run, {path: b"one\n"} | segments(path, 4, b"two\n", b"three\n"))
    sync_run(run, dest)
    assert home(dest)[path] == b"one\ntwo\nthree\n"
    fill(run, segments(path, 14, b"four\n"))
    new = Counter(run)
    sync_run(new, dest)
    assert new.fetched == [segment_path(path, 14)] and home(dest)[path] == b"one\ntwo\nthree\nfour\n"
    run.delete(segments(path, 14, b"four\n"))  # seen in the middle of a join: what came home stays
    assert sync_run(run, dest).files == 0 and home(dest)[path].endswith(b"four\n")
    run.write(path, b"one\ntwo\nthree\nfour\nfive")
    sync_run(run, dest)
    assert home(dest)[path] == b"one\ntwo\nthree\nfour\nfive"


def test_file_that_is_joined_while_it_is_fetched(tmp_path: Path) -> None:
    """The segments that were listed don't fit to the end of the longer file."""
    run, dest, path = open_store(str(tmp_path / "run")), tmp_path / "home", "output/metrics.jsonl"
    fill(run, {path: b"one\n"} | segments(path, 4, b"two\n"))
    longer = Counter(run, before=lambda at: run.write(path, b"one\ntwo\nthree\n") if at == path else None)
    sync_run(longer, dest)
    assert home(dest)[path] == b"one\ntwo\nthree\n"
    assert sync_run(run, dest).files == 0


def test_what_vanishes_meanwhile_is_passed_over(run: Store, tmp_path: Path) -> None:
    fill(run, TREE)
    gone = Counter(run, before=lambda path: run.delete([path]) if path.startswith("checkpoints") else None)
    report = sync_run(gone, tmp_path / "home")
    assert report.files == len(TREE) - 1
    assert "checkpoints/10/complete.json" not in home(tmp_path / "home")


_SYNC = """
import json, sys, time
from pathlib import Path
import launcher.sync as sync
from launcher.stores import StorageOptions, open_store

def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.02)

sync._SAVE_EVERY_S = 0
store = open_store(sys.argv[1], StorageOptions.from_mapping(json.loads(sys.argv[2])))
sync.sync_run(store, Path(sys.argv[3]), progress=slowly)
"""


def test_a_killed_sync_continues(run: Store, tmp_path: Path) -> None:
    """kill -9 in the middle: every file under its own name is whole, and most of those aren't fetched again."""
    fill(run, {f"model/{n:03}": os.urandom(300_000) for n in range(40)})
    dest = tmp_path / "home"
    command = [sys.executable, "-c", _SYNC, run.uri, json.dumps(_options_of(run)), str(dest)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert all(content == run.read(path) for path, content in whole(dest).items())
    report = sync_run(run, dest)
    assert report.skipped >= 4
    assert report.files + report.skipped == 40
    assert whole(dest) == {entry.path: run.read(entry.path) for entry in run.list()}


def whole(dest: Path) -> dict[str, bytes]:
    return {path: content for path, content in home(dest).items() if not path.endswith(".part")}


def _options_of(run: Store) -> dict[str, str]:
    client = getattr(run, "client", None)
    if client is None:
        return {}
    return {"endpoint": client.config["endpoint"], "region": "us-east-1"}


def test_parts_of_a_dead_process_are_removed(tmp_path: Path) -> None:
    run, dest = open_store(str(tmp_path / "run")), tmp_path / "home"
    run.write("model/a", b"1")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, young, living = (dest / "model" / f".a.{pid}-1a.part" for pid in (dead.pid, dead.pid + 10**6, os.getpid()))
    mine = dest / "model" / ".mine.part"  # of another program
    (dest / "model").mkdir(parents=True)
    for part in (old, young, living, mine):
        part.write_text("half")
    for part in (old, living, mine):
        os.utime(part, (0, 0))
    sync_run(run, dest)
    assert [part.exists() for part in (old, young, living, mine)] == [False, True, True, True]


def test_the_state_of_another_run_is_not_believed(tmp_path: Path) -> None:
    for name in "ab":
        open_store(str(tmp_path / name)).write("model/weights", name.encode())
        os.utime(tmp_path / name / "model/weights", (1, 1))
        sync_run(open_store(str(tmp_path / name)), tmp_path / "home")
    assert home(tmp_path / "home") == {"model/weights": b"b"}
    (tmp_path / "home" / ".cvlaunch-sync.json").write_bytes(b"\0damaged")
    assert sync_run(open_store(str(tmp_path / "b")), tmp_path / "home").files == 1


def test_hostile_keys_write_nothing(moto_bucket: Bucket, tmp_path: Path) -> None:
    run = moto_bucket.store()
    run.write("model/good", b"1")
    client = moto_bucket.server.client()
    client.put_object(Bucket=moto_bucket.name, Key="runs/shapes-1/model/../../../../evil", Body=b"1")
    with pytest.raises(IntegrityError):
        sync_run(run, tmp_path / "a" / "b" / "home")
    assert not list(tmp_path.rglob("evil"))


def test_a_file_that_is_a_folder_too(moto_bucket: Bucket, tmp_path: Path) -> None:
    run = moto_bucket.store()
    fill(run, {"model/a": b"1", "model/a/b": b"2"})
    with pytest.raises(IntegrityError, match="a folder can't hold both"):
        sync_run(run, tmp_path / "home")


def test_links_in_the_destination_are_not_followed_out(tmp_path: Path) -> None:
    run = open_store(str(tmp_path / "run"))
    run.write("model/weights", b"1")
    (tmp_path / "outside").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model").symlink_to(tmp_path / "outside")
    with pytest.raises(SpecError, match="symbolic link"):
        sync_run(run, tmp_path / "home")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_run_is_not_brought_onto_itself(tmp_path: Path) -> None:
    run = open_store(str(tmp_path / "run"))
    run.write("model/weights", b"1")
    with pytest.raises(SpecError, match="choose another folder"):
        sync_run(run, tmp_path / "x" / ".." / "run")


def test_no_room_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    run = open_store(str(tmp_path / "run"))
    run.write("model/small", b"1")
    with (tmp_path / "run" / "model" / "huge").open("wb") as file:
        file.truncate(10 << 40)
    with pytest.raises(CapacityError, match=r"needs 10.0 TiB"):
        sync_run(run, tmp_path / "home")
    assert home(tmp_path / "home") == {}
    sync_run(run, tmp_path / "home", exclude=["model/huge"])


# -- following a file -----------------------------------------------------------------------------


def follow(run: Store, path: str, cursor: Cursor) -> tuple[bytes, Cursor]:
    data, after = read_appended(run, path, since=cursor)
    again, same = read_appended(run, path, since=after)
    assert (again, same) == (b"", after)
    return data, after


def test_a_growing_file_is_followed(tmp_path: Path) -> None:
    run, path = open_store(str(tmp_path)), "output/metrics.jsonl"
    data, cursor = follow(run, path, Cursor())
    assert data == b""
    (tmp_path / "output").mkdir()
    for text in ("one\ntw", "o\n", "three\n"):
        with (tmp_path / path).open("a") as file:
            file.write(text)
        data, cursor = follow(run, path, cursor)
        assert data == text.encode()


def test_segments_and_then_the_whole_file_are_followed(run: Store) -> None:
    path, cursor, got = "output/metrics.jsonl", Cursor(), b""
    blocks = [f"line {n}\n".encode() for n in range(12)]
    parts = segments(path, 0, *blocks[:11])
    for n, (name, block) in enumerate(parts.items()):
        run.write(name, block)
        if n in (0, 4, 5):
            data, cursor = follow(run, path, cursor)
            got += data
    run.write(path, b"".join(blocks))
    run.delete(parts)
    data, cursor = follow(run, path, cursor)
    assert got + data == b"".join(blocks)


EVENTS = ["write", "join", "clean one", "clean", "die", "read", "stop inside", "sync"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=st.lists(st.sampled_from(EVENTS), max_size=40), pick=st.randoms(use_true_random=False))
def test_no_order_of_events_repeats_or_loses_bytes(
    events: list[str], pick: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """join: the whole file appears; clean: segments that it holds go; die: the attempt ends, the next one goes on."""
    run, dest = open_store(f"memory://{os.urandom(8).hex()}"), tmp_path_factory.mktemp("home")
    path, sent, whole, names, got, cursor = "output/log", b"", 0, list[str](), b"", Cursor()
    for event in [*events, "read", "join", "clean", "read", "sync"]:
        if event == "write":
            name, block = segment_path(path, len(sent)), b"%d " % len(sent) * pick.randint(1, 5)
            run.write(name, block)
            names, sent = [*names, name], sent + block
        elif event == "join":
            sent += b"torn"
            run.write(path, sent)
            whole = len(sent)
        elif event.startswith("clean"):
            old = [name for name in names if int(name[-12:]) < whole]
            gone = old[:1] if event == "clean one" else old
            run.delete(gone)
            names = [name for name in names if name not in gone]
        elif event == "die":
            assert read_appended(run, path)[0] == sent, "what the next attempt begins with"
        elif event == "sync":
            sync_run(run, dest)
            assert home(dest).get(path, b"") == sent
        else:
            data, after = read_appended(run, path, since=cursor)
            assert got + data == sent
            taken = pick.randint(0, len(data)) if event == "stop inside" else len(data)
            got += data[:taken]
            inside = dataclasses.replace(cursor, offset=cursor.offset + taken)
            cursor = after if taken == len(data) else inside
    assert got == sent


# -- archives, to be unpacked -----------------------------------------------------------------------


def make_tar(path: Path, members: list[tuple[str, bytes | str, bytes]]) -> Path:
    """members: (name, content or the target of a link, tar type)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.mode = 0o4755
            if isinstance(content, str):
                info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


EVIL: dict[str, tuple[str, bytes | str, bytes]] = {
    "up": ("../evil", b"1", tarfile.REGTYPE),
    "up inside": ("a/../../evil", b"1", tarfile.REGTYPE),
    "absolute": ("/tmp/evil", b"1", tarfile.REGTYPE),
    "backslash": ("..\\evil", b"1", tarfile.REGTYPE),
    "link out": ("evil", "../../etc/passwd", tarfile.SYMTYPE),
    "absolute link": ("evil", "/etc/passwd", tarfile.SYMTYPE),
    "hard link out": ("evil", "../outside", tarfile.LNKTYPE),
    "link to a folder": ("evil", "good", tarfile.SYMTYPE),
    "link to itself": ("evil", "evil", tarfile.SYMTYPE),
    "device": ("evil", b"", tarfile.CHRTYPE),
    "pipe": ("evil", b"", tarfile.FIFOTYPE),
    "below a file": ("good/file/evil", b"1", tarfile.REGTYPE),
}


# -- views of what a platform left ----------------------------------------------------------------


def packed(files: dict[str, bytes], *extra: tuple[str, bytes | str, bytes]) -> bytes:
    """A .tar.gz, as SageMaker makes it."""
    with tempfile.TemporaryDirectory() as folder:
        members = [(f"./{name}", content, tarfile.REGTYPE) for name, content in files.items()]
        return make_tar(Path(folder) / "x", [("./", b"", tarfile.DIRTYPE), *members, *extra]).read_bytes()


def left(job: str, name: str) -> str:
    return f"artifacts/{job}/output/{name}"


RUN = {"started.json": b"{}", "output/metrics.jsonl": b"1\n2\n"}
ISOLATED = {
    ".cvlaunch/started.json": b"{}",
    ".cvlaunch/input/config/job.json": b"{}",
    ".cvlaunch/output/result.json": b"{}",
    ".cvlaunch/output/metrics.jsonl": b"1\n2\n3\n",
    ".cvlaunch/nodes/1/output/x": b"n",
    "mine.csv": b"a,b",
}
ISOLATED_AT_HOME = {
    "started.json": b"{}",
    "input/config/job.json": b"{}",
    "output/result.json": b"{}",
    "output/metrics.jsonl": b"1\n2\n3\n",
    "nodes/1/output/x": b"n",
    "output/data/mine.csv": b"a,b",
}
VIEWS: dict[str, tuple[dict[str, bytes], dict[str, bytes]]] = {
    "archives": (
        RUN
        | {
            left("r", "model.tar.gz"): packed({"best.pt": b"b", "deep/x": b"x"}),
            left("r", "output.tar.gz"): packed({"mine.csv": b"a,b"}),
        },
        RUN | {"model/best.pt": b"b", "model/deep/x": b"x", "output/data/mine.csv": b"a,b"},
    ),
    "not packed": (
        RUN | {left("r", "model/best.pt"): b"b", left("r", "data/mine.csv"): b"a,b", left("r", "profiler/x"): b"no"},
        RUN | {"model/best.pt": b"b", "output/data/mine.csv": b"a,b"},
    ),
    "no network": ({left("r", "output.tar.gz"): packed(ISOLATED)}, ISOLATED_AT_HOME),
    "no network, not packed": ({left("r", f"data/{name}"): c for name, c in ISOLATED.items()}, ISOLATED_AT_HOME),
    "the runner's own is the truth": (
        RUN
        | {
            "model/best.pt": b"own",
            left("r", "model.tar.gz"): packed({"best.pt": b"b", "last.pt": b"l"}),
            left("r", "output.tar.gz"): packed({".cvlaunch/output/metrics.jsonl": b"0\n", "x": b"1"}),
        },
        RUN | {"model/best.pt": b"own", "model/last.pt": b"l", "output/data/x": b"1"},
    ),
    "the newest job's": (
        RUN
        | {left(f"r-7{n}", "model.tar.gz"): packed({f"of{n}": b"m"}) for n in ("", "-2", "-9", "-10")}
        | {left(f"r-7{n}", "output.tar.gz"): packed({f"of{n}": b"o"}) for n in ("", "-2")},
        RUN | {"model/of-10": b"m", "output/data/of-2": b"o"},
    ),
    "an empty one": (RUN | {left("r", "model.tar.gz"): packed({})}, RUN),
    "a mirror while it runs": (
        {
            "checkpoints/.cvlaunch/started.json": b"{}",
            "checkpoints/.cvlaunch/owner": b"me",
            "checkpoints/.cvlaunch/segments/output/metrics.jsonl/seg-000000000000": b"1\n",
            "checkpoints/.cvlaunch/segments/output/metrics.jsonl/seg-000000000002": b"2\n",
            "checkpoints/5/complete.json": b"{}",
        },
        RUN | {"checkpoints/5/complete.json": b"{}"},
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_a_platform_left_comes_home_in_the_same_layout(run: Store, tmp_path: Path, name: str) -> None:
    stored, expected = VIEWS[name]
    fill(run, stored)
    report = sync_run(run, tmp_path / "home")
    assert home(tmp_path / "home") == expected
    assert (report.files, report.skipped) == (len(expected), 0)
    again = Counter(run)
    report = sync_run(again, tmp_path / "home")
    assert (report.files, report.skipped, again.fetched) == (0, len(expected), [])
    assert home(tmp_path / "home") == expected


def test_an_archive_is_fetched_again_for_what_changed_or_is_missing(run: Store, tmp_path: Path) -> None:
    dest, model = tmp_path / "home", left("r", "model.tar.gz")
    fill(run, RUN | {model: packed({"a": b"1", "b": b"2"})})
    sync_run(run, dest)
    (dest / "model/a").unlink()
    kept = (dest / "model/b").stat().st_ino
    counted = Counter(run)
    assert sync_run(counted, dest).files == 1
    assert counted.fetched == [model] and (dest / "model/a").read_bytes() == b"1"
    assert (dest / "model/b").stat().st_ino == kept
    time.sleep(0.01)
    run.write(model, packed({"a": b"3", "b": b"2"}))
    sync_run(run, dest)
    assert (dest / "model/a").read_bytes() == b"3"
    run.write(left("r-2", "model.tar.gz"), packed({"a": b"4"}))
    counted = Counter(run)
    sync_run(counted, dest)
    assert counted.fetched == [left("r-2", "model.tar.gz")]
    assert home(dest) == RUN | {"model/a": b"4", "model/b": b"2"}  # nothing local is deleted


def test_include_and_exclude_count_for_what_is_in_an_archive(run: Store, tmp_path: Path) -> None:
    model, output = left("r", "model.tar.gz"), left("r", "output.tar.gz")
    fill(run, RUN | {model: packed({"a.pt": b"1", "b.txt": b"2"}), output: packed({"x": b"3"})})
    wishes: list[tuple[dict[str, list[str]], list[str], list[str]]] = [
        ({"include": ["model"]}, [model], ["model/a.pt", "model/b.txt"]),
        ({"include": ["model/b.txt"]}, [model], ["model/b.txt"]),
        ({"include": ["mod*.pt"]}, [model], ["model/a.pt"]),
        ({"include": ["output/logs", "checkpoints/*"]}, [], []),
        ({"include": ["output"]}, [output, "output/metrics.jsonl"], ["output/data/x", "output/metrics.jsonl"]),
        ({"include": ["model"], "exclude": ["*.pt"]}, [model], ["model/b.txt"]),
        ({"include": ["model", "output/data"], "exclude": ["model/*"]}, [output], ["output/data/x"]),
        ({"include": ["model", "output/data"], "exclude": ["model"]}, [output], ["output/data/x"]),
    ]
    for number, (wish, fetched, files) in enumerate(wishes):
        counted = Counter(run)
        sync_run(counted, tmp_path / str(number), **wish)
        assert (sorted(counted.fetched), sorted(home(tmp_path / str(number)))) == (fetched, files), wish
    assert sync_run(run, tmp_path / "1").files == 4  # what was not wanted before


def _sparse() -> bytes:
    """A file of a pebibyte, of which nothing is there (PAX, GNU.sparse 1.0)."""
    size = 1 << 50
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.0/bomb")
        content = b"1\n%d\n0\n" % size
        info.size = 512
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "bomb"}
        info.pax_headers["GNU.sparse.realsize"] = str(size)
        tar.addfile(info, io.BytesIO(content.ljust(512, b"\0")))
    return data.getvalue()


def _more_than_there_is() -> bytes:
    """A header that says 1 TiB, and nothing behind it."""
    info = tarfile.TarInfo("bomb")
    info.size = 1 << 50
    return gzip.compress(info.tobuf())


EVIL_ARCHIVES: dict[str, Callable[[], bytes]] = {
    **{name: partial(packed, {"good/file": b"1"}, member) for name, member in EVIL.items()},
    "sparse bomb": _sparse,
    "declared bomb": _more_than_there_is,
}


@pytest.mark.parametrize("name", [*EVIL_ARCHIVES, "cut", "text"])
def test_a_bad_archive_holds_nothing_else_up(tmp_path: Path, name: str) -> None:
    run, dest, model = open_store(str(tmp_path / "r")), tmp_path / "home", left("r", "model.tar.gz")
    good = packed({"good/file": b"1", "big": os.urandom(100_000)})
    bad = EVIL_ARCHIVES[name]() if name in EVIL_ARCHIVES else {"cut": good[:50_000], "text": b"text"}[name]
    fill(run, RUN | {model: bad, left("r", "output.tar.gz"): packed({"x": b"3"})})
    with pytest.raises((IntegrityError, CapacityError), match=r"model\.tar\.gz"):
        sync_run(run, dest)
    assert home(dest) == RUN | {"output/data/x": b"3"}
    time.sleep(0.01)
    run.write(model, packed({"good/file": b"1"}))
    assert sync_run(run, dest).files == 1
    assert home(dest) == RUN | {"output/data/x": b"3", "model/good/file": b"1"}


def test_an_unpacking_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    """A file of ours stands where the archive wants a folder; the next sync, without it, brings the rest."""
    run, dest = open_store(str(tmp_path / "r")), tmp_path / "home"
    fill(run, {left("r", "model.tar.gz"): packed({"a": b"1", "b/c": b"2", "d": b"3"})})
    (dest / "model").mkdir(parents=True)
    (dest / "model/b").write_text("mine")
    with pytest.raises(OSError, match="b"):
        sync_run(run, dest)
    assert home(dest) == {"model/a": b"1", "model/b": b"mine"}
    (dest / "model/b").unlink()
    assert sync_run(run, dest).files == 2
    assert home(dest) == {"model/a": b"1", "model/b/c": b"2", "model/d": b"3"}


def test_a_mirror_gives_way_to_the_archive_that_is_newer(tmp_path: Path) -> None:
    """And comes back when the next attempt runs."""
    run, dest = open_store(str(tmp_path / "r")), tmp_path / "home"
    mirror = "checkpoints/.cvlaunch"
    fill(run, {f"{mirror}/segments/output/metrics.jsonl/seg-000000000000": b"1\n"})
    fill(run, {f"{mirror}/{path}": content for path, content in {"started.json": b"{}", "output/x": b"1"}.items()})
    sync_run(run, dest)
    assert home(dest) == {"started.json": b"{}", "output/metrics.jsonl": b"1\n", "output/x": b"1"}
    time.sleep(0.02)
    fill(run, {left("r", "output.tar.gz"): packed(ISOLATED)})
    for fetched in ([left("r", "output.tar.gz")], []):
        counted = Counter(run)
        sync_run(counted, dest)
        assert home(dest) == ISOLATED_AT_HOME | {"output/x": b"1"}
        assert counted.fetched == fetched
    time.sleep(0.02)
    fill(run, {f"{mirror}/output/metrics.jsonl": b"1\n2\n3\n4\n"})
    sync_run(run, dest)
    assert home(dest)["output/metrics.jsonl"] == b"1\n2\n3\n4\n"


def test_many_files_in_an_archive_come_quickly(tmp_path: Path) -> None:
    run, dest = open_store(str(tmp_path / "r")), tmp_path / "home"
    fill(run, {left("r", "model.tar.gz"): packed({f"{n % 100}/{n}": b"%d" % n for n in range(10_000)})})
    since = time.monotonic()
    assert sync_run(run, dest).files == 10_000
    assert time.monotonic() - since < 60  # 2 s on an idle machine
    assert sync_run(run, dest).skipped == 10_000


# -- archives -------------------------------------------------------------------------------------


def test_a_tar_file_unpacks(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str, bytes]] = [
        ("./", b"", tarfile.DIRTYPE),
        ("./model", b"", tarfile.DIRTYPE),
        ("./model/weights.pt", b"www", tarfile.REGTYPE),
        ("model/latest.pt", "weights.pt", tarfile.SYMTYPE),
        ("model/deep/up.pt", "../latest.pt", tarfile.SYMTYPE),
        ("same.pt", "./model/weights.pt", tarfile.LNKTYPE),
    ]
    assert unpack_tar(make_tar(tmp_path / "model.tar.gz", members), tmp_path / "home") == 4
    assert home(tmp_path / "home") == {
        "model/weights.pt": b"www",
        "model/latest.pt": b"www",
        "model/deep/up.pt": b"www",
        "same.pt": b"www",
    }
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_symlink()
        assert not path.stat().st_mode & 0o7000


@pytest.mark.parametrize("name", EVIL)
def test_evil_tar_files_write_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("secret")
    archive = make_tar(tmp_path / "evil.tar.gz", [("good/file", b"1", tarfile.REGTYPE), EVIL[name]])
    with pytest.raises(IntegrityError):
        unpack_tar(archive, tmp_path / "home")
    assert not (tmp_path / "home").exists() or home(tmp_path / "home") == {}
    assert not list(tmp_path.rglob("evil"))


def test_a_damaged_tar_file(tmp_path: Path) -> None:
    good = make_tar(tmp_path / "good.tar.gz", [("a", os.urandom(100_000), tarfile.REGTYPE)])
    (tmp_path / "cut.tar.gz").write_bytes(good.read_bytes()[:50_000])
    (tmp_path / "text.tar.gz").write_text("no archive")
    for name in ("cut", "text"):
        with pytest.raises(IntegrityError, match="fetch it again"):
            unpack_tar(tmp_path / f"{name}.tar.gz", tmp_path / "home")
    assert home(tmp_path / "home") == {} or not (tmp_path / "home").exists()
    with pytest.raises(FileNotFoundError):
        unpack_tar(tmp_path / "missing.tar", tmp_path / "home")
