"""Files that hold credentials: read only if nobody else can read them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import AuthError

__all__ = ["require_private", "secret_lines"]


def require_private(path: Path) -> Path:
    """`path`, if it keeps its secret; AuthError otherwise. FileNotFoundError if it is not there.

    A file of our own must be closed to group and others, as ssh asks of a key. A file of somebody else that
    we can read through a group (a Kubernetes Secret volume with fsGroup) must be closed to others.
    """
    facts = path.stat()
    open_to = stat.S_IRWXG | stat.S_IRWXO if os.name == "posix" and facts.st_uid == os.getuid() else stat.S_IRWXO
    if os.name == "posix" and facts.st_mode & open_to:
        mode = stat.S_IMODE(facts.st_mode)
        raise AuthError(f"{path} holds credentials and others can read it (mode {mode:04o}): chmod 600 {path}")
    return path


def secret_lines(secrets: Mapping[str, str]) -> bytes:
    """As the runner reads them: NAME=JSON string, one a line."""
    return "".join(f"{name}={json.dumps(value)}\n" for name, value in secrets.items()).encode()
