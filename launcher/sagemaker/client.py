"""Calls of AWS, in one region and with one identity; what AWS says no with becomes our errors."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.credentials.aws import core_session, translated
from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    UnsupportedError,
    nearest,
)

if TYPE_CHECKING:
    import botocore.session

__all__ = ["LOG_GROUP", "Access", "Account", "Json", "MissingError", "Quota", "quota_of"]

Json = dict[str, Any]

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
"""Of all training jobs: https://docs.aws.amazon.com/sagemaker/latest/dg/logging-cloudwatch.html"""

_ATTEMPTS = 10
"""Of a call that is throttled or meets a server's error.

botocore's own repetitions are not used: after some hundreds of them a client of it repeats nothing any more.
"""
_SILENT_ATTEMPTS = 4
"""Of a call that nobody answers, each of which may take a minute."""
_HASTY_ATTEMPTS = 3
_LONGEST_PAUSE_S = 20.0

_EVERY_S: Mapping[str, float] = {"list_training_jobs": 0.5}
"""What an account as a whole may ask that often: https://docs.aws.amazon.com/general/latest/gr/sagemaker.html"""
_CONNECT_S, _READ_S = 10, 60

_THROTTLED = (
    "Throttling ThrottlingException ThrottledException RequestThrottledException RequestThrottled RequestLimitExceeded "
    "TooManyRequestsException SlowDown BandwidthLimitExceeded LimitExceededException EC2ThrottledException "
    "ProvisionedThroughputExceededException TransactionInProgressException PriorRequestNotComplete"
)
"""botocore, retries/standard.py"""
_AWAY = (
    "InternalFailure InternalServerError InternalError ServiceUnavailable ServiceUnavailableException RequestTimeout"
)
_EXPIRED = "ExpiredToken ExpiredTokenException TokenRefreshRequired"
_SKEWED = "RequestTimeTooSkewed RequestExpired RequestInTheFuture"
_SKEWED_WORDS = re.compile(r"signature (expired|not yet current)", re.IGNORECASE)
_UNKNOWN = (
    "UnrecognizedClientException InvalidClientTokenId InvalidAccessKeyId SignatureDoesNotMatch AuthFailure "
    "InvalidSignatureException IncompleteSignature MissingAuthenticationToken NotAuthorized"
)
_DENIED = "AccessDenied AccessDeniedException UnauthorizedOperation Forbidden 403 OptInRequired"
_MISSING = (
    "ResourceNotFound ResourceNotFoundException NoSuchEntity NoSuchBucket NoSuchKey NotFound 404 "
    "RepositoryNotFoundException ImageNotFoundException NoSuchResourceException ParameterNotFound"
)
_TAKEN = "ResourceInUse ResourceInUseException"
_QUOTA = "ResourceLimitExceeded"

