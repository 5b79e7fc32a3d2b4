"""The API server at the wire: HTTP, authentication, authorization, discovery, faults."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from tests.services.kube import streams
from tests.services.kube.answers import ApiError, bad_request, expired, forbidden, status
from tests.services.kube.api import Api
from tests.services.kube.kubelet import Kubelet
from tests.services.kube.objects import Json, Key, grace_of
from tests.services.kube.resources import BY_PATH, CORE, OPENSHIFT_GROUPS, RESOURCES, Resource
from tests.services.kube.schema import VERSION
from tests.services.kube.times import now

__all__ = ["Fault", "Forbidden", "Request", "Server", "Settings"]

_LIMIT = 3 * 1024 * 1024
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get"}
_WATCH_POLL_S = 0.03
_CONTINUE_EXPIRED = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results. "
    "Continuing with the provided token results in an inconsistent list - objects that were created, modified, or "
    "deleted between the time the first chunk was returned and now may show up in the list."
)
_REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired",
    422: "Invalid", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip
_MESSAGES = {
    401: "Unauthorized",
    410: _CONTINUE_EXPIRED,
    429: "the server has received too many requests and has asked us to try again later",
    500: "Internal error occurred: etcdserver: request timed out",
    503: "the server is currently unable to handle the request",
}


@dataclass(frozen=True)
class Request:
    """One that the server got. path: without its query. impersonated: headers `Impersonate-…`, in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    impersonated: tuple[tuple[str, str], ...] = ()


@dataclass
class Fault:
    """What happens to a request instead, the next `times` times (None: always).

    status: of the answer; 0 closes the connection without one, after the request was carried out if `late`.
    """

    status: int
    path: str
    method: str
    times: int | None
    headers: Mapping[str, str]
    body: Json | str | None
    late: bool = False

    def meets(self, request: web.Request) -> bool:
        fits = re.search(self.path, request.path_qs) and self.method in ("", request.method)
        return bool(fits) and self.times != 0

    def use(self) -> None:
        self.times = None if self.times is None else self.times - 1


@dataclass(frozen=True)
class Forbidden:
    """verb, resource: `*` is any. resource: with its subresource, as in `pods/log`."""

    verb: str
    resource: str
    namespace: str | None


@dataclass
class Settings:
    """What tests change. user: whom the tokens belong to. hidden: API groups that are not served."""

    tokens: set[str]
    user: str = "dev"
    faults: list[Fault] = field(default_factory=list)
    forbidden: list[Forbidden] = field(default_factory=list)
    hidden: set[str] = field(default_factory=lambda: set(OPENSHIFT_GROUPS))
    cuts: list[streams.Cut] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    resource: Resource
    version: str
    namespace: str
    name: str
    sub: str

    @property
    def key(self) -> Key:
        return (self.resource.name, self.namespace, self.name)


