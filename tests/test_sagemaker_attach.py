"""`attach` of SageMaker's training jobs: those of ours that somebody else has sent, and those of other tools."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import (
    AuthError,
    ConflictError,
    IntegrityError,
    Run,
    SpecError,
    State,
    Status,
    UnsupportedError,
    attach,
    render,
    runs,
    submit,
)
from launcher.backends.base import Handle, LogLine
from launcher.contract import JOB, RESULT
from launcher.ledger import Ledger
from launcher.masking import HIDDEN
from launcher.sagemaker.adoption import adopt_foreign
from launcher.sagemaker.client import Access, Account
from launcher.sagemaker.request import PLAN_SHA
from tests.cli_tool import cli, cli_json
from tests.services.aws import AwsCloud

Json = dict[str, Any]

IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/cvlaunch/trainer:test"
SDK_NAME = "pytorch-training-2026-11-22-10-11-12-123"
SECRET = "xyzzy-canary"


@pytest.fixture
def project(tmp_path: Path, aws: AwsCloud, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job and a target, in the current folder; an account whose jobs run nothing, but for one."""
    for prefix in ("again", "by-hand", "mine", "pytorch", "shared"):
        aws.script(prefix)
    aws.bucket("attach"), aws.bucket("data")
    for key in held(aws):  # of an earlier test
        aws.client("s3").delete_object(Bucket="attach", Key=key)
    target = {"backend": "sagemaker", "region": "eu-west-1", "role": aws.role(), "output": "s3://attach/ours"}
    folder = tmp_path / "project"
    folder.mkdir()
    targets = {"aws": {**target, "storage": {"endpoint": aws.endpoint}}}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": targets}))
    job = {"name": "by hand", "image": IMAGE, "command": ["python", "-c", "print('hi')"], "tags": {"team": "vision"}}
    (folder / "job.yaml").write_text(yaml.safe_dump({**job, "env": {"LR": "0.1"}, "resources": {"timeout": "1h"}}))
    monkeypatch.chdir(folder)
    return folder


def put(aws: AwsCloud, files: Mapping[str, bytes]) -> None:
    """Into the bucket `attach`."""
    for key, data in files.items():
        aws.client("s3").put_object(Bucket="attach", Key=key, Body=data)


def held(aws: AwsCloud) -> list[str]:
    return [entry["Key"] for entry in aws.client("s3").list_objects_v2(Bucket="attach").get("Contents", ())]


