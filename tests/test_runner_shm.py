"""The guard of /dev/shm, with tmpfs of its own sizes, real data loaders and a real runner."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.contract import Channel, JobFile, Layout
from launcher.runner.loaders import guard_loaders, shm_reason
from launcher.runner.result import End, Word, judge
from tests.runner_world import Ended, RunnerWorld, python
from tests.trainer_runs import REPOSITORY, draw_classes, metrics

MIB = 2**20
TRAIN: dict[str, object] = {
    "task": "classify",
    "model": "test_resnet",
    "pretrained": False,
    "image_size": 64,
    "epochs": 1,
    "batch": 64,
    "workers": 8,
    "threads": 1,
}
"""Batches of 768 KiB; 8 workers need 16 MiB, and 8 batches are more than 4 MiB."""
COUNTS = {"red": 256, "green": 256}
VAL_COUNTS = {"red": 40, "green": 40}
VARIABLES = 'print({k: v for k, v in os.environ.items() if k.startswith("CVLAUNCH_LOADER")})'
ENVIRONMENT = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'trainer_image'}", "HF_HUB_OFFLINE": "1"}


def with_shm(options: str) -> tuple[str, ...]:
    """A prefix for a command that sees a /dev/shm of its own; options: of mount."""
    script = 'mount -t tmpfs -o "$0" shm /dev/shm && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, options)


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Channel, ...]:
    folder = tmp_path_factory.mktemp("data")
    counts = {"train": COUNTS, "val": VAL_COUNTS}
    return tuple(Channel(name, draw_classes(folder / name, counts[name]).as_uri(), "path") for name in counts)


Trained = tuple[RunnerWorld, Ended]
Trainer = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(channels: tuple[Channel, ...], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    def run(options: str, *arguments: str, **changes: object) -> Trained:
        world = RunnerWorld(tmp_path_factory.mktemp("world"))
        job = world.job(train={**TRAIN, **changes}, channels=channels)
        running = world.start(job, env=ENVIRONMENT, prefix=with_shm(options), arguments=arguments)
        return world, running.end(300)

    return run


@pytest.fixture(scope="module")
def guarded(train: Trainer) -> Trained:
    return train("size=4m")


@pytest.fixture(scope="module")
def unguarded(train: Trainer) -> Trained:
    """The same as a command of the user's, which nobody guards."""
    return train("size=4m", "--", sys.executable, "-m", "cvtrainer")


@pytest.mark.needs("root", "unshare")
def test_loaders_that_do_not_fit_are_made_smaller_and_the_run_says_so(guarded: Trained) -> None:
    world, ended = guarded

    assert ended.code == 0, ended.output
    assert world.result["state"] == "SUCCEEDED"
    assert "root " in ended.output and "/dev/shm 4.0 MiB, 4.0 MiB free" in ended.output
    warning = next(line for line in world.log().splitlines() if "warning: /dev/shm" in line)
    assert "has 4.0 MiB free" in warning
    assert "15.9 MiB: 8 workers, prefetch 2, batches of 768.0 KiB" in warning
    assert "going on with 3 workers, prefetch 1 (3.8 MiB)" in warning
    assert "resources.shm: 64Mi" in warning


@pytest.mark.needs("root", "unshare")
def test_with_enough_room_there_is_no_warning_and_the_numbers_are_the_same(guarded: Trained, train: Trainer) -> None:
    world, ended = train("size=64m")

    assert ended.code == 0, ended.output
    assert "warning: " not in ended.output
    expected = metrics(Layout(guarded[0].root))
    assert expected and metrics(Layout(world.root)) == expected


@pytest.mark.needs("root", "unshare")
def test_a_dev_shm_that_cannot_be_written_means_no_workers(guarded: Trained, train: Trainer) -> None:
    world, ended = train("ro")

    assert ended.code == 0, ended.output
    assert "warning: /dev/shm can't be used" in ended.output and "going on with no workers" in ended.output
    assert metrics(Layout(world.root)) == metrics(Layout(guarded[0].root))


@pytest.mark.needs("root", "unshare")
def test_without_the_guard_the_same_job_dies_and_the_reason_names_dev_shm(unguarded: Trained) -> None:
    """It shows that the guard is what saves the job; and that a full /dev/shm is an end, not a wait for ever."""
    world, ended = unguarded

    assert ended.code == 1, ended.output
    assert "No space left on device" in ended.output
    reason = world.result["reason"]
    assert "/dev/shm is too small for the data loaders (4.0 MiB); resources.shm: 1Gi" in reason
    assert "file_system does not help" in reason
    assert "\n" not in reason
    assert "/dev/shm is too small" in world.read("output/failure")


