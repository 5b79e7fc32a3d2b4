"""Are two runs the same job? Equal digests say so; else the list of what differs.

Apart from it: what they were told besides, and what they had around them (environment.json).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.ledger import RunRecord
from launcher.quantities import format_size

__all__ = ["Comparison", "Difference", "Surroundings", "compare"]

_ABSENT = "-"
_LEFT_OUT = ("gpus", "hostname", "packages", "packages_changed", "user")
"""Keys of environment.json that are told in another way, or differ between any two runs."""
_IN_THE_JOB = ("code.sha256", "image.config_digest")
_SIZES = ("memory", "shm")


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
    surroundings, packages: what the runs found where they ran; empty if `not_compared` says why.
    """

    identical: bool
    differences: tuple[Difference, ...]
    elsewhere: tuple[Difference, ...]
    unpinned: tuple[str, ...]
    surroundings: tuple[Difference, ...] = ()
    packages: tuple[Difference, ...] = ()
    not_compared: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "differences": [vars(difference) for difference in self.differences],
            "elsewhere": [vars(difference) for difference in self.elsewhere],
            "unpinned": list(self.unpinned),
            "surroundings": [vars(difference) for difference in self.surroundings],
            "packages": [vars(difference) for difference in self.packages],
            "not_compared": list(self.not_compared),
        }


@dataclass(frozen=True)
class Surroundings:
    """What a run had around it, as text. why_not: why nothing is known of it."""

    facts: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    why_not: str = ""

    @classmethod
    def from_json(cls, environment: Mapping[str, object]) -> Surroundings:
        """Of environment.json, by whatever version it was written."""
        gpus, packages = environment.get("gpus"), environment.get("packages")
        rest = {key: value for key, value in environment.items() if key not in _LEFT_OUT}
        facts = {"gpus": _gpus(gpus) if isinstance(gpus, list) else None, **{k: _amount(k, v) for k, v in rest.items()}}
        told = {key: text for key, text in _flat(facts) if key not in _IN_THE_JOB}
        others = packages.items() if isinstance(packages, Mapping) else ()
        return cls(told, {str(name): str(version) for name, version in others if name not in told})


def compare(a: RunRecord, b: RunRecord, around: tuple[Surroundings, Surroundings] | None = None) -> Comparison:
    """The jobs are compared as they were sent, by the run files: no platform is asked.

    around: what the two runs had around them, if that is to be compared, too.
    """
    found = _compare_jobs(a, b)
    if around is None:
        return found
    if unknown := tuple(one.why_not for one in around if one.why_not):
        return dataclasses.replace(found, not_compared=unknown)
    one, other = around
    return dataclasses.replace(
        found,
        surroundings=tuple(_differences(one.facts, other.facts)),
        packages=tuple(sorted(_differences(one.packages, other.packages), key=lambda d: d.key)),
    )


def _compare_jobs(a: RunRecord, b: RunRecord) -> Comparison:
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


def _gpus(gpus: Sequence[object]) -> str:
    """`2 × NVIDIA H200 (139.8 GiB)`; no word of their serial numbers, and none of the driver, which has its own key."""
    kinds = Counter(_gpu(gpu) for gpu in gpus if isinstance(gpu, Mapping))
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items()) or "none"


def _gpu(gpu: Mapping[str, object]) -> str:
    size = gpu.get("memory")
    return f"{gpu.get('name')} ({format_size(size)})" if isinstance(size, int) else str(gpu.get("name"))


def _amount(key: str, value: object) -> object:
    return format_size(value) if key in _SIZES and isinstance(value, int) else value


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys with dots; what is empty is left out."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif item not in (None, "", [], ()):
            yield f"{prefix}{key}", item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
