"""`targets setup`, `targets probe`, `login`: what they print, what they write, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher.cli.app import main
from launcher.cli.targetsfile import add_target
from launcher.errors import SpecError
from launcher.remote import Host
from tests.cli_tool import cli
from tests.services.aws import AwsCloud
from tests.services.slurm import SlurmCluster

Call = Callable[..., tuple[int, str, str]]

KEYS = {"backend": "slurm", "root": "/scratch/me", "gpu_types": {"A100": "a100"}}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capfd.readouterr()

    return called


def write_target(folder: Path, **keys: object) -> str:
    """The target `hpc`, of this machine unless `ssh` is given; its root."""
    root = f"{folder}/the root"
    target = {"backend": "slurm", "root": root, **keys}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"targets": {"hpc": target}}))
    return root


# -- setup


def test_setup_of_this_machine_checks_its_python(call: Call, tmp_path: Path) -> None:
    root = write_target(tmp_path)
    code, out, err = call("targets", "setup", "hpc")
    assert code == 0, err
    assert err.startswith("sent cvlaunch ")
    assert [line.split()[0] for line in out.splitlines()] == ["root", "cvlaunch", "python", "contract"]
    assert sys.executable in out
    code, out, err = call("targets", "setup", "hpc", "--json")
    said = json.loads(out)
    assert (code, said["root"], said["done"], said["missing"], said["images"]) == (0, root, [], [], {})
    assert call("targets", "setup", "hpc")[2] == "all of it is there already\n"


def test_setup_says_what_a_python_lacks_and_where_a_lock_went(call: Call, tmp_path: Path) -> None:
    root = write_target(tmp_path, python="/usr/bin/python3")
    _, _, err = call("targets", "setup", "hpc")
    assert (
        "warning: /usr/bin/python3 lacks torch, torchvision, timm, ultralytics: jobs with `train` will not run" in err
    )
    lock = tmp_path / "empty.lock"
    lock.write_text("# nothing\n")
    code, _, err = call("targets", "setup", "hpc", "--requirements", str(lock))
    assert code == 0, err
    assert f"jobs run in it when the target says so: write python: {root}/env-" in err


@pytest.mark.needs("root", "sshd")
def test_setup_behind_ssh(call: Call, tmp_path: Path, ssh_host: Host) -> None:
    write_target(tmp_path, ssh="cluster", python=sys.executable)
    code, out, err = call("targets", "setup", "hpc")
    assert code == 0, err
    assert sys.executable in out


def test_setup_brings_images(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_target(tmp_path, container_command="apptainer")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apptainer").write_text('#!/bin/sh\necho pulling "$3"; touch "$2"\n')
    (tmp_path / "bin/apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    image = f"ghcr.io/team/trainer@sha256:{'ab' * 32}"
    code, out, err = call("targets", "setup", "hpc", "--image", image)
    assert code == 0, err
    assert f"pulling docker://{image}" in err
    assert out.splitlines()[-1].split(maxsplit=1) == [image, f"{root}/images/trainer-{'ab' * 8}.sif"]
    assert not list(Path(root).glob("env-*"))


REFUSED = {
    "another backend": ({}, ("setup", "local"), "local: the local backend has nothing to set up, to look at"),
    "no such target": ({}, ("setup", "hcp"), "--target: unknown target 'hcp'; there are container, hpc, kubernetes"),
    "an image without a tool": (
        {"python": sys.executable},
        ("setup", "hpc", "--image", "ghcr.io/a/b:1"),
        "--image: the target has no container_command, so that its jobs use no image",
    ),
    "a python that is not there": (
        {"python": "/opt/none/bin/python"},
        ("setup", "hpc"),
        "python: /opt/none/bin/python on",
    ),
    "no such lock": ({}, ("setup", "hpc", "--requirements", "none.lock"), "'none.lock' does not exist"),
}


@pytest.mark.parametrize("keys, arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_setup_refuses(
    call: Call, tmp_path: Path, keys: dict[str, object], arguments: tuple[str, ...], message: str
) -> None:
    write_target(tmp_path, **keys)
    code, out, err = call("targets", *arguments)
    assert (code, out) == (2, "")
    assert message in err


# -- probe


@pytest.mark.needs("slurm")
def test_probe_prints_tables_and_a_target_that_can_be_used(call: Call, tmp_path: Path, slurm: SlurmCluster) -> None:
    code, out, err = call("targets", "probe", "--root", f"{tmp_path}/root", "--run-job", "--connect", "127.0.0.1:9")
    assert (code, err) == (0, "waiting for a node, 5 minutes at most\n")
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert "accounting on, an account is required" in words
    assert "arrays up to 301 elements" in words
    assert "main * 1-00:00:00 1 1 2 a100 8 15.6 GiB a100" in words
    assert "low 1-00:00:00 1 1 1 l40s 8 15.6 GiB l40s requeue" in words
    assert "compute node node1, partition main" in words
    assert "shared memory 2.0 GiB" in words
    assert "vision any limited, normal" in words
    (tmp_path / "targets.yaml").write_text(out[out.index("# targets.yaml") :])
    shown = yaml.safe_load(call("targets", "show", "cvtest")[1])
    assert (shown["partition"], shown["spot_partition"], shown["root"]) == ("main", "low", f"{tmp_path}/root")


@pytest.mark.needs("slurm")
def test_probe_writes_the_target_once(call: Call, tmp_path: Path, slurm: SlurmCluster) -> None:
    (tmp_path / "targets.yaml").write_text("# ours\ntargets:\n  desk: {backend: local}   # here\n")
    code, out, err = call("targets", "probe", "hpc", "--root", f"{tmp_path}/root", "--write", "--json")
    assert code == 0
    assert json.loads(out)["cluster"]["name"] == "cvtest"
    assert f"added to {tmp_path}/targets.yaml; next: cvlaunch targets setup hpc" in err
    text = (tmp_path / "targets.yaml").read_text()
    assert text.startswith("# ours\ntargets:\n  desk: {backend: local}   # here\n  hpc:\n    backend: slurm\n")
    assert yaml.safe_load(text)["targets"]["hpc"] == json.loads(out)["target"]["hpc"]
    code, _, err = call("targets", "probe", "hpc", "--write")
    assert (code, (tmp_path / "targets.yaml").read_text()) == (2, text)
    assert "targets.yaml: targets: 'hpc' is there already: choose another name, or change it by hand" in err


@pytest.mark.needs("slurm")
def test_a_node_that_can_not_be_had_is_a_warning(call: Call, slurm: SlurmCluster, tmp_path: Path) -> None:
    code, out, err = call("targets", "probe", "--root", "/x", "--run-job", "--connect", "nowhere")
    assert code == 0
    assert "warning: 'nowhere' is no place to connect to" in err
    assert "compute node" not in out


def test_what_probe_and_login_refuse(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_target(tmp_path)
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in ("bash", "id", "timeout", "head"):
        (bare / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(bare))
    assert call("targets", "probe")[::2] == (
        2,
        "cvlaunch: sbatch is not on the PATH of a login shell of this machine: name a login node of a cluster\n",
    )
    assert "unknown target 'hcp'; there are container, hpc" in call("targets", "probe", "hcp")[2]
    assert "the local backend has nothing to set up" in call("targets", "probe", "local")[2]
    assert "the container backend has nothing" in call("login", "container")[2]


# -- login


@pytest.mark.needs("root", "sshd")
def test_login_opens_the_connection(call: Call, tmp_path: Path, ssh_host: Host) -> None:
    write_target(tmp_path, ssh="cluster")
    code, _, err = call("login", "hpc")
    assert (code, err.splitlines()[-1]) == (0, "the connection to cluster is open")
    assert ssh_host.is_open()
    ssh_host.logout()


def test_login_to_this_machine_is_needless(call: Call, tmp_path: Path) -> None:
    write_target(tmp_path)
    assert call("login", "hpc") == (0, "", "hpc is on this machine: no login needed\n")


# -- SageMaker

ROLE = "arn:aws:iam::123456789012:role/clusters"
REGISTRY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/vision/clusters"


@pytest.fixture
def account(aws: AwsCloud, tmp_path: Path) -> AwsCloud:
    """With the target `aws`, which has all that it needs."""
    aws.bucket("clusters")
    aws.role("clusters")
    aws.serve_image(f"{REGISTRY}:1", image="none")
    write_aws(tmp_path)
    return aws


def write_aws(folder: Path, **keys: object) -> None:
    usual = {"backend": "sagemaker", "region": "eu-west-1", "role": ROLE, "output": "s3://clusters/runs"}
    content = {
        "datasets": {"shapes": {"default": "s3://clusters/shapes", "desk": "/data"}, "desk-only": {"desk": "/x"}},
        "targets": {"aws": {**usual, **keys}},
    }
    (folder / "targets.yaml").write_text(yaml.safe_dump(content))


def test_probe_shows_an_account(call: Call, account: AwsCloud) -> None:
    account.quota("ml.g5.xlarge", 4)
    code, out, err = call("targets", "probe", "aws")
    assert (code, err) == (0, "")
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert words[:7] == [
        "region eu-west-1",
        "account 123456789012",
        "you arn:aws:sts::123456789012:user/moto",
        f"role {ROLE} (SageMaker may take it)",
        "output s3://clusters/runs (bucket in eu-west-1)",
        "log group /aws/sagemaker/TrainingJobs (the first job makes it)",
        "longest job 28d 00h",
    ]
    assert "INSTANCES GPUS ON DEMAND SPOT WARM POOL" in words
    assert "ml.g5.xlarge 1 × A10G (24 GB) 4 1000 1000" in words
    assert "Service Quotas checks of quotas yes" in words
    assert not any(line.startswith(("refused", "note")) for line in words)
    shown = yaml.safe_load(out[out.index("# targets.yaml") :])
    assert shown["targets"]["aws"]["role"] == ROLE


def test_probe_says_what_an_account_lacks(call: Call, account: AwsCloud, tmp_path: Path) -> None:
    write_aws(tmp_path, role=f"{ROLE}-none", output="s3://clusters-none/runs")
    code, out, _ = call("targets", "probe", "aws")
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert f"role {ROLE}-none (can't be used)" in words
    assert any(
        line.startswith("refused role there is no role clusters-none: correct its ARN, or make it: `aws iam")
        for line in words
    )
    assert any(line.startswith("refused output there is no bucket clusters-none") for line in words)
    said = json.loads(call("targets", "probe", "aws", "--json")[1])
    assert [(p["thing"], p["fatal"]) for p in said["account"]["problems"]] == [("role", True), ("output", True)]
    assert said["account"]["trusted"] is False
    assert said["account"]["quotas"][0]["name"] == "ml.g4dn.xlarge"


def test_probe_writes_a_target_of_aws(call: Call, account: AwsCloud, tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").unlink()
    code, out, err = call("targets", "probe", "lab", "--region", "us-east-1", "--write")
    assert code == 0, err
    assert "    # role: arn:aws:iam::ACCOUNT:role/NAME\n    # output: s3://BUCKET/runs\n" in out
    assert err == f"added to {tmp_path}/targets.yaml; it still lacks `role` and `output`\n"
    written = yaml.safe_load((tmp_path / "targets.yaml").read_text())
    assert written == {"targets": {"lab": {"backend": "sagemaker", "region": "us-east-1"}}}


AWS_OFFLINE: dict[str, tuple[dict[str, str], int, str]] = {
    "no credentials": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, 4, "credentials"),
    "no network": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 6, "did not answer"),
    "no region": ({"AWS_REGION": "", "AWS_DEFAULT_REGION": ""}, 2, "nothing says which region target 'aws' is in"),
    "no such profile": ({"AWS_PROFILE": "nobody"}, 2, "the AWS profile 'nobody' is not in ~/.aws"),
}


@pytest.mark.parametrize("variables, exit_code, words", AWS_OFFLINE.values(), ids=AWS_OFFLINE)
def test_an_account_that_can_not_be_asked(
    call: Call,
    account: AwsCloud,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    exit_code: int,
    words: str,
) -> None:
    write_aws(tmp_path, region=None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    code, out, err = call("targets", "probe", "aws")
    assert (code, out, err.count("\n")) == (exit_code, "", 1)
    assert words in err
    assert err.startswith("cvlaunch: ")


def test_policies_are_printed(call: Call, account: AwsCloud, tmp_path: Path) -> None:
    key = "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    code, out, err = call("targets", "policy", "aws", "--secret", "secretsmanager:wandb#key", "--key", key)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == ["submitter", "role", "trust"]
    for name in found:
        assert json.loads(call("targets", "policy", "aws", "--of", name)[1])["Version"] == "2012-10-17"
    role = {statement["Sid"]: statement["Resource"] for statement in found["role"]["Statement"]}
    assert role["Secrets"] == ["arn:aws:secretsmanager:eu-west-1:123456789012:secret:wandb-??????"]
    assert role["DataObjects"] == ["arn:aws:s3:::clusters/shapes/*"]
    assert role["OwnKeys"] == [key]
    write_aws(tmp_path, role=None, output=None)
    code, out, err = call("targets", "policy", "aws", "--of", "submitter")
    assert (code, err.splitlines()) == (0, [
        "the target has no role: put yours where it says REPLACE-ME",
        "the target has no output: put yours where it says REPLACE-ME",
    ])  # fmt: skip
    assert "arn:aws:iam::*:role/REPLACE-ME" in out
    assert "arn:aws:s3:::replace-me/*" in out
    assert account.calls == ()


WRONG = {
    "options of another backend": (("targets", "policy", "aws", "--user", "ada"), "are for clusters of Kubernetes"),
    "of is for SageMaker": (("targets", "policy", "kubernetes", "--of", "role"), "are for targets of SageMaker"),
    "secret": (("targets", "policy", "aws", "--secret", "env:X"), "--secret: 'env:X' is no reference"),
    "key": (("targets", "policy", "aws", "--key", "alias/team"), "--key: 'alias/team' is no key's ARN"),
    "key is for SageMaker": (("targets", "policy", "kubernetes", "--key", "x"), "--key are for targets of SageMaker"),
    "set up": (
        ("targets", "setup", "aws"),
        "aws: there is nothing to set up in SageMaker: `cvlaunch targets probe aws`",
    ),
    "probe both": (("targets", "probe", "--region", "x", "--context", "y"), "--profile and --region are for SageMaker"),
    "probe slurm": (("targets", "probe", "aws", "--run-job"), "are for clusters of SLURM"),
}


@pytest.mark.parametrize("arguments, words", WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_with_sagemaker(call: Call, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    write_aws(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_login_with_keys_asks_who_that_is(call: Call, account: AwsCloud) -> None:
    code, _, err = call("login", "aws")
    assert (code, err.splitlines()) == (0, [
        "there is nothing to log in to: the identity is the keys in AWS_ACCESS_KEY_ID and its like",
        "region eu-west-1: you are arn:aws:sts::123456789012:user/moto",
    ])  # fmt: skip
    account.expire(account.access_key)
    code, _, err = call("login", "aws")
    assert code == 4
    assert "AWS does not take the keys in AWS_ACCESS_KEY_ID and its like (An error occurred (ExpiredToken)" in err
    assert err.endswith(": set new ones\n")


def sso_profile(call_aws: str, folder: Path, account: AwsCloud, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """call_aws: what the program `aws` does. botocore looks for the log-in's cache in the home that it began with."""
    account.sign_in(home, "lab", role="clusters")
    write_aws(folder, profile="lab")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (folder / "bin").mkdir()
    if call_aws:
        (folder / "bin/aws").write_text(f"#!/bin/sh\n{call_aws}\n")
        (folder / "bin/aws").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))


