"""How a cluster is reached: kubeconfig files with their contexts, or the service account of the pod that we are in."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import math
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from launcher.errors import AuthError, SpecError, UnsupportedError, nearest

if TYPE_CHECKING:
    import urllib3

__all__ = ["Access", "Loaded", "load_access"]

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_NO_ACCESS = "no kubeconfig: there is neither {wanted} nor a service account of a pod that we are in; log in to the \
cluster (`oc login`, or what your provider has for it), or set the target's `kubeconfig`"
_PLUGIN_S = 300.0
"""A plugin may wait for somebody who logs in with a browser."""


@dataclass(frozen=True)
class Access:
    """The keys of a target.

    context: None is the current one. kubeconfig: None is $KUBECONFIG, ~/.kube/config, else the service account of the
    pod that we are in. namespace: None is the context's (in a pod the pod's), else `default`.
    """

    context: str | None = None
    kubeconfig: str | None = None
    namespace: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A configuration, read. what: for messages. login: how to get a new token. expires: of the token, Unix seconds.

    impersonated: headers that name somebody in whose place we ask. settings: as the package `kubernetes` fills them in;
    only what is set is there.
    """

    what: str
    namespace: str
    settings: SimpleNamespace
    login: str
    expires: float = math.inf
    proxy: str | None = None
    impersonated: Sequence[tuple[str, str]] = ()

    @property
    def server(self) -> str:
        return str(self.settings.host)

    def headers(self) -> list[tuple[str, str]]:
        """Who we are; a name may come several times. A token in a file or of an identity provider is read anew when it
        is due."""
        with _login_errors(self.what):
            if renew := getattr(self.settings, "refresh_api_key_hook", None):
                renew(self.settings)
        token = next(iter(self.settings.api_key.values()), None)  # its key has changed between versions
        return [*([("Authorization", str(token))] if token else []), *self.impersonated]

    def pool(self) -> urllib3.PoolManager:
        import urllib3

        options: dict[str, Any] = {
            "cert_reqs": "CERT_REQUIRED" if self._verified else "CERT_NONE",
            "ca_certs": self._setting("ssl_ca_cert"),
            "cert_file": self._setting("cert_file"),
            "key_file": self._setting("key_file"),
            "maxsize": 8,
        }
        if name := self._setting("tls_server_name"):
            options["server_hostname"] = name
        if not self._verified:  # the kubeconfig says so on purpose
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        if not self.proxy:
            return urllib3.PoolManager(**options)
        login = self._proxy_login
        headers = urllib3.make_headers(proxy_basic_auth=":".join(login)) if login else None
        return urllib3.ProxyManager(self.proxy, proxy_headers=headers, **options)

    def tls_options(self) -> dict[str, object]:
        """For websocket-client, which takes what ssl.SSLContext does."""
        options = {
            "cert_reqs": ssl.CERT_REQUIRED if self._verified else ssl.CERT_NONE,
            "check_hostname": self._verified,
            "ca_certs": self._setting("ssl_ca_cert"),
            "certfile": self._setting("cert_file"),
            "keyfile": self._setting("key_file"),
            "server_hostname": self._setting("tls_server_name"),
        }
        return {key: value for key, value in options.items() if value is not None}

    def proxy_options(self) -> dict[str, Any]:
        """For websocket-client, which would look into the environment itself."""
        if not self.proxy:
            return {"http_no_proxy": ["*"]}
        proxy = urlsplit(self.proxy)
        return {
            "http_proxy_host": proxy.hostname,
            "http_proxy_port": proxy.port or 80,
            "http_proxy_auth": self._proxy_login,
            "proxy_type": "http",
            "http_no_proxy": [""],
        }

    @property
    def _proxy_login(self) -> tuple[str, str] | None:
        proxy = urlsplit(self.proxy or "")
        return (unquote(proxy.username), unquote(proxy.password or "")) if proxy.username else None

    @property
    def _verified(self) -> bool:
        return bool(getattr(self.settings, "verify_ssl", True))

    def _setting(self, name: str) -> str | None:
        return getattr(self.settings, name, None) or None


