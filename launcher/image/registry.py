"""Images in registries: bringing them there, with the log-in that is needed, and knowing later what went where."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launcher.credentials import aws, google
from launcher.engine import Engine, LocalImage
from launcher.errors import AuthError, SpecError, UnsupportedError
from launcher.paths import cache_folder, data_folder
from launcher.stores import copy_into_place

__all__ = [
    "Pushed",
    "config_known",
    "digest_in",
    "note_config",
    "pull",
    "push",
    "pushed_as",
    "recall",
    "registry_of",
]

T = TypeVar("T")

_HUB = "docker.io"
_REFERENCE = re.compile(
    r"(?P<repository>(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
"""https://github.com/distribution/reference"""


@dataclass(frozen=True)
class Pushed:
    """An image as a registry has it. reference: with its tag. digest: of the manifest."""

    reference: str
    digest: str
    config_digest: str

    @property
    def pinned(self) -> str:
        """The reference by digest, which no other push can move."""
        return f"{_parts(self.reference)['repository']}@{self.digest}"


def push(
    engine: Engine,
    source: str,
    to: str,
    *,
    say: Callable[[str], None],
    options: Sequence[str] = (),
    profile: str | None = None,
) -> Pushed:
    """Brings an image of the engine's store to `registry/repository[:tag]`; the tag is the source's own unless given.

    A registry that wants a log-in, and is one of AWS or Google, gets one with the identity found here (profile: AWS
    profile). Layers that the registry has are not sent again.
    """
    image = engine.image(source)
    if image is None:
        raise SpecError(f"{engine.name} has no image {source}; build it: cvlaunch image build", key="IMAGE")
    to = _destination(source, to)
    digest = _with_login(engine, to, profile, lambda: engine.push(source, to, options=options, say=say))
    pushed = Pushed(to, digest, image.config_digest)
    _remember(pushed)
    return pushed


def pull(engine: Engine, reference: str, *, say: Callable[[str], None], profile: str | None = None) -> LocalImage:
    """From its registry into the engine's store, with a log-in as in `push`."""
    if registry_of(reference) == "localhost":
        raise SpecError(f"{engine.name} has no image {reference}, and no registry has it either", key="image")
    return _with_login(engine, reference, profile, lambda: engine.pull(reference, say))


def registry_of(reference: str) -> str:
    """`host[:port]`; the Docker Hub where a name says none."""
    first, slash, _ = reference.partition("/")
    return first if slash and (first == "localhost" or set(first) & set(".:")) else _HUB


def digest_in(reference: str) -> str | None:
    """The manifest's digest that a reference says."""
    return _parts(reference)["digest"]


def _parts(reference: str) -> dict[str, str | None]:
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise SpecError(f"{reference!r} is no image; an image looks like registry.example.com/team/trainer:tag")
    return found.groupdict()


def _destination(source: str, to: str) -> str:
    parts = _parts(to)
    if parts["digest"]:
        raise SpecError(f"{to} names a digest, which follows from what is pushed; give a tag, or none", key="TO")
    if registry_of(to) == "localhost":
        raise SpecError(f"{to} names no registry; a place looks like registry.example.com/team/trainer", key="TO")
    return to if parts["tag"] else f"{to}:{_parts(source)['tag'] or 'latest'}"


def _with_login(engine: Engine, reference: str, profile: str | None, act: Callable[[], T]) -> T:
    """What the engine is logged in to comes first: a credential helper of the user's may do this better."""
    try:
        return act()
    except AuthError as refusal:
        host = registry_of(reference)
        try:
            login = aws.ecr_login(host, profile) or google.registry_login(host)
        except UnsupportedError as missing:
            raise AuthError(f"{refusal}. cvlaunch can log in to {host} by itself: {missing.message}") from refusal
        if login is None:
            raise AuthError(str(refusal).replace("login REGISTRY", f"login {host}")) from refusal
    engine.login(host, *login)
    return act()


# ---- what went where


def recall(reference: str) -> Pushed | None:
    """What this user pushed last under a reference, by tag or by digest."""
    return _read(_note(reference))


def pushed_as(config_digest: str) -> list[Pushed]:
    """Where this user pushed an image of this configuration."""
    found = {pushed for path in _notes().glob("*.json") if (pushed := _read(path))}
    return sorted((p for p in found if p.config_digest == config_digest), key=lambda pushed: pushed.reference)


def config_known(reference: str) -> str | None:
    """The configuration's digest of an image that is named by digest, if it was found once: it never changes."""
    with contextlib.suppress(OSError):
        return _config_note(reference).read_text(encoding="ascii")
    return None


def note_config(reference: str, config_digest: str) -> None:
    _write(_config_note(reference), config_digest)


def _config_note(reference: str) -> Path:
    return cache_folder() / "image-configs" / hashlib.sha256(reference.encode()).hexdigest()[:32]


def _read(path: Path) -> Pushed | None:
    try:
        content = json.loads(path.read_bytes())
        return Pushed(**content) if content.keys() == {f.name for f in dataclasses.fields(Pushed)} else None
    except (OSError, ValueError):
        return None


def _remember(pushed: Pushed) -> None:
    for name in (pushed.reference, pushed.pinned):
        _write(_note(name), json.dumps(dataclasses.asdict(pushed)))


def _write(path: Path, text: str) -> None:
    with copy_into_place(path) as file:
        file.write(text.encode())


def _notes() -> Path:
    return data_folder() / "images"


def _note(reference: str) -> Path:
    return _notes() / f"{hashlib.sha256(reference.encode()).hexdigest()[:32]}.json"