class Server:
    def __init__(self, api: Api, kubelet: Kubelet, settings: Settings) -> None:
        self._api, self._kubelet, self._settings = api, kubelet, settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kube-server", daemon=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self.port = 0

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _serve(self) -> None:
        application = web.Application(client_max_size=_LIMIT)
        application.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    # -- a request ----------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        others = tuple((k.lower(), v) for k, v in request.headers.items() if k.lower().startswith("impersonate-"))
        self._settings.requests.append(Request(request.method, request.path, dict(request.query), others))
        fault = next((f for f in self._settings.faults if f.meets(request)), None)
        if fault:
            fault.use()
            if not fault.late:
                return self._broken(request, fault)
        try:
            response = await self._answer(request)
        except ApiError as error:
            response = _json(error.code, error.body(), error.headers)
        except web.HTTPRequestEntityTooLarge:
            message = f"Request entity too large: limit is {_LIMIT}"
            response = _json(413, status(413, "RequestEntityTooLarge", message))
        return self._broken(request, fault) if fault else response

    def _broken(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        if fault.status == 0:
            if request.transport:
                request.transport.abort()
            return web.Response(status=500)
        body = fault.body
        if body is None:
            message = _MESSAGES.get(fault.status, "an error on the server has prevented the request from succeeding")
            body = status(fault.status, _REASONS.get(fault.status, "InternalError"), message)
        if isinstance(body, str):
            return web.Response(status=fault.status, text=body, headers=fault.headers)
        return _json(fault.status, body, fault.headers)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/")
        if path in ("/healthz", "/readyz", "/livez"):
            return web.Response(text="ok")
        self._authenticate(request)
        user = self._impersonated(request)
        found = self._discovery(path)
        if found is not None:
            return _json(200, found)
        target = self._target(path)
        if target is None:
            return web.Response(status=404, text="404 page not found\n")
        verb = self._verb(request, target)
        self._authorize(target, verb, user)
        return await self._do(request, target, verb)

    def _authenticate(self, request: web.Request) -> None:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or token not in self._settings.tokens:
            raise ApiError(401, "Unauthorized", "Unauthorized")

    def _impersonated(self, request: web.Request) -> str:
        """Whom the request is for. The user needs the right for each user, group, uid and kind of extra."""
        own, user = self._settings.user, self._settings.user
        for name, value in request.headers.items():
            kind = name.lower().removeprefix("impersonate-")
            if kind == name.lower():
                continue
            user = value if kind == "user" else user
            resource, _, key = kind.partition("-") if kind.startswith("extra-") else (f"{kind}s", "", "")
            what = f"userextras/{unquote(key)}" if key else resource
            if not self.allowed("impersonate", what, ""):
                group = "" if kind in ("user", "group") else "authentication.k8s.io"
                why = f'User "{own}" cannot impersonate resource "{what}" in API group "{group}" at the cluster scope'
                message = f'{what} "{value}" is forbidden: {why}'
                raise ApiError(403, "Forbidden", message, {"name": value, "group": group, "kind": what})
        return user

    def _target(self, path: str) -> Target | None:
        parts = path.split("/")[1:]
        if parts[0] == "api" and len(parts) > 2:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            return None
        if group in self._settings.hidden:
            return None
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        name, sub = (rest[1] if len(rest) > 1 else ""), (rest[2] if len(rest) > 2 else "")
        resource = BY_PATH.get((group, version, rest[0]))
        if resource is None or (sub and sub not in resource.subresources):
            if not any(r.group == group and version in r.versions for r in RESOURCES):
                return None
            raise ApiError(404, "NotFound", "the server could not find the requested resource", {})
        return Target(resource, version, namespace, name, sub)

    def _verb(self, request: web.Request, target: Target) -> str:
        verb = _VERBS.get(request.method)
        if verb is None or (verb == "create" and target.name and not target.sub):
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        if verb == "get" and not target.name:
            return "watch" if request.query.get("watch") in ("true", "1") else "list"
        if verb == "delete" and not target.name:
            return "deletecollection"
        return verb

    def allowed(self, verb: str, resource: str, namespace: str) -> bool:
        return not any(
            rule.verb in ("*", verb) and rule.resource in ("*", resource) and rule.namespace in (None, namespace)
            for rule in self._settings.forbidden
        )

    def _authorize(self, target: Target, verb: str, user: str) -> None:
        resource = target.resource
        verb = "get" if target.sub in ("exec", "portforward") and verb == "get" else verb
        what = f"{resource.name}/{target.sub}" if target.sub else resource.name
        if resource.name.startswith("self") or self.allowed(verb, what, target.namespace):
            return
        where = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
        why = f'User "{user}" cannot {verb} resource "{what}" in API group "{resource.group}" {where}'
        raise forbidden(resource, target.name, why)

    # -- verbs --------------------------------------------------------------------------------------------------------

    async def _do(self, request: web.Request, target: Target, verb: str) -> web.StreamResponse:
        if target.sub in ("log", "exec", "portforward", "eviction"):
            return await self._of_pod(request, target)
        doing: dict[str, Callable[[web.Request, Target], Awaitable[web.StreamResponse]]] = {
            "get": self._get,
            "list": self._list,
            "watch": self._watch,
            "create": self._create,
            "update": self._update,
            "patch": self._patch,
            "delete": self._delete,
            "deletecollection": self._delete_all,
        }
        return await doing[verb](request, target)

    def _shown(self, obj: Json, target: Target) -> Json:
        return {**obj, "apiVersion": target.resource.with_version(target.version), "kind": target.resource.kind}

    async def _get(self, request: web.Request, target: Target) -> web.StreamResponse:
        if target.resource.name == "projects":
            return _json(200, _project(self._api.get(CORE["namespaces"], "", target.name)))
        return _json(200, self._shown(self._api.get(target.resource, target.namespace, target.name), target))

    async def _list(self, request: web.Request, target: Target) -> web.StreamResponse:
        resource = target.resource
        if resource.name == "projects":
            items, meta = self._api.list(CORE["namespaces"], "", request.query)
            items = [_project(item) for item in items]
        else:
            items, meta = self._api.list(resource, target.namespace, request.query)
            bare = [{k: v for k, v in item.items() if k not in ("apiVersion", "kind")} for item in items]
            items = [self._shown(item, target) for item in items] if resource.custom else bare
        api_version = resource.with_version(target.version)
        return _json(200, {"kind": f"{resource.kind}List", "apiVersion": api_version, "metadata": meta, "items": items})

    async def _create(self, request: web.Request, target: Target) -> web.StreamResponse:
        body = await _body(request)
        if not target.resource.stored:
            return _json(201, self._review(target.resource, body))
        made, warnings = self._api.create(
            target.resource, target.namespace, body, version=target.version, query=request.query
        )
        return _json(201, self._shown(made, target), _warnings(warnings))

    async def _update(self, request: web.Request, target: Target) -> web.StreamResponse:
        body = await _body(request)
        found, warnings = self._api.replace(
            target.resource, target.key, body, version=target.version, sub=target.sub, query=request.query
        )
        return _json(200, self._shown(found, target), _warnings(warnings))

    async def _patch(self, request: web.Request, target: Target) -> web.StreamResponse:
        form = request.headers.get("Content-Type", "").partition(";")[0]
        body = await request.read()
        found, warnings = self._api.patch(target.resource, target.key, form, body, sub=target.sub, query=request.query)
        return _json(200, self._shown(found, target), _warnings(warnings))

    async def _delete(self, request: web.Request, target: Target) -> web.StreamResponse:
        options = await _body(request) if request.can_read_body else {}
        old = self._api.get(target.resource, target.namespace, target.name)
        left, warnings = self._api.delete(
            target.resource, target.namespace, target.name, options=options or {}, query=request.query
        )
        if left is not None or target.resource.name == "pods":
            return _json(200, self._shown(left or old, target), _warnings(warnings))
        details = {"name": target.name, "group": target.resource.group, "kind": target.resource.name}
        details = {key: value for key, value in details.items() if value} | {"uid": old["metadata"]["uid"]}
        done = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return _json(200, done, _warnings(warnings))

    async def _delete_all(self, request: web.Request, target: Target) -> web.StreamResponse:
        options = await _body(request) if request.can_read_body else {}
        items = self._api.selected(target.resource, target.namespace, request.query)
        for item in items:
            meta = item["metadata"]
            self._api.delete(
                target.resource, meta.get("namespace", ""), meta["name"], options=options or {}, query=request.query
            )
        kind, api_version = f"{target.resource.kind}List", target.resource.with_version(target.version)
        return _json(200, {"kind": kind, "apiVersion": api_version, "metadata": {}, "items": items})

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        resource, store = target.resource, self._api.store
        keep = self._api.selection(resource, request.query)
        since = request.query.get("resourceVersion", "")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if since in ("", "0"):
            items, meta = self._api.list(resource, target.namespace, {})
            for item in filter(keep, items):
                await self._send_change(response, "ADDED", self._shown(item, target))
            since = meta["resourceVersion"]
        version = int(since)
        if store.history and version < store.history[0].version - 1:
            await self._send_change(response, "ERROR", expired(f"too old resource version: {since}").body())
            return response
        end = time.monotonic() + float(request.query.get("timeoutSeconds") or 1800)
        while time.monotonic() < end and not self._stop.is_set():
            with store.lock:
                news = [c for c in store.history if c.version > version] if store.version > version else []
            for change in news:
                version = change.version
                if change.key[0] == resource.name and target.namespace in ("", change.key[1]):
                    kind = change.kind if keep(change.obj) else "DELETED"
                    await self._send_change(response, kind, self._shown(change.obj, target))
            await asyncio.sleep(_WATCH_POLL_S)
        return response

    async def _send_change(self, response: web.StreamResponse, kind: str, obj: Json) -> None:
        await response.write(json.dumps({"type": kind, "object": obj}).encode() + b"\n")

    def _review(self, resource: Resource, body: Any) -> Json:
        spec = body.get("spec", {})
        if resource.name == "selfsubjectaccessreviews":
            asked = spec.get("resourceAttributes", {})
            name = asked.get("resource", "")
            if asked.get("subresource"):
                name += f"/{asked['subresource']}"
            fine = self.allowed(asked.get("verb", ""), name, asked.get("namespace", ""))
            return {**body, "metadata": {}, "status": {"allowed": fine, **({} if fine else {"reason": ""})}}
        if resource.name == "localsubjectaccessreviews":
            fine = spec.get("resourceAttributes", {}).get("name") == "restricted-v2"  # all that an account is given
            return {**body, "status": {"allowed": fine}}
        rules = [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}] if not self._settings.forbidden else []
        return {**body, "metadata": {}, "status": {"resourceRules": rules, "nonResourceRules": [], "incomplete": False}}

    # -- pods ---------------------------------------------------------------------------------------------------------

    async def _of_pod(self, request: web.Request, target: Target) -> web.StreamResponse:
        pod = self._api.get(target.resource, target.namespace, target.name)
        if target.sub == "log":
            return await self._log(request, pod)
        if target.sub == "eviction":
            body = await _body(request)
            evict(self._api, target.key, (body or {}).get("deleteOptions", {}).get("gracePeriodSeconds"))
            return _json(201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise bad_request("Upgrade request required")
        if target.sub == "portforward":
            if pod["status"].get("phase") != "Running":
                raise _not_running(pod)
            return await streams.forward_ports(request, pod)
        return await streams.exec_in(request, self._running(pod, request.query.get("container", "")))

    def _running(self, pod: Json, container: str) -> Any:
        if pod["status"].get("phase") in ("Succeeded", "Failed"):
            phase = pod["status"]["phase"]
            raise ApiError(
                500, "InternalError", f"cannot exec into a container in a completed pod; current phase is {phase}"
            )
        worker = self._kubelet.worker(pod)
        slot = worker.slot(container or pod["spec"]["containers"][0]["name"]) if worker else None
        if container and slot is None and worker:
            raise bad_request(f"container {container} is not valid for pod {pod['metadata']['name']}")
        if slot is None or slot.run is None or slot.run.terminated:
            raise _not_running(pod, container)
        return slot.run

    async def _log(self, request: web.Request, pod: Json) -> web.StreamResponse:
        query = streams.parse_log_query(request.query, time.time())
        source = streams.log_source(self._kubelet, pod, query)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        cut = next((cut for cut in self._settings.cuts if cut.times), None)
        if cut:
            cut.times -= 1
        await response.prepare(request)
        if source is None:
            return response
        _, run = source
        sent = 0
        async for line in _unless_stopped(streams.log_lines(run, query), self._stop):
            await response.write(line)
            sent += 1
            if cut and sent >= cut.lines:
                if request.transport and not cut.clean:
                    await asyncio.sleep(0)
                    request.transport.close()
                return response
        return response

    # -- discovery ----------------------------------------------------------------------------------------------------

    def _discovery(self, path: str) -> Json | None:
        served = [r for r in RESOURCES if r.group not in self._settings.hidden]
        if path == "/version":
            major, minor, _ = VERSION.split(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{VERSION}", "platform": "linux/amd64"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        groups = {r.group: r.versions for r in served if r.group}
        groups["policy"] = ("v1",)
        if path == "/apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(n, v) for n, v in groups.items()]}
        parts = path.split("/")[1:]
        if parts[0] == "apis" and len(parts) == 2 and parts[1] in groups:
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(parts[1], groups[parts[1]])}
        group, version = ("", parts[-1]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[-1])
        if (parts[0], len(parts)) not in (("api", 2), ("apis", 3)):
            return None
        found = [entry for r in served if r.group == group and version in r.versions for entry in _listed(r)]
        place = f"{group}/{version}" if group else version
        if not found:
            return None
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": place, "resources": found}


def evict(api: Api, key: Key, grace_s: int | None = None) -> None:
    """As the eviction API: the condition that says so, then a graceful deletion."""
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "EvictionByEvictionAPI",
        "message": "Eviction API: evicting",
        "lastProbeTime": None,
        "lastTransitionTime": now(),
    }

    def mutate(pod: Json) -> None:
        pod["status"].setdefault("conditions", []).append(condition)

    with api.store.lock:
        pod = api.store.change(key, mutate)
        assert pod is not None
        api.store.delete(key, grace_s=grace_of(key, pod, grace_s))


