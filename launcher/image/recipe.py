"""What an image is built from, and the tag that follows from it: the same content has the same name everywhere."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.contract import canonical_json
from launcher.errors import SpecError
from launcher.image.wheel import make_wheel
from launcher.paths import trainer_folder

__all__ = [
    "BASE_VARIABLE",
    "NAME",
    "OPTIONS_VARIABLE",
    "PLATFORM",
    "Recipe",
    "folder_recipe",
    "needs_trainer",
    "trainer_recipe",
]

NAME = "cvlaunch-trainer"
"""`image: cvlaunch-trainer` is the image of this installation."""

PLATFORM = "linux/amd64"
BASE_VARIABLE = "CVLAUNCH_BASE_IMAGE"
OPTIONS_VARIABLE = "CVLAUNCH_BUILD_OPTIONS"
"""Options of every build, `submit`'s too, as they are typed in a shell."""

_TAG_LENGTH = 12
_LOCAL = "localhost"
"""The registry part of names that no registry has: an engine never looks for them elsewhere."""

_FILES = ("Dockerfile", "requirements.lock")
_TRAINER_ARG = "TRAINER"

_NEUTRAL_OPTIONS = (
    "--add-host", "--authfile", "--builder", "--cache-from", "--cache-to", "--cert-dir", "--cpu-shares", "--creds",
    "--jobs", "--memory", "--memory-swap", "--metadata-file", "--network", "--progress", "--secret", "--shm-size",
    "--ssh", "--ulimit", "--volume", "-m", "-v",
)  # fmt: skip
_NEUTRAL_FLAGS = ("--force-rm", "--layers", "--no-cache", "--pull", "--quiet", "--rm", "--tls-verify", "-q")
"""How it is built, not what: these don't count for the tag. All others do."""


@dataclass(frozen=True)
class Recipe:
    """repository: name without tag. folder: the context; None is ours, which is made when it is needed.

    args: build arguments. options: further words for the engine's build. digest: SHA-256 (hex) of the files that the
    engine would get, the Dockerfile, arguments, platform and options.
    """

    repository: str
    folder: Path | None
    dockerfile: Path
    args: Mapping[str, str]
    platform: str
    options: tuple[str, ...]
    digest: str

    @property
    def tag(self) -> str:
        return self.digest[:_TAG_LENGTH]

    @property
    def reference(self) -> str:
        return f"{self.repository}:{self.tag}"

    @contextlib.contextmanager
    def context(self) -> Iterator[Path]:
        if self.folder is not None:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix="cvlaunch-image-") as scratch:
            _fill(Path(scratch))
            yield Path(scratch)


def trainer_recipe(
    *, base: str | None = None, name: str | None = None, platform: str = PLATFORM, options: Sequence[str] | None = None
) -> Recipe:
    """Of the trainer image as this installation makes it.

    base: an image, else $CVLAUNCH_BASE_IMAGE, else the Dockerfile's own. options: None is $CVLAUNCH_BUILD_OPTIONS.
    """
    with tempfile.TemporaryDirectory(prefix="cvlaunch-image-") as scratch:
        wheel = _fill(Path(scratch))
        files = dict(_entries(Path(scratch), lambda _: False, prune=False))
    base = base or os.environ.get(BASE_VARIABLE)
    args = {**({"BASE": base} if base else {}), "VERSION": wheel.name.split("-")[1]}
    return _recipe(name or NAME, None, trainer_folder() / "Dockerfile", files, args, platform, options)


def folder_recipe(
    folder: Path,
    *,
    dockerfile: Path | None = None,
    base: str | None = None,
    name: str | None = None,
    platform: str = PLATFORM,
    options: Sequence[str] | None = None,
) -> Recipe:
    """Of a folder of the user's. `ARG BASE` in its Dockerfile gets the base, `ARG TRAINER` our image's reference."""
    if not folder.is_dir():
        raise SpecError(f"no folder {folder} to build an image from")
    folder = folder.absolute()
    dockerfile = _dockerfile(folder, dockerfile)
    declared = _declared(dockerfile)
    if base and "BASE" not in declared:
        raise SpecError(f"{dockerfile} has no `ARG BASE`, so that a base can't be chosen", key="--base")
    args = {}
    if "BASE" in declared and (chosen := base or os.environ.get(BASE_VARIABLE)):
        args["BASE"] = chosen
    if _TRAINER_ARG in declared:
        args[_TRAINER_ARG] = trainer_recipe(platform=platform).reference
    ignores, prune = _ignore(folder, dockerfile)
    files = dict(_entries(folder, ignores, prune=prune))
    files["\0dockerfile"] = [_file_hash(dockerfile)]
    return _recipe(name or _slug(folder.resolve().name), folder, dockerfile, files, args, platform, options)


def needs_trainer(recipe: Recipe) -> bool:
    """Whether it starts from our image, which must be there first."""
    return recipe.folder is not None and _TRAINER_ARG in recipe.args


def _recipe(
    name: str,
    folder: Path | None,
    dockerfile: Path,
    files: Mapping[str, list[Any]],
    args: Mapping[str, str],
    platform: str,
    options: Sequence[str] | None,
) -> Recipe:
    words = tuple(shlex.split(os.environ.get(OPTIONS_VARIABLE, "")) if options is None else options)
    facts = {
        "v": 1,
        "files": [[name, *files[name]] for name in sorted(files)],
        "args": dict(args),
        "platform": platform,
        "options": list(_counting(words)),
    }
    digest = hashlib.sha256(canonical_json(facts)).hexdigest()
    return Recipe(_repository(name), folder, dockerfile, args, platform, words, digest)


