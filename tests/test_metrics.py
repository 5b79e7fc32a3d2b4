from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.errors import SpecError, UnsupportedError
from launcher.metrics import Goal, Metrics, Point, Reader, format_value, goal_of, parse_lines


def line(step: int, split: str = "train", epoch: int | None = None, **values: float | None) -> str:
    return json.dumps({"step": step, "epoch": epoch, "time": 100.0 + step, "split": split, "values": values}) + "\n"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Two epochs, then a resume from the checkpoint of the first."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        line(10, epoch=0, loss=2.0)
        + line(10, "val", epoch=0, loss=1.5, accuracy=0.5)
        + line(20, epoch=1, loss=9.0)
        + line(20, epoch=1, loss=1.0)
        + line(20, "val", epoch=1, loss=1.6, accuracy=0.8)
        + line(20, "val", epoch=1, seconds=3)
    )
    return path


def test_the_last_line_of_each_split_step_and_name_counts(digits: Path) -> None:
    metrics = Metrics.from_file(digits)

    assert metrics.names == ("train/loss", "val/loss", "val/accuracy", "val/seconds")
    assert metrics.series("train/loss") == [(10, 2.0), (20, 1.0)]
    assert metrics.summary() == {"train/loss": 1.0, "val/loss": 1.6, "val/accuracy": 0.8, "val/seconds": 3.0}
    assert [(p.step, p.split) for p in metrics.points] == [(10, "train"), (10, "val"), (20, "train"), (20, "val")]


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("val/loss", "auto", (10, 1.5)),
        ("val/accuracy", "auto", (20, 0.8)),
        ("val/loss", "max", (20, 1.6)),
        ("val/accuracy", "min", (10, 0.5)),
    ],
)
def test_best(digits: Path, name: str, mode: str, expected: tuple[int, float]) -> None:
    assert Metrics.from_file(digits).best(name, mode=mode) == expected  # type: ignore[arg-type]


def test_best_passes_over_nan_and_takes_the_earliest() -> None:
    metrics = Metrics.from_bytes(
        (line(1, loss=math.nan) + line(2, loss=3) + line(3, loss=3) + line(4, loss=None)).encode()
    )

    assert metrics.best("train/loss") == (2, 3.0)
    assert math.isnan(metrics.last("train/loss")[1])


def test_best_of_nothing_finite_is_the_last() -> None:
    step, value = Metrics.from_bytes((line(1, loss=None) + line(2, loss=None)).encode()).best("train/loss")

    assert step == 2
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("train/loss", Goal.LOW),
        ("val/box_loss", Goal.LOW),
        ("val/top1_error", Goal.LOW),
        ("val/RMSE", Goal.LOW),
        ("loss/accuracy", Goal.HIGH),
        ("val/mAP50-95(B)", Goal.HIGH),
        ("val/accuracy", Goal.HIGH),
        ("val/mirror_accuracy", Goal.HIGH),
        ("train/lr", Goal.NONE),
        ("train/learning_rate", Goal.NONE),
        ("train/lr/pg0", Goal.NONE),
        ("train/epoch_time", Goal.NONE),
    ],
)
def test_goal(name: str, goal: Goal) -> None:
    assert goal_of(name) is goal


def test_unknown_name_offers_the_nearest(digits: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'val/accuracy'"):
        Metrics.from_file(digits).series("val/acuracy")


def test_by_epoch_takes_the_last_values_of_each(digits: Path) -> None:
    rows = Metrics.from_file(digits).by_epoch()

    assert [(row.epoch, row.step) for row in rows] == [(0, 10), (1, 20)]
    assert rows[1].values == {"train/loss": 1.0, "val/loss": 1.6, "val/accuracy": 0.8, "val/seconds": 3.0}


def test_by_epoch_of_a_run_without_epochs_is_by_step() -> None:
    rows = Metrics.from_bytes((line(7, loss=1) + line(9, loss=2)).encode()).by_epoch()

    assert [(row.epoch, row.step) for row in rows] == [(None, 7), (None, 9)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"loss": null}', "nan"),
        ('{"loss": NaN}', "nan"),
        ('{"loss": Infinity}', "inf"),
        ('{"loss": -Infinity}', "-inf"),
        ('{"loss": 1e999}', "inf"),
        ('{"loss": ' + "9" * 400 + "}", "inf"),
        ('{"loss": 5e-324}', "5e-324"),
    ],
)
def test_values_that_are_no_finite_numbers_survive(text: str, expected: str) -> None:
    (point,) = parse_lines('{"step": 1, "epoch": null, "time": 0, "split": "val", "values": ' + text + "}\n")

    assert str(point.values["loss"]) == expected


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00binary",
        b"[" * 100_000,
        b'{"step": true, "values": {}}',
        b'{"step": NaN, "values": {}}',
        b'{"step": 1e300, "values": {}}',
        b'{"step": "1", "values": {}}',
        b'{"step": 1, "values": []}',
        b'{"step": 1}',
        b'{"step": ' + b"9" * 5000 + b', "values": {}}',
    ],
)
def test_lines_that_are_no_points_are_left_out(bad: bytes) -> None:
    points = parse_lines(line(1, loss=1).encode() + bad + b"\n" + line(2, loss=2).encode())

    assert [p.step for p in points] == [1, 2]


