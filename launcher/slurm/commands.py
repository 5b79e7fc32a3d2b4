"""SLURM's commands on a login node: what is sent, and what their text output says. Scripts stand in `scripts/`.

Text formats only: before 23.11 `--json` ignores every filter, and its shapes have changed four times since.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import beside
from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from launcher.remote import Done, Host
from launcher.slurm.scripts import script_text
from launcher.slurm.words import ENDED, LIMITS, state_word

__all__ = ["ARRAY_NAME", "Element", "Evidence", "Listed", "Slurm", "fields_of", "same_job"]

ARRAY_NAME = "cvlaunch-"
"""Begins the name of every array of ours."""

_SQUEUE = "%i|%T|%V|%S|%e|%N|%j|%q|%r|%k"
"""Id, state, submitted, started or expected, end, nodes, name, QOS, reason, comment; the last may hold anything."""

_ANOTHER_JOB, _REFUSED, _NO_ANSWER = 47, 48, 49
"""Exit codes of submit.sh; the last also of find.sh."""

_REFUSALS: Sequence[tuple[str, type[CvlaunchError], str, str]] = (
    (r"invalid partition specified", SpecError, "partition", "SLURM knows no such partition; `sinfo -s` lists them"),
    (r"invalid account", SpecError, "account", "this account doesn't exist, or you may not use it in this partition"),
    (r"invalid qos", SpecError, "qos", "this QOS doesn't exist, or your account may not use it"),
    (r"invalid feature", SpecError, "constraint", "no node has such a feature; `sinfo -o '%N %f'` lists them"),
    (r"invalid.*reservation|reservation.*invalid|requested reservation", SpecError, "reservation",
     "SLURM has no such reservation for you"),
    (r"invalid generic resource", SpecError, "resources.gpus",
     "no node has GPUs of this kind; `sinfo -o '%N %G'` lists them"),
    (r"time limit.*(invalid|exceed)|exceeds.*time limit", SpecError, "resources.timeout",
     "it is longer than the partition allows; set the target's `time` to what one start may take"),
    (r"node count specification invalid|more processors requested|node configuration is not available|"
     r"requested partition configuration not available|memory.*not available|memory specification",
     SpecError, "resources",
     "no node of the partition has what the job asks for; `sinfo -o '%N %c %m %G'` shows what they have"),
    (r"accounting/qos policy|job violates", CapacityError, "",
     "a limit of your account or QOS: wait until jobs have ended, or ask for less"),
    (r"job submit limit|job/step limit|slurm temporarily unable to accept job", CapacityError, "",
     "SLURM takes no more jobs of yours at the moment: wait until some have ended"),
    (r"invalid job array", SpecError, "", "the array is larger than SLURM takes (MaxArraySize)"),
    (r"access/permission denied|user.*not (permitted|allowed)", AuthError, "", "you may not submit there"),
    (r"requeue.*not (enabled|allowed|permitted)", SpecError, "", "this site lets no job go back into the queue"),
    (r"unrecognized option|invalid option|unknown option|is invalid|invalid \S+ specification", SpecError, "sbatch",
     "sbatch doesn't understand one of its options; correct the target"),
)  # fmt: skip
"""What sbatch says → what the caller can do, the key to change, and the way out. The first that fits counts."""


@dataclass(frozen=True)
class Listed:
    """A line of squeue. submitted, started, ended: Unix seconds; started may be SLURM's expectation."""

    id: str
    state: str
    submitted: float | None
    started: float | None
    ended: float | None
    nodes: str
    name: str
    qos: str
    reason: str
    comment: str


@dataclass(frozen=True)
class Evidence:
    """What is known of a job that squeue does not show going on.

    status: what its script left. result, notice: the runner's. said: the line of SLURM's output of it that tells most.
    account: SLURM's own words, by the keys of scontrol.
    """

    status: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    notice: Mapping[str, Any] = field(default_factory=dict)
    cancelled: bool = False
    said: str = ""
    account: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Element:
    """One job of an array: run id, script, and the secrets as the runner reads them."""

    run_id: str
    script: bytes
    secrets: bytes = b""


