"""The REST client against a server that says what it is told to: errors, patience, log-ins, pages, streams."""

from __future__ import annotations

import base64
import contextlib
import datetime
import gc
import http.server
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

from launcher.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from launcher.kube.client import Access, Cluster, CutError, Json
from tests.services.kube import KubeCluster

TOKEN = "sekret-token"


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Answer:
    """body: JSON, or bytes as they stand. blocks: sent one by one; None breaks the connection off."""

    status: int = 200
    body: Json | bytes = field(default_factory=dict)
    headers: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    blocks: Sequence[bytes | None] | None = None
    hang: threading.Event | None = None


LOST = Answer(blocks=[None], status=0)


class Server:
    """Answers with what `answers` holds, in turn; then with the last one again."""

    def __init__(self) -> None:
        self.answers: list[Answer | Callable[[Asked], Answer]] = [Answer()]
        self.asked: list[Asked] = []
        self.clock: Callable[[], float] = time.time
        self.targets: list[str] = []
        """What stood in the request line."""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                server._answer(self)

            do_GET = do_POST = do_PATCH = do_DELETE = handle_one  # noqa: N815

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(server.clock() if timestamp is None else timestamp)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=lambda: self.http.serve_forever(poll_interval=0.02))

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.targets.append(handler.path)
        url = urlsplit(handler.path)
        data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in handler.headers.items()}
        asked = Asked(
            handler.command, url.path, dict(parse_qsl(url.query)), headers, json.loads(data) if data else None
        )
        self.asked.append(asked)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self._send(handler, found(asked) if callable(found) else found)

    def _send(self, handler: http.server.BaseHTTPRequestHandler, answer: Answer) -> None:
        if not answer.status:
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for key, value in answer.headers.items():
            for one in [value] if isinstance(value, str) else value:
                handler.send_header(key, one)
        if answer.blocks is None:
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
            return
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for block in answer.blocks:
            if block is None:
                handler.close_connection = True
                return
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
            handler.wfile.flush()
        if answer.hang:
            answer.hang.wait(60)
        handler.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.thread.join()
        server.http.server_close()


@dataclass
class Sleeps:
    seconds: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def config(url: str, *, user: Json | None = None, namespace: str | None = "vision", **cluster: Any) -> Json:
    context = {"cluster": "c", "user": "u", **({"namespace": namespace} if namespace else {})}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "kind",
        "contexts": [{"name": "kind", "context": context}],
        "clusters": [{"name": "c", "cluster": {"server": url, **cluster}}],
        "users": [{"name": "u", "user": {"token": TOKEN} if user is None else user}],
    }


@pytest.fixture
def reach(server: Server, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """A cluster with a kubeconfig of its own."""
    clusters = []

    def make(*, sleep: Callable[[float], None] | None = None, access: Mapping[str, str] = {}, **how: Any) -> Cluster:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(config(how.pop("url", server.url), **how)))
        clusters.append(Cluster(Access(kubeconfig=str(path), **access), "kube", sleep=sleep or Sleeps()))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


def status(code: int, message: str, reason: str = "", **details: Any) -> Answer:
    body = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}
    return Answer(code, {**body, "details": details})


CAUSES = [
    {"reason": "FieldValueInvalid", "message": 'Invalid value: "x": must be less', "field": "spec.template.spec"},
    {"reason": "FieldValueRequired", "message": "Required value", "field": "spec.completions"},
]
RBAC = (
    'jobs.batch is forbidden: User "ann" cannot create resource "jobs" in API group "batch" in the namespace "vision"'
)
QUOTA = 'jobs.batch "r" is forbidden: exceeded quota: gpus, requested: nvidia.com/gpu=8, used: 2, limited: 4'
WEBHOOK = 'admission webhook "policy.example.com" denied the request: label team is missing'
POD_SECURITY = 'pods "r" is forbidden: violates PodSecurity "restricted:latest": privileged'
SCC = 'pods "r" is forbidden: unable to validate against any security context constraint: []'

