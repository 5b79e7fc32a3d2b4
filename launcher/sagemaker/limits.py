"""What CreateTrainingJob takes: checked before anything is sent, without credentials and without boto3.

botocore itself checks required members, types and minima only. limits.json has what botocore's model says besides
(`launcher.sagemaker.tables` makes it); the rules below are those between members, from its documentation and from
AWS's pages about managed spot training, FastFile mode, warm pools and tags.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import SpecError, nearest
from launcher.sagemaker.catalogue import instance_type
from launcher.sagemaker.target import LONGEST_RUN_S

__all__ = ["check_request", "doubts", "instance_names", "unknown_members"]

_Limit = Mapping[str, Any]
"""A node of limits.json."""

_KEYS: Mapping[str, tuple[str, str]] = {
    "": ("overlay", "it comes from `overlay` or from your template"),
    "TrainingJobName": ("name", "choose a shorter name"),
    "RoleArn": ("role", "`aws iam get-role --role-name NAME` shows the ARN of a role"),
    "AlgorithmSpecification.TrainingImage": ("image", "give the image a shorter name or tag"),
    "AlgorithmSpecification.TrainingImageConfig": ("image_access", "correct it"),
    "AlgorithmSpecification.TrainingInputMode": ("input_mode", "correct it"),
    "AlgorithmSpecification.ContainerEntrypoint": ("command", "put it into a script of the image"),
    "AlgorithmSpecification.ContainerArguments": (
        "command",
        "put long arguments into a file of the data, or let our runner start the command (runner: auto)",
    ),
    "Environment": (
        "env",
        "put large values into a file of the data, or let our runner start the command (runner: auto)",
    ),
    "Environment.CVLAUNCH_JOB": ("output", "choose a shorter place for runs"),
    "InputDataConfig": ("data", "correct the channel"),
    "InputDataConfig.InputMode": ("input_modes", "correct it"),
    "OutputDataConfig": ("output", "choose another place for runs"),
    "OutputDataConfig.KmsKeyId": ("kms_key", "correct it"),
    "CheckpointConfig.S3Uri": ("output", "choose another place for runs"),
    "ResourceConfig.InstanceType": ("instance_types", "correct it"),
    "ResourceConfig.InstancePreferences": ("instance_types", "name at most five, best first"),
    "ResourceConfig.InstanceCount": ("resources.nodes", "correct it"),
    "ResourceConfig.VolumeSizeInGB": ("resources.disk", "correct it"),
    "ResourceConfig.VolumeKmsKeyId": ("volume_kms_key", "correct it"),
    "ResourceConfig.KeepAlivePeriodInSeconds": ("keep_alive", "a warm pool lives six hours at most"),
    "VpcConfig.SecurityGroupIds": ("security_groups", "correct them"),
    "VpcConfig.Subnets": ("subnets", "correct them"),
    "StoppingCondition.MaxRuntimeInSeconds": ("resources.timeout", "split the work into several runs"),
    "StoppingCondition.MaxWaitTimeInSeconds": ("resources.max_wait", "correct it"),
    "StoppingCondition.MaxPendingTimeInSeconds": ("resources.max_wait", "say 30m to 28d"),
    "Tags": ("tags", "shorten or drop some"),
    "EnableManagedSpotTraining": ("resources.spot", "correct it"),
    "EnableNetworkIsolation": ("network_isolation", "correct it"),
    "EnableInterContainerTrafficEncryption": ("encrypt_traffic", "correct it"),
    "RetryStrategy": ("retries_by_platform", "SageMaker starts a job again up to 30 times"),
}
"""Member and those below it → the user's key, a way out; the longest that fits."""

_SAID: Mapping[str, str] = {
    ".*": "one line of text",
    ".+": "one line of text",
    "[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}": "letters, digits and - between them",
    "[A-Za-z0-9\\.\\-_]+": "letters, digits, ., - and _",
    "[a-zA-Z_][a-zA-Z0-9_]*": "letters, digits and _, and no digit first",
    "([\\p{L}\\p{Z}\\p{N}_.:/=+\\-@]*)": "letters, digits, spaces and any of _.:/=+-@",
    "(https|s3)://([^/]+)/?(.*)": "s3://bucket/prefix",
    "[-0-9a-zA-Z]+": "letters, digits and -",
    "arn:aws[a-z\\-]*:iam::\\d{12}:role/?[a-zA-Z_0-9+=,.@\\-_/]+": "arn:aws:iam::123456789012:role/NAME",
}
"""Pattern → what it means; others are shown as they are."""

