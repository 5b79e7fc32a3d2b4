"""Amazon SageMaker: one training job a run, in one account and region."""

from __future__ import annotations

import json
import math
import os.path
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal

from launcher.backends.base import (
    Adopted,
    BaseTarget,
    Feature,
    Handle,
    Job,
    LogLine,
    Plan,
    Problem,
    Remarks,
    Support,
    Transport,
    native_name,
)
from launcher.contract import RESULT, JobFile
from launcher.errors import AuthError, CapacityError, ConflictError, CvlaunchError, SpecError, UnsupportedError
from launcher.quantities import format_duration
from launcher.rules import RULES, ContainerRules
from launcher.sagemaker import words
from launcher.sagemaker.adoption import (
    SUBMISSION,
    adopt_foreign,
    adopt_own,
    has_runner,
    job_name,
    no_such_job,
    own_run_id,
    run_folder,
    submission_of,
)
from launcher.sagemaker.catalogue import instance_type
from launcher.sagemaker.catalogue import words as words_of_type
from launcher.sagemaker.client import Account, Json, MissingError, quota_of
from launcher.sagemaker.limits import check_request, doubts
from launcher.sagemaker.request import (
    PLAN_SHA,
    ROLE,
    RUN,
    instances,
    is_accelerated,
    request_context,
    too_large,
)
from launcher.sagemaker.target import SageMakerTarget
from launcher.status import State, Status
from launcher.stores import Store, open_store
from launcher.watch import seldom

__all__ = ["SageMakerBackend"]

_MOVERS = {"checkpoints": "platform", "model": "platform", "output": "runner"}
_ISOLATED = {**_MOVERS, "output": "platform"}
_GRACE_S = RULES["sagemaker"].grace_s or 0.0

_PAGE = 100
_PACE_S = 0.5
"""Between two pages: SageMaker lists twice a second for a whole account."""
_PAGES = 50
"""Of 100 jobs, the newest first; what is older is asked for by its name."""
_AT_ONCE = 4
_SUFFIX = re.compile(r"-[0-9a-z]{10}(-\d+)?$")
"""What follows the slug in a run id of ours."""

_ECR = re.compile(r"\d{12}\.dkr\.ecr(-fips)?\.[a-z0-9-]+\.amazonaws\.com(\.cn)?/.+")
_OVER = re.compile(r"status (Completed|Failed|Stopped|Stopping)|already|in a terminal", re.IGNORECASE)
"""What StopTrainingJob says of a job that needs no stopping."""

_FOREIGN = {
    "retries": "a foreign image (runner: none) has nobody to start it again; write retries: 0",
    "code": "a foreign image (runner: none) has nobody to bring it; build the code into the image",
    "secrets": "a foreign image (runner: none) has nobody to fetch them; let it read them with the job's role",
    "train": "the trainer is started by our runner; write runner: auto",
}
"""Key of the job → why a foreign image can't have it."""

_STORES = ("secretsmanager", "ssm")
_STORE_WORDS = "store:secretsmanager:NAME or store:ssm:NAME"


