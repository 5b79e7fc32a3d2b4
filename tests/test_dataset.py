"""Data folders: which channels a training takes, and what `cvlaunch init` recognises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.dataset import ClassFolders, Unknown, YoloData, check_channel, inspect_folder
from launcher.errors import SpecError
from launcher.spec import ClassifyConfig, DetectConfig

CLASSIFY = ClassifyConfig(task="classify")
DETECT = DetectConfig(task="detect")


def tree(root: Path, *names: str) -> Path:
    """Empty files; a name that ends with / is a folder."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


# ---- channels


@pytest.mark.parametrize(
    "names",
    [
        ("cat/1.jpg", "dog/2.PNG"),
        ("cat/deep/er/1.webp", "dog/2.bmp", "notes.txt", ".cache/x"),
        ("cat/1.tiff", "dog/notes.txt", "dog/2.gif"),
        ("-/1.jpg", "# '\" ü/1.jpeg"),
    ],
)
def test_class_folders_pass(tmp_path: Path, names: tuple[str, ...]) -> None:
    check_channel(tree(tmp_path / "train", *names), CLASSIFY, channel="train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "is empty"),
        ((".DS_Store",), "is empty"),
        (("1.jpg", "2.jpg"), "images but no class folders; classify expects <class>/<image>"),
        (("readme.txt",), "no class folders; classify expects"),
        (("cat/",), "holds no images"),
        (("cat/a.txt", "dog/b.txt"), "holds no images"),
        (("cat/1.jpg",), "one class, 'cat'"),
        (("cat/1.jpg", ".hidden/1.jpg"), "one class, 'cat'"),
        (("train/cat/1.jpg",), "/train that you mean?"),
        (("cat/1.jpg", "dog/"), "the class folder 'dog'"),
        (("cat/1.jpg", "dog/.1.jpg"), "the class folder 'dog'"),
        (("cat/1.jpg", "dog/2.jpg", *(f"x{i}/" for i in range(8))), "'x0', 'x1', 'x2', 'x3', 'x4' and 3 more"),
    ],
)
def test_class_folders_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_channel(tree(tmp_path / "here", *names), CLASSIFY, channel="train")
    assert message in caught.value.message
    assert str(tmp_path / "here") in caught.value.message
    assert (caught.value.key, caught.value.exit_code) == ("data.train", 2)


def test_val_may_have_one_class(tmp_path: Path) -> None:
    check_channel(tree(tmp_path / "val", "cat/1.jpg"), CLASSIFY, channel="val")


@pytest.mark.parametrize("names", [("images/1.jpg", "labels/1.txt"), ("images/a/1.png", "labels/a/1.txt", "data.yaml")])
def test_yolo_channels_pass(tmp_path: Path, names: tuple[str, ...]) -> None:
    check_channel(tree(tmp_path / "train", *names), DETECT, channel="train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "is empty"),
        (("cat/1.jpg",), "has no folder images/"),
        (("images/", "labels/1.txt"), "holds no images"),
        (("images/1.txt", "labels/1.txt"), "holds no images"),
        (("images/1.jpg",), "has no folder labels/"),
        (("images/1.jpg", "labels/"), "holds no .txt files"),
    ],
)
def test_yolo_channels_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_channel(tree(tmp_path / "here", *names), DETECT, channel="val")
    assert message in caught.value.message
    assert caught.value.key == "data.val"


def test_no_folder_and_no_access(tmp_path: Path) -> None:
    file = tree(tmp_path, "file") / "file"
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    bad = {tmp_path / "none": "no folder", file: "is a file", loop: "no folder", Path("a\0b"): "no folder"}
    for path, message in {**bad, tmp_path / ("x" * 300): "can't be read"}.items():
        with pytest.raises(SpecError, match=message):
            check_channel(path, CLASSIFY, channel="train")


@pytest.mark.needs("root")
def test_unreadable_folder(tmp_path: Path) -> None:
    """As another user, since root may read everything."""
    folder = tree(tmp_path / "train", "cat/1.jpg", "dog/1.jpg")
    (folder / "dog").chmod(0)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(SpecError, match="can't be read: Permission denied"):
            check_channel(folder, CLASSIFY, channel="train")
    finally:
        os.seteuid(0)


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    tree(tmp_path / "pool", "cats/1.jpg")
    folder = tree(tmp_path / "train", "dog/1.jpg", "bird/notes.txt")
    (folder / "cat").symlink_to("../pool/cats")
    (folder / "bird" / "again").symlink_to("..")
    check_channel(folder, CLASSIFY, channel="train")  # bird/again/dog/1.jpg counts: the trainer follows links too
    (folder / "bird" / "again").unlink()
    (folder / "bird" / "self").symlink_to(".")
    with pytest.raises(SpecError, match="'bird'"):
        check_channel(folder, CLASSIFY, channel="train")


