"""A sweep: one job many times with other values. What its runs have in common is looked at once, and sent together."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from launcher.backends.base import Plan
from launcher.errors import ConflictError, CvlaunchError, SpecError
from launcher.jobfile import apply_settings
from launcher.ledger import Ledger, RunRecord
from launcher.process import ProcessId
from launcher.resolve import digest_of, train_of
from launcher.spec import JobSpec
from launcher.status import State
from launcher.submission import REFUSALS, Prepared, accepted, carry_out, fresh_run_id, prepare, record_of
from launcher.yamlfile import Document, read_yaml

__all__ = ["MOST_RUNS", "SETTINGS_TAG", "SWEEP_TAG", "combinations", "prepare_many", "send_many"]

SWEEP_TAG, SETTINGS_TAG = "sweep", "settings"
MOST_RUNS = 1000
"""Of what `combinations` multiplies out, where a slip of the hand soon makes a million."""

_NOT_RESOLVED = {
    "name": True,
    "command": True,
    "env": True,
    "tags": True,
    "retries": True,
    "max_attempts": True,
    "train": {
        "epochs", "seed", "threads", "checkpoint_every", "patience", "model", "pretrained", "learning_rate",
        "weight_decay", "warmup", "label_smoothing", "dropout", "augment", "amp",
    },
}  # fmt: skip
"""Keys of a job that `resolve` and `Backend.check` don't look at; jobs that differ in no other are resolved once."""


def combinations(sweeps: Sequence[str]) -> list[list[str]]:
    """`["a=1,2", "b=x,y"]` → all four lists of settings, the last key changing fastest.

    Values are parted by commas as in a list of YAML, so that `[1, 2]` and `"a, b"` are one each.
    """
    keys = [text.partition("=")[0] for text in sweeps]
    for key in keys:
        if keys.count(key) > 1:
            raise SpecError(f"{key} is swept twice; write its values into one", key="--sweep")
    found = list(itertools.islice(itertools.product(*map(_settings, sweeps)), MOST_RUNS + 1))
    if len(found) > MOST_RUNS:
        raise SpecError(f"these are more than {MOST_RUNS} runs; sweep fewer values", key="--sweep")
    return [list(settings) for settings in found]


def _settings(text: str) -> list[str]:
    key, equals, written = text.partition("=")
    if not (key and equals and written.strip()):
        raise SpecError(f"{text!r} is not a sweep; a sweep looks like train.seed=0,1,2", key="--sweep")
    values = _values(written)
    if doubled := next((value for value in values if values.count(value) > 1), None):
        raise SpecError(f"{doubled!r} stands twice in {text!r}", key="--sweep")
    return [f"{key}={value}" for value in values]


