"""Docker, Podman and Buildah: the one place that knows their command lines and their words for what went wrong.

They are driven through their command lines, as their users do, so that log-ins, contexts and rootless set-ups count
here as they count there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import AuthError, CapacityError, CvlaunchError, SpecError, UnreachableError, UnsupportedError
from launcher.paths import cache_folder
from launcher.process import descendants

__all__ = [
    "AUTO",
    "ENGINES",
    "ENGINE_VARIABLE",
    "BuildOptions",
    "Container",
    "ContainerOptions",
    "Engine",
    "LocalImage",
    "Mount",
    "Step",
    "build_error",
    "engine_error",
    "find_engine",
]

ENGINES = ("docker", "podman", "buildah")
"""In the order in which they are tried. Buildah builds, pushes and inspects; it runs no jobs."""

ENGINE_VARIABLE = "CVLAUNCH_ENGINE"

AUTO = "auto"
"""Whatever engine there is."""

_ASK_S = 60.0
_TAIL = 20
"""Lines of an engine's output that an error is read from."""
_NO_VARIABLES: Mapping[str, str] = {}
_STOP_S = 10.0


@dataclass(frozen=True)
class LocalImage:
    """An image in the engine's store.

    config_digest: SHA-256 of its configuration, `sha256:…`, the same before and after a push. digests: `name@sha256:…`
    of manifests under which registries know it. layers: uncompressed digests. size: bytes. user: of USER; empty: root.
    """

    config_digest: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    size: int
    platform: str
    layers: tuple[str, ...]
    labels: Mapping[str, str]
    entrypoint: tuple[str, ...]
    user: str


