"""What SageMaker moves between S3 and an instance: channels, checkpoints, model and output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.services.aws.account import Account, split_uri
from tests.services.aws.wire import Json

__all__ = ["Checkpoints", "NoDataError", "download_channel", "files_in", "upload_folder"]

_UPLOADING, _UPLOADED, _IGNORED = ".sagemaker-uploading", ".sagemaker-uploaded", ".sagemaker-ignore"
"""What SageMaker's agent puts beside a file as it sends it, and what it never sends:
https://github.com/aws/sagemaker-xgboost-container, src/sagemaker_xgboost_container/checkpointing.py"""

_NO_OBJECTS = (
    'No S3 objects found under S3 URL "{uri}" given in input data source. Please ensure that the bucket exists in the '
    'selected region ({region}), that objects exist under that S3 prefix, and that the role "{role}" has '
    '"s3:ListBucket" permissions on bucket "{bucket}".'
)


class NoDataError(Exception):
    """What the job's FailureReason says."""


def download_channel(account: Account, source: Json, folder: Path, *, role: str, part: tuple[int, int]) -> None:
    """source: an S3DataSource. part: (number of this instance from 0, how many there are)."""
    folder.mkdir(parents=True, exist_ok=True)
    number, count = part
    found = sorted(_manifest(account, source) if source["S3DataType"] == "ManifestFile" else _prefix(account, source))
    if not found:
        bucket, _ = split_uri(source["S3Uri"])
        text = _NO_OBJECTS.format(uri=source["S3Uri"], region=account.region, role=role, bucket=bucket)
        raise NoDataError(f"ClientError: Data download failed:{text}")
    mine = found[number::count] if source.get("S3DataDistributionType") == "ShardedByS3Key" else found
    for name, bucket, key in mine:
        data = account.read(bucket, key)
        if data is not None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def _prefix(account: Account, source: Json) -> Iterator[tuple[str, str, str]]:
    """(name below the channel's folder, bucket, key)"""
    bucket, prefix = split_uri(source["S3Uri"])
    folder = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
    for entry in account.objects(source["S3Uri"]):
        if entry.key.endswith("/"):
            continue
        if entry.key.startswith(folder):
            yield entry.key[len(folder) :], bucket, entry.key
        else:
            yield entry.key[prefix.rfind("/") + 1 :], bucket, entry.key


def _manifest(account: Account, source: Json) -> Iterator[tuple[str, str, str]]:
    data = account.read(*split_uri(source["S3Uri"]))
    first, *names = json.loads(data or b"[{}]")
    for name in names:
        bucket, key = split_uri(first.get("prefix", "") + name)
        yield name, bucket, key


def files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path below, path); what vanishes meanwhile is passed over, folders too."""
    for path in sorted(Path(where, name) for where, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix(), path


def upload_folder(account: Account, folders: Sequence[Path], uri: str, *, packed: str, plain: str) -> str:
    """All instances' folders as one, under `uri`: an archive named `packed`, or, without that name, files below
    `plain`. Where they lie then; empty if there is nothing."""
    files = dict(entry for folder in folders for entry in files_in(folder))
    if not files:
        return ""
    bucket, key = split_uri(uri)
    if packed:
        account.write(bucket, f"{key}/{packed}", _packed(files.items()))
        return f"{uri}/{packed}"
    for name, path in files.items():
        account.write(bucket, f"{key}/{plain}/{name}", path.read_bytes())
    return f"{uri}/{plain}/"


def _packed(files: Iterable[tuple[str, Path]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, path in files:
            archive.add(path, name)
    return buffer.getvalue()


class Checkpoints:
    """Of one instance: what stands in its folder, and in S3 as far as it was sent there."""

    def __init__(self, account: Account, uri: str, folder: Path) -> None:
        self._account, self._folder = account, folder
        self._bucket, prefix = split_uri(uri)
        self._prefix = prefix.rstrip("/") + "/" if prefix else ""
        self._sent: dict[str, tuple[int, int]] = {}

    def restore(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for entry in self._account.objects(f"s3://{self._bucket}/{self._prefix}"):
            data, target = self._account.read(self._bucket, entry.key), self._folder / entry.key[len(self._prefix) :]
            if data is not None and not entry.key.endswith("/"):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        self._sent = dict(self._states())

    def sync(self) -> None:
        """As the platform does it all the time: whatever stands there, half written or not; its marks are beside it."""
        states = dict(self._states())
        changed = [name for name, state in states.items() if self._sent.get(name) != state]
        for name in changed:  # several leave at once
            self._mark(name, _UPLOADING, instead_of=_UPLOADED)
        for name in changed:
            with contextlib.suppress(FileNotFoundError):
                self._account.write(self._bucket, self._prefix + name, (self._folder / name).read_bytes())
            self._mark(name, _UPLOADED, instead_of=_UPLOADING)
        for name in self._sent.keys() - states.keys():
            self._account.delete(self._bucket, self._prefix + name)
            self._unmark(name, _UPLOADED)
        self._sent = states

    def _mark(self, name: str, mark: str, *, instead_of: str) -> None:
        """What is gone meanwhile, or has gone with its folder, gets none."""
        with contextlib.suppress(OSError):
            if (self._folder / name).is_file():
                (self._folder / f"{name}{mark}").touch()
        self._unmark(name, instead_of)

    def _unmark(self, name: str, mark: str) -> None:
        with contextlib.suppress(OSError):
            (self._folder / f"{name}{mark}").unlink(missing_ok=True)

    def _states(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for name, path in files_in(self._folder):
            if name.endswith((_UPLOADING, _UPLOADED, _IGNORED)):
                continue
            with contextlib.suppress(OSError):
                found = path.stat()
                yield name, (found.st_mtime_ns, found.st_size)
