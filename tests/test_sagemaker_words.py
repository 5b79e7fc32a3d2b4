"""What SageMaker says of a training job: every status of its model, and reasons of failures as people have met them."""

from __future__ import annotations

import datetime
import json
from typing import Any

import botocore.session
import pytest

from launcher.sagemaker.words import attempt_of, read_result, status_of, summary_status
from launcher.status import State

ARN = "arn:aws:sagemaker:eu-west-1:123456789012:training-job/digits-0000000000"
START = datetime.datetime(2026, 11, 22, 9, 0, tzinfo=datetime.UTC)

MODEL = botocore.session.get_session().get_service_model("sagemaker")
STATUSES: list[str] = MODEL.shape_for("TrainingJobStatus").enum
PHASES: list[str] = MODEL.shape_for("SecondaryStatus").enum

GOES_ON = {
    "Pending": State.QUEUED,
    "Starting": State.STARTING,
    "LaunchingMLInstances": State.STARTING,
    "PreparingTrainingStack": State.STARTING,
    "Downloading": State.STARTING,
    "DownloadingTrainingImage": State.STARTING,
    "Training": State.RUNNING,
    "Updating": State.RUNNING,
    "Interrupted": State.RESTARTING,
    "Restarting": State.RESTARTING,
    "Uploading": State.FINALIZING,
    "Completed": State.FINALIZING,
    "Failed": State.FINALIZING,
    "Stopping": State.STOPPING,
    "Stopped": State.STOPPING,
    "MaxRuntimeExceeded": State.STOPPING,
    "MaxWaitTimeExceeded": State.STOPPING,
}
"""Of a job that is InProgress: its secondary status → ours."""
ENDS = {"Completed": State.SUCCEEDED, "Failed": State.FAILED, "Stopped": State.CANCELLED, "Deleting": State.UNKNOWN}


def job(status: str = "InProgress", phase: str = "Training", **keys: Any) -> dict[str, Any]:
    """As DescribeTrainingJob answers. keys: of the answer, and `steps`, (status, message) of its transitions."""
    steps = [{"Status": word, "StartTime": START, "StatusMessage": message} for word, message in keys.pop("steps", ())]
    ended = {"TrainingEndTime": START + datetime.timedelta(hours=1)} if status in ENDS else {}
    return {
        "TrainingJobName": "digits-0000000000",
        "TrainingJobArn": ARN,
        "TrainingJobStatus": status,
        "SecondaryStatus": phase,
        "SecondaryStatusTransitions": steps,
        "TrainingStartTime": START,
        **ended,
        **keys,
    }


def failed(reason: str, result: dict[str, Any] | None = None) -> Any:
    return status_of(job("Failed", "Failed", FailureReason=reason), result)


def expected(status: str, phase: str) -> State:
    if status == "InProgress":
        return GOES_ON[phase]
    if status == "Stopping":
        return State.FINALIZING if phase == "Uploading" else State.STOPPING
    special = {"MaxRuntimeExceeded": State.TIMED_OUT, "MaxWaitTimeExceeded": State.ERROR}
    return special.get(phase, ENDS[status]) if status == "Stopped" else ENDS[status]


@pytest.mark.parametrize("status", STATUSES)
def test_every_word_of_the_model_has_a_state(status: str) -> None:
    for phase in PHASES:
        described = job(status, phase)
        listed = {key: described[key] for key in ("TrainingJobStatus", "SecondaryStatus")}
        found = {summary_status(listed).state, summary_status(described).state, status_of(described, None).state}
        assert found == {expected(status, phase)}, phase


@pytest.mark.parametrize(
    ("status", "phase", "native"),
    [
        ("InProgress", "Thinking", "InProgress/Thinking"),
        ("Stopping", "Thinking", "Stopping/Thinking"),
        ("Thinking", "Training", "Thinking/Training"),
        ("Thinking", "", "Thinking"),
        ("", "", ""),
    ],
)
def test_a_word_of_a_later_version_is_no_end(status: str, phase: str, native: str) -> None:
    found = status_of(job(status, phase), None)
    state = {"InProgress": State.RUNNING, "Stopping": State.STOPPING}.get(status, State.UNKNOWN)
    assert (found.state, found.native) == (state, native), "one that is unknown for ten minutes would be lost"
    assert not found.state.terminal
    assert summary_status({"TrainingJobStatus": status}).state.terminal is False


