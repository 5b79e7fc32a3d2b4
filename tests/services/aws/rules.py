"""What SageMaker checks of CreateTrainingJob beyond its model: fields that go or don't go together, and what must be
there already. Sources: botocore's documentation of the fields, and Amazon SageMaker's developer guide."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from tests.services.aws.account import Account, split_uri
from tests.services.aws.jobs import Hardware
from tests.services.aws.wire import AwsError, Json

__all__ = ["check_account", "check_fields", "instances_of"]

_LONGEST = 28 * 24 * 3600
_DAY = 24 * 3600
_LOCAL_DISK = re.compile(
    r"ml\.(p3dn|p4d|p4de|p5|p5e|p5en|p6-b200|p6-b300|p6e-gb200|g4dn|g5|g6|g6e|g7|g7e|trn1|trn1n|trn2|r5d)\."
)
_ASSUME = (
    "Could not assume role {}. Please ensure that the role exists and allows principal 'sagemaker.amazonaws.com' to "
    "assume the role."
)


def instances_of(body: Json) -> list[Hardware]:
    """What is asked for, best first."""
    config = body.get("ResourceConfig", {})
    spot = bool(body.get("EnableManagedSpotTraining"))
    if "InstancePreferences" in config:
        wanted = config["InstancePreferences"]
        count = config.get("InstanceCount", 1)
        return [Hardware(one["InstanceType"], one.get("InstanceCount", count), spot) for one in wanted]
    if config.get("InstanceGroups"):
        group = config["InstanceGroups"][0]
        return [Hardware(group["InstanceType"], group["InstanceCount"], spot)]
    return [Hardware(config["InstanceType"], config["InstanceCount"], spot)]


def check_fields(body: Json) -> None:
    """AwsError ValidationException with the first that is wrong."""
    for rule in _RULES:
        for problem in rule(body):
            raise AwsError("ValidationException", problem)


def _image(body: Json) -> Iterator[str]:
    algorithm = body.get("AlgorithmSpecification")
    if algorithm is None:
        yield "AlgorithmSpecification must be specified"
    elif ("TrainingImage" in algorithm) == ("AlgorithmName" in algorithm):
        yield "You must specify either AlgorithmName or TrainingImage, and not both"


def _instances(body: Json) -> Iterator[str]:
    config = body.get("ResourceConfig")
    if config is None:
        yield "ResourceConfig must be specified"
        return
    chosen = [name for name in ("InstanceType", "InstanceGroups", "InstancePreferences") if config.get(name)]
    if len(chosen) != 1:
        yield f"Exactly one of InstanceType, InstanceGroups and InstancePreferences must be specified, got: {chosen}"
        return
    if "InstancePreferences" in config:
        if "InstancePlacementConfig" in config:
            yield "InstancePreferences cannot be specified together with InstancePlacementConfig"
        if body.get("EnableManagedSpotTraining"):
            yield "InstancePreferences cannot be specified together with EnableManagedSpotTraining"
        if any(count > 1 for count in Counter(w["InstanceType"] for w in config["InstancePreferences"]).values()):
            yield "InstancePreferences must not name an instance type twice"
    elif chosen == ["InstanceType"] and not config.get("InstanceCount"):
        yield "InstanceCount must be at least 1"


def _volumes(body: Json) -> Iterator[str]:
    config, types = body["ResourceConfig"], [wanted.type for wanted in instances_of(body)]
    local = [name for name in types if _LOCAL_DISK.match(name)]
    if "alias/" in config.get("VolumeKmsKeyId", ""):
        yield f"Invalid VolumeKmsKeyId {config['VolumeKmsKeyId']}: it must be a key ID or the ARN of a key"
    if config.get("VolumeKmsKeyId") and local:
        yield f"VolumeKmsKeyId is not supported for instance type {local[0]}, which has local instance storage"
    if not config.get("VolumeSizeInGB") and len(local) < len(types):
        yield f"VolumeSizeInGB must be specified for instance type {next(t for t in types if t not in local)}"


def _times(body: Json) -> Iterator[str]:
    stopping, spot = body.get("StoppingCondition", {}), bool(body.get("EnableManagedSpotTraining"))
    runtime, wait = stopping.get("MaxRuntimeInSeconds", _DAY), stopping.get("MaxWaitTimeInSeconds")
    if runtime > _LONGEST:
        yield f"Invalid MaxRuntimeInSeconds. It must be less than or equal to {_LONGEST} seconds"
    if spot and wait is None:
        yield "MaxWaitTimeInSeconds must be specified if EnableManagedSpotTraining is set to true"
    if not spot and wait is not None:
        yield "MaxWaitTimeInSeconds can only be specified if EnableManagedSpotTraining is set to true"
    if wait is not None and wait < runtime:
        yield "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds"


def _warm_pool(body: Json) -> Iterator[str]:
    if body["ResourceConfig"].get("KeepAlivePeriodInSeconds") and body.get("EnableManagedSpotTraining"):
        yield "KeepAlivePeriodInSeconds is not supported with EnableManagedSpotTraining"


def _channels(body: Json) -> Iterator[str]:
    channels = body.get("InputDataConfig", [])
    for name, count in Counter(channel["ChannelName"] for channel in channels).items():
        if count > 1:
            yield f"Input channel names must be unique, found {count} of name {name}"
    for channel in channels:
        source = channel["DataSource"].get("S3DataSource")
        if (source is None) == ("FileSystemDataSource" not in channel["DataSource"]):
            yield f"Channel {channel['ChannelName']} must have one of S3DataSource and FileSystemDataSource"
        mode = channel.get("InputMode") or body["AlgorithmSpecification"]["TrainingInputMode"]
        if source and mode == "FastFile":
            if source["S3DataType"] != "S3Prefix":
                yield f"FastFile mode supports only S3Prefix as S3DataType, channel {channel['ChannelName']}"
            if not source["S3Uri"].endswith("/"):
                yield f"S3Uri must end with a forward slash (/) in FastFile mode, channel {channel['ChannelName']}"


def _checkpoints(body: Json) -> Iterator[str]:
    path = body.get("CheckpointConfig", {}).get("LocalPath", "/opt/ml/checkpoints/")
    reserved = ("/opt/ml/input", "/opt/ml/model", "/opt/ml/output")
    if any(path == place or path.startswith(place + "/") for place in reserved):
        yield f"CheckpointConfig LocalPath {path} is reserved"


def _tags(body: Json) -> Iterator[str]:
    for key, count in Counter(tag["Key"] for tag in body.get("Tags", ())).items():
        if count > 1:
            yield f"Duplicate tag keys are not allowed: {key}"
        if key.lower().startswith("aws:"):
            yield f"Tag keys must not begin with aws: {key}"


def _definitions(body: Json) -> Iterator[str]:
    definitions = body["AlgorithmSpecification"].get("MetricDefinitions", ())
    for name, count in Counter(definition["Name"] for definition in definitions).items():
        if count > 1:
            yield f"Metric names must be unique, found {count} of name {name}"
    for definition in definitions:
        try:
            groups = re.compile(definition["Regex"]).groups
        except re.error:
            groups = 0
        if groups < 1:
            yield f"Invalid Regex of metric {definition['Name']}: it must be valid and have a capturing group"


_RULES: tuple[Callable[[Json], Iterator[str]], ...] = (
    _image,
    _instances,
    _volumes,
    _times,
    _warm_pool,
    _channels,
    _checkpoints,
    _tags,
    _definitions,
)
"""Asked in this order: each may take for granted what those before it ask."""


def check_account(body: Json, account: Account, region: str) -> None:
    """AwsError ValidationException if what the job names is not there."""
    if not account.trusts(body["RoleArn"], "sagemaker.amazonaws.com"):
        raise AwsError("ValidationException", _ASSUME.format(body["RoleArn"]))
    uris = [("OutputDataConfig", body["OutputDataConfig"]["S3OutputPath"])]
    if "CheckpointConfig" in body:
        uris.append(("CheckpointConfig", body["CheckpointConfig"]["S3Uri"]))
    for channel in body.get("InputDataConfig", ()):
        if source := channel["DataSource"].get("S3DataSource"):
            uris.append((f"channel {channel['ChannelName']}", source["S3Uri"]))
    for what, uri in uris:
        _check_bucket(what, uri, account, region)


def _check_bucket(what: str, uri: str, account: Account, region: str) -> None:
    bucket, _ = split_uri(uri)
    where = account.bucket_region(bucket)
    if where is None:
        text = f"The specified bucket does not exist: bucket {bucket} of {what} ({uri}). (Service: Amazon S3; "
        raise AwsError("ValidationException", f"{text}Status Code: 404; Error Code: NoSuchBucket)")
    if where != region:
        text = f"The bucket must be in the region of the job: the bucket {bucket} of {what} ({uri}) is in {where}"
        raise AwsError(
            "ValidationException", f"{text}, and this request is for {region}. Error Code: PermanentRedirect"
        )
