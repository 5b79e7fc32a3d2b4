"""Keys of a target: an AWS identity, the role of its jobs, and what each of them gets."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from launcher.backends.base import BaseTarget, Url
from launcher.errors import nearest
from launcher.quantities import format_duration
from launcher.sagemaker.client import Access
from launcher.spec import Duration, Whole
from launcher.stores import StorageOptions

__all__ = ["LONGEST_RUN_S", "SageMakerTarget"]

InputMode = Literal["File", "FastFile"]

_DAY = 24 * 3600.0
LONGEST_RUN_S = 28 * 24 * 3600
"""Of any job."""
_LONGEST = {"max_runtime": LONGEST_RUN_S, "keep_alive": 6 * 3600.0}
_SERVICES = ("sagemaker", "logs", "sts", "iam", "ecr", "s3", "service-quotas")


class SageMakerTarget(BaseTarget):
    """A region of an AWS account, the way to it, and what every training job there gets."""

    backend: Literal["sagemaker"] = "sagemaker"
    region: str | None = Field(None, description="eu-west-1; none: the profile's, or $AWS_REGION")
    profile: str | None = Field(
        None, description="AWS profile of this machine (keys, SSO, assume-role); none: the default"
    )
    role: str | None = Field(None, description="of the jobs: arn:aws:iam::123456789012:role/trainer")
    instance_types: tuple[str, ...] = Field(
        (), max_length=5, description="instead of a choice by resources, best first: [ml.g5.2xlarge]"
    )
    input_mode: InputMode = Field("File", description="File copies data before the start, FastFile reads it when asked")
    input_modes: dict[str, InputMode] = Field({}, description="of single channels: {train: FastFile}")
    max_runtime: Duration = Field(
        5 * _DAY, description="of jobs without a timeout; five days is what new accounts may have"
    )
    spot_wait: Duration = Field(
        _DAY, description="how long a spot job without max_wait may wait, besides its running time"
    )
    keep_alive: Duration | None = Field(None, description="warm pool: how long instances stay after a job: 30m")
    subnets: tuple[str, ...] = Field((), max_length=16, description="of your VPC; with security_groups")
    security_groups: tuple[str, ...] = Field((), max_length=5, description="of your VPC; with subnets")
    network_isolation: bool = Field(
        False, description="containers reach nothing, S3 neither; the platform moves all files"
    )
    encrypt_traffic: bool = Field(False, description="between the instances of a job")
    kms_key: str | None = Field(None, description="encrypts what SageMaker writes to S3: a key's ARN, id or alias")
    volume_kms_key: str | None = Field(None, description="encrypts the volume of each instance: a key's ARN or id")
    image_access: Literal["Platform", "Vpc"] = Field(
        "Platform", description="Vpc: images come from a registry in your VPC instead of ECR"
    )
    retries_by_platform: Whole = Field(
        0, ge=0, le=30, description="how often SageMaker starts a job again after an internal error of its own"
    )
    tags: dict[str, str] = Field({}, description="further tags of each job: {team: vision}")
    endpoints: dict[str, Url] = Field({}, description=f"how you reach a service: URL by name ({', '.join(_SERVICES)})")

    @field_validator("region")
    @classmethod
    def _region_is_a_name(cls, region: str | None) -> str | None:
        """It becomes part of host names."""
        if region is not None and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", region):
            raise ValueError(f"expected a region such as eu-west-1, found {region!r}")
        return region

    @field_validator("role")
    @classmethod
    def _role_is_an_arn(cls, role: str | None) -> str | None:
        if role is not None and not re.match(r"arn:[a-z-]+:iam::", role):
            raise ValueError(
                f"expected the ARN of a role, such as arn:aws:iam::123456789012:role/trainer, found {role!r}; "
                "`aws iam get-role --role-name NAME` shows it"
            )
        return role

    @field_validator("max_runtime", "keep_alive")
    @classmethod
    def _fits(cls, seconds: float | None, info: ValidationInfo) -> float | None:
        most = _LONGEST[info.field_name or ""]
        if seconds is not None and seconds > most:
            raise ValueError(f"SageMaker takes {format_duration(most)} at most, not {format_duration(seconds)}")
        return seconds

    @field_validator("tags")
    @classmethod
    def _tags_are_not_ours(cls, tags: dict[str, str]) -> dict[str, str]:
        for name in tags:
            if name.startswith("cvlaunch-"):
                raise ValueError(f"a run is found by its tags, {name!r} and others: choose another name")
        return tags

    @field_validator("endpoints")
    @classmethod
    def _services_are_known(cls, endpoints: dict[str, str]) -> dict[str, str]:
        for name in endpoints:
            if name not in _SERVICES:
                raise ValueError(f"{name!r} is none of {', '.join(_SERVICES)}{nearest(name, _SERVICES)}")
        return endpoints

    @model_validator(mode="after")
    def _vpc_is_whole(self) -> Self:
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("subnets and security_groups come together; give both or none")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_identity(cls, values: object) -> object:
        """The store is reached as the account is, unless `storage` says otherwise."""
        if not isinstance(values, dict) or not isinstance(values.get("storage", {}), dict):
            return values
        known = {"profile": values.get("profile"), "region": values.get("region")}
        inherited = {key: value for key, value in known.items() if isinstance(value, str)}
        return {**values, "storage": {**inherited, **values.get("storage", {})}} if inherited else values

    @property
    def store_options(self) -> StorageOptions:
        """Of this machine's way to the store. What is in `endpoints` is of that alone: jobs have `storage.endpoint`."""
        options = self.storage.options
        return dataclasses.replace(options, endpoint=self.endpoints.get("s3") or options.endpoint)

    @property
    def access(self) -> Access:
        return Access(
            profile=self.profile, region=self.region, endpoints=self.endpoints, ca_bundle=self.storage.ca_bundle
        )
