"""The script for sbatch, read as bash and administrators do: no remark of shellcheck, taken by a real sbatch, and
the exact words that reach srun and the tools of containers, also from folders with hostile names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import render
from launcher.backends.base import Plan
from launcher.backends.slurm import inline_job
from launcher.contract import JobFile
from launcher.errors import SpecError
from launcher.testing.conformance import HOSTILE
from tests.services.slurm import SlurmCluster

GOLDEN = Path(__file__).parent / "golden/slurm"
SCRIPTS = Path(__file__).parents[1] / "launcher/slurm/scripts"
INVENTED = {"everything", "everything-spot", "feature"}
"""Golden scripts that name partitions or features which no cluster of ours has."""

NAME = 'it\'s R&D $(touch x) "now" #1'
"""Of a folder; without the comma and the colon, which no tool takes."""
IMAGE = "registry.example.com/team/trainer@sha256:" + "c" * 64
SRUN = ["--nodes=1", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--mpi=none", "--export=ALL"]


# -- as an administrator reads it -------------------------------------------------------------------------------------


@pytest.mark.needs("shellcheck")
def test_shellcheck_has_no_remark() -> None:
    scripts = sorted(GOLDEN.glob("*.sh")) + sorted(SCRIPTS.glob("*.sh"))
    assert len(scripts) > 40
    done = subprocess.run(["shellcheck", "--shell=bash", *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.needs("slurm")
def test_sbatch_takes_every_script(slurm: SlurmCluster) -> None:
    scripts = [path for path in GOLDEN.glob("*.sh") if path.stem not in INVENTED]
    assert len(scripts) > 15
    for path in scripts:
        slurm.run("sbatch", "--test-only", path)


def test_lines_for_sbatch_come_first_and_say_what_the_target_says() -> None:
    lines = (GOLDEN / "everything.sh").read_text().split("\n\n")[0].splitlines()
    assert lines[0] == "#!/bin/bash -l"
    assert all(line.startswith("#SBATCH ") for line in lines[1:])
    wanted = ("partition", "account", "qos", "reservation", "constraint", "nodes", "ntasks-per-node", "cpus-per-task")
    more = ("mem", "gres", "time", "signal", "requeue", "open-mode", "mail-type", "mail-user", "exclusive", "comment")
    assert [name for name in (*wanted, *more) if not any(f"--{name}" in line for line in lines)] == []


# -- as bash reads it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What the script gave to srun, how it ended, and what it left in its record."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    code: int
    said: str
    status: Mapping[str, Any]


def run_script(plan: Plan, folder: Path) -> Ran:
    """By bash, with an srun that only looks and says that the job is badly configured."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    look = f"printf '%s\\0' \"$@\" > {folder}/argv; env -0 > {folder}/environ; exit 64"
    for name, line in {
        "srun": look,
        "module": f'printf "%s\\0" "$@" >> {folder}/modules',
        "scontrol": "exit 1",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    environ = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(folder),
        "SLURM_JOB_ID": "7",
        "NODE_DISK": str(folder / NAME),
    }
    done = subprocess.run(
        ["bash", "-c", plan.text], env=environ, cwd=folder, capture_output=True, text=True, check=False
    )
    (record,) = (folder / NAME / "root/jobs").iterdir()
    reached = (folder / "argv").exists()
    return Ran(
        argv=_words(folder / "argv") if reached else (),
        environ=dict(word.split("=", 1) for word in _words(folder / "environ")) if reached else {},
        code=done.returncode,
        said=done.stderr,
        status=json.loads((record / "status-7.json").read_text()),
    )


def _words(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\0")[:-1]


def plan_of(folder: Path, *, target: Mapping[str, Any] = {}, **keys: Any) -> Plan:
    """Below a folder with a hostile name, which also holds the data."""
    root, data = folder / NAME / "root", folder / NAME / "data"
    data.mkdir(parents=True, exist_ok=True)
    where = {"backend": "slurm", "root": str(root), "python": "/opt/my python/bin/python", "scratch": "$NODE_DISK"}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"hpc": {**where, **target}}}))
    job = {"name": "hostile", "command": ["true"], "data": {"train": str(data)}, **keys}
    (folder / "job.yaml").write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")
    return render(folder / "job.yaml", target="hpc")


