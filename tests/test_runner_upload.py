"""What leaves, when, in which order, and how often."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from launcher.contract import METRICS, complete_checkpoint
from launcher.errors import AuthError, IntegrityError, SpecError, UnreachableError
from launcher.runner.pulse import Pulse, Rhythm
from launcher.runner.stop import Reason, Stop
from launcher.runner.upload import Pace, Uploader
from launcher.stores import Entry, Store, open_store
from launcher.sync import read_appended, segment_path, sync_run
from tests.runner_world import RunnerWorld, python, until
from tests.s3_fixtures import Bucket

ALL = ("checkpoints", "model", "output")
NOW = Pace(settled_s=0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountingStore:
    """A folder that counts what is put into it, and on demand is away, forgets it at once, or doesn't say it came."""

    def __init__(self, folder: Path) -> None:
        self._store = open_store(str(folder))
        self.puts: list[str] = []
        self.away = self.forget = self.silent = False

    @property
    def uri(self) -> str:
        return self._store.uri

    def _ask(self) -> Store:
        if self.away:
            raise UnreachableError("the store did not answer")
        return self._store

    def head(self, path: str) -> Entry | None:
        return self._ask().head(path)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._ask().list(prefix)

    def read(self, path: str) -> bytes:
        return self._ask().read(path)

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        return self._ask().read_range(path, start, end)

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        if not self.forget:
            self._ask().write(path, data, if_absent=if_absent)
        if self.silent:
            raise UnreachableError("the answer was lost")
        self.puts.append(path)

    def download(self, path: str, to: Path) -> Entry:
        return self._ask().download(path, to)

    def delete(self, paths: Iterable[str]) -> None:
        self._ask().delete(paths)

    def local_path(self, path: str = "") -> Path | None:
        return None

    def check_writable(self) -> None:
        self._ask().check_writable()


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


