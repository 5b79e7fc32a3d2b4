"""The stand-in for AWS is as strict as AWS is."""

from __future__ import annotations

import copy
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import botocore.tokens
import pytest
from botocore.config import Config

from launcher.stores import StorageOptions, open_store
from tests.services.aws import REGION, AwsCloud, AwsError

Json = dict[str, Any]

GROUP = "/aws/sagemaker/TrainingJobs"
ROLE = "arn:aws:iam::123456789012:role/trainer"
SOURCE = {"S3DataType": "S3Prefix", "S3Uri": "s3://data/train/"}


@pytest.fixture
def scripted(aws: AwsCloud) -> AwsCloud:
    """An account whose jobs run nothing."""
    aws.script("")
    aws.bucket("runs"), aws.bucket("data"), aws.role()
    return aws


def raw(aws: AwsCloud, service: str = "sagemaker", **config: Any) -> Any:
    """A client that checks nothing itself and asks once."""
    once = Config(parameter_validation=False, retries={"total_max_attempts": 1}, **config)
    return boto3.client(service, config=once)


def body(name: str = "tiny-1", **changes: Any) -> Json:
    """Of CreateTrainingJob. changes: dotted keys with `__`; None takes one away."""
    made: Json = {
        "TrainingJobName": name,
        "RoleArn": ROLE,
        "AlgorithmSpecification": {"TrainingImage": "registry/trainer:1", "TrainingInputMode": "File"},
        "OutputDataConfig": {"S3OutputPath": "s3://runs/out"},
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 600},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        at = made
        for key in path:
            at = at.setdefault(key, {})
        at[last] = copy.deepcopy(value)
        if value is None:
            del at[last]
    return made


def refused(call: Callable[..., object], **parameters: Any) -> tuple[str, str]:
    """(code, message)"""
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call(**parameters)
    return caught.value.response["Error"]["Code"], caught.value.response["Error"]["Message"]


def posted(aws: AwsCloud, request: Json) -> str:
    """What is said to a CreateTrainingJob that botocore would not send."""
    credential = f"{aws.access_key}/20261122/{REGION}/sagemaker/aws4_request"
    headers = {
        "X-Amz-Target": "SageMaker.CreateTrainingJob",
        "Content-Type": "application/x-amz-json-1.1",
        "Authorization": f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0",
    }
    asked = urllib.request.Request(aws.endpoint, json.dumps(request).encode(), headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asked)
    with caught.value as answer:
        return answer.read().decode()


def channel(name: str, **more: Any) -> Json:
    return {"ChannelName": name, "DataSource": {"S3DataSource": SOURCE}, **more}


def definitions(count: int) -> list[Json]:
    return [{"Name": f"m{n}", "Regex": f"m{n}=([0-9.]+)"} for n in range(count)]


def tags(count: int) -> list[Json]:
    return [{"Key": f"k{n}", "Value": ""} for n in range(count)]


def variables(count: int) -> dict[str, str]:
    return {f"V{n}": "" for n in range(count)}