def load_access(access: Access, target: str = "") -> Loaded:
    """Reads the configuration; a plugin that it names is run. SpecError, AuthError."""
    try:
        import kubernetes  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("clusters need the package `kubernetes`: pip install 'cvlaunch[kubernetes]'") from error
    wanted = _wanted(access)
    there = [path for path in wanted if path.exists()]
    names = " or ".join(map(str, wanted))
    with _target_named(target):
        if there:
            return _from_files(there, access)
        if access.kubeconfig:
            raise SpecError(f"there is no file {names}: correct it, or log in to the cluster", key="kubeconfig")
        if access.context:
            raise SpecError(f"no context {access.context!r}: there is no {names} to look in", key="context")
        if not (os.environ.get("KUBERNETES_SERVICE_HOST") and (_SERVICE_ACCOUNT / "token").exists()):
            raise SpecError(_NO_ACCESS.format(wanted=names), key="kubeconfig")
        return _from_pod()


def _wanted(access: Access) -> list[Path]:
    """Several in $KUBECONFIG are taken together, as kubectl does."""
    text = access.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    return [Path(part).expanduser() for part in text.split(os.pathsep) if part]


@contextlib.contextmanager
def _target_named(target: str) -> Iterator[None]:
    try:
        yield
    except SpecError as error:
        if not target:
            raise
        raise SpecError(f"target {target}: {error.message}", file=error.file, line=error.line, key=error.key) from error


def _from_pod() -> Loaded:
    from kubernetes import config

    package: Any = config
    settings = SimpleNamespace(api_key={})
    try:
        package.load_incluster_config(client_configuration=settings)
        namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
    except (package.ConfigException, OSError) as error:
        raise SpecError(f"the service account of this pod can't be used: {error}", key="kubeconfig") from error
    login = "give the pod's service account a Role, and a token that is valid"
    return Loaded(
        f"the cluster of this pod ({settings.host})", namespace, settings, login, proxy=_proxy_for(settings.host)
    )


def _from_files(paths: Sequence[Path], access: Access) -> Loaded:
    from kubernetes.config import kube_config

    package: Any = kube_config
    with _file_errors(paths):
        merger = package.KubeConfigMerger(os.pathsep.join(map(str, paths)))
        files = list(merger.config_files.values())
        contexts = _named(files, "contexts", "context")
        current = next((str(found) for one in files if (found := one.get("current-context"))), None)
    name = _chosen(access.context or current, contexts, paths)
    with _file_errors(paths):
        context = contexts[name]
        cluster = _named(files, "clusters", "cluster").get(context.get("cluster", ""), {})
        user = _named(files, "users", "user").get(context.get("user", ""), {})
        impersonated = list(_impersonated(user))
        what = f"context {name} ({cluster.get('server', 'without server')})"
        what += f" as {user['as']}" if impersonated else ""
    login, expires = "log in again, or renew the token in the kubeconfig", math.inf
    if (plugin := user.get("exec")) and not user.keys() & {"token", "tokenFile"}:
        credential = _run_plugin(plugin, cluster, what=what, folder=_folder_of(merger, context.get("user")))
        _replace_user(merger, context["user"], credential.user)
        login, expires = f"log in again with what `{plugin['command']}` gets its token from", credential.expires
    settings = SimpleNamespace(api_key={}, host="")
    with _file_errors(paths):
        loader = package.KubeConfigLoader(
            config_dict=merger.config,
            active_context=name,
            config_base_path=None,
            config_persister=merger.save_changes,
        )
        loader.load_and_set(settings)
        if not settings.host:
            raise SpecError(f"context {name!r} has a cluster without `server`: add it", key="kubeconfig")
        proxy = cluster.get("proxy-url") or _proxy_for(settings.host)
        namespace = context.get("namespace") or "default"
    return Loaded(what, namespace, settings, login, expires, _checked_proxy(proxy), impersonated)


