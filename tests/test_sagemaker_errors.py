"""What a user is told who asks AWS for what it doesn't have: one line with the thing, the file and key, the way out.

Nothing is left behind then: no training job, and in the ledger at most a run that says that it was not submitted. What
is seen without AWS stands in test_sagemaker_requests.py.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher import State, runs
from launcher.cli.app import main
from launcher.errors import UnreachableError
from launcher.sagemaker.client import Access, Account
from tests.cli_tool import cli
from tests.sagemaker_site import IMAGE, SageMakerSite, make_site
from tests.services.aws import AwsCloud

ROLE = "arn:aws:iam::123456789012:role"
TARGET, JOB = "{project}/targets.yaml:", "job.yaml:"

Patch = pytest.MonkeyPatch
Prepare = Callable[[SageMakerSite, Patch], object]
Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    def one_line(self, code: int, *words: str) -> None:
        assert (self.code, self.out) == (code, ""), self
        assert self.err.startswith("cvlaunch: ") and self.err.count("\n") == 1 and len(self.err) < 900, self.err
        assert [word for word in words if word not in self.err] == [], self.err


Called = Callable[..., Said]


@pytest.fixture
def live(aws: AwsCloud, tmp_path: Path, monkeypatch: Patch) -> SageMakerSite:
    """Its jobs find no image that could run."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return make_site(aws, tmp_path / "project", scripted=False)


@pytest.fixture
def site(aws: AwsCloud, tmp_path: Path, monkeypatch: Patch) -> SageMakerSite:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return make_site(aws, tmp_path / "project")


@pytest.fixture
def called(capfd: pytest.CaptureFixture[str]) -> Called:
    """The same `main` as the script's, in this process: eighty processes would take a minute."""

    def call(*arguments: str) -> Said:
        code = main(arguments)
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return call


def submitted(site: SageMakerSite, called: Called, target: Keys | None = None, job: Keys | None = None) -> Said:
    site.write(target or {}, job or {})
    return called("submit", "job.yaml", "--target", "aws")


def nothing(site: SageMakerSite, patch: Patch) -> None:
    pass


def not_submitted(site: SageMakerSite) -> bool:
    """No job; and in the ledger no run, or one that says so."""
    return site.cloud.names == [] and [run.record.state for run in runs()] in ([], [State.NOT_SUBMITTED])


def resources(**keys: object) -> dict[str, object]:
    return {"resources": keys}


# -- the way to AWS ---------------------------------------------------------------------------------------------------


def without(*names: str) -> Prepare:
    return lambda site, patch: [patch.delenv(name) for name in names]


def other_profile(site: SageMakerSite, patch: Patch) -> None:
    config = site.project / "config"
    config.write_text("[profile lab]\nregion = eu-west-1\n")
    patch.setenv("AWS_CONFIG_FILE", str(config))


