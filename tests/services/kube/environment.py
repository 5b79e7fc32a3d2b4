"""The variables of a container, and what `$(NAME)` stands for in its command."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.services.kube.objects import Store
from tests.services.kube.times import parse_quantity, whole

__all__ = ["ConfigError", "Environment", "environment_of", "expand", "field_value", "resource_value"]

Json = dict[str, Any]

_SERVICE = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "KUBERNETES_SERVICE_PORT": "443",
    "KUBERNETES_SERVICE_PORT_HTTPS": "443",
    "KUBERNETES_PORT": "tcp://10.96.0.1:443",
    "KUBERNETES_PORT_443_TCP": "tcp://10.96.0.1:443",
    "KUBERNETES_PORT_443_TCP_PROTO": "tcp",
    "KUBERNETES_PORT_443_TCP_PORT": "443",
    "KUBERNETES_PORT_443_TCP_ADDR": "10.96.0.1",
}


class ConfigError(Exception):
    """CreateContainerConfigError: the kubelet tries again."""


@dataclass
class Environment:
    """secret: names whose values come from a Secret."""

    values: dict[str, str] = field(default_factory=dict)
    secret: set[str] = field(default_factory=set)

    def set(self, name: str, value: str, *, secret: bool = False) -> None:
        self.values[name] = value
        (self.secret.add if secret else self.secret.discard)(name)


def environment_of(store: Store, pod: Json, container: Json) -> Environment:
    """ConfigError where it names what is not there."""
    found = Environment(dict(_SERVICE))
    for source in container.get("envFrom", ()):
        _all_of(store, pod, source, found)
    for variable in container.get("env", ()):
        _one(store, pod, container, variable, found)
    return found


def _all_of(store: Store, pod: Json, source: Json, found: Environment) -> None:
    for kind, plural in (("secretRef", "secrets"), ("configMapRef", "configmaps")):
        if kind in source:
            values = _data(store, pod, plural, source[kind])
            for key, value in (values or {}).items():
                found.set(source.get("prefix", "") + key, value, secret=plural == "secrets")


def _one(store: Store, pod: Json, container: Json, variable: Json, found: Environment) -> None:
    name, source = variable["name"], variable.get("valueFrom", {})
    if not source:
        found.set(name, expand(variable.get("value", ""), found.values))
    elif "fieldRef" in source:
        found.set(name, field_value(pod, source["fieldRef"]["fieldPath"]))
    elif "resourceFieldRef" in source:
        found.set(name, resource_value(container, source["resourceFieldRef"]))
    for kind, plural in (("secretKeyRef", "secrets"), ("configMapKeyRef", "configmaps")):
        if kind in source:
            _by_key(store, pod, (plural, name), source[kind], found)


def _by_key(store: Store, pod: Json, what: tuple[str, str], reference: Json, found: Environment) -> None:
    plural, name = what
    values = _data(store, pod, plural, reference)
    if values is not None and reference["key"] in values:
        found.set(name, values[reference["key"]], secret=plural == "secrets")
    elif not reference.get("optional"):
        word = "Secret" if plural == "secrets" else "ConfigMap"
        place = f"{pod['metadata']['namespace']}/{reference['name']}"
        raise ConfigError(f"couldn't find key {reference['key']} in {word} {place}")


def _data(store: Store, pod: Json, plural: str, reference: Json) -> dict[str, str] | None:
    found = store.get((plural, pod["metadata"]["namespace"], reference["name"]))
    if found is None:
        if reference.get("optional"):
            return None
        raise ConfigError(f'{plural.rstrip("s")} "{reference["name"]}" not found')
    data: dict[str, str] = found.get("data", {})
    return {key: base64.b64decode(v).decode() for key, v in data.items()} if plural == "secrets" else data


def field_value(pod: Json, path: str) -> str:
    """Of the downward API."""
    meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
    for kind in ("labels", "annotations"):
        if path.startswith(f"metadata.{kind}['"):
            return str(meta.get(kind, {}).get(path.partition("'")[2].rpartition("'")[0], ""))
        if path == f"metadata.{kind}":
            return "\n".join(f"{key}={_quoted(value)}" for key, value in sorted(meta.get(kind, {}).items()))
    known = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": status.get("podIP", ""),
        "status.podIPs": status.get("podIP", ""),
        "status.hostIP": status.get("hostIP", ""),
        "status.hostIPs": status.get("hostIP", ""),
    }
    return str(known[path])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def resource_value(container: Json, reference: Json) -> str:
    kind, _, name = reference["resource"].partition(".")
    value = container["resources"].get(kind, {}).get(name, "0")
    divisor = parse_quantity(reference.get("divisor") or "1") or 1
    return str(whole(parse_quantity(value) / divisor))


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` is its value if there is one, `$$` a dollar, all else stands as it is
    (third_party/forked/golang/expansion)."""
    parts, at = [], 0
    while at < len(text):
        if text[at] != "$" or at + 1 == len(text):
            parts.append(text[at])
            at += 1
        elif text[at + 1] == "$":
            parts.append("$")
            at += 2
        elif text[at + 1] == "(" and (end := text.find(")", at)) > 0:
            name = text[at + 2 : end]
            parts.append(values.get(name, f"$({name})"))
            at = end + 1
        else:
            parts.append(text[at : at + 2])
            at += 2
    return "".join(parts)
