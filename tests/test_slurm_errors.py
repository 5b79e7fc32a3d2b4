"""What a user is told who asks a cluster for what it doesn't have: the thing, the file and key, the way out.

Nothing is left behind then: no job, no record, and in the ledger at most a run that says that it was not submitted.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import State, runs, submit
from launcher.errors import AuthError, CapacityError, CvlaunchError, SpecError, UnreachableError
from launcher.slurm import places
from tests.cli_tool import cli
from tests.services.slurm import SlurmCluster, slurm_cluster
from tests.services.sshd import ALIAS, Sshd, sshd
from tests.worlds.slurm import SlurmWorld

pytestmark = pytest.mark.needs("slurm")


@dataclass(frozen=True)
class Site:
    """A user's folder with a target `hpc`. target: its keys, of which a test changes some; None leaves one out."""

    project: Path
    root: Path
    target: Mapping[str, Any]

    def write(self, target: Mapping[str, Any] = {}, job: Mapping[str, Any] = {}) -> Path:
        keys = {key: value for key, value in {**self.target, **target}.items() if value is not None}
        (self.project / "targets.yaml").write_text(yaml.safe_dump({"targets": {"hpc": keys}}))
        described = {"name": "wrong", "command": [sys.executable, "-c", "print('ran')"], **job}
        (self.project / "job.yaml").write_text(yaml.safe_dump(described))
        return self.project / "job.yaml"

    def refused(self, target: Mapping[str, Any] = {}, job: Mapping[str, Any] = {}) -> CvlaunchError:
        with pytest.raises(CvlaunchError) as caught:
            submit(self.write(target, job), target="hpc")
        return caught.value


@pytest.fixture
def site(slurm: SlurmCluster, tmp_path: Path) -> Site:
    world = SlurmWorld(tmp_path / "cluster", slurm)
    (tmp_path / "project").mkdir()
    return Site(tmp_path / "project", tmp_path / "cluster/root", {**world.target, "partition": "main"})


def resources(**keys: object) -> dict[str, object]:
    return {"resources": keys}


# -- what can't be read -----------------------------------------------------------------------------------------------

