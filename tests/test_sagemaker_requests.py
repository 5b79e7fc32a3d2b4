"""Bodies of CreateTrainingJob: golden files, five of them as people write them by hand, and SageMaker's limits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import render, submit
from launcher.backends.base import Image, Plan, disk_for_data
from launcher.backends.sagemaker import SageMakerBackend
from launcher.contract import JOB, JobFile
from launcher.errors import SpecError, UnsupportedError
from launcher.ledger import Ledger
from launcher.plan import load_template, make_plan
from launcher.sagemaker.limits import check_request, doubts
from launcher.sagemaker.request import METRICS
from launcher.sagemaker.target import SageMakerTarget
from tests.conftest import Golden
from tests.jobs import fixed_job

GIB = 1 << 30
DIGEST = "sha256:" + "c" * 64
REPOSITORY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/trainer"
IMAGE = f"{REPOSITORY}@{DIGEST}"
TAGGED = f"{REPOSITORY}:1"
"""For speed: no engine is asked what it is."""
ROLE = "arn:aws:iam::123456789012:role/trainer"
VPC = {"subnets": ["subnet-1", "subnet-2"], "security_groups": ["sg-1"]}
KEY = "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"

GPU = {"gpus": 1, "gpu": ("A10G",)}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpu": ("classify", {}, {**GPU, "timeout": 12 * 3600.0}),
    "preferences": ("classify", {}, {"gpus": 1, "gpu": ("A10G", "L4", "T4"), "max_wait": 7200.0}),
    "spot": ("detect", {"tags": {"cost-center": "4711"}}, {**GPU, "spot": True, "timeout": 3600.0, "max_wait": 7200.0}),
    "nodes": (
        "classify",
        {"encrypt_traffic": True, "retries_by_platform": 3},
        {"gpus": 8, "gpu": ("A100",), "nodes": 2},
    ),
    "vpc": (
        "detect",
        {**VPC, "kms_key": KEY, "volume_kms_key": KEY, "network_isolation": True, "image_access": "Vpc"},
        {"cpus": 8, "memory": 30 * GIB},
    ),
    "fastfile": ("classify", {"input_modes": {"train": "FastFile"}}, GPU),
    "warm-pool": ("command", {"keep_alive": "30m", "instance_types": ["ml.g5.2xlarge"]}, {"gpus": 1, "timeout": 600.0}),
    "foreign": (
        "command",
        {"storage": {"endpoint": "https://s3.example.com"}},
        {"foreign": True, "timeout": 3600.0, "env": {"A": "1"}},
    ),
    "cpu": ("command", {"max_runtime": "2d"}, {}),
    "overlay": (
        "classify",
        {
            "overlay": {
                "RemoteDebugConfig": {"EnableRemoteDebug": True},
                "OutputDataConfig": {"CompressionType": "NONE"},
                "HyperParameters": None,
            }
        },
        GPU,
    ),
    "native": (
        "command",
        {"overlay": {"ExperimentConfig": {"ExperimentName": "a", "TrialName": "b"}}},
        {"native": {"sagemaker": {"ExperimentConfig": {"TrialName": "c"}, "SessionChainingConfig": {}}}},
    ),
}  # fmt: skip
"""Name → a fixed job, keys of the target, and what else the job asks for (of its resources, but for a few)."""


def plan_of(name: str, keys: Mapping[str, Any], asked: Mapping[str, Any]) -> Plan:
    """Of a fixed job. asked: of its resources; `foreign`, `native`, `env`, `tags`, `secrets` and `command`, too."""
    known = {"region": "eu-west-1", "role": ROLE, "output": "s3://bucket/runs", **keys}
    backend = SageMakerBackend(SageMakerTarget.model_validate(known), "aws")
    job = fixed_job(name, backend.target, "aws", str(known["output"]))
    asked = {"secrets": {}, **asked}
    own = {key: asked.pop(key) for key in ("native", "env", "tags", "secrets") if key in asked}
    own["runner"] = "none" if asked.pop("foreign", False) else "auto"
    command = asked.pop("command", job.command)
    resources = job.spec.resources.model_copy(update=asked)
    spec = job.spec.model_copy(update={"resources": resources, "retries": 0, **own})
    mounted = tuple(dataclasses.replace(channel, access="mounted") for channel in job.channels)
    storage = backend.target.storage.options.portable().to_mapping()
    job = dataclasses.replace(
        job, spec=spec, command=command, image=Image(IMAGE, DIGEST), channels=mounted, storage=storage
    )
    return make_plan(job, backend, f"{name}-0000000000", template=load_template(SageMakerBackend))


def body_of(name: str, keys: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan_of(name, keys, asked).text)
    return found


@pytest.mark.parametrize("case", CASES)
def test_golden_renderings(case: str, golden: Golden) -> None:
    name, keys, asked = CASES[case]
    plan = plan_of(name, keys, asked)
    assert plan == plan_of(name, keys, asked)
    assert not [warning for warning in plan.warnings if "shared memory" not in warning], plan.warnings
    golden.check(f"sagemaker/{case}.json", plan.text)


@functools.cache
def model() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("sagemaker")


def golden_files() -> list[Path]:
    return sorted((Path(__file__).parent / "golden/sagemaker").glob("*.json"))


def test_every_rendering_is_what_sagemaker_takes() -> None:
    """botocore's validator knows members, types and minima; our tables the rest."""
    from botocore.validate import ParamValidator

    assert [path.stem for path in golden_files()] == sorted(CASES)
    shape = model().operation_model("CreateTrainingJob").input_shape
    for path in golden_files():
        body = json.loads(path.read_text(encoding="utf-8"))
        assert ParamValidator().validate(body, shape).generate_report() == "", path.name
        check_request(body)
        assert doubts(body) == (), path.name


