"""Clusters that SLURM runs: a script for sbatch, from the login node itself or through the user's ssh.

A job keeps a record of itself on the cluster, `<root>/jobs/<run_id>/` (launcher.slurm.places): the script, its ids,
what SLURM printed, and how it ended, written by the script's EXIT trap. That is the first evidence of an end, because
the controller forgets a job after minutes and not every site keeps accounts. A handle is `JOBID.RUN_ID`, so that a job
id that SLURM uses again names no other run.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from launcher import paths
from launcher.attempts import SIGNALLED, signal_words
from launcher.backends.base import (
    Adopted,
    BaseTarget,
    Feature,
    Handle,
    Job,
    LogLine,
    Plan,
    Problem,
    Support,
    Transport,
)
from launcher.contract import DEFAULT_ROOT, EXIT_DONE, EXIT_PREEMPTED, OUTPUT_FOLDERS, JobFile
from launcher.errors import SpecError, UnreachableError
from launcher.logfiles import PRINTED, follow_logs, printed_lines
from launcher.quantities import format_duration, format_size, parse_duration
from launcher.remote import Host
from launcher.rules import RULES, ContainerRules
from launcher.secretfiles import secret_lines
from launcher.slurm import places
from launcher.slurm.commands import ARRAY_NAME, Element, Evidence, Listed, Slurm, no_slurm, same_job
from launcher.slurm.ways import WAYS, Bind, Way, bad_words, filled
from launcher.slurm.words import ENDED, STATES, STUCK, reason_words, state_word
from launcher.status import State, Status
from launcher.stores import Store, file_uri, join_uri, open_store, path_of, scheme
from launcher.stores.remote import RemoteStore
from launcher.supervised import ended_state
from launcher.watch import seldom

__all__ = ["SlurmBackend", "SlurmTarget", "inline_job"]

_IN_PLACE = dict.fromkeys(OUTPUT_FOLDERS, "in_place")
_UPLOADED = dict.fromkeys(OUTPUT_FOLDERS, "runner")
_BARE = {"client": "path", "file": "path", "s3": "staged", "gs": "staged"}
_IN_CONTAINER = {"client": "mounted", "file": "mounted", "s3": "staged", "gs": "staged"}

_NO_IMAGE = "the target has no container_command, so the job runs in its python, without the image"
_NO_DISK = "few sites tell SLURM how large the nodes' disks are; the target's scratch says where files go"

_AROUND_TIMEOUT_S = 15 * 60
"""SLURM's limit is the job's own plus this: the runner keeps the timeout, over all starts."""
_BEFORE_THE_END_S = 60
"""How much earlier than the grace the warning comes, which SLURM may give up to a minute late or early."""
_LONGEST_JOB = 100_000
"""Bytes of job.json; a variable of the environment holds at most 128 KiB."""
_LEAST_DISK_KIB = 1 << 20
_REQUEUE_SEEN_S = 300.0
"""How long SLURM may take to show a job that went back into the queue."""
_AT_ONCE = 4
"""Arrays that are handed over at the same time; sshd takes ten sessions over one connection."""


def _like(pattern: str, words: str) -> AfterValidator:
    def checked(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {words}, found {value!r}")
        return value

    return AfterValidator(checked)


_Word = Annotated[str, _like(r"[A-Za-z0-9_.,@:+/-]+", "one word of letters, digits and _.,@:+/-")]
_Constraint = Annotated[str, _like(r"[A-Za-z0-9_.,:&|*()\[\]-]+", "features of nodes, such as a100&nvlink")]
_Option = Annotated[str, _like(r"--[a-z][a-z-]*(=[^\n\\]*)?", "an option of sbatch without a \\, such as --nice=100")]
_Line = Annotated[str, _like(r"[^\n]*", "one line")]
_Folder = Annotated[str, _like(r"(\$[A-Za-z_]\w*|/)[^\n]*", "an absolute path, or one below a variable: $SLURM_TMPDIR")]


class SlurmTarget(BaseTarget):
    """A cluster: the way to it, folders on its shared disk, and what sbatch is told besides the job's own wishes."""

    backend: Literal["slurm"] = "slurm"
    ssh: _Word | None = Field(
        None, description="login node as your ssh knows it: an alias of ~/.ssh/config, me@login1; none: this machine"
    )
    root: str = Field(
        default_factory=lambda: str(paths.data_folder() / "slurm"),
        description="folder on a disk that all nodes share: cvlaunch itself, environments, images, records of jobs",
    )
    output: str | None = Field(
        default_factory=lambda: places.runs(str(paths.data_folder() / "slurm")),
        description="where runs are kept: a folder of the cluster, or s3://bucket/prefix; none: runs below root",
    )
    python: str | None = Field(
        None, description="interpreter on the cluster; none: the environment that `cvlaunch targets setup` makes"
    )
    container_command: str | tuple[str, ...] | None = Field(
        None, description=f"{', '.join(WAYS)}, or words in front of the command; none: no container"
    )
    partition: _Word | None = None
    account: _Word | None = None
    qos: _Word | None = None
    constraint: _Constraint | None = Field(None, description="features of nodes: a100&nvlink")
    reservation: _Word | None = None
    spot_partition: _Word | None = Field(
        None, description="for jobs with resources.spot: the one that may be preempted"
    )
    time: str | None = Field(None, description="longest time of one start: 24h; the job goes on in the next one")
    gpu_option: Literal["gres", "gpus-per-node"] = Field("gres", description="how this site wants GPUs asked for")
    gpu_types: dict[str, _Word] = Field({}, description="GPU model → its type in this site's gres: {A100: a100-sxm4}")
    gpu_features: dict[str, _Word] = Field({}, description="GPU model → feature of nodes that have it: {A100: a100}")
    cpus_per_gpu: int | None = Field(None, ge=1, description="cores for each GPU, where the job doesn't say how many")
    modules: tuple[_Line, ...] = Field((), description="loaded before the job, in this order")
    setup: tuple[_Line, ...] = Field((), description="shell lines before the job; one that fails ends it")
    scratch: _Folder = Field("$TMPDIR", description="folder on a node's own disk: /local, $SLURM_TMPDIR")
    interface: _Word | None = Field(None, description="network between nodes: ib0; none: NCCL and gloo choose")
    array_limit: int | None = Field(None, ge=1, description="how many jobs of an array run at a time")
    mail_user: _Word | None = None
    mail_type: _Word | None = Field(None, description="END,FAIL")
    sbatch: tuple[_Option, ...] = Field((), description="further options of sbatch: [--exclusive, --nice=100]")

    @field_validator("root", "python")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"/[^\n]*", value):
            raise ValueError(f"expected an absolute path of the cluster, found {value!r}")
        return value and (value.rstrip("/") or "/")

    @field_validator("time")
    @classmethod
    def _a_duration(cls, value: str | None) -> str | None:
        if value is not None:
            parse_duration(value)
        return value

    @field_validator("container_command")
    @classmethod
    def _a_way(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, str) and value not in WAYS:
            raise ValueError(f"{value!r} is none of {', '.join(WAYS)}; other commands are a list of words")
        if isinstance(value, tuple) and (problem := bad_words(value)):
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _root_of_another_machine(self) -> SlurmTarget:
        if self.ssh is not None and "root" not in self.model_fields_set:
            raise ValueError("root is missing: with ssh, write which folder on the cluster's shared disk it is")
        return self

    @model_validator(mode="before")
    @classmethod
    def _output_below_root(cls, values: Any) -> Any:
        root = values.get("root") if isinstance(values, dict) else None
        if isinstance(root, str) and values.get("output") is None:
            return {**values, "output": places.runs(root.rstrip("/"))}
        return values

    @property
    def reached_by(self) -> str | None:
        return f"ssh://{self.ssh}" if self.ssh is not None else None

    @property
    def has_image_files(self) -> bool:
        return self.way is not None

    @property
    def way(self) -> Way | None:
        """How containers run; None: they don't."""
        if self.container_command is None:
            return None
        if isinstance(self.container_command, str):
            return WAYS[self.container_command]
        return Way(self.container_command, tool=self.container_command[0])

    @property
    def interpreter(self) -> str:
        if self.python is not None:
            return self.python
        return sys.executable if self.ssh is None else places.python_of(places.environment(self.root))

    @property
    def library(self) -> str | None:
        """Where our package is, for an interpreter that may have none, or another version."""
        return None if self.ssh is None and self.python is None else places.library(self.root)


