"""Setting up a cluster: this machine as the login node, the real uv and ch-image; apptainer and enroot by name only."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher._version import __version__
from launcher.contract import CONTRACT
from launcher.errors import (
    AuthError,
    CapacityError,
    CvlaunchError,
    IntegrityError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from launcher.process import descendants
from launcher.remote import Host
from launcher.slurm import places
from launcher.slurm.setup import SetUp, bring_image, set_up
from tests.services.podman import podman

HASHES = (
    "4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274",
    "ff70335d468e7eb6ec65b95b99d3a2836546063f63acc5171de367e834932a81",
)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HERE = Host()

pytestmark = pytest.mark.needs("linux")


def quiet(line: str) -> None:
    pass


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """One small package, as `uv pip compile --generate-hashes` writes it."""
    return write_lock(tmp_path / "tiny.lock", HASHES)


def write_lock(path: Path, hashes: tuple[str, ...]) -> Path:
    path.write_text("six==1.17.0 \\\n" + " \\\n".join(f"    --hash=sha256:{value}" for value in hashes) + "\n")
    return path


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"{tmp_path}/a cluster's root"


def library_only(root: str, say: Callable[[str], None] = quiet) -> SetUp:
    return set_up(HERE, root, environment=False, say=say)


def tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of this name, in front of all others."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{textwrap.dedent(script)}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return path


# -- our package


def test_the_package_stands_whole_under_a_name_of_its_content(root: str) -> None:
    done = library_only(root)
    whole = Path(done.library).resolve()
    assert whole.name.startswith(f"cvlaunch-{__version__}-")
    assert (done.python, len(done.done)) == (None, 1)
    assert sorted(path.name for path in Path(root).iterdir() if path.name[0] != ".") == sorted(
        ["images", "jobs", "runs", f"cvlaunch-{__version__}", whole.name]
    )
    script = "import launcher.runner.main, launcher.contract; print(launcher.contract.__file__)"
    said = subprocess.run(
        ["/usr/bin/python3", "-c", script],
        env={"PYTHONPATH": done.library},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == f"{done.library}/launcher/contract.py"


def test_what_is_there_is_not_sent_again(root: str) -> None:
    first = library_only(root)
    made = Path(first.library).resolve().stat()
    assert library_only(root).done == ()
    after = Path(first.library).resolve().stat()
    assert (after.st_ino, after.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_another_content_gets_a_folder_of_its_own_and_running_jobs_keep_theirs(root: str) -> None:
    link = Path(library_only(root).library)
    ours = link.resolve()
    older = link.with_name(f"{link.name}-0123456789ab")
    ours.rename(older)
    link.unlink()
    link.symlink_to(older.name)
    assert len(library_only(root).done) == 1
    assert link.resolve() == ours
    assert (older / "launcher/contract.py").exists()
    link.unlink()
    link.symlink_to(older.name)
    assert library_only(root).done == (f"{link} is {ours.name} again",)
    assert link.resolve() == ours


def test_files_that_a_purge_took_come_back(root: str) -> None:
    module = Path(library_only(root).library).resolve() / "launcher/runner/main.py"
    module.unlink()
    (module.parent / "__pycache__").mkdir()
    (module.parent / "__pycache__/left.pyc").touch()
    assert len(library_only(root).done) == 1
    assert module.exists()


# -- the environment


def test_an_environment_is_made_once_from_a_lock(root: str, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", SYSTEM_PATH)  # no uv: ours is sent
    said: list[str] = []
    done = set_up(HERE, root, requirements=lock, say=said.append)
    assert done.python == f"{root}/env-{places.lock_hash(lock)}/bin/python"
    assert (done.contract, done.missing) == (CONTRACT, ("torch", "torchvision", "timm", "ultralytics"))
    assert said[0].startswith("sending uv")
    assert any("six==1.17.0" in line for line in said)
    assert any("which compute nodes must have, too" in line for line in done.done)
    subprocess.run([done.python, "-c", "import six"], check=True)
    assert sorted(path.name for path in Path(root, ".cache").iterdir()) == ["uv"]
    said.clear()
    again = set_up(HERE, root, requirements=lock, say=said.append)
    assert (again.done, said, again.python) == ((), [], done.python)


def test_uv_comes_by_pip_where_ours_can_not_start(
    root: str, lock: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", SYSTEM_PATH)
    tool(tmp_path / "bin", "uname", 'case $1 in -m) echo riscv64;; *) exec /usr/bin/uname "$@";; esac', monkeypatch)
    if subprocess.run(["python3", "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        (tmp_path / "bin/python3").symlink_to(sys._base_executable)  # Debian's has no pip
    said: list[str] = []
    done = set_up(HERE, root, requirements=lock, say=said.append)
    assert said[0] == "fetching uv with pip"
    assert Path(root, "bin/uv").is_file()
    subprocess.run([str(done.python), "-c", "import six"], check=True)


def test_no_uv_and_no_way_to_get_one(root: str, lock: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", SYSTEM_PATH)
    tool(tmp_path / "bin", "uname", "echo riscv64", monkeypatch)
    tool(tmp_path / "bin", "python3", "echo 'python3: command not found' >&2; exit 127", monkeypatch)
    with pytest.raises(
        UnsupportedError, match=r"this machine has no uv, and none could be brought \(.*command not found"
    ):
        set_up(HERE, root, requirements=lock, say=quiet)


BAD_LOCKS: dict[str, tuple[str, type[CvlaunchError], str]] = {
    "other bytes than promised": (
        f"six==1.17.0 --hash=sha256:{'0' * 64}\n", IntegrityError, "a package has other bytes than the lock says"
    ),
    "no such version": (
        f"six==999 --hash=sha256:{'0' * 64}\n", SpecError, "the lock doesn't fit this cluster"
    ),
    "no hashes": ("six==1.17.0\n", SpecError, "hash"),
}  # fmt: skip


@pytest.mark.parametrize("text, error, message", BAD_LOCKS.values(), ids=BAD_LOCKS)
def test_a_lock_that_can_not_be_installed(
    root: str, tmp_path: Path, text: str, error: type[CvlaunchError], message: str
) -> None:
    bad = tmp_path / "bad.lock"
    bad.write_text(text)
    with pytest.raises(error, match=message) as raised:
        set_up(HERE, root, requirements=bad, say=quiet)
    assert type(raised.value) is error
    assert not Path(places.environment(root, bad), "complete").exists()


def test_an_index_that_does_not_answer(root: str, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(UnreachableError, match="packages can't be fetched there: try again, or give that machine"):
        set_up(HERE, root, requirements=lock, say=quiet)


def test_two_setups_at_once_make_one_environment(root: str, lock: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: set_up(HERE, root, requirements=lock, say=quiet), range(2)))
    assert sum("made" in line for done in both for line in done.done) == 1
    assert both[0].python == both[1].python
    assert [path.name for path in Path(root).iterdir() if path.name.startswith(f".cvlaunch-{__version__}.")] == [
        f".cvlaunch-{__version__}.lock"
    ]


def test_a_setup_that_was_killed_is_started_anew_and_a_live_one_is_waited_for(
    root: str, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = Path(sys.executable).with_name("uv")
    started, go = tmp_path / "started", tmp_path / "go"
    tool(
        tmp_path / "bin",
        "uv",
        f"""\
        if [ "$1" = pip ] && [ ! -e '{go}' ]; then
            touch '{started}'
            sleep 600
        fi
        exec '{uv}' "$@"
        """,
        monkeypatch,
    )
    script = (
        f"from tests.test_slurm_setup import *\nset_up(HERE, {root!r}, requirements=Path({str(lock)!r}), say=print)"
    )
    victim = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    while not started.exists():
        assert victim.poll() is None
        time.sleep(0.02)
    below = [process.pid for process in descendants(victim.pid)]
    go.touch()
    victim.kill()
    victim.wait()
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(set_up, HERE, root, requirements=lock, say=said.append)
        while not any("somebody else is at work" in line for line in said):
            assert not second.done(), "uv of the first still runs"
            time.sleep(0.02)
        for pid in below:
            kill(pid)
        done = second.result(timeout=300)
    assert any("made" in line for line in done.done)
    subprocess.run([str(done.python), "-c", "import six"], check=True)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)


# -- a Python of the user's own


def test_an_own_python_is_checked_and_gets_no_environment(root: str) -> None:
    done = set_up(HERE, root, python=sys.executable, say=quiet)
    assert (done.python, done.version, done.missing) == (sys.executable, platform.python_version(), ())
    bare = set_up(HERE, root, python="/usr/bin/python3", say=quiet)
    assert bare.missing == ("torch", "torchvision", "timm", "ultralytics")
    assert not list(Path(root).glob("env-*"))


def test_lines_of_the_target_come_before_its_python(root: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"does not start: .*this line of the target's setup failed: false; correct"):
        set_up(HERE, root, python=sys.executable, setup=("false",), say=quiet)
    lines = (f"ln -s {sys.executable} '{tmp_path}/python'",)
    assert set_up(HERE, root, python=f"{tmp_path}/python", setup=lines, say=quiet).version == platform.python_version()


BAD_PYTHONS = {
    "not there": (None, "does not start: .*No such file"),
    "does not start": (
        "#!/bin/sh\necho 'libpython3.11.so.1.0: cannot open shared object file' >&2; exit 127",
        "libpython",
    ),
    "too old": ("#!/bin/sh\necho version 3.6.8", "is Python 3.6.8, jobs need 3.11; correct `python` in the target"),
    "without our package": (
        "#!/bin/sh\necho version 3.11.2; echo \"No module named 'launcher'\" >&2; exit 1",
        "can't import cvlaunch: No module named 'launcher'",
    ),
    "with another of another contract": (
        "#!/bin/sh\nprintf 'version 3.11.2\\ncontract 0\\nhome /x\\nmissing \\n'",
        f"imports cvlaunch of contract 0, this one speaks {CONTRACT}: uninstall that",
    ),
}


@pytest.mark.parametrize("script, message", BAD_PYTHONS.values(), ids=BAD_PYTHONS)
def test_a_python_that_can_not_run_jobs(root: str, tmp_path: Path, script: str | None, message: str) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(script)
        python.chmod(0o755)
    with pytest.raises(SpecError, match=message) as raised:
        set_up(HERE, root, python=str(python), say=quiet)
    assert raised.value.key == "python"


# -- the root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MB, all of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.needs("root")
@pytest.mark.parametrize("free", [0, 200_000], ids=["full", "too small for the package"])
def test_a_full_disk_is_said_and_nothing_half_stays(small_disk: Path, free: int) -> None:
    (small_disk / "others").write_bytes(b"x" * (1_000_000 - free))
    with pytest.raises(CapacityError, match=f"{small_disk}/root on this machine: the disk is full: make room"):
        library_only(f"{small_disk}/root")
    assert not list((small_disk / "root").glob("cvlaunch-*"))
    assert not list((small_disk / "root").glob(f".cvlaunch-{__version__}.*[!k]"))
    (small_disk / "others").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert len(library_only(f"{small_disk}/root").done) == 1


@pytest.mark.needs("root")
def test_a_read_only_file_system(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(AuthError, match="this file system is read-only: set `root` to another folder"):
        library_only(f"{small_disk}/root")


@pytest.mark.needs("root", "sshd")
def test_a_root_of_somebody_else(csh_host: Host, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(AuthError, match=f"{tmp_path}/root on cluster: no permission: set `root` to a folder"):
        set_up(csh_host, f"{tmp_path}/root", environment=False, say=quiet)


def test_roots_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^root: 'scratch/me' is no absolute path of the cluster"):
        library_only("scratch/me")
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="something else has this name"):
        library_only(f"{tmp_path}/file/root")


@pytest.mark.needs("root", "sshd")
def test_behind_ssh_and_a_login_shell_that_is_csh(csh_host: Host, lock: Path) -> None:
    """The login files print noise, and another user is in the way of nothing."""
    home = csh_host.run("printf %s ~").out.decode()
    trust = "\n".join(
        f"export {name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "PIP_CERT") if name in os.environ
    )
    csh_host.run('printf "%s\\n" "$1" >> ~/.bash_profile', trust)
    root = f"{home}/a root"
    said: list[str] = []
    done = set_up(csh_host, root, requirements=lock, say=said.append)
    assert any("six==1.17.0" in line for line in said)
    assert csh_host.run('"$1" -c "import six"', str(done.python)).code == 0
    assert set_up(csh_host, root, requirements=lock, say=quiet).done == ()


# -- images

DIGEST = f"sha256:{'ab' * 32}"
PULLS = {
    "apptainer": (
        "apptainer", 'touch "$2"', ".sif",
        "apptainer pull MADE docker://registry.example.com:5000/team/trainer@{digest}",
        {"APPTAINER_CACHEDIR": "ROOT/.cache/apptainer"},
    ),
    "singularity": (
        "singularity", 'touch "$2"', ".sif",
        "singularity pull MADE docker://registry.example.com:5000/team/trainer@{digest}",
        {"SINGULARITY_CACHEDIR": "ROOT/.cache/singularity"},
    ),
    "enroot": (
        "enroot", 'touch "$3"', ".sqsh",
        "enroot import --output MADE docker://registry.example.com:5000#team/trainer:{digest}",
        {"ENROOT_CACHE_PATH": "ROOT/.cache/enroot"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", PULLS)
def test_an_image_is_pulled_once_by_digest(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    name, act, ending, line, variables = PULLS[way]
    calls = tmp_path / "calls"
    tool(tmp_path / "bin", name, f"echo {name} \"$*\" >> '{calls}'; env -0 > '{calls}.env'; {act}", monkeypatch)
    library_only(root)

    def bring() -> str:
        return bring_image(
            HERE, root, reference="registry.example.com:5000/team/trainer:1", digest=DIGEST, way=way, say=quiet
        )

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: bring(), range(2))
    assert first == second == f"{root}/images/trainer-1-{'ab' * 8}{ending}"
    part = f"{root}/images/.part-{Path(first).name}"
    assert calls.read_text() == f"{line.format(digest=DIGEST).replace('MADE', f'{part}/made{ending}')}\n"
    environment = dict(pair.split("=", 1) for pair in Path(f"{calls}.env").read_text().split("\0") if pair)
    assert {name: environment[name] for name in variables} == {
        name: value.replace("ROOT", root) for name, value in variables.items()
    }
    assert sorted(path.name for path in Path(root, "images").iterdir()) == sorted(
        [Path(first).name, f"{Path(first).name}.lock"]
    )


REFERENCES = {
    "debian:12": "docker://registry-1.docker.io#library/debian:12",
    "team/trainer": "docker://registry-1.docker.io#team/trainer:latest",
    "docker.io/team/trainer:2": "docker://registry-1.docker.io#team/trainer:2",
    f"ghcr.io/team/trainer:1@{DIGEST}": f"docker://ghcr.io#team/trainer:{DIGEST}",
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_short_names_are_docker_hubs(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    tool(tmp_path / "bin", "enroot", f'echo "$4" > \'{tmp_path}/called\'; touch "$3"', monkeypatch)
    library_only(root)
    bring_image(HERE, root, reference=reference, digest=None, way="enroot", say=quiet)
    assert (tmp_path / "called").read_text().strip() == REFERENCES[reference]


FAILURES: dict[str, tuple[str, type[CvlaunchError], str]] = {
    "no login": ("FATAL: unauthorized: authentication required", AuthError, "the registry wants a login"),
    "no such image": ("manifest unknown: manifest unknown", SpecError, "the registry has no such image"),
    "no network": (
        "dial tcp: lookup ghcr.io: no such host",
        UnreachableError,
        "the registry can't be reached from there",
    ),
    "no room": ("write /x/made.sif: No space left on device", CapacityError, "the disk is full"),
    "anything else": ("something odd", SpecError, "exit code 3: something odd"),
}


@pytest.mark.parametrize("said, error, message", FAILURES.values(), ids=FAILURES)
def test_a_pull_that_fails_leaves_nothing(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, error: type[CvlaunchError], message: str
) -> None:
    tool(tmp_path / "bin", "apptainer", f"echo half > \"$2\"; echo '{said}' >&2; exit 3", monkeypatch)
    library_only(root)
    with pytest.raises(error, match=message) as raised:
        bring_image(HERE, root, reference="ghcr.io/team/trainer:1", digest=None, way="apptainer", say=quiet)
    assert type(raised.value) is error
    assert [path.suffix for path in Path(root, "images").iterdir()] == [".lock"]


def test_images_that_can_not_come(root: str) -> None:
    library_only(root)
    with pytest.raises(UnsupportedError, match="this machine has no apptainer: write the `module load` that brings it"):
        bring_image(HERE, root, reference="ghcr.io/a/b", digest=None, way="apptainer", say=quiet)
    with pytest.raises(SpecError, match="localhost/trainer:1 is an image of this machine, which no cluster can pull"):
        bring_image(HERE, root, reference="localhost/trainer:1", digest=None, way="apptainer", say=quiet)
    with pytest.raises(UnsupportedError, match="how images are brought for 'shifter' is not known"):
        bring_image(HERE, root, reference="ghcr.io/a/b", digest=None, way="shifter", say=quiet)
    assert (
        bring_image(HERE, root, reference="ghcr.io/a/b:1", digest=DIGEST, way="", say=quiet) == f"ghcr.io/a/b@{DIGEST}"
    )


@pytest.fixture
def tls_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """host:port of a registry with a certificate, as ch-image wants it, which trusts it here."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-nodes", "-keyout", key, "-out", certificate]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", *subject, *files],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": "127.0.0.1:0", "tls": {"certificate": str(certificate), "key": str(key)}},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(settings))
    log = tmp_path / "registry.log"
    with log.open("wb") as out:
        server = subprocess.Popen(["docker-registry", "serve", tmp_path / "registry.yml"], stdout=out, stderr=out)
    try:
        while not (found := re.search(r"listening on (127\.0\.0\.1:\d+)\D", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.02)
        yield found[1]
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.needs("podman", "docker-registry", "charliecloud")
@pytest.mark.usefixtures("images_alone")
def test_charliecloud_pulls_an_image_into_a_folder(
    root: str, tmp_path: Path, tls_registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", SYSTEM_PATH)  # ch-image is a program of Debian's Python
    monkeypatch.delenv("USER", raising=False)
    (tmp_path / "content/etc").mkdir(parents=True)
    (tmp_path / "content/etc/made").write_text("by us\n")
    subprocess.run(["tar", "-cf", tmp_path / "content.tar", "-C", tmp_path / "content", "."], check=True)
    reference = f"{tls_registry}/team/tiny:1"
    podman("import", "--quiet", tmp_path / "content.tar", reference)
    try:
        podman("push", "--quiet", "--tls-verify=false", "--digestfile", tmp_path / "digest", reference)
    finally:
        podman("rmi", "--force", reference)
    digest = (tmp_path / "digest").read_text()
    library_only(root)
    for known in (None, digest):
        folder = bring_image(HERE, root, reference=reference, digest=known, way="charliecloud", say=quiet)
        assert Path(folder, "etc/made").read_text() == "by us\n"
        assert bring_image(HERE, root, reference=reference, digest=known, way="charliecloud", say=quiet) == folder
    assert Path(root, ".cache/charliecloud").is_dir()
    with pytest.raises(SpecError, match="the registry has no such image"):
        bring_image(HERE, root, reference=f"{tls_registry}/team/none:1", digest=None, way="charliecloud", say=quiet)