@pytest.mark.needs("root", "unshare")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("size=64m", "/dev/shm has 64.0 MiB: a PyTorch data loader needs (num_workers"),
        ("ro", "there is no /dev/shm to write in"),
        ("size=65m", None),
        ("size=0", None),
    ],
)
def test_a_command_of_the_user_gets_advice_and_no_variables(tmp_path: Path, options: str, expected: str | None) -> None:
    world = RunnerWorld(tmp_path)
    ended = world.end(world.job(python(VARIABLES)), prefix=with_shm(options))

    assert ended.code == 0 and "\n{}\n" in ended.output
    advice = [line for line in ended.output.splitlines() if "data loader" in line]
    assert len(advice) == (1 if expected else 0)
    assert expected is None or expected in advice[0]
    assert options != "size=0" or "/dev/shm without a limit" in ended.output


def job_of(task: str, **changes: Any) -> JobFile:
    train = {"task": task, "batch": 64, "image_size": 256, "workers": 8}
    job = JobFile(run_id="a", name="a", job_digest="0" * 64, output="file:///a", train=train)
    return replace(job, **changes)


@pytest.mark.parametrize(
    ("job", "free_mib", "workers", "prefetch", "words"),
    [
        (job_of("classify"), 1024, 8, 2, []),
        (job_of("classify"), 64, 3, 1, ["resources.shm: 256Mi", "the results are the same"]),
        (job_of("classify", processes=4, gpus=4), 1024, 8, 2, []),
        (job_of("classify", processes=4, gpus=4), 256, 3, 1, ["in each of 4 processes", "resources.shm: 1Gi"]),
        (job_of("classify"), None, 0, 1, ["can't be used", "no workers"]),
        (job_of("detect", gpus=1), 4096, 8, 4, []),
        (job_of("detect", gpus=1), 1600, 8, 2, ["loading may be slower"]),
        (job_of("detect", gpus=1), 256, 2, 1, ["draws its augmentation per worker"]),
        (job_of("detect"), 64, 0, 4, []),
    ],
)
def test_what_the_runner_tells_the_trainer(
    job: JobFile, free_mib: int | None, workers: int, prefetch: int, words: list[str]
) -> None:
    said: list[str] = []
    free = None if free_mib is None else free_mib * MIB
    variables = guard_loaders(job, free, foreign=False, say=said.append)

    assert variables == {"CVLAUNCH_LOADER_WORKERS": str(workers), "CVLAUNCH_LOADER_PREFETCH": str(prefetch)}
    assert all(word in said[0] for word in words)
    lowered = (workers, prefetch) not in ((8, 2 if job.train["task"] == "classify" else 4), (0, 4))  # type: ignore[index]
    assert len(said) == lowered


@pytest.mark.parametrize("train", [{"task": "classify"}, {**TRAIN, "batch": "many"}, {"batch": 4}])
def test_settings_that_the_trainer_will_refuse_are_left_to_it(train: dict[str, object]) -> None:
    assert guard_loaders(replace(job_of("classify"), train=train), 2**40, foreign=False, say=str) == {}


FULL = "RuntimeError: unable to allocate shared memory(shm) for file </torch_29_1_0>: No space left on device (28)"
FORMER = "RuntimeError: unable to write to file </torch_29_1>"
KILLED = "RuntimeError: DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's …"
NCCL = "NCCL WARN Error: failed to extend /dev/shm/nccl-x to 9637892 bytes, error: No space left on device (28)"


@pytest.mark.parametrize(
    ("code", "lines", "starts"),
    [
        (1, ["Traceback", FULL], FULL),
        (1, [FORMER, "Aborted"], FORMER),
        (1, [KILLED], KILLED),
        (1, [NCCL], NCCL),
        (135, ["epoch 1"], "killed by SIGBUS: /dev/shm is most likely too small"),
        (135, ["Bus error (core dumped)"], "Bus error (core dumped): /dev/shm is too small"),
        (1, ["OSError: [Errno 28] No space left on device: '/opt/ml/model/a.pt'"], None),
        (1, ["ValueError: busy errors"], None),
        (137, ["epoch 1"], None),
        (0, [FULL], None),
        (64, [FULL], None),
        (75, [FULL], None),
    ],
)
def test_what_a_full_dev_shm_looks_like(code: int, lines: list[str], starts: str | None) -> None:
    reason = shm_reason(code, lines)

    assert (reason or "").startswith(starts or "") and (reason is None) == (starts is None)
    assert starts is None or len(reason or "") < 700