CREATE_ERRORS: list[tuple[Answer, type[CvlaunchError], str | None, list[str]]] = [
    (status(401, "Unauthorized"), AuthError, None, ["log in again"]),
    (status(403, RBAC, "Forbidden"), AuthError, None, ['cannot create resource "jobs"', "Role"]),
    (status(403, QUOTA, "Forbidden"), CapacityError, None, ["exceeded quota: gpus", "limited: 4"]),
    (status(403, WEBHOOK), SpecError, None, ["label team is missing", "overlay"]),
    (status(400, WEBHOOK), SpecError, None, ["label team is missing"]),
    (status(500, WEBHOOK), SpecError, None, ["label team is missing"]),
    (status(403, POD_SECURITY, "Forbidden"), SpecError, None, ["privileged"]),
    (status(403, SCC, "Forbidden"), SpecError, None, ["security context constraint"]),
    (status(403, 'jobs "r" is forbidden: unable to create new content in namespace vision because it is being '
            "terminated"), SpecError, "namespace", ["terminated"]),
    (status(403, 'User "system:anonymous" cannot create resource "jobs"'), AuthError, None, ["log in again"]),
    (Answer(403, b"<html>no</html>"), AuthError, None, ["HTTP 403", "permission"]),
    (status(404, 'namespaces "vision" not found', "NotFound"), SpecError, "namespace", ["create namespace"]),
    (Answer(404, b"404 page not found\n"), UnsupportedError, None, ["page not found", "operator"]),
    (status(409, 'jobs.batch "r" already exists', "AlreadyExists"), ConflictError, None, ["already exists"]),
    (status(422, 'Job.batch "r" is invalid: …', "Invalid", causes=CAUSES), SpecError, None,
     ['spec.template.spec: Invalid value: "x": must be less; spec.completions: Required value']),
    (status(400, 'strict decoding error: unknown field "spec.gpu"'), SpecError, None, ['unknown field "spec.gpu"']),
    (status(503, "etcdserver: leader changed"), UnreachableError, None, ["leader changed", "try again"]),
    (Answer(302, b"", {"Location": "https://login.example.com/"}), SpecError, "kubeconfig",
     ["redirects to https://login.example.com/"]),
    (Answer(200, b"<html>portal</html>"), SpecError, None, ["not the API of a cluster"]),
    (LOST, UnreachableError, None, ["does not answer"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "kind", "key", "words"),
    CREATE_ERRORS,
    ids=[f"{row[0].status} {row[3][0][:30]}" for row in CREATE_ERRORS],
)
def test_what_a_cluster_says_no_with(
    server: Server,
    reach: Callable[..., Cluster],
    answer: Answer,
    kind: type[CvlaunchError],
    key: str | None,
    words: list[str],
) -> None:
    server.answers = [answer]
    cluster = reach()
    with pytest.raises(CvlaunchError) as caught:
        cluster.create(cluster.path("jobs"), {"metadata": {"name": "r"}})
    assert type(caught.value).__mro__[0] in (kind, *kind.__subclasses__())
    assert getattr(caught.value, "key", None) == key
    text = str(caught.value)
    assert "context kind (http://127.0.0.1" in text
    assert all(word in text for word in words), text
    assert TOKEN not in text
    assert len(server.asked) == (2 if answer.status == 401 else 1)


def test_what_is_not_there_is_no_error(server: Server, reach: Callable[..., Cluster]) -> None:
    server.answers = [status(404, 'jobs.batch "r" not found', "NotFound")]
    cluster = reach()
    path = cluster.path("jobs", "r")
    assert cluster.get(path) is None
    assert cluster.patch(path, {}, form="merge") is None
    assert cluster.delete(path) is False
    assert list(cluster.lines(cluster.path("pods", "r", "log"))) == []
    assert cluster.calls == 4


def test_a_change_in_between_is_a_conflict(server: Server, reach: Callable[..., Cluster]) -> None:
    cluster = reach()
    for answer in (
        status(409, "the object has been modified; please apply your changes to the latest version", "Conflict"),
        status(422, "the server rejected our request due to an error in our request", "Invalid"),
    ):
        server.answers = [answer]
        with pytest.raises(ConflictError, match="changed since it was read"):
            cluster.patch(cluster.path("notebooks", "n"), [{"op": "test", "path": "/x", "value": 1}], form="json")
    assert server.asked[0].headers["content-type"] == "application/json-patch+json"


@pytest.mark.parametrize(
    ("resource", "parts", "path"),
    [
        ("jobs", ("r",), "/apis/batch/v1/namespaces/vision/jobs/r"),
        ("pods", ("r", "log"), "/api/v1/namespaces/vision/pods/r/log"),
        ("nodes", (), "/api/v1/nodes"),
        ("namespaces", ("a b/c",), "/api/v1/namespaces/a%20b%2Fc"),
    ],
)
def test_paths(reach: Callable[..., Cluster], resource: str, parts: tuple[str, ...], path: str) -> None:
    assert reach().path(resource, *parts) == path


def test_a_path_of_another_namespace_and_of_all(reach: Callable[..., Cluster]) -> None:
    cluster = reach(access={"namespace": "own"})
    assert cluster.path("pods") == "/api/v1/namespaces/own/pods"
    assert cluster.path("pods", namespace="other") == "/api/v1/namespaces/other/pods"
    assert cluster.path("pods", namespace="") == "/api/v1/pods"


# -- patience ---------------------------------------------------------------------------------------------------------


BUSY = Answer(429, b"", {"Retry-After": "3"})
BROKEN = status(503, "overloaded")
DONE = Answer(200, {"kind": "Job"})


@pytest.mark.parametrize(
    ("call", "answers", "sent", "waits"),
    [
        ("get", [BUSY, BROKEN, LOST, DONE], 4, [3.0, None, None]),
        ("delete", [BROKEN, LOST, DONE], 3, [None, None]),
        ("create", [BUSY, BUSY, DONE], 3, [3.0, 3.0]),
        ("patch", [BUSY, DONE], 2, [3.0]),
    ],
)
def test_what_is_sent_again(
    server: Server,
    reach: Callable[..., Cluster],
    call: str,
    answers: list[Answer],
    sent: int,
    waits: list[float | None],
) -> None:
    sleeps = Sleeps()
    server.answers = list(answers)
    cluster = reach(sleep=sleeps)
    path = cluster.path("jobs", "r")
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: cluster.get(path),
        "delete": lambda: cluster.delete(path),
        "create": lambda: cluster.create(path, {}),
        "patch": lambda: cluster.patch(path, {}, form="merge"),
    }
    assert calls[call]()
    assert len(server.asked) == sent
    assert [wait if wait == 3.0 else None for wait in sleeps.seconds] == waits


