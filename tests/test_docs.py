"""The words keep step with the code: every code block is run, loaded or parsed, every key and link is looked up.

A block of a language or a kind that no rule here knows is a failure, so none is passed over.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import click
import pytest
import yaml

import launcher
from launcher import JobSpec, Run, State, contract, errors, render, submit
from launcher.backends.base import BaseTarget, Notify, Storage
from launcher.backends.container import ContainerTarget
from launcher.backends.local import LocalTarget
from launcher.cli.app import cli
from launcher.jobfile import load_job
from launcher.kube.target import KubernetesTarget
from launcher.metrics import parse_lines
from launcher.sagemaker.target import SageMakerTarget
from launcher.spec import ClassifyConfig, CodeSpec, DetectConfig, Model, Resources
from launcher.targets import load_targets
from tests.test_layers import ROWS
from tests.worlds.local import LocalWorld

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
)
PYTHON_PAGES = {
    "README.md": "test_python_blocks_run",
    "docs/python-api.md": "test_python_blocks_run",
    "docs/container-contract.md": "test_the_contract_s_example_survives_a_preemption",
    "CONTRIBUTING.md": "test_the_promises_can_be_run_from_another_package",
}
"""Page with Python blocks → the test that runs them."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Lines that a reader would type: after `$ ` in a console block, all in a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(page: str) -> Iterator[Block]:
    lines = (ROOT / page).read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language = lines[start].strip().removeprefix("```")
        yield Block(page, start + 1, language, "\n".join(lines[start + 1 : number]) + "\n")
        start = None
    assert start is None, f"{page}:{start} begins a block that never ends"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[object]:
    return [pytest.param(b, id=f"{b.page}:{b.line}") for b in BLOCKS if b.language in languages]


def test_every_block_has_a_rule() -> None:
    known = {"console", "json", "jsonl", "python", "sh", "text", "toml", "yaml"}
    assert [(b.page, b.line, b.language) for b in BLOCKS if b.language not in known] == []
    assert {b.page for b in BLOCKS if b.language == "python"} == set(PYTHON_PAGES)
    assert set(PYTHON_PAGES.values()) <= set(globals())


# -- files in blocks


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_blocks_load(block: Block, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(block.text))
    if all("apiVersion" in document for document in documents):  # for a cluster: tests/test_kube_probe.py has the Role
        return
    (content,) = documents
    if content.keys() <= {"default", "datasets", "targets"}:
        (tmp_path / "targets.yaml").write_text(block.text)
        for name in content["targets"]:
            job = JobSpec(name="any", image="registry.example.com/team/any:1", command=("true",))
            assert render(job, target=name, folder=tmp_path).text
        assert load_targets(tmp_path).select().name == content.get("default", "local")
    else:
        (tmp_path / "job.yaml").write_text(block.text)
        assert load_job(tmp_path / "job.yaml").name == content["name"]


@pytest.mark.parametrize("block", of("json", "jsonl", "toml"))
def test_data_blocks_are_well_formed(block: Block) -> None:
    if block.language == "toml":
        assert tomllib.loads(block.text)
    elif block.language == "json":
        assert json.loads(block.text)
    else:
        assert len(parse_lines(block.text)) == len(block.text.splitlines())


# -- commands


@pytest.mark.parametrize("block", of("console", "sh"))
def test_commands_are_commands(block: Block) -> None:
    assert block.commands
    for line in block.commands:
        check_command(shlex.split(line, comments=True))


def check_command(words: list[str]) -> None:
    words = words[: next((i for i, word in enumerate(words) if word in (">", ">>", "|")), len(words))]
    program, *rest = words
    match Path(program).name:
        case "cvlaunch":
            parse_cvlaunch(rest)
        case "make":
            assert {word for word in rest if "=" not in word} <= make_targets()
        case "python" | "pytest":
            check_python(rest)
        case "pip":
            assert rest[0] == "install"
            assert set(re.findall(r"\[(.*?)\]", rest[1])) <= extras()
        case "export":
            assert re.fullmatch(r"CVLAUNCH_(TARGETS|DATASETS)(__[A-Z]+)+=\S+", rest[0])
        case "sbatch":  # as in tests/test_adopt.py
            assert rest == ["job.sh"]
        case "kubectl" | "oc":
            assert rest[:2] == ["apply", "-f"]
        case "aws":
            check_aws(rest)
        case "cd" | "git" | "source":
            pass
        case _:
            pytest.fail(f"no rule for the command {program!r}")


def parse_cvlaunch(words: list[str]) -> None:
    """With the real commands and options, without running anything. click.UsageError for a word that none takes."""
    command: click.Command | None = cli
    context = click.Context(cli, info_name="cvlaunch")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"there is no command {name!r}"
    assert command is not None
    try:
        command.make_context(command.name, words, parent=context)
    except click.exceptions.Exit:
        assert "--help" in words


def make_targets() -> set[str]:
    (line,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(line.split())


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def check_python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1]) is not None
    for word in words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/cli.md"])
