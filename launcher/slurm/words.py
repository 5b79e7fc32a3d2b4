"""SLURM's words for states and reasons, and what they mean. From squeue(1), sacct(1), "Job Reason Codes"."""

from __future__ import annotations

import re
from collections.abc import Mapping

from launcher.status import State

__all__ = ["ENDED", "LIMITS", "STATES", "STUCK", "reason_words", "state_word"]

STATES = {
    "BOOT_FAIL": State.ERROR,
    "CANCELLED": State.CANCELLED,
    "COMPLETED": State.SUCCEEDED,
    "COMPLETING": State.FINALIZING,
    "CONFIGURING": State.STARTING,
    "DEADLINE": State.ERROR,
    "FAILED": State.FAILED,
    "NODE_FAIL": State.ERROR,
    "OUT_OF_MEMORY": State.FAILED,
    "PENDING": State.QUEUED,
    "POWER_UP_NODE": State.STARTING,
    "PREEMPTED": State.FAILED,
    "REQUEUED": State.RESTARTING,
    "REQUEUE_FED": State.RESTARTING,
    "REQUEUE_HOLD": State.RESTARTING,
    "RESIZING": State.RUNNING,
    "RESV_DEL_HOLD": State.QUEUED,
    "REVOKED": State.ERROR,
    "RUNNING": State.RUNNING,
    "SIGNALING": State.STOPPING,
    "SPECIAL_EXIT": State.RESTARTING,
    "STAGE_OUT": State.FINALIZING,
    "STOPPED": State.RUNNING,
    "SUSPENDED": State.RUNNING,
    "TIMEOUT": State.TIMED_OUT,
}
"""A job's state, as squeue, scontrol and sacct write it. Any other word is UNKNOWN."""

ENDED = {
    "BOOT_FAIL": "its nodes could not be started",
    "CANCELLED": "cancelled",
    "COMPLETED": "",
    "DEADLINE": "its deadline passed before it could end",
    "FAILED": "",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory: the kernel killed it; ask for more with resources.memory",
    "PREEMPTED": "preempted, and SLURM did not put it back into the queue",
    "REVOKED": "taken back: a cluster of the federation has it",
    "TIMEOUT": "killed at its time limit",
}
"""States that are an end → what to say of it where nobody else says why."""

_RUNNING_WORDS = {
    "STOPPED": "stopped by a signal; it keeps its nodes",
    "SUSPENDED": "suspended by the scheduler, in favour of another job",
}

_REASONS = {
    "AssociationJobLimit": "the account's limit of jobs is reached",
    "AssociationResourceLimit": "a limit of the account is reached",
    "AssociationTimeLimit": "the account's time limit is reached",
    "AccountingPolicy": "a limit of the account or the QOS is reached",
    "BeginTime": "waiting for its earliest start",
    "BurstBufferOperation": "a burst buffer operation failed",
    "BurstBufferResources": "waiting for a burst buffer",
    "BurstBufferStageIn": "its data are being brought into a burst buffer",
    "Cleaning": "its last start is being cleaned up",
    "Dependency": "waiting for another job",
    "DeadLine": "its deadline has passed",
    "FedJobLock": "waiting for the clusters of the federation to agree",
    "FrontEndDown": "no front end node is available",
    "InactiveLimit": "the limit of inactivity was reached",
    "JobArrayTaskLimit": "waiting for other jobs of its array: so many run at a time",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held; let it go with: scontrol release JOBID",
    "JobHoldMaxRequeue": "held: SLURM has put it back into the queue too often (MaxBatchRequeue)",
    "JobLaunchFailure": "it could not be launched; a file system that is away, or an invalid program",
    "Licenses": "waiting for a license",
    "NodeDown": "a node that it needs is down",
    "None": "waiting for the scheduler to look at it",
    "NonZeroExitCode": "its last start failed",
    "PartitionConfig": "the partition can't start it: its nodes, time or memory are beyond what it gives now",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition starts no jobs now",
    "PowerNotAvail": "waiting for power: the cluster has reached its cap",
    "PowerReserved": "waiting for power, which is reserved for others",
    "Priority": "waiting for priority: other jobs come first",
    "Prolog": "its prolog is running",
    "QOSJobLimit": "the QOS's limit of jobs is reached",
    "QOSResourceLimit": "a limit of the QOS is reached",
    "QOSTimeLimit": "the QOS's time limit is reached",
    "QOSUsageThreshold": "the QOS's usage threshold is reached",
    "ReqNodeNotAvail": "a node that it needs is not available: down, drained or reserved",
    "Reservation": "waiting for its reservation",
    "Resources": "waiting for resources",
    "SchedDefer": "the scheduler looks at it later",
    "SystemFailure": "SLURM itself failed, or a file system or network",
    "TimeLimit": "its last start used up its time",
    "WaitingForScheduling": "waiting for the scheduler to look at it",
}

