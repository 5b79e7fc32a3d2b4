"""The user's code as one archive, byte for byte the same on every machine for the same content.

In a git repository: the tracked files and the untracked ones that git doesn't ignore. Elsewhere: all files, less what
tools leave behind. From both, `.cvlaunchignore` at the root takes files away; it is written like a .gitignore.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from launcher.contract import Code
from launcher.errors import SpecError
from launcher.quantities import format_size

__all__ = ["IGNORE_FILE", "MAX_BYTES", "build_archive"]

IGNORE_FILE = ".cvlaunchignore"
MAX_BYTES = 50_000_000
"""Of all files together: code, not data."""

_KEY = "code.root"
_LISTED = 10
_LEFTOVERS = (
    ".cache", ".git", ".hg", ".ipynb_checkpoints", ".mypy_cache", ".nox", ".pytest_cache", ".ruff_cache", ".svn",
    ".tox", ".venv", "__pycache__", "node_modules", "venv",
)  # fmt: skip
"""Folders that no one means by `all files`; in a repository git knows better."""

_KEY_NAMES = (
    "*.key", "*.p12", "*.pem", "*.pfx", ".env", ".env.*", ".netrc", ".pypirc", "credentials*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*", "id_rsa*",
)  # fmt: skip
_NO_KEY_NAMES = ("*.md", "*.py", "*.pyi", "*.rst", ".env.example", ".env.sample", ".env.template")
"""Source and documentation are judged by their content."""
_PRIVATE_KEY = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    rb"""(?:\s|\\[nr]|["'+])+(?:[A-Za-z0-9+/]{16}|[A-Z][A-Za-z-]+: )"""
)
"""With the first of its content: a program that looks for keys names the heading alone."""
_SERVICE_ACCOUNT = re.compile(rb'"type"\s*:\s*"service_account"')
_SERVICE_ACCOUNT_KEY = re.compile(rb'"private_key"\s*:\s*"[^"]')
_AWS_ID = re.compile(rb"\b(?:AKIA|ASIA)(?![A-Z0-9]{9}EXAMPLE\b)[A-Z0-9]{16}\b")
"""https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html; its examples end with EXAMPLE."""
_AWS_SECRET = re.compile(
    rb"(?<![A-Za-z0-9/+=])(?=\S{0,39}[a-z])(?=\S{0,39}[A-Z])(?=\S{0,39}[0-9])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
)


@dataclass(frozen=True)
class _Entry:
    """name: relative to the root, with `/`. link: where a symbolic link points, else None."""

    name: str
    path: Path
    size: int
    mode: int
    link: str | None


def build_archive(root: Path, to: Path, *, requirements: str | None) -> Code:
    """Writes a .tar.gz of the code below `root`. requirements: a file that must be in it, relative to `root`.

    SpecError, with the files' names, for: no files, over `MAX_BYTES`, what looks like a key, links that lead outside.
    """
    root = _checked_root(root)
    repository = _in_repository(root)
    names = _names(root, repository) - {to.resolve().relative_to(root).as_posix() if _is_below(to, root) else ""}
    entries = [entry for name in sorted(names, key=os.fsencode) if (entry := _entry(root, name))]
    _check(root, entries, requirements)
    archive = _gzip(_tar(entries))
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(archive)
    commit = _commit(root) if repository else None
    dirty = bool(repository and _git(root, "status", "--porcelain", "--", "."))
    return Code(hashlib.sha256(archive).hexdigest(), len(archive), requirements, commit, dirty)


def _checked_root(root: Path) -> Path:
    if not root.exists():
        raise SpecError(f"no folder {root}", key=_KEY)
    if not root.is_dir():
        raise SpecError(f"{root} is a file; give the folder that holds the code", key=_KEY)
    return root.resolve()


def _is_below(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root)


# ---- which files


def _names(root: Path, repository: bool) -> set[str]:
    names = set(_of_repository(root)) if repository else set(_of_folder(root))
    return names - _ignored(root, names)


def _in_repository(root: Path) -> bool:
    """By the files alone: git also fails in a repository that it does not trust, and then everything would be taken."""
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def _of_repository(root: Path) -> Iterator[str]:
    """Names relative to `root`, repositories inside it (which git names as folders) included."""
    for name in _split(_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")):
        path = root / name
        if path.is_dir() and not path.is_symlink():
            inside = _of_repository(path) if (path / ".git").exists() else ()
            yield from (f"{name.rstrip('/')}/{below}" for below in inside)
        else:
            yield name


def _of_folder(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise SpecError(f"{error.filename} can't be read: {error.strerror}", key=_KEY) from error

    for parent, folders, files in os.walk(root, onerror=fail):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = [name for name in folders if name not in links and name not in _LEFTOVERS]
        yield from (Path(parent, name).relative_to(root).as_posix() for name in (*files, *links))


def _ignored(root: Path, names: set[str]) -> set[str]:
    """Those that `.cvlaunchignore` takes away.

    git itself matches, in an empty repository made for this, so that neither a .gitignore has a say nor tracked files
    escape, and a folder outside git is treated alike.
    """
    rules = root / IGNORE_FILE
    if not rules.is_file() or not names:
        return set()
    with tempfile.TemporaryDirectory(prefix="cvlaunch-") as scratch:
        empty = Path(scratch)
        _git(empty, "init", "--quiet", "--template=")
        (empty / ".git/info").mkdir(exist_ok=True)
        (empty / ".git/info/exclude").write_bytes(rules.read_bytes())
        _git(empty, "config", "core.excludesFile", os.devnull)
        _git(empty, "config", "core.ignoreCase", "false")
        asked = b"".join(b"./" + os.fsencode(name) + b"\0" for name in sorted(names))  # ./ as :(top)x means something
        found = _split(_git(empty, "check-ignore", "--no-index", "-z", "--stdin", stdin=asked, no=1))
        return {name.removeprefix("./") for name in found}


def _split(output: bytes) -> list[str]:
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _commit(root: Path) -> str | None:
    """None before the first commit."""
    return _git(root, "rev-parse", "--verify", "--quiet", "HEAD", no=1).decode().strip() or None


def _git(folder: Path, *arguments: str, stdin: bytes = b"", no: int = 0) -> bytes:
    """no: an exit code that means `nothing found`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            input=stdin,
            capture_output=True,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        raise SpecError(f"{folder} needs git to tell which files are code; install git", key=_KEY) from None
    if done.returncode not in (0, no):
        problem = done.stderr.decode(errors="replace").strip()
        raise SpecError(f"git {arguments[0]} failed in {folder}: {problem}", key=_KEY)
    return done.stdout


def _entry(root: Path, name: str) -> _Entry | None:
    """None for what is no file: tracked but deleted, or below a link by now; sockets, pipes, devices."""
    path = root / name
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if path.parent.resolve() != path.parent:
        return None
    if stat.S_ISLNK(facts.st_mode):
        return _Entry(name, path, 0, 0o777, os.readlink(path))  # noqa: PTH115 Path.readlink normalises
    if not stat.S_ISREG(facts.st_mode):
        return None
    return _Entry(name, path, facts.st_size, 0o755 if facts.st_mode & stat.S_IXUSR else 0o644, None)


# ---- what is refused


def _check(root: Path, entries: list[_Entry], requirements: str | None) -> None:
    if not entries:
        raise SpecError(f"{root} holds no files, or all are ignored by git or {IGNORE_FILE}", key=_KEY)
    if requirements is not None and Path(requirements).as_posix() not in {e.name for e in entries if e.link is None}:
        missing = "is ignored by git or " + IGNORE_FILE if (root / requirements).is_file() else "does not exist"
        raise SpecError(f"{root / requirements} {missing}; it must be a file of the code", key="code.requirements")
    astray = [f"{e.name} -> {e.link}" for e in entries if e.link is not None and _leads_outside(root, e)]
    if astray:
        _refuse(f"{root} holds links that lead outside of it, or are absolute", astray, "make them relative, or name")
    total = sum(entry.size for entry in entries)
    if total > MAX_BYTES:
        largest = sorted(entries, key=lambda entry: -entry.size)[:_LISTED]
        listed = [f"{entry.name} ({format_size(entry.size)})" for entry in largest]
        what = f"the code in {root} is {format_size(total)}, over {format_size(MAX_BYTES)}; the largest files"
        _refuse(what, listed, "data belongs in data:, not in code; name")
    keys = [f"{e.name} ({why})" for e in entries if e.link is None and (why := _why_a_key(e))]
    if keys:
        _refuse(f"{root} holds what looks like keys, which must not leave this machine", keys, "name")


def _refuse(what: str, listed: list[str], way_out: str) -> None:
    more = f"\n  and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    lines = "\n".join(f"  {line}" for line in listed[:_LISTED])
    raise SpecError(f"{what}:\n{lines}{more}\n{way_out} what the job does not need in {IGNORE_FILE}", key=_KEY)


def _leads_outside(root: Path, entry: _Entry) -> bool:
    """As written and as this disk has it; where it is unpacked, other links may stand in between."""
    link = str(entry.link)
    written = os.path.normpath(os.path.join(os.path.dirname(entry.name), link))  # noqa: PTH118, PTH120 text only
    real = Path(os.path.realpath(entry.path))
    return link.startswith("/") or written.split("/")[0] == ".." or not real.is_relative_to(root)


def _why_a_key(entry: _Entry) -> str | None:
    base = entry.path.name.lower()
    pattern = next((p for p in _KEY_NAMES if fnmatchcase(base, p)), None)
    if pattern and not any(fnmatchcase(base, p) for p in _NO_KEY_NAMES):
        return f"its name fits {pattern}"
    content = _read(entry)
    if _PRIVATE_KEY.search(content):
        return "a private key"
    if _SERVICE_ACCOUNT.search(content) and _SERVICE_ACCOUNT_KEY.search(content):
        return "a service account's key"
    return "an AWS access key" if _AWS_ID.search(content) and _AWS_SECRET.search(content) else None


def _read(entry: _Entry) -> bytes:
    try:
        return entry.path.read_bytes()
    except OSError as error:
        raise SpecError(f"{entry.path} can't be read: {error.strerror}", key=_KEY) from error


# ---- bytes


def _tar(entries: list[_Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)  # a fresh one: time, ids and names of the owner are 0 and empty
            info.mode = entry.mode
            if entry.link is not None:
                info.type, info.linkname = tarfile.SYMTYPE, entry.link
                tar.addfile(info)
            else:
                content = _read(entry)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _gzip(data: bytes) -> bytes:
    """RFC 1952 with stored blocks (RFC 1951, 3.2.4).

    Compressed bytes differ between zlib's versions and zlib-ng, which some Pythons are built with, and with them would
    the job's digest.
    """
    header = b"\x1f\x8b\x08\x00" + bytes(4) + b"\x00\xff"  # no name, no time, unknown system
    blocks = [data[start : start + 65535] for start in range(0, len(data), 65535)] or [b""]
    stored = [
        struct.pack("<BHH", i == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for i, block in enumerate(blocks)
    ]
    return header + b"".join(stored) + struct.pack("<II", zlib.crc32(data), len(data))
