"""SageMaker at the wire, whose instances are containers of Podman; S3, logs and secrets are moto's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.base import Handle
from launcher.contract import JOB
from launcher.rules import RULES
from launcher.sagemaker.catalogue import instance_type
from launcher.sagemaker.request import PLAN_SHA
from launcher.testing import ContainerFacts
from tests.services.aws import AwsCloud

__all__ = ["IMAGE", "SageMakerWorld", "facts_of", "sagemaker_world"]

IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/cvlaunch/trainer:test"


class SageMakerWorld:
    """A bucket and a role of its own. keys: of the target, besides."""

    backend = "sagemaker"
    patience = 300.0

    def __init__(self, cloud: AwsCloud, *, image: str, **keys: Any) -> None:
        self.cloud, self._keys = cloud, keys
        self.bucket = f"vision-{secrets.token_hex(4)}"
        cloud.bucket(self.bucket)
        cloud.serve_image(IMAGE, image=image)
        self._role = cloud.role()

    @property
    def environment(self) -> Mapping[str, str]:
        """What the commands of this test's processes need."""
        return self.cloud.environment

    @property
    def target(self) -> Mapping[str, Any]:
        return {
            "backend": self.backend,
            "region": "eu-west-1",
            "role": self._role,
            "output": f"s3://{self.bucket}/runs",
            "storage": {"endpoint": self.cloud.endpoint},
            **self._keys,
        }

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"image={IMAGE}",)

    def python(self) -> str:
        return "/opt/venv/bin/python"

    def facts(self, text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
        return facts_of(text, files)

    def sent(self, handle: Handle) -> str:
        """What SageMaker got, in the form of a rendering; without the tag that holds the rendering's own hash."""
        body = self.cloud.posted(handle.native)
        tags = [tag for tag in body["Tags"] if tag["Key"] != PLAN_SHA]
        return json.dumps({**body, "Tags": tags}, indent=2, ensure_ascii=False) + "\n"

    def submit_again(self, handle: Handle) -> None:
        """A name is taken once; so the same job comes from somebody who gave it another."""
        body = {**self.cloud.posted(handle.native), "TrainingJobName": f"{handle.native}-again"}
        self.cloud.client("sagemaker").create_training_job(**body)

    def preempt(self, handle: Handle) -> None:
        self.cloud.interrupt(handle.native)

    def stored_secret(self, value: str) -> str:
        name = f"cvlaunch/{secrets.token_hex(4)}"
        self.cloud.client("secretsmanager").create_secret(Name=name, SecretString=value)
        return f"store:secretsmanager:{name}"


def facts_of(text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
    """Of a request that our template made."""
    body = json.loads(text)
    algorithm, asked = body["AlgorithmSpecification"], body["ResourceConfig"]
    first = asked.get("InstancePreferences", [asked])[0]
    kind = instance_type(first["InstanceType"])
    assert kind is not None
    described = files[JOB]
    assert isinstance(described, bytes)
    return ContainerFacts(
        argv=algorithm["ContainerEntrypoint"],
        env=body["Environment"],
        job=json.loads(described),
        gpus=kind.gpus,
        nodes=first["InstanceCount"],
        image=algorithm["TrainingImage"],
        cpus=float(kind.cpus),
        memory=kind.memory,
        shm=None,
        disk=asked["VolumeSizeInGB"] << 30,
        grace_s=RULES["sagemaker"].grace_s,
        timeout_s=float(body["StoppingCondition"]["MaxRuntimeInSeconds"]),
        secrets=None,
    )


def sagemaker_world(request: pytest.FixtureRequest, **keys: Any) -> Callable[[Path], SageMakerWorld]:
    """For a session's fixture. keys: of the target."""
    cloud, image = request.getfixturevalue("aws_session"), request.getfixturevalue("trainer_image")
    return lambda _: SageMakerWorld(cloud, image=image, **keys)
