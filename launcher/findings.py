"""What containers did under a platform's rules → which rules they kept. Pure: rehearse.py runs them.

The log is read for the words in which shells, Python and C libraries complain; a run that failed is blamed on the
first rule that has such words, so that one mistake of an image is one broken rule.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePosixPath

from launcher.contract import CONTRACTS_ACCEPTED, EXIT_CANCELLED, EXIT_DONE, EXIT_PREEMPTED
from launcher.engine import LocalImage
from launcher.quantities import format_size
from launcher.rules import ContainerRules
from launcher.runner.loaders import shm_reason

__all__ = ["CONTRACT_LABEL", "PLATFORM", "Case", "Finding", "Ran", "Verdict", "findings"]

CONTRACT_LABEL = "io.cvlaunch.contract"
PLATFORM = "linux/amd64"

_RUNNER = "cvlaunch: "
"""Begins each line of the runner's own."""


class Verdict(StrEnum):
    KEPT = "kept"
    BROKEN = "broken"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Finding:
    """seen: the evidence. way_out: what to change, of a broken rule. source: a key of rules.SOURCES, or empty."""

    rule: str
    verdict: Verdict
    seen: str
    way_out: str = ""
    source: str = ""


@dataclass(frozen=True)
class Case:
    """What is rehearsed. user: `uid:gid` that it runs as. runner: under cvlaunch-run. trains: by the built-in trainer.

    shm, grace_s: bytes and seconds that it is given. network: it may use it. mounted: targets of all mounts.
    """

    platform: str
    rules: ContainerRules
    image: LocalImage
    user: str
    runner: bool
    trains: bool
    shm: int
    grace_s: float
    network: bool
    mounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ran:
    """One container. exit_code: None if it never started. changes: `A /path`, as the engine lists them.

    stopped_after: seconds of running after which it was asked to stop, None if it ended by itself. took: seconds from
    there to its end, None if it was killed. error: the engine's, if it never started. result: the state in result.json.
    upload: the same file's. checkpoint: step of the newest complete one in the store. model: whether one is there.
    """

    seconds: float
    exit_code: int | None
    lines: Sequence[str] = ()
    changes: Sequence[str] = ()
    stopped_after: float | None = None
    took: float | None = None
    error: str = ""
    result: str = ""
    reason: str = ""
    upload: str = ""
    checkpoint: str | None = None
    model: bool = False

    @property
    def failed(self) -> bool:
        """By itself."""
        return self.stopped_after is None and self.exit_code != EXIT_DONE


@dataclass(frozen=True)
class _Sign:
    """words: a pattern in a line of the log. always: breaks the rule even where the run succeeded."""

    rule: str
    words: str
    always: bool = False


_SIGNS = (
    _Sign("read-only root", r"read-only file system|\[Errno 30\]", always=True),
    _Sign(
        "network",
        r"name resolution|name or service not known|could(n't| not) resolve|network is unreachable|unknown host"
        r"|no address associated|getaddrinfo|nameresolutionerror|failed to establish a new connection"
        r"|couldn't connect to|connect\w* (to \S+ )?failed|unable to connect|weights of \S+ can't be had",
    ),
    _Sign("user", r"getpw|uid not found|cannot find name for user|no such user|no user exists for uid|I have no name"),
    _Sign("writes", r"permission denied|\[Errno 13\]|can be written by uid|operation not permitted", always=True),
)
"""Asked in this order after shared memory, whose words runner/loaders.py knows."""

