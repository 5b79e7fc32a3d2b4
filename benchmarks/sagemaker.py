"""From `submit` to CreateTrainingJob: CPU, time and requests, beside a bare boto3 script and SageMaker's own SDK.

    python benchmarks/sagemaker.py [ROUNDS] [--peer-python PYTHON] [--watch RUNS]

AWS is the stand-in of the tests (tests/services/aws), in this process; each side is a process of its own, and its CPU
time, user and system, is that from start to end. The job is a fine-tuning with two pushed datasets. The sides take
turns after a round that fills caches; medians. Exits with 1 if the command line needs more than 1.7 times the CPU time
of the bare script, which puts job.json and sends the same body, or more than 3 requests before CreateTrainingJob.

The image goes by its tag. One that goes by its digest, and was not pushed by cvlaunch, is looked for among the images
of this machine, too, which costs what its engine takes.

PYTHON: of an environment with SageMaker's SDK, 730 MB:

    uv venv peer && uv pip install --python peer/bin/python sagemaker==3.27.0

--watch polls so many runs, half of whose calls are throttled, until all have ended; exits with 1 if one ends wrong.
500 take five minutes, most of which is patience.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from launcher import manifest, render
from launcher.contract import JOB
from launcher.stores import StorageOptions, open_store
from tests.services.aws import AwsCloud, aws_cloud

MOST_CPU, MOST_REQUESTS = 1.7, 3

BARE = """
import json, sys
import boto3
name = sys.argv[1]
with open("body.json") as file:
    body = json.load(file) | {"TrainingJobName": name}
with open("job.json", "rb") as file:
    boto3.client("s3").put_object(Bucket="runs", Key=f"{name}/input/config/job.json", Body=file.read())
boto3.client("sagemaker").create_training_job(**body)
"""
OURS = "import launcher; launcher.submit('job.yaml', target='aws')"
PEER = """
import json
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import CheckpointConfig, Compute, InputData, OutputDataConfig, StoppingCondition
with open("body.json") as file:
    body = json.load(file)
machine, checkpoints = body["ResourceConfig"], body["CheckpointConfig"]
trainer = ModelTrainer(
    training_image=body["AlgorithmSpecification"]["TrainingImage"],
    role=body["RoleArn"],
    base_job_name="bench-peer",
    compute=Compute(
        instance_type=machine["InstanceType"], instance_count=1, volume_size_in_gb=machine["VolumeSizeInGB"]
    ),
    stopping_condition=StoppingCondition(max_runtime_in_seconds=body["StoppingCondition"]["MaxRuntimeInSeconds"]),
    output_data_config=OutputDataConfig(s3_output_path=body["OutputDataConfig"]["S3OutputPath"]),
    checkpoint_config=CheckpointConfig(s3_uri=checkpoints["S3Uri"], local_path=checkpoints["LocalPath"]),
    environment=body["Environment"],
    hyperparameters=body["HyperParameters"],
)
places = {one["ChannelName"]: one["DataSource"]["S3DataSource"]["S3Uri"] for one in body["InputDataConfig"]}
inputs = [InputData(channel_name=name, data_source=place) for name, place in places.items()]
trainer.train(input_data_config=inputs, wait=False, logs=False)
"""
IMPORTS = {
    "bare": "import boto3",
    "cvlaunch": "import launcher; launcher.submit",
    "peer": "from sagemaker.train import ModelTrainer",
}
PACKAGES = {"bare": ("boto3",), "cvlaunch": ("cvlaunch", "boto3"), "peer": ("sagemaker",)}
SIZE = """
import json, sys
from importlib.metadata import distributions
found = [sum(f.size or 0 for f in d.files or ()) for d in distributions()]
print(json.dumps([len(found), sum(found)]))
"""


@dataclass(frozen=True)
class Spent:
    """By one process. requests: service and operation of those before CreateTrainingJob."""

    cpu_s: float
    wall_s: float
    requests: tuple[str, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=9)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--watch", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, aws_cloud(Path(scratch) / "cloud") as cloud:
        root = Path(scratch)
        settle(root, cloud)
        if asked.watch:
            return watched(root, cloud, asked.watch)
        prepare(root, cloud)
        commands = {
            "bare": [sys.executable, "-c", BARE, "NAME"],
            "cvlaunch": [sys.executable, "-m", "launcher.cli", "submit", "job.yaml", "--target", "aws"],
            "submit()": [sys.executable, "-c", OURS],
        }
        if asked.peer_python:
            commands["peer"] = [str(asked.peer_python.absolute()), "-c", PEER]
        found = measure(root, cloud, commands, asked.rounds)
        failed = tell(found)
        tell_imports(root, asked.peer_python)
    return failed


def settle(root: Path, cloud: AwsCloud) -> None:
    """A user of its own for this process and those that it starts; bytecode is kept, as an installed program has it."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {**cloud.environment, "HOME": str(root)}
    os.environ |= {f"XDG_{name}_HOME": str(root / name.lower()) for name in ("DATA", "CACHE", "CONFIG", "STATE")}