# -- as people write them by hand -------------------------------------------------------------------------------------

BY_HAND = sorted((Path(__file__).parent / "sagemaker_by_hand").glob("*.yaml"))


@pytest.mark.parametrize("path", BY_HAND, ids=[path.stem for path in BY_HAND])
def test_a_rendering_is_what_one_would_write_by_hand(path: Path, tmp_path: Path) -> None:
    """Each file: the job, the target, and the request with a reason for each choice."""
    job, target, request = path.read_text(encoding="utf-8").split("\n---\n")
    (tmp_path / "job.yaml").write_text(job, encoding="utf-8")
    entry = "".join(f"    {line}\n" for line in target.splitlines())
    (tmp_path / "targets.yaml").write_text(f"targets:\n  aws:\n{entry}", encoding="utf-8")
    plan = render(tmp_path / "job.yaml", target="aws")
    known = {
        "RUN-ID": plan.run_id,
        "JOB-DIGEST": plan.job_digest,
        "JOB-SHA256": hashlib.sha256(content(plan)).hexdigest(),
    }
    written = re.sub("|".join(known), lambda found: known[found[0]], request)
    assert json.loads(plan.text) == yaml.safe_load(written)
    assert plan.placeholders == ()


def content(plan: Plan) -> bytes:
    """job.json."""
    found = plan.files[JOB]
    assert isinstance(found, bytes)
    return found


def test_there_are_five_and_each_choice_has_its_reason() -> None:
    """Above the key, or just below it; in one of the files."""
    assert len(BY_HAND) == 5
    members, explained = set(model().shape_for("CreateTrainingJobRequest").members), set[str]()
    chosen = {key for path in BY_HAND for key in yaml.safe_load(path.read_text(encoding="utf-8").split("\n---\n")[2])}
    for path in BY_HAND:
        for one, other in itertools.pairwise(path.read_text(encoding="utf-8").splitlines()):
            keys = (line.partition(":")[0] for line, beside in ((one, other), (other, one)) if said(beside))
            explained.update(keys)
    assert chosen <= members
    assert chosen - explained == set()


def said(line: str) -> bool:
    return line.lstrip().startswith("#")


# -- what stands in it ------------------------------------------------------------------------------------------------

