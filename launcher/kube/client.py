"""The API of a cluster over plain HTTP.

Of the package `kubernetes` only the loading of configurations is used, so that any version from 30 on will do: its
generated classes differ from one to the next, the API does not.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode, urlsplit

from launcher._version import __version__
from launcher.errors import CvlaunchError, SpecError, UnreachableError
from launcher.kube.access import Access, Loaded, load_access
from launcher.kube.refusals import NotSentError, Refusal, refusal_error, transport_error

if TYPE_CHECKING:
    import urllib3
    import websocket

__all__ = ["Access", "Cluster", "CutError", "Json"]

Json = dict[str, Any]
"""An object of the API as it stands on the wire."""

_RESOURCES: Mapping[str, tuple[str, bool]] = {
    "clusterqueues": ("kueue.x-k8s.io/v1beta2", False),
    "configmaps": ("v1", True),
    "cronjobs": ("batch/v1", True),
    "daemonsets": ("apps/v1", True),
    "deployments": ("apps/v1", True),
    "events": ("v1", True),
    "jobs": ("batch/v1", True),
    "limitranges": ("v1", True),
    "localsubjectaccessreviews": ("authorization.k8s.io/v1", True),
    "localqueues": ("kueue.x-k8s.io/v1beta2", True),
    "namespaces": ("v1", False),
    "nodes": ("v1", False),
    "notebooks": ("kubeflow.org/v1", True),
    "persistentvolumeclaims": ("v1", True),
    "persistentvolumes": ("v1", False),
    "pods": ("v1", True),
    "priorityclasses": ("scheduling.k8s.io/v1", False),
    "replicasets": ("apps/v1", True),
    "resourcequotas": ("v1", True),
    "runtimeclasses": ("node.k8s.io/v1", False),
    "secrets": ("v1", True),
    "securitycontextconstraints": ("security.openshift.io/v1", False),
    "selfsubjectaccessreviews": ("authorization.k8s.io/v1", False),
    "serviceaccounts": ("v1", True),
    "services": ("v1", True),
    "statefulsets": ("apps/v1", True),
    "storageclasses": ("storage.k8s.io/v1", False),
    "workloadpriorityclasses": ("kueue.x-k8s.io/v1beta2", False),
    "workloads": ("kueue.x-k8s.io/v1beta2", True),
}
"""Resource → API group with version, and whether it lives in namespaces."""
_BEFORE = {"kueue.x-k8s.io/v1beta2": "kueue.x-k8s.io/v1beta1"}
"""What a cluster may still have in its place: Kueue before 0.15; from 0.20 on it serves v1beta2 alone."""

_PAGE = "500"
_FRESH_STARTS = 5
"""Of a list whose pages went out of date; a page is good for 5 minutes or so."""
_ATTEMPTS, _PATIENCE_S = 6, 20.0
"""Whichever ends first."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_LONGEST_RETRY_AFTER_S = 30.0
_CONNECT_S, _READ_S = 10.0, 60.0
_EARLY_S = 30.0
"""How long before its end a token is renewed."""
_SKEW_S = 5.0
"""Clocks that differ by less are the same: an answer says the time in whole seconds, and was under way."""
_FORMS = {"merge": "application/merge-patch+json", "json": "application/json-patch+json"}
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')


