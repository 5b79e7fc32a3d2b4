"""The classifier's promises, by real runs of `python -m cvtrainer`."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher.contract import Layout, check_checkpoint
from tests.trainer_runs import draw_classes, exit_facts, finish, make_root, metrics, run_each, start, wait_for

STEPS = 60
EPOCHS = 3
TRAIN = {
    "task": "classify",
    "model": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "epochs": EPOCHS,
    "batch": 4,
    "workers": 0,
    "threads": 1,
    "augment": "standard",
    "dropout": 0.2,
}
COUNTS = {"red": 80, "green": 80, "blue": 80}
VAL_COUNTS = {"red": 13, "green": 12, "blue": 12}
ONE_EPOCH = {**TRAIN, "epochs": 1, "batch": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {"train": draw_classes(folder / "train", COUNTS), "val": draw_classes(folder / "val", VAL_COUNTS)}


@pytest.fixture(scope="module")
def straight(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, str]:
    """An uninterrupted run, and what it printed."""
    layout = make_root(tmp_path_factory.mktemp("straight"), TRAIN)
    return layout, finish(start(layout, data))


def test_everything_promised_is_written(straight: tuple[Layout, str]) -> None:
    layout, output = straight
    assert exit_facts(layout) == {"code": 0, "reason": "done"}
    assert not layout.failure.exists()
    assert output.count("images/s") == EPOCHS
    card = json.loads((layout.model / "model_card.json").read_text())
    assert card["classes"] == ["blue", "green", "red"]
    assert card["input_size"] == [3, 32, 32]
    assert (card["run_id"], card["job_digest"], card["epochs"]) == ("run-1", "d" * 64, EPOCHS)
    assert card["metrics"]["accuracy"] == max(
        v["accuracy"] for (split, _), v in metrics(layout).items() if split == "val"
    )
    assert (layout.model / "model.pt").stat().st_size > 1000
    assert (layout.output / "plots/confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert list((layout.output / "tensorboard").glob("events*"))


def test_confusion_matrix_counts_each_image_once(straight: tuple[Layout, str]) -> None:
    layout, _ = straight
    with (layout.output / "plots/confusion_matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert {row[0]: sum(map(int, row[1:])) for row in rows[1:]} == VAL_COUNTS
    with (layout.output / "plots/per_class.csv").open() as file:
        assert {row["class"]: int(row["count"]) for row in csv.DictReader(file)} == VAL_COUNTS


def test_last_two_checkpoints_and_the_best_are_kept(straight: tuple[Layout, str]) -> None:
    layout, _ = straight
    scores = {step: v["accuracy"] for (split, step), v in sorted(metrics(layout).items()) if split == "val"}
    best = max(scores, key=scores.__getitem__)
    steps = {int(path.name) for path in layout.checkpoints.iterdir()}
    assert steps == {best, (EPOCHS - 1) * STEPS, EPOCHS * STEPS}
    for step in steps:
        facts = check_checkpoint(layout.checkpoints / str(step))
        assert facts is not None
        assert (facts["step"], facts["epoch"]) == (step, step // STEPS)


def test_stopped_after_an_epoch_and_resumed_it_gives_the_same_numbers(
    straight: tuple[Layout, str], data: dict[str, Path], tmp_path: Path
) -> None:
    """Also with other workers: what is random about a sample depends on none of them."""
    layout = make_root(tmp_path, {**TRAIN, "workers": 2})
    process = start(layout, data)
    wait_for(lambda: ("train", STEPS + STEPS // 10) in metrics(layout), process)
    process.send_signal(signal.SIGTERM)
    finish(process, expected=75)
    stopped = max(int(path.name) for path in layout.checkpoints.iterdir())
    assert exit_facts(layout) == {"code": 75, "reason": f"preempted at step {stopped}"}
    assert STEPS < stopped < EPOCHS * STEPS
    make_root(tmp_path, TRAIN)
    assert f"resuming from step {stopped}" in finish(start(layout, data))
    assert exit_facts(layout)["code"] == 0
    assert metrics(layout) == metrics(straight[0])
    cards = [json.loads((root.model / "model_card.json").read_text()) for root in (layout, straight[0])]
    assert cards[0] == cards[1]


def test_two_ranks_agree_stop_together_and_go_on(data: dict[str, Path], tmp_path: Path) -> None:
    layout = make_root(tmp_path, {**TRAIN, "epochs": 4})
    process = start(layout, data, ranks=2)
    wait_for(lambda: ("val", STEPS // 2) in metrics(layout), process)
    layout.stop.parent.mkdir(parents=True)
    layout.stop.write_text("preempted")
    finish(process, expected=1)  # torchrun's own
    stopped = max(int(path.name) for path in layout.checkpoints.iterdir())
    assert exit_facts(layout) == {"code": 75, "reason": f"preempted at step {stopped}"}
    layout.stop.unlink()
    finish(start(layout, data, ranks=2))
    assert exit_facts(layout)["code"] == 0
    val = {step: values for (split, step), values in metrics(layout).items() if split == "val"}
    assert sorted(val) == [30, 60, 90, 120]
    images = sum(VAL_COUNTS.values())
    for values in val.values():
        right = values["accuracy"] * images
        assert right == pytest.approx(round(right), abs=1e-4)


@dataclass(frozen=True)
class Bad:
    """A run that must end with 64 and say `message`; channels that are not named are the good ones."""

    message: str
    train: Mapping[str, object] = field(default_factory=dict)
    folders: Mapping[str, Mapping[str, int]] | None = None
    broken: str | None = None
    weights: bytes = b""


BAD = {
    "missing channel": Bad("the data channel 'train' is missing", folders={}),
    "no class folders": Bad("train is empty; expected class folders", folders={"train": {}}),
    "one class": Bad("has one class, 'red'", folders={"train": {"red": 3}}),
    "empty class": Bad("train/green holds no images", folders={"train": {"red": 3, "green": 0}}),
    "unknown class": Bad(
        "lacks: grey; did you mean 'green'?", folders={"train": {"red": 9, "green": 9}, "val": {"grey": 1}}
    ),
    "broken image": Bad(
        "train/red/000.png can't be read", folders={"train": {"red": 9, "green": 9}}, broken="train/red/000.png"
    ),
    "unknown model": Bad("no model 'resnet1x'; did you mean 'resnet", {"model": "resnet1x"}),
    "no network": Bad("train.pretrained: false, or give a data channel `weights`", {"pretrained": True}),
    "no weights": Bad("weights can't be loaded as weights (UnpicklingError)", weights=b"\x80\x02cos\nsystem\n."),
    "too small": Bad("can't take 8 px", {"model": "test_vit", "image_size": 8}),
    "bad value": Bad("train.epochs: Input should be greater", {"epochs": 0}),
}


def test_a_users_mistake_is_one_line_and_exit_64(data: dict[str, Path], tmp_path: Path) -> None:
    cases = []
    for name, bad in BAD.items():
        root = tmp_path / name.replace(" ", "-")
        layout = make_root(root, {**ONE_EPOCH, **bad.train})
        channels = dict(data)
        for channel, counts in (bad.folders or {}).items():
            (root / channel).mkdir()
            channels[channel] = draw_classes(root / channel, counts)
        if bad.folders == {}:
            channels["train"] = root / "nowhere"
        elif bad.folders and "val" not in bad.folders:
            channels["val"] = channels["train"]
        if bad.broken:
            (root / bad.broken).write_bytes(b"\x89PNG no more")
        if bad.weights:
            channels["weights"] = root / "weights"
            channels["weights"].write_bytes(bad.weights)
        cases.append((layout, channels))
    codes, output = run_each(cases)
    assert dict(zip(BAD, codes, strict=True)) == dict.fromkeys(BAD, 64)
    for (layout, _), bad in zip(cases, BAD.values(), strict=True):
        reason = str(exit_facts(layout)["reason"])
        assert bad.message in reason
        assert "\n" not in reason
        assert layout.failure.read_text() == reason
    assert "Traceback" not in output


def test_earlier_weights_and_the_folders_of_the_layout(straight: tuple[Layout, str], tmp_path: Path) -> None:
    """Two classes instead of three: the last layer is left out. No variables: channels are found below the root."""
    layout = make_root(tmp_path, ONE_EPOCH)
    for channel in ("train", "val"):
        draw_classes(layout.channel(channel), {"red": 20, "green": 20})
    layout.channel("weights").symlink_to(straight[0].model)
    codes, output = run_each([(layout, {})])
    assert codes == [0], output
    assert "without its last layer (2 tensors: other classes)" in output
