"""Sweeps: one job many times. Resolved once, sent in one call, each run of it as sure as one that was sent alone."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import JobSpec, Run, State, render, submit, submit_many
from launcher.errors import CapacityError, SpecError, UnreachableError
from launcher.ledger import Ledger
from launcher.run import refresh
from launcher.sweep import MOST_RUNS, combinations
from tests.cli_tool import COMMAND, cli, cli_json

COUNTING = '''
"""Runs jobs on this machine, writes down what it is asked, and takes so many of them."""
from pathlib import Path
from typing import Literal
from pydantic import Field
from launcher.backends.local import LocalBackend, LocalTarget
from launcher.errors import CapacityError, UnreachableError

class CountingTarget(LocalTarget):
    backend: Literal["counting"] = "counting"
    room: int = 10**6
    broken: bool = Field(False, description="after that many, it answers no more")

class CountingBackend(LocalBackend):
    name = "counting"
    Target = CountingTarget
    doubt_s = 60.0

    def note(self, text):
        with Path(self.target.root + ".asked").open("a") as file:
            file.write(text + "\\n")

    def check(self, job):
        self.note("check")
        yield from super().check(job)

    def find(self, run_ids):
        self.note(f"find {len(run_ids)}")
        return super().find(run_ids)

    def submit_many(self, plans, secrets, *, attempt=1):
        self.note(f"submit_many {len(plans)}")
        handles = super().submit_many(plans[:self.target.room], secrets, attempt=attempt)
        if len(handles) < len(plans):
            raise UnreachableError("no answer") if self.target.broken else CapacityError("no more room")
        return handles
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose job leaves a mark, `$NAME`, and whose target counts."""
    site = tmp_path / "site"
    info = site / "counting-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cvlaunch.backends]\ncounting = counting_plugin:CountingBackend\n")
    (site / "counting_plugin.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(str(site))
    (tmp_path / "marks").mkdir()
    mark = ["sh", "-c", f'mktemp {tmp_path}/marks/"$NAME"-XXXXXXXX']
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "swept", "command": mark, "env": {"NAME": "plain"}}))
    write_target(tmp_path)
    return tmp_path


def write_target(project: Path, **keys: object) -> None:
    folders = {"output": str(project / "output"), "root": str(project / "local")}
    targets = {"desk": {"backend": "counting", **folders, **keys}, "plain": {"backend": "local", **folders}}
    (project / "targets.yaml").write_text(yaml.safe_dump({"targets": targets}))


@pytest.fixture
def ledger(project: Path) -> Iterator[Ledger]:
    """The user's own; the test ends when all runs have."""
    ledger = Ledger()
    yield ledger
    for run_id in ledger.ids():
        if not ledger.get(run_id).state.terminal:
            Run(run_id, ledger).cancel()


def asked(project: Path) -> list[str]:
    return Path(f"{project}/local.asked").read_text().splitlines()


def marks(project: Path) -> Counter[str]:
    """How often each name ran."""
    return Counter(path.name.rpartition("-")[0] for path in (project / "marks").iterdir())


def states(ledger: Ledger) -> Counter[State]:
    return Counter(record.state for record in ledger.all())


def settle(ledger: Ledger, *, ahead: float = 0.0) -> None:
    """Until every run has ended. ahead: how much later than now it is asked."""
    deadline = time.monotonic() + 300
    while not all(record.state.terminal for record in ledger.all()):
        assert time.monotonic() < deadline
        refresh(ledger.all(), ledger=ledger, now=lambda: time.time() + ahead)
        time.sleep(0.1)


def named(count: int, *, first: int = 0) -> list[list[str]]:
    return [[f"env.NAME=n{number}"] for number in range(first, first + count)]