def test_a_traceback_of_a_worker_ends_as_one_line() -> None:
    left = (1, f"RuntimeError: Caught RuntimeError in DataLoader worker process 2.\nOriginal Traceback …\n{FULL}\n")
    outcome = judge(End(1, left), None, timeout_s=None)

    assert outcome.state is Word.FAILED
    assert outcome.reason.startswith(f"{FULL}: /dev/shm is too small")


def test_what_an_earlier_start_died_of_is_not_the_reason_of_the_next(tmp_path: Path) -> None:
    world = RunnerWorld(tmp_path)
    script = f"""
if not Path("{tmp_path}/second").exists():
    Path("{tmp_path}/second").touch()
    print({FULL!r})
    sys.exit(1)
sys.exit(3)
"""
    ended = world.end(world.job(python(script), retries=1))

    assert ended.code == 3 and world.result["reason"] == "exit code 3"
    assert "/dev/shm is too small" in world.log()  # said at the restart


ULTRALYTICS = """
import itertools, sys, time
from types import SimpleNamespace
import torch
from cvtrainer.detect import fit_into_shm
from launcher.shm import TORCH_PREFETCH, ULTRALYTICS_PREFETCH, Loaders, Loading
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer

folder, prefetch = sys.argv[1], int(sys.argv[2])
args = get_cfg(overrides={"task": "detect", "imgsz": 64, "workers": 1})
data = {"names": {0: "thing"}, "nc": 1, "channels": 3, "train": folder, "val": folder}
trainer = SimpleNamespace(args=args, data=data, model=torch.nn.Module(), device=torch.device("cpu"))
trainer.model.stride = torch.tensor([32])
trainer.build_dataset = lambda *rest: DetectionTrainer.build_dataset(trainer, *rest)
train, val = (
    DetectionTrainer.get_dataloader(trainer, folder, batch_size=size, rank=-1, mode=mode)
    for mode, size in (("train", 8), ("val", 16))
)
assert (train.prefetch_factor, val.prefetch_factor) == (ULTRALYTICS_PREFETCH, TORCH_PREFETCH)
assert (train.num_workers, val.num_workers) == (1, 2)
for loader in (train, val, train):  # twice, as at the start of each epoch
    fit_into_shm(loader, prefetch)
first, other = next(iter(train)), next(iter(val))
assert train.iterator._prefetch_factor == prefetch and val.iterator._prefetch_factor == min(prefetch, 2)
assert all(batch["img"].dtype == torch.uint8 and batch["img"].is_shared() for batch in (first, other))
assert first["img"].shape == (8, 3, 64, 64) and other["img"].shape == (16, 3, 96, 96)
stat = lambda: (lambda s: (s.f_blocks - s.f_bfree) * s.f_frsize)(__import__("os").statvfs("/dev/shm"))
need = Loaders("detect", 8, 64, Loading(1, 4)).need(Loading(1, prefetch)) / 1.25
highest, end = 0, time.monotonic() + 60
while time.monotonic() < end:
    highest = max(highest, stat())
    if highest > 0.9 * need:  # full, or nearly; whatever is too much comes soon
        end = min(end, time.monotonic() + 2)
    time.sleep(0.01)
print("ratio", highest / need)
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 square pictures with one box each, in YOLO's format."""
    folder = tmp_path_factory.mktemp("objects")
    draw_classes(folder, {"images": 100}, side=64)
    (folder / "labels").mkdir()
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as image:
            image.crop((0, 0, 64, 64)).save(path)
        (folder / "labels" / f"{path.stem}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    return folder


def load_objects(folder: Path, options: str, prefetch: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*with_shm(options), sys.executable, "-c", ULTRALYTICS, str(folder / "images"), str(prefetch)],
        env={**os.environ, **ENVIRONMENT, "YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.needs("root", "unshare")
@pytest.mark.parametrize("prefetch", [4, 1])
def test_ultralytics_loads_as_the_formula_says(objects: Path, prefetch: int) -> None:
    """Its prefetch, workers, bytes and padding; and that our hold on its loaders works."""
    done = load_objects(objects, "size=64m", prefetch)

    assert done.returncode == 0, done.stdout + done.stderr
    assert 0.9 < float(done.stdout.split("ratio ")[1]) < 1.15  # small tensors take a page each


@pytest.mark.needs("root", "unshare")
def test_in_ultralytics_too_a_full_dev_shm_is_an_error_and_no_wait_for_ever(objects: Path) -> None:
    done = load_objects(objects, "size=512k", 4)

    assert done.returncode == 1
    assert "unable to allocate shared memory" in done.stderr.strip().splitlines()[-1], done.stderr