@dataclass(frozen=True)
class Container:
    """A container as the engine remembers it. status: the engine's word. exit_code: None as long as it runs.

    image: config digest. out_of_memory: the kernel killed it at its memory limit. error: why it could not start.
    """

    name: str
    status: str
    running: bool
    exit_code: int | None
    out_of_memory: bool
    error: str
    image: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Mount:
    """source: a folder or file of this machine."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class ContainerOptions:
    """How a container runs. None: the engine's default, or no limit.

    user: `uid:gid`; None is the caller, so that what it writes belongs to whoever started it. shm, memory: bytes.
    gpus: UUIDs or indices. passwd: whether an arbitrary user gets an entry in /etc/passwd (Podman
    does that by default, Docker never). entrypoint: replaces the image's; arguments follow it. init: the engine's own
    first process stands before the command. keep_stdin: the container reads our standard input. inherit: variables
    whose values are ours, and stand on no command line. id_file: gets the container's id as soon as there is one.
    proxy_signals: what the client gets, the container gets.
    """

    image: str
    arguments: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    user: str | None = None
    groups: tuple[int, ...] = ()
    shm: int | None = None
    memory: int | None = None
    cpus: float | None = None
    gpus: tuple[str, ...] = ()
    network: str | None = None
    read_only: bool = False
    passwd: bool = True
    drop_capabilities: bool = False
    stop_signal: str | None = None
    init: bool = False
    keep_stdin: bool = False
    inherit: tuple[str, ...] = ()
    id_file: str | None = None
    proxy_signals: bool = True


@dataclass(frozen=True)
class BuildOptions:
    """dockerfile: its path. args: build arguments. more: further words of the engine's own."""

    tag: str
    dockerfile: Path
    platform: str
    args: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One instruction of an image. size: bytes of its layer; 0 if it made none."""

    size: int
    made_by: str


@dataclass(frozen=True)
class Engine:
    """name: docker, podman or buildah. program: its path. rootless: its root is the caller, and no other user is."""

    name: str
    program: str
    rootless: bool = False

    def read(self, *arguments: str, stdin: str = "", timeout: float = _ASK_S) -> str:
        """What it prints. Its failure is one of our errors."""
        try:
            done = subprocess.run(
                [self.program, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"{self.name} did not answer `{arguments[0]}` within {timeout:.0f} s") from None
        except OSError as error:
            raise UnsupportedError(f"{self.program} can't be started: {error.strerror}") from error
        if done.returncode:
            raise engine_error(self.name, arguments[0], done.stderr or done.stdout)
        return done.stdout

    def follow(
        self,
        arguments: Sequence[str],
        say: Callable[[str], None],
        *,
        env: Mapping[str, str] = _NO_VARIABLES,
        failed: Callable[[str, str, str], CvlaunchError] | None = None,
    ) -> str:
        """Like `read`, for what takes long: passes on each line as it comes, standard error, too. Returns them all.

        env: beside ours. failed: makes the error, like `engine_error`, from the last lines.
        """
        lines: list[str] = []
        for line in self._lines(arguments, env, failed or engine_error):
            lines.append(line)
            say(line)
        return "\n".join(lines)

    def _lines(
        self, arguments: Sequence[str], env: Mapping[str, str], failed: Callable[[str, str, str], CvlaunchError]
    ) -> Iterator[str]:
        tail: list[str] = []
        with subprocess.Popen(
            [self.program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            process_group=0,  # Ctrl-C in a terminal reaches us alone: Podman would leave a running step behind
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None  # noqa: S101 for mypy
            try:
                for line in process.stdout:
                    tail = [*tail[-_TAIL:], line.rstrip()]
                    yield line.rstrip()
            except BaseException:  # Ctrl-C: nothing goes on behind our back
                _stop(process)
                raise
        if process.returncode:
            raise failed(self.name, arguments[0], "\n".join(tail))

    # -- images -------------------------------------------------------------------------------------------------------

    def image(self, reference: str) -> LocalImage | None:
        """None if it is not in the engine's own store."""
        if self.name == "buildah":
            return self._buildah_image(reference)
        try:
            found: list[dict[str, Any]] = json.loads(self.read("image", "inspect", reference))
        except SpecError:
            return None
        return self._by_config(_local_image(found[0]), found[0]) if found else None

    def _by_config(self, image: LocalImage, found: Mapping[str, Any]) -> LocalImage:
        """Docker's containerd store, the usual one since Docker 29, calls an image by its manifest's digest."""
        kind = (found.get("Descriptor") or {}).get("mediaType", "")
        if not re.search(r"manifest|index", kind):
            return image
        return dataclasses.replace(image, config_digest=_noted(image.config_digest, self._saved_config))

    def _saved_config(self, image: str) -> str:
        """The configuration's digest, from the archive that `docker save` writes; no other command tells it."""
        command = [self.program, "image", "save", image]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as saving:
            try:
                with tarfile.open(fileobj=saving.stdout, mode="r|") as archive:
                    for member in archive:
                        if member.name == "manifest.json" and (file := archive.extractfile(member)):
                            config: str = json.loads(file.read())[0]["Config"]
                            return _sha256(config.rpartition("/")[2].removesuffix(".json"))
            except tarfile.TarError:
                saving.kill()
        raise SpecError(f"docker does not say what {image} is made of", key="image")

    def _buildah_image(self, reference: str) -> LocalImage | None:
        try:
            found = json.loads(self.read("inspect", "--type", "image", reference))
        except SpecError:
            return None
        config = found["OCIv1"]
        return LocalImage(
            config_digest=_sha256(found["FromImageID"]),
            names=(found["FromImage"],),
            digests=(f"{found['FromImage'].rpartition(':')[0]}@{found['FromImageDigest']}",),
            size=0,
            platform=f"{config['os']}/{config['architecture']}",
            layers=tuple(config["rootfs"]["diff_ids"]),
            labels=config["config"].get("Labels") or {},
            entrypoint=tuple(config["config"].get("Entrypoint") or ()),
            user=config["config"].get("User") or "",
        )

    def build(self, context: Path, options: BuildOptions, *, say: Callable[[str], None]) -> None:
        """Makes the image and gives it its tag. SpecError, with the last lines, if a step of the Dockerfile fails."""

        def failed(engine: str, action: str, output: str) -> CvlaunchError:
            return build_error(engine, output, str(options.dockerfile))

        self.follow([*self._build_words(), *_build_options(options), str(context)], say, env=_BUILDKIT, failed=failed)

    def _build_words(self) -> list[str]:
        """Without attestations: what is pushed is one image, which every platform takes, not an index of images."""
        if self.name != "docker":
            return ["build"]
        try:
            self.read("buildx", "version")
        except CvlaunchError:
            return ["build", "--progress=plain"]
        return ["buildx", "build", "--load", "--provenance=false", "--progress=plain"]

    def push(self, source: str, to: str, *, options: Sequence[str], say: Callable[[str], None]) -> str:
        """Gives the image the name `to` and brings it to its registry. The manifest's digest there."""
        if self.name == "docker":
            self.read("tag", source, to)
            found: list[str] = re.findall(r"digest: (sha256:[0-9a-f]{64})", self.follow(["push", *options, to], say))
        else:
            with tempfile.TemporaryDirectory(prefix="cvlaunch-push-") as scratch:
                file = Path(scratch, "digest")
                self.follow(["push", "--digestfile", str(file), *options, source, f"docker://{to}"], say)
                found = file.read_text().split()
            self.read("tag", source, to)
        if not found:
            raise SpecError(f"{self.name} pushed {to} and does not say its digest")
        return found[-1]

    def login(self, registry: str, user: str, password: str) -> None:
        """The password goes through standard input, where nobody else can read it."""
        self.read("login", "--username", user, "--password-stdin", registry, stdin=password)

    def steps(self, reference: str) -> list[Step]:
        """What made the image, the newest step first; empty where the engine doesn't tell."""
        if self.name == "buildah":
            return []
        lines = self.read("history", "--human=false", "--no-trunc", "--format", "{{json .}}", reference).splitlines()
        found = [entry for line in lines for entry in _listed(json.loads(line))]
        return [Step(int(entry.get("size", entry.get("Size", 0))), entry["CreatedBy"]) for entry in found]

    def file_in(self, reference: str, path: str) -> bytes | None:
        """A file of the image, which is not started for this; None if it has none, or the engine can't look."""
        if self.name == "buildah":
            return None
        name = self.read("create", reference, "none").strip()
        try:
            with tempfile.TemporaryDirectory(prefix="cvlaunch-look-") as scratch:
                self.read("cp", f"{name}:{path}", f"{scratch}/file")
                return Path(scratch, "file").read_bytes()
        except SpecError:
            return None
        finally:
            self.remove(name)

    def pull(self, reference: str, say: Callable[[str], None]) -> LocalImage:
        """From its registry, where it isn't here. SpecError if there is no such image."""
        self.follow(["pull", reference], say)
        image = self.image(reference)
        if image is None:
            raise SpecError(f"{self.name} pulled {reference} and does not find it", key="image")
        return image

    # -- containers ---------------------------------------------------------------------------------------------------

    def run_command(self, options: ContainerOptions) -> list[str]:
        """The whole command line; its exit code is the container's, or 125 to 127 where none was started."""
        return [self.program, "run", *_run_options(self, options), options.image, *_arguments(options)]

    def container(self, name: str) -> Container | None:
        """None if the engine knows of none. name: or its id."""
        try:
            found: list[dict[str, Any]] = json.loads(self.read("container", "inspect", name))
        except SpecError as error:
            if not re.search(r"no such container|no container with name or id", str(error), re.IGNORECASE):
                raise
            return None
        return _container(found[0]) if found else None

    def containers(self, label: str) -> list[str]:
        """Names of the containers with the label `key=value`, ended ones included."""
        return self.read("ps", "--all", "--filter", f"label={label}", "--format", "{{.Names}}").split()

    def signal(self, name: str, signal: str) -> None:
        """To the container's first process; one that has ended is fine."""
        with contextlib.suppress(CvlaunchError):
            self.read("kill", "--signal", signal, name)

    def remove(self, name: str) -> None:
        """Kills it, if it runs; one that is gone is fine.

        Podman 4.3 refuses ("container state improper") while it still writes down that the container has ended.
        """
        for pause in (0.2, 0.5, 1.0, 0.0):
            try:
                self.read("rm", "--force", "--volumes", name)
            except SpecError:
                if self.container(name) is None:
                    return
                time.sleep(pause)
            else:
                return

    def changes(self, name: str) -> list[str]:
        """Paths in the container's own layer that were added (A), changed (C) or deleted (D): `A /root/x`."""
        return self.read("diff", name).splitlines()


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends what the engine runs for a build first, so that it can put its own things in order: Podman and Buildah end
    at SIGTERM without a look at the step that is running. Docker's steps are its daemon's, which stops them itself.
    """
    steps = [child.pid for child in descendants(process.pid) if child.parent != process.pid]
    for pid in steps:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    for stop in (process.terminate, process.kill) if not steps else (lambda: None, process.terminate, process.kill):
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
            return


def find_engine(wanted: str | None = None, *, builds: bool = False) -> Engine:
    """The engine that `wanted` names; for None and AUTO that of $CVLAUNCH_ENGINE, else the first one that answers.

    builds: Buildah will do. UnsupportedError if there is none; UnreachableError if it doesn't answer.
    """
    name = (None if wanted == AUTO else wanted) or os.environ.get(ENGINE_VARIABLE)
    known = ENGINES if builds else ENGINES[:2]
    if name and name not in known:
        what = "build images" if builds else "run containers"
        raise SpecError(f"{name!r} is no engine to {what} with; there are {', '.join(known)}", key=ENGINE_VARIABLE)
    failures: list[CvlaunchError] = []
    for candidate in [name] if name else known:
        if program := shutil.which(candidate):
            try:
                return _asked(candidate, program)
            except CvlaunchError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    looked = name or " or ".join(known)
    raise UnsupportedError(f"{looked} is not installed here: no container engine was found on PATH")


@functools.lru_cache
def _asked(name: str, program: str) -> Engine:
    return Engine(name, program, _rootless(Engine(name, program)))


def _rootless(engine: Engine) -> bool:
    """Also asks whether it is there at all: a Docker client has no daemon everywhere."""
    if engine.name == "docker":
        return "rootless" in engine.read("info", "--format", "{{.SecurityOptions}}")
    if engine.name == "podman":
        return engine.read("info", "--format", "{{.Host.Security.Rootless}}").strip() == "true"
    engine.read("version")
    return os.geteuid() != 0


_BUILDKIT = {"DOCKER_BUILDKIT": "1"}
"""For a client without buildx. Podman and Buildah don't read it."""


