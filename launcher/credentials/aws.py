"""AWS identity: the one place that finds it. boto3 is imported only when environment variables don't suffice."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.credentials.partitions import ECR_HOST
from launcher.errors import AuthError, SpecError, UnreachableError, UnsupportedError, nearest
from launcher.secretfiles import require_private

if TYPE_CHECKING:
    import boto3.session
    import botocore.session
    from botocore.exceptions import ClientError
    from obstore.store import S3Config, S3Credential

__all__ = [
    "Provider",
    "core_session",
    "ecr_login",
    "obstore_credentials",
    "parameter",
    "region_variables",
    "s3_endpoint",
    "secret",
    "session",
    "source_profile",
    "translated",
]

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
_REFUSED = ("CredentialRetrievalError", "PartialCredentialsError", "MissingDependencyException")
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
    inner = core_session(profile)
    return boto3.Session(botocore_session=inner, region_name=region)


def core_session(profile: str | None = None) -> botocore.session.Session:
    """What a boto3 session has inside, and enough for calls; it comes in a quarter of the time.

    SpecError for a profile that doesn't exist.
    """
    try:
        import botocore.session
    except ImportError as error:
        raise UnsupportedError("calls of AWS need boto3: pip install 'cvlaunch[s3]'") from error
    with _aws_errors(profile):
        _check_files(os.environ)
        inner = botocore.session.Session(profile=profile)
        inner.register_component("data_loader", _service_models(inner.get_config_variable("data_path")))
        return inner


@functools.cache
def _service_models(path: str | None) -> Any:
    """Shared, because each loader reads and parses megabytes anew: nine tenths of what a further client takes."""
    from botocore.loaders import create_loader

    return create_loader(path)


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
    identity = _identity(profile, environ)
    with _ONE_ASKS:
        provider = _ROLES.get(identity) or _provider(profile)
        provider()  # an expired login is reported here, in our words, not from inside a transfer
        if hasattr(provider.inner.credentials, "refresh_needed"):
            _ROLES[identity] = provider
    return provider


_ONE_ASKS = threading.Lock()
_ROLES: dict[tuple[object, ...], Provider] = {}
"""Of roles and logins, which are asked for once, not for every store: they may ask for a code of somebody's MFA."""


def _identity(profile: str | None, environ: Mapping[str, str]) -> tuple[object, ...]:
    """What says who that is: other files or variables may mean another."""
    files = tuple((str(path), path.stat().st_mtime_ns) for path in _files(environ))
    return profile, files, tuple(sorted(item for item in environ.items() if item[0].startswith("AWS_")))


def _provider(profile: str | None) -> Provider:
    found = session(profile)
    from obstore.auth.boto3 import Boto3CredentialProvider

    with _aws_errors(profile):
        if found.get_credentials() is None:
            raise AuthError(_no_credentials(profile))
        return Provider(Boto3CredentialProvider(found, ttl=_GOOD_FOR), profile)


def s3_endpoint(profile: str | None = None, *, environ: Mapping[str, str] | None = None) -> str | None:
    """Where S3 is said to be by the environment, or by the profile, as botocore reads them; None: at AWS."""
    environ = os.environ if environ is None else environ
    if said := environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL"):
        return said
    if not any("endpoint_url" in path.read_text(errors="replace") for path in _files(environ)):
        return None
    import botocore.session

    profile = profile or environ.get("AWS_PROFILE")
    with _aws_errors(profile):
        opened = botocore.session.Session(profile=profile)
        keys: Mapping[str, Any] = opened.get_scoped_config()
        services = opened.full_config.get("services", {}).get(keys.get("services"), {})
    found = services.get("s3", {}).get("endpoint_url") or keys.get("endpoint_url")
    return str(found) if found else None


def ecr_login(host: str, profile: str | None = None) -> tuple[str, str] | None:
    """(user, password) of an ECR registry, good for 12 hours; None for another host. AuthError if AWS gives none."""
    found = re.fullmatch(ECR_HOST, host)
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


def region_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """AWS_REGION and AWS_DEFAULT_REGION, as far as a training job of SageMaker lacks them: its own region's.

    The job's name and ARN are all that its environment is promised to say:
    https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html
    """
    job = environ.get("TRAINING_JOB_ARN", "").split(":")
    if len(job) < 6:
        return {}
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or job[3]
    return {name: region for name in ("AWS_REGION", "AWS_DEFAULT_REGION") if not environ.get(name)}


def secret(reference: str) -> str:
    """A value of Secrets Manager: NAME or ARN, `#KEY` after it for a key of a JSON secret; asked by this identity.

    SpecError if there is none, or no text; AuthError, naming the permission. No message holds a value.
    """
    name, _, key = reference.partition("#")
    answer = _ask(_SECRETS, name)
    if "SecretString" not in answer:
        raise SpecError(f"the secret {name!r} of Secrets Manager is binary; a variable takes text")
    text = str(answer["SecretString"])
    return _key_of(text, key, f"the secret {name!r} of Secrets Manager") if key else text