ABSOLUTE = "expected an absolute path of the cluster, found 'scratch/me'"
UNREADABLE = {
    "two words": ({"partition": "my part"}, "partition: expected one word"),
    "two lines": ({"account": "me\n#SBATCH --uid=0"}, "account: expected one word"),
    "a relative root": ({"root": "scratch/me"}, f"root: {ABSOLUTE}"),
    "a relative python": ({"python": "scratch/me"}, f"python: {ABSOLUTE}"),
    "no root": ({"ssh": "login1", "root": None}, "targets.hpc: root is missing: with ssh, write which folder"),
    "no time": ({"time": "soon"}, "time: "),
    "docker": ({"container_command": "docker"}, "'docker' is none of apptainer, singularity, pyxis, charliecloud"),
    "no image": ({"container_command": ["run", "{binds}"]}, "container_command: no word has {image}"),
    "no folder": ({"container_command": ["run", "{image}"]}, "the run's folder could not be seen"),
    "no field": ({"container_command": ["run", "{imgae}"]}, "{imgae} is no field; there are {binds}"),
    "no option": ({"sbatch": ["-N2"]}, "sbatch.0: expected an option of sbatch"),
    "scratch": ({"scratch": "tmp"}, "scratch: expected an absolute path, or one below a variable"),
    "no key": ({"partitoin": "main"}, "partitoin: unknown key; did you mean 'partition'?"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_the_target_can_t_say(site: Site, name: str) -> None:
    keys, words = UNREADABLE[name]
    error = site.refused(keys)
    assert isinstance(error, SpecError) and words in str(error)
    assert str(error).startswith(f"{site.project}/targets.yaml:") and error.key is not None
    assert runs() == [] and not (site.root / "jobs").exists()


# -- what is seen before anything is sent -----------------------------------------------------------------------------

SETUP = "run: cvlaunch targets setup hpc"
SEEN = {
    "partition": ({"partition": "nope"}, {}, "hpc.partition: this machine: Partition nope not found; `sinfo -s` lists"),
    "one of two": ({"partition": "main,nope"}, {}, "hpc.partition: this machine: Partition nope not found"),
    "timeout": ({"partition": "short"}, resources(timeout="2h"), "resources.timeout: a start of this job takes up to"),
    "time": ({"partition": "short", "time": "1h"}, {}, "hpc.time: a start of this job takes up to 1h 00m"),
    "little time": ({"time": "10s"}, {}, "hpc.time: 10s leaves no time to train: the job's grace needs 4m 00s of it"),
    "nodes": ({}, resources(nodes=9), "resources.nodes: the job asks for 9 nodes together, and partition main has 2"),
    "cpus": ({}, resources(cpus=99), "resources.cpus: the job asks for 99 cpus together, and partition main has 16"),
    "spot": ({}, resources(spot=True), "resources.spot: the target has no spot_partition"),
    "wait": ({}, resources(max_wait="1h"), "resources.max_wait: the slurm backend has no max_wait: SLURM keeps a job"),
    "shm": ({}, resources(shm="1Gi"), "resources.shm: the slurm backend has no shm: shared memory is the node's own"),
    "large": ({}, {"env": {"LONG": "x" * 110_000}}, "the job has more than 100000 bytes; put long values into a file"),
    "python": ({"python": "/no/python"}, {}, f"hpc.python: there is no /no/python on this machine; {SETUP}"),
    "root": ({"root": "/proc/no"}, {}, "; set root or output to a folder that you may write"),
    "data": ({}, {"data": {"train": "target:/no/data"}}, "data.train: no folder /no/data"),
    "image": ({"container_command": "apptainer"}, {"image": "/no.sif"}, "image: there is no /no.sif on this machine"),
    "no image": ({"container_command": "apptainer"}, {}, "image: the slurm backend runs containers; give image or"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_before_anything_is_sent(site: Site, slurm: SlurmCluster, name: str) -> None:
    target, job, words = SEEN[name]
    error = site.refused(target, job)
    assert isinstance(error, SpecError) and words in str(error), str(error)
    assert name == "large" or str(error).partition(":")[0].endswith(("targets.yaml", "job.yaml"))
    assert runs() == [] and slurm.run("squeue", "-h") == ""
    assert [path.name for path in site.root.iterdir()] == [Path(places.library("/")).name]


def test_a_library_that_is_not_there(site: Site, tmp_path: Path) -> None:
    error = site.refused({"root": str(tmp_path / "fresh")})
    assert f"there is no cvlaunch of this version on this machine ({tmp_path}/fresh" in str(error)
    assert str(error).endswith(SETUP) and not (tmp_path / "fresh").exists()


def test_the_way_out_of_a_long_job_is_one(site: Site) -> None:
    """It goes on in its next start; a list of partitions has the longest limit of them."""
    error = site.refused({"partition": "short"}, resources(timeout="2h"))
    written = str(error).partition("write time: ")[2].partition(" in the target")[0]
    for target in {"partition": "short", "time": written}, {"partition": "short,main"}:
        run = submit(site.write(target, resources(timeout="2h")), target="hpc")
        assert run.status().state in (State.QUEUED, State.STARTING, State.RUNNING, State.FINALIZING, State.SUCCEEDED)
        run.cancel()


# -- what sbatch refuses ----------------------------------------------------------------------------------------------

NO_NODE = "no node of the partition has what the job asks for; `sinfo"
REFUSED = {
    "gpus": ({}, resources(gpus=3), NO_NODE),
    "gpus by option": ({"gpu_option": "gpus-per-node"}, resources(gpus=3), NO_NODE),
    "gpu type": ({}, resources(gpus=1, gpu="H200"), NO_NODE),
    "memory": ({}, resources(memory="1TB"), NO_NODE),
    "account": ({"account": "nope"}, {}, "hpc.account: this machine: this account doesn't exist, or you may not use"),
    "qos": ({"qos": "nope"}, {}, "hpc.qos: this machine: this QOS doesn't exist, or your account may not use it"),
    "feature": ({"constraint": "nope"}, {}, "hpc.constraint: this machine: no node has such a feature; `sinfo"),
    "reservation": ({"reservation": "nope"}, {}, "hpc.reservation: this machine: SLURM has no such reservation"),
    "option": ({"sbatch": ["--nope"]}, {}, "correct the target (unrecognized option '--nope')"),
    "value": ({"sbatch": ["--mail-type=SOMETIMES"]}, {}, "correct the target (Invalid --mail-type specification)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_sbatch_refuses(site: Site, slurm: SlurmCluster, name: str) -> None:
    target, job, words = REFUSED[name]
    error = site.refused(target, job)
    assert isinstance(error, SpecError) and words in str(error), str(error)
    assert str(error).partition(":")[0].endswith(("targets.yaml", "job.yaml"))
    (run,) = runs()
    assert (run.record.state, run.handle) == (State.NOT_SUBMITTED, None)
    assert list((site.root / "jobs").iterdir()) == [] and slurm.run("squeue", "-h") == ""


def test_a_message_as_it_is_printed(site: Site) -> None:
    site.write({"account": "nope"}, {"name": "my 'job' $(touch /tmp/cvlaunch-was-here) \"x\""})
    done = cli("submit", "job.yaml", "--target", "hpc", cwd=site.project)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"cvlaunch: {site.project}/targets.yaml:3: targets.hpc.account: this machine: "
        "this account doesn't exist, or you may not use it in this partition "
        "(Batch job submission failed: Invalid account or account/partition combination specified)\n"
    )


def test_a_name_of_spaces_and_quotes(site: Site) -> None:
    name = "my 'job' $(touch /tmp/cvlaunch-was-here) \"x\""
    run = submit(site.write({}, {"name": name, "tags": {"who": name}}), target="hpc")
    assert run.wait(timeout=240).state is State.SUCCEEDED
    assert not Path("/tmp/cvlaunch-was-here").exists()
    assert run.record.name == name


def test_a_container_tool_that_no_node_has(site: Site, tmp_path: Path) -> None:
    """The login node need not have it, so that only the job can tell."""
    (tmp_path / "image.sif").touch()
    job = site.write({"container_command": "apptainer"}, {"image": str(tmp_path / "image.sif")})
    status = submit(job, target="hpc").wait(timeout=240)
    assert status.state is State.FAILED
    assert status.reason.startswith("its node has no apptainer; see container_command")


# -- a controller that is away ----------------------------------------------------------------------------------------


@pytest.fixture
def impatient(slurm: SlurmCluster, tmp_path: Path) -> Path:
    """Settings with which SLURM's commands ask for a second, where a site's do for ten and more."""
    settings = Path(slurm.environment["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(settings.replace("MessageTimeout=10", "MessageTimeout=1"))
    return tmp_path / "slurm.conf"


def test_a_controller_that_is_away_before(
    site: Site, slurm: SlurmCluster, impatient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.stop_controller()
    monkeypatch.setenv("SLURM_CONF", str(impatient))
    error = site.refused()
    assert isinstance(error, UnreachableError) and "SLURM's controller did not answer" in str(error)
    assert runs() == []


def test_a_controller_that_goes_away_meanwhile(
    site: Site, slurm: SlurmCluster, tmp_path: Path, impatient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have taken the job: nobody sends it again before it was asked."""
    script = tmp_path / "bin/sbatch"
    script.parent.mkdir()
    gone = "while scontrol ping | grep -q 'is UP'; do sleep 0.1; done"
    script.write_text(
        f"#!/bin/sh\nscontrol shutdown slurmctld\nexport SLURM_CONF='{impatient}'\n{gone}\n"
        'exec /usr/bin/sbatch "$@"\n'
    )
    script.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        error = site.refused()
    assert isinstance(error, UnreachableError) and "whether wrong-" in str(error)
    (run,) = runs()
    assert run.record.state is State.SENDING
    slurm.daemons["slurmctld"].wait_for_end()
    slurm.start_controller()
    assert run.status().state is State.SENDING
    assert run.resume().wait(timeout=240).state is State.SUCCEEDED
    assert len(slurm.run("squeue", "-h", "-t", "all", "-n", run.id, "-o", "%i").split()) == 1


# -- ssh --------------------------------------------------------------------------------------------------------------


def other_key(server: Sshd, folder: Path, config: str) -> str:
    make_key(folder / "other")
    return config.replace(str(server.folder / "client_key"), str(folder / "other"))


def other_host_key(server: Sshd, folder: Path, config: str) -> str:
    make_key(folder / "other")
    (folder / "known").write_text(f"[127.0.0.1]:{server.port} {(folder / 'other.pub').read_text()}")
    return config.replace(str(server.folder / "known_hosts"), str(folder / "known"))


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


WAYS = {
    "unknown": (lambda *_: "", UnreachableError, f"{ALIAS}: no host of this name is known here: correct `ssh`"),
    "closed": (
        lambda server, _, config: config.replace(f"Port {server.port}", "Port 9"),
        UnreachableError,
        f"{ALIAS}: nothing answers at its port: check host and port",
    ),
    "key": (other_key, AuthError, "it did not let you in without a question: run `cvlaunch login hpc`"),
    "host key": (other_host_key, AuthError, "its host key is not the one that ~/.ssh/known_hosts has"),
}


@pytest.mark.needs("sshd", "root")
@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_can_t_be_reached(
    ssh_server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    change, kind, words = WAYS[way]
    (tmp_path / "config").write_text(change(ssh_server, tmp_path, ssh_server.config.read_text()))
    script = tmp_path / "bin/ssh"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp_path / "config"} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    with short_folder() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        site = Site(tmp_path, tmp_path / "root", {"backend": "slurm", "ssh": ALIAS, "root": str(tmp_path / "root")})
        error = site.refused()
    assert isinstance(error, kind) and words in str(error), str(error)
    assert runs() == [] and not site.root.exists()


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """For sockets, and for what another user has to see."""
    folder = Path(tempfile.mkdtemp(prefix="cvt-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.needs("sshd", "root")
def test_a_host_without_slurm(slurm_login: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_login.environment.items():
        monkeypatch.setenv(name, value)
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith(("sbatch", "squeue", "scontrol", "scancel", "sacct", "sinfo", "srun")):
            (programs / program.name).symlink_to(program)
    profile = slurm_login.home / ".bash_profile"
    profile.write_text(f"PATH={programs}\n")
    site = Site(tmp_path, tmp_path / "root", {"backend": "slurm", "ssh": ALIAS, "root": str(tmp_path / "root")})
    error = site.refused()
    profile.unlink()
    assert isinstance(error, SpecError) and runs() == []
    assert f"SLURM's commands are not on the PATH of a login shell on {ALIAS}; correct `ssh`" in str(error)


# -- a user who is not root, whose login shell is csh -----------------------------------------------------------------


@dataclass(frozen=True)
class Guest:
    """Folders that both may see. python: an interpreter of the cluster that can run jobs."""

    folder: Path
    server: Sshd
    python: Path

    def folder_of_theirs(self, name: str) -> Path:
        facts = pwd.getpwnam(self.server.user)
        made = self.folder / name
        made.mkdir()
        os.chown(made, facts.pw_uid, facts.pw_gid)
        return made


@pytest.fixture(scope="module")
def guest_session() -> Iterator[Guest]:
    """pytest's own folders are private, so that this cluster stands elsewhere."""
    with short_folder() as folder:
        folder.chmod(0o755)
        with (
            slurm_cluster(folder / "cluster", accounting=False) as cluster,
            sshd(folder / "sshd", login_shell="/bin/csh", variables=cluster.environment) as server,
        ):
            python = folder / "python"
            packages = sysconfig.get_path("purelib")
            python.write_text(f'#!/bin/sh\nPYTHONPATH=$PYTHONPATH:{packages} exec /usr/bin/python3 "$@"\n')
            python.chmod(0o755)
            yield Guest(folder, server, python)


@pytest.fixture
def guest(guest_session: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    for name, value in guest_session.server.environment.items():
        monkeypatch.setenv(name, value)
    return guest_session


def site_of(guest: Guest, root: Path, tmp_path: Path) -> Site:
    keys = {"backend": "slurm", "ssh": ALIAS, "root": str(root), "python": str(guest.python)}
    return Site(tmp_path, root, keys)


@pytest.mark.needs("sshd", "root")
def test_a_login_shell_that_is_csh_and_noisy(guest: Guest, tmp_path: Path) -> None:
    root = guest.folder_of_theirs("root")
    site = site_of(guest, root, tmp_path)
    refused = str(site.refused())
    assert f"there is no cvlaunch of this version on {ALIAS} ({root}" in refused and refused.endswith(SETUP)
    assert "there is no /no/python on cluster" in str(site.refused({"python": "/no/python"}))
    Path(places.library(str(root))).symlink_to(Path(__file__).parents[1])
    run = submit(
        site.write(job={"command": ["/usr/bin/python3", "-c", "import getpass; print('I am', getpass.getuser())"]}),
        target="hpc",
    )
    status = run.wait(timeout=240)
    assert status.state is State.SUCCEEDED, (status, [line.text for line in run.logs()])
    assert f"I am {guest.server.user}" in [line.text for line in run.logs()]
    run.remove(remote=True)
    assert list((root / "jobs").iterdir()) == []


@pytest.mark.needs("sshd", "root")
def test_a_folder_that_is_somebody_else_s(guest: Guest, tmp_path: Path) -> None:
    root = guest.folder / "not theirs"
    root.mkdir()
    error = site_of(guest, root, tmp_path).refused()
    assert isinstance(error, SpecError) and f"{ALIAS}: " in str(error) and "targets.hpc.root" in str(error)
    assert "Permission denied; set root or output to a folder that you may write" in str(error)
    assert runs() == [] and list(root.iterdir()) == []


@pytest.mark.needs("sshd", "root")
def test_a_disk_that_is_full(guest: Guest, tmp_path: Path) -> None:
    """The job itself no longer has room."""
    root = guest.folder / "full"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "none", root], check=True)
    try:
        Path(places.library(str(root))).symlink_to(Path(__file__).parents[1])
        error = site_of(guest, root, tmp_path).refused(job={"env": {"LONG": "x" * 90_000}})
        assert isinstance(error, CapacityError) and f"on {ALIAS} is full: make room" in str(error), str(error)
        assert [run.record.state for run in runs()] == [State.NOT_SUBMITTED]
        assert list((root / "jobs").iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
