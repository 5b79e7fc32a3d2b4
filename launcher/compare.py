"""Are two runs the same job? Equal digests say so; else the list of what differs, and apart from it where they ran."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.ledger import RunRecord

__all__ = ["Comparison", "Difference", "compare"]

_ABSENT = "-"


@dataclass(frozen=True)
class Difference:
    """One key with its value in each run, as text; `-` where a run has none."""

    key: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.key}: {self.a} → {self.b}"


@dataclass(frozen=True)
class Comparison:
    """differences: what the job digest covers. elsewhere: what it leaves out, such as target and name.

    unpinned: what no digest vouches for in one of the runs, so that it may differ all the same.
    """

    identical: bool
    differences: tuple[Difference, ...]
    elsewhere: tuple[Difference, ...]
    unpinned: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "differences": [vars(difference) for difference in self.differences],
            "elsewhere": [vars(difference) for difference in self.elsewhere],
            "unpinned": list(self.unpinned),
        }


def compare(a: RunRecord, b: RunRecord) -> Comparison:
    """What is compared is what was sent, kept in the run files: no store and no platform is asked."""
    digests = a.plan["job_digest"], b.plan["job_digest"]
    identical = digests[0] == digests[1]
    differences = () if identical else tuple(_differences(_job_facts(a), _job_facts(b)))
    if not identical and not differences:  # such as a default that a later cvlaunch added
        differences = (Difference("job digest", digests[0][:12], digests[1][:12]),)
    return Comparison(
        identical=identical,
        differences=differences,
        elsewhere=tuple(_differences(_other_facts(a), _other_facts(b))),
        unpinned=tuple(dict.fromkeys((*a.plan["unpinned"], *b.plan["unpinned"]))),
    )


def _differences(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield Difference(key, a.get(key, _ABSENT), b.get(key, _ABSENT))


def _job_facts(record: RunRecord) -> dict[str, str]:
    """The facts of `digest.job_digest`, flat and as text."""
    job = record.job.get("job_file") or {}
    image = record.job.get("image") or {}
    code = job.get("code") or {}
    channels = {
        f"data.{channel['name']}": f"fingerprint {channel['fingerprint'][:12]}"
        if channel["fingerprint"]
        else "unpinned"
        for channel in job.get("channels", ())
    }
    facts = {
        "command": job.get("command"),
        "train": job.get("train"),
        "env": job.get("env"),
        "secrets": sorted(job.get("secrets") or ()),
        "code": code.get("sha256", "")[:12],
        "code.requirements": code.get("requirements"),
        "image": image.get("config_digest"),
        "nodes": job.get("nodes"),
        "gpus": job.get("gpus"),
        "processes": job.get("processes"),
    }
    return {**dict(_flat(facts)), **channels}


def _other_facts(record: RunRecord) -> dict[str, str]:
    """What may differ between two runs of one job."""
    spec = record.job.get("spec") or {}
    job = record.job.get("job_file") or {}
    covered = ("gpus", "nodes", "processes")
    facts = {
        "target": record.target_name,
        "backend": record.backend,
        "name": record.name,
        "output": record.output,
        "image": (record.job.get("image") or {}).get("reference"),
        "resources": {k: v for k, v in (spec.get("resources") or {}).items() if k not in covered},
        "retries": spec.get("retries"),
        "max_attempts": spec.get("max_attempts"),
        "data": {channel["name"]: channel["uri"] for channel in job.get("channels", ())},
        "secrets": spec.get("secrets"),
        "tags": dict(record.tags),
        "native": spec.get("native"),
        "cvlaunch": job.get("cvlaunch"),
    }
    return dict(_flat(facts))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys with dots; what is empty is left out."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif item not in (None, "", [], ()):
            yield f"{prefix}{key}", item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
