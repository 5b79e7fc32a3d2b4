"""Every limit of CreateTrainingJob at its edge, and one past it; the rules between members; the table's freshness."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import SpecError
from launcher.sagemaker import limits, tables

TABLE = json.loads(Path(limits.__file__).with_name("limits.json").read_text())
DAY = 24 * 3600
ARN = "arn:aws:iam::123456789012:role/"
CHANNEL = {
    "ChannelName": "train",
    "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://data/train/"}},
}
MINIMAL: dict[str, Any] = {
    "TrainingJobName": "digits-1",
    "RoleArn": f"{ARN}trainer",
    "AlgorithmSpecification": {"TrainingImage": "image", "TrainingInputMode": "File"},
    "InputDataConfig": [CHANNEL],
    "OutputDataConfig": {"S3OutputPath": "s3://runs"},
    "CheckpointConfig": {"S3Uri": "s3://runs/checkpoints"},
    "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 30},
    "StoppingCondition": {"MaxRuntimeInSeconds": DAY},
    "VpcConfig": {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]},
    "RetryStrategy": {"MaximumRetryAttempts": 1},
    "Environment": {"A": "b"},
    "Tags": [{"Key": "team", "Value": "vision"}],
}


def with_(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The minimal request with values at `A.B[0].C`; `None` takes a member away."""
    request = copy.deepcopy(MINIMAL)
    for path, value in changes:
        *above, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", path)]
        place: Any = request
        for part in above:
            place = place.setdefault(part, {}) if isinstance(part, str) else place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return request


def refused(request: Mapping[str, Any]) -> SpecError:
    with pytest.raises(SpecError) as caught:
        limits.check_request(request)
    return caught.value


def text(length: int) -> str:
    return "x" * length


def ending(start: str) -> Callable[[int], str]:
    return lambda length: start + "x" * (length - len(start))


def listed(make: Callable[[int], Any]) -> Callable[[int], list[Any]]:
    return lambda length: [make(index) for index in range(length)]


def mapped(length: int) -> dict[str, str]:
    return {f"V{index}": "x" for index in range(length)}


def channel(index: int) -> dict[str, Any]:
    return {**CHANNEL, "ChannelName": f"c{index}"}


def number(value: int) -> int:
    return value


ALGORITHM, S3 = "AlgorithmSpecification", "InputDataConfig[0].DataSource.S3DataSource"
MOST: list[tuple[str, int, Callable[[int], Any], str]] = [
    ("TrainingJobName", 63, text, "name"),
    ("RoleArn", 2048, ending(ARN), "role"),
    (f"{ALGORITHM}.TrainingImage", 255, text, "image"),
    (f"{ALGORITHM}.ContainerEntrypoint", 100, listed(str), "command"),
    (f"{ALGORITHM}.ContainerEntrypoint", 256, lambda length: [text(length)], "command"),
    (f"{ALGORITHM}.ContainerArguments", 100, listed(str), "command"),
    (f"{ALGORITHM}.ContainerArguments", 256, lambda length: [text(length)], "command"),
    (f"{ALGORITHM}.MetricDefinitions", 40, listed(lambda i: {"Name": f"m{i}", "Regex": "x"}), "overlay"),
    (f"{ALGORITHM}.MetricDefinitions", 255, lambda n: [{"Name": text(n), "Regex": "x"}], "overlay"),
    (f"{ALGORITHM}.MetricDefinitions", 500, lambda n: [{"Name": "x", "Regex": text(n)}], "overlay"),
    ("HyperParameters", 100, mapped, "overlay"),
    ("HyperParameters", 256, lambda length: {text(length): "x"}, "overlay"),
    ("HyperParameters", 2500, lambda length: {"x": text(length)}, "overlay"),
    ("Environment", 100, mapped, "env"),
    ("Environment", 512, lambda length: {text(length): "x"}, "env"),
    ("Environment", 512, lambda length: {"X": text(length)}, "env"),
    ("InputDataConfig", 20, listed(channel), "data"),
    ("InputDataConfig[0].ChannelName", 64, text, "data"),
    ("InputDataConfig[0].ContentType", 256, text, "data"),
    (f"{S3}.S3Uri", 1024, ending("s3://data/"), "data"),
    (f"{S3}.AttributeNames", 16, listed(str), "data"),
    ("OutputDataConfig.S3OutputPath", 1024, ending("s3://runs/"), "output"),
    ("OutputDataConfig.KmsKeyId", 2048, text, "kms_key"),
    ("CheckpointConfig.S3Uri", 1024, ending("s3://runs/"), "output"),
    ("CheckpointConfig.LocalPath", 4096, ending("/opt/"), "overlay"),
    ("ResourceConfig.VolumeKmsKeyId", 2048, text, "volume_kms_key"),
    ("ResourceConfig.KeepAlivePeriodInSeconds", 21600, number, "keep_alive"),
    ("StoppingCondition.MaxPendingTimeInSeconds", 28 * DAY, number, "resources.max_wait"),
    ("StoppingCondition.MaxRuntimeInSeconds", 28 * DAY, number, "resources.timeout"),
    ("RetryStrategy.MaximumRetryAttempts", 30, number, "retries_by_platform"),
    ("VpcConfig.Subnets", 16, listed(lambda i: f"subnet-{i}"), "subnets"),
    ("VpcConfig.Subnets", 32, lambda length: [text(length)], "subnets"),
    ("VpcConfig.SecurityGroupIds", 5, listed(lambda i: f"sg-{i}"), "security_groups"),
    ("Tags", 50, listed(lambda i: {"Key": f"k{i}", "Value": ""}), "tags"),
    ("Tags[0].Key", 128, text, "tags"),
    ("Tags[0].Value", 256, text, "tags"),
]
"""Where, how much at most, a value of that size, the user's key."""