SIGN_INS = {
    "it works": (
        "echo program: $*",
        0,
        "region eu-west-1, profile lab: you are arn:aws:sts::123456789012:assumed-role/clusters/",
    ),
    "it fails": ("exit 3", 4, "`aws sso login --profile lab` ended with code 3"),
    "it is not there": ("", 2, "`aws sso login --profile lab` needs AWS's own program: pip install awscli"),
}


@pytest.mark.parametrize("program, exit_code, words", SIGN_INS.values(), ids=SIGN_INS)
def test_login_by_sso_runs_aws(
    account: AwsCloud,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    exit_code: int,
    words: str,
) -> None:
    sso_profile(program, tmp_path, account, monkeypatch, home)
    done = cli("login", "aws", cwd=tmp_path)
    assert done.returncode == exit_code, done.stderr
    assert words in done.stderr
    assert done.stdout == ("program: sso login --profile lab\n" if exit_code == 0 else "")


# -- targets.yaml

BLOCK = "  hpc:\n    backend: slurm\n    root: /scratch/me\n    gpu_types:\n      A100: a100\n"
FILES = {
    "none": (None, f"targets:\n{BLOCK}"),
    "empty": ("", f"targets:\n{BLOCK}"),
    "comments only": ("# ours\n", f"# ours\n\ntargets:\n{BLOCK}"),
    "no targets": ("default: local\n", f"default: local\n\ntargets:\n{BLOCK}"),
    "targets without any": ("targets:\ndefault: local\n", f"targets:\n{BLOCK}default: local\n"),
    "no line end": ("targets:\n  a: {backend: local}", f"targets:\n  a: {{backend: local}}\n{BLOCK}"),
    "keys behind": (
        "targets:\n  a:\n    backend: local  # here\n\n# places of data\ndatasets: {}\n",
        f"targets:\n  a:\n    backend: local  # here\n{BLOCK}\n# places of data\ndatasets: {{}}\n",
    ),
    "another indent": (
        "targets:\n    a:\n        backend: local\n",
        "targets:\n    a:\n        backend: local\n" + "".join(f"  {line}\n" for line in BLOCK.splitlines()),
    ),
}


