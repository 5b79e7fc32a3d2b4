"""What goes wrong on purpose, for all services alike."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tests.services.aws.wire import AwsError, Request

__all__ = ["Call", "CutError", "Faults"]

_THROTTLED: Mapping[str, AwsError] = {
    "s3": AwsError("SlowDown", "Please reduce your request rate.", 503),
    "sts": AwsError("Throttling", "Rate exceeded"),
    "iam": AwsError("Throttling", "Rate exceeded"),
}
_EXPIRED: Mapping[str, AwsError] = {
    "s3": AwsError("ExpiredToken", "The provided token has expired."),
    "sts": AwsError("ExpiredToken", "The security token included in the request is expired", 403),
    "iam": AwsError("ExpiredToken", "The security token included in the request is expired", 403),
}
_UNKNOWN: Mapping[str, AwsError] = {
    "s3": AwsError("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.", 403),
    "sts": AwsError("InvalidClientTokenId", "The security token included in the request is invalid.", 403),
    "iam": AwsError("InvalidClientTokenId", "The security token included in the request is invalid.", 403),
}
"""Services that say it otherwise than those with JSON."""


@dataclass(frozen=True)
class Call:
    """A request that was answered. status: of HTTP; 0 if the connection was cut. time: epoch seconds when it came.
    path: of the URL, which for S3 is `/bucket/key`."""

    service: str
    operation: str
    status: int
    time: float
    access_key: str = ""
    region: str = ""
    path: str = "/"


class CutError(ConnectionError):
    """The connection is to be closed without an answer."""


@dataclass
class _Fault:
    """error: a function, as what is said depends on the service. times: None for ever."""

    operation: str
    error: Callable[[Request], Exception]
    times: int | None = 1
    share: float = 1.0
    when: Literal["before", "after"] = "before"


class Faults:
    """Operations are named as AWS does (ListTrainingJobs, GetLogEvents, PutObject); `*` is any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._faults: list[_Fault] = []
            self._expired: set[str] = set()
            self._unknown: set[str] = set()
            self._rates: dict[str, float] = {}
            self._tokens: dict[str, tuple[float, float]] = {}
            self._dice = random.Random(6)

    def throttle(self, operation: str, times: int | None, share: float) -> None:
        throttled = AwsError("ThrottlingException", "Rate exceeded")
        self._add(_Fault(operation, lambda request: _THROTTLED.get(request.service, throttled), times, share))

    def fail(self, operation: str, error: AwsError, times: int | None) -> None:
        self._add(_Fault(operation, lambda _: error, times))

    def cut(self, operation: str, when: Literal["before", "after"], times: int | None) -> None:
        self._add(_Fault(operation, lambda _: CutError("the connection is cut"), times, when=when))

    def rate(self, operation: str, per_second: float) -> None:
        """A bucket of that many tokens."""
        with self._lock:
            self._rates[operation] = per_second

    def expire(self, access_key: str) -> None:
        self._expired.add(access_key)

    def revoke(self, access_key: str) -> None:
        self._unknown.add(access_key)

    def renew(self, access_key: str) -> None:
        self._expired.discard(access_key)
        self._unknown.discard(access_key)

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def before(self, request: Request) -> None:
        """AwsError or CutError if the request is not to take effect."""
        if request.access_key in self._unknown:
            invalid = AwsError("UnrecognizedClientException", "The security token included in the request is invalid.")
            raise _UNKNOWN.get(request.service, invalid)
        if request.access_key in self._expired:
            expired = AwsError("ExpiredTokenException", "The security token included in the request is expired")
            raise _EXPIRED.get(request.service, expired)
        self._strike(request, "before")
        if request.operation in self._rates and not self._token(request.operation):
            raise _THROTTLED.get(request.service, AwsError("ThrottlingException", "Rate exceeded"))

    def after(self, request: Request) -> None:
        """CutError if the answer is not to arrive."""
        self._strike(request, "after")

    def _strike(self, request: Request, when: str) -> None:
        with self._lock:
            for fault in self._faults:
                if fault.when != when or fault.operation not in (request.operation, "*") or fault.times == 0:
                    continue
                if self._dice.random() < fault.share:
                    fault.times = fault.times and fault.times - 1
                    raise fault.error(request)

    def _token(self, operation: str) -> bool:
        with self._lock:
            rate, now = self._rates[operation], time.monotonic()
            left, since = self._tokens.get(operation, (max(rate, 1.0), now))
            left = min(max(rate, 1.0), left + (now - since) * rate)
            self._tokens[operation] = (left - (left >= 1), now)
            return left >= 1