LEAST: list[tuple[str, int, Callable[[int], Any], str]] = [
    ("TrainingJobName", 1, text, "name"),
    ("RoleArn", 20, lambda length: "arn:aws:iam::123456789012:role/x"[-length:], "role"),
    (f"{ALGORITHM}.ContainerEntrypoint", 1, listed(str), "command"),
    (f"{ALGORITHM}.ContainerArguments", 1, listed(str), "command"),
    ("InputDataConfig", 1, listed(channel), "data"),
    ("Tags[0].Key", 1, text, "tags"),
    ("VpcConfig.Subnets", 1, listed(str), "subnets"),
    ("StoppingCondition.MaxRuntimeInSeconds", 1, number, "resources.timeout"),
    ("StoppingCondition.MaxPendingTimeInSeconds", 1800, number, "resources.max_wait"),
    ("RetryStrategy.MaximumRetryAttempts", 1, number, "retries_by_platform"),
    ("ResourceConfig.KeepAlivePeriodInSeconds", 0, number, "keep_alive"),
]
"""The same for what there must be at least."""


def test_a_minimal_request_passes() -> None:
    limits.check_request(MINIMAL)


@pytest.mark.parametrize(("path", "most", "make", "key"), MOST, ids=[f"{path}-{most}" for path, most, _, _ in MOST])
def test_the_edge_passes_and_one_more_is_refused(path: str, most: int, make: Callable[[int], Any], key: str) -> None:
    limits.check_request(with_((path, make(most))))
    error = refused(with_((path, make(most + 1))))
    assert error.key == key
    assert path in error.message and str(most) in error.message and str(most + 1) in error.message


@pytest.mark.parametrize(
    ("path", "least", "make", "key"), LEAST, ids=[f"{path}-{least}" for path, least, _, _ in LEAST]
)
def test_the_lower_edge_passes_and_one_less_is_refused(
    path: str, least: int, make: Callable[[int], Any], key: str
) -> None:
    if path != "RoleArn":  # a role's shortest ARN is longer than its shortest length
        limits.check_request(with_((path, make(least))))
    error = refused(with_((path, make(least - 1))))
    assert error.key == key
    assert path in error.message and f"{least} at least" in error.message


def preferred(length: int) -> dict[str, Any]:
    kinds = [f"ml.m5.{size}xlarge" for size in ("", 2, 4, 12, 24)] + ["ml.m5.large"]
    return {
        "InstanceCount": 1,
        "VolumeSizeInGB": 30,
        "InstancePreferences": [{"InstanceType": k} for k in kinds[:length]],
    }


def test_instance_preferences_are_one_to_five() -> None:
    for length in (1, 5):
        limits.check_request(with_(("ResourceConfig", preferred(length))))
    for length in (0, 6):
        error = refused(with_(("ResourceConfig", preferred(length))))
        assert error.key == "instance_types" and "ResourceConfig.InstancePreferences" in error.message


