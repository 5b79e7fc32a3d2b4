"""What stands in the account beside training jobs, looked at from inside: moto keeps it in this process.

Calls from here are nobody's requests: they are not counted, and no fault meets them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ACCOUNT", "LOCK", "Account", "RoleKeys", "S3Object", "split_image", "split_uri"]

ACCOUNT = "123456789012"
"""moto's."""

LOCK = threading.RLock()
"""Around all that moto does: its dictionaries stand no two threads."""


@dataclass(frozen=True)
class S3Object:
    """etag: changes with the content."""

    key: str
    etag: str
    size: int


@dataclass(frozen=True)
class RoleKeys:
    """Of an assumed role. until: in UTC."""

    access_key: str
    secret_key: str
    token: str
    until: datetime.datetime


class Account:
    """Of one region, with buckets of all."""

    def __init__(self, region: str) -> None:
        self.region = region

    # -- S3 -----------------------------------------------------------------------------------------------------------

    def bucket_region(self, name: str) -> str | None:
        """None if there is no such bucket."""
        with LOCK:
            bucket = self._s3().buckets.get(name)
            return str(bucket.region_name) if bucket is not None else None

    def create_bucket(self, name: str, region: str) -> None:
        with LOCK:
            self._s3().create_bucket(name, region)

    def objects(self, uri: str) -> list[S3Object]:
        """All whose key begins as the URI says, sorted."""
        bucket, prefix = split_uri(uri)
        with LOCK:
            found, *_ = self._s3().list_objects(self._s3().get_bucket(bucket), prefix, None, None, None)
            return [S3Object(key.name, key.etag.strip('"'), key.size) for key in found]

    def read(self, bucket: str, key: str) -> bytes | None:
        """None if it is gone."""
        with LOCK:
            found = self._s3().get_object(bucket, key)
            return bytes(found.value) if found is not None else None

    def write(self, bucket: str, key: str, data: bytes) -> None:
        with LOCK:
            self._s3().put_object(bucket, key, data)

    def delete(self, bucket: str, key: str) -> None:
        with LOCK:
            self._s3().delete_object(bucket, key)

    def _s3(self) -> Any:
        from moto.s3.models import s3_backends

        return s3_backends[ACCOUNT]["aws"]

    # -- identities ---------------------------------------------------------------------------------------------------

    def create_role(self, name: str, service: str) -> str:
        """Its ARN. service: who may assume it. One of that name is replaced."""
        statement = {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        with LOCK:
            iam = self._iam()
            for role in [role for role in iam.get_roles() if role.name == name]:
                iam.roles.pop(role.id)
            return str(iam.create_role(name, policy, "/", None, "", [], None).arn)

    def trusts(self, arn: str, service: str) -> bool:
        """Whether there is such a role, which this service may assume."""
        with LOCK:
            role = next((role for role in self._iam().get_roles() if role.arn == arn), None)
        if role is None:
            return False
        policy = role.assume_role_policy_document
        document = json.loads(urllib.parse.unquote(policy)) if isinstance(policy, str) else policy
        return any(
            statement.get("Effect") == "Allow"
            and "sts:AssumeRole" in _listed(statement.get("Action", ()))
            and service in _listed(statement.get("Principal", {}).get("Service", ()))
            for statement in _listed(document.get("Statement", ()))
        )

    def assume(self, arn: str, session: str, seconds: int = 3600) -> RoleKeys:
        from moto.sts.models import sts_backends

        with LOCK:
            role = sts_backends[ACCOUNT]["aws"].assume_role(self.region, session[:64], arn, "", seconds, "")
        return RoleKeys(
            role.access_key_id,
            role.secret_access_key,
            role.session_token,
            datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds),
        )

    def _iam(self) -> Any:
        from moto.iam.models import iam_backends

        return iam_backends[ACCOUNT]["aws"]

    # -- images -------------------------------------------------------------------------------------------------------

    def push_image(self, reference: str, architecture: str) -> None:
        """An image index in ECR, as if it had been pushed, with one image for linux/`architecture`."""
        region, repository, tag, digest = split_image(reference)
        manifest = _index(reference, architecture)
        with LOCK:
            ecr = self._ecr(region)
            if repository not in ecr.repositories:
                ecr.create_repository(repository, None, {}, {}, "MUTABLE", [])
            kept = ecr.repositories[repository].images
            if not any(image.image_manifest == manifest for image in kept):
                ecr.put_image(repository, manifest, tag or "latest", digest=digest or None)

    def find_image(self, reference: str) -> str:
        """What SageMaker says of an image that it can't pull; empty if it can."""
        region, repository, tag, digest = split_image(reference)
        if not region:
            return "" if not reference.split("/")[0].endswith("amazonaws.com") else "Invalid image URI"
        with LOCK:
            found = self._ecr(region).repositories.get(repository)
            if found is None:
                return f"Cannot find repository: {repository} in registry ID: {ACCOUNT}"
            images = found.images
            known = any(image.get_image_digest() == digest if digest else tag in image.image_tags for image in images)
        what = f"image tag: {tag}" if not digest else f"image digest: {digest}"
        return "" if known else f"Cannot find {what} in repository: {repository} and registry ID: {ACCOUNT}"

    def _ecr(self, region: str) -> Any:
        from moto.ecr.models import ecr_backends

        return ecr_backends[ACCOUNT][region]

    # -- logs ---------------------------------------------------------------------------------------------------------

    def put_lines(self, group: str, stream: str, lines: Sequence[tuple[int, str]]) -> None:
        """lines: (epoch milliseconds, text). Group and stream are made by the first ones."""
        from moto.logs.models import logs_backends

        with LOCK:
            logs = logs_backends[ACCOUNT][self.region]
            if group not in logs.groups:
                logs.create_log_group(group, {})
            if stream not in logs.groups[group].streams:
                logs.create_log_stream(group, stream)
            events = [{"timestamp": stamp, "message": text} for stamp, text in lines]
            logs.put_log_events(group, stream, events)

    def lines(self, group: str, prefix: str) -> dict[str, list[str]]:
        """Stream → its lines."""
        from moto.logs.models import logs_backends

        with LOCK:
            found = logs_backends[ACCOUNT][self.region].groups.get(group)
            streams = found.streams.items() if found else ()
            return {n: [event.message for event in s.events] for n, s in streams if n.startswith(prefix)}

    def events(self, group: str, stream: str, region: str) -> list[Any] | None:
        """moto's, by time; None if there is no such stream."""
        from moto.logs.models import logs_backends

        with LOCK:
            found = logs_backends[ACCOUNT][region].groups.get(group)
            if found is None or stream not in found.streams:
                return None
            return sorted(found.streams[stream].events, key=lambda event: (event.timestamp, event.event_id))

    def remove_streams(self, group: str, prefix: str) -> None:
        from moto.logs.models import logs_backends

        with LOCK:
            found = logs_backends[ACCOUNT][self.region].groups.get(group)
            for name in [name for name in found.streams if name.startswith(prefix)] if found else ():
                del found.streams[name]


def _listed(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, str | dict) else list(value)


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def split_image(reference: str) -> tuple[str, str, str, str]:
    """(region, repository, tag, digest) of `ACCOUNT.dkr.ecr.REGION.amazonaws.com/repository:tag@sha256:…`; all empty
    if it is not in ECR."""
    host, _, rest = reference.partition("/")
    words = host.split(".")
    if words[1:3] != ["dkr", "ecr"] or len(words) < 6:
        return "", "", "", ""
    rest, _, digest = rest.partition("@")
    repository, _, tag = rest.partition(":")
    return words[3], repository, tag or ("" if digest else "latest"), digest


def _index(reference: str, architecture: str) -> str:
    """Of one that was built with buildx or podman: an index of one image."""
    digest = hashlib.sha256(f"{reference} {architecture}".encode()).hexdigest()
    image = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": f"sha256:{digest}",
        "size": 1234,
        "platform": {"os": "linux", "architecture": architecture},
    }
    index = "application/vnd.oci.image.index.v1+json"
    return json.dumps({"schemaVersion": 2, "mediaType": index, "manifests": [image]})
