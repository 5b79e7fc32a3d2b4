"""Job files: each mistake is one SpecError that names file, line and key, and `--set` keeps types."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import SpecError
from launcher.jobfile import load_job, parse_setting
from launcher.spec import JobSpec

GOOD = """\
name: shapes
train:
  task: classify
  epochs: 2
data:
  train: data/train
  val: data/val
resources:
  gpus: 0
"""
COMMAND = "name: x\ncommand: [python, train.py]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *sets: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load_job(write(folder, text), sets)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_good_file(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, GOOD))
    assert job.train is not None
    assert (job.name, job.train.task, job.train.epochs, job.data["val"]) == ("shapes", "classify", 2, "data/val")


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "message"),
    [
        ("epochs: 2", "epoch: 2", 4, "train.epoch", "unknown key; did you mean 'epochs'?"),
        ("epochs: 2", "zzzzzz: 2", 4, "train.zzzzzz", "unknown key; expected one of amp, augment, batch"),
        ("resources:", "resource:", 8, "resource", "did you mean 'resources'?"),
        ("gpus: 0", "gpuss: 0", 9, "resources.gpuss", "did you mean 'gpus'?"),
        ("epochs: 2", "epochs: two", 4, "train.epochs", "expected a valid integer"),
        ("epochs: 2", "epochs: 2.5", 4, "train.epochs", "found 2.5"),
        ("epochs: 2", "epochs: yes", 4, "train.epochs", "expected a number, found true"),
        ("epochs: 2", "epochs: [2]", 4, "train.epochs", "found a list"),
        ("epochs: 2", "epochs: 0", 4, "train.epochs", "greater than or equal to 1, found 0"),
        ("epochs: 2", "learning_rate: .nan", 4, "train.learning_rate", "found nan"),
        ("epochs: 2", "augment: strong", 4, "train.augment", "'none', 'shift' or 'standard', found 'strong'"),
        ("task: classify", "task: segment", 2, "train", "'segment' is not a task; expected 'classify', 'detect'"),
        ("  task: classify\n", "", 2, "train", "task: classify or task: detect"),
        ("task: classify", "task: detect\n  image_size: 100", 4, "train.image_size", "multiple of 32"),
        ("name: shapes", "name: 7", 1, "name", "expected text, found 7"),
        ("name: shapes", "name: ''", 1, "name", "at least 1 character"),
        ("name: shapes", "name: '---'", 1, "name", "at least one letter or digit"),
        ("name: shapes", 'name: "a\\nb"', 1, "name", "one line"),
        ("name: shapes\n", "", None, "name", "is missing"),
        ("name: shapes", "name: shapes\ncommand: [x]", None, None, "train and command are both given"),
        ("name: shapes", "name: shapes\ncommand: x", 2, "command", "expected a list, found 'x'"),
        ("  val: data/val\n", "", None, None, "'val' is missing"),
        ("data/val", "[data/val]", 7, "data.val", "expected text, found a list"),
        ("  val:", "  Val:", 5, "data", "'Val' is not a channel name"),
        ("  val: data/val", "  val: ''", 5, "data", "channel 'val' has no place"),
        ("  val: data/val", "  val: a\n  a-b: x\n  a_b: x", 5, "data", "would share the variable CVLAUNCH_DATA_A_B"),
        ("  val: data/val", "  val: a\n  detect: 5", 8, "data.detect", "expected text, found 5"),
        ("  gpus: 0", "  gpus: 0\n  shm: 5 apples", 10, "resources.shm", "'5 apples' is not a size"),
        ("  gpus: 0", "  gpus: 0\n  memory: [1]", 10, "resources.memory", "is not a size"),
        ("  gpus: 0", "  processes: many", 9, "resources.processes", "found 'many'"),
        ("  gpus: 0", "  timeout: soon", 9, "resources.timeout", "'soon' is not a duration"),
        ("  gpus: 0", "  gpu: A100", 8, "resources", "gpu names a model but gpus is 0"),
        ("name: shapes", "name: shapes\nsecrets: {TOKEN: hunter2}", 2, "secrets", "'TOKEN' is given by value"),
        ("name: shapes", "name: shapes\nsecrets: {TOKEN: 424242}", 2, "secrets.TOKEN", "expected a reference"),
        ("name: shapes", "name: shapes\nenv: {A B: x}", 2, "env", "'A B' is not a variable name"),
        ("name: shapes", "name: shapes\nenv: {PYTHON: 3.10}", 2, "env.PYTHON", "expected text, found 3.1; quote it"),
        ("name: shapes", "name: shapes\nenv: {CVLAUNCH_X: x}", 2, "env", "is set by cvlaunch"),
        ("name: shapes", "name: shapes\nenv: {A: x}\nsecrets: {A: env:A}", None, None, "in env and in secrets"),
        ("name: shapes", "name: shapes\nimage: a\nbuild: b", None, None, "image and build are both given"),
        ("name: shapes", "name: shapes\nrunner: none", None, None, "runner: none is for foreign images"),
        ("name: shapes", "name: shapes\ncode: {root: ., requirements: ../r}", 2, "code", "inside root"),
        ("name: shapes", "name: shapes\ncode: .", 2, "code", "expected keys and values, found '.'"),
        ("name: shapes", "name: shapes\nname: again", 2, "name", "given twice"),
    ],
)
def test_bad_files(tmp_path: Path, old: str, new: str, line: int | None, key: str | None, message: str) -> None:
    assert GOOD.count(old) == 1
    error = refusal(tmp_path, GOOD.replace(old, new))
    assert message in error.message
    assert (error.key, error.line, error.file) == (key, line, str(tmp_path / "job.yaml"))
    assert "hunter2" not in str(error)
    assert "424242" not in str(error)


def test_nothing_to_run(tmp_path: Path) -> None:
    assert "give train or command" in refusal(tmp_path, "name: x\n").message


def test_detect_limits(tmp_path: Path) -> None:
    detect = GOOD.replace("task: classify", "task: detect")
    assert "one node" in refusal(tmp_path, detect.replace("gpus: 0", "nodes: 2")).message
    assert "one process" in refusal(tmp_path, detect.replace("gpus: 0", "processes: 2")).message


def test_a_huge_value_is_shortened(tmp_path: Path) -> None:
    assert len(str(refusal(tmp_path, f"name: x\ncommand: {'y' * 10_000}\n"))) < 300


@pytest.mark.parametrize(
    ("setting", "place", "value"),
    [
        ("name=123", "name", "123"),
        ("name=true", "name", "true"),
        ("name=1e3", "name", "1e3"),
        ("name=a=b", "name", "a=b"),
        ("train.epochs=3", "train.epochs", 3),
        ("train.model=50", "train.model", "50"),
        ("train.pretrained=false", "train.pretrained", False),
        ("train.learning_rate=1e-3", "train.learning_rate", 0.001),
        ("train.patience=null", "train.patience", None),
        ("resources={gpus: 2, gpu: [A100, L40S]}", "resources.gpu", ("A100", "L40S")),
        ("resources.timeout=90m", "resources.timeout", 5400.0),
        ("data.train=7", "data.train", "7"),
        ("data.detect=5", "data.detect", "5"),
        ("env.LEVEL=007", "env.LEVEL", "007"),
        ("env.PYTHON=3.10", "env.PYTHON", "3.10"),
        ("env.FLAG=yes", "env.FLAG", "yes"),
        ("tags.year=2026", "tags.year", "2026"),
        ("secrets.TOKEN=env:TOKEN", "secrets.TOKEN", "env:TOKEN"),
    ],
)
def test_set_keeps_types(tmp_path: Path, setting: str, place: str, value: object) -> None:
    found: object = load_job(write(tmp_path, GOOD), [setting])
    for part in place.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert (found, type(found)) == (value, type(value))


def test_settings_are_laid_over_in_order(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, GOOD), ["resources.gpus=1", "resources.gpu=[A100]", "resources.gpus=2"])
    assert (job.resources.gpus, job.resources.gpu) == (2, ("A100",))


@pytest.mark.parametrize(
    ("setting", "key", "message"),
    [
        ("train.epochs", "--set", "a setting looks like train.epochs=3"),
        ("=3", "--set", "a setting looks like"),
        ("train..epochs=3", "--set", "a setting looks like"),
        ("name=[", "--set name", "can't be read; quote it"),
        ("name=2026-99-99", "--set name", "can't be read; quote it"),
        ("name=!!bool maybe", "--set name", "can't be read; quote it"),
        ("name=" + "[" * 500, "--set name", "can't be read; quote it"),
        ("train.epoch=3", "train.epoch", "did you mean 'epochs'?"),
        ("resourcs.gpus=1", "resourcs", "did you mean 'resources'?"),
        ("train.epochs=x", "train.epochs", "expected a valid integer"),
        ("train.epochs.deep=1", "train.epochs", "found keys and values"),
        ("command=[python, x.py]", None, "train and command are both given"),
    ],
)
def test_bad_settings(tmp_path: Path, setting: str, key: str | None, message: str) -> None:
    error = refusal(tmp_path, GOOD, setting)
    assert message in error.message
    assert error.key == key


def test_a_setting_has_no_line_of_the_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD, "train.epochs=x").line != 4
    assert refusal(tmp_path, GOOD.replace("epochs: 2", "epochs: x"), "name=y").line == 4


def test_parse_setting() -> None:
    assert parse_setting("a.b=3") == (("a", "b"), 3, "3")
    assert parse_setting("a=") == (("a",), "", "")


KEYS = st.sampled_from([*JobSpec.model_fields, "task", "epochs", "gpus", "gpu", "shm", "timeout", "A", "root", "nope"])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.binary(max_size=5),
    st.text(max_size=10),
    st.sampled_from(["classify", "detect", "auto", "none", "env:A", "16Gi", "12h", "1" * 400 + "h", "\0"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=4)
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.dictionaries(KEYS, VALUES, max_size=6), plausible=st.booleans())
def test_any_yaml_is_a_job_or_a_spec_error(tmp_path: Path, content: dict[str, object], plausible: bool) -> None:
    whole = {**yaml.safe_load(GOOD), **content} if plausible else content
    try:
        assert isinstance(load_job(write(tmp_path, yaml.safe_dump(whole))), JobSpec)
    except SpecError as error:
        assert str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.lists(KEYS | st.text(max_size=4), min_size=1, max_size=3).map(".".join), value=st.text(max_size=20))
def test_any_setting_is_taken_or_a_spec_error(tmp_path: Path, key: str, value: str) -> None:
    try:
        load_job(write(tmp_path, GOOD), [f"{key}={value}"])
    except SpecError as error:
        assert str(error)