WAYS: dict[str, tuple[str | list[str], int, list[str]]] = {
    "apptainer": (
        "apptainer", 1,
        ["apptainer", "exec", "--nv", "--no-home", "--pwd", "/", "--bind", "BINDS:ro", "FILE.sif", "cvlaunch-run"],
    ),
    "apptainer without GPUs": (
        "apptainer", 0,
        ["apptainer", "exec", "--no-home", "--pwd", "/", "--bind", "BINDS:ro", "FILE.sif", "cvlaunch-run"],
    ),
    "singularity": (
        "singularity", 1,
        ["singularity", "exec", "--nv", "--no-home", "--pwd", "/", "--bind", "BINDS:ro", "FILE.sif", "cvlaunch-run"],
    ),
    "pyxis": (
        "pyxis", 1,
        ["--container-image=FILE.sqsh", "--container-mounts=BINDS:ro", "--container-workdir=/",
         "--no-container-mount-home", "--no-container-entrypoint", "cvlaunch-run"],
    ),
    "charliecloud": (
        "charliecloud", 1,
        ["ch-run", "--set-env", "--cd=/", "--bind=RUN:/opt/ml", "--bind=TMP:/tmp",
         "--bind=DATA:/opt/ml/input/data/train", "FILE", "--", "cvlaunch-run"],
    ),
    "words": (
        ["podman-hpc", "run", "{gpus}", "--volume={source}:{target}{mode}", "{image}"], 1,
        ["podman-hpc", "run", "--volume=RUN:/opt/ml", "--volume=TMP:/tmp", "--volume=DATA:/opt/ml/input/data/train:ro",
         "IMAGE", "cvlaunch-run"],
    ),
}  # fmt: skip
"""Name → what the target says, GPUs, and the words behind srun's own options."""


@pytest.mark.parametrize("case", WAYS)
def test_a_container_s_words_reach_the_node_unchanged(case: str, tmp_path: Path) -> None:
    way, gpus, expected = WAYS[case]
    plan = plan_of(tmp_path, target={"container_command": way}, image=IMAGE, resources={"gpus": gpus})
    ran = run_script(plan, tmp_path)
    here = tmp_path / NAME
    run, tmp, data = f"{here}/root/runs/{plan.run_id}", f"{here}/cvlaunch-7-0/tmp", f"{here}/data"
    file = f"{here}/root/images/trainer-{'c' * 16}"
    names = {"BINDS": f"{run}:/opt/ml,{tmp}:/tmp,{data}:/opt/ml/input/data/train", "RUN": run, "TMP": tmp}
    names |= {"DATA": data, "FILE": file, "IMAGE": IMAGE}
    assert ran.argv == [*SRUN, *(_replaced(word, names) for word in expected)]
    assert ran.environ["CVLAUNCH_ROOT"] == "/opt/ml"
    assert Path(run, "input/data/train").is_dir(), "where its data are bound"
    assert not Path(tmp).exists(), "nothing is left on the node's disk"


