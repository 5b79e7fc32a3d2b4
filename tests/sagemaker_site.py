"""A user's folder with a target `aws` in an account whose jobs run nothing: their ends are told."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import Run
from launcher.backends.base import Handle
from launcher.backends.sagemaker import SageMakerBackend
from launcher.errors import CvlaunchError
from launcher.ledger import Ledger
from launcher.sagemaker.target import SageMakerTarget
from launcher.submission import prepare, send
from tests.services.aws import AwsCloud

__all__ = ["IMAGE", "SageMakerSite", "make_site", "name_of"]

IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/trainer:1"
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SageMakerSite:
    """target, job: keys, of which a test changes some; None takes one away."""

    project: Path
    cloud: AwsCloud
    bucket: str
    target: Mapping[str, Any]
    job: Mapping[str, Any]

    def write(self, target: Mapping[str, Any] = {}, job: Mapping[str, Any] = {}) -> Path:
        _write(self.project / "targets.yaml", {"targets": {"aws": _given({**self.target, **target})}})
        _write(self.project / "job.yaml", _given({**self.job, **job}))
        return self.project / "job.yaml"

    def send(
        self,
        target: Mapping[str, Any] = {},
        job: Mapping[str, Any] = {},
        *,
        run_id: str | None = None,
        ledger: Ledger | None = None,
        sleep: Callable[[float], None] = lambda _: None,
    ) -> Run:
        """As `submit` does, but for the pauses between calls that AWS sends away."""
        ledger = ledger or Ledger()
        with prepare(self.write(target, job), target="aws") as prepared:
            assert isinstance(prepared.backend, SageMakerBackend)
            prepared = dataclasses.replace(prepared, backend=self.backend(prepared.backend.target, sleep=sleep))
            return Run(send(prepared, ledger=ledger, run_id=run_id), ledger)

    def refused(self, target: Mapping[str, Any] = {}, job: Mapping[str, Any] = {}, **options: Any) -> CvlaunchError:
        with pytest.raises(CvlaunchError) as caught:
            self.send(target, job, **options)
        return caught.value

    def backend(
        self, target: SageMakerTarget | None = None, *, sleep: Callable[[float], None] = lambda _: None
    ) -> SageMakerBackend:
        """sleep: instead of pauses."""
        target = target or SageMakerTarget.model_validate(_given(dict(self.target)))
        return SageMakerBackend(target, "aws", sleep=sleep)

    def asked(self, action: Callable[[], object]) -> list[str]:
        """The operations that it asked for."""
        before = len(self.cloud.calls)
        action()
        return [call.operation for call in self.cloud.calls[before:]]


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _write(path: Path, value: object) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False))


def name_of(run: Run) -> str:
    assert isinstance(run.handle, Handle)
    return run.handle.native


def make_site(cloud: AwsCloud, project: Path, *, scripted: bool = True) -> SageMakerSite:
    """scripted: jobs wait for what they are told to do; else for instances, an image that doesn't run, and so on."""
    bucket = f"vision-{secrets.token_hex(4)}"
    cloud.bucket(bucket)
    cloud.serve_image(IMAGE, image="none")
    if scripted:
        cloud.script("")
    target = {
        "backend": "sagemaker",
        "region": cloud.region,
        "role": cloud.role(),
        "output": f"s3://{bucket}/runs",
    }
    return SageMakerSite(project, cloud, bucket, target, {"name": "digits", "image": IMAGE, "command": ["true"]})
