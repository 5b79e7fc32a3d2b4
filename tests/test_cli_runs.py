"""Real runs on this machine through the real command line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.app import main
from launcher.cli.live import view_of
from launcher.cli.out import Out
from launcher.ledger import Ledger
from launcher.run import Run
from launcher.status import State, Status
from launcher.stores import open_store
from tests.cli_tool import COMMAND, cli, cli_json, ledger_files, user, write_loop
from tests.s3_fixtures import Bucket


@dataclass(frozen=True)
class Past:
    """A user with three ended runs: two of one job, the second of them followed, and one that failed."""

    home: Path
    folder: Path
    first: str
    again: str
    failed: str
    handle: str

    @property
    def env(self) -> Mapping[str, str]:
        return user(self.home)


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Past:
    home, folder = tmp_path_factory.mktemp("past"), tmp_path_factory.mktemp("work")
    env = user(home)
    write_loop(folder)
    submitted = cli("submit", "job.yaml", "--tag", "team=vision", cwd=folder, env=env)
    handle = submitted.stdout.strip()
    first = handle.rpartition("/")[2]
    wrong = write_loop(folder, code=3, extra="env: {LEVEL: 2}\n").rename(folder / "wrong.yaml")
    failed = cli("submit", wrong, "-q", "--run-id", "wrong", cwd=folder, env=env).stdout.strip().rpartition("/")[2]
    cli("wait", first, failed, cwd=folder, env=env)
    again = cli("rerun", first, "-q", cwd=folder, env=env).stdout.strip().rpartition("/")[2]
    cli("wait", again, cwd=folder, env=env)
    return Past(home, folder, first, again, failed, handle)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def ask(past: Past, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Calls `main` in this process as the user with a past."""
    for name, value in past.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(past.folder)

    def call(*arguments: str) -> Answer:
        code = main(arguments)
        return Answer(code, *capfd.readouterr())

    return call


def test_runs_lists_the_newest_first_and_plainly_in_a_pipe(ask: Any, past: Past) -> None:
    answer = ask("runs")
    lines = answer.out.splitlines()
    assert lines[0].split() == ["RUN", "STATE", "AGE", "TARGET", "REASON"]
    assert [line.split()[:2] for line in lines[1:]] == [
        [past.again, "SUCCEEDED"],
        [past.failed, "FAILED"],
        [past.first, "SUCCEEDED"],
    ]
    assert "\x1b" not in answer.out
    assert len({line.index(word) for line, word in zip(lines, ["STATE", "SUCC", "FAIL", "SUCC"], strict=True)}) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--state", "failed"], ["failed"]),
        (["--state", "FAILED", "--state", "RUNNING"], ["failed"]),
        (["--tag", "team=vision"], ["again", "first"]),
        (["--tag", "team=audio"], []),
        (["--target", "hpc"], []),
        (["--backend", "local", "--limit", "1"], ["again"]),
        (["--since", "1h"], ["again", "failed", "first"]),
        (["--since", "0.001s"], []),
        (["--no-refresh"], ["again", "failed", "first"]),
    ],
    ids=" ".join,
)
def test_runs_filters(ask: Any, past: Past, options: list[str], expected: list[str]) -> None:
    found = ask("runs", *options, "--json").json
    assert [run["run_id"] for run in found] == [getattr(past, name) for name in expected]


def test_a_run_is_found_by_id_beginning_handle_and_last(ask: Any, past: Past) -> None:
    for text, run_id in ((past.first, past.first), (past.handle, past.first), ("wro", "wrong"), ("last", past.again)):
        assert ask("status", text, "--json").json["run_id"] == run_id
    answer = ask("status", "loop-")
    assert answer.code == 2
    assert "fits 2 runs" in answer.err


def test_status_says_how_it_ended(ask: Any, past: Past) -> None:
    facts = ask("status", past.failed, "--json").json
    assert (facts["state"], facts["exit_code"], facts["backend"], facts["target"]) == ("FAILED", 3, "local", "local")
    assert facts["handle"] == f"local://local/{past.failed}"
    lines = dict(line.split(None, 1) for line in ask("status", past.failed).out.splitlines())
    assert lines["state"].startswith("FAILED (")
    assert lines["unpinned"].startswith("image: ")


