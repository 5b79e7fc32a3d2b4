"""Looking at an AWS account: whether a job would be accepted there, what it lacks, and the command that brings it.

Most of what is looked at needs a right of its own, which users often don't have: that is a note, no refusal. Everything
is asked at once, by an account that soon gives up.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import ssl
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from launcher.backends.base import Problem
from launcher.credentials.partitions import partition_of
from launcher.errors import AuthError, CvlaunchError, SpecError, UnreachableError
from launcher.quantities import format_duration
from launcher.sagemaker.catalogue import INSTANCES, instance_type
from launcher.sagemaker.client import LOG_GROUP, Account, Json, MissingError, Quota
from launcher.sagemaker.policy import (
    SERVICE,
    EcrImage,
    Need,
    ecr_image,
    parse_role,
    place_of,
    role_needs,
    split_s3,
    submitter_needs,
    trust_policy,
)
from launcher.sagemaker.target import SageMakerTarget

__all__ = [
    "Asked",
    "Caller",
    "InstanceQuota",
    "Probe",
    "Service",
    "as_target",
    "caller_of",
    "check_job",
    "probe",
    "quota_remedy",
]

_AT_ONCE = 8
_HIDDEN = "it can't be looked at"
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_LARGEST_CONFIG = 4 << 20
_ARCHITECTURE = "amd64"
_USAGE = {
    "on demand": "{} for training job usage",
    "spot": "{} for spot training job usage",
    "warm pool": "{} for training warm pool usage",
}
"""How Service Quotas calls what limits instances; the value is a number of them."""
_LONGEST_RUN = "Longest run time for a training job"
"""In seconds."""
_OLD_REGIONS = {"": "us-east-1", "EU": "eu-west-1"}
"""LocationConstraint of buckets that are older than its other values."""


@dataclass(frozen=True)
class Asked:
    """What a job wants. image: None if none is named. channels: name → URI. instance_types: one of them is enough.

    max_runtime: in seconds, of the job's own timeout; 0: it has none, and the target's counts.
    """

    role: str | None
    image: str | None
    output: str
    channels: Mapping[str, str] = field(default_factory=dict)
    instance_types: tuple[str, ...] = ()
    instances: int = 1
    spot: bool = False
    max_runtime: float = 0.0


@dataclass(frozen=True)
class Caller:
    """Who asks. arn: as STS has it, a session's for an assumed role."""

    account: str
    arn: str


def caller_of(account: Account) -> Caller:
    """AuthError without an identity that AWS takes, UnreachableError without an answer."""
    found = account.call("sts", "get_caller_identity")
    return Caller(found["Account"], found["Arn"])


def check_job(account: Account, target: SageMakerTarget, asked: Asked) -> Iterator[Problem]:
    """AuthError without an identity that AWS takes, UnreachableError without an answer; all else is a Problem."""
    account = account.hasty()
    look = _Look(account, target, caller_of(account))
    questions = {
        "role": lambda: look.role(asked.role),
        "profile": lambda: look.rights(asked.role),
        "output": lambda: look.bucket("output", asked.output),
        **{f"data.{name}": _question(look.channel, f"data.{name}", uri) for name, uri in asked.channels.items()},
        "image": lambda: look.image(asked.image),
        "resources": lambda: look.quotas(asked),
    }
    yield from _answers({"instance_types": lambda: _unknown_types(asked.instance_types), **questions})


def _question(ask: Callable[[str, str], Iterable[Problem]], key: str, uri: str) -> Callable[[], Iterable[Problem]]:
    return lambda: ask(key, uri)


def _answers(questions: Mapping[str, Callable[[], Iterable[Problem]]]) -> Iterator[Problem]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(_answer, questions, questions.values()):
            yield from found


def _answer(key: str, question: Callable[[], Iterable[Problem]]) -> list[Problem]:
    found: list[Problem] = []
    try:
        found.extend(question())
    except MissingError as error:
        found.append(Problem(key, f"AWS does not find it: {error}"))
    except SpecError as error:
        found.append(Problem(key, str(error)))
    except CvlaunchError as error:
        found.append(Problem(key, f"{_HIDDEN}: {error}", fatal=False))
    return found


