"""Amazon SageMaker: one training job a run, in one account and region."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from launcher.contract import MIRROR, RESULT, JobFile
from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from launcher.image import NAME as TRAINER
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
from launcher.sagemaker.client import Account, Json, MissingError, quota_of
from launcher.sagemaker.request import (
    PLAN_SHA,
    ROLE,
    RUN,
    instances,
    longest_run,
    request_context,
)
from launcher.sagemaker.review import STORE_WORDS, at_key, check_found_again, review
from launcher.sagemaker.target import SageMakerTarget
from launcher.status import State, Status
from launcher.stores import Store, join_uri, open_store, scheme
from launcher.watch import seldom

__all__ = ["SageMakerBackend"]

_MOVERS = {"checkpoints": "platform", "model": "platform", "output": "runner"}
_ISOLATED = {**_MOVERS, "output": "platform"}

_PAGE = 100
_WORTH_A_PAGE = 10
"""Runs that one page is asked for; to describe fewer is quicker, however many jobs of others have such names."""
_PAGES = 50
"""Of 100 jobs, the newest first; what is older is asked for by its name."""
_AT_ONCE = 4
_SUFFIX = re.compile(r"-[0-9a-z]{10}(-(?P<submission>\d+))?$")
"""What follows the slug in a run id of ours."""

_OVER = re.compile(r"status (Completed|Failed|Stopped|Stopping)|already|in a terminal", re.IGNORECASE)
"""What StopTrainingJob says of a job that needs no stopping."""


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
            False, f"whoever may describe a job reads its variables; keep it in AWS and write {STORE_WORDS}"
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
        return review(job, json.loads(text), self.target)

    def check(self, job: Job) -> Iterator[Problem]:
        """Whether SageMaker can be asked from here; it says the rest itself, when it is sent the job."""
        self._account.client("sagemaker")
        yield from ()

    def examine(self, job: Job) -> Iterator[Problem]:
        """Account, role, bucket, image and quota: each of them asked for."""
        from launcher.sagemaker.probe import Asked, check_job

        made, longest = self._made_at_submission(job), longest_run(job, self.target)
        if made:
            yield made
        yield from check_job(
            self._account,
            self.target,
            Asked(
                role=self.target.role,
                image=job.image.reference if job.image and not made else None,
                output=job.output,
                channels={channel.name: channel.uri for channel in job.channels},
                instance_types=instances(job, self.target),
                instances=job.spec.resources.nodes,
                spot=job.spec.resources.spot,
                max_runtime=longest if job.spec.resources.timeout else 0.0,
            ),
        )

    def _made_at_submission(self, job: Job) -> Problem | None:
        """Of an image that is not in ECR yet, and needn't be."""
        image, registry = job.image, self.target.registry
        if image is None or image.digest or not registry or not image.reference.startswith(f"{registry}:"):
            return None
        if not (job.spec.build or job.spec.image == TRAINER):
            return None
        return Problem("image", f"submit builds it and pushes it as {image.reference}", fatal=False)

    # -- submission ---------------------------------------------------------------------------------------------------

    def submit(self, plan: Plan, secrets: Mapping[str, str], *, attempt: int = 1) -> Handle:
        request = json.loads(plan.text)
        check_found_again(request, plan.run_id)
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
            raise at_key(refused, request, self.target) from error
        except SpecError as error:
            raise at_key(error, request, self.target) from error
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
        if job is None:  # its name is taken: what AWS shows may lag behind what it has
            raise UnreachableError(f"the name {name} is in use, and AWS does not show by which job: try again")
        if tags.get(RUN) != plan.run_id or tags.get(PLAN_SHA) != plan.plan_sha:
            raise ConflictError(
                f"{self._account.where} has another training job {name}; choose another --run-id, or delete that one"
            )

    def submit_many(self, plans: Sequence[Plan], secrets: Mapping[str, str], *, attempt: int = 1) -> list[Handle]:
        """One after another: SageMaker has no call for many, and throttles those who hurry."""
        return [self.submit(plan, secrets, attempt=attempt) for plan in plans]

    def find(self, run_ids: Sequence[str]) -> Mapping[str, Handle]:
        found: dict[str, Handle] = {}
        for group in _groups(run_ids):
            for job in self._pages(_common(group)):
                name = job["TrainingJobName"]
                wanted = ({name, name.rpartition("-")[0]} & group) - set(found)  # the newest comes first
                if wanted and job["TrainingJobStatus"] != "Deleting":
                    run_id = self._tags(job).get(RUN, "")  # `exp-2` may be a run of its own
                    if run_id in wanted and words.attempt_of(name, run_id):
                        found[run_id] = self._handle(name)
                if group <= set(found):
                    break
        return found

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
        return adopt_own(handle, job, tags, store=self._opened(run_folder(job)), account=self._account)

    def _newest_job(self, run_id: str) -> Json | None:
        """Of the run's submissions; None where nobody may look for them."""
        try:
            found = self.find([run_id]).get(run_id)
        except AuthError:
            return None
        return self._describe(found.native) if found else None

    # -- a run --------------------------------------------------------------------------------------------------------

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """Of many by lists of their names; only those that have ended are described.

        One that can't be asked about hides no other; an error is raised where nothing is known of any.
        """
        names = {handle.native for handle in handles}
        listed = self._listed(names)
        asked = [name for name in names if name not in listed or words.summary_status(listed[name]).state.terminal]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = dict(zip(asked, pool.map(lambda name: self._told(name, listed.get(name)), asked), strict=True))
        errors = [told for told in found.values() if isinstance(told, CvlaunchError)]
        if errors and len(errors) == len(names):
            raise errors[0]
        said = {name: _unseen(told) if isinstance(told, CvlaunchError) else told for name, told in found.items()}
        return {handle: said.get(handle.native) or _by_summary(listed[handle.native]) for handle in handles}

    def _told(self, name: str, listed: Json | None) -> Status | CvlaunchError:
        """listed: what is said of it meanwhile if AWS has no time for more, and for good if it may not be described."""
        try:
            return self._status(name)
        except UnreachableError as error:
            unended = dataclasses.replace(_by_summary(listed), state=State.FINALIZING) if listed else None
            return dataclasses.replace(unended, reason=str(error)) if unended else error
        except AuthError as error:
            return dataclasses.replace(_by_summary(listed), reason=str(error)) if listed else error

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
        earlier = range(words.attempt_of(handle.native, run_id) - 1, 0, -1)
        names = (native_name(run_id, attempt) for attempt in earlier)
        for name in (handle.native, *(name for name in names if self._is_of(name, run_id))):
            with contextlib.suppress(MissingError):
                self._account.call("sagemaker", "delete_training_job", TrainingJobName=name)

    def _is_of(self, name: str, run_id: str) -> bool:
        """`exp-2` may be a run of its own."""
        job = self._describe(name)
        return job is not None and self._tags_if_allowed(job).get(RUN) == run_id

    def store(self, uri: str) -> Store | None:
        """S3 in the account's region, whoever has named that."""
        if scheme(uri) != "s3":
            return None
        options = self.target.store_options
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
        return self._opened(join_uri(folder, MIRROR) if job.get("EnableNetworkIsolation") else folder)

    def _opened(self, uri: str) -> Store:
        return self.store(uri) or open_store(uri, self.target.store_options)


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


def _unseen(error: CvlaunchError) -> Status:
    """Not lost: somebody who may look sees it."""
    return Status(State.UNKNOWN, native="elsewhere", reason=str(error))


def _common(names: Collection[str]) -> str:
    return os.path.commonprefix(sorted(names))  # noqa: RUF071 characters are what is meant


# -- the text ---------------------------------------------------------------------------------------------------------


def _as_sent(request: Json, plan_sha: str, name: str, attempt: int) -> Json:
    """With the hash of the text, which can't stand in it, and what a later submission of the run has of its own."""
    tags = [*request.get("Tags", ()), {"Key": PLAN_SHA, "Value": plan_sha}]
    sent = {**request, "TrainingJobName": name, "Tags": tags}
    if attempt > 1 and has_runner(request):  # a foreign image may have as many variables as there can be
        sent["Environment"] = {**request["Environment"], SUBMISSION: str(attempt)}
    return sent


def _run_id(job: Json, name: str) -> str:
    """Of a job of ours: its name, less the number of the submission."""
    return name.removesuffix(f"-{submission_of(job)}") if submission_of(job) > 1 else name
