"""Files of the user, checked against their models: every error names file, line, key and the nearest valid one."""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launcher.errors import SpecError, nearest
from launcher.spec import JobSpec
from launcher.yamlfile import Document, KeyPath, parse_yaml, read_yaml, with_value

__all__ = ["apply_settings", "load_job", "parse_setting", "validate"]

M = TypeVar("M", bound=BaseModel)


def load_job(path: Path, settings: Iterable[str] = ()) -> JobSpec:
    """The job file with `KEY=VALUE` settings laid over it (`train.epochs=3`). SpecError names file, line and key."""
    return apply_settings(read_yaml(path), settings)


def apply_settings(document: Document, settings: Iterable[str]) -> JobSpec:
    """The job in a document, with settings laid over it."""
    parsed = [parse_setting(text) for text in settings]
    content = dict(document.content)
    for keys, value, written in parsed:
        content = with_value(content, keys, written if keys[0] == "env" and type(value) is int else value)
    return _validate_with_settings(Document(document.file, content, _lines_without(document, parsed)), parsed)


@functools.lru_cache(maxsize=1024)
def parse_setting(text: str) -> tuple[KeyPath, Any, str]:
    """`a.b=3` → (("a", "b"), 3, "3"): the value read as YAML, and as it was written."""
    key, equals, written = text.partition("=")
    if not equals or not all(key.split(".")):
        raise SpecError(f"{text!r} is not a setting; a setting looks like train.epochs=3", key="--set")
    try:
        value = parse_yaml(written)[0] if written else ""
    except SpecError as error:
        raise SpecError(
            f"the value {written!r} can't be read; quote it ({error.message})", key=f"--set {key}"
        ) from None
    return tuple(key.split(".")), value, written


def validate(model: type[M], document: Document, *, at: KeyPath = (), content: Any = None) -> M:
    """A model from a document, or from the part of it that stands `at` a key."""
    try:
        return model.model_validate(document.content if content is None else content)
    except ValidationError as error:
        raise _spec_error(model, _telling(error.errors()), document, at) from None


def _validate_with_settings(document: Document, settings: list[tuple[KeyPath, Any, str]]) -> JobSpec:
    """`--set name=1` means the text `1` where text is expected: types are kept, not guessed."""
    try:
        return JobSpec.model_validate(document.content)
    except ValidationError as error:
        places = {tuple(str(k) for k in e["loc"]) for e in error.errors() if e["type"] == "string_type"}
    content = dict(document.content)
    for keys, _, written in settings:
        if any(_same_place(place, keys) for place in places):
            content = with_value(content, keys, written)
    return validate(JobSpec, Document(document.file, content, document.lines))


def _same_place(place: tuple[str, ...], keys: KeyPath) -> bool:
    """Whether pydantic's location, which also names the kind of training, is this key."""
    return _untagged(place) == keys


_TAGS = ("classify", "detect")


def _untagged(place: tuple[Any, ...]) -> tuple[Any, ...]:
    """pydantic's location without the kind of training that it puts after `train`."""
    return place[:1] + place[2:] if place[:1] == ("train",) and place[1:2] and place[1] in _TAGS else place


def _telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """The error to show: of `auto | SIZE`, what is wrong with the size, at the place of the whole."""
    first = errors[0]
    place = first["loc"][:-1]
    if not (first["loc"] and str(first["loc"][-1]).startswith("literal[")):
        return first
    last = [error for error in errors if error["loc"][: len(place)] == place][-1]
    return {**last, "loc": place}


def _lines_without(document: Document, settings: list[tuple[KeyPath, Any, str]]) -> dict[KeyPath, int]:
    """A line of the file says nothing about a value that came from --set."""
    return {p: n for p, n in document.lines.items() if not any(p[: len(keys)] == keys for keys, _, _ in settings)}


def _spec_error(model: type[BaseModel], error: ErrorDetails, document: Document, at: KeyPath) -> SpecError:
    place = _untagged(error["loc"])
    message = _message(model, error, place)
    key = ".".join(str(part) for part in (*at, *place)) or None
    return SpecError(message, file=document.file, line=document.line((*at, *place)), key=key)


def _message(model: type[BaseModel], error: ErrorDetails, place: KeyPath) -> str:
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = _keys_at(model, error["loc"][:-1])
        listed = f"; expected one of {', '.join(known)}" if known else ""
        return f"unknown key{nearest(str(place[-1]), known) or listed}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "union_tag_invalid":
        return f"{error['ctx']['tag']!r} is not a task; expected {error['ctx']['expected_tags']}"
    if kind == "union_tag_not_found":
        return "the key task is missing; expected task: classify or task: detect"
    if place[:1] == ("secrets",):
        return "expected a reference: env:NAME, file:PATH or store:REFERENCE"  # the value may be the secret itself
    text = _EXPECTED.get(kind) or _NOISE.sub("", error["msg"])
    quote = "; quote it" if kind == "string_type" and not isinstance(value, list | dict | None) else ""
    return f"expected {text}, found {_shown(value)}{quote}"


_NOISE = re.compile(r"^(Input should be|(String|Tuple|List|Dictionary) should have) | after validation, not \d+$")
"""Of pydantic's words, where a plainer one says it."""

_EXPECTED = {
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "keys and values"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _keys_at(model: Any, place: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the model that stands at pydantic's location."""
    for part in place:
        model = _step(model, part)
    found = [m for m in _members(model) if isinstance(m, type) and issubclass(m, BaseModel)]
    return sorted({name for m in found for name in m.model_fields})


def _step(model: Any, part: int | str) -> Any:
    for member in _members(model):
        if isinstance(member, type) and issubclass(member, BaseModel):
            if part in member.model_fields:
                return member.model_fields[str(part)].annotation
            if part in _TAGS and str(part) in str(member.model_fields["task"].annotation):
                return member
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(m for arg in typing.get_args(annotation) for m in _members(arg))
    return (annotation,)
