"""Status objects, in the API server's own words (k8s.io/apimachinery, pkg/api/errors and util/validation/field)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tests.services.kube.resources import Resource

__all__ = [
    "ApiError",
    "Causes",
    "already_exists",
    "bad_request",
    "conflict",
    "expired",
    "forbidden",
    "invalid",
    "not_found",
    "status",
]

_NONE: Mapping[str, Any] = {}


class ApiError(Exception):
    """What the API server answers instead of the object. headers: beside the usual ones."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        details: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] = _NONE,
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, dict(details or {})
        self.headers = dict(headers)

    def body(self) -> dict[str, Any]:
        return status(self.code, self.reason, self.message, self.details)


class Causes:
    """Collects what is wrong with the fields of an object."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    def required(self, field: str, why: str = "") -> None:
        self._add("FieldValueRequired", f"Required value: {why}" if why else "Required value", field)

    def invalid(self, field: str, value: Any, why: str) -> None:
        self._add("FieldValueInvalid", f"Invalid value: {_shown(value)}: {why}", field)

    def unsupported(self, field: str, value: Any, known: Iterable[str]) -> None:
        names = ", ".join(f'"{name}"' for name in known)
        self._add("FieldValueNotSupported", f"Unsupported value: {_shown(value)}: supported values: {names}", field)

    def forbidden(self, field: str, why: str) -> None:
        self._add("FieldValueForbidden", f"Forbidden: {why}", field)

    def missing(self, field: str, value: Any) -> None:
        self._add("FieldValueNotFound", f"Not found: {_shown(value)}", field)

    def duplicate(self, field: str, value: Any) -> None:
        self._add("FieldValueDuplicate", f"Duplicate value: {_shown(value)}", field)

    def too_long(self, field: str, limit: int) -> None:
        self._add("FieldValueTooLong", f"Too long: may not be more than {limit} bytes", field)

    def _add(self, reason: str, message: str, field: str) -> None:
        self.found.append({"reason": reason, "message": message, "field": field})


def status(code: int, reason: str, message: str, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        **({"reason": reason} if reason else {}),
        **({"details": dict(details)} if details else {}),
        "code": code,
    }


def not_found(resource: Resource, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{resource.qualified} "{name}" not found', _about(resource, name))


def already_exists(resource: Resource, name: str) -> ApiError:
    return ApiError(409, "AlreadyExists", f'{resource.qualified} "{name}" already exists', _about(resource, name))


def conflict(resource: Resource, name: str, why: str = "") -> ApiError:
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return ApiError(409, "Conflict", message, _about(resource, name))


def invalid(resource: Resource, name: str, causes: Causes) -> ApiError:
    lines = [f"{cause['field']}: {cause['message']}" for cause in causes.found]
    text = lines[0] if len(lines) == 1 else f"[{', '.join(lines)}]"
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    details = {"name": name, "group": resource.group, "kind": resource.kind, "causes": causes.found}
    return ApiError(422, "Invalid", f'{kind} "{name}" is invalid: {text}', {k: v for k, v in details.items() if v})


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def forbidden(resource: Resource, name: str, why: str) -> ApiError:
    what = f'{resource.qualified} "{name}"' if name else resource.qualified
    return ApiError(403, "Forbidden", f"{what} is forbidden: {why}", _about(resource, name))


def expired(message: str) -> ApiError:
    return ApiError(410, "Expired", message)


def _about(resource: Resource, name: str) -> dict[str, str]:
    found = {"name": name, "group": resource.group, "kind": resource.name}
    return {key: value for key, value in found.items() if value}


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
