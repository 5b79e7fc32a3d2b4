"""The job's model: defaults, derived values, JSON Schema."""

from __future__ import annotations

import jsonschema
import pytest
from pydantic import TypeAdapter, ValidationError

from launcher.spec import ClassifyConfig, DetectConfig, JobSpec, Resources, TrainConfig

TRAIN = {"name": "x", "train": {"task": "classify"}, "data": {"train": "a", "val": "b"}}
COMMAND = {"name": "x", "command": ["python", "train.py"]}


def test_models_are_frozen() -> None:
    job = JobSpec.model_validate(TRAIN)
    with pytest.raises(ValidationError, match="frozen"):
        job.name = "y"  # type: ignore[misc]


def test_the_task_chooses_the_model() -> None:
    adapter: TypeAdapter[ClassifyConfig | DetectConfig] = TypeAdapter(TrainConfig)
    assert isinstance(adapter.validate_python({"task": "classify"}), ClassifyConfig)
    assert isinstance(adapter.validate_python({"task": "detect"}), DetectConfig)


@pytest.mark.parametrize(
    ("resources", "processes"),
    [({}, 1), ({"gpus": 4}, 4), ({"processes": 2}, 2), ({"gpus": 4, "processes": 1}, 1)],
)
def test_processes_per_node(resources: dict[str, object], processes: int) -> None:
    assert Resources.model_validate(resources).processes_per_node == processes


def test_quantities_are_read() -> None:
    resources = Resources.model_validate({"memory": "64GB", "shm": "16Gi", "timeout": "12h", "grace": 30, "gpus": 1})
    assert (resources.memory, resources.shm, resources.disk) == (64 * 10**9, 16 * 2**30, "auto")
    assert (resources.timeout, resources.max_wait, resources.grace) == (43200.0, None, 30.0)


def test_one_gpu_model_may_stand_alone() -> None:
    assert Resources.model_validate({"gpus": 1, "gpu": "A100"}).gpu == ("A100",)


def test_env_takes_whole_numbers_as_text() -> None:
    assert JobSpec.model_validate({**COMMAND, "env": {"A": 1, "C": "x"}}).env == {"A": "1", "C": "x"}


@pytest.mark.parametrize("reference", ["env:TOKEN", "file:~/.token", "store:projects/p/secrets/s"])
def test_secrets_by_reference(reference: str) -> None:
    assert JobSpec.model_validate({**COMMAND, "secrets": {"A": reference}}).secrets == {"A": reference}


@pytest.mark.parametrize("value", ["hunter2", "", "env:", "env:A B", "file:", "https://x", "ENV:A"])
def test_secrets_by_value(value: str) -> None:
    with pytest.raises(ValidationError, match="given by value"):
        JobSpec.model_validate({**COMMAND, "secrets": {"A": value}})


def test_init_and_the_weights_channel_exclude_each_other() -> None:
    train = {"task": "classify", "init": "run://a/model"}
    with pytest.raises(ValidationError, match=r"train\.init and the channel weights"):
        JobSpec.model_validate({**TRAIN, "train": train, "data": {"train": "a", "val": "b", "weights": "c"}})


@pytest.mark.parametrize(
    "job",
    [
        TRAIN,
        COMMAND,
        {**COMMAND, "resources": {"memory": "64GB", "timeout": "12h", "shm": "auto", "disk": 10**9}},
        {**COMMAND, "image": "x", "runner": "none"},
    ],
)
def test_the_schema_takes_what_the_model_takes(job: dict[str, object]) -> None:
    JobSpec.model_validate(job)
    jsonschema.validate(job, JobSpec.model_json_schema())


@pytest.mark.parametrize(
    "job",
    [{**TRAIN, "nmae": "x"}, {**TRAIN, "train": {"task": "classify", "epochs": "many"}}, {**COMMAND, "retries": -1}],
)
def test_the_schema_refuses_what_the_model_refuses(job: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, JobSpec.model_json_schema())
