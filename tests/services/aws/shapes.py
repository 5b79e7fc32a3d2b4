"""Checks of a request against botocore's service model, as AWS makes them: types, required members, lengths, ranges,
patterns and words; botocore itself checks no maximum, pattern or word."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from botocore.model import ServiceModel, Shape

from tests.services.aws.wire import AwsError, Json

__all__ = ["check_request", "service_model"]

Words = Mapping[str, frozenset[str]]

_MULTIPLE = "{} validation error{} detected: {}"
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "timestamp": (int, float),
    "list": (list,),
    "map": (dict,),
    "structure": (dict,),
}
_CLASSES = {
    r"\p{L}": r"\w",
    r"\p{N}": r"\d",
    r"\p{Z}": " \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
}
"""Unicode classes, which `re` does not know; all patterns that have them allow `_` too."""


@functools.cache
def service_model(service: str) -> ServiceModel:
    import botocore.session

    return botocore.session.get_session().get_service_model(service)


def check_request(service: str, operation: str, body: Json, words: Mapping[str, frozenset[str]] = {}) -> None:
    """AwsError with all that is wrong. words: name of a shape → words that it may have besides the model's."""
    shape = service_model(service).operation_model(operation).input_shape
    found = list(_structure(shape, body, "", words)) if shape else []
    if found:
        text = _MULTIPLE.format(len(found), "" if len(found) == 1 else "s", "; ".join(found))
        raise AwsError("ValidationException", text)


def _structure(shape: Shape, value: Json, path: str, words: Words) -> Iterator[str]:
    for name in shape.required_members:
        if value.get(name) is None:
            yield _wrong(None, _joined(path, _lower(name)), "Member must not be null")
    for name, member in value.items():
        if name not in shape.members:
            raise AwsError("ValidationException", f"Unknown parameter in {path or 'the request'}: {name!r}")
        if member is not None:
            yield from _check(shape.members[name], member, _joined(path, _lower(name)), words)


def _check(shape: Shape, value: Any, path: str, words: Words) -> Iterator[str]:
    kinds = _TYPES[shape.type_name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise AwsError("SerializationException", f"{type(value).__name__} can not be converted to {shape.type_name}")
    constraints = list(_constraints(shape, value, words))
    for constraint in constraints:
        yield _wrong(value, path, constraint)
    if shape.type_name == "structure":
        yield from _structure(shape, value, path, words)
    elif shape.type_name == "list":
        for number, item in enumerate(value, 1):
            yield from _check(shape.member, item, f"{path}.{number}.member", words)
    elif shape.type_name == "map":
        yield from _map(shape, value, path, words)


def _map(shape: Shape, value: Json, path: str, words: Words) -> Iterator[str]:
    for key, item in value.items():
        for what, part, side in (("keys", key, shape.key), ("values", item, shape.value)):
            if not isinstance(part, str):
                raise AwsError("SerializationException", f"{type(part).__name__} can not be converted to string")
            if constraints := list(_constraints(side, part, words)):
                yield _wrong(value, path, f"Map {what[:-1]} must satisfy constraint: [{', '.join(constraints)}]")


def _constraints(shape: Shape, value: Any, words: Words) -> Iterator[str]:
    limits = shape.metadata
    sized = shape.type_name in ("string", "list", "map")
    size = len(value) if sized else value
    what = "have length" if sized else "have value"
    if isinstance(size, int | float) and not isinstance(size, bool):
        if "min" in limits and size < limits["min"]:
            yield f"Member must {what} greater than or equal to {limits['min']}"
        if "max" in limits and size > limits["max"]:
            yield f"Member must {what} less than or equal to {limits['max']}"
    if shape.type_name == "string":
        yield from _text_constraints(shape, value, words)


def _text_constraints(shape: Shape, value: str, words: Words) -> Iterator[str]:
    pattern, known = shape.metadata.get("pattern"), shape.metadata.get("enum")
    if pattern and not re.fullmatch(_translated(pattern), value):
        yield f"Member must satisfy regular expression pattern: {pattern}"
    if known and value not in known and value not in words.get(shape.name, ()):
        yield f"Member must satisfy enum value set: [{', '.join(known)}]"


@functools.cache
def _translated(pattern: str) -> str:
    for theirs, ours in _CLASSES.items():
        pattern = pattern.replace(theirs, ours)
    return pattern


def _wrong(value: Any, path: str, constraint: str) -> str:
    shown = "null" if value is None else f"'{value}'"
    return f"Value {shown} at '{path}' failed to satisfy constraint: {constraint}"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _lower(name: str) -> str:
    """As Java writes it: trainingJobName, but s3Uri and kmsKeyId."""
    return name[:1].lower() + name[1:]
