"""One server for all services: SageMaker, Service Quotas and IAM Identity Center are ours, the rest is moto's."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import MotoRequestHandler
from werkzeug.serving import make_server

from tests.services.aws.account import Account
from tests.services.aws.faults import Call, CutError, Faults
from tests.services.aws.moto import Moto, rest_of_body
from tests.services.aws.wire import Answer, AwsError, Json, Request, read_request, refusal

__all__ = ["Server"]

Handler = Callable[[Request], Answer | None]

_ANYWHERE = ("CreateBucket", "ListBuckets", "GetBucketLocation")


class _Handler(MotoRequestHandler):
    def make_environ(self) -> Json:
        """With the one header of AWS that has an underscore, which werkzeug drops."""
        environ = super().make_environ()
        if token := self.headers.get("x-amz-sso_bearer_token"):
            environ["HTTP_X_AMZ_SSO_BEARER_TOKEN"] = token
        return environ

    def log_request(self, *_: object) -> None:
        """Nothing: `Cloud.calls` has them all."""


class Server:
    """handler: answers, or None for what is moto's. inside: path → what containers of the platform read there."""

    def __init__(self, account: Account, faults: Faults, handler: Handler) -> None:
        self.calls: list[Call] = []
        self.inside: dict[str, Callable[[], Json]] = {}
        self._account, self._faults, self._handler = account, faults, handler
        self._moto = Moto()
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # -- one request --------------------------------------------------------------------------------------------------

    def __call__(self, environ: Json, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Of WSGI."""
        if (read := self.inside.get(environ.get("PATH_INFO", ""))) is not None:
            answer = Answer(200, json.dumps(read()).encode(), {"Content-Type": "application/json"})
        else:
            answer = self._recorded_or_cut(environ)
        headers = {"content-length": str(len(answer.body)), "x-amzn-requestid": str(uuid.uuid4())}
        headers |= {name.lower(): value for name, value in answer.headers.items()}
        start_response(f"{answer.status} -", [*headers.items()])
        return [answer.body]

    def _recorded_or_cut(self, environ: Json) -> Answer:
        try:
            return self._recorded(environ)
        except CutError:
            with contextlib.suppress(OSError):
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise

    def _recorded(self, environ: Json) -> Answer:
        """Noted before whoever asked has the answer, so that it can be counted at once; and where calls were noted when
        it came, as what a killed container has left behind is no call of the next test."""
        calls, began = self.calls, time.time()
        request = read_request(environ)
        status = 0
        try:
            answer = self._answer(request, environ)
            self._faults.after(request)
            status = answer.status
        finally:
            calls.append(_call(request, status, began))
        return answer

    def _answer(self, request: Request, environ: Json) -> Answer:
        try:
            self._faults.before(request)
            return self._elsewhere(request) or self._handler(request) or self._of_moto(environ)
        except AwsError as error:
            with contextlib.suppress(OSError):
                rest_of_body(environ)  # who still sends must not find the door shut
            return refusal(request, error)

    def _elsewhere(self, request: Request) -> Answer | None:
        """What S3 says in one region of a bucket in another; moto has all buckets everywhere."""
        bucket = request.path.strip("/").partition("/")[0]
        if request.service != "s3" or not bucket or not request.region or request.operation in _ANYWHERE:
            return None
        where = self._account.bucket_region(bucket)
        if where in (None, request.region):
            return None
        text = "The bucket you are attempting to access must be addressed using the specified endpoint."
        answer = refusal(request, AwsError("PermanentRedirect", text, 301))
        return Answer(301, answer.body, {**answer.headers, "x-amz-bucket-region": str(where)})

    def _of_moto(self, environ: Json) -> Answer:
        try:
            return self._moto.answer(environ)
        except CutError:
            raise
        except Exception as error:
            raise AwsError("InternalFailure", f"moto failed: {error!r}", 500) from error


def _call(request: Request, status: int, began: float) -> Call:
    return Call(
        request.service, request.operation, status, began,
        access_key=request.access_key, region=request.region, path=request.path,
    )  # fmt: skip
