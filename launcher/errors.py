"""Errors of cvlaunch. A class is what the caller can do next.

CvlaunchError
├── SpecError            fix the file, the option or the argument            exit 2
│   └── UnsupportedError choose another backend, or ask for less             exit 2
├── JobFailedError       read the logs of the run                            exit 1
├── AuthError            log in, or ask for the permission that it names     exit 4
├── CapacityError        wait, ask for a quota, or go elsewhere              exit 5
├── UnreachableError     try again                                           exit 6
├── ConflictError        the name is taken by something that is not ours     exit 7
└── IntegrityError       bytes differ from what was promised: fetch again    exit 8

A message names the thing, what is wrong with it, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

__all__ = [
    "AuthError",
    "CapacityError",
    "ConflictError",
    "CvlaunchError",
    "IntegrityError",
    "JobFailedError",
    "SpecError",
    "UnreachableError",
    "UnsupportedError",
    "nearest",
]


class CvlaunchError(Exception):
    """Anything that cvlaunch raises on purpose. `exit_code` is what the CLI exits with."""

    exit_code: ClassVar[int] = 1


class SpecError(CvlaunchError):
    """Something that the user wrote can't be used as it stands.

    Prints as `FILE:LINE: KEY: message`, with the parts that are known.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.line = line
        self.key = key

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return ": ".join(part for part in (place, self.key, self.message) if part)


class UnsupportedError(SpecError):
    """This backend, platform or installation can't do what was asked."""


class JobFailedError(CvlaunchError):
    """The job ran and did not succeed."""


class AuthError(CvlaunchError):
    """No identity, an expired one, or one without the permission."""

    exit_code = 4


class CapacityError(CvlaunchError):
    """No room: quota, hardware or disk."""

    exit_code = 5


class UnreachableError(CvlaunchError):
    """A service did not answer, or asked us to come back later."""

    exit_code = 6


class ConflictError(CvlaunchError):
    """A name is in use by something that this run does not own."""

    exit_code = 7


class IntegrityError(CvlaunchError):
    """Bytes differ from their manifest, digest or recorded hash."""

    exit_code = 8


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'epochs'?` where a known word is close to `word`, else an empty string."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""