_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "string": (str, "text"),
    "integer": (int, "a whole number"),
    "long": (int, "a whole number"),
    "boolean": (bool, "true or false"),
    "list": ((list, tuple), "a list"),
    "map": (Mapping, "a mapping"),
    "structure": (Mapping, "a mapping"),
}
_DOT = r"(\\.|\[(?:\\.|[^\]\\])*\])|\."
"""A dot that stands for any character; in group 1, what is passed over: escapes and classes."""
_UNITS: Mapping[str, str] = {"string": "characters", "list": "entries", "map": "entries"}


@dataclass(frozen=True)
class _Place:
    """path: as people read it, `InputDataConfig[0].ChannelName`. member: the same without indexes, `Environment.LR`."""

    path: str = ""
    member: str = ""

    def down(self, name: str) -> _Place:
        dot = "." if self.path else ""
        return _Place(f"{self.path}{dot}{name}", f"{self.member}{dot}{name}")

    def at(self, index: int | str) -> _Place:
        member = f"{self.member}.{index}" if isinstance(index, str) else self.member
        return _Place(f"{self.path}[{index!r}]", member)

    def error(self, problem: str, way_out: str = "") -> SpecError:
        key, usual = next(_KEYS[above] for above in _upwards(self.member) if above in _KEYS)
        return SpecError(f"{self.path or 'the request'} {problem}; {way_out or usual}", key=key)


def _upwards(member: str) -> Iterator[str]:
    while member:
        yield member
        member = member.rpartition(".")[0]
    yield ""


def check_request(request: Mapping[str, Any]) -> None:
    """Raises SpecError for the first thing that SageMaker would not take; its key is the user's where one is meant."""
    wrong = _errors(request, _table()["request"], _Place())
    # Rules read a request whose members are right one by one, so they come after all of those.
    for error in itertools.chain(wrong, (error for rule in _RULES for error in rule(request))):
        raise error


def unknown_members(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths that no CreateTrainingJob had when limits.json was made; a newer one may."""
    return tuple(path for path, _ in _unknown(request, _table()["request"], _Place()))


def instance_names() -> frozenset[str]:
    """All types that SageMaker had when limits.json was made."""
    return frozenset(_table()["instance_types"])


def doubts(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences for what is sent as it is, though it may be a mistake: members and instance types that are unknown."""
    version = _table()["botocore"]
    members = (
        f"{path} is no member of CreateTrainingJob in botocore {version}{hint}"
        for path, hint in _unknown(request, _table()["request"], _Place())
    )
    types = (
        f"{name} is no instance type in botocore {version}{nearest(name, instance_names())}"
        for name in dict.fromkeys(_types(request))
        if name not in instance_names()
    )
    return (*members, *types)


@functools.cache
def _table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(Path(__file__).with_name("limits.json").read_text())
    return found


def _errors(value: Any, limit: _Limit, place: _Place) -> Iterator[SpecError]:
    """What is wrong with a value and all below it; nothing is said of what is below a wrong one."""
    if problem := _kind_problem(value, limit) or _size_problem(value, limit):
        yield place.error(problem)
        return
    if limit["type"] == "string" and (problem := _text_problem(value, limit)):
        yield place.error(problem, "correct it")
    for name in limit.get("required", ()):
        if name not in value:
            yield place.down(name).error("is missing", "add it by `overlay` or in your template")
    for inner, below, where in _below(value, limit, place):
        yield from _errors(inner, below, where)


def _below(value: Any, limit: _Limit, place: _Place) -> Iterator[tuple[object, _Limit, _Place]]:
    kind = limit["type"]
    if kind == "structure":
        members = limit["members"]
        yield from ((value[name], members[name], place.down(name)) for name in value if name in members)
    elif kind == "list":
        yield from ((item, limit["member"], place.at(index)) for index, item in enumerate(value))
    elif kind == "map":
        for key, item in value.items():
            yield key, limit["key"], _Place(f"the key {_short(key)} of {place.path}", place.member)
            yield item, limit["value"], place.at(key)


def _kind_problem(value: object, limit: _Limit) -> str:
    kind = limit["type"]
    return "" if _is_a(value, kind) else f"is {_short(value)}, and {_KINDS[kind][1]} is expected"


def _is_a(value: object, kind: str) -> bool:
    """For Python, True is a whole number."""
    return isinstance(value, _KINDS[kind][0]) and (kind == "boolean" or not isinstance(value, bool))


def _size_problem(value: Any, limit: _Limit) -> str:
    unit = _UNITS.get(limit["type"])
    size = len(value) if unit else value
    has = f"has {size} {unit}" if unit else f"is {size}"
    if "max" in limit and size > limit["max"]:
        return f"{has}, and SageMaker takes {limit['max']} at most"
    if "min" in limit and size < limit["min"]:
        return f"{has}, and SageMaker takes {limit['min']} at least"
    return ""


def _text_problem(text: str, limit: _Limit) -> str:
    words: Sequence[str] = limit.get("enum", ())
    if words and text not in words:
        return f"is {_short(text)}{nearest(text, words) or ';'} there are {', '.join(words)}"
    pattern = limit.get("pattern")
    if pattern and not _matches(text, pattern):
        return f"is {_short(text)}, and SageMaker takes {_SAID.get(pattern, f'what matches {pattern}')}"
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-1]}"


