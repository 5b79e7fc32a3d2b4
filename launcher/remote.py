"""Scripts on this machine, or on another one through the user's own `ssh`.

What the login shell there gets is one fixed command line that csh, tcsh, fish, zsh and bash read alike; the script and
its arguments travel on stdin, in front of its data. So neither any shell's quoting nor its limits (a word of csh is at
most 1,024 characters, an argument of execve 128 KiB) nor `ps` ever see them. Random marks on stdout and stderr tell
the script's output from the noise of login files; a last mark carries the script's exit code. Without that mark,
the connection broke.

The connection is shared (ControlMaster) by all processes of a user. Its socket stands at a place of our own, also
where the user's configuration names another: it is private, its path is short enough for a socket, and `login` and
`logout` know which one they open and close.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, cast

from launcher.errors import AuthError, CvlaunchError, SpecError, UnreachableError, UnsupportedError
from launcher.process import exit_code, signal_group

__all__ = ["Done", "Host"]

_OPTIONS: Mapping[str, str] = {
    "ConnectTimeout": "15",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "ControlMaster": "auto",
    # what users set for their own sessions with a host, and what would be in the way of ours
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
}
_BATCH = {"BatchMode": "yes", "ControlPersist": "600", "LogLevel": "INFO"}
_LOGIN = {"BatchMode": "no", "ControlPersist": str(12 * 3600)}

_START = (
    "exec sh -c 'command -v bash >/dev/null || {{ echo cvlaunch: no bash >&2; exit 0; }}; "
    "exec 3<&0 4>&1 </dev/null >&2; "  # login files get neither our stdin nor our stdout
    'exec bash {option} "$0" bash "$@"\' '
    "'set +euxv; exec <&3 >&4 3<&- 4>&-; {program}'"  # login files may leave options behind
)
"""A command line for any login shell: no quotes inside of quotes, `!`, backslash or line end; there they differ."""
_READ = 'read -r size; eval "$(head -c $size)"'
_DECODE = 'eval "$(printf %s "$@" | base64 -d)"'

_CHUNK = 1 << 20
_NOISE = 4096
"""Bytes of a login shell's output that are kept for a message."""
_WORD = 900
"""Characters of a word on a command line, for csh."""
_COMMAND_LINE = 100_000

_FOLDER_PATH = 104 - len("/") - 40 - len(".") - 16 - len("\0")
"""Of a socket's path (104 on BSDs, 108 on Linux), less %C and what ssh appends while it makes the socket."""

_TROUBLES: Sequence[tuple[str, type[CvlaunchError], str]] = (
    (r"session open refused by peer", UnreachableError,
     "it takes no more sessions over one connection at the moment: try again"),
    (r"could not resolve hostname", UnreachableError,
     "no host of this name is known here: correct `ssh`, give it an entry in ~/.ssh/config, or join its network (VPN)"),
    (r"remote host identification has changed", AuthError,
     "its host key is not the one that ~/.ssh/known_hosts has, so it may be another machine: ask its administrators; "
     "if they changed it, remove the old key with `ssh-keygen -R`"),
    (r"host key verification failed|host key is known for", AuthError,
     "its host key is not known yet: run `{login}`, and compare the fingerprint that it shows"),
    (r"too many authentication failures", AuthError,
     "your agent offers more keys than it takes: name one by IdentityFile with IdentitiesOnly in ~/.ssh/config"),
    (r"permission denied \(|no more authentication methods|no supported authentication methods", AuthError,
     "it did not let you in without a question: run `{login}` if it wants a password or a code, "
     "else give it your public key, or load the key into your agent"),
    (r"bad configuration option|bad owner or permissions|\bline \d+: |extra arguments at end", SpecError,
     "ssh can't use its configuration: correct it"),
    (r"connection refused", UnreachableError, "nothing answers at its port: check host and port, or try again later"),
    (r"timed out|timeout, server", UnreachableError,
     "it does not answer: check the network (VPN), or try again later"),
    (r"no route to host|network is unreachable|host is down", UnreachableError,
     "there is no way to it from here: check the network (VPN)"),
    (r"unknown port 65535|stdio forwarding failed", UnreachableError,
     "the way through its jump host failed: try `ssh {ssh} true`, which shows more"),
)  # fmt: skip
"""What ssh says (OpenSSH 7 to 10) → what the caller can do. The first that fits counts."""


@dataclass(frozen=True)
class Done:
    """What a script left: its own exit code, and what it and nobody else wrote."""

    code: int
    out: bytes
    err: str