def _build_options(options: BuildOptions) -> Iterator[str]:
    yield from ("--tag", options.tag, "--file", str(options.dockerfile), "--platform", options.platform)
    yield from _pairs("--build-arg", options.args)
    yield from _pairs("--label", options.labels)
    yield from options.more


def _listed(value: Any) -> list[Mapping[str, Any]]:
    """Docker prints an object a line, Podman all in one list."""
    return value if isinstance(value, list) else [value]


def _noted(image: str, find: Callable[[str], str]) -> str:
    """The configuration of an image, found once."""
    note = cache_folder() / "images" / image.removeprefix("sha256:")
    if not note.is_file():
        config = find(image)
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as file:
            file.write(config)
        Path(file.name).replace(note)
    return note.read_text()


def _run_options(engine: Engine, options: ContainerOptions) -> Iterator[str]:
    if options.name:
        yield from ("--name", options.name)
    yield from _pairs("--label", options.labels)
    yield from _pairs("--env", options.env)
    for name in options.inherit:
        yield from ("--env", name)
    for mount in options.mounts:
        yield from ("--mount", _mount(mount))
    yield from _user_options(engine, options)
    yield from _limit_options(engine, options)
    if options.init:
        yield "--init"
    if options.keep_stdin:
        yield "--interactive"
    if options.network:
        yield from ("--network", options.network)
    if options.stop_signal:
        yield from ("--stop-signal", options.stop_signal)
    if options.entrypoint:
        yield from ("--entrypoint", options.entrypoint[0])
    if options.id_file:
        yield from ("--cidfile", options.id_file)
    if not options.proxy_signals:
        yield "--sig-proxy=false"