def _unknown_types(names: Sequence[str]) -> Iterator[Problem]:
    for name in names:
        if instance_type(name) is None:
            yield Problem(
                "instance_types",
                f"cvlaunch does not know {name}, nor what is in it; it is sent as it is, as this version and botocore "
                "may be older than the type",
                fatal=False,
            )


# ---- one account


_NAMED = {"PassRole": "", "Jobs": "; one for jobs of certain names is enough where this one's is among them"}
"""Needs of the submitter that are asked about → what may make a no of the simulator a yes."""
_EMPTY = "yes, with nothing in it yet"
"""A service's answer."""


@dataclass(frozen=True)
class _Look:
    account: Account
    target: SageMakerTarget
    caller: Caller

    def role(self, arn: str | None) -> Iterator[Problem]:
        role = parse_role(arn or "")
        if role is None:
            yield Problem("role", _no_role(arn, self.account))
            return
        if role.account != self.caller.account:
            who = f"you are in account {self.caller.account} ({self.caller.arn})"
            yield Problem(
                "role", f"{arn} is of another account, {who}: name a role of your account, or the profile of the other"
            )
            return
        try:
            found = self.account.call("iam", "get_role", RoleName=role.name)["Role"]
        except MissingError:
            yield Problem("role", _no_such_role(role.name, self.account))
            return
        if found["Arn"] != arn:
            yield Problem("role", f"there is no {arn}; the role of this name is {found['Arn']}: write that")
        if not _trusts(found.get("AssumeRolePolicyDocument")):
            yield Problem("role", _no_trust(role.name, self.account))

    def rights(self, role: str | None) -> Iterator[Problem]:
        """What IAM's simulator says, where the caller may ask it. It knows no policies of buckets and keys."""
        if parse_role(role or "") is not None:
            with contextlib.suppress(CvlaunchError, MissingError):
                yield from self._simulated(str(role))

    def _simulated(self, role: str) -> Iterator[Problem]:
        place = place_of(self.target, self.account.region)
        policy = f"`cvlaunch targets policy {self.account.name} --of"
        caller = self._principal()
        for need in submitter_needs(place) if caller else ():
            if need.name in _NAMED and (denied := self._denied(str(caller), need)):
                what = f"you may not do {', '.join(denied)} on {need.resources[0]}"
                way_out = f"ask for the policy that {policy} submitter` prints{_NAMED[need.name]}"
                yield Problem("profile", f"{what}: {way_out}", fatal=not _NAMED[need.name])
        for need in role_needs(place):
            if need.name in ("OutputObjects", "Image", "Logs") and (denied := self._denied(role, need)):
                what = f"the role may not do {', '.join(denied)} on {need.resources[0]}, for {need.purpose}"
                yield Problem("role", f"{what}: give it the policy that {policy} role` prints", fatal=False)

    def _principal(self) -> str | None:
        """Of the caller, as IAM's simulator wants it; None for those it doesn't know."""
        session = re.fullmatch(r"arn:[\w-]+:sts::\d+:assumed-role/(?P<role>[^/]+)/.+", self.caller.arn)
        if session:
            return str(self.account.call("iam", "get_role", RoleName=session["role"])["Role"]["Arn"])
        return self.caller.arn if ":user/" in self.caller.arn else None

    def _denied(self, principal: str, need: Need) -> list[str]:
        context = [
            {"ContextKeyName": key, "ContextKeyType": "string", "ContextKeyValues": [value]}
            for keys in need.condition.values()
            for key, value in keys.items()
        ]
        answers = self.account.call(
            "iam",
            "simulate_principal_policy",
            PolicySourceArn=principal,
            ActionNames=list(need.actions),
            ResourceArns=list(need.resources),
            ContextEntries=context,
        ).get("EvaluationResults", ())
        denied = (answer["EvalActionName"] for answer in answers if answer["EvalDecision"] != "allowed")
        return list(dict.fromkeys(denied))

    def bucket(self, key: str, uri: str) -> Iterator[Problem]:
        place, account = split_s3(uri), self.account
        if place is None:
            return
        name = place[0]
        try:
            region = _region_of(name, account)
        except MissingError:
            yield Problem(
                key,
                f"there is no bucket {name}: correct the name, or make it: "
                + _command(account, "s3", "mb", f"s3://{name}"),
            )
            return
        if region != account.region:
            way = (
                f"copy it to a bucket of {account.region}" if key != "output" else f"name a bucket of {account.region}"
            )
            yield Problem(
                key,
                f"bucket {name} is in {region} and the job in {account.region}, and SageMaker wants both in the same "
                f"region: {way}, or run there: region: {region} in the target",
            )

    def channel(self, key: str, uri: str) -> Iterator[Problem]:
        wrong = list(self.bucket(key, uri))
        yield from wrong
        place = split_s3(uri)
        if wrong or place is None:
            return
        bucket, prefix = place
        folder = f"{prefix}/" if prefix else ""
        if not self.account.call("s3", "list_objects_v2", Bucket=bucket, Prefix=folder, MaxKeys=1).get("KeyCount"):
            push = f"cvlaunch data push FOLDER {uri} --target {self.account.name}"
            yield Problem(key, f"there is nothing at {uri}: correct the place, or bring the data: {push}")

    def image(self, reference: str | None) -> Iterator[Problem]:
        if reference is None:
            return
        image, account = ecr_image(reference), self.account
        if image is None:
            if self.target.image_access == "Platform":
                yield Problem("image", _not_in_ecr(reference, self.target, account))
            return
        if image.region != account.region:
            yield Problem(
                "image",
                f"{reference} is in {image.region} and the job in {account.region}, and SageMaker pulls images of its "
                f"own region only: push it to a registry of {account.region}",
            )
            return
        yield from self._ecr_image(image, reference)

    def registry(self) -> Iterator[Problem]:
        """Of the target, for images that are pushed."""
        image = ecr_image(self.target.registry or "")
        if image is None:
            return
        if image.region != self.account.region:
            where = f"it is in {image.region}, and SageMaker pulls images of its own region only"
            yield Problem("registry", f"{where}: name one of {self.account.region}")
            return
        which = {"registryId": image.account, "repositoryName": image.repository, "maxResults": 1}
        try:
            self.account.call("ecr", "describe_images", **which)
        except MissingError:
            yield Problem("registry", _no_repository(image, self.account))

    def _ecr_image(self, image: EcrImage, reference: str) -> Iterator[Problem]:
        """Of another account's registry often nothing can be seen, and its policy has to let the role pull."""
        theirs = image.account != self.caller.account
        if theirs:
            note = f"registry {image.account} is another account's: its repository's policy has to let the role pull"
            yield Problem("image", f"{note} (ecr:BatchGetImage, ecr:GetDownloadUrlForLayer)", fatal=False)
        try:
            found = _manifest(image, self.account)
        except MissingError:
            yield Problem("image", _no_repository(image, self.account), fatal=not theirs)
            return
        if found is None:
            yield Problem("image", _no_image(image, reference, self.account), fatal=not theirs)
            return
        there = _architectures(found, image, self.account, self.target.access.ca_bundle)
        if there and _ARCHITECTURE not in there:
            yield Problem(
                "image",
                f"{reference} is for {', '.join(there)}, and SageMaker's instances are {_ARCHITECTURE}: build it for "
                f"linux/{_ARCHITECTURE}, then push it: {_PUSH.format(_registry(reference))}",
            )

    def service(self, ask: _Ask) -> Service:
        """Whether it answers, and be it with a no."""
        try:
            self.account.call(ask.service, ask.operation, **ask.parameters)
        except MissingError:
            return Service(ask.name, ask.purpose, _EMPTY)
        except CvlaunchError as error:
            answer = "no answer" if isinstance(error, UnreachableError) else "not allowed"
            return Service(ask.name, ask.purpose, answer, "" if ask.told else str(error))
        return Service(ask.name, ask.purpose, "yes")

    def quotas(self, asked: Asked) -> Iterator[Problem]:
        usage = _USAGE["spot" if asked.spot else "on demand"]
        wanted = {usage.format(name): name for name in asked.instance_types}
        warm = {_USAGE["warm pool"].format(name): name for name in asked.instance_types if self.target.keep_alive}
        there = _quotas_named([*wanted, *warm, _LONGEST_RUN], self.account)
        yield from self._too_few(wanted, there, asked, key="resources.spot" if asked.spot else self._types_key)
        yield from self._too_few(warm, there, asked, key="keep_alive")
        longest = there.get(_LONGEST_RUN)
        if longest is not None:
            yield from self._too_long(longest, asked.max_runtime)

    def _too_long(self, longest: _ServiceQuota, timeout: float) -> Iterator[Problem]:
        key = "resources.timeout" if timeout else "max_runtime"
        wanted = timeout or self.target.max_runtime
        if longest.value < wanted:
            yield Problem(
                key,
                f"the job may run for {format_duration(wanted)}, and what this account may have is "
                f"{format_duration(longest.value)}: write less, or ask for more: "
                + _raise(longest.code, math.ceil(wanted), self.account),
            )

    @property
    def _types_key(self) -> str:
        return "instance_types" if self.target.instance_types else "resources"

    def _too_few(
        self, wanted: Mapping[str, str], there: Mapping[str, _ServiceQuota], asked: Asked, *, key: str
    ) -> Iterator[Problem]:
        """wanted: quota → type. Of several types one is enough."""
        lacking = [name for name in wanted if (found := there.get(name)) and found.value < asked.instances]
        fatal = len(lacking) == len(wanted)
        for name in lacking:
            found = there[name]
            yield Problem(
                key,
                f"{asked.instances} × {wanted[name]} wanted, and the quota '{name}' is {found.value:g} in "
                f"{self.account.region}: ask for more: {_raise(found.code, asked.instances, self.account)}, or take "
                "another type",
                fatal=fatal,
            )
        for name in wanted:
            if name not in there:
                what = f"Service Quotas knows no '{name}' in {self.account.region}"
                yield Problem(key, f"{what}: the type may not be offered there", fatal=False)