def test_logs_by_rank_time_and_json(ask: Any, past: Past) -> None:
    text = ask("logs", past.first).out.splitlines()
    assert [line for line in text if not line.startswith("[cvlaunch] ")] == ["epoch 1", "epoch 2"]
    assert ask("logs", past.first, "--rank", "0").out.splitlines() == ["epoch 1", "epoch 2"]
    timed = ask("logs", past.first, "--rank", "0", "--timestamps").out.splitlines()
    assert all(line[:2] == "20" and line[23] == "Z" for line in timed)
    found = [json.loads(line) for line in ask("logs", past.first, "--json").out.splitlines()]
    assert [line["text"] for line in found if line["rank"] == "0"] == ["epoch 1", "epoch 2"]


def test_metrics_as_table_csv_and_json(ask: Any, past: Past) -> None:
    rows = [line.split() for line in ask("metrics", past.first).out.splitlines()]
    assert rows == [["EPOCH", "val/loss", "val/accuracy"], ["1", "1", "0"], ["2", "0.5", "0.5"]]
    assert ask("metrics", past.first, "--csv").out.splitlines()[0] == "step,epoch,time,split,loss,accuracy"
    assert [point["values"]["loss"] for point in ask("metrics", past.first, "--json").json] == [1.0, 0.5]
    followed = ask("metrics", past.first, "--follow").out.splitlines()
    assert followed[-1] == "epoch 2 step 20 val: loss 0.5  accuracy 0.5"


def test_diff_tells_identical_jobs_from_different_ones(ask: Any, past: Past) -> None:
    same = ask("diff", past.first, past.again)
    assert (same.code, same.out.splitlines()[0]) == (0, "identical job")
    assert "unpinned: image: " in same.out
    other = ask("diff", past.first, past.failed)
    assert other.code == 1
    assert "  env.LEVEL: - → 2" in other.out.splitlines()
    found = ask("diff", past.first, past.failed, "--json")
    assert {d["key"] for d in json.loads(found.out)["differences"]} == {"command", "env.LEVEL"}


def test_sync_brings_what_is_asked_for(ask: Any, past: Past, tmp_path: Path) -> None:
    answer = ask("sync", past.first, str(tmp_path), "--include", "output/metrics.jsonl")
    assert answer.out.strip() == str(tmp_path / past.first)
    assert (tmp_path / past.first / "output/metrics.jsonl").is_file()
    assert not (tmp_path / past.first / "output/result.json").exists()
    assert ask("sync", past.first, str(tmp_path), "--json").json["files"] > 0


