"""Commands that print texts and start nothing: render, init, schema, targets, backends, templates, data; and docs/."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from launcher import plan
from launcher.cli.app import SECTIONS, cli, main
from launcher.spec import JobSpec
from tests.cli_tool import COMMAND, ledger_files

ROOT = Path(__file__).parent.parent
GOOD = "name: a\ncommand: [python, -c, pass]\n"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capfd.readouterr()

    return called


# -- render


def test_render_prints_the_text_alone(call: Call, tmp_path: Path, home: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD + "data: {x: s3://bucket/x}\n")
    code, out, err = call("render", "job.yaml")
    assert code == 0
    assert json.loads(out)["job"]["command"] == ["python", "-c", "pass"]
    assert err == "warning: data.x: s3://bucket/x was not looked at; --resolve reads its fingerprint\n"
    assert call("render", "job.yaml", "--out", "plan.json", "--quiet") == (0, "", "")
    assert (tmp_path / "plan.json").read_text() == out
    assert ledger_files(home) == []


def test_render_explains_who_moves_what(call: Call, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text("pass\n")
    (tmp_path / "job.yaml").write_text(
        GOOD + "code: {root: code}\ndata: {x: s3://bucket/x}\noutput: s3://bucket/runs\n"
    )
    code, out, _ = call("render", "job.yaml", "--explain")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "data x s3://bucket/x copied by the runner before the start; no fingerprint" in lines
    assert any(line.startswith("file input/code.tar.gz s3://bucket/runs/") for line in lines)
    assert any(line.startswith("checkpoints, model, output s3://bucket/runs/") for line in lines)
    facts = json.loads(call("render", "job.yaml", "--explain", "--json")[1])
    assert facts["movers"] == {"checkpoints": "runner", "model": "runner", "output": "runner"}
    assert [file["path"] for file in facts["files"]] == ["input/code.tar.gz"]


def test_render_checks_what_the_platform_would_refuse(call: Call, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD + "resources: {gpus: 64}\n")
    code, out, err = call("render", "job.yaml", "--check")
    assert code == 2
    assert json.loads(out)["limits"]["gpus"] == 64
    assert "refused: resources.gpus: 64 wanted, this machine has " in err
    (tmp_path / "job.yaml").write_text(GOOD)
    assert "target local would take this job" in call("render", "job.yaml", "--check")[2]


def test_settings_change_what_is_rendered(call: Call, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    job = json.loads(call("render", "job.yaml", "--set", "retries=3", "--set", "env.A=1")[1])["job"]
    assert (job["retries"], job["env"]) == (3, {"A": "1"})


# -- init, schema


def make_classes(folder: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(3):
                (folder / part / name / f"{number}.png").write_bytes(b"x")


def test_init_writes_a_job_that_renders(call: Call, tmp_path: Path) -> None:
    make_classes(tmp_path / "pets")
    code, out, err = call("init", "pets")
    assert (code, out) == (0, "job.yaml\n")
    assert "cvlaunch submit job.yaml" in err
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert job["train"]["task"] == "classify"
    assert call("render", "job.yaml")[0] == 0
    assert call("init", "pets", "--name", "other", "--force")[0] == 0
    assert yaml.safe_load((tmp_path / "job.yaml").read_text())["name"] == "other"


JOBS: dict[str, Any] = {
    "quantities as text": {"resources": {"memory": "64GB", "shm": "16Gi", "timeout": "12h", "grace": 90}},
    "quantities as numbers": {"resources": {"memory": 64, "timeout": 3600, "disk": "auto"}},
    "one GPU model": {"resources": {"gpus": 1, "gpu": "A100"}},
    "several": {"resources": {"gpus": 1, "gpu": ["A100", "L40S"]}},
    "numbers in env": {"env": {"A": 1, "B": "x"}},
}


@pytest.mark.parametrize("case", JOBS)
def test_the_schema_takes_what_the_spec_takes(case: str, call: Call) -> None:
    schema = json.loads(call("schema")[1])
    job = {"name": "a", "command": ["x"], **JOBS[case]}
    JobSpec.model_validate(job)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job, "epochs": 3}, schema)


# -- places


def test_targets_say_where_they_come_from_and_hide_a_webhooks_secret(call: Call, tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").write_text(
        "default: here\ntargets:\n"
        "  here: {backend: local, output: out, notify: {webhook: 'https://u:p@hooks.example/T0/secret'}}\n"
        "  broken: {backend: local, pythn: x}\n"
    )
    listed = {target["name"]: target for target in json.loads(call("targets", "list", "--json")[1])}
    assert listed["here"]["default"]
    assert listed["here"]["source"] == f"{tmp_path / 'targets.yaml'}:3"
    assert listed["local"]["source"] == "built in"
    assert "unknown key" in listed["broken"]["error"]
    code, out, _ = call("targets")
    assert code == 0
    assert "here *" in out
    shown = call("targets", "show", "here")[1]
    assert yaml.safe_load(shown)["output"] == "out"
    assert "https://hooks.example/..." in shown
    assert "secret" not in shown


def test_backends_give_reasons(call: Call) -> None:
    features = json.loads(call("backends", "local", "--json")[1])["local"]["features"]
    assert features["gpus"]["supported"]
    assert "one machine" in features["multi_node"]["reason"]
    assert "write resources.nodes: 1" in call("backends")[1]


def test_an_ejected_template_is_the_one_that_is_shown_and_used(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("templates", "eject", "local")
    assert (code, out) == (0, "templates/local\n")
    ejected = next((tmp_path / "templates/local").iterdir())
    assert ejected.read_text() == call("templates", "show", "local")[1]
    assert call("templates", "eject", "local")[0] == 2
    ejected.write_text(ejected.read_text().replace('"mounts": []', '"mounts": ["mine"]'))
    (tmp_path / "targets.yaml").write_text("targets:\n  here: {backend: local, templates: templates}\n")
    (tmp_path / "job.yaml").write_text(GOOD)
    assert json.loads(call("render", "job.yaml", "--target", "here")[1])["mounts"] == ["mine"]
    assert plan.PLACEHOLDER not in ejected.read_text()


# -- data


def test_data_is_checked_fingerprinted_and_pushed(call: Call, tmp_path: Path) -> None:
    make_classes(tmp_path / "pets")
    assert json.loads(call("data", "check", "pets", "--json")[1])["classes"] == {"cat": 3, "dog": 3}
    assert call("data", "check", "pets/train", "--task", "classify")[0] == 0
    assert call("data", "check", "pets", "--task", "detect")[0] == 2
    code, out, err = call("data", "fingerprint", "pets")
    assert (code, len(out.strip())) == (0, 64)
    assert "12 files" in err
    pushed = call("data", "push", "pets", f"file://{tmp_path / 'copy'}")
    assert pushed[1] == out
    assert (tmp_path / "copy/train/cat/0.png").read_bytes() == b"x"
    assert call("data", "fingerprint", "copy")[1] == out
    assert call("data", "fingerprint", "memory://bucket/none")[0] == 2


# -- what the documents say


def test_the_reference_page_is_current() -> None:
    """In a process of its own, because click keeps the help option that a command was first shown with."""
    made = subprocess.run([sys.executable, "-m", "launcher.cli.reference"], capture_output=True, text=True, check=True)
    page = (ROOT / "docs/cli.md").read_text()
    assert page == made.stdout, "run: python -m launcher.cli.reference > docs/cli.md"


def test_the_schema_file_is_current(call: Call) -> None:
    made = "cvlaunch schema > docs/job.schema.json"
    assert (ROOT / "docs/job.schema.json").read_text() == call("schema")[1], f"run: {made}"


@pytest.mark.parametrize("name", [name for section in SECTIONS.values() for name in section])
def test_the_list_of_commands_tells_what_each_command_tells(name: str) -> None:
    text = next(section[name][1] for section in SECTIONS.values() if name in section)
    shown = CliRunner().invoke(cli, [name, "--help"]).output
    assert shown.splitlines()[2].strip() == text


def test_help_and_render_import_no_more_than_they_need(tmp_path: Path) -> None:
    """What is measured by benchmarks/startup.py, as a fact that does not depend on the machine."""
    (tmp_path / "job.yaml").write_text(GOOD)
    heavy = {"boto3", "botocore", "google", "kubernetes", "torch", "numpy", "pandas", "rich", "obstore"}
    for arguments, more in ((["--help"], {"pydantic", "jinja2", "yaml"}), (["render", "job.yaml"], set())):
        traced = [sys.executable, "-X", "importtime", *COMMAND[1:], *arguments]
        done = subprocess.run(traced, cwd=tmp_path, capture_output=True, text=True, check=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
        assert "click" in imported
        assert not imported & (heavy | more)