_PUSH = "`cvlaunch image push IMAGE {}`"


def _command(account: Account, *words: str) -> str:
    """One of AWS's own program, in this account's region and profile."""
    profile = ("--profile", account.profile) if account.profile else ()
    return f"`{shlex.join(('aws', *words, '--region', account.region, *profile))}`"


# ---- the role


def _no_role(arn: str | None, account: Account) -> str:
    if arn:
        return f"{arn!r} is no role; one looks like arn:aws:iam::123456789012:role/trainer"
    return (
        "each job of SageMaker has a role of your account, and the target names none: write role: arn:aws:iam::…; if "
        f"there is none yet, make one: `cvlaunch targets policy {account.name}` prints the policies that it needs"
    )


def _no_such_role(name: str, account: Account) -> str:
    made = _command(
        account, "iam", "create-role", "--role-name", name, "--assume-role-policy-document", _compact(trust_policy())
    )
    return (
        f"there is no role {name}: correct its ARN, or make it: {made}; its policy is what "
        f"`cvlaunch targets policy {account.name} --of role` prints"
    )


def _no_trust(name: str, account: Account) -> str:
    (statement,) = trust_policy()["Statement"]
    document = _command(
        account, "iam", "update-assume-role-policy", "--role-name", name, "--policy-document", "file://trust.json"
    )
    return (
        f"SageMaker may not take role {name}: its trust policy lacks the statement {_compact(statement)}: add it "
        f"(in the console, or {document}; `cvlaunch targets policy {account.name} --of trust` prints a whole one)"
    )