@dataclass(frozen=True)
class Host:
    """ssh: as the user's ssh knows it (an alias of ~/.ssh/config, user@host); None is this machine.

    target: its name in targets.yaml, for messages.
    """

    ssh: str | None = None
    target: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.ssh is not None and not re.fullmatch(r"(?!-)[^\s\x00-\x1f\x7f]+", self.ssh):
            raise SpecError(f"{self.ssh!r} is not a host for ssh; one looks like login1 or me@login1.example.org")

    @property
    def name(self) -> str:
        return self.ssh or "this machine"

    def run(
        self,
        script: str,
        *arguments: str,
        stdin: bytes | Path = b"",
        to: BinaryIO | None = None,
        timeout_s: float | None = None,
        login: bool = True,
    ) -> Done:
        """Runs bash text with `arguments` as its $1, $2, ..., once; its own exit code is no error.

        to: stdout goes there as it comes, and `out` is empty.
        login: with what a login shell has on its PATH, which may take a second; this machine's PATH is always ours.

        UnreachableError and AuthError if it did not run or its end is not known. What it has started there may go on
        when the connection breaks, or when `timeout_s` is over.
        """
        mark = secrets.token_hex(16)
        memory = io.BytesIO()
        out = _AfterMark(f"{mark}\n".encode(), to or memory)
        with _opened(stdin) as data:
            program = io.BytesIO(_sized(_marked(_program(script, arguments), mark)))
            ended = _converse(self._command(_READ, login=login), [program, data], out, timeout_s=timeout_s)
        err, code = _own(ended.said, mark)
        if ended.code != 0 or code is None:
            raise self._trouble(ended, out, timeout_s)
        return Done(code, memory.getvalue(), err)

    def attach(self, script: str, *arguments: str, tty: bool) -> int:
        """Runs bash text on our own stdin, stdout and stderr; its exit code, or ssh's 255 (which then has said why).

        tty: with a terminal there. UnreachableError and AuthError as `run` has them.
        """
        program = _program(script, arguments)
        if self.ssh is None:
            return _foreground(["bash", "-c", program])
        self.run("")
        code = base64.b64encode(program.encode("utf-8", "surrogateescape")).decode()
        if len(code) > _COMMAND_LINE:
            raise SpecError(
                f"a command of {len(code)} characters is too long for {self.name}: put it into a file there"
            )
        words = [code[at : at + _WORD] for at in range(0, len(code), _WORD)]
        command = self._command(
            _DECODE, *words, terminal="-tt" if tty else "-T", options={**_BATCH, "LogLevel": "ERROR"}
        )
        return _foreground(command)

    def login(self) -> None:
        """Opens the connection in our terminal, where ssh may ask for a password, a code or about a host key.

        It stays open for 12 hours after its last use. AuthError if it did not open.
        """
        if self.ssh is None:
            return
        code = _foreground(["ssh", *_flags({**_OPTIONS, **_LOGIN}), "-T", "--", self.ssh, "exit 0"])
        if code:
            raise AuthError(f"{self.name}: the login failed; ssh has said why")

    def logout(self) -> None:
        """Closes the connection for all who use it; none is fine."""
        self._control("exit")

    def is_open(self) -> bool:
        """Whether a connection stands that `run` would use."""
        return self.ssh is None or self._control("check")

    def _control(self, order: str) -> bool:
        if self.ssh is None:
            return True
        command = ["ssh", *_flags({}), "-O", order, "--", self.ssh]
        with _missing_program():
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0

    def _command(
        self,
        program: str,
        *words: str,
        login: bool = True,
        terminal: str = "-T",
        options: Mapping[str, str] = _BATCH,
    ) -> list[str]:
        if self.ssh is None:
            return ["bash", "-c", program]
        line = " ".join([_START.format(option="-lc" if login else "-c", program=program), *words])
        return ["ssh", *_flags({**_OPTIONS, **options}), terminal, "--", self.ssh, line]

    def _trouble(self, ended: _Ended, out: _AfterMark, timeout_s: float | None) -> CvlaunchError:
        """Why no exit code of a script came back."""
        if ended.expired:
            return UnreachableError(f"{self.name}: no answer within {timeout_s:g} s: try again later")
        if out.found:
            text = f"{self.name}: the connection broke while a script ran, which may have done its work or not"
            return UnreachableError(f"{text}{_last_line(ended.said)}: try again")
        if b"cvlaunch: no bash" in ended.said:
            return UnsupportedError(f"{self.name} has no bash, which cvlaunch needs there: ask its administrators")
        if ended.code == 255:
            return self._no_connection(ended.said)
        said = _last_line(ended.said) or _last_line(out.noise)
        return UnsupportedError(
            f"{self.name} took the connection and then ran no script{said}: "
            "its login shell or login files end early, or only certain commands are allowed there"
        )

    def _no_connection(self, said: bytes) -> CvlaunchError:
        text = said.decode("utf-8", "replace")
        for pattern, kind, sentence in _TROUBLES:
            if re.search(pattern, text, re.IGNORECASE):
                login = f"cvlaunch login {self.target or 'TARGET'}"
                return kind(f"{self.name}: {sentence.format(ssh=self.ssh, login=login)}{_last_line(said)}")
        return UnreachableError(f"{self.name}: ssh could not connect{_last_line(said)}: try again later")


# -- the program that is sent -----------------------------------------------------------------------------------------