def prepare(root: Path, cloud: AwsCloud) -> None:
    """Data, a role, an image, job.yaml and targets.yaml; and the body that ours sends, for the others to send."""
    image = cloud.reference()
    cloud.serve_image(image, image="none")
    cloud.bucket("runs")
    options = StorageOptions(endpoint=cloud.endpoint, region=cloud.region)
    places = {}
    for channel in ("train", "val"):
        for label in ("cat", "dog"):
            (root / channel / label).mkdir(parents=True)
            (root / channel / label / "1.png").write_bytes(b"x")
        places[channel] = f"{cloud.bucket('data')}/{channel}"
        manifest.push(root / channel, open_store(places[channel], options))
    job = {"name": "bench", "image": image, "train": {"task": "classify"}, "data": places}
    resources = {"gpus": 1, "gpu": "A10G", "timeout": "1h"}
    target = {"backend": "sagemaker", "region": cloud.region, "role": cloud.role(), "output": "s3://runs"}
    (root / "job.yaml").write_text(json.dumps({**job, "resources": resources}))
    (root / "targets.yaml").write_text(json.dumps({"targets": {"aws": target}}))
    plan = render(root / "job.yaml", target="aws")
    content = plan.files[JOB]
    assert isinstance(content, bytes)
    (root / "body.json").write_text(plan.text)
    (root / "job.json").write_bytes(content)


def measure(root: Path, cloud: AwsCloud, commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Spent]]:
    found: dict[str, list[Spent]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            cloud.clear()
            cloud.script("bench")
            whole = [f"bench-bare-{number}" if word == "NAME" else word for word in command]
            spent = run(whole, root)
            assert cloud.count("CreateTrainingJob", status=200) == 1, (name, cloud.calls)
            if number:
                found[name].append(Spent(spent.cpu_s, spent.wall_s, before(cloud)))
    return found


def before(cloud: AwsCloud) -> tuple[str, ...]:
    words = [f"{call.service} {call.operation}" for call in cloud.calls]
    return tuple(words[: words.index("sagemaker CreateTrainingJob")])


def run(command: Sequence[str], folder: Path) -> Spent:
    """With what the processes that it starts spend."""
    begin = time.perf_counter()
    with (folder / "output.txt").open("w+b") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begin
        output.seek(0)
        assert process.returncode == 0, (command, output.read().decode())
    return Spent(spent.ru_utime + spent.ru_stime, wall)


def tell(found: Mapping[str, Sequence[Spent]]) -> int:
    medians = {
        name: (statistics.median(s.cpu_s for s in all_), statistics.median(s.wall_s for s in all_))
        for name, all_ in found.items()
    }
    base = medians["bare"]
    print(f"{'':<10}{'CPU ms':>8}{'×':>7}{'wall ms':>9}{'×':>7}   requests before CreateTrainingJob")
    for name, (cpu, wall) in medians.items():
        asked = Counter(max((spent.requests for spent in found[name]), key=len))
        words = ", ".join(f"{count} {what}" for what, count in asked.items()) or "none"
        print(f"{name:<10}{cpu * 1000:8.0f}{cpu / base[0]:7.2f}{wall * 1000:9.0f}{wall / base[1]:7.2f}   {words}")
    ratio, most = medians["cvlaunch"][0] / base[0], max(len(spent.requests) for spent in found["cvlaunch"])
    print(
        f"cvlaunch: {ratio:.2f} times the CPU time (limit {MOST_CPU}), {most} requests before (limit {MOST_REQUESTS})"
    )
    return int(ratio > MOST_CPU or most > MOST_REQUESTS)


# -- imports and sizes ------------------------------------------------------------------------------------------------


def tell_imports(root: Path, peer: Path | None) -> None:
    for name, statement in IMPORTS.items():
        python = sys.executable if name != "peer" else str(peer.absolute()) if peer else None
        if python is None:
            continue
        spent = [run([python, "-c", statement], root) for _ in range(5)]
        cpu = statistics.median(one.cpu_s for one in spent)
        count, size = everything(python) if name == "peer" else closure(PACKAGES[name])
        print(f"{statement:<42}{cpu * 1000:6.0f} ms CPU; installed: {count} packages, {size / 1e6:.0f} MB")


def everything(python: str) -> tuple[int, int]:
    """Packages of an environment, and their bytes."""
    done = subprocess.run([python, "-c", SIZE], stdout=subprocess.PIPE, text=True, check=True)
    count, size = json.loads(done.stdout)
    return count, size


def closure(names: Sequence[str]) -> tuple[int, int]:
    """The same of packages and all that they need, without extras."""
    seen: dict[str, int] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        with contextlib.suppress(PackageNotFoundError):
            if name not in seen:
                found = distribution(name)
                seen[name] = sum(file.size or 0 for file in found.files or ())
                waiting += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in found.requires or () if ";" not in one]
    return len(seen), sum(seen.values())


