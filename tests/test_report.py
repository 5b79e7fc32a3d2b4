from __future__ import annotations

import base64
import json
import math
import os
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.report import render_report, write_report
from launcher.report.charts import Curve, draw, thin
from launcher.report.confusion import Confusion
from launcher.report.folder import flatten, read_folder

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e&amp;{{7*7}}"
VOID = {"meta", "img", "br", "hr", "input", "link"}
DIGEST = "ab" * 32


class Page(HTMLParser):
    """The page as a browser's parser sees it; fails on tags that don't nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data.strip())

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and css in (a.get("class") or "")]

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.texts))


def png(side: int = 4) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + os.urandom(side * 3) for _ in range(side)))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write(folder: Path, name: str, content: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def metrics(points: list[tuple[int, str, dict[str, float | None]]]) -> str:
    lines = ({"step": s, "epoch": s // 10, "time": 1e9 + s, "split": p, "values": v} for s, p, v in points)
    return "".join(json.dumps(line) + "\n" for line in lines)


def csv_of(classes: list[str], counts: list[list[int]]) -> str:
    rows = [["", *classes], *([c, *map(str, row)] for c, row in zip(classes, counts, strict=True))]
    return "\n".join(",".join(row) for row in rows) + "\n"


def make_run(root: Path, run_id: str = "digits-06a1", **job: Any) -> Path:
    folder = root / run_id
    result = {"run_id": run_id, "state": "SUCCEEDED", "exit_code": 0, "attempt": 2, "restarts": 1, "upload": "complete"}
    write(folder, "output/result.json", {**result, "started": 1_763_766_000, "ended": 1_763_766_185.4, "metrics": {}})
    train = [(s, "train", {"loss": 2.0 / s, "lr": 0.001}) for s in range(1, 41)]
    val = [(s, "val", {"loss": 2.5 / s, "accuracy": 1 - 1 / s}) for s in (10, 20, 30, 40)]
    write(folder, "output/metrics.jsonl", metrics([*train, *val]))
    gpus = [{"name": "NVIDIA H200", "memory": 2**37, "driver": "570.1"}] * 2
    packages = {"torch": "2.15.0", "timm": "1.0.9"}
    write(folder, "output/environment.json", {"python": "3.11.7", "gpus": gpus, "memory": 2**36, "packages": packages})
    spec = {"run_id": run_id, "name": "digits", "job_digest": DIGEST, "train": {"task": "classify", "epochs": 4}}
    channels = [{"name": "train", "uri": "s3://b/d", "fingerprint": "12" * 32}]
    write(folder, "input/config/job.json", {**spec, "channels": channels, "env": {}, **job})
    write(folder, "model/model_card.json", {"classes": ["cat", "dog"], "input_size": [3, 32, 32]})
    write(folder, "output/plots/confusion_matrix.csv", csv_of(["cat", "dog"], [[9, 1], [4, 6]]))
    write(folder, "output/plots/samples.png", png())
    write(folder, "output/logs/rank0.log", "\x1b[31mepoch 1\x1b[0m\n10 %\r50 %\r100 %\nlast line\n")
    return folder


def assert_self_contained(html: str) -> Page:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}:
                assert (value or "").startswith("data:image/png;base64,")
    assert "url(" not in html
    assert "@import" not in html
    return page


def test_one_run_shows_everything(tmp_path: Path) -> None:
    page = assert_self_contained(render_report([make_run(tmp_path)]))

    for expected in (
        "digits-06a1", "SUCCEEDED", "3m 05s", "attempt 2, 1 restart", "2025-11-21 23:00 UTC", DIGEST[:10],
        "train.epochs", "2 × NVIDIA H200 (128.0 GiB, driver 570.1)", "64.0 GiB", "torch", "2.15.0",
        "cat, dog", "3, 32, 32", "epoch 1\n100 %\nlast line",
        "20 images, 75.0 % right", "69.2 %", "60.0 %", "Values by epoch",
    ):  # fmt: skip
        assert expected in page.text
    assert "Not on this page" not in page.text
    (image,) = page.all("img")
    source = image["src"] or ""
    assert (
        base64.b64decode(source.partition(",")[2]) == (tmp_path / "digits-06a1/output/plots/samples.png").read_bytes()
    )


def test_the_page_forbids_scripts_and_the_network(tmp_path: Path) -> None:
    (policy,) = [a for a in Page(render_report([make_run(tmp_path)])).all("meta") if "http-equiv" in a]

    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_charts_hold_the_data(tmp_path: Path) -> None:
    page = Page(render_report([make_run(tmp_path)]))

    descriptions = [text for text in page.texts if re.match(r"(train|val): \d+ values", text)]
    assert descriptions == [
        "val: 4 values from 0.25 at step 10 to 0.0625 at step 40; train: 40 values from 2 at step 1 to 0.05 at step 40",
        "val: 4 values from 0.9 at step 10 to 0.975 at step 40",
        "train: 40 values from 0.001 at step 1 to 0.001 at step 40",
    ]
    dots = [text for text in page.texts if text.startswith("val: ") and " at step 30" in text]
    assert dots == ["val: 0.08333 at step 30", "val: 0.9667 at step 30"]
    paths = [a["d"] or "" for a in page.all("path", "curve") if len(a["d"] or "") > 30]
    assert [path.count(",") for path in paths] == [4, 40, 4, 40]
    assert len(page.all("circle", "ring")) == 3


def test_a_falling_loss_falls_on_the_chart_and_gets_a_log_scale() -> None:
    chart = draw("loss", [Curve("train", 0, [(s, 10.0 ** -(s / 25)) for s in range(101)])])

    assert chart is not None
    assert chart.log
    ys = [float(y) for y in re.findall(r",([\d.]+)", chart.lines[0].path)]
    assert ys == sorted(ys)  # SVG's y grows downwards
    assert ys[50] == pytest.approx((ys[0] + ys[-1]) / 2, abs=0.2)
    assert [tick.label for tick in chart.y_ticks] == ["1", "0.1", "0.01", "0.001", "0.0001"][::-1]


@pytest.mark.parametrize(
    ("title", "values", "log"),
    [
        ("loss", [1, 0.5, 0.1], False),
        ("loss", [10, 1, 0.01], True),
        ("accuracy", [0.001, 0.5, 1], False),
        ("loss", [10, 0, 5], False),
    ],
)
def test_log_scale_is_for_losses_over_decades(title: str, values: list[float], log: bool) -> None:
    chart = draw(title, [Curve("val", 0, list(enumerate(values)))])

    assert chart is not None
    assert chart.log is log


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [1e300, -1e300, 1.0, 2.0],
        [1e149, -1e149],
        [5e-324, 1e-320, 1e149],
        [5e-324, 5e-324],
        [1.0, 1.0 + 1e-16, 1.0],
        [-1e-300, 1e-300],
        [math.nan, 1.0, math.inf, 2.0, -math.inf],
        [1e6, 1e6 + 1e-4],
    ],
)
def test_extreme_values_stay_on_the_chart(values: list[float]) -> None:
    for title in ("loss", "accuracy"):
        chart = draw(title, [Curve("val", 0, list(enumerate(values)))])

        assert chart is not None
        for text in re.findall(r"[ML]([^MLh]*)", chart.lines[0].path):
            x, y = map(float, text.split(","))
            assert 0 <= x <= 460
            assert 0 <= y <= 242
        assert len(chart.y_ticks) < 20


@pytest.mark.parametrize("values", [[], [math.nan, math.nan], [1.0], [1.0, math.nan]])
def test_nothing_to_connect_is_no_chart(values: list[float]) -> None:
    assert draw("loss", [Curve("val", 0, list(enumerate(values)))]) is None


def test_values_that_are_not_finite_leave_a_gap_and_a_word() -> None:
    chart = draw("loss", [Curve("train", 0, [(0, 3.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf)])])

    assert chart is not None
    (line,) = chart.lines
    assert line.path.count("M") == 2
    assert line.note == "2 not finite, first at step 2"
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2", "3", "4"]
    assert (line.last, line.best_value) == ("∞", "1")


@pytest.mark.parametrize("count", [401, 10_000, 100_000])
def test_thinning_keeps_ends_and_spikes(count: int) -> None:
    points = [(step, 1.0) for step in range(count)]
    points[count // 3] = (count // 3, 50.0)
    points[count // 2] = (count // 2, math.nan)

    kept = thin(points)

    assert len(kept) < 450
    assert kept[0] == (0, 1.0)
    assert kept[-1] == (count - 1, 1.0)
    assert (count // 3, 50.0) in kept
    assert kept.count(None) == 1


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write(folder, "output/metrics.jsonl", metrics([(s, "train", {"loss": 1 / (1 + s)}) for s in range(20_000)]))

    html = render_report([folder])

    assert len(html) < 120_000
    assert "train: 20000 values" in html


@pytest.mark.parametrize("hostile", [HOSTILE, "\ud800", "a\0b\x1b[2J", "]]>--><style>*{display:none}</style>"])
def test_hostile_strings_are_inert(tmp_path: Path, hostile: str) -> None:
    folder = make_run(tmp_path, name=hostile, env={hostile: hostile}, tags={hostile: hostile})
    result = {"run_id": hostile, "state": hostile, "reason": hostile, "upload": hostile, "exit_code": 1}
    write(folder, "output/result.json", result)
    values: dict[str, float | None] = {hostile: 0.5, "loss": 1.0}
    write(folder, "output/metrics.jsonl", metrics([(s, hostile, values) for s in range(3)]))
    write(
        folder,
        "output/environment.json",
        {"python": hostile, "gpus": [{"name": hostile}], "packages": {hostile: hostile}},
    )
    write(folder, "model/model_card.json", {"classes": [hostile], hostile: hostile})
    name = '"' + hostile.replace('"', '""').replace("\ud800", "?") + '"'
    write(folder, "output/plots/confusion_matrix.csv", csv_of([name, "b"], [[1, 2], [3, 4]]))
    write(folder, "output/plots/<b onclick=x>.png", png())
    write(folder, "output/logs/<i>.log", hostile.encode(errors="replace"))
    other = make_run(tmp_path, "other")

    for folders in ([folder], [folder, other]):
        html = render_report(folders)
        html.encode()
        page = assert_self_contained(html)
        assert len(page.all("style")) == 1
        assert not any("onclick" in a or "onerror" in a for _, a in page.tags)
        assert "\0" not in html
        assert "\x1b" not in html
        if hostile is HOSTILE:
            assert hostile in page.text


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "bare-06x").mkdir()

    page = assert_self_contained(render_report([tmp_path / "bare-06x"]))

    assert "bare-06x" in page.text
    for name in ("output/result.json", "output/metrics.jsonl", "input/config/job.json", "output/environment.json"):
        assert f"{name} is missing" in page.text


@pytest.mark.parametrize("folders", [0, 1, 2])
def test_folders_that_are_not_there(tmp_path: Path, folders: int) -> None:
    assert_self_contained(render_report([tmp_path / f"gone-{i}" for i in range(folders)]))


FILES = (
    "output/result.json", "started.json", "output/metrics.jsonl", "output/environment.json", "input/config/job.json",
    "model/model_card.json", "output/plots/confusion_matrix.csv", "output/plots/samples.png", "output/logs/rank0.log",
)  # fmt: skip
DAMAGE = {
    "empty": b"",
    "torn": b'{"state": "SUCC',
    "binary": bytes(range(256)),
    "list": b'[1, {"a": [[]]}]',
    "null": b"null",
    "deep": b'{"a":' * 5000,
    "wrong types": json.dumps(
        {
            **{
                key: {"a": [1, None]}
                for key in ("run_id", "state", "reason", "name", "job_digest", "upload", "python", "cpu")
            },
            **dict.fromkeys(("started", "ended", "exit_code", "attempt", "restarts", "memory", "shm"), 10**400),
            **{
                key: [3, "x", None, {"name": []}]
                for key in ("metrics", "packages", "gpus", "channels", "train", "classes")
            },
        }
    ).encode(),
    "infinite": b'{"started": -Infinity, "ended": NaN, "metrics": {"a": NaN, "b": 1e999}, "memory": NaN, "gpus": 7}',
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_never_fails_the_page(tmp_path: Path, name: str, damage: str) -> None:
    folder = make_run(tmp_path)
    write(folder, name, DAMAGE[damage])

    assert_self_contained(render_report([folder]))
    assert_self_contained(render_report([folder, make_run(tmp_path, "other")]))


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

    assert_self_contained(render_report([folder]))


def test_a_large_picture_and_one_that_is_none_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write(folder, "output/plots/large.png", b"\x89PNG\r\n\x1a\n" + b"x" * 3 * 2**20)
    write(folder, "output/plots/text.png", "hello")
    write(folder, "output/plots/confusion_matrix.png", png())

    page = Page(render_report([folder]))

    assert [a["alt"] for a in page.all("img")] == ["samples"]
    assert "output/plots/large.png is too large to show (3.0 MiB)" in page.text
    assert "output/plots/text.png is damaged: not a PNG picture" in page.text


def test_final_metrics_of_the_result_stand_in_for_a_missing_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "output/metrics.jsonl").unlink()
    write(folder, "output/result.json", {"state": "SUCCEEDED", "metrics": {"val/accuracy": 0.875, "note": "x"}})

    assert "val/accuracy 0.875" in Page(render_report([folder])).text


def test_job_json_in_the_root_and_an_unfinished_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "input/config/job.json").rename(folder / "job.json")
    (folder / "output/result.json").unlink()
    write(folder, "started.json", {"time": 1_763_766_000.5})

    page = Page(render_report([folder]))

    assert "STARTED digits-06a1 2025-11-21 23:00 UTC" in page.text
    assert "the run has not ended, or its end is not synced" in page.text
    assert "train.epochs" in page.text


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path, "digits-a")
    second = make_run(tmp_path, "digits-b", job_digest="cd" * 32, train={"task": "classify", "epochs": 9})
    write(second, "output/metrics.jsonl", metrics([(s, "val", {"loss": 9 / s, "accuracy": 0.99}) for s in (10, 20)]))
    write(
        second,
        "output/environment.json",
        {"python": "3.11.7", "gpus": [], "packages": {"torch": "2.9.0", "timm": "1.0.9"}},
    )

    page = assert_self_contained(render_report([first, second]))

    assert "No, 2 different jobs. A: digits-a; B: digits-b." in page.text
    assert "val/loss 0.0625 ★ best step 40, the last 0.45 step 20, the last" in page.text
    assert "val/accuracy 0.975 step 40, the last 0.99 ★ best step 10 · last 0.99" in page.text
    assert "train.epochs 4 9" in page.text
    assert "1 package in different versions package digits-a digits-b torch 2.15.0 2.9.0" in page.text
    for same in ("train.task", "timm", "python"):
        assert same not in page.text
    assert {a["class"] for a in page.all("path", "curve")} == {"curve s0", "curve s1"}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({}, "Yes: all runs have the same job digest."),
        ({"channels": [{"name": "val"}]}, "Yes, as far as it is pinned: the data of val has no fingerprint"),
        ({"job_digest": ""}, "Unknown: no job digest for digits-b."),
    ],
)
def test_identical_job(tmp_path: Path, second: dict[str, Any], expected: str) -> None:
    page = Page(render_report([make_run(tmp_path, "digits-a"), make_run(tmp_path, "digits-b", **second)]))

    assert expected in page.text


def test_runs_of_one_id_and_more_runs_than_colours(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(i), "digits") for i in range(10)]

    page = assert_self_contained(render_report(folders))

    assert "digits #1" in page.text
    assert "digits #10" in page.text
    assert page.all("path", "curve s1 dash")


@pytest.mark.parametrize("n", [2, 10, 25, 26, 100, 251])
def test_confusion_of_any_size(tmp_path: Path, n: int) -> None:
    folder = make_run(tmp_path)
    counts = [[50 if i == j else 3 if j == i + 1 else 0 for j in range(n)] for i in range(n)]
    write(folder, "output/plots/confusion_matrix.csv", csv_of([f"class {i}" for i in range(n)], counts))

    page = assert_self_contained(render_report([folder]))

    hits = page.all("td", "hit") if n <= 25 else page.all("rect", "hit")
    misses = page.all("td", "miss") if n <= 25 else page.all("rect", "miss")
    assert (len(hits), len(misses)) == ((n, n - 1) if n <= 250 else (0, 0))
    assert "94.3 %" in page.text  # precision or recall: 50 of 53
    if n > 25:
        assert "class 0 class 1 3 5.7 %" in page.text


def test_confusion_ratios() -> None:
    confusion = Confusion.from_csv(b"\xef\xbb\xbf,cat,dog,owl\r\ncat,8,2,0\r\ndog,0,0,0\r\nowl,4,0,6\r\n")

    rows = [(r.name, r.support, r.precision, r.recall, r.f1) for r in confusion.class_rows]

    assert rows == [
        ("cat", "10", "66.7 %", "80.0 %", "72.7 %"),
        ("dog", "0", "0.0 %", "–", "0.0 %"),
        ("owl", "10", "100.0 %", "60.0 %", "75.0 %"),
    ]
    assert confusion.accuracy == "70.0 %"
    worst = confusion.worst_pairs[0]
    assert (worst.true, worst.predicted, worst.count, worst.share) == ("owl", "cat", "4", "40.0 %")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header row"),
        (",a,b\na,1,2\n", "different classes"),
        (",a,b\nb,1,2\na,3,4\n", "different classes"),
        (",a,b\na,1\nb,1,2\n", "has 1 counts, expected 2"),
        (",a\na,-1\n", "not a number"),
        (",a\na,nan\n", "not a number"),
        (",a\na,x\n", "could not convert"),
    ],
)
def test_a_confusion_matrix_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Confusion.from_csv(text.encode())


def test_passwords_and_signatures_are_masked(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path,
        env={"API_TOKEN": "canary1", "MODE": "fast"},
        secrets={"HF_TOKEN": "env:HF_TOKEN"},
        output="s3://key:canary2@host/b?X-Amz-Signature=canary3&x=1",
    )

    text = Page(render_report([folder])).text

    assert "canary" not in text
    assert "s3://key:…@host/b?X-Amz-Signature=…&x=1" in text
    assert "env.MODE fast" in text
    assert "env:HF_TOKEN" in text


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ({"name": "H200", "memory": 2**37, "driver": "570.1"}, "2 × H200 (128.0 GiB, driver 570.1)"),
        (
            {"name": "H200", "memory.total": "143771 MiB", "driver_version": "570.1"},
            "2 × H200 (143771 MiB, driver 570.1)",
        ),
        ({"name": "H200"}, "2 × H200"),
        ("H200", "2 × H200"),
        (None, "2 × GPU"),
    ],
)
def test_gpus_of_a_kind_are_counted(tmp_path: Path, gpu: object, expected: str) -> None:
    write(tmp_path, "output/environment.json", {"gpus": [gpu, gpu]})

    assert read_folder(tmp_path).environment["gpus"] == expected


@pytest.mark.parametrize(("upload", "warned"), [("complete", False), ("in_place", False), ("incomplete", True)])
def test_an_incomplete_upload_is_said(tmp_path: Path, upload: str, warned: bool) -> None:
    write(tmp_path, "output/result.json", {"state": "SUCCEEDED", "upload": upload})

    assert ("Files of this run may be missing" in render_report([tmp_path])) is warned


def test_packages_that_are_not_the_image_s_are_shown(tmp_path: Path) -> None:
    changes = {"added": {"shapely": "2.1"}, "changed": {"numpy": ["2.0.0", "2.1.0"]}, "removed": {}}
    write(tmp_path, "output/environment.json", {"packages_changed": changes})

    assert read_folder(tmp_path).environment == {"not as in the image": "shapely 2.1 added, numpy 2.0.0 → 2.1.0"}


def test_flatten() -> None:
    value = {
        "a": {"b": 1, "c": None},
        "d": [1, "x"],
        "e": [{"name": "n", "v": True}],
        "f": [{}, {"v": 2}],
        "g": [],
        "h": 0,
    }

    assert dict(flatten(value)) == {"a.b": "1", "d": "1, x", "e.n.v": "true", "f.1.v": "2", "h": "0"}


def test_read_folder_takes_the_time_of_the_metrics_without_a_result(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "output/result.json").unlink()

    run = read_folder(folder)

    assert (run.state, run.duration, run.name, run.run_id) == ("UNKNOWN", 39.0, "digits", "digits-06a1")


def test_write_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path)

    assert write_report([folder], tmp_path / "new/folder/page.html") == tmp_path / "new/folder/page.html"
    assert write_report([folder], tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report([folder])
    assert [p.name for p in (tmp_path / "new/folder").iterdir()] == ["page.html"]
