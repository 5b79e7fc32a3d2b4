"""One instance of a job: its /opt/ml, its container, its log stream."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.services.aws.account import Account
from tests.services.aws.cloudwatch import cut_event
from tests.services.aws.jobs import Job
from tests.services.aws.transfer import Checkpoints, download_channel
from tests.services.aws.wire import Json
from tests.services.podman import podman

__all__ = ["GROUP", "LABEL", "Instance", "Place", "StartError"]

GROUP = "/aws/sagemaker/TrainingJobs"
LABEL = "cvlaunch-test-aws"
"""Of all containers of a cloud; its value is its owner."""

_ROOT = "/opt/ml"
_CHECKPOINTS = "/opt/ml/checkpoints"
_PODMAN_FAILED = 125
_SHM = "64m"


class StartError(Exception):
    """What podman said."""


@dataclass(frozen=True)
class Place:
    """Where an instance works. number: from 1, of `count`. image: podman's name of it. environment: what the platform
    sets. folder: its own."""

    account: Account
    number: int
    count: int
    image: str
    environment: Mapping[str, str]
    folder: Path
    name: str
    owner: str


class Instance:
    """A container that runs once."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place = job, place
        self.root = place.folder / "ml"
        self.code: int | None = None
        self.checkpoints: Checkpoints | None = None
        self._process = self._monitor = -1
        self._log = _Log(place.folder / "log")
        self._stream = ""

    # -- before -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """All of it belongs to root, who alone can write. NoDataError if a channel has none."""
        for name in ("input/config", "input/data", "model", "output/data", "checkpoints"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        config = self.root / "input/config"
        files = {"hyperparameters": self.job.posted.get("HyperParameters", {}), "resourceconfig": self._resources()}
        for name, value in {**files, "inputdataconfig": self._channels()}.items():
            (config / f"{name}.json").write_text(json.dumps(value))
        for channel in self.job.posted.get("InputDataConfig", ()):
            if source := channel["DataSource"].get("S3DataSource"):
                download_channel(
                    self.place.account, source, self.root / "input/data" / channel["ChannelName"],
                    role=self.job.posted["RoleArn"], part=(self.place.number - 1, self.place.count),
                )  # fmt: skip
        if wanted := self.job.posted.get("CheckpointConfig"):
            self.checkpoints = Checkpoints(self.place.account, wanted["S3Uri"], self._checkpoint_folder())
            self.checkpoints.restore()
        for path in [self.root, *self.root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)

    def _resources(self) -> Json:
        hosts = sorted(f"algo-{number}" for number in range(1, self.place.count + 1))  # algo-10 before algo-2
        kind = self.job.instance.type
        return {
            "current_host": f"algo-{self.place.number}",
            "current_instance_type": kind,
            "current_group_name": "homogeneousCluster",
            "hosts": hosts,
            "instance_groups": [{"instance_group_name": "homogeneousCluster", "instance_type": kind, "hosts": hosts}],
            "network_interface_name": "lo",
        }

    def _channels(self) -> Json:
        usual = self.job.posted["AlgorithmSpecification"]["TrainingInputMode"]
        return {
            channel["ChannelName"]: {
                "TrainingInputMode": channel.get("InputMode", usual),
                "S3DistributionType": "FullyReplicated",
                "RecordWrapperType": channel.get("RecordWrapperType", "None"),
                **({"ContentType": channel["ContentType"]} if "ContentType" in channel else {}),
            }
            for channel in self.job.posted.get("InputDataConfig", ())
        }

    def _checkpoint_folder(self) -> Path:
        path = self._checkpoint_path()
        if path.startswith(_ROOT + "/"):
            return self.root / path.removeprefix(_ROOT + "/")
        return self.place.folder / "checkpoints"

    def _checkpoint_path(self) -> str:
        return str(self.job.posted.get("CheckpointConfig", {}).get("LocalPath", _CHECKPOINTS)).rstrip("/")

    # -- its life -----------------------------------------------------------------------------------------------------

    def start(self, epoch: int) -> None:
        """StartError. epoch: in the name of its log stream."""
        self._stream = f"{self.job.name}/algo-{self.place.number}-{epoch}"
        self._hosts().write_text("127.0.0.1\tlocalhost\n::1\tlocalhost\n")
        self._log.path.touch()
        done = _podman_run(["podman", "run", *self._options(), self.place.image, *self._arguments()], self.place.folder)
        if done.returncode:
            raise StartError(done.stderr.strip().removeprefix("Error: "))
        self._process, self._monitor = (_descriptor(self.place.folder / name) for name in ("pid", "monitor"))

    def announce(self) -> None:
        """The names of all instances can be resolved from now on."""
        lines = [f"{_address(self.job.arn, n)}\talgo-{n}" for n in range(1, self.place.count + 1)]
        with self._hosts().open("a") as file:
            file.write("\n".join(lines) + "\n")

    def _hosts(self) -> Path:
        return self.place.folder / "hosts"

    def _options(self) -> Iterator[str]:
        folder, isolated = self.place.folder, self.job.posted.get("EnableNetworkIsolation")
        yield from ("--detach", "--pull", "never", "--network", "none" if isolated else "host", "--no-hosts")
        yield from ("--name", self.place.name, "--label", f"{LABEL}={self.place.owner}")
        yield from ("--pidfile", str(folder / "pid"), "--conmon-pidfile", str(folder / "monitor"))
        yield from ("--log-driver", "k8s-file", "--log-opt", f"path={self._log.path}")
        yield from ("--unsetenv", "TERM", "--unsetenv", "container", "--shm-size", _SHM)
        for name, value in {**self.place.environment, **self.job.posted.get("Environment", {})}.items():
            yield from ("--env", f"{name}={value}")
        yield from ("--volume", f"{self._hosts()}:/etc/hosts:ro", "--volume", f"{self.root}:{_ROOT}:rw")
        for name in self._streamed():
            inside = f"input/data/{name}"
            yield from ("--volume", f"{self.root / inside}:{_ROOT}/{inside}:ro")
        if not self._checkpoint_path().startswith(_ROOT + "/") and self.checkpoints:
            yield from ("--volume", f"{self._checkpoint_folder()}:{self._checkpoint_path()}:rw")
        if command := self.job.posted["AlgorithmSpecification"].get("ContainerEntrypoint"):
            yield from ("--entrypoint", json.dumps(command))

    def _streamed(self) -> list[str]:
        return [name for name, channel in self._channels().items() if channel["TrainingInputMode"] == "FastFile"]

    def _arguments(self) -> list[str]:
        algorithm = self.job.posted["AlgorithmSpecification"]
        usual = [] if algorithm.get("ContainerEntrypoint") else ["train"]
        return list(algorithm.get("ContainerArguments") or usual)

    def signal(self, number: int) -> None:
        if self._process >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, number)

    @property
    def descriptor(self) -> int:
        """Can be read once the container has ended; -1 once that is known."""
        return self._monitor

    def finish(self) -> None:
        """Call it when it has ended."""
        self.code = _exit_code(self.place.name)
        self.forget()

    def forget(self) -> None:
        for descriptor in (self._process, self._monitor):
            if descriptor >= 0:
                os.close(descriptor)
        self._process = self._monitor = -1

    def send_lines(self) -> list[str]:
        """What it printed since the last time goes to CloudWatch, and is given back."""
        lines = self._log.read()
        if lines:
            events = [(stamp, part) for stamp, text in lines for part in cut_event(text)]
            self.place.account.put_lines(GROUP, self._stream, events)
        return [text for _, text in lines]


