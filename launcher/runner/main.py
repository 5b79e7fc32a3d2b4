"""The order of a run, from top to bottom."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn

from launcher.contract import EXIT_CANCELLED, EXIT_PREEMPTED, OWNER, Layout
from launcher.errors import CvlaunchError
from launcher.runner.attempt import Attempt, exit_code_of_error
from launcher.runner.job import command_of_arguments, read_job
from launcher.runner.logs import RunLog
from launcher.runner.place import NothingToRun, enter, find_place
from launcher.runner.result import Word, leave_word, write_failure
from launcher.runner.stop import Reason, Stop, Stopped

__all__ = ["run"]


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Ends the process, whatever threads still hang in a store: they must not keep the machine."""
    stop = Stop()
    stop.install()
    code = _run(arguments, environ, stop, RunLog(tagged=environ.get("CVLAUNCH_LOG") == "tagged"))
    sys.stdout.flush()
    os._exit(code)


def _run(arguments: Sequence[str], environ: Mapping[str, str], stop: Stop, log: RunLog) -> int:
    try:
        override = command_of_arguments(arguments)
        source = stop.during(lambda abort: read_job(environ))
        place = stop.during(lambda abort: find_place(source, environ, log))
        owner = stop.during(lambda abort: enter(place, source.data, environ))
        attempt = Attempt(place, owner, override=override, environ=environ, stop=stop, log=log)
    except Stopped:
        return EXIT_CANCELLED if stop.reason is Reason.CANCELLED else EXIT_PREEMPTED
    except NothingToRun as reason:
        log.say(str(reason))
        leave_word(environ, reason.state, reason.exit_code, str(reason))
        return reason.exit_code
    except CvlaunchError as error:
        log.say(str(error))
        return _failed(environ, exit_code_of_error(error), str(error))
    except Exception as error:  # a full disk, a bug
        log.say(traceback.format_exc())
        return _failed(environ, 1, f"{type(error).__name__}: {error}")
    return attempt.run()


def _failed(environ: Mapping[str, str], code: int, text: str) -> int:
    """For a platform that shows it; the run's own folder isn't ours yet, so only where there is a folder already."""
    leave_word(environ, Word.FAILED, code, text)
    layout = Layout.from_environment(environ)
    owned = (layout.root / OWNER).exists()
    wanted = layout.output.is_dir() or "TRAINING_JOB_ARN" in environ  # SageMaker looks there, and makes nothing
    if wanted and not owned:
        with contextlib.suppress(OSError):
            write_failure(layout.failure, text, [])
    return code