def _matches(text: str, pattern: str) -> bool:
    """Whether all of the text matches a regular expression of Java, in which SageMaker has its patterns."""
    plain = text if text.isascii() or r"\p{L}" not in pattern else "".join(map(_ascii, text))
    return _compiled(pattern).fullmatch(plain) is not None


def _ascii(character: str) -> str:
    """A letter, number or space of ASCII for one of Unicode's."""
    return {"L": "a", "N": "0", "Z": " "}.get(unicodedata.category(character)[0], character)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    r"""`.` is any character but those that end a line for Java; \p{…} is written for ASCII only: see _ascii."""
    for java, python in {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9", r"\p{Z}": " ", r"\p{Alnum}": "a-zA-Z0-9"}.items():
        pattern = pattern.replace(java, python)
    return re.compile(re.sub(_DOT, lambda found: found[1] or r"[^\n\r\x85\u2028\u2029]", pattern), re.ASCII)


def _unknown(value: Any, limit: _Limit, place: _Place) -> Iterator[tuple[str, str]]:
    """(path, `; did you mean …?` or nothing)"""
    if not _is_a(value, limit["type"]):
        return
    if limit["type"] == "structure":
        strange = (name for name in value if name not in limit["members"])
        yield from ((place.down(name).path, nearest(name, limit["members"])) for name in strange)
    for inner, below, where in _below(value, limit, place):
        yield from _unknown(inner, below, where)


# ── rules between members ──


def _error(member: str, problem: str, way_out: str = "") -> SpecError:
    return _Place(member, member).error(problem, way_out)


def _types(request: Mapping[str, Any]) -> Iterator[str]:
    resources = request.get("ResourceConfig", {})
    holders = [resources, *resources.get("InstanceGroups", ()), *resources.get("InstancePreferences", ())]
    yield from (holder["InstanceType"] for holder in holders if "InstanceType" in holder)


def _one_algorithm(request: Mapping[str, Any]) -> Iterator[SpecError]:
    algorithm, member = request.get("AlgorithmSpecification", {}), "AlgorithmSpecification.TrainingImage"
    if "TrainingImage" in algorithm and "AlgorithmName" in algorithm:
        yield _error(member, "excludes AlgorithmName", "give one of them")
    elif algorithm and "TrainingImage" not in algorithm and "AlgorithmName" not in algorithm:
        yield _error(member, "is missing, and so is AlgorithmName", "say image: REGISTRY/NAME:TAG")


def _spot(request: Mapping[str, Any]) -> Iterator[SpecError]:
    stopping, resources = request.get("StoppingCondition", {}), request.get("ResourceConfig", {})
    longest, wait = stopping.get("MaxRuntimeInSeconds", 24 * 3600), stopping.get("MaxWaitTimeInSeconds")
    member = "StoppingCondition.MaxWaitTimeInSeconds"
    if not request.get("EnableManagedSpotTraining"):
        if wait is not None:
            yield _error(member, "is for managed spot training only", "add spot: true, or leave it out")
        return
    if wait is None:
        yield _error(member, "is missing, which managed spot training needs", "say max_wait: 12h")
    elif wait < longest:
        yield _error(member, f"is {wait}, less than MaxRuntimeInSeconds ({longest})", "it holds waiting and running")
    if "InstancePreferences" in resources:
        yield _error("EnableManagedSpotTraining", "excludes InstancePreferences", "name one instance type")
    if resources.get("KeepAlivePeriodInSeconds"):
        yield _error("ResourceConfig.KeepAlivePeriodInSeconds", "excludes managed spot training", "choose one of both")


def _run_time(request: Mapping[str, Any]) -> Iterator[SpecError]:
    member = "StoppingCondition.MaxRuntimeInSeconds"
    longest = request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", 0)
    if longest > LONGEST_RUN_S:
        yield _error(member, f"is {longest}, and SageMaker takes {LONGEST_RUN_S} (28 days) at most")


def _preferences(request: Mapping[str, Any]) -> Iterator[SpecError]:
    member, resources = "ResourceConfig.InstancePreferences", request.get("ResourceConfig", {})
    if not (preferred := resources.get("InstancePreferences")):
        return
    for other in ("InstanceType", "InstanceGroups", "InstancePlacementConfig"):
        if other in resources:
            yield _error(member, f"excludes {other}", "give one of them")
    counted = sum("InstanceCount" in each for each in preferred)
    if counted != (0 if "InstanceCount" in resources else len(preferred)):
        yield _error(member, "needs InstanceCount in each entry, or once beside it", "give it in one of both ways")
    if twice := _twice(each["InstanceType"] for each in preferred):
        yield _error(member, f"names {twice} twice", "name each type once")


def _selected(request: Mapping[str, Any]) -> Iterator[SpecError]:
    for name in ("SelectedInstanceType", "SelectedInstanceCount"):
        if name in request.get("ResourceConfig", {}):
            yield _error(f"ResourceConfig.{name}", "is what SageMaker answers, and can't be asked for", "leave it out")


def _volumes(request: Mapping[str, Any]) -> Iterator[SpecError]:
    resources = request.get("ResourceConfig", {})
    key = resources.get("VolumeKmsKeyId", "")
    if re.match(r"(arn:[^/]*:)?alias/", key):
        yield _error(
            "ResourceConfig.VolumeKmsKeyId",
            f"is the alias {_short(key)}, and SageMaker takes a key's id or ARN there",
            f"`aws kms describe-key --key-id {shlex.quote(key)}` shows the ARN",
        )
    for known in filter(None, map(instance_type, _types(request))):
        if known.nvme and "VolumeKmsKeyId" in resources:
            yield _error(
                "ResourceConfig.VolumeKmsKeyId",
                f"can't be asked for with {known.name}",
                "its local disk has a hardware key of its own: leave volume_kms_key out, or choose another type",
            )
        if known.nvme and resources.get("VolumeSizeInGB", 0) * 10**9 > known.nvme:
            yield _error(
                "ResourceConfig.VolumeSizeInGB",
                f"is {resources['VolumeSizeInGB']}, and in the volume's place {known.name} has a local disk of "
                f"{known.nvme // 10**9} GB",
                "ask for less disk, or choose a type with more",
            )
        if not known.nvme and not resources.get("VolumeSizeInGB"):
            yield _error("ResourceConfig.VolumeSizeInGB", f"is missing, which {known.name} needs", "say disk: 50GB")


def _channels(request: Mapping[str, Any]) -> Iterator[SpecError]:
    channels = request.get("InputDataConfig", ())
    if twice := _twice(channel["ChannelName"] for channel in channels):
        yield _error("InputDataConfig", f"has two channels {twice!r}", "rename one")
    usual = request.get("AlgorithmSpecification", {}).get("TrainingInputMode")
    for index, channel in enumerate(channels):
        source = channel["DataSource"].get("S3DataSource")
        if source and channel.get("InputMode", usual) == "FastFile":
            place = _Place().down("InputDataConfig").at(index).down("DataSource").down("S3DataSource")
            yield from _fast_file(source, place)


def _fast_file(source: Mapping[str, Any], place: _Place) -> Iterator[SpecError]:
    if source["S3DataType"] != "S3Prefix":
        yield place.down("S3DataType").error(f"is {source['S3DataType']}, and FastFile reads S3Prefix only", "use File")
    elif not source["S3Uri"].endswith("/"):
        way_out = "end it with /, or use File"
        yield place.down("S3Uri").error(f"is {source['S3Uri']}, and FastFile reads a prefix that ends with /", way_out)


def _tags(request: Mapping[str, Any]) -> Iterator[SpecError]:
    keys = [tag["Key"] for tag in request.get("Tags", ())]
    if twice := _twice(keys):
        yield _error("Tags", f"has the key {twice!r} twice", "rename one")
    for key in keys:
        if key.lower().startswith("aws:"):
            yield _error("Tags", f"has the key {key!r}, and AWS keeps aws: to itself", "rename it")


def _twice(words: Iterator[str] | Sequence[str]) -> str:
    return next((word for word, count in Counter(words).items() if count > 1), "")


_RULES: Sequence[Callable[[Mapping[str, Any]], Iterator[SpecError]]] = (
    _one_algorithm, _run_time, _preferences, _selected, _spot, _volumes, _channels, _tags,
)  # fmt: skip