@pytest.fixture
def ml(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    for name in ("checkpoints", "model", "output/logs"):
        (folder / name).mkdir(parents=True)
    return folder


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def checkpoint(ml: Path, step: int) -> None:
    folder = ml / "checkpoints" / str(step)
    folder.mkdir()
    (folder / "weights").write_text(f"step {step}")
    (folder / "a-state").write_text("x")
    complete_checkpoint(folder)


def test_segments_are_whole_lines_and_are_joined_at_the_end(ml: Path, store: CountingStore) -> None:
    uploader = Uploader(ml, store, ALL, pace=NOW)
    append(ml / METRICS, "one\ntwo\nthr")
    append(ml / "output/logs/attempt-1.node-0.log", "line\n")
    uploader.round()
    assert store.read("segments/output/metrics.jsonl/seg-000000000000") == b"one\ntwo\n"
    uploader.round()
    append(ml / METRICS, "ee\nfour")
    uploader.round()
    assert store.read("segments/output/metrics.jsonl/seg-000000000008") == b"three\n"
    assert store.puts == [
        "segments/output/logs/attempt-1.node-0.log/seg-000000000000",
        "segments/output/metrics.jsonl/seg-000000000000",
        "segments/output/metrics.jsonl/seg-000000000008",
    ]
    assert uploader.send_all()
    assert store.read(METRICS) == b"one\ntwo\nthree\nfour" and not list(store.list("segments"))


def test_segments_go_on_after_an_earlier_attempt(ml: Path, store: CountingStore) -> None:
    append(ml / METRICS, "one\n")
    Uploader(ml, store, ALL).round()
    append(ml / METRICS, "two\n")
    Uploader(ml, store, ALL, restored={METRICS: 4}).round()
    assert store.read("segments/output/metrics.jsonl/seg-000000000004") == b"two\n"


def test_segment_that_arrived_unnoticed_stays_as_it_is(ml: Path, store: CountingStore) -> None:
    """A follower has it already, and goes on where it ends."""
    uploader = Uploader(ml, store, ALL)
    append(ml / METRICS, "one\n")
    store.silent = True
    uploader.guarded_round()
    store.silent = False
    data, cursor = read_appended(store, METRICS)
    append(ml / METRICS, "two\n")
    uploader.guarded_round()
    assert (data, read_appended(store, METRICS, since=cursor)[0]) == (b"one\n", b"two\n")


def test_file_that_somebody_cut_sends_no_segment_more(ml: Path, store: CountingStore) -> None:
    uploader = Uploader(ml, store, ALL)
    append(ml / METRICS, "one\ntwo\n")
    uploader.round()
    (ml / METRICS).write_text("new\n")
    uploader.round()
    append(ml / METRICS, "and\nlonger\n")
    uploader.round()
    assert len(store.puts) == 1 and uploader.send_all()
    assert store.read(METRICS) == b"new\nand\nlonger\n"


def test_checkpoints_leave_complete_newest_first_and_old_ones_go(ml: Path, store: CountingStore) -> None:
    uploader = Uploader(ml, store, ALL)
    for step in (9, 10):
        checkpoint(ml, step)
    (ml / "checkpoints/11").mkdir()
    (ml / "checkpoints/11/weights").write_text("not yet complete")
    uploader.round()
    assert store.puts == [f"checkpoints/{s}/{f}" for s in (10, 9) for f in ("a-state", "weights", "complete.json")]
    shutil.rmtree(ml / "checkpoints/9")
    shutil.rmtree(ml / "checkpoints/10")
    uploader.round()
    assert {e.path.split("/")[1] for e in store.list("checkpoints")} == {"10"}, "the newest one stays"
    complete_checkpoint(ml / "checkpoints/11")
    uploader.round()
    assert {e.path.split("/")[1] for e in store.list("checkpoints")} == {"11"}


def test_at_the_end_the_newest_checkpoint_is_first_and_changed_files_leave_again(
    ml: Path, store: CountingStore
) -> None:
    (ml / "model/best.pt").write_text("v1")
    (ml / "model/.best.pt.4711-aa.part").write_text("half")
    uploader = Uploader(ml, store, ALL, pace=NOW)
    uploader.round()
    (ml / "model/best.pt").write_text("version 2")
    uploader.round()
    assert store.puts == ["model/best.pt"] and store.read("model/best.pt") == b"v1", "nothing is overwritten in mid-run"
    append(ml / METRICS, "one\n")
    (ml / "output/failure").write_text("why")
    for step in (1, 2):
        checkpoint(ml, step)
    store.puts.clear()
    assert uploader.send_all()
    assert store.puts[:3] == ["checkpoints/2/a-state", "checkpoints/2/weights", "checkpoints/2/complete.json"]
    assert store.puts[3:6] == [METRICS, "model/best.pt", "output/failure"]
    assert store.puts[6] == "checkpoints/1/a-state" and store.read("model/best.pt") == b"version 2"


def test_file_that_is_being_written_waits(ml: Path, store: CountingStore) -> None:
    uploader = Uploader(ml, store, ALL, pace=Pace(settled_s=600))
    (ml / "model/best.pt").write_text("x")
    uploader.round()
    assert not store.puts
    os.utime(ml / "model/best.pt", (0, 0))
    uploader.round()
    assert store.puts == ["model/best.pt"]


def test_only_what_the_runner_moves(ml: Path, store: CountingStore) -> None:
    checkpoint(ml, 1)
    (ml / "model/best.pt").write_text("x")
    append(ml / METRICS, "one\n")
    uploader = Uploader(ml, store, ["output"], where="nodes/1/", pace=NOW)
    uploader.round()
    assert store.puts == ["segments/nodes/1/output/metrics.jsonl/seg-000000000000"]
    assert uploader.send_all() and store.puts[1:] == ["nodes/1/output/metrics.jsonl"]


def test_node_joins_what_its_own_dead_attempts_left(ml: Path, store: CountingStore) -> None:
    logs = "output/logs/attempt-1.node-{}.log"
    mine, other = f"nodes/1/{logs.format(1)}", logs.format(0)
    for path in (mine, other):
        store.write(segment_path(path, 0), b"one\n")
        store.write(segment_path(path, 4), b"two\n")
    assert Uploader(ml, store, ["output"], where="nodes/1/").send_all()
    assert store.read(mine) == b"one\ntwo\n" and [e.path for e in store.list()] == [
        mine,
        segment_path(other, 0),
        segment_path(other, 4),
    ]


@pytest.mark.parametrize(("watched", "fewest", "most"), [(False, 2400, 3000), (True, 2880, 6000)])
def test_puts_of_a_day(ml: Path, store: CountingStore, watched: bool, fewest: int, most: int) -> None:
    """A job that writes all the time; heartbeats are counted too."""
    clock = Clock()
    uploader = Uploader(ml, store, ALL, watched=lambda: watched, clock=clock, pace=NOW)
    pulse = Pulse(store, Stop(), dict, rhythm=Rhythm(), clock=clock)
    store.forget = True
    for _ in range(86400 // 30):
        clock.now += 30
        append(ml / METRICS, "a line\n")
        uploader.round()
        pulse.tick()
    assert fewest <= len(store.puts) <= most


def test_store_that_is_away_is_said_once(ml: Path, store: CountingStore) -> None:
    said: list[str] = []
    uploader = Uploader(ml, store, ALL, say=said.append)
    append(ml / METRICS, "one\n")
    store.away = True
    for _ in range(5):
        uploader.guarded_round()
    assert len(said) == 1 and "did not answer" in said[0]
    store.away = False
    append(ml / METRICS, "two\n")
    uploader.guarded_round()
    assert read_appended(store, METRICS)[0] == b"one\ntwo\n" and len(said) == 2


def test_upload_that_is_given_up_is_not_complete(ml: Path, store: CountingStore) -> None:
    append(ml / METRICS, "one\n")
    store.away = True
    uploader = Uploader(ml, store, ALL, pace=Pace(quick_s=0.01))
    uploader.start()
    uploader.finish()
    assert not uploader.done.wait(0.3)
    uploader.give_up()
    assert uploader.done.wait(60) and not uploader.complete


ODD_NAMES = {"backslash": b"a\\b.png", "control": b"a\x07.png", "not UTF-8": b"a\xff.png", "unreadable": b"a.png"}


def odd_file(folder: Path, kind: str) -> None:
    """unreadable: Linux lets nobody read that one, not even root."""
    folder.mkdir()
    path = os.fsencode(folder) + b"/" + ODD_NAMES[kind]
    if kind == "unreadable":
        Path(os.fsdecode(path)).symlink_to("/proc/sys/vm/compact_memory")
    else:
        os.close(os.open(path, os.O_CREAT))


@pytest.mark.needs("linux")
@pytest.mark.parametrize("kind", ODD_NAMES)
def test_odd_file_holds_up_nothing(ml: Path, store: CountingStore, kind: str) -> None:
    said: list[str] = []
    (ml / "model/best.pt").write_text("x")
    odd_file(ml / "output/odd", kind)
    (ml / "output/z.txt").write_text("after it")
    (ml / "checkpoints/²").mkdir()
    checkpoint(ml, 3)
    complete_checkpoint(ml / "checkpoints/²")
    uploader = Uploader(ml, store, ALL, say=said.append, pace=NOW)
    uploader.guarded_round()
    uploader.guarded_round()
    assert store.puts[-2:] == ["model/best.pt", "output/z.txt"] and len(said) == 1 and "not uploaded" in said[0]
    append(ml / METRICS, "one\n")
    uploader.start()
    uploader.finish()
    assert uploader.done.wait(60) and not uploader.complete and len(said) == 1
    assert store.read(METRICS) == b"one\n"
    shutil.rmtree(ml / "output/odd")
    assert uploader.send_all(), "what is gone is not missing"


def test_checkpoint_with_an_odd_file_holds_up_nothing(ml: Path, store: CountingStore) -> None:
    checkpoint(ml, 1)
    checkpoint(ml, 2)
    (ml / "checkpoints/2/o\\dd").write_text("x")
    complete_checkpoint(ml / "checkpoints/2")
    uploader = Uploader(ml, store, ALL)
    uploader.guarded_round()
    assert {path.split("/")[1] for path in store.puts} == {"1"}, "no half of the other"
    assert not uploader.send_all()


class PickyStore(CountingStore):
    """Fails for one path, whatever the reason."""

    def __init__(self, folder: Path, path: str, error: Exception) -> None:
        super().__init__(folder)
        self.path, self.error, self.asked = path, error, 0

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        if path == self.path:
            self.asked += 1
            raise self.error
        super().write(path, data, if_absent=if_absent)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (UnreachableError("no answer"), True),
        (RuntimeError("a bug of a library"), True),
        (AuthError("expired"), True),
        (SpecError("refused"), False),
        (IntegrityError("no such path"), False),
        (OSError("odd"), False),
    ],
)
def test_one_file_that_is_refused(ml: Path, tmp_path: Path, error: Exception, again: bool) -> None:
    """The others leave; it is asked for again where that can help, and no longer than patience lasts."""
    store = PickyStore(tmp_path / "store", "model/a.pt", error)
    for name in ("model/a.pt", "model/b.pt", "output/c.txt"):
        (ml / name).write_text("x")
    uploader = Uploader(ml, store, ALL)
    uploader.start()
    uploader.finish()
    until(lambda: uploader.done.is_set() or store.asked > 1)
    assert uploader.done.is_set() is not again
    assert store.puts == ["model/b.pt", "output/c.txt"]
    uploader.give_up()
    assert uploader.done.wait(60) and not uploader.complete and (store.asked > 1) is again