class _Log:
    """A log of podman's k8s-file driver: `TIME stdout F text`; P is part of a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._rest = 0, ""
        self._parts: dict[str, str] = {}

    def read(self) -> list[tuple[int, str]]:
        """New whole lines: (epoch milliseconds, text). CloudWatch takes none without any text."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        found = (self._line(line) for line in data[:end].decode(errors="replace").split("\n") if line)
        return _ordered([line for line in found if line and line[1]])

    def _line(self, line: str) -> tuple[int, str] | None:
        stamp, source, tag, text = [*line.split(" ", 3), ""][:4]
        whole = self._parts.pop(source, "") + text
        if tag == "P":
            self._parts[source] = whole
            return None
        return round(datetime.datetime.fromisoformat(stamp).timestamp() * 1000), whole


def _ordered(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """In one request they must be: stdout and stderr may cross by a millisecond."""
    return sorted(lines, key=lambda line: line[0])


def _address(arn: str, number: int) -> str:
    """Of 127/8: whoever listens on all addresses is reached there."""
    digest = hashlib.sha256(arn.encode()).digest()
    return f"127.{64 + digest[0] % 64}.{digest[1]}.{1 + number}"


def _podman_run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Again if podman itself failed, as it may while another process removes an image or a container."""
    for more in ([], *[["--replace"]] * 4):
        done = subprocess.run(
            [*command[:2], *more, *command[2:]],
            cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != _PODMAN_FAILED:
            break
        time.sleep(0.3)
    return done


def _descriptor(file: Path) -> int:
    """-1 if that process is gone already."""
    try:
        return os.pidfd_open(int(file.read_text()))
    except ProcessLookupError:
        return -1


def _exit_code(name: str) -> int:
    """Podman may lag behind, or fail once, as it may while another process removes a container."""
    for _ in range(100):
        state, _, code = podman(
            "container", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", name, check=False
        ).partition(" ")
        if state in ("exited", "stopped"):
            return int(code)
        time.sleep(0.1)
    return 137
