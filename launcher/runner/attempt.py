"""One attempt of a run on one node: prepare, train, close."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import contract
from launcher.contract import (
    CANCEL,
    ENVIRONMENT,
    EXIT_BAD_CONFIG,
    EXIT_CANCELLED,
    EXIT_PREEMPTED,
    RESULT,
    write_json,
)
from launcher.errors import CvlaunchError, UnreachableError
from launcher.paths import trainer_folder
from launcher.quantities import format_duration
from launcher.runner.child import Child
from launcher.runner.claim import Owner
from launcher.runner.code import install_requirements, unpack_code
from launcher.runner.command import Command, build_command, command_environment
from launcher.runner.environment import describe_environment, package_changes
from launcher.runner.loaders import describe_shm, guard_loaders
from launcher.runner.logs import RunLog
from launcher.runner.pack import DATA, pack
from launcher.runner.place import Place
from launcher.runner.pulse import Pulse, Rhythm, read_heartbeat
from launcher.runner.ranks import wait_for_master
from launcher.runner.result import (
    End,
    Outcome,
    Result,
    Word,
    complete_checkpoints,
    exit_code_of,
    judge,
    last_metrics,
    leave_word,
    read_exit_file,
    write_failure,
)
from launcher.runner.root import scratch_folder
from launcher.runner.secret import read_secrets
from launcher.runner.stage import check_room, restore_checkpoint, restore_metrics, stage_channels
from launcher.runner.stop import Reason, Stop, Stopped, within
from launcher.runner.upload import Uploader
from launcher.shm import shm_free

__all__ = ["Attempt", "exit_code_of_error"]

_COMMAND_SHARE = 0.6
"""Of the grace time; the rest is for the upload."""
_UPLOAD_SHARE = 0.9
"""Of the grace time: when the upload has to be over."""
_UPLOAD_PATIENCE_S = 1800.0
"""At a normal end: how long nothing may reach the store before the upload is given up."""
_LAST_WRITE_S = 60.0
_DESCRIBE_S = 5.0
"""A graphics card that hangs is no reason to wait at the end."""
_LONGEST_BACK_OFF_S = 30.0
_CLOCKS_APART_S = 30.0
_SETTLE_S = 1.0
"""What a command left behind gets this long, when it ended by itself."""


def exit_code_of_error(error: CvlaunchError) -> int:
    """A service that is away may be back at the next start; nothing else heals by itself."""
    return 1 if isinstance(error, UnreachableError) else EXIT_BAD_CONFIG


@dataclass
class _Progress:
    """What changes as a run goes on. earlier_s: running time of the command before `running_since` (monotonic)."""

    attempt: int
    phase: str = "staging"
    restarts: int = 0
    earlier_s: float = 0.0
    running_since: float | None = None

    @property
    def elapsed_s(self) -> float:
        since = self.running_since
        return self.earlier_s + (0.0 if since is None else time.monotonic() - since)

    def go_on(self, heartbeat: Mapping[str, Any]) -> None:
        """Counts on from the last heartbeat of an earlier attempt."""
        elapsed, restarts = heartbeat.get("elapsed_s"), heartbeat.get("restarts")
        self.earlier_s = float(elapsed) if isinstance(elapsed, int | float) else 0.0
        self.restarts = restarts if isinstance(restarts, int) else 0

    def rest(self) -> None:
        self.earlier_s, self.running_since = self.elapsed_s, None

    def facts(self) -> dict[str, Any]:
        """What stands in the heartbeat, from which the next attempt goes on counting."""
        elapsed = round(self.elapsed_s, 3)
        return {"attempt": self.attempt, "phase": self.phase, "restarts": self.restarts, "elapsed_s": elapsed}


@dataclass(frozen=True)
class _Restored:
    """What the store has from earlier attempts: a checkpoint's step, path → bytes of growing files."""

    step: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