def test_both_words_of_sagemaker_stay_beside_ours() -> None:
    assert summary_status(job("InProgress", "Downloading")).native == "InProgress/Downloading"
    assert summary_status(job("Completed", "Completed")).native == "Completed"


def test_times_are_seconds() -> None:
    going, over = status_of(job(), None), status_of(job("Completed", "Completed"), None)
    assert (going.started, going.ended) == (START.timestamp(), None)
    assert (over.started, over.ended) == (START.timestamp(), START.timestamp() + 3600)
    assert status_of({**job("InProgress", "Pending"), "TrainingStartTime": None}, None).started is None


@pytest.mark.parametrize(
    ("phase", "message", "state", "said"),
    [
        ("Starting", "Launching requested ML instances.", State.STARTING, "instances are being prepared"),
        (
            "Starting",
            "Insufficient capacity error from EC2 while launching instances, retrying!",
            State.QUEUED,
            "Insufficient capacity error from EC2",
        ),
        ("Starting", "Launched instance was unhealthy, replacing it!", State.STARTING, "instances are being prepared"),
        ("Pending", "Waiting for capacity", State.QUEUED, "it waits for instances: Waiting for capacity"),
        ("Downloading", "Downloading input data", State.STARTING, "data is being copied"),
        ("Training", "Downloading the training image", State.RUNNING, ""),
        ("Uploading", "Uploading generated training model", State.FINALIZING, "packed and copied"),
        ("Thinking", "Thinking about it", State.RUNNING, "SageMaker says Thinking: Thinking about it"),
    ],
)
def test_messages_of_a_job_that_goes_on(phase: str, message: str, state: State, said: str) -> None:
    """Texts of API_SecondaryStatusTransition."""
    found = status_of(job(phase=phase, steps=[(phase, message)]), None)
    assert found.state is state
    assert said in found.reason


