"""What IAM has to allow, and no more: to whoever submits, and to the role that jobs have. Pure.

The tables are Needs, from which the policies are written and by which `targets probe` asks about rights.
https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemaker.html has which actions know a
resource; https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html has what a job's role needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.credentials.partitions import ECR_HOST, partition_of
from launcher.errors import SpecError
from launcher.sagemaker.client import LOG_GROUP, Json
from launcher.sagemaker.target import SageMakerTarget

__all__ = [
    "SERVICE",
    "EcrImage",
    "Need",
    "Place",
    "Role",
    "arn_of_s3",
    "document",
    "ecr_image",
    "parse_role",
    "place_of",
    "role_needs",
    "split_s3",
    "submitter_needs",
    "trust_policy",
]

SERVICE = "sagemaker.amazonaws.com"

_VERSION = "2012-10-17"
_UNKNOWN_ROLE = "REPLACE-ME"
_ECR = re.compile(
    rf"{ECR_HOST}/"
    r"(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?::(?P<tag>[\w][\w.-]*))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_ROLE = re.compile(r"arn:(?P<partition>aws[a-z-]*):iam::(?P<account>\d{12}):role/(?:.+/)?(?P<name>[\w+=,.@-]+)")
_KEY = re.compile(r"arn:aws[a-z-]*:kms:[a-z0-9-]+:\d{12}:key/[\w-]+")
_S3 = re.compile(r"s3://(?P<bucket>[^/]+)/*(?P<prefix>.*?)/*")


@dataclass(frozen=True)
class Need:
    """One statement of a policy: what is allowed on which ARNs, and what for. condition: of IAM."""

    name: str
    purpose: str
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    condition: Mapping[str, Mapping[str, str | list[str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class EcrImage:
    """Of ECR. tag, digest: None where the reference has none."""

    account: str
    region: str
    repository: str
    tag: str | None
    digest: str | None


@dataclass(frozen=True)
class Role:
    account: str
    name: str


@dataclass(frozen=True)
class Place:
    """What a policy is about. account: 12 digits, or `*` where nobody says it. data: s3:// URIs that jobs read.

    secrets: references as in a job file, without `store:`. keys: of KMS, by which buckets, secrets and parameters are
    encrypted.
    """

    target: SageMakerTarget
    region: str
    account: str
    output: str | None
    data: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def arn(self, service: str, resource: str, *, account: str | None = None) -> str:
        return f"arn:{partition_of(self.region).name}:{service}:{self.region}:{account or self.account}:{resource}"


def place_of(
    target: SageMakerTarget,
    region: str,
    *,
    data: Sequence[str] = (),
    secrets: Sequence[str] = (),
    keys: Sequence[str] = (),
) -> Place:
    """data: places of datasets; those outside S3 need no rights. keys: ARNs. SpecError for what is none of these."""
    role, image = parse_role(target.role or ""), ecr_image(target.registry or "")
    account = role.account if role else image.account if image else "*"
    in_s3 = tuple(dict.fromkeys(uri for uri in data if split_s3(uri)))
    found = tuple(secret.removeprefix("store:") for secret in secrets)
    for secret in found:
        if not re.fullmatch(r"(secretsmanager|ssm):.+", secret):
            raise SpecError(
                f"{secret!r} is no reference; one looks like secretsmanager:NAME or ssm:NAME", key="--secret"
            )
    for key in keys:
        if not _KEY.fullmatch(key):
            raise SpecError(
                f"{key!r} is no key's ARN; one looks like arn:aws:kms:eu-west-1:123456789012:key/1234abcd-…, and "
                "`aws kms describe-key --key-id alias/NAME` shows that of an alias",
                key="--key",
            )
    return Place(target, region, account, target.output, in_s3, found, tuple(dict.fromkeys(keys)))


def ecr_image(reference: str) -> EcrImage | None:
    """None for what is not in ECR."""
    found = _ECR.fullmatch(reference)
    return EcrImage(**found.groupdict()) if found else None


def parse_role(arn: str) -> Role | None:
    """None for what is no role's ARN."""
    found = _ROLE.fullmatch(arn)
    return Role(found["account"], found["name"]) if found else None


def split_s3(uri: str) -> tuple[str, str] | None:
    """(bucket, prefix without slashes around it); None for what is not in S3."""
    found = _S3.fullmatch(uri)
    return (found["bucket"], found["prefix"]) if found else None


def arn_of_s3(bucket: str, region: str, prefix: str | None = None) -> str:
    """Of the bucket, or of all that stands below a prefix."""
    inside = "" if prefix is None else f"/{prefix}/*" if prefix else "/*"
    return f"arn:{partition_of(region).name}:s3:::{bucket}{inside}"


# ---- who submits