def packed(files: Mapping[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return memory.getvalue()


# -- ours, sent by somebody else --------------------------------------------------------------------------------------


def theirs(project: Path, run_id: str) -> Run:
    """A run in somebody else's ledger."""
    return submit("job.yaml", target="aws", run_id=run_id, ledger=Ledger(project / "theirs", project / "cache"))


def rendered(aws: AwsCloud, run_id: str) -> Json:
    """What was posted, less the tag that no rendering has."""
    body = aws.posted(run_id)
    return {**body, "Tags": [tag for tag in body["Tags"] if tag["Key"] != PLAN_SHA]}


def sent_by_hand(project: Path, aws: AwsCloud, run_id: str) -> Json:
    """`aws sagemaker create-training-job --cli-input-json`, with job.json where the rendering says."""
    theirs(project, run_id)
    body = rendered(aws, run_id)
    aws.finish(run_id), aws.client("sagemaker").delete_training_job(TrainingJobName=run_id)
    aws.client("sagemaker").create_training_job(**body)
    return body


def test_a_rendering_that_was_sent_by_hand_is_a_run_like_any_other(project: Path, aws: AwsCloud) -> None:
    body = sent_by_hand(project, aws, "by-hand-1")
    render = cli("render", "job.yaml", "--target", "aws", "--run-id", "by-hand-1", cwd=project)
    assert json.loads(render.stdout) == body
    done = cli("attach", "by-hand-1", "--target", "aws", cwd=project)
    assert (done.returncode, done.stdout) == (0, "sagemaker://aws/by-hand-1\n"), done.stderr
    run = Run("by-hand-1")
    assert json.loads(run.record.plan["text"]) == body
    assert (run.output, run.record.name, run.record.tags) == (
        "s3://attach/ours/by-hand-1",
        "by hand",
        {"team": "vision"},
    )
    assert run.status().state is State.STARTING
    aws.enter("by-hand-1", "Training")
    run.cancel()
    assert run.status().state is State.CANCELLED
    assert "ours/by-hand-1/control/cancel" in held(aws)


def test_a_colleague_s_run_is_the_same_run(project: Path, aws: AwsCloud) -> None:
    sent = theirs(project, "shared-1")
    ours = attach(sent.id, target="aws")
    assert (ours.handle, ours.output) == (sent.handle, sent.output)
    assert json.loads(ours.record.plan["text"]) == json.loads(sent.record.plan["text"])
    assert sent.diff(ours).identical
    result = {"state": "FAILED", "exit_code": 3, "reason": "no luck", "native_id": aws.job(ours.id)["TrainingJobArn"]}
    put(aws, {f"ours/{ours.id}/{RESULT}": json.dumps(result).encode()})
    aws.finish(ours.id, "Failed", reason="AlgorithmError: no luck, exit code: 3")
    assert (ours.status().state, ours.status().exit_code) == (State.FAILED, 3)


def test_a_foreign_image_stays_one(project: Path, aws: AwsCloud) -> None:
    (project / "job.yaml").write_text(
        yaml.safe_dump({"name": "x", "image": IMAGE, "runner": "none", "env": {"A": "1"}})
    )
    sent = theirs(project, "shared-2")
    ours = attach("shared-2", target="aws")
    assert ours.record.job["spec"]["runner"] == "none"
    assert json.loads(ours.record.plan["text"]) == json.loads(sent.record.plan["text"])
    assert sent.diff(ours).identical


def test_of_a_run_that_was_resumed_the_newest_job_is_taken_and_the_next_is_the_third(
    project: Path, aws: AwsCloud
) -> None:
    sent = theirs(project, "again-1")
    aws.finish("again-1", "Failed", reason="InternalServerError")
    assert sent.status().state is State.ERROR
    sent.resume()
    ours = attach("again-1", target="aws")
    assert (str(ours.handle), ours.record.attempt) == ("sagemaker://aws/again-1-2", 2)
    assert json.loads(ours.record.plan["text"]) == json.loads(sent.record.plan["text"])
    assert attach("again-1-2", target="aws").id == "again-1"
    aws.finish("again-1-2", "Failed", reason="InternalServerError")
    assert ours.status().state is State.ERROR
    assert str(ours.resume().handle) == "sagemaker://aws/again-1-3"


def test_a_job_of_ours_whose_tags_nobody_may_read_is_known_by_its_variables(project: Path, aws: AwsCloud) -> None:
    body = sent_by_hand(project, aws, "by-hand-2")
    aws.fail("ListTags", "AccessDeniedException", "not authorized to perform: sagemaker:ListTags", times=None)
    run = attach("by-hand-2", target="aws")
    assert run.id == "by-hand-2"
    assert json.loads(run.record.plan["text"]) == {key: value for key, value in body.items() if key != "Tags"}


def test_a_job_without_network_is_taken_in_before_it_has_written_anything(project: Path, aws: AwsCloud) -> None:
    targets = yaml.safe_load((project / "targets.yaml").read_text())
    targets["targets"]["aws"]["network_isolation"] = True
    (project / "targets.yaml").write_text(yaml.safe_dump(targets))
    sent = theirs(project, "shared-3")
    ours = attach("shared-3", target="aws")
    assert (ours.id, ours.output) == (sent.id, sent.output)
    aws.finish("shared-3")
    assert ours.status().state is State.SUCCEEDED


@pytest.mark.parametrize(
    ("left", "kind", "message"),
    [
        (None, SpecError, "s3://attach/ours/by-hand-3 has no input/config/job.json"),
        (b"{}", IntegrityError, "is not the one that by-hand-3 was sent with"),
    ],
)
def test_job_json_must_be_the_one_that_was_sent(
    project: Path, aws: AwsCloud, left: bytes | None, kind: type[Exception], message: str
) -> None:
    sent_by_hand(project, aws, "by-hand-3")
    aws.client("s3").delete_object(Bucket="attach", Key=f"ours/by-hand-3/{JOB}")
    put(aws, {f"ours/by-hand-3/{JOB}": left} if left else {})
    with pytest.raises(kind, match=message):
        attach("by-hand-3", target="aws")
    assert Ledger().ids() == []


def test_another_run_of_the_same_id_is_not_overwritten(project: Path, aws: AwsCloud) -> None:
    submit("job.yaml", target="aws", run_id="mine-1")
    aws.client("sagemaker").create_training_job(**{**rendered(aws, "mine-1"), "TrainingJobName": "mine-1-copy"})
    with pytest.raises(ConflictError, match=r"there is a run 'mine-1' already \(sagemaker://aws/mine-1\)"):
        attach("mine-1-copy", target="aws")


# -- made elsewhere ---------------------------------------------------------------------------------------------------


def foreign(aws: AwsCloud, name: str = SDK_NAME, **changes: Any) -> str:
    """As SageMaker's SDK would send it. changes: of members; None takes one away."""
    body: Json = {
        "TrainingJobName": name,
        "RoleArn": aws.role(),
        "AlgorithmSpecification": {
            "TrainingImage": "763104351884.dkr.ecr.eu-west-1.amazonaws.com/pytorch-training:2.8-gpu-py312",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python", "train.py"],
            "ContainerArguments": ["--epochs", "3", "--api-key", SECRET, f"--hub-token={SECRET}"],
            "EnableSageMakerMetricsTimeSeries": True,
        },
        "HyperParameters": {"epochs": "3", "hf_token": SECRET},
        "Environment": {"LR": "0.1", "WANDB_API_KEY": SECRET, "DATABASE": f"postgres://me:{SECRET}@db/x"},
        "InputDataConfig": [
            {
                "ChannelName": "training",
                "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://data/train/"}},
                "CompressionType": "None",
            }
        ],
        "OutputDataConfig": {"S3OutputPath": "s3://attach/theirs/"},
        "CheckpointConfig": {"S3Uri": "s3://attach/checkpoints/"},
        "ResourceConfig": {"InstanceType": "ml.g5.12xlarge", "InstanceCount": 2, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 600},
        "Tags": [{"Key": "team", "Value": "vision"}],
    }
    body = {key: value for key, value in {**body, **changes}.items() if value is not None}
    aws.client("sagemaker").create_training_job(**body)
    return name