def _compact(document: Json) -> str:
    return json.dumps(document, separators=(",", ":"))


def _trusts(policy: object) -> bool:
    statements = policy.get("Statement", ()) if isinstance(policy, dict) else ()
    return any(
        statement.get("Effect") == "Allow"
        and {"sts:assumerole", "sts:*", "*"} & {action.lower() for action in _listed(statement.get("Action"))}
        and _includes_us(statement.get("Principal"))
        for statement in _listed(statements)
    )


def _includes_us(principal: object) -> bool:
    if isinstance(principal, dict):
        return SERVICE in _listed(principal.get("Service"))
    return principal == "*"


def _listed(value: object) -> list[Any]:
    """IAM writes a list of one without the list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


# ---- buckets


def _region_of(bucket: str, account: Account) -> str:
    """MissingError without the bucket, AuthError for one that may not be looked at."""
    try:
        region = account.call("s3", "head_bucket", Bucket=bucket).get("BucketRegion")
        if region:
            return str(region)
    except AuthError:  # it needs the right to list all of the bucket, the next call another one
        pass
    place = account.call("s3", "get_bucket_location", Bucket=bucket).get("LocationConstraint") or ""
    return _OLD_REGIONS.get(place, str(place))


# ---- the image


def _registry(reference: str) -> str:
    """Of an image of ECR, whose host has no port: without tag and digest."""
    return reference.partition("@")[0].partition(":")[0]


def _not_in_ecr(reference: str, target: SageMakerTarget, account: Account) -> str:
    to = target.registry or f"ACCOUNT.dkr.ecr.{account.region}.{partition_of(account.region).domain}/REPOSITORY"
    return (
        f"{reference} is not in ECR, from where SageMaker takes images: push it: `cvlaunch image push {reference} {to}`"
        "; for a registry in your VPC write image_access: Vpc in the target"
    )


def _no_repository(image: EcrImage, account: Account) -> str:
    words = ("ecr", "create-repository", "--repository-name", image.repository)
    return (
        f"there is no repository {image.repository} in the registry of {image.account}, {image.region}: correct the "
        f"name, or make it: {_command(account, *words)}"
    )


def _no_image(image: EcrImage, reference: str, account: Account) -> str:
    words = ("ecr", "list-images", "--repository-name", image.repository)
    push = _PUSH.format(_registry(reference))
    return f"there is no {reference}: push it: {push}; {_command(account, *words)} lists what is there"


def _manifest(image: EcrImage, account: Account) -> Json | None:
    """None without the image, MissingError without the repository."""
    which = {"imageDigest": image.digest} if image.digest else {"imageTag": image.tag or "latest"}
    answer = account.call(
        "ecr",
        "batch_get_image",
        registryId=image.account,
        repositoryName=image.repository,
        imageIds=[which],
        acceptedMediaTypes=list(_MANIFESTS),
    )
    found = answer.get("images")
    return dict(json.loads(found[0]["imageManifest"])) if found else None


def _architectures(manifest: Json, image: EcrImage, account: Account, ca_bundle: str | None) -> list[str]:
    """Empty: unknown. An index names them; of one image the configuration does."""
    if "manifests" in manifest:
        said = (entry.get("platform", {}).get("architecture") for entry in manifest["manifests"])
        return sorted({word for word in said if word and word != "unknown"})  # attestations are `unknown`
    with contextlib.suppress(CvlaunchError, MissingError, OSError, ValueError, KeyError):
        where = account.call(
            "ecr",
            "get_download_url_for_layer",
            registryId=image.account,
            repositoryName=image.repository,
            layerDigest=manifest["config"]["digest"],
        )
        return [str(_fetched(where["downloadUrl"], ca_bundle)["architecture"])]
    return []


def _fetched(url: str, ca_bundle: str | None) -> Json:
    if not url.startswith(("https://", "http://")):
        raise ValueError(url)
    context = ssl.create_default_context(cafile=ca_bundle) if url.startswith("https:") else None
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:  # noqa: S310 - checked above
        return dict(json.loads(answer.read(_LARGEST_CONFIG)))


# ---- quotas


@dataclass(frozen=True)
class _ServiceQuota:
    name: str
    code: str
    value: float


def _quotas(account: Account) -> Iterator[_ServiceQuota]:
    """All of SageMaker's in the region: thousands, a hundred a call."""
    for found in account.pages(
        "service-quotas", "list_service_quotas", "Quotas", ServiceCode="sagemaker", MaxResults=100
    ):
        yield _ServiceQuota(found["QuotaName"], found["QuotaCode"], float(found["Value"]))