def _program(script: str, arguments: Sequence[str]) -> str:
    """Bash text that runs `script` as if alone: its `exit` ends only itself, and no ~/.bash_logout is read."""
    if "\0" in "".join([script, *arguments]):
        raise SpecError("a script and its arguments can't hold the character NUL: remove it")
    return f"(set -- {' '.join(map(shlex.quote, arguments))}\neval {shlex.quote(script)})"


def _marked(program: str, mark: str) -> str:
    return f"printf '%s\\n' {mark}\nprintf '%s\\n' {mark} >&2\n{program}\nprintf '\\n{mark} %d\\n' $? >&2\n"


def _sized(program: str) -> bytes:
    data = program.encode("utf-8", "surrogateescape")
    return f"{len(data)}\n".encode() + data


def _own(said: bytes, mark: str) -> tuple[str, int | None]:
    """A script's stderr and its exit code, of all that came."""
    _, _, after = said.partition(f"{mark}\n".encode())
    text, found, code = after.rpartition(f"\n{mark} ".encode())
    digits = re.match(rb"\d+", code)
    if not found or not digits:
        return after.decode("utf-8", "replace"), None
    return text.decode("utf-8", "replace"), int(digits[0])


class _AfterMark:
    """Passes on what comes after the mark, and keeps the end of what came before."""

    def __init__(self, mark: bytes, to: BinaryIO) -> None:
        self._mark, self._to = mark, to
        self.noise, self.found = b"", False

    def write(self, block: bytes) -> None:
        if not self.found:
            self.noise, found, block = (self.noise + block).partition(self._mark)
            self.found = bool(found)
            self.noise = self.noise[-_NOISE:]
        if self.found and block:
            self._to.write(block)


# -- the process on this side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ended:
    """said: all of stderr. expired: the time was over."""

    code: int
    said: bytes
    expired: bool


def _converse(command: list[str], given: Sequence[IO[bytes]], out: _AfterMark, *, timeout_s: float | None) -> _Ended:
    """Runs a command that ends by itself. OSError if what is given can't be read."""
    # stderr is a file: a shared connection that OpenSSH before 8.5 leaves behind keeps it open, and a pipe has no end
    with tempfile.TemporaryFile() as said, ThreadPoolExecutor(1) as pool, _started(command, said) as process:
        feed = pool.submit(_feed, process, given)
        with _killed_after(process, timeout_s) as expired:
            while block := cast(io.BufferedReader, process.stdout).read1(_CHUNK):
                out.write(block)
            code = process.wait()
        feed.result()
        return _Ended(code, os.pread(said.fileno(), os.fstat(said.fileno()).st_size, 0), expired.is_set())


@contextlib.contextmanager
def _started(command: list[str], said: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that Ctrl-C comes to us alone: `ssh` of a jump host serves others, too."""
    with _missing_program():
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        )
    with process:
        try:
            yield process
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """All that a script of this machine has started; of ssh only itself, for its children serve others."""
    if process.returncode is None:
        if cast(list[str], process.args)[0] == "ssh":
            process.kill()
        else:
            signal_group(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float | None) -> Iterator[threading.Event]:
    """The event tells whether that happened."""
    expired = threading.Event()
    if seconds is None:
        yield expired
        return

    def expire() -> None:
        expired.set()
        _kill(process)

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
        timer.join()


def _feed(process: subprocess.Popen[bytes], given: Sequence[IO[bytes]]) -> None:
    """A script need not read all that it is given."""
    with contextlib.suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as stdin:
        for source in given:
            shutil.copyfileobj(source, stdin, _CHUNK)


def _foreground(command: list[str]) -> int:
    with _missing_program():
        return exit_code(subprocess.run(command, check=False).returncode)


@contextlib.contextmanager
def _missing_program() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UnsupportedError(f"{error.filename} is not on this machine's PATH: install it") from error


@contextlib.contextmanager
def _opened(data: bytes | Path) -> Iterator[IO[bytes]]:
    with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
        yield file


def _flags(options: Mapping[str, str]) -> list[str]:
    """Command-line options of ssh, with the place of the connection's socket."""
    settings = {**options, "ControlPath": f"{_socket_folder()}/%C"}
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _socket_folder() -> Path:
    """A private one whose path is short and needs no quotes: whoever may open the socket is us on the other machine."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime, "cvlaunch")
    if not (re.fullmatch(r"/[\w./-]+", runtime) and len(str(folder)) <= _FOLDER_PATH and os.access(runtime, os.W_OK)):
        folder = Path(f"/tmp/cvlaunch-{os.geteuid()}")  # noqa: S108 - its owner is checked
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise SpecError(f"{folder} is not a private folder of yours: remove it, or set XDG_RUNTIME_DIR to one that is")
    return folder


def _last_line(said: bytes) -> str:
    """In brackets, for a message; empty if nothing was said."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    return f" ({lines[-1][-300:]})" if lines else ""