def test_commands_in_sentences_are_commands(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for line in re.findall(r"`(cvlaunch [^`]+)`", prose):
        check_command(shlex.split(line.replace("\n", " ")))


def check_aws(words: list[str]) -> None:
    """Service, operation and options are those of botocore's model; `s3` is the program's own."""
    import botocore.session
    from botocore import xform_name

    service, operation, *rest = words
    if service == "s3":
        assert operation == "mb"
        return
    model = botocore.session.get_session().get_service_model(service)
    (name,) = [name for name in model.operation_names if xform_name(name, "-") == operation]
    shape = model.operation_model(name).input_shape
    known = {f"--{xform_name(member, '-')}" for member in shape.members}
    given = {word for word in rest if word.startswith("--")}
    assert given <= known | {"--region", "--profile", "--query", "--output"}
    assert {f"--{xform_name(member, '-')}" for member in shape.required_members} <= given


def test_overlays_for_sagemaker_fit_its_api(tmp_path: Path) -> None:
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    from launcher.sagemaker.limits import check_request, unknown_members

    shape = get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    blocks = [block for block in BLOCKS if block.page == "docs/sagemaker.md" and "overlay" in block.text]
    assert blocks
    for block in blocks:
        (tmp_path / "targets.yaml").write_text(block.text)
        for name, keys in yaml.safe_load(block.text)["targets"].items():
            job = JobSpec(name="any", image="registry.example.com/team/any:1", command=("true",))
            request = json.loads(render(job, target=name, folder=tmp_path).text)
            assert not ParamValidator().validate(request, shape).generate_report(), name
            check_request(request)
            assert not unknown_members(request), name
            if isinstance(keys["overlay"], dict):
                assert keys["overlay"].keys() <= request.keys(), name


def test_the_first_run_is_what_make_demo_does() -> None:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    steps = [line.strip().replace("$(BIN)/", "") for line in recipe[1].splitlines()]
    assert steps in [block.commands for block in BLOCKS if block.page == "README.md"]


def test_overrides_by_the_environment_work(tmp_path: Path) -> None:
    page = [block for block in BLOCKS if block.page == "docs/targets.md"]
    (tmp_path / "targets.yaml").write_text(page[0].text)
    exports = [line.removeprefix("export ") for block in page for line in block.commands if line.startswith("export ")]
    assert exports
    targets = load_targets(tmp_path, dict(line.split("=", 1) for line in exports))
    assert targets.select(target="desk").target.output == "/data/other-runs"
    assert targets.select(target="local").target.storage.endpoint == "http://127.0.0.1:9000"
    assert targets.place_of("flowers", "desk") == "/mnt/flowers"


# -- Python


METRICS_JOB = """\
name: documented
command:
  - {python}
  - -c
  - |
    import json, os
    for step in range(3):
        line = {{"step": step, "epoch": step + 1, "time": 0, "split": "val", "values": {{"accuracy": step / 4}}}}
        with open(os.environ["CVLAUNCH_OUTPUT"] + "/metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")
"""


@pytest.mark.parametrize("page", ["README.md", "docs/python-api.md"])
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    """One after the other, in a folder with a small job.yaml. What a block prints last stands behind its print."""
    (tmp_path / "job.yaml").write_text(METRICS_JOB.format(python=sys.executable))
    blocks = [block for block in BLOCKS if block.page == page and block.language == "python"]
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block.text], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        if said := re.search(r"print\(\w+\)  # (.*)$", block.text.rstrip()):
            assert done.stdout.splitlines()[-1] == said[1]
    (synced,) = (tmp_path / "results").iterdir()
    assert (synced / contract.METRICS).is_file()


def file_in(page: str, name: str) -> str:
    (text,) = [b.text for b in BLOCKS if b.page == page and b.text.startswith(f"# {name}\n")]
    return text


def test_the_contract_s_example_survives_a_preemption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    (job,) = [b.text for b in BLOCKS if b.page == "docs/container-contract.md" and b.language == "yaml"]
    world, project = LocalWorld(tmp_path / "world"), tmp_path / "project"
    project.mkdir()
    (project / "job.yaml").write_text(job)
    (project / "train.py").write_text(file_in("docs/container-contract.md", "train.py"))
    (project / "targets.yaml").write_text(yaml.safe_dump({"targets": {"world": {**world.target}}}))
    steps = 1000
    command = f'command=[python, train.py, "{steps}"]'  # long enough for a busy machine to stop it in time
    runs = [submit(project / "job.yaml", target="world", settings=[command]) for _ in range(2)]
    preempted, other = runs
    while not preempted.metrics().points:
        assert not preempted.status().state.terminal
        time.sleep(0.05)
    assert preempted.handle is not None
    world.preempt(preempted.handle)
    ends = [run.wait(timeout=world.patience) for run in runs]
    assert [(end.state, end.attempt) for end in ends] == [(State.SUCCEEDED, 2), (State.SUCCEEDED, 1)]
    starts = [line.text for line in preempted.logs() if line.text.startswith("starting at step")]
    assert starts[0] == "starting at step 0"
    assert 50 <= int(starts[1].split()[-1]) < steps
    assert preempted.store().read("model/model.json") == other.store().read("model/model.json")
    assert preempted.metrics().names == ("train/weight",)


