"""Requests and answers of AWS's protocols: which operation a request asks for, and how an error is said to it."""

from __future__ import annotations

import io
import json
import re
import secrets
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["Answer", "AwsError", "Json", "Request", "json_answer", "read_request", "refusal"]

Json = dict[str, Any]

_JSON = "application/x-amz-json-1.1"
_CREDENTIAL = re.compile(r"Credential=([^/,\s]+)/\d{8}/([^/]+)/([^/]+)/aws4_request")
_SERVICES = {"servicequotas": "service-quotas", "monitoring": "cloudwatch"}
"""Name in a signature → boto3's name."""


class AwsError(Exception):
    """What AWS says when it refuses."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


@dataclass(frozen=True)
class Request:
    """service: boto3's name. operation: as AWS writes it (CreateTrainingJob). body: of operations that are asked for in
    JSON or by a form; S3's stays on the wire."""

    service: str
    operation: str
    region: str
    access_key: str
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def json(self) -> Json:
        """AwsError if it is no JSON object."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise AwsError("SerializationException", "Unexpected content: the body is no JSON object")
        return value


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": _JSON})


def read_request(environ: Json) -> Request:
    """The body of operations that are asked for in JSON or by a form is read, and put back for the next reader."""
    target, auth = environ.get("HTTP_X_AMZ_TARGET", ""), environ.get("HTTP_AUTHORIZATION", "")
    path, method = environ.get("PATH_INFO", "/"), environ["REQUEST_METHOD"]
    query = dict(urllib.parse.parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
    found = _CREDENTIAL.search(auth) or _presigned(query)
    access_key, region, name = found.groups() if found else ("", "", "s3")
    service, body = _SERVICES.get(name, name), b""
    if target or "x-www-form-urlencoded" in environ.get("CONTENT_TYPE", ""):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
    if target:
        operation = target.rpartition(".")[2]
    elif body and (action := urllib.parse.parse_qs(body.decode(errors="replace")).get("Action")):
        operation, service = action[0], service if found else "sts"
    elif not found and (operation := _log_in(path)):
        service = "sso"
    else:
        operation = _s3_operation(method, path, query, environ) if service == "s3" else f"{method} {path}"
    headers = {key[5:].replace("_", "-").lower(): value for key, value in environ.items() if key.startswith("HTTP_")}
    return Request(service, operation, region, access_key, method, path, query, headers, body)


def _presigned(query: Mapping[str, str]) -> re.Match[str] | None:
    return _CREDENTIAL.search("Credential=" + query.get("X-Amz-Credential", ""))


def _log_in(path: str) -> str:
    """Of IAM Identity Center, whose requests are not signed."""
    return {"/federation/credentials": "GetRoleCredentials", "/token": "CreateToken"}.get(path, "")


_ON_KEY = {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}
_ON_BUCKET = {"GET": "ListObjects", "HEAD": "HeadBucket", "PUT": "CreateBucket", "DELETE": "DeleteBucket"}
_BY_QUERY = (
    ("GET", "list-type", "ListObjectsV2"),
    ("GET", "location", "GetBucketLocation"),
    ("POST", "delete", "DeleteObjects"),
    ("POST", "uploads", "CreateMultipartUpload"),
    ("PUT", "partNumber", "UploadPart"),
    ("POST", "uploadId", "CompleteMultipartUpload"),
    ("DELETE", "uploadId", "AbortMultipartUpload"),
)


def _s3_operation(method: str, path: str, query: Mapping[str, str], environ: Json) -> str:
    for wanted, name, operation in _BY_QUERY:
        if method == wanted and name in query:
            return operation
    bucket, _, key = path.strip("/").partition("/")
    if not bucket:
        return "ListBuckets"
    if key and method == "PUT" and "HTTP_X_AMZ_COPY_SOURCE" in environ:
        return "CopyObject"
    return (_ON_KEY if key else _ON_BUCKET).get(method, method)


def refusal(request: Request, error: AwsError) -> Answer:
    """In the protocol of the service that was asked."""
    if "x-amz-target" in request.headers:
        return json_answer({"__type": error.code, "message": error.message}, error.status)
    code, message = escape(error.code), escape(error.message)
    if request.service == "s3":
        text = f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>{_request_id()}</RequestId></Error>"
        return Answer(error.status, b"" if request.method == "HEAD" else text.encode(), _XML)
    if request.service == "sso":
        headers = {"Content-Type": "application/json", "x-amzn-errortype": error.code}
        return Answer(error.status, json.dumps({"message": error.message}).encode(), headers)
    text = (
        f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
        f"<RequestId>{_request_id()}</RequestId></ErrorResponse>"
    )
    return Answer(error.status, text.encode(), _XML)


_XML = {"Content-Type": "application/xml"}


def _request_id() -> str:
    return secrets.token_hex(8).upper()
