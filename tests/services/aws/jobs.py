"""Training jobs as SageMaker keeps them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.services.aws.account import ACCOUNT
from tests.services.aws.wire import AwsError, Json

__all__ = ["ENDED", "MESSAGES", "Hardware", "Job", "Jobs"]

ENDED = ("Completed", "Failed", "Stopped")

MESSAGES = {
    "Pending": "Waiting for capacity",
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Uploading": "Uploading generated training model",
    "Stopping": "Stopping the training job",
    "Interrupted": "The managed spot training instances were interrupted",
    "Restarting": "Restarting the training job after an internal error",
    "MaxRuntimeExceeded": "Training job runtime exceeded MaxRuntimeInSeconds provided",
    "MaxWaitTimeExceeded": "Training job exceeded MaxWaitTimeInSeconds provided",
    "Stopped": "Training job stopped",
    "Completed": "Training job completed",
    "Failed": "Training job failed",
}
"""Secondary status → what is said with it."""

_FAILURE_CHARACTERS = 1024


@dataclass
class Hardware:
    """What was asked for, or chosen. spot: managed spot."""

    type: str
    count: int
    spot: bool


@dataclass(eq=False)
class Job:
    """posted: the body of CreateTrainingJob. metrics: name → (value,
    epoch seconds)."""

    posted: Json
    region: str
    instance: Hardware
    scripted: bool
    created: float = field(default_factory=time.time)
    status: str = "InProgress"
    transitions: list[Json] = field(default_factory=list)
    failure: str = ""
    artifacts: str = ""
    modified: float = 0.0
    trained_from: float | None = None
    billable: float = 0.0
    ended: float | None = None
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def name(self) -> str:
        return str(self.posted["TrainingJobName"])

    @property
    def arn(self) -> str:
        return f"arn:aws:sagemaker:{self.region}:{ACCOUNT}:training-job/{self.name}"

    @property
    def secondary(self) -> str:
        return str(self.transitions[-1]["Status"]) if self.transitions else "Starting"

    @property
    def over(self) -> bool:
        return self.status in ENDED

    def enter(self, secondary: str, message: str = "", *, status: str | None = None) -> None:
        """The next of its secondary statuses."""
        with self.lock:
            now = time.time()
            if self.transitions:
                self.transitions[-1].setdefault("EndTime", now)
            text = message or MESSAGES.get(secondary, secondary)
            self.transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": text})
            self.modified = now
            if secondary == "Training" and self.trained_from is None:
                self.trained_from = now
            if status:
                self.status = status

    def end(self, status: str, secondary: str = "", failure: str = "") -> None:
        with self.lock:
            self.failure = failure[:_FAILURE_CHARACTERS]
            if self.billable == 0.0 and self.trained_from is not None:
                self.billable = time.time() - self.trained_from
            self.enter(secondary or status, failure[:_FAILURE_CHARACTERS] if status == "Failed" else "", status=status)
            self.ended = self.transitions[-1]["EndTime"] = self.modified

    # -- what is said of it -------------------------------------------------------------------------------------------

    def described(self) -> Json:
        with self.lock:
            posted = {key: value for key, value in self.posted.items() if key not in ("Tags", "SessionChainingConfig")}
            return {
                **posted,
                "TrainingJobArn": self.arn,
                "TrainingJobStatus": self.status,
                "SecondaryStatus": self.secondary,
                "SecondaryStatusTransitions": [dict(transition) for transition in self.transitions],
                "CreationTime": self.created,
                "LastModifiedTime": self.modified,
                "AlgorithmSpecification": self._algorithm(),
                "ResourceConfig": self._resources(),
                "StoppingCondition": {"MaxRuntimeInSeconds": 86400, **self.posted.get("StoppingCondition", {})},
                "EnableNetworkIsolation": self.posted.get("EnableNetworkIsolation", False),
                "EnableInterContainerTrafficEncryption": self.posted.get(
                    "EnableInterContainerTrafficEncryption", False
                ),
                "EnableManagedSpotTraining": self.posted.get("EnableManagedSpotTraining", False),
                "ProfilingStatus": "Disabled",
                **self._times(),
                **({"FailureReason": self.failure} if self.failure else {}),
                **({"ModelArtifacts": {"S3ModelArtifacts": self.artifacts}} if self.artifacts else {}),
                **({"FinalMetricDataList": self._metrics()} if self.metrics else {}),
            }

    def _algorithm(self) -> Json:
        return {"EnableSageMakerMetricsTimeSeries": False, **self.posted.get("AlgorithmSpecification", {})}

    def _resources(self) -> Json:
        config = dict(self.posted.get("ResourceConfig", {}))
        if "InstancePreferences" in config and self.trained_from is not None:
            config |= {"SelectedInstanceType": self.instance.type, "SelectedInstanceCount": self.instance.count}
        return config

    def _times(self) -> Json:
        if self.trained_from is None:
            return {"TrainingEndTime": self.ended} if self.ended else {}
        times: Json = {"TrainingStartTime": self.trained_from}
        if self.ended:
            whole = max(1, round(self.ended - self.trained_from))
            billable = min(whole, max(1, round(self.billable)))
            times |= {"TrainingEndTime": self.ended, "TrainingTimeInSeconds": whole, "BillableTimeInSeconds": billable}
        return times

    def _metrics(self) -> list[Json]:
        return [{"MetricName": n, "Value": value, "Timestamp": when} for n, (value, when) in self.metrics.items()]

    def summary(self) -> Json:
        with self.lock:
            return {
                "TrainingJobName": self.name,
                "TrainingJobArn": self.arn,
                "CreationTime": self.created,
                "LastModifiedTime": self.modified,
                "TrainingJobStatus": self.status,
                "SecondaryStatus": self.secondary,
                **({"TrainingEndTime": self.ended} if self.ended else {}),
            }


class Jobs:
    """Those of one account, all regions together."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], Job] = {}
        self.lock = threading.RLock()

    def add(self, job: Job) -> None:
        self._jobs[job.region, job.name] = job

    def find(self, name: str, region: str | None = None) -> Job | None:
        """None as the region: whichever has it."""
        with self.lock:
            if region is not None:
                return self._jobs.get((region, name))
            return next((job for (_, known), job in self._jobs.items() if known == name), None)

    def get(self, name: str, region: str | None = None) -> Job:
        if (job := self.find(name, region)) is None:
            raise AwsError("ValidationException", "Requested resource not found.")
        return job

    def of_arn(self, arn: str) -> Job:
        with self.lock:
            if (job := next((job for job in self._jobs.values() if job.arn == arn), None)) is None:
                raise AwsError("ValidationException", f"Could not find resource: {arn}")
            return job

    def remove(self, job: Job) -> None:
        with self.lock:
            del self._jobs[job.region, job.name]

    def all(self, region: str | None = None) -> Sequence[Job]:
        with self.lock:
            return [job for (where, _), job in self._jobs.items() if region in (None, where)]

    def in_use(self, instance_type: str, spot: bool, region: str) -> int:
        """Instances of that type."""
        jobs = [job for job in self.all(region) if not job.over]
        return sum(
            job.instance.count for job in jobs if (job.instance.type, job.instance.spot) == (instance_type, spot)
        )

    def clear(self) -> None:
        with self.lock:
            self._jobs.clear()
