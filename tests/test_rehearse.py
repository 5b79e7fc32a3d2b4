"""Rehearsal: real containers under each platform's rules, good images and deliberately bad ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from launcher.engine import LocalImage
from launcher.errors import SpecError
from launcher.findings import Case, Ran, Verdict, findings
from launcher.rehearse import LABEL, Report, Request, rehearse, rules_of
from launcher.rules import RULES, SOURCES
from tests.cli_tool import COMMAND, cli, cli_json
from tests.services.podman import image_exists, locked, podman
from tests.trainer_runs import REPOSITORY, draw_classes, exit_facts, finish, make_root, metrics, start

PLATFORMS = list(RULES)
DIGITS = REPOSITORY / "examples/digits"
TRAIN = {
    "task": "classify",
    "model": "test_resnet",
    "pretrained": False,
    "image_size": 32,
    "epochs": 5,
    "batch": 8,
    "workers": 0,
    "threads": 1,
}

WORK = "for i in 1 2 3 4 5; do sleep 0.25 & wait $!; done\n"
LONG = 4 * WORK
"""Longer than an engine takes to start and to end: half of all that is in the middle of it."""
POLITE = "trap 'exit 143' TERM\n"
SCRIPTS = {
    "good": f"{POLITE}dd if=/dev/zero of=/dev/shm/batch bs=1M count=30 status=none && rm /dev/shm/batch\n"
    f"echo result > /tmp/result\n{LONG}",
    "writer": f"{POLITE}echo result > /root/result.txt\n{WORK}",
    "strict-writer": f"set -e\n{POLITE}echo result > /root/result.txt\n{WORK}",
    "filler": f"set -e\n{POLITE}dd if=/dev/zero of=/dev/shm/batch bs=1M count=100\n{WORK}",
    "deaf": "trap '' TERM\nsleep 300\n",
    "caller": f"set -e\n{POLITE}exec 3<>/dev/tcp/telemetry.example.com/80\n{WORK}",
    "curious": f"{POLITE}exec 3<>/dev/tcp/telemetry.example.com/80\n{WORK}",
    "facts": """\
echo "user=$(id -u):$(id -g)"
echo "caps=$(sed -n 's/^CapEff:\\t//p' /proc/self/status)"
echo "shm=$(df -k /dev/shm | awk 'END {print $2}')"
echo "networks=$(tail -n +3 /proc/net/dev | cut -d: -f1 | xargs)"
echo "home=$HOME"
echo "entry=$(getent passwd $(id -u) | wc -l)"
echo "first=$(tr '\\0' ' ' < /proc/1/cmdline | cut -d' ' -f1)"
if test -w /usr; then echo usr=open; else echo usr=closed; fi
for folder in /opt/ml /tmp; do touch $folder/x && rm $folder/x && echo "$folder=open"; done
env | grep -E '^(TRAINING_JOB_NAME|CLUSTER_SPEC|JOB_COMPLETION_INDEX|SLURM_JOB_ID|CVLAUNCH_MAX_STEPS|MINE)='
cat /opt/ml/input/data/train/a.txt
ls /opt/ml/input/config/resourceconfig.json 2> /dev/null
exit 3
""",
}
"""Name of an image → what it runs, as the container's first process."""

Images = Callable[[str], str]

needs_podman = pytest.mark.needs("podman", "debootstrap")


