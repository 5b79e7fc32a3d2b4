"""The command as it is started: its environment, its variables filled in, torchrun around it where ranks are needed."""

from __future__ import annotations

import os
import pwd
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import contract
from launcher.contract import JobFile, Layout
from launcher.credentials.aws import region_variables
from launcher.runner.claim import native_id_of
from launcher.runner.ranks import Ranks

__all__ = ["Command", "build_command", "command_environment", "expand", "uses_torchrun"]

_VARIABLE = re.compile(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
"""Left by whatever started the runner; a training framework would take them for a process group of its own."""

_RUNNER_VARIABLES = (
    "CVLAUNCH_SECRETS_FILE", "CVLAUNCH_NOTICE", "CVLAUNCH_JOB_JSON", "CVLAUNCH_JOB_SHA256", "CVLAUNCH_SUBMISSION",
    "CVLAUNCH_INTERFACE", "CVLAUNCH_SECRETS_FOLDER", "CVLAUNCH_LOG", "CVLAUNCH_TERMINATION", "CVLAUNCH_STORAGE",
    "CVLAUNCH_GRACE",
)  # fmt: skip

_CACHES = {
    "TORCH_HOME": ".cache/torch",
    "HF_HOME": ".cache/huggingface",
    "MPLCONFIGDIR": ".config/matplotlib",
    "YOLO_CONFIG_DIR": ".config/Ultralytics",
    "XDG_CACHE_HOME": ".cache",
    "TRITON_CACHE_DIR": ".triton/cache",
    "NUMBA_CACHE_DIR": ".cache/numba",
}
"""Variable → where its library writes without it, below HOME."""

_SCRATCH_CACHES = "CVLAUNCH_SCRATCH_CACHES"
"""Set in the trainer image: a cache in its HOME would end with the container, and some platforms forbid it."""

_RENDEZVOUS_S = 24 * 3600
"""How long torchrun waits for its peers to be there, which gives up after 10 minutes by itself; nodes stage different
amounts of data, and pods come when there is a machine for them. That a peer is lost is seen by its connection."""

_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - what libraries take without TMPDIR
_SOCKET = "pymp-12345678/listener-12345678"
"""What multiprocessing makes below TMPDIR; the kernel takes 107 bytes for a socket's path."""


@dataclass(frozen=True)
class Command:
    """torchrun: whether the lines carry torchrun's rank prefix. cwd: None is the runner's own."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path | None
    torchrun: bool


def build_command(
    job: JobFile,
    override: Sequence[str] | None,
    *,
    env: Mapping[str, str],
    ranks: Ranks,
    code: Path | None,
    scratch: Path,
) -> Command:
    """override: the command from the runner's own command line. code: the job's code folder."""
    argv = _argv(job, override)
    known = {k: v for k, v in env.items() if k.startswith(("CVLAUNCH_", "SM_")) or k in job.env}
    argv = tuple(expand(word, {k: v for k, v in known.items() if k not in job.secrets}) for word in argv)
    torchrun = uses_torchrun(argv, ranks.nodes * job.processes)
    if torchrun:
        argv = (*_torchrun(argv[0], ranks, job.processes, scratch), *argv)
    return Command(argv, env, code, torchrun)


def _argv(job: JobFile, override: Sequence[str] | None) -> tuple[str, ...]:
    if override:
        return tuple(override)
    return job.command or (sys.executable, "-m", "cvtrainer")


def expand(word: str, values: Mapping[str, str]) -> str:
    """`${NAME}` by its value; names that are not in `values` stay, and `$${NAME}` is a plain `${NAME}`."""

    def replacement(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        if name not in values:
            return match[0]
        return match[0][1:] if escaped else values[name]

    return _VARIABLE.sub(replacement, word)


def uses_torchrun(argv: Sequence[str], world_size: int) -> bool:
    return world_size > 1 and _PYTHON.fullmatch(Path(argv[0]).name) is not None


def _torchrun(python: str, ranks: Ranks, processes: int, scratch: Path) -> tuple[str, ...]:
    """--no-python: each rank runs the command as it stands, with its own interpreter options."""
    rendezvous: tuple[str, ...]
    if ranks.nodes == 1:  # the agent takes a free port, so that two runs on one machine never collide
        rendezvous = ("--standalone", "--local-addr", "127.0.0.1", "--nnodes", "1")
    else:
        rendezvous = (
            "--nnodes", str(ranks.nodes), "--node-rank", str(ranks.node_rank),
            "--master-addr", ranks.master_addr, "--master-port", str(ranks.master_port),
            "--rdzv-conf", f"timeout={_RENDEZVOUS_S}",
        )  # fmt: skip
    return (
        python, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(processes),
        "--max-restarts", "0", "--tee", "3", "--log-dir", str(scratch / "ranks"), "--no-python",
    )  # fmt: skip


def command_environment(
    job: JobFile,
    layout: Layout,
    *,
    environ: Mapping[str, str],
    secrets: Mapping[str, str],
    ranks: Ranks,
    attempt: int,
    scratch: Path,
    python_path: Sequence[Path],
    places: Mapping[str, Path] = {},
) -> dict[str, str]:
    """Everything that the command finds in its environment. places: of channels that stand elsewhere."""
    env = {k: v for k, v in environ.items() if k not in (*_RANK_VARIABLES, *_RUNNER_VARIABLES)}
    env.setdefault("PYTHONUNBUFFERED", "1")
    env |= _contract_variables(job, layout, ranks, attempt)
    env |= _channel_variables({channel.name: layout.channel(channel.name) for channel in job.channels} | {**places})
    if native_id := native_id_of(environ):
        env["CVLAUNCH_NATIVE_ID"] = native_id
    env |= {**job.env, **secrets}
    env |= region_variables(env)
    env |= _home_variables(env, scratch)
    env |= _temporary_variables(env, scratch)
    if ranks.interface:
        env = {"NCCL_SOCKET_IFNAME": ranks.interface, "GLOO_SOCKET_IFNAME": ranks.interface, **env}
    if python_path:
        env["PYTHONPATH"] = os.pathsep.join([*map(str, python_path), *filter(None, [env.get("PYTHONPATH")])])
    return env


def _contract_variables(job: JobFile, layout: Layout, ranks: Ranks, attempt: int) -> dict[str, str]:
    variables = {
        "CVLAUNCH_ROOT": layout.root,
        "CVLAUNCH_JOB": layout.job,
        "CVLAUNCH_CHECKPOINTS": layout.checkpoints,
        "CVLAUNCH_MODEL": layout.model,
        "CVLAUNCH_OUTPUT": layout.output,
        "CVLAUNCH_RUN_ID": job.run_id,
        "CVLAUNCH_ATTEMPT": attempt,
        "CVLAUNCH_NODES": ranks.nodes,
        "CVLAUNCH_NODE_RANK": ranks.node_rank,
        "CVLAUNCH_MASTER": f"{ranks.master_addr}:{ranks.master_port}",
        "SM_MODEL_DIR": layout.model,
        "SM_OUTPUT_DATA_DIR": layout.output,
    }
    return {name: str(value) for name, value in variables.items()}


def _channel_variables(places: Mapping[str, Path]) -> dict[str, str]:
    ours = {contract.channel_variable(name): str(path) for name, path in places.items()}
    return ours | {name.replace("CVLAUNCH_DATA_", "SM_CHANNEL_", 1): path for name, path in ours.items()}


def _home_variables(env: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """Writable homes and caches for a uid without a home, or one on a read-only disk; what works is left alone."""
    found: dict[str, str] = {}
    try:
        user = pwd.getpwuid(os.getuid())
        home = env.get("HOME") or user.pw_dir
    except KeyError:  # an arbitrary uid, as OpenShift and OVH give: getpass.getuser() would fail
        home = env.get("HOME") or "/"
        found["USER"] = env.get("USER") or "cvlaunch"
    if not env.get("HOME") or not _can_write(Path(home)):
        home = str(_made(scratch / "home"))
        found["HOME"] = home
    to_scratch = env.get(_SCRATCH_CACHES) == "1"
    for name, default in _CACHES.items():
        if name not in env and (to_scratch or not _can_write(Path(home) / default)):
            found[name] = str(_made(scratch / name.lower()))
    return found


def _temporary_variables(env: Mapping[str, str], scratch: Path) -> dict[str, str]:
    """TMPDIR on a read-only disk: below scratch, or in memory where sockets can't stand there (too deep, or FUSE)."""
    wanted = [env["TMPDIR"]] if env.get("TMPDIR") else _TEMPORARY
    if any(_can_write(Path(folder)) for folder in wanted):
        return {}
    folder = _made(scratch / "tmp")
    memory = Path("/dev/shm", scratch.name.lstrip("."))  # noqa: S108 - a new name, as scratch's is
    if not _takes_sockets(folder) and _can_write(memory):
        folder = _made(memory)
    return {"TMPDIR": str(folder)}


def _takes_sockets(folder: Path) -> bool:
    path = folder / _SOCKET
    _made(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
    return True


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _can_write(folder: Path) -> bool:
    """Whether the folder, or the nearest one above that exists, takes new files."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
