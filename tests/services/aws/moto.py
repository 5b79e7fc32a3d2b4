"""moto's services, one request at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from tests.services.aws.account import LOCK
from tests.services.aws.faults import CutError
from tests.services.aws.wire import Answer, Json

__all__ = ["Moto", "rest_of_body"]


class Moto:
    """Of WSGI. What it looks at and then changes stays as it was in between; all of a process have the same data."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: Json, start_response: Callable[..., Any]) -> Iterable[bytes]:
        answer = self.answer(environ)
        start_response(f"{answer.status} -", [*answer.headers.items()])
        return [answer.body]

    def answer(self, environ: Json) -> Answer:
        """The whole body is read first, so that nobody who sends slowly holds the lock."""
        body = rest_of_body(environ)
        environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(body), str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ.pop("wsgi.input_terminated", None)
        told: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
            told[:] = [status, headers]

        with LOCK:
            data = b"".join(self._app(environ, start))
        headers: Mapping[str, str] = dict(told[1])
        return Answer(int(told[0].split()[0]), data, headers)


def rest_of_body(environ: Json) -> bytes:
    """What of the body was not read yet. CutError if its sender is gone before it is whole: it has no effect then."""
    if environ.get("wsgi.input_terminated"):
        return bytes(environ["wsgi.input"].read())
    wanted = int(environ.get("CONTENT_LENGTH") or 0)
    body = bytes(environ["wsgi.input"].read(wanted))
    if len(body) < wanted:
        raise CutError("the body ends too early")
    return body