@dataclass(frozen=True)
class Slurm:
    """A cluster, seen from `host`."""

    host: Host

    def submit(self, record: str, run_id: str, script: bytes, *, secrets: bytes = b"", submission: int = 1) -> str:
        """The id of the job, which may have been there before.

        ConflictError if the record is that of another script; UnreachableError where it may have arrived or not.
        """
        sizes = str(len(script)), str(len(secrets))
        done = self._run("submit", record, run_id, str(submission), *sizes, stdin=script + secrets)
        return self._id(done, record, run_id)

    def submit_array(
        self,
        jobs: str,
        folder: str,
        name: str,
        elements: Sequence[Element],
        *,
        header: bytes,
        limit: int | None,
        submission: int,
    ) -> str:
        """The id of the array, whose index i is elements[i]. jobs: the folder of all records."""
        throttle = f"%{limit}" if limit else ""
        done = self._run(
            "submit_array", jobs, folder, name, str(submission), throttle, str(len(elements)),
            stdin=_packed(elements, header),
        )  # fmt: skip
        return self._id(done, jobs, done.err.strip().splitlines()[0] if done.code == _ANOTHER_JOB else name)

    def _id(self, done: Done, record: str, run_id: str) -> str:
        if done.code == 0:
            return done.out.decode().strip()
        if done.code == _ANOTHER_JOB:
            raise ConflictError(f"{run_id} is another job on {self.host.name} ({record}); choose another --run-id")
        if done.code == _NO_ANSWER:
            raise UnreachableError(f"{self.host.name}: SLURM's controller did not answer ({_last(done.err)})")
        if done.code == _REFUSED:
            raise _refusal(done.err, self.host.name)
        raise _folder_error(done.err, record, self.host.name)

    def queue(self) -> dict[str, Listed]:
        """Every job of this user that the controller still knows, by id. UnreachableError if it doesn't answer."""
        done = self.host.run(
            'export SLURM_TIME_FORMAT=%s\nexec squeue --me --noheader --array --states=all --format "$1"', _SQUEUE
        )
        if done.code:
            self._require_slurm(done)
            raise UnreachableError(f"{self.host.name}: squeue failed: {_last(done.err)}")
        lines = done.out.decode("utf-8", "replace").splitlines()
        return {listed.id: listed for listed in map(_listed, lines) if listed}

    def evidence(self, jobs: str, wanted: Sequence[tuple[str, str]]) -> dict[str, Evidence]:
        """By id. wanted: run id and id of each job."""
        done = self._run("evidence", jobs, stdin="".join(f"{run} {native}\n" for run, native in wanted).encode())
        found: dict[str, dict[str, Any]] = {native: {} for _, native in wanted}
        for line in done.out.decode("utf-8", "replace").splitlines():
            kind, _, rest = line.partition("\t")
            native, _, text = rest.partition("\t")
            if native in found:
                found[native].update(_piece(kind, text))
        for run, native in wanted:
            account = found[native].get("account", {})
            if not same_job(run, native, account.get("JobName", ""), account.get("Comment", "")):
                found[native].pop("account", None)
        return {native: Evidence(**pieces) for native, pieces in found.items()}

    def find(self, jobs: str, run_ids: Sequence[str]) -> dict[str, str]:
        """Run id → id of its newest job."""
        done = self._run("find", jobs, stdin="".join(f"{run_id}\n" for run_id in run_ids).encode())
        self._require_slurm(done)
        if done.code == _NO_ANSWER:
            raise UnreachableError(f"{self.host.name}: SLURM's controller did not answer ({_last(done.err)})")
        pairs = (line.partition(" ")[::2] for line in done.out.decode().splitlines())
        return dict(pairs)

    def adopt(self, jobs: str, name: str) -> tuple[str, str] | None:
        """Id and script of a job by its run id or SLURM's id; None if there is none."""
        done = self._run("adopt", jobs, name)
        self._require_slurm(done)
        native, _, script = done.out.decode("utf-8", "replace").partition("\n")
        return (native, script) if done.code == 0 else None

    def cancel(self, record: str, native: str) -> None:
        done = self._run("cancel", record, native)
        if done.code and "already" not in done.err.lower() and "invalid job id" not in done.err.lower():
            self._require_slurm(done)
            raise UnreachableError(f"{self.host.name}: {native} could not be cancelled: {_last(done.err)}")

    def attach(
        self,
        record: str,
        native: str,
        run_id: str,
        library: str,
        *,
        front: Sequence[str],
        command: Sequence[str],
        tty: bool,
    ) -> int:
        """Runs a command beside a job's, in a step of its own, on our standard streams; its exit code.

        front: words that open its container, if it has one, and the interpreter.
        """
        words = [record, native, run_id, library, "--pty" if tty else "", str(len(front)), *front]
        return self.host.attach(
            script_text("attach"), *words, Path(beside.__file__).read_text(encoding="utf-8"), *command, tty=tty
        )

    def remove(self, record: str) -> None:
        self.host.run('rm -rf -- "$1"', record)

    def config(self) -> dict[str, str]:
        """What `scontrol show config` says, by its words."""
        done = self.host.run("scontrol show config")
        self._require_slurm(done)
        return dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", done.out.decode("utf-8", "replace"), re.MULTILINE))

    def limits(self) -> dict[str, dict[str, str]]:
        """QOS → its limits, by the words of sacctmgr; empty without accounting."""
        done = self.host.run(f"sacctmgr --noheader --parsable2 show qos format=Name,{','.join(LIMITS)}")
        rows = (line.split("|") for line in done.out.decode("utf-8", "replace").splitlines())
        return {name: dict(zip(LIMITS, values, strict=False)) for name, *values in rows}

    def look(self, *arguments: str) -> list[tuple[str, str]]:
        """What check.sh finds: a word and a text."""
        done = self._run("check", *arguments)
        lines = (line.partition("\t") for line in done.out.decode("utf-8", "replace").splitlines())
        return [(word, text) for word, _, text in lines]

    def _run(self, name: str, *arguments: str, stdin: bytes = b"") -> Done:
        return self.host.run(script_text(name), *arguments, stdin=stdin)

    def _require_slurm(self, done: Done) -> None:
        if "command not found" in done.err or done.code == 127:
            raise no_slurm(self.host)


