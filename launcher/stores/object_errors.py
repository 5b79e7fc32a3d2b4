"""obstore's errors as ours: two tables and one context manager."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from launcher.errors import (
    AuthError,
    CapacityError,
    CvlaunchError,
    IntegrityError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from launcher.stores.paths import scheme

__all__ = ["AfterEndError", "NoRangesError", "Operation", "object_errors"]


class Operation(StrEnum):
    READ = "read"
    LIST = "list"
    WRITE = "write"
    DELETE = "delete"


_PERMISSIONS = {
    ("s3", Operation.READ): "s3:GetObject (and s3:ListBucket, to learn that an object is not there)",
    ("s3", Operation.LIST): "s3:ListBucket",
    ("s3", Operation.WRITE): "s3:PutObject",
    ("s3", Operation.DELETE): "s3:DeleteObject",
    ("gs", Operation.READ): "storage.objects.get",
    ("gs", Operation.LIST): "storage.objects.list",
    ("gs", Operation.WRITE): "storage.objects.create (and storage.objects.delete, to replace)",
    ("gs", Operation.DELETE): "storage.objects.delete",
}


class AfterEndError(Exception):
    """A range that starts at or after the end."""


class NoRangesError(Exception):
    """The server sent the whole object for a range."""


_REGION = "the bucket is in another region than the named one, or needs one: set `region`, or choose another bucket"
_REFUSED = "the service refused the credentials: check that they belong to this endpoint and account"
_EXPIRED = "the credentials have expired: log in again"

_CODES: Mapping[str, tuple[type[CvlaunchError], str]] = {
    "NoSuchBucket": (SpecError, "there is no such bucket: correct its name, or make it"),
    "InvalidBucketName": (SpecError, "this is not a name that a bucket can have: correct it"),
    "PermanentRedirect": (SpecError, _REGION),
    "AuthorizationHeaderMalformed": (SpecError, _REGION),
    "IllegalLocationConstraintException": (SpecError, _REGION),
    "KeyTooLongError": (SpecError, "the path is too long for this service: shorten it"),
    "NotImplemented": (UnsupportedError, "the service can't do this: choose another one"),
    "ExpiredToken": (AuthError, _EXPIRED),
    "ExpiredTokenException": (AuthError, _EXPIRED),
    "TokenRefreshRequired": (AuthError, _EXPIRED),
    "InvalidAccessKeyId": (AuthError, _REFUSED),
    "InvalidToken": (AuthError, _REFUSED),
    "SignatureDoesNotMatch": (AuthError, _REFUSED),
    "RequestTimeTooSkewed": (AuthError, "the clock of this machine is wrong: set it"),
    "QuotaExceeded": (CapacityError, "the quota of the bucket is used up: make room, or ask for more"),
    "XMinioStorageFull": (CapacityError, "the service's disks are full: make room"),
}
"""`<Code>` in the body of a refusal. S3: docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""

_TEXTS: tuple[tuple[str, type[CvlaunchError], str], ...] = (
    (r"redirect without LOCATION", SpecError, _REGION),
    (r"UnknownIssuer|invalid peer certificate|certificate verify failed", SpecError,
     "the service's certificate is not trusted here: set `ca_bundle` to its authority"),
    (r"URL scheme is not allowed|builder error|RelativeUrlWithoutBase", SpecError,
     "the endpoint is not a URL: correct it"),
    (r"169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal", AuthError,
     "no credentials found: log in, or set the variables that hold them"),
    (r"status code: 403|lacked the necessary privileges", AuthError,
     "this identity is not allowed to: it needs {permission}"),
    (r"status code: 401", AuthError, _REFUSED),
    (r"status code: 507", CapacityError, "the service has no room left"),
    (r"status code: 501", UnsupportedError, "the service can't do this: choose another one"),
    (r"status code: (5\d\d|429|408)", UnreachableError, "the service is overloaded or broken: try again"),
    (r"status code: 4\d\d", SpecError, "the service refused the request"),
    (r"error sending request|timed out|TimedOut|Connect", UnreachableError, "the service did not answer: try again"),
)  # fmt: skip
"""Looked for from top to bottom in the whole text of an error."""


@contextmanager
def object_errors(base: str, operation: Operation, *, path: str | None = None) -> Iterator[None]:
    """obstore's errors as ours, naming place and operation. base: `s3://bucket`; path: what was asked for.

    FileNotFoundError and FileExistsError stay, with a plain text.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise _translated(error, base, operation, path or base) from error


def _translated(error: Exception, base: str, operation: Operation, path: str) -> Exception:
    from obstore import exceptions as theirs

    text = str(error)
    code = match[1] if (match := re.search(r"<Code>(\w+)</Code>", text)) else ""
    if code in _CODES:
        kind, reason = _CODES[code]
        return kind(f"{base if kind is SpecError else path}: can't {operation}: {reason} ({code})")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object", path)
    if isinstance(error, theirs.AlreadyExistsError | theirs.PreconditionError):
        return FileExistsError(errno.EEXIST, "there is one already", path)
    if isinstance(error, theirs.InvalidPathError):
        return IntegrityError(
            f"{path} holds a path that can't be brought to a folder ({_first(text)}): rename or remove it"
        )
    if isinstance(error, theirs.UnauthenticatedError) and (match := re.search(r"provider: \w+: (.*)", text)):
        return AuthError(f"{path}: can't {operation}: {match[1]}")
    if isinstance(error, theirs.NotSupportedError):
        return UnsupportedError(f"{path}: can't {operation}: {_first(text)}")
    if isinstance(error, theirs.UnknownConfigurationKeyError):
        return SpecError(f"{base}: {_first(text)}")
    return _by_text(text, base, operation, path)


def _by_text(text: str, base: str, operation: Operation, path: str) -> Exception:
    if re.search(r"status code: 416|StartTooLarge", text):
        return AfterEndError(path)
    if "NotPartial" in text:
        return NoRangesError(path)
    for pattern, kind, reason in _TEXTS:
        if re.search(pattern, text):
            permission = _PERMISSIONS.get((scheme(base), operation), f"the permission to {operation}")
            found = reason.format(permission=permission)
            return kind(f"{path}: can't {operation}: {found} ({_first(text)})")
    return UnreachableError(f"{path}: can't {operation}: {_first(text)}: try again")


def _first(text: str) -> str:
    """The first line of an error of obstore without its debug output, at most 300 characters."""
    return text.split("\n", 1)[0].strip()[:300]
