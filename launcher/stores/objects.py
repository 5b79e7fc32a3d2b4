"""What obstore reaches: `s3://`, `gs://` and `memory://`. Its threads don't survive a fork: fork first.

What services differ in, found by trying (moto 5.2, rclone 1.75):

* `if_absent` is If-None-Match on S3 and GCS. rclone's server ignores that header, so a HEAD goes first: against such
  a server two writers in the same instant can both believe they were first.
* rclone answers a range request with the whole object; the range is then cut out here.
* A HEAD has no body, so that a missing bucket looks like a missing object there. Other calls tell them apart.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.credentials.partitions import partition_of
from launcher.errors import AuthError, UnreachableError
from launcher.stores.base import Entry, StorageOptions, pem_text
from launcher.stores.folders import PROBE, copy_into_place
from launcher.stores.object_errors import AfterEndError, NoRangesError, Operation, object_errors
from launcher.stores.paths import check_path, from_store

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSConfig, MemoryStore, RetryConfig, S3Config
    from obstore.store import ObjectStore as Client

    from launcher.credentials.aws import Provider

__all__ = ["CLIENTS", "ObjectStore"]

_CHUNK = 8 << 20
_MAX_PARTS = 9_000  # S3 takes 10,000 parts of one object


@dataclass(frozen=True)
class ObjectStore:
    """What obstore reaches. `base` is `s3://bucket`, `prefix` the folder in it."""

    base: str
    prefix: str
    client: Client

    @property
    def uri(self) -> str:
        return f"{self.base}/{self.prefix}" if self.prefix else self.base

    def head(self, path: str) -> Entry | None:
        try:
            with self._errors(Operation.READ, path):
                meta = self.client.head(self._key(path))
        except FileNotFoundError:
            return None
        return Entry(path, meta["size"], meta["last_modified"].timestamp(), _etag(meta["e_tag"]))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix) if prefix else self.prefix
        skip = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(Operation.LIST):
            found = [
                Entry(meta["path"][skip:], meta["size"], meta["last_modified"].timestamp(), _etag(meta["e_tag"]))
                for block in self.client.list(folder or None)
                for meta in block
            ]
        for entry in _without_markers(sorted(found, key=lambda entry: entry.path)):
            from_store(entry.path, self.uri)
            yield entry

    def read(self, path: str) -> bytes:
        with self._errors(Operation.READ, path):
            return bytes(self.client.get(self._key(path)).bytes())

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        if start == 0 and end is None:
            return self.read(path)
        try:
            with self._errors(Operation.READ, path):
                if end is None:
                    return bytes(self.client.get(self._key(path), options={"range": {"offset": start}}).bytes())
                return bytes(self.client.get_range(self._key(path), start=start, end=end))
        except AfterEndError:
            return b""
        except NoRangesError:
            return self.read(path)[start:end]

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        key = self._key(path)
        if if_absent and self.head(path) is not None:
            raise FileExistsError(errno.EEXIST, "there is one already", f"{self.uri}/{path}")
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        with self._errors(Operation.WRITE, path):
            if if_absent:
                self.client.put(key, data, mode="create", use_multipart=False)
            else:
                self.client.put(key, data, chunk_size=max(_CHUNK, size // _MAX_PARTS))

    def download(self, path: str, to: Path) -> Entry:
        import stamina

        # obstore continues a broken body by itself, but only within patience_s of the request
        for attempt in stamina.retry_context(on=_BrokenOffError, attempts=3, timeout=None, wait_initial=0.2):
            with attempt:
                entry = self._download(path, to)
        return entry

    def _download(self, path: str, to: Path) -> Entry:
        with self._errors(Operation.READ, path):
            found = self.client.get(self._key(path))
            meta = found.meta
        with copy_into_place(to, meta["size"]) as file:
            try:
                with self._errors(Operation.READ, path):
                    done = sum(file.write(block) for block in found.stream(_CHUNK))
            except UnreachableError as error:
                raise _BrokenOffError(str(error)) from error
            if done != meta["size"]:
                raise _BrokenOffError(f"{self.uri}/{path}: {done} of {meta['size']} bytes arrived: try again")
        return Entry(path, meta["size"], meta["last_modified"].timestamp(), _etag(meta["e_tag"]))

    def delete(self, paths: Iterable[str]) -> None:
        keys = [self._key(path) for path in paths]
        if not keys:
            return
        try:
            with self._errors(Operation.DELETE):
                self.client.delete(keys)
        except FileNotFoundError:  # GCS stops at the first that is missing
            for key in keys:
                with suppress(FileNotFoundError), self._errors(Operation.DELETE):
                    self.client.delete(key)

    def local_path(self, path: str = "") -> Path | None:
        return None

    def check_writable(self) -> None:
        self.write(PROBE, b"")
        with suppress(AuthError):  # many roles may write and not delete
            self.delete([PROBE])

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{check_path(path)}" if self.prefix else check_path(path)

    @contextmanager
    def _errors(self, operation: Operation, path: str = "") -> Iterator[None]:
        with object_errors(self.base, operation, path=f"{self.uri}/{path}" if path else self.uri):
            yield


class _BrokenOffError(UnreachableError):
    """A body that stopped before its end."""


def _etag(text: str | None) -> str | None:
    """Without quotes: rclone's list has none, its head has."""
    return text.strip('"') if text else None