WORDS: list[tuple[str, list[Any], list[Any], str]] = [
    ("TrainingJobName", ["a", "a-b", "a--b", "9"], ["-a", "a-", "a_b", "a.b", "ä", "a\n"], "name"),
    ("RoleArn", [f"{ARN}service-role/x", "arn:aws-cn:iam::123456789012:role/x"], [f"{ARN}a b", "trainer" * 9], "role"),
    (f"{ALGORITHM}.TrainingInputMode", ["Pipe", "File", "FastFile"], ["fastfile", ""], "input_mode"),
    (f"{ALGORITHM}.ContainerArguments", [["", "ü {} [x]"]], [["a\nb"], ["a\u2028b"], ["a\rb"]], "command"),
    (f"{ALGORITHM}.MetricDefinitions", [[{"Name": "a/b", "Regex": "."}]], [[{"Name": "a", "Regex": "\n"}]], "overlay"),
    ("HyperParameters", [{"a b": "ü"}], [{"a": "b\nc"}, {"a\nb": "c"}], "overlay"),
    ("Environment", [{"_a9": "a\nb\t"}, {"A": ""}], [{"9": ""}, {"a-b": ""}, {"": ""}, {"ä": ""}], "env"),
    ("InputDataConfig[0].ChannelName", ["a.b-c_D"], ["a b", "a/b", "ä"], "data"),
    (f"{S3}.S3Uri", ["s3://b", "https://b/x"], ["b/x", "s3:///x", "gs://b/x"], "data"),
    (f"{S3}.S3DataType", ["ManifestFile"], ["s3prefix"], "data"),
    ("OutputDataConfig.CompressionType", ["GZIP", "NONE"], ["None"], "output"),
    ("VpcConfig.Subnets", [["subnet-0a"]], [["subnet_0"]], "subnets"),
    ("Tags[0].Key", ["a b:c/d=e+f-g@h.i_j", "größe", "数据", "٣", "a\u00a0b"], ["a#b", "a\nb", "a,b", "😀"], "tags"),
    ("Tags[0].Value", ["", "größe"], ["50%", "(x)"], "tags"),
]  # fmt: skip
"""Patterns and enums: where, what passes, what is refused. The patterns are Java's, which know letters of Unicode."""


@pytest.mark.parametrize(("path", "right", "wrong", "key"), WORDS, ids=[word[0] for word in WORDS])
def test_patterns_and_enums(path: str, right: list[Any], wrong: list[Any], key: str) -> None:
    for value in right:
        limits.check_request(with_((path, value)))
    for value in wrong:
        error = refused(with_((path, value)))
        assert error.key == key and path in error.message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("ResourceConfig.InstanceCount", "1", "a whole number"),
        ("ResourceConfig.InstanceCount", True, "a whole number"),
        ("EnableNetworkIsolation", 1, "true or false"),
        ("Environment.A", 1, "text"),
        ("Tags", {"a": "b"}, "a list"),
        ("VpcConfig", [], "a mapping"),
    ],
)
def test_a_wrong_type_says_which_is_expected(path: str, value: object, words: str) -> None:
    assert words in refused(with_((path, value))).message


def test_missing_members_are_named() -> None:
    for path, key in {"RoleArn": "role", "OutputDataConfig.S3OutputPath": "output", "Tags[0].Value": "tags"}.items():
        error = refused(with_((path, None)))
        assert error.key == key and f"{path} is missing" in error.message


def test_an_enum_suggests_the_nearest_word() -> None:
    assert "did you mean 'FastFile'?" in refused(with_((f"{ALGORITHM}.TrainingInputMode", "Fastfile"))).message


def test_a_long_value_is_not_shown_whole() -> None:
    assert len(str(refused(with_(("Tags[0].Value", "#" * 250))))) < 300