def _arguments(options: ContainerOptions) -> tuple[str, ...]:
    """Docker's --entrypoint takes one word; the others go before the arguments."""
    return (*(options.entrypoint or ())[1:], *options.arguments)


def _user_options(engine: Engine, options: ContainerOptions) -> Iterator[str]:
    user = options.user or _caller(engine)
    yield from ("--user", user)
    if options.user is None and engine.name == "podman" and engine.rootless:
        yield "--userns=keep-id"
    for group in options.groups:
        yield from ("--group-add", str(group))
    if engine.name == "podman" and not options.passwd:
        yield "--passwd=false"
    if options.drop_capabilities:
        yield from ("--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    if options.read_only:
        yield "--read-only"
        if engine.name == "podman":
            yield "--read-only-tmpfs=false"  # else /tmp, /run and /var/tmp can be written, which Docker's can't


def _caller(engine: Engine) -> str:
    return "0:0" if engine.name == "docker" and engine.rootless else f"{os.geteuid()}:{os.getegid()}"


def _limit_options(engine: Engine, options: ContainerOptions) -> Iterator[str]:
    if options.shm is not None:
        yield from ("--shm-size", str(options.shm))
    if options.memory is not None:
        yield from ("--memory", str(options.memory))
    if options.cpus is not None:
        yield from ("--cpus", f"{options.cpus:g}")
    if options.gpus and engine.name == "docker":
        yield from ("--gpus", f'"device={",".join(options.gpus)}"')  # quoted: its value is read as CSV
    elif options.gpus:
        for gpu in options.gpus:
            yield from ("--device", f"nvidia.com/gpu={gpu}")  # CDI


def _pairs(option: str, values: Mapping[str, str]) -> Iterator[str]:
    for key, value in values.items():
        yield from (option, f"{key}={value}")


def _mount(mount: Mount) -> str:
    """One record of CSV, which both engines read it as: a path may hold commas and quotes."""
    fields = [
        "type=bind",
        f"source={mount.source}",
        f"target={mount.target}",
        *(["readonly"] if mount.read_only else []),
    ]
    return ",".join(_csv_field(text) for text in fields)


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\n]', text) else text