def finished(aws: AwsCloud, name: str) -> None:
    """With what the platform leaves."""
    aws.enter(name, "Training")
    aws.say(name, "epoch 1 loss 0.5", "2026-01-01T00:00:00.000Z epoch 2")
    put(
        aws,
        {
            f"theirs/{name}/output/model.tar.gz": packed({"model.pt": b"weights", "code/train.py": b"pass"}),
            f"theirs/{name}/output/output.tar.gz": packed({"plot.png": b"png"}),
            f"theirs/{name}/debug-output/x": b"not ours to know",
            "checkpoints/epoch-1.pt": b"halfway",
        },
    )
    aws.finish(name)


def test_every_command_knows_a_job_of_the_sdk(project: Path, aws: AwsCloud) -> None:
    done = cli("attach", foreign(aws), "--target", "aws", cwd=project)
    assert (done.returncode, done.stdout) == (0, f"sagemaker://aws/{SDK_NAME}\n")
    said = done.stderr
    assert "checkpoints: s3://attach/checkpoints\n" in said and "not kept, because named like secrets: WANDB" in said
    finished(aws, SDK_NAME)
    before = held(aws)
    watched = cli("watch", "last", cwd=project)
    assert watched.returncode == 0, watched.stderr
    assert "epoch 1 loss 0.5" in watched.stdout + watched.stderr
    facts = cli_json("status", "last", cwd=project)
    assert (facts["state"], facts["native"], facts["name"]) == ("SUCCEEDED", "Completed", "pytorch-training")
    assert facts["output"] == f"s3://attach/theirs/{SDK_NAME}/output"
    assert cli("report", "last", cwd=project).returncode == 0
    (run,) = runs()
    assert [line.text for line in run.logs()] == ["epoch 1 loss 0.5", "2026-01-01T00:00:00.000Z epoch 2"]
    assert run.metrics().points == ()
    assert held(aws) == before