def _impersonated(user: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Headers for `as`, `as-uid`, `as-groups` and `as-user-extra`, of which the package knows nothing.

    https://kubernetes.io/docs/reference/access-authn-authz/authentication/#user-impersonation
    """
    name, more = user.get("as"), sorted({"as-uid", "as-groups", "as-user-extra"} & {k for k, v in user.items() if v})
    if not name:
        if more:
            raise SpecError(f"the kubeconfig's user has {more[0]} without `as`: add it", key="kubeconfig")
        return
    yield "Impersonate-User", str(name)
    if uid := user.get("as-uid"):
        yield "Impersonate-Uid", str(uid)
    yield from (("Impersonate-Group", str(group)) for group in user.get("as-groups") or ())
    for key, values in (user.get("as-user-extra") or {}).items():
        yield from ((f"Impersonate-Extra-{quote(key, safe=_OF_NAMES)}", str(value)) for value in values)


_OF_NAMES = "!#$&'*+^`|"
"""What a header's name may have beside letters, digits and `_.-~` (RFC 9110, 5.6.2); `%` stands for all others."""


@contextlib.contextmanager
def _file_errors(paths: Sequence[Path]) -> Iterator[None]:
    """What is wrong in the files comes out of the package, and of our look-ups, as any error that there is."""
    import yaml

    try:
        yield
    except (SpecError, AuthError):
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = {"file": mark.name, "line": mark.line + 1} if mark else {"file": str(paths[0])}
        raise SpecError(f"this is not YAML: {error.problem}", **where) from error
    except Exception as error:
        if str(error).startswith("cmd-path:"):  # a log-in command of the old kind
            raise AuthError(f"{paths[0]}: {_last_line(str(error))}: log in again") from error
        text = f"{type(error).__name__}: {error}" if isinstance(error, LookupError | TypeError) else str(error)
        raise SpecError(f"this kubeconfig can't be used: {text}", file=_names(paths), key="kubeconfig") from error


@contextlib.contextmanager
def _login_errors(what: str) -> Iterator[None]:
    """Identity providers and token files fail in as many ways as there are."""
    try:
        yield
    except Exception as error:
        raise AuthError(f"{what}: the token can't be renewed ({_last_line(str(error))}): log in again") from error


def _names(paths: Sequence[Path]) -> str:
    return os.pathsep.join(map(str, paths))


def _named(files: Sequence[Mapping[str, Any]], kind: str, key: str) -> dict[str, dict[str, Any]]:
    """Name → what it stands for; the first file that has a name counts."""
    found: dict[str, dict[str, Any]] = {}
    for one in files:
        for item in one.get(kind) or ():
            found.setdefault(str(item["name"]), item.get(key) or {})
    return found


def _chosen(name: str | None, contexts: Mapping[str, object], paths: Sequence[Path]) -> str:
    there = f"there are {', '.join(contexts)}" if contexts else "there are none: log in to a cluster"
    if not name:
        raise SpecError(f"no context is the current one in {_names(paths)}: name one; {there}", key="context")
    if name not in contexts:
        raise SpecError(f"no context {name!r} in {_names(paths)}{nearest(name, contexts)}; {there}", key="context")
    return name


# -- plugins ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Credential:
    """user: the part of a kubeconfig that says the same."""

    user: dict[str, str]
    expires: float


def _run_plugin(plugin: Mapping[str, Any], cluster: Mapping[str, Any], *, what: str, folder: Path) -> _Credential:
    """client.authentication.k8s.io; by ourselves, since the package only logs that it went wrong.

    https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
    """
    command = str(plugin["command"])
    program = str(folder / command) if os.sep in command else command
    asks = plugin.get("interactiveMode") != "Never" and sys.stdin is not None and sys.stdin.isatty()
    spec: dict[str, object] = {"interactive": asks}
    if plugin.get("provideClusterInfo"):
        spec["cluster"] = _cluster_info(cluster)
    info = {"apiVersion": plugin.get("apiVersion", ""), "kind": "ExecCredential", "spec": spec}
    env = {str(item["name"]): str(item["value"]) for item in plugin.get("env") or ()}
    try:
        done = subprocess.run(
            [program, *map(str, plugin.get("args") or ())],
            env={**os.environ, **env, "KUBERNETES_EXEC_INFO": json.dumps(info)},
            stdin=None if asks else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if asks else subprocess.PIPE,
            timeout=_PLUGIN_S,
            check=True,
        )
        return _credential(json.loads(done.stdout)["status"])
    except OSError as error:
        hint = str(plugin.get("installHint") or "install it").strip()
        raise AuthError(f"{what}: its plugin {command!r} can't be run ({error.strerror}): {hint}") from error
    except subprocess.CalledProcessError as error:
        words = _last_line((error.stderr or b"").decode(errors="replace")) or f"exit code {error.returncode}"
        raise AuthError(f"{what}: its plugin {command!r} gave no token: {words}: log in again") from error
    except subprocess.TimeoutExpired as error:
        raise AuthError(f"{what}: its plugin {command!r} did not end: log in by hand first") from error
    except (ValueError, LookupError, TypeError) as error:
        raise AuthError(f"{what}: its plugin {command!r} gave something that is no credential: update it") from error


def _cluster_info(cluster: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data", "proxy-url")
    info = {key: cluster[key] for key in kept if key in cluster}
    for extension in cluster.get("extensions") or ():
        if extension.get("name") == "client.authentication.k8s.io/exec":
            info["config"] = extension.get("extension")
    return info


def _credential(status: Mapping[str, Any]) -> _Credential:
    user = {}
    if "token" in status:
        user["token"] = str(status["token"])
    if "clientCertificateData" in status:
        user["client-certificate-data"] = base64.b64encode(status["clientCertificateData"].encode()).decode()
        user["client-key-data"] = base64.b64encode(status["clientKeyData"].encode()).decode()
    if not user:
        raise ValueError("neither token nor certificate")
    end = status.get("expirationTimestamp")
    return _Credential(user, datetime.fromisoformat(end).timestamp() if end else math.inf)


def _folder_of(merger: Any, user: object) -> Path:
    """Of the file that has this user: a plugin's path is relative to it."""
    return next(Path(node.path).absolute().parent for node in merger.config.value["users"] if node["name"] == user)


def _replace_user(merger: Any, name: object, user: Mapping[str, str]) -> None:
    """In the merged configuration alone, so that no token is written into a file."""
    users = merger.config.value["users"]
    for at, node in enumerate(users):
        if node["name"] == name:
            users[at] = type(node)(node.name, {"name": name, "user": dict(user)}, node.path)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# -- proxies ----------------------------------------------------------------------------------------------------------


def _proxy_for(server: str) -> str | None:
    """What the environment says."""
    proxies = getproxies()
    url = urlsplit(server)
    host = url.hostname or ""
    if proxy_bypass(f"{host}:{url.port}" if url.port else host) or _in_networks(host, proxies):
        return None
    return proxies.get(url.scheme) or proxies.get("all")


def _in_networks(host: str, proxies: Mapping[str, str]) -> bool:
    """Whether `no_proxy` names a network, 10.0.0.0/8, that the address is in, as clusters' tools understand it."""
    for part in proxies.get("no", "").split(","):
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(part.strip(), strict=False):
                return True
    return False


def _checked_proxy(proxy: str | None) -> str | None:
    if proxy and not proxy.startswith(("http://", "https://")):
        url = urlsplit(proxy)
        named = f"{url.scheme}://{url.hostname}" if url.scheme else "proxy"
        raise UnsupportedError(f"{named} can't be used: only proxies http:// and https:// can", key="kubeconfig")
    return proxy
