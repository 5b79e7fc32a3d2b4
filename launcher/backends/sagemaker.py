"""Amazon SageMaker: one training job a run, in one account and region."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os.path
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

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
from launcher.contract import MIRROR, RESULT, JobFile
from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    UnsupportedError,
    nearest,
)
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
from launcher.stores import Store, join_uri, open_store, scheme
from launcher.watch import seldom

__all__ = ["SageMakerBackend"]

_MOVERS = {"checkpoints": "platform", "model": "platform", "output": "runner"}
_ISOLATED = {**_MOVERS, "output": "platform"}
_GRACE_S = RULES["sagemaker"].grace_s or 0.0
_LONGEST_RUN_S = 28 * 24 * 3600

_PAGE = 100
_WORTH_A_PAGE = 10
"""Runs that one page is asked for; to describe fewer is quicker, however many jobs of others have such names."""
_PAGES = 50
"""Of 100 jobs, the newest first; what is older is asked for by its name."""
_AT_ONCE = 4
_SUFFIX = re.compile(r"-[0-9a-z]{10}(-(?P<submission>\d+))?$")
"""What follows the slug in a run id of ours."""

_ECR = re.compile(r"\d{12}\.dkr\.ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/.+")
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
        self,
        target: SageMakerTarget,
        target_name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.target = target
        self.target_name = target_name
        self._account = Account(target.access, target_name, clock=clock, sleep=sleep)
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
        try:
            check_request(request)
            _check_found_again(request, str(request["TrainingJobName"]))
        except SpecError as error:
            raise _at_change(error, job, self.target) from None
        return Remarks(
            notes=tuple(_costs(request)),
            warnings=(*_warnings(job, request, self.target), *doubts(request)),
            missing=tuple(_missing(job, self.target)),
        )

    def check(self, job: Job) -> Iterator[Problem]:
        """Whether SageMaker can be asked from here; it says the rest itself, when it is sent the job."""
        self._account.client("sagemaker")
        yield from ()

    def examine(self, job: Job) -> Iterator[Problem]:
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
        except MissingError as error:  # a subnet, a key, a bucket
            refused = SpecError(f"AWS refuses it (CreateTrainingJob): {error}")
            raise _at_key(refused, request, self.target) from error
        except SpecError as error:
            raise _at_key(error, request, self.target) from error
        return self._handle(name)

    def _adopt_own(self, name: str, plan: Plan) -> None:
        """ConflictError unless the job of this name is what we wanted to send."""
        try:
            job = self._describe(name)
            tags = self._tags(job) if job else {}
        except AuthError as error:
            raise UnreachableError(
                f"there is a training job {name}, and whether it is this run can't be seen: {error}"
            ) from error
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
        if name == run_id:
            job = self._newest_job(run_id) or job
        handle = self._handle(job["TrainingJobName"])
        tags = tags if handle.native == name else self._tags_if_allowed(job)
        return adopt_own(handle, job, tags, store=self._store(job), account=self._account)

    def _newest_job(self, run_id: str) -> Json | None:
        """Of the run's submissions; None where nobody may look for them."""
        try:
            found = self.find([run_id]).get(run_id)
        except AuthError:
            return None
        return self._describe(found.native) if found else None

    # -- a run --------------------------------------------------------------------------------------------------------

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """Of many by lists of their names; only those that have ended are described."""
        names = {handle.native for handle in handles}
        listed = self._listed(names)
        asked = [name for name in names if name not in listed or words.summary_status(listed[name]).state.terminal]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda name: self._status(name, listed.get(name)), asked)
            described = dict(zip(asked, found, strict=True))
        return {handle: described.get(handle.native) or _by_summary(listed[handle.native]) for handle in handles}

    def _status(self, name: str, listed: Json | None = None) -> Status:
        """listed: what is said while AWS has no time for more, lest the others' ends are lost with this one's."""
        try:
            job = self._describe(name)
        except UnreachableError as error:
            if listed is None:
                raise
            return dataclasses.replace(_by_summary(listed), state=State.FINALIZING, reason=str(error))
        if job is None:
            return Status(State.UNKNOWN, native="gone", reason=f"{self._account.where} has no training job {name}")
        return words.status_of(job, self._result(job), submission=submission_of(job))

    def _listed(self, names: Collection[str]) -> dict[str, Json]:
        """By name, of those that are asked for together with others."""
        found: dict[str, Json] = {}
        for group in _groups(names):
            if len(group) > 1:
                with contextlib.suppress(AuthError):  # who may not list may well describe
                    found |= self._newest(group)
        return found

    def _newest(self, names: set[str]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for job in self._pages(_common(names), most=1 + len(names) // _WORTH_A_PAGE):
            if job["TrainingJobName"] in names:
                found[job["TrainingJobName"]] = job
            if len(found) == len(names):
                break
        return found

    def _pages(self, part: str, most: int = _PAGES) -> Iterator[Json]:
        """Jobs with `part` in their names, the newest first."""
        filters: Json = {"SortBy": "CreationTime", "SortOrder": "Descending", "MaxResults": _PAGE}
        filters |= {"NameContains": part} if part else {}
        token: Json = {}
        for _ in range(min(most, _PAGES)):
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
        """S3 in the account's region, whoever has named that."""
        if scheme(uri) != "s3":
            return None
        options = self.target.storage.options
        return open_store(uri, options if options.region else dataclasses.replace(options, region=self._account.region))

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
        """What the runner tells: in the run's folder, or where the platform takes it."""
        folder = run_folder(job)
        told = join_uri(folder, MIRROR) if job.get("EnableNetworkIsolation") else folder
        return self.store(told) or open_store(told, self.target.storage.options)


# -- names ------------------------------------------------------------------------------------------------------------


def _groups(names: Iterable[str]) -> list[set[str]]:
    """Names that one list can be asked for: of one slug."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(_SUFFIX.sub("", name), set()).add(name)
    return list(groups.values())


def _by_summary(job: Json) -> Status:
    """The submission stands in its name alone; a name that somebody has chosen may end so by itself."""
    found = _SUFFIX.search(job["TrainingJobName"])
    return dataclasses.replace(words.summary_status(job), attempt=int((found and found["submission"]) or 1))


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


def _at_change(error: SpecError, job: Job, target: SageMakerTarget) -> SpecError:
    """At what changed the text, if the key that is wrong is written nowhere."""
    native = job.spec.native.get(target.backend) is not None
    if any(_is_written(model, error.key or "") for model in (job.spec, target)) or not _change(target, native=native):
        return error
    return SpecError(error.message, key=_change(target, native=native))


def _is_written(model: BaseModel, key: str) -> bool:
    first, _, rest = key.partition(".")
    if first not in model.model_fields_set:
        return False
    inner = getattr(model, first)
    return _is_written(inner, rest) if rest and isinstance(inner, BaseModel) else True


def _change(target: SageMakerTarget, *, native: bool) -> str:
    """The key by which the user changed the text."""
    if target.overlay is not None:
        return "overlay"
    return f"native.{target.backend}" if native else "templates" if target.templates else ""


_CAUSES: Mapping[str, str] = {
    r"assume role|\bRoleArn\b": "role",
    r"instance ?type": "instance_types",
    r"security ?group": "security_groups",
    r"subnet": "subnets",
    r"KmsKey|KMS key": "kms_key",
    r"TrainingImage|\bimage\b|\bECR\b": "image",
}
"""What CreateTrainingJob says → the user's key; the first that fits."""


def _at_key(error: SpecError, request: Json, target: SageMakerTarget) -> SpecError:
    """Refusals of CreateTrainingJob at the key of the user that is meant."""
    if error.key == "overlay":  # botocore knows the member, and nobody where it came from
        return SpecError(error.message, key=_change(target, native=not target.templates))
    if error.key:
        return error
    channels = request.get("InputDataConfig") or ()
    places = {_place(channel): f"data.{channel['ChannelName']}" for channel in channels}
    places[request["OutputDataConfig"]["S3OutputPath"]] = "output"
    meant = next((key for uri, key in places.items() if uri and uri in error.message), None)
    said = next((key for pattern, key in _CAUSES.items() if re.search(pattern, error.message, re.IGNORECASE)), None)
    return SpecError(error.message, key=meant or said)


def _place(channel: Json) -> str:
    return str(channel.get("DataSource", {}).get("S3DataSource", {}).get("S3Uri", ""))


def _check_features(job: Job, *, isolated: bool) -> None:
    if job.spec.runner == "none":
        for key, why in _FOREIGN.items():
            if getattr(job.spec, key):
                raise UnsupportedError(why, key=key)
    elif isolated and (lacking := _out_of_reach(job)):
        key, way_out = lacking
        raise UnsupportedError(f"under network_isolation the job reaches nothing: {way_out}", key=key)
    for variable, reference in job.spec.secrets.items():
        _, store, name = (*reference.split(":", 2), "", "")[:3]
        if store not in _STORES:
            raise SpecError(f"{reference!r} is in no store of AWS; write {_STORE_WORDS}", key=f"secrets.{variable}")
        if not name:
            raise SpecError(f"{reference!r} names no secret; write {_STORE_WORDS}", key=f"secrets.{variable}")


def _out_of_reach(job: Job) -> tuple[str, str] | None:
    """Key and way out of what nobody can bring to a job without network."""
    if job.code and job.code.requirements:
        return "code.requirements", "build these packages into the image"
    return ("secrets", "leave them out") if job.spec.secrets else None


def _costs(request: Json) -> Iterator[str]:
    """Which machines, and what they cost by the hour and at most."""
    spot, choices = request.get("EnableManagedSpotTraining"), _choices(request.get("ResourceConfig") or {})
    for name, count in itertools.chain.from_iterable(choices):
        known = instance_type(name)
        many = f"{count} × " if count > 1 else ""
        yield f"instance: {many}{words_of_type(known) if known else name}{', spot' if spot else ''}"
    yield from _at_most(choices, request)


def _choices(resources: Json) -> list[list[tuple[str, int]]]:
    """Of which SageMaker takes one: type and count of the instances that it has."""
    groups = resources.get("InstanceGroups")
    found = [groups] if groups else [[item] for item in resources.get("InstancePreferences") or (resources,)]
    usual = resources.get("InstanceCount") or 1
    named = ([(item.get("InstanceType"), item.get("InstanceCount") or usual) for item in each] for each in found)
    return [[(str(name), int(count)) for name, count in each] for each in named if all(name for name, _ in each)]


def _at_most(choices: Sequence[Sequence[tuple[str, int]]], request: Json) -> Iterator[str]:
    prices = [price for choice in choices if (price := _price(choice)) is not None]
    longest = (request.get("StoppingCondition") or {}).get("MaxRuntimeInSeconds")
    if prices and longest:
        most = max(prices) * longest / 3600
        limit = format_duration(longest)
        cheaper = "; spot costs less" if request.get("EnableManagedSpotTraining") else ""
        amount = f"{most:.2f}" if most < _CENTS_BELOW else f"{math.ceil(most)}"
        yield f"cost: at most about ${amount} if it runs until SageMaker's limit, {limit}{cheaper}"


def _price(choice: Sequence[tuple[str, int]]) -> float | None:
    """Of an hour; None if that of one type is unknown."""
    prices = [(known.price, count) for name, count in choice if (known := instance_type(name))]
    if len(prices) < len(choice) or any(price is None for price, _ in prices):
        return None
    return sum((price or 0.0) * count for price, count in prices)


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
    yield from _doubtful_places(job, target)
    if (resources.timeout or 0) > _LONGEST_RUN_S:
        yield f"resources.timeout: SageMaker ends every job after {format_duration(_LONGEST_RUN_S)}"
    if resources.grace > _GRACE_S:
        yield f"resources.grace: SageMaker gives {format_duration(_GRACE_S)}, whatever the job asks for"
    if resources.max_wait is not None and not resources.spot and not any(map(is_accelerated, names)):
        yield "resources.max_wait has no effect: jobs without GPUs don't wait for room, they fail"
    if resources.spot and len(resources.gpu) > 1:
        yield f"resources.gpu: spot jobs name one instance type, here {names[0]}"


def _doubtful_places(job: Job, target: SageMakerTarget) -> Iterator[str]:
    """What is somewhere else than the job, or is said of what the job doesn't have."""
    found = _ECR.fullmatch(job.image.reference) if job.image else None
    if found and target.region and found["region"] != target.region:
        yield f"image: it is in ECR of {found['region']}, and the job runs in {target.region}: push it to ECR there"
    names = [channel.name for channel in job.channels]
    for name in target.input_modes:
        if name not in names and (hint := nearest(name, names)):
            yield f"input_modes: the job has no channel {name!r}{hint}"


def _missing(job: Job, target: SageMakerTarget) -> Iterable[str]:
    reference = job.image.reference if job.image else ""
    if target.image_access == "Platform" and not _ECR.fullmatch(reference):
        return [
            f"an image in ECR ({reference} is none; with `registry` in the target, such as "
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com/trainer, submit pushes it)"
        ]
    return []
