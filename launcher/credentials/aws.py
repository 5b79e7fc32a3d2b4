"""AWS identity: the one place that finds it. boto3 is imported only when environment variables don't suffice."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import AuthError, SpecError, UnreachableError, UnsupportedError, nearest
from launcher.secretfiles import require_private

if TYPE_CHECKING:
    import boto3.session
    from obstore.store import S3Config, S3Credential

__all__ = ["Provider", "ecr_login", "obstore_credentials", "session", "translated"]

_ECR = re.compile(r"(\d{12})\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?")
"""https://docs.aws.amazon.com/AmazonECR/latest/userguide/Registries.html"""

_NATIVE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
)
"""With one of these set, obstore finds the identity by itself.

A container's role at AWS_CONTAINER_CREDENTIALS_FULL_URI is asked for by obstore only with a token file (obstore 0.12).
"""

# botocore caches for us and renews what has less than 10 to 15 minutes to live, so that what it hands out is good
# for 10; obstore's own provider assumes 30.
_GOOD_FOR = timedelta(minutes=10)

_LOGIN = ("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "SSOError")
_LOGIN_CONSOLE = ("LoginRefreshRequired", "LoginTokenLoadError", "LoginError")
_REFUSED = ("CredentialRetrievalError", "PartialCredentialsError", "NoCredentialsError", "MissingDependencyException")
_OFFLINE = ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "SSLError")


@dataclass(frozen=True)
class Provider:
    """What obstore calls for fresh keys. `config` carries the profile's region to the store."""

    inner: Any
    profile: str | None

    @property
    def config(self) -> S3Config:
        config: S3Config = self.inner.config
        return config

    def __call__(self) -> S3Credential:
        with _aws_errors(self.profile):
            credential: S3Credential = self.inner()
        return credential


def session(profile: str | None = None, region: str | None = None) -> boto3.session.Session:
    """A boto3 session; nothing is asked of AWS yet. SpecError for a profile that doesn't exist."""
    boto3 = _boto3("the AWS configuration of this machine" if profile is None else f"the AWS profile {profile!r}")
    with _aws_errors(profile):
        _check_files(os.environ)
        return boto3.Session(profile_name=profile, region_name=region)


def obstore_credentials(profile: str | None = None, *, environ: Mapping[str, str] | None = None) -> Provider | None:
    """A provider that renews itself, or None where obstore's own chain is enough.

    None: keys, web identity or a container's role in the environment, or no boto3 and nothing under ~/.aws (then
    obstore asks the instance). Otherwise boto3 finds the keys: profiles, SSO, assume-role, processes, instance role.
    AuthError, naming the way out, if there is no usable identity.
    """
    environ = os.environ if environ is None else environ
    if profile is None and any(environ.get(name) for name in _NATIVE):
        return None
    if profile is None and not _configured(environ) and not _has_boto3():
        return None
    profile = profile or environ.get("AWS_PROFILE")
    found = session(profile)
    from obstore.auth.boto3 import Boto3CredentialProvider

    with _aws_errors(profile):
        if found.get_credentials() is None:
            raise AuthError(_no_credentials(profile))
        provider = Provider(Boto3CredentialProvider(found, ttl=_GOOD_FOR), profile)
    provider()  # an expired login is reported here, in our words, not from inside a transfer
    return provider


def ecr_login(host: str, profile: str | None = None) -> tuple[str, str] | None:
    """(user, password) of an ECR registry, good for 12 hours; None for another host. AuthError if AWS gives none."""
    found = _ECR.fullmatch(host)
    if found is None:
        return None
    account, region = found.groups()
    profile = profile or os.environ.get("AWS_PROFILE")
    client = session(profile, region)
    with _aws_errors(profile):
        answer = client.client("ecr").get_authorization_token(registryIds=[account])
    token = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode()
    user, _, password = token.partition(":")
    return user, password


def _files(environ: Mapping[str, str]) -> list[Path]:
    names = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    paths = (Path(environ.get(name) or default).expanduser() for name, default in names.items())
    return [path for path in paths if path.is_file()]


def _configured(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("AWS_PROFILE") or _files(environ))


def _check_files(environ: Mapping[str, str]) -> None:
    """The credentials file always holds keys; the config file only sometimes, and tools write it as 0644."""
    for path in _files(environ):
        if "aws_secret_access_key" in path.read_text(errors="replace"):
            require_private(path)


def _has_boto3() -> bool:
    import importlib.util

    return importlib.util.find_spec("boto3") is not None


def _boto3(what: str) -> Any:
    try:
        import boto3
    except ImportError as error:
        raise UnsupportedError(f"{what} needs boto3: pip install 'cvlaunch[s3]'") from error
    return boto3


def _no_credentials(profile: str | None) -> str:
    if profile:
        return f"the AWS profile {profile!r} has no credentials: run: aws configure --profile {profile}"
    return (
        "no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile of ~/.aws, "
        "or run where a role is attached"
    )


@contextmanager
def _aws_errors(profile: str | None) -> Iterator[None]:
    """botocore's errors as ours."""
    from botocore.exceptions import BotoCoreError, ClientError, ProfileNotFound

    try:
        yield
    except ProfileNotFound as error:
        raise SpecError(_unknown_profile(error)) from error
    except (BotoCoreError, ClientError) as error:
        raise translated(error, profile) from error


def _unknown_profile(error: Exception) -> str:
    import botocore.session

    name = str(getattr(error, "kwargs", {}).get("profile", ""))
    known = botocore.session.Session(profile=None).full_config.get("profiles", {})
    have = ", ".join(sorted(known)) or "none"
    return f"the AWS profile {name!r} is not in ~/.aws (there: {have}){nearest(name, known)}"


def translated(error: Exception, profile: str | None) -> AuthError | UnreachableError | SpecError:
    """An error of botocore about identity, configuration or network as ours."""
    kind = type(error).__name__
    option = f" --profile {profile}" if profile else ""
    if kind in _LOGIN:
        return AuthError(f"the AWS SSO login has expired or was never made: run: aws sso login{option}")
    if kind in _LOGIN_CONSOLE:
        return AuthError(f"the AWS login has expired or was never made: run: aws login{option}")
    if kind in _OFFLINE:
        return UnreachableError(f"AWS did not answer when asked for credentials: {error}")
    if kind in _REFUSED or kind == "ClientError":
        who = f"profile {profile!r}" if profile else "this identity"
        return AuthError(f"AWS gave {who} no credentials: {error}")
    return SpecError(f"the AWS configuration can't be used: {error}")
