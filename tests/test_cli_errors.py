"""What the user gets wrong is one line on stderr, an exit code, and nothing started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import errors
from launcher.cli.app import EXIT_CODES, main
from tests.cli_tool import COMMAND, cli, ledger_files, write_loop

GOOD = "name: a\ncommand: [python, -c, pass]\n"
TRAIN = "name: a\ntrain: {task: classify}\n"
BOMB = (
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + GOOD
)


def images(*classes: str) -> Callable[[Path], None]:
    """Makes train/ with these class folders, each with an image."""

    def make(folder: Path) -> None:
        (folder / "train").mkdir()
        for name in classes:
            (folder / "train" / name).mkdir()
            (folder / "train" / name / "1.png").write_bytes(b"x")

    return make


def nothing(folder: Path) -> None:
    pass


BAD_JOBS = {
    "unknown key": (
        TRAIN.replace("classify", "classify, epoks: 3"),
        nothing,
        "job.yaml:2: train.epoks: unknown key; did you mean 'epochs'?",
    ),
    "wrong type": (GOOD + "retries: many\n", nothing, "job.yaml:3: retries: expected a valid integer"),
    "empty data folder": (TRAIN + "data: {train: train, val: train}\n", images(), "train is empty"),
    "one class": (TRAIN + "data: {train: train, val: train}\n", images("cat"), "one class, 'cat'"),
    "no data folder": (GOOD + "data: {x: ./gone}\n", nothing, "job.yaml:3: data.x: no folder"),
    "unknown scheme": (
        GOOD + "data: {x: 'ftp://host/x'}\n",
        nothing,
        "data.x: ftp://host/x can't be read by target 'local'",
    ),
    "unknown scheme of the output": (
        GOOD + "output: ftp://host/x\n",
        nothing,
        "output: the local backend can't write to ftp://host/x",
    ),
    "command and train": (
        TRAIN + "command: [x]\ndata: {train: t, val: v}\n",
        nothing,
        "train and command are both given",
    ),
    "no letter in the name": ("name: '!!!'\ncommand: [x]\n", nothing, "name: expected one line with at least one"),
    "binary": ("\0\1\2\3", nothing, "not YAML"),
    "broken YAML": ("name: [a\n", nothing, "job.yaml:2: not YAML"),
    "not keys and values": ("- a\n- b\n", nothing, "expected keys and values, found a list"),
    "alias bomb": (BOMB, nothing, "aliases expand to more than"),
    "500 levels": ("name: " + "[" * 500 + "]" * 500, nothing, "levels deep"),
    "secret by value": (GOOD + "secrets: {TOKEN: hunter2-hunter2}\n", nothing, "secret 'TOKEN' is given by value"),
    "unknown dataset": (GOOD + "data: {x: shaps/train}\n", nothing, "data.x: 'shaps/train' is neither a folder"),
}


@pytest.mark.parametrize("case", BAD_JOBS)
def test_a_bad_job_file_is_one_clear_line(case: str, called: Called, tmp_path: Path) -> None:
    text, prepare, message = BAD_JOBS[case]
    prepare(tmp_path)
    (tmp_path / "job.yaml").write_text(text)
    called("submit", "job.yaml").refused(message)


BAD_CALLS = {
    "missing file": (["submit", "gone.yaml"], "gone.yaml: no such file"),
    "a folder as job": (["submit", "."], ".: can't be read: Is a directory"),
    "unknown target": (["submit", "job.yaml", "--target", "loca"], "unknown target 'loca'; there are "),
    "unknown backend": (["submit", "job.yaml", "--backend", "slurmm"], "unknown backend 'slurmm'"),
    "a run id that no platform takes": (["submit", "job.yaml", "--run-id", "Bad_ID"], "'Bad_ID' is not a run id"),
    "a setting without value": (["submit", "job.yaml", "--set", "x"], "'x' is not a setting"),
    "a setting of a wrong type": (["submit", "job.yaml", "--set", "retries=x"], "retries: expected a valid integer"),
    "a tag without value": (["submit", "job.yaml", "--tag", "x"], "'x' is not a pair"),
    "neither job nor run": (["submit"], "give a job file, or --resume RUN"),
    "both job and run": (["submit", "job.yaml", "--resume", "a"], "give a job file, or --resume RUN"),
    "no such run": (["status", "gone-123"], "there is no run 'gone-123'"),
    "no run at all": (["logs", "last"], "there is no run yet"),
    "not a handle": (["wait", "slurm://"], "is not a handle"),
    "a path as run": (["rm", "../../etc/passwd"], "is not a run"),
    "a duration that is none": (["runs", "--since", "soon"], "'soon' is not a duration"),
    "unknown option": (["runs", "--foo"], "No such option"),
    "unknown command": (["statu"], "there is no command 'statu'; did you mean 'status'?"),
    "push without a store": (["submit", "job.yaml", "--push-data"], "has no output in a store; write --push-data=URI"),
    "push to no store": (["submit", "job.yaml", "--push-data=x"], "'x' is not a place in a store"),
    "write over a job file": (["init", "--out", "job.yaml"], "job.yaml: is there already; --force"),
    "nothing to train on": (["init", "--out", "new.yaml"], "holds no images"),
    "no data to check": (["data", "check", "gone"], "no folder gone"),
    "no data to push": (["data", "push", "gone", "s3://b/x"], "no folder gone"),
    "csv and json": (["metrics", "a", "--csv", "--json"], "--csv goes with neither --follow nor --json"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_one_clear_line(case: str, called: Called, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    arguments, message = BAD_CALLS[case]
    called(*arguments).refused(message)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str
    home: Path

    def refused(self, message: str) -> None:
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.err.startswith("cvlaunch: ")
        assert self.err.count("\n") == 1, self.err
        assert message in self.err
        assert "hunter2" not in self.err
        assert ledger_files(self.home) == []


Called = Callable[..., Answer]


@pytest.fixture
def called(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Called:
    """The same `main` as the script's, in this process: forty processes would take a minute."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Answer:
        code = main(arguments)
        out, err = capfd.readouterr()
        return Answer(code, out, err, home)

    return call