_NOT_FOUND = re.compile(r"requested resource not found|could not find|does not exist", re.IGNORECASE)
"""What SageMaker says of a job that is not there, by a ValidationException."""
_QUOTA_WORDS = re.compile(
    r"service limit '(?P<name>[^']+)' is (?P<value>[\d.,]+)(?: \w+)?"
    r"(?:, with current utilization of (?P<used>[\d.,]+))?(?:.*?request delta of (?P<delta>[\d.,]+))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Access:
    """profile: of AWS's files. endpoints: service → URL; others by botocore's own rules, $AWS_ENDPOINT_URL included."""

    profile: str | None = None
    region: str | None = None
    endpoints: Mapping[str, str] = field(default_factory=dict)
    ca_bundle: str | None = None


class MissingError(Exception):
    """What a call asks for is not there."""


class _StaleError(AuthError):
    """Newer credentials may be there."""


class _DoubtError(UnreachableError):
    """It may have taken effect."""


class _SilentError(_DoubtError):
    """Nobody has answered."""


@dataclass(frozen=True)
class Quota:
    """A limit that a request went over. name: as Service Quotas has it. delta: what was wanted besides `used`."""

    name: str
    value: float
    used: float
    delta: float

    @property
    def wanted(self) -> int:
        return int(self.used + self.delta)


class Account:
    """Nothing is asked before the first call; clients are kept. Threads may share it.

    name: of the target, for messages. clock, sleep: seconds, of pauses between calls.
    """

    def __init__(
        self,
        access: Access,
        name: str = "",
        *,
        attempts: int = _ATTEMPTS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._access, self._name, self._attempts = access, name, attempts
        self._clock, self._sleep = clock, sleep
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}

    def hasty(self) -> Account:
        """The same identity, which soon gives up: for questions that nothing hangs on."""
        found = Account(self._access, self._name, attempts=_HASTY_ATTEMPTS, clock=self._clock, sleep=self._sleep)
        found._session = self._session  # a second one might ask for a second code of somebody's MFA
        return found

    @property
    def name(self) -> str:
        """Of the target, for messages."""
        return self._name or "TARGET"

    @property
    def profile(self) -> str | None:
        return self._access.profile

    @functools.cached_property
    def region(self) -> str:
        region = self._access.region or os.environ.get("AWS_REGION") or self._session.get_config_variable("region")
        if not region:
            raise SpecError(
                f"nothing says which region target {self._name!r} is in: add region: eu-west-1", key="region"
            )
        return region

    @property
    def where(self) -> str:
        """For messages."""
        return f"region {self.region}" + (f", profile {self.profile}" if self.profile else "")

    @functools.cached_property
    def _session(self) -> botocore.session.Session:
        try:
            return core_session(self.profile)
        except UnsupportedError:
            raise UnsupportedError("the sagemaker backend needs boto3: pip install 'cvlaunch[sagemaker]'") from None
        except SpecError as error:
            raise SpecError(error.message, key="profile" if self.profile else None) from error

    def client(self, service: str) -> Any:
        """botocore's, for what `call` can't do."""
        with self._lock:
            if service not in self._clients:
                self._clients[service] = self._new_client(service)
            return self._clients[service]

    def _new_client(self, service: str) -> Any:
        region, opened = self.region, self._session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
            user_agent_extra="cvlaunch",
        )
        try:
            return opened.create_client(
                service,
                region_name=region,
                endpoint_url=self._access.endpoints.get(service),
                verify=self._access.ca_bundle,
                config=config,
            )
        except (BotoCoreError, ValueError) as error:
            if isinstance(error, ValueError):
                raise SpecError(f"{error}: correct it", key=f"endpoints.{service}") from error
            raise translated(error, self.profile) from error

    def call(self, service: str, operation: str, **parameters: Any) -> Json:
        """One call, as botocore names it: `call("sagemaker", "describe_training_job", TrainingJobName=…)`.

        MissingError if what it names is not there. UnreachableError may mean that it took effect all the same.
        """
        doubt: _DoubtError | None = None
        pauses, silences, renewed = _pauses(self._attempts), 0, False
        while True:
            client = self.client(service)
            try:
                with self._turn(operation):
                    return self._once(client, service, operation, parameters)
            except UnreachableError as error:
                if isinstance(error, _DoubtError):
                    doubt = error
                silences += isinstance(error, _SilentError)
                if (pause := next(pauses, None)) is None or silences == _SILENT_ATTEMPTS:
                    raise
                self._sleep(pause)
            except (AuthError, CapacityError) as error:
                if isinstance(error, _StaleError) and not renewed and self._renew(client, service):
                    renewed = True
                elif doubt:  # this no does not tell what became of the call before
                    raise UnreachableError(f"{doubt}; and then: {error}") from error
                else:
                    raise

    @contextlib.contextmanager
    def _turn(self, operation: str) -> Iterator[None]:
        """Whoever else asks, too: threads stand in one line. The pause counts from the end: a start may take long."""
        if (pause := _EVERY_S.get(operation)) is None:
            yield
            return
        with self._lock:
            now = self._clock()
            turn = max(now, self._next.get(operation, now))
            self._next[operation] = turn + pause
        if turn > now:
            self._sleep(turn - now)
        try:
            yield
        finally:
            with self._lock:
                self._next[operation] = max(self._next[operation], self._clock() + pause)

    def _renew(self, client: Any, service: str) -> bool:
        """Whether there are other keys now, such as somebody has written into ~/.aws/credentials meanwhile.

        Roles and logins renew theirs themselves; to ask for one again may mean to ask for a code of somebody's MFA.
        """
        with self._lock:
            if self._clients.get(service) is not client:  # another thread was faster
                return True
            used = self._session.get_credentials()
            if used is None or hasattr(used, "refresh_needed"):
                return False
            fresh = core_session(self.profile)
            found = fresh.get_credentials()
            if found is None or found.get_frozen_credentials() == used.get_frozen_credentials():
                return False
            self._session = fresh
            self._clients.clear()
            return True

    def _once(self, client: Any, service: str, operation: str, parameters: Json) -> Json:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            answer: Json = getattr(client, operation)(**parameters)
        except ClientError as error:
            raise self._refusal(error) from error
        except BotoCoreError as error:
            raise self._trouble(error, service) from error
        except ResponseParserError as error:
            raise self._somebody_else(service, str(error)) from error
        # botocore takes a page of HTML for an answer that says nothing; AWS gives each of its answers an id.
        if not answer.get("ResponseMetadata", {}).get("RequestId") and len(answer) <= 1:
            raise self._somebody_else(service, "its answer says nothing")
        return answer

    def _somebody_else(self, service: str, why: str) -> CvlaunchError:
        return _SilentError(f"what answers for AWS ({service}, {self.where}) is not AWS: {why}: check the way to it")

    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Json]:
        """The items below `key` of all pages."""
        token: dict[str, str] = {}
        while True:
            answer = self.call(service, operation, **parameters, **token)
            yield from answer.get(key, ())
            name = next((name for name in ("NextToken", "nextToken") if answer.get(name)), None)
            if name is None:
                return
            token = {name: answer[name]}

    def _trouble(self, error: Exception, service: str) -> CvlaunchError:
        """No answer came."""
        kind = type(error).__name__
        if kind == "ParamValidationError":
            wrong = _MEMBERS.sub(lambda found: found[1] + nearest(found[2], found[3].split(", ")), str(error))
            return SpecError(f"{wrong.splitlines()[-1]}: correct it", key="overlay")
        if kind == "SSLError" and "CERTIFICATE_VERIFY_FAILED" in str(error):
            return SpecError(
                f"the certificate of AWS ({service}, {self.where}) is not trusted here: {error}: name the authority "
                "of whoever answers for it",
                key="storage.ca_bundle",
            )
        if kind in _SILENT.split():
            return _SilentError(f"AWS ({service}, {self.where}) did not answer: {error}: try again")
        return translated(error, self.profile)

    def _refusal(self, error: Any) -> CvlaunchError | MissingError:
        """AWS answered with no."""
        code, message = _words(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
        if code in _MISSING.split() or (code == "ValidationException" and _NOT_FOUND.search(message)):
            return MissingError(message)
        if code in _SKEWED.split() or _SKEWED_WORDS.search(message):
            return AuthError(f"the clock of this machine is wrong, says AWS ({code}: {message}): set it")
        if code in _EXPIRED.split():
            return _StaleError(f"the AWS credentials of this machine have expired: {self._login}")
        if code in _UNKNOWN.split():
            return _StaleError(f"AWS does not know these credentials ({code}: {message}): {self._login}")
        if code in _DENIED.split():
            return AuthError(self._denied(error.operation_name, message))
        if code in _THROTTLED.split():
            return UnreachableError(f"AWS asks for patience ({error.operation_name}: {message}): try again later")
        if code in _AWAY.split() or status >= 500:
            text = f"AWS failed ({error.operation_name}: {code} {message}): try again later"
            return _DoubtError(text)
        if code in _TAKEN.split():
            return ConflictError(message)
        if code == _QUOTA:
            return CapacityError(message)
        said = _ECHO.sub("Value '…' at '", _ENUM.sub(_nearest_of, message))
        return SpecError(f"AWS refuses it ({error.operation_name}): {said}")

    @property
    def _login(self) -> str:
        profile = self.profile
        if profile:
            return f"run `cvlaunch login {self.name}`, which is `aws sso login --profile {profile}` for SSO"
        return f"set new ones (AWS_ACCESS_KEY_ID, …), or run `cvlaunch login {self.name}`"

    def _denied(self, operation: str, message: str) -> str:
        found = re.search(r"not authorized to perform:? ([\w-]+:\w+)", message)
        action = found[1] if found else operation
        return (
            f"you may not do {action} ({self.where}): {message}: ask for the policy that "
            f"`cvlaunch targets policy {self.name}` prints"
        )


_SILENT = (
    "EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError ConnectionError SSLError "
    "ProxyConnectionError HTTPClientError IncompleteReadError ResponseStreamingError"
)


def _pauses(attempts: int) -> Iterator[float]:
    """Between them: at most 1, 2, 4, … seconds, so that many who were sent away don't come back together."""
    for number in range(attempts - 1):
        yield random.uniform(0, min(2.0**number, _LONGEST_PAUSE_S))  # noqa: S311 nothing secret


_MEMBERS = re.compile(r"(Unknown parameter in [^:]+: \"([^\"]*)\"), must be one of: ([\w, ]+)")
_ENUM = re.compile(r"(Value '(?P<value>[^']*)' at .*?enum value set: )\[(?P<words>[^\]]{200,})\]", re.DOTALL)

_ECHO = re.compile(r"Value '(?:(?!' at ').){120,}' at '", re.DOTALL)
"""All variables of a job, for one of them: long, and nobody's business in a log."""


def _nearest_of(found: re.Match[str]) -> str:
    """AWS lists all that there is, such as three hundred instance types."""
    words = found["words"].split(", ")
    return f"{found[1]}[{words[0]}, … {len(words)} in all]{nearest(found['value'], words)}"


def _words(error: Any) -> tuple[str, str]:
    found = error.response.get("Error", {})
    return str(found.get("Code", "")), str(found.get("Message") or found.get("message") or error)


def quota_of(message: str) -> Quota | None:
    """What AWS says of a limit that a request goes over; None if it says something else."""
    found = _QUOTA_WORDS.search(message)
    if found is None:
        return None
    value, used, delta = (float((found[part] or "0").replace(",", "")) for part in ("value", "used", "delta"))
    return Quota(found["name"], value, used, delta or 1.0)