STUCK = {
    "BadConstraints": "no node can ever have what it asks for",
    "DependencyNeverSatisfied": "what it depends on has failed",
    "InvalidAccount": "the account is not valid any more",
    "InvalidQOS": "the QOS is not valid any more",
    "MaxMemPerLimit": "it asks for more memory than the partition gives to a node or a CPU",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives to one job",
    "PartitionTimeLimit": "it asks for more time than the partition gives",
    "QOSNotAllowed": "the partition doesn't take this QOS",
    "AccountNotAllowed": "the partition doesn't take this account",
    "ReservationDeleted": "its reservation was removed",
    "NodeCountIncorrect": "it asks for more nodes than there are",
}
"""Reasons that never clear by themselves."""

_LIMIT = re.compile(
    r"(Assoc|QOS)?(Grp|Max|Min)(.+?)(RunMinutes|Minutes)?(?:(PerJob|PerNode)|(PerAccount|PerAcct|PA)|(PerUser|PU))?"
    r"(?:Limit|NotSatisfied)?"
)
_WHAT = {
    "BB": "burst buffer",
    "Billing": "billing",
    "Cpu": "CPUs",
    "CPU": "CPUs",
    "GRES": "GPUs",
    "License": "licenses",
    "Lic": "licenses",
    "Mem": "memory",
    "Node": "nodes",
    "Submit": "submitted jobs",
    "SubmitJob": "submitted jobs",
    "SubmitJobs": "submitted jobs",
    "Unknown": "resources",
    "Wall": "time",
    "WallDuration": "time",
}
_MINUTES = {"Minutes": " minutes", "RunMinutes": " minutes of running jobs"}


LIMITS = ("GrpTRES", "MaxTRESPU", "MaxTRESPA", "GrpJobs", "MaxJobsPU", "MaxJobsPA")
"""Fields of a QOS that keep jobs waiting: sacctmgr(1), SPECIFICATIONS FOR QOS."""
_TRES = {"Cpu": "cpu", "CPU": "cpu", "GRES": "gres/gpu", "Mem": "mem", "Node": "node", "Lic": "license"}


def state_word(text: str) -> str:
    """`CANCELLED` of `CANCELLED by 1000`, `FAILED` of sacct's cut `FAILED+`."""
    return text.partition(" ")[0].rstrip("+")


def reason_words(reason: str, *, state: str = "PENDING", limits: Mapping[str, str] = {}) -> str:
    """What a user wants to hear of the reason column; SLURM's own word where it is none that we know.

    limits: of the job's QOS, as sacctmgr(1) names them (`LIMITS`).
    """
    if state in _RUNNING_WORDS:
        return _RUNNING_WORDS[state]
    word = reason.strip("()").partition(",")[0].strip()
    if state != "PENDING" or not word:
        return ""
    if word in STUCK:
        return f"will never start: {STUCK[word]} ({word})"
    if word in _REASONS:
        return _REASONS[word]
    return _limit_words(word, limits) or f"waiting ({reason.strip('() ')})"


def _limit_words(word: str, limits: Mapping[str, str]) -> str:
    match = _LIMIT.fullmatch(word)
    if not match:
        return ""
    whose, kind, what, minutes, one, account, user = match.groups()
    owner = "account" if whose == "Assoc" else "QOS"
    known = _WHAT.get(what, what.lower())
    if minutes:
        known = known.removesuffix("s") + _MINUTES[minutes]
    if kind == "Min":
        return f"will never start: the {owner} wants jobs that ask for more: {known} ({word})"
    if one:
        return f"will never start: it asks for more {known} than the {owner} gives to one {one[3:].lower()} ({word})"
    each = " for one account" if account else " for one user" if user else ""
    most = _most(kind + ("PA" if account else "PU" if user else ""), what, limits) if owner == "QOS" else ""
    return f"a limit of the {owner} is reached: {most}{known}{each} ({word})"


def _most(kind: str, what: str, limits: Mapping[str, str]) -> str:
    """`4 `, of `gres/gpu=4`; empty where it isn't told. kind: Grp, MaxPU, MaxPA."""
    prefix, each = kind[:3], kind[3:]
    if what == "Jobs":
        found = limits.get(f"{prefix}Jobs{each}", "")
    else:
        pairs = (pair.partition("=") for pair in limits.get(f"{prefix}TRES{each}", "").split(","))
        found = next((value for name, _, value in pairs if name == _TRES.get(what)), "")
    return f"{found} " if found else ""
