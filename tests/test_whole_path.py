"""The main job, through the whole path: job file, resolve, plan, submit, runner, trainer, watch, sync, report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launcher import Metrics, Run, State, submit
from launcher.errors import SpecError
from launcher.ledger import Ledger
from launcher.supervisor import SupervisorFolder

DIGITS = Path(__file__).parents[1] / "examples/digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its data, in a folder of its own."""
    folder = tmp_path_factory.mktemp("digits")
    for name in ("make_data.py", "tiny.yaml", "digits.yaml"):
        (folder / name).write_bytes((DIGITS / name).read_bytes())
    subprocess.run([sys.executable, str(folder / "make_data.py")], check=True, capture_output=True)
    target = {"backend": "local", "output": str(folder / "output"), "root": str(folder / "root")}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"desk": target}}))
    return folder


def trained(digits: Path, ledger: Ledger, **changes: object) -> Run:
    settings = [f"{key}={value}" for key, value in changes.items()]
    return submit(digits / "tiny.yaml", target="desk", settings=settings, ledger=ledger)


def values(metrics: Metrics) -> dict[str, list[tuple[int, float]]]:
    """All that does not depend on the clock."""
    return {name: metrics.series(name) for name in metrics.names if not name.endswith("per_second")}


def test_a_preempted_run_ends_with_the_same_digits(digits: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", tmp_path / "cache")
    longer = {"train.epochs": 4}  # so that a busy machine stops it in time
    whole = trained(digits, ledger, **longer)
    assert whole.wait(timeout=300).state is State.SUCCEEDED
    cut = trained(digits, ledger, **longer)
    while not any(point.epoch == 2 for point in cut.metrics().points):
        assert not cut.status().state.terminal
        time.sleep(0.05)
    record = SupervisorFolder(Path(cut.record.target["root"]) / cut.id).record()
    assert record is not None
    assert record.runner is not None
    os.kill(record.runner.pid, signal.SIGTERM)
    status = cut.wait(timeout=300)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 2)
    assert whole.record.plan["job_digest"] == cut.record.plan["job_digest"]
    first, second = values(whole.metrics()), values(cut.metrics())
    assert {name: series[-1] for name, series in first.items()} == {name: s[-1] for name, s in second.items()}
    assert first["val/accuracy"] == second["val/accuracy"]


def test_results_come_home_and_are_shown(digits: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", tmp_path / "cache")
    run = trained(digits, ledger)
    assert run.wait(timeout=300, check=True).state is State.SUCCEEDED
    folder = run.sync(tmp_path / "home").path
    card = json.loads((folder / "model/model_card.json").read_text())
    assert card["job_digest"] == run.record.plan["job_digest"]
    assert len(card["classes"]) == 10
    for name in ("model/model.pt", "output/plots/confusion_matrix.csv", "output/plots/confusion_matrix.png"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "output/tensorboard").iterdir())
    page = run.report().read_text()
    assert run.id in page
    assert "val/accuracy" in page or "accuracy" in page
    assert "<table>" in run._repr_html_()


def test_weights_of_one_run_start_another(digits: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", tmp_path / "cache")
    first = trained(digits, ledger)
    assert first.wait(timeout=300).state is State.SUCCEEDED
    second = trained(digits, ledger, **{"train.init": f"run://{first.id}/model", "train.epochs": "1"})
    assert second.wait(timeout=300).state is State.SUCCEEDED
    assert first.record.plan["job_digest"] != second.record.plan["job_digest"]
    start = first.metrics().series("train/loss")[0][1]
    assert second.metrics().series("train/loss")[0][1] < start / 2


def test_two_ranks_train_one_model(digits: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", tmp_path / "cache")
    alone = yaml.safe_load((digits / "tiny.yaml").read_text())["train"]["batch"]
    run = trained(digits, ledger, **{"resources.processes": "2", "train.batch": str(alone // 2)})
    assert run.wait(timeout=300).state is State.SUCCEEDED
    assert run.metrics().summary()["val/accuracy"] > 0.5


@pytest.mark.parametrize("broken", ["empty", "one class"])
def test_data_that_can_t_be_trained_on_starts_nothing(digits: Path, tmp_path: Path, broken: str) -> None:
    ledger = Ledger(tmp_path / "ledger", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    if broken == "one class":
        (data / "only").mkdir()
        (data / "only/1.png").touch()
    with pytest.raises(SpecError, match=r"data\.train"):
        trained(digits, ledger, **{"data.train": data})
    assert ledger.ids() == []