def _quotas_named(names: Sequence[str], account: Account) -> dict[str, _ServiceQuota]:
    """As far as there are any; asks no further than needed."""
    there: dict[str, _ServiceQuota] = {}
    if names:
        for quota in _quotas(account):
            if quota.name in names:
                there[quota.name] = quota
            if len(there) == len(set(names)):
                break
    return there


def _raise(code: str, value: int, account: Account) -> str:
    return _command(
        account, "service-quotas", "request-service-quota-increase", "--service-code", "sagemaker",
        "--quota-code", code, "--desired-value", str(value),
    )  # fmt: skip


def quota_remedy(account: Account, quota: Quota) -> str:
    """For a job that SageMaker refused: the quota, its numbers, and the command that asks for more."""
    wanted = max(quota.wanted, 1)
    said = f"the quota '{quota.name}' is "
    if quota.name == _LONGEST_RUN:
        said += (
            f"{format_duration(quota.value)} in {account.region}, and this job may run for {format_duration(wanted)}: "
            "write a shorter resources.timeout, or max_runtime in the target"
        )
    else:
        way_out = "wait until others have ended" if quota.delta <= quota.value else "take another type"
        used = f"{quota.used:g} are in use, and this needs {quota.delta:g} more"
        said += f"{quota.value:g} in {account.region}, {used}: {way_out}"
    with contextlib.suppress(CvlaunchError, MissingError):
        found = _quotas_named([quota.name], account.hasty()).get(quota.name)
        if found:
            return f"{said}, or ask for more: {_raise(found.code, wanted, account)}"
    query = f"Quotas[?QuotaName=='{quota.name}'].QuotaCode"
    code = _command(
        account, "service-quotas", "list-service-quotas", "--service-code", "sagemaker", "--query", query,
        "--output", "text",
    )  # fmt: skip
    return f"{said}, or ask for more: {_raise('CODE', wanted, account)}, where CODE is what {code} prints"