def test_the_contract_names_every_variable(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    script = "import os; print(*[n for n in os.environ if n.startswith(('CVLAUNCH_', 'SM_'))])"
    job = JobSpec(name="variables", command=(sys.executable, "-c", script), data={"pictures": "./pictures"})
    run = submit(job, backend="local", folder=tmp_path)
    assert run.wait(timeout=60).state is State.SUCCEEDED
    (line,) = [line.text for line in run.logs() if line.rank == "0"]
    page = (ROOT / "docs/container-contract.md").read_text()
    documented = set(re.findall(r"`((?:CVLAUNCH|SM)_[A-Z_<>]+)`", page))
    for_trainers = {"CVLAUNCH_LOADER_WORKERS", "CVLAUNCH_LOADER_PREFETCH", "CVLAUNCH_MAX_STEPS"}
    assert {name.replace("PICTURES", "<CHANNEL>") for name in line.split()} | for_trainers == documented


def test_the_promises_can_be_run_from_another_package(tmp_path: Path) -> None:
    for name in ("conftest.py", "test_promises.py"):
        (tmp_path / name).write_text(file_in("CONTRIBUTING.md", name))
    (tmp_path / "your_package").mkdir()
    (tmp_path / "your_package/testing.py").write_text("from tests.worlds.local import LocalWorld as YourWorld\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "every or rendering_is"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"^[3-9] passed", done.stdout, re.MULTILINE), done.stdout


# -- tables


def table_of(page: str, heading: str) -> dict[str, list[str]]:
    """First column (every `word` in it) → the other columns, of the first table below a heading."""
    text = (ROOT / page).read_text()
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"{page} has no heading {heading!r}"
    lines = [line for line in section[1].splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {word: rest for first, *rest in rows for word in re.findall(r"`([^`]+)`", first) or [first]}


NEEDED = {
    JobSpec: {"name": "any", "command": ["true"]},
    ClassifyConfig: {"task": "classify"},
    DetectConfig: {"task": "detect"},
    CodeSpec: {"root": "."},
    BaseTarget: {"backend": "local"},
}

TABLES = [
    ("docs/job-file.md", "Top level", JobSpec),
    ("docs/job-file.md", "train: classify", ClassifyConfig),
    ("docs/job-file.md", "train: detect", DetectConfig),
    ("docs/job-file.md", "code", CodeSpec),
    ("docs/job-file.md", "resources", Resources),
    ("docs/targets.md", "Keys of every target", BaseTarget),
    ("docs/targets.md", "Storage", Storage),
    ("docs/targets.md", "Notify", Notify),
]


@pytest.mark.parametrize(("page", "heading", "model"), TABLES, ids=[model.__name__ for *_, model in TABLES])
def test_every_key_is_described_with_its_default(page: str, heading: str, model: type[Model]) -> None:
    table = table_of(page, heading)
    assert set(table) == set(model.model_fields)
    needed = NEEDED.get(model, {})
    for key, field in model.model_fields.items():
        written = table[key][1]
        if field.is_required():
            assert written == "required", key
        elif written == "–":
            assert field.get_default(call_default_factory=True) is None, key
        else:
            value = yaml.safe_load(written.strip("`"))
            assert getattr(model.model_validate({**needed, key: value}), key) == field.get_default(
                call_default_factory=True
            ), key


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("local", LocalTarget),
        ("container", ContainerTarget),
        ("kubernetes", KubernetesTarget),
        ("sagemaker", SageMakerTarget),
    ],
)
def test_keys_of_a_target_are_described(name: str, target: type[BaseTarget]) -> None:
    own = set(vars(target)["__annotations__"]) - {"backend"}
    assert set(table_of("docs/targets.md", f"Keys of a {name} target")) == own


def test_every_state_is_described() -> None:
    assert list(table_of("docs/runs.md", "States")) == [state.value for state in State]


def test_every_exit_code_of_the_contract_is_described() -> None:
    codes = {str(value) for name, value in vars(contract).items() if name.startswith("EXIT_")}
    assert set(table_of("docs/container-contract.md", "Exit codes")) == {*codes, "other"}


def test_every_public_name_is_described() -> None:
    page = (ROOT / "docs/python-api.md").read_text()
    assert [name for name in launcher.__all__ if not re.search(rf"\b{name}\b", page) and name != "__version__"] == []
    known = {name for name in vars(Run) if not name.startswith("_")}
    assert {name.split("(")[0] for name in table_of("docs/python-api.md", "A run")} == known
    classes = {name for name in errors.__all__ if name.endswith("Error")} - {"CvlaunchError"}
    assert set(table_of("docs/python-api.md", "Errors")) == classes


def test_layers_are_as_tested() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = [f"| {i} | {', '.join(f'`{name}`' for name in row.split())} |" for i, row in enumerate(ROWS)]
    assert [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)] == rows


# -- links and versions


def slug(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], target


def test_the_changelog_begins_with_this_version() -> None:
    found = re.findall(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found[0][0] == launcher.__version__
    assert [date.fromisoformat(day) for _, day in found]
