"""An AWS account in this process: starting, preparing and disturbing it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tests.services.aws.account import ACCOUNT, Account, RoleKeys
from tests.services.aws.api import SageMaker
from tests.services.aws.cloudwatch import LogPages
from tests.services.aws.faults import Call, Faults
from tests.services.aws.instances import GROUP, LABEL
from tests.services.aws.jobs import ENDED, Job, Jobs
from tests.services.aws.lookups import Lookups
from tests.services.aws.quotas import Quotas, quota_name
from tests.services.aws.runs import Run, Settings
from tests.services.aws.server import Server
from tests.services.aws.sso import SignIn
from tests.services.aws.wire import Answer, AwsError, Json, Request, json_answer
from tests.services.kube.containers import remove_containers
from tests.services.podman import configure, podman, podman_works

__all__ = ["REGION", "AwsCloud", "aws_cloud"]

REGION = "eu-west-1"

_ACCESS_KEY = "AKIATESTTESTTESTTEST"
_SECRET_KEY = "test/secret/test/secret/test/secret/test"
_PREFIX = "cvlaunch-test-aws-"
_KEYS_LAST_S = 3600
_USUAL_GRACE_S = 120.0
_PATIENCE_S = 120.0


class AwsCloud:
    """All services at one endpoint, in account 123456789012.

    grace_s: between SIGTERM and SIGKILL. late_names_s: how long the names of a job's instances don't resolve.
    keys_last_s: how long the keys of a job's role are good for.
    """

    def __init__(self, folder: Path, owner: str, region: str = REGION) -> None:
        self.region = region
        self.account = Account(region)
        self.keys_last_s = _KEYS_LAST_S
        self._folder, self._owner = folder, owner
        self._settings = Settings(folder / "instances", owner)
        self._jobs = Jobs()
        self._quotas = Quotas(self._jobs)
        self._faults = Faults()
        self._sign_in = SignIn(self.account)
        self.lookups = Lookups()
        self._pages = LogPages(self.account)
        self._runs: dict[Job, Run] = {}
        self._keys: dict[str, list[RoleKeys]] = {}
        self._sagemaker = SageMaker(self._jobs, self._quotas, self.account, self._start, self._stop)
        self._server = Server(self.account, self._faults, self._answer)
        self._settings.endpoint = self._server.endpoint

    # -- ways in ------------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """Of all services."""
        return self._server.endpoint

    @contextlib.contextmanager
    def behind_tls(self, certificate: Path, key: Path) -> Iterator[str]:
        """A second endpoint."""
        from werkzeug.serving import make_server

        server = make_server("127.0.0.1", 0, self._server, threaded=True, ssl_context=(str(certificate), str(key)))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"https://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    @property
    def access_key(self) -> str:
        """Of `environment`."""
        return _ACCESS_KEY

    @property
    def environment(self) -> dict[str, str]:
        """What a client's processes need."""
        return {
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str, region: str | None = None) -> Any:
        """boto3's, to prepare and to look behind the curtain; its calls are counted like all others."""
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name=region or self.region,
            aws_access_key_id=_ACCESS_KEY,
            aws_secret_access_key=_SECRET_KEY,
        )

    # -- what there is ------------------------------------------------------------------------------------------------

    def bucket(self, name: str | None = None, region: str | None = None) -> str:
        """`s3://name`, empty if it is new."""
        name = name or f"runs-{secrets.token_hex(4)}"
        if self.account.bucket_region(name) is None:
            self.account.create_bucket(name, region or self.region)
        return f"s3://{name}"

    def role(self, name: str = "trainer", trusted: bool = True) -> str:
        """Its ARN. trusted: SageMaker may assume it."""
        return self.account.create_role(name, "sagemaker.amazonaws.com" if trusted else "ec2.amazonaws.com")

    def reference(self, repository: str = "cvlaunch/trainer", tag: str = "test") -> str:
        """Of an image in this account's ECR."""
        return f"{ACCOUNT}.dkr.ecr.{self.region}.amazonaws.com/{repository}:{tag}"

    def serve_image(self, reference: str, *, image: str, architecture: str = "amd64") -> None:
        """`reference`, of ECR, is podman's `image` in jobs."""
        self.account.push_image(reference, architecture)
        self._settings.images[reference] = image

    def offer(self, instance_type: str) -> None:
        """One that botocore's model doesn't know yet."""
        self._quotas.offered.add(instance_type)

    def sign_in(self, home: Path, profile: str, *, role: str = "trainer") -> str:
        """A profile with a log-in by SSO, as `aws sso login` leaves it below `home`. Its token.

        botocore looks for the home folder when it is imported (`SSOTokenProvider._SSO_TOKEN_CACHE_DIR`).
        """
        return self._sign_in.log_in(home, profile, role)

    def sign_out(self, token: str) -> None:
        self._sign_in.log_out(token)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def posted(self, name: str) -> Json:
        """The body of CreateTrainingJob, as it came."""
        return self._jobs.get(name).posted

    def job(self, name: str) -> Json:
        """As DescribeTrainingJob says it. AwsError if there is none."""
        return self._jobs.get(name).described()

    def tags(self, name: str) -> dict[str, str]:
        return dict(self._jobs.get(name).tags)

    @property
    def names(self) -> list[str]:
        """Of all jobs, the oldest first."""
        return [job.name for job in self._jobs.all()]

    def wait(self, name: str, *statuses: str, seconds: float = _PATIENCE_S) -> Json:
        """Until its status, or its secondary status, is one of these, or it has ended. AssertionError if it isn't."""
        deadline = time.monotonic() + seconds
        job = self._jobs.get(name)
        while not (job.over or {job.status, job.secondary} & set(statuses)):
            assert time.monotonic() < deadline, job.described()
            time.sleep(0.02)
        said = job.described()
        assert {job.status, job.secondary} & set(statuses or ENDED), said
        return said

    def lines(self, name: str) -> dict[str, list[str]]:
        """What stands in CloudWatch: stream → lines."""
        return self.account.lines(GROUP, f"{name}/")

    def keys(self, name: str) -> list[str]:
        """Access keys that the containers of this job got, the newest last."""
        return [keys.access_key for keys in self._keys.get(name, ())]

    def interrupt(self, name: str) -> None:
        """Managed spot: its machines are taken away (SIGTERM, grace, SIGKILL), then it starts again."""
        self._run(name).ask("interrupt")

    def fail_internally(self, name: str) -> None:
        """An error of the platform; RetryStrategy says whether it is tried again."""
        self._run(name).ask("crash")

    def give_up(self, name: str) -> None:
        """As if MaxPendingTimeInSeconds, at least half an hour, had passed."""
        self._run(name).ask("pending")

    def hold(self, name: str, secondary_status: str) -> None:
        """The job stays in it, before anything is done there, until `release`; it need not be there yet."""
        self._settings.held.add((name, secondary_status))

    def release(self, name: str) -> None:
        self._settings.held = {held for held in self._settings.held if held[0] != name}

    def script(self, prefix: str) -> None:
        """Jobs whose name begins so run no container: `enter` and `finish` say how they go on."""
        self._sagemaker.scripted.add(prefix)

    def enter(self, name: str, secondary_status: str, message: str = "") -> None:
        self._jobs.get(name).enter(secondary_status, message)

    def age(self, name: str, seconds: float) -> None:
        """As if it had been made so much earlier."""
        self._jobs.get(name).created -= seconds

    def finish(self, name: str, status: str = "Completed", *, secondary: str = "", reason: str = "") -> None:
        """reason: FailureReason, of one that Failed."""
        self._jobs.get(name).end(status, secondary, reason)

    def _run(self, name: str) -> Run:
        return self._runs[self._jobs.get(name)]

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    @property
    def calls(self) -> Sequence[Call]:
        """Since the last `clear`, of all services, but for what containers ask of the platform."""
        return tuple(self._server.calls)

    def count(self, operation: str, *, status: int | None = None) -> int:
        return sum(call.operation == operation and status in (None, call.status) for call in self.calls)

    def throttle(self, operation: str, *, times: int | None = None, share: float = 1.0) -> None:
        """The next `times` calls, or all until `clear`; share: of them, the others pass. `*` is any operation."""
        self._faults.throttle(operation, times, share)

    def rate(self, operation: str, *, per_second: float) -> None:
        """More are throttled."""
        self._faults.rate(operation, per_second)

    def fail(self, operation: str, code: str, message: str, *, times: int | None = 1, status: int = 400) -> None:
        self._faults.fail(operation, AwsError(code, message, status), times)

    def cut(self, operation: str, when: Literal["before", "after"] = "before", *, times: int | None = 1) -> None:
        """The connection is lost before it takes effect, or after."""
        self._faults.cut(operation, when, times)

    def heal(self) -> None:
        """No more faults; keys that have expired are good again."""
        self._faults.clear()

    def quota(self, instance_type: str, count: int, *, spot: bool = False, running: int = 0) -> None:
        """running: of them, by somebody else's jobs."""
        name = quota_name(instance_type, spot)
        self._quotas.values[name], self._quotas.running[name] = count, running

    def quota_value(self, name: str, value: float) -> None:
        """Of any quota, as `Longest run time for a training job` (seconds)."""
        self._quotas.values[name] = value

    def no_capacity(self, instance_type: str, how: Literal["fail", "pend"] = "fail") -> None:
        self._settings.lacking[instance_type] = how

    def capacity(self, instance_type: str) -> None:
        """There is some again."""
        self._settings.lacking.pop(instance_type, None)

    def expire(self, access_key: str) -> None:
        """It is refused from now on, as one that has expired."""
        self._faults.expire(access_key)

    def revoke(self, access_key: str) -> None:
        """It is refused from now on, as one that nobody knows."""
        self._faults.revoke(access_key)

    def renew(self, access_key: str) -> None:
        """It is good again."""
        self._faults.renew(access_key)

    def log_pages(self, *, events: int = 10_000, empty: int = 0) -> None:
        """Pages of GetLogEvents have no more events than that, and the next `empty` ones have none, before the end."""
        self._pages.page, self._pages.empty = events, empty

    def say(self, name: str, *lines: str, host: int = 1, epoch: int = 1_700_000_000) -> None:
        """Lines of a scripted job, in its log stream."""
        now = round(time.time() * 1000)
        self.account.put_lines(GROUP, f"{name}/algo-{host}-{epoch}", [(now, line) for line in lines])

    def forget_logs(self, name: str) -> None:
        """CloudWatch has no streams of this job any more."""
        self.account.remove_streams(GROUP, f"{name}/")

    @property
    def grace_s(self) -> float:
        return self._settings.grace_s

    @grace_s.setter
    def grace_s(self, seconds: float) -> None:
        self._settings.grace_s = seconds

    @property
    def late_names_s(self) -> float:
        return self._settings.late_names_s

    @late_names_s.setter
    def late_names_s(self, seconds: float) -> None:
        self._settings.late_names_s = seconds

    # -- its life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self.clear()
        self._server.stop()
        if podman_works():
            names = podman("ps", "--all", "--filter", f"label={LABEL}={self._owner}", "--format", "{{.Names}}")
            remove_containers(names.split())

    def clear(self) -> None:
        """Ends containers; forgets jobs, their logs, faults, quotas and calls. Buckets, roles and images stay."""
        runs = list(self._runs.values())
        for run in runs:
            run.ask("kill")
        for run in runs:
            run.join(_PATIENCE_S)
        for job in self._jobs.all():
            self.account.remove_streams(GROUP, f"{job.name}/")
        self._runs.clear()
        self._jobs.clear()
        self._quotas.clear()
        self._faults.clear()
        self.lookups.clear()
        self._pages.clear()
        self._sagemaker.scripted.clear()
        self._settings.held.clear()
        self._settings.lacking.clear()
        self._settings.grace_s, self._settings.late_names_s = _USUAL_GRACE_S, 0.0
        self._keys.clear()
        self._server.inside.clear()
        self._server.calls = []
        shutil.rmtree(self._settings.folder, ignore_errors=True)

    # -- what the server asks -----------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> Answer | None:
        target = request.headers.get("x-amz-target", "").partition(".")[0]
        if target == "SageMaker":
            return json_answer(self._sagemaker.answer(request.operation, request.json, request.region))
        if target == "ServiceQuotasV20190624":
            return json_answer(self._quotas.answer(request.operation, request.json, request.region))
        if (request.service, request.operation) == ("logs", "GetLogEvents"):
            return json_answer(self._pages.get_log_events(request.json, request.region))
        if request.service == "sso":
            return self._sign_in.answer(request)
        return self.lookups.answer(request, self.endpoint)

    def _start(self, job: Job) -> None:
        if not job.scripted:
            run = self._runs[job] = Run(job, self.account, self._settings, self._credentials)
            run.start()

    def _stop(self, job: Job) -> None:
        if job.status != "Stopping":
            job.enter("Stopping", status="Stopping")
        if job.scripted:
            job.end("Stopped")
        else:
            self._runs[job].ask("stop")

    def _credentials(self, job: Job) -> str:
        """Where the containers of a job read the keys of its role, new ones each time."""
        path = f"/credentials/{secrets.token_hex(16)}"
        role = job.posted["RoleArn"]

        def read() -> Json:
            keys = self.account.assume(role, "SageMaker", self.keys_last_s)
            self._keys.setdefault(job.name, []).append(keys)
            return {
                "AccessKeyId": keys.access_key,
                "SecretAccessKey": keys.secret_key,
                "Token": keys.token,
                "RoleArn": role,
                "Expiration": keys.until.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }

        self._server.inside[path] = read
        return self.endpoint + path


@contextlib.contextmanager
def aws_cloud(folder: Path, *, region: str = REGION) -> Iterator[AwsCloud]:
    """`folder` need not be there."""
    configure()
    folder.mkdir(parents=True, exist_ok=True)
    owner = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(3)}"
    cloud = AwsCloud(folder, owner, region)
    cloud.start()
    try:
        yield cloud
    finally:
        cloud.stop()