# ---- a look at the account


@dataclass(frozen=True)
class InstanceQuota:
    """How many instances of a type with GPUs may be in use at a time. gpus: `4 × A10G (24 GB)`."""

    name: str
    gpus: str
    on_demand: int
    spot: int
    warm_pool: int


@dataclass(frozen=True)
class Service:
    """answer: yes, not there, not allowed, no answer. message: what it said instead of yes."""

    name: str
    purpose: str
    answer: str
    message: str = ""


@dataclass(frozen=True)
class Probe:
    """user: ARN. trusted: SageMaker may take the role; None: unknown. bucket_region: None: unknown.

    logs: whether the log group is there, which the first job makes; None: unknown. longest_run: seconds. quotas: None
    where they are hidden.
    """

    region: str
    account: str
    user: str
    role: str | None
    trusted: bool | None
    output: str | None
    bucket_region: str | None
    log_group: str
    logs: bool | None
    quotas: tuple[InstanceQuota, ...] | None
    longest_run: float | None
    services: tuple[Service, ...]
    problems: tuple[Problem, ...]


def probe(account: Account, target: SageMakerTarget) -> Probe:
    """AuthError without an identity that AWS takes, UnreachableError without an answer."""
    account = account.hasty()
    look = _Look(account, target, caller_of(account))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        quotas = pool.submit(_all_quotas, account)
        region = pool.submit(_output_region, look)
        services = pool.map(look.service, _questions(target))
        problems = list(_answers(_of_target(look)))
        answers, there = tuple(services), quotas.result()
    logs = next(one.answer for one in answers if one.name == _LOGS)
    return Probe(
        region=account.region,
        account=look.caller.account,
        user=look.caller.arn,
        role=target.role,
        trusted=_trusted(problems),
        output=target.output,
        bucket_region=region.result(),
        log_group=LOG_GROUP,
        logs={"yes": True, _EMPTY: False}.get(logs),
        quotas=None if there is None else tuple(_instance_quotas(there)),
        longest_run=there[_LONGEST_RUN].value if there and _LONGEST_RUN in there else None,
        services=answers,
        problems=(*problems, *_unanswered(answers), *_no_gpus(there, target, account)),
    )


def _of_target(look: _Look) -> dict[str, Callable[[], Iterable[Problem]]]:
    output = look.target.output
    return {
        "role": lambda: look.role(look.target.role),
        "profile": lambda: look.rights(look.target.role),
        "output": lambda: look.bucket("output", output) if output else _no_output(),
        "registry": look.registry,
    }


