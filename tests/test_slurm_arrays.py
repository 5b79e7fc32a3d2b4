"""Sweeps as job arrays on a real cluster: few calls, counted at the wire, and every element a run of its own."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import Run, State, submit, submit_many
from launcher.backends.slurm import SlurmBackend
from launcher.errors import CapacityError, ConflictError, UnreachableError
from launcher.ledger import Ledger
from launcher.run import refresh
from launcher.submission import backend_of, prepare
from launcher.testing.conformance import job, ledger, text_of, until
from tests.services.slurm import NODES, SlurmCluster
from tests.worlds.slurm import SlurmWorld

__all__ = ["job", "ledger"]

pytestmark = pytest.mark.needs("slurm")

LARGEST = 301
"""Elements of an array: MaxArraySize of the test cluster."""
TOKEN = "canary-of-the-arrays"

ELEMENT = """
    import os, sys, time
    from launcher.contract import Layout, complete_checkpoint, newest_checkpoint
    name, layout = os.environ["NAME"], Layout.from_environment()
    newest = newest_checkpoint(layout.checkpoints)
    long = name == "long" and newest is None
    if long:
        step = layout.checkpoints / "1"
        step.mkdir(parents=True)
        complete_checkpoint(step, step=1)
    print("I am", name, "from", newest.name if newest else None, len(os.environ.get("TOKEN", "")), flush=True)
    if name == "fails":
        sys.exit(3)
    time.sleep(600 if long else 0)
"""


class Wire:
    """Programs of SLURM in front of the real ones, which write down how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue", "scontrol", "sacct", "scancel"):
            self.write(name, "")

    def write(self, name: str, more: str) -> None:
        """more: bash, before the real one is run; `real` is its path."""
        real, log = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin"), shlex.quote(f"{self.folder}/{name}.log")
        script = self.folder / name
        script.write_text(f'#!/bin/bash\nreal={real}\necho "$*" >> {log}\n{more}\nexec "$real" "$@"\n')
        script.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        log = self.folder / f"{name}.log"
        return log.read_text().splitlines() if log.exists() else []

    def forget(self) -> None:
        for log in self.folder.glob("*.log"):
            log.unlink()


@pytest.fixture
def wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire(tmp_path / "wire")
    monkeypatch.setenv("PATH", str(wire.folder), prepend=":")
    return wire


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, slurm: SlurmCluster) -> SlurmWorld:
    return SlurmWorld(tmp_path / "world", slurm, sbatch=["--mem=50"], **getattr(request, "param", {}))


@pytest.fixture
def waiting(slurm: SlurmCluster) -> None:
    """Nothing starts."""
    for node in NODES:
        slurm.drain(node)


@pytest.fixture
def secret(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return {"secrets": {"TOKEN": f"file:{file}"}}


Sweep = Callable[..., list[Run]]


@pytest.fixture
def sweep(job: Callable[..., Path], ledger: Ledger, world: SlurmWorld) -> Sweep:
    def send(names: list[str], *settings: str, script: str = ELEMENT, **keys: Any) -> list[Run]:
        """A run for each name, in its variable NAME."""
        path = job(script, **keys)
        each = [[*world.settings, *settings, f"env.NAME={name}"] for name in names]
        return submit_many(path, each, target="world", ledger=ledger)

    return send


def records(world: SlurmWorld) -> Path:
    return Path(world.target["root"]) / "jobs"


def backend_for(world: SlurmWorld) -> SlurmBackend:
    return SlurmBackend(SlurmBackend.Target.model_validate(dict(world.target)), "world")


def states(ledger: Ledger) -> Counter[State]:
    return Counter(record.state for record in ledger.all())


def native(run: Run) -> str:
    assert run.handle is not None
    return run.handle.native.partition(".")[0]


def arrays(runs: list[Run]) -> Counter[str]:
    return Counter(native(run).partition("_")[0] for run in runs)


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_text(errors="replace")]