_HARMLESS = {".cache", ".config", ".triton", ".nv", "__pycache__"}
"""Parts of paths that hold what is made again."""
_ENGINES_FOLDERS = ("/dev", "/proc", "/sys", "/run", "/var/run", "/var/tmp", "/var/cache")  # noqa: S108 names of folders
_ENGINES_FILES = {"/etc", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/etc/passwd", "/etc/group"}
_LONGEST = 300
"""Characters of a log's line in the report."""


def findings(case: Case, first: Ran, stopped: Ran | None, *, no_runner: str = "") -> list[Finding]:
    """One for each rule, in the order in which they come into play.

    first: the run that may end by itself. stopped: the one that was asked to stop, which may be the same; None if
    there was none. no_runner: why cvlaunch-run could not be started, where the image was tried without it.
    """
    found = [_platform(case), _contract(case), _starts(case, first, no_runner)]
    if first.exit_code is None:
        found += [Finding(rule, Verdict.NOT_TRIED, "it did not start") for rule in _rules_of_running(case)]
    else:
        found += _running(case, first, stopped)
    sources = case.rules.sources
    return [replace(finding, source=sources.get(finding.rule, "")) for finding in found]


def _rules_of_running(case: Case) -> list[str]:
    read_only = ["read-only root"] if case.rules.read_only_root else []
    return ["user", "writes", *read_only, "shm", "network", "results", "stop"]


def _running(case: Case, first: Ran, stopped: Ran | None) -> Iterator[Finding]:
    runs = [first] if stopped is None or stopped is first else [first, stopped]
    signs = _signs(case, runs)
    blamed = next(iter(signs), None) if first.failed else None
    for rule in _rules_of_running(case):
        always = rule == "shm" or any(sign.rule == rule and sign.always for sign in _SIGNS)
        if rule == "stop":
            yield _stop(case, first, stopped)
        elif rule == "writes" and (lost := _lost(case, runs)):
            yield Finding(rule, Verdict.BROKEN, f"{_several(lost)}: lost with the container", _write_below(case))
        elif rule in signs and (rule == blamed or (always and blamed is None)):
            yield _broken(case, rule, signs[rule])
        elif blamed is not None and rule in ("read-only root", "shm", "network", "results"):
            yield Finding(rule, Verdict.NOT_TRIED, f"it ended early: see {blamed}")
        elif rule == "results":
            yield _results(case, first)
        elif first.failed and rule in ("shm", "network"):
            yield Finding(rule, Verdict.NOT_TRIED, "it ended early: see results")
        else:
            yield _kept(case, rule, runs, signs.get(rule, ""))


def _signs(case: Case, runs: Sequence[Ran]) -> dict[str, str]:
    """Rule → the first line of a log that complains about it."""
    lines = [line for run in runs for line in run.lines]
    others = [line for line in lines if not line.startswith(_RUNNER)]
    found: dict[str, str] = {}
    if spent := next((line for line in others if shm_reason(1, [line])), None):
        found["shm"] = spent
    elif runs[0].exit_code == 128 + signal.SIGBUS:
        found["shm"] = "killed by SIGBUS"
    for sign in _SIGNS:
        if line := next((line for line in lines if re.search(sign.words, line, re.IGNORECASE)), None):
            in_data = f"{case.rules.root}/input/data/" in line  # read-only everywhere
            known = sign.rule in _rules_of_running(case) and not (sign.rule == "read-only root" and in_data)
            found.setdefault(sign.rule if known else "writes", line)
    return {rule: line.strip()[:_LONGEST] for rule, line in found.items()}


def _several(things: Sequence[str]) -> str:
    return things[0] if len(things) == 1 else f"{things[0]} (and {len(things) - 1} more)"


def _lost(case: Case, runs: Sequence[Ran]) -> list[str]:
    """Paths that were written outside the folders that are kept, without caches and what the engine makes.

    A folder right below / that only changed had something that is gone again.
    """
    lines = {line for run in runs for line in run.changes}
    changed = {line[2:] for line in lines if not (line.startswith("C ") and line.count("/") == 1)}
    parents = {str(parent) for path in (*changed, *case.mounted) for parent in PurePosixPath(path).parents}
    allowed = (*case.rules.writable, *case.mounted, *_ENGINES_FOLDERS)
    return sorted(
        path
        for path in changed - parents - _ENGINES_FILES
        if not any(PurePosixPath(path).is_relative_to(folder) for folder in allowed)
        and not _HARMLESS & set(PurePosixPath(path).parts)
    )


# One rule each


def _platform(case: Case) -> Finding:
    found = case.image.platform
    if found == PLATFORM:
        return Finding("platform", Verdict.KEPT, found)
    return Finding("platform", Verdict.BROKEN, f"{found} instead of {PLATFORM}", f"build it with --platform {PLATFORM}")


def _contract(case: Case) -> Finding:
    label = case.image.labels.get(CONTRACT_LABEL)
    accepted = ", ".join(map(str, CONTRACTS_ACCEPTED))
    if not case.runner:
        return Finding("contract", Verdict.NOT_TRIED, "it runs without cvlaunch-run")
    if label is None:
        return Finding("contract", Verdict.NOT_TRIED, f"the image has no label {CONTRACT_LABEL}")
    if label in map(str, CONTRACTS_ACCEPTED):
        return Finding("contract", Verdict.KEPT, f"version {label}")
    way_out = f"build it with this version of cvlaunch, which takes {accepted}"
    return Finding("contract", Verdict.BROKEN, f"version {label}", way_out)


def _starts(case: Case, first: Ran, no_runner: str) -> Finding:
    if no_runner:
        way_out = "install cvlaunch in the image (pip install cvlaunch), or say runner: none in the job"
        return Finding("starts", Verdict.BROKEN, no_runner, way_out)
    if first.exit_code is None:
        way_out = "the entry point and the command must be there, executable, and made for this processor"
        return Finding("starts", Verdict.BROKEN, first.error, way_out)
    return Finding("starts", Verdict.KEPT, "by cvlaunch-run" if case.runner else "by its own entry point")


def _broken(case: Case, rule: str, seen: str) -> Finding:
    return Finding(rule, Verdict.BROKEN, seen, _WAYS_OUT[rule].format(**_words(case)))


def _write_below(case: Case) -> str:
    return f"write below {' or '.join(case.rules.writable)}"


def _words(case: Case) -> dict[str, str]:
    shm = case.rules.shm
    fixed = f"its size is fixed on {case.platform}: fewer data loader workers, a smaller batch"
    return {
        "write_below": _write_below(case),
        "platform": case.platform,
        "shm": f"resources.shm: 1Gi, which {case.platform} sets by {shm.how}" if shm.how else fixed,
    }


_WAYS_OUT = {
    "user": "take no user name for granted: set HOME and USER, or let cvlaunch-run start it, which does",
    "writes": "{write_below}; or open the folder in the Dockerfile: chgrp -R 0 FOLDER && chmod -R g=u FOLDER",
    "read-only root": "{write_below} and nowhere else",
    "shm": "{shm}",
    "network": "bring it along: files as a data channel, weights as the channel `weights`, packages in the image; or, "
    "where {platform} lets it out, rehearse with --network",
}


def _kept(case: Case, rule: str, runs: Sequence[Ran], sign: str) -> Finding:
    entry = "as the platform enters it" if case.rules.passwd else "without an entry in /etc/passwd"
    warned = next((ln for ln in runs[0].lines if ln.startswith(f"{_RUNNER}warning: /dev/shm")), "")
    seen = {
        "user": f"{case.user}, {entry}" if not case.user.startswith("0") else "root",
        "writes": f"only below {' and '.join(case.rules.writable)}",
        "read-only root": "nothing else was written",
        "shm": f"{format_size(case.shm)}; {warned.removeprefix(_RUNNER)}"
        if warned
        else f"{format_size(case.shm)} are enough",
        "network": f"it went on without: {sign}" if sign else "it ran without",
    }[rule]
    if rule == "network" and case.network:
        return Finding(rule, Verdict.NOT_TRIED, "--network lets it out")
    return Finding(rule, Verdict.KEPT, seen)


def _results(case: Case, first: Ran) -> Finding:
    if first.stopped_after is not None:
        return Finding(
            "results", Verdict.NOT_TRIED, f"still running after {first.stopped_after:.0f} s; --seconds gives it longer"
        )
    if first.failed:
        last = next((line.strip() for line in reversed(first.lines) if line.strip()), "it printed nothing")
        seen = f"exit code {first.exit_code}: {first.reason or last}"[:_LONGEST]
        return Finding("results", Verdict.BROKEN, seen, "the log's last lines are below")
    if case.runner and (first.result != "SUCCEEDED" or first.upload != "complete"):
        seen = f"exit code 0; result.json says {first.result or 'nothing'}, upload {first.upload or 'none'}"
        return Finding("results", Verdict.BROKEN, seen, "the log's last lines are below")
    if case.trains and not first.model:
        return Finding(
            "results", Verdict.BROKEN, "exit code 0, and no model", "the image's trainer writes model/model.pt"
        )
    what = ", model written" if case.trains else ", result.json written" if case.runner else ""
    return Finding("results", Verdict.KEPT, f"exit code 0 after {first.seconds:.0f} s{what}")


def _stop(case: Case, first: Ran, stopped: Ran | None) -> Finding:
    """In time, by itself, with a code that says so; a training leaves a complete checkpoint."""
    signal_name = case.rules.stop_signal
    if stopped is None:
        return Finding("stop", Verdict.NOT_TRIED, "it does not get that far" if first.failed else "it was not asked to")
    if stopped.stopped_after is None:
        return Finding("stop", Verdict.NOT_TRIED, f"it ended by itself, after {stopped.seconds:.1f} s")
    if stopped.took is None:
        seen = f"still running {case.grace_s:g} s after {signal_name}, and killed"
        return Finding("stop", Verdict.BROKEN, seen, _way_to_stop(case))
    seen = f"{stopped.took:.1f} s after {signal_name} (of {case.grace_s:g}), exit code {stopped.exit_code}"
    if stopped.exit_code not in (EXIT_DONE, EXIT_PREEMPTED, EXIT_CANCELLED):
        way_out = "a stop is no failure: save a checkpoint and exit with 75"
        return Finding("stop", Verdict.BROKEN, seen, way_out)
    if case.trains and stopped.checkpoint is None:
        return Finding("stop", Verdict.NOT_TRIED, f"{seen}; no checkpoint by then: --seconds gives it longer")
    saved = f", checkpoint {stopped.checkpoint} complete" if stopped.checkpoint else ""
    return Finding("stop", Verdict.KEPT, seen + saved)


def _way_to_stop(case: Case) -> str:
    if case.image.entrypoint[:2] == ("/bin/sh", "-c") and not case.runner:
        return 'write ENTRYPOINT in its exec form, ["program", "argument"]: a shell passes no signals on'
    first = (
        ""
        if case.rules.init or case.runner
        else "; the first process of a container dies of none that it does not handle"
    )
    return f"handle {case.rules.stop_signal}: save a checkpoint and exit with 75{first}"
