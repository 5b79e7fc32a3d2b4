"""environment.json: what a real runner writes, and what is read from control groups, nvidia-smi and packages."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.contract import Code, JobFile
from launcher.runner.environment import PackageChanges, describe_environment, package_changes, packages
from launcher.runner.machine import Gpus, Limits, describe_machine, read_gpus, read_limits
from tests.runner_world import RunnerWorld, python
from tests.services.podman import podman

IMAGE = {"reference": "registry.example.com/trainer:1", "digest": "sha256:1", "config_digest": "sha256:2"}
JOB = JobFile("shapes-1", "shapes", "0" * 64, "file:///runs")


def test_a_real_runner_leaves_it(tmp_path: Path) -> None:
    world = RunnerWorld(tmp_path)
    assert world.end(world.job(python("pass"), image=IMAGE), env={"SLURMD_NODENAME": "gpu-03"}).code == 0
    facts = json.loads(world.read("output/environment.json"))
    assert (facts["image"], facts["kind"], facts["node"]) == (IMAGE, "container", "gpu-03")
    assert facts["user"]["uid"] == os.getuid()
    assert facts["memory"] > 2**20 and facts["shm"] and facts["cpus"] >= 1 and facts["os"] and facts["kernel"]
    assert re.fullmatch(r"3\.\d+\.\d+\S*", facts["python"])
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["torch"].startswith(importlib.metadata.version("torch"))  # with +cu132, where a build says so
    assert facts["packages_changed"] is None
    world = RunnerWorld(tmp_path / "other")
    world.end(world.job(python("pass")))
    process = json.loads(world.read("output/environment.json"))
    assert (process["image"], process["kind"], process["code"]) == (None, "process", None)


def test_the_code_is_named_by_commit_and_by_whether_it_was_changed() -> None:
    facts = describe_environment(JobFile("a-1", "a", "0" * 64, "o", code=Code("f" * 64, 10, None, "c0ffee", True)), {})
    assert facts["code"] == {"sha256": "f" * 64, "commit": "c0ffee", "dirty": True}


def test_torch_is_described_without_being_imported() -> None:
    script = (
        "import json, sys; from launcher.contract import JobFile; from launcher.runner.environment import *;"
        "facts = describe_environment(JobFile('a-1', 'a', '0', 'o'), {});"
        "assert 'torch' not in sys.modules and 'pynvml' not in sys.modules;"
        "print(json.dumps({key: facts[key] for key in ('torch', 'cuda', 'cudnn', 'nccl')}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["torch"].startswith(importlib.metadata.version("torch"))
    installed = packages()
    for library in ("cudnn", "nccl"):
        versions = {v for name, v in installed.items() if name.startswith(f"nvidia-{library}-cu")}
        assert {facts[library]} == (versions or {None})


def test_torch_of_the_job_s_own_packages_goes_first(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text(
        "from typing import Optional\n__version__ = '2.9.1+cu126'\ndebug = False\ncuda: Optional[str] = '12.6'\n"
        "hip: Optional[str] = None\n"
    )
    (tmp_path / "torch-2.9.1+cu126.dist-info").mkdir()
    facts = describe_environment(JOB, {}, site=tmp_path)
    assert (facts["torch"], facts["cuda"]) == ("2.9.1+cu126", "12.6")
    assert facts["packages"]["torch"] == "2.9.1+cu126"  # type: ignore[index]
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\ncuda: Optional[str] = None\n")
    assert describe_environment(JOB, {}, site=tmp_path)["cuda"] is None


# ---- packages


def test_names_of_folders_say_what_the_metadata_says() -> None:
    said: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        said.setdefault(re.sub(r"[-_.]+", "-", found.name).lower(), found.version)
    assert packages() == said
    assert list(packages()) == sorted(said)


CHANGES = {
    "none": ({}, PackageChanges(), ""),
    "added": ({"remove": ["pytest"]}, None, "pytest {pytest} added"),
    "changed": ({"set": {"pytest": "0.1"}}, None, "pytest 0.1 → {pytest}"),
    "removed": ({"set": {"left-pad": "1.0"}}, PackageChanges(removed={"left-pad": "1.0"}), "left-pad 1.0 removed"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_otherwise_than_in_the_image(case: str, tmp_path: Path) -> None:
    change, expected, words = CHANGES[case]
    now = packages()
    baked = {name: version for name, version in now.items() if name not in change.get("remove", ())}
    (tmp_path / "packages.json").write_text(json.dumps({**baked, **change.get("set", {})}))
    found = package_changes(baked=tmp_path / "packages.json")
    assert found is not None and str(found) == words.format(**now) and bool(found) == bool(words)
    assert expected is None or found == expected


def test_many_changes_are_counted_in_the_log_and_without_a_list_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "packages.json").write_text("{}")
    text = str(package_changes(baked=tmp_path / "packages.json"))
    assert text.endswith(f" added, {len(packages()) - 12} more, all in output/environment.json")
    (tmp_path / "packages.json").write_text("not JSON")
    assert package_changes(baked=tmp_path / "packages.json") is None
    assert package_changes(baked=tmp_path / "none.json") is None


# ---- the machine

_GIB = 2**30
_WITHOUT = str(2**63 - 4096)
"""What version 1 says for no limit."""

TREES: dict[str, tuple[str, dict[str, str], Limits]] = {
    "v2, a container": (
        "0::/\n",
        {"memory.max": f"{4 * _GIB}\n", "cpu.max": "150000 100000\n"},
        Limits(4 * _GIB, 1.5),
    ),
    "v2, no limit": ("0::/\n", {"memory.max": "max\n", "cpu.max": "max 100000\n"}, Limits(None, None)),
    "v2, the group above has less": (
        "0::/system.slice/job_7/step_0\n",
        {"system.slice/job_7/memory.max": f"{2 * _GIB}", "system.slice/job_7/step_0/memory.max": f"{8 * _GIB}"},
        Limits(2 * _GIB, None),
    ),
    "v2, the host's path": ("0::/kubepods/pod1/abc\n", {"memory.max": f"{_GIB}"}, Limits(_GIB, None)),
    "v2, a path that leads out": ("0::/../../other\n", {"memory.max": f"{_GIB}"}, Limits(_GIB, None)),
    "v1, a container": (
        "5:memory:/libpod_parent/libpod-1\n4:cpu,cpuacct:/\n",
        {
            "memory/memory.limit_in_bytes": f"{3 * _GIB}",
            "cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        Limits(3 * _GIB, 0.5),
    ),
    "v1, of SLURM": (
        "9:memory:/slurm/uid_1000/job_7/step_0/task_0\n1:cpu:/\n",
        {
            "memory/memory.limit_in_bytes": _WITHOUT,
            "memory/slurm/uid_1000/job_7/memory.limit_in_bytes": f"{6 * _GIB}",
            "memory/slurm/uid_1000/job_7/step_0/task_0/memory.limit_in_bytes": _WITHOUT,
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
        Limits(6 * _GIB, None),
    ),
    "none": ("", {}, Limits(None, None)),
}


@pytest.mark.parametrize("case", TREES)
def test_limits_of_control_groups(case: str, tmp_path: Path) -> None:
    own, files, expected = TREES[case]
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "memory.max").write_text("1")  # outside of what is mounted
    assert read_limits(tmp_path / "cgroup", tmp_path / "own") == expected


NODES = {
    "SLURM": ({"SLURMD_NODENAME": "gpu-03"}, "gpu-03"),
    "Kubernetes": ({"NODE_NAME": "ip-10-0-0-1.ec2.internal"}, "ip-10-0-0-1.ec2.internal"),
    "nothing": ({"SLURMD_NODENAME": ""}, None),
}


@pytest.mark.parametrize("case", NODES)
def test_the_platform_s_name_of_the_node(case: str) -> None:
    environ, expected = NODES[case]
    assert describe_machine(environ)["node"] == expected


TABLE = """\
+---------------------------------------------------------------------------------------+
| NVIDIA-SMI 570.133.20         Driver Version: 570.133.20         CUDA Version: 12.8    |
+---------------------------------------------------------------------------------------+
"""
SMI = f"""\
#!/bin/sh
case "$1" in
--query-gpu=*) printf '%s\\n' 'NVIDIA H200, 143771, 570.133.20, GPU-aaaa, 0' 'NVIDIA H200, 143771, 570.133.20, GPU-bbbb, 1' 'NVIDIA GB10, [N/A], 570.133.20, GPU-cccc, 2';;
*) cat <<'END'
{TABLE}END
esac
"""  # noqa: E501

VISIBLE = {
    "all": ({}, ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"]),
    "by UUID": ({"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, ["GPU-bbbb"]),
    "by number": ({"CUDA_VISIBLE_DEVICES": "0, 2"}, ["GPU-aaaa", "GPU-cccc"]),
    "none": ({"CUDA_VISIBLE_DEVICES": ""}, []),
    "a slice": ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"]),
}


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin/nvidia-smi"
    path.parent.mkdir()
    path.write_text(SMI)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


@pytest.mark.parametrize("case", VISIBLE)
def test_gpus_that_the_run_has(case: str, nvidia_smi: Path) -> None:
    environ, expected = VISIBLE[case]
    gpus = read_gpus(environ)
    assert [card["uuid"] for card in gpus.cards] == expected
    assert (gpus.driver, gpus.cuda) == (("570.133.20", "12.8") if expected else (None, None))


def test_a_gpu_with_its_memory_in_bytes(nvidia_smi: Path) -> None:
    first, *_, shared = read_gpus({}).cards
    assert first == {"name": "NVIDIA H200", "memory": 143771 << 20, "uuid": "GPU-aaaa", "driver": "570.133.20"}
    assert shared["memory"] is None


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho No devices were found\n", "not a program"])
def test_a_driver_that_does_not_answer_is_no_gpu(script: str, nvidia_smi: Path) -> None:
    nvidia_smi.write_text(script)
    assert read_gpus({}) == Gpus()


@pytest.mark.needs("podman", "debootstrap")
def test_the_image_s_list_and_the_limits_of_a_real_container(trainer_image: str) -> None:
    script = (
        "import json, os; from launcher.contract import JobFile; from launcher.runner.environment import *;"
        "facts = describe_environment(JobFile('a-1', 'a', '0', 'o', image={'reference': 'r'}), os.environ);"
        "print(json.dumps([facts, package_changes() == PackageChanges()]))"
    )
    limits = ["--memory=300m", "--cpus=1.5", "--shm-size=32m", "--user=1000730000:0", "--env=NODE_NAME=gpu-7"]
    told = podman("run", "--rm", "--network=none", *limits, "--entrypoint=python", trainer_image, "-c", script)
    facts, as_built = json.loads(told)
    assert as_built
    assert (facts["memory"], facts["cpu_limit"], facts["shm"]) == (300 * 2**20, 1.5, 32 * 2**20)
    assert (facts["user"]["uid"], facts["user"]["gid"], facts["node"]) == (1000730000, 0, "gpu-7")
    assert facts["os"].startswith("Debian") and facts["packages_changed"] is None