FAILURES: dict[str, tuple[str, State, str, int | None]] = {
    # aws/sagemaker-python-sdk#357
    "AlgorithmError: Exit Code: 1": ("exit code 1", State.FAILED, "", 1),
    # aws/sagemaker-python-sdk#134
    "AlgorithmError: Exit Code: 139": ("exit code 139", State.FAILED, "", 139),
    # a kill for lack of memory
    "AlgorithmError: , exit code: 137": ("exit code 137", State.FAILED, "", 137),
    # huggingface/notebooks#136
    'AlgorithmError: ExecuteUserScriptError:\nExitCode 1\nErrorMessage "raise EnvironmentError(msg)\n\n OSError"': (
        "raise EnvironmentError(msg)",
        State.FAILED,
        "",
        1,
    ),
    # the training toolkit's, with the platform's word after it, which counts
    'AlgorithmError: ExecuteUserScriptError:\nExitCode 2\nErrorMessage ""\nCommand "python -m t", exit code: 1': (
        'Command "python -m t"',
        State.FAILED,
        "",
        1,
    ),
    # aws/sagemaker-python-sdk#1225
    'AlgorithmError: ExecuteUserScriptError:\nCommand "/miniconda3/bin/python -m train --c 0.0003"': (
        'ExecuteUserScriptError:\nCommand "/miniconda3/bin/python -m train --c 0.0003"',
        State.FAILED,
        "",
        None,
    ),
    # what our runner leaves in `failure`
    "AlgorithmError: the command ended with exit code 3\nlast line, exit code: 3": (
        "the command ended with exit code 3\nlast line",
        State.FAILED,
        "",
        3,
    ),
    "AlgorithmError: the timeout of 12h is used up, exit code: 124": (
        "the timeout of 12h is used up",
        State.TIMED_OUT,
        "",
        124,
    ),
    "AlgorithmError: it says: insufficient capacity of the buffer, exit code: 1": (
        "it says: insufficient capacity of the buffer",
        State.FAILED,
        "",
        1,
    ),
    "": ("SageMaker gives no reason", State.FAILED, "", None),
    # DIAGNijmegen/rse-grand-challenge#2631
    "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML instance "
    "type.": ("try again later", State.ERROR, "capacity", None),
    # aws/sagemaker-python-sdk#70
    "InternalServerError: We encountered an internal error. Please try again.": (
        "retries_by_platform",
        State.ERROR,
        "SageMaker",
        None,
    ),
    # aws/sagemaker-python-sdk#57
    "ClientError: Cannot pull algorithm container. Either the image does not exist or its permissions are incorrect.": (
        "ECR",
        State.ERROR,
        "image",
        None,
    ),
    # aws/amazon-sagemaker-examples#2534, there from CreateTrainingJob
    "ClientError: Cannot find repository: custompipeline/preprocessor in registry ID: 521695447989 Please check if "
    "your ECR repository exists and role arn:aws:iam::521695447989:role/Build has proper pull permissions": (
        "ECR",
        State.ERROR,
        "image",
        None,
    ),
    # aws/amazon-sagemaker-examples#3650
    "ClientError: Artifact upload failed:API error (400): OCI runtime create failed: container_linux.go:380: starting "
    'container process caused: exec: "train": executable file not found in $PATH: unknown': (
        "runner",
        State.ERROR,
        "image",
        None,
    ),
    "AlgorithmError: CannotStartContainerError. Please make sure the container can be run with 'docker run <image> "
    "train'. Please refer SageMaker documentation for details.": ("runner", State.ERROR, "image", None),
    # aws/sagemaker-python-sdk#35
    "ClientError: SageMaker was unable to assume the role 'arn:aws:iam::379899735384:role/SageMakerRole'": (
        "cvlaunch targets policy",
        State.ERROR,
        "role",
        None,
    ),
    # aws/amazon-sagemaker-examples#4384
    "ClientError: Data download failed:Unable to download object s3://sagemaker-repository-dub/model-data "
    "(AccessDenied: Access Denied)": ("cvlaunch targets policy", State.ERROR, "role", None),
    "ClientError: Data download failed:failed to download data. 403 Forbidden (403): Forbidden": (
        "cvlaunch targets policy",
        State.ERROR,
        "role",
        None,
    ),
    # aws/amazon-sagemaker-examples#2267, there from CreateTrainingJob
    'ClientError: Data download failed:No S3 objects found under S3 URL "s3://b/image-classification/train/" given in '
    "input data source. Please ensure that the bucket exists in the selected region (us-west-2), that objects exist "
    'under that S3 prefix, and that the role "arn:aws:iam::521695447989:role/Build" has "s3:ListBucket" permissions on '
    'bucket "b".': ("channel", State.ERROR, "data", None),
    # aws/sagemaker-python-sdk#128
    "ClientError: Data download failed:Insufficient disk space": ("resources.disk", State.ERROR, "data", None),
    # aws-samples/generative-ai-on-amazon-sagemaker#242
    "ClientError: Data download failed:Failed to download data. S3 key: s3://b/shared//train/input/requirements.txt "
    "has an illegal char sub-sequence '//' in it": ("channel", State.ERROR, "data", None),
    "ClientError: Failed to download data. ListObjectsV2 failed for s3://b/manifests: Unable to execute request to "
    "S3": ("channel", State.ERROR, "data", None),
    # aws/amazon-sagemaker-operator-for-k8s#22
    "ClientError: Artifact upload failed:Please ensure that the subnet's route table has a route to an S3 VPC endpoint "
    "or a NAT device, and both the security groups and the subnet's network ACL allow outbound traffic to S3": (
        "give the VPC an S3 endpoint",
        State.ERROR,
        "network",
        None,
    ),
    "ClientError: Please use an instance type with more memory, or reduce the size of training data processed on an "
    "instance.": ("resources.memory", State.ERROR, "memory", None),
    # aws/amazon-sagemaker-examples#587
    "ClientError: Please use a GPU instance for training": ("objects to", State.ERROR, "request", None),
    # gabehollombe-aws/jupyter-notebooks#1, there from CreateTrainingJob
    "ResourceLimitExceeded: The account-level service limit 'ml.p3.2xlarge for training job usage' is 0 Instances, "
    "with current utilization of 0 Instances and a request delta of 1 Instances.": (
        "Service Quotas",
        State.ERROR,
        "quota",
        None,
    ),
}
"""FailureReason → what is said, our state, its kind, the exit code."""


@pytest.mark.parametrize("reason", FAILURES, ids=range(len(FAILURES)))
def test_reasons_of_failures(reason: str) -> None:
    said, state, kind, code = FAILURES[reason]
    found = failed(reason)
    assert (found.state, found.exit_code) == (state, code), found
    assert said in found.reason
    if kind:
        assert found.reason.startswith(f"{kind}: {reason}: "), "SageMaker's own words stay"


def result(**keys: Any) -> dict[str, Any]:
    return {"native_id": ARN, "state": "FAILED", "reason": "the command ended", "exit_code": 3, "attempt": 2, **keys}


