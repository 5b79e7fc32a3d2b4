"""The three forms of PATCH."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonpatch

from tests.services.kube.answers import ApiError, bad_request
from tests.services.kube.resources import Resource
from tests.services.kube.schema import merge_key

__all__ = ["patched"]

Json = dict[str, Any]

_MERGE, _JSON = "application/merge-patch+json", "application/json-patch+json"
_STRATEGIC, _APPLY = "application/strategic-merge-patch+json", "application/apply-patch+yaml"


def patched(resource: Resource, old: Json, form: str, body: bytes) -> Json:
    """ApiError 415 for a form that the resource does not take, 422 for a JSON patch that does not fit."""
    known = [_JSON, _MERGE, _APPLY] if resource.custom else [_JSON, _MERGE, _STRATEGIC, _APPLY]
    if form not in known:
        message = f"the body of the request was in an unknown format - accepted media types include: {', '.join(known)}"
        raise ApiError(415, "UnsupportedMediaType", message)
    try:
        patch = json.loads(body)
    except ValueError as error:
        raise bad_request(f"error decoding patch: {error}") from None
    if form == _JSON:
        return _json_patch(old, patch)
    if not isinstance(patch, dict):
        raise bad_request(
            "error decoding patch: json: cannot unmarshal array into Go value of type map[string]interface {}"
        )
    return _strategic(resource, old, patch, ()) if form == _STRATEGIC else _merge(old, patch)


def _json_patch(old: Json, patch: Any) -> Json:
    try:
        result: Json = jsonpatch.JsonPatch(patch).apply(copy.deepcopy(old))
    except (jsonpatch.JsonPatchTestFailed, jsonpatch.JsonPatchConflict, jsonpatch.JsonPointerException):
        message = "the server rejected our request due to an error in our request"
        raise ApiError(422, "Invalid", message) from None
    except (jsonpatch.InvalidJsonPatch, TypeError, KeyError) as error:
        raise bad_request(f"error decoding patch: {error}") from None
    return result


def _merge(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result


def _strategic(resource: Resource, old: Any, patch: Any, path: tuple[str, ...]) -> Any:
    if isinstance(patch, dict):
        result = dict(old) if isinstance(old, dict) else {}
        for key, value in patch.items():
            if value is None:
                result.pop(key, None)
            elif not key.startswith("$"):
                result[key] = _strategic(resource, result.get(key), value, (*path, key))
        return result
    name = merge_key(resource, path) if isinstance(patch, list) else None
    if name is None or not isinstance(old, list):
        return patch
    items = {item[name]: item for item in old}
    for item in patch:
        if item.get("$patch") == "delete":
            items.pop(item[name], None)
        else:
            items[item[name]] = _strategic(resource, items.get(item[name]), item, path)
    return list(items.values())
