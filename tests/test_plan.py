"""Templates, overlays, and the golden renderings of every backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.backends.local import LocalBackend, LocalTarget
from launcher.errors import SpecError, UnsupportedError
from launcher.plan import eject_templates, load_template, make_plan, placeholders
from tests.conftest import Golden
from tests.jobs import SPECS, fixed_job


def local(**keys: object) -> LocalBackend:
    facts = {"output": "/out", "root": "/state", "python": "/usr/bin/python3", **keys}
    return LocalBackend(LocalTarget.model_validate(facts), "desk")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("output", ["file:///out", "s3://bucket/runs"], ids=["file", "s3"])
def test_golden_renderings_of_local(name: str, output: str, golden: Golden) -> None:
    backend = local()
    job = fixed_job(name, backend.target, "desk", output)
    plan = make_plan(job, backend, f"{name}-0000000000", template=load_template(LocalBackend))
    assert make_plan(job, backend, f"{name}-0000000000", template=load_template(LocalBackend)) == plan
    golden.check(f"local/{name}-{output.partition(':')[0]}.json", plan.text)


def rendered(template: str, **keys: object) -> str:
    backend = local(**keys)
    job = fixed_job("command", backend.target, "desk", "file:///out")
    return make_plan(job, backend, "echo-0000000000", template=template).text


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ('{"a": {{ nothing | tojson }}}', "local/process.json.j2: .*'nothing' is undefined"),
        ('{"a": {{ run_id }}}', "prints 'echo-0000000000' without a filter"),
        ('{"a": {{ run_id | upper }}}', "No filter named 'upper'"),
        ('{"a": \n{% if %}}', "local/process.json.j2:2: not a Jinja template"),
        ('{"a": ', "did not give JSON"),
    ],
)
def test_a_wrong_template_is_told(template: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        rendered(template)


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ({"b": {"c": 2, "d": None}, "e": [1]}, {"a": "echo-0000000000", "b": {"c": 2}, "e": [1]}),
        ([{"op": "replace", "path": "/b/c", "value": 3}], {"a": "echo-0000000000", "b": {"c": 3, "d": 1}}),
        ({"a": None}, {"b": {"c": 1, "d": 1}}),
    ],
    ids=["merge", "patch", "remove"],
)
def test_an_overlay_changes_what_is_sent(overlay: object, expected: object) -> None:
    text = rendered('{"a": {{ run_id | tojson }}, "b": {"c": 1, "d": 1}}', overlay=overlay)
    assert json.loads(text) == expected


def test_an_overlay_that_does_not_apply_is_told() -> None:
    with pytest.raises(SpecError, match="overlay: the JSON patch does not apply"):
        rendered("{}", overlay=[{"op": "replace", "path": "/b/c", "value": 3}])


def test_a_user_s_template_goes_before_ours(tmp_path: Path) -> None:
    copy = eject_templates(LocalBackend, tmp_path)
    (copy / LocalBackend.template).write_text("{}")
    assert load_template(LocalBackend, str(tmp_path)) == "{}"
    assert load_template(LocalBackend, str(tmp_path / "empty")) == load_template(LocalBackend)
    with pytest.raises(SpecError, match="is there already"):
        eject_templates(LocalBackend, tmp_path)


def test_placeholders_are_found() -> None:
    text = '{"role": "arn:aws:iam::000000000000:role/REPLACE-ME", "b": "REPLACE-ME"}'
    assert placeholders(text) == ["REPLACE-ME", "arn:aws:iam::000000000000:role/REPLACE-ME"]


def test_an_output_that_no_table_knows_is_refused() -> None:
    class Narrow(LocalBackend):
        transports = {"s3": LocalBackend.transports["s3"]}  # noqa: RUF012 a table as any backend has

    with pytest.raises(UnsupportedError, match="can't write to gs://b; it knows s3"):
        job = fixed_job("command", local().target, "desk", "gs://b")
        make_plan(job, Narrow(local().target, "desk"), "echo-0000000000", template="{}")  # type: ignore[arg-type]