class Cluster:
    """A cluster with one namespace, reached as somebody. Thread-safe; nothing is read or sent before it is needed.

    calls: requests sent so far. warnings: what the server remarked on the last object that was created.
    """

    def __init__(self, access: Access, name: str = "", *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._access, self._name, self._sleep = access, name, sleep
        self._lock = threading.Lock()
        self._reached: tuple[Loaded, urllib3.PoolManager] | None = None
        self._calls = 0
        self._ahead_s = 0.0
        self._versions: dict[str, str] = {}
        self._warnings: list[str] = []

    @property
    def namespace(self) -> str:
        return self._access.namespace or self._reach()[0].namespace

    @property
    def where(self) -> str:
        return f"{self._reach()[0].what}, namespace {self.namespace}"

    @property
    def calls(self) -> int:
        return self._calls

    @property
    def now(self) -> float:
        """Unix seconds by the clock of the cluster, which writes the times of its objects: as its last answer said."""
        return time.time() + self._ahead_s

    @property
    def warnings(self) -> list[str]:
        return list(self._warnings)

    def close(self) -> None:
        """Lets connections go; the next request makes new ones."""
        with self._lock:
            if self._reached:
                self._reached[1].clear()
            self._reached = None

    def path(self, resource: str, name: str = "", sub: str = "", *, namespace: str | None = None) -> str:
        """namespace: None is ours, an empty string all of them. Asks which version there is, where that is open."""
        api, namespaced = _RESOURCES[resource]
        space = self.namespace if namespace is None and namespaced else namespace
        parts = [*(("namespaces", space) if namespaced and space else ()), resource, *filter(None, (name, sub))]
        return "/".join((_root(self._served(api)), *(quote(part, safe="") for part in parts)))

    def get(self, path: str, **query: str) -> Json | None:
        """None: there is none."""
        return self._ask(_Request("GET", path, query=query))

    def list(self, path: str, *, labels: str = "", fields: str = "", **query: str) -> Iterator[Json]:
        """Page by page, each object once.

        labels, fields: selectors. A list that went out of date in the middle is read from its beginning again.
        """
        asked = {"limit": _PAGE, "labelSelector": labels, "fieldSelector": fields, **query}
        seen = set[str]()
        for _ in range(_FRESH_STARTS):
            try:
                for item in self._pages(path, {key: value for key, value in asked.items() if value}):
                    uid = item["metadata"].get("uid") or item["metadata"]["name"]
                    if uid not in seen:
                        seen.add(uid)
                        yield item
                return
            except _OutdatedError:
                continue
        raise UnreachableError(f"{self.where}: the list changes faster than it can be read: try again")

    def create(self, path: str, body: Json, **query: str) -> Json:
        """UnreachableError leaves open whether the object is there now."""
        request = _Request("POST", path, query=query, body=body, patient=False)
        answer = self._send(request)
        if answer.status >= 300:
            raise self._refused(_refusal(answer, request))
        texts = [text for header in answer.headers.getlist("Warning") for text in _WARNING.findall(header)]
        self._warnings = [re.sub(r"\\(.)", r"\1", text) for text in texts]
        return self._json(answer)

    def patch(self, path: str, body: Json | Sequence[Json], *, form: Literal["merge", "json"]) -> Json | None:
        """None: there is no such object. ConflictError: it has changed since it was read."""
        return self._ask(_Request("PATCH", path, body=body, form=_FORMS[form], patient=False))

    def delete(self, path: str, *, propagation: str = "Background", grace_s: int | None = None) -> bool:
        """Whether it was there."""
        options: Json = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        return self._ask(_Request("DELETE", path, body=options)) is not None

    def lines(self, path: str, *, silence_s: float = _READ_S, **query: str) -> Iterator[bytes]:
        """A streamed answer by lines, without their ends; nothing where there is no such object.

        CutError when the stream breaks or is silent for so long; a piece of a line is then dropped.
        """
        request = _Request("GET", path, query=query, stream=True, read_s=silence_s)
        answer = self._send(request)
        with contextlib.closing(answer), self._transport():
            refusal = _refusal(answer, request) if answer.status >= 300 else None
            if refusal is None:
                yield from self._uncut_lines(answer)
            elif not refusal.missing:
                raise self._refused(refusal)

    def socket(self, path: str, *, query: Sequence[tuple[str, str]], protocol: str) -> websocket.WebSocket:
        """protocol: those that we speak, the best first, with commas; `getsubprotocol()` tells which it became."""
        answer = self._open_socket(path, query, protocol)
        if isinstance(answer, Refusal) and answer.status == 401:
            self._renew()
            answer = self._open_socket(path, query, protocol)
        if isinstance(answer, Refusal):
            raise self._refused(answer)
        return answer

    def allowed(
        self,
        verb: str,
        resource: str,
        *,
        name: str = "",
        sub: str = "",
        namespace: str | None = None,
        service_account: str | None = None,
    ) -> bool:
        """Whether we may. name: of one object; all of them otherwise. namespace: where; None is ours for what lives in
        namespaces. service_account: of our namespace, asked for in our place; AuthError for who may not ask."""
        api, namespaced = _RESOURCES[resource]
        asked = {"verb": verb, "resource": resource, "group": api.rpartition("/")[0], "subresource": sub, "name": name}
        if namespaced or namespace is not None:
            asked["namespace"] = self.namespace if namespace is None else namespace
        kind, spec = "SelfSubjectAccessReview", {"resourceAttributes": asked}
        if service_account is not None:
            kind, spec = "LocalSubjectAccessReview", {"resourceAttributes": asked, **self._identity(service_account)}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
        if service_account is not None:
            body["metadata"] = {"namespace": asked["namespace"]}
        found = self._ask(_Request("POST", self.path(f"{kind.lower()}s"), body=body)) or {}
        return bool(found.get("status", {}).get("allowed"))

    def _identity(self, service_account: str) -> Json:
        """What its token says (https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/)."""
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"]
        return {"user": f"system:serviceaccount:{self.namespace}:{service_account}", "groups": groups}

    def has_api(self, group_version: str) -> bool:
        return self.get(_root(group_version)) is not None

    def _served(self, api: str) -> str:
        if api in _BEFORE and api not in self._versions:
            self._versions[api] = api if self.has_api(api) else _BEFORE[api]
        return self._versions.get(api, api)

    # -- one question -------------------------------------------------------------------------------------------------

    def _ask(self, request: _Request) -> Json | None:
        answer = self._send(request)
        if answer.status < 300:
            return self._json(answer)
        refusal = _refusal(answer, request)
        if refusal.missing:
            return None
        raise self._refused(refusal)

    def _pages(self, path: str, query: Mapping[str, str]) -> Iterator[Json]:
        token: str | None = ""
        while token is not None:
            request = _Request("GET", path, query={**query, "continue": token} if token else query)
            answer = self._send(request)
            if answer.status == 410:
                raise _OutdatedError
            if answer.status >= 300:
                raise self._refused(_refusal(answer, request))
            page = self._json(answer)
            yield from page.get("items") or ()
            token = page.get("metadata", {}).get("continue") or None

    def _send(self, request: _Request) -> urllib3.BaseHTTPResponse:
        """The answer, whatever it says, after some patience."""
        until, attempt, renewed = time.monotonic() + _PATIENCE_S, 0, False
        while True:
            attempt += 1
            last = attempt == _ATTEMPTS or time.monotonic() > until
            try:
                answer = self._send_once(request)
            except UnreachableError as error:
                if last or not (request.patient or isinstance(error, NotSentError)):
                    raise
                self._sleep(_back_off(attempt))
                continue
            if answer.status == 401 and not renewed:
                renewed = True
                self._renew()
            elif last or not request.again_after(answer.status):
                return answer
            else:
                self._sleep(_retry_after(answer) or _back_off(attempt))
            answer.close()

    def _send_once(self, request: _Request) -> urllib3.BaseHTTPResponse:
        loaded, pool = self._reach()  # says so, where the extra is missing

        import urllib3

        headers = urllib3.HTTPHeaderDict(request.headers)
        for name, value in loaded.headers():
            headers.add(name, value.encode().decode("latin-1"))
        with self._lock:
            self._calls += 1
        with self._transport():
            answer = pool.request(
                request.method,
                f"{loaded.server}{request.path}{'?' if request.query else ''}{urlencode(request.query)}",
                body=request.content,
                headers=headers,
                preload_content=not request.stream,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=_CONNECT_S, read=request.read_s),
            )
        self._ahead_s = _ahead_s(answer)
        return answer

    @contextlib.contextmanager
    def _transport(self) -> Iterator[None]:
        import urllib3

        try:
            yield
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise transport_error(error, self._reach()[0]) from error

    def _json(self, answer: urllib3.BaseHTTPResponse) -> Json:
        with contextlib.suppress(ValueError):
            found = json.loads(answer.data)
            if isinstance(found, dict):
                return found
        what = self._reach()[0].what
        raise SpecError(f"{what}: what answers is not the API of a cluster: correct `server` in the kubeconfig")

    def _refused(self, refusal: Refusal) -> CvlaunchError:
        return refusal_error(refusal, self._reach()[0], self.namespace)

    def _uncut_lines(self, answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            with self._transport():
                yield from _split_lines(answer.stream(None))
        except UnreachableError as error:
            raise CutError(str(error)) from error

    # -- the way there ------------------------------------------------------------------------------------------------

    def _reach(self) -> tuple[Loaded, urllib3.PoolManager]:
        with self._lock:
            if self._reached is None or self._reached[0].expires < time.time() + _EARLY_S:
                loaded = load_access(self._access, self._name)
                if self._reached:
                    self._reached[1].clear()
                self._reached = loaded, loaded.pool()
            return self._reached

    def _renew(self) -> None:
        """The token was refused: whatever gave it is asked again, at the next request."""
        self.close()

    def _open_socket(self, path: str, query: Sequence[tuple[str, str]], protocol: str) -> websocket.WebSocket | Refusal:
        import websocket

        loaded = self._reach()[0]
        url = urlsplit(loaded.server + path)._replace(scheme=loaded.server.partition(":")[0].replace("http", "ws", 1))
        with self._lock:
            self._calls += 1
        channel = websocket.WebSocket(sslopt=loaded.tls_options(), enable_multithread=True)
        connect: Callable[..., None] = channel.connect
        try:
            connect(
                url._replace(query=urlencode(query)).geturl(),
                header=[f"{key}: {value}" for key, value in loaded.headers()],
                subprotocols=protocol.split(","),
                timeout=_CONNECT_S,
                **loaded.proxy_options(),
            )
        except websocket.WebSocketBadStatusException as error:
            return Refusal.parse(error.status_code, error.resp_body or b"", method="GET", path=path)
        except (websocket.WebSocketException, OSError) as error:
            raise transport_error(error, loaded) from error
        channel.settimeout(None)
        return channel


class CutError(UnreachableError):
    """A stream that stopped before its end, or fell silent."""


@dataclass(frozen=True)
class _Request:
    """patient: it may be sent twice. stream: the body comes bit by bit, read_s apart at most."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Json | Sequence[Json] | None = None
    form: str = "application/json"
    patient: bool = True
    stream: bool = False
    read_s: float = _READ_S

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else json.dumps(self.body).encode()

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json, */*", "User-Agent": f"cvlaunch/{__version__}"}
        if not self.stream:  # a long list is a tenth of its size
            headers["Accept-Encoding"] = "gzip"
        return headers if self.body is None else {**headers, "Content-Type": self.form}

    def again_after(self, status: int) -> bool:
        return status == 429 or (self.patient and status >= 500)


class _OutdatedError(Exception):
    """410: the token for the next page has expired."""


def _root(group_version: str) -> str:
    return f"/apis/{group_version}" if "/" in group_version else f"/api/{group_version}"


def _back_off(attempt: int) -> float:
    """Seconds; spread, so that many do not come back at once."""
    return min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _LONGEST_WAIT_S) * random.uniform(0.75, 1.25)  # noqa: S311


def _retry_after(answer: urllib3.BaseHTTPResponse) -> float | None:
    text = answer.headers.get("Retry-After", "")
    return min(float(text), _LONGEST_RETRY_AFTER_S) if text.isdecimal() else None


def _ahead_s(answer: urllib3.BaseHTTPResponse) -> float:
    """Of our clock; 0 where the answer does not say."""
    try:
        ahead = parsedate_to_datetime(answer.headers.get("Date", "")).timestamp() - time.time()
    except ValueError:
        return 0.0
    return ahead if abs(ahead) > _SKEW_S else 0.0


def _refusal(answer: urllib3.BaseHTTPResponse, request: _Request) -> Refusal:
    to = answer.headers.get("Location")
    return Refusal.parse(answer.status, answer.data, method=request.method, path=request.path, to=to)


def _split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest
