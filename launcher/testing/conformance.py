"""The promises. Each test takes the fixture `world`; `ledger` and `job` are made here."""

from __future__ import annotations

import contextlib
import json
import os
import secrets as random_source
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import Run, State, contract, paths, render, submit
from launcher.backends import load_backend
from launcher.backends.base import IGNORABLE, Backend, Feature, Handle
from launcher.errors import ConflictError, UnsupportedError
from launcher.ledger import Ledger
from launcher.status import Status
from launcher.stores import join_uri, open_store
from launcher.submission import backend_of, prepare
from launcher.testing.world import World

__all__ = [
    "backend_of_world",
    "files_with",
    "holders",
    "job",
    "ledger",
    "own_id",
    "run_job",
    "test_a_cancelled_run_never_comes_back",
    "test_a_doubled_submission_runs_once",
    "test_a_failed_command_keeps_its_exit_code",
    "test_a_handle_is_enough_to_ask_again",
    "test_a_handle_of_nothing_is_no_success",
    "test_a_preempted_job_starts_again",
    "test_a_taken_run_id_is_refused",
    "test_bad_configuration_is_not_retried",
    "test_crashes_are_retried",
    "test_every_feature_is_answered",
    "test_every_folder_has_one_writer",
    "test_hostile_values_arrive_unchanged",
    "test_logs_can_be_resumed",
    "test_many_are_submitted_at_once",
    "test_many_runs_are_asked_at_once",
    "test_remove_leaves_nothing",
    "test_rendering_asks_the_platform_for_what_the_job_asks",
    "test_rendering_gives_shared_memory_where_it_can",
    "test_rendering_is_what_is_sent",
    "test_rendering_names_secrets_without_their_values",
    "test_rendering_says_what_the_job_says",
    "test_results_come_home_in_one_layout",
    "test_secrets_stay_secret",
    "test_what_is_ignored_has_a_reason",
]

HOSTILE = {
    "QUOTES": 'it\'s "quoted" `twice`',
    "SHELL": "$(touch /tmp/cvlaunch-was-here); ${HOME} && rm -rf / #",
    "TEMPLATE": "{{ 7 * 7 }} {% raw %}",
    "LINES": "one\ntwo\n\n three\\n",
    "YAML": "no: [yes, *a, &b] # {x}\t|",
    "UNICODE": "ünïcödé ☃ \u202e 💾",
    "SPACES": "  both ends  ",
    "EMPTY": "",
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger", tmp_path / "cache")


@pytest.fixture
def job(tmp_path: Path, world: World) -> Callable[..., Path]:
    """Writes a job file whose command is a Python script, and the targets.yaml that leads to the world."""

    def write(script: str, **keys: Any) -> Path:
        folder = tmp_path / "project"
        folder.mkdir(exist_ok=True)
        (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": {**world.target}}}), encoding="utf-8")
        path = folder / "job.yaml"
        command = [world.python(), "-u", "-c", textwrap.dedent(script)]
        path.write_text(
            yaml.safe_dump({"name": "promise", "command": command, **keys}, allow_unicode=True), encoding="utf-8"
        )
        return path

    return write


@pytest.fixture
def run_job(job: Callable[..., Path], ledger: Ledger, world: World) -> Iterator[Callable[..., Run]]:
    """Submits a script; whatever still runs at the end of the test is cancelled."""
    started: list[Run] = []

    def start(script: str, *, run_id: str | None = None, **keys: Any) -> Run:
        path = job(script, **keys)
        run = submit(path, target="world", settings=world.settings, run_id=run_id, ledger=ledger)
        started.append(run)
        return run

    yield start
    for run in started:
        if run.id in ledger.ids():
            run.cancel()


def backend_of_world(world: World) -> Backend:
    kind = load_backend(world.backend)
    return kind(kind.Target.model_validate(dict(world.target)), "world")


def own_id(word: str) -> str:
    """A run id that nobody else has: a platform may be shared by all tests that run at the time."""
    return f"promise-{word}-{random_source.token_hex(4)}"


def end_of(run: Run, world: World) -> Status:
    return run.wait(timeout=world.patience)


def until(condition: Callable[[], object], world: World) -> None:
    deadline = time.monotonic() + world.patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def text_of(run: Run) -> str:
    return "\n".join(line.text for line in run.logs())


def test_every_feature_is_answered(world: World) -> None:
    features = load_backend(world.backend).features
    assert set(features) == set(Feature)
    assert all(support.reason for support in features.values() if not support.supported)


def test_every_folder_has_one_writer(world: World) -> None:
    for transport in backend_of_world(world).transports.values():
        assert set(transport.movers) == set(contract.OUTPUT_FOLDERS)
        assert set(transport.movers.values()) <= {"in_place", "runner", "platform"}
        assert set(transport.channels.values()) <= {"path", "mounted", "staged"}


def test_rendering_is_what_is_sent(job: Callable[..., Path], run_job: Callable[..., Run], world: World) -> None:
    path = job("print('hello')")
    first = render(path, target="world", settings=world.settings)
    assert render(path, target="world", settings=world.settings) == first
    run = run_job("print('hello')")
    assert run.handle is not None
    assert world.sent(run.handle) == run.record.plan["text"]
    again = render(path, target="world", settings=world.settings, run_id=run.id)
    assert run.record.plan["text"] == again.text
    assert end_of(run, world).state is State.SUCCEEDED


def test_what_is_ignored_has_a_reason(world: World) -> None:
    ignored = backend_of_world(world).ignored
    assert set(ignored) <= set(IGNORABLE)
    assert all(ignored.values())


RESOURCES = {"timeout": "90m", "grace": "70s", "cpus": 3, "memory": "2GiB", "disk": "30GiB"}


def test_rendering_says_what_the_job_says(job: Callable[..., Path], world: World) -> None:
    path = job("print('hello')", env={"GREETING": "hello"}, retries=3, resources=RESOURCES, tags={"a": "b"})
    plan = render(path, target="world", settings=world.settings)
    facts = world.facts(plan.text, plan.files)
    assert facts.argv[-1] == "launcher.runner" or facts.argv[-1].endswith("cvlaunch-run")
    assert (facts.gpus, facts.nodes) == (0, 1)
    described = contract.JobFile.from_bytes(json.dumps(facts.job).encode())
    assert described.run_id == plan.run_id
    assert described.job_digest == plan.job_digest
    assert described.command is not None
    assert described.command[-1] == "print('hello')"
    assert (described.env, described.retries) == ({"GREETING": "hello"}, 3)
    assert (described.timeout_s, described.grace_s) == (5400, 70)
    assert set(described.movers) == set(contract.OUTPUT_FOLDERS)


def test_rendering_asks_the_platform_for_what_the_job_asks(job: Callable[..., Path], world: World) -> None:
    """Each is in the platform's own words at least what the job wants, or the user is told that it has no effect."""
    plan = render(job("print('hello')", resources=RESOURCES), target="world", settings=world.settings)
    facts, backend = world.facts(plan.text, plan.files), backend_of_world(world)
    asked = {"resources.cpus": 3, "resources.memory": 2 << 30, "resources.disk": 30 << 30}
    got = {"resources.cpus": facts.cpus, "resources.memory": facts.memory, "resources.disk": facts.disk}
    for key, least in asked.items():
        found = got[key]
        told = any(warning.startswith(f"{key} has no effect") for warning in plan.warnings)
        assert (found is None, told) == (key in backend.ignored,) * 2, key
        assert found is None or found >= least, key
    assert (facts.image is None) == ("image" in backend.ignored)
    assert facts.grace_s is None or facts.grace_s >= 70
    assert facts.timeout_s is None or facts.timeout_s >= 5400


def test_rendering_gives_shared_memory_where_it_can(job: Callable[..., Path], world: World) -> None:
    path = job("print('hello')", resources={"shm": "1Gi"})
    if load_backend(world.backend).features[Feature.SHM].supported:
        plan = render(path, target="world", settings=world.settings)
        assert (world.facts(plan.text, plan.files).shm or 0) >= 1 << 30
        return
    with pytest.raises(UnsupportedError):
        render(path, target="world", settings=world.settings)


def test_rendering_names_secrets_without_their_values(
    job: Callable[..., Path], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RENDERED_TOKEN", "canary-1d07-of-rendering")
    if not load_backend(world.backend).features[Feature.SECRETS_CLIENT].supported:
        return
    path = job("print('hello')", secrets={"TOKEN": "env:RENDERED_TOKEN"})
    plan = render(path, target="world", settings=world.settings)
    facts = world.facts(plan.text, plan.files)
    assert set(facts.job["secrets"]) == {"TOKEN"}
    assert facts.secrets is None or "TOKEN" in facts.secrets
    assert "canary-1d07-of-rendering" not in plan.text


def test_results_come_home_in_one_layout(run_job: Callable[..., Run], world: World, tmp_path: Path) -> None:
    run = run_job("""
        import json, os, pathlib
        output, model = pathlib.Path(os.environ["CVLAUNCH_OUTPUT"]), pathlib.Path(os.environ["CVLAUNCH_MODEL"])
        for step in range(3):
            line = {"step": step, "epoch": step, "time": 0, "split": "val", "values": {"accuracy": step / 4}}
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\\n")
        (model / "model.bin").write_bytes(b"weights")
        print("done")
    """)
    status = end_of(run, world)
    assert (status.state, status.exit_code) == (State.SUCCEEDED, 0)
    assert run.metrics().summary() == {"val/accuracy": 0.5}
    folder = run.sync(tmp_path / "home").path
    assert (folder / "model/model.bin").read_bytes() == b"weights"
    assert len((folder / contract.METRICS).read_text().splitlines()) == 3
    assert contract.JobFile.from_bytes((folder / contract.JOB).read_bytes()).run_id == run.id
    assert json.loads((folder / contract.RESULT).read_text())["state"] == "SUCCEEDED"
    assert json.loads((folder / contract.STARTED).read_text())["run_id"] == run.id
    assert any("done" in path.read_text(encoding="utf-8") for path in (folder / contract.LOGS).iterdir())


def test_a_failed_command_keeps_its_exit_code(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("import sys; print('the reason', file=sys.stderr); sys.exit(3)")
    status = end_of(run, world)
    assert (status.state, status.exit_code) == (State.FAILED, 3)
    assert "the reason" in text_of(run)


def test_crashes_are_retried(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("""
        import os, pathlib, sys
        mark = pathlib.Path(os.environ["CVLAUNCH_CHECKPOINTS"]) / "crashed"
        first = not mark.exists()
        mark.touch()
        sys.exit(9 if first else 0)
    """, retries=1)  # fmt: skip
    assert end_of(run, world).state is State.SUCCEEDED


def test_bad_configuration_is_not_retried(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("import sys; print('started'); sys.exit(64)", retries=5)
    status = end_of(run, world)
    assert (status.state, status.exit_code) == (State.FAILED, contract.EXIT_BAD_CONFIG)
    assert text_of(run).splitlines().count("started") == 1


STOPPABLE = """
    import os, pathlib, signal, sys, time
    from launcher.contract import Layout, complete_checkpoint, newest_checkpoint
    signal.signal(signal.SIGTERM, lambda *_: None)  # the file says what to do
    layout = Layout.from_environment()
    newest = newest_checkpoint(layout.checkpoints)
    print("starts from", newest.name if newest else None)
    if newest:
        sys.exit(0)
    while not layout.stop.exists():
        time.sleep(0.05)
    step = layout.checkpoints / "1"
    step.mkdir(parents=True)
    (step / "state").write_text("half way")
    complete_checkpoint(step, step=1)
    sys.exit(75)
"""


def test_a_preempted_job_starts_again(run_job: Callable[..., Run], world: World) -> None:
    run = run_job(STOPPABLE)
    until(lambda: "starts from None" in text_of(run), world)
    assert run.handle is not None
    world.preempt(run.handle)
    status = end_of(run, world)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2)
    assert "starts from 1" in text_of(run)


def test_a_cancelled_run_never_comes_back(run_job: Callable[..., Run], world: World) -> None:
    run = run_job(STOPPABLE, retries=5)
    until(lambda: "starts from None" in text_of(run), world)
    run.cancel()
    status = end_of(run, world)
    assert status.state is State.CANCELLED
    assert run.cancel().state is State.CANCELLED
    assert text_of(run).count("starts from") == 1


def test_a_handle_is_enough_to_ask_again(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("print('hello')")
    end_of(run, world)
    handle = Handle.parse(str(run.handle))
    answers = backend_of(run.record).status([handle])
    assert answers[handle].state is State.SUCCEEDED
    assert backend_of(run.record).find([run.id, "nobody-0000000000"]) == {run.id: handle}


def test_a_handle_of_nothing_is_no_success(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("print('hello')")
    assert run.handle is not None
    nothing = Handle(run.handle.backend, run.handle.target, "nobody-0000000000")
    assert backend_of(run.record).status([nothing])[nothing].state in (State.UNKNOWN, State.LOST)


def test_many_runs_are_asked_at_once(run_job: Callable[..., Run], world: World) -> None:
    started = [run_job(f"print('run {i}')") for i in range(5)]
    for i, run in enumerate(started):
        assert end_of(run, world).state is State.SUCCEEDED
        assert f"run {i}" in text_of(run)
    handles = [run.handle for run in started if run.handle]
    answers = backend_of(started[0].record).status(handles)
    assert [answers[handle].state for handle in handles] == [State.SUCCEEDED] * 5


def test_many_are_submitted_at_once(job: Callable[..., Path], world: World) -> None:
    with prepare(job("print('one of many')"), target="world", settings=world.settings) as prepared:
        plans = [prepared.plan(f"{own_id('many')}-{number}") for number in range(3)]
        backend = prepared.backend
        for plan in plans:
            uri = join_uri(prepared.job.output, plan.run_id)
            store = backend.store(uri) or open_store(uri, backend.target.storage.options)
            for path, content in plan.files.items():
                store.write(path, Path(content) if isinstance(content, str) else content)
        handles = backend.submit_many(plans, {})
    assert backend.find([plan.run_id for plan in plans]) == {p.run_id: h for p, h in zip(plans, handles, strict=True)}
    until(lambda: all(status.state is State.SUCCEEDED for status in backend.status(handles).values()), world)


def test_a_doubled_submission_runs_once(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("""
        import os, pathlib, time
        mark = pathlib.Path(os.environ["CVLAUNCH_OUTPUT"]) / f"ran-{os.getpid()}"
        mark.touch()
        print("ran")
        time.sleep(3)
    """)
    until(lambda: "ran" in text_of(run), world)
    assert run.handle is not None
    world.submit_again(run.handle)
    assert end_of(run, world).state is State.SUCCEEDED
    time.sleep(1)
    assert len([e for e in run.store().list("output") if e.path.startswith("output/ran-")]) == 1


def test_a_taken_run_id_is_refused(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("print('first')", run_id=own_id("taken"))
    with pytest.raises(ConflictError):
        run_job("print('second')", run_id=run.id)
    assert end_of(run, world).state is State.SUCCEEDED
    assert "second" not in text_of(run)


def test_hostile_values_arrive_unchanged(run_job: Callable[..., Run], world: World) -> None:
    run = run_job(
        "import json, os, sys; print('GOT' + json.dumps([dict(os.environ), sys.argv[1:]]))",
        env=HOSTILE,
        tags={"hostile": HOSTILE["SHELL"]},
    )
    assert end_of(run, world).state is State.SUCCEEDED
    (line,) = [line for line in text_of(run).splitlines() if line.startswith("GOT")]
    environ, _ = json.loads(line.removeprefix("GOT"))
    assert {name: environ[name] for name in HOSTILE} == HOSTILE
    assert not Path("/tmp/cvlaunch-was-here").exists()  # noqa: S108 that is what the value would make


def test_logs_can_be_resumed(run_job: Callable[..., Run], world: World) -> None:
    run = run_job("for i in range(20): print('line', i)")
    end_of(run, world)
    lines = [line for line in run.logs() if line.text.startswith("line ")]
    assert [line.text for line in lines] == [f"line {i}" for i in range(20)]
    for seen in (0, 6, 19):
        again = [line for line in run.logs(since=lines[seen].cursor) if line.text.startswith("line ")]
        assert again == lines[seen + 1 :]


def holders(value: str) -> dict[int, str]:
    """Process → command line, of those that have `value` in their command line or environment, as far as we may see."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (folder / "cmdline").read_bytes()
            if value.encode() in argv + (folder / "environ").read_bytes():
                found[int(folder.name)] = argv.replace(b"\0", b" ").decode(errors="replace")
    return found


def files_with(value: str, *, since: float, folders: Iterable[Path]) -> set[Path]:
    """Files below these folders that hold `value`, of those that have changed since (Unix seconds).

    By find, which looks at a million files in seconds. Those of more than a gigabyte are other tests' disks.
    """
    there = [str(folder) for folder in set(folders) if folder.exists()]
    with tempfile.NamedTemporaryFile() as mark:
        os.utime(mark.name, (since, since))
        command = ["find", *there, "-type", "f", "-size", "-1024M", "-newer", mark.name, "-print0"]
        names = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    found = set()
    for path in (Path(os.fsdecode(name)) for name in names.split(b"\0") if name):
        with contextlib.suppress(OSError):
            if value.encode() in path.read_bytes():
                found.add(path)
    return found


def test_secrets_stay_secret(run_job: Callable[..., Run], world: World, tmp_path: Path) -> None:
    """Nobody but the command has the value: no text, log, file or store, and no other process while it runs."""
    canary = f"canary-{random_source.token_hex(8)}-very-secret"
    since = time.time() - 1
    file = tmp_path / "token"
    if load_backend(world.backend).features[Feature.SECRETS_CLIENT].supported:
        file.write_text(canary)
        file.chmod(0o600)
        reference, here = f"file:{file}", {file}
    else:
        reference, here = world.stored_secret(canary), set()
    run = run_job(
        """
        import os, time
        print("length", len(os.environ["TOKEN"]))
        print("value", os.environ["TOKEN"])
        time.sleep(600)  # THE COMMAND
        """,
        secrets={"TOKEN": reference},
        resources={"grace": "5s"},
    )
    until(lambda: f"length {len(canary)}" in text_of(run), world)
    running = holders(canary)
    assert [argv for argv in running.values() if canary in argv or "THE COMMAND" not in argv] == []
    folders = [tmp_path, Path.home(), paths.data_folder(), paths.cache_folder(), Path(tempfile.gettempdir())]
    assert files_with(canary, since=since, folders=folders) == here
    run.cancel()
    assert end_of(run, world).state is State.CANCELLED
    assert "value" in text_of(run)
    assert canary not in text_of(run)
    assert canary not in run.record.plan["text"]
    assert holders(canary) == {}
    assert files_with(canary, since=since, folders=folders) == here


def test_remove_leaves_nothing(run_job: Callable[..., Run], world: World, ledger: Ledger) -> None:
    run = run_job("print('hello')")
    end_of(run, world)
    store = run.store()
    run.remove(remote=True)
    assert list(store.list()) == []
    assert run.id not in ledger.ids()
    assert backend_of(run.record).find([run.id]) == {}
