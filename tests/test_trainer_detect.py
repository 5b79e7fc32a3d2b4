"""The detector's promises, by real runs of `python -m cvtrainer`."""

from __future__ import annotations

import csv
import importlib.util
import json
import signal
from pathlib import Path

import pytest

from launcher.contract import Layout, check_checkpoint
from tests.trainer_runs import REPOSITORY, exit_facts, finish, make_root, metrics, run_each, start, wait_for

EPOCHS = 3
STEPS = 6
TRAIN = {
    "task": "detect",
    "model": "yolo11n",
    "pretrained": False,
    "image_size": 64,
    "epochs": EPOCHS,
    "batch": 8,
    "workers": 0,
    "threads": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = REPOSITORY / "examples/shapes/make_data.py"
    spec = importlib.util.spec_from_file_location("make_shapes", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("shapes")
    module.write_shapes(folder, {"train": 8 * STEPS, "val": 8})
    return {"train": folder / "train", "val": folder / "val"}


@pytest.fixture(scope="module")
def resumed(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A run stopped after its first epoch and started again."""
    layout = make_root(tmp_path_factory.mktemp("run"), TRAIN)
    process = start(layout, data)
    wait_for(lambda: ("val", STEPS) in metrics(layout), process)
    process.send_signal(signal.SIGTERM)
    finish(process, expected=75)
    facts = exit_facts(layout)
    assert facts["code"] == 75
    kept = STEPS * (max(step for _, step in metrics(layout)) // STEPS)
    assert str(facts["reason"]).endswith(f"the checkpoint of step {kept} is kept")
    assert f"resuming from step {kept}" in finish(start(layout, data))
    return layout


def test_a_stopped_run_goes_on_with_its_next_epoch(resumed: Layout) -> None:
    assert exit_facts(resumed) == {"code": 0, "reason": "done"}
    rows = [json.loads(line) for line in resumed.metrics.read_text().splitlines()]
    assert [(row["epoch"], row["split"]) for row in rows] == [(e, s) for e in (1, 2, 3) for s in ("train", "val")]
    assert set(rows[1]["values"]) >= {"map50", "map", "precision", "recall", "loss"}
    assert rows[0]["values"]["loss"] > 0


def test_everything_promised_is_written(resumed: Layout) -> None:
    card = json.loads((resumed.model / "model_card.json").read_text())
    assert card["classes"] == ["circle", "square", "triangle"]
    assert (card["input_size"], card["epochs"], card["run_id"]) == ([3, 64, 64], EPOCHS, "run-1")
    assert set(card["metrics"]) == {"map50", "map", "precision", "recall"}
    assert (resumed.model / "model.pt").stat().st_size > 1_000_000
    assert (resumed.output / "plots/confusion_matrix.png").exists()
    with (resumed.output / "plots/confusion_matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["circle", "square", "triangle", "background"]
    assert sum(int(number) for row in rows[1:] for number in row[1:]) < 1000, "boxes of no confidence are counted"
    assert list((resumed.output / "tensorboard").glob("events*"))


def test_checkpoints_are_complete(resumed: Layout) -> None:
    steps = {int(path.name) for path in resumed.checkpoints.iterdir()}
    assert steps >= {12, 18}
    assert all(check_checkpoint(resumed.checkpoints / str(step)) for step in steps)


def test_nothing_is_written_into_the_data(resumed: Layout, data: dict[str, Path]) -> None:
    for folder in data.values():
        assert {path.name for path in folder.iterdir()} == {"images", "labels", "data.yaml"}
        assert {path.suffix for path in (folder / "labels").iterdir()} == {".txt"}


def test_a_users_mistake_is_one_line_and_exit_64(data: dict[str, Path], tmp_path: Path) -> None:
    cases: list[tuple[Layout, dict[str, Path]]] = []
    messages: list[str] = []

    def case(message: str, train: dict[str, object], channels: dict[str, Path]) -> None:
        cases.append((make_root(tmp_path / str(len(cases)), {**TRAIN, **train}), {**data, **channels}))
        messages.append(message)

    bare = tmp_path / "bare"
    (bare / "images").mkdir(parents=True)
    empty = tmp_path / "empty"
    (empty / "labels").mkdir(parents=True)
    (empty / "images").mkdir()
    case("give train.classes, or", {}, {"train": bare})
    case("bare has no folder labels/", {"classes": ["a"]}, {"train": bare})
    case("images holds no images", {"classes": ["a"]}, {"train": empty})
    case("label file is broken", {"classes": ["a"]}, {})
    case("has no model 'yolo11q'; did you mean 'yolo11", {"model": "yolo11q"}, {})
    case("'yolo11n-seg' is a model for segment", {"model": "yolo11n-seg"}, {})
    case("of 'yolo11n' can't be had", {"pretrained": True}, {})
    codes, output = run_each(cases)
    assert codes == [64] * len(cases), output
    for (layout, _), message in zip(cases, messages, strict=True):
        reason = str(exit_facts(layout)["reason"])
        assert message in reason
        assert "\n" not in reason
    assert "Traceback" not in output