class Attempt:
    def __init__(
        self,
        place: Place,
        owner: Owner,
        *,
        override: Sequence[str] | None,
        environ: Mapping[str, str],
        stop: Stop,
        log: RunLog,
    ) -> None:
        self._place, self._job = place, place.job
        self._override, self._environ, self._stop, self._log = override, environ, stop, log
        self._started = time.time()
        self._owner, self._progress = owner, _Progress(owner.attempt)
        self._scratch = scratch_folder(place.layout)
        self._checkpoints_before = complete_checkpoints(place.layout.checkpoints)
        rhythm = Rhythm() if self._packs else None  # what is written to that folder goes to a store
        self._pulse = Pulse(place.store, stop, self._progress.facts, where=place.where, rhythm=rhythm)
        self._describer = threading.Thread(target=self._describe, daemon=True)

    def run(self) -> int:
        """The exit code."""
        uploader = None
        try:
            self._open_log()
            self._describer.start()
            restored = self._stop.during(self._restore)
            uploader = self._start_uploader(restored)
            outcome = self._train(self._stop.during(self._prepare))
        except Stopped:
            outcome = _stopped_before_start(self._stop, self._cancelled)
        except CvlaunchError as error:
            outcome = Outcome(Word.FAILED, exit_code_of_error(error), str(error))
        except Exception as error:  # a full disk, a bug: result.json has to say so all the same
            self._log.say(traceback.format_exc())
            outcome = Outcome(Word.FAILED, 1, f"{type(error).__name__}: {error}")
        return self._close(outcome, uploader)

    def _open_log(self) -> None:
        name = f"attempt-{self._progress.attempt}.node-{self._place.ranks.node_rank}.log"
        self._log.open(self._place.home.root / contract.LOGS / name)

    # -- prepare ------------------------------------------------------------------------------------------------------

    def _restore(self, abort: threading.Event) -> _Restored:
        """Counts and files of earlier attempts; away with their end."""
        place = self._place
        before = read_heartbeat(place.store, place.where)
        self._progress.go_on(before)
        for path in (place.home.root / RESULT, place.home.failure):
            path.unlink(missing_ok=True)
        if place.first:
            place.layout.stop.unlink(missing_ok=True)
        if before:
            place.store.delete([place.where + RESULT, f"{place.where}output/failure"])
        self._pulse.beat()
        self._pulse.start()
        step = None
        if self._mover("checkpoints") == "runner":
            step = restore_checkpoint(place.store, place.layout, abort, self._log.say)
            self._checkpoints_before = complete_checkpoints(place.layout.checkpoints)
        moved = place.first and "output" in self._moved()
        return _Restored(step, restore_metrics(place.store, place.layout) if moved else {})

    def _mover(self, folder: str) -> str:
        return self._job.movers.get(folder, "runner")

    @property
    def _packs(self) -> bool:
        """Whether no store is reached, and the platform brings out what the runner keeps."""
        return self._mover("output") == "platform"

    def _moved(self) -> list[str]:
        """The folders that this node uploads."""
        wanted = contract.OUTPUT_FOLDERS if self._place.first else ("output",)
        return [f for f in wanted if self._mover(f) == "runner" or (f == "output" and self._packs)]

    def _start_uploader(self, restored: _Restored) -> Uploader | None:
        folders = self._moved()
        if not folders:
            return None
        uploader = Uploader(
            self._place.home.root,
            self._place.store,
            folders,
            where=self._place.where,
            without=DATA if self._packs else "",
            quick=lambda: self._pulse.quick,
            watched=lambda: self._pulse.watched,
            say=self._log.say,
            restored=restored.sizes,
        )
        if restored.step:
            uploader.keep(restored.step)
        uploader.start()
        return uploader

    def _prepare(self, abort: threading.Event) -> Command:
        job, layout, say = self._job, self._place.layout, self._log.say
        self._say_hello()
        loading = guard_loaders(job, shm_free(), foreign=bool(self._override), say=say)
        secrets = read_secrets(job.secrets, self._environ)
        self._log.hide(secrets.values())
        check_room(job, layout)
        places = stage_channels(job, layout, self._scratch, abort=abort, say=say)
        if job.code:
            unpack_code(job.code, self._place.store, layout, mounted=self._place.code)
        env = self._environment(secrets, [], places)
        site = install_requirements(job.code, layout, env, abort) if job.code else None
        self._look_at_packages(site)
        if job.nodes > 1:
            self._wait_for_master(abort)
        code = layout.code if job.code else None
        paths = [trainer_folder() if job.train and not self._override else None, code, site]
        env = {**self._environment(secrets, [path for path in paths if path], places), **loading}
        return build_command(job, self._override, env=env, ranks=self._place.ranks, code=code, scratch=self._scratch)

    def _wait_for_master(self, abort: threading.Event) -> None:
        """This is running time, as it is on node 0, where the command waits for the others."""
        self._progress.running_since = time.monotonic()
        try:
            wait_for_master(self._place.ranks, abort, self._log.say, time_left=self._time_left)
        finally:
            self._progress.rest()

    def _environment(
        self, secrets: Mapping[str, str], paths: Sequence[Path], places: Mapping[str, Path]
    ) -> dict[str, str]:
        return command_environment(
            self._job,
            self._place.layout,
            environ=self._environ,
            secrets=secrets,
            ranks=self._place.ranks,
            attempt=self._progress.attempt,
            scratch=self._scratch,
            python_path=paths,
            places=places,
        )

    def _say_hello(self) -> None:
        place = self._place
        node = f", node {place.ranks.node_rank} of {place.ranks.nodes}" if place.ranks.nodes > 1 else ""
        self._log.say(
            f"{self._job.run_id}, attempt {self._progress.attempt}{node}; root {place.layout.root}; {describe_shm()}"
        )

    def _look_at_packages(self, site: Path | None) -> None:
        """site: the folder of those that the job itself brought, which environment.json names, too."""
        if site:
            self._describer.join(_DESCRIBE_S)
            self._describe(site)
        if changes := package_changes(site):
            self._log.say(f"packages are not as in the image: {changes}")

    def _describe(self, site: Path | None = None) -> None:
        """Beside the start: nvidia-smi can take seconds."""
        write_json(self._place.home.root / ENVIRONMENT, describe_environment(self._job, self._environ, site=site))

    # -- train --------------------------------------------------------------------------------------------------------

    def _train(self, command: Command) -> Outcome:
        """Runs the command, again after a crash as long as retries are left."""
        back_off = 1.0
        while True:
            outcome = self._judge(self._run_once(command))
            if not self._try_again(outcome):
                return outcome
            self._progress.restarts += 1
            self._log.say(
                f"{outcome.reason}; restart {self._progress.restarts} of {self._job.retries} in {back_off:.0f} s"
            )
            self._pause(back_off)
            if self._stop.reason is not None:
                return self._judge(End(outcome.exit_code))
            back_off = min(2 * back_off, _LONGEST_BACK_OFF_S)

    def _try_again(self, outcome: Outcome) -> bool:
        if outcome.state is not Word.FAILED or outcome.exit_code == EXIT_BAD_CONFIG or self._stop.reason is not None:
            return False
        return self._progress.restarts < self._job.retries and not self._cancelled()

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._stop.reason is None and time.monotonic() < end:
            self._stop.wait(end - time.monotonic())

    def _run_once(self, command: Command) -> End:
        place, progress = self._place, self._progress
        if self._stop.reason is not None:
            raise Stopped
        if self._time_left() <= 0:
            self._stop.ask(Reason.TIMEOUT)
            return End(1)
        if place.first:
            place.layout.exit.unlink(missing_ok=True)
        since = 0.0 if place.first else time.time() - _CLOCKS_APART_S
        progress.phase, progress.running_since = "running", time.monotonic()
        self._log.begin_command()
        child = Child(command, self._log, first_rank=place.ranks.node_rank * self._job.processes, ended=self._stop.wake)
        try:
            code = self._follow(child)
        except BaseException:  # it must not outlive us
            child.finish(0)
            raise
        progress.rest()
        saved = complete_checkpoints(place.layout.checkpoints) - self._checkpoints_before
        left = read_exit_file(place.layout.exit, since=since)
        return End(code, left, bool(saved), self._log.last_lines())

    def _follow(self, child: Child) -> int:
        """The exit code; the child is stopped when a stop is asked for or the time is up."""
        while child.running and self._stop.reason is None:
            self._stop.wait(min(self._time_left(), 60.0))
            if self._time_left() <= 0:
                self._stop.ask(Reason.TIMEOUT)
        return child.finish(_SETTLE_S) if self._stop.reason is None else self._stop_child(child, self._stop.reason)

    def _time_left(self) -> float:
        timeout = self._job.timeout_s
        return float("inf") if timeout is None else timeout - self._progress.elapsed_s

    def _stop_child(self, child: Child, reason: Reason) -> int:
        """The mark of a cancellation is looked for after TERM, as the store may be slow."""
        self._progress.phase = "stopping"
        self._log.say(f"stopping: {reason}; {format_duration(self._job.grace_s)} of grace")
        self._tell(reason)
        child.ask_to_stop()
        if self._cancelled() and self._stop.reason is not reason:
            self._tell(Reason.CANCELLED)
        return child.finish(self._stop.left(_COMMAND_SHARE * self._job.grace_s))

    def _tell(self, reason: Reason) -> None:
        with self._as_room_allows("control/stop"):  # TERM says enough
            write_json(self._place.layout.stop, {"reason": reason})

    def _cancelled(self) -> bool:
        """Looks for the mark, for a moment, and notes it."""
        store = self._place.store
        marked = within(min(10.0, 0.1 * self._job.grace_s), lambda: store.head(CANCEL) is not None) or False
        if marked:
            self._stop.ask(Reason.CANCELLED)
        return marked

    def _judge(self, end: End) -> Outcome:
        return judge(end, self._stop.reason, timeout_s=self._job.timeout_s)

    # -- close --------------------------------------------------------------------------------------------------------

    def _close(self, outcome: Outcome, uploader: Uploader | None) -> int:
        """failure, the upload, and result.json as the last word."""
        self._progress.phase = "uploading"
        if outcome.state in (Word.FAILED, Word.TIMED_OUT):
            with self._as_room_allows("failure"):
                write_failure(self._place.home.failure, self._log.mask(outcome.reason), self._log.last_lines())
        code = f"exit code {outcome.exit_code}"
        why = f": {outcome.reason}" if outcome.reason not in ("", code) else ""
        self._log.say(f"{outcome.state}, {code}{why}")
        if self._describer.ident:
            self._describer.join(_DESCRIBE_S)
        upload = self._finish_upload(uploader)
        with self._as_room_allows("result.json"):
            self._write_result(outcome, upload)
        if self._packs:
            with self._as_room_allows(f"{DATA}/{contract.PACKED}"):
                pack(self._place)
        reason = self._log.mask(outcome.reason)
        leave_word(self._environ, outcome.state, outcome.exit_code, reason, attempt=self._progress.attempt)
        self._pulse.end()
        self._progress.phase = "ended"
        self._within_grace(self._pulse.beat)
        _remove(self._scratch)
        return exit_code_of(outcome, self._environ)

    @contextlib.contextmanager
    def _as_room_allows(self, name: str) -> Iterator[None]:
        """The exit code is kept even on a disk that is full."""
        try:
            yield
        except OSError as error:
            self._log.say(f"{name} could not be written: {error.strerror}")

    def _finish_upload(self, uploader: Uploader | None) -> str:
        """`upload` in result.json. Without an uploader the start failed, or there is nothing to move."""
        if uploader is None:
            return "incomplete" if self._moved() else "in_place"
        uploader.finish()
        since = time.monotonic()
        while not uploader.done.wait(0.05):
            idle = time.monotonic() - max(since, uploader.progress_at)
            late = self._stop.reason is not None and self._stop.left(_UPLOAD_SHARE * self._job.grace_s) <= 0
            if late or idle > _UPLOAD_PATIENCE_S:
                uploader.give_up()
                uploader.done.wait(0.2)
                break
        if not uploader.complete:
            self._log.say("the upload is incomplete; what is missing is lost with this machine")
        return "complete" if uploader.complete else "incomplete"

    def _write_result(self, outcome: Outcome, upload: str) -> None:
        place = self._place
        result = Result(
            run_id=self._job.run_id,
            native_id=self._owner.native_id,
            state=outcome.state,
            exit_code=outcome.exit_code,
            reason=self._log.mask(outcome.reason),
            attempt=self._progress.attempt,
            restarts=self._progress.restarts,
            started=self._started,
            ended=time.time(),
            upload=upload,
            metrics=last_metrics(place.layout.metrics),
        )
        result.write(place.home)
        if "output" in self._moved():
            path = place.home.root / RESULT
            self._within_grace(lambda: place.store.write(place.where + RESULT, path))

    def _within_grace(self, work: Callable[[], None]) -> None:
        left = _LAST_WRITE_S if self._stop.reason is None else max(self._stop.left(self._job.grace_s), 1.0)
        within(left, work)


def _stopped_before_start(stop: Stop, cancelled: Callable[[], bool]) -> Outcome:
    """Nothing is lost: the next start stages in again."""
    if stop.reason is Reason.CANCELLED or cancelled():
        return Outcome(Word.CANCELLED, EXIT_CANCELLED, "cancelled")
    return Outcome(Word.PREEMPTED, EXIT_PREEMPTED, "preempted before the command started")


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
