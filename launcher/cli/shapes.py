"""What a run looks like in JSON. Keys only ever get more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.backends.base import LogLine
from launcher.ledger import RunRecord, RunSummary
from launcher.metrics import Point
from launcher.status import Status

__all__ = ["log_json", "point_json", "run_json", "status_json", "summary_json"]


def run_json(record: RunRecord) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "name": record.name,
        "created": record.created,
        **status_json(record.last_status),
        "backend": record.backend,
        "target": record.target_name,
        "handle": record.handle,
        "rerun_of": record.rerun_of,
        "output": record.folder,
        "synced": record.synced,
        "job_digest": record.plan["job_digest"],
        "plan_sha": record.plan["plan_sha"],
        "notes": list(record.plan.get("notes", ())),
        "unpinned": list(record.plan["unpinned"]),
        "warnings": list(record.plan["warnings"]),
        "tags": dict(record.tags),
    }


def status_json(status: Status) -> dict[str, Any]:
    return {**vars(status), "state": str(status.state)}


def summary_json(summary: RunSummary) -> dict[str, Any]:
    values = {key: value for key, value in vars(summary).items() if key != "target_name"}
    return {**values, "state": str(summary.state), "target": summary.target_name}


def log_json(line: LogLine) -> Mapping[str, Any]:
    return {"time": line.time, "attempt": line.attempt, "node": line.node, "rank": line.rank, "text": line.text}


def point_json(point: Point) -> Mapping[str, Any]:
    return {
        "step": point.step,
        "epoch": point.epoch,
        "time": point.time,
        "split": point.split,
        "values": dict(point.values),
    }
