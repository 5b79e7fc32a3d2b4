"""`python -m cvtrainer`: finds the job, trains, and says how it ended (DESIGN §4: 0, 64, 75, else 1)."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

from cvtrainer.run import Preempted, Ranks, Run, Stop, UserError, leave, read_job
from launcher.contract import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_PREEMPTED, Layout


def main() -> int:
    layout, ranks = Layout.from_environment(), Ranks.from_environment()
    stop = Stop(layout.stop)
    stop.listen()  # before torch is imported, which takes seconds
    if ranks.main:
        for stale in (layout.exit, layout.failure):
            stale.unlink(missing_ok=True)
    try:
        _train(layout, ranks, stop)
    except UserError as error:
        return leave(layout, ranks, code=EXIT_BAD_CONFIG, reason=str(error))
    except Preempted as error:
        return leave(layout, ranks, code=EXIT_PREEMPTED, reason=str(error))
    except Exception as error:
        traceback.print_exc()
        return leave(layout, ranks, code=1, reason=_last_line(error))
    return leave(layout, ranks, code=EXIT_DONE, reason="done")


def _train(layout: Layout, ranks: Ranks, stop: Stop) -> None:
    from pydantic import TypeAdapter, ValidationError

    from launcher.spec import ClassifyConfig, DetectConfig, TrainConfig

    job = read_job(layout)
    adapter: TypeAdapter[ClassifyConfig | DetectConfig] = TypeAdapter(TrainConfig)
    try:
        config = adapter.validate_python(dict(job.train or {}))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, ("train", *problem["loc"][1:])))  # the first part is the task
        raise UserError(f"{key}: {problem['msg']}") from error
    importlib.import_module(f"cvtrainer.{config.task}").train(Run(layout, job, ranks, stop), config)


def _last_line(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _end(code: int) -> NoReturn:
    """At once: all is written by now, and taking torch apart would take another second and a half."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