@pytest.mark.parametrize("answer", [BUSY, BROKEN, LOST], ids=["429", "503", "lost"])
def test_patience_ends(server: Server, reach: Callable[..., Cluster], answer: Answer) -> None:
    server.answers = [answer]
    cluster = reach()
    with pytest.raises(UnreachableError):
        cluster.get(cluster.path("jobs", "r"))
    assert 4 <= len(server.asked) <= 8


@pytest.mark.parametrize("answer", [BROKEN, LOST], ids=["503", "lost"])
def test_a_create_in_doubt_is_not_sent_again(server: Server, reach: Callable[..., Cluster], answer: Answer) -> None:
    server.answers = [answer, DONE]
    cluster = reach()
    with pytest.raises(UnreachableError):
        cluster.create(cluster.path("jobs"), {})
    assert len(server.asked) == 1


def test_nobody_there(reach: Callable[..., Cluster]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        sleeps = Sleeps()
        cluster = reach(url=f"http://127.0.0.1:{free.getsockname()[1]}", sleep=sleeps)
        with pytest.raises(UnreachableError, match=r"does not answer.*refused"):
            cluster.create(cluster.path("jobs"), {})
    assert len(sleeps.seconds) > 2  # nothing was sent, so that even this may be tried again


# -- lists, objects, streams ------------------------------------------------------------------------------------------


def page(names: Sequence[str], token: str = "") -> Answer:
    return Answer(200, {"items": [{"metadata": {"name": n, "uid": n}} for n in names], "metadata": {"continue": token}})


def test_a_list_has_pages(server: Server, reach: Callable[..., Cluster]) -> None:
    server.answers = [page("ab", "t1"), page("cd", "t2"), page("e")]
    cluster = reach()
    found = cluster.list(cluster.path("jobs"), labels="a=b", fields="metadata.name=x")
    assert [item["metadata"]["name"] for item in found] == list("abcde")
    query = {"limit": "500", "labelSelector": "a=b", "fieldSelector": "metadata.name=x"}
    assert [asked.query for asked in server.asked] == [query, {**query, "continue": "t1"}, {**query, "continue": "t2"}]


def test_a_list_that_went_out_of_date_begins_again_and_gives_nothing_twice(
    server: Server, reach: Callable[..., Cluster]
) -> None:
    server.answers = [page("ab", "t1"), status(410, "The provided continue parameter is too old", "Expired"),
                      page("abx", "t2"), page("c")]  # fmt: skip
    cluster = reach()
    assert [item["metadata"]["name"] for item in cluster.list(cluster.path("jobs"))] == list("abxc")
    assert "continue" not in server.asked[2].query


def test_a_list_that_is_always_out_of_date(server: Server, reach: Callable[..., Cluster]) -> None:
    server.answers = [status(410, "too old", "Expired")]
    cluster = reach()
    with pytest.raises(UnreachableError, match="changes faster"):
        list(cluster.list(cluster.path("jobs")))


def test_remarks_of_the_server(server: Server, reach: Callable[..., Cluster]) -> None:
    texts = ['299 - "would violate \\"restricted\\""', '299 - "one", 299 - "two"']
    server.answers = [Answer(201, {}, {"Warning": texts}), Answer(201, {})]
    cluster = reach()
    cluster.create(cluster.path("jobs"), {}, dryRun="All")
    assert cluster.warnings == ['would violate "restricted"', "one", "two"]
    assert server.asked[0].query == {"dryRun": "All"}
    cluster.create(cluster.path("jobs"), {})
    assert cluster.warnings == []


def test_delete_says_how(server: Server, reach: Callable[..., Cluster]) -> None:
    cluster = reach()
    assert cluster.delete(cluster.path("pods", "p"), propagation="Foreground", grace_s=0) is True
    assert server.asked[0].body["propagationPolicy"] == "Foreground"
    assert server.asked[0].body["gracePeriodSeconds"] == 0


def test_what_we_may(server: Server, reach: Callable[..., Cluster]) -> None:
    server.answers = [
        lambda asked: Answer(201, {"status": {"allowed": asked.body["spec"]["resourceAttributes"]["verb"] == "get"}})
    ]
    cluster = reach()
    assert cluster.allowed("get", "jobs", sub="status")
    assert not cluster.allowed("use", "securitycontextconstraints", name="anyuid")
    jobs, sccs = (asked.body["spec"]["resourceAttributes"] for asked in server.asked)
    assert (jobs["group"], jobs["resource"], jobs["subresource"], jobs["namespace"]) == (
        "batch",
        "jobs",
        "status",
        "vision",
    )
    assert (sccs["group"], sccs["name"], "namespace" in sccs) == ("security.openshift.io", "anyuid", False)


def test_an_api_that_is_there_and_one_that_is_not(server: Server, reach: Callable[..., Cluster]) -> None:
    server.answers = [Answer(200, {"kind": "APIResourceList"}), Answer(404, b"404 page not found\n")]
    cluster = reach()
    assert [cluster.has_api(name) for name in ("v1", "kueue.x-k8s.io/v1beta1")] == [True, False]
    assert [asked.path for asked in server.asked] == ["/api/v1", "/apis/kueue.x-k8s.io/v1beta1"]


@pytest.mark.parametrize(
    ("there", "version"),
    [(Answer(200, {"kind": "APIResourceList"}), "v1beta2"), (status(404, "page not found"), "v1beta1")],
)
def test_kueue_is_asked_in_the_version_that_it_has(
    server: Server, reach: Callable[..., Cluster], there: Answer, version: str
) -> None:
    server.answers = [there, Answer(200, {"items": []})]
    cluster = reach()
    for resource in ("workloads", "localqueues"):
        assert list(cluster.list(cluster.path(resource))) == []
        assert server.asked[-1].path == f"/apis/kueue.x-k8s.io/{version}/namespaces/vision/{resource}"
    assert [asked.path for asked in server.asked].count("/apis/kueue.x-k8s.io/v1beta2") == 1, "once is enough"


@pytest.mark.parametrize(("ahead_s", "seen_s"), [(-3600, -3600), (7200, 7200), (2, 0)])
def test_the_time_is_the_cluster_s(server: Server, reach: Callable[..., Cluster], ahead_s: int, seen_s: int) -> None:
    server.clock = lambda: time.time() + ahead_s
    cluster = reach()
    cluster.get("/version")
    assert cluster.now - time.time() == pytest.approx(seen_s, abs=30 if seen_s else 1)


def test_a_stream_by_lines(server: Server, reach: Callable[..., Cluster]) -> None:
    server.answers = [Answer(blocks=[b"on", b"e\ntwo\n\nth", b"ree"])]
    cluster = reach()
    assert list(cluster.lines(cluster.path("pods", "p", "log"), follow="true")) == [b"one", b"two", b"", b"three"]


def test_a_stream_that_is_cut_ends_in_an_error_after_its_whole_lines(
    server: Server, reach: Callable[..., Cluster]
) -> None:
    server.answers = [Answer(blocks=[b"one\ntw", None])]
    cluster = reach()
    lines = cluster.lines(cluster.path("pods", "p", "log"))
    assert next(lines) == b"one"
    with pytest.raises(CutError):
        next(lines)


def test_a_stream_that_falls_silent(server: Server, reach: Callable[..., Cluster]) -> None:
    over = threading.Event()
    server.answers = [Answer(blocks=[b"one\n"], hang=over)]
    cluster = reach()
    lines = cluster.lines(cluster.path("pods", "p", "log"), silence_s=2)
    assert next(lines) == b"one"
    with pytest.raises(CutError):
        next(lines)
    over.set()


# -- configurations ---------------------------------------------------------------------------------------------------


def test_where_we_are(reach: Callable[..., Cluster], server: Server) -> None:
    assert reach().where == f"context kind ({server.url}), namespace vision"
    assert reach(namespace=None).namespace == "default"
    assert reach(access={"namespace": "other"}).where.endswith("namespace other")


GOOD = yaml.safe_dump(config("http://127.0.0.1:1"))
BAD_FILES: list[tuple[str | None, dict[str, str], str]] = [
    (None, {}, r"kubeconfig: target kube: there is no file .*/kubeconfig"),
    ("contexts: [}", {}, r"kubeconfig:1: target kube: this is not YAML"),
    ("", {}, r"kubeconfig: target kube: this kubeconfig can't be used"),
    ("just words", {}, r"kubeconfig: target kube: this kubeconfig can't be used"),
    ("contexts: [{}]", {}, r"kubeconfig: target kube: this kubeconfig can't be used"),
    ("kind: Config", {}, r"context: target kube: no context is the current one.*log in to a cluster"),
    (GOOD, {"context": "kid"}, r"context: target kube: no context 'kid'.*did you mean 'kind'.*there are kind"),
    (GOOD.replace("server: http://127.0.0.1:1", "x: y"), {}, r"cluster without `server`"),
    (GOOD.replace("name: c\n", "name: d\n"), {}, r"can't be used: .*name c"),
    (GOOD.replace("server: http:", "certificate-authority: /nope.pem\n    server: https:"), {}, r"/nope.pem"),
    (GOOD.replace("token: sekret-token", "as-groups: [a]"), {}, r"user has as-groups without `as`: add it"),
    (GOOD.replace("token: sekret-token", "as: a\n    as-user-extra: [b]"), {}, r"kubeconfig can't be used: "),
    (GOOD.replace("server:", "proxy-url: socks5://ann:pw@127.0.0.1:1\n    server:"), {}, r"socks5://127.0.0.1 can't.*http://"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "access", "words"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_kubeconfig_that_can_t_be_used(tmp_path: Path, text: str | None, access: dict[str, str], words: str) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=words):
        assert Cluster(Access(kubeconfig=str(path), **access), "kube").where


@pytest.mark.parametrize(
    ("access", "words"), [({}, "no kubeconfig: .*nowhere or .*neither-here"), ({"context": "x"}, "no context 'x'")]
)
def test_no_kubeconfig_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: dict[str, str], words: str
) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/nowhere:{tmp_path}/neither-here")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SpecError, match=words):
        assert Cluster(Access(**access)).where


def test_several_files_are_taken_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """The first file that says something counts, as for kubectl; what one names may stand in another."""
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    whole = config(server.url)
    first.write_text(yaml.safe_dump({"current-context": "kind", "users": whole["users"]}))
    second.write_text(yaml.safe_dump({"contexts": whole["contexts"], "clusters": whole["clusters"]}))
    other = config("http://127.0.0.1:1", namespace="wrong")
    third.write_text(yaml.safe_dump({**other, "current-context": "other"}))
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, (tmp_path / "missing", first, second, third))))
    cluster = Cluster(Access())
    assert cluster.where == f"context kind ({server.url}), namespace vision"
    cluster.get(cluster.path("jobs", "r"))
    assert server.asked[0].headers["authorization"] == f"Bearer {TOKEN}"
    cluster.close()


