"""Values of the job's secrets: from the runner's environment, a 0600 file, a folder, or a platform's secret store."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.credentials import aws
from launcher.errors import SpecError
from launcher.secretfiles import require_private

__all__ = ["RESOLVERS", "read_secrets"]

RESOLVERS: Mapping[str, Callable[[str], str]] = {"secretsmanager": aws.secret, "ssm": aws.parameter}
"""Kind of a `store:KIND:NAME` reference → function from NAME to value, asked with the job's own identity."""


def read_secrets(names: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Variable → value for each variable → reference. SpecError names the first one that is missing, never a value.

    $CVLAUNCH_SECRETS_FILE: a file, or `-` for standard input, which has them once. $CVLAUNCH_SECRETS_FOLDER: a folder
    with a file for each variable, as Kubernetes mounts them.
    """
    path, folder = environ.get("CVLAUNCH_SECRETS_FILE"), environ.get("CVLAUNCH_SECRETS_FOLDER")
    known = {
        **environ,
        **(_read_file(path) if names and path else {}),
        **(_read_folder(Path(folder), names) if folder else {}),
    }
    return {name: _value(name, reference, known) for name, reference in names.items()}


def _read_folder(folder: Path, names: Mapping[str, str]) -> dict[str, str]:
    """AuthError if others can read one of them."""
    try:
        return {name: require_private(folder / name).read_text("utf-8") for name in names if (folder / name).exists()}
    except OSError as error:
        raise SpecError(f"{error.filename} (CVLAUNCH_SECRETS_FOLDER): {error.strerror}") from error
    except UnicodeDecodeError:  # `from error` would print the value
        raise SpecError(f"a file in {folder} (CVLAUNCH_SECRETS_FOLDER) is not UTF-8") from None


def _value(name: str, reference: str, known: Mapping[str, str]) -> str:
    if name in known:
        return known[name]
    if reference.startswith("store:"):
        kind, _, rest = reference.removeprefix("store:").partition(":")
        if kind not in RESOLVERS:
            raise SpecError(
                f"the secret {name} is {reference}; known here: {', '.join(f'store:{k}:…' for k in RESOLVERS)}"
            )
        return RESOLVERS[kind](rest)
    raise SpecError(
        f"the secret {name} ({reference}) is neither in the environment nor in CVLAUNCH_SECRETS_FILE or _FOLDER"
    )


def _read_file(path: str) -> dict[str, str]:
    """NAME=JSON string, one a line. AuthError if others can read it."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else require_private(Path(path)).read_bytes()
        lines = data.decode().split("\n")
    except OSError as error:
        raise SpecError(f"{path} (CVLAUNCH_SECRETS_FILE): {error.strerror}") from error
    except UnicodeDecodeError:  # `from error` would print the value
        raise SpecError(f"{path} (CVLAUNCH_SECRETS_FILE) is not UTF-8") from None
    return dict(_entry(path, number, line) for number, line in enumerate(lines, 1) if line.strip())


def _entry(path: str, number: int, line: str) -> tuple[str, str]:
    name, _, text = line.partition("=")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, str):  # `from error` would print the value
        raise SpecError('expected NAME="VALUE" with VALUE as a JSON string', file=path, line=number)
    return name, value
