"""What SageMaker does with a job, from Starting to its end: one thread a job."""

from __future__ import annotations

import contextlib
import re
import secrets
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.services.aws.account import Account
from tests.services.aws.instances import Instance, Place, StartError
from tests.services.aws.jobs import Job
from tests.services.aws.transfer import NoDataError, upload_folder
from tests.services.kube.containers import remove_containers

__all__ = ["Ask", "Run", "Settings"]

Ask = Literal["", "stop", "interrupt", "runtime", "wait", "pending", "crash", "kill"]
"""What is to end a job, or its attempt. crash: an internal error. kill: the cloud itself ends."""

_TICK = 0.05
_SYNC = 0.3
_NO_CAPACITY = (
    "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML instance type."
)
_INTERNAL = "InternalServerError: We encountered an internal error. Please try again."
_CANNOT_START = (
    "AlgorithmError: CannotStartContainerError. Please make sure the container can be run with 'docker run <image> "
    "train'. Please refer SageMaker documentation for details. It is possible that the Dockerfile's entrypoint is not "
    "properly defined, or missing permissions."
)
_LONGEST_PENDING = 28 * 24 * 3600.0


@dataclass
class Settings:
    """What a test can turn. images: reference in ECR → podman's. lacking: instance type → what happens. held: (job,
    secondary status). late_names_s: how long the names of a job's instances don't resolve once all have started; what
    it is at the time counts."""

    folder: Path
    owner: str
    endpoint: str = ""
    grace_s: float = 120.0
    late_names_s: float = 0.0
    images: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, Literal["fail", "pend"]] = field(default_factory=dict)
    held: set[tuple[str, str]] = field(default_factory=set)


class _OverError(Exception):
    """The job ends: its status, its secondary status, and why."""

    def __init__(self, status: str, secondary: str = "", failure: str = "") -> None:
        super().__init__(failure)
        self.status, self.secondary, self.failure = status, secondary, failure


class _AgainError(Exception):
    """The attempt is over, the job isn't."""