class SlurmBackend:
    name: ClassVar[str] = "slurm"
    Target: ClassVar[type[BaseTarget]] = SlurmTarget
    template: ClassVar[str] = "slurm/job.sbatch.j2"
    form: ClassVar[Literal["json", "yaml", "script"]] = "script"
    inline_job: ClassVar[bool] = True
    doubt_s: ClassVar[float] = 60.0
    features: ClassVar[Mapping[Feature, Support]] = {
        Feature.GPUS: Support(True),
        Feature.MULTI_NODE: Support(True),
        Feature.SHM: Support(False, "shared memory is the node's own; write resources.shm: auto"),
        Feature.SPOT: Support(True),
        Feature.RESTART: Support(True),
        Feature.MAX_WAIT: Support(
            False, "SLURM keeps a job until it can start; `cvlaunch status` says when that may be. Leave max_wait out"
        ),
        Feature.SECRETS_CLIENT: Support(True),
        Feature.SECRETS_STORE: Support(False, "a cluster has no secret store; write env:NAME or file:PATH"),
        Feature.CONTAINER: Support(
            False,
            "without our runner nobody would carry a job over its time limit; send a script of your own by sbatch",
        ),
        Feature.FOLLOW_LOGS: Support(True),
        Feature.EXEC: Support(True),
    }
    placeholders: ClassVar[Mapping[str, str]] = {}

    def __init__(self, target: SlurmTarget, target_name: str) -> None:
        self.target = target
        self.target_name = target_name
        self._slurm = Slurm(Host(target.ssh, target_name))
        self._jobs: dict[str, JobFile] = {}
        self._qos: dict[str, dict[str, str]] | None = None

    @property
    def rules(self) -> ContainerRules:
        return RULES["slurm"] if self.target.way else ContainerRules(container=False, shm=RULES["slurm"].shm)

    @property
    def ignored(self) -> Mapping[str, str]:
        always = {"resources.disk": _NO_DISK}
        return always if self.target.way else {**always, "image": _NO_IMAGE, "build": _NO_IMAGE}

    @property
    def transports(self) -> Mapping[str, Transport]:
        channels = _IN_CONTAINER if self.target.way else _BARE
        uploaded = Transport(channels, _UPLOADED)
        shared = {"file" if self.target.ssh is None else "ssh": Transport(channels, _IN_PLACE)}
        return {**shared, "s3": uploaded, "gs": uploaded}

    # -- the script ---------------------------------------------------------------------------------------------------

    def context(self, job: Job, run_id: str, job_file: JobFile) -> Mapping[str, object]:
        target, resources = self.target, job.spec.resources
        if len(job_file.to_bytes()) > _LONGEST_JOB:
            raise SpecError(f"the job has more than {_LONGEST_JOB} bytes; put long values into a file of its code")
        in_place = job_file.movers["output"] == "in_place"
        variable, folder = _scratch(target.scratch)
        return {
            "run_id": run_id,
            "login": bool(target.modules or target.setup),
            "comment": f"cvlaunch:{run_id}",
            "partition": _partition(target, resources.spot),
            "account": target.account,
            "qos": target.qos,
            "reservation": target.reservation,
            "constraint": _constraint(target, resources.gpu),
            "nodes": resources.nodes,
            "cpus": resources.cpus or (target.cpus_per_gpu or 0) * resources.gpus or None,
            "memory": f"{math.ceil(resources.memory / 2**20)}M" if resources.memory else None,
            "gres": _gpus(target, resources.gpu, resources.gpus) if target.gpu_option == "gres" else None,
            "gpus_per_node": _gpus(target, resources.gpu, resources.gpus) if target.gpu_option != "gres" else None,
            "time": _time_limit(target, resources.timeout, resources.grace),
            "warning_s": math.ceil(resources.grace) + _BEFORE_THE_END_S,
            "longest_stop_s": math.ceil(resources.grace) + _BEFORE_THE_END_S,
            "mail_type": target.mail_type,
            "mail_user": target.mail_user,
            "options": target.sbatch,
            "record": places.record(target.root, run_id),
            "max_attempts": job_file.max_attempts,
            "in_place": in_place,
            "root": _path_there(job.output, run_id) if in_place else None,
            "scratch_variable": variable,
            "scratch_folder": folder,
            "has_secrets": bool(job_file.secrets),
            "modules": target.modules,
            "setup": target.setup,
            "library": None if target.way else target.library,
            "env": self._variables(),
            "container": target.way is not None,
            "keys": _needs_keys(job_file),
            "mounted": [channel.name for channel in job_file.channels if channel.access == "mounted"],
            "job": job_file.to_json(),
            "command": [*self._in_front(job_file), *self._runner],
        }

    def _variables(self) -> dict[str, str]:
        """What the target says of its nodes, for the runner."""
        found = {"CVLAUNCH_INTERFACE": self.target.interface, "AWS_PROFILE": self.target.storage.profile}
        return {name: value for name, value in found.items() if value}

    @property
    def _runner(self) -> tuple[str, ...]:
        return ("cvlaunch-run",) if self.target.way else (self.target.interpreter, "-m", "launcher.runner")

    def _in_front(self, job_file: JobFile) -> tuple[str, ...]:
        """Options of srun and the words that open a container; `@root@` and `@scratch@` are known on the node alone."""
        way = self.target.way
        if way is None:
            return ()
        binds = [Bind("@root@", DEFAULT_ROOT), Bind("@scratch@/tmp", "/tmp")]  # noqa: S108 names the container's
        for channel in job_file.channels:
            if channel.access == "mounted":
                source = str(path_of(channel.uri))
                binds.append(Bind(source, f"{DEFAULT_ROOT}/input/data/{channel.name}", way.read_only))
        if _needs_keys(job_file):
            binds.append(Bind("@scratch@/aws", "/tmp/.aws", way.read_only))  # noqa: S108
        in_place = job_file.movers["output"] == "in_place"
        _require_bindable(
            [*(bind.source for bind in binds), _path_there(job_file.output) if in_place else "", self.target.scratch]
        )
        image = self._image(job_file.image or {})
        gpus = way.gpus if job_file.gpus else ()
        return filled((*way.srun, *way.prefix), image=image, binds=binds, gpus=gpus)

    def _image(self, image: Mapping[str, str | None]) -> str:
        """Its file on the cluster; its name, where the nodes fetch it; or as it is written, if that is a path."""
        reference, way = str(image.get("reference")), self.target.way
        if reference.startswith("/") or way is None or not way.pull:
            return reference
        return places.image(self.target.root, reference, digest=image.get("digest"), ending=way.ending)

    # -- before and at submission -------------------------------------------------------------------------------------

    def check(self, job: Job) -> Iterator[Problem]:
        """One look at the login node. sbatch itself says whether a partition, an account or GPUs are there."""
        target, way = self.target, self.target.way
        image = self._image(asdict(job.image)) if way and job.image else ""
        folders = [str(path_of(c.uri)) for c in job.channels if c.access in ("path", "mounted")]
        found = self._slurm.look(
            target.root,
            _path_there(job.output) if scheme(job.output) in ("file", "ssh") else "",
            _partition(target, job.spec.resources.spot) or "",
            "" if way else target.interpreter,
            "" if way else target.library or "",
            image if image.startswith("/") else "",
            way.tool if way else "",
            *folders,
        )
        for word, text in found:
            yield from self._problem(word, text, job)
        yield from self._check_limits([text for word, text in found if word == "partition"], job)

    def _problem(self, word: str, text: str, job: Job) -> Iterator[Problem]:
        where, name = self._slurm.host.name, self.target_name
        setup = f"run: cvlaunch targets setup {name}"
        if word == "sbatch":
            yield Problem("ssh", no_slurm(self._slurm.host).message)
        elif word == "folder":
            yield Problem("root", f"{where}: {text}; set root or output to a folder that you may write")
        elif word == "free" and text.isdecimal() and int(text) < _LEAST_DISK_KIB:
            yield Problem("disk", f"{where} has {format_size(int(text) << 10)} left; free some space", fatal=False)
        elif word == "python":
            yield Problem("python", f"there is no {text} on {where}; {setup}")
        elif word == "library":
            yield Problem("root", f"there is no cvlaunch of this version on {where} ({text}); {setup}")
        elif word == "image":
            reference = job.image.reference if job.image else ""
            how = f"bring it there: cvlaunch targets setup {name} --image {reference}"
            yield Problem("image", f"there is no {text} on {where}" + ("" if reference == text else f"; {how}"))
        elif word == "tool":
            message = f"{text} is not on the PATH of {where}; if the nodes have it, all is well (see also `modules`)"
            yield Problem("container_command", message, fatal=False)
        elif word == "data":
            yield Problem("data", f"there is no folder {text} on {where}")
        elif word == "refused":
            if re.search("unable to contact|timed out", text, re.IGNORECASE):
                raise UnreachableError(f"{where}: SLURM's controller did not answer ({text}): try again later")
            yield Problem("partition", f"{where}: {text}; `sinfo -s` lists the partitions")

    def _check_limits(self, lines: Sequence[str], job: Job) -> Iterator[Problem]:
        """Sites that don't enforce a partition's limits at submission let such a job wait for ever.

        lines: of the partitions in which it may start, or of all.
        """
        resources, target = job.spec.resources, self.target
        partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        if _partition(target, resources.spot) is None:
            partitions = [facts for facts in partitions if facts.get("Default") == "YES"]
        if not partitions:
            return
        names = ",".join(facts.get("PartitionName", "") for facts in partitions)
        asked, limit = _seconds_asked(target, resources.timeout), _most(partitions, "MaxTime", _slurm_seconds)
        if asked is not None and limit is not None and asked > limit:
            lead = f"a start of this job takes up to {format_duration(asked)}, and partition {names} allows "
            key = "resources.timeout" if target.time is None else "time"
            way_out = f"write time: {format_duration(limit)} in the target, and the job goes on in its next start"
            yield Problem(key, f"{lead}{format_duration(limit)}; {way_out}")
        for key, wanted, fact in (
            ("nodes", resources.nodes, "TotalNodes"),
            ("cpus", resources.nodes * (resources.cpus or 0), "TotalCPUs"),
        ):
            most = _most(partitions, fact, _number)
            if most is not None and wanted > most:
                lead = f"the job asks for {wanted} {key} together, and partition {names} has {most:g}"
                yield Problem(f"resources.{key}", f"{lead}; `sinfo -s` lists the partitions")
        for facts in partitions:
            if facts.get("State", "UP") not in ("UP", "DRAIN"):
                yield Problem("partition", f"partition {facts['PartitionName']} is {facts['State']}", fatal=False)

    def submit(self, plan: Plan, secrets: Mapping[str, str], *, attempt: int = 1) -> Handle:
        record = places.record(self.target.root, plan.run_id)
        native = self._slurm.submit(
            record, plan.run_id, plan.text.encode(), secrets=secret_lines(secrets), submission=attempt
        )
        return self._handle(native, plan.run_id)

    def submit_many(self, plans: Sequence[Plan], secrets: Mapping[str, str], *, attempt: int = 1) -> list[Handle]:
        """One array for all that ask SLURM for the same, in parts as large as the cluster takes them."""
        if len(plans) == 1:
            return [self.submit(plans[0], secrets, attempt=attempt)]
        largest = int(self._slurm.config().get("MaxArraySize", "1001"))
        if largest < 2:
            return [self.submit(plan, secrets, attempt=attempt) for plan in plans]
        groups: dict[str, list[Plan]] = {}
        for plan in plans:
            groups.setdefault(_header(plan.text), []).append(plan)
        parts = [
            (head, same[at : at + largest]) for head, same in groups.items() for at in range(0, len(same), largest)
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sent = list(pool.map(lambda part: self._submit_array(part[0], part[1], secrets, attempt), parts))
        handles = {run_id: handle for found in sent for run_id, handle in found.items()}
        return [handles[plan.run_id] for plan in plans]

    def _submit_array(
        self, header: str, plans: Sequence[Plan], secrets: Mapping[str, str], attempt: int
    ) -> dict[str, Handle]:
        """The same runs make an array of the same name, by which it is found again."""
        content = "\n".join([str(attempt), *(plan.run_id for plan in plans)])
        name = f"{ARRAY_NAME}{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        folder, jobs = f"{self.target.root}/arrays/{name}", self._records
        lines = secret_lines(secrets)
        native = self._slurm.submit_array(
            jobs,
            folder,
            name,
            [Element(plan.run_id, plan.text.encode(), lines) for plan in plans],
            header=_array_header(header, name, folder=folder, jobs=jobs).encode(),
            limit=self.target.array_limit,
            submission=attempt,
        )
        return {plan.run_id: self._handle(f"{native}_{index}", plan.run_id) for index, plan in enumerate(plans)}

    def _handle(self, native: str, run_id: str) -> Handle:
        return Handle(self.name, self.target_name, f"{native}.{run_id}")

    def find(self, run_ids: Sequence[str]) -> Mapping[str, Handle]:
        found = self._slurm.find(self._records, run_ids)
        return {run_id: self._handle(native, run_id) for run_id, native in found.items()}

    def adopt(self, name: str) -> Adopted:
        """A script that was sent by hand, or a colleague's whose record we may read."""
        found = self._slurm.adopt(self._records, name)
        if found is None:
            raise SpecError(f"{self._slurm.host.name} has no job {name!r}, by SLURM's id or by run id")
        native, script = found
        job_file = inline_job(script)
        return Adopted(self._handle(native, job_file.run_id), script, job_file)

    # -- what became of it --------------------------------------------------------------------------------------------

    def status(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """One squeue for all; then one look for evidence, only for those that it does not show going on."""
        queue = self._slurm.queue()
        answers: dict[Handle, Status] = {}
        others: list[_Native] = []
        for handle in handles:
            native = _Native.of(handle)
            listed = native.listed_in(queue)
            if listed and listed.state not in ENDED:
                answers[handle] = _going_on(listed, self._limits(listed))
            else:
                others.append(native)
        asked = [(native.run_id, native.id) for native in others if native.run_id]
        evidence = self._slurm.evidence(self._records, asked) if asked else {}
        now = time.time()
        for native in others:
            found = evidence.get(native.id, Evidence())
            answers[native.handle] = _judged(native, found, native.listed_in(queue), now)
        return answers

    def _limits(self, listed: Listed) -> Mapping[str, str]:
        """Of its QOS, looked up once, and only for a job that they keep waiting."""
        if not listed.reason.startswith("QOS"):
            return {}
        if self._qos is None:
            self._qos = self._slurm.limits()
        return self._qos.get(listed.qos, {})

    def logs(self, handle: Handle, *, follow: bool = False, since: str = "") -> Iterator[LogLine]:
        """The runner's log; what SLURM has of its output, where it ended before it could write one."""
        native = _Native.of(handle)
        ended = seldom(lambda: self.status([handle])[handle].state.terminal)
        seen = False
        job_file = None if since.startswith(PRINTED) else self._job_file(native.run_id)
        if job_file is not None:
            store = self._run_folder(job_file)
            for line in follow_logs(store, ended=ended if follow else None, since=since):
                seen = True
                yield line
        if not seen and (not since or since.startswith(PRINTED)) and (follow or ended()):
            yield from printed_lines(lambda: self._printed(native), ended, follow=follow, since=since)

    def _run_folder(self, job_file: JobFile) -> Store:
        """As this machine reaches it: the script may have been rendered there, or behind another name of the host."""
        if job_file.movers["output"] == "in_place":
            return self._folder(_path_there(job_file.output, job_file.run_id))
        return open_store(join_uri(job_file.output, job_file.run_id), self.target.storage.options)

    def _folder(self, path: str) -> Store:
        """Of the cluster."""
        place = f"{self.target.reached_by}{path}" if self.target.reached_by else file_uri(Path(path))
        return self.store(place) or open_store(place)

    def _printed(self, native: _Native) -> bytes:
        try:
            return self._record(native.run_id).read(f"slurm-{native.id}.out")
        except FileNotFoundError:
            return b""

    def _job_file(self, run_id: str) -> JobFile | None:
        """Of the script in the record; None while there is none."""
        if run_id not in self._jobs:
            try:
                script = self._record(run_id).read("job.sh").decode()
            except FileNotFoundError:
                return None
            self._jobs[run_id] = inline_job(script)
        return self._jobs[run_id]

    def _record(self, run_id: str) -> Store:
        return self._folder(places.record(self.target.root, run_id))

    @property
    def _records(self) -> str:
        return places.record(self.target.root, "").rstrip("/")

    def cancel(self, handle: Handle) -> None:
        native = _Native.of(handle)
        self._slurm.cancel(places.record(self.target.root, native.run_id), native.id)

    def exec(self, handle: Handle, command: Sequence[str], *, tty: bool) -> int:
        """In a step of its own on the job's first node, which shares what the job has; in its container, too."""
        native = _Native.of(handle)
        status = self.status([handle])[handle]
        if status.state is not State.RUNNING:
            raise SpecError(f"{native.run_id} is {status.state}; a command runs only beside a run that is going on")
        job_file = self._job_file(native.run_id)
        front = self._in_front(job_file) if job_file else ()
        python = "python3" if self.target.way else self.target.interpreter
        return self._slurm.attach(
            places.record(self.target.root, native.run_id), native.id, native.run_id, self.target.library or "",
            front=(*front, python), command=command, tty=tty,
        )  # fmt: skip

    def remove(self, handle: Handle) -> None:
        self._slurm.remove(places.record(self.target.root, _Native.of(handle).run_id))

    def store(self, uri: str) -> Store | None:
        """Folders of the cluster: by the target's own connection, and without looking for what a runner there never
        writes, for each look is a round trip."""
        reached_by = self.target.reached_by
        if reached_by is None or not uri.startswith(f"{reached_by}/"):
            return None
        return RemoteStore(self._slurm.host, uri.removeprefix(reached_by), in_place=True)


@dataclass(frozen=True)
class _Native:
    """A handle taken apart. run_id: empty in a handle that none of ours has."""

    handle: Handle
    id: str
    run_id: str

    @classmethod
    def of(cls, handle: Handle) -> _Native:
        native, _, run_id = handle.native.partition(".")
        return cls(handle, native, run_id)

    def listed_in(self, queue: Mapping[str, Listed]) -> Listed | None:
        """Its line of squeue, unless the id is another job's by now."""
        listed = queue.get(self.id)
        return listed if listed and same_job(self.run_id, self.id, listed.name, listed.comment) else None


# -- what the script says ---------------------------------------------------------------------------------------------


def _path_there(output: str, *parts: str) -> str:
    """The absolute path on the cluster."""
    path = str(path_of(output)) if scheme(output) == "file" else "/" + output.split("://", 1)[1].partition("/")[2]
    return "/".join([path.rstrip("/"), *parts])


def _require_bindable(folders: Iterable[str]) -> None:
    for folder in folders:
        if set(folder) & set(",:"):
            raise SpecError(f"{folder!r} can't be bound into a container: no tool takes a comma or a colon in its name")


def _needs_keys(job_file: JobFile) -> bool:
    """Those of ~/.aws, for a runner that copies from or to S3."""
    return "s3" in {scheme(job_file.output), *(scheme(c.uri) for c in job_file.channels if c.access == "staged")}


def _scratch(written: str) -> tuple[str | None, str]:
    """(variable, folder below it), or (None, folder)."""
    match = re.match(r"\$([A-Za-z_]\w*)(.*)", written)
    return (match[1], match[2].rstrip("/")) if match else (None, written.rstrip("/"))


def _partition(target: SlurmTarget, spot: bool) -> str | None:
    if spot and target.spot_partition is None:
        raise SpecError("the target has no spot_partition, whose jobs may be preempted", key="resources.spot")
    return target.spot_partition if spot else target.partition


def _constraint(target: SlurmTarget, models: Sequence[str]) -> str | None:
    """Any of the models, where the site has features for all; together with what the target wants."""
    features = [target.gpu_features[model] for model in models if model in target.gpu_features]
    if not features or len(features) < len(models):
        return target.constraint
    either = features[0] if len(features) == 1 else f"({'|'.join(features)})"
    return f"{target.constraint}&{either}" if target.constraint else either


def _gpus(target: SlurmTarget, models: Sequence[str], count: int) -> str | None:
    """`gpu:a100:2`; without a type, where features of nodes say which models will do."""
    if not count:
        return None
    prefix = "gpu:" if target.gpu_option == "gres" else ""
    if not models or all(model in target.gpu_features for model in models):
        return f"{prefix}{count}"
    known = [model for model in models if model in target.gpu_types]
    kind = target.gpu_types[known[0]] if known else models[0].lower()
    return f"{prefix}{kind}:{count}"


def _seconds_asked(target: SlurmTarget, timeout: float | None) -> float | None:
    limits = [timeout + _AROUND_TIMEOUT_S] if timeout is not None else []
    limits += [parse_duration(target.time)] if target.time is not None else []
    return min(limits, default=None)


def _time_limit(target: SlurmTarget, timeout: float | None, grace: float) -> str | None:
    """In SLURM's form, `1-12:30:00`."""
    seconds = _seconds_asked(target, timeout)
    if seconds is None:
        return None
    if seconds < grace + 2 * _BEFORE_THE_END_S:
        least = format_duration(grace + 2 * _BEFORE_THE_END_S)
        raise SpecError(
            f"{target.time} leaves no time to train: the job's grace needs {least} of it; write a longer time, "
            "or a shorter resources.grace",
            key="time",
        )
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 1440}-{minutes % 1440 // 60:02}:{minutes % 60:02}:00"


def _most(partitions: Sequence[Mapping[str, str]], fact: str, read: Callable[[str], float | None]) -> float | None:
    """The largest of them; None where one has no limit."""
    found = [read(facts.get(fact, "")) for facts in partitions]
    numbers = [number for number in found if number is not None]
    return max(numbers) if len(numbers) == len(found) else None


def _number(text: str) -> float | None:
    return float(text) if text.isdecimal() else None


def _slurm_seconds(text: str) -> float | None:
    """Of `2-00:00:00`, `30:00`; None for UNLIMITED."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts):
        return None
    numbers = [int(part) for part in parts]
    if dash:
        numbers = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        numbers = [0, numbers[0], 0]
    seconds = sum(number * unit for number, unit in zip(reversed(numbers), (1, 60, 3600), strict=False))
    return float(seconds + 86400 * int(days or 0))


_OWN_LINES = ("--job-name=", "--comment=", "--output=")


def _header(script: str) -> str:
    """What a script asks SLURM for, but for what is the run's own."""
    first, *rest = script.splitlines()
    lines = itertools.takewhile(lambda line: line.startswith("#SBATCH "), rest)
    return "\n".join(
        [first, *(line for line in lines if not line.startswith(tuple(f"#SBATCH {o}" for o in _OWN_LINES)))]
    )


def _array_header(header: str, name: str, *, folder: str, jobs: str) -> str:
    own = (f"--job-name={name}", f"--comment=cvlaunch-array:{name}", f"--output={folder}/%a.out")
    lines = [
        header,
        *(f"#SBATCH {shlex.quote(option)}" for option in own),
        f"records={shlex.quote(jobs)} folder={shlex.quote(folder)}",
    ]
    return "\n".join(lines) + "\n"


def inline_job(script: str) -> JobFile:
    """job.json of a script that our template made."""
    match = re.search(r"<<'CVLAUNCH_JOB'\n(.*)\nCVLAUNCH_JOB\n", script)
    if match is None:
        raise SpecError("its script holds no job of cvlaunch (CVLAUNCH_JOB)")
    return JobFile.from_bytes(match[1].encode())


# -- what SLURM's words mean ------------------------------------------------------------------------------------------


def _going_on(listed: Listed, limits: Mapping[str, str]) -> Status:
    state = STATES.get(listed.state, State.UNKNOWN)
    if state is State.QUEUED and listed.reason == "BeginTime":  # our scripts ask for no start of their own
        state = State.RESTARTING
    reason = reason_words(listed.reason, state=listed.state, limits=limits)
    if listed.state == "PENDING" and listed.started and listed.reason not in STUCK:
        wait = listed.started - time.time()
        reason += f"; SLURM expects to start it in {format_duration(round(wait, -1))}" if wait > 30 else ""
    started = listed.started if listed.state != "PENDING" else None
    return Status(state, listed.state, reason=reason, started=started, node=listed.nodes)


def _judged(native: _Native, found: Evidence, listed: Listed | None, now: float) -> Status:
    """The script's own words first, then SLURM's; without either, nobody knows."""
    word = state_word(found.account.get("JobState", "")) or (listed.state if listed else "")
    word = word or _ended_by_slurm(found.status)
    status = _facts(found, listed, word)
    if word and word not in ENDED:  # it went on between the two looks
        return replace(status, state=STATES.get(word, State.UNKNOWN), exit_code=None, ended=None)
    if found.status.get("requeued") and not word:
        waiting = now - float(found.status["ended"]) < _REQUEUE_SEEN_S
        reason = "it went back into the queue" if waiting else "it went back into the queue, and SLURM knows it no more"
        return replace(status, state=State.RESTARTING if waiting else State.UNKNOWN, reason=reason)
    if found.status and not found.status.get("requeued"):
        return _by_script(status, found, word)
    if word:
        return _by_slurm(status, found, word)
    if found.cancelled:
        return replace(status, state=State.CANCELLED, reason="cancelled")
    reason = f"SLURM doesn't know {native.id or native.handle.native}, and it left no word in its record"
    return replace(status, state=State.UNKNOWN, native="gone", reason=reason)


def _facts(found: Evidence, listed: Listed | None, word: str) -> Status:
    """All but the state and its reason."""
    account, status = found.account, found.status
    code = str(account.get("ExitCode", "")).partition(":")[0]
    ended = status.get("ended") or _seconds(account.get("EndTime")) or (listed.ended if listed else None)
    attempt = found.result.get("attempt") or status.get("start") or int(account.get("Restarts", 0) or 0) + 1
    return Status(
        State.UNKNOWN,
        native=word or (f"exited {status['code']}" if status else ""),
        exit_code=status.get("code", int(code) if code.isdecimal() and word in ENDED else None),
        started=_seconds(account.get("StartTime")) or (listed.started if listed else None),
        ended=float(ended) if ended else None,
        node=str(status.get("node") or account.get("NodeList") or ""),
        attempt=int(attempt),
    )


def _seconds(text: object) -> float | None:
    return float(str(text)) if str(text).isdecimal() else None


def _ended_by_slurm(status: Mapping[str, Any]) -> str:
    """SLURM's word for it, of what it said to the script, which it had told to end: while a script runs on after that,
    it is COMPLETING."""
    said = str(status.get("slurm", ""))
    word = said.partition(" ")[0]
    if word == "COMPLETING":
        return "TIMEOUT" if "Reason=TimeLimit" in said else "CANCELLED"
    return word if word in ENDED else ""


_BEFORE_THE_RUNNER = {"BOOT_FAIL", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
"""Ends that SLURM makes, of which a runner knows only that it was to stop."""


def _by_script(status: Status, found: Evidence, word: str) -> Status:
    code, account = int(found.status["code"]), found.notice or found.result
    if word in _BEFORE_THE_RUNNER and account.get("state", "PREEMPTED") == "PREEMPTED":
        return _by_slurm(status, found, word)
    if word == "CANCELLED" and code != EXIT_DONE:
        return replace(status, state=State.CANCELLED, reason=_by_whom(found))
    state = ended_state(account.get("state"), code)
    reason = str(account.get("reason") or "")
    if code == EXIT_PREEMPTED and state is State.FAILED:
        reason = "preempted with a checkpoint, and not put back into the queue: max_attempts, or the site forbids it"
    elif state is State.FAILED and not account:
        reason = signal_words("the runner or srun", code) or _said(found)
    return replace(status, state=state, reason=reason)


def _by_slurm(status: Status, found: Evidence, word: str) -> Status:
    """Its script was killed before it could say anything, or its record is gone."""
    reason = ENDED[word]
    if word == "FAILED":
        number = found.account.get("ExitCode", "").partition(":")[2]
        reason = signal_words("its script", SIGNALLED + int(number) if number.isdecimal() else 0) or _said(found)
    elif word == "CANCELLED":
        reason = _by_whom(found)
    elif word == "NODE_FAIL" and status.node:
        reason = f"{reason}: {status.node}"
    return replace(status, state=STATES[word], reason=reason)


def _by_whom(found: Evidence) -> str:
    return "cancelled" if found.cancelled else "cancelled with scancel"


def _said(found: Evidence) -> str:
    text = found.said.removeprefix("cvlaunch: ")[:300]
    if missing := re.search(r"execve\(\): (\S+): No such file", text):
        return f"its node has no {missing[1]}; see container_command, python and modules of the target ({text})"
    return text