CREDENTIALS = without("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
NO_REGION = without("AWS_REGION", "AWS_DEFAULT_REGION")
WAYS: dict[str, tuple[Prepare, Keys, int, list[str]]] = {
    "none": (CREDENTIALS, {}, 4, ["no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a"]),
    "expired": (lambda site, _: site.cloud.expire(site.cloud.access_key), {}, 4,
                ["the credentials have expired: log in again"]),
    "revoked": (lambda site, _: site.cloud.revoke(site.cloud.access_key), {}, 4,
                ["the service refused the credentials: check that they belong to this endpoint and account"]),
    "profile": (other_profile, {"profile": "lba"}, 2,
                [TARGET, ": targets.aws.profile: the AWS profile 'lba' is not in ~/.aws (there: lab); did you mean"]),
    "region": (NO_REGION, {"region": None}, 2,
               [TARGET, "targets.aws.region: nothing says which region target 'aws' is in: add region: eu-west-1"]),
    "region's name": (nothing, {"region": "Ireland (eu-west-1)"}, 2,
                      [TARGET, "targets.aws.region: expected a region such as eu-west-1, found 'Ireland (eu-west-1)'"]),
    "role's name": (nothing, {"role": "trainer"}, 2,
                    [TARGET, "targets.aws.role: expected the ARN of a role, such as arn:aws:iam::", "found 'trainer'"]),
    "endpoint": (nothing, {"endpoints": {"sagemaker": "localhost:4566"}}, 2,
                 [TARGET, "targets.aws.endpoints.sagemaker: expected a URL such as https://s3.example.com, found 'lo"]),
    "service": (nothing, {"endpoints": {"sagmaker": "https://x.example.com"}}, 2,
                [TARGET, "targets.aws.endpoints: 'sagmaker' is none of ", "; did you mean 'sagemaker'?"]),
    "store": (nothing, {"storage": {"endpoint": "localhost:9000"}}, 2,
              [TARGET, "targets.aws.storage.endpoint: expected a URL such as https://s3.example.com, found 'local"]),
    "password": (nothing, {"storage": {"endpoint": "https://me:hunter2@s3.example.com"}}, 2,
                 [TARGET, "targets.aws.storage.endpoint: a URL with a user or password in it: leave them out"]),
    "key": (nothing, {"instance_type": ["ml.g5.xlarge"]}, 2,
            [TARGET, "targets.aws.instance_type: unknown key; did you mean 'instance_types'?"]),
    "backend": (nothing, {"backend": "sagemeker"}, 2, ["unknown backend 'sagemeker'; ", "did you mean 'sagemaker'?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_a_way_that_leads_nowhere(site: SageMakerSite, called: Called, monkeypatch: Patch, name: str) -> None:
    prepare, target, code, words = WAYS[name]
    prepare(site, monkeypatch)
    said = submitted(site, called, target)
    said.one_line(code, *(word.format(project=site.project) for word in words))
    assert not_submitted(site) and site.cloud.account.objects(f"s3://{site.bucket}") == []


def test_without_boto3(site: SageMakerSite, tmp_path: Path) -> None:
    """In a process of its own, which has none."""
    blocker = tmp_path / "site/sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(
        "import sys\n\nclass Blocker:\n    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('boto3', 'botocore'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    site.write()
    environment = {"PYTHONPATH": str(blocker.parent)}
    done = cli("submit", "job.yaml", "--target", "aws", cwd=site.project, env=environment)
    said = Said(done.returncode, done.stdout, done.stderr)
    said.one_line(2, "the sagemaker backend needs boto3: pip install 'cvlaunch[sagemaker]'")
    assert not_submitted(site) and site.cloud.account.objects(f"s3://{site.bucket}") == []
    rendered = cli("render", "job.yaml", "--target", "aws", cwd=site.project, env=environment)
    assert rendered.returncode == 0, rendered.stderr


@contextlib.contextmanager
def web_page() -> Iterator[str]:
    """A server of something else, which says so in HTML."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html><body>Sign in to the hotel's network</body></html>")

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_somebody_who_is_not_aws(aws: AwsCloud) -> None:
    with web_page() as page, pytest.raises(UnreachableError) as caught:
        account = Account(Access(region="eu-west-1", endpoints={"sagemaker": page}), attempts=1)
        account.call("sagemaker", "list_training_jobs")
    assert str(caught.value).startswith("what answers for AWS (sagemaker, region eu-west-1) is not AWS: ")


def test_nobody_answers(aws: AwsCloud) -> None:
    account = Account(Access(region="eu-west-1", endpoints={"sagemaker": "http://127.0.0.1:9"}), attempts=1)
    with pytest.raises(UnreachableError) as caught:
        account.call("sagemaker", "list_training_jobs")
    assert str(caught.value).startswith("AWS (sagemaker, region eu-west-1) did not answer: Could not connect to the")


# -- what AWS doesn't have, or doesn't give ---------------------------------------------------------------------------


def quota(name: str, count: int, **more: Any) -> Prepare:
    return lambda site, _: site.cloud.quota(name, count, **more)


def refusal(code: str, message: str, operation: str = "CreateTrainingJob", status: int = 400) -> Prepare:
    def prepare(site: SageMakerSite, patch: Patch) -> None:
        site.cloud.fail(operation, code, message.replace("{bucket}", site.bucket), times=None, status=status)

    return prepare


def denied(action: str, operation: str = "CreateTrainingJob") -> Prepare:
    user = "User: arn:aws:iam::123456789012:user/me is not authorized to perform"
    why = f"because no identity-based policy allows the {action} action"
    return refusal("AccessDeniedException", f"{user}: {action} on resource: arn:aws:x {why}", operation)


def overlay(*patches: Mapping[str, Any]) -> Keys:
    return {"overlay": list(patches)}


def add(path: str, value: object) -> Mapping[str, Any]:
    return {"op": "add", "path": path, "value": value}


RAISE = "aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code L-"
GPU, SPOT = resources(gpus=1, gpu="T4"), resources(gpus=1, gpu="T4", spot=True)
POLICY = "ask for the policy that `cvlaunch targets policy aws` prints"
ASSUME = "targets.aws.role: AWS refuses it (CreateTrainingJob): Could not assume role "

REFUSED: dict[str, tuple[Prepare, Keys, Keys, int, list[str]]] = {
    "no such role": (nothing, {"role": f"{ROLE}/nobody"}, {}, 2, [TARGET, ASSUME, "that the role exists and allows"]),
    "role of others": (lambda site, _: site.cloud.role("ec2", trusted=False), {"role": f"{ROLE}/ec2"}, {}, 2,
                       [TARGET, ASSUME, "allows principal 'sagemaker.amazonaws.com' to assume"]),
    "no such bucket": (nothing, {"output": "s3://no-such-bucket-x/runs"}, {}, 2,
                       [TARGET, "targets.aws.output: s3://no-such-bucket-x: can't write: there is no such bucket: "]),
    "bucket of the job": (nothing, {}, {"output": "s3://no-such-bucket-x/runs"}, 2,
                          [JOB, ": output: s3://no-such-bucket-x: can't write: there is no such bucket: correct"]),
    "bucket elsewhere": (lambda site, _: site.cloud.bucket("far-away-x", "us-west-2"),
                         {"output": "s3://far-away-x/runs"}, {}, 2,
                         [TARGET, "targets.aws.output: s3://far-away-x/runs/", "the bucket is in another region"]),
    "bucket of others": (refusal("AccessDenied", "Access Denied", "PutObject", 403), {}, {}, 4,
                         ["can't write: this identity is not allowed to: it needs s3:PutObject"]),
    "bucket of data": (nothing, {}, {"data": {"train": "s3://no-such-bucket-x/x"}}, 2,
                       [JOB, ": data.train: s3://no-such-bucket-x: can't read: there is no such bucket: correct its"]),
    "data elsewhere": (lambda site, _: site.cloud.bucket("far-data-x", "us-west-2"), {},
                       {"data": {"train": "s3://far-data-x/x"}}, 2,
                       [JOB, ": data.train: ", "region"]),
    "data as AWS says it": (refusal("ValidationException", 'No S3 objects found under S3 URL "s3://{bucket}/no/" given '
                                    "in input data source."), {}, {"data": {"train": "s3://{bucket}/no"}}, 2,
                            [JOB, ": data.train: AWS refuses it (CreateTrainingJob): No S3 objects found under"]),
    "quota": (quota("ml.g4dn.xlarge", 0), {}, GPU, 5,
              ["the quota 'ml.g4dn.xlarge for training job usage' is 0 in eu-west-1, 0 are in use, and this needs 1",
               "more: take another type, or ask for more: `aws ",
               RAISE, "--desired-value 1 --region eu-west-1"]),
    "quota in use": (quota("ml.m5.large", 2, running=2), {}, {}, 5,
                     ["'ml.m5.large for training job usage' is 2 in eu-west-1, 2 are in use", "--desired-value 3"]),
    "quota of spot": (quota("ml.g4dn.xlarge", 0, spot=True), {}, SPOT, 5,
                      ["the quota 'ml.g4dn.xlarge for spot training job usage' is 0", RAISE]),
    "quota of time": (lambda site, _: site.cloud.quota_value("Longest run time for a training job", 86400), {}, {}, 5,
                      ["the quota 'Longest run time for a training job' is 1d 00h in eu-west-1, and this job may run "
                       "for 5d 00h: write a shorter resources.timeout, or max_runtime in the target, or ask for more: ",
                       RAISE, "--desired-value 432000"]),
    "type": (nothing, {"instance_types": ["ml.g5.2xlage"]}, {}, 2,
             [TARGET, "targets.aws.instance_types: AWS refuses it (CreateTrainingJob): ", "'ml.g5.2xlage'",
              " in all]; did you mean 'ml.g5.2xlarge'?"]),
    "subnet": (refusal("ValidationException", "The subnet ID 'subnet-1' does not exist"),
               {"subnets": ["subnet-1"], "security_groups": ["sg-1"]}, {}, 2,
               [TARGET, "targets.aws.subnets: AWS refuses it (CreateTrainingJob): The subnet ID 'subnet-1' does not"]),
    "key": (refusal("ValidationException", "The KMS key 'alias/x' is disabled"), {"kms_key": "alias/x"}, {}, 2,
            [TARGET, "targets.aws.kms_key: AWS refuses it (CreateTrainingJob): The KMS key 'alias/x' is disabled"]),
    "whatever": (refusal("ValidationException", "The moon is full"), {}, {}, 2,
                 ["cvlaunch: AWS refuses it (CreateTrainingJob): The moon is full"]),
    "echo": (refusal("ValidationException", "2 validation errors detected: Value 'x' at 'a' is wrong; Value '{A="
                     + 50 * "hunter2" + "}' at 'environment' is too long"), {}, {}, 2,
             ["2 validation errors detected: Value 'x' at 'a' is wrong; Value '…' at 'environment' is too long"]),
    "create": (denied("sagemaker:CreateTrainingJob"), {}, {}, 4,
               ["you may not do sagemaker:CreateTrainingJob (region eu-west-1): User: arn:aws:iam::1", POLICY]),
    "pass role": (denied("iam:PassRole"), {}, {}, 4, ["you may not do iam:PassRole (region eu-west-1): User", POLICY]),
    "member": (nothing, overlay(add("/RetryStratgy", {"MaximumRetryAttempts": 1})), {}, 2,
               [TARGET, 'targets.aws.overlay: Unknown parameter in input: "RetryStratgy"; did you mean \'RetryS']),
    "member of the job": (nothing, {}, {"native": {"sagemaker": {"Nonsense": 1}}}, 2,
                          [JOB, ': native.sagemaker: Unknown parameter in input: "Nonsense": correct it']),
}  # fmt: skip


def filled(value: Any, bucket: str) -> Any:
    return json.loads(json.dumps(value).replace("{bucket}", bucket))


@pytest.mark.parametrize("name", REFUSED)
def test_what_aws_refuses(site: SageMakerSite, called: Called, monkeypatch: Patch, name: str) -> None:
    prepare, target, job, code, words = REFUSED[name]
    prepare(site, monkeypatch)
    said = submitted(site, called, target, filled(job, site.bucket))
    said.one_line(code, *(word.format(project=site.project, bucket=site.bucket) for word in words))
    assert not_submitted(site)


# -- what is seen before ----------------------------------------------------------------------------------------------

WAIT = "StoppingCondition.MaxWaitTimeInSeconds is 60, less than MaxRuntimeInSeconds (432000); it holds waiting and"
SEEN: dict[str, tuple[Keys, Keys, list[str]]] = {
    "wait by overlay": (overlay(add("/StoppingCondition/MaxWaitTimeInSeconds", 60)), SPOT,
                        [TARGET, f"targets.aws.overlay: {WAIT}"]),
    "wait by the job": ({}, {**SPOT, "native": {"sagemaker": {"StoppingCondition": {"MaxWaitTimeInSeconds": 60}}}},
                        [JOB, f": native.sagemaker: {WAIT}"]),
    "type by overlay": (overlay(add("/EnableNetworkIsolation", "yes")), {},
                        [TARGET, "targets.aws.overlay: EnableNetworkIsolation is 'yes', and true or false is exp"]),
    "type by the job": ({}, {"native": {"sagemaker": {"EnableNetworkIsolation": "yes"}}},
                        [JOB, ": native.sagemaker: EnableNetworkIsolation is 'yes', and true or false is expected"]),
    "long by overlay": (overlay(add("/Tags/-", {"Key": "k" * 129, "Value": "v"})), {},
                        [TARGET, "targets.aws.overlay: Tags[2].Key has 129 characters, and SageMaker takes 128 at"]),
    "tag by overlay": (overlay({"op": "remove", "path": "/Tags/0"}), {},
                       [TARGET, "targets.aws.overlay: a run is found by TrainingJobName, by the tag cvlaunch-run"]),
    "tag of ours": ({"tags": {"cvlaunch-run": "mine"}}, {},
                    [TARGET, "targets.aws.tags: a run is found by its tags, 'cvlaunch-run' and others: choose ano"]),
    "no place": (overlay({"op": "replace", "path": "/No/where", "value": 1}), {},
                 [TARGET, "targets.aws.overlay: the JSON patch does not apply: member 'No' not found there"]),
    "no native": ({}, {"native": {"sagemaker": 5}}, [JOB, ": native.sagemaker: expected "]),
    "secret": ({}, {"secrets": {"A": "store:ssm:"}}, [JOB, "secrets.A: 'store:ssm:' names no secret; write store:"]),
    "store": ({}, {"secrets": {"A": "store:vault:x"}}, [JOB, "secrets.A: 'store:vault:x' is in no store of AWS; wr"]),
    "long run": ({"max_runtime": "40d"}, {}, [TARGET, "max_runtime: SageMaker takes 28d 00h at most, not 40d 00h"]),
    "warm": ({"keep_alive": "7h"}, {}, [TARGET, "targets.aws.keep_alive: SageMaker takes 6h 00m at most, not 7h 00"]),
    "six types": ({"instance_types": [f"ml.g{n}.x" for n in range(6)]}, {}, [TARGET, "expected at most 5 items"]),
    "data here": ({}, {"data": {"train": "."}},
                  [JOB, ": data.train: '.' is a folder of this machine, which target 'aws' can't see; push it with "
                   "--push-data, or write the place that this makes: cvlaunch data push {project} s3://{bucket}/runs/"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_before_anything_is_sent(site: SageMakerSite, called: Called, name: str) -> None:
    target, job, words = SEEN[name]
    said = submitted(site, called, target, job)
    said.one_line(2, *(word.format(project=site.project, bucket=site.bucket) for word in words))
    assert runs() == [] and site.cloud.names == [] and site.cloud.account.objects(f"s3://{site.bucket}") == []


def test_a_template_that_is_no_json(site: SageMakerSite, called: Called) -> None:
    own = site.project / "templates/sagemaker/training_job.json.j2"
    own.parent.mkdir(parents=True)
    own.write_text('{"TrainingJobName": {{ job_name | tojson }},}\n')
    said = submitted(site, called, {"templates": "templates"})
    said.one_line(2, "targets.aws.templates: the template did not give JSON: Expecting property name")
    own.write_text('{"TrainingJobName": {{ job_naem | tojson }}}\n')
    submitted(site, called, {"templates": "templates"}).one_line(2, "training_job.json.j2", "job_naem")
    assert runs() == [] and site.cloud.names == []


DOUBTS: dict[str, tuple[Keys, Keys, str]] = {
    "unknown type": ({"instance_types": ["ml.g9.xlarge"]}, {}, "ml.g9.xlarge is no instance type in botocore "),
    "image elsewhere": ({}, {"image": IMAGE.replace("eu-west-1", "us-east-1")},
                        "image: it is in ECR of us-east-1, and the job runs in eu-west-1: push it to ECR there"),
    "mode of no channel": ({"input_modes": {"tarin": "FastFile"}}, {"data": {"train": "s3://{bucket}/x"}},
                           "input_modes: the job has no channel 'tarin'; did you mean 'train'?"),
    "timeout": ({}, resources(timeout="40d"), "resources.timeout: SageMaker ends every job after 28d 00h"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTS)
def test_what_may_be_a_mistake_is_said_and_sent(site: SageMakerSite, called: Called, name: str) -> None:
    target, job, words = DOUBTS[name]
    site.cloud.offer("ml.g9.xlarge")
    said = submitted(site, called, target, filled(job, site.bucket))
    assert said.code == 0 and f"warning: {words}" in said.err, said
    assert len(site.cloud.names) == 1


# -- what shows later -------------------------------------------------------------------------------------------------


def test_who_may_not_list_asks_for_each(site: SageMakerSite, called: Called) -> None:
    """Of two runs there would be a list, which nobody needs."""
    for _ in range(2):
        assert submitted(site, called).code == 0
    denied("sagemaker:ListTrainingJobs", "ListTrainingJobs")(site, Patch())
    for name in site.cloud.names:
        site.cloud.finish(name)
    said = called("runs")
    assert said.code == 0 and said.out.count("SUCCEEDED") == 2, said


def test_who_may_not_describe_is_told(site: SageMakerSite, called: Called) -> None:
    assert submitted(site, called).code == 0
    denied("sagemaker:DescribeTrainingJob", "DescribeTrainingJob")(site, Patch())
    words = "you may not do sagemaker:DescribeTrainingJob (region eu-west-1)"
    for command in ("logs", "wait"):
        called(command, "last").one_line(4, words, POLICY)
    said = called("status", "last")
    assert said.code == 0 and words in said.out + said.err and "this is what was last seen" in said.out + said.err, said


def test_who_may_not_read_logs_is_told_where_nothing_else_has_them(site: SageMakerSite, called: Called) -> None:
    assert submitted(site, called).code == 0
    site.cloud.enter(site.cloud.names[0], "Training")
    site.cloud.say(site.cloud.names[0], "hello")
    assert called("logs", "last").out == "hello\n"
    for operation in "DescribeLogStreams", "GetLogEvents":
        denied(f"logs:{operation}", operation)(site, Patch())
    called("logs", "last").one_line(4, "you may not do logs:", POLICY)


def test_what_sagemaker_can_t_do_and_who_may_not_stop(site: SageMakerSite, called: Called) -> None:
    assert submitted(site, called).code == 0
    said = called("exec", "last", "--", "ls")
    said.one_line(
        2, "SageMaker has no such call; with RemoteDebugConfig in the target's overlay, `aws ssm start-session`"
    )
    denied("sagemaker:StopTrainingJob", "StopTrainingJob")(site, Patch())
    called("cancel", "last").one_line(4, "you may not do sagemaker:StopTrainingJob (region eu-west-1)", POLICY)
    site.cloud.heal()
    assert called("cancel", "last").code == 0


ENDS: Mapping[str, tuple[Keys, str]] = {
    "image": ({"image": IMAGE.replace(":1", ":2")}, "image: ClientError: Cannot find image tag: 2 in repository: "),
    "repository": (
        {"image": IMAGE.replace("team", "taem")},
        "image: ClientError: Cannot find repository: taem/trainer",
    ),
    "data": ({"data": {"train": "s3://{bucket}/nothing"}}, "data: ClientError: "),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_only_the_job_can_tell(live: SageMakerSite, called: Called, name: str) -> None:
    job, words = ENDS[name]
    assert submitted(live, called, {}, filled(job, live.bucket)).code == 0
    live.cloud.wait(live.cloud.names[0], "Failed")
    said = called("status", "last")
    (reason,) = [line for line in said.out.splitlines() if line.startswith("reason")]
    assert words in reason and "ERROR" in said.out, said
    assert reason.endswith(WAYS_OUT["data" if name == "data" else "image"]), reason


WAYS_OUT = {
    "image": ": check that it is in ECR of this region, is for amd64, and that the role may pull it",
    "data": ": check the channel's place, and resources.disk",
}


def test_no_capacity_is_told(site: SageMakerSite, called: Called) -> None:
    assert submitted(site, called).code == 0
    reason = "CapacityError: Unable to provision requested ML compute capacity."
    site.cloud.finish(site.cloud.names[0], "Failed", reason=reason)
    said = called("status", "last")
    assert f"capacity: {reason}: try again later, name more GPUs in resources.gpu" in said.out, said


def test_a_closed_port_is_told_soon(site: SageMakerSite) -> None:
    began = time.monotonic()
    account = Account(Access(region="eu-west-1", endpoints={"sts": "http://127.0.0.1:9"}), attempts=1)
    with pytest.raises(UnreachableError):
        account.call("sts", "get_caller_identity")
    assert time.monotonic() - began < 30


# -- render --check, and what is said besides -------------------------------------------------------------------------


def test_an_image_that_submit_will_push_is_no_fault(site: SageMakerSite, called: Called) -> None:
    place = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/trainer"
    site.write({"registry": place}, {"image": "cvlaunch-trainer"})
    said = called("render", "job.yaml", "--target", "aws", "--check")
    assert (said.code, "refused:" in said.err) == (0, False), said.err
    assert f"warning: image: submit builds it and pushes it as {place}:" in said.err
    site.write({"registry": place}, {"image": f"{place}:of-somebody"})
    said = called("render", "job.yaml", "--target", "aws", "--check")
    assert said.code == 2 and "refused: image: there is no " in said.err


def test_a_sweep_says_what_each_run_costs(site: SageMakerSite, called: Called) -> None:
    site.write({}, {"env": {"SEED": "0"}})
    said = called("submit", "job.yaml", "--target", "aws", "--sweep", "env.SEED=1,2,3")
    assert said.code == 0 and len(site.cloud.names) == 3, said.err
    assert re.search(r"^cost: at most about .* \(each of 3 runs\)$", said.err, re.MULTILINE), said.err
