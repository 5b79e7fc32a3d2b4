"""Templates, overlays, and the golden renderings of every backend."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher._version import __version__
from launcher.backends import names
from launcher.backends.base import Image
from launcher.backends.container import ContainerBackend, ContainerTarget
from launcher.backends.local import LocalBackend, LocalTarget
from launcher.backends.slurm import SlurmBackend, SlurmTarget
from launcher.contract import Channel
from launcher.errors import SpecError, UnsupportedError
from launcher.ledger import Ledger
from launcher.plan import eject_templates, load_template, make_plan
from launcher.run import submit
from launcher.spec import JobSpec
from launcher.submission import prepare
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


@pytest.mark.parametrize("name", [*SPECS, "foreign"])
@pytest.mark.parametrize("output", ["file:///out", "s3://bucket/runs"], ids=["file", "s3"])
def test_golden_renderings_of_container(name: str, output: str, golden: Golden) -> None:
    keys = {"output": "/out", "root": "/state", "user": "1000730000:0", "network": "host", "read_only": True}
    backend = ContainerBackend(ContainerTarget.model_validate(keys), "desk")
    job = fixed_job("command" if name == "foreign" else name, backend.target, "desk", output)
    image = Image("registry/trainer@sha256:" + "c" * 64)
    channels = (*job.channels, Channel("near", "file:///data/near shapes", "mounted"))
    resources = job.spec.resources.model_copy(update={"memory": 8 << 30, "cpus": 4, "timeout": 7200.0})
    spec = job.spec.model_copy(
        update={"runner": "none" if name == "foreign" else "auto", "resources": resources, "env": {"A": "1"}}
    )
    job = dataclasses.replace(job, spec=spec, image=image, channels=channels, shm=1 << 30)
    plan = make_plan(job, backend, f"{name}-0000000000", template=load_template(ContainerBackend))
    golden.check(f"container/{name}-{output.partition(':')[0]}.json", plan.text)


def slurm(**keys: object) -> SlurmBackend:
    facts = {"root": "/scratch/me/cvlaunch", "python": "/opt/python/bin/python", **keys}
    return SlurmBackend(SlurmTarget.model_validate(facts), "hpc")


def sbatch_script(name: str, backend: SlurmBackend, output: str, **changes: object) -> str:
    """Of a fixed job; changes: of its resources, and `image` and `near`, a folder of data there."""
    job = fixed_job(name, backend.target, "hpc", output)
    image = Image("registry/trainer@sha256:" + "c" * 64, digest="sha256:" + "c" * 64) if backend.target.way else None
    near = (Channel("near", "file:///data/near shapes", "mounted" if image else "path"),) if "near" in changes else ()
    resources = job.spec.resources.model_copy(update={key: changes[key] for key in changes if key != "near"})
    spec = job.spec.model_copy(update={"resources": resources})
    job = dataclasses.replace(job, spec=spec, image=image, channels=(*job.channels, *near))
    text = make_plan(job, backend, f"{name}-0000000000", template=load_template(SlurmBackend)).text
    return text.replace(f"/cvlaunch-{__version__}", "/cvlaunch-VERSION")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("output", ["file:///out", "ssh://login1/out", "s3://bucket/runs"], ids=["file", "ssh", "s3"])
def test_golden_renderings_of_slurm(name: str, output: str, golden: Golden) -> None:
    backend = slurm() if output.startswith("file:") else slurm(ssh="login1")
    golden.check(f"slurm/{name}-{output.partition(':')[0]}.sh", sbatch_script(name, backend, output))


_EVERYTHING = {
    "ssh": "me@login1",
    "partition": "gpu,gpu-long",
    "account": "vision",
    "qos": "high",
    "constraint": "ib&hdr",
    "reservation": "course",
    "spot_partition": "preempt",
    "time": "24h",
    "gpu_types": {"A100": "a100-sxm4"},
    "cpus_per_gpu": 8,
    "modules": ["CUDA/12.4", "Apptainer"],
    "setup": ["export HTTPS_PROXY=http://$SITE_PROXY:3128", "ulimit -n 65536 || ulimit -n 4096"],
    "scratch": "$SLURM_TMPDIR/my files",
    "interface": "ib0",
    "mail_user": "me@example.com",
    "mail_type": "END,FAIL",
    "sbatch": ["--exclusive", "--nice=100", "--licenses=matlab@flex:2", "--wckey=a 'b' $c"],
    "storage": {"profile": "lab"},
}
_ASKED = {"gpus": 2, "gpu": ("A100",), "memory": 8 << 30, "timeout": 7 * 86400.0, "near": True}
_SLURM_CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "everything": (_EVERYTHING, {**_ASKED, "nodes": 2}),
    "everything-spot": ({**_EVERYTHING, "gpu_option": "gpus-per-node"}, {**_ASKED, "spot": True, "cpus": 4}),
    "feature": (
        {"constraint": "ib", "gpu_features": {"A100": "a100", "H100": "h100"}},
        {"gpus": 1, "gpu": ("A100", "H100")},
    ),
    "apptainer": ({"container_command": "apptainer"}, _ASKED),
    "singularity-nodes": ({"container_command": "singularity"}, {"nodes": 2}),
    "pyxis": ({"container_command": "pyxis"}, _ASKED),
    "charliecloud": ({"container_command": "charliecloud", "ssh": "login1"}, {"near": True}),
    "words": (
        {"container_command": ["podman-hpc", "run", "--rm", "{gpus}", "--volume={source}:{target}{mode}", "{image}"]},
        _ASKED,
    ),
}
"""Name → keys of the target, and what the job asks for."""


@pytest.mark.parametrize("case", _SLURM_CASES)
def test_golden_renderings_of_slurm_targets(case: str, golden: Golden) -> None:
    keys, changes = _SLURM_CASES[case]
    output = (
        "s3://bucket/runs" if case == "singularity-nodes" else "ssh://login1/out" if "ssh" in keys else "file:///out"
    )
    golden.check(f"slurm/{case}.sh", sbatch_script("command", slurm(**keys), output, **changes))


def test_a_profile_of_this_machine_reaches_the_runner() -> None:
    backend = local(storage={"profile": "lab"})
    job = fixed_job("command", backend.target, "desk", "s3://bucket/runs")
    plan = make_plan(job, backend, "echo-0000000000", template=load_template(LocalBackend))
    assert json.loads(plan.text)["env"]["AWS_PROFILE"] == "lab"


def test_every_backend_has_golden_renderings() -> None:
    assert [name for name in names() if not (Path(__file__).parent / "golden" / name).is_dir()] == []


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


def test_a_job_s_native_settings_come_last() -> None:
    backend = local(overlay={"nice": 5, "limits": {"cpus": 1}})
    job = fixed_job("command", backend.target, "desk", "file:///out")
    native = {"local": {"limits": {"cpus": 2}, "run_id": None}}
    job = dataclasses.replace(job, spec=job.spec.model_copy(update={"native": native}))
    plan = make_plan(job, backend, "echo-0000000000", template='{"run_id": {{ run_id | tojson }}, "a": 1}')
    assert json.loads(plan.text) == {"a": 1, "nice": 5, "limits": {"cpus": 2}}


def test_a_script_has_no_native_settings() -> None:
    backend = SlurmBackend(SlurmTarget(root="/scratch/cv"), "hpc")
    job = fixed_job("command", backend.target, "hpc", "file:///out")
    job = dataclasses.replace(job, spec=job.spec.model_copy(update={"native": {"slurm": {"qos": "high"}}}))
    with pytest.raises(UnsupportedError, match="native: a script takes no native; use a template of your own"):
        make_plan(job, backend, "echo-0000000000", template="echo")


def test_an_overlay_that_does_not_apply_is_told() -> None:
    with pytest.raises(SpecError, match="overlay: the JSON patch does not apply"):
        rendered("{}", overlay=[{"op": "replace", "path": "/b/c", "value": 3}])


def test_a_user_s_template_goes_before_ours(tmp_path: Path) -> None:
    eject_templates(LocalBackend, tmp_path)
    (tmp_path / LocalBackend.template).write_text("{}")
    assert load_template(LocalBackend, str(tmp_path)) == "{}"
    assert load_template(LocalBackend, str(tmp_path / "empty")) == load_template(LocalBackend)
    with pytest.raises(SpecError, match="is there already"):
        eject_templates(LocalBackend, tmp_path)


class RoleTarget(LocalTarget):
    role: str | None = None


class NeedsRole(LocalBackend):
    placeholders = {"role": "arn:aws:iam::000000000000:role/REPLACE-ME"}  # noqa: RUF012 a table as any backend has


@pytest.mark.parametrize(
    ("target", "template", "missing"),
    [
        ({}, "{}", ["the key role of target 'desk' (arn:aws:iam::000000000000:role/REPLACE-ME)"]),
        ({"role": "arn:mine"}, "{}", []),
        ({"role": "REPLACE-ME"}, "{}", ["the key role of target 'desk' (REPLACE-ME)"]),
        (
            {"role": "arn:mine", "overlay": {"a": ["x/REPLACE-ME"]}},
            "{}",
            ["the key overlay.a.0 of target 'desk' (x/REPLACE-ME)"],
        ),
        ({"role": "arn:mine"}, '{"a": "REPLACE-ME"}', ["REPLACE-ME in the template local/process.json.j2"]),
    ],
)
def test_what_nobody_has_given_is_named(target: dict[str, object], template: str, missing: list[str]) -> None:
    backend = NeedsRole(RoleTarget.model_validate({"output": "/out", **target}), "desk")
    plan = make_plan(fixed_job("command", backend.target, "desk", "file:///out"), backend, "a-0", template=template)
    assert list(plan.placeholders) == missing
    assert [w.removesuffix(" must be given before this can be sent") for w in plan.warnings] == missing


@pytest.mark.parametrize("key", ["env", "tags"])
def test_the_user_s_own_replace_me_is_a_word_like_any_other(tmp_path: Path, key: str) -> None:
    job = JobSpec.model_validate({"name": "x", "command": ["true"], key: {"TEXT": "REPLACE-ME"}})
    with prepare(job, target="local", folder=tmp_path, ledger=Ledger(tmp_path / "ledger")) as prepared:
        plan = prepared.plan()
    assert "REPLACE-ME" in plan.text
    assert (plan.placeholders, plan.warnings) == ((), ())


def test_a_placeholder_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").write_text("targets: {desk: {backend: local, overlay: {queue: REPLACE-ME}}}")
    job, ledger = JobSpec.model_validate({"name": "x", "command": ["true"]}), Ledger(tmp_path / "ledger")
    with pytest.raises(
        SpecError, match=r"the key overlay\.queue of target 'desk' .*must be given before this can be sent"
    ):
        submit(job, target="desk", folder=tmp_path, ledger=ledger)
    assert ledger.ids() == []


def test_a_template_is_utf_8_on_every_machine(tmp_path: Path) -> None:
    """Whatever the language of the user is: here ASCII."""
    eject_templates(LocalBackend, tmp_path)
    (tmp_path / LocalBackend.template).write_text('{"greeting": "grüß ☃"}', encoding="utf-8")
    script = (
        "import sys; from launcher.plan import load_template; from launcher.backends.local import LocalBackend; "
        "sys.stdout.buffer.write(load_template(LocalBackend, sys.argv[1]).encode())"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environ, capture_output=True, check=False)
    assert done.stdout.decode() == '{"greeting": "grüß ☃"}', done.stderr.decode()
    (tmp_path / LocalBackend.template).write_bytes(b"\xff")
    with pytest.raises(SpecError, match=f"{LocalBackend.template}: not a text file"):
        load_template(LocalBackend, str(tmp_path))


def test_an_output_that_no_table_knows_is_refused() -> None:
    class Narrow(LocalBackend):
        transports = {"s3": LocalBackend.transports["s3"]}  # noqa: RUF012 a table as any backend has

    with pytest.raises(UnsupportedError, match="can't write to gs://b; it knows s3"):
        job = fixed_job("command", local().target, "desk", "gs://b")
        make_plan(job, Narrow(local().target, "desk"), "echo-0000000000", template="{}")  # type: ignore[arg-type]