def test_a_real_process_says_the_same(tmp_path: Path, home: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD + "retries: many\n")
    done = cli("submit", "job.yaml", cwd=tmp_path)
    Answer(done.returncode, done.stdout, done.stderr, home).refused("job.yaml:3: retries: expected a valid integer")


def test_a_backend_whose_extra_is_missing_says_what_to_install(tmp_path: Path, home: Path) -> None:
    site = tmp_path / "site"
    facts = site / "cvlaunch_lunar-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: cvlaunch-lunar\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[cvlaunch.backends]\nlunar = cvlaunch_lunar:Lunar\n")
    (site / "cvlaunch_lunar.py").write_text("import lunar_sdk\n")
    (tmp_path / "job.yaml").write_text(GOOD)
    env = {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    done = cli("submit", "job.yaml", "--backend", "lunar", cwd=tmp_path, env=env)
    answer = Answer(done.returncode, done.stdout, done.stderr, home)
    answer.refused("the lunar backend needs lunar_sdk: pip install cvlaunch-lunar")
    listed = cli("backends", cwd=tmp_path, env=env)
    assert listed.returncode == 0
    assert "the lunar backend needs lunar_sdk" in listed.stdout
    assert "local" in listed.stdout


def test_a_target_file_that_is_wrong_names_its_line(called: Called, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    (tmp_path / "targets.yaml").write_text("targets:\n  here:\n    backend: local\n    pythn: /usr/bin/python\n")
    answer = called("submit", "job.yaml", "--target", "here")
    answer.refused("targets.yaml:4: targets.here.pythn: unknown key; did you mean 'python'?")


def test_an_unexpected_error_is_one_line_and_a_traceback_only_on_demand(tmp_path: Path, home: Path) -> None:
    write_loop(tmp_path)
    done = cli("submit", "job.yaml", "-q", cwd=tmp_path)
    run_id = done.stdout.strip().rpartition("/")[2]
    path = home / f"data/cvlaunch/runs/{run_id}.json"
    assert cli("wait", run_id, cwd=tmp_path).returncode == 0
    path.write_text(path.read_text().replace('"unpinned": [', '"unpinned": 7, "other": ['))
    plain = cli("status", run_id, cwd=tmp_path)
    assert plain.returncode == 70
    assert plain.stderr.startswith("cvlaunch: unexpected TypeError: ")
    assert plain.stderr.count("\n") == 1
    debug = cli("status", run_id, cwd=tmp_path, env={"CVLAUNCH_DEBUG": "1"})
    assert "Traceback" in debug.stderr


def test_a_file_that_cannot_be_written_is_one_line(called: Called, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    answer = called("render", "job.yaml", "--out", "no/such/folder/x")
    assert (answer.code, answer.err) == (2, "cvlaunch: no/such/folder/x: No such file or directory\n")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    for arguments in (["schema"], ["schema", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([*COMMAND, *arguments], stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, b"")


def test_the_exit_codes_are_in_the_help_and_match_the_errors(called: Called) -> None:
    shown = called("--help").out.partition("Exit codes:")[2]
    assert [int(line.split()[0]) for line in shown.strip().splitlines()] == list(EXIT_CODES)
    codes = {getattr(errors, name).exit_code for name in errors.__all__ if name.endswith("Error")}
    assert codes <= set(EXIT_CODES)
