"""SageMaker's operations on training jobs."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Mapping

from tests.services.aws.account import Account
from tests.services.aws.jobs import Job, Jobs
from tests.services.aws.quotas import Quotas
from tests.services.aws.rules import check_account, check_fields, instances_of
from tests.services.aws.shapes import check_request
from tests.services.aws.wire import AwsError, Json

__all__ = ["SageMaker"]

_DAY = 24 * 3600
_TAGS = 50


class SageMaker:
    """start, stop: what is to happen with a job that was accepted, or that somebody wants to end."""

    def __init__(
        self, jobs: Jobs, quotas: Quotas, account: Account, start: Callable[[Job], None], stop: Callable[[Job], None]
    ) -> None:
        self._jobs, self._quotas, self._account = jobs, quotas, account
        self._start, self._stop = start, stop
        self.scripted: set[str] = set()
        self._operations: Mapping[str, Callable[[Json, str], Json]] = {
            "CreateTrainingJob": self._create,
            "DescribeTrainingJob": lambda body, region: self._jobs.get(body["TrainingJobName"], region).described(),
            "ListTrainingJobs": self._list,
            "StopTrainingJob": self._stop_job,
            "DeleteTrainingJob": self._delete,
            "ListTags": self._list_tags,
            "AddTags": self._add_tags,
            "DeleteTags": self._delete_tags,
        }

    def answer(self, operation: str, body: Json, region: str) -> Json:
        """AwsError if it is refused."""
        if operation not in self._operations:
            raise AwsError("UnknownOperationException", f"this stand-in has no {operation}")
        offered = frozenset(self._quotas.offered)
        check_request("sagemaker", operation, body, {"TrainingInstanceType": offered})
        return self._operations[operation](body, region)

    def _create(self, body: Json, region: str) -> Json:
        check_fields(body)
        check_account(body, self._account, region)
        name = body["TrainingJobName"]
        with self._jobs.lock:
            if self._jobs.find(name, region) is not None:
                text = f"Training job names must be unique within an AWS account and region, but a training job with \
name {name} already exists"
                raise AwsError("ResourceInUse", text)
            job = self._accepted(body, region)
            self._jobs.add(job)
        job.enter("Starting", "Starting the training job")
        self._start(job)
        return {"TrainingJobArn": job.arn}

    def _accepted(self, body: Json, region: str) -> Job:
        """On the first of its instance types that a quota allows."""
        runtime = body.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", _DAY)
        warm = bool(body["ResourceConfig"].get("KeepAlivePeriodInSeconds"))
        wanted = instances_of(body)
        for instance in wanted[:-1]:
            with contextlib.suppress(AwsError):
                self._quotas.check(instance, runtime, region, warm=warm)
                break
        else:
            instance = wanted[-1]
            self._quotas.check(instance, runtime, region, warm=warm)
        scripted = any(body["TrainingJobName"].startswith(prefix) for prefix in self.scripted)
        job = Job(body, region, instance, scripted)
        job.tags = {tag["Key"]: tag["Value"] for tag in body.get("Tags", ())}
        return job

    def _list(self, body: Json, region: str) -> Json:
        first = _offset(body.get("NextToken"))
        found = [job for job in self._jobs.all(region) if _fits(job, body)]
        key = {"Name": lambda job: job.name, "Status": lambda job: (job.status, job.created)}.get(
            body.get("SortBy", ""), lambda job: job.created
        )
        found.sort(key=key, reverse=body.get("SortOrder", "Descending") == "Descending")
        after = first + body.get("MaxResults", 10)
        more = {"NextToken": _token(after)} if after < len(found) else {}
        return {"TrainingJobSummaries": [job.summary() for job in found[first:after]], **more}

    def _stop_job(self, body: Json, region: str) -> Json:
        job = self._jobs.get(body["TrainingJobName"], region)
        with job.lock:
            if job.over:
                text = f"The request was rejected because the training job is in status {job.status}."
                raise AwsError("ValidationException", text)
            self._stop(job)
        return {}

    def _delete(self, body: Json, region: str) -> Json:
        job = self._jobs.get(body["TrainingJobName"], region)
        if not job.over:
            text = f"The request was rejected because the training job is in status {job.status}; only jobs in a \
terminal state can be deleted."
            raise AwsError("ValidationException", text)
        self._jobs.remove(job)
        return {}

    # -- tags ---------------------------------------------------------------------------------------------------------

    def _list_tags(self, body: Json, region: str) -> Json:
        tags = self._jobs.of_arn(body["ResourceArn"]).tags
        return {"Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}

    def _add_tags(self, body: Json, region: str) -> Json:
        job = self._jobs.of_arn(body["ResourceArn"])
        tags = {**job.tags, **{tag["Key"]: tag["Value"] for tag in body["Tags"]}}
        if len(tags) > _TAGS:
            raise AwsError("ResourceLimitExceeded", f"The maximum number of tags for a resource is {_TAGS}")
        job.tags = tags
        return {"Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}

    def _delete_tags(self, body: Json, region: str) -> Json:
        job = self._jobs.of_arn(body["ResourceArn"])
        job.tags = {key: value for key, value in job.tags.items() if key not in body["TagKeys"]}
        return {}


def _fits(job: Job, body: Json) -> bool:
    bounds = (
        (job.created, "CreationTimeAfter", "CreationTimeBefore"),
        (job.modified, "LastModifiedTimeAfter", "LastModifiedTimeBefore"),
    )
    return (
        body.get("NameContains", "") in job.name
        and body.get("StatusEquals", job.status) == job.status
        and "WarmPoolStatusEquals" not in body
        and "TrainingPlanArnEquals" not in body
        and all(body.get(after, 0) <= value <= body.get(before, float("inf")) for value, after, before in bounds)
    )


def _token(offset: int) -> str:
    return base64.b64encode(f"page {offset}".encode()).decode()


def _offset(token: str | None) -> int:
    if not token:
        return 0
    try:
        return int(base64.b64decode(token).decode().removeprefix("page "))
    except ValueError:
        raise AwsError("ValidationException", "The token is invalid.") from None
