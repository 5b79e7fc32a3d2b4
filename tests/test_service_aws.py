"""The stand-in for AWS is as strict as AWS, and runs what it is given."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest

from tests.services.aws import AwsCloud

Json = dict[str, Any]

pytestmark = pytest.mark.needs("podman")


@pytest.fixture
def image(aws: AwsCloud, trainer_image: str) -> str:
    """Reference of an image with Python."""
    reference = aws.reference()
    aws.serve_image(reference, image=trainer_image)
    return reference


def body(aws: AwsCloud, script: str, *, name: str = "tiny-1", image: str = "", **more: Any) -> Json:
    """Of CreateTrainingJob, for a job that runs this shell script."""
    bucket = aws.bucket()
    return {
        "TrainingJobName": name,
        "RoleArn": aws.role(),
        "AlgorithmSpecification": {
            "TrainingImage": image or aws.reference(),
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/sh", "-c", script],
        },
        "OutputDataConfig": {"S3OutputPath": f"{bucket}/out"},
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 600},
        **more,
    }


def test_a_job_runs_and_leaves_its_results(aws: AwsCloud, image: str) -> None:
    sagemaker, s3, logs = aws.client("sagemaker"), aws.client("s3"), aws.client("logs")
    script = "echo hello; echo m > /opt/ml/model/m; mkdir /opt/ml/output/data/a; echo o > /opt/ml/output/data/a/o"
    sagemaker.create_training_job(**body(aws, script, image=image))
    aws.wait("tiny-1", "Completed")
    said = sagemaker.describe_training_job(TrainingJobName="tiny-1")
    states = [state["Status"] for state in said["SecondaryStatusTransitions"]]
    assert states == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    bucket = said["OutputDataConfig"]["S3OutputPath"].split("/")[2]
    assert said["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{bucket}/out/tiny-1/output/model.tar.gz"
    data = s3.get_object(Bucket=bucket, Key="out/tiny-1/output/output.tar.gz")["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["a/o"]
    group = "/aws/sagemaker/TrainingJobs"
    (stream,) = logs.describe_log_streams(logGroupName=group, logStreamNamePrefix="tiny-1/")["logStreams"]
    events = logs.get_log_events(logGroupName=group, logStreamName=stream["logStreamName"], startFromHead=True)
    assert [event["message"] for event in events["events"]] == ["hello"]
