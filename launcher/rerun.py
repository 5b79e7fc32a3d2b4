"""The job of an earlier run once more: the code as it was sent then, all else as it is found now."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launcher import contract
from launcher.backends.base import Job
from launcher.contract import Code, sha256_file
from launcher.errors import IntegrityError
from launcher.jobfile import apply_settings
from launcher.ledger import Ledger, RunRecord
from launcher.resolve import digest_of
from launcher.spec import JobSpec
from launcher.stores import Store
from launcher.submission import Prepared, prepare
from launcher.yamlfile import Document

__all__ = ["prepare_again"]


@contextlib.contextmanager
def prepare_again(
    earlier: RunRecord,
    store: Store,
    *,
    backend: str | None = None,
    target: str | None = None,
    settings: Sequence[str] = (),
    make: Callable[[str], None] | None = None,
    ledger: Ledger,
) -> Iterator[Prepared]:
    """For the same target, unless another is given. store: the earlier run's folder.

    make: as in `resolve`. A setting of `code` means the folder as it is now; so does an archive that the store has no
    more.
    """
    earlier.require_ours("its job is not known well enough to send it again; write a job file with its image and data")
    spec = apply_settings(Document(Path(f"the job of {earlier.run_id}"), earlier.job["spec"]), settings)
    with tempfile.TemporaryDirectory(prefix="cvlaunch-") as scratch:
        archive = Path(scratch) / "code.tar.gz"
        code = None if _touched(settings) else _fetched(earlier, store, archive)
        with prepare(
            spec.model_copy(update={"code": None}) if code else spec,
            backend=backend,
            target=target if backend or target else earlier.target_name,
            folder=Path(earlier.job["folder"]),
            make=make,
            ledger=ledger,
        ) as prepared:
            job = _with_code(prepared.job, spec, code, archive, earlier) if code else prepared.job
            yield dataclasses.replace(prepared, job=job, rerun_of=earlier.run_id)


def _touched(settings: Sequence[str]) -> bool:
    return any(setting.partition("=")[0].partition(".")[0] == "code" for setting in settings)


def _fetched(earlier: RunRecord, store: Store, to: Path) -> Code | None:
    """The earlier run's archive, written to `to`; None if it had no code, or the store has it no more."""
    stored = earlier.job["job_file"].get("code")
    if not stored:
        return None
    code = Code(**{field.name: stored[field.name] for field in dataclasses.fields(Code) if field.name in stored})
    try:
        store.download(contract.CODE, to)
    except FileNotFoundError:
        return None
    if sha256_file(to) != code.sha256:
        raise IntegrityError(
            f"{store.uri}/{contract.CODE} is not the code that was sent; --set code.root=FOLDER sends another"
        )
    return code


def _with_code(job: Job, spec: JobSpec, code: Code, archive: Path, earlier: RunRecord) -> Job:
    about_code = [reason for reason in earlier.plan["unpinned"] if reason.startswith("code:")]
    return dataclasses.replace(
        job,
        spec=spec,
        code=code,
        code_archive=str(archive),
        digest=digest_of(spec, channels=job.channels, code=code, image=job.image),
        unpinned=(*job.unpinned, *about_code),
    )
