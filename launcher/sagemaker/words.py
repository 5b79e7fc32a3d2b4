"""What SageMaker says of a training job, in our words: states, reasons, and why one failed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from launcher.quantities import format_duration
from launcher.sagemaker.client import Json
from launcher.status import State, Status

__all__ = ["attempt_of", "read_result", "status_of", "summary_status"]

_ENDS: Mapping[tuple[str, str], tuple[State, str]] = {
    ("Completed", ""): (State.SUCCEEDED, ""),
    ("Stopped", "MaxRuntimeExceeded"): (State.TIMED_OUT, "SageMaker's limit of the running time was reached"),
    ("Stopped", "MaxWaitTimeExceeded"): (State.ERROR, "capacity: it could not run in the time that it may wait"),
    ("Stopped", ""): (State.CANCELLED, ""),
    ("Failed", ""): (State.FAILED, ""),
    ("Deleting", ""): (State.UNKNOWN, "it is being deleted"),
}
"""TrainingJobStatus and SecondaryStatus, of which an empty one is any."""

_PHASES: Mapping[str, tuple[State, str]] = {
    "Pending": (State.QUEUED, "it waits for instances"),
    "Starting": (State.STARTING, "instances are being prepared"),
    "LaunchingMLInstances": (State.STARTING, "instances are being prepared"),
    "PreparingTrainingStack": (State.STARTING, "instances are being prepared"),
    "Downloading": (State.STARTING, "data is being copied"),
    "DownloadingTrainingImage": (State.STARTING, "the image is being pulled"),
    "Training": (State.RUNNING, ""),
    "Updating": (State.RUNNING, ""),
    "Interrupted": (State.RESTARTING, "its spot instances were taken away; it goes on when there are others"),
    "Restarting": (State.RESTARTING, "SageMaker starts it again after an error of its own"),
    "Uploading": (State.FINALIZING, "its results are being packed and copied"),
    "MaxRuntimeExceeded": (State.STOPPING, "SageMaker's limit of the running time was reached"),
    "MaxWaitTimeExceeded": (State.STOPPING, "capacity: it could not run in the time that it may wait"),
    "Stopping": (State.STOPPING, ""),
    "Stopped": (State.STOPPING, ""),
    "Completed": (State.FINALIZING, ""),
    "Failed": (State.FINALIZING, ""),
}
"""SecondaryStatus of a job that goes on, as one with any other word does: AWS says that its words may change."""

_SAYS = "SageMaker says"

_WAITING = re.compile(r"insufficient capacity|waiting for .*capacity|unable to provision", re.IGNORECASE)
"""A message of a job that is Starting, and really waits."""


@dataclass(frozen=True)
class _Cause:
    """pattern: of FailureReason. way_out: what to do. The first that fits counts."""

    pattern: str
    state: State
    kind: str
    way_out: str


_CAUSES = (
    _Cause(r"^(?!AlgorithmError).*(CapacityError|insufficient capacity|unable to provision)", State.ERROR, "capacity",
           "try again later, name more GPUs in resources.gpu, or another region"),
    _Cause(r"^(ResourceLimitExceeded|(?!AlgorithmError).*account-level service limit)", State.ERROR, "quota",
           "ask for a larger one in Service Quotas; see: cvlaunch targets probe"),
    _Cause(r"^InternalServerError", State.ERROR, "SageMaker",
           "submit it again; retries_by_platform in the target does that"),
    _Cause(r"^ClientError.*(route table|VPC endpoint|network ACL)", State.ERROR, "network",
           "instances in your subnets must reach S3: give the VPC an S3 endpoint or a NAT"),
    _Cause(r"^ClientError.*instance type with more memory", State.ERROR, "memory", "ask for more in resources.memory"),
    _Cause(r"^(AlgorithmError: CannotStartContainerError|ClientError.*(OCI runtime|executable file not found))",
           State.ERROR, "image", "it must have the runner on its path, or its own entry point with runner: none"),
    _Cause(r"^ClientError(?!: (Data download|Failed to download)).*"
           r"(\bimage\b|algorithm container|repository|\bECR\b|manifest)", State.ERROR, "image",
           "check that it is in ECR of this region, is for amd64, and that the role may pull it"),
    _Cause(r"^ClientError.*(No S3 objects|disk space|space left)", State.ERROR, "data",
           "check the channel's place, and resources.disk"),
    _Cause(r"^ClientError.*(\brole\b|assume|AccessDenied|not authorized|Access denied|\b403\b)", State.ERROR, "role",
           "the role lacks a permission; see: cvlaunch targets policy"),
    _Cause(r"^ClientError.*(data ?source|download|\bS3\b|channel|\bdisk\b)", State.ERROR, "data",
           "check the channel's place, and resources.disk"),
    _Cause(r"^ClientError", State.ERROR, "request", "change what it objects to"),
)  # fmt: skip
"""https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeTrainingJob.html, FailureReason"""

_EXIT_CODE = re.compile(r",?\s*\bexit ?code:?\s*\"?(-?\d+)\"?\s*$", re.MULTILINE | re.IGNORECASE)
"""SageMaker's words, and those of its training toolkit."""
_TIMED_OUT = re.compile(r"^the timeout of .* is used up")


def attempt_of(name: str, run_id: str) -> int:
    """Of a job's name: `run-id-3` is the third submission of `run-id`; 0 if it is another run's."""
    if name == run_id:
        return 1
    number = name.removeprefix(f"{run_id}-")
    return int(number) if name.startswith(f"{run_id}-") and re.fullmatch(r"[2-9]|[1-9]\d+", number) else 0


