"""Getting cvlaunch onto a cluster: our package, a Python environment, images, all below the target's `root`.

Bash on a login node does it (`scripts/`), and expects GNU's tools there and nothing else: no Python, no unzip. What is
made appears whole: folders and images by rename, an environment, which can't be moved, by a mark that is written last.
Locks are the kernel's (flock): they end with whoever held them. On a file system that has none (some mounts of Lustre)
two setups at once get in each other's way.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import platform
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

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
from launcher.image import make_wheel
from launcher.paths import trainer_folder
from launcher.quantities import format_size
from launcher.remote import Done, Host
from launcher.slurm import places
from launcher.slurm.scripts import script_text

__all__ = ["PULLS", "Pull", "SetUp", "bring_image", "set_up"]

_THERE = "cvlaunch: there"
"""What a script prints that had nothing to do."""

_PACKAGES = ("torch", "torchvision", "timm", "ultralytics")
"""What the trainer imports; jobs with a command of their own need none of it."""

_HUB = "docker.io"

_PYTHONS = ("3.11", ">=3.11")
"""The lock is made for the first, as in the trainer image; its hashes are of later ones, too."""
_OWN_PYTHONS = (">=3.11",)
"""For a lock of the user's own."""
_OTHER_PYTHON = "correct `python` in the target, or leave it out: then an environment is made"


@dataclass(frozen=True)
class Pull:
    """How an image comes to a cluster: `script` makes $made from $reference, with its downloads below $cache.

    tool: the program that must be there. ending: of the file; empty for a folder. wants: the form of $reference, with
    the fields registry, name, version (`12-slim`, `sha256:…`) and the separator at (`:`, `@`). hub: Docker Hub's name.
    """

    tool: str
    ending: str
    wants: str
    script: str
    hub: str = _HUB


_NAME = "{registry}/{name}{at}{version}"

PULLS: Mapping[str, Pull] = {
    "apptainer": Pull(
        "apptainer",
        ".sif",
        f"docker://{_NAME}",
        'export APPTAINER_CACHEDIR="${APPTAINER_CACHEDIR:-$cache/apptainer}"\n'
        'export APPTAINER_TMPDIR="${APPTAINER_TMPDIR:-$part}"\n'
        'apptainer pull "$made" "$reference"',
    ),
    "singularity": Pull(
        "singularity",
        ".sif",
        f"docker://{_NAME}",
        'export SINGULARITY_CACHEDIR="${SINGULARITY_CACHEDIR:-$cache/singularity}"\n'
        'export SINGULARITY_TMPDIR="${SINGULARITY_TMPDIR:-$part}"\n'
        'singularity pull "$made" "$reference"',
    ),
    # A digest stands behind a colon: Enroot 3 knows no @, and asks the registry for whatever follows the colon.
    "enroot": Pull(
        "enroot",
        ".sqsh",
        "docker://{registry}#{name}:{version}",
        'export ENROOT_CACHE_PATH="${ENROOT_CACHE_PATH:-$cache/enroot}"\nenroot import --output "$made" "$reference"',
        hub="registry-1.docker.io",
    ),
    "charliecloud": Pull(
        "ch-image",
        "",
        _NAME,
        'export USER="${USER:-$(id -un)}" CH_IMAGE_STORAGE="${CH_IMAGE_STORAGE:-$cache/charliecloud}"\n'
        # without the build cache, which is git's and asks who the user is
        'ch-image pull --no-cache "$reference" && ch-convert -i ch-image -o dir "$reference" "$made" || return\n'
        'ch-image delete --no-cache "$reference" || :',
        hub="registry-1.docker.io",
    ),
}
"""By the word of launcher.slurm.ways.Way.pull."""

_DISK: Mapping[str, tuple[type[CvlaunchError], str]] = {
    r"No space left on device": (CapacityError, "the disk is full: make room, or set `root` to another file system"),
    r"quota exceeded": (CapacityError, "your quota is used up: make room, or set `root` to another file system"),
    r"Permission denied|Operation not permitted": (
        AuthError,
        "no permission: set `root` to a folder that you may write",
    ),
    r"Read-only file system": (AuthError, "this file system is read-only: set `root` to another folder"),
    r"Not a directory|File exists|File name too long|cannot overwrite": (
        SpecError,
        "something else has this name: set `root` to another folder",
    ),
}
"""Words of the system → whose turn it is."""