def _repository(name: str) -> str:
    """`trainer` → `localhost/trainer`; a name that says its registry stays."""
    if not re.fullmatch(r"[a-z0-9]+([._:/-]+[a-z0-9]+)*", name) or ":" in name.rpartition("/")[2]:
        raise SpecError(f"{name!r} is no name for an image: lower-case letters, digits, . _ - and /; the tag is ours")
    first, slash, _ = name.partition("/")
    return name if slash and (first == _LOCAL or set(first) & set(".:")) else f"{_LOCAL}/{name}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "image"


def _counting(words: Sequence[str]) -> Iterator[str]:
    """The engine's options that say what is built."""
    skip = False
    for word in words:
        option, equals, _ = word.partition("=")
        neutral = skip or option in _NEUTRAL_FLAGS or option in _NEUTRAL_OPTIONS
        skip = not skip and option in _NEUTRAL_OPTIONS and not equals
        if not neutral:
            yield word


# ---- our own folder


def _fill(folder: Path) -> Path:
    """Dockerfile, lock and wheel, which it returns. Of one time and mode, so that engines find their layers again."""
    for name in _FILES:
        source = trainer_folder() / name
        if not source.is_file():
            raise SpecError(f"this installation of cvlaunch is incomplete: no file {source}")
        shutil.copyfile(source, folder / name)
    wheel = make_wheel(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
        os.utime(path, (0, 0))
    return wheel


# ---- a folder of the user's


def _dockerfile(folder: Path, given: Path | None) -> Path:
    candidates = [given] if given else [folder / "Dockerfile", folder / "Containerfile"]
    found = next((path.absolute() for path in candidates if path.is_file()), None)
    if found is None:
        raise SpecError(f"no file {given}" if given else f"{folder} holds no Dockerfile")
    return found


def _declared(dockerfile: Path) -> set[str]:
    """Names of its build arguments."""
    lines = re.findall(r"^[ \t]*ARG[ \t]+(.*)$", dockerfile.read_text(errors="replace"), re.MULTILINE | re.IGNORECASE)
    return {word.partition("=")[0] for line in lines for word in line.split()}


def _entries(folder: Path, ignores: Callable[[str], bool], *, prune: bool) -> Iterator[tuple[str, list[Any]]]:
    """(name, [kind, mode, content]) of what the engine gets. prune: what is ignored needs no look inside."""

    def fail(error: OSError) -> None:
        raise SpecError(f"{error.filename} can't be read: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=fail):
        here = Path(parent).relative_to(folder)
        if prune:
            folders[:] = [name for name in folders if not ignores((here / name).as_posix())]
        for name in (*folders, *names):
            path = (here / name).as_posix()
            if not ignores(path):
                yield _text(path), _entry(folder / path)


def _entry(path: Path) -> list[Any]:
    mode = path.lstat().st_mode & 0o7777
    if path.is_symlink():
        return ["link", 0, _text(os.readlink(path))]  # noqa: PTH115 Path.readlink normalises
    if path.is_dir():
        return ["folder", mode, ""]
    return ["file", mode, _file_hash(path) if path.is_file() else ""]


def _text(path: str) -> str:
    """A name that is no UTF-8, too, as text that is."""
    return path.encode(errors="backslashreplace").decode()


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SpecError(f"{path} can't be read: {error.strerror}") from error


def _ignore(folder: Path, dockerfile: Path) -> tuple[Callable[[str], bool], bool]:
    """(whether no engine gets a path, whether folders that are ignored hold nothing that isn't).

    Docker reads <Dockerfile>.dockerignore, else .dockerignore; Podman and Buildah .containerignore, else
    .dockerignore. What one of them would get counts.
    """
    docker = _first(Path(f"{dockerfile}.dockerignore"), folder / ".dockerignore")
    podman = _first(folder / ".containerignore", folder / ".dockerignore")
    both = [_rules(file) for file in {docker, podman}]
    pruned = not any(keep for rules in both for keep, _ in rules)
    return lambda path: all(_matches(rules, path) for rules in both), pruned


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


_Rules = list[tuple[bool, re.Pattern[str]]]


def _rules(file: Path | None) -> _Rules:
    """(whether it takes a path back in, pattern) in the order of the lines."""
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines()] if file else []
    rules = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        keep, pattern = line.startswith("!"), os.path.normpath(line.removeprefix("!").strip()).lstrip("/")
        if pattern != ".":
            rules.append((keep, _pattern(pattern)))
    return rules


def _matches(rules: _Rules, path: str) -> bool:
    """The last rule that fits the path or a folder above it decides."""
    return next((not keep for keep, pattern in reversed(rules) if pattern.match(path)), False)


@functools.lru_cache
def _pattern(text: str) -> re.Pattern[str]:
    """https://docs.docker.com/build/concepts/context/#syntax: Go's filepath.Match, and `**` for any folders."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|\\.|.", text, re.DOTALL)
    made = (words.get(part) or (part if len(part) > 1 and part[0] == "[" else re.escape(part[-1])) for part in parts)
    return re.compile("".join(made) + r"(?:/|\Z)", re.DOTALL)
