"""SageMaker as its users meet it: jobs in real containers, and what a run says of them.

The promises that every backend keeps are in the conformance suite; trainings in test_sagemaker_training.py.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import Run, State, submit
from launcher.cli.app import main
from launcher.compare import compare
from launcher.ledger import Ledger
from launcher.status import Status
from launcher.testing.conformance import text_of
from tests.services.aws import AwsCloud
from tests.trainings import at_home, digits, rank_0_port, series, train
from tests.worlds.sagemaker import IMAGE, SageMakerWorld, sagemaker_world

__all__ = ["at_home", "digits", "rank_0_port"]

pytestmark = pytest.mark.needs("podman", "debootstrap")

PYTHON = "/opt/venv/bin/python"
FOREIGN = IMAGE.replace("trainer", "foreign")


@pytest.fixture(scope="session")
def make_world(request: pytest.FixtureRequest) -> Callable[[Path], SageMakerWorld]:
    return sagemaker_world(request)


@pytest.fixture
def world(
    make_world: Callable[[Path], SageMakerWorld], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SageMakerWorld]:
    made = make_world(tmp_path / "world")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield made
    made.cloud.clear()


@dataclasses.dataclass(frozen=True)
class Live:
    """A user's folder with a target `aws`."""

    folder: Path
    world: SageMakerWorld

    @property
    def cloud(self) -> AwsCloud:
        return self.world.cloud

    def send(self, job: Mapping[str, Any], target: Mapping[str, Any] | None = None) -> Run:
        targets = {"targets": {"aws": {**self.world.target, **(target or {})}}}
        (self.folder / "targets.yaml").write_text(yaml.safe_dump(targets))
        (self.folder / "job.yaml").write_text(yaml.safe_dump({"name": "life", "image": IMAGE, **job}))
        return submit(self.folder / "job.yaml", target="aws")

    def script(self, script: str, *, target: Mapping[str, Any] | None = None, **job: Any) -> Run:
        return self.send({"command": [PYTHON, "-c", script], **job}, target)


@pytest.fixture
def live(world: SageMakerWorld, tmp_path: Path) -> Live:
    return Live(tmp_path, world)