# -- many runs, and a storm -------------------------------------------------------------------------------------------

WATCH = """
import json, resource, sys, time
from launcher import runs
from launcher.ledger import Ledger
from launcher.run import refresh
from launcher.submission import OpenBackends
ledger, backends = Ledger(), OpenBackends()
begin, polls, silent = time.perf_counter(), 0, 0
while left := [record for record in ledger.all() if not record.last_status.state.terminal]:
    silent += len(refresh(left, ledger=ledger, backends=backends))
    polls += 1
    print(json.dumps({"polls": polls, "left": len(left)}), flush=True)
    sys.stdin.readline()
spent = resource.getrusage(resource.RUSAGE_SELF)
found = {run.id: str(run.record.last_status.state) for run in runs()}
wall = time.perf_counter() - begin
print(json.dumps({"s": wall, "cpu_s": spent.ru_utime + spent.ru_stime, "silent": silent, "found": found}), flush=True)
"""
"""A line for each poll, and waits for one before the next."""

ENDS = (
    ("Completed", "", "SUCCEEDED"),
    ("Failed", "AlgorithmError: , exit code: 1", "FAILED"),
    ("Failed", "CapacityError: Unable to provision requested ML compute capacity.", "ERROR"),
    ("Stopped", "", "CANCELLED"),
)
"""TrainingJobStatus, FailureReason, ours."""


def watched(root: Path, cloud: AwsCloud, count: int) -> int:
    """Submits a sweep, then ends a fifth of it before each poll."""
    from launcher import submit_many

    prepare(root, cloud)
    cloud.script("bench")
    begin = time.perf_counter()
    sent = submit_many(root / "job.yaml", [[f"train.seed={number}"] for number in range(count)], target="aws")
    print(f"{count} runs submitted in {time.perf_counter() - begin:.1f} s: {asked_of(cloud)}")
    before = Counter(call.operation for call in cloud.calls)
    cloud.throttle("DescribeTrainingJob", share=0.5)
    cloud.throttle("ListTrainingJobs", share=0.5)
    expected: dict[str, str] = {}
    waiting = [run.id for run in sent]
    with watcher(root) as process:
        assert process.stdin and process.stdout
        while "polls" in (said := json.loads(process.stdout.readline())):
            for name in waiting[: count // 5 + 1]:
                status, reason, state = ENDS[len(expected) % len(ENDS)]
                cloud.finish(name, status, reason=reason)
                expected[name] = state
            waiting = waiting[count // 5 + 1 :]
            process.stdin.write("\n")
            process.stdin.flush()
            polls = said["polls"]
    calls = Counter(call.operation for call in cloud.calls) - before
    refused = sum(call.status == 400 for call in cloud.calls)
    print(
        f"{polls} polls: {said['s']:.1f} s, {said['cpu_s']:.2f} s CPU, {sum(calls.values())} calls, {refused} refused"
    )
    print("calls:", ", ".join(f"{number} {operation}" for operation, number in calls.most_common()))
    wrong = {name: state for name, state in expected.items() if said["found"].get(name) != state}
    print(f"ends: {dict(Counter(said['found'].values()))}, {len(wrong)} of them wrong; unanswered: {said['silent']}")
    return int(bool(wrong) or len(expected) != count)


def asked_of(cloud: AwsCloud) -> str:
    return ", ".join(f"{n} {what}" for what, n in Counter(call.operation for call in cloud.calls).most_common())


@contextlib.contextmanager
def watcher(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WATCH]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


if __name__ == "__main__":
    sys.exit(main())
