"""What both tasks share: the job, its channels, the stop flag, metrics and the way out. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_PREEMPTED, JobFile, Layout, channel_variable, write_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Preempted", "Ranks", "Recorder", "Run", "Stop", "UserError", "brief", "leave", "read_job"]

_FAILURE_LENGTH = 1024
_BRIEF_LENGTH = 160


class UserError(Exception):
    """Data or configuration that no restart can mend: exit 64 with this one line."""


class Preempted(Exception):  # noqa: N818 - it is no error
    """Asked to stop, and stopped: exit 75."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others, as torchrun says it."""

    rank: int = 0
    local: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Ranks:
        rank, local, world = (
            int(environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        return cls(rank, local, world)

    @property
    def main(self) -> bool:
        return self.rank == 0


class Stop:
    """Whether the run was asked to stop: by SIGTERM, by SIGUSR1, or by the file that the runner writes."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._asked = False
        self._looked = 0.0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Cheap enough for every step: the file system is asked once a second."""
        now = time.monotonic()
        if not self._asked and now - self._looked >= 1:
            self._looked = now
            self._asked = self._file.exists()
        return self._asked


@dataclass(frozen=True)
class Run:
    """One running job, as one of its processes sees it."""

    layout: Layout
    job: JobFile
    ranks: Ranks
    stop: Stop

    def channel(self, name: str) -> Path | None:
        """The channel's folder, None if the job has no such channel."""
        folder = Path(os.environ.get(channel_variable(name)) or self.layout.channel(name))
        return folder if folder.exists() else None

    def need_channel(self, name: str) -> Path:
        folder = self.channel(name)
        if folder is None:
            wanted = os.environ.get(channel_variable(name)) or self.layout.channel(name)
            raise UserError(f"the data channel {name!r} is missing: {wanted} does not exist")
        return folder

    @property
    def max_steps(self) -> float:
        """$CVLAUNCH_MAX_STEPS: after so many steps training ends as after the last epoch; infinite without it."""
        text = os.environ.get("CVLAUNCH_MAX_STEPS")
        if not text:
            return math.inf
        if not text.isdecimal() or not int(text):
            raise UserError(f"CVLAUNCH_MAX_STEPS is {text!r}; expected a number of steps, 1 or more")
        return int(text)

    def say(self, text: str) -> None:
        """One line on stdout, from rank 0 alone."""
        if self.ranks.main:
            print(text, flush=True)


class Recorder:
    """Appends to `output/metrics.jsonl` and to TensorBoard's events.

    The file only grows, because it is uploaded by its offset: a resumed run appends again from its checkpoint's step,
    and of each (step, split) the last line counts.
    """

    def __init__(self, layout: Layout) -> None:
        self._metrics = layout.metrics
        self._events = layout.output / "tensorboard"
        self._board: SummaryWriter | None = None
        layout.output.mkdir(parents=True, exist_ok=True)
        _end_last_line(self._metrics)

    def log(self, step: int, epoch: int, *, split: str, values: Mapping[str, float]) -> None:
        row = {"step": step, "epoch": epoch, "time": time.time(), "split": split, "values": dict(values)}
        with self._metrics.open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")
        for name, value in values.items():
            self._events_from(step).add_scalar(f"{split}/{name}", value, step)

    def _events_from(self, step: int) -> SummaryWriter:
        """The writer; TensorBoard then hides what an earlier attempt wrote of this and later steps."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._events), purge_step=step)
        return self._board

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _end_last_line(path: Path) -> None:
    """A process killed while writing leaves half a line; the next one must not be glued to it."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab", buffering=0) as file:
            file.write(b"\n")


def brief(error: BaseException) -> str:
    """The first line of a library's message, short enough to stand in ours."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= _BRIEF_LENGTH else line[: _BRIEF_LENGTH - 1] + "…"


def read_job(layout: Layout) -> JobFile:
    try:
        return JobFile.from_bytes(layout.job.read_bytes())
    except OSError as error:
        raise UserError(f"{layout.job} can't be read: {error.strerror}; is CVLAUNCH_ROOT right?") from error
    except ValueError as error:
        raise UserError(f"{layout.job}: {error}") from error


def leave(layout: Layout, ranks: Ranks, *, code: int, reason: str) -> int:
    """Leaves `exit.json` and, for a failure, `failure`; returns `code`.

    torchrun turns every code into 1, so the runner reads the file. Rank 0 writes it; another rank only says that it
    failed, and rank 0, killed for that, doesn't replace the reason by its own.
    """
    if code not in (EXIT_DONE, EXIT_PREEMPTED):
        print(f"cvtrainer: {reason}", file=sys.stderr, flush=True)
    if ranks.main or code == EXIT_BAD_CONFIG:
        known = layout.exit.exists() and code not in (EXIT_DONE, EXIT_PREEMPTED)
        if not known:
            write_json(layout.exit, {"code": code, "reason": reason})
            if code not in (EXIT_DONE, EXIT_PREEMPTED):
                layout.failure.write_text(reason[:_FAILURE_LENGTH])
    return code
