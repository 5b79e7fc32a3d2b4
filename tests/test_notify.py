"""The end of a run is told to a real command and a real web server."""

from __future__ import annotations

import http.server
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from launcher.backends.base import Notify
from launcher.notify import End, send_end

END = End(
    run_id="digits-1",
    name="Digits \u00fc",
    state="FAILED",
    reason="exit code 3",
    exit_code=3,
    backend="local",
    target="here",
    handle="local://here/digits-1",
    output="file:///runs/digits-1",
    started=1.5,
    ended=9.0,
    job_digest="ab" * 32,
    metrics={"val/accuracy": 0.5, "train/loss": float("nan")},
    tags={"team": "vision"},
)


class Hook(http.server.BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers["Content-Type"], body))
        self.send_response(500 if self.path == "/broken" else 204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Hook.seen.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_webhook_gets_the_end_as_json(server: str) -> None:
    assert send_end(Notify(webhook=f"{server}/T0/secret"), END) == []
    [(path, kind, body)] = Hook.seen
    told = json.loads(body)
    assert (path, kind) == ("/T0/secret", "application/json")
    assert (told["run_id"], told["name"], told["exit_code"]) == ("digits-1", "Digits ü", 3)
    assert told["metrics"] == {"val/accuracy": 0.5, "train/loss": None}


def test_a_command_gets_the_same_without_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "told $(touch x); .json"
    script = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    assert send_end(Notify(command=(sys.executable, "-c", script, str(path))), END) == []
    assert path.read_bytes() == END.to_json()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_fails_is_a_sentence_and_hides_the_address(server: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://u:password@127.0.0.1:{closed.getsockname()[1]}/secret"
        unreached = send_end(Notify(webhook=nobody), END)
    assert len(unreached) == 1
    assert unreached[0].startswith("notify.webhook at 127.0.0.1 was not reached: ")
    assert "secret" not in unreached[0]
    assert "password" not in unreached[0]
    assert send_end(Notify(webhook=f"{server}/broken"), END) == [
        "notify.webhook at 127.0.0.1 answered 500 Internal Server Error"
    ]
    assert send_end(Notify(command=("/no/such/thing",)), END) == [
        "notify.command /no/such/thing can't be started: No such file or directory"
    ]
    failing = (sys.executable, "-c", "import sys; sys.exit('no\\nmail')")
    assert send_end(Notify(command=failing), END) == [f"notify.command {sys.executable} exited with 1: mail"]


def test_both_are_tried_even_if_the_first_fails(server: str) -> None:
    problems = send_end(Notify(command=("/no/such/thing",), webhook=f"{server}/x"), END)
    assert len(problems) == 1
    assert [path for path, _, _ in Hook.seen] == ["/x"]


def test_nothing_is_told_where_nothing_is_asked_for() -> None:
    assert send_end(Notify(), END) == []