@pytest.mark.needs("podman", "debootstrap")
def test_a_job_of_the_sdk_is_followed_from_its_first_line_to_its_results(
    project: Path, aws: AwsCloud, base_image: str
) -> None:
    aws.serve_image(image := aws.reference("small"), image=base_image)
    script = "echo begun; echo w >/opt/ml/model/w.pt; mkdir -p /opt/ml/output/data; echo d >/opt/ml/output/data/d"
    algorithm = {"TrainingImage": image, "TrainingInputMode": "File", "ContainerEntrypoint": ["/bin/sh", "-c", script]}
    run = attach(foreign(aws, "real-1", AlgorithmSpecification=algorithm, InputDataConfig=None), target="aws")
    events = list(run.follow(sleep=lambda pause: time.sleep(0.05)))
    assert "begun" in [event.text for event in events if isinstance(event, LogLine)]
    assert isinstance(events[-1], Status) and events[-1].state is State.SUCCEEDED
    folder = run.sync(project / "home").path
    assert (folder / "model/w.pt").read_text() == "w\n"
    assert (folder / "output/data/d").read_text() == "d\n"


def test_its_results_come_home_in_our_layout_and_only_once(project: Path, aws: AwsCloud, tmp_path: Path) -> None:
    run = attach(foreign(aws), target="aws")
    assert run.sync(tmp_path / "home").files == 0
    finished(aws, SDK_NAME)
    report = run.sync(tmp_path / "home")
    found = {
        path.relative_to(report.path).as_posix(): path.read_bytes()
        for path in report.path.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert found == {
        "model/model.pt": b"weights",
        "model/code/train.py": b"pass",
        "output/data/plot.png": b"png",
        "checkpoints/epoch-1.pt": b"halfway",
    }
    again = run.sync(tmp_path / "home")
    assert (again.files, again.skipped) == (0, 4)
    alone = run.sync(tmp_path / "models", include=["model/model.pt"])
    assert [path.name for path in alone.path.rglob("*.pt")] == ["model.pt"]


def test_what_was_not_packed_comes_home_too(project: Path, aws: AwsCloud, tmp_path: Path) -> None:
    name = foreign(
        aws, OutputDataConfig={"S3OutputPath": "s3://attach/theirs", "CompressionType": "NONE"}, CheckpointConfig=None
    )
    put(aws, {f"theirs/{name}/output/model/a/b.pt": b"b", f"theirs/{name}/output/data/c.txt": b"c"})
    report = attach(name, target="aws").sync(tmp_path / "home")
    assert (report.path / "model/a/b.pt").read_bytes() == b"b"
    assert (report.path / "output/data/c.txt").read_bytes() == b"c"


def test_nothing_is_written_into_its_places(project: Path, aws: AwsCloud) -> None:
    run = attach(foreign(aws), target="aws")
    put(aws, {"theirs/x": b"x", "checkpoints/y": b"y"})
    aws.enter(SDK_NAME, "Training")
    before, done_before = held(aws), len(aws.calls)
    events = run.follow(sleep=lambda pause: None)
    next(events)
    assert run.cancel().state is State.CANCELLED
    list(events)
    assert aws.count("StopTrainingJob") == 1
    with pytest.raises(UnsupportedError, match="its job and results are not deleted; leave out --remote"):
        run.remove(remote=True)
    refused = cli("rm", "--remote", "--yes", run.id, cwd=project)
    assert (refused.returncode, "not deleted" in refused.stderr) == (2, True)
    for change in (lambda: run.store().write("control/x", b""), lambda: run.store().delete(["checkpoints/y"])):
        with pytest.raises(UnsupportedError, match="is read, never changed"):
            change()
    run.remove()
    assert (held(aws), Ledger().ids(), aws.count("DeleteTrainingJob")) == (before, [], 0)
    assert not any(call.operation in ("PutObject", "DeleteObject", "DeleteObjects") for call in aws.calls[done_before:])


def test_what_may_be_a_secret_is_not_kept(project: Path, aws: AwsCloud, home: Path) -> None:
    run = attach(foreign(aws), target="aws")
    assert all(SECRET.encode() not in path.read_bytes() for path in home.rglob("*") if path.is_file())
    job = run.record.job["job_file"]
    assert job["env"] == {"LR": "0.1", "WANDB_API_KEY": HIDDEN, "DATABASE": "postgres://me:…@db/x"}
    assert [*job["command"]] == ["python", "train.py", "--epochs", "3", "--api-key", HIDDEN, f"--hub-token={HIDDEN}"]
    assert json.loads(run.record.plan["text"])["HyperParameters"] == {"epochs": "3", "hf_token": HIDDEN}


def test_what_is_known_of_it(project: Path, aws: AwsCloud) -> None:
    record = attach(foreign(aws), target="aws").record
    job, sent = record.job["job_file"], json.loads(record.plan["text"])
    assert (job["nodes"], job["gpus"], job["timeout_s"], record.tags) == (2, 4, 600, {"team": "vision"})
    assert [(channel["name"], channel["uri"]) for channel in job["channels"]] == [("training", "s3://data/train/")]
    assert record.plan["unpinned"] == [
        "data.training: no manifest",
        f"image: {job['image']['reference']} is not pinned",
        "code: nobody knows what it ran",
    ]
    assert sent["AlgorithmSpecification"]["EnableSageMakerMetricsTimeSeries"] is True
    assert "CompressionType" not in sent["InputDataConfig"][0]
    assert not {"TrainingJobArn", "CreationTime", "SecondaryStatus", "EnableNetworkIsolation"} & sent.keys()


_DESCRIBED: Json = {
    "TrainingJobName": "x-1",
    "TrainingJobArn": "arn:aws:sagemaker:eu-west-1:123456789012:training-job/x-1",
    "CreationTime": datetime(2026, 1, 1, tzinfo=UTC),
    "AlgorithmSpecification": {"TrainingImage": "r/t:1", "TrainingInputMode": "File"},
    "OutputDataConfig": {"S3OutputPath": "s3://attach/theirs"},
    "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
}

_KINDS: Mapping[str, tuple[Json, Callable[[Json], object], object]] = {
    "an algorithm of AWS": (
        {"AlgorithmSpecification": {"AlgorithmName": "xgb", "TrainingInputMode": "File"}},
        lambda job: (job["image"]["reference"], job["command"]),
        ("xgb", None),
    ),
    "a pinned image": (
        {"AlgorithmSpecification": {"TrainingImage": f"r/t@sha256:{'0' * 64}", "TrainingInputMode": "File"}},
        lambda job: job["image"]["digest"],
        f"sha256:{'0' * 64}",
    ),
    "a file system": (
        {
            "InputDataConfig": [
                {
                    "ChannelName": "training",
                    "DataSource": {
                        "FileSystemDataSource": {
                            "FileSystemType": "FSxLustre",
                            "FileSystemId": "fs-0123456789a",
                            "FileSystemAccessMode": "ro",
                            "DirectoryPath": "/fsx/train",
                        }
                    },
                }
            ]
        },
        lambda job: job["channels"][0]["uri"],
        "fsxlustre://fs-0123456789a/fsx/train",
    ),
    "groups of instances": (
        {
            "ResourceConfig": {
                "InstanceGroups": [
                    {"InstanceType": "ml.g5.xlarge", "InstanceCount": 2, "InstanceGroupName": "gpu"},
                    {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "InstanceGroupName": "cpu"},
                ]
            }
        },
        lambda job: (job["nodes"], job["gpus"]),
        (3, 1),
    ),
    "acceptable types": (
        {
            "ResourceConfig": {
                "InstancePreferences": [
                    {"InstanceType": "ml.g6.xlarge", "InstanceCount": 2},
                    {"InstanceType": "ml.g5.xlarge", "InstanceCount": 2},
                ]
            }
        },
        lambda job: (job["nodes"], job["gpus"]),
        (2, 1),
    ),
    "a type that nobody knows": (
        {"ResourceConfig": {"InstanceType": "ml.x99.large", "InstanceCount": 1}},
        lambda job: (job["nodes"], job["gpus"]),
        (1, 0),
    ),
    "nothing but what must be": (
        dict.fromkeys(("InputDataConfig", "Environment", "HyperParameters", "CheckpointConfig", "Tags")),
        lambda job: (job["channels"], job["env"]),
        ([], {}),
    ),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_jobs_of_all_kinds_are_described(kind: str) -> None:
    changes, facts, expected = _KINDS[kind]
    described = {key: value for key, value in {**_DESCRIBED, **changes}.items() if value is not None}
    found = adopt_foreign(
        Handle("sagemaker", "aws", "x-1"), described, {}, account=Account(Access(region="eu-west-1"), "aws")
    )
    assert facts(json.loads(found.job.to_bytes())) == expected


def test_a_variable_of_another_tool_does_not_count_submissions(project: Path, aws: AwsCloud) -> None:
    """Nor keeps a look at it, and at all that are looked at with it, from an answer."""
    run = attach(foreign(aws, Environment={"CVLAUNCH_SUBMISSION": "first"}), target="aws")
    aws.finish(SDK_NAME)
    status = run.status()
    assert (status.state, status.attempt) == (State.SUCCEEDED, 1)


def test_all_who_take_it_in_call_it_the_same(project: Path, aws: AwsCloud) -> None:
    mine, another = (
        attach(foreign(aws), target="aws"),
        attach(foreign(aws, SDK_NAME.replace("123", "124")), target="aws"),
    )
    other_ledger = Ledger(project / "theirs", project / "cache")
    assert re.fullmatch(r"pytorch-training-[0-9a-v]{10}", mine.id)
    assert mine.id == attach(SDK_NAME, target="aws", ledger=other_ledger).id
    assert mine.id == attach(aws.job(SDK_NAME)["TrainingJobArn"], target="aws").id
    assert mine.id < another.id


def test_its_results_are_data_for_other_jobs(project: Path, aws: AwsCloud) -> None:
    run = attach(foreign(aws), target="aws")
    text = render("job.yaml", target="aws", settings=[f"data.init=run://{run.id}", f"data.x=run://{run.id}/model"]).text
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in json.loads(text)["InputDataConfig"]}
    assert channels == {"init": f"{run.output}/", "x": f"{run.output}/model/"}


def test_it_can_t_be_sent_again(project: Path, aws: AwsCloud) -> None:
    run = attach(foreign(aws), target="aws")
    aws.finish(SDK_NAME, "Failed", reason="AlgorithmError: ExecuteUserScriptError:\nExitCode 1")
    status = run.status()
    assert (status.state, status.exit_code) == (State.FAILED, 1)
    with pytest.raises(UnsupportedError, match=r"made without cvlaunch.*write a job file"):
        run.rerun()
    with pytest.raises(UnsupportedError, match="can't be resumed"):
        run.resume()
    with pytest.raises(UnsupportedError, match="SageMaker has no such call"):
        run.exec(["ls"])


# -- what can't be taken in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch-training-2026-11-22-10-11-12-12", f"in region eu-west-1; did you mean '{SDK_NAME}'"),
        ("nobody-1", "there is no training job 'nobody-1' in region eu-west-1; one of another region needs a target"),
        ("../../etc", "there is no training job '../../etc': a name has"),
        (f"arn:aws:sagemaker:eu-central-1:123456789012:training-job/{SDK_NAME}", "a target with region: eu-central-1"),
    ],
)
def test_a_job_that_is_not_there(project: Path, aws: AwsCloud, name: str, message: str) -> None:
    foreign(aws)
    with pytest.raises(SpecError, match=re.escape(message)):
        attach(name, target="aws")


def test_who_may_not_list_jobs_gets_no_names(project: Path, aws: AwsCloud) -> None:
    foreign(aws)
    aws.fail("ListTrainingJobs", "AccessDeniedException", "not authorized to perform: sagemaker:ListTrainingJobs")
    with pytest.raises(SpecError, match=r"in region eu-west-1; one of another"):
        attach(f"{SDK_NAME}4", target="aws")


def test_who_may_not_describe_jobs_is_told_what_is_missing(project: Path, aws: AwsCloud) -> None:
    aws.fail("DescribeTrainingJob", "AccessDeniedException", "not authorized to perform: sagemaker:DescribeTrainingJob")
    done = cli("attach", foreign(aws), "--target", "aws", cwd=project)
    assert (done.returncode, "you may not do sagemaker:DescribeTrainingJob" in done.stderr) == (
        AuthError.exit_code,
        True,
    )
    assert "cvlaunch targets policy aws" in done.stderr