# -- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("world", [{"array_limit": 8}], indirect=True, ids=["limit"])
def test_a_thousand(
    sweep: Sweep, ledger: Ledger, world: SlurmWorld, wire: Wire, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    runs = sweep([f"n{number}" for number in range(1000)], **secret)
    assert len(wire.calls("sbatch")) == math.ceil(1000 / LARGEST)
    assert sorted(call.split("--array=")[1] for call in wire.calls("sbatch")) == ["0-300%8"] * 3 + ["0-96%8"]
    assert sorted(arrays(runs).values()) == [97, LARGEST, LARGEST, LARGEST]
    assert TOKEN not in str(wire.calls("sbatch"))

    wire.forget()
    assert refresh(ledger.all(), ledger=ledger) == []
    assert states(ledger) == {State.QUEUED: 1000}
    assert {name: len(wire.calls(name)) for name in ("squeue", "scontrol", "sacct")} == {
        "squeue": 1, "scontrol": 0, "sacct": 0,
    }  # fmt: skip
    found = backend_for(world).find([run.id for run in runs])
    assert found == {run.id: run.handle for run in runs}
    assert len(wire.calls("squeue")) == 1  # the records know

    # one cancelled by us, one behind our back, of which SLURM itself keeps no trace
    assert runs[500].cancel().state is State.CANCELLED
    slurm.run("scancel", native(runs[501]))
    assert runs[501].status().state is State.CANCELLED
    assert runs[502].status().state is State.QUEUED
    assert {path.parent.name for path in files_with(records(world), TOKEN)} == {
        run.id for number, run in enumerate(runs) if number not in (500, 501)
    }

    slurm.run("scancel", "--user=root")
    wire.forget()
    assert refresh(ledger.all(), ledger=ledger) == []
    assert states(ledger) == {State.CANCELLED: 1000}
    assert {name: len(wire.calls(name)) for name in ("squeue", "scontrol", "sacct")} == {
        "squeue": 1, "scontrol": 4, "sacct": 1,
    }  # fmt: skip
    assert files_with(Path(world.target["root"]), TOKEN) == []


@pytest.mark.usefixtures("waiting")
def test_many_ends_are_told_in_a_few_calls(
    sweep: Sweep, ledger: Ledger, world: SlurmWorld, wire: Wire, slurm: SlurmCluster
) -> None:
    """With the words that their scripts would leave, for nobody has time for hundreds of real ones."""
    runs = sweep([f"n{number}" for number in range(300)])
    for number, run in enumerate(runs):
        record, job = records(world) / run.id, native(run)
        code = number % 2
        (record / f"begun-{job}").touch()
        (record / f"status-{job}.json").write_text(
            f'{{"job": "{job}", "start": 1, "code": {code}, "signal": 0, "ended": 1, "node": "n", "slurm": "", '
            '"requeued": false}\n'
        )
        (record / f"slurm-{job}.out").write_text("a\ncvlaunch: it was too much\n\n")
    slurm.run("scancel", "--user=root")
    wire.forget()
    refresh(ledger.all(), ledger=ledger)
    assert sum(len(wire.calls(name)) for name in ("squeue", "scontrol", "sacct")) <= 3
    assert states(ledger) == {State.SUCCEEDED: 150, State.FAILED: 150}
    assert Run(runs[1].id, ledger).record.status["reason"] == "it was too much"


# -- each a run of its own --------------------------------------------------------------------------------------------


def test_elements_are_runs_of_their_own(
    sweep: Sweep, ledger: Ledger, world: SlurmWorld, slurm: SlurmCluster, wire: Wire, secret: dict[str, Any]
) -> None:
    slurm.drain("node2")
    good, bad, long = runs = sweep(["good", "fails", "long"], **secret)
    assert len(arrays(runs)) == 1
    until(lambda: "I am long from None" in text_of(long), world)
    assert good.wait(timeout=240).state is State.SUCCEEDED
    failed = bad.wait(timeout=240)
    assert (failed.state, failed.exit_code) == (State.FAILED, 3)
    for run, name in zip(runs, ["good", "fails", "long"], strict=True):
        assert f"I am {name} from None {len(TOKEN)}" in text_of(run)
    slurm.resume("node2")
    assert long.handle is not None
    world.preempt(long.handle)
    ended = long.wait(timeout=world.patience)
    assert (ended.state, ended.attempt) == (State.SUCCEEDED, 2)
    assert f"I am long from 1 {len(TOKEN)}" in text_of(long)
    assert files_with(Path(world.target["root"]), TOKEN) == []
    for run in runs:
        run.sync(records(world).parent / "synced")
        assert (records(world).parent / "synced" / run.id / "output/result.json").exists()

    again = bad.resume()  # alone, as its second submission
    assert "_" not in native(again)
    assert again.wait(timeout=240).state is State.FAILED
    bad.remove(remote=True)
    assert not (records(world) / bad.id).exists()
    assert backend_for(world).find([run.id for run in runs]) == {run.id: run.handle for run in (good, long)}


def test_one_element_is_cancelled_while_it_runs(sweep: Sweep, world: SlurmWorld) -> None:
    first, second = sweep(["long", "long"])
    for run in (first, second):
        until(lambda run=run: "I am long" in text_of(run), world)
    first.cancel()
    assert first.wait(timeout=240).state is State.CANCELLED
    assert second.status().state is State.RUNNING
    second.cancel()
    assert second.wait(timeout=240).state is State.CANCELLED


@pytest.mark.usefixtures("waiting")
def test_those_that_ask_for_the_same_are_together(job: Callable[..., Path], ledger: Ledger, wire: Wire) -> None:
    path = job(ELEMENT)
    settings = [[f"resources.cpus={1 + number % 2}", f"env.NAME=n{number}"] for number in range(6)]
    runs = submit_many(path, settings, target="world", ledger=ledger)
    assert len(wire.calls("sbatch")) == 2
    assert len({native(run).partition("_")[0] for run in runs[::2]}) == 1
    assert sorted(arrays(runs).values()) == [3, 3]


# -- exactly once -----------------------------------------------------------------------------------------------------

ONCE = 'if mkdir "${0%/*}/cut" 2>/dev/null; then'
AFTER = f'{ONCE} id=$("$real" "$@"); kill -KILL 0; fi'
BEFORE = f"{ONCE} kill -KILL 0; fi"


def cut_off(sweep: Sweep, wire: Wire, ledger: Ledger, how: str, secret: dict[str, Any]) -> None:
    """A login node that dies while it talks to SLURM."""
    wire.write("sbatch", how)
    with pytest.raises(UnreachableError, match="whether each of 3 runs was submitted is not known"):
        sweep(["a", "b", "c"], **secret)
    assert states(ledger) == {State.SENDING: 3}


@pytest.mark.usefixtures("waiting")
def test_cut_off_when_it_had_arrived(
    sweep: Sweep, ledger: Ledger, wire: Wire, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    cut_off(sweep, wire, ledger, AFTER, secret)
    wire.forget()
    refresh(ledger.all(), ledger=ledger)
    assert states(ledger) == {State.QUEUED: 3}
    assert len(wire.calls("squeue")) == 2  # where they are, and how they are
    runs = [Run(record, ledger) for record in reversed(ledger.all())]
    (array,) = arrays(runs)
    assert [native(run) for run in runs] == [f"{array}_{index}" for index in range(3)]
    assert slurm.run("squeue", "--noheader", "--format=%F") == array
    for node in NODES:
        slurm.resume(node)
    assert {run.wait(timeout=240).state for run in runs} == {State.SUCCEEDED}


@pytest.mark.usefixtures("waiting")
def test_cut_off_before_it_arrived(
    sweep: Sweep, ledger: Ledger, wire: Wire, slurm: SlurmCluster, secret: dict[str, Any]
) -> None:
    cut_off(sweep, wire, ledger, BEFORE, secret)
    refresh(ledger.all(), ledger=ledger)
    assert states(ledger) == {State.SENDING: 3}
    refresh(ledger.all(), ledger=ledger, now=lambda: time.time() + 61)
    assert states(ledger) == {State.NOT_SUBMITTED: 3}
    again = Run(ledger.all()[0], ledger).resume()
    assert states(ledger) == {State.NOT_SUBMITTED: 2, State.QUEUED: 1}
    assert slurm.run("squeue", "--noheader", "--format=%F") == native(again)


@pytest.mark.usefixtures("waiting")
def test_the_same_runs_are_sent_once(job: Callable[..., Path], ledger: Ledger, world: SlurmWorld, wire: Wire) -> None:
    with prepare(job(ELEMENT), target="world", ledger=ledger) as prepared:
        plans = [prepared.plan(f"same-{number}") for number in range(3)]
        handles = prepared.backend.submit_many(plans, {"TOKEN": TOKEN})
        assert prepared.backend.submit_many(plans, {"TOKEN": TOKEN}) == handles
    assert len(wire.calls("sbatch")) == 1
    assert {path.parent.name for path in files_with(Path(world.target["root"]), TOKEN)} == {p.run_id for p in plans}


@pytest.mark.usefixtures("waiting")
def test_another_jobs_run_id_sends_nothing(
    job: Callable[..., Path], ledger: Ledger, world: SlurmWorld, wire: Wire
) -> None:
    path = job(ELEMENT)
    first = submit(path, target="world", run_id="taken", ledger=ledger)
    with prepare(path, target="world", settings=["env.NAME=other"], ledger=ledger) as prepared:
        plans = [prepared.plan(run_id) for run_id in ("new", "taken", "newer")]
        with pytest.raises(ConflictError, match="taken is another job on this machine"):
            prepared.backend.submit_many(plans, {"TOKEN": TOKEN})
    assert len(wire.calls("sbatch")) == 1
    assert [path.name for path in records(world).iterdir()] == [first.id]
    assert files_with(Path(world.target["root"]), TOKEN) == []


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def room_for_three(slurm: SlurmCluster) -> Iterator[None]:
    """Jobs of this user that SLURM takes: each element counts."""
    limit = ["sacctmgr", "--immediate", "modify", "user", "root", "set"]
    slurm.run(*limit, "MaxSubmitJobs=3")
    try:
        yield
    finally:
        slurm.run(*limit, "MaxSubmitJobs=-1")


@pytest.mark.usefixtures("waiting", "room_for_three")
def test_more_than_the_account_may_have(
    sweep: Sweep, ledger: Ledger, world: SlurmWorld, slurm: SlurmCluster, wire: Wire, secret: dict[str, Any]
) -> None:
    with pytest.raises(CapacityError, match="a limit of your account or QOS"):
        sweep(["a", "b", "c", "d"], **secret)
    assert slurm.run("squeue", "--noheader") == ""
    assert list(records(world).iterdir()) == []
    assert files_with(Path(world.target["root"]), TOKEN) == []
    assert states(ledger) == {State.NOT_SUBMITTED: 4}
    assert len(wire.calls("sbatch")) == 1
    assert len(sweep(["a", "b", "c"])) == 3


@pytest.mark.usefixtures("waiting", "room_for_three")
def test_of_several_arrays_one_is_refused(job: Callable[..., Path], ledger: Ledger, slurm: SlurmCluster) -> None:
    settings = [[f"resources.cpus={1 + number % 2}", f"env.NAME=n{number}"] for number in range(4)]
    with pytest.raises(CapacityError, match="2 of 4 runs were sent"):
        submit_many(job(ELEMENT), settings, target="world", ledger=ledger)
    assert states(ledger) == {State.QUEUED: 2, State.NOT_SUBMITTED: 2}
    assert len(slurm.run("squeue", "--noheader", "--array").splitlines()) == 2
    sent = [record for record in ledger.all() if record.state is State.QUEUED]
    handles = [Run(record, ledger).handle for record in sent]
    assert {status.state for status in backend_of(sent[0]).status([h for h in handles if h]).values()} == {State.QUEUED}