HOSTILE = (
    "".join(map(chr, [*range(1, 0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0xFEFF, 0xFFFE, 0x1F4BE]))
    + "{{ x }} {% if %} ${A} $(rm) '\"\\ #"
)


def test_every_character_arrives() -> None:
    asked = {"foreign": True, "command": ("sh", "-c", HOSTILE), "env": {"A": HOSTILE}}
    with pytest.raises(SpecError, match="one line of text"):
        plan_of("command", {}, asked)  # SageMaker's own rule of arguments; anything may stand in variables
    one_line = re.sub("[\n\r\x85\u2028\u2029]", "", HOSTILE)
    body = body_of("command", {}, {**asked, "command": ("sh", "-c", one_line)})
    assert body["AlgorithmSpecification"]["ContainerArguments"] == ["sh", "-c", one_line]
    assert body["Environment"] == {"A": HOSTILE}


def test_with_our_runner_every_character_travels_in_job_json() -> None:
    tags = {"sprite": "übung №1", "hostile": HOSTILE}
    plan = plan_of("command", {}, {"command": ("sh", "-c", HOSTILE), "env": {"A": HOSTILE}, "tags": tags})
    assert HOSTILE not in json.loads(plan.text).values()
    found = JobFile.from_bytes(content(plan))
    assert (found.command, found.env, found.tags) == (("sh", "-c", HOSTILE), {"A": HOSTILE}, tags)
    variables = json.loads(plan.text)["Environment"]
    assert variables["CVLAUNCH_JOB_SHA256"] == hashlib.sha256(content(plan)).hexdigest()
    assert not {"A", *(name for name in variables if name.startswith("SM_"))} & variables.keys()


@pytest.mark.parametrize(
    ("name", "value", "there"),
    [
        ("team", "vision", True),
        ("übung 1", "Ⅷ / a_b.c:d=e+f-g@h", True),
        ("k" * 128, "v" * 256, True),
        ("k" * 129, "v", False),
        ("k", "v" * 257, False),
        ("aws:createdBy", "me", False),
        ("AWS:x", "me", False),
        ("what?", "x", False),
        ("x", "a, b", False),
        ("x", "a\nb", False),
        ("", "x", False),
        ("x", "", True),
        ("cvlaunch-run", "another", False),
        ("cvlaunch-digest", "another", False),
    ],
)
def test_tags_that_aws_can_t_have_stay_in_job_json(name: str, value: str, there: bool) -> None:
    plan = plan_of("command", {}, {"tags": {name: value}})
    found = {tag["Key"]: tag["Value"] for tag in json.loads(plan.text)["Tags"]}
    assert (found.get(name) == value) is there
    assert found["cvlaunch-run"] == plan.run_id
    assert found["cvlaunch-digest"] == plan.job_digest
    assert JobFile.from_bytes(content(plan)).tags == {name: value}


def test_room_is_left_for_the_tag_that_is_added_when_it_is_sent() -> None:
    many = {f"tag-{number:02}": "x" for number in range(60)}
    plan = plan_of("command", {"tags": {"team": "vision", "tag-07": "of the target"}}, {"tags": many})
    tags = {tag["Key"]: tag["Value"] for tag in json.loads(plan.text)["Tags"]}
    assert len(tags) == len(json.loads(plan.text)["Tags"]) == 49
    assert list(tags)[:4] == ["cvlaunch-run", "cvlaunch-digest", "team", "tag-07"]
    assert tags["tag-07"] == "of the target"
    assert JobFile.from_bytes(content(plan)).tags == many


def test_a_target_with_too_many_tags_is_told() -> None:
    fitting = {f"tag-{number:02}": "x" for number in range(47)}
    assert len(body_of("command", {"tags": fitting}, {"tags": {"one": "more"}})["Tags"]) == 49
    with pytest.raises(SpecError, match="Tags has 51 entries, and SageMaker takes 50 at most") as error:
        body_of("command", {"tags": {**fitting, "a": "", "b": ""}}, {})
    assert error.value.key == "tags"


LINES = {
    "classify": (
        "epoch 2/3  loss 1.2345  acc 0.5000  val loss 0.9876  val acc 0.6250  lr 1.00e-03  812 images/s",
        {
            "train/epoch_loss": 1.2345,
            "train/epoch_accuracy": 0.5,
            "val/loss": 0.9876,
            "val/accuracy": 0.625,
            "train/lr": 0.001,
            "train/images_per_second": 812,
        },
    ),
    "detect": (
        "epoch 10/100  loss 3.2100  val map50 0.7000  map 0.4321  lr 5.00e-04  90 images/s",
        {
            "train/loss": 3.21,
            "val/map50": 0.7,
            "val/map": 0.4321,
            "train/lr": 5e-4,
            "train/images_per_second": 90,
        },
    ),
}
"""What the trainer prints after an epoch; where it does: trainer_image/cvtrainer."""


@pytest.mark.parametrize("task", LINES)
def test_metrics_are_found_in_the_trainer_s_lines(task: str) -> None:
    line, values = LINES[task]
    shape = re.sub(r"(?<![a-z])\b[\d.]+(e-\d+)?", "N", line)
    source = (Path(__file__).parents[1] / f"trainer_image/cvtrainer/{task}.py").read_text(encoding="utf-8")
    parts = re.findall(r'f"(epoch .*?)"\n\s+f"(.*?)"(?:\n\s+f"(.*?)")?\n', source)
    printed = ["".join(found) for found in parts if "images/s" in "".join(found)]
    assert [re.sub(r"\{[^}]*\}", "N", text) for text in printed] == [shape]
    tagged = f"1.0 2026-11-22T09:00:00Z {line}"
    found = {name: [float(text) for text in re.findall(regex, tagged)] for name, regex in METRICS[task].items()}
    assert found == {name: [value] for name, value in values.items()}


def test_hyperparameters_are_texts_that_the_manual_allows() -> None:
    classes = [f"class-{number}" for number in range(60)]
    plan = plan_of("detect", {}, {})
    job = fixed_job("detect", SageMakerTarget.model_validate({"output": "s3://b/r"}), "aws", "s3://b/r")
    backend = SageMakerBackend(SageMakerTarget.model_validate({"output": "s3://b/r", "role": ROLE}), "aws")
    job = dataclasses.replace(job, image=Image(IMAGE), train={**(job.train or {}), "classes": classes})
    long = json.loads(make_plan(job, backend, "a-0000000000", template=load_template(SageMakerBackend)).text)
    assert json.loads(plan.text)["HyperParameters"]["classes"] == '["circle", "square"]'
    assert "classes" not in long["HyperParameters"], "it stands in job.json"
    assert all(isinstance(value, str) and len(value) <= 256 for value in long["HyperParameters"].values())


def test_a_prefix_takes_no_sibling_along() -> None:
    body = body_of("classify", {"input_mode": "FastFile", "input_modes": {"val": "File"}}, GPU)
    modes = {one["ChannelName"]: one["InputMode"] for one in body["InputDataConfig"]}
    assert modes == {"train": "FastFile", "val": "File"}
    assert body["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    places = [one["DataSource"]["S3DataSource"]["S3Uri"] for one in body["InputDataConfig"]]
    assert places == ["s3://bucket/digits/train/", "s3://bucket/digits/val/"]


@pytest.mark.parametrize(
    ("keys", "disk", "volume", "kind"),
    [
        ({}, "auto", 244, "ml.g6.2xlarge"),
        ({"input_modes": {"train": "FastFile"}}, "auto", 132, "ml.g4dn.2xlarge"),
        ({"input_mode": "FastFile"}, "auto", 20, "ml.g4dn.xlarge"),
        ({"input_mode": "FastFile"}, 245 << 30, 245, "ml.g6.2xlarge"),
    ],
)
def test_what_fast_file_reads_needs_no_disk(keys: Mapping[str, Any], disk: str | int, volume: int, kind: str) -> None:
    target = SageMakerTarget(role=ROLE, output="s3://bucket/runs", **keys)
    job = fixed_job("classify", target, "aws", "s3://bucket/runs")
    channels = tuple(dataclasses.replace(channel, access="mounted", size=100 * 10**9) for channel in job.channels)
    resources = job.spec.resources.model_copy(update={"disk": disk})
    spec = job.spec.model_copy(update={"resources": resources, "retries": 0})
    needed = disk_for_data(channel.size for channel in channels) + (20 << 30) if disk == "auto" else int(disk)
    job = dataclasses.replace(job, spec=spec, channels=channels, disk=needed, image=Image(IMAGE, DIGEST))
    plan = make_plan(job, SageMakerBackend(target, "aws"), "x-0000000000", template=load_template(SageMakerBackend))
    found = json.loads(plan.text)["ResourceConfig"]
    assert (found["VolumeSizeInGB"], found["InstanceType"]) == (volume, kind)


def test_under_isolation_the_platform_moves_everything() -> None:
    plan = plan_of("classify", {"network_isolation": True}, GPU)
    body, job = json.loads(plan.text), JobFile.from_bytes(content(plan))
    assert body["Environment"]["CVLAUNCH_JOB"] == "/opt/ml/input/data/cvlaunch/config/job.json"
    assert "CVLAUNCH_STORAGE" not in body["Environment"]
    *_, last = body["InputDataConfig"]
    assert last["DataSource"]["S3DataSource"]["S3Uri"] == "s3://bucket/runs/classify-0000000000/input/"
    assert job.movers == dict.fromkeys(("checkpoints", "model", "output"), "platform")
    assert JobFile.from_bytes(content(plan_of("classify", {}, GPU))).movers["output"] == "runner"


def test_under_isolation_the_platform_brings_the_code_along(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text("pass\n")
    plan = front(tmp_path, {"code": {"root": "code"}}, {"network_isolation": True})
    place = json.loads(plan.text)["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    stored = {f"s3://bucket/runs/{plan.run_id}/{path}" for path in plan.files}
    assert len(stored) == 2
    assert all(uri.startswith(place) for uri in stored)


# -- limits, through the whole front ----------------------------------------------------------------------------------


def front(folder: Path, job: Mapping[str, Any], target: Mapping[str, Any] = {}, **keys: Any) -> Plan:
    """Renders from files. job, target: beside what every job and target here has."""
    write(folder, job, target)
    return render(folder / "job.yaml", target="aws", **keys)


def write(folder: Path, job: Mapping[str, Any], target: Mapping[str, Any] = {}) -> None:
    whole = {"name": "edge", "image": TAGGED, "command": ["true"], **job}
    known = {"backend": "sagemaker", "region": "eu-west-1", "role": ROLE, "output": "s3://bucket/runs", **target}
    kept = {key: value for key, value in known.items() if value is not None}
    (folder / "job.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"aws": kept}}, sort_keys=False), encoding="utf-8")


FOREIGN = {"runner": "none"}
GPUS = {"gpus": 1}

EDGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "channels": ({"data": {f"c{n}": f"s3://bucket/{n}" for n in range(20)}}, {}),
    "argument": ({**FOREIGN, "command": ["x" * 256] * 100}, {}),
    "variable": ({**FOREIGN, "env": {f"V{n}": "é" * 512 for n in range(100)}}, {}),
    "long, by our runner": ({"command": ["x" * 5_000] * 101, "env": {f"V{n}": "x" * 513 for n in range(101)}}, {}),
    "wait, least": ({"resources": {**GPUS, "max_wait": "30m"}}, {}),
    "wait, most": ({"resources": {**GPUS, "max_wait": "28d"}}, {}),
    "wait of spot": ({"resources": {**GPUS, "max_wait": "1m", "spot": True}}, {}),
    "time": ({"resources": {"timeout": "28d"}}, {}),
    "preferences": (
        {"resources": GPUS}, {"instance_types": [f"ml.{name}.2xlarge" for name in ("g5", "g6", "g4dn", "g6e", "p3")]},
    ),
    "warm pool": ({}, {"keep_alive": "6h"}),
    "retries": ({}, {"retries_by_platform": 30}),
    "vpc": ({}, {"subnets": [f"subnet-{n}" for n in range(16)], "security_groups": [f"sg-{n}" for n in range(5)]}),
    "image": ({"image": REPOSITORY + "/x" * ((253 - len(REPOSITORY)) // 2) + ":1"}, {}),
    "kms": ({}, {"kms_key": "k" * 2048}),
    "isolation": ({}, {"network_isolation": True}),
    "name": ({"name": "N" * 128}, {}),
    "grace": ({"resources": {"grace": "2m"}}, {}),
    "fast file": ({"data": {"train": "s3://bucket/data"}}, {"input_mode": "FastFile"}),
    "isolated channels": ({"data": {f"c{n}": f"s3://bucket/{n}" for n in range(19)}}, {"network_isolation": True}),
}  # fmt: skip
"""What passes, without a word."""


@pytest.mark.parametrize("edge", EDGES)
def test_at_the_edge_it_passes(edge: str, tmp_path: Path) -> None:
    job, target = EDGES[edge]
    plan = front(tmp_path, job, target)
    body = json.loads(plan.text)
    assert len(body["TrainingJobName"]) <= 63
    assert plan.placeholders == ()
    assert not [said for said in plan.warnings if "was not looked at" not in said], plan.warnings


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "channels": (
        {"data": {f"c{n}": f"s3://bucket/{n}" for n in range(21)}},
        {},
        r"job.yaml:\d+: data: InputDataConfig has 21 entries, and SageMaker takes 20 at most",
    ),
    "isolated channels": (
        {"data": {f"c{n}": f"s3://bucket/{n}" for n in range(20)}},
        {"network_isolation": True},
        r"job.yaml:\d+: data: InputDataConfig has 21 entries, and SageMaker takes 20 at most",
    ),
    "argument": (
        {**FOREIGN, "command": ["x" * 257]},
        {},
        r"job.yaml:\d+: command: .*ContainerArguments\[0\] has 257 characters, and SageMaker takes 256 at most; .*file",
    ),
    "arguments": ({**FOREIGN, "command": ["x"] * 101}, {}, r"job.yaml:\d+: command: .*has 101 entries"),
    "argument of two lines": ({**FOREIGN, "command": ["a\nb"]}, {}, r"job.yaml:\d+: command: .*one line of text"),
    "value": (
        {**FOREIGN, "env": {"A": "x" * 513}},
        {},
        r"job.yaml:\d+: env: Environment\['A'\] has 513 characters, and SageMaker takes 512 at most; .*runner: auto",
    ),
    "variables": ({**FOREIGN, "env": {f"V{n}": "" for n in range(101)}}, {}, r"job.yaml:\d+: env: Environment has 101"),
    "wait": (
        {"resources": {**GPUS, "max_wait": "29m"}},
        {},
        r"job.yaml:\d+: resources.max_wait: SageMaker lets a job wait for 30m 00s to 28d.*, not for 29m 00s",
    ),
    "long wait": ({"resources": {**GPUS, "max_wait": "29d"}}, {}, r"job.yaml:\d+: resources.max_wait: .*not for 29d"),
    "a GPU of others": (
        {"resources": {"gpus": 1, "gpu": "RTX4090"}},
        {},
        r"job.yaml:\d+: resources.gpu: SageMaker has no 'RTX4090'; there are T4, A10G, ",
    ),
    "a slip": ({"resources": {"gpus": 1, "gpu": "H10O"}}, {}, r"job.yaml:\d+: resources.gpu: .*did you mean 'H100'\?"),
    "too many GPUs": ({"resources": {"gpus": 9}}, {}, r"job.yaml:\d+: resources.gpus: no instance .*has 9 GPUs"),
    "memory": ({"resources": {"memory": "9Ti"}}, {}, r"job.yaml:\d+: resources.memory: no instance of SageMaker"),
    "shm": ({"resources": {"shm": "8Gi"}}, {}, r"job.yaml:\d+: resources.shm: .*leave shm out"),
    "a secret from here": ({"secrets": {"A": "env:HOME"}}, {}, r"job.yaml:\d+: secrets: .*store:secretsmanager:NAME"),
    "a secret of nobody": ({"secrets": {"A": "store:vault/a"}}, {}, r"job.yaml:\d+: secrets.A: .*store:ssm:NAME"),
    "a foreign image's secret": (
        {**FOREIGN, "secrets": {"A": "store:ssm:a"}}, {}, r"job.yaml:\d+: secrets: .*nobody to fetch them",
    ),
    "a foreign image's code": ({**FOREIGN, "code": {"root": "code"}}, {}, r"job.yaml:\d+: code: .*nobody to bring it"),
    "a foreign image's retries": ({**FOREIGN, "retries": 1}, {}, r"job.yaml:\d+: retries: .*write retries: 0"),
    "isolated secrets": (
        {"secrets": {"A": "store:ssm:a"}},
        {"network_isolation": True},
        r"job.yaml:\d+: secrets: under network_isolation the job reaches nothing: leave them out",
    ),
    "isolated channel": (
        {"data": {"cvlaunch": "s3://bucket/x"}},
        {"network_isolation": True},
        r"job.yaml:\d+: data: InputDataConfig has two channels 'cvlaunch'; rename one",
    ),
    "image": ({"image": REPOSITORY + "/x" * 200}, {}, r"job.yaml:\d+: image: .*has \d+ characters, .*255 at most"),
    "no image": ({"image": None}, {}, r"image: the sagemaker backend runs containers; give image or build"),
    "place": ({"output": "gs://bucket/x"}, {}, r"job.yaml:\d+: output: the sagemaker backend can't write to gs://"),
    "data here": ({"data": {"train": "code"}}, {}, r"job.yaml:\d+: data.train: "),
    "other platform": ({"native": {"slurm": {}}}, {}, r"job.yaml:\d+: native: the job has native settings of slurm"),
    "name by overlay": (
        {"native": {"sagemaker": {"TrainingJobName": "mine"}}}, {}, r"a run is found by TrainingJobName, by the tag",
    ),
    "tags by overlay": (
        {}, {"overlay": {"Tags": []}}, r"targets.yaml:\d+: targets.aws.overlay: a run is found .* the tag cvlaunch-run",
    ),
    "what overlay breaks": (
        {"native": {"sagemaker": {"ResourceConfig": {"VolumeSizeInGB": "x"}}}},
        {},
        r"ResourceConfig.VolumeSizeInGB is 'x', and a whole number is expected",
    ),
    "subnets alone": (
        {}, {"subnets": ["subnet-1"]}, r"targets.yaml:\d+: targets.aws: .*subnets and security_groups come together",
    ),
    "region": ({}, {"region": 5}, r"targets.yaml:\d+: targets.aws.region: "),
    "role": ({}, {"role": "arn:aws:iam::1:role/trainer"}, r"targets.yaml:\d+: targets.aws.role: RoleArn .*:role/NAME"),
    "role name": ({}, {"role": "trainer"}, r"targets.yaml:\d+: targets.aws.role: expected the ARN of a role.*aws iam"),
    "warm pool": ({}, {"keep_alive": "7h"}, r"targets.yaml:\d+: targets.aws.keep_alive: "),
    "warm spot": (
        {"resources": {"spot": True, "gpus": 1}},
        {"keep_alive": "1h"},
        r"targets.yaml:\d+: targets.aws.keep_alive: .*excludes managed spot training",
    ),
    "a place with a long name": (
        {},
        {"output": f"s3://bucket/{'x' * 480}"},
        r"targets.yaml:\d+: targets.aws.output: Environment\['CVLAUNCH_JOB'\] has 5\d\d characters.*a shorter place",
    ),
    "volume key of NVMe": (
        {"resources": GPUS},
        {"volume_kms_key": "k"},
        r"targets.yaml:\d+: targets.aws.volume_kms_key: .*can't be asked for with ml\.g",
    ),
    "volume key by its alias": (
        {},
        {"volume_kms_key": "alias/volumes"},
        r"targets.yaml:\d+: targets.aws.volume_kms_key: .* is the alias 'alias/volumes', and SageMaker takes a key's "
        r"id or ARN there; `aws kms describe-key --key-id alias/volumes` shows the ARN",
    ),
    "six types": ({}, {"instance_types": [f"ml.g{n}.xlarge" for n in range(6)]}, r"targets.yaml:\d+: .*instance_types"),
    "twice": (
        {},
        {"instance_types": ["ml.g5.xlarge", "ml.g5.xlarge"]},
        r"targets.yaml:\d+: targets.aws.instance_types: .*names ml.g5.xlarge twice",
    ),
    "retries": ({}, {"retries_by_platform": 31}, r"targets.yaml:\d+: targets.aws.retries_by_platform: "),
    "mode": ({}, {"input_mode": "Pipe"}, r"targets.yaml:\d+: targets.aws.input_mode: "),
    "endless": ({}, {"max_runtime": "29d"}, r"targets.yaml:\d+: targets.aws.max_runtime: "),
}  # fmt: skip
"""What the job and the target say → what is said of it."""


@pytest.mark.parametrize("case", REFUSED)
def test_past_the_edge_one_clear_error_says_where(case: str, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text("pass\n")
    job, target, said = REFUSED[case]
    with pytest.raises((SpecError, UnsupportedError)) as error:
        front(tmp_path, job, target)
    assert re.search(said, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


WARNED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "grace": ({"resources": {"grace": "5m"}}, {}, "resources.grace: SageMaker gives 2m 00s, whatever the job asks for"),
    "spot": (
        {"resources": {"gpus": 1, "gpu": ["A10G", "L4"], "spot": True}},
        {},
        "resources.gpu: spot jobs name one instance type, here ml.g5.xlarge",
    ),
    "unknown": ({}, {"instance_types": ["ml.g9.xlarge"]}, "ml.g9.xlarge is no instance type in botocore "),
    "wait": ({"resources": {"max_wait": "1h"}}, {}, "resources.max_wait has no effect"),
    "fewer": (
        {"resources": {"gpus": 4}}, {"instance_types": ["ml.g5.xlarge"]}, "ml.g5.xlarge has 1 GPUs, fewer than",
    ),
    "more": ({"resources": {"gpus": 2}}, {"instance_types": ["ml.g5.12xlarge"]}, "4 GPUs, of which the job uses 2"),
    "member": (
        {}, {"overlay": {"StopingCondition": {}}}, "StopingCondition is no member of CreateTrainingJob in botocore ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_what_may_be_a_mistake_is_said_and_sent(case: str, tmp_path: Path) -> None:
    job, target, said = WARNED[case]
    plan = front(tmp_path, job, target)
    assert [warning for warning in plan.warnings if said in warning], plan.warnings


def test_one_type_with_gpus_is_enough_to_wait(tmp_path: Path) -> None:
    """botocore: it takes effect when the list includes at least one accelerated computing instance type."""
    waits = {"resources": {"gpus": 1, "max_wait": "1h"}}
    plan = front(tmp_path, waits, {"instance_types": ["ml.g5.xlarge", "ml.m5.xlarge"]})
    assert json.loads(plan.text)["StoppingCondition"]["MaxPendingTimeInSeconds"] == 3600
    assert not [warning for warning in plan.warnings if "max_wait" in warning]


def test_the_longest_timeout_is_sagemaker_s_own_limit(tmp_path: Path) -> None:
    runs = {
        asked: json.loads(front(tmp_path, {"resources": {"timeout": asked}}).text)["StoppingCondition"]
        for asked in ("1h", "28d")
    }
    assert runs == {"1h": {"MaxRuntimeInSeconds": 3600 + 900}, "28d": {"MaxRuntimeInSeconds": 28 * 86400}}
    foreign = front(tmp_path, {**FOREIGN, "resources": {"timeout": "1h"}})
    assert json.loads(foreign.text)["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600}
    spot = {"resources": {"timeout": "1h", "spot": True, "gpus": 1}}
    stopping = json.loads(front(tmp_path, spot).text)["StoppingCondition"]
    assert stopping == {"MaxRuntimeInSeconds": 4500, "MaxWaitTimeInSeconds": 4500 + 86400}


def test_what_nobody_has_given_is_listed_and_not_sent(tmp_path: Path) -> None:
    plan = front(tmp_path, {}, {"role": None, "output": None})
    assert plan.placeholders == (
        "the key role of target 'aws' (arn:aws:iam::000000000000:role/REPLACE-ME)",
        "the key output of target 'aws' (s3://REPLACE-ME/runs)",
    )
    check_request(json.loads(plan.text))
    refused = "the key role of target 'aws' .*must be given before this can be sent"
    assert_refused_before_sending(tmp_path, refused, image=IMAGE)


@pytest.mark.parametrize(
    ("image", "target", "missing"),
    [
        ("registry.example.com/trainer:1", {}, True),
        ("python:3.12", {}, True),
        ("12345678901.dkr.ecr.eu-west-1.amazonaws.com/x", {}, True),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn/x", {}, False),
        ("123456789012.dkr.ecr-fips.us-east-1.amazonaws.com/team/x:1", {}, False),
        ("registry.example.com/trainer:1", {"image_access": "Vpc", **VPC}, False),
    ],
)
def test_an_image_that_sagemaker_can_t_pull_is_not_sent(
    image: str, target: dict[str, Any], missing: bool, tmp_path: Path
) -> None:
    plan = front(tmp_path, {"image": image}, target)
    assert [said.startswith(f"an image in ECR ({image} is none; with `registry`") for said in plan.placeholders] == (
        [True] if missing else []
    )
    if missing:
        assert_refused_before_sending(tmp_path, r"an image in ECR .*must be given before this can be sent", image=image)


def assert_refused_before_sending(folder: Path, said: str, *, image: str) -> None:
    """No connection is opened, and no run is left in the ledger."""
    ledger = Ledger(folder / "ledger")
    with socket.create_server(("127.0.0.1", 0)) as server:
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
        os.environ |= {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        try:
            with pytest.raises(SpecError, match=said):
                submit(folder / "job.yaml", target="aws", ledger=ledger)
        finally:
            for name in (*keys, "AWS_ENDPOINT_URL"):
                del os.environ[name]
        assert select.select([server], [], [], 0)[0] == []
    assert ledger.ids() == []


OFFLINE = """
import socket, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("boto3", "botocore", "obstore"):
            raise AssertionError(f"{name} is imported")

def refuse(*words):
    raise AssertionError("something is asked over the network")

sys.meta_path.insert(0, Blocker())
socket.socket.connect = refuse
from launcher.cli import main
sys.exit(main())
"""


def test_render_needs_no_boto3_no_credentials_and_no_network(tmp_path: Path) -> None:
    write(tmp_path, {"data": {"train": "s3://bucket/train"}, "resources": {"gpus": 1}}, {"profile": "nobody"})
    arguments = ["render", "job.yaml", "--target", "aws"]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["AlgorithmSpecification"]["TrainingImage"] == TAGGED


def test_without_a_target_a_rendering_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "x", "image": IMAGE, "command": ["true"]}))
    plan = render(tmp_path / "job.yaml", backend="sagemaker")
    assert [said.partition(" of target")[0] for said in plan.placeholders] == ["the key role", "the key output"]


def test_what_it_may_cost_is_said(tmp_path: Path) -> None:
    job = {"resources": {"gpus": 8, "gpu": "A100", "nodes": 2, "timeout": "10h", "spot": True}}
    notes = front(tmp_path, job).notes
    assert notes[0].startswith("instance: 2 × ml.p4d.24xlarge: 8 × A100 (40 GB), 96 vCPU")
    assert notes[0].endswith(", spot")
    most = re.fullmatch(
        r"cost: at most about \$(\d+) if it runs until SageMaker's limit, 10h 15m; spot costs less", notes[1]
    )
    assert most and 400 < int(most[1]) < 700
    assert front(tmp_path, {}, {"instance_types": ["ml.g9.xlarge"]}).notes == ("instance: ml.g9.xlarge",)


def most_of(notes: tuple[str, ...]) -> float:
    return float(re.findall(r"at most about \$([\d.]+)", notes[-1])[0])


def test_what_several_instances_cost(tmp_path: Path) -> None:
    hour = {"resources": {"timeout": "10h"}}
    two = {"resources": {"timeout": "10h", "nodes": 2}}
    types = {"instance_types": ["ml.g5.xlarge", "ml.g5.2xlarge"]}
    one, both = front(tmp_path, hour, types).notes, front(tmp_path, two, types).notes
    assert [note.split(":")[1].strip() for note in both[:2]] == ["2 × ml.g5.xlarge", "2 × ml.g5.2xlarge"]
    assert most_of(both) == pytest.approx(2 * most_of(one), abs=1)
    groups = [
        {"InstanceGroupName": name, "InstanceType": f"ml.{name}", "InstanceCount": count}
        for name, count in (("g5.xlarge", 1), ("c5.4xlarge", 3))
    ]
    overlay = {"ResourceConfig": {"InstanceType": None, "InstanceCount": None, "InstanceGroups": groups}}
    notes = front(tmp_path, hour, {"overlay": overlay}).notes
    assert [note.split(":")[1].strip() for note in notes[:2]] == ["ml.g5.xlarge", "3 × ml.c5.4xlarge"]
    assert most_of(notes) == pytest.approx(10.25 * (1.408 + 3 * 0.816), abs=1)