def test_values_that_were_never_numbers_are_left_out() -> None:
    (point,) = parse_lines('{"step": 3.0, "epoch": "x", "time": null, "values": {"a": "1", "b": true, "c": 2}}')

    assert point == Point(3, None, 0.0, "train", {"c": 2.0})


@pytest.mark.parametrize("cut", range(1, len(line(2, "val", loss=2))))
def test_a_torn_last_line_is_ignored_and_what_a_resume_wrote_behind_it_is_not(cut: int) -> None:
    torn = line(1, loss=1) + line(2, "val", loss=2)[:cut]
    whole = cut == len(line(2, "val", loss=2)) - 1  # only the newline is missing

    assert [p.step for p in parse_lines(torn)] == ([1, 2] if whole else [1])
    assert parse_lines(torn + line(3, loss=3))[-1] == Point(3, None, 103.0, "train", {"loss": 3.0})


def test_names_with_line_separators_and_surrogates() -> None:
    (point,) = parse_lines('{"step": 1, "split": "a\u2028b", "values": {"\\ud800x": 1}}\n'.encode())

    assert point.split == "a\u2028b"
    assert list(point.values) == ["?x"]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_reader_fed_in_pieces_sees_what_the_file_holds(digits: Path, size: int) -> None:
    data = digits.read_bytes()
    reader = Reader()

    points = [p for start in range(0, len(data), size) for p in reader.feed(data[start : start + size])]

    assert points == parse_lines(data)


def test_reader_waits_for_the_rest_of_a_line() -> None:
    reader = Reader()
    data = line(5, loss=1).encode()

    assert reader.feed(data[:20]) == []
    assert reader.feed(data[20:-1]) == []
    assert [p.step for p in reader.feed(data[-1:])] == [5]
    assert reader.feed(b"") == []


def test_100k_lines_parse_in_about_a_second(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(i, epoch=i // 100, loss=1 / (i + 1), lr=1e-3, images=32) for i in range(100_000)))
    start = time.process_time()

    metrics = Metrics.from_file(path)
    last = metrics.last("train/loss")

    assert time.process_time() - start < 4  # a slow, shared machine; 0.7 s on a quiet one
    assert last == (99_999, 1 / 100_000)
    assert len(metrics.by_epoch()) == 1000


def test_json_is_strict_and_reads_back(digits: Path) -> None:
    digits.write_text(digits.read_text() + line(30, loss=math.nan))

    text = Metrics.from_file(digits).to_json()
    back = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))

    assert back[-1] == {"step": 30, "epoch": None, "time": 130.0, "split": "train", "values": {"loss": None}}
    assert len(back) == 5


def test_csv(digits: Path) -> None:
    digits.write_text(digits.read_text() + '{"step": 30, "values": {"step": 4, "a,b\\"c": 5}}\n')

    rows = list(csv.reader(io.StringIO(Metrics.from_file(digits).to_csv())))

    assert rows[0] == ["step", "epoch", "time", "split", "loss", "accuracy", "seconds", "values/step", 'a,b"c']
    assert rows[1] == ["10", "0", "110.0", "train", "2.0", "", "", "", ""]
    assert rows[-1] == ["30", "", "0.0", "train", "", "", "", "4.0", "5.0"]


def test_pandas(digits: Path) -> None:
    pytest.importorskip("pandas")

    frame = Metrics.from_file(digits).to_pandas()

    assert list(frame.columns) == ["step", "epoch", "time", "split", "loss", "accuracy", "seconds"]
    assert frame[frame.split == "val"].accuracy.tolist() == [0.5, 0.8]
    assert Metrics().to_pandas().empty


def test_without_pandas_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['pandas'] = None\n"
        "from launcher.metrics import Metrics\n"
        "try: Metrics().to_pandas()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.startswith(UnsupportedError.__name__)
    assert "pip install 'cvlaunch[report]'" in done.stdout


def test_notebook_table_is_escaped() -> None:
    shown = Metrics.from_bytes(line(1, "<b>", **{"<script>alert(1)</script>": 0.5}).encode())._repr_html_()

    assert "<script" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown


def test_metrics_can_not_be_changed(digits: Path) -> None:
    metrics = Metrics.from_file(digits)

    metrics.series("train/loss").clear()

    assert len(metrics.series("train/loss")) == 2
    with pytest.raises(AttributeError):
        metrics.points = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.98333, "0.9833"),
        (1.2e-5, "1.2e-05"),
        (512.0, "512"),
        (0.0, "0"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_format_value(value: float, text: str) -> None:
    assert format_value(value) == text