def _trusted(problems: Sequence[Problem]) -> bool | None:
    """Of what `role` found; what the role itself may do is a note."""
    of_role = [problem for problem in problems if problem.thing == "role"]
    if any(problem.fatal for problem in of_role):
        return False
    return None if any(problem.message.startswith(_HIDDEN) for problem in of_role) else True


def _no_output() -> Iterator[Problem]:
    yield Problem(
        "output", "the target names none: write output: s3://BUCKET/runs, or write it in each job", fatal=False
    )


def _output_region(look: _Look) -> str | None:
    place = split_s3(look.target.output or "")
    if place:
        with contextlib.suppress(CvlaunchError, MissingError):
            return _region_of(place[0], look.account)
    return None


_LOGS = "CloudWatch Logs"


@dataclass(frozen=True)
class _Ask:
    """A small question. told: somebody else reports if it is not answered."""

    name: str
    purpose: str
    service: str
    operation: str
    parameters: Json = field(default_factory=dict)
    told: bool = False


def _questions(target: SageMakerTarget) -> Iterator[_Ask]:
    role, image, place = parse_role(target.role or ""), ecr_image(target.registry or ""), split_s3(target.output or "")
    yield _Ask("STS", "identity", "sts", "get_caller_identity")
    yield _Ask("SageMaker", "runs", "sagemaker", "list_training_jobs", {"MaxResults": 1})
    yield _Ask(_LOGS, "logs", "logs", "describe_log_streams", {"logGroupName": LOG_GROUP, "limit": 1})
    if place:
        yield _Ask("S3", "results and data", "s3", "get_bucket_location", {"Bucket": place[0]}, told=True)
    if image:
        which = {"registryId": image.account, "repositoryName": image.repository, "maxResults": 1}
        yield _Ask("ECR", "images", "ecr", "describe_images", which, told=True)
    if role:
        yield _Ask("IAM", "checks of the role", "iam", "get_role", {"RoleName": role.name}, told=True)
    few = {"ServiceCode": "sagemaker", "MaxResults": 1}
    yield _Ask("Service Quotas", "checks of quotas", "service-quotas", "list_service_quotas", few)


def _unanswered(services: Sequence[Service]) -> Iterator[Problem]:
    for service in services:
        if service.message:
            yield Problem(service.name, service.message, fatal=service.purpose == "runs")


def _all_quotas(account: Account) -> dict[str, _ServiceQuota] | None:
    """None where they are hidden."""
    with contextlib.suppress(CvlaunchError, MissingError):
        return {quota.name: quota for quota in _quotas(account)}
    return None


def _instance_quotas(there: Mapping[str, _ServiceQuota]) -> Iterator[InstanceQuota]:
    for instance in INSTANCES.values():
        found = [there.get(form.format(instance.name)) for form in _USAGE.values()]
        counts = [int(quota.value) if quota else 0 for quota in found]
        if instance.gpus and any(counts):
            gpus = f"{instance.gpus} × {instance.gpu} ({instance.gpu_memory} GB)"
            yield InstanceQuota(instance.name, gpus, *counts)


def _no_gpus(there: Mapping[str, _ServiceQuota] | None, target: SageMakerTarget, account: Account) -> Iterator[Problem]:
    if there is None or any(quota.on_demand or quota.spot for quota in _instance_quotas(there)):
        return
    name = next(iter(target.instance_types), _FIRST_TYPE)
    found = there.get(_USAGE["on demand"].format(name))
    if found:
        what = "no instance type with GPUs has a quota, as in all new accounts: ask for one"
        yield Problem("quotas", f"{what}: {_raise(found.code, 1, account)} is for {name}", fatal=False)


_FIRST_TYPE = "ml.g5.xlarge"


def as_target(found: Probe, target: SageMakerTarget) -> dict[str, object]:
    """Keys of a target: what is written in this one, and where it was found to be."""
    written = target.model_dump(
        include=target.model_fields_set, exclude={"backend", "storage"}, exclude_none=True, mode="json"
    )
    return {"backend": target.backend, "region": found.region, **written}
