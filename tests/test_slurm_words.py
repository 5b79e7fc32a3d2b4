"""SLURM's words: each state of the manual, reasons in words."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.backends.base import Handle
from launcher.backends.slurm import SlurmBackend, SlurmTarget
from launcher.slurm.words import ENDED, STATES, STUCK, reason_words, state_word
from launcher.status import State, Status

# JOB STATE CODES of squeue(1) and sacct(1), 20.11 to 25.05
MANUAL = """
    BOOT_FAIL CANCELLED COMPLETED COMPLETING CONFIGURING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING POWER_UP_NODE
    PREEMPTED REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING RESV_DEL_HOLD REVOKED RUNNING SIGNALING SPECIAL_EXIT STAGE_OUT
    STOPPED SUSPENDED TIMEOUT
"""


def test_every_state_of_the_manual_has_a_word_of_ours() -> None:
    assert sorted(STATES) == sorted(MANUAL.split())
    assert State.UNKNOWN not in STATES.values()


@pytest.mark.needs("slurm")
def test_every_state_of_this_machine_s_manual_has_one_too() -> None:
    shown = subprocess.run(["man", "-P", "cat", "squeue"], capture_output=True, text=True, check=False).stdout
    section = re.split(r"\n(?=[A-Z])", re.sub(r".\x08", "", shown).partition("\nJOB STATE CODES")[2])[0]
    words = re.findall(r"^ {7}[A-Z]+ +([A-Z_]+) ", section, re.MULTILINE)
    if not words:
        pytest.skip("the manual is not installed")
    assert len(words) > 20
    assert set(words) <= set(STATES)


def test_an_end_is_an_end_in_both_tables() -> None:
    assert set(ENDED) == {word for word, state in STATES.items() if state.terminal}


def test_only_a_completed_job_has_succeeded() -> None:
    assert [word for word, state in STATES.items() if state is State.SUCCEEDED] == ["COMPLETED"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("RUNNING", "RUNNING"),
        ("CANCELLED by 1000", "CANCELLED"),
        ("OUT_OF_ME+", "OUT_OF_ME"),
        ("FAILED+", "FAILED"),
        ("", ""),
    ],
)
def test_words_as_sacct_writes_them(text: str, word: str) -> None:
    assert state_word(text) == word


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "waiting for priority: other jobs come first"),
        ("(Priority)", "waiting for priority: other jobs come first"),
        ("Resources", "waiting for resources"),
        ("None", "waiting for the scheduler to look at it"),
        ("JobHeldUser", "held; let it go with: scontrol release JOBID"),
        ("ReqNodeNotAvail, UnavailableNodes:node2", "a node that it needs is not available: down, drained or reserved"),
        ("PartitionTimeLimit", "will never start: it asks for more time than the partition gives (PartitionTimeLimit)"),
        ("InvalidQOS", "will never start: the QOS is not valid any more (InvalidQOS)"),
        ("QOSMaxGRESPerUser", "a limit of the QOS is reached: GPUs for one user (QOSMaxGRESPerUser)"),
        ("QOSMaxCpuPerUserLimit", "a limit of the QOS is reached: CPUs for one user (QOSMaxCpuPerUserLimit)"),
        ("QOSMaxJobsPerUserLimit", "a limit of the QOS is reached: jobs for one user (QOSMaxJobsPerUserLimit)"),
        ("MaxGRESPerAccount", "a limit of the QOS is reached: GPUs for one account (MaxGRESPerAccount)"),
        ("AssocGrpGRES", "a limit of the account is reached: GPUs (AssocGrpGRES)"),
        ("AssocGrpCPUMinutesLimit", "a limit of the account is reached: CPU minutes (AssocGrpCPUMinutesLimit)"),
        ("AssocGrpMemRunMinutes",
         "a limit of the account is reached: memory minutes of running jobs (AssocGrpMemRunMinutes)"),
        ("AssocGrpSubmitJobsLimit", "a limit of the account is reached: submitted jobs (AssocGrpSubmitJobsLimit)"),
        ("QOSMaxWallDurationPerJobLimit",
         "will never start: it asks for more time than the QOS gives to one job (QOSMaxWallDurationPerJobLimit)"),
        ("AssocMaxGRESPerNode",
         "will never start: it asks for more GPUs than the account gives to one node (AssocMaxGRESPerNode)"),
        ("QOSMinGRES", "will never start: the QOS wants jobs that ask for more: GPUs (QOSMinGRES)"),
        ("ANewReason", "waiting (ANewReason)"),
        ("(ANewReason)", "waiting (ANewReason)"),
        ("", ""),
    ],
)  # fmt: skip
def test_reasons_in_words(reason: str, words: str) -> None:
    assert reason_words(reason) == words


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("RUNNING", "None", ""),
        ("COMPLETING", "None", ""),
        ("SUSPENDED", "None", "suspended by the scheduler, in favour of another job"),
    ],
)
def test_a_job_that_does_not_wait_has_no_reason_to(state: str, reason: str, words: str) -> None:
    assert reason_words(reason, state=state) == words


def test_what_never_starts_says_so_with_slurm_s_word() -> None:
    for word in STUCK:
        assert reason_words(word) == f"will never start: {STUCK[word]} ({word})"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Status]:
    """The status of job 7 of run `a-run` on a cluster whose commands print the given texts."""

    def status_of(run: str = "a-run", **outputs: str) -> Status:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("squeue", "scontrol", "sacct", "sacctmgr"):
            script = f"cat <<'TEXT'\n{outputs[name]}\nTEXT" if name in outputs else f"exit {int(name != 'squeue')}"
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        (tmp_path / "jobs" / run).mkdir(parents=True)
        handle = Handle("slurm", "hpc", f"7.{run}")
        return SlurmBackend(SlurmTarget(root=str(tmp_path)), "hpc").status([handle])[handle]

    return status_of


@pytest.mark.parametrize(
    ("word", "state"), [("BORROWED", State.UNKNOWN), ("RUNNING", State.RUNNING), ("COMPLETING", State.FINALIZING)]
)
def test_a_state_that_nobody_has_heard_of_is_unknown(word: str, state: State, programs: Callable[..., Status]) -> None:
    """A squeue that speaks of it stands for a SLURM to come."""
    status = programs(squeue=f"7|{word}|1700000000|1700000001|N/A|node1|a-run|normal|None|cvlaunch:a-run")
    assert (status.state, status.native, status.node) == (state, word, "node1")


ENDS = [
    ("CANCELLED", State.CANCELLED, "cancelled with scancel"),
    ("COMPLETED", State.SUCCEEDED, ""),
    ("FAILED", State.FAILED, "its script was killed by signal 9 (Killed)"),
    ("OUT_OF_MEMORY", State.FAILED, "out of memory: the kernel killed it; ask for more with resources.memory"),
    ("TIMEOUT", State.TIMED_OUT, "killed at its time limit"),
    ("NODE_FAIL", State.ERROR, "its node failed: node1"),
    ("BOOT_FAIL", State.ERROR, "its nodes could not be started"),
    ("DEADLINE", State.ERROR, "its deadline passed before it could end"),
    ("PREEMPTED", State.FAILED, "preempted, and SLURM did not put it back into the queue"),
    ("REVOKED", State.ERROR, "taken back: a cluster of the federation has it"),
]
"""Of a job whose script has left no word."""


@pytest.mark.parametrize(("word", "state", "reason"), ENDS, ids=[end[0] for end in ENDS])
@pytest.mark.parametrize("program", ["scontrol", "sacct"])
def test_every_end_by_the_controller_and_by_the_accounts(
    program: str, word: str, state: State, reason: str, programs: Callable[..., Status]
) -> None:
    code = "0:9" if word == "FAILED" else "0:0"
    texts = {
        "scontrol": f"JobId=7 JobName=a-run JobState={word} Reason=None ExitCode={code} NodeList=node1",
        "sacct": f"7|a-run|{word}|{code}|1700000000|1700000009|node1",
    }
    status = programs(**{program: texts[program]})
    assert (status.state, status.native, status.reason) == (state, word, reason)


@pytest.mark.parametrize(
    "outputs",
    [
        {"sacct": "7|a-run|RUNNING|0:0|1700000000|Unknown|node1"},
        {"sacct": "7|another|COMPLETED|0:0|1700000000|1700000009|node1"},
        {"scontrol": "JobId=7 JobName=another JobState=COMPLETED ExitCode=0:0 NodeList=node1"},
        {"squeue": "7|COMPLETED|1700000000|1700000001|N/A|node1|another|normal|None|"},
        {},
    ],
    ids=["out of date", "another by accounts", "another by scontrol", "another by squeue", "nothing"],
)
def test_what_nobody_knows_is_unknown(outputs: dict[str, str], programs: Callable[..., Status]) -> None:
    assert programs(**outputs).state is State.UNKNOWN


def test_a_job_that_was_sent_under_another_name_is_known_by_its_comment(programs: Callable[..., Status]) -> None:
    status = programs(squeue="7|RUNNING|1700000000|1700000001|N/A|node1|renamed|normal|None|cvlaunch:a-run")
    assert status.state is State.RUNNING
