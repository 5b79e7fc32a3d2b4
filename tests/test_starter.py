"""`cvlaunch init`: the first job file loads, fits the data, and refusals say what to do."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from launcher import gpus
from launcher.dataset import check_channel
from launcher.errors import SpecError
from launcher.jobfile import load_job
from launcher.spec import ClassifyConfig, DetectConfig, JobSpec
from launcher.starter import image_shape, starter_job


def image(size: tuple[int, int], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind, **options)
    return buffer.getvalue()


def classes(
    root: Path, count: int = 2, size: tuple[int, int] = (32, 30), names: tuple[str, ...] = ("cat", "dog")
) -> Path:
    """`count` images a class to train on, one to validate."""
    content = image(size)
    for split, images in (("train", count), ("val", 1)):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(images):
                (folder / f"{i}.png").write_bytes(content)
    return root


def yolo(root: Path, names: list[str], size: tuple[int, int] = (640, 480)) -> Path:
    for split in ("train", "valid"):
        for kind, name, content in (("images", "1.jpg", image(size, "JPEG")), ("labels", "1.txt", b"0 .5 .5 .1 .1\n")):
            (root / split / kind).mkdir(parents=True)
            (root / split / kind / name).write_bytes(content)
    content = {"train": "../train/images", "val": "../valid/images", "names": names}
    (root / "data.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    return root


def load(text: str, folder: Path) -> JobSpec:
    """The file as `cvlaunch init` writes it, and what it means: its channels must be there and fit."""
    (folder / "job.yaml").write_text(text)
    job = load_job(folder / "job.yaml")
    assert job.train is not None
    for channel, place in job.data.items():
        assert place.startswith((".", "/"))
        check_channel(folder / place, job.train, channel=channel)
    return job


def test_the_first_line_is_the_editors(tmp_path: Path) -> None:
    text = starter_job(classes(tmp_path / "data"), name=None, relative_to=tmp_path)
    assert text.startswith("# yaml-language-server: $schema=job.schema.json\n")
    assert "cvlaunch schema > job.schema.json" in text
    assert all(len(line) <= 120 and line == line.rstrip() for line in text.splitlines())


def test_every_commented_option_is_valid(tmp_path: Path) -> None:
    """Taking a `# key:` line's mark away gives a job that still loads."""
    text = starter_job(classes(tmp_path / "pets"), name=None, relative_to=tmp_path)
    text = text.replace("  gpus: 0", "  gpus: 1")
    options = [
        line for line in text.splitlines() if line.lstrip().startswith("# ") and ": " in line and "`" not in line
    ]
    options = [line for line in options if line.split(":")[0].split("# ")[1].isidentifier()]
    keys = {line.split("# ")[1].split(":")[0] for line in options}
    assert keys >= {
        "learning_rate",
        "patience",
        "seed",
        "gpu",
        "cpus",
        "memory",
        "timeout",
        "max_wait",
        "spot",
        "retries",
        "tags",
    }
    for line in options:
        other = text.replace(line, line.replace("# ", "", 1))
        if "command" in line or "code" in line:
            continue
        (tmp_path / "job.yaml").write_text(other)
        load_job(tmp_path / "job.yaml")


def test_classification(tmp_path: Path) -> None:
    root = classes(tmp_path / "flowers" / "data", count=3, size=(500, 300))
    job = load(starter_job(root, name=None, relative_to=tmp_path), tmp_path)
    assert isinstance(job.train, ClassifyConfig)
    assert (job.name, job.data) == ("flowers", {"train": "./flowers/data/train", "val": "./flowers/data/val"})
    assert (job.train.model, job.train.pretrained, job.train.image_size) == ("resnet18", True, 224)
    assert (job.train.epochs, job.train.batch, job.train.augment) == (20, 8, "standard")
    assert job.resources.gpus == min(1, gpus.count())


def test_small_images(tmp_path: Path) -> None:
    job = load(starter_job(classes(tmp_path / "digits", size=(28, 33)), name="mine", relative_to=tmp_path), tmp_path)
    assert isinstance(job.train, ClassifyConfig)
    assert job.name == "mine"
    assert (job.train.model, job.train.pretrained, job.train.image_size) == ("resnet10t", False, 64)


def test_more_images(tmp_path: Path) -> None:
    job = load(starter_job(classes(tmp_path / "many", count=1100), name=None, relative_to=tmp_path), tmp_path)
    assert isinstance(job.train, ClassifyConfig)
    assert (job.train.epochs, job.train.batch) == (10, 32)


def test_detection(tmp_path: Path) -> None:
    names = ["cat", "traffic light", "1", "yes", "it's: # [odd], ü\u2028", "null", "- dash", "a\nb"]
    root = yolo(tmp_path / "road", names)
    for folder in (root, root / "data.yaml"):
        job = load(starter_job(folder, name=None, relative_to=tmp_path), tmp_path)
        assert isinstance(job.train, DetectConfig)
        assert (job.name, job.train.classes, job.train.image_size) == ("road", tuple(names), 640)
        assert job.data == {"train": "./road/train", "val": "./road/valid"}