def submitter_needs(place: Place) -> Iterator[Need]:
    """Of whoever submits, follows, fetches and cancels."""
    group = place.arn("logs", f"log-group:{LOG_GROUP}")
    jobs = tuple(f"sagemaker:{verb}TrainingJob" for verb in ("Create", "Describe", "Stop", "Delete"))
    yield Need("Jobs", "submit, status, cancel, rm", (*jobs, "sagemaker:AddTags", "sagemaker:ListTags"),
               (place.arn("sagemaker", "training-job/*"),))  # fmt: skip
    yield Need("ListJobs", "many runs in one call", ("sagemaker:ListTrainingJobs",), ("*",))
    yield Need("PassRole", "gives the role to jobs", ("iam:PassRole",), (_role_arn(place),),
               {"StringEquals": {"iam:PassedToService": SERVICE}})  # fmt: skip
    yield Need("ReadRole", "cvlaunch targets probe", ("iam:GetRole",), (_role_arn(place),))
    yield Need("Logs", "logs while a run goes on", ("logs:DescribeLogStreams", "logs:GetLogEvents"),
               (group, f"{group}:*"))  # fmt: skip
    yield from _output_needs(place)
    yield from _data_needs(place)
    yield from _push_needs(place)
    if place.target.kms_key:
        yield _key_need("DecryptResults", place.target.kms_key, ("kms:Decrypt", "kms:GenerateDataKey"), place)
    yield from _own_key_needs(place)
    yield Need("Quotas", "cvlaunch targets probe", ("servicequotas:ListServiceQuotas",), ("*",))


def _role_arn(place: Place) -> str:
    return place.target.role or f"arn:{partition_of(place.region).name}:iam::{place.account}:role/{_UNKNOWN_ROLE}"


def _output_needs(place: Place) -> Iterator[Need]:
    bucket, prefix = split_s3(place.output or "") or (_UNKNOWN_ROLE.lower(), "")
    yield from _listing("Output", "results", {bucket: [prefix]}, place)
    objects = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
    yield Need("OutputObjects", "results", objects, (arn_of_s3(bucket, place.region, prefix),))


def _data_needs(place: Place) -> Iterator[Need]:
    found = [split for uri in place.data if (split := split_s3(uri))]
    if not found:
        return
    buckets: dict[str, list[str]] = {}
    for bucket, prefix in found:
        buckets.setdefault(bucket, []).append(prefix)
    yield from _listing("Data", "datasets", buckets, place)
    objects = tuple(arn_of_s3(bucket, place.region, prefix) for bucket, prefix in found)
    yield Need("DataObjects", "datasets", ("s3:GetObject",), objects)


def _listing(name: str, purpose: str, buckets: Mapping[str, Sequence[str]], place: Place) -> Iterator[Need]:
    """A condition holds for all resources of a statement, so that each bucket has its own."""
    arns = tuple(arn_of_s3(bucket, place.region) for bucket in buckets)
    yield Need(f"{name}Buckets", purpose, ("s3:GetBucketLocation",), arns)
    for number, (bucket, prefixes) in enumerate(buckets.items(), 1):
        below = [word for prefix in prefixes for word in (prefix, f"{prefix}/*")]
        condition = {"StringLike": {"s3:prefix": below}} if all(prefixes) else {}
        suffix = str(number) if len(buckets) > 1 else ""
        yield Need(f"{name}List{suffix}", purpose, ("s3:ListBucket",), (arn_of_s3(bucket, place.region),), condition)


_PULL = ("ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer")
_PUSH = ("ecr:InitiateLayerUpload", "ecr:UploadLayerPart", "ecr:CompleteLayerUpload", "ecr:PutImage")


def _push_needs(place: Place) -> Iterator[Need]:
    image = ecr_image(place.target.registry or "")
    if image is None:
        return
    yield Need("RegistryLogin", "pushing images", ("ecr:GetAuthorizationToken",), ("*",))
    yield Need("Registry", "pushing images", (*_PULL, *_PUSH, "ecr:DescribeImages"), (_repository(image, place),))


def _repository(image: EcrImage, place: Place) -> str:
    return f"arn:{partition_of(place.region).name}:ecr:{image.region}:{image.account}:repository/{image.repository}"


# ---- the role of jobs


def trust_policy() -> Json:
    """Lets SageMaker take the role."""
    return {
        "Version": _VERSION,
        "Statement": [{"Effect": "Allow", "Principal": {"Service": SERVICE}, "Action": "sts:AssumeRole"}],
    }


