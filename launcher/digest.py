"""Is it the same job? The job digest covers what decides the result, and nothing of where it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.contract import Channel, Code, canonical_json

__all__ = ["job_digest", "text_digest"]

_VERSION = 1


def job_digest(
    *,
    command: Iterable[str] | None,
    train: Mapping[str, Any] | None,
    env: Mapping[str, str],
    secrets: Iterable[str],
    channels: Iterable[Channel],
    code: Code | None,
    image: str | None,
    nodes: int,
    gpus: int,
    processes: int,
) -> str:
    """SHA-256 (hex) of canonical JSON.

    train: defaults filled in. secrets: names. image: the config digest, the same before and after a push.
    Channels count by fingerprint, never by place; gpus and processes are per node.
    """
    facts = {
        "v": _VERSION,
        "command": None if command is None else list(command),
        "train": None if train is None else dict(train),
        "env": dict(env),
        "secrets": sorted(secrets),
        "channels": {channel.name: channel.fingerprint for channel in channels},
        "code": None if code is None else [code.sha256, code.requirements],
        "image": image,
        "world": {"nodes": nodes, "gpus": gpus, "processes": processes},
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 (hex) of a rendered text."""
    return hashlib.sha256(text.encode()).hexdigest()