# -- which runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweeps", "settings"),
    [
        (["a=1"], [["a=1"]]),
        (["a=1,2", "b.c=x,y"], [["a=1", "b.c=x"], ["a=1", "b.c=y"], ["a=2", "b.c=x"], ["a=2", "b.c=y"]]),
        (["a=1e-3, 0.1 ,"], [["a=1e-3"], ["a=0.1"]]),
        (['a="x, y",[1, 2],{k: v}'], [['a="x, y"'], ["a=[1, 2]"], ["a={k: v}"]]),
        (["a=s3://b/c,target:/d,it's"], [["a=s3://b/c"], ["a=target:/d"], ["a=it's"]]),
        (["a=b=c,d"], [["a=b=c"], ["a=d"]]),
    ],
)
def test_combinations(sweeps: list[str], settings: list[list[str]]) -> None:
    assert combinations(sweeps) == settings


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["a"], "'a' is not a sweep"),
        (["=1"], "'=1' is not a sweep"),
        (["a= "], "'a= ' is not a sweep"),
        (["a=1,,2"], "'1,,2' is not a list of values"),
        (["a=1]"], "'1]' is not a list of values"),
        (["a=1],[2"], "'1],[2' is not a list of values"),
        (["a={b"], "'{b' is not a list of values"),
        (["a=*b"], "'*b' is not a list of values"),
        (["a=" + "[" * 3000], "is not a list of values"),
        (["a=1,2,1"], "'1' stands twice in 'a=1,2,1'"),
        (["a=1", "a=2"], "a is swept twice"),
        ([f"a{n}={','.join(map(str, range(100)))}" for n in range(9)], f"more than {MOST_RUNS} runs"),
    ],
)
def test_what_is_no_sweep(sweeps: list[str], words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        combinations(sweeps)


# -- one look, one call -----------------------------------------------------------------------------------------------


def test_it_is_looked_at_and_sent_once(project: Path, ledger: Ledger) -> None:
    runs = submit_many(project / "job.yaml", named(12), target="desk", ledger=ledger)
    assert asked(project) == ["check", "submit_many 12"]
    assert [run.handle and run.handle.native for run in runs] == [run.id for run in runs]
    settle(ledger)
    assert marks(project) == {f"n{number}": 1 for number in range(12)}
    assert len({run.record.tags["sweep"] for run in runs}) == 1
    assert [run.record.tags["settings"] for run in runs] == [text for (text,) in named(12)]


def test_each_run_is_the_job_that_one_sends_alone(project: Path, ledger: Ledger) -> None:
    job = project / "job.yaml"
    (project / "train").mkdir()
    (project / "train/x").write_text("x")
    common = ["data.train=./train", "tags.team=vision"]
    keys = ["env.NAME=a", "env.NAME=b", "retries=3", "resources.timeout=1h", "command=[x]", "name=other"]
    settings = [[*common, key] for key in keys]
    runs = submit_many(job, settings, target="desk", ledger=ledger)
    for run, own in zip(runs, settings, strict=True):
        alone = render(job, target="desk", settings=own)
        assert run.record.plan["job_digest"] == alone.job_digest
        tags = run.record.tags
        assert (tags["settings"], tags["team"]) == (own[-1], "vision")
        sent = {**run.record.job["job_file"], "run_id": "", "tags": {}}
        assert sent == {**json.loads(json.dumps(job_file_of(job, own))), "run_id": "", "tags": {}}
    assert asked(project).count("check") == 2  # the backend may care about the timeout
    assert asked(project)[-1] == f"submit_many {len(keys)}"


def job_file_of(job: Path, settings: list[str]) -> dict[str, Any]:
    from launcher.plan import job_file
    from launcher.submission import prepare

    with prepare(job, target="desk", settings=settings) as prepared:
        return job_file(prepared.backend, prepared.job, "x").to_json()


TRAIN = {
    "epochs": 7, "seed": 7, "threads": 7, "checkpoint_every": 7, "patience": 7, "model": "resnet50",
    "pretrained": False, "learning_rate": 0.7, "weight_decay": 0.7, "warmup": 0.7, "label_smoothing": 0.7,
    "dropout": 0.7, "augment": "none", "amp": False, "batch": 700, "image_size": 700, "workers": 7,
}  # fmt: skip


def test_a_sweep_of_training_keys_resolves_as_each_alone(project: Path, ledger: Ledger) -> None:
    for split, name in itertools.product(("train", "val"), "ab"):
        (project / f"data/{split}/{name}").mkdir(parents=True)
        (project / f"data/{split}/{name}/1.png").touch()
    spec = {
        "name": "t",
        "train": {"task": "classify"},
        "data": {"train": "data/train", "val": "data/val"},
        "resources": {"memory": "1Gi"},
    }
    job = project / "train.yaml"
    job.write_text(yaml.safe_dump(spec))
    write_target(project, room=0)
    settings = [[f"train.{key}={json.dumps(value)}"] for key, value in TRAIN.items()]
    with pytest.raises(CapacityError):  # what is sent is looked at, nothing need run
        submit_many(job, settings, target="desk", ledger=ledger)
    records = {record.tags["settings"]: record for record in ledger.all()}
    for (setting,) in settings:
        alone = render(job, target="desk", settings=[setting])
        found = records[setting].plan
        assert (found["job_digest"], found["warnings"]) == (alone.job_digest, list(alone.warnings))
    assert asked(project).count("check") == 4  # one for all but batch, image_size and workers


def test_a_jobspec_can_be_swept(project: Path, ledger: Ledger) -> None:
    spec = JobSpec.model_validate(yaml.safe_load((project / "job.yaml").read_text()))
    runs = submit_many(spec, named(3), target="desk", folder=project, ledger=ledger)
    settle(ledger)
    assert marks(project) == {"n0": 1, "n1": 1, "n2": 1}
    assert {run.status().state for run in runs} == {State.SUCCEEDED}


def test_each_run_has_its_code(project: Path, ledger: Ledger) -> None:
    (project / "src").mkdir()
    (project / "src/own.sh").write_text('mktemp "$1/$NAME-XXXXXXXX"')
    settings = [["code.root=src", f'command=[sh, own.sh, "{project}/marks"]', *own] for own in named(4)]
    runs = submit_many(project / "job.yaml", settings, target="desk", ledger=ledger)
    settle(ledger)
    assert marks(project) == {f"n{number}": 1 for number in range(4)}
    assert len({run.store().head("input/code.tar.gz") is not None for run in runs}) == 1


def test_the_users_own_name_of_a_sweep_stays(project: Path, ledger: Ledger) -> None:
    settings = [["tags.sweep=search", *own] for own in named(2)]
    runs = submit_many(project / "job.yaml", settings, target="desk", ledger=ledger)
    assert [run.record.tags for run in runs] == [{"sweep": "search", "settings": text} for (text,) in named(2)]


# -- exactly once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "a sweep without settings has no runs"),
        ([["env.NAME=a"], ["retries=many"]], "retries: expected"),
        ([["env.NAME=a"], ["resources.gpus=64"]], "this machine has"),
        ([["env.NAME=a"], ["data.x=./missing"]], "data.x"),
        ([["secrets.A=env:HOME"], ["secrets.A=env:PATH"]], "have the same secrets"),
    ],
)
def test_one_mistake_sends_nothing(project: Path, ledger: Ledger, settings: list[list[str]], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        submit_many(project / "job.yaml", settings, target="desk", ledger=ledger)
    assert ledger.ids() == []
    assert "submit_many" not in str(Path(f"{project}/local.asked").exists() and asked(project))


def test_refused_in_the_middle(project: Path, ledger: Ledger) -> None:
    write_target(project, room=2)
    with pytest.raises(CapacityError, match=r"room; 2 of 5 runs were sent, .*: cvlaunch runs --tag sweep=swept-"):
        submit_many(project / "job.yaml", named(5), target="desk", ledger=ledger)
    assert asked(project)[-1] == "find 5"
    refused = [record for record in ledger.all() if record.state is State.NOT_SUBMITTED]
    assert [record.status["reason"] for record in refused] == ["no more room"] * 3
    settle(ledger)
    assert states(ledger) == {State.SUCCEEDED: 2, State.NOT_SUBMITTED: 3}
    write_target(project)
    for record in refused:  # the targets are as they were
        ledger.update(record.run_id, target={**record.target, "room": 10})
        Run(record.run_id, ledger).resume()
    settle(ledger)
    assert marks(project) == {f"n{number}": 1 for number in range(5)}


def test_refused_as_a_whole(project: Path, ledger: Ledger) -> None:
    write_target(project, room=0)
    with pytest.raises(CapacityError, match=r"^no more room$"):
        submit_many(project / "job.yaml", named(3), target="desk", ledger=ledger)
    assert states(ledger) == {State.NOT_SUBMITTED: 3}


def test_in_doubt_the_platform_is_asked_once_for_all(project: Path, ledger: Ledger) -> None:
    write_target(project, room=2, broken=True)
    with pytest.raises(UnreachableError, match="whether each of 5 runs was submitted is not known"):
        submit_many(project / "job.yaml", named(5), target="desk", ledger=ledger)
    assert states(ledger) == {State.SENDING: 5}
    assert refresh(ledger.all(), ledger=ledger) == []
    assert states(ledger)[State.SENDING] == 3
    refresh(ledger.all(), ledger=ledger, now=lambda: time.time() + 61)
    assert [line for line in asked(project) if line.startswith("find")] == ["find 5", "find 3"]
    settle(ledger)
    assert states(ledger) == {State.SUCCEEDED: 2, State.NOT_SUBMITTED: 3}
    assert marks(project) == {"n0": 1, "n1": 1}


@pytest.mark.parametrize(("entered", "begun"), [(1, 0), (4, 0), (6, 0), (6, 1), (6, 4), (6, 6)])
def test_killed_at_any_moment(project: Path, ledger: Ledger, entered: int, begun: int) -> None:
    """When so many run files and so many runs are there."""
    sweep = ["--sweep", "env.NAME=a,b,c,d,e,f"]
    command = [*COMMAND, "submit", str(project / "job.yaml"), "--target", "plain", *sweep]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if len(ledger.ids()) >= entered and len(list((project / "local").glob("*"))) >= begun:
            process.kill()
    settle(ledger)
    assert set(states(ledger)) <= {State.SUCCEEDED, State.NOT_SUBMITTED}
    assert begun - 1 <= states(ledger)[State.SUCCEEDED] == sum(marks(project).values())
    assert set(marks(project).values()) <= {1}


def change(folder: Path, name: str) -> None:
    ledger = Ledger(folder, folder / "cache")
    for number in range(20):
        ledger.update_many({run_id: {name: f"{number}"} for run_id in ledger.ids()})


def test_many_updates_at_once_lose_nothing(project: Path, ledger: Ledger) -> None:
    write_target(project, room=0)
    with pytest.raises(CapacityError):
        submit_many(project / "job.yaml", named(40), target="desk", ledger=ledger)
    context = multiprocessing.get_context("spawn")
    pair = [context.Process(target=change, args=(ledger.folder, name)) for name in ("synced", "rerun_of")]
    for process in pair:
        process.start()
    for process in pair:
        process.join(300)
    assert [process.exitcode for process in pair] == [0, 0]
    assert {(record.synced, record.rerun_of) for record in ledger.all()} == {("19", "19")}
    assert [path.name for path in ledger.folder.iterdir() if path.suffix == ".part"] == []


def test_a_taken_run_id_is_left_alone(project: Path, ledger: Ledger) -> None:
    run = submit(project / "job.yaml", target="desk", ledger=ledger)
    known = ledger.get(run.id)
    fresh = [Ledger.get(ledger, run.id)]
    assert ledger.create_many(fresh) == fresh
    assert ledger.get(run.id) == known


# -- the command line -------------------------------------------------------------------------------------------------


def test_a_sweep_from_the_command_line(project: Path, ledger: Ledger) -> None:
    sweep = ["--sweep", "env.NAME=a,b", "--sweep", "retries=0,1"]
    done = cli("submit", "job.yaml", "--target", "plain", *sweep, "--set", "env.X=1", cwd=project)
    handles = done.stdout.splitlines()
    assert (done.returncode, len(handles)) == (0, 4), done.stderr
    (name,) = re.findall(r"^list them: cvlaunch runs --tag sweep=(\S+)$", done.stderr, re.MULTILINE)
    assert f"sweep {name}: 4 runs on target plain" in done.stderr
    settle(ledger)
    listed = cli_json("runs", "--tag", f"sweep={name}", cwd=project)
    assert [run["handle"] for run in reversed(listed)] == handles
    assert [run["tags"]["settings"] for run in reversed(listed)] == [
        f"env.NAME={name} retries={retries}" for name in "ab" for retries in (0, 1)
    ]
    table = cli("runs", "--tag", f"sweep={name}", cwd=project).stdout
    assert "SETTINGS" in table and "env.NAME=b retries=1" in table
    assert "SETTINGS" not in cli("runs", "--tag", "sweep=none", cwd=project).stdout


def test_a_sweep_in_json(project: Path, ledger: Ledger) -> None:
    listed = cli_json("submit", "job.yaml", "--target", "plain", "--sweep", "env.NAME=a,b", cwd=project)
    assert [run["tags"]["settings"] for run in listed] == ["env.NAME=a", "env.NAME=b"]
    assert [run["state"] for run in listed] == ["QUEUED", "QUEUED"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--follow"], "a sweep is many runs; follow one of them: cvlaunch watch RUN"),
        (["--sync", "x"], "a sweep is many runs; follow one of them: cvlaunch watch RUN"),
        (["--run-id", "mine"], "each run of a sweep has an id of its own"),
        (["--sweep", "env.NAME=x"], "env.NAME is swept twice"),
        (["--sweep", "nam=x"], "unknown key; did you mean 'name'?"),
    ],
)
def test_a_sweep_is_refused(project: Path, ledger: Ledger, arguments: list[str], words: str) -> None:
    done = cli("submit", "job.yaml", "--sweep", "env.NAME=a,b", *arguments, cwd=project)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert ledger.ids() == []


def test_resume_takes_no_sweep(project: Path) -> None:
    done = cli("submit", "--resume", "x", "--sweep", "env.NAME=a", cwd=project)
    assert "leave out --sweep" in done.stderr