def role_needs(place: Place) -> Iterator[Need]:
    """Of the role that jobs have."""
    target, group = place.target, place.arn("logs", f"log-group:{LOG_GROUP}")
    image = ecr_image(target.registry or "")
    images = _repository(image, place) if image else place.arn("ecr", "repository/*")
    yield from _output_needs(place)
    yield from _data_needs(place)
    yield Need("RegistryLogin", "pulling the image", ("ecr:GetAuthorizationToken",), ("*",))
    yield Need("Image", "pulling the image", _PULL, (images,))
    logs = tuple(f"logs:{verb}" for verb in ("CreateLogGroup", "CreateLogStream", "DescribeLogStreams", "PutLogEvents"))
    yield Need("Logs", "logs", logs, (group, f"{group}:*"))
    yield Need("Curves", "metrics in CloudWatch", ("cloudwatch:PutMetricData",), ("*",),
               {"StringLike": {"cloudwatch:namespace": "/aws/sagemaker/*"}})  # fmt: skip
    if target.subnets:
        yield from _network_needs(place)
    if target.kms_key:
        actions = ("kms:Encrypt", "kms:Decrypt", "kms:GenerateDataKey", "kms:DescribeKey")
        yield _key_need("EncryptResults", target.kms_key, actions, place)
    if target.volume_kms_key:
        yield _key_need("EncryptVolumes", target.volume_kms_key, ("kms:CreateGrant", "kms:DescribeKey"), place)
    yield from _own_key_needs(place)
    yield from _secret_needs(place)


def _network_needs(place: Place) -> Iterator[Need]:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/train-vpc.html"""
    target = place.target
    interfaces = place.arn("ec2", "network-interface/*")
    parts = (
        *(place.arn("ec2", f"subnet/{subnet}") for subnet in target.subnets),
        *(place.arn("ec2", f"security-group/{group}") for group in target.security_groups),
    )
    what = "instances in your VPC"
    yield Need("NetworkCreate", what, ("ec2:CreateNetworkInterface",), (interfaces, *parts))
    change = tuple(
        f"ec2:{verb}" for verb in (
            "CreateNetworkInterfacePermission", "DeleteNetworkInterface", "DeleteNetworkInterfacePermission",
        )
    )  # fmt: skip
    yield Need("NetworkChange", what, change, (interfaces,))
    things = ("DhcpOptions", "NetworkInterfaces", "SecurityGroups", "Subnets", "Vpcs")
    yield Need("NetworkLook", what, tuple(f"ec2:Describe{thing}" for thing in things), ("*",))


def _key_need(name: str, key: str, actions: tuple[str, ...], place: Place) -> Need:
    """key: an ARN, an id or an alias. Policies know no aliases as resources, but a condition."""
    conditions: dict[str, Mapping[str, str | list[str]]] = {}
    alias = key if key.startswith("alias/") else (re.fullmatch(r"arn:.*:(alias/.+)", key) or ("", ""))[1]
    if alias:
        conditions["ForAnyValue:StringEquals"] = {"kms:ResourceAliases": alias}
    if "kms:CreateGrant" in actions:
        conditions["BoolIfExists"] = {"kms:GrantIsForAWSResource": "true"}
    resource = place.arn("kms", "key/*") if alias else key if key.startswith("arn:") else place.arn("kms", f"key/{key}")
    return Need(name, "encryption", actions, (resource,), conditions)


def _own_key_needs(place: Place) -> Iterator[Need]:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingKMSEncryption.html: reading decrypts, writing asks for
    a key of the data."""
    if place.keys:
        yield Need("OwnKeys", "what a key of KMS encrypts", ("kms:Decrypt", "kms:GenerateDataKey"), place.keys)


def _secret_needs(place: Place) -> Iterator[Need]:
    found: dict[str, list[str]] = {"secretsmanager": [], "ssm": []}
    for reference in place.secrets:
        kind, _, name = reference.partition("#")[0].partition(":")
        found[kind] += _secret_arns(name, place) if kind == "secretsmanager" else [_parameter_arn(name, place)]
    names = {"secretsmanager": ("Secrets", "secretsmanager:GetSecretValue"), "ssm": ("Parameters", "ssm:GetParameter")}
    for kind, (name, action) in names.items():
        if found[kind]:
            yield Need(name, "secrets of jobs", (action,), tuple(dict.fromkeys(found[kind])))


def _secret_arns(name: str, place: Place) -> list[str]:
    """Secrets Manager ends the ARN of a secret with `-` and six characters of its own, which a reference may leave out.

    Whether an ARN that ends so is whole can't be seen: `my-secret` may be all of a name.
    """
    arn = name if name.startswith("arn:") else place.arn("secretsmanager", f"secret:{name}")
    whole = name.startswith("arn:") and re.search("-[A-Za-z0-9]{6}$", name)
    return [arn, f"{arn}-??????"] if whole else [f"{arn}-??????"]


def _parameter_arn(name: str, place: Place) -> str:
    """Without the version or label, which IAM doesn't know: `/team/token:3`."""
    arn = name if name.startswith("arn:") else place.arn("ssm", f"parameter/{name.lstrip('/')}")
    return ":".join(arn.split(":")[:6])


# ---- as IAM takes it


def document(needs: Iterator[Need]) -> Json:
    return {"Version": _VERSION, "Statement": [_statement(need) for need in needs]}


def _statement(need: Need) -> Json:
    condition = {"Condition": {test: dict(keys) for test, keys in need.condition.items()}} if need.condition else {}
    return {
        "Sid": need.name,
        "Effect": "Allow",
        "Action": list(need.actions),
        "Resource": list(need.resources),
        **condition,
    }
