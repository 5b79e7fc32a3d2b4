"""Asking about many runs: one that can't be asked hides no other, and what ends as LOST was missed for long enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import Run, State
from launcher.errors import SpecError, UnreachableError
from launcher.ledger import Ledger
from launcher.run import refresh
from launcher.testing.conformance import job, ledger, run_job
from tests.worlds.local import LocalWorld

__all__ = ["job", "ledger", "run_job"]


@pytest.fixture
def world(tmp_path: Path) -> LocalWorld:
    return LocalWorld(tmp_path / "world")


def test_one_that_can_t_be_asked_hides_no_other(run_job: Callable[..., Run], ledger: Ledger) -> None:
    good, gone, broken, foreign = (run_job(f"print({i})") for i in range(4))
    records = ledger.all()
    ledger.delete(gone.id)
    ledger.update(broken.id, target={"backend": "local", "root": "not/absolute"})
    ledger.update(foreign.id, backend="no-such-plug-in")
    told = refresh(records, ledger=ledger)
    assert len(told) == 2
    assert any("no-such-plug-in" in str(why) for _, why in told)
    assert good.wait(timeout=60).state is State.SUCCEEDED
    for run_id in (broken.id, foreign.id):
        ledger.update(run_id, state=State.CANCELLED)


def test_a_target_of_another_version_is_still_understood(run_job: Callable[..., Run], ledger: Ledger) -> None:
    run = run_job("print(1)")
    later = {**run.record.target, "key_of_later": 1, "storage": {"endpoint": None, "other_key_of_later": 2}}
    ledger.update(run.id, target=later)
    assert Run(run.id, ledger).wait(timeout=60).state is State.SUCCEEDED


def test_silence_is_said(run_job: Callable[..., Run], ledger: Ledger) -> None:
    run = run_job("print(1)")
    ledger.update(run.id, target={"backend": "local", "root": "not/absolute"})
    with pytest.raises(UnreachableError, match="could not be asked"):
        run.status()
    ledger.update(run.id, state=State.CANCELLED)


def test_a_removed_run_can_be_removed_no_more_and_its_folder_may_be_gone(
    run_job: Callable[..., Run], ledger: Ledger
) -> None:
    run = run_job("print(1)")
    run.wait(timeout=60)
    folder = run.store().local_path()
    assert folder is not None
    (folder / ".left-over.part").touch()
    run.remove(remote=True)
    assert not folder.exists()
    with pytest.raises(SpecError, match="there is no run"):
        Run(run.id, ledger)
    other = run_job("print(1)")
    other.wait(timeout=60)
    other.remove()
    assert other.id not in ledger.ids()