class Run(threading.Thread):
    """credentials: gives the URL where the containers of a job read the keys of its role."""

    def __init__(self, job: Job, account: Account, settings: Settings, credentials: Callable[[Job], str]) -> None:
        super().__init__(name=f"training job {job.name}", daemon=True)
        self.job, self._account, self._settings, self._credentials = job, account, settings, credentials
        self._ask: Ask = ""
        self._wake = threading.Event()
        self._mark = secrets.token_hex(3)  # a name may be used again
        self._starts = 0
        self._epoch = 0
        self._trained = 0.0
        self._crashes = 0
        self._containers: list[str] = []

    def ask(self, what: Ask) -> None:
        """kill comes before all else; a stop before the rest."""
        ranks: list[Ask] = ["", "interrupt", "crash", "pending", "wait", "runtime", "stop", "kill"]
        if ranks.index(what) > ranks.index(self._ask):
            self._ask = what
        self._wake.set()

    def run(self) -> None:
        try:
            self._run()
        except _OverError as over:
            self.job.billable = self._trained
            self.job.end(over.status, over.secondary, over.failure)
        except Exception as error:  # a test must not wait for a job for ever
            self.job.end("Failed", failure=f"InternalServerError: the stand-in failed: {error!r}")
            raise
        finally:
            remove_containers(self._containers)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(_AgainError):
                self._attempt()

    # -- phases -------------------------------------------------------------------------------------------------------

    def _attempt(self) -> None:
        self._hold("Starting")
        self._wait_for_capacity()
        image = self._pull()
        self._enter("Downloading")
        instances = self._prepare(image)
        self._enter("Training")
        began = time.monotonic()
        try:
            ask = self._train(instances, began)
        finally:
            self._trained += time.monotonic() - began
            for instance in instances:
                instance.forget()
        self._settle(instances, ask)

    def _enter(self, secondary: str) -> None:
        self.job.enter(secondary)
        self._hold(secondary)

    def _hold(self, secondary: str) -> None:
        while (self.job.name, secondary) in self._settings.held and not self._ask:
            self._wait()
        self._heed()

    def _linger(self, secondary: str) -> None:
        """Held where nothing but the end of the cloud ends it."""
        while (self.job.name, secondary) in self._settings.held and self._ask != "kill":
            self._wake.wait(_TICK)
            self._wake.clear()

    def _wait(self) -> None:
        self._check_times()
        self._wake.wait(_TICK)
        self._wake.clear()

    def _heed(self) -> None:
        """While nothing runs."""
        if not self._ask:
            return
        if self._ask == "interrupt":
            self._restart("Interrupted")
        if self._ask == "crash":
            self._crash()
        if self._ask != "stop":
            self.job.enter("Stopping", status="Stopping")
        self._linger("Stopping")
        raise _OverError("Stopped", _SECONDARY.get(self._ask, ""))

    def _check_times(self) -> None:
        stopping = self.job.posted.get("StoppingCondition", {})
        if "MaxWaitTimeInSeconds" in stopping and time.time() - self.job.created > stopping["MaxWaitTimeInSeconds"]:
            self.ask("wait")

    def _wait_for_capacity(self) -> None:
        """With InstancePreferences the first type that there is."""
        while (lacking := self._settings.lacking.get(self._choose_type())) and not self._ask:
            if lacking == "fail":
                raise _OverError("Failed", failure=_NO_CAPACITY)
            pending = self.job.posted.get("StoppingCondition", {}).get("MaxPendingTimeInSeconds")
            if self.job.secondary != "Pending" and not self.job.instance.spot:
                self.job.enter("Pending")
            if time.time() - self.job.created > (pending or _LONGEST_PENDING):
                self.ask("pending")
            self._wait()
        self._heed()
        if self.job.secondary == "Pending":
            self.job.enter("Starting")

    def _choose_type(self) -> str:
        wanted = self.job.posted["ResourceConfig"].get("InstancePreferences", ())
        free = [choice["InstanceType"] for choice in wanted if choice["InstanceType"] not in self._settings.lacking]
        if free:
            self.job.instance.type = free[0]
        return self.job.instance.type

    def _pull(self) -> str:
        reference = self.job.posted["AlgorithmSpecification"]["TrainingImage"]
        if problem := self._account.find_image(reference):
            raise _OverError(
                "Failed", failure=f"ClientError: {problem}. Please check if your ECR repository and image exist."
            )
        image = self._settings.images.get(reference)
        if image is None:
            raise _OverError("Failed", failure=f"ClientError: Please check that the image {reference} exists.")
        return image

    def _prepare(self, image: str) -> list[Instance]:
        self._starts += 1
        self._epoch = max(int(time.time()), self._epoch + 1)
        count = self.job.instance.count
        instances = [Instance(self.job, self._place(image, number, count)) for number in range(1, count + 1)]
        try:
            for instance in instances:
                instance.prepare()
        except NoDataError as error:
            raise _OverError("Failed", failure=str(error)) from error
        self._heed()
        return instances

    def _place(self, image: str, number: int, count: int) -> Place:
        mark = f"{self._mark}-{self.job.name}-{self._starts}-{number}"
        folder = self._settings.folder / mark
        folder.mkdir(parents=True)
        name = f"{self._settings.owner}-{mark}"
        self._containers.append(name)
        environment = {"TRAINING_JOB_NAME": self.job.name, "TRAINING_JOB_ARN": self.job.arn}
        if not self.job.posted.get("EnableNetworkIsolation"):
            environment["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = self._credentials(self.job)
            environment["AWS_ENDPOINT_URL"] = self._settings.endpoint
        return Place(self._account, number, count, image, environment, folder, name, self._settings.owner)

    # -- the container runs -------------------------------------------------------------------------------------------

    def _train(self, instances: list[Instance], began: float) -> Ask:
        """Until all have ended. What was asked meanwhile, if it came in time."""
        self._start(instances)
        limit = self.job.posted.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", 86400) - self._trained
        started = time.monotonic()
        asked: Ask = ""
        killed_at, named, synced = float("inf"), False, time.monotonic()
        while running := [instance for instance in instances if instance.code is None]:
            now = time.monotonic()
            if not named and now - started >= self._settings.late_names_s:
                named = True
                for instance in instances:
                    instance.announce()
            if now - began > limit:
                self.ask("runtime")
            self._check_times()
            if self._ask and (not asked or self._ask == "kill"):
                asked, killed_at = self._end(running)
            if now > killed_at:
                killed_at = float("inf")
                _signal(running, signal.SIGKILL)
            if now - synced > _SYNC:
                self._sync(instances)
                synced = now
            self._watch(running)
            if not asked and any(instance.code for instance in running):  # one that fails ends the others
                _signal([instance for instance in running if instance.code is None], signal.SIGKILL)
            self._read(instances)
        self._read(instances)
        return asked

    def _start(self, instances: list[Instance]) -> None:
        try:
            for instance in instances:
                instance.start(self._epoch)
        except StartError as error:
            _signal(instances, signal.SIGKILL)
            raise _OverError("Failed", failure=f"{_CANNOT_START} ({error})") from error

    def _end(self, running: list[Instance]) -> tuple[Ask, float]:
        ask = self._ask
        at_once = ask in ("kill", "crash")
        if ask in ("runtime", "wait"):
            self.job.enter("Stopping", status="Stopping")
        _signal(running, signal.SIGKILL if at_once else signal.SIGTERM)
        return ask, time.monotonic() + self._settings.grace_s

    def _watch(self, running: list[Instance]) -> None:
        descriptors = [instance.descriptor for instance in running if instance.descriptor >= 0]
        ready = select.select(descriptors, [], [], _TICK)[0] if len(descriptors) == len(running) else descriptors
        for instance in running:
            if instance.descriptor in ready or instance.descriptor < 0:
                instance.finish()

    def _sync(self, instances: list[Instance]) -> None:
        for instance in instances:
            if instance.checkpoints:
                instance.checkpoints.sync()

    def _read(self, instances: list[Instance]) -> None:
        patterns = self.job.posted["AlgorithmSpecification"].get("MetricDefinitions", ())
        for line in [line for instance in instances for line in instance.send_lines()]:
            for definition in patterns:
                if found := re.search(definition["Regex"], line):
                    with contextlib.suppress(ValueError):
                        self.job.metrics[definition["Name"]] = (float(found[1]), time.time())

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _settle(self, instances: list[Instance], ask: Ask) -> None:
        if ask == "kill":
            raise _OverError("Stopped")
        codes = [instance.code or 0 for instance in instances]
        if ask == "interrupt":
            if 137 not in codes:  # what is killed with its machine has no time for it
                self._sync(instances)
            self._restart("Interrupted")
        if ask == "crash":
            self._crash()
        if ask:
            self._linger("Stopping")
        self._sync(instances)
        failed = any(codes) and not ask
        self.job.enter("Uploading")
        self._upload(instances, model=not failed)
        self._linger("Uploading")
        if failed:
            raise _OverError("Failed", failure=_failure(instances))
        ask = ask or ("stop" if self.job.status == "Stopping" else "")
        raise _OverError("Stopped" if ask else "Completed", _SECONDARY.get(ask, ""))

    def _upload(self, instances: list[Instance], *, model: bool) -> None:
        config = self.job.posted["OutputDataConfig"]
        uri = f"{config['S3OutputPath'].rstrip('/')}/{self.job.name}/output"
        packed = config.get("CompressionType", "GZIP") == "GZIP"
        for name, kind, wanted in (("model", "model", model), ("output", "data", True)):
            folders = [instance.root / ("model" if name == "model" else "output/data") for instance in instances]
            archive = f"{name}.tar.gz" if packed else ""
            where = upload_folder(self._account, folders, uri, packed=archive, plain=kind) if wanted else ""
            if name == "model" and where:
                self.job.artifacts = where

    def _restart(self, secondary: str) -> None:
        self._ask = "" if self._ask in ("interrupt", "crash") else self._ask
        self.job.enter(secondary)
        self._hold(secondary)
        self.job.enter("Starting")
        raise _AgainError

    def _crash(self) -> None:
        allowed = self.job.posted.get("RetryStrategy", {}).get("MaximumRetryAttempts", 0)
        self._crashes += 1
        if self._crashes > allowed:
            raise _OverError("Failed", failure=_INTERNAL)
        self._restart("Restarting")


_SECONDARY = {"runtime": "MaxRuntimeExceeded", "wait": "MaxWaitTimeExceeded"}


def _signal(instances: list[Instance], number: signal.Signals) -> None:
    for instance in instances:
        instance.signal(number)


def _failure(instances: list[Instance]) -> str:
    """Of the first that failed and wrote why; the first, if none wrote."""
    bad = [instance for instance in instances if instance.code]
    texts = [_written(instance) for instance in bad]
    instance, text = next(((one, text) for one, text in zip(bad, texts, strict=True) if text), (bad[0], ""))
    end = f", exit code: {instance.code}"
    return f"AlgorithmError: {text[: 1024 - len(end) - len('AlgorithmError: ')]}{end}"


def _written(instance: Instance) -> str:
    file = instance.root / "output/failure"
    return file.read_text(errors="replace")[:1024] if file.is_file() else ""