_NETWORK = (
    r"error sending request|dns error|failed to (?:fetch|download)|connection refused|timed out|i/o timeout|"
    r"no such host|could not resolve|Name or service not known|Temporary failure|Network is unreachable|"
    r"Max retries exceeded"
)
_INSTALLING: Mapping[str, tuple[type[CvlaunchError], str]] = {
    r"Hash mismatch": (
        IntegrityError,
        "a package has other bytes than the lock says: look at the index that uv uses there",
    ),
    **_DISK,
    r"No solution found|has no wheels|no matching|not find a version": (
        SpecError,
        "the lock doesn't fit this cluster: give one of your own with --requirements",
    ),
    _NETWORK: (
        UnreachableError,
        "packages can't be fetched there: try again, or give that machine an index (UV_DEFAULT_INDEX) or a proxy "
        "(HTTPS_PROXY) in its ~/.bash_profile",
    ),
}
_PULLING: Mapping[str, tuple[type[CvlaunchError], str]] = {
    r"unauthorized or not in registry": (
        SpecError,
        "the registry has no such image, or shows it only to those that it knows: correct the name, or log in there",
    ),
    r"unauthorized|authentication required|denied: |\b40[13]\b": (
        AuthError,
        "the registry wants a login: log in there with the same tool, then try again",
    ),
    r"manifest unknown|not found|\b404\b|name unknown": (SpecError, "the registry has no such image"),
    **_DISK,
    _NETWORK: (
        UnreachableError,
        "the registry can't be reached from there: try again, or look at that machine's proxy",
    ),
}

_LOOK = f"""\
import sys
print("version %d.%d.%d" % sys.version_info[:3])
if sys.version_info < (3, 11):
    sys.exit(0)
import importlib.util, os
import launcher.contract
print("contract %d" % launcher.contract.CONTRACT)
print("home " + os.path.realpath(sys.executable))
print("missing " + " ".join(name for name in {_PACKAGES!r} if importlib.util.find_spec(name) is None))
"""
"""Python 2 must be able to read it, to say that it is too old."""


@dataclass(frozen=True)
class SetUp:
    """What a target needs is there. done: what this call did, in words; empty if all was there already.

    library: the link to our package. version: of `python`, None without one. missing: packages that the trainer needs.
    """

    root: str
    library: str
    python: str | None
    version: str | None
    contract: int
    done: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class _There:
    """uv: a path; empty if there is none. files: how many the folder of our package holds."""

    system: str
    machine: str
    uv: str
    files: int
    link: str


@dataclass(frozen=True)
class _Python:
    """home: the interpreter's own path, behind all links."""

    version: str
    home: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _Library:
    """Our package as it is sent. archive: .tar.gz."""

    name: str
    hash: str
    files: int
    archive: bytes

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.hash}"


def set_up(
    host: Host,
    root: str,
    *,
    python: str | None = None,
    requirements: Path | None = None,
    environment: bool = True,
    say: Callable[[str], None],
    setup: Sequence[str] = (),
) -> SetUp:
    """Brings everything that jobs on a cluster import, and checks that it works. May be repeated; does what is missing.

    python: an interpreter of the user's own there; None makes an environment from `requirements`, or from the trainer
    image's lock. environment: False makes none, for jobs that run in images. setup: lines of bash that come before jobs
    there, such as `module load`. say: gets lines of progress.
    """
    library = _library(places.library(root))
    there = _prepare(host, root, library)
    done = [*_bring_library(host, root, library, there=there)]
    link = places.library(root)
    if python is None and not environment:
        return SetUp(root, link, None, None, CONTRACT, tuple(done))
    env = places.environment(root, requirements)
    made = python is None and _make_environment(host, root, env, requirements=requirements, there=there, say=say)
    python = python or places.python_of(env)
    found = _check_python(host, root, python, setup)
    if made:
        shared = "" if found.home.startswith(f"{root}/") else ", which compute nodes must have, too"
        done.append(f"made {env} with Python {found.version} ({found.home}{shared})")
    return SetUp(root, link, python, found.version, CONTRACT, tuple(done), found.missing)