def no_slurm(host: Host) -> UnsupportedError:
    where = "this machine's PATH" if host.ssh is None else f"the PATH of a login shell on {host.name}"
    return UnsupportedError(f"SLURM's commands are not on {where}; correct `ssh` in the target", key="ssh")


def _refusal(said: str, where: str) -> CvlaunchError:
    text = _without_name(_last(said))
    if "command not found" in said or "sbatch: No such file" in said:
        return no_slurm(Host())
    for pattern, kind, key, way_out in _REFUSALS:
        if found := re.search(f".*({pattern}).*", said, re.IGNORECASE):
            message = f"{where}: {way_out} ({_without_name(found[0])})"
            return kind(message, key=key or None) if issubclass(kind, SpecError) else kind(message)
    return SpecError(f"{where}: sbatch refuses the job: {text or 'without a word'}")


def _without_name(line: str) -> str:
    return re.sub(r"^sbatch: (error: )?", "", line.strip())


def _folder_error(said: str, folder: str, where: str) -> CvlaunchError:
    text = _last(said)
    if re.search(r"no space left|quota exceeded", said, re.IGNORECASE):
        return CapacityError(f"{folder} on {where} is full: make room, or set `root` to another file system")
    if re.search(r"permission denied|read-only|not permitted", said, re.IGNORECASE):
        return AuthError(f"{folder} on {where} can't be written ({text}): set `root` to a folder that you may write")
    return UnreachableError(f"{where}: the job could not be handed over in {folder}: {text or 'the connection broke'}")


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _listed(line: str) -> Listed | None:
    parts = line.split("|", 9)
    if len(parts) < 10:
        return None
    native, state, submitted, started, ended, *texts = parts
    return Listed(native, state_word(state), _time(submitted), _time(started), _time(ended), *texts)


def _time(text: str) -> float | None:
    """None for `N/A` and `Unknown`."""
    return float(text) if text.isdecimal() else None


def _piece(kind: str, text: str) -> dict[str, Any]:
    import json

    names = {"S": "status", "R": "result", "N": "notice"}
    if kind in names:
        try:
            content = json.loads(text)
        except ValueError:
            return {}
        return {names[kind]: content} if isinstance(content, dict) else {}
    if kind == "X":
        return {"cancelled": True}
    if kind == "O":
        return {"said": text.strip()}
    if kind == "C":
        return {"account": fields_of(text)}
    if kind == "A":
        keys = ("JobName", "JobState", "ExitCode", "StartTime", "EndTime", "NodeList")
        account = dict(zip(keys, text.split("|"), strict=False))
        # the controller does not know it any more: whatever the accounts say of its going on is out of date
        return {"account": account} if state_word(account.get("JobState", "")) in ENDED else {}
    return {}


def same_job(run_id: str, native: str, name: str, comment: str) -> bool:
    """Whether the job that SLURM has under this id is this run's: ids begin anew at a limit, or when state was lost.

    An element of an array bears the array's name.
    """
    if "_" in native:
        return name.startswith(ARRAY_NAME)
    return name == run_id or comment == f"cvlaunch:{run_id}"


def fields_of(line: str) -> dict[str, str]:
    """`Key=value` pairs of `scontrol -o`; a value goes on until the next key."""
    return {key: value.strip() for key, value in re.findall(r"(\S+?)=(.*?)(?=\s\S+?=|$)", line)}


def _packed(elements: Sequence[Element], header: bytes) -> bytes:
    """The tar that submit_array.sh reads. By hand: for a thousand files `tarfile` takes as long as all the rest."""
    listed = "".join(f"{element.run_id}\n" for element in elements).encode()
    members = [("header", header), ("list", listed), *_members(elements), ("end", b"")]
    blocks = (_tar_header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in members)
    return b"".join(blocks) + bytes(1024)


def _tar_header(name: str, size: int) -> bytes:
    """Of POSIX.1-1988: name, mode, uid, gid, size, time, checksum over all with itself as blanks, type of a file."""
    front = name.encode().ljust(100, b"\0") + b"0000600\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"0" * 11 + b"\0"
    checksum = sum(front) + 8 * ord(" ") + ord("0")
    return (front + b"%06o\0 0" % checksum).ljust(512, b"\0")


def _members(elements: Sequence[Element]) -> Iterator[tuple[str, bytes]]:
    for element in elements:
        yield f"{element.run_id}/job.sh", element.script
        if element.secrets:
            yield f"{element.run_id}/secrets", element.secrets