def test_many_files_are_not_read(tmp_path: Path) -> None:
    """The first image of a class is enough, in folders of 1,000: seen by the system calls of a process of its own."""
    folder = tree(tmp_path / "train", *(f"{c}/{i}.jpg" for c in range(20) for i in range(1_000)))
    script = f"""
import sys
from pathlib import Path
from launcher.dataset import check_channel
from launcher.spec import ClassifyConfig
opened = []
sys.addaudithook(lambda event, facts: opened.append(facts[0]) if event == "open" else None)
check_channel(Path({str(folder)!r}), ClassifyConfig(task="classify"), channel="train")
print(len([path for path in opened if str(path).endswith(".jpg")]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 20


# ---- folders


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_split_class_folders(tmp_path: Path, train: str, val: str) -> None:
    root = tree(
        tmp_path, f"{train}/cat/1.jpg", f"{train}/cat/2.jpg", f"{train}/dog/1.jpg", f"{train}/none/", f"{val}/cat/3.jpg"
    )
    assert inspect_folder(root) == ClassFolders({"cat": 2, "dog": 1}, root / train, root / val, split=True)


def test_val_goes_before_test(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"{split}/{c}/1.jpg" for split in ("train", "test", "val") for c in "ab"))
    found = inspect_folder(root)
    assert isinstance(found, ClassFolders)
    assert found.val == root / "val"


def test_class_folders_without_split(tmp_path: Path) -> None:
    root = tree(tmp_path, "cat/1.jpg", "dog/1.jpg", "docs/readme.md")
    assert inspect_folder(root) == ClassFolders({"cat": 1, "dog": 1}, root, None, split=False)
    only_train = tree(tmp_path / "other", "train/cat/1.jpg", "train/dog/1.jpg")
    found = inspect_folder(only_train)
    assert found == ClassFolders({"cat": 1, "dog": 1}, only_train / "train", None, split=True)


def yolo(root: Path, *names: str, **content: object) -> Path:
    tree(root, *names)
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root


SPLIT_FIRST = ("train/images/1.jpg", "train/labels/1.txt", "valid/images/1.jpg", "valid/labels/1.txt")


@pytest.mark.parametrize(
    "content",
    [
        {"train": "train/images", "val": "valid/images", "names": ["cat", "dog"], "nc": 2},
        {"train": "../train/images", "val": "../valid/images", "names": ["cat", "dog"]},
        {"train": "train", "val": "valid", "names": {0: "cat", 1: "dog"}},
        {"path": ".", "train": "./train/images/", "validation": "valid/images", "names": ["cat", "dog"]},
        {"path": "../datasets/gone", "train": "train/images", "val": "valid/images", "names": ["cat", "dog"]},
    ],
    ids=["plain", "roboflow", "names by id", "path", "path elsewhere"],
)
def test_data_yaml(tmp_path: Path, content: dict[str, object]) -> None:
    root = yolo(tmp_path / "ds", *SPLIT_FIRST, **content)
    expected = YoloData(root / "data.yaml", ("cat", "dog"), root / "train", root / "valid")
    assert inspect_folder(root) == inspect_folder(root / "data.yaml") == expected


def test_a_yaml_of_another_name(tmp_path: Path) -> None:
    root = yolo(tmp_path, *SPLIT_FIRST, train="train/images", val="valid/images", names=["a"])
    (root / "data.yaml").rename(root / "coco128.yaml")
    (root / "other.yaml").write_text("a: 1\n")
    (root / "broken.yaml").write_text("a: [\n")
    found = inspect_folder(root)
    assert isinstance(found, YoloData)
    assert found.yaml == root / "coco128.yaml"


def test_channels_with_names_in_the_data_yaml_of_train(tmp_path: Path) -> None:
    """As examples/shapes has it: the folders are the contract's channels already."""
    tree(tmp_path, *SPLIT_FIRST)
    (tmp_path / "train/data.yaml").write_text("names: [cat, dog]\n")
    expected = YoloData(tmp_path / "train/data.yaml", ("cat", "dog"), tmp_path / "train", tmp_path / "valid")
    assert inspect_folder(tmp_path) == expected


