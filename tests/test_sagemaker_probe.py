"""Looking at an AWS account: each thing that a job may find missing there, with the words that bring it."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher.backends
import launcher.sagemaker
from launcher.backends.base import Problem
from launcher.credentials.partitions import partition_of
from launcher.errors import AuthError, SpecError, UnreachableError
from launcher.sagemaker.catalogue import INSTANCES
from launcher.sagemaker.client import Account, MissingError, Quota
from launcher.sagemaker.login import way_in
from launcher.sagemaker.policy import (
    SERVICE,
    document,
    ecr_image,
    parse_role,
    place_of,
    role_needs,
    split_s3,
    submitter_needs,
    trust_policy,
)
from launcher.sagemaker.probe import Asked, caller_of, check_job, probe, quota_remedy
from launcher.sagemaker.target import SageMakerTarget
from tests.services.aws import AwsCloud

REGION = "eu-west-1"
REPOSITORY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/vision/probed"
IMAGE = f"{REPOSITORY}:1"
ROLE = "arn:aws:iam::123456789012:role/prober"
TYPE = "ml.g5.xlarge"
USER = "arn:aws:sts::123456789012:user/moto"


@pytest.fixture
def ready(aws: AwsCloud) -> AwsCloud:
    """An account that takes the job which `asked()` is."""
    aws.bucket("probed")
    aws.account.write("probed", "shapes/a.png", b"x")
    aws.role("prober")
    aws.serve_image(IMAGE, image="none")
    return aws


def target(**keys: Any) -> SageMakerTarget:
    given = {"region": REGION, "role": ROLE, "output": "s3://probed/runs", "registry": REPOSITORY, **keys}
    return SageMakerTarget(**given)


def asked(**changes: Any) -> Asked:
    usual = {
        "role": ROLE,
        "image": IMAGE,
        "output": "s3://probed/runs",
        "channels": {"train": "s3://probed/shapes"},
        "instance_types": (TYPE,),
    }
    return Asked(**{**usual, **changes})


def account_of(given: SageMakerTarget) -> Account:
    """Without pauses."""
    return Account(given.access, "aws", sleep=lambda _: None)


@functools.cache
def usual_account() -> Account:
    """With the environment's keys, for tests that don't disturb these: botocore reads its files once."""
    return account_of(target())


def problems(asking: Asked, *, account: Account | None = None, **keys: Any) -> list[Problem]:
    found = target(**keys)
    return list(check_job(account or account_of(found), found, asking))


def only(found: list[Problem]) -> Problem:
    (problem,) = found
    return problem


# -- a job


def test_a_job_that_fits_has_no_problem(ready: AwsCloud) -> None:
    assert problems(asked()) == []
    asked_about = {call.operation for call in ready.calls}
    assert {"GetCallerIdentity", "GetRole", "SimulatePrincipalPolicy", "HeadBucket", "BatchGetImage"} <= asked_about
    assert ready.lookups.asked == [USER, USER, ROLE, ROLE, ROLE]


def nothing(_: AwsCloud) -> None:
    pass


BAD: dict[str, tuple[Callable[[AwsCloud], object], dict[str, Any], dict[str, Any], tuple[str, bool, list[str]]]] = {
    "no role": (nothing, {"role": None}, {}, ("role", True, [
        "the target names none: write role: arn:aws:iam::…",
        "`cvlaunch targets policy aws` prints the policies",
    ])),
    "no ARN": (nothing, {"role": "trainer"}, {}, ("role", True, [
        "'trainer' is no role; one looks like arn:aws:iam::123456789012:role/trainer",
    ])),
    "role of somebody else": (nothing, {"role": "arn:aws:iam::000000000001:role/x"}, {}, ("role", True, [
        f"is of another account, you are in account 123456789012 ({USER}): name a role of your account",
    ])),
    "role missing": (nothing, {"role": f"{ROLE}-none"}, {}, ("role", True, [
        "there is no role prober-none: correct its ARN, or make it: `aws iam create-role --role-name prober-none "
        "--assume-role-policy-document '{\"Version\":\"2012-10-17\"",
        "--region eu-west-1`; its policy is what `cvlaunch targets policy aws --of role` prints",
    ])),
    "role not trusted": (lambda cloud: cloud.role("other", trusted=False), {"role": ROLE.replace("prober", "other")},
        {}, ("role", True, [
        'its trust policy lacks the statement {"Effect":"Allow","Principal":{"Service":"sagemaker.amazonaws.com"},'
        '"Action":"sts:AssumeRole"}',
        "`aws iam update-assume-role-policy --role-name other --policy-document file://trust.json --region eu-west-1`",
        "`cvlaunch targets policy aws --of trust` prints a whole one",
    ])),
    "role may not be looked at": (lambda cloud: cloud.fail("GetRole", "AccessDenied", f"User: {USER} is not authorized "
        f"to perform: iam:GetRole on resource: {ROLE}", times=None, status=403), {}, {}, ("role", False, [
        "it can't be looked at: you may not do iam:GetRole (region eu-west-1)",
        "`cvlaunch targets policy aws` prints",
    ])),
    "caller may not pass it": (lambda cloud: cloud.lookups.denied.add("iam:PassRole"), {}, {}, ("profile", True, [
        f"you may not do iam:PassRole on {ROLE}: ask for the policy that `cvlaunch targets policy aws --of submitter`",
    ])),
    "caller has a policy for other names": (
        lambda cloud: cloud.lookups.limited.update({"sagemaker:CreateTrainingJob": "arn:*:training-job/vision-*"}),
        {}, {}, ("profile", False, [
        "you may not do sagemaker:CreateTrainingJob on arn:aws:sagemaker:eu-west-1:123456789012:training-job/*: ask ",
        "--of submitter` prints; one for jobs of certain names is enough where this one's is among them",
    ])),
    "role may not write": (lambda cloud: cloud.lookups.denied.add("s3:PutObject"), {}, {}, ("role", False, [
        "the role may not do s3:PutObject on arn:aws:s3:::probed/runs/*, for results: give it the policy that "
        "`cvlaunch targets policy aws --of role` prints",
    ])),
    "bucket missing": (nothing, {"output": "s3://probed-none/runs"}, {}, ("output", True, [
        "there is no bucket probed-none: correct the name, or make it: `aws s3 mb s3://probed-none --region eu-west-1`",
    ])),
    "bucket elsewhere": (lambda cloud: cloud.bucket("probed-far", "us-west-2"), {"output": "s3://probed-far/runs"}, {},
        ("output", True, [
        "bucket probed-far is in us-west-2 and the job in eu-west-1, and SageMaker wants both in the same region: "
        "name a bucket of eu-west-1, or run there: region: us-west-2 in the target",
    ])),
    "data elsewhere": (lambda cloud: cloud.bucket("probed-us", "us-east-1"), {"channels": {"val": "s3://probed-us/x"}},
        {}, ("data.val", True, [
        "bucket probed-us is in us-east-1 and the job in eu-west-1",
        "copy it to a bucket of eu-west-1, or run there: region: us-east-1 in the target",
    ])),
    "data not there yet": (nothing, {"channels": {"val": "s3://probed/shape"}}, {}, ("data.val", True, [
        "there is nothing at s3://probed/shape: correct the place, or bring the data: "
        "cvlaunch data push FOLDER s3://probed/shape --target aws",
    ])),
    "data missing": (nothing, {"channels": {"val": "s3://probed-none/x"}}, {},
        ("data.val", True, ["there is no bucket"])),
    "bucket may not be looked at": (
        lambda cloud: [cloud.fail(name, "AccessDenied", "Access Denied", times=None, status=403)
                       for name in ("HeadBucket", "GetBucketLocation")],
        {"channels": {}}, {}, ("output", False, ["it can't be looked at: you may not do GetBucketLocation"])),
    "image elsewhere than ECR": (nothing, {"image": "ghcr.io/team/trainer:1"}, {}, ("image", True, [
        "ghcr.io/team/trainer:1 is not in ECR, from where SageMaker takes images: push it: "
        f"`cvlaunch image push ghcr.io/team/trainer:1 {REPOSITORY}`",
        "image_access: Vpc",
    ])),
    "image of another region": (nothing, {"image": IMAGE.replace("eu-west-1", "us-east-1")}, {}, ("image", True, [
        "is in us-east-1 and the job in eu-west-1, and SageMaker pulls images of its own region only: push it to a "
        "registry of eu-west-1",
    ])),
    "no repository": (nothing, {"image": IMAGE.replace("probed", "none")}, {}, ("image", True, [
        "there is no repository vision/none in the registry of 123456789012, eu-west-1",
        "`aws ecr create-repository --repository-name vision/none --region eu-west-1`",
    ])),
    "image missing": (nothing, {"image": f"{REPOSITORY}:2"}, {}, ("image", True, [
        f"there is no {REPOSITORY}:2: push it: `cvlaunch image push IMAGE {REPOSITORY}`",
        "`aws ecr list-images --repository-name vision/probed --region eu-west-1` lists what is there",
    ])),
    "image digest missing": (nothing, {"image": f"{REPOSITORY}@sha256:{'0' * 64}"}, {}, ("image", True, [
        f"there is no {REPOSITORY}@sha256:0000", f"push it: `cvlaunch image push IMAGE {REPOSITORY}`",
    ])),
    "image for ARM": (lambda cloud: cloud.serve_image(f"{REPOSITORY}:arm", image="none", architecture="arm64"),
        {"image": f"{REPOSITORY}:arm"}, {}, ("image", True, [
        f"{REPOSITORY}:arm is for arm64, and SageMaker's instances are amd64: build it for linux/amd64, then push it: "
        f"`cvlaunch image push IMAGE {REPOSITORY}`",
    ])),
    "quota 0": (lambda cloud: cloud.quota(TYPE, 0), {}, {}, ("resources", True, [
        "1 × ml.g5.xlarge wanted, and the quota 'ml.g5.xlarge for training job usage' is 0 in eu-west-1: ask for more: "
        "`aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code L-",
        "--desired-value 1 --region eu-west-1`, or take another type",
    ])),
    "spot quota 1": (lambda cloud: cloud.quota(TYPE, 1, spot=True), {"spot": True, "instances": 2}, {},
        ("resources.spot", True, [
        "2 × ml.g5.xlarge wanted, and the quota 'ml.g5.xlarge for spot training job usage' is 1", "--desired-value 2",
    ])),
    "one of two types": (lambda cloud: cloud.quota(TYPE, 0), {"instance_types": (TYPE, "ml.g6.xlarge")},
        {"instance_types": [TYPE, "ml.g6.xlarge"]}, ("instance_types", False, ["1 × ml.g5.xlarge wanted"])),
    "warm pool quota": (lambda cloud: cloud.quota_value(f"{TYPE} for training warm pool usage", 0), {},
        {"keep_alive": "10m"}, ("keep_alive", True, ["the quota 'ml.g5.xlarge for training warm pool usage' is 0"])),
    "job too long": (lambda cloud: cloud.quota_value("Longest run time for a training job", 432000),
        {"max_runtime": 6 * 86400.0}, {}, ("resources.timeout", True, [
        "the job may run for 6d 00h, and what this account may have is 5d 00h: write less, or ask for more: `aws ",
        "--desired-value 518400",
    ])),
    "target too long": (lambda cloud: cloud.quota_value("Longest run time for a training job", 86400), {},
        {"max_runtime": "2d"}, ("max_runtime", True, ["the job may run for 2d 00h, and what this account may"])),
    "quotas hidden": (lambda cloud: cloud.fail("ListServiceQuotas", "AccessDeniedException", f"User: {USER} is not "
        "authorized to perform: servicequotas:ListServiceQuotas because no policy allows it", times=None),
        {}, {}, ("resources", False, ["it can't be looked at: you may not do servicequotas:ListServiceQuotas"])),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "changes", "keys", "expected"), BAD.values(), ids=BAD)
def test_what_a_job_finds_missing(
    ready: AwsCloud,
    prepare: Callable[[AwsCloud], object],
    changes: dict[str, Any],
    keys: dict[str, Any],
    expected: tuple[str, bool, list[str]],
) -> None:
    prepare(ready)
    thing, fatal, words = expected
    found = only(problems(asked(**changes), account=usual_account(), **keys))
    assert (found.thing, found.fatal) == (thing, fatal)
    for part in words:
        assert part in found.message
    for command in re.findall(r"`(aws [^`]+)`", found.message):
        assert shlex.split(command)[-2:] == ["--region", REGION]


def test_a_profile_stands_in_every_command(ready: AwsCloud, home: Path) -> None:
    (home / ".aws").mkdir()
    (home / ".aws/credentials").write_text(
        "[lab]\naws_access_key_id = AKIATESTTESTTESTLAB1\naws_secret_access_key = x\n"
    )
    (home / ".aws/credentials").chmod(0o600)
    found = only(problems(asked(output="s3://probed-none/x"), profile="lab"))
    assert found.message.endswith("`aws s3 mb s3://probed-none --region eu-west-1 --profile lab`")


def test_a_type_that_nobody_here_knows_is_a_warning(ready: AwsCloud) -> None:
    found = problems(asked(instance_types=("ml.g99.xlarge",)), instance_types=["ml.g99.xlarge"])
    assert [(problem.thing, problem.fatal) for problem in found] == [("instance_types", False)] * 2
    assert "cvlaunch does not know ml.g99.xlarge, nor what is in it" in found[0].message
    assert "botocore may be older" in found[0].message
    assert "Service Quotas knows no 'ml.g99.xlarge for training job usage' in eu-west-1" in found[1].message


def test_an_image_of_somebody_else_may_be_hidden(ready: AwsCloud) -> None:
    theirs = "763104351884.dkr.ecr.eu-west-1.amazonaws.com/pytorch-training:2"
    found = problems(asked(image=theirs))
    assert [problem.fatal for problem in found] == [False] * len(found)
    assert "registry 763104351884 is another account's" in found[0].message


def test_a_registry_in_the_vpc_is_not_looked_at(ready: AwsCloud) -> None:
    inside = {"image_access": "Vpc", "subnets": ["subnet-1"], "security_groups": ["sg-1"]}
    assert problems(asked(image="registry.example.com/team/trainer:1"), **inside) == []


@pytest.mark.parametrize(("architecture", "fatal"), [("amd64", False), ("arm64", True), (None, False)])
def test_the_architecture_of_a_single_image_stands_in_its_configuration(
    ready: AwsCloud, architecture: str | None, fatal: bool
) -> None:
    digest = f"sha256:{architecture or 'none':x<64}"
    manifest = {"schemaVersion": 2, "config": {"digest": digest}, "layers": []}
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    ready.client("ecr").put_image(
        repositoryName="vision/probed", imageTag=f"one-{architecture}", imageManifest=json.dumps(manifest),
        imageManifestMediaType=kind,
    )  # fmt: skip
    if architecture:
        ready.lookups.layers[digest] = {"architecture": architecture, "os": "linux"}
    found = problems(asked(image=f"{REPOSITORY}:one-{architecture}"))
    assert [problem.fatal for problem in found] == [True] * fatal


# -- identities


def test_an_assumed_role_is_asked_about_as_the_role(ready: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ready.account.assume(ready.role("worker"), "ada")
    for name, value in (("ACCESS_KEY_ID", keys.access_key), ("SECRET_ACCESS_KEY", keys.secret_key),
                        ("SESSION_TOKEN", keys.token)):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    assert caller_of(account_of(target())).arn == "arn:aws:sts::123456789012:assumed-role/worker/ada"
    assert problems(asked()) == []
    assert ready.lookups.asked[0] == "arn:aws:iam::123456789012:role/worker"


def test_who_may_not_simulate_is_not_bothered(ready: AwsCloud) -> None:
    ready.fail("SimulatePrincipalPolicy", "AccessDenied", "no", times=None, status=403)
    assert problems(asked()) == []
    assert ready.count("SimulatePrincipalPolicy") == 1


def expired(cloud: AwsCloud, _: pytest.MonkeyPatch) -> None:
    cloud.expire(cloud.access_key)


def unknown(cloud: AwsCloud, _: pytest.MonkeyPatch) -> None:
    cloud.revoke(cloud.access_key)


def no_keys(_: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def no_network(_: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")


def denied(cloud: AwsCloud, _: pytest.MonkeyPatch) -> None:
    cloud.fail("GetCallerIdentity", "AccessDenied", "explicit deny in a service control policy", times=None, status=403)


STRANGERS = {
    "expired": (expired, AuthError, "expired: set new ones (AWS_ACCESS_KEY_ID, …), or run `cvlaunch login aws`"),
    "unknown": (unknown, AuthError, "AWS does not know these credentials"),
    "no credentials": (no_keys, AuthError, "credentials"),
    "no network": (no_network, UnreachableError, "sts, region eu-west-1"),
    "access denied": (denied, AuthError, "you may not do GetCallerIdentity"),
}


@pytest.mark.parametrize("disturb, error, words", STRANGERS.values(), ids=STRANGERS)
def test_whom_aws_does_not_know_gets_one_error(
    ready: AwsCloud, monkeypatch: pytest.MonkeyPatch, disturb: Callable[..., None], error: type[Exception], words: str
) -> None:
    disturb(ready, monkeypatch)
    with pytest.raises(error, match=re.escape(words)):
        problems(asked())
    with pytest.raises(error, match=re.escape(words)):
        probe(account_of(target()), target())


# -- quotas that a submission went over


def test_a_quota_that_is_full_comes_with_its_command(aws: AwsCloud) -> None:
    quota = Quota("ml.g5.xlarge for training job usage", 2.0, 1.0, 2.0)
    said = quota_remedy(account_of(target()), quota)
    assert said.startswith(
        "the quota 'ml.g5.xlarge for training job usage' is 2 in eu-west-1, 1 are in use, and this needs 2 more: wait "
        "until others have ended, or ask for more: `aws service-quotas request-service-quota-increase --service-code "
    )
    code = re.search(r"--quota-code (L-\w+) --desired-value 3 --region eu-west-1`$", said)
    listed = aws.client("service-quotas").get_service_quota(ServiceCode="sagemaker", QuotaCode=code[1] if code else "")
    assert listed["Quota"]["QuotaName"] == quota.name


def test_who_may_not_list_quotas_gets_the_command_that_finds_the_code(aws: AwsCloud) -> None:
    aws.fail("ListServiceQuotas", "AccessDeniedException", "no", times=None)
    said = quota_remedy(account_of(target()), Quota("ml.p5.48xlarge for training job usage", 0.0, 0.0, 1.0))
    raising, finding = re.findall(r"`(aws [^`]+)`", said)
    assert "--quota-code CODE --desired-value 1" in raising
    assert shlex.split(finding)[1:7] == ["service-quotas", "list-service-quotas", "--service-code", "sagemaker",
                                         "--query", "Quotas[?QuotaName=='ml.p5.48xlarge for training job usage']"
                                         ".QuotaCode"]  # fmt: skip


# -- a look at an account


def test_a_probe_sees_what_there_is(ready: AwsCloud) -> None:
    logs = ready.client("logs")
    for group in logs.describe_log_groups()["logGroups"]:  # of other tests' jobs
        logs.delete_log_group(logGroupName=group["logGroupName"])
    for name in INSTANCES:
        for use in ("training job", "spot training job", "training warm pool"):
            ready.quota_value(f"{name} for {use} usage", 0)
    ready.quota(TYPE, 2)
    ready.quota(TYPE, 1, spot=True)
    ready.quota_value("Longest run time for a training job", 432000)
    found = probe(account_of(target()), target())
    assert (found.region, found.account, found.user) == (REGION, "123456789012", USER)
    assert (found.role, found.trusted, found.bucket_region, found.logs) == (ROLE, True, REGION, False)
    assert [(q.name, q.gpus, q.on_demand, q.spot, q.warm_pool) for q in found.quotas or ()] == [
        (TYPE, "1 × A10G (24 GB)", 2, 1, 0)
    ]
    assert found.longest_run == 432000
    assert {service.name: service.answer for service in found.services} == {
        "STS": "yes", "SageMaker": "yes", "S3": "yes", "ECR": "yes", "IAM": "yes",
        "Service Quotas": "yes", "CloudWatch Logs": "yes, with nothing in it yet",
    }  # fmt: skip
    assert found.problems == ()


def test_a_probe_says_what_is_missing_and_goes_on(ready: AwsCloud) -> None:
    for name in INSTANCES:
        for use in ("training job", "spot training job"):
            ready.quota_value(f"{name} for {use} usage", 0)
    ready.role("other", trusted=False)
    ready.fail("ListTrainingJobs", "AccessDeniedException", f"User: {USER} is not authorized to perform: "
               "sagemaker:ListTrainingJobs", times=None)  # fmt: skip
    lacking = target(role=ROLE.replace("prober", "other"), output="s3://probed-none/runs")
    found = probe(account_of(lacking), lacking)
    assert found.trusted is False
    assert [(problem.thing, problem.fatal) for problem in found.problems] == [
        ("role", True), ("output", True), ("SageMaker", True), ("quotas", False)
    ]  # fmt: skip
    assert "you may not do sagemaker:ListTrainingJobs" in found.problems[2].message
    assert "no instance type with GPUs has a quota, as in all new accounts" in found.problems[3].message
    assert "--desired-value 1 --region eu-west-1` is for ml.g5.xlarge" in found.problems[3].message


REGISTRIES = {
    "missing": (
        REPOSITORY.replace("probed", "none"),
        "`aws ecr create-repository --repository-name vision/none --region",
    ),
    "far": (REPOSITORY.replace("eu-west-1", "us-east-1"), "in us-east-1, and SageMaker pulls images of its own region"),
}


@pytest.mark.parametrize("registry, words", REGISTRIES.values(), ids=REGISTRIES)
def test_a_registry_that_can_not_be_used(ready: AwsCloud, registry: str, words: str) -> None:
    given = target(registry=registry)
    problem = only(list(probe(account_of(given), given).problems))
    assert (problem.thing, problem.fatal) == ("registry", True)
    assert words in problem.message


def test_a_probe_of_a_target_with_nothing_in_it(ready: AwsCloud) -> None:
    bare = SageMakerTarget(region=REGION)
    found = probe(account_of(bare), bare)
    assert {problem.thing: problem.fatal for problem in found.problems} == {"role": True, "output": False}
    assert [service.name for service in found.services] == ["STS", "SageMaker", "CloudWatch Logs", "Service Quotas"]


# -- policies

FULL = target(
    kms_key="alias/results",
    volume_kms_key="1234abcd-12ab-34cd-56ef-1234567890ab",
    subnets=["subnet-1", "subnet-2"],
    security_groups=["sg-1"],
)
DATA = ["s3://probed/shapes", "s3://other/a/b/", "s3://whole", "/mnt/shapes", "s3://other/c"]
SECRETS = [
    "store:secretsmanager:wandb#key",
    "ssm:/team/token",
    "secretsmanager:arn:aws:secretsmanager:eu-west-1:1:secret:x",
    "secretsmanager:arn:aws:secretsmanager:eu-west-1:1:secret:my-secret#key",
    "ssm:arn:aws:ssm:eu-west-1:1:parameter/team/other:first#key",
    "ssm:/team/token:3",
]
KEYS = [f"arn:aws:kms:eu-west-1:123456789012:key/{name}" for name in ("1234abcd-12ab-34cd-56ef-1234567890ab", "mrk-1a")]

ANY_RESOURCE = {
    "sagemaker:ListTrainingJobs",
    "servicequotas:ListServiceQuotas",
    "ecr:GetAuthorizationToken",
    "cloudwatch:PutMetricData",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
}
"""For these IAM knows no resource: https://docs.aws.amazon.com/service-authorization/latest/reference/"""


