"""The ledger: a file a run, durable, shared by processes; the index only makes it faster."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import ConflictError, SpecError
from launcher.ledger import Ledger, RunRecord, new_run_id, valid_run_id
from launcher.process import ProcessId
from launcher.status import State, Status

SPAWN = multiprocessing.get_context("spawn")
"""A fork of a process with threads may hang: servers of other tests run in this one."""


def record(run_id: str, **changes: object) -> RunRecord:
    facts = {
        "run_id": run_id,
        "name": "digits",
        "created": 1_763_000_000.0,
        "state": State.RUNNING,
        "backend": "local",
        "target_name": "local",
        "target": {},
        "output": "file:///out",
        "owner": ProcessId.of().to_json(),
        "plan": {"job_digest": "d" * 64},
        "handle": f"local://local/{run_id}",
    }
    return RunRecord(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "runs", tmp_path / "cache")


def test_a_run_is_kept_and_found(ledger: Ledger) -> None:
    ledger.create(record("digits-aaaaaaaaaa"))
    ledger.create(record("digits-bbbbbbbbbb", created=1_763_000_001.0))
    assert ledger.find("digits-a").run_id == "digits-aaaaaaaaaa"
    assert ledger.find("local://local/digits-bbbbbbbbbb").run_id == "digits-bbbbbbbbbb"
    assert [r.run_id for r in ledger.all()] == ["digits-bbbbbbbbbb", "digits-aaaaaaaaaa"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("digits-", "fits 2 runs"),
        ("digits-c", "there is no run"),
        ("../../etc/passwd", "is not a run"),
        ("local://local/other", "no run has the handle"),
        ("", "is not a run"),
    ],
)
def test_what_is_no_run_is_told(ledger: Ledger, text: str, says: str) -> None:
    ledger.create(record("digits-aaaaaaaaaa"))
    ledger.create(record("digits-bbbbbbbbbb"))
    with pytest.raises(SpecError, match=says):
        ledger.find(text)


def test_a_run_id_is_taken_once(ledger: Ledger) -> None:
    ledger.create(record("digits-aaaaaaaaaa", name="first"))
    with pytest.raises(ConflictError):
        ledger.create(record("digits-aaaaaaaaaa", name="second"))
    assert ledger.get("digits-aaaaaaaaaa").name == "first"


def test_an_end_stays_an_end_but_lost_may_be_revised(ledger: Ledger) -> None:
    ledger.create(record("digits-aaaaaaaaaa"))
    ledger.record_status("digits-aaaaaaaaaa", Status(State.LOST, "gone"), attempt=1)
    ledger.record_status("digits-aaaaaaaaaa", Status(State.SUCCEEDED, "exited 0", exit_code=0), attempt=1)
    ledger.record_status("digits-aaaaaaaaaa", Status(State.UNKNOWN, "gone"), attempt=1)
    assert ledger.get("digits-aaaaaaaaaa").last_status == Status(State.SUCCEEDED, "exited 0", exit_code=0)


def test_the_index_follows_the_files_and_can_be_lost(ledger: Ledger, tmp_path: Path) -> None:
    for letter in "abc":
        ledger.create(record(f"digits-{letter * 10}"))
    assert len(ledger.summaries()) == 3
    ledger.update("digits-aaaaaaaaaa", state=State.FAILED, status={"reason": "why"})
    ledger.delete("digits-bbbbbbbbbb")
    expected = {("digits-aaaaaaaaaa", State.FAILED, "why"), ("digits-cccccccccc", State.RUNNING, "")}
    assert {(s.run_id, s.state, s.reason) for s in ledger.summaries()} == expected
    (index,) = (tmp_path / "cache").iterdir()
    for damage in (b"not a database", b"SQLite format 3\0" + b"x" * 4096):
        index.write_bytes(damage)
        assert {(s.run_id, s.state, s.reason) for s in ledger.summaries()} == expected
        assert index.read_bytes() != damage
    assert Ledger(ledger.folder, Path("/proc/no-such-place")).summaries() == ledger.summaries()


def test_a_damaged_file_hides_no_other(ledger: Ledger) -> None:
    ledger.create(record("digits-aaaaaaaaaa"))
    (ledger.folder / "digits-bbbbbbbbbb.json").write_text("{")
    assert [r.run_id for r in ledger.all()] == ["digits-aaaaaaaaaa"]
    assert [s.run_id for s in ledger.summaries()] == ["digits-aaaaaaaaaa"]


def _add_tags(folder: Path, number: int) -> None:
    ledger = Ledger(folder)
    for i in range(25):
        name = f"digits-{number}{i:09}"
        ledger.create(record(name))
        ledger.update("digits-shared0000", **{("name", "synced", "output", "target_name")[number]: f"{number}-{i}"})


def test_processes_share_it(ledger: Ledger) -> None:
    ledger.create(record("digits-shared0000"))
    processes = [SPAWN.Process(target=_add_tags, args=(ledger.folder, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(ledger.ids()) == 101
    shared = ledger.get("digits-shared0000")
    assert (shared.name, shared.synced, shared.output, shared.target_name) == ("0-24", "1-24", "2-24", "3-24")


@pytest.mark.parametrize("state", [State.PREPARING, State.SENDING, State.CANCELLED, State.NOT_SUBMITTED])
def test_an_older_look_changes_neither_a_submission_nor_an_end(ledger: Ledger, state: State) -> None:
    ledger.create(record("digits-aaaaaaaaaa", state=state))
    ledger.record_status("digits-aaaaaaaaaa", Status(State.FAILED, "exited 1"), attempt=1)
    assert ledger.get("digits-aaaaaaaaaa").state is state


def test_an_earlier_attempt_says_nothing_of_a_later_one(ledger: Ledger) -> None:
    ledger.create(record("digits-aaaaaaaaaa", attempt=2))
    ledger.record_status("digits-aaaaaaaaaa", Status(State.FAILED, "exited 1"), attempt=1)
    assert ledger.get("digits-aaaaaaaaaa").state is State.RUNNING


def test_a_change_that_came_too_late_is_not_made(ledger: Ledger) -> None:
    ledger.create(record("digits-aaaaaaaaaa", state=State.LOST))
    kept = ledger.update("digits-aaaaaaaaaa", only_if=lambda now: now.state is State.RUNNING, name="other")
    assert (kept.name, ledger.get("digits-aaaaaaaaaa").name) == ("digits", "digits")


def _hold_the_lock(ledger: Ledger, holding: Event) -> None:
    with ledger._lock("digits-aaaaaaaaaa"):
        holding.set()
        time.sleep(60)


def test_a_dead_process_s_lock_is_free(ledger: Ledger) -> None:
    ledger.create(record("digits-aaaaaaaaaa"))
    holding = SPAWN.Event()
    holder = SPAWN.Process(target=_hold_the_lock, args=(ledger, holding))
    holder.start()
    assert holding.wait(120)
    holder.kill()
    holder.join()
    assert ledger.update("digits-aaaaaaaaaa", name="other").name == "other"


def test_an_owner_that_is_gone_owns_nothing(ledger: Ledger) -> None:
    me = ProcessId.of().to_json()
    foreign = {**me, "host": "login-7", "boot": "another-boot"}
    now = time.time()
    assert record("a", owner=me).owner_alive
    assert not record("a", owner={}).owner_alive
    assert not record("a", owner={**me, "start": 1}).owner_alive
    assert record("a", owner=foreign, updated=now).owner_alive
    assert not record("a", owner=foreign, updated=now - 7200).owner_alive


@given(st.text(max_size=60), st.floats(1_600_000_000, 2_800_000_000), st.integers(0, 2**13 - 1))
def test_run_ids_fit_every_platform(name: str, now: float, randomness: int) -> None:
    run_id = new_run_id(name, now=now, randomness=randomness)
    assert valid_run_id(run_id) == run_id
    assert len(run_id) <= 35


def test_run_ids_sort_by_time() -> None:
    ids = [new_run_id("digits", now=1_763_000_000 + i / 10, randomness=8191 - i) for i in range(1000)]
    assert ids == sorted(ids)


@pytest.mark.parametrize("text", ["", "Upper", "1digit", "a_b", "a--b", "a-", "-a", "a.b", "a" * 40, "é"])
def test_what_no_platform_takes_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="not a run id"):
        valid_run_id(text)
