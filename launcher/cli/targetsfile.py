"""Adding a target to targets.yaml as text, so that comments and order stay as their writer has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from launcher.errors import SpecError
from launcher.targets import FILE_NAME
from launcher.yamlfile import parse_yaml

__all__ = ["add_target", "target_block"]

_WIDTH = 2


def target_block(name: str, keys: Mapping[str, object], *, indent: int = _WIDTH) -> str:
    """`name:` and its keys, as they stand below `targets:`."""
    text = yaml.safe_dump({name: dict(keys)}, sort_keys=False, allow_unicode=True, indent=_WIDTH)
    return "".join(f"{' ' * indent}{line}\n" for line in text.splitlines())


def add_target(folder: Path, name: str, keys: Mapping[str, object]) -> Path:
    """Writes it into the targets.yaml of `folder` or the nearest one above it, or into a new one; returns the path.

    SpecError if the name is there, or if the file is written in a way that text can't be added to.
    """
    path = next((f / FILE_NAME for f in (folder, *folder.parents) if (f / FILE_NAME).is_file()), folder / FILE_NAME)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    content = parse_yaml(old, file=path)[0] or {}
    known = content.get("targets") or {} if isinstance(content, dict) else None
    if not isinstance(known, dict):
        raise SpecError("expected keys and values, and below `targets`, too", file=path)
    if name in known:
        raise SpecError(
            f"{name!r} is there already: choose another name, or change it by hand", file=path, key="targets"
        )
    new = _with_block(old, name, keys)
    if _parsed(new) != {**content, "targets": {**known, name: dict(keys)}}:
        raise SpecError("no target can be added to a file written like this: add the printed lines by hand", file=path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(new, encoding="utf-8")
    part.replace(path)
    return path


def _parsed(text: str) -> object:
    with contextlib.suppress(SpecError):
        return parse_yaml(text)[0]
    return None


def _with_block(old: str, name: str, keys: Mapping[str, object]) -> str:
    lines = (old if old.endswith("\n") or not old else f"{old}\n").splitlines(keepends=True)
    place = _place(old)
    if place is None:
        return "".join([*lines, *(["\n"] if lines else []), "targets:\n", target_block(name, keys)])
    at, indent = place
    while at > 0 and (not lines[at - 1].strip() or lines[at - 1].startswith("#")):
        at -= 1  # what stands above the next key belongs to that
    return "".join([*lines[:at], target_block(name, keys, indent=indent), *lines[at:]])


def _place(text: str) -> tuple[int, int] | None:
    """(line behind the last target, column of targets); None without the key."""
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = top.value if isinstance(top, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "targets" and isinstance(value, yaml.MappingNode) and value.value:
            return value.end_mark.line + (value.end_mark.column > 0), value.value[0][0].start_mark.column
        if key.value == "targets":
            return key.end_mark.line + 1, _WIDTH
    return None
