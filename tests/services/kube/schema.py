"""The published JSON schemas as the decoder of the API server: what it refuses, drops and asks for, in its words."""

from __future__ import annotations

import base64
import binascii
import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

from tests.services.kube.answers import ApiError, Causes, bad_request
from tests.services.kube.resources import Resource
from tests.services.kube.times import canonical

__all__ = ["VERSION", "decode", "merge_key", "required_fields"]

VERSION = "1.34.0"
_PREFIX = "#/$defs/"
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
_QUANTITY_PATTERN = "^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$"
_WORDS = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
_TYPES = {
    "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float), "array": (list,),
    "object": (dict,),
}  # fmt: skip


@functools.cache
def _definitions() -> dict[str, Any]:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{VERSION}-local-strict"
    found: dict[str, Any] = json.loads((folder / "_definitions.json").read_text())["$defs"]
    return found


def decode(resource: Resource, version: str, body: Any, *, strict: bool) -> tuple[dict[str, Any], list[str]]:
    """(the object without nulls and unknown fields, warnings). ApiError 400 for a wrong type, and for an unknown field
    if strict, which the server else warns of."""
    if not isinstance(body, dict):
        raise bad_request(f"couldn't get version/kind; json parse error: json: cannot unmarshal {_WORDS[type(body)]}")
    expected = (resource.with_version(version), resource.kind)
    if (got := (body.get("apiVersion", expected[0]), body.get("kind", expected[1]))) != expected:
        raise bad_request(
            f"the API version in the data ({got[0]}) does not match the expected API version ({expected[0]})"
            if got[0] != expected[0]
            else f"{got[1]} in version {version!r} cannot be handled as a {resource.kind}"
        )
    clean = {**_without_nulls(body), "apiVersion": expected[0], "kind": expected[1]}
    if resource.custom:
        return clean, []
    unknown: list[str] = []
    handled = f'{resource.kind} in version "{version}" cannot be handled as a {resource.kind}'
    try:
        clean = _decode(clean, f"{_PREFIX}{resource.definition}", "", unknown)
    except _WrongTypeError as error:
        raise bad_request(f"{handled}: {error}") from None
    if unknown and strict:
        named = ", ".join(f'unknown field "{field}"' for field in unknown)
        raise ApiError(400, "BadRequest", f"{handled}: strict decoding error: {named}")
    return clean, [f'unknown field "{field}"' for field in unknown]


class _WrongTypeError(Exception):
    pass


def _decode(value: Any, reference: str, path: str, unknown: list[str]) -> Any:
    name = reference.removeprefix(_PREFIX)
    if name == _QUANTITY:
        return _quantity(value)
    schema = _definitions()[name]
    properties = schema.get("properties")
    if properties is None:
        return _scalar(value, schema, path, "")
    if not isinstance(value, dict):
        raise _wrong(value, path, name.rpartition(".")[2], "")
    result = {}
    for key, item in value.items():
        field = f"{path}.{key}" if path else key
        if key not in properties:
            unknown.append(field)
            continue
        result[key] = _value(item, properties[key], field, (name.rpartition(".")[2], unknown))
    return result


def _value(value: Any, schema: dict[str, Any], path: str, context: tuple[str, list[str]]) -> Any:
    owner, unknown = context
    if reference := schema.get("$ref"):
        return _decode(value, reference, path, unknown)
    value = _scalar(value, schema, path, owner)
    if isinstance(value, list) and "items" in schema:
        return [_value(item, schema["items"], f"{path}[{i}]", context) for i, item in enumerate(value)]
    inner = schema.get("additionalProperties")
    if isinstance(value, dict) and isinstance(inner, dict):
        return {key: _value(item, inner, f"{path}.{key}", context) for key, item in value.items()}
    return value


def _scalar(value: Any, schema: dict[str, Any], path: str, owner: str) -> Any:
    known = schema.get("type", ())
    allowed = [t for name in ([known] if isinstance(known, str) else known) for t in _TYPES.get(name, ())]
    for choice in schema.get("oneOf", ()):
        allowed += [t for name in choice["type"] for t in _TYPES.get(name, ())]
    if allowed and (not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed)):
        raise _wrong(value, path, owner, schema.get("format") or (known if isinstance(known, str) else known[0]))
    if schema.get("format") == "byte":
        _base64(value)
    return value


def _base64(value: str) -> None:
    try:
        base64.b64decode(value, validate=True)
    except binascii.Error:
        raise _WrongTypeError("illegal base64 data at input byte 0") from None


def _quantity(value: Any) -> str:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return canonical(value)
    except ValueError:
        pass
    raise _WrongTypeError(f"quantities must match the regular expression '{_QUANTITY_PATTERN}'")


def _wrong(value: Any, path: str, owner: str, kind: str) -> _WrongTypeError:
    where = ".".join(part.partition("[")[0] for part in path.split("."))
    kinds = {"integer": "int32", "boolean": "bool", "object": "map[string]string", "array": "[]"}
    word = kinds.get(kind, kind or f"v1.{owner}")
    return _WrongTypeError(
        f"json: cannot unmarshal {_WORDS[type(value)]} into Go struct field {owner}.{where} of type {word}"
    )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def required_fields(resource: Resource, body: dict[str, Any], causes: Causes) -> None:
    """Fields that the schema demands, below `spec`, `data` and the rest, but not `status`."""
    if resource.custom:
        return
    for key, item in body.items():
        schema = _definitions()[resource.definition]["properties"].get(key)
        if schema and key != "status":
            for field in _missing(item, schema, key):
                causes.required(field)


def _missing(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    if reference := schema.get("$ref"):
        schema = _definitions()[reference.rpartition(_PREFIX)[2]]
    if isinstance(value, dict) and "properties" in schema:
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{path}.{name}"
        for key, item in value.items():
            if key in schema["properties"]:
                yield from _missing(item, schema["properties"][key], f"{path}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from _missing(item, schema["items"], f"{path}[{index}]")


def merge_key(resource: Resource, path: tuple[str, ...]) -> str | None:
    """By which field a strategic merge patch tells the items of the list at this path; None: the list is replaced."""
    schema: dict[str, Any] = {"$ref": f"{_PREFIX}{resource.definition}"}
    for key in path:
        if reference := schema.get("$ref"):
            schema = _definitions()[reference.rpartition(_PREFIX)[2]]
        if schema.get("type") and "array" in schema["type"]:
            schema = schema["items"]
            if reference := schema.get("$ref"):
                schema = _definitions()[reference.rpartition(_PREFIX)[2]]
        inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
        if not isinstance(inner, dict):
            return None
        schema = inner
    key = schema.get("x-kubernetes-patch-merge-key")
    return key if key and "merge" in schema.get("x-kubernetes-patch-strategy", "") else None