def test_small_scenes(tmp_path: Path) -> None:
    job = load(starter_job(yolo(tmp_path / "a", ["x"], size=(100, 90)), name=None, relative_to=tmp_path), tmp_path)
    assert job.train is not None
    assert job.train.image_size == 128


def test_where_the_job_file_stands(tmp_path: Path) -> None:
    root = classes(tmp_path / "far" / "pets")
    beside = tmp_path / "jobs" / "deep"
    beside.mkdir(parents=True)
    assert load(starter_job(root, name=None, relative_to=root), root).data["train"] == "./train"
    assert load(starter_job(root, name=None, relative_to=beside), beside).data["train"] == "../../far/pets/train"
    (tmp_path / "link").symlink_to("jobs/deep")
    load(starter_job(root, name=None, relative_to=tmp_path / "link"), tmp_path / "link")


def test_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert load(starter_job(Path("pets"), name=None, relative_to=Path()), tmp_path).data["train"] == "./pets/train"
    monkeypatch.chdir(tmp_path / "pets")
    assert load(starter_job(Path(), name=None, relative_to=Path()), tmp_path / "pets").name == "pets"


def test_test_in_place_of_val_is_said(tmp_path: Path) -> None:
    root = classes(tmp_path / "pets")
    (root / "val").rename(root / "test")
    text = starter_job(root, name=None, relative_to=tmp_path)
    assert load(text, tmp_path).data["val"] == "./pets/test"
    assert "no folder val, so test serves" in text


FOLDER = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..") and len(os.fsencode(name)) < 200
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=FOLDER)
@example(name="two words")
@example(name="-rf")
@example(name="# no comment")
@example(name="'\"")
@example(name=": {x}")
@example(name="target:")
@example(name="~")
@example(name="null")
@example(name="123")
@example(name="a\nb: c")
@example(name=" ")
@example(name="é\u2028\x85\ufeff\U0001f600")
@example(name="{gpus}")
@example(name="%s")
def test_any_folder_name(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    base = tmp_path_factory.mktemp("any")
    root = classes(base / name, count=1)
    assert load(starter_job(root, name=None, relative_to=base), base).data["train"] == f"./{name}/train"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.text(max_size=140))
def test_any_name_is_taken_as_it_is_or_refused(tmp_path: Path, name: str) -> None:
    root = classes(tmp_path / "pets", count=1)
    try:
        text = starter_job(root, name=name, relative_to=tmp_path)
    except SpecError as error:
        assert error.key == "name"
    else:
        assert load(text, tmp_path).name == name


def test_a_folder_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    root = classes(tmp_path / os.fsdecode(b"caf\xe9"), count=1)
    with pytest.raises(SpecError) as caught:
        starter_job(root, name="x", relative_to=tmp_path)
    assert caught.value.key == "data.train"


@pytest.mark.parametrize("layout", ["flat", "train only"])
def test_without_val_the_printed_command_makes_one(tmp_path: Path, layout: str) -> None:
    root = classes(tmp_path / "my pets", count=10, names=("cat", "-dog s", "it's"))
    for split in ("val", "train"):
        for folder in sorted((root / split).iterdir()) if split == "val" or layout == "flat" else []:
            folder.rename(root / folder.name) if split == "train" else [
                *map(Path.unlink, folder.iterdir()),
                folder.rmdir(),
            ]
    (root / "val").rmdir()
    if layout == "flat":
        (root / "train").rmdir()
    with pytest.raises(SpecError) as caught:
        starter_job(root, name=None, relative_to=tmp_path)
    assert "no val/ to measure the result on" in caught.value.message
    subprocess.run(["sh", "-ec", caught.value.message.splitlines()[-1]], check=True)
    load(starter_job(root, name=None, relative_to=tmp_path), tmp_path)
    for name in ("cat", "-dog s", "it's"):
        assert [len(list((root / split / name).iterdir())) for split in ("train", "val")] == [8, 2]


@pytest.mark.parametrize("name", ["none", "empty", "x" * 300])
def test_nothing_to_train_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError) as caught:
        starter_job(tmp_path / name, name=None, relative_to=tmp_path)
    assert name in caught.value.message
    assert caught.value.exit_code == 2


# ---- headers


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (3000, 17)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": b"Exif\0\0" + b"x" * 60_000})],
    ids=["png", "jpeg", "progressive", "exif"],
)
def test_image_shape(tmp_path: Path, kind: str, options: dict[str, object], size: tuple[int, int]) -> None:
    path = tmp_path / "image"
    path.write_bytes(image(size, kind, **options))
    assert image_shape(path) == size


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(b"\xff\xd8".__add__),
        st.binary(max_size=20).map(b"\x89PNG\r\n\x1a\n".__add__),
    )
)
def test_image_shape_of_anything(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    assert image_shape(path) is None or min(image_shape(path) or ()) >= 0