@pytest.fixture
def scripted(aws: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Live:
    """Its jobs run no container."""
    world = SageMakerWorld(aws, image="none")
    aws.script("")
    monkeypatch.chdir(tmp_path)
    return Live(tmp_path, world)


def name_of(run: Run) -> str:
    assert run.handle is not None
    return run.handle.native


def in_lines(run: Run, text: str, seconds: float = 180) -> None:
    """Waits until it has printed that."""
    deadline = time.monotonic() + seconds
    while text not in text_of(run):
        assert time.monotonic() < deadline and not run.status().state.terminal, (run.status(), text_of(run))
        time.sleep(0.1)


def end_of(run: Run, *states: State) -> Status:
    status = run.wait(timeout=300)
    assert status.state in states, (status, text_of(run))
    return status


# -- how it ends ------------------------------------------------------------------------------------------------------

LEAVES = """\
import os, sys
for place, name in ("OUTPUT", "notes.txt"), ("MODEL", "weights.bin"):
    folder = os.environ["CVLAUNCH_" + place]
    os.makedirs(folder, exist_ok=True)
    open(folder + "/" + name, "w").write("left")
os.makedirs("/opt/ml/output/data", exist_ok=True)
open("/opt/ml/output/data/extra.txt", "w").write("packed")
"""


def test_what_a_failed_job_leaves_comes_home_with_its_reason(live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    run = live.script(LEAVES + "print('no such column: label', file=sys.stderr)\nsys.exit(3)\n")
    status = end_of(run, State.FAILED)
    assert status.exit_code == 3
    failure = live.cloud.job(name_of(run))["FailureReason"]
    assert failure.startswith("AlgorithmError: ") and failure.endswith("exit code: 3")
    assert status.reason == "exit code 3" and f": {status.reason}\n" in failure and "no such column: label" in failure
    capfd.readouterr()
    assert main(["status", run.id]) == 0
    assert status.reason in capfd.readouterr().out
    assert main(["sync", run.id, "home"]) == 0
    home = live.folder / "home" / run.id
    found = {str(path.relative_to(home)): path.read_text() for path in home.rglob("*.txt")}
    assert [text for name, text in found.items() if name.endswith("notes.txt")] == ["left"], found
    assert found["output/data/extra.txt"] == "packed", found


ENDS: dict[str, tuple[str, Mapping[str, Any], State, int | None, str]] = {
    "configuration": ("raise SystemExit(64)", {"retries": 2}, State.FAILED, 64, "64"),
    "killed": ("import os; os.kill(os.getpid(), 9)", {}, State.FAILED, 137, "killed by SIGKILL"),
    "timeout": ("import time; time.sleep(60)", {"resources": {"timeout": "1s", "grace": "5s"}}, State.TIMED_OUT, None,
                "the timeout of"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_ends(live: Live, name: str) -> None:
    script, job, state, code, words = ENDS[name]
    live.cloud.grace_s = 5.0
    run = live.script(script, **job)
    status = end_of(run, state)
    assert words in status.reason, status
    assert code in (None, status.exit_code), status
    assert status.attempt == 1


def test_a_failure_is_known_without_the_output_store(live: Live) -> None:
    """FailureReason says what result.json would."""
    run = live.script("raise SystemExit(64)")
    end = end_of(run, State.FAILED)
    run.store().delete(["output/result.json"])
    run = Run(run.record, Ledger())
    again = next(iter(backend_status(run)))
    assert (again.state, again.exit_code) == (State.FAILED, 64), again
    assert again.reason and again.reason in end.reason


def backend_status(run: Run) -> list[Status]:
    from launcher.submission import backend_of

    assert run.handle is not None
    return list(backend_of(run.record).status([run.handle]).values())


# -- cancelling -------------------------------------------------------------------------------------------------------

PATIENT = """\
import os, signal, time
def stop(*_):
    print("it ends well", flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, stop)
print("it runs", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("who", ["cvlaunch", "console"])
def test_a_running_job_is_stopped_in_time(live: Live, who: str) -> None:
    run = live.script(PATIENT)
    in_lines(run, "it runs")
    began = time.monotonic()
    if who == "cvlaunch":
        run.cancel()
    else:
        live.cloud.client("sagemaker").stop_training_job(TrainingJobName=name_of(run))
    end_of(run, State.CANCELLED)
    assert time.monotonic() - began < 60
    assert "it ends well" in text_of(run)
    assert live.cloud.job(name_of(run))["TrainingJobStatus"] == "Stopped"
    run.cancel()
    assert run.status().state is State.CANCELLED, "twice is once"


def test_a_waiting_job_is_stopped(scripted: Live) -> None:
    run = scripted.script("pass")
    scripted.cloud.enter(name_of(run), "Pending")
    assert run.status().state is State.QUEUED
    run.cancel()
    assert run.wait(timeout=30).state is State.CANCELLED
    run.cancel()
    done = scripted.script("pass")
    scripted.cloud.finish(name_of(done))
    done.cancel()
    assert done.wait(timeout=30).state is State.SUCCEEDED, "it was faster"


# -- what goes in and out ---------------------------------------------------------------------------------------------

ALL = """\
import os, hashlib
for channel in "train", "val":
    folder = os.environ["CVLAUNCH_ROOT"] + "/input/data/" + channel
    print(channel, sorted(os.listdir(folder)), open(folder + "/a.txt").read(), flush=True)
for name in "PLAIN", "KEY", "PARAMETER":
    print(name, hashlib.sha256(os.environ[name].encode()).hexdigest(), flush=True)
print("env", os.environ["HOW"])
"""


def test_everything_that_a_job_can_have(live: Live) -> None:
    import hashlib

    cloud = live.cloud
    for key in "train/a.txt", "train-old/b.txt", "val/a.txt":
        cloud.account.write(live.world.bucket, f"data/{key}", key.encode())
    values = {"PLAIN": "hunter2-plain", "KEY": "hunter2-key", "PARAMETER": "hunter2-parameter"}
    secrets = cloud.client("secretsmanager")
    plain = secrets.create_secret(Name=f"plain-{live.world.bucket}", SecretString=values["PLAIN"])["ARN"]
    keyed = f"keyed-{live.world.bucket}"
    secrets.create_secret(Name=keyed, SecretString=json.dumps({"password": values["KEY"], "other": 1}))
    parameter = f"/{live.world.bucket}/token"
    cloud.client("ssm").put_parameter(Name=parameter, Value=values["PARAMETER"], Type="SecureString")
    run = live.script(
        LEAVES + ALL,
        env={"HOW": 'o\'neill "x" $HOME é'},
        tags={"team": "vision", "odd, one": "a;b"},
        data={name: f"s3://{live.world.bucket}/data/{name}" for name in ("train", "val")},
        secrets={
            "PLAIN": f"store:secretsmanager:{plain}",
            "KEY": f"store:secretsmanager:{keyed}#password",
            "PARAMETER": f"store:ssm:{parameter}",
        },
        target={
            "input_modes": {"val": "FastFile"},
            "keep_alive": "10m",
            "tags": {"cost": "4711"},
            "overlay": {"OutputDataConfig": {"CompressionType": "NONE"}},
        },
    )
    status = end_of(run, State.SUCCEEDED)
    assert "billed" in status.reason
    text = text_of(run)
    assert "train ['a.txt'] train/a.txt" in text and "val ['a.txt'] val/a.txt" in text
    for name, value in values.items():
        assert f"{name} {hashlib.sha256(value.encode()).hexdigest()}" in text
    assert 'env o\'neill "x" $HOME é' in text
    described = cloud.job(name_of(run))
    assert {channel["ChannelName"]: channel["InputMode"] for channel in described["InputDataConfig"]} == {
        "train": "File",
        "val": "FastFile",
    }
    assert described["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert described["ModelArtifacts"]["S3ModelArtifacts"].endswith("/artifacts/" + name_of(run) + "/output/model/")
    tags = cloud.tags(name_of(run))
    assert {"cost": "4711", "team": "vision", "cvlaunch-run": run.id}.items() <= tags.items() and len(tags) == 5
    seen = [json.dumps(described, default=str), json.dumps(tags), json.dumps(cloud.lines(name_of(run))), text]
    seen += [read(cloud, live.world.bucket, item.key) for item in cloud.account.objects(f"s3://{live.world.bucket}")]
    seen.append(json.dumps(dataclasses.asdict(run.record), default=str))
    assert [value for value in values.values() if any(value in place for place in seen)] == []
    home = run.sync(live.folder / "home").path
    assert (home / "model/weights.bin").read_text() == "left" and (home / "output/data/extra.txt").exists()


NO_SECRET = {
    "missing": ("store:secretsmanager:nothing-x", "Secrets Manager has no 'nothing-x' in eu-west-1: correct the"),
    "missing parameter": ("store:ssm:/nothing-x", "SSM's Parameter Store has no '/nothing-x' in eu-west-1: correct"),
    "forbidden": ("store:secretsmanager:theirs-x",
                  "the job's role may not read 'theirs-x': it needs secretsmanager:GetSecretValue on it"),
}  # fmt: skip


def test_a_secret_that_the_job_can_t_have(live: Live) -> None:
    """Nobody tries it again: it is wrong."""
    for name, (reference, words) in NO_SECRET.items():
        if name == "forbidden":
            live.cloud.fail("GetSecretValue", "AccessDeniedException", "not authorized", times=None)
        run = live.script("pass", secrets={"TOKEN": reference}, retries=2)
        status = end_of(run, State.FAILED)
        assert (status.exit_code, status.attempt) == (64, 1) and words in status.reason, status


def read(cloud: AwsCloud, bucket: str, key: str) -> str:
    return (cloud.account.read(bucket, key) or b"").decode(errors="replace")


def test_a_foreign_image(live: Live, base_image: str) -> None:
    """It is started as SageMaker starts images, and its words and files are brought home."""
    live.cloud.serve_image(FOREIGN, image=base_image)
    script = 'echo "hello $WHO: $0 $1"; echo end >/opt/ml/output/data/notes.txt; echo w >/opt/ml/model/w.bin'
    overlay = {
        "AlgorithmSpecification": {"ContainerEntrypoint": ["/bin/sh", "-c", f"mkdir -p /opt/ml/output/data; {script}"]}
    }
    job = {"runner": "none", "image": FOREIGN, "command": ["a b", "$HOME"], "env": {"WHO": "you"}}
    run = live.send(job, {"overlay": overlay})
    end_of(run, State.SUCCEEDED)
    assert "hello you: a b $HOME" in text_of(run).splitlines()
    home = run.sync(live.folder / "home").path
    assert (home / "model/w.bin").read_text() == "w\n"
    assert (home / "output/data/notes.txt").read_text() == "end\n"


def test_a_foreign_image_says_why_it_failed(live: Live, base_image: str, capfd: pytest.CaptureFixture[str]) -> None:
    live.cloud.serve_image(FOREIGN, image=base_image)
    script = "printf 'the labels are empty\\nsee labels.csv' >/opt/ml/output/failure; exit 7"
    overlay = {"AlgorithmSpecification": {"ContainerEntrypoint": ["/bin/sh", "-c", script]}}
    run = live.send({"runner": "none", "image": FOREIGN}, {"overlay": overlay})
    status = end_of(run, State.FAILED)
    assert (status.reason, status.exit_code) == ("the labels are empty\nsee labels.csv", 7)
    capfd.readouterr()
    assert main(["status", run.id]) == 0
    assert main(["runs"]) == 0
    assert capfd.readouterr().out.count("the labels are empty see labels.csv") == 2, "in one line"


@pytest.mark.usefixtures("rank_0_port")
def test_two_instances_are_followed(live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "import os, time\nrank = os.environ.get('CVLAUNCH_NODE_RANK', '?')\n"
        "for n in range(6):\n    print('line', n, flush=True)\n    time.sleep(0.3)\n"
    )
    run = live.script(script, resources={"nodes": 2})
    codes: list[int] = []
    follower = threading.Thread(target=lambda: codes.append(main(["logs", run.id, "--follow"])))
    follower.start()
    follower.join(300)
    assert codes == [0] and run.status().state is State.SUCCEEDED, text_of(run)
    lines = capfd.readouterr().out.splitlines()
    for n in range(6):
        assert len([line for line in lines if line.endswith(f"line {n}")]) == 2, lines
    assert {line.node for line in run.logs()} == {0, 1}
    assert main(["watch", run.id]) == 0
    assert "SUCCEEDED" in "".join(capfd.readouterr())


# -- with other tools, and after ---------------------------------------------------------------------------------------


def test_a_training_s_life_afterwards(
    digits: Path, world: SageMakerWorld, at_home: Callable[..., Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The console has what it has of other jobs; weights of the run begin another; pages and diffs know it."""
    ledger = Ledger()
    run = train(digits, world.target, ledger, {"train.epochs": "1"}, settings=world.settings)
    assert run.wait(timeout=600).state is State.SUCCEEDED, text_of(run)
    described = world.cloud.job(name_of(run))
    assert described["HyperParameters"]["epochs"] == "1"
    assert described["ModelArtifacts"]["S3ModelArtifacts"].endswith(f"/artifacts/{name_of(run)}/output/model.tar.gz")
    assert {item["Name"] for item in described["AlgorithmSpecification"]["MetricDefinitions"]} >= {
        item["MetricName"] for item in described["FinalMetricDataList"]
    }
    again = train(
        digits,
        world.target,
        ledger,
        {"train.epochs": "1", "train.init": f"run://{run.id}/model"},
        settings=world.settings,
    )
    assert again.wait(timeout=600).state is State.SUCCEEDED, text_of(again)
    assert "weights: unpacking model.tar.gz" in text_of(again)
    first, then = (one.metrics().series("train/loss")[0][1] for one in (run, again))
    assert then < first - 0.2, "it did not begin at the beginning"
    assert main(["report", run.id, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert run.id in page and "epoch 1/1  loss " in page
    capfd.readouterr()
    assert main(["diff", run.id, again.id]) == 1
    assert "init" in capfd.readouterr().out
    home = at_home(**{"train.epochs": "1"})
    assert series(run.metrics()) == series(home.metrics())
    said = compare(run.record, home.record)
    assert said.identical and said.differences == (), said
