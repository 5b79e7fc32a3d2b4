"""Before anything is fetched: the job file, the folders, the output's permission, the claim."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.contract import Channel
from launcher.errors import SpecError
from launcher.runner.claim import Owner, claim
from launcher.stores import Store, file_uri, open_store
from tests.runner_world import AS_SOMEONE, RUNNER, RunnerWorld, folder_of_another, python


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path)


def owner(native_id: str = "a", attempt: int = 1, digest: str = "0" * 64, submission: int = 1) -> Owner:
    return Owner("shapes-1", digest, native_id, attempt, "host", 1, 0.0, submission)


@pytest.mark.parametrize(
    ("first", "second", "counted", "attempt"),
    [
        (owner("a"), owner("a"), True, 1),
        (owner("a"), owner("a"), False, 2),
        (owner("a", 4), owner("a"), False, 5),
        (owner("a"), owner("b", 2), True, 2),
        (owner("a"), owner("b"), True, None),
        (owner("a", 2), owner("b", 2), True, None),
        (owner("a", 3), owner("b", 2), True, None),
        (owner(""), owner(""), True, None),
        (owner("a"), owner("b", 2), False, None),
        (owner("a", 4), owner("b", submission=2), False, 5),
        (owner("a", 4, submission=2), owner("b", submission=2), False, None),
        (owner("a", 4, submission=2), owner("b"), False, None),
    ],
)
def test_claim(tmp_path: Path, first: Owner, second: Owner, counted: bool, attempt: int | None) -> None:
    store = open_store(str(tmp_path))
    assert claim(store, first, counted=True) == first
    found = claim(store, second, counted=counted)
    assert (found and found.attempt) == attempt
    kept = json.loads((tmp_path / "owner").read_text())
    assert kept["native_id"] == (second if found else first).native_id


def test_claim_over_a_torn_summary(tmp_path: Path) -> None:
    (tmp_path / "owner").write_text("{")
    assert claim(open_store(str(tmp_path)), owner(), counted=True) is not None


def test_a_claim_that_nobody_can_read_is_somebody_s(tmp_path: Path) -> None:
    """A folder without hard links shows it before all of it is written."""
    (tmp_path / "owner-1").write_text("{")
    assert claim(open_store(str(tmp_path)), owner("b"), counted=True) is None
    assert claim(open_store(str(tmp_path)), owner("b", 2), counted=True) == owner("b", 2)


@pytest.mark.parametrize("attempt", [1, 2])
def test_another_job_s_folder_is_refused(tmp_path: Path, attempt: int) -> None:
    store = open_store(str(tmp_path))
    claim(store, owner("a"), counted=True)
    with pytest.raises(SpecError, match="belongs to another job of the same name"):
        claim(store, owner("b", attempt, digest="1" * 64), counted=True)
    assert json.loads((tmp_path / "owner").read_text())["native_id"] == "a"


@pytest.mark.parametrize("attempt", [1, 2])
def test_of_many_claims_one_wins(tmp_path: Path, attempt: int) -> None:
    """A second attempt, too: its claim is as much put if absent as the first."""
    for round_ in range(10):
        store = open_store(str(tmp_path / str(round_)))
        claim(store, owner("before", attempt - 1), counted=True)
        start = threading.Barrier(8)

        def try_it(number: int, store: Store = store, start: threading.Barrier = start) -> Owner | None:
            start.wait()
            return claim(store, owner(f"job-{number}", attempt), counted=True)

        with ThreadPoolExecutor(8) as pool:
            found = [o for o in pool.map(try_it, range(8)) if o is not None]
        assert len(found) == 1
        assert json.loads(store.read("owner")) == json.loads(found[0].to_bytes())


def test_run_submitted_twice_runs_once(world: RunnerWorld) -> None:
    job = world.job(python("with (ml.output / 'runs').open('a') as f: f.write('x')\nready(); time.sleep(60)"))
    first = world.start(job, env={"CVLAUNCH_NATIVE_ID": "1"}).printed("ready")
    before = world.read("started.json"), world.read("owner")
    notice = world.folder / "notice.json"
    second = world.end(job, env={"CVLAUNCH_NATIVE_ID": "2", "CVLAUNCH_NOTICE": str(notice)})
    assert second.code == 0 and "submitted twice" in second.output
    told = json.loads(notice.read_text())
    assert told["state"] == "ERROR" and told["reason"].startswith("another submission runs this run")
    assert (world.read("started.json"), world.read("owner")) == before
    assert world.read("output/runs") == "x" and not (world.run / "output/result.json").exists()
    first.signal().end()


def test_run_of_another_job_is_bad_configuration(world: RunnerWorld) -> None:
    assert world.end(world.job(python("print('ran')")), env={"CVLAUNCH_NATIVE_ID": "1"}).code == 0
    before = world.read("output/result.json")
    other = world.job(python("print('the other')"), job_digest="1" * 64)
    ended = world.end(other, env={"CVLAUNCH_NATIVE_ID": "2"})
    assert ended.code == 64 and "belongs to another job" in ended.output and "the other" not in ended.output
    assert world.read("output/result.json") == before


def test_secrets_by_standard_input(world: RunnerWorld, tmp_path: Path) -> None:
    """Read once and gone: neither a file nor the runner's own environment has them."""
    job = world.job(python("print('length', len(os.environ['TOKEN']), sys.stdin.read())"), secrets={"TOKEN": "env:X"})
    job_file = tmp_path / "job.json"
    job_file.write_bytes(job.to_bytes())
    environ = {**os.environ, "CVLAUNCH_ROOT": str(world.root), "CVLAUNCH_JOB": str(job_file)}
    value = "k\u2028ey" * 15_000  # more than a pipe holds, with a character that some take for the end of a line
    ended = subprocess.run(
        RUNNER,
        env={**environ, "CVLAUNCH_SECRETS_FILE": "-"},
        input=f"TOKEN={json.dumps(value, ensure_ascii=False)}\n".encode(),
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0 and f"length {len(value)}" in world.log()


def test_platform_that_starts_the_same_job_again(world: RunnerWorld) -> None:
    """SLURM requeues under the same job id and says nothing about attempts to a runner that isn't told."""
    job = world.job(python("print('ran')"))
    for attempt in (1, 2):
        assert world.end(job, env={"SLURM_JOB_ID": "4711"}).code == 0
        assert world.result["attempt"] == attempt and "ran" in world.log(attempt)


@pytest.mark.needs("root", "unshare")
@pytest.mark.parametrize("in_place", [True, False])
def test_output_not_writable(tmp_path: Path, in_place: bool) -> None:
    folder_of_another(tmp_path / "runs")
    (tmp_path / "data").mkdir()
    world = RunnerWorld(tmp_path, in_place=in_place)
    job = world.job(python("print('ran')"), channels=(Channel("train", file_uri(tmp_path / "data")),))
    ended = world.end(job, prefix=AS_SOMEONE)
    assert ended.code == 64 and "no permission on this folder" in ended.output
    assert str(tmp_path / "runs") in ended.output and "ran" not in ended.output
    assert not list(tmp_path.rglob("input/data")), "data was staged before the output was tried"


@pytest.mark.needs("root", "unshare")
def test_root_and_home_not_writable(tmp_path: Path) -> None:
    world = RunnerWorld(tmp_path, in_place=False)
    folder_of_another(world.root)
    program = """
import getpass
print("root", ml.root, "user", getpass.getuser())
for name in ("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
    if name in os.environ: Path(os.environ[name], "x").touch()
    print(name, name in os.environ)
"""
    env = {"TMPDIR": str(tmp_path / "tmp"), "HOME": str(world.root), "XDG_CACHE_HOME": str(tmp_path)}
    ended = world.end(world.job(python(program)), prefix=AS_SOMEONE, env=env)
    instead = tmp_path / "tmp/cvlaunch/shapes-1"
    assert ended.code == 0 and f"can't be written by uid 12345; the root is {instead}" in ended.output
    assert f"root {instead} user cvlaunch\nHOME True\nMPLCONFIGDIR False" in ended.output
    assert world.result["upload"] == "complete"


def test_file_in_the_way_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    world = RunnerWorld(tmp_path, in_place=False)
    ended = world.end(world.job(python("print('ran')")))
    assert ended.code == 64 and str(tmp_path / "runs") in ended.output and "ran" not in ended.output


def test_job_inline_and_command_of_the_command_line(world: RunnerWorld) -> None:
    job = world.job(python("print('of the job')"))
    env = {"CVLAUNCH_JOB_JSON": job.to_bytes().decode(), "CVLAUNCH_JOB": "/nowhere"}
    assert "of the job" in world.end(job, env=env).output
    again = world.start(job, arguments=("--", "echo", "${CVLAUNCH_RUN_ID}"), env={"CVLAUNCH_ATTEMPT": "2"}).end()
    assert again.code == 0 and "\nshapes-1\n" in again.output
    assert world.read("input/config/job.json").encode() == job.to_bytes()


def test_job_file_in_the_root(world: RunnerWorld) -> None:
    world.run.joinpath("input/config").mkdir(parents=True)
    world.run.joinpath("input/config/job.json").write_bytes(world.job(python("print('found')")).to_bytes())
    assert "found" in world.end(world.job(), env={"CVLAUNCH_JOB": ""}).output


@pytest.mark.parametrize(
    ("env", "arguments", "message"),
    [
        ({"CVLAUNCH_JOB": "/nowhere/job.json"}, (), "/nowhere/job.json: No such file or directory; set CVLAUNCH_JOB"),
        ({"CVLAUNCH_JOB_JSON": '{"contract": 7}'}, (), "contract version 7, this runner takes 1: rebuild the image"),
        ({"CVLAUNCH_JOB_JSON": "{"}, (), "$CVLAUNCH_JOB_JSON: "),
        ({"CVLAUNCH_JOB_JSON": '{"contract": 1}'}, (), "missing"),
        ({"CVLAUNCH_JOB_SHA256": "0" * 64}, (), "submitted was 000"),
        ({"CVLAUNCH_ATTEMPT": "two"}, (), "CVLAUNCH_ATTEMPT is 'two'; expected a number"),
        ({}, ("train",), "usage: cvlaunch-run"),
        ({"CVLAUNCH_NODE_RANK": "0"}, (), ""),
    ],
)
def test_bad_start(world: RunnerWorld, env: dict[str, str], arguments: tuple[str, ...], message: str) -> None:
    ended = world.start(world.job(python("print('ran')")), env=env, arguments=arguments).end()
    if not message:  # one node is one node, whatever the platform says
        assert ended.code == 0
        return
    assert ended.code == 64 and message in ended.output and "Traceback" not in ended.output


def test_hash_of_the_job_file(world: RunnerWorld) -> None:
    job = world.job(python("print('ran')"))
    digest = hashlib.sha256(job.to_bytes()).hexdigest()
    assert world.end(job, env={"CVLAUNCH_JOB_SHA256": digest}).code == 0