def _local_image(found: Mapping[str, Any]) -> LocalImage:
    config = found.get("Config") or {}
    return LocalImage(
        config_digest=_sha256(found["Id"]),
        names=tuple(found.get("RepoTags") or ()),
        digests=tuple(found.get("RepoDigests") or ()),
        size=int(found["Size"]),
        platform=f"{found['Os']}/{found['Architecture']}",
        layers=tuple((found.get("RootFS") or {}).get("Layers") or ()),
        labels=config.get("Labels") or {},
        entrypoint=_words(config.get("Entrypoint")),
        user=config.get("User") or "",
    )


def _words(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())


def _sha256(value: str) -> str:
    return value if value.startswith("sha256:") else f"sha256:{value}"


def _container(found: Mapping[str, Any]) -> Container:
    state = found["State"]
    running = state["Status"] in ("running", "paused", "stopping")
    started = state["Status"] not in ("created", "configured", "initialized")
    return Container(
        name=found["Name"].removeprefix("/"),
        status=state["Status"],
        running=running,
        exit_code=int(state["ExitCode"]) if started and not running else None,
        out_of_memory=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        image=_sha256(found["Image"]),
        labels=(found.get("Config") or {}).get("Labels") or {},
    )


@dataclass(frozen=True)
class _Word:
    """pattern: in what the engine printed. kind: our error. advice: the way out."""

    pattern: str
    kind: type[CvlaunchError]
    advice: str


_NO_SPACE = r"(?:write [^\s:]+: )?(?:no space left on device|disk quota exceeded)"