def _replaced(word: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(name, value)
    return word


def test_hostile_values_are_read_back_by_bash(tmp_path: Path) -> None:
    setup = ["""export MINE='it'"'"'s "mine"' && cd /""", "true # and nothing else"]
    target = {"modules": ["CUDA/12.4", NAME], "setup": setup, "sbatch": [f"--comment={NAME}"], "interface": "ib0"}
    plan = plan_of(
        tmp_path, target=target, env=HOSTILE, tags={"a": HOSTILE["SHELL"]}, command=["echo", *HOSTILE.values()]
    )
    ran = run_script(plan, tmp_path)
    assert ran.argv == [*SRUN, "/opt/my python/bin/python", "-m", "launcher.runner"]
    assert _words(tmp_path / "modules") == ["load", "CUDA/12.4", "load", NAME]
    assert ran.environ["MINE"] == 'it\'s "mine"'
    assert ran.environ["CVLAUNCH_INTERFACE"] == "ib0"
    job = inline_job(plan.text)
    assert JobFile.from_bytes(ran.environ["CVLAUNCH_JOB_JSON"].encode()) == job
    assert (job.env, job.command) == (HOSTILE, ("echo", *HOSTILE.values()))
    assert ran.environ["CVLAUNCH_ROOT"] == str(tmp_path / NAME / "root/runs" / plan.run_id)
    assert (ran.code, ran.status["code"], ran.status["requeued"]) == (64, 64, False)
    assert not (tmp_path / "x").exists(), "a command in a name was run"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (
            {"setup": ["true", "echo 'it'\"'\"'s' > /dev/null && false"]},
            "this line of the target's `setup` failed: echo 'it'\"'\"'s'",
        ),
        ({"scratch": "/proc/nobody's"}, "no scratch folder /proc/nobody's/cvlaunch-7-0"),
    ],
    ids=["setup", "scratch"],
)
def test_what_fails_before_the_job_is_said(target: dict[str, Any], says: str, tmp_path: Path) -> None:
    ran = run_script(plan_of(tmp_path, target=target), tmp_path)
    assert ran.argv == ()
    assert says in ran.said
    assert ran.code == ran.status["code"] == (64 if "setup" in target else 73)


def test_a_command_beside_a_job_enters_the_same_container(tmp_path: Path) -> None:
    """attach.sh, with the folders that the job has written down."""
    record = tmp_path / NAME
    record.mkdir()
    (record / "places-7").write_text(f"/runs/{NAME}\n/disk/{NAME}\n/opt/ml\n")
    (tmp_path / "srun").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {tmp_path}/argv\n")
    (tmp_path / "srun").chmod(0o755)
    front = ["ch-run", "--bind=@root@:/opt/ml", "--bind=@scratch@/tmp:/tmp", "/images/a b", "--", "python3"]
    arguments = [record, "7", "run-1", "", "", str(len(front)), *front, "the text", "echo", NAME]
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", SCRIPTS / "attach.sh", *arguments], env=environ, check=True)
    found = _words(tmp_path / "argv")
    assert found[found.index("ch-run") :] == [
        "ch-run", f"--bind=/runs/{NAME}:/opt/ml", f"--bind=/disk/{NAME}/tmp:/tmp", "/images/a b", "--", "python3",
        "-c", "the text", "run-1", "/opt/ml", "echo", NAME,
    ]  # fmt: skip


# -- what is refused, and what is left alone --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a,b", "a:b"])
@pytest.mark.parametrize("what", ["data", "output", "scratch"])
def test_a_folder_that_no_tool_takes_is_refused(name: str, what: str, tmp_path: Path) -> None:
    target: dict[str, Any] = {"container_command": "apptainer"}
    folder = tmp_path / name
    folder.mkdir()
    if what != "data":
        target[what] = str(folder)
    data = {"data": {"train": str(folder)}} if what == "data" else {}
    with pytest.raises(SpecError, match=rf"{name}.* can't be bound into a container"):
        plan_of(tmp_path, target=target, image=IMAGE, **data)


@pytest.mark.parametrize("image", ["/apps/my trainer.sif", "/apps/trainer"])
def test_a_path_as_the_image_is_left_alone(image: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, target={"container_command": "apptainer"}, image=image)
    assert run_script(plan, tmp_path).argv[-2:] == [image, "cvlaunch-run"]
    assert f"image: nothing says what is in {image}; write NAME@sha256:DIGEST" in plan.unpinned
    with pytest.raises(SpecError, match="is no image"):
        render(tmp_path / "job.yaml", backend="container")