def _without_markers(entries: list[Entry]) -> Iterator[Entry]:
    """Leaves out empty objects that only stand for a folder (`x/`, as consoles make them)."""
    folders = {path[:i] for path in (entry.path for entry in entries) for i, c in enumerate(path) if c == "/"}
    return (entry for entry in entries if entry.size or entry.path not in folders)


_MEMORY: dict[str, MemoryStore] = {}
_MEMORY_LOCK = threading.Lock()


def _memory_client(name: str, _options: StorageOptions, _patience_s: float) -> Client:
    from obstore.store import MemoryStore

    with _MEMORY_LOCK:
        return _MEMORY.setdefault(name, MemoryStore())


def _s3_client(bucket: str, options: StorageOptions, patience_s: float) -> Client:
    from obstore.store import S3Store

    from launcher.credentials import aws

    provider = None if options.anonymous else aws.obstore_credentials(options.profile)
    endpoint = options.endpoint or aws.s3_endpoint(options.profile) or _s3_of_partition(_region(options, provider))
    config: S3Config = {"virtual_hosted_style_request": False}
    if endpoint:  # the second, because it would win over the first if it came from the environment
        config["endpoint"] = config["aws_endpoint_url_s3"] = endpoint
    if options.region:
        config["region"] = options.region
    if options.anonymous:
        config["skip_signature"] = True
    with object_errors(f"s3://{bucket}", Operation.READ):
        return S3Store(
            bucket,
            config=config,
            client_options=_client_options(endpoint, options.ca_bundle or os.environ.get("AWS_CA_BUNDLE")),
            retry_config=_retries(patience_s),
            credential_provider=provider,
        )


def _region(options: StorageOptions, provider: Provider | None) -> str:
    """The one that obstore will take."""
    of_profile = provider.config.get("region") if provider else None
    found = options.region or of_profile or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return found or ""


def _s3_of_partition(region: str) -> str | None:
    """Where S3 is if not at amazonaws.com, the only domain that obstore knows (0.12)."""
    domain = partition_of(region).domain
    return None if domain == "amazonaws.com" else f"https://s3.{region}.{domain}"


def _gcs_client(bucket: str, options: StorageOptions, patience_s: float) -> Client:
    from obstore.store import GCSStore

    from launcher.credentials import google

    config: GCSConfig = {}
    if options.endpoint:
        config["base_url"] = options.endpoint
    if options.anonymous:
        config["skip_signature"] = True
    provider = None if options.anonymous else google.obstore_credentials()
    with object_errors(f"gs://{bucket}", Operation.READ):
        return GCSStore(
            bucket,
            config=config,
            client_options=_client_options(options.endpoint, options.ca_bundle),
            retry_config=_retries(patience_s),
            credential_provider=provider,
        )


def _client_options(endpoint: str | None, ca_bundle: str | None) -> ClientConfig:
    # obstore's own limit of 30 s counts for a whole transfer; a stalled one is found by the read timeout
    options: ClientConfig = {"timeout": "12h", "read_timeout": "120s", "connect_timeout": "5s"}
    if endpoint and endpoint.lower().startswith("http://"):
        options["allow_http"] = True
    if pem := pem_text(ca_bundle):
        options["root_certificate"] = pem
    return options


def _retries(patience_s: float) -> RetryConfig:
    return {
        "max_retries": 20 if patience_s else 0,
        "retry_timeout": timedelta(seconds=patience_s),
        "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
    }


CLIENTS: dict[str, Callable[[str, StorageOptions, float], Client]] = {
    "gs": _gcs_client,
    "memory": _memory_client,
    "s3": _s3_client,
}
"""Scheme → (bucket, options, patience_s) → obstore's store."""
