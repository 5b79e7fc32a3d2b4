"""Data loaders and /dev/shm: what fits before the start, and the words for what went wrong after all."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable

from launcher.contract import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_PREEMPTED, JobFile
from launcher.quantities import format_size
from launcher.shm import SHM, Loaders, Loading, rounded_need, shm_free, shm_size, size_as_written

__all__ = ["describe_shm", "guard_loaders", "shm_reason"]

_SMALL = 64 * 2**20
"""What containers get when nobody asks for more."""

_LONGEST_QUOTE = 240

_SIGNATURES = re.compile(
    r"unable to allocate shared memory"  # torch 2.x, out of space
    r"|unable to write to file </torch_"  # before
    r"|\bbus error\b"  # torch's handler in the worker, its message in the training process, a shell
    r"|(/torch_|\bshm\b).*No space left on device"
    r"|No space left on device.*(/torch_|\bshm\b)",
    re.IGNORECASE,
)


def describe_shm() -> str:
    """`/dev/shm 64.0 MiB, 63.9 MiB free`."""
    size, free = shm_size(), shm_free()
    if size is None:
        return f"no {SHM}"
    if free is None:
        return f"{SHM} that can't be written"
    return f"{SHM} {format_size(size)}, {format_size(free)} free" if size else f"{SHM} without a limit"


def guard_loaders(job: JobFile, free: int | None, *, foreign: bool, say: Callable[[str], None]) -> dict[str, str]:
    """Variables for the built-in trainer: its loaders as asked or, with a warning, as they fit into `free` bytes.

    free: None where there is no /dev/shm to write in. foreign: a command of the user's runs, which gets advice alone.
    """
    loaders = None if foreign else _loaders(job)
    if loaders is None:
        _advise(free, say)
        return {}
    loading = loaders.fitting(free or 0)
    if loading != loaders.asked:
        say(_warning(loaders, loading, free))
    return loading.to_environment()


def _loaders(job: JobFile) -> Loaders | None:
    """None for a command, and for settings that the trainer will refuse."""
    try:
        return Loaders.of_train(job.train, job.processes, gpus=job.gpus) if job.train else None
    except (KeyError, TypeError, ValueError):
        return None


def _warning(loaders: Loaders, loading: Loading, free: int | None) -> str:
    there = "can't be used" if free is None else f"has {format_size(free)} free"
    fewer = loading.workers < loaders.asked.workers
    effect = (
        "Ultralytics draws its augmentation per worker, so the results differ from those with the workers asked for"
        if loaders.task == "detect" and fewer
        else "loading may be slower, the results are the same"
    )
    return (
        f"warning: {SHM} {there}, too little for the data loaders ({loaders}); going on with {loading} "
        f"({format_size(loaders.need(loading))}); {effect}. The way out is resources.shm: "
        f"{size_as_written(rounded_need(loaders.need()))} or, where the platform fixes the size, fewer train.workers "
        "or a smaller train.batch"
    )


def _advise(free: int | None, say: Callable[[str], None]) -> None:
    size = shm_size()
    if free is None:
        say(f"there is no {SHM} to write in: PyTorch data loaders with workers will fail; use num_workers=0")
    elif size and size <= _SMALL:
        say(
            f"{SHM} has {format_size(size)}: a PyTorch data loader needs (num_workers × prefetch_factor + 1) × the "
            "bytes of a batch there, or dies with a bus error; resources.shm: 1Gi gives more where the platform "
            "lets it be set, else use fewer workers"
        )


def shm_reason(code: int, last_lines: Iterable[str]) -> str | None:
    """Why a command ended with `code`, and the way out, if /dev/shm was full; None if it was something else."""
    if code in (EXIT_DONE, EXIT_BAD_CONFIG, EXIT_PREEMPTED):
        return None
    told = [line.strip()[:_LONGEST_QUOTE] for line in last_lines if _SIGNATURES.search(line)]
    if not told and code != 128 + signal.SIGBUS:
        return None
    size = shm_size()
    what = f"{told[-1]}: {SHM} is" if told else f"killed by SIGBUS: {SHM} is most likely"
    return (
        f"{what} too small for the data loaders{f' ({format_size(size)})' if size else ''}; resources.shm: 1Gi gives "
        "more where the platform lets it be set, else use fewer workers, a lower prefetch or a smaller batch; the "
        "sharing strategy file_system does not help, as it lives there, too"
    )