def parameter(reference: str) -> str:
    """A value of SSM's Parameter Store, decrypted; otherwise as `secret`."""
    name, _, key = reference.partition("#")
    text = str(_ask(_PARAMETERS, name)["Parameter"]["Value"])
    return _key_of(text, key, f"the parameter {name!r} of SSM") if key else text


def _key_of(text: str, key: str, what: str) -> str:
    """Text stays as it is, other JSON values as JSON."""
    try:
        values = json.loads(text)
    except ValueError:  # `from error` would print the value
        values = None
    if not isinstance(values, dict):
        raise SpecError(f"{what} is no JSON object, so it has no key {key!r}: leave out #{key}")
    if key not in values:
        raise SpecError(f"{what} has no key {key!r}")  # its other keys may tell more than they should
    return values[key] if isinstance(values[key], str) else json.dumps(values[key])


@dataclass(frozen=True)
class _Vault:
    """Where secrets are kept. name: in messages. missing: its codes for a name that is not there."""

    name: str
    service: str
    operation: str
    permission: str
    missing: tuple[str, ...]
    parameters: Callable[[str], dict[str, object]]


_SECRETS = _Vault(
    "Secrets Manager",
    "secretsmanager",
    "get_secret_value",
    "secretsmanager:GetSecretValue",
    ("ResourceNotFoundException",),
    lambda name: {"SecretId": name},
)
_PARAMETERS = _Vault(
    "SSM's Parameter Store",
    "ssm",
    "get_parameter",
    "ssm:GetParameter",
    ("ParameterNotFound", "ParameterVersionNotFound"),
    lambda name: {"Name": name, "WithDecryption": True},
)
_NOT_ALLOWED = ("AccessDeniedException", "AccessDenied", "DecryptionFailure", "InvalidKeyId")


def _ask(vault: _Vault, name: str) -> dict[str, Any]:
    """The service's answer, in the region of an ARN, else of the environment."""
    boto3 = _boto3(f"the secret store:{vault.service}:{name}")
    from botocore.config import Config
    from botocore.exceptions import ClientError

    region = name.split(":")[3] if name.startswith("arn:") and name.count(":") >= 5 else ""
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    patient = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 4})
    with _aws_errors(None):
        client = boto3.Session(region_name=region or None).client(vault.service, config=patient)
        try:
            answer: dict[str, Any] = getattr(client, vault.operation)(**vault.parameters(name))
        except ClientError as error:
            raise _refusal(error, vault, name, client.meta.region_name) from error
        finally:
            client.close()
    return answer


def _refusal(error: ClientError, vault: _Vault, name: str, region: str) -> AuthError | SpecError | UnreachableError:
    code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
    if code in vault.missing:
        return SpecError(f"{vault.name} has no {name!r} in {region}: correct the reference, or make it")
    if code in _NOT_ALLOWED:
        key = ", and kms:Decrypt with the key of its own that it may have"
        return AuthError(f"the job's role may not read {name!r}: it needs {vault.permission} on it{key} ({code})")
    if status >= 500 or "Throttling" in code:
        return UnreachableError(f"{vault.name} did not give {name!r} ({code}): try again")
    return translated(error, None) if "Token" in code else SpecError(f"{vault.name} refuses {name!r}: {error}")


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


def _login_profile(profile: str) -> str:
    import botocore.session

    return source_profile(profile, botocore.session.Session(profile=None).full_config.get("profiles", {}))


def source_profile(name: str, profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Whose keys or login an assume-role profile stands on: the one to log in to."""
    seen = {name}
    while (source := profiles.get(name, {}).get("source_profile")) and source not in seen:
        seen.add(name := source)
    return name


def translated(error: Exception, profile: str | None) -> AuthError | UnreachableError | SpecError:
    """An error of botocore about identity, configuration or network as ours."""
    kind = type(error).__name__
    name = _login_profile(profile) if profile and kind in (*_LOGIN, *_LOGIN_CONSOLE) else profile
    option = f" --profile {name}" if name else ""
    if kind in _LOGIN:
        return AuthError(f"the AWS SSO login has expired or was never made: run: aws sso login{option}")
    if kind in _LOGIN_CONSOLE:
        return AuthError(f"the AWS login has expired or was never made: run: aws login{option}")
    if kind in _OFFLINE:
        return UnreachableError(f"AWS did not answer when asked for credentials: {error}")
    if kind == "NoCredentialsError":
        return AuthError(_no_credentials(profile))
    if kind in _REFUSED or kind == "ClientError":
        who = f"profile {profile!r}" if profile else "this identity"
        return AuthError(f"AWS gave {who} no credentials: {error}")
    return SpecError(f"the AWS configuration can't be used: {error}")
