"""Scripts here and behind ssh: real servers, login shells that are csh or noisy, broken connections, every refusal."""

from __future__ import annotations

import io
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import AuthError, CvlaunchError, SpecError, UnreachableError, UnsupportedError
from launcher.process import with_variable
from launcher.remote import Done, Host
from tests.services.sshd import ALIAS, NOISE, Sshd, close_connections, sshd
from tests.ssh_fixtures import use

needs_sshd = pytest.mark.needs("sshd", "root")


@pytest.fixture(
    params=["here", *(pytest.param(name, marks=needs_sshd) for name in ("ssh_server", "csh_server", "bash_server"))]
)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host() if request.param == "here" else use(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture
def fresh(ssh_server: Sshd, ssh_host: Host) -> Host:
    """No connection stands yet."""
    close_connections(ssh_server.runtime)
    return ssh_host


@pytest.fixture
def runtime(ssh_server: Sshd, ssh_host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sockets of this test alone, for it changes what ssh is to find."""
    folder = ssh_server.runtime / os.urandom(3).hex()
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    close_connections(folder)


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    """Another configuration of ssh for this test."""
    (tmp_path / "ssh_config").write_text(config)
    script = tmp_path / "bin/ssh"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp_path / "ssh_config"} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# -- what every machine promises --------------------------------------------------------------------------------------

HOSTILE = [
    "",
    " ",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "!! !x",
    "a\nb\n\n",
    "\\",
    "\\n",
    "-n",
    "--",
    "*",
    "~",
    "é 火 \udcff",
    "%s%C",
    "a;b|c&d>e<f",
    "{a,b}",
    "#",
    "\t\r\x1b",
]


def test_arguments_arrive_as_they_are(host: Host) -> None:
    done = host.run('printf "%s\\0" "$@"', *HOSTILE)
    assert done.out == b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in HOSTILE)
    assert (done.code, done.err) == (0, "")


def test_a_script_may_hold_any_text(host: Host) -> None:
    script = 'cat <<\'END\'\nit\'s "$HOME" `id` \\ ! é\nEND\necho "$#" # a comment'
    assert host.run(script).out.decode() == 'it\'s "$HOME" `id` \\ ! é\n0\n'


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("true", 0),
        ("false", 1),
        ("exit 255", 255),
        ("exec sh -c 'exit 3'", 3),
        ("set -e; false; echo no", 1),
        ("kill -KILL $BASHPID", 137),
        ("trap 'echo bye' EXIT; exit 4", 4),
        ("if", 2),
    ],
)
def test_exit_codes_are_the_scripts(host: Host, script: str, code: int) -> None:
    assert host.run(script).code == code


def test_output_is_the_scripts_alone(host: Host) -> None:
    assert host.run("printf out; printf err >&2; exit 1") == Done(1, b"out", "err")
    assert host.run("") == Done(0, b"", "")
    assert host.run("echo; echo >&2") == Done(0, b"\n", "\n")


def test_two_megabytes_on_stdin(host: Host, tmp_path: Path) -> None:
    data = os.urandom(2 << 20)
    (tmp_path / "data").write_bytes(data)
    assert host.run("cat", stdin=data).out == data
    assert host.run("wc -c", stdin=tmp_path / "data").out.split() == [b"2097152"]
    assert host.run("read -r -N 5 first; echo done", stdin=data).out == b"done\n"


def test_a_script_and_arguments_longer_than_a_command_line(host: Host) -> None:
    long = "x" * 300_000
    assert host.run(f'echo "${{#1}}" # {long}', long).out == b"300000\n"


def test_a_file_that_is_missing_is_not_sent(host: Host, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        host.run("cat", stdin=tmp_path / "missing")


def test_nul_is_refused(host: Host) -> None:
    with pytest.raises(SpecError, match="NUL"):
        host.run("echo", "a\0b")


def test_fifty_megabytes_stream_out(host: Host, tmp_path: Path) -> None:
    with (tmp_path / "got").open("wb") as file:
        done = host.run("head -c 50000000 /dev/zero; exit 7", to=file)
    assert (done.code, done.out) == (7, b"")
    assert (tmp_path / "got").stat().st_size == 50_000_000


@pytest.fixture
def ours(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Our processes but for the shared connection, which stands."""
    host.run("")
    monkeypatch.setenv("CVTEST", word := os.urandom(8).hex())
    return lambda: with_variable("CVTEST", word)


def test_what_the_receiver_throws_ends_the_script(host: Host, ours: Callable[[], list[int]]) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        host.run("yes", to=Full())
    wait_for(lambda: ours() == [])


def test_time_over_leaves_no_process(host: Host, ours: Callable[[], list[int]]) -> None:
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match=r"no answer within 0\.5 s"):
        host.run("sleep 600", timeout_s=0.5)
    assert time.monotonic() - begun < 60
    wait_for(lambda: ours() == [])
    assert host.run("echo well", timeout_s=300).out == b"well\n"


def test_ctrl_c_leaves_no_process(host: Host, ours: Callable[[], list[int]]) -> None:
    nap = f"sleep 600.{secrets.randbelow(10**9)}"  # no other test's, which may go on behind ssh
    child = subprocess.Popen([sys.executable, "-c", _RUN, repr(host.ssh), f"exec {nap}"], stderr=subprocess.PIPE)
    wait_for(lambda: nap in host.run("ps ax -o args").out.decode().splitlines())  # the child's own line has more
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said
    wait_for(lambda: ours() == [])


_RUN = "import sys; from launcher.remote import Host; Host(eval(sys.argv[1])).run(*sys.argv[2:])"
_ATTACH = (
    "import sys; from launcher.remote import Host\n"
    "sys.exit(Host(eval(sys.argv[1])).attach(*sys.argv[3:], tty=sys.argv[2] == 'tty'))"
)


def attach(
    host: Host, tty: str, script: str, *arguments: str, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-W", "error", "-c", _ATTACH, repr(host.ssh), tty, script, *arguments]
    return subprocess.run(command, input=given, capture_output=True, timeout=300, check=False)


def test_attached_it_has_our_own_streams(host: Host) -> None:
    hostile = [text for text in HOSTILE if "\udcff" not in text]
    done = attach(host, "no", 'cat; printf "%s|" "$@"; echo err >&2; exit 3', *hostile, "x" * 9000, given=b"given ")
    assert done.returncode == 3
    assert done.stdout.endswith(f"given {'|'.join(hostile)}|{'x' * 9000}|".encode())
    assert done.stderr.endswith(b"err\n")


def test_attached_with_a_terminal(ssh_server: Sshd, ssh_host: Host) -> None:
    assert attach(ssh_host, "tty", "test -t 0 && test -t 1 && exit 5").returncode == 5
    assert attach(ssh_host, "no", "test -t 0 || exit 6").returncode == 6


def test_names_and_bad_hosts() -> None:
    assert Host().name == "this machine"
    assert Host("me@login1").name == "me@login1"
    for bad in ("", "-oProxyCommand=id", "a b", "a\nb"):
        with pytest.raises(SpecError, match="not a host for ssh"):
            Host(bad)


# -- login shells -----------------------------------------------------------------------------------------------------


@needs_sshd
def test_login_files_are_noisy_and_we_do_not_hear_it(csh_server: Sshd, bash_server: Sshd) -> None:
    for server in (csh_server, bash_server):
        plain = subprocess.run([server.bin / "ssh", ALIAS, "echo x"], capture_output=True, text=True, check=True)
        assert plain.stdout == f"{NOISE}\nx\n"


@needs_sshd
def test_path_of_a_login_shell(ssh_server: Sshd, ssh_host: Host) -> None:
    (ssh_server.home / ".bash_profile").write_text("PATH=$PATH:/opt/slurm/bin\nread -r eaten\nshopt -s nullglob\n")
    try:
        assert ssh_host.run("cat; echo $PATH", stdin=b"kept\n").out.endswith(b":/opt/slurm/bin\n")
        assert ssh_host.run("cat", stdin=b"kept\n").out == b"kept\n"
        assert b"/opt/slurm/bin" not in ssh_host.run("echo $PATH", login=False).out
    finally:
        (ssh_server.home / ".bash_profile").unlink()


@needs_sshd
def test_neither_script_nor_arguments_show_in_a_list_of_processes(csh_host: Host) -> None:
    word, argument = secrets.token_hex(8), secrets.token_hex(8)
    listed = csh_host.run(f"cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; : {word} $1", argument).out
    assert b"head -c" in listed
    assert word.encode() not in listed
    assert argument.encode() not in listed


ENDINGS = {
    "/usr/sbin/nologin": "took the connection and then ran no script (This account is currently not available.)",
    "/bin/true": "took the connection and then ran no script: its login shell",
}


@needs_sshd
@pytest.mark.parametrize("shell", ENDINGS)
def test_a_login_shell_that_runs_nothing(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path, login_shell=shell) as server, pytest.raises(UnsupportedError) as caught:
        use(server, monkeypatch).run("true")
    assert ENDINGS[shell] in str(caught.value)


@needs_sshd
def test_login_files_that_end_the_shell(bash_server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = bash_server.home / ".bash_profile"
    kept = profile.read_text()
    profile.write_text("echo 'module: command not found' >&2\nexec true\n")
    try:
        with pytest.raises(UnsupportedError, match=r"ran no script \(module: command not found\): its login shell"):
            use(bash_server, monkeypatch).run("true")
    finally:
        profile.write_text(kept)


@needs_sshd
def test_no_bash_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only/sh").symlink_to("/bin/sh")
    with sshd(tmp_path / "sshd", variables={"PATH": str(tmp_path / "only")}) as server:
        host = use(server, monkeypatch)
        with pytest.raises(UnsupportedError, match="cluster has no bash, which cvlaunch needs there"):
            host.run("true")


# -- the connection ---------------------------------------------------------------------------------------------------


def connections(server: Sshd) -> int:
    return (server.folder / "sshd.log").read_text().count("Accepted ")


@needs_sshd
def test_one_connection_serves_many_calls(ssh_server: Sshd, fresh: Host) -> None:
    before = connections(ssh_server)
    assert not fresh.is_open()
    begun = time.monotonic()
    for _ in range(5):
        fresh.run("true")
    assert time.monotonic() - begun < 300, "the connection that stays open holds our streams"
    assert fresh.is_open()
    assert connections(ssh_server) == before + 1
    fresh.logout()
    assert not fresh.is_open()
    fresh.logout()


@needs_sshd
def test_many_at_once_from_the_start(fresh: Host) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = pool.map(lambda n: fresh.run("echo $1", str(n)).out, range(16))
    assert list(done) == [f"{n}\n".encode() for n in range(16)]


@needs_sshd
def test_more_at_once_than_the_server_lets_share_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path, options=["MaxSessions 2"]) as server:
        host = use(server, monkeypatch)
        host.run("true")
        with ThreadPoolExecutor(6) as pool:
            done = pool.map(lambda n: host.run("sleep 0.3; echo $1", str(n)).out, range(6))
        assert list(done) == [f"{n}\n".encode() for n in range(6)]


@needs_sshd
def test_a_dead_connection_is_got_over(fresh: Host) -> None:
    fresh.run("true")
    check = subprocess.run(
        ["ssh", "-O", "check", "-S", next(Path(os.environ["XDG_RUNTIME_DIR"]).glob("*/*")), "any"],
        capture_output=True,
        text=True,
        check=True,
    )
    os.kill(int(check.stderr.split("pid=")[1].split(")")[0]), signal.SIGKILL)
    wait_for(lambda: not fresh.is_open())
    assert fresh.run("echo again").out == b"again\n"


@needs_sshd
def test_a_connection_that_breaks_is_no_success(ssh_server: Sshd, fresh: Host, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    go_on.touch()
    script = 'echo out; echo > "$1.begun"; while [ -e "$1" ]; do sleep 0.05; done'
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(fresh.run, script, str(go_on))
        wait_for((tmp_path / "go on.begun").exists)
        ssh_server.cut()
        with pytest.raises(UnreachableError, match="cluster: the connection broke while a script ran"):
            call.result(60)
    go_on.unlink()
    assert fresh.run("echo again").out == b"again\n"


@needs_sshd
def test_a_script_that_is_killed_with_its_shell_is_no_success(fresh: Host) -> None:
    with pytest.raises(UnreachableError, match="broke while a script ran"):
        fresh.run("kill -KILL $$")


@needs_sshd
def test_a_place_for_sockets_that_others_can_open_is_refused(fresh: Host, runtime: Path) -> None:
    (runtime / "cvlaunch").mkdir(mode=0o755)
    with pytest.raises(SpecError, match="is not a private folder of yours"):
        fresh.run("true")


@needs_sshd
@pytest.mark.parametrize("folder", ["a" * 80, "with space", "not there", ""])
def test_a_place_that_sockets_cannot_have_is_left_aside(
    fresh: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    if folder and folder != "not there":
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / folder) if folder else "")
    assert fresh.run("echo x").out == b"x\n"
    fresh.logout()
    assert Path(f"/tmp/cvlaunch-{os.geteuid()}").stat().st_mode & 0o777 == 0o700


@needs_sshd
def test_login_asks_and_the_rest_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    askpass = tmp_path / "askpass"
    askpass.write_text(f"#!/bin/sh\necho asked >> {tmp_path / 'asked'}\necho open sesame\n")
    askpass.chmod(0o755)
    options = ["PasswordAuthentication yes", "AuthenticationMethods publickey,password"]
    with sshd(tmp_path / "sshd", login_shell="/bin/bash", password="open sesame", options=options) as server:
        host = Host(use(server, monkeypatch).ssh, target="hpc")
        monkeypatch.setenv("SSH_ASKPASS", str(askpass))
        monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
        with pytest.raises(AuthError, match=r"run `cvlaunch login hpc` if it wants a password.*Permission denied"):
            host.run("true")
        assert not (tmp_path / "asked").exists()
        host.login()
        assert host.is_open()
        assert host.run("echo in").out == b"in\n"
        host.login()
        assert (tmp_path / "asked").read_text() == "asked\n"
        host.logout()
        askpass.write_text("#!/bin/sh\nexit 1\n")
        with pytest.raises(AuthError, match="the login failed; ssh has said why"):
            host.login()


# -- refusals ---------------------------------------------------------------------------------------------------------


@needs_sshd
def test_another_key_is_refused(
    ssh_server: Sshd, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    text = ssh_server.config.read_text().replace(str(ssh_server.folder / "client_key"), str(tmp_path / "other"))
    configure(tmp_path, monkeypatch, text)
    with pytest.raises(AuthError, match=r"cluster: it did not let you in.*`cvlaunch login TARGET`.*Permission denied"):
        Host(ALIAS).run("true")


@needs_sshd
@pytest.mark.parametrize(
    ("known", "words"),
    [("", "its host key is not known yet: run `cvlaunch login hpc`"), ("other", "is not the one that")],
)
def test_host_keys_are_checked(
    ssh_server: Sshd, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str, words: str
) -> None:
    if known:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
        known = f"[127.0.0.1]:{ssh_server.port} {(tmp_path / 'other.pub').read_text()}"
    (tmp_path / "known_hosts").write_text(known)
    text = ssh_server.config.read_text().replace(str(ssh_server.folder / "known_hosts"), str(tmp_path / "known_hosts"))
    configure(tmp_path, monkeypatch, text)
    with pytest.raises(AuthError, match=words):
        Host(ALIAS, target="hpc").run("true")
    assert (tmp_path / "known_hosts").read_text() == known


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@needs_sshd
def test_hosts_that_cannot_be_reached(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_port: int
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
        configure(
            tmp_path,
            monkeypatch,
            f"Host closed\n HostName 127.0.0.1\n Port {closed}\nHost silent\n HostName 127.0.0.1\n Port {silent_port}\n"
            "Host behind\n HostName 127.0.0.1\n ProxyJump closed\n",
        )
        with pytest.raises(UnreachableError, match=r"closed: nothing answers at its port.*Connection refused"):
            Host("closed").run("true")
        with pytest.raises(
            UnreachableError, match="behind: the way through its jump host failed: try `ssh behind true`"
        ):
            Host("behind").run("true")
        with pytest.raises(AuthError, match="the login failed"):
            Host("closed").login()
    with pytest.raises(UnreachableError, match=r"no-such-host\.invalid: no host of this name"):
        Host("no-such-host.invalid").run("true")
    with pytest.raises(UnreachableError, match=r"silent: no answer within 0\.5 s"):
        Host("silent").run("true", timeout_s=0.5)


TEXTS = {
    "ssh: connect to host x port 22: Connection timed out": (UnreachableError, "it does not answer"),
    "Connection timed out during banner exchange": (UnreachableError, "it does not answer"),
    "ssh: connect to host x port 22: No route to host": (UnreachableError, "there is no way to it"),
    "kex_exchange_identification: Connection closed by remote host": (UnreachableError, "ssh could not connect"),
    "Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures": (AuthError, "IdentitiesOnly"),
    "me@x: Permission denied (publickey,keyboard-interactive).": (AuthError, "it did not let you in"),
    "/home/me/.ssh/config: line 3: Bad configuration option: foo": (SpecError, "ssh can't use its configuration"),
    "Bad owner or permissions on /home/me/.ssh/config": (SpecError, "ssh can't use its configuration"),
    "mux_client_request_session: session request failed: Session open refused by peer\nPermission denied (x).": (
        UnreachableError,
        "no more sessions",
    ),
    "": (UnreachableError, "ssh could not connect: try again later"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_ssh_says_in_our_words(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, words = TEXTS[text]
    (tmp_path / "said").write_text(f"** banner **\n{text}\n" if text else "")
    (tmp_path / "ssh").write_text(f"#!/bin/sh\ncat {tmp_path / 'said'} >&2\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CvlaunchError) as caught:
        Host("login1").run("true")
    assert type(caught.value) is kind
    assert str(caught.value).startswith("login1: ")
    assert words in str(caught.value)
    assert text.rpartition("\n")[2] in str(caught.value)


def test_ssh_is_missing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (lambda: Host("x").run("true"), Host("x").login, lambda: Host("x").attach("true", tty=False)):
        with pytest.raises(UnsupportedError, match="ssh is not on this machine's PATH: install it"):
            call()
    with pytest.raises(UnsupportedError, match="bash is not on this machine's PATH"):
        Host().run("true")