def test_report_of_two_runs_is_one_page(ask: Any, past: Past, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    answer = ask("report", past.first, past.failed, "--out", str(page))
    assert (answer.code, answer.out.strip()) == (0, str(page))
    text = page.read_text()
    assert past.first in text
    assert past.failed in text


def test_wait_for_ended_runs_says_which_did_not_succeed(ask: Any, past: Past) -> None:
    answer = ask("wait", past.first, past.failed)
    assert answer.code == 1
    assert f"{past.first}  SUCCEEDED" in answer.out.splitlines()
    assert f"{past.failed}  FAILED" in answer.out
    assert ask("wait", past.first).code == 0


def test_cancelling_an_ended_run_changes_nothing(ask: Any, past: Past) -> None:
    answer = ask("cancel", past.first)
    assert answer.code == 0
    assert "has ended already: SUCCEEDED" in answer.err


def test_rm_refuses_where_nobody_can_be_asked(past: Past) -> None:
    done = cli("rm", past.first, cwd=past.folder, env=past.env)
    assert done.returncode == 2
    assert "give --yes" in done.stderr
    assert past.first in str(ledger_files(past.home))


def test_completion_knows_runs_and_targets(past: Past) -> None:
    for words, expected in (("cvlaunch status wr", "plain,wrong"), ("cvlaunch submit --target lo", "plain,local")):
        env = {**past.env, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = cli(cwd=past.folder, env={**env, "_CVLAUNCH_COMPLETE": "bash_complete"})
        assert done.stdout.splitlines() == [expected]


# -- one run each


def test_submit_prints_the_handle_alone_and_quietly_nothing_else(tmp_path: Path) -> None:
    write_loop(tmp_path)
    done = cli("submit", "job.yaml", "--run-id", "mine", cwd=tmp_path)
    assert done.stdout == "local://local/mine\n"
    assert "run mine on target local" in done.stderr
    assert "unpinned: image" in done.stderr
    quiet = cli("submit", "job.yaml", "--quiet", cwd=tmp_path)
    assert (quiet.stdout.count("\n"), quiet.stderr) == (1, "")
    taken = cli("submit", "job.yaml", "--run-id", "mine", cwd=tmp_path)
    assert (taken.returncode, taken.stdout) == (7, "")
    assert "there is a run 'mine' already" in taken.stderr


def test_following_shows_lines_and_metrics_then_brings_the_results(tmp_path: Path) -> None:
    note = tmp_path / "end.json"
    script = f"import sys; open({str(note)!r}, 'w').write(sys.stdin.read())"
    command = json.dumps([sys.executable, "-c", script])
    (tmp_path / "targets.yaml").write_text(f"targets:\n  here: {{backend: local, notify: {{command: {command}}}}}\n")
    write_loop(tmp_path, epochs=3, pause=0.2, code=3)
    done = cli("submit", "job.yaml", "--target", "here", "--run-id", "mine", "--follow", "--sync", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == "local://here/mine\n"
    lines = done.stderr.splitlines()
    order = ["epoch 1", "epoch 3", "state: FAILED", "results: out/mine"]
    assert [line for line in lines if line in order] == order
    assert "metrics: epoch 3 · val accuracy 0.6667 · val loss 0.3333" in lines
    assert ["3", "0.3333", "0.6667"] in [line.split() for line in lines]
    assert any(line.startswith("mine FAILED after ") for line in lines)
    assert (tmp_path / "out/mine/output/metrics.jsonl").is_file()
    told = json.loads(note.read_text())
    assert (told["run_id"], told["state"], told["exit_code"]) == ("mine", "FAILED", 3)
    assert told["metrics"]["val/accuracy"] == pytest.approx(2 / 3)


def test_what_a_followed_run_waits_for_is_told_once(past: Past, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(past.home / "data/cvlaunch/runs")
    waiting = Status(State.QUEUED, reason="no node takes it")
    record = dataclasses.replace(ledger.get(past.first), state=waiting.state, status={"reason": waiting.reason})
    with view_of(Run(record, ledger), Out(), err=True) as view:
        for status in (waiting, waiting, Status(State.QUEUED, reason="all are taken"), Status(State.RUNNING)):
            view.show(status)
        view.show(Status(State.FAILED, reason="told at the end"))
    told = ["state: QUEUED: no node takes it", "state: QUEUED: all are taken", "state: RUNNING", "state: FAILED"]
    assert capsys.readouterr().err.splitlines() == told


def test_following_as_json_is_a_line_an_event(tmp_path: Path) -> None:
    write_loop(tmp_path, pause=3.0)
    done = cli("submit", "job.yaml", "--follow", "--json", cwd=tmp_path)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [events[0]["type"], events[-1]["type"], events[-1]["state"]] == ["submitted", "end", "SUCCEEDED"]
    assert {event["type"] for event in events} == {"submitted", "status", "log", "metrics", "end"}
    states = [event["state"] for event in events if event["type"] == "status"]
    assert states[-2:] == ["RUNNING", "SUCCEEDED"]
    assert (events[1]["type"], events[-2]["type"]) == ("status", "status")
    assert [event["values"]["loss"] for event in events if event["type"] == "metrics"] == [1.0, 0.5]


def test_ctrl_c_leaves_the_run_and_cancel_ends_it(tmp_path: Path) -> None:
    write_loop(tmp_path, epochs=3000, pause=0.1)
    with subprocess.Popen(
        [*COMMAND, "submit", "job.yaml", "--run-id", "long", "--follow"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "epoch 2\n":
                break
        os.killpg(process.pid, signal.SIGINT)
        last = process.stderr.read()
        assert process.wait(120) == 130
    assert "cvlaunch: long goes on\n  look again:  cvlaunch watch long\n  stop it:     cvlaunch cancel long" in last
    assert "Traceback" not in last

    running = cli_json("status", "long", cwd=tmp_path)
    assert running["state"] == "RUNNING"
    early = cli("wait", "long", "--timeout", "0.5s", cwd=tmp_path)
    assert (early.returncode, early.stdout) == (124, "")
    refused = cli("rm", "long", "--yes", cwd=tmp_path)
    assert (refused.returncode, "cancel it first" in refused.stderr) == (2, True)

    assert cli("cancel", "long", cwd=tmp_path).returncode == 0
    ended = cli("wait", "long", "--json", cwd=tmp_path)
    assert ended.returncode == 1
    assert json.loads(ended.stdout)[0]["state"] == "CANCELLED"


def test_rm_remote_says_what_goes_and_leaves_nothing(tmp_path: Path, home: Path) -> None:
    write_loop(tmp_path)
    assert cli("submit", "job.yaml", "--run-id", "mine", "--follow", "--quiet", cwd=tmp_path).returncode == 0
    output = Path(cli_json("status", "mine", cwd=tmp_path)["output"].removeprefix("file://"))
    assert (output / "output/result.json").exists()
    done = cli("rm", "mine", "--remote", "--yes", cwd=tmp_path)
    assert done.returncode == 0
    assert f"in file://{output} go, and what local://local/mine left" in done.stderr
    assert not output.exists()
    assert ledger_files(home) == []
    assert (tmp_path / "runs/mine/output/result.json").exists()


def test_rerun_takes_settings_and_another_target(tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").write_text("targets:\n  here: {backend: local, output: results}\n")
    write_loop(tmp_path, extra="env: {LEVEL: 1}\n")
    first = cli("submit", "job.yaml", "--target", "local", "-q", cwd=tmp_path).stdout.strip()
    (tmp_path / "job.yaml").unlink()
    again = cli("rerun", first, "--target", "here", "--set", "env.LEVEL=2", "--follow", "--quiet", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("local://here/loop-")
    told = cli("diff", first, again.stdout.strip(), cwd=tmp_path)
    assert told.returncode == 1
    assert "  env.LEVEL: 1 → 2" in told.stdout
    assert "  target: local → here" in told.stdout
    wrong = cli("rerun", first, "--set", "retries=x", cwd=tmp_path)
    assert (wrong.returncode, "retries: expected a valid integer" in wrong.stderr) == (2, True)


def test_on_a_terminal_there_are_colours_unless_no_color_is_set(past: Past) -> None:
    for variables, coloured in ({}, True), ({"NO_COLOR": "1"}, False):
        text = on_a_terminal(["runs"], past, columns=80, variables=variables)
        assert past.failed in text
        assert ("\x1b[31mFAILED" in text) is coloured
        assert all(len(line) <= 80 for line in plain(text).splitlines())


def test_the_live_view_ends_with_a_table(past: Past) -> None:
    text = plain(on_a_terminal(["watch", past.first, "--no-sync"], past, columns=80, variables={}))
    assert "epoch 2" in text
    assert "val/accuracy" in text
    assert f"{past.first} SUCCEEDED after" in text


def on_a_terminal(arguments: list[str], past: Past, *, columns: int, variables: Mapping[str, str]) -> str:
    """What a terminal of this width gets."""
    import fcntl
    import pty
    import struct
    import termios

    main_end, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**os.environ, **past.env, "TERM": "xterm-256color", **variables}
    env.pop("COLUMNS", None)
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=past.folder, env=env, stdin=other_end, stdout=other_end, stderr=other_end
    )
    os.close(other_end)
    text = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            piece = os.read(main_end, 65536)
        except OSError:  # Linux: EIO when the other end is closed
            break
        text += piece
        if not piece:
            break
    os.close(main_end)
    assert process.wait(60) == 0
    return text.decode()


def plain(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def test_data_is_pushed_first_where_the_target_cannot_see_it(rclone_bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.txt").write_text("hello from the store\n")
    (tmp_path / "targets.yaml").write_text(
        f"targets:\n  s3: {{backend: local, output: {rclone_bucket.uri}/runs, "
        f"storage: {{endpoint: {rclone_bucket.server.options.endpoint!r}, region: us-east-1}}}}\n"
    )
    script = 'import os; print(open(os.environ["CVLAUNCH_DATA_WORDS"] + "/a.txt").read())'
    (tmp_path / "job.yaml").write_text(
        f"name: words\ncommand: [{sys.executable}, -c, {json.dumps(script)}]\ndata: {{words: words}}\n"
    )
    done = cli("submit", "job.yaml", "--push-data", "--target", "s3", "--follow", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"pushed data.words to {rclone_bucket.uri}/runs/_data/" in done.stderr
    assert "hello from the store" in done.stderr
    assert "unpinned: data.words" not in done.stderr
    run_id = done.stdout.strip().rpartition("/")[2]
    assert (tmp_path / "runs" / run_id / "output/result.json").is_file()
    again = cli("logs", run_id, "--rank", "0", cwd=tmp_path)
    assert "hello from the store" in again.stdout
    (tmp_path / "words/a.txt").write_text("hello from another\n")
    (tmp_path / "words/b.txt").write_text("and more\n")
    other = cli("submit", "job.yaml", "--push-data", "--target", "s3", "--follow", cwd=tmp_path)
    assert "hello from another" in other.stderr
    places = [re.search(r"pushed data.words to (\S+)", text)[1] for text in (done.stderr, other.stderr)]  # type: ignore[index]
    first = open_store(places[0], rclone_bucket.server.options)
    assert places[0] != places[1] and first.read("a.txt") == b"hello from the store\n", "nobody's data were replaced"