IN_PLACE_OF = {
    "as": "ada",
    "as-uid": "1000",
    "as-groups": ["vision", "Forschung & Lehre", "équipe"],
    "as-user-extra": {"example.com/project": ["one", "two"], "Scopes": ["all"]},
}


@pytest.mark.parametrize("plugged", [False, True])
def test_who_asks_in_somebody_s_place(kube: KubeCluster, tmp_path: Path, plugged: bool) -> None:
    """With a token, and with one of a plugin, which a kubeconfig may have beside `as`; websockets, too."""
    text = yaml.safe_load(kube.kubeconfig.read_text())
    chosen = "exec" if plugged else "token"
    next(one for one in text["users"] if one["name"] == chosen)["user"].update(IN_PLACE_OF)
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(text))
    namespace = kube.namespace()
    access = Access(kubeconfig=str(path), context="exec" if plugged else "test", namespace=namespace)
    with contextlib.closing(Cluster(access)) as cluster:
        assert f"({kube.url}) as ada, namespace {namespace}" in cluster.where
        kube.requests.clear()
        list(cluster.list(cluster.path("pods")))
        with pytest.raises(SpecError, match="not found"):
            cluster.socket(cluster.path("pods", "none", "exec"), query=[], protocol="v4.channel.k8s.io")
        for request in kube.requests:
            assert sorted(request.impersonated) == [
                ("impersonate-extra-example.com%2fproject", "one"),
                ("impersonate-extra-example.com%2fproject", "two"),
                ("impersonate-extra-scopes", "all"),
                ("impersonate-group", "Forschung & Lehre"),
                ("impersonate-group", "vision"),
                ("impersonate-group", "équipe"),
                ("impersonate-uid", "1000"),
                ("impersonate-user", "ada"),
            ]
        assert len(kube.requests) == 2
        kube.forbid("list", "pods")
        with pytest.raises(AuthError, match='User "ada" cannot list resource "pods"'):
            list(cluster.list(cluster.path("pods")))
        for resource in ("users", "groups", "uids", "userextras/scopes"):
            kube.allow()
            kube.forbid("impersonate", resource)
            with pytest.raises(AuthError, match=f'User "dev" cannot impersonate resource "{resource}"'):
                list(cluster.list(cluster.path("pods")))


