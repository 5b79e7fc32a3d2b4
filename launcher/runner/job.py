"""job.json: where it comes from, and whether it is what was submitted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import contract
from launcher.contract import JobFile
from launcher.errors import AuthError, IntegrityError, SpecError
from launcher.stores import StorageOptions, open_store, path_of, scheme

__all__ = ["JobSource", "command_of_arguments", "read_job"]

USAGE = "usage: cvlaunch-run [-- COMMAND [ARGUMENT…]]; the job comes from $CVLAUNCH_JOB or <root>/input/config/job.json"


@dataclass(frozen=True)
class JobSource:
    """place: a path, a URI or the name of a variable."""

    job: JobFile
    data: bytes
    place: str


def command_of_arguments(arguments: Sequence[str]) -> tuple[str, ...] | None:
    """The command after `--`, None without one. SpecError, which is the usage, for anything else."""
    if not arguments:
        return None
    if arguments[0] != "--" or len(arguments) < 2:
        raise SpecError(USAGE)
    return tuple(arguments[1:])


def read_job(environ: Mapping[str, str]) -> JobSource:
    """SpecError if there is none or it can't be read, AuthError if it mustn't, IntegrityError if it is another.

    $CVLAUNCH_STORAGE: StorageOptions as JSON, for a $CVLAUNCH_JOB in a store that isn't the cloud's own.
    """
    place, data = _read(environ)
    wanted = environ.get("CVLAUNCH_JOB_SHA256")
    found = hashlib.sha256(data).hexdigest()
    if wanted and wanted != found:
        raise IntegrityError(f"{place} has SHA-256 {found}, submitted was {wanted}; submit the job again")
    try:
        return JobSource(JobFile.from_bytes(data), data, place)
    except ValueError as error:
        raise SpecError(f"{place}: {error}") from error


def _read(environ: Mapping[str, str]) -> tuple[str, bytes]:
    if inline := environ.get("CVLAUNCH_JOB_JSON"):
        return "$CVLAUNCH_JOB_JSON", os.fsencode(inline)
    place = environ.get("CVLAUNCH_JOB") or str(
        Path(environ.get("CVLAUNCH_ROOT") or contract.DEFAULT_ROOT) / contract.JOB
    )
    try:
        if scheme(place) == "file":
            return place, path_of(place).read_bytes()
        folder, _, name = place.rpartition("/")
        return place, open_store(folder, _storage(environ)).read(name)
    except OSError as error:
        raise SpecError(f"{place}: {error.strerror}; set CVLAUNCH_JOB to a job.json (a path or a URI)") from error
    except AuthError as error:
        raise AuthError(f"the job's role may not read its job.json: {error}") from error


def _storage(environ: Mapping[str, str]) -> StorageOptions:
    """How to reach the store that has job.json, before job.json can say so."""
    text = environ.get("CVLAUNCH_STORAGE") or "{}"
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise SpecError(f'CVLAUNCH_STORAGE is {text!r}; expected JSON like {{"endpoint": "https://s3.example"}}')
    return StorageOptions.from_mapping(values)