@pytest.fixture
def images(base_image: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Images:
    """The image of a script, built once."""
    monkeypatch.setenv("CVLAUNCH_ENGINE", "podman")

    def image_of(name: str) -> str:
        script = SCRIPTS[name]
        digest = hashlib.sha256(f"{base_image}\n{script}".encode()).hexdigest()
        reference = f"localhost/cvlaunch-test-rehearsal-{name}:{digest[:12]}"
        with locked("rehearsal"):
            if not image_exists(reference):
                with locked("images"):
                    _build(base_image, script, reference, tmp_path_factory.mktemp("image"))
        return reference

    return image_of


def _build(base: str, script: str, reference: str, folder: Path) -> None:
    (folder / "run.sh").write_text(script)
    mkdir = "RUN mkdir -p -m 777 /opt/ml\n"
    (folder / "Dockerfile").write_text(f'FROM {base}\n{mkdir}COPY run.sh /\nENTRYPOINT ["bash", "/run.sh"]\n')
    podman("build", "--quiet", "--network=host", f"--tag={reference}", folder)


def write_job(folder: Path, image: str, *, runner: str = "none", grace: str = "60s", extra: str = "") -> Path:
    path = folder / "job.yaml"
    path.write_text(f"name: rehearsed\nimage: {image}\nrunner: {runner}\nresources: {{grace: {grace}}}\n{extra}")
    return path


def play(job: Path, platform: str, **more: object) -> Report:
    request = Request(job, platform, **{"seconds": 60.0, **more})  # type: ignore[arg-type]
    return rehearse(request, lambda text: None)


def broken(report: Report) -> set[str]:
    return {finding.rule for finding in report.findings if finding.verdict is Verdict.BROKEN}


def seen(report: Report, rule: str) -> str:
    return next(finding.seen for finding in report.findings if finding.rule == rule)


def verdict(report: Report, rule: str) -> Verdict:
    return next(finding.verdict for finding in report.findings if finding.rule == rule)


def containers(process: int) -> list[str]:
    """That a rehearsal of this process runs, or has left."""
    return podman("ps", "--all", "--quiet", "--filter", f"label={LABEL}={process}").split()


# Bad images, good images


@needs_podman
@pytest.mark.parametrize(
    ("image", "platform", "rule", "evidence"),
    [
        ("writer", "sagemaker", "writes", "/root/result.txt: lost with the container"),
        ("writer", "vertex", "writes", "/root/result.txt: lost with the container"),
        ("writer", "openshift", "writes", "/root/result.txt: Permission denied"),
        ("strict-writer", "ovh", "writes", "/root/result.txt: Permission denied"),
        ("strict-writer", "slurm", "writes", "/root/result.txt: Permission denied"),
        ("filler", "sagemaker", "shm", "No space left on device"),
        ("filler", "kubernetes", "shm", "No space left on device"),
        ("deaf", "openshift", "stop", "still running 1 s after SIGTERM"),
        ("deaf", "slurm", "stop", "still running 1 s after SIGTERM"),
        ("caller", "sagemaker", "network", "name resolution"),
        ("caller", "ovh", "network", "name resolution"),
    ],
)
def test_a_bad_image_breaks_one_rule(
    images: Images, image: str, platform: str, rule: str, evidence: str, tmp_path: Path
) -> None:
    how = ("1s", 10.0) if image == "deaf" else ("60s", 60.0)
    report = play(write_job(tmp_path, images(image), grace=how[0]), platform, seconds=how[1])
    assert broken(report) == {rule}
    assert evidence in seen(report, rule)
    assert next(finding.way_out for finding in report.findings if finding.rule == rule)
    assert not containers(os.getpid())


@needs_podman
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_good_foreign_image_keeps_all_rules(images: Images, platform: str, tmp_path: Path) -> None:
    report = play(write_job(tmp_path, images("good")), platform)
    verdicts = {finding.rule: finding.verdict for finding in report.findings}
    assert verdicts.pop("contract") is Verdict.NOT_TRIED
    assert set(verdicts.values()) == {Verdict.KEPT}, report
    assert "exit code 143" in seen(report, "stop")


@needs_podman
def test_more_shared_memory_where_it_can_be_asked_for(images: Images, tmp_path: Path) -> None:
    job = write_job(tmp_path, images("filler")).read_text().replace("grace: 60s", "grace: 60s, shm: 128Mi")
    (tmp_path / "job.yaml").write_text(job)
    assert broken(play(tmp_path / "job.yaml", "kubernetes")) == set()
    assert broken(play(tmp_path / "job.yaml", "ovh")) == {"shm"}


@needs_podman
def test_a_network_that_is_not_needed_is_no_broken_rule(images: Images, tmp_path: Path) -> None:
    report = play(write_job(tmp_path, images("curious")), "kubernetes")
    assert broken(report) == set()
    assert "went on without" in seen(report, "network")


@needs_podman
def test_with_the_network_the_rule_is_not_tried(images: Images, tmp_path: Path) -> None:
    assert verdict(play(write_job(tmp_path, images("good")), "kubernetes", network=True), "network") is (
        Verdict.NOT_TRIED
    )


FACTS = {
    "sagemaker": {
        "user=0:0", "shm=65536", "usr=open", "TRAINING_JOB_NAME=rehearsal", "/opt/ml/input/config/resourceconfig.json",
    },
    "vertex": {"user=0:0", "shm=65536", "usr=open"},
    "ovh": {"user=42420:42420", "shm=65536", "usr=closed", "entry=0", "home=/"},
    "openshift": {
        "user=1000730000:0", "caps=0000000000000000", "shm=65536", "usr=closed", "entry=0", "home=/",
    },
    "kubernetes": {"user=1000:0", "caps=0000000000000000", "usr=closed", "JOB_COMPLETION_INDEX=0"},
    "slurm": {
        "user=1000:1000", "caps=0000000000000000", "usr=closed", "entry=1", "home=/home/user", "SLURM_JOB_ID=1",
    },
}  # fmt: skip
"""Platform → what a container sees there. Tests run as root, for whom 1000 stands in on a cluster."""
EVERYWHERE = {"networks=lo", "/opt/ml=open", "/tmp=open", "CVLAUNCH_MAX_STEPS=3", "MINE=yes", "hello"}


@needs_podman
@pytest.mark.needs("root")
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_container_finds_what_the_platform_gives(images: Images, platform: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("hello\n")
    job = write_job(tmp_path, images("facts"), extra="data: {train: data}\nenv: {MINE: 'yes'}\n")
    report = play(job, platform, steps=3)
    assert broken(report) == {"results"}
    assert "exit code 3" in seen(report, "results")
    assert FACTS[platform] | EVERYWHERE <= set(report.log)
    first = next(line for line in report.log if line.startswith("first="))
    assert (first == "first=bash") is (platform != "slurm"), "Apptainer's command is not the first process"


@needs_podman
@pytest.mark.parametrize("platform", PLATFORMS)
def test_our_image_keeps_all_rules(trainer_image: str, digits: Path, platform: str) -> None:
    report = play(digits / "tiny.yaml", platform, image=trainer_image, settings=("resources.grace=90s",), seconds=300.0)
    assert {finding.rule: finding.verdict for finding in report.findings if finding.verdict is not Verdict.KEPT} == {}
    assert "model written" in seen(report, "results")
    assert "exit code 75, checkpoint" in seen(report, "stop")
    assert not containers(os.getpid())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its data, in a folder of its own."""
    folder = tmp_path_factory.mktemp("digits")
    for name in ("make_data.py", "tiny.yaml"):
        (folder / name).write_bytes((DIGITS / name).read_bytes())
    subprocess.run([sys.executable, str(folder / "make_data.py")], check=True, capture_output=True)
    return folder


@needs_podman
def test_loaders_that_need_more_than_64_mib(trainer_image: str, digits: Path) -> None:
    """A warning where the size is fixed, none where resources.shm sets it."""
    settings = ("train.workers=8", "train.batch=64", "train.image_size=160", "resources.grace=90s")
    fixed = play(digits / "tiny.yaml", "sagemaker", image=trainer_image, settings=settings, seconds=0.5)
    assert "warning: /dev/shm has" in seen(fixed, "shm")
    settable = play(
        digits / "tiny.yaml",
        "kubernetes",
        image=trainer_image,
        settings=(*settings, "resources.shm=1Gi"),
        seconds=0.5,
    )
    assert seen(settable, "shm") == "1.0 GiB are enough"
    assert broken(fixed) | broken(settable) == set()


@needs_podman
def test_a_command_under_the_runner_gets_its_secrets(
    trainer_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-5f1c")
    work = 'test "$TOKEN" = canary-5f1c && test "$STORED" = rehearsal && sleep 2'
    extra = f"command: [sh, -c, {work!r}]\nsecrets: {{TOKEN: 'env:MY_TOKEN', STORED: 'store:x:y'}}\n"
    job = write_job(tmp_path, trainer_image, runner="auto", extra=extra)
    report = play(job, "openshift")
    assert broken(report) == set(), report
    assert "result.json written" in seen(report, "results")
    assert list(report.notes) == ["a stand-in for STORED, which only the platform's secret store knows"]
    assert "canary" not in str(report)


@needs_podman
def test_an_image_without_our_runner_is_rehearsed_as_far_as_it_goes(images: Images, tmp_path: Path) -> None:
    job = write_job(tmp_path, images("writer"), runner="auto", extra="command: [bash, /run.sh]\n")
    report = play(job, "sagemaker")
    assert broken(report) == {"starts", "writes"}
    assert seen(report, "starts") == "cvlaunch-run is not in the image"


@needs_podman
def test_an_entry_point_that_is_not_there(base_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVLAUNCH_ENGINE", "podman")
    job = write_job(tmp_path, base_image, extra="command: [no-such-program]\n")
    report = play(job, "vertex")
    assert broken(report) == {"starts"}
    assert "no-such-program" in seen(report, "starts")
    assert {f.verdict for f in report.findings[3:]} == {Verdict.NOT_TRIED}


# Nothing is left behind


@needs_podman
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_rehearsal_leaves_nothing(
    images: Images, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    job = write_job(tmp_path, images("deaf"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [*COMMAND, "rehearse", str(job), "--like", "ovh"],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 180
    while not containers(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=180)
    assert process.returncode == code, said
    assert not containers(process.pid)
    assert list(scratch.iterdir()) == []


# The command


@needs_podman
def test_the_command_prints_a_table_or_json(images: Images, tmp_path: Path) -> None:
    job = write_job(tmp_path, images("strict-writer"))
    done = cli("rehearse", job, "--like", "openshift", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "user      1000730000:0" in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert "broken" in rows["writes"]
    assert "not tried  it ended early: see writes" in rows["results"]
    assert "Ways out:\n  writes: write below /opt/ml or /tmp" in done.stdout
    facts = cli_json(
        "rehearse", write_job(tmp_path, images("good")), "--like", "vertex", "--seconds", "60s", cwd=tmp_path
    )
    assert facts["kept"] is True
    assert {finding["verdict"] for finding in facts["findings"]} == {"kept", "not tried"}
    assert facts["assumed"] == list(RULES["vertex"].assumed.values())


COMMAND_JOB = "name: x\ncommand: ['true']\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (COMMAND_JOB, ["--like", "sagmaker"], "unknown platform 'sagmaker'"),
        (COMMAND_JOB, ["--like", "sagmaker"], "did you mean 'sagemaker'?"),
        (COMMAND_JOB, ["--like", "local"], "local runs a process without a container"),
        (COMMAND_JOB, ["--like", "container"], "container is this machine"),
        (COMMAND_JOB, [], "Missing option '--like'"),
        (COMMAND_JOB, ["--like", "ovh", "--steps", "0"], "0 is not in the range"),
        (COMMAND_JOB, ["--like", "ovh", "--seconds", "soon"], "'soon' is not a duration"),
        ("name: x\nimage: [\n", ["--like", "ovh"], "job.yaml:"),
    ],
)
def test_wrong_input_is_one_line(text: str, options: Sequence[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    done = cli("rehearse", "job.yaml", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@needs_podman
@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (COMMAND_JOB, [], "image: the job has no image to rehearse; add image: cvlaunch-trainer, or --image"),
        (COMMAND_JOB, ["--image", "localhost/no-such:1"], "localhost/no-such:1"),
        (
            "name: x\nrunner: none\nimage: IMAGE\ndata: {train: s3://bucket/x}\n",
            [],
            "data.train: s3://bucket/x is in a store; give --network",
        ),
        (
            "name: x\nrunner: none\nimage: IMAGE\ndata: {train: closed}\n",
            [],
            "data.train: TMP/closed is closed to other users",
        ),
    ],
)
def test_a_job_that_cant_be_rehearsed(
    images: Images, text: str, options: Sequence[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "job.yaml").write_text(text.replace("IMAGE", images("good")))
    done = cli("rehearse", "job.yaml", "--like", "ovh", *options, cwd=tmp_path)
    assert done.returncode in (2, 6), done.stderr
    assert message.replace("TMP", str(tmp_path)) in done.stderr
    assert "Traceback" not in done.stderr


def test_without_an_engine(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"{COMMAND_JOB}image: x\n")
    done = cli("rehearse", "job.yaml", "--like", "ovh", cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "no container engine was found" in done.stderr


# Verdicts

IMAGE = LocalImage(
    config_digest="sha256:0", names=("x:1",), digests=(), size=1, platform="linux/amd64", layers=(),
    labels={"io.cvlaunch.contract": "1"}, entrypoint=("cvlaunch-run",), user="",
)  # fmt: skip
GOOD = Ran(5.0, 0, result="SUCCEEDED", upload="complete", model=True)
STOPPED = Ran(5.0, 75, stopped_after=4.0, took=1.0, checkpoint="7")


def case_of(platform: str, **more: object) -> Case:
    facts: dict[str, object] = {
        "platform": platform, "rules": RULES[platform], "image": IMAGE, "user": "1000:0", "runner": True,
        "trains": True, "shm": 1 << 26, "grace_s": 30.0, "network": False, "mounted": ("/opt/ml", "/mnt/store"),
    }  # fmt: skip
    return Case(**{**facts, **more})  # type: ignore[arg-type]


def broken_in(case: Case, first: Ran = GOOD, stopped: Ran | None = STOPPED) -> set[str]:
    return {finding.rule for finding in findings(case, first, stopped) if finding.verdict is Verdict.BROKEN}


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (
            "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
            "shm",
        ),
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", "shm"),
        ("KeyError: 'getpwuid(): uid not found: 1000730000'", "user"),
        ("PermissionError: [Errno 13] Permission denied: '/workspace'", "writes"),
        ("cvlaunch: neither /opt/ml nor /tmp/cvlaunch/x can be written by uid 7; set CVLAUNCH_ROOT", "writes"),
        ("OSError: [Errno 30] Read-only file system: '/opt/ml/input/data/train/x.cache'", "writes"),
        ("urllib3.exceptions.NameResolutionError: Failed to resolve 'pypi.org'", "network"),
        ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", "network"),
        ("cvtrainer: train.model: the published weights of 'resnet18' can't be had (offline)", "network"),
        ("ValueError: 7", "results"),
    ],
)
def test_what_a_failed_run_is_blamed_on(line: str, rule: str) -> None:
    failed = Ran(3.0, 1, ["epoch 1", line], result="FAILED")
    assert broken_in(case_of("openshift"), failed, None) == {rule}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"exit_code": 128 + signal.SIGBUS}, "shm"),
        ({"model": False}, "results"),
        ({"upload": "incomplete"}, "results"),
        ({"result": ""}, "results"),
        ({"changes": ["C /root", "A /root/x"]}, "writes"),
        ({"changes": ["D /usr/bin/python"]}, "writes"),
        ({"changes": ["C /root", "A /root/.cache", "A /root/.cache/x", "A /opt/ml/y", "C /etc", "A /tmp/z"]}, None),
        ({"changes": ["C /opt", "C /opt/app", "C /opt/app/state.db"]}, "writes"),
        ({"changes": ["C /usr"]}, None),
        ({"changes": ["A /mnt", "A /mnt/store", "A /opt/venv/lib/__pycache__/x.pyc", "A /run/lock/x"]}, None),
        ({"lines": ["cvlaunch: a loader needs room, or dies with a bus error"]}, None),
        ({"lines": ["OSError: Temporary failure in name resolution; going on without"]}, None),
    ],
)
def test_what_a_run_that_ended_well_breaks(change: Mapping[str, object], rule: str | None) -> None:
    first = dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    assert broken_in(case_of("sagemaker"), first) == ({rule} if rule else set())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Verdict.KEPT),
        ({"exit_code": 143}, Verdict.KEPT),
        ({"exit_code": 1}, Verdict.BROKEN),
        ({"took": None, "exit_code": 137}, Verdict.BROKEN),
        ({"checkpoint": None}, Verdict.NOT_TRIED),
        ({"stopped_after": None, "exit_code": 0}, Verdict.NOT_TRIED),
    ],
)
def test_what_a_stop_must_look_like(change: Mapping[str, object], expected: Verdict) -> None:
    stopped = dataclasses.replace(STOPPED, **change)  # type: ignore[arg-type]
    found = findings(case_of("vertex"), GOOD, stopped)
    assert next(finding.verdict for finding in found if finding.rule == "stop") is expected


@pytest.mark.parametrize(
    ("image", "rule"),
    [
        (dataclasses.replace(IMAGE, platform="linux/arm64"), {"platform"}),
        (dataclasses.replace(IMAGE, labels={"io.cvlaunch.contract": "99"}), {"contract"}),
        (dataclasses.replace(IMAGE, labels={}), set()),
    ],
)
def test_what_an_image_says_of_itself(image: LocalImage, rule: set[str]) -> None:
    assert broken_in(case_of("ovh", image=image)) == rule


def test_a_shell_as_entry_point_is_named_where_the_stop_fails() -> None:
    case = case_of("kubernetes", runner=False, image=dataclasses.replace(IMAGE, entrypoint=("/bin/sh", "-c", "run")))
    found = findings(case, GOOD, dataclasses.replace(STOPPED, took=None))
    assert "exec form" in found[-1].way_out


# Rules


def test_each_source_is_listed_and_each_listed_one_is_used() -> None:
    named = {key for rules in RULES.values() for key in rules.sources.values()}
    assert named == set(SOURCES)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_has_no_source_is_called_assumed(platform: str) -> None:
    """Of the rules in which platforms differ."""
    rules = rules_of(platform)
    told = {*rules.sources, *rules.assumed}
    wanted = {"user", "shm", "stop"} | ({"read-only root"} if rules.read_only_root else set())
    assert wanted - told <= {"user"} if platform == "slurm" else wanted <= told
    assert set(rules.mounts) <= set(rules.writable)
    assert rules.root in rules.writable


def test_the_page_tells_the_rules() -> None:
    page = (REPOSITORY / "docs/rehearsal.md").read_text()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    rows = {cells[0].strip("`"): cells[1:] for cells in table}
    users = {"image": "the image's", None: "yours", "random": "random:0"}
    for platform, rules in RULES.items():
        user, mounts, image, shm, sources = rows.pop(platform)
        assert user == users.get(rules.uid, f"{rules.uid}:{rules.gid}")
        assert mounts == (", ".join(rules.mounts) or "–")
        assert ("no capabilities" in image, "read-only" in image) == (rules.drop_capabilities, rules.read_only_root)
        assert shm == ("this machine's" if rules.shm.host else "`resources.shm`" if rules.shm.how else "64 MiB")
        assert sources == ", ".join(rules.sources)
    assert rows == {}
    told = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert {finding.rule for finding in findings(case_of("slurm"), GOOD, STOPPED)} <= told


@pytest.mark.parametrize("platform", ["local", "container", "slurmm"])
def test_what_is_no_platform(platform: str) -> None:
    with pytest.raises(SpecError, match="--like"):
        rules_of(platform)


# The trainer


@pytest.mark.parametrize("steps", [1, 4])
def test_the_classifier_ends_after_so_many_steps(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {split: draw_classes(tmp_path / split, {"red": 12, "blue": 12}) for split in ("train", "val")}
    layout = make_root(tmp_path / "run", TRAIN)
    monkeypatch.setenv("CVLAUNCH_MAX_STEPS", str(steps))
    finish(start(layout, data))
    assert exit_facts(layout)["code"] == 0
    assert max(step for _, step in metrics(layout)) == steps
    assert ("val", steps) in metrics(layout)
    assert json.loads((layout.model / "model_card.json").read_text())["epochs"] == -(-steps // 3)
    assert (layout.checkpoints / str(steps) / "complete.json").exists()


def test_a_number_of_steps_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {split: draw_classes(tmp_path / split, {"red": 12, "blue": 12}) for split in ("train", "val")}
    layout = make_root(tmp_path / "run", TRAIN)
    monkeypatch.setenv("CVLAUNCH_MAX_STEPS", "few")
    finish(start(layout, data), expected=64)
    assert "CVLAUNCH_MAX_STEPS is 'few'" in str(exit_facts(layout)["reason"])


def test_the_detector_ends_after_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); from make_data import write_shapes; "
         "from pathlib import Path; write_shapes(Path(sys.argv[2]), {'train': 24, 'val': 4})",
         str(REPOSITORY / "examples/shapes"), str(tmp_path)],
        check=True,
    )  # fmt: skip
    train = {**TRAIN, "task": "detect", "model": "yolo11n", "image_size": 64}
    layout = make_root(tmp_path / "run", train)
    monkeypatch.setenv("CVLAUNCH_MAX_STEPS", "2")
    finish(start(layout, {split: tmp_path / split for split in ("train", "val")}))
    assert set(metrics(layout)) == {("train", 2), ("val", 2)}
    assert (layout.model / "model.pt").exists()
