"""Reads a synced run folder. Every file may be missing or damaged: then a note says so and the rest is read."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.contract import ENVIRONMENT, JOB, LOGS, METRICS, RESULT, STARTED
from launcher.masking import HIDDEN, mask_links, names_secret
from launcher.metrics import Metrics
from launcher.quantities import format_size
from launcher.report.confusion import Confusion

__all__ = ["Log", "Plot", "RunFolder", "flatten", "read_folder"]

MODEL_CARD = "model/model_card.json"
PLOTS = "output/plots"
CONFUSION = f"{PLOTS}/confusion_matrix.csv"

_MIB = 2**20
_LARGEST_FILE = 16 * _MIB
_LARGEST_METRICS = 1024 * _MIB
_LARGEST_PLOT = 2 * _MIB
_ALL_PLOTS = 8 * _MIB
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_LOGS = 6
_LOG_TAIL = 32 * 2**10
_LOG_LINES = 80
_DEEPEST = 6
_LARGEST_AMOUNT = 2**60
_LONGEST_TEXT = 4000

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_SIZES = ("memory", "shm", "disk")


@dataclass(frozen=True)
class Plot:
    """A picture. uri: `data:image/png;base64,…`."""

    name: str
    uri: str


@dataclass(frozen=True)
class Log:
    """The last lines of a log file, without terminal colours. size: of the whole file, as text."""

    name: str
    size: str
    tail: str


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds. `job`, `environment`, `packages` and `card` are flat: dotted key → text.

    duration: seconds, by result.json, else by the metrics' times. final: metrics of result.json.
    unpinned: data channels without a fingerprint, which the job digest can't tell apart.
    """

    run_id: str
    name: str
    state: str
    reason: str
    exit_code: int | None
    attempt: int | None
    restarts: int | None
    started: float | None
    duration: float | None
    upload: str
    job_digest: str
    unpinned: tuple[str, ...]
    metrics: Metrics
    final: Mapping[str, float]
    environment: Mapping[str, str]
    packages: Mapping[str, str]
    job: Mapping[str, str]
    card: Mapping[str, str]
    confusion: Confusion | None
    plots: tuple[Plot, ...]
    logs: tuple[Log, ...]
    notes: tuple[str, ...]


class _Files:
    """The files of one folder; what can't be read becomes a note."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: list[str] = []

    def read(self, name: str, limit: int = _LARGEST_FILE) -> bytes | None:
        path = self._folder / name
        try:
            size = path.stat().st_size
            if path.is_file() and size <= limit:
                return path.read_bytes()
            what = f"is too large to show ({format_size(size)})" if path.is_file() else "is not a file"
            self.notes.append(f"{name} {what}")
        except FileNotFoundError:
            self.notes.append(f"{name} is missing")
        except OSError as error:
            self.notes.append(f"{name} can't be read: {error.strerror}")
        return None

    def json(self, name: str) -> Mapping[str, object]:
        data = self.read(name)
        if data is None:
            return {}
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.damaged(name, error)
            return {}
        if not isinstance(value, dict):
            self.notes.append(f"{name} is damaged: expected an object")
            return {}
        return value

    def damaged(self, name: str, error: Exception) -> None:
        self.notes.append(f"{name} is damaged: {str(error)[:200]}")

    def exists(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def list(self, name: str, pattern: str) -> list[Path]:
        try:
            return sorted(path for path in (self._folder / name).glob(pattern) if path.is_file())
        except OSError:
            return []


def read_folder(folder: Path) -> RunFolder:
    """Never fails: what is missing or damaged stands in `notes`."""
    files = _Files(folder)
    result = files.json(RESULT)
    started = files.json(STARTED) if files.exists(STARTED) else {}
    metrics = _metrics(files)
    job = files.json(JOB if files.exists(JOB) or not files.exists("job.json") else "job.json")
    environment = files.json(ENVIRONMENT)
    card = files.json(MODEL_CARD)
    confusion = _confusion(files)
    plots = tuple(_plots(files, skip="confusion_matrix.png" if confusion else ""))
    begin, end = _amount(result.get("started")) or _amount(started.get("time")), _amount(result.get("ended"))
    run_id = _text(result.get("run_id")) or _text(job.get("run_id")) or folder.name or folder.resolve().name
    return RunFolder(
        run_id=run_id,
        name=_text(job.get("name")) or run_id,
        state=_text(result.get("state")) or ("STARTED" if started else "UNKNOWN"),
        reason=_text(result.get("reason")),
        exit_code=_whole(result.get("exit_code")),
        attempt=_whole(result.get("attempt")),
        restarts=_whole(result.get("restarts")),
        started=begin,
        duration=end - begin if begin and end and end >= begin else _span(metrics),
        upload=_text(result.get("upload")),
        job_digest=_text(job.get("job_digest")) or _text(result.get("job_digest")),
        unpinned=tuple(_unpinned(job.get("channels"))),
        metrics=metrics,
        final=dict(_numbers(result.get("metrics"))),
        environment=dict(_environment(environment)),
        packages=dict(flatten(environment.get("packages"))),
        job=dict(_job(job)),
        card=dict(flatten(card)),
        confusion=confusion,
        plots=plots,
        logs=tuple(_logs(files)),
        notes=tuple(files.notes),
    )


def flatten(value: object, key: str = "", *, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of each leaf that says something; what looks like a secret is masked."""
    if isinstance(value, dict) and depth < _DEEPEST:
        for name, item in value.items():
            yield from flatten(item, f"{key}.{name}" if key else str(name), depth=depth + 1)
    elif isinstance(value, list) and depth < _DEEPEST and any(isinstance(item, dict | list) for item in value):
        for name, item in _named(value):
            yield from flatten(item, f"{key}.{name}", depth=depth + 1)
    elif value is not None and value not in ("", [], {}):
        yield key, _mask(key, _leaf(value))


def _named(items: list[object]) -> list[tuple[str, object]]:
    """Each item under its own name where all have one and no two the same, else under its index."""
    named = {str(item["name"]): item for item in items if isinstance(item, dict) and item.get("name")}
    if len(named) < len(items):
        return [(str(index), item) for index, item in enumerate(items)]
    return [(name, {k: v for k, v in item.items() if k != "name"}) for name, item in named.items()]


def _leaf(value: object) -> str:
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        text = ", ".join(_leaf(item) for item in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"


def _mask(key: str, text: str) -> str:
    """Hides passwords in addresses, signatures in links, and plain variables that are named like secrets."""
    return HIDDEN if key.startswith("env.") and names_secret(key) else mask_links(text)


def _job(job: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What the trainer is told first, then the rest."""
    shown = {k: v for k, v in job.items() if k not in ("train", "run_id", "job_digest")}
    yield from flatten({"train": job.get("train")})
    yield from flatten(shown)


def _environment(environment: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Without packages, but with those that are not the image's; GPUs of a kind counted, sizes readable."""
    gpus = environment.get("gpus")
    if isinstance(gpus, list):
        yield "gpus", ", ".join(_gpus(gpus)) or "none"
    for key, value in environment.items():
        size = _amount(value) if key in _SIZES else None
        if size is not None:
            yield key, format_size(size)
        elif key == "packages_changed" and isinstance(value, dict):
            yield "not as in the image", ", ".join(_package_changes(value))
        elif key not in ("packages", "gpus"):
            yield from flatten({key: value})


def _package_changes(changes: Mapping[str, object]) -> Iterator[str]:
    """`numpy 2.0.0 → 2.1.0`, `pillow 12.0 added`."""
    for what, packages in changes.items():
        for name, version in packages.items() if isinstance(packages, dict) else ():
            pair = isinstance(version, list) and len(version) == 2
            yield f"{name} {version[0]} → {version[1]}" if pair else f"{name} {version} {what}"


def _gpus(gpus: list[object]) -> list[str]:
    """`2 × NVIDIA H200 (141.0 GiB, driver 570.1)`; facts under our names or nvidia-smi's."""
    kinds: dict[str, int] = {}
    for gpu in gpus:
        facts = gpu if isinstance(gpu, dict) else {"name": gpu}
        size = _amount(facts.get("memory"))
        memory = format_size(size) if size else _text(facts.get("memory.total"))
        driver = _text(facts.get("driver")) or _text(facts.get("driver_version"))
        details = ", ".join(filter(None, (memory, f"driver {driver}" if driver else "")))
        text = _text(facts.get("name")) or "GPU"
        kind = f"{text} ({details})" if details else text
        kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items()]


def _unpinned(channels: object) -> Iterator[str]:
    for channel in channels if isinstance(channels, list) else ():
        if isinstance(channel, dict) and not channel.get("fingerprint"):
            yield _text(channel.get("name")) or "?"


def _metrics(files: _Files) -> Metrics:
    data = files.read(METRICS, _LARGEST_METRICS)
    metrics = Metrics.from_bytes(data or b"")
    if data and not metrics.points:
        files.notes.append(f"{METRICS} holds no values")
    return metrics


def _confusion(files: _Files) -> Confusion | None:
    if not files.exists(CONFUSION):
        return None
    data = files.read(CONFUSION)
    try:
        return None if data is None else Confusion.from_csv(data)
    except ValueError as error:
        files.damaged(CONFUSION, error)
        return None


def _plots(files: _Files, *, skip: str) -> Iterator[Plot]:
    room = _ALL_PLOTS
    for path in files.list(PLOTS, "*.png"):
        if path.name == skip:
            continue
        name = f"{PLOTS}/{path.name}"
        data = files.read(name, min(_LARGEST_PLOT, room))
        if data is not None and not data.startswith(_PNG):
            files.notes.append(f"{name} is damaged: not a PNG picture")
        elif data is not None:
            room -= len(data)
            yield Plot(path.stem, "data:image/png;base64," + b64encode(data).decode())


def _logs(files: _Files) -> Iterator[Log]:
    paths = files.list(LOGS, "*")
    for path in paths[:_MOST_LOGS]:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _LOG_TAIL))
                tail = file.read(_LOG_TAIL)
        except OSError as error:
            files.notes.append(f"{LOGS}/{path.name} can't be read: {error.strerror}")
            continue
        text = _ANSI.sub("", tail.decode(errors="replace"))
        # A progress bar rewrites its line after each \r: only its last state is worth a line.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        yield Log(path.name, format_size(size), "\n".join(lines[-_LOG_LINES:]).strip("\n"))
    if len(paths) > _MOST_LOGS:
        files.notes.append(f"{len(paths) - _MOST_LOGS} more files in {LOGS} are not shown")


def _numbers(values: object) -> Iterator[tuple[str, float]]:
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000:
            yield str(name), float(value)


def _span(metrics: Metrics) -> float | None:
    times = [point.time for point in metrics.points if point.time > 0]
    return max(times) - min(times) if len(times) > 1 else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _amount(value: object) -> float | None:
    """A plausible time or size, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _LARGEST_AMOUNT else None