def _prepare(host: Host, root: str, library: _Library) -> _There:
    if not root.startswith("/"):
        raise SpecError(f"{root!r} is no absolute path of the cluster", key="root")
    done = host.run(script_text("setup_prepare"), root, f"{root}/{library.folder}", places.library(root))
    _check(done, host, root, _DISK)
    facts = _facts(done)
    return _There(facts["system"], facts["machine"], facts["uv"], int(facts["files"]), facts["link"])


# ---- our package


def _library(link: str) -> _Library:
    with tempfile.TemporaryDirectory(prefix="cvlaunch-") as scratch:
        wheel = make_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as content:
            files = {info.filename: content.read(info) for info in content.infolist()}
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]
    return _Library(link.rpartition("/")[2], digest, len(files), _archive(files))


def _archive(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _bring_library(host: Host, root: str, library: _Library, *, there: _There) -> Sequence[str]:
    if there.files != library.files:
        words = (root, library.name, library.hash, str(library.files))
        _check(host.run(script_text("lock", "setup_library"), *words, stdin=library.archive), host, root, _DISK)
        return [f"sent cvlaunch {__version__} ({format_size(len(library.archive))}) to {root}/{library.folder}"]
    if there.link != library.folder:
        _check(host.run(script_text("setup_link"), root, library.name, library.hash), host, root, _DISK)
        return [f"{root}/{library.name} is {library.folder} again"]
    return []


# ---- the environment


def _make_environment(
    host: Host,
    root: str,
    env: str,
    *,
    requirements: Path | None,
    there: _There,
    say: Callable[[str], None],
) -> bool:
    """False if it is there already, all of it."""
    uv = there.uv or _bring_uv(host, root, there, say=say)
    lock = requirements.read_bytes() if requirements else _own_lock("torch", "packages")
    pythons = _OWN_PYTHONS if requirements else _PYTHONS
    done, made = _stream(host, script_text("lock", "setup_environment"), root, env, uv, *pythons, stdin=lock, say=say)
    _check(done, host, env, _INSTALLING)
    return made


def _own_lock(*parts: str) -> bytes:
    """The trainer image's lock, as far as it is of these parts; the Dockerfile cuts it in the same way."""
    lock = (trainer_folder() / "requirements.lock").read_text()
    found = dict(re.findall(r"^# --- (\w+)\n(.*?)(?=^# --- |\Z)", lock, re.MULTILINE | re.DOTALL))
    return "".join(found[part] for part in parts).encode()


def _bring_uv(host: Host, root: str, there: _There, *, say: Callable[[str], None]) -> str:
    """Its path there: our own binary where it starts, else one that Python's pip brings."""
    own = _own_uv(there)
    if own is not None:
        packed = gzip.compress(own.read_bytes(), compresslevel=4, mtime=0)
        say(f"sending uv ({format_size(len(packed))})")
        if host.run(script_text("setup_uv_sent"), root, stdin=packed).code == 0:
            return f"{root}/bin/uv"
    say("fetching uv with pip")
    done = host.run(script_text("setup_uv_pip"), root, stdin=_own_lock("tools"))
    if done.code:
        raise UnsupportedError(
            f"{host.name} has no uv, and none could be brought ({_last(done.err)}): put one at {root}/bin/uv, or set "
            "`python` to an interpreter there that has the trainer's packages"
        )
    return f"{root}/bin/uv"


def _own_uv(there: _There) -> Path | None:
    """This machine's, if it can run there."""
    if (platform.system(), platform.machine()) != (there.system, there.machine):
        return None
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    return Path(found) if found else None


def _check_python(host: Host, root: str, python: str, setup: Sequence[str]) -> _Python:
    """SpecError if it doesn't start, is too old or imports another cvlaunch."""
    script = "\n".join([*_before(setup), script_text("setup_python")])
    done = host.run(script, python, places.library(root), root, _LOOK)
    facts = _facts(done)
    thing = f"{python} on {host.name}"
    if "version" not in facts:
        raise SpecError(f"{thing} does not start: {_last(done.err)}; {_OTHER_PYTHON}", key="python")
    if "contract" not in facts and not done.code:
        raise SpecError(f"{thing} is Python {facts['version']}, jobs need 3.11; {_OTHER_PYTHON}", key="python")
    if "contract" not in facts:
        raise SpecError(f"{thing} can't import cvlaunch: {_last(done.err)}", key="python")
    if facts["contract"] != str(CONTRACT):
        raise SpecError(
            f"{thing} imports cvlaunch of contract {facts['contract']}, this one speaks {CONTRACT}: uninstall that",
            key="python",
        )
    return _Python(facts["version"], facts["home"], tuple(facts["missing"].split()))


# ---- images


def bring_image(
    host: Host,
    root: str,
    *,
    reference: str,
    digest: str | None,
    way: str,
    say: Callable[[str], None],
    setup: Sequence[str] = (),
) -> str:
    """The file or folder there that holds an image, pulled and converted if it isn't there yet; one pull at a time.

    digest: of the manifest. way: a key of PULLS; empty where each node pulls by itself, and then it is the reference,
    by digest where that is known.
    """
    if way and way not in PULLS:
        raise UnsupportedError(f"how images are brought for {way!r} is not known; known are {', '.join(PULLS)}")
    registry, name, version = _parts(reference)
    version = digest or version
    fields = {"registry": registry, "name": name, "version": version, "at": "@" if ":" in version else ":"}
    if not way:
        return _NAME.format_map(fields)
    pull = PULLS[way]
    fields["registry"] = pull.hub if registry == _HUB else registry
    file = places.image(root, reference, digest=digest, ending=pull.ending)
    script = "\n".join([*_before(setup), script_text("lock", "setup_image")])
    done, _ = _stream(
        host, script, root, file, pull.wants.format_map(fields), pull.tool, pull.ending, pull.script, say=say
    )
    if done.code == 127 and not done.err.strip():
        raise UnsupportedError(
            f"{host.name} has no {pull.tool}: write the `module load` that brings it into the target's `setup`, or "
            "choose another `container_command`"
        )
    _check(done, host, reference, _PULLING)
    return file


def _parts(reference: str) -> tuple[str, str, str]:
    """(registry, name, tag or digest), with what Docker's short names leave out."""
    name, _, digest = reference.partition("@")
    first, slash, rest = name.partition("/")
    if slash and first == "localhost":
        raise SpecError(
            f"{reference} is an image of this machine, which no cluster can pull: push it (`registry` in the target, "
            "or cvlaunch image push)",
            key="image",
        )
    if not slash or not set(first) & set(".:"):
        first, rest = _HUB, name if slash else f"library/{name}"
    rest, _, tag = rest.partition(":")
    return first, rest, digest or tag or "latest"


# ---- scripts, and what they said


def _before(setup: Sequence[str]) -> Iterator[str]:
    """As in a job: a line that fails ends it."""
    for line in setup:
        words = shlex.quote(f"this line of the target's setup failed: {line}")
        yield f"eval {shlex.quote(line)} || {{ echo {words} >&2; exit 64; }}"


def _stream(
    host: Host, script: str, *arguments: str, stdin: bytes = b"", say: Callable[[str], None]
) -> tuple[Done, bool]:
    """Runs a script whose progress comes line by line; (what it left, those lines as `err`; whether it had work)."""
    lines = _Lines(say)
    done = host.run(f"exec 2>&1\n{script}", *arguments, stdin=stdin, to=cast(BinaryIO, lines))
    return replace(done, err="\n".join(lines.all)), not lines.there


class _Lines:
    """Written to in blocks, tells lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._rest = say, b""
        self.all: list[str] = []
        self.there = False

    def write(self, block: bytes) -> None:
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace").rstrip())

    def _take(self, line: str) -> None:
        if line == _THERE:
            self.there = True
        elif line:
            self.all.append(line)
            self._say(line)


def _check(done: Done, host: Host, thing: str, known: Mapping[str, tuple[type[CvlaunchError], str]]) -> None:
    """Raises what the words of a failed script mean."""
    if done.code == 0:
        return
    for pattern, (kind, advice) in known.items():
        if found := re.search(f"^.*(?:{pattern}).*$", done.err, re.MULTILINE | re.IGNORECASE):
            raise kind(f"{thing} on {host.name}: {advice} ({found[0].strip()})")
    raise SpecError(f"{thing} on {host.name}: exit code {done.code}: {_last(done.err) or 'nothing was said'}")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])


def _facts(done: Done) -> dict[str, str]:
    lines = (line.partition(" ") for line in done.out.decode(errors="replace").splitlines())
    return {key: value for key, _, value in lines}