@pytest.mark.parametrize("before, after", FILES.values(), ids=FILES)
def test_a_target_is_added_and_all_else_stays(tmp_path: Path, before: str | None, after: str) -> None:
    if before is not None:
        (tmp_path / "targets.yaml").write_text(before)
    assert add_target(tmp_path, "hpc", KEYS) == tmp_path / "targets.yaml"
    assert (tmp_path / "targets.yaml").read_text() == after
    assert [path.name for path in tmp_path.iterdir()] == ["targets.yaml"]


def test_the_nearest_file_above_is_taken(tmp_path: Path) -> None:
    (tmp_path / "targets.yaml").write_text("targets:\n")
    (tmp_path / "below").mkdir()
    assert add_target(tmp_path / "below", "hpc", KEYS) == tmp_path / "targets.yaml"


@pytest.mark.parametrize("text", ["targets: {a: {backend: local}}\n", "{targets: {}}\n"])
def test_a_file_that_text_can_not_be_added_to(tmp_path: Path, text: str) -> None:
    (tmp_path / "targets.yaml").write_text(text)
    with pytest.raises(SpecError, match="no target can be added to a file written like this: add the printed lines"):
        add_target(tmp_path, "hpc", KEYS)
    assert (tmp_path / "targets.yaml").read_text() == text


@pytest.mark.parametrize("text", ["targets:\n- a\n", "- targets\n"])
def test_a_file_that_holds_no_targets(tmp_path: Path, text: str) -> None:
    (tmp_path / "targets.yaml").write_text(text)
    with pytest.raises(SpecError, match="expected keys and values"):
        add_target(tmp_path, "hpc", KEYS)
    assert (tmp_path / "targets.yaml").read_text() == text