PLUGIN = f"""#!{sys.executable}
import json, os, pathlib, sys
count = pathlib.Path(__file__).with_name("count")
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
assert json.loads(os.environ["KUBERNETES_EXEC_INFO"])["kind"] == "ExecCredential"
status = {{"token": os.environ["PREFIX"] + str(number)}}
status.update(json.loads(sys.argv[1]))
print(json.dumps({{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}}))
"""


def plugin_user(command: str, *args: str, **more: str) -> Json:
    env = [{"name": "PREFIX", "value": "token-"}]
    api = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": api, "command": command, "args": list(args), "env": env, **more}}


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """Relative to the kubeconfig, as its authors may write it."""
    path = tmp_path / "plugin"
    path.write_text(PLUGIN)
    path.chmod(0o755)
    return "./plugin"


def only_takes(token: str) -> Callable[[Asked], Answer]:
    return lambda asked: (
        DONE if asked.headers.get("authorization") == f"Bearer {token}" else status(401, "Unauthorized")
    )


def test_a_token_that_is_refused_is_asked_for_again(
    server: Server, reach: Callable[..., Cluster], plugin: str, tmp_path: Path
) -> None:
    server.answers = [only_takes("token-2")]
    cluster = reach(user=plugin_user(plugin, "{}"))
    assert cluster.get(cluster.path("jobs", "r")) == DONE.body
    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer token-1", "Bearer token-2"]
    cluster.get(cluster.path("jobs", "r"))
    assert (tmp_path / "count").read_text() == "2"
    assert "token-" not in (tmp_path / "kubeconfig").read_text().replace("value: token-", "")