class SageMakerBackend:
    name: ClassVar[str] = "sagemaker"
    Target: ClassVar[type[BaseTarget]] = SageMakerTarget
    template: ClassVar[str] = "sagemaker/training_job.json.j2"
    form: ClassVar[Literal["json", "yaml", "script"]] = "json"
    inline_job: ClassVar[bool] = False
    doubt_s: ClassVar[float] = 60.0
    check_first: ClassVar[bool] = False
    features: ClassVar[Mapping[Feature, Support]] = {
        Feature.GPUS: Support(True),
        Feature.MULTI_NODE: Support(True),
        Feature.SHM: Support(
            False, "its API has no field for shared memory; leave shm out: the runner fits the loaders to what is there"
        ),
        Feature.SPOT: Support(True),
        Feature.RESTART: Support(True),
        Feature.MAX_WAIT: Support(True),
        Feature.SECRETS_CLIENT: Support(
            False, f"whoever may describe a job reads its variables; keep it in AWS and write {_STORE_WORDS}"
        ),
        Feature.SECRETS_STORE: Support(True),
        Feature.CONTAINER: Support(True),
        Feature.FOLLOW_LOGS: Support(True),
        Feature.EXEC: Support(
            False,
            "SageMaker has no such call; with RemoteDebugConfig in the target's overlay, `aws ssm start-session` opens "
            "a shell",
        ),
    }
    ignored: ClassVar[Mapping[str, str]] = {}
    placeholders: ClassVar[Mapping[str, str]] = {"role": ROLE, "output": "s3://REPLACE-ME/runs"}

    def __init__(
        self, target: SageMakerTarget, target_name: str, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.target = target
        self.target_name = target_name
        self._account = Account(target.access, target_name)
        self._sleep = sleep
        self._runners: dict[str, bool] = {}

    @property
    def rules(self) -> ContainerRules:
        return RULES[self.name]

    @property
    def transports(self) -> Mapping[str, Transport]:
        return {"s3": Transport({"s3": "mounted"}, _ISOLATED if self.target.network_isolation else _MOVERS)}

    # -- before a run -------------------------------------------------------------------------------------------------

    def context(self, job: Job, run_id: str, job_file: JobFile) -> Mapping[str, object]:
        return request_context(job, run_id, job_file, target=self.target)

    def review(self, job: Job, text: str) -> Remarks:
        """What SageMaker would refuse, by our tables; what was chosen, and what it may cost."""
        _check_features(job, isolated=self.target.network_isolation)
        request = json.loads(text)
        check_request(request)
        _check_found_again(request, str(request["TrainingJobName"]))
        return Remarks(
            notes=tuple(_costs(request)),
            warnings=(*_warnings(job, request, self.target), *doubts(request)),
            missing=tuple(_missing(job, self.target)),
        )

    def check(self, job: Job) -> Iterator[Problem]:
        """Account, role, bucket, image and quota: each of them asked for."""
        from launcher.sagemaker.probe import Asked, check_job

        yield from check_job(
            self._account,
            self.target,
            Asked(
                role=self.target.role,
                image=job.image.reference if job.image else None,
                output=job.output,
                channels={channel.name: channel.uri for channel in job.channels},
                instance_types=instances(job, self.target),
                instances=job.spec.resources.nodes,
                spot=job.spec.resources.spot,
                max_runtime=job.spec.resources.timeout or 0.0,
            ),
        )

    # -- submission ---------------------------------------------------------------------------------------------------

    def submit(self, plan: Plan, secrets: Mapping[str, str], *, attempt: int = 1) -> Handle:
        request = json.loads(plan.text)
        _check_found_again(request, plan.run_id)
        name = native_name(plan.run_id, attempt)
        try:
            self._account.call("sagemaker", "create_training_job", **_as_sent(request, plan.plan_sha, name, attempt))
        except ConflictError:
            self._adopt_own(name, plan)
        except CapacityError as error:
            from launcher.sagemaker.probe import quota_remedy

            if quota := quota_of(str(error)):
                raise CapacityError(quota_remedy(self._account, quota)) from error
            raise
        return self._handle(name)

    def _adopt_own(self, name: str, plan: Plan) -> None:
        """ConflictError unless the job of this name is what we wanted to send."""
        job = self._describe(name)
        tags = self._tags(job) if job else {}
        if tags.get(RUN) != plan.run_id or tags.get(PLAN_SHA) != plan.plan_sha:
            raise ConflictError(
                f"{self._account.where} has another training job {name}; choose another --run-id, or delete that one"
            )

    def submit_many(self, plans: Sequence[Plan], secrets: Mapping[str, str], *, attempt: int = 1) -> list[Handle]:
        """One after another: SageMaker has no call for many, and throttles those who hurry."""
        return [self.submit(plan, secrets, attempt=attempt) for plan in plans]

    def find(self, run_ids: Sequence[str]) -> Mapping[str, Handle]:
        newest: dict[str, Json] = {}
        for group in _groups(run_ids):
            for job in self._pages(_common(group)):
                run_id = next((one for one in group if words.attempt_of(job["TrainingJobName"], one)), None)
                if run_id and job["TrainingJobStatus"] != "Deleting":
                    newest.setdefault(run_id, job)  # the newest comes first
                if len(newest) == len(run_ids):
                    break
        ours = (run_id for run_id, job in newest.items() if self._tags(job).get(RUN) == run_id)
        return {run_id: self._handle(newest[run_id]["TrainingJobName"]) for run_id in ours}

    def adopt(self, name: str) -> Adopted:
        """A job that a colleague, the console or another tool has sent. Of a run, the newest submission."""
        name = job_name(name, self._account)
        job = self._describe(name)
        if job is None:
            raise no_such_job(self._account, name)
        tags = self._tags_if_allowed(job)
        run_id = own_run_id(job, tags)
        if not run_id:
            return adopt_foreign(self._handle(name), job, tags, account=self._account)
        handle = self.find([run_id]).get(run_id) if name == run_id else None
        if handle and handle.native != name:
            newest = self._describe(handle.native)
            job, tags = (newest, self._tags_if_allowed(newest)) if newest else (job, tags)
        handle = self._handle(job["TrainingJobName"])
        return adopt_own(handle, job, tags, store=self._store(job), account=self._account)

    # -- a run --------------------------------------------------------------------------------------------------------

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """Of many by lists of their names; only those that have ended are described."""
        names = {handle.native for handle in handles}
        listed = self._listed(names)
        asked = [name for name in names if name not in listed or words.summary_status(listed[name]).state.terminal]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            described = dict(zip(asked, pool.map(self._status, asked), strict=True))
        return {
            handle: described.get(handle.native) or words.summary_status(listed[handle.native]) for handle in handles
        }

    def _status(self, name: str) -> Status:
        job = self._describe(name)
        if job is None:
            return Status(State.UNKNOWN, native="gone", reason=f"{self._account.where} has no training job {name}")
        return words.status_of(job, self._result(job), submission=submission_of(job))

    def _listed(self, names: Collection[str]) -> dict[str, Json]:
        """By name, of those that are asked for together with others."""
        found: dict[str, Json] = {}
        for group in _groups(names):
            if len(group) > 1:
                found |= self._newest(group)
        return found

    def _newest(self, names: set[str]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for job in self._pages(_common(names)):
            if job["TrainingJobName"] in names:
                found[job["TrainingJobName"]] = job
            if len(found) == len(names):
                break
        return found

    def _pages(self, part: str) -> Iterator[Json]:
        """Jobs with `part` in their names, the newest first; at our pace."""
        filters: Json = {"SortBy": "CreationTime", "SortOrder": "Descending", "MaxResults": _PAGE}
        filters |= {"NameContains": part} if part else {}
        token: Json = {}
        for number in range(_PAGES):
            if number:
                self._sleep(_PACE_S)
            answer = self._account.call("sagemaker", "list_training_jobs", **filters, **token)
            yield from answer["TrainingJobSummaries"]
            if not answer.get("NextToken"):
                return
            token = {"NextToken": answer["NextToken"]}

    def _result(self, job: Json) -> Mapping[str, Any] | None:
        """What the runner says of the end; None where there is none, or it can't be read."""
        if not words.summary_status(job).state.terminal or not run_folder(job):
            return None
        try:
            data = self._store(job).read(RESULT)
        except (FileNotFoundError, CvlaunchError):
            return None
        return words.read_result(data, job["TrainingJobArn"])

    def logs(self, handle: Handle, *, follow: bool = False, since: str = "") -> Iterator[LogLine]:
        """From CloudWatch; from the output store what it has no more, or does not show us."""
        from launcher.sagemaker.logs import run_logs

        name = handle.native
        ended = seldom(lambda: self.status([handle])[handle].state.terminal)
        return run_logs(
            self._account,
            name,
            lambda: self._run_folder(name),
            ended=ended if follow else None,
            since=since,
            has_runner=self._has_runner(name),
        )

    def _has_runner(self, name: str) -> bool:
        """Asked once: a job stays what it is. One that is gone was most likely ours."""
        if name not in self._runners:
            job = self._describe(name)
            self._runners[name] = job is None or has_runner(job)
        return self._runners[name]

    def _run_folder(self, name: str) -> Store | None:
        """None if the job, which says where it is, is gone, or is none of ours."""
        job = self._describe(name)
        return self._store(job) if job and run_folder(job) else None

    def cancel(self, handle: Handle) -> None:
        try:
            self._account.call("sagemaker", "stop_training_job", TrainingJobName=handle.native)
        except MissingError:
            return
        except SpecError as error:
            if not _OVER.search(error.message):
                raise

    def exec(self, handle: Handle, command: Sequence[str], *, tty: bool) -> int:
        raise UnsupportedError(f"no command can be run beside {handle.native}: {self.features[Feature.EXEC].reason}")

    def remove(self, handle: Handle) -> None:
        """The jobs of all its submissions."""
        run_id = _run_id(self._describe(handle.native) or {}, handle.native)
        for attempt in range(words.attempt_of(handle.native, run_id), 0, -1):
            try:
                self._account.call("sagemaker", "delete_training_job", TrainingJobName=native_name(run_id, attempt))
            except MissingError:
                continue

    def store(self, uri: str) -> Store | None:
        return None

    # -- parts --------------------------------------------------------------------------------------------------------

    def _handle(self, name: str) -> Handle:
        return Handle(self.name, self.target_name, name)

    def _describe(self, name: str) -> Json | None:
        try:
            return self._account.call("sagemaker", "describe_training_job", TrainingJobName=name)
        except MissingError:
            return None

    def _tags(self, job: Json) -> dict[str, str]:
        try:
            found = list(self._account.pages("sagemaker", "list_tags", "Tags", ResourceArn=job["TrainingJobArn"]))
        except MissingError:
            return {}
        return {tag["Key"]: tag["Value"] for tag in found}

    def _tags_if_allowed(self, job: Json) -> dict[str, str]:
        try:
            return self._tags(job)
        except AuthError:
            return {}

    def _store(self, job: Json) -> Store:
        return open_store(run_folder(job), self.target.storage.options)


# -- names ------------------------------------------------------------------------------------------------------------


def _groups(names: Iterable[str]) -> list[set[str]]:
    """Names that one list can be asked for: of one slug."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(_SUFFIX.sub("", name), set()).add(name)
    return list(groups.values())


def _common(names: Collection[str]) -> str:
    return os.path.commonprefix(sorted(names))  # noqa: RUF071 characters are what is meant


# -- the text ---------------------------------------------------------------------------------------------------------


def _as_sent(request: Json, plan_sha: str, name: str, attempt: int) -> Json:
    """With the hash of the text, which can't stand in it, and what a later submission of the run has of its own."""
    tags = [*request.get("Tags", ()), {"Key": PLAN_SHA, "Value": plan_sha}]
    sent = {**request, "TrainingJobName": name, "Tags": tags}
    if attempt > 1:
        sent["Environment"] = {**request.get("Environment", {}), SUBMISSION: str(attempt)}
    return sent


def _run_id(job: Json, name: str) -> str:
    """Of a job of ours: its name, less the number of the submission."""
    return name.removesuffix(f"-{submission_of(job)}") if submission_of(job) > 1 else name


def _check_found_again(request: Json, run_id: str) -> None:
    """SpecError where an overlay took away what a run is found by."""
    tags = {tag.get("Key"): tag.get("Value") for tag in request.get("Tags") or ()}
    if request.get("TrainingJobName") != run_id or tags.get(RUN) != run_id or not run_folder(request):
        raise SpecError(
            f"a run is found by TrainingJobName, by the tag {RUN} and by OutputDataConfig.S3OutputPath: leave them as "
            "they are",
            key="overlay",
        )


def _check_features(job: Job, *, isolated: bool) -> None:
    if job.spec.runner == "none":
        for key, why in _FOREIGN.items():
            if getattr(job.spec, key):
                raise UnsupportedError(why, key=key)
    elif isolated and (job.code or job.spec.secrets):
        key = "code" if job.code else "secrets"
        why = "nothing is reached under network_isolation, so nobody can fetch it"
        raise UnsupportedError(f"{why}; {'build it into the image' if job.code else 'leave it out'}", key=key)
    for variable, reference in job.spec.secrets.items():
        if reference.startswith("store:") and reference.split(":")[1] not in _STORES:
            raise SpecError(f"{reference!r} is in no store of AWS; write {_STORE_WORDS}", key=f"secrets.{variable}")


def _costs(request: Json) -> Iterator[str]:
    """Which machines, and what they cost by the hour and at most."""
    resources, spot = request.get("ResourceConfig") or {}, request.get("EnableManagedSpotTraining")
    names = [item["InstanceType"] for item in resources.get("InstancePreferences") or (resources,) if item]
    count = max(int(resources.get("InstanceCount") or 1), 1)
    for name in filter(None, names):
        known = instance_type(name)
        many = f"{count} × " if count > 1 else ""
        yield f"instance: {many}{words_of_type(known) if known else name}{', spot' if spot else ''}"
    yield from _at_most(names, count, request)


def _at_most(names: Sequence[str], count: int, request: Json) -> Iterator[str]:
    prices = [known.price for name in names if (known := instance_type(name)) and known.price is not None]
    longest = (request.get("StoppingCondition") or {}).get("MaxRuntimeInSeconds")
    if prices and longest:
        most = max(prices) * count * longest / 3600
        limit = format_duration(longest)
        cheaper = "; spot costs less" if request.get("EnableManagedSpotTraining") else ""
        amount = f"{most:.2f}" if most < _CENTS_BELOW else f"{math.ceil(most)}"
        yield f"cost: at most about ${amount} if it runs until SageMaker's limit, {limit}{cheaper}"


_CENTS_BELOW = 10


def _warnings(job: Job, request: Json, target: SageMakerTarget) -> Iterator[str]:
    resources = job.spec.resources
    for kind in () if target.instance_types else too_large(job):
        yield f"{kind.gpu} comes {kind.gpus} at a time ({kind.name}) and is passed over; instance_types can name it"
    chosen = request.get("ResourceConfig") or {}
    names = [item.get("InstanceType", "") for item in chosen.get("InstancePreferences") or (chosen,)]
    for name in names:
        known = instance_type(name)
        if known and known.gpus > resources.gpus:
            yield f"{name} has {known.gpus} GPUs, of which the job uses {resources.gpus}"
        elif known and known.gpus < resources.gpus:
            yield f"{name} has {known.gpus} GPUs, fewer than resources.gpus: {resources.gpus}"
    if resources.grace > _GRACE_S:
        yield f"resources.grace: SageMaker gives {format_duration(_GRACE_S)}, whatever the job asks for"
    if resources.max_wait is not None and not resources.spot and not any(map(is_accelerated, names)):
        yield "resources.max_wait has no effect: jobs without GPUs don't wait for room, they fail"
    if resources.spot and len(resources.gpu) > 1:
        yield f"resources.gpu: spot jobs name one instance type, here {names[0]}"


def _missing(job: Job, target: SageMakerTarget) -> Iterable[str]:
    reference = job.image.reference if job.image else ""
    if target.image_access == "Platform" and not _ECR.fullmatch(reference):
        return [
            f"an image in ECR ({reference} is none; with `registry` in the target, such as "
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com/trainer, submit pushes it)"
        ]
    return []
