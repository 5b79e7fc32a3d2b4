"""The stand-in for SageMaker runs jobs under SageMaker's rules."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.services.aws import AwsCloud
from tests.services.aws.wire import Json

pytestmark = pytest.mark.needs("podman", "debootstrap")


def until(met: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Lab:
    """A bucket, and jobs of shell scripts in a small image."""

    def __init__(self, cloud: AwsCloud, image: str) -> None:
        self.cloud, self.uri, self.role = cloud, cloud.bucket(), cloud.role()
        self.image = cloud.reference("small")
        cloud.serve_image(self.image, image=image)
        self.sagemaker = cloud.client("sagemaker")

    def start(self, script: str | None, name: str = "tiny-1", **more: Any) -> None:
        """script: comes as a channel, as an argument takes 256 characters of one line; None: as the image has it."""
        algorithm: Json = {"TrainingImage": self.image, "TrainingInputMode": "File"}
        channels = more.pop("InputDataConfig", [])
        if script is not None:
            self.put(f"code/{name}/run", script)
            channels = [{"ChannelName": "code", "DataSource": source(f"{self.uri}/code/{name}/")}, *channels]
            algorithm |= {"ContainerEntrypoint": ["/bin/sh", "/opt/ml/input/data/code/run"]}
        if channels:
            more["InputDataConfig"] = channels
        request = {
            "TrainingJobName": name,
            "RoleArn": self.role,
            "AlgorithmSpecification": {**algorithm, **more.pop("AlgorithmSpecification", {})},
            "OutputDataConfig": {"S3OutputPath": f"{self.uri}/out"},
            "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
            "StoppingCondition": {"MaxRuntimeInSeconds": 600},
        }
        self.sagemaker.create_training_job(**{**request, **more})

    def ended(self, name: str = "tiny-1") -> Json:
        return self.cloud.wait(name)

    def lines(self, name: str = "tiny-1") -> list[str]:
        return [line for lines in self.cloud.lines(name).values() for line in lines]

    def until_line(self, line: str, name: str = "tiny-1") -> None:
        until(lambda: line in self.lines(name))

    def put(self, key: str, text: str) -> None:
        self.cloud.account.write(self.uri.removeprefix("s3://"), key, text.encode())

    def read(self, key: str) -> bytes:
        return self.cloud.account.read(self.uri.removeprefix("s3://"), key) or b""

    def keys(self, prefix: str = "") -> list[str]:
        return [entry.key for entry in self.cloud.account.objects(f"{self.uri}/{prefix}")]

    def archive(self, key: str) -> dict[str, str]:
        with tarfile.open(fileobj=io.BytesIO(self.read(key))) as archive:
            return {member.name: (archive.extractfile(member) or io.BytesIO()).read().decode() for member in archive}


@pytest.fixture
def lab(aws: AwsCloud, base_image: str) -> Iterator[Lab]:
    yield Lab(aws, base_image)


def states(said: Json) -> list[str]:
    return [state["Status"] for state in said["SecondaryStatusTransitions"]]


def source(uri: str, kind: str = "S3Prefix") -> Json:
    return {"S3DataSource": {"S3DataType": kind, "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}}


def test_a_job_gets_its_files_and_leaves_its_results(lab: Lab) -> None:
    lab.put("data/train/a/1.txt", "one")
    lab.put("data/train/2.txt", "two")
    lab.put("data/fast/3.txt", "three")
    script = """
    cd /opt/ml; find input -type f | sort; cat input/config/resourceconfig.json input/config/hyperparameters.json
    echo; echo $TRAINING_JOB_NAME $TRAINING_JOB_ARN ${AWS_REGION:-nowhere} $MINE; df -k /dev/shm | tail -1
    touch input/data/fast/4 2>&1 && echo writable
    touch input/data/train/4 && echo loss=0.5 && echo loss=0.25 && echo to stderr >&2
    echo m > model/m; mkdir output/data/rank-0; echo o > output/data/rank-0/o
    """
    channels = [
        {"ChannelName": "train", "DataSource": source(f"{lab.uri}/data/train")},
        {"ChannelName": "fast", "DataSource": source(f"{lab.uri}/data/fast/"), "InputMode": "FastFile"},
    ]
    lab.start(
        script, InputDataConfig=channels, HyperParameters={"lr": "1"}, Environment={"MINE": "a b"},
        AlgorithmSpecification={"MetricDefinitions": [{"Name": "loss", "Regex": "loss=([0-9.]+)"}]},
    )  # fmt: skip
    said = lab.ended()
    assert (said["TrainingJobStatus"], states(said)) == (
        "Completed", ["Starting", "Downloading", "Training", "Uploading", "Completed"],
    )  # fmt: skip
    lines = lab.lines()
    assert [line for line in lines if line.startswith("input/data")] == [
        f"input/data/{name}" for name in ("code/run", "fast/3.txt", "train/2.txt", "train/a/1.txt")
    ]
    written = next(line for line in lines if '"current_host"' in line)
    config, _ = json.JSONDecoder().raw_decode(written)
    assert (config["current_host"], config["hosts"]) == ("algo-1", ["algo-1"])
    assert f"tiny-1 {said['TrainingJobArn']} nowhere a b" in lines
    assert "writable" not in lines and "to stderr" in lines
    assert any(line.split()[1] == "65536" for line in lines if "/dev/shm" in line)
    assert [(m["MetricName"], m["Value"]) for m in said["FinalMetricDataList"]] == [("loss", 0.25)]
    assert said["ModelArtifacts"]["S3ModelArtifacts"] == f"{lab.uri}/out/tiny-1/output/model.tar.gz"
    assert lab.archive("out/tiny-1/output/model.tar.gz") == {"m": "m\n"}
    assert lab.archive("out/tiny-1/output/output.tar.gz") == {"rank-0/o": "o\n"}
    assert said["BillableTimeInSeconds"] >= 1


def test_failures(lab: Lab) -> None:
    """All at once: what went wrong stands in FailureReason."""
    long = "printf %02000d 0 > /opt/ml/output/failure; echo o > /opt/ml/output/data/o; echo m > /opt/ml/model/m; exit 3"
    lab.start(long, "written")
    lab.start("exit 4", "silent")
    lab.start(None, "train")
    lab.start("true", "image", AlgorithmSpecification={"TrainingImage": lab.cloud.reference("nothing")})
    lab.start("true", "tag", AlgorithmSpecification={"TrainingImage": lab.cloud.reference("small", "none")})
    lab.start("true", "data", InputDataConfig=[{"ChannelName": "a", "DataSource": source(f"{lab.uri}/none/")}])
    lab.start("true", "command", AlgorithmSpecification={"ContainerEntrypoint": ["/no/such/program"]})
    reasons = {name: lab.ended(name).get("FailureReason", "") for name in lab.cloud.names}
    assert reasons["written"].startswith("AlgorithmError: 000") and reasons["written"].endswith("0, exit code: 3")
    assert len(reasons["written"]) == 1024
    assert reasons["silent"] == "AlgorithmError: , exit code: 4"
    assert reasons["train"].startswith("AlgorithmError: CannotStartContainerError"), "`IMAGE train` is what runs"
    assert reasons["image"].startswith("ClientError: Cannot find repository: nothing in registry ID: 123456789012")
    assert reasons["tag"].startswith("ClientError: Cannot find image tag: none in repository: small")
    assert f'No S3 objects found under S3 URL "{lab.uri}/none/"' in reasons["data"]
    assert reasons["command"].startswith("AlgorithmError: CannotStartContainerError")
    assert '"train"' in reasons["train"]
    assert lab.keys("out/written") == ["out/written/output/output.tar.gz"], "a model is of jobs that completed"


def test_stop_grace_and_kill(lab: Lab) -> None:
    lab.cloud.hold("polite", "Stopping")
    lab.start("trap 'echo m > /opt/ml/model/m; exit 0' TERM; echo ready; while :; do sleep 0.05; done", "polite")
    lab.start("trap 'echo caught' TERM; echo ready; while :; do sleep 0.05; done", "deaf")
    for name, grace_s in (("polite", 120.0), ("deaf", 3.0)):
        lab.until_line("ready", name)
        lab.cloud.grace_s = grace_s
        lab.sagemaker.stop_training_job(TrainingJobName=name)
        assert lab.cloud.job(name)["TrainingJobStatus"] in ("Stopping", "Stopped")
    assert lab.cloud.job("polite")["TrainingJobStatus"] == "Stopping"
    lab.cloud.release("polite")
    for name in ("polite", "deaf"):
        said = lab.ended(name)
        assert (said["TrainingJobStatus"], states(said)[-3:]) == ("Stopped", ["Stopping", "Uploading", "Stopped"])
        assert "FailureReason" not in said
    assert lab.keys("out/") == ["out/polite/output/model.tar.gz"]
    assert "caught" in lab.lines("deaf")


def test_times_run_out(lab: Lab) -> None:
    wait = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    lab.cloud.grace_s = 1.0  # time may be up before the trap is set
    lab.start(wait, "long", StoppingCondition={"MaxRuntimeInSeconds": 1})
    lab.cloud.no_capacity("ml.p4d.24xlarge", "pend")
    spot = {"EnableManagedSpotTraining": True}
    never = {"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 1}
    limits = {"MaxRuntimeInSeconds": 1, "MaxWaitTimeInSeconds": 1}
    lab.start(wait, "never", ResourceConfig=never, StoppingCondition=limits, **spot)
    lab.start(wait, "pending", ResourceConfig=never)
    said = lab.ended("long")
    assert (said["TrainingJobStatus"], said["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")
    said = lab.ended("never")
    assert (said["TrainingJobStatus"], said["SecondaryStatus"]) == ("Stopped", "MaxWaitTimeExceeded")
    assert states(said)[0] == "Starting" and "Training" not in states(said)
    lab.cloud.wait("pending", "Pending")
    lab.cloud.give_up("pending")
    assert lab.ended("pending")["TrainingJobStatus"] == "Stopped"
    lab.cloud.no_capacity("ml.p4d.24xlarge", "fail")
    lab.start("true", "refused", ResourceConfig=never)
    assert lab.ended("refused")["FailureReason"].startswith("CapacityError: Unable to provision")


def test_checkpoints_come_back_after_an_interruption(lab: Lab) -> None:
    script = """
    cd /opt/ml/checkpoints; ls; touch gone; [ -f a ] && rm a && echo second > b && exit 0
    trap 'echo last > last; exit 0' TERM
    echo first > a; echo ready; rm gone; while :; do sleep 0.05; done
    """
    lab.start(
        script, CheckpointConfig={"S3Uri": f"{lab.uri}/kept"}, EnableManagedSpotTraining=True,
        StoppingCondition={"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 600},
    )  # fmt: skip
    lab.until_line("ready")
    until(lambda: lab.keys("kept/") == ["kept/a"])
    lab.cloud.interrupt("tiny-1")
    said = lab.ended()
    assert states(said) == [
        *("Starting", "Downloading", "Training", "Interrupted"),
        *("Starting", "Downloading", "Training", "Uploading", "Completed"),
    ]
    first, second = lab.cloud.lines("tiny-1").values()
    assert "ready" in first and second == ["a", "last"]
    assert lab.keys("kept/") == ["kept/b", "kept/gone", "kept/last"]


def test_files_that_are_synced_have_marks_beside_them(lab: Lab) -> None:
    script = """
    cd /opt/ml/checkpoints; mkdir 1; echo one > 1/a; echo mine > b.sagemaker-ignore
    until [ -f 1/a.sagemaker-uploaded ]; do sleep 0.02; done; find . -type f | sort
    rm 1/a; while [ -f 1/a.sagemaker-uploaded ]; do sleep 0.02; done; ls 1 | wc -l; echo two > c
    """
    lab.start(script, CheckpointConfig={"S3Uri": f"{lab.uri}/kept"})
    assert lab.ended()["TrainingJobStatus"] == "Completed"
    marked = [line for line in lab.lines() if not line.startswith("./1/a.sagemaker-uploading")]
    assert marked == ["./1/a", "./1/a.sagemaker-uploaded", "./b.sagemaker-ignore", "0"]
    assert lab.keys("kept/") == ["kept/c"]


def test_what_the_platform_mounts_is_root_s(lab: Lab) -> None:
    lab.start("cd /opt/ml; stat -c '%A %u %n' . input/config model output output/data checkpoints")
    assert lab.ended()["TrainingJobStatus"] == "Completed"
    assert all(line.startswith("drwxr-xr-x 0 ") for line in lab.lines()), lab.lines()


def test_two_instances_know_each_other(lab: Lab) -> None:
    lab.cloud.late_names_s = 600
    script = """
    until getent hosts algo-1 >/dev/null; do echo not yet; sleep 0.05; done; getent hosts algo-1 algo-2
    host=$(grep -o 'current_host": "algo-[0-9]' /opt/ml/input/config/resourceconfig.json | tail -c 7)
    echo $host > /opt/ml/output/data/$host; echo $host > /opt/ml/model/same
    """
    two = {"InstanceType": "ml.g5.xlarge", "InstanceCount": 2}
    output = {"S3OutputPath": f"{lab.uri}/out/", "CompressionType": "NONE"}
    lab.start(script, ResourceConfig=two, OutputDataConfig=output)
    until(lambda: ["not yet" in lines for lines in lab.cloud.lines("tiny-1").values()] == [True, True])
    lab.cloud.late_names_s = 0
    said = lab.ended()
    assert said["ModelArtifacts"]["S3ModelArtifacts"] == f"{lab.uri}/out/tiny-1/output/model/"
    assert lab.keys("out/") == [f"out/tiny-1/output/{n}" for n in ("data/algo-1", "data/algo-2", "model/same")]
    for stream, lines in lab.cloud.lines("tiny-1").items():
        assert stream.startswith(("tiny-1/algo-1-", "tiny-1/algo-2-")) and "not yet" in lines
        assert [line.split()[1] for line in lines[-2:]] == ["algo-1", "algo-2"]
        assert all(line.startswith("127.") for line in lines[-2:])


def test_one_that_fails_ends_the_other(lab: Lab) -> None:
    two = {"InstanceType": "ml.g5.xlarge", "InstanceCount": 2}
    script = "grep -q 'current_host\": \"algo-1' /opt/ml/input/config/resourceconfig.json && exit 7; sleep 100"
    lab.start(script, ResourceConfig=two)
    assert lab.ended()["FailureReason"] == "AlgorithmError: , exit code: 7"


def test_all_instances_have_their_grace(lab: Lab) -> None:
    lab.start(
        "trap 'exit 143' TERM; grep -q 'current_host\": \"algo-1' /opt/ml/input/config/resourceconfig.json || "
        "trap 'sleep 0.5; echo slow > /opt/ml/model/slow; exit 143' TERM; echo ready; while :; do sleep 0.05; done",
        ResourceConfig={"InstanceType": "ml.g5.xlarge", "InstanceCount": 2},
    )
    until(lambda: lab.lines() == ["ready", "ready"])
    lab.sagemaker.stop_training_job(TrainingJobName="tiny-1")
    assert lab.ended()["TrainingJobStatus"] == "Stopped"
    assert lab.archive("out/tiny-1/output/model.tar.gz") == {"slow": "slow\n"}
    lab.sagemaker.delete_training_job(TrainingJobName="tiny-1")
    lab.start("echo again")
    assert lab.ended()["TrainingJobStatus"] == "Completed", "a name can be used again"


def test_network_isolation(lab: Lab) -> None:
    lab.start("env; cat /proc/net/dev", EnableNetworkIsolation=True)
    assert lab.ended()["TrainingJobStatus"] == "Completed"
    lines = lab.lines()
    assert not [line for line in lines if "eth0" in line or line.startswith("AWS_CONTAINER")]


def test_hold_crash_and_retry(lab: Lab) -> None:
    lab.cloud.hold("tiny-1", "Downloading")
    lab.start("echo ready; sleep 1000", RetryStrategy={"MaximumRetryAttempts": 1})
    lab.cloud.wait("tiny-1", "Downloading")
    assert lab.lines() == []
    lab.cloud.fail_internally("tiny-1")
    assert lab.cloud.wait("tiny-1", "Downloading")["TrainingJobStatus"] == "InProgress"
    lab.cloud.release("tiny-1")
    lab.until_line("ready")
    lab.cloud.fail_internally("tiny-1")
    said = lab.ended()
    assert said["FailureReason"].startswith("InternalServerError: ")
    assert states(said).count("Restarting") == 1


def test_keys_of_the_role_are_renewed(lab: Lab, trainer_image: str) -> None:
    script = """
import boto3, botocore.session
one, two = (botocore.session.Session().get_credentials().get_frozen_credentials().access_key for _ in range(2))
print(one != two, boto3.client("sts", region_name="eu-west-1").get_caller_identity()["Arn"])
"""
    lab.cloud.serve_image(lab.cloud.reference(), image=trainer_image)
    command = ["/opt/venv/bin/python", "/opt/ml/input/data/code/run"]
    lab.start(script, AlgorithmSpecification={"TrainingImage": lab.cloud.reference(), "ContainerEntrypoint": command})
    lab.ended()
    assert lab.lines() == ["True arn:aws:sts::123456789012:assumed-role/trainer/SageMaker"], lab.lines()[-1]
    assert len(lab.cloud.keys("tiny-1")) == 3


def test_clear_ends_what_runs(lab: Lab) -> None:
    lab.start("echo ready; sleep 1000")
    lab.until_line("ready")
    began = time.monotonic()
    lab.cloud.clear()
    assert time.monotonic() - began < 60 and lab.cloud.names == []