def test_upload_that_breaks_ends(ml: Path, store: CountingStore) -> None:
    """Nobody waits for a thread that is gone."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise RuntimeError("a bug")

    uploader = Uploader(ml, store, ALL, say=say)
    append(ml / METRICS, "one\n")
    store.away = True
    uploader.start()
    uploader.finish()
    assert uploader.done.wait(60) and not uploader.complete and "a bug" in said[1]


# -- the pulse --------------------------------------------------------------------------------------------------------


def test_pulse_beats_and_hears(store: CountingStore) -> None:
    clock, stop = Clock(), Stop()
    pulse = Pulse(store, stop, lambda: {"phase": "running"}, rhythm=Rhythm(), clock=clock)
    for _ in range(120):  # ten minutes, quick
        pulse.tick()
        clock.now += 5
    assert len(store.puts) == 20 and not pulse.quick
    assert json.loads(store.read("heartbeat")) == {"time": 1570.0, "phase": "running"}
    store.away = True
    pulse.tick()
    store.away = False
    store.write("control/watch", b"")
    os.utime(store._store.local_path("control/watch"), (clock.now - 50, clock.now - 50))
    pulse.tick()
    assert pulse.watched and pulse.quick
    clock.now += 30
    assert not pulse.watched, "the mark is 80 s old"
    os.utime(store._store.local_path("control/watch"), (5, 5))  # renewed, by a store whose clock is wrong
    pulse.tick()
    assert pulse.watched and stop.reason is None
    store.write("control/cancel", b"")
    pulse.tick()
    assert stop.reason is Reason.CANCELLED


def test_no_beat_comes_after_the_last(store: CountingStore) -> None:
    """A beat that a slow store held up would say of an ended run that it goes on."""
    phase, held, go_on = ["running"], threading.Event(), threading.Event()

    def facts() -> dict[str, str]:
        said = {"phase": phase[0]}
        if threading.current_thread() is not threading.main_thread():
            held.set()
            assert go_on.wait(60)
        return said

    pulse = Pulse(store, Stop(), facts, rhythm=Rhythm(look_quick_s=0.01))
    pulse.start()
    assert held.wait(60)
    threading.Timer(0.3, go_on.set).start()
    pulse.end()
    phase[0] = "ended"
    pulse.beat()
    time.sleep(0.5)
    assert json.loads(store.read("heartbeat"))["phase"] == "ended"


# -- whole runs -------------------------------------------------------------------------------------------------------

PROGRAM = """
metrics(1, accuracy=0.5)
checkpoint(1)
ready()
wait()
metrics(2, accuracy=0.75)
(ml.model / "best.pt").write_text("the model")
"""


def test_run_with_a_root_of_its_own(tmp_path: Path) -> None:
    world = RunnerWorld(tmp_path, in_place=False)
    ended = world.end(world.job(python("wait = lambda: None" + PROGRAM)))
    assert ended.code == 0
    assert world.result["upload"] == "complete" and world.result["metrics"] == {"val/accuracy": 0.75}
    there = {path.relative_to(world.run).as_posix() for path in world.run.rglob("*") if path.is_file()}
    assert there == {
        "checkpoints/1/complete.json",
        "checkpoints/1/weights",
        "input/config/job.json",
        "heartbeat",
        "model/best.pt",
        "output/environment.json",
        "output/logs/attempt-1.node-0.log",
        "output/metrics.jsonl",
        "output/result.json",
        "owner",
        "owner-1",
        "started.json",
    }


def test_second_node_writes_below_its_number_only(tmp_path: Path) -> None:
    world = RunnerWorld(tmp_path, in_place=False, name="1")
    env = {"CVLAUNCH_NODE_RANK": "1", "CVLAUNCH_NODES": "2", "CVLAUNCH_MASTER": "127.0.0.1"}
    assert world.end(world.job(("true",), nodes=2), env=env).code == 0
    there = {path.relative_to(world.run).parts[:2] for path in world.run.rglob("*") if path.is_file()}
    assert there == {("nodes", "1")}
    assert json.loads(world.read("nodes/1/output/result.json"))["state"] == "SUCCEEDED"
    assert "node 1 of 2" in world.read("nodes/1/output/logs/attempt-1.node-1.log")


def test_on_s3(tmp_path: Path, moto_bucket: Bucket) -> None:
    """Segments while it runs, joined at the end, brought home by sync; a second submission finds the owner."""
    world = RunnerWorld(tmp_path, in_place=False, output=f"{moto_bucket.uri}/runs")
    wait = "def wait():\n    while not (ml.root / 'go').exists(): time.sleep(0.05)"
    job = world.job(python(wait + PROGRAM), storage=moto_bucket.server.options.to_mapping())
    first = world.start(job, env={"CVLAUNCH_NATIVE_ID": "1"}).printed("ready")
    store = moto_bucket.store()
    twice = world.end(job, env={"CVLAUNCH_NATIVE_ID": "2"})
    assert twice.code == 0 and "submitted twice" in twice.output
    until(lambda: store.head("segments/output/metrics.jsonl/seg-000000000000"))
    (world.root / "go").touch()
    assert first.end().code == 0
    assert not list(store.list("segments"))
    results = tmp_path / "results"
    sync_run(store, results)
    assert (results / "model/best.pt").read_text() == "the model"
    assert len((results / METRICS).read_text().splitlines()) == 2
    assert json.loads((results / "output/result.json").read_text())["upload"] == "complete"


def test_stop_while_the_store_is_gone_ends_within_the_grace(tmp_path: Path, moto_bucket: Bucket) -> None:
    """The bucket vanishes in mid-run: the training goes on, and at the end the upload is given up in time."""
    world = RunnerWorld(tmp_path, in_place=False, output=f"{moto_bucket.uri}/runs")
    program = (
        "signal.signal(signal.SIGTERM, lambda *_: (leave(75), sys.exit(75))); checkpoint(1); ready(); time.sleep(60)"
    )
    job = world.job(python(program), storage=moto_bucket.server.options.to_mapping(), grace_s=30)
    running = world.start(job).printed("ready")
    client = moto_bucket.server.client()
    for entry in client.list_objects_v2(Bucket=moto_bucket.name)["Contents"]:
        client.delete_object(Bucket=moto_bucket.name, Key=entry["Key"])
    client.delete_bucket(Bucket=moto_bucket.name)
    ended = running.signal().end()
    assert ended.code == 75 and ended.seconds < 30 and "the upload is incomplete" in ended.output
    assert json.loads((world.root / "output/result.json").read_text())["upload"] == "incomplete"