@pytest.mark.parametrize(
    ("reason", "left", "found"),
    [
        ("AlgorithmError: short, exit code: 1", result(), (State.FAILED, "the command ended", 3)),
        (
            "AlgorithmError: , exit code: 1",
            result(state="TIMED_OUT", reason="the timeout of 1h is used up", exit_code=124),
            (State.TIMED_OUT, "the timeout of 1h is used up", 124),
        ),
        (
            "AlgorithmError: , exit code: 1",
            result(state="CANCELLED", reason="cancelled", exit_code=143),
            (State.CANCELLED, "cancelled", 143),
        ),
        ("AlgorithmError: x, exit code: 137", result(state="RESTARTING"), (State.FAILED, "x", 137)),
        ("AlgorithmError: x, exit code: 137", result(state="SUCCEEDED", exit_code=0), (State.FAILED, "x", 137)),
        ("AlgorithmError: x, exit code: 1", result(exit_code=None), (State.FAILED, "x", 1)),
        ("AlgorithmError: x, exit code: 1", None, (State.FAILED, "x", 1)),
    ],
)
def test_the_runner_s_word_of_an_end_is_exact(reason: str, left: Any, found: tuple[State, str, int]) -> None:
    status = failed(reason, left)
    assert (status.state, status.reason, status.exit_code) == found
    assert status.attempt == (2 if left else 1)


def test_what_ended_it_outside_the_container_counts_more_than_the_runner_s_word() -> None:
    found = failed("InternalServerError: We encountered an internal error. Please try again.", result())
    assert (found.state, found.exit_code) == (State.ERROR, None)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (json.dumps({"native_id": ARN, "exit_code": 0}).encode(), {"native_id": ARN, "exit_code": 0}),
        (json.dumps({"native_id": ""}).encode(), None),
        (json.dumps({"native_id": f"{ARN}-2"}).encode(), None),
        (json.dumps({"exit_code": 0}).encode(), None),
        (b"[]", None),
        (b"{", None),
        (b"\xff", None),
        (b"", None),
    ],
    ids=["its own", "by hand", "another submission's", "nobody's", "a list", "cut off", "no text", "empty"],
)
def test_a_result_counts_for_the_job_that_wrote_it(data: bytes, found: Any) -> None:
    assert read_result(data, ARN) == found


@pytest.mark.parametrize(
    ("steps", "submission", "attempt", "state"),
    [
        (["Starting", "Training"], 1, 1, State.STARTING),
        (["Starting", "Training", "Interrupted", "Starting"], 1, 2, State.RESTARTING),
        (["Starting", "Training", "Interrupted", "Starting", "Training", "Restarting"], 1, 3, State.RESTARTING),
        (["Starting"], 3, 3, State.RESTARTING),
        (["Starting", "Interrupted"], 2, 3, State.RESTARTING),
    ],
)
def test_attempts_are_counted_by_transitions(steps: list[str], submission: int, attempt: int, state: State) -> None:
    described = job(phase="Starting", steps=[(word, "") for word in steps])
    found = status_of(described, None, submission=submission)
    assert (found.attempt, found.state) == (attempt, state)
    over = job("Completed", "Completed", steps=[(word, "") for word in steps])
    assert status_of(over, None, submission=submission).attempt == attempt
    assert status_of(over, result(attempt=9), submission=submission).attempt == 9, "crashes within are the runner's"


@pytest.mark.parametrize(
    ("billed", "trained", "said"),
    [
        (None, None, ""),
        (0, 10, ""),
        (600, None, "10m 00s billed"),
        (600, 600, "10m 00s billed"),
        (600, 3600, "10m 00s billed of 1h 00m"),
    ],
)
def test_what_is_billed(billed: int | None, trained: int | None, said: str) -> None:
    seconds = {"BillableTimeInSeconds": billed, "TrainingTimeInSeconds": trained}
    given = {key: value for key, value in seconds.items() if value is not None}
    found = status_of(job("Completed", "Completed", **given), None)
    assert (found.state, found.exit_code, found.reason) == (State.SUCCEEDED, 0, said)


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("digits-0000000000", 1),
        ("digits-0000000000-2", 2),
        ("digits-0000000000-10", 10),
        ("digits-0000000000-1", 0),
        ("digits-0000000000-02", 0),
        ("digits-0000000000-x", 0),
        ("digits-0000000000-2-2", 0),
        ("digits-00000000002", 0),
        ("digits", 0),
        ("", 0),
    ],
)
def test_names_of_submissions(name: str, attempt: int) -> None:
    assert attempt_of(name, "digits-0000000000") == attempt
