"""What a store is: the protocol, its entries and its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.errors import SpecError, nearest

__all__ = ["Entry", "Progress", "StorageOptions", "Store", "pem_text"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class StorageOptions:
    """How to reach a store. No secrets: it travels in job.json.

    endpoint: URL of an S3 or GCS service that isn't the cloud's own; `http://` is allowed.
    ca_bundle: path of a PEM file, or PEM text. profile: of ~/.aws, on this machine only.
    anonymous: don't sign requests (public buckets).
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    ca_bundle: str | None = None
    project: str | None = None
    anonymous: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> StorageOptions:
        """SpecError for a key that isn't known."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                expected = ", ".join(known)
                raise SpecError(f"{key!r} is not a storage option; known: {expected}{nearest(key, known)}")
        texts = {key: value for key, value in values.items() if key != "anonymous"}
        return cls(**texts, anonymous=values.get("anonymous", "false").lower() == "true")

    def to_mapping(self) -> dict[str, str]:
        """What another machine can use: no profile, and only what is set."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value and key != "profile"}
        return {key: "true" if value is True else str(value) for key, value in values.items()}

    def portable(self) -> StorageOptions:
        """The same for another machine: no profile, and the CA bundle as text instead of a path of this machine."""
        return dataclasses.replace(self, profile=None, ca_bundle=pem_text(self.ca_bundle))


@dataclass(frozen=True, slots=True)
class Entry:
    """One object or file. path: relative to the store. modified: Unix seconds. etag: changes when the content does."""

    path: str
    size: int
    modified: float
    etag: str | None


class Store(Protocol):
    """One folder of bytes. Paths in and out are relative, checked, and never leave the folder.

    Any method may raise AuthError, UnreachableError, CapacityError, or SpecError (the bucket isn't there).
    """

    @property
    def uri(self) -> str:
        """Without a `/` at the end."""
        ...

    def head(self, path: str) -> Entry | None: ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All that stands below the folder `prefix`, sorted by path. Part files are left out."""
        ...

    def read(self, path: str) -> bytes:
        """FileNotFoundError if it isn't there."""
        ...

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        """Bytes from `start` up to, without, `end`; empty at and after the end. FileNotFoundError if not there."""
        ...

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        """All or nothing, from bytes or a local file. if_absent: FileExistsError if there is one already."""
        ...

    def download(self, path: str, to: Path) -> Entry:
        """By part file and rename; what was fetched. FileNotFoundError if it isn't there."""
        ...

    def delete(self, paths: Iterable[str]) -> None:
        """What is missing is fine."""
        ...

    def local_path(self, path: str = "") -> Path | None:
        """Where it stands on this machine; None for a store that isn't a folder."""
        ...

    def check_writable(self) -> None:
        """AuthError or SpecError that says which permission is missing."""
        ...


def pem_text(ca_bundle: str | None) -> str | None:
    """PEM text of a path or of itself."""
    if not ca_bundle or "-----BEGIN" in ca_bundle:
        return ca_bundle
    try:
        text = Path(ca_bundle).expanduser().read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SpecError(f"the CA bundle {ca_bundle} can't be read ({error.strerror}): correct `ca_bundle`") from error
    if "-----BEGIN CERTIFICATE" not in text:
        raise SpecError(f"{ca_bundle} holds no PEM certificate: correct `ca_bundle`")
    return text
