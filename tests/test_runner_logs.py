"""Log lines: time and rank, progress bars, long lines, garbage, secrets."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from launcher.contract import Channel
from launcher.runner.logs import LONGEST_LINE, LineSplitter, RunLog, rank_of_line
from tests.runner_world import RunnerWorld, python

CANARY = "canary-5f1d7c"


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("blocks", "lines"),
    [
        ([b"a\nb\r\nc"], ["a", "b", "c"]),
        ([b"a\r", b"\nb\n"], ["a", "b"]),
        ([b"a", b"b", b"\n", b"\n"], ["ab", ""]),
        ([b"\xff\xfe\n"], ["��"]),
        ([b"caf\xc3", b"\xa9\n"], ["café"]),
        ([b"1%\r2%\r3%\rdone\n"], ["1%", "done"]),
        ([b"1%\r2%\r100%\r"], ["1%", "100%"]),
        ([b"1%\r2%\r3%\r\n"], ["1%", "3%"]),
        ([b"\r1%", b"\r2%", b"\r3%\n"], ["1%", "3%"]),
    ],
)
def test_splitting(blocks: list[bytes], lines: list[str]) -> None:
    splitter = LineSplitter(Clock())
    found = [line for block in blocks for line in splitter.feed(block)]
    assert [*found, *splitter.end()] == lines


def test_progress_comes_once_a_second() -> None:
    clock = Clock()
    splitter = LineSplitter(clock)
    found = []
    for i in range(100):
        clock.now = i / 10
        found += splitter.feed(f"{i}%\r".encode())
    assert len(found) in (9, 10) and found[1] == "10%"


def test_long_lines_are_cut_and_the_next_one_is_whole() -> None:
    splitter = LineSplitter()
    found = [line for _ in range(300) for line in splitter.feed(b"x" * 1000)]
    found += splitter.feed(b"\nnext\n")
    assert len(found) == 2 and found[1] == "next" and len(found[0]) < LONGEST_LINE * 1.2


@pytest.mark.parametrize(
    ("text", "first", "found"),
    [
        ("[default1]:loss 0.3", 0, ("1", "loss 0.3")),
        ("[default0]:[default9]:x", 8, ("8", "[default9]:x")),
        ("torchrun speaks", 0, ("-", "torchrun speaks")),
    ],
)
def test_rank(text: str, first: int, found: tuple[str, str]) -> None:
    assert rank_of_line(text, first) == found


def test_form_of_the_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        log = RunLog(out=out.fileno(), clock=lambda: 1795303171.1234)
        log.say("early")
        log.open(tmp_path / "logs/a.log")
        log.line("1", "loss 0.3")
    assert (tmp_path / "logs/a.log").read_text() == (
        "2026-11-21T23:19:31.123Z [-] early\n2026-11-21T23:19:31.123Z [1] loss 0.3\n"
    )
    assert (tmp_path / "out").read_text() == "cvlaunch: early\nloss 0.3\n"


def test_secret_across_the_cut_is_masked(tmp_path: Path) -> None:
    log = RunLog(out=os.open(os.devnull, os.O_WRONLY))
    log.hide([CANARY])
    log.open(tmp_path / "a.log")
    log.line("0", "x" * (LONGEST_LINE - 5) + CANARY + "y" * 100)
    assert "canar" not in (tmp_path / "a.log").read_text()


def test_a_reader_that_went_away_does_not_end_the_run(world: RunnerWorld) -> None:
    program = "print('x' * 1000, flush=True); time.sleep(0.5)\nfor _ in range(200): print('y' * 1000)"
    running = world.start(world.job(python(program)), prefix=("sh", "-c", '"$@" | head -c 10 >&2; exit 0', "-"))
    running.process.wait(120)
    assert world.result["state"] == "SUCCEEDED" and world.log().count("y" * 1000) == 200


# -- secrets ----------------------------------------------------------------------------------------------------------

LEAK = """
print("token:", os.environ["TOKEN"], "and", json.dumps({"t": os.environ["TOKEN"]}), sys.argv[1:])
leave(3, "refused: " + os.environ["TOKEN"])
"""


def secrets_file(folder: Path, mode: int = 0o600) -> dict[str, str]:
    path = folder / "secrets.env"
    path.write_text(f"TOKEN={json.dumps(CANARY)}\n")
    path.chmod(mode)
    return {"CVLAUNCH_SECRETS_FILE": str(path)}


@pytest.mark.parametrize("source", ["environment", "file"])
def test_secrets_reach_the_command_and_no_text(world: RunnerWorld, source: str) -> None:
    world.folder.mkdir(exist_ok=True)
    env = {"TOKEN": CANARY} if source == "environment" else secrets_file(world.folder)
    job = world.job((*python(LEAK), "${TOKEN}"), secrets={"TOKEN": "env:MY_TOKEN"})
    ended = world.end(job, env=env)
    assert ended.code == 3 and 'token: *** and {"t": "***"} [\'${TOKEN}\']' in ended.output
    assert world.result["reason"] == "refused: ***"
    written = [path for path in world.run.rglob("*") if path.is_file() and path.name != "exit.json"]
    assert len(written) > 5 and not [path for path in written if CANARY in path.read_text()]


@pytest.mark.parametrize(
    ("reference", "mode", "message"),
    [
        ("env:MY_TOKEN", None, "the secret TOKEN (env:MY_TOKEN) is neither in the environment nor in"),
        (
            "store:aws:prod/token",
            None,
            "the secret TOKEN is store:aws:prod/token; known here: store:secretsmanager:…, store:ssm:…",
        ),
        ("env:MY_TOKEN", 0o644, "others can read it"),
    ],
)
def test_secret_that_is_not_there(world: RunnerWorld, reference: str, mode: int | None, message: str) -> None:
    world.folder.mkdir(exist_ok=True)
    env = secrets_file(world.folder, mode) if mode else {}
    ended = world.end(world.job(python("print('ran')"), secrets={"TOKEN": reference}), env=env)
    assert ended.code == 64 and message in ended.output and "ran" not in ended.output and CANARY not in ended.output


def test_command_line_and_environment(world: RunnerWorld) -> None:
    words = (
        "${CVLAUNCH_DATA_TRAIN_2}",
        "${SM_CHANNEL_TRAIN_2}",
        "${LR}",
        "${PATH}",
        "$${LR}",
        "${SM_MODEL_DIR}",
        "$LR",
    )
    data = world.folder / "data"
    data.mkdir(parents=True)
    job = world.job(
        (sys.executable, "-c", "import sys; print(sys.argv[1:])", *words),
        env={"LR": "0.1"},
        channels=(Channel("train-2", data.as_uri(), access="path"),),
    )
    output = world.end(job).output
    train = str(world.run / "input/data/train-2")
    assert str([train, train, "0.1", "${PATH}", "${LR}", str(world.run / "model"), "$LR"]) in output
    assert (world.run / "input/data/train-2").resolve() == data


def test_full_disk_costs_log_lines_and_not_the_training(world: RunnerWorld) -> None:
    """/dev/full stands for a disk without room."""
    logs = world.run / "output/logs"
    logs.mkdir(parents=True)
    (logs / "attempt-1.node-0.log").symlink_to("/dev/full")
    ended = world.end(world.job(python("print('x' * 200000); print('done')")))
    assert ended.code == 0 and "\ndone\n" in ended.output
