"""A run's job once more: what is the same, and what is said where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import Run, State, contract, manifest, submit
from launcher.errors import IntegrityError, SpecError
from launcher.ledger import Ledger
from launcher.stores import open_store
from tests.cli_tool import cli

JOB = """\
name: words
command: [{python}, say.py]
code: {{root: code}}
data: {{words: words}}
env: {{LEVEL: 1}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/say.py").write_text("print('first')\n")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.txt").write_text("one")
    pin(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB.format(python=sys.executable))
    (tmp_path / "targets.yaml").write_text("targets:\n  here: {backend: local, output: results}\n")
    return tmp_path


def pin(folder: Path) -> None:
    manifest.write(open_store(str(folder / "words")), manifest.scan(folder / "words"))


def ended(run: Run) -> Run:
    assert run.wait(timeout=60).state is State.SUCCEEDED, run.status()
    return run


def said(run: Run) -> list[str]:
    return [line.text for line in run.logs() if line.rank == "0"]


def archive_of(run: Run) -> Path:
    path = run.store().local_path(contract.CODE)
    assert path is not None
    return path


def test_the_code_is_what_was_sent_then(project: Path) -> None:
    first = ended(submit(project / "job.yaml"))
    (project / "code/say.py").write_text("print('second')\n")
    again = ended(first.rerun())
    assert said(again) == ["first"]
    assert again.record.plan["job_digest"] == first.record.plan["job_digest"]
    assert again.record.rerun_of == first.id
    assert first.record.rerun_of is None
    assert first.diff(again).identical
    assert ended(again.rerun()).record.rerun_of == again.id
    assert Ledger().get(again.id).rerun_of == first.id


def test_the_folder_of_the_code_is_not_asked_for(project: Path) -> None:
    first = ended(submit(project / "job.yaml"))
    (project / "code/say.py").unlink()
    (project / "code").rmdir()
    assert said(ended(first.rerun(target="here"))) == ["first"]


@pytest.mark.needs("git")
def test_it_is_still_said_that_the_code_was_not_committed(project: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    first = submit(project / "job.yaml")
    again = first.rerun()
    assert [reason for reason in again.record.plan["unpinned"] if reason.startswith("code:")]
    assert again.record.plan["unpinned"] == first.record.plan["unpinned"]
    ended(first)
    ended(again)


CHANGES: dict[str, tuple[Callable[[Path, Run], object], list[str], set[str], list[str]]] = {
    "settings": (lambda folder, run: None, ["env.LEVEL=2"], {"env.LEVEL"}, ["first"]),
    "code of now": (
        lambda folder, run: (folder / "code/say.py").write_text("print('second')\n"),
        ["code.root=code"],
        {"code"},
        ["second"],
    ),
    "the archive is gone": (
        lambda folder, run: ((folder / "code/say.py").write_text("print('second')\n"), archive_of(run).unlink()),
        [],
        {"code"},
        ["second"],
    ),
    "the archive is gone, the folder as it was": (
        lambda folder, run: archive_of(run).unlink(), [], set(), ["first"]
    ),
    "data": (
        lambda folder, run: ((folder / "words/a.txt").write_text("two"), pin(folder)), [], {"data.words"}, ["first"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_another_job(case: str, project: Path) -> None:
    change, settings, keys, words = CHANGES[case]
    first = ended(submit(project / "job.yaml"))
    change(project, first)
    again = ended(first.rerun(settings=settings))
    found = first.diff(again)
    assert {difference.key for difference in found.differences} == keys
    assert found.identical is not bool(keys)
    assert said(again) == words


def test_an_archive_that_is_not_what_was_sent_is_refused(project: Path) -> None:
    first = ended(submit(project / "job.yaml"))
    archive_of(first).write_bytes(b"other bytes")
    with pytest.raises(IntegrityError, match=r"is not the code that was sent; --set code\.root=FOLDER"):
        first.rerun()
    assert len(Ledger().ids()) == 1
    with pytest.raises(SpecError, match="unknown target 'nowhere'"):
        first.rerun(target="nowhere", settings=["code.root=code"])


def test_the_command_line_says_whether_it_is_the_same_job(project: Path) -> None:
    submitted = cli("submit", "job.yaml", "--run-id", "one", "--follow", cwd=project)
    assert submitted.returncode == 0, submitted.stderr
    (project / "code/say.py").write_text("print('second')\n")
    same = cli("rerun", "one", "--target", "here", cwd=project)
    assert same.stdout.startswith("local://here/words-")
    told = same.stderr.splitlines()
    assert told[:2] == [
        "identical job: that of one",
        "code: as it was sent then; --set code.root=code takes it as it is now",
    ]

    (project / "words/a.txt").write_text("two")
    pin(project)
    other = cli("rerun", "one", "--set", "code.root=code", "--set", "env.LEVEL=2", "--json", cwd=project)
    lines = [line.partition(": ")[0] for line in other.stderr.splitlines()]
    assert lines[0] == "not the same job as one:"
    assert set(lines[1:4]) == {"  env.LEVEL", "  code", "  data.words changed since"}
    answer = json.loads(other.stdout)
    assert (answer["rerun_of"], answer["identical"]) == ("one", False)
    assert {d["key"] for d in answer["differences"]} == {"env.LEVEL", "code", "data.words"}

    archive_of(Run("one")).unlink()
    drifted = cli("rerun", "one", cwd=project).stderr
    assert "  code changed since: " in drifted
    assert "as it was sent then" not in drifted
    shown = cli("status", "last", cwd=project).stdout
    assert ["rerun", "of", "one"] in [line.split() for line in shown.splitlines()]
    for run_id in Ledger().ids():
        Run(run_id).wait(timeout=60)