def test_images_and_labels_first_is_arranged_by_the_commands_that_it_prints(tmp_path: Path) -> None:
    names = [
        f"{kind}/{split}/1.{end}"
        for kind, end in (("images", "jpg"), ("labels", "txt"))
        for split in ("train", "my val")
    ]
    root = yolo(tmp_path / "my data", *names, train="images/train", val="images/my val", names=["cat"])
    found = inspect_folder(root)
    assert isinstance(found, Unknown)
    commands = "\n".join(line for line in found.reason.splitlines() if line.startswith("  "))
    subprocess.run(["sh", "-ec", commands], check=True)
    assert inspect_folder(root) == YoloData(root / "data.yaml", ("cat",), root / "train", root / "my val")
    check_channel(root / "train", DETECT, channel="train")
    assert (root / "images/train/1.jpg").samefile(root / "train/images/1.jpg")


@pytest.mark.parametrize(
    ("names", "content", "reason"),
    [
        (SPLIT_FIRST, {"train": "train/images", "val": "valid/images"}, "names must be a list"),
        (SPLIT_FIRST, {"train": "train/images", "val": "valid/images", "names": []}, "names must be a list"),
        (SPLIT_FIRST, {"train": "train/images", "val": "valid/images", "names": {1: "a"}}, "names must be a list"),
        (SPLIT_FIRST, {"train": "train/images", "val": "valid/images", "names": [False, True]}, "names must be a list"),
        (SPLIT_FIRST, {"train": "train/images", "val": "valid/images", "names": [["a"]]}, "names must be a list"),
        (SPLIT_FIRST, {"val": "valid/images", "names": ["a"]}, "train is missing"),
        (SPLIT_FIRST, {"train": "train/images", "names": ["a"]}, "val is missing"),
        (SPLIT_FIRST, {"train": ["train/images"], "val": "valid/images", "names": ["a"]}, "is not one folder"),
        (SPLIT_FIRST, {"train": "nowhere", "val": "valid/images", "names": ["a"]}, "there is no such folder"),
        (("train/images/1.jpg",), {"train": "train/images", "val": "x", "names": ["a"]}, "no folder labels/ beside"),
        (("images/train/1.jpg",), {"train": "images/train", "val": "x", "names": ["a"]}, "no folder labels/ beside"),
    ],
)
def test_data_yaml_refused(tmp_path: Path, names: tuple[str, ...], content: dict[str, object], reason: str) -> None:
    found = inspect_folder(yolo(tmp_path, *names, **content))
    assert isinstance(found, Unknown)
    assert reason in found.reason
    assert str(tmp_path) in found.reason


@pytest.mark.parametrize(
    "text",
    [
        b"\x00\xff",
        b"a: [",
        b"- a",
        b"",
        b"names: !!bool maybe",
        b"[" * 5000,
        b"names: &a [*a]\ntrain: x",
        b"1: 2",
        b"names: [0x" + b"f" * 9000 + b"]",
        b"#" * (1 << 21),
    ],
    ids=range(10),
)
def test_broken_data_yaml(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "data.yaml").write_bytes(text)
    assert isinstance(inspect_folder(tmp_path), Unknown)
    assert isinstance(inspect_folder(tmp_path / "data.yaml"), Unknown)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "holds no images; expected train/<class>/<image> and val/<class>/<image>"),
        (("1.jpg",), "holds images but no class folders"),
        (("train/1.jpg", "val/1.jpg"), "holds images but no class folders"),
        (("train/cat/1.jpg", "val/cat/1.jpg"), "one class, 'cat'"),
        (("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/cow/1.jpg"), "has the class 'cow', which"),
        (("train/cat/1.jpg", "train/dog/1.jpg", "val/1.jpg"), "has no class folders"),
        (("images/1.jpg", "labels/1.txt"), "no data.yaml"),
        (SPLIT_FIRST, "no data.yaml"),
    ],
)
def test_unknown_folders(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    found = inspect_folder(tree(tmp_path / "here", *names))
    assert isinstance(found, Unknown)
    assert reason in found.reason


def test_unknown_files(tmp_path: Path) -> None:
    tree(tmp_path, "photo.jpg")
    for path, reason in {tmp_path / "photo.jpg": "is a file", tmp_path / "none": "no folder"}.items():
        found = inspect_folder(path)
        assert isinstance(found, Unknown)
        assert reason in found.reason