def summary_status(job: Mapping[str, Any]) -> Status:
    """Of an item of ListTrainingJobs, or of an answer to DescribeTrainingJob, without the reasons of an end."""
    word, phase = str(job.get("TrainingJobStatus", "")), str(job.get("SecondaryStatus") or "")
    native = f"{word}/{phase}" if phase and phase != word else word
    ended = _seconds(job.get("TrainingEndTime"))
    if word == "InProgress" or word == "Stopping":
        state, reason = _PHASES.get(phase, (State.RUNNING, f"{_SAYS} {phase or word}"))
        if word == "Stopping" and not state.terminal:
            state = State.FINALIZING if phase == "Uploading" else State.STOPPING
        return Status(state, native, reason, started=_seconds(job.get("TrainingStartTime")))
    state, reason = _ENDS.get((word, phase)) or _ENDS.get((word, "")) or (State.UNKNOWN, f"{_SAYS} {word}")
    return Status(state, native, reason, started=_seconds(job.get("TrainingStartTime")), ended=ended)


def status_of(job: Json, result: Mapping[str, Any] | None, *, submission: int = 1) -> Status:
    """Of an answer to DescribeTrainingJob. result: what the runner left as result.json, if it is this job's.

    submission: how often the run had been sent when this job was.
    """
    status, attempt = summary_status(job), submission + _restarts(job)
    if not status.state.terminal:
        return _going_on(job, status, attempt)
    if result is not None:
        attempt = max(attempt, int(result.get("attempt") or 0))
    state, reason, code = _end(job, status, result or {})
    return Status(state, status.native, reason, code, status.started, status.ended, attempt=attempt)


def _going_on(job: Json, status: Status, attempt: int) -> Status:
    said = _last_message(job)
    state, reason = status.state, status.reason
    if state is State.STARTING and _WAITING.search(said):
        state, reason = State.QUEUED, said
    elif state is State.STARTING and attempt > 1:
        state = State.RESTARTING
    elif said and (state is State.QUEUED or reason.startswith(_SAYS)):
        reason = f"{reason}: {said}" if reason else said
    return Status(state, status.native, reason, started=status.started, attempt=attempt)


def _end(job: Json, status: Status, result: Mapping[str, Any]) -> tuple[State, str, int | None]:
    code = result.get("exit_code")
    if status.state is State.SUCCEEDED:
        return State.SUCCEEDED, _billed(job), 0 if code is None else int(code)
    if status.state is State.CANCELLED and _waited_in_vain(job, status):
        state, reason = _ENDS["Stopped", "MaxWaitTimeExceeded"]
        return state, reason, None
    if status.state is not State.FAILED:
        return status.state, status.reason, None
    failure = str(job.get("FailureReason") or "")
    cause = next((cause for cause in _CAUSES if re.search(cause.pattern, failure, re.IGNORECASE | re.DOTALL)), None)
    if cause is not None:
        return cause.state, f"{cause.kind}: {failure}: {cause.way_out}", None
    if result.get("state") in (State.FAILED, State.TIMED_OUT, State.CANCELLED) and isinstance(code, int):
        return State(result["state"]), str(result.get("reason") or ""), code
    return _by_words(failure)


def _waited_in_vain(job: Json, status: Status) -> bool:
    """For longer than MaxPendingTimeInSeconds, of which SageMaker says no more than that it has stopped the job."""
    longest = (job.get("StoppingCondition") or {}).get("MaxPendingTimeInSeconds")
    created = _seconds(job.get("CreationTime"))
    if longest is None or created is None or status.ended is None or job.get("TrainingStartTime"):
        return False
    return status.ended - created >= float(longest)


def _by_words(failure: str) -> tuple[State, str, int | None]:
    """`AlgorithmError: <the failure file>, exit code: 3`"""
    *_, found = [None, *_EXIT_CODE.finditer(failure)]  # the last is the platform's; the job's own text comes first
    code = int(found[1]) if found else None
    said = failure[: found.start()] + failure[found.end() :] if found else failure
    text = said.removeprefix("AlgorithmError:").strip(" ,\n")
    state = State.TIMED_OUT if _TIMED_OUT.search(text) else State.FAILED
    return state, text or (f"exit code {code}" if code is not None else "SageMaker gives no reason"), code


def read_result(data: bytes, arn: str) -> Mapping[str, Any] | None:
    """result.json, if this job wrote it: an earlier submission of the run may have left one."""
    try:
        result = json.loads(data)
    except ValueError:
        return None
    return result if isinstance(result, dict) and result.get("native_id") == arn else None


def _billed(job: Json) -> str:
    """For people: what it costs, and what spot has saved."""
    billed, trained = job.get("BillableTimeInSeconds"), job.get("TrainingTimeInSeconds")
    if not billed:
        return ""
    text = f"{format_duration(billed)} billed"
    return f"{text} of {format_duration(trained)}" if trained and trained > billed else text


def _transitions(job: Json) -> list[Json]:
    return list(job.get("SecondaryStatusTransitions") or ())


def _restarts(job: Json) -> int:
    return sum(step.get("Status") in ("Interrupted", "Restarting") for step in _transitions(job))


def _last_message(job: Json) -> str:
    return str(next((step.get("StatusMessage") or "" for step in reversed(_transitions(job))), ""))


def _seconds(when: object) -> float | None:
    return when.timestamp() if isinstance(when, datetime) else None