_WORDS = (
    _Word(
        r"container registry localhost\b|https?://localhost/v2/",
        SpecError,
        "names that begin with localhost/ are of this machine, and it has no such image",
    ),
    _Word(_NO_SPACE, CapacityError, "free some space where images are kept"),
    _Word(
        r"cannot connect to the docker daemon|cannot connect to podman|unable to connect to podman",
        UnreachableError,
        "start it (Docker: systemctl start docker), or name another engine in CVLAUNCH_ENGINE",
    ),
    _Word(
        r"permission denied while trying to connect|dial unix \S+: connect: permission denied",
        AuthError,
        "this user may not use it: join its group (docker), or use Podman",
    ),
    _Word(
        r"unauthorized|authentication required|no basic auth credentials|incorrect username or password",
        AuthError,
        "log in to the registry: {engine} login REGISTRY",
    ),
    _Word(r"pull access denied", SpecError, "check its name and tag; one that is private needs: {engine} login"),
    _Word(
        r"denied|forbidden|read-only|method not allowed|\bunsupported\b.*operation|status code 405",
        AuthError,
        "the registry takes no such request from this log-in; ask for the right to push, or push elsewhere",
    ),
    _Word(
        r"(?s)toomanyrequests|too many requests|rate limit", UnreachableError, "the registry asks to come back later"
    ),
    _Word(
        r"manifest unknown|name unknown|repository name not known|requested resource .*not found|no such image"
        r"|image not known|no such object|no such container|not found: manifest|did not resolve to an alias"
        r"|does not exist|no container with name or id|image not found",
        SpecError,
        "check its name and tag",
    ),
    _Word(r"unresolvable cdi devices|could not select device driver", CapacityError, "the engine has no NVIDIA GPUs: "
          "install the NVIDIA container toolkit (Podman: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml)"),
    _Word(
        r"connection refused|no such host|i/o timeout|no route to host|network is unreachable|tls handshake"
        r"|server gave http response|certificate|connection reset|temporary failure in name resolution",
        UnreachableError,
        "the registry does not answer; check its address and this machine's network",
    ),
)  # fmt: skip
"""The first that fits counts."""


def engine_error(engine: str, action: str, output: str) -> CvlaunchError:
    """What an engine printed when it failed, as one of our errors. Words that nobody knows are a SpecError."""
    said = _last_words(output)
    for word in _WORDS:
        if found := re.search(word.pattern, output, re.IGNORECASE):
            said = found[0] if word.pattern == _NO_SPACE else said  # the line around it can be pages
            return word.kind(f"{engine} {action}: {said}; {word.advice.format(engine=engine)}")
    return SpecError(f"{engine} {action} failed: {said}")


_STEP_FAILED = re.compile(
    r"building at STEP|executor failed running|did not complete successfully|failed to compute cache key"
    r"|failed to calculate checksum|dockerfile parse error|unknown instruction|no build stage|no FROM statement"
    r"|file with no instructions",
    re.IGNORECASE,
)
"""What Podman and BuildKit say when the Dockerfile is to blame, not a registry or the machine."""


_BOOKKEEPING = re.compile(
    r"STEP |-->|time=|sha256:|---| ?>|\[\d+/\d+\] |\[internal\]|(DONE|CACHED|ERROR)\b(?!: failed)"
    r"|transferring (context|docker)"
)
"""Lines of an engine that say nothing of why a step failed."""


def build_error(engine: str, output: str, dockerfile: str) -> CvlaunchError:
    """Like `engine_error`, for a build. What a step itself printed is shown and not taken for the engine's words."""
    if not _STEP_FAILED.search(output) or re.search(_NO_SPACE, output, re.IGNORECASE):
        return engine_error(engine, "build", output)
    lines = [_plain(line) for line in output.splitlines()]
    shown = [line for line in lines if line and not _BOOKKEEPING.match(line)]
    return SpecError("\n".join([f"{dockerfile}: a step failed; {engine} said last:", *(f"  {s}" for s in shown[-10:])]))


def _plain(line: str) -> str:
    """Without BuildKit's counters: `#5 0.312 text`."""
    return re.sub(r"^#\d+ (\d+\.\d+ )?", "", line).rstrip()


def _last_words(output: str) -> str:
    """The line that says why: the last `Error: …`, without what wraps it."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("time=")]
    errors = [line for line in lines if re.match(r"(error|err|denied|unauthorized)\b", line, re.IGNORECASE)]
    text = (errors or lines or ["it says nothing"])[-1]
    return re.sub(r"^error( response from daemon)?: ", "", text, flags=re.IGNORECASE)[:500]