def policies(given: SageMakerTarget, region: str = REGION, **more: Any) -> dict[str, dict[str, Any]]:
    place = place_of(given, region, **more)
    return {"submitter": document(submitter_needs(place)), "role": document(role_needs(place))}


POLICIES = {
    "usual": policies(target(), data=DATA[:1]),
    "full": policies(FULL, data=DATA, secrets=SECRETS, keys=KEYS),
    "empty": policies(SageMakerTarget(region=REGION)),
    "china": policies(target(role=None, registry=None), "cn-north-1", data=DATA),
}


@pytest.mark.parametrize("which", ["submitter", "role"])
@pytest.mark.parametrize("name", POLICIES)
def test_iam_takes_the_policies(aws: AwsCloud, name: str, which: str) -> None:
    policy = POLICIES[name][which]
    text = json.dumps(policy)
    aws.client("iam").create_policy(PolicyName=f"probe-{name}-{which}", PolicyDocument=text)
    assert len(re.sub(r"\s", "", text)) <= 6144
    ids = [statement["Sid"] for statement in policy["Statement"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[A-Za-z0-9]+", sid) for sid in ids)


@pytest.mark.parametrize("which", ["submitter", "role"])
@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_allowed_everywhere_that_need_not(name: str, which: str) -> None:
    for statement in POLICIES[name][which]["Statement"]:
        assert all(re.fullmatch(r"[a-z0-9-]+:[A-Za-z]+", action) for action in statement["Action"])
        if statement["Resource"] == ["*"]:
            assert set(statement["Action"]) <= ANY_RESOURCE
        else:
            assert not set(statement["Action"]) & ANY_RESOURCE
            assert all(arn.count(":") >= 5 and not arn.endswith(":*:*") for arn in statement["Resource"])


def statements(policy: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {statement["Sid"]: statement for statement in policy["Statement"]}


def test_the_submitter_may_do_what_cvlaunch_does() -> None:
    found = statements(POLICIES["usual"]["submitter"])
    assert found["Jobs"]["Resource"] == ["arn:aws:sagemaker:eu-west-1:123456789012:training-job/*"]
    assert {action.partition(":")[2] for action in found["Jobs"]["Action"]} == {
        "CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "DeleteTrainingJob", "AddTags", "ListTags"
    }  # fmt: skip
    assert found["PassRole"] == {
        "Sid": "PassRole", "Effect": "Allow", "Action": ["iam:PassRole"], "Resource": [ROLE],
        "Condition": {"StringEquals": {"iam:PassedToService": SERVICE}},
    }  # fmt: skip
    assert found["OutputObjects"]["Resource"] == ["arn:aws:s3:::probed/runs/*"]
    assert found["OutputList"]["Condition"] == {"StringLike": {"s3:prefix": ["runs", "runs/*"]}}
    assert found["DataObjects"] == {
        "Sid": "DataObjects", "Effect": "Allow", "Action": ["s3:GetObject"],
        "Resource": ["arn:aws:s3:::probed/shapes/*"],
    }  # fmt: skip
    assert found["Registry"]["Resource"] == ["arn:aws:ecr:eu-west-1:123456789012:repository/vision/probed"]
    assert "ecr:PutImage" in found["Registry"]["Action"]
    assert "Registry" not in statements(POLICIES["china"]["submitter"])


def calls_in(path: Path) -> Iterator[tuple[str, str]]:
    """(service, operation) of all calls of AWS that stand in a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("call", "pages") and len(words) >= 2:
                yield words[0], words[1]
            elif name == "_Ask":
                yield words[-2], words[-1]


def test_no_call_is_made_that_the_submitter_may_not_make() -> None:
    modules = [*Path(launcher.sagemaker.__path__[0]).glob("*.py"), Path(launcher.backends.__path__[0], "sagemaker.py")]
    made = {call for path in modules for call in calls_in(path)}
    assert len(made) >= 15
    wanted = {f"{service.replace('-', '')}:{''.join(map(str.capitalize, name.split('_')))}" for service, name in made}
    assert "s3:ListObjectsV2" in wanted
    wanted = wanted - {"s3:ListObjectsV2"} | {"s3:ListBucket"}  # as IAM calls it
    allowed = {action for s in POLICIES["usual"]["submitter"]["Statement"] for action in s["Action"]}
    asked_in_vain = {"sts:GetCallerIdentity", "iam:SimulatePrincipalPolicy", "s3:HeadBucket"}
    """The first is everybody's; without the others something is not looked at, or in another way."""
    assert wanted - allowed == asked_in_vain


def test_the_role_may_do_what_the_runner_and_the_platform_do() -> None:
    usual, full = (statements(POLICIES[name]["role"]) for name in ("usual", "full"))
    assert set(full) - set(usual) == {
        "NetworkCreate", "NetworkChange", "NetworkLook", "EncryptResults", "EncryptVolumes", "Secrets", "Parameters",
        "OwnKeys", "DataList1", "DataList2", "DataList3",
    }  # fmt: skip
    assert full["NetworkCreate"]["Resource"][1:] == [
        "arn:aws:ec2:eu-west-1:123456789012:subnet/subnet-1",
        "arn:aws:ec2:eu-west-1:123456789012:subnet/subnet-2",
        "arn:aws:ec2:eu-west-1:123456789012:security-group/sg-1",
    ]
    assert full["EncryptResults"]["Resource"] == ["arn:aws:kms:eu-west-1:123456789012:key/*"]
    assert full["EncryptResults"]["Condition"] == {"ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/results"}}
    assert full["EncryptVolumes"]["Resource"] == [
        "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    ]
    assert full["Secrets"]["Resource"] == [
        "arn:aws:secretsmanager:eu-west-1:123456789012:secret:wandb-??????",
        "arn:aws:secretsmanager:eu-west-1:1:secret:x-??????",
        "arn:aws:secretsmanager:eu-west-1:1:secret:my-secret",
        "arn:aws:secretsmanager:eu-west-1:1:secret:my-secret-??????",
    ]
    assert full["Parameters"]["Resource"] == [
        "arn:aws:ssm:eu-west-1:123456789012:parameter/team/token",
        "arn:aws:ssm:eu-west-1:1:parameter/team/other",
    ]
    for found in full, statements(POLICIES["full"]["submitter"]):
        assert (found["OwnKeys"]["Action"], found["OwnKeys"]["Resource"]) == (
            ["kms:Decrypt", "kms:GenerateDataKey"],
            KEYS,
        )
    assert full["DataObjects"]["Resource"] == [
        "arn:aws:s3:::probed/shapes/*", "arn:aws:s3:::other/a/b/*", "arn:aws:s3:::whole/*", "arn:aws:s3:::other/c/*"
    ]  # fmt: skip
    assert full["DataList2"]["Condition"] == {"StringLike": {"s3:prefix": ["a/b", "a/b/*", "c", "c/*"]}}
    assert "Condition" not in full["DataList3"]
    assert not any("ecr:PutImage" in statement["Action"] for statement in full.values())


@pytest.mark.parametrize(
    ("region", "partition"),
    [
        ("eu-west-1", "aws"), ("cn-northwest-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov"),
        ("us-iso-east-1", "aws-iso"), ("us-isof-south-1", "aws-iso-f"), ("eu-isoe-west-1", "aws-iso-e"),
    ],
)  # fmt: skip
def test_the_partition_follows_from_the_region(region: str, partition: str) -> None:
    assert partition_of(region).name == partition
    for policy in policies(target(role=None, registry=None), region, data=DATA).values():
        arns = {arn.split(":")[1] for s in policy["Statement"] for arn in s["Resource"] if arn != "*"}
        assert arns == {partition}


def test_a_role_that_is_made_as_printed_is_trusted(ready: AwsCloud) -> None:
    ready.client("iam").create_role(RoleName="printed", AssumeRolePolicyDocument=json.dumps(trust_policy()))
    printed = ROLE.replace("prober", "printed")
    assert problems(asked(role=printed), role=printed) == []


@pytest.mark.parametrize("secret", ["wandb", "env:TOKEN", "ssm:"])
def test_a_secret_that_is_no_reference(secret: str) -> None:
    with pytest.raises(SpecError, match="one looks like secretsmanager:NAME or ssm:NAME"):
        place_of(target(), REGION, secrets=[secret])


@pytest.mark.parametrize("key", ["alias/team", "1234abcd", "arn:aws:kms:eu-west-1:123456789012:alias/team"])
def test_a_key_that_is_no_arn(key: str) -> None:
    with pytest.raises(SpecError, match=r"is no key's ARN; one looks like arn:aws:kms:.*aws kms describe-key"):
        place_of(target(), REGION, keys=[key])


WORDS = [
    (ecr_image, IMAGE, True),
    (ecr_image, f"123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn/a@sha256:{'a' * 64}", True),
    (ecr_image, "123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com/a/b_c:1.0-x", True),
    (ecr_image, "ghcr.io/team/trainer:1", False),
    (ecr_image, "12345.dkr.ecr.eu-west-1.amazonaws.com/a", False),
    (parse_role, "arn:aws-cn:iam::123456789012:role/service-role/a+b", True),
    (parse_role, "arn:aws:iam::123456789012:user/ada", False),
    (parse_role, "trainer", False),
    (split_s3, "s3://b", True),
    (split_s3, "gs://b/x", False),
]


@pytest.mark.parametrize(("parse", "text", "good"), WORDS)
def test_what_is_of_aws(parse: Callable[[str], object | None], text: str, good: bool) -> None:
    assert (parse(text) is not None) is good


# -- where an identity comes from

CONFIG = """\
[profile sso]
sso_session = s
[sso-session s]
sso_start_url = https://example.awsapps.com/start
[profile old-sso]
sso_start_url = https://example.awsapps.com/start
[profile lab]
role_arn = arn:aws:iam::123456789012:role/x
source_profile = sso
[profile program]
credential_process = /opt/keys --all
[profile console]
login_session = arn:aws:iam::123456789012:user/ada
[profile pod]
web_identity_token_file = /var/token
[profile loop]
source_profile = pool
[profile pool]
source_profile = loop
"""
WAYS = {
    "sso": (("aws", "sso", "login", "--profile", "sso"), "the SSO login of profile sso"),
    "old-sso": (("aws", "sso", "login", "--profile", "old-sso"), "the SSO login of profile old-sso"),
    "lab": (("aws", "sso", "login", "--profile", "sso"), "the SSO login of profile sso"),
    "console": (("aws", "login", "--profile", "console"), "the console login of profile console"),
    "program": ((), "the program of profile program"),
    "keys": ((), "the keys of profile keys"),
    "pod": ((), "the token of profile pod"),
    "loop": ((), "the role of this machine, if it has one"),
}


@pytest.fixture
def profiles(home: Path) -> Iterator[None]:
    (home / ".aws").mkdir()
    (home / ".aws/config").write_text(CONFIG)
    (home / ".aws/credentials").write_text("[keys]\naws_access_key_id = AKIA\naws_secret_access_key = x\n")
    yield


@pytest.mark.parametrize("profile", WAYS)
def test_where_an_identity_comes_from(profiles: None, profile: str) -> None:
    found = way_in(profile, {})
    assert (found.command, found.source) == WAYS[profile]
    assert way_in(None, {"AWS_PROFILE": profile}) == found
    assert way_in(None, {"AWS_PROFILE": profile, "AWS_ACCESS_KEY_ID": "AKIA"}).source.startswith("the keys in")


def test_a_service_that_is_not_aws_is_no_traceback(ready: AwsCloud) -> None:
    account = account_of(target(endpoints={"iam": f"{ready.endpoint}/nowhere"})).hasty()
    with pytest.raises((UnreachableError, SpecError, MissingError)):
        account.call("iam", "get_role", RoleName="prober")