async def _unless_stopped(lines: AsyncIterator[bytes], stop: asyncio.Event) -> AsyncIterator[bytes]:
    async for line in lines:
        if stop.is_set():
            return
        yield line


def _not_running(pod: Json, container: str = "") -> ApiError:
    name = pod["metadata"]["name"]
    if container:
        return ApiError(500, "InternalError", f'container not found ("{container}")')
    return bad_request(f"pod {name} does not have a running container; current phase is {pod['status'].get('phase')}")


def _project(namespace: Json) -> Json:
    return {**namespace, "apiVersion": "project.openshift.io/v1", "kind": "Project"}


def _group(name: str, versions: tuple[str, ...]) -> Json:
    listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _listed(resource: Resource) -> list[Json]:
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    entry: Json = {
        "name": resource.name,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": verbs if resource.stored else ["create"],
    }
    subs = [
        {**entry, "name": f"{resource.name}/{sub}", "verbs": ["get", "patch", "update"]}
        for sub in resource.subresources
    ]
    return [entry, *subs]


async def _body(request: web.Request) -> Any:
    text = await request.read()
    if not text:
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise bad_request(f"the object provided is unrecognized (must be of type json): {error}") from None


def _warnings(texts: list[str]) -> dict[str, str]:
    return {"Warning": ", ".join(f"299 - {json.dumps(text)}" for text in texts)} if texts else {}


def _json(code: int, body: Json, headers: Mapping[str, str] | None = None) -> web.Response:
    content = json.dumps(body, separators=(",", ":")).encode()
    return web.Response(status=code, body=content, content_type="application/json", headers=headers)