def _values(written: str) -> list[str]:
    """Each as it was written."""
    listed = f"[{written}]"
    try:
        node = yaml.compose(listed, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(listed):
        raise SpecError(f"{written!r} is not a list of values; one looks like 0.1,0.01", key="--sweep")
    return [listed[value.start_mark.index : value.end_mark.index].strip() for value in node.value]


@contextlib.contextmanager
def prepare_many(
    job: JobSpec | Path | str,
    settings: Sequence[Sequence[str]],
    *,
    backend: str | None = None,
    target: str | None = None,
    folder: Path | None = None,
    make: Callable[[str], None] | None = None,
    ledger: Ledger,
) -> Iterator[list[Prepared]]:
    """`prepare` for each list of settings; runs of which the platform sees the same share what was resolved."""
    if not settings:
        raise SpecError("a sweep without settings has no runs; give a list of settings for each")
    folder = folder or (Path.cwd() if isinstance(job, JobSpec) else Path(job).absolute().parent)
    first: dict[str, Prepared] = {}
    prepared = []
    with contextlib.ExitStack() as stack:
        for spec, own in zip(_specs(job, settings), settings, strict=True):
            alike = spec.model_dump_json(exclude=_NOT_RESOLVED)  # type: ignore[arg-type]
            if alike not in first:
                # by the file where there is one, so that an error names the line
                how = {"backend": backend, "target": target, "folder": folder, "make": make, "ledger": ledger}
                given = {"job": spec} if isinstance(job, JobSpec) else {"job": job, "settings": own}
                first[alike] = stack.enter_context(prepare(**given, **how))  # type: ignore[arg-type]
            prepared.append(_with_spec(first[alike], spec))
        yield _tagged(prepared, settings)


def _specs(job: JobSpec | Path | str, settings: Sequence[Sequence[str]]) -> list[JobSpec]:
    if isinstance(job, JobSpec):
        document = Document(Path("the job"), job.model_dump(mode="json"))
    else:
        document = read_yaml(Path(job))
    return [apply_settings(document, own) for own in settings]


def _with_spec(prepared: Prepared, spec: JobSpec) -> Prepared:
    """For a job that differs only in keys of `_NOT_RESOLVED`."""
    job = prepared.job
    digest = digest_of(spec, channels=job.channels, code=job.code, image=job.image)
    job = dataclasses.replace(job, spec=spec, train=train_of(spec), command=spec.command, digest=digest)
    return dataclasses.replace(prepared, job=job)


def _tagged(prepared: Sequence[Prepared], settings: Sequence[Sequence[str]]) -> list[Prepared]:
    """With the sweep's name, and what each has for itself; the user's own tags come first."""
    sweep = fresh_run_id(prepared[0].job.spec)
    common = set(settings[0]).intersection(*settings) if len(settings) > 1 else set()
    found = []
    for one, own in zip(prepared, settings, strict=True):
        tags = {SWEEP_TAG: sweep, SETTINGS_TAG: " ".join(text for text in own if text not in common)}
        spec = one.job.spec.model_copy(update={"tags": {**tags, **one.job.spec.tags}})
        found.append(dataclasses.replace(one, job=dataclasses.replace(one.job, spec=spec)))
    return found


def send_many(prepared: Sequence[Prepared], *, ledger: Ledger) -> list[RunRecord]:
    """Submits all, as `send` does it for one. SpecError if the platform would refuse one: nothing is left behind."""
    checked = {id(one.backend): one for one in prepared}  # a backend was opened for each job that was resolved
    values = [accepted(one) for one in checked.values()]
    if any(other != values[0] for other in values):
        raise SpecError("the runs of a sweep have the same secrets; submit them one by one", key="secrets")
    plans, records = _entered(prepared, ledger)
    try:
        return carry_out(plans, records, prepared[0].backend, values[0], ledger=ledger)
    except REFUSALS as error:
        sent = sum(ledger.get(record.run_id).handle is not None for record in records)
        if not sent:
            raise
        lead = f"{sent} of {len(records)} runs were sent, the others not"
        raise _extended(error, f"; {lead}: cvlaunch runs --tag {SWEEP_TAG}={records[0].tags[SWEEP_TAG]}") from error


def _entered(prepared: Sequence[Prepared], ledger: Ledger) -> tuple[list[Plan], list[RunRecord]]:
    """Run files, durable. What has no files to store is on its way from here on."""
    owner = ProcessId.of().to_json()
    run_ids: set[str] = set()
    plans, records = [], []
    for one in prepared:
        while (run_id := fresh_run_id(one.job.spec)) in run_ids or run_id in ledger:
            pass
        run_ids.add(run_id)
        plans.append(one.plan(run_id))
        state = State.PREPARING if plans[-1].files else State.SENDING
        records.append(dataclasses.replace(record_of(one, plans[-1], owner), state=state))
    if taken := ledger.create_many(records):
        raise ConflictError(f"another process has just taken the run id {taken[0].run_id}; try again")
    return plans, records


def _extended(error: CvlaunchError, more: str) -> CvlaunchError:
    if isinstance(error, SpecError):
        return type(error)(f"{error.message}{more}", file=error.file, line=error.line, key=error.key)
    return type(error)(f"{error}{more}")
