"""A real OpenSSH server on 127.0.0.1, with a user of its own if one with another login shell is wanted.

OpenSSH takes a user's configuration from the home folder of /etc/passwd, not from $HOME. So the client gets its
configuration, which a user would have in ~/.ssh/config, from a script `ssh` on PATH that adds `-F`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.process import descendants
from tests.services.podman import locked
from tests.services.ports import free_port

__all__ = ["ALIAS", "NOISE", "Sshd", "close_connections", "sshd"]

ALIAS = "cluster"
"""What the client's configuration calls the server."""

NOISE = 'Welcome to the "cluster": $HOME is *not* backed up'
"""What login files print."""


@dataclass(frozen=True)
class Sshd:
    """user: who logs in. home: their $HOME. bin: a folder for PATH with an `ssh` that knows this server as ALIAS.

    runtime: a folder whose path is short enough for sockets, for XDG_RUNTIME_DIR.
    """

    folder: Path
    runtime: Path
    port: int
    user: str
    home: Path
    pid: int

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server as a user does."""
        return {"PATH": f"{self.bin}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(self.runtime)}

    def cut(self) -> None:
        """Ends every connection as a crash of the machine would; what runs in them goes on."""
        while servers := list(_servers(self.pid)):
            for pid in servers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


@contextlib.contextmanager
def sshd(
    folder: Path,
    *,
    login_shell: str | None = None,
    options: Sequence[str] = (),
    variables: Mapping[str, str] = {},
    password: str | None = None,
) -> Iterator[Sshd]:
    """A server that lets the caller in as root, or as a new user with `login_shell`, whose login files print noise.

    options: further lines for sshd_config. variables: what commands find in their environment.
    password: of the new user.
    """
    folder.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "client_key"):
        _make_key(folder / name)
    runtime = Path(tempfile.mkdtemp(prefix="cvt-", dir="/tmp"))
    try:
        with _user(login_shell, folder / "client_key.pub", password) as user:
            port = free_port()
            home = Path(pwd.getpwnam(user).pw_dir)
            if login_shell is None:
                home = folder / "home"  # without the login files of this machine's root
                home.mkdir(exist_ok=True)
            settings = _server_settings(folder, port, [*options, _set_env({"HOME": str(home), **variables})])
            (folder / "sshd_config").write_text(settings)
            _write_client(folder, port, user)
            with _process(folder) as pid:
                yield Sshd(folder, runtime, port, user, home, pid)
                close_connections(runtime)
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


def close_connections(runtime: Path) -> None:
    """Ends what ssh has left behind with sockets below `runtime`. What is told to end removes its socket later."""
    for path in list(runtime.glob("*/*")):
        done = subprocess.run(["ssh", "-O", "exit", "-S", path, "any"], capture_output=True, check=False)
        deadline = time.monotonic() + 60
        while done.returncode == 0 and path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def _make_key(path: Path) -> None:
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cvlaunch tests", "-f", path], check=True)


def _server_settings(folder: Path, port: int, more: Sequence[str]) -> str:
    lines = [
        *more,  # the first line of a name counts
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'client_key.pub'} .ssh/authorized_keys",
        "StrictModes no",  # folders of tests stand below /tmp
        "PermitRootLogin yes",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "UsePAM no",
        "PidFile none",
        "MaxStartups 100",
        "Subsystem sftp internal-sftp",
    ]
    return "".join(f"{line}\n" for line in lines)


def _set_env(variables: Mapping[str, str]) -> str:
    """One line: sshd takes the first alone."""
    return "SetEnv " + " ".join(f'"{name}={value}"' for name, value in variables.items())


def _write_client(folder: Path, port: int, user: str) -> None:
    key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
    (folder / "ssh_config").write_text(
        f"Host {ALIAS}\n  HostName 127.0.0.1\n  Port {port}\n  User {user}\n"
        f"Host *\n  IdentityFile {folder / 'client_key'}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder / 'known_hosts'}\n  GlobalKnownHostsFile /dev/null\n"
    )
    script = folder / "bin/ssh"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path="/usr/bin:/bin")} -F {folder / "ssh_config"} "$@"\n')
    script.chmod(0o755)


@contextlib.contextmanager
def _process(folder: Path) -> Iterator[int]:
    log = folder / "sshd.log"
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or "sshd"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, "-D", "-e", "-f", folder / "sshd_config"], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        _wait_for(process, log)
        yield process.pid
    finally:
        for child in reversed(descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        process.terminate()
        process.wait(60)


def _wait_for(process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if "Server listening on" in log.read_text():
            return
        time.sleep(0.02)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")


def _servers(pid: int) -> Iterator[int]:
    """sshd's own processes below one, without the shells that they have started."""
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process.pid}/comm").read_text().startswith("sshd"):
                yield process.pid


@contextlib.contextmanager
def _user(login_shell: str | None, key: Path, password: str | None) -> Iterator[str]:
    if login_shell is None:
        yield "root"
        return
    name = f"cvt{os.getpid()}-{os.urandom(2).hex()}"
    _change_users(["useradd", "--create-home", "--shell", login_shell, "--password", _hashed(password), name])
    try:
        _fill_home(name, key)
        yield name
    finally:
        _change_users(["userdel", "--remove", "--force", name])


def _hashed(password: str | None) -> str:
    """`*`: nobody knows it, and the account is not locked."""
    if password is None:
        return "*"
    command = ["openssl", "passwd", "-6", "-stdin"]
    return subprocess.run(command, input=password, capture_output=True, text=True, check=True).stdout.strip()


def _change_users(command: list[str]) -> None:
    """Two at once are refused by the lock of /etc/passwd, which has no queue."""
    with locked("users"):
        subprocess.run(command, capture_output=True, text=True, check=True)


def _fill_home(name: str, key: Path) -> None:
    facts = pwd.getpwnam(name)
    home = Path(facts.pw_dir)
    files = {".ssh/authorized_keys": key.read_text()}
    for login_file in (".cshrc", ".login", ".bashrc", ".bash_profile", ".bash_logout", ".profile"):
        files[login_file] = f"echo '{NOISE}'\n"
    files[".bash_profile"] += "echo noise >&2\nset -eu\nset -x\n"
    for path, text in files.items():
        (home / path).parent.mkdir(exist_ok=True)
        (home / path).write_text(text)
        os.chown(home / path, facts.pw_uid, facts.pw_gid)