SPOT = ("EnableManagedSpotTraining", True)
WAIT = "StoppingCondition.MaxWaitTimeInSeconds"
FAST = ("InputDataConfig[0].InputMode", "FastFile")
TWO = [{"InstanceType": "ml.g5.xlarge"}, {"InstanceType": "ml.g6.xlarge"}]
EACH = [{**kind, "InstanceCount": 1} for kind in TWO]
RULES: list[tuple[str, list[tuple[str, Any]], list[tuple[str, Any]], str, str]] = [
    ("spot waits", [SPOT, (WAIT, DAY)], [SPOT], "resources.max_wait", WAIT),
    ("spot waits long enough", [SPOT, (WAIT, DAY)], [SPOT, (WAIT, DAY - 1)], "resources.max_wait", str(DAY - 1)),
    ("only spot waits", [], [(WAIT, DAY)], "resources.max_wait", "managed spot"),
    (
        "spot has one type",
        [("ResourceConfig", {"InstancePreferences": EACH})],
        [SPOT, (WAIT, DAY), ("ResourceConfig", {"InstancePreferences": EACH})],
        "resources.spot",
        "InstancePreferences",
    ),
    (
        "spot has no warm pool",
        [SPOT, (WAIT, DAY), ("ResourceConfig.KeepAlivePeriodInSeconds", 0)],
        [SPOT, (WAIT, DAY), ("ResourceConfig.KeepAlivePeriodInSeconds", 60)],
        "keep_alive",
        "KeepAlivePeriodInSeconds",
    ),
    (
        "preferences or a type",
        [("ResourceConfig", {"InstancePreferences": EACH})],
        [("ResourceConfig", {"InstancePreferences": EACH, "InstanceType": "ml.g5.xlarge"})],
        "instance_types",
        "InstanceType",
    ),
    (
        "a count in each or once",
        [("ResourceConfig", {"InstancePreferences": TWO, "InstanceCount": 1})],
        [("ResourceConfig", {"InstancePreferences": EACH, "InstanceCount": 1})],
        "instance_types",
        "InstanceCount",
    ),
    (
        "a count in all",
        [("ResourceConfig", {"InstancePreferences": EACH})],
        [("ResourceConfig", {"InstancePreferences": [EACH[0], TWO[1]]})],
        "instance_types",
        "InstanceCount",
    ),
    (
        "each type once",
        [("ResourceConfig", {"InstancePreferences": EACH})],
        [("ResourceConfig", {"InstancePreferences": [EACH[0], EACH[0]]})],
        "instance_types",
        "ml.g5.xlarge twice",
    ),
    (
        "answers are not asked for",
        [],
        [("ResourceConfig.SelectedInstanceType", "ml.g5.xlarge")],
        "overlay",
        "SelectedInstanceType",
    ),
    (
        "a local disk has its own key",
        [("ResourceConfig.VolumeKmsKeyId", "key")],
        [("ResourceConfig.VolumeKmsKeyId", "key"), ("ResourceConfig.InstanceType", "ml.g5.xlarge")],
        "volume_kms_key",
        "ml.g5.xlarge",
    ),
    *(
        (
            f"a volume's key is no alias, {key}",
            [("ResourceConfig.VolumeKmsKeyId", "arn:aws:kms:eu-west-1:123456789012:key/alias")],
            [("ResourceConfig.VolumeKmsKeyId", key)],
            "volume_kms_key",
            "describe-key",
        )
        for key in ("alias/volumes", "arn:aws:kms:eu-west-1:123456789012:alias/volumes")
    ),
    (
        "only a local disk has a size of its own",
        [("ResourceConfig.VolumeSizeInGB", None), ("ResourceConfig.InstanceType", "ml.g5.xlarge")],
        [("ResourceConfig.VolumeSizeInGB", None)],
        "resources.disk",
        "ml.m5.large",
    ),
    (
        "a local disk has no room but its own",
        [("ResourceConfig.VolumeSizeInGB", 250), ("ResourceConfig.InstanceType", "ml.g5.xlarge")],
        [("ResourceConfig.VolumeSizeInGB", 251), ("ResourceConfig.InstanceType", "ml.g5.xlarge")],
        "resources.disk",
        "ml.g5.xlarge",
    ),
    ("FastFile reads folders", [FAST], [FAST, (f"{S3}.S3Uri", "s3://data/train")], "data", f"{S3}.S3Uri"),
    (
        "FastFile for all channels",
        [(f"{ALGORITHM}.TrainingInputMode", "FastFile"), ("InputDataConfig[0].InputMode", "File"), (f"{S3}.S3Uri", "s3://data/train")],
        [(f"{ALGORITHM}.TrainingInputMode", "FastFile"), (f"{S3}.S3Uri", "s3://data/train")],
        "data",
        f"{S3}.S3Uri",
    ),
    ("FastFile reads prefixes", [FAST], [FAST, (f"{S3}.S3DataType", "ManifestFile")], "data", "S3Prefix"),
    (
        "channels have names of their own",
        [("InputDataConfig", [channel(1), channel(2)])],
        [("InputDataConfig", [channel(1), channel(1)])],
        "data",
        "'c1'",
    ),
    (
        "tags have keys of their own",
        [("Tags", [{"Key": "a", "Value": ""}, {"Key": "A", "Value": ""}])],
        [("Tags", [{"Key": "a", "Value": "1"}, {"Key": "a", "Value": "2"}])],
        "tags",
        "'a'",
    ),
    ("AWS keeps aws:", [("Tags[0].Key", "aws-x")], [("Tags[0].Key", "AWS:x")], "tags", "'AWS:x'"),
    (
        "an image or an algorithm",
        [(f"{ALGORITHM}.TrainingImage", None), (f"{ALGORITHM}.AlgorithmName", "mine")],
        [(f"{ALGORITHM}.AlgorithmName", "mine")],
        "image",
        "AlgorithmName",
    ),
    ("an image at least", [], [(f"{ALGORITHM}.TrainingImage", None)], "image", "AlgorithmName"),
]  # fmt: skip
"""Rule, changes that keep to it, changes that don't, the user's key, what the message names."""