def test_a_token_that_stays_refused(server: Server, reach: Callable[..., Cluster], plugin: str) -> None:
    server.answers = [only_takes("another")]
    cluster = reach(user=plugin_user(plugin, "{}"))
    with pytest.raises(AuthError, match=r"context kind .*log in again with what `\./plugin`"):
        cluster.create(cluster.path("jobs"), {})
    assert len(server.asked) == 2


def test_a_token_is_renewed_before_it_expires(
    server: Server, reach: Callable[..., Cluster], plugin: str, tmp_path: Path
) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5)
    later = soon + datetime.timedelta(hours=1)
    for end, runs in ((soon, "2"), (later, "3")):
        stamp = end.strftime("%Y-%m-%dT%H:%M:%SZ")
        cluster = reach(user=plugin_user(plugin, json.dumps({"expirationTimestamp": stamp})))
        cluster.get("/api/v1")
        cluster.get("/api/v1")
        assert int((tmp_path / "count").read_text()) >= int(runs)
    assert server.asked[-1].headers["authorization"] == server.asked[-2].headers["authorization"]
    assert server.asked[0].headers["authorization"] != server.asked[1].headers["authorization"]


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (plugin_user("cvlaunch-no-such-plugin", installHint="get it from x"), "can't be run .*: get it from x"),
        (plugin_user("sh", "-c", "echo first >&2; echo session expired >&2; exit 3"), ": session expired: log in"),
        (plugin_user("sh", "-c", "exit 3"), "exit code 3"),
        (plugin_user("echo", "hello"), "no credential"),
        (plugin_user("echo", '{"status": {}}'), "no credential"),
    ],
)  # fmt: skip
def test_a_plugin_that_fails(reach: Callable[..., Cluster], user: Json, words: str) -> None:
    with pytest.raises(AuthError, match=words) as caught:
        assert reach(user=user).where
    assert "first" not in str(caught.value)


