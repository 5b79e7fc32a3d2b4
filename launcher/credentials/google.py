"""Google identity (application default credentials): the one place that finds it. google-auth is imported lazily."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import AuthError, UnreachableError, UnsupportedError
from launcher.secretfiles import require_private

if TYPE_CHECKING:
    from obstore.store import GCSCredential

__all__ = ["Provider", "credentials", "obstore_credentials", "registry_login"]

_REGISTRY = re.compile(r"[a-z0-9-]+-docker\.pkg\.dev|(?:[a-z]+\.)?gcr\.io")
"""https://cloud.google.com/artifact-registry/docs/docker/authentication#token"""

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_WAY_OUT = "run: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"


@dataclass(frozen=True)
class Provider:
    """What obstore calls for a fresh token."""

    inner: Any

    def __call__(self) -> GCSCredential:
        with _google_errors():
            credential: GCSCredential = self.inner()
        return credential


def credentials(environ: Mapping[str, str] | None = None) -> tuple[Any, str | None]:
    """(google.auth credentials, the project they name or None). AuthError if there are none."""
    _check_file(os.environ if environ is None else environ)
    try:
        import google.auth
    except ImportError as error:
        raise UnsupportedError("Google credentials need google-auth: pip install 'cvlaunch[gcs]'") from error
    with _google_errors():
        found, project = google.auth.default(scopes=_SCOPES)
    return found, project


def obstore_credentials(*, environ: Mapping[str, str] | None = None) -> Provider | None:
    """A provider that renews its token, or None without google-auth: then obstore's own chain (key file, gcloud's
    file, metadata server) does it. google-auth also knows workload identity federation and impersonation."""
    environ = os.environ if environ is None else environ
    _check_file(environ)
    if not _has_google_auth():
        return None
    found, _ = credentials(environ)
    from obstore.auth.google import GoogleCredentialProvider

    return Provider(GoogleCredentialProvider(found))


def registry_login(host: str) -> tuple[str, str] | None:
    """(user, password) of Artifact Registry, good for an hour; None for another host. AuthError without an identity."""
    if not _REGISTRY.fullmatch(host):
        return None
    found, _ = credentials()
    from google.auth.transport.requests import Request

    with _google_errors():
        found.refresh(Request())
    return "oauth2accesstoken", found.token


def _check_file(environ: Mapping[str, str]) -> None:
    """Refuses a key file that others can read, and one that is named and not there."""
    named = environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    path = Path(named or "~/.config/gcloud/application_default_credentials.json").expanduser()
    if path.is_file():
        require_private(path)
    elif named:
        raise AuthError(f"GOOGLE_APPLICATION_CREDENTIALS names {named}, which is not a file: {_WAY_OUT}")


def _has_google_auth() -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec("google.auth.transport.requests") is not None
    except ImportError:
        return False


@contextmanager
def _google_errors() -> Iterator[None]:
    """google-auth's errors as ours."""
    from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError

    try:
        yield
    except TransportError as error:
        raise UnreachableError(f"Google did not answer when asked for a token: {error}") from error
    except RefreshError as error:
        raise AuthError(f"Google refused the login, which may have expired: {error.args[0]}: {_WAY_OUT}") from error
    except GoogleAuthError as error:
        raise AuthError(f"no usable Google credentials: {_WAY_OUT}") from error