@pytest.mark.parametrize(
    ("right", "wrong", "key", "named"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_rules_between_members(
    right: list[tuple[str, Any]], wrong: list[tuple[str, Any]], key: str, named: str
) -> None:
    limits.check_request(with_(*right))
    error = refused(with_(*wrong))
    assert error.key == key and named in error.message


def test_what_is_unknown_is_doubted_and_passes() -> None:
    request = with_(
        ("RetryStrateg", {}), ("ResourceConfig.InstanceTyp", "x"), ("ResourceConfig.InstanceType", "ml.g5.xxlarge")
    )
    limits.check_request(request)
    assert limits.unknown_members(request) == ("RetryStrateg", "ResourceConfig.InstanceTyp")
    first, second, third = limits.doubts(request)
    assert "did you mean 'RetryStrategy'?" in first
    assert "ResourceConfig.InstanceTyp " in second and "did you mean 'InstanceType'?" in second
    assert "ml.g5.xxlarge is no instance type" in third and "ml.g5." in third.partition("did you mean")[2]
    assert limits.doubts(MINIMAL) == ()


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield path, node
        return
    for name, below in node.items():
        yield from leaves(below, f"{path}.{name}")


def test_the_table_is_that_of_botocore() -> None:
    """Exactly, where botocore is the version that it was made from; a newer one may know more, but nothing else."""
    fresh = json.loads(tables.limits())
    if fresh["botocore"] == TABLE["botocore"]:
        assert fresh == TABLE, "python -m launcher.sagemaker.tables > launcher/sagemaker/limits.json"
        return
    there = dict(leaves(fresh["request"]))
    changed = {
        path: (limit, there.get(path))
        for path, limit in leaves(TABLE["request"])
        if there.get(path) != limit and not (path.endswith(".enum") and set(limit) <= set(there.get(path) or ()))
    }
    assert not changed, f"botocore {fresh['botocore']} differs from limits.json ({TABLE['botocore']}): {changed}"


def test_all_patterns_of_the_table_can_be_asked() -> None:
    patterns = {value for path, value in leaves(TABLE["request"]) if path.endswith(".pattern")}
    assert patterns > set(limits._SAID)
    for pattern in patterns:
        assert not re.search(r"\\p\{", limits._compiled(pattern).pattern)


def test_user_keys_belong_to_members_of_the_table() -> None:
    for member in limits._KEYS:
        node = TABLE["request"]
        for name in member.split(".") if member else []:
            node = node["member"] if node["type"] == "list" else node
            node = node["value"] if node["type"] == "map" else node["members"][name]


def test_a_usual_request_is_checked_at_once() -> None:
    request = with_(
        ("Environment", mapped(10)),
        (f"{ALGORITHM}.MetricDefinitions", [{"Name": f"m{i}", "Regex": "a (.*)"} for i in range(10)]),
        ("Tags", [{"Key": f"k{i}", "Value": "ü"} for i in range(10)]),
    )
    limits.check_request(request)

    def took() -> float:
        start = time.process_time()
        for _ in range(10):
            limits.check_request(request)
        return (time.process_time() - start) / 10

    assert min(took() for _ in range(5)) < 0.002