_ALGORITHM = "AlgorithmSpecification"
_EDGES: Mapping[str, tuple[Json, Json, str]] = {
    "name": ({"TrainingJobName": "a" * 63}, {"TrainingJobName": "a" * 64}, "at 'trainingJobName' failed to satisfy "
             "constraint: Member must have length less than or equal to 63"),
    "name's end": ({"TrainingJobName": "a-b"}, {"TrainingJobName": "a-"}, "regular expression pattern"),
    "argument": ({f"{_ALGORITHM}__ContainerArguments": ["x" * 256]}, {f"{_ALGORITHM}__ContainerArguments": ["x" * 257]},
                 "'algorithmSpecification.containerArguments.1.member'"),
    "arguments": ({f"{_ALGORITHM}__ContainerArguments": ["x"] * 100},
                  {f"{_ALGORITHM}__ContainerArguments": ["x"] * 101}, "less than or equal to 100"),
    "variables": ({"Environment": variables(100)}, {"Environment": variables(101)}, "less than or equal to 100"),
    "variable": ({"Environment": {"A": "x" * 512}}, {"Environment": {"A": "x" * 513}}, "Map value must satisfy"),
    "its name": ({"Environment": {"_A1": ""}}, {"Environment": {"1A": ""}}, "Map key must satisfy"),
    "tags": ({"Tags": tags(50)}, {"Tags": tags(51)}, "less than or equal to 50"),
    "tag": ({"Tags": [{"Key": "é/+-@", "Value": "v" * 256}]}, {"Tags": [{"Key": "k", "Value": "v" * 257}]}, "256"),
    "tag's words": ({"Tags": [{"Key": "a b", "Value": ""}]}, {"Tags": [{"Key": "a#", "Value": ""}]}, "pattern"),
    "tag twice": ({"Tags": tags(2)}, {"Tags": tags(2)[:1] * 2}, "Duplicate tag keys"),
    "channels": ({"InputDataConfig": [channel(f"c{n}") for n in range(20)]},
                 {"InputDataConfig": [channel(f"c{n}") for n in range(21)]}, "less than or equal to 20"),
    "channel twice": ({"InputDataConfig": [channel("a"), channel("b")]},
                      {"InputDataConfig": [channel("a")] * 2}, "unique"),
    "FastFile": ({"InputDataConfig": [channel("a", InputMode="FastFile")]},
                 {"InputDataConfig": [{**channel("a", InputMode="FastFile"), "DataSource": {
                     "S3DataSource": {**SOURCE, "S3Uri": "s3://data/train"}}}]}, "forward slash"),
    "metrics": ({f"{_ALGORITHM}__MetricDefinitions": definitions(40)},
                {f"{_ALGORITHM}__MetricDefinitions": definitions(41)}, "less than or equal to 40"),
    "metric": ({f"{_ALGORITHM}__MetricDefinitions": [{"Name": "a", "Regex": "a=(.)"}]},
               {f"{_ALGORITHM}__MetricDefinitions": [{"Name": "a", "Regex": "a=."}]}, "capturing group"),
    "instance type": ({"ResourceConfig__InstanceType": "ml.p5.48xlarge"}, {"ResourceConfig__InstanceType": "ml.x"},
                      "Member must satisfy enum value set: [ml."),
    "volume": ({"ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1}},
               {"ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1}}, "VolumeSizeInGB must be"),
    "volume key": ({"ResourceConfig__VolumeKmsKeyId": "k", "ResourceConfig__InstanceType": "ml.m5.large"},
                   {"ResourceConfig__VolumeKmsKeyId": "k"}, "local instance storage"),
    "runtime": ({"StoppingCondition__MaxRuntimeInSeconds": 2_419_200},
                {"StoppingCondition__MaxRuntimeInSeconds": 2_419_201}, "Invalid MaxRuntimeInSeconds"),
    "spot": ({"EnableManagedSpotTraining": True, "StoppingCondition__MaxWaitTimeInSeconds": 600},
             {"EnableManagedSpotTraining": True, "StoppingCondition__MaxWaitTimeInSeconds": 599},
             "greater than or equal to MaxRuntimeInSeconds"),
    "spot's wait": ({}, {"EnableManagedSpotTraining": True}, "MaxWaitTimeInSeconds must be specified"),
    "wait": ({}, {"StoppingCondition__MaxWaitTimeInSeconds": 600}, "only be specified if EnableManagedSpotTraining"),
    "pending": ({"StoppingCondition__MaxPendingTimeInSeconds": 1800},
                {"StoppingCondition__MaxPendingTimeInSeconds": 1799}, "greater than or equal to 1800"),
    "pending CPU": ({"StoppingCondition__MaxPendingTimeInSeconds": 1800, "ResourceConfig__InstanceType": "ml.m5.large"},
                    {"StoppingCondition__MaxPendingTimeInSeconds": 1799, "ResourceConfig__InstanceType": "ml.m5.large"},
                    "greater than or equal to 1800"),
    "volume key's alias": ({"ResourceConfig__VolumeKmsKeyId": "arn:aws:kms:eu-west-1:123456789012:key/k",
                            "ResourceConfig__InstanceType": "ml.m5.large"},
                           {"ResourceConfig__VolumeKmsKeyId": "arn:aws:kms:eu-west-1:123456789012:alias/k",
                            "ResourceConfig__InstanceType": "ml.m5.large"}, "key ID or the ARN of a key"),
    "preferences": ({"ResourceConfig": {"InstancePreferences": [{"InstanceType": "ml.g5.xlarge", "InstanceCount": 1}]}},
                    {"ResourceConfig__InstancePreferences": [{"InstanceType": "ml.g5.xlarge"}]}, "Exactly one of"),
    "warm pool": ({"ResourceConfig__KeepAlivePeriodInSeconds": 21600},
                  {"ResourceConfig__KeepAlivePeriodInSeconds": 21601}, "21600"),
    "image": ({}, {f"{_ALGORITHM}__TrainingImage": None}, "either AlgorithmName or TrainingImage"),
    "missing": ({}, {"RoleArn": None}, "Value null at 'roleArn' failed to satisfy constraint: Member must not be null"),
    "role": ({}, {"RoleArn": f"{ROLE}s"}, "Could not assume role"),
    "bucket": ({}, {"OutputDataConfig__S3OutputPath": "s3://nowhere/out"}, "does not exist"),
}  # fmt: skip
"""What → (at the edge, past it, in the refusal)."""


def test_edges_of_requests(scripted: AwsCloud) -> None:
    sagemaker = raw(scripted)
    for number, (what, (good, bad, words)) in enumerate(_EDGES.items()):
        sagemaker.create_training_job(**body(**{"TrainingJobName": f"job-{number}", **good}))
        code, message = refused(sagemaker.create_training_job, **body(**bad))
        assert code == "ValidationException" and words in message, f"{what}: {message}"
    assert "Unknown parameter in resourceConfig: 'Types'" in posted(scripted, body(ResourceConfig__Types=[]))
    assert "SerializationException" in posted(scripted, body(StoppingCondition__MaxRuntimeInSeconds="600"))
    assert scripted.count("CreateTrainingJob", status=200) == len(_EDGES)


def test_what_an_account_must_have(scripted: AwsCloud) -> None:
    sagemaker = raw(scripted)
    scripted.bucket("far", region="us-east-1")
    message = refused(sagemaker.create_training_job, **body(OutputDataConfig__S3OutputPath="s3://far/out"))[1]
    assert "is in us-east-1" in message
    untrusted = scripted.role("untrusted", trusted=False)
    assert "allows principal 'sagemaker.amazonaws.com'" in refused(
        sagemaker.create_training_job, **body(RoleArn=untrusted)
    )[1]  # fmt: skip
    scripted.offer("ml.g9.xlarge")
    sagemaker.create_training_job(**body(ResourceConfig__InstanceType="ml.g9.xlarge"))
    code, message = refused(sagemaker.create_training_job, **body())
    assert (code, "already exists" in message) == ("ResourceInUse", True)


def test_quotas(scripted: AwsCloud) -> None:
    sagemaker, quotas = raw(scripted), scripted.client("service-quotas")
    scripted.quota("ml.g5.xlarge", 2, running=1)
    scripted.quota("ml.g5.xlarge", 0, spot=True)
    sagemaker.create_training_job(**body("first"))
    code, message = refused(sagemaker.create_training_job, **body("second"))
    assert code == "ResourceLimitExceeded"
    assert message.startswith(
        "The account-level service limit 'ml.g5.xlarge for training job usage' is 2 Instances, with current "
        "utilization of 2 Instances and a request delta of 1 Instances. Please use AWS Service Quotas"
    )
    spot = body("spot", EnableManagedSpotTraining=True, StoppingCondition__MaxWaitTimeInSeconds=600)
    assert "'ml.g5.xlarge for spot training job usage' is 0" in refused(sagemaker.create_training_job, **spot)[1]
    scripted.finish("first")
    sagemaker.create_training_job(**body("second"))
    scripted.quota_value("Longest run time for a training job", 500)
    scripted.finish("second")
    scripted.quota_value("ml.g5.xlarge for training warm pool usage", 0)
    kept = body("kept", ResourceConfig__KeepAlivePeriodInSeconds=60)
    assert "warm pool usage' is 0" in refused(sagemaker.create_training_job, **kept)[1]
    assert "500 Seconds" in refused(sagemaker.create_training_job, **body("third"))[1]
    pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    found = {quota["QuotaName"]: quota for page in pages for quota in page["Quotas"]}
    assert scripted.count("ListServiceQuotas") > 2
    quota = found["ml.g5.xlarge for spot training job usage"]
    assert quotas.get_service_quota(ServiceCode="sagemaker", QuotaCode=quota["QuotaCode"])["Quota"]["Value"] == 0
    assert refused(quotas.get_service_quota, ServiceCode="sagemaker", QuotaCode="L-0")[0] == "NoSuchResourceException"


def test_preferences_take_the_first_that_is_allowed(scripted: AwsCloud) -> None:
    wanted = [{"InstanceType": name, "InstanceCount": 1} for name in ("ml.p4d.24xlarge", "ml.g5.xlarge")]
    scripted.quota("ml.p4d.24xlarge", 0)
    scripted.client("sagemaker").create_training_job(**body(ResourceConfig={"InstancePreferences": wanted}))
    assert "SelectedInstanceType" not in scripted.job("tiny-1")["ResourceConfig"]
    scripted.enter("tiny-1", "Training")
    assert scripted.job("tiny-1")["ResourceConfig"]["SelectedInstanceType"] == "ml.g5.xlarge"


def test_life_of_a_job(scripted: AwsCloud) -> None:
    sagemaker = scripted.client("sagemaker")
    arn = sagemaker.create_training_job(**body(Tags=[{"Key": "a", "Value": "1"}], Environment={"A": "b"}))
    sagemaker.add_tags(ResourceArn=arn["TrainingJobArn"], Tags=[{"Key": "b", "Value": "2"}])
    told = sagemaker.list_tags(ResourceArn=arn["TrainingJobArn"])["Tags"]
    assert {tag["Key"]: tag["Value"] for tag in told} == scripted.tags("tiny-1") == {"a": "1", "b": "2"}
    assert refused(sagemaker.delete_training_job, TrainingJobName="tiny-1")[0] == "ValidationException"
    sagemaker.stop_training_job(TrainingJobName="tiny-1")
    said = sagemaker.describe_training_job(TrainingJobName="tiny-1")
    assert (said["TrainingJobStatus"], said["Environment"]) == ("Stopped", {"A": "b"})
    assert refused(sagemaker.stop_training_job, TrainingJobName="tiny-1") == (
        "ValidationException", "The request was rejected because the training job is in status Stopped.",
    )  # fmt: skip
    sagemaker.delete_training_job(TrainingJobName="tiny-1")
    for call in (sagemaker.describe_training_job, sagemaker.stop_training_job, sagemaker.delete_training_job):
        assert refused(call, TrainingJobName="tiny-1") == ("ValidationException", "Requested resource not found.")
    sagemaker.create_training_job(**body())


def test_lists(scripted: AwsCloud) -> None:
    sagemaker = scripted.client("sagemaker")
    for number in range(30):
        sagemaker.create_training_job(**body(f"{'even' if number % 2 == 0 else 'odd'}-{number:02}"))
    scripted.finish("even-04", "Failed", reason="ClientError: x")
    page = sagemaker.list_training_jobs()
    assert [job["TrainingJobName"] for job in page["TrainingJobSummaries"]][:2] == ["odd-29", "even-28"]
    assert (len(page["TrainingJobSummaries"]), "NextToken" in page) == (10, True)
    pages = sagemaker.get_paginator("list_training_jobs").paginate(NameContains="even", SortBy="Name", MaxResults=4)
    names = [job["TrainingJobName"] for page in pages for job in page["TrainingJobSummaries"]]
    assert names == [f"even-{number:02}" for number in range(28, -1, -2)]
    (failed,) = sagemaker.list_training_jobs(StatusEquals="Failed")["TrainingJobSummaries"]
    assert (failed["TrainingJobName"], failed["SecondaryStatus"]) == ("even-04", "Failed")
    assert refused(raw(scripted).list_training_jobs, MaxResults=101)[0] == "ValidationException"


def test_faults(scripted: AwsCloud) -> None:
    sagemaker, s3, sts = raw(scripted), raw(scripted, "s3"), raw(scripted, "sts")
    scripted.throttle("*", times=3)
    assert refused(sagemaker.list_training_jobs) == ("ThrottlingException", "Rate exceeded")
    assert refused(s3.list_objects_v2, Bucket="runs")[0] == "SlowDown"
    assert refused(sts.get_caller_identity)[0] == "Throttling"
    scripted.fail("ListTrainingJobs", "InternalFailure", "oh", status=500)
    assert refused(sagemaker.list_training_jobs) == ("InternalFailure", "oh")
    scripted.expire(scripted.access_key)
    assert refused(sagemaker.list_training_jobs)[0] == "ExpiredTokenException"
    assert [refused(call)[0] for call in (s3.list_buckets, sts.get_caller_identity)] == ["ExpiredToken"] * 2
    scripted.renew(scripted.access_key)
    scripted.revoke(scripted.access_key)
    assert refused(sagemaker.list_training_jobs)[0] == "UnrecognizedClientException"
    scripted.heal()
    for when, there in (("before", False), ("after", True)):
        scripted.cut("CreateTrainingJob", when)
        with pytest.raises(botocore.exceptions.HTTPClientError):
            sagemaker.create_training_job(**body(when))
        assert (when in scripted.names) is there
    assert sts.get_caller_identity()["Account"] == "123456789012"
    calls = [(call.service, call.operation, call.status) for call in scripted.calls]
    assert calls[:2] == [("sagemaker", "ListTrainingJobs", 400), ("s3", "ListObjectsV2", 503)]
    assert ("sagemaker", "CreateTrainingJob", 0) in calls and calls[-1] == ("sts", "GetCallerIdentity", 200)


def test_rate(scripted: AwsCloud) -> None:
    sagemaker = raw(scripted)
    scripted.rate("ListTrainingJobs", per_second=2)
    answers, began = [], time.monotonic()
    for _ in range(12):
        try:
            sagemaker.list_training_jobs()
            answers.append(200)
        except botocore.exceptions.ClientError:
            answers.append(400)
    assert answers[:2] == [200, 200] and answers.count(200) <= 2 + 2 * (time.monotonic() - began)


def test_a_bucket_elsewhere_is_a_redirection(scripted: AwsCloud) -> None:
    scripted.bucket("distant", region="us-east-1")
    assert refused(boto3.client("s3").get_object, Bucket="distant", Key="a")[0] == "NoSuchKey"
    assert [call.status for call in scripted.calls][-2:] == [301, 404]
    where = boto3.client("s3").head_bucket(Bucket="distant")["ResponseMetadata"]["HTTPHeaders"]["x-amz-bucket-region"]
    assert where == "us-east-1"


def test_objects_travel_whole(scripted: AwsCloud) -> None:
    s3, data = boto3.client("s3"), bytes(range(256)) * 40_000
    s3.upload_fileobj(io.BytesIO(data), "runs", "big")
    s3.put_object(Bucket="runs", Key="once", Body=b"1", IfNoneMatch="*")
    assert refused(s3.put_object, Bucket="runs", Key="once", Body=b"2", IfNoneMatch="*")[0] == "PreconditionFailed"
    assert s3.get_object(Bucket="runs", Key="big")["Body"].read() == data
    assert s3.head_object(Bucket="runs", Key="big")["ContentLength"] == len(data)
    assert s3.get_object(Bucket="runs", Key="big", Range="bytes=0-3")["Body"].read() == data[:4]
    assert [entry.size for entry in scripted.account.objects("s3://runs/")] == [len(data), 1]
    store = open_store("s3://runs/folder", StorageOptions(endpoint=scripted.endpoint, region=REGION))
    store.write("a/b", b"c")
    assert store.read("a/b") == b"c" and [entry.path for entry in store.list()] == ["a/b"]
    asked = {call.operation for call in scripted.calls}
    assert {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "HeadObject", "PutObject"} <= asked


def test_pages_of_logs(scripted: AwsCloud) -> None:
    logs = raw(scripted, "logs")
    name = "tiny-1/algo-1-1700000000"
    ask = {"logGroupName": GROUP, "logStreamName": name, "startFromHead": True}
    assert refused(logs.get_log_events, **ask)[0] == "ResourceNotFoundException"
    scripted.client("sagemaker").create_training_job(**body())
    scripted.say("tiny-1", "a", "b", "c", "x" * 200_000, *["y" * 250_000] * 4)
    page, found = logs.get_log_events(**ask), []
    assert len(page["events"]) == 7, "a page ends at 1 MB"
    scripted.log_pages(events=3, empty=1)
    token = None
    while True:
        page = logs.get_log_events(**ask, **({"nextToken": token} if token else {}))
        found.append([event["message"][0] for event in page["events"]])
        if page["nextForwardToken"] == token:
            break
        token = page["nextForwardToken"]
    assert found == [[], ["a", "b", "c"], ["x", "y", "y"], ["y", "y"], []]
    scripted.say("tiny-1", "late")
    (event,) = logs.get_log_events(**ask, nextToken=token)["events"]
    assert event["message"] == "late"
    last = logs.get_log_events(logGroupName=GROUP, logStreamName=name)
    assert last["events"][-1]["message"] == "late"
    before = logs.get_log_events(logGroupName=GROUP, logStreamName=name, nextToken=last["nextBackwardToken"])
    assert [event["message"][0] for event in before["events"]] == ["x", "y", "y"]
    assert refused(logs.get_log_events, **{**ask, "nextToken": "f/1"})[0] == "InvalidParameterException"
    scripted.forget_logs("tiny-1")
    assert refused(logs.get_log_events, **ask)[0] == "ResourceNotFoundException"


def test_profiles(scripted: AwsCloud, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSO and assume-role: both get keys from the stand-in."""
    cache = str(home / ".aws/sso/cache")
    monkeypatch.setattr(botocore.tokens.SSOTokenProvider, "_SSO_TOKEN_CACHE_DIR", cache)
    token = scripted.sign_in(home, "lab", role="trainer")
    with (home / ".aws/config").open("a") as file:
        file.write(f"[profile assumed]\nrole_arn = {ROLE}\ncredential_source = Environment\nregion = {REGION}\n")
    who = boto3.Session(profile_name="assumed").client("sts").get_caller_identity()["Arn"]
    assert "assumed-role/trainer/" in who
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "assumed-role/trainer/" in boto3.Session(profile_name="lab").client("sts").get_caller_identity()["Arn"]
    scripted.sign_out(token)
    with pytest.raises(botocore.exceptions.UnauthorizedSSOTokenError):
        boto3.Session(profile_name="lab").client("sts").get_caller_identity()


def test_many_jobs_are_quick(scripted: AwsCloud) -> None:
    sagemaker = scripted.client("sagemaker")
    for number in range(100):
        sagemaker.create_training_job(**body(f"many-{number}"))
    began = time.monotonic()
    for number in range(100):
        scripted.finish(f"many-{number}")
    pages = sagemaker.get_paginator("list_training_jobs").paginate(NameContains="many-", MaxResults=100)
    assert sum(len(page["TrainingJobSummaries"]) for page in pages) == 100
    assert time.monotonic() - began < 10


def test_clear(scripted: AwsCloud) -> None:
    scripted.client("sagemaker").create_training_job(**body())
    scripted.throttle("*")
    scripted.clear()
    with pytest.raises(AwsError):
        scripted.job("tiny-1")
    assert scripted.client("s3").head_bucket(Bucket="runs") and scripted.count("CreateTrainingJob") == 0