@pytest.mark.parametrize(
    ("no_proxy", "through"), [("", True), ("127.0.0.1", False), ("127.0.0.0/8", False), ("10.0.0.0/8", True)]
)
def test_proxies_of_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_proxy: str, through: bool
) -> None:
    """The double is cluster and proxy: a proxy is asked with the whole URL."""
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", no_proxy)
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config(server.url)))
    cluster = Cluster(Access(kubeconfig=str(path)))
    cluster.get("/api/v1")
    cluster.close()
    assert server.targets == [f"{server.url}/api/v1" if through else "/api/v1"]


def test_the_proxy_of_a_kubeconfig(server: Server, reach: Callable[..., Cluster]) -> None:
    cluster = reach(url="http://cluster.test", **{"proxy-url": server.url.replace("//", "//ann:p%40ss@")})
    cluster.get("/api/v1")
    assert server.targets == ["http://cluster.test/api/v1"]
    assert server.asked[0].headers["proxy-authorization"] == f"Basic {base64.b64encode(b'ann:p@ss').decode()}"


def test_a_cluster_that_nobody_closes(server: Server, reach: Callable[..., Cluster], tmp_path: Path) -> None:
    """Its connections go with it, without a warning."""
    reach()
    cluster = Cluster(Access(kubeconfig=str(tmp_path / "kubeconfig")))
    cluster.get("/api/v1")
    del cluster
    gc.collect()


# -- TLS --------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str) -> Path:
    """Self-signed, key and certificate in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / f"{name}.pem"
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("cluster_keys", "error"),
    [
        ({"certificate-authority": "kube.test.pem", "tls-server-name": "kube.test"}, None),
        ({"insecure-skip-tls-verify": True}, None),
        ({"certificate-authority": "kube.test.pem"}, "not trusted"),
        ({"certificate-authority": "other.test.pem", "tls-server-name": "kube.test"}, "not trusted"),
        ({}, "not trusted"),
    ],
)
def test_certificates(
    server: Server, reach: Callable[..., Cluster], tmp_path: Path, cluster_keys: Json, error: str | None
) -> None:
    certificate(tmp_path, "other.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path, "kube.test"))
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    server.http.handle_error = lambda *_: None  # type: ignore[method-assign]
    cluster = reach(url=server.url.replace("http://", "https://"), **cluster_keys)
    if error is None:
        assert cluster.get("/api/v1") == {}
        return
    with pytest.raises(SpecError, match=error):
        cluster.get("/api/v1")


def test_a_server_without_tls(server: Server, reach: Callable[..., Cluster]) -> None:
    server.http.handle_error = lambda *_: None  # type: ignore[method-assign]
    cluster = reach(url=server.url.replace("http://", "https://"))
    with pytest.raises(SpecError, match="does not speak TLS"):
        cluster.get("/api/v1")
