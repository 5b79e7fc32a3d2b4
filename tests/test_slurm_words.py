"""SLURM's words: each state of the manual, reasons in words."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from launcher.backends.base import Handle
from launcher.backends.slurm import SlurmBackend, SlurmTarget
from launcher.slurm.words import ENDED, STATES, STUCK, reason_words, state_word
from launcher.status import State

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


@pytest.mark.parametrize(
    ("word", "state"), [("BORROWED", State.UNKNOWN), ("RUNNING", State.RUNNING), ("COMPLETING", State.FINALIZING)]
)
def test_a_state_that_nobody_has_heard_of_is_unknown(
    word: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A squeue that speaks of it stands for a SLURM to come."""
    programs = tmp_path / "bin"
    programs.mkdir()
    squeue = programs / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '7|{word}|1700000000|1700000001|N/A|node1|a-run|normal|None|cvlaunch:a-run'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    backend = SlurmBackend(SlurmTarget(root=str(tmp_path)), "hpc")
    handle = Handle("slurm", "hpc", "7.a-run")
    status = backend.status([handle])[handle]
    assert (status.state, status.native, status.node) == (state, word, "node1")
