"""YAML files read with the line of every key, and defended against what YAML allows but nobody means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import SpecError

__all__ = ["Document", "KeyPath", "parse_yaml", "read_yaml", "with_value"]

KeyPath = tuple[str | int, ...]

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 50
_MAX_NODES = 50_000
_MAX_DIGITS = 100
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""`"\\ud800"` is YAML, but has no UTF-8."""
_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_INTEGER = "tag:yaml.org,2002:int"


@dataclass(frozen=True)
class Document:
    """A mapping read from `file`. lines: key path → line number, 1 is the first."""

    file: Path
    content: Mapping[str, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def line(self, path: KeyPath) -> int | None:
        """The line of the key, or of the nearest key around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read_yaml(path: Path) -> Document:
    """Reads one mapping. SpecError for anything else: binary, broken, too large, too deep, aliases that explode."""
    content, lines = parse_yaml(_read_text(path), file=path)
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise SpecError(f"expected keys and values, found {found}", file=path)
    return Document(path, content, lines)


def parse_yaml(text: str, *, file: Path | None = None) -> tuple[Any, dict[KeyPath, int]]:
    """The value of one YAML document and the lines of its keys. SpecError for what `read_yaml` refuses."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(node, file)) if node else {}
        return yaml.load(text, Loader=yaml.SafeLoader), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SpecError(f"not YAML: {error.problem}", file=file, line=mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        raise SpecError(f"not YAML: {str(error).splitlines()[0]}", file=file) from error
    except RecursionError:
        raise SpecError(f"nested more than {_MAX_DEPTH} levels deep", file=file) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What PyYAML's constructors raise on the date 2026-99-99, on `!!bool maybe` and on `!!int ''`.
        raise SpecError(f"not YAML: a value that is not what its tag or form promises ({error})", file=file) from error


def with_value(content: Mapping[str, Any], keys: KeyPath, value: Any) -> dict[str, Any]:
    """A copy with the value set at a key; what stands in its way and has no keys is replaced."""
    first, rest = str(keys[0]), keys[1:]
    if not rest:
        return {**content, first: value}
    below = content.get(first)
    return {**content, first: with_value(below if isinstance(below, Mapping) else {}, rest, value)}


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else None
    except FileNotFoundError:
        raise SpecError("no such file", file=path) from None
    except OSError as error:
        raise SpecError(f"can't be read: {error.strerror}", file=path) from error
    if data is None:
        raise SpecError(f"larger than {_MAX_BYTES >> 20} MiB, which no job file is", file=path)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SpecError("not a text file (UTF-8)", file=path) from None


def _lines(root: yaml.Node, file: Path | None) -> Iterator[tuple[KeyPath, int]]:
    """Walks aliases as often as they are used, so that a bomb is met here, before anything is built from it."""
    count = 0
    stack: list[tuple[KeyPath, yaml.Node]] = [((), root)]
    while stack:
        path, node = stack.pop()
        count += 1
        line = node.start_mark.line + 1
        if len(path) > _MAX_DEPTH:
            raise SpecError(f"nested more than {_MAX_DEPTH} levels deep", file=file, line=line)
        if count > _MAX_NODES:
            raise SpecError(f"its aliases expand to more than {_MAX_NODES} values", file=file)
        if isinstance(node, yaml.MappingNode):
            yield from _keys(path, node, file)
            stack += [((*path, str(key.value)), value) for key, value in reversed(node.value)]
        elif isinstance(node, yaml.SequenceNode):
            stack += [((*path, i), value) for i, value in reversed([*enumerate(node.value)])]
            yield from (((*path, i), value.start_mark.line + 1) for i, value in enumerate(node.value))
        elif node.tag == _INTEGER and len(node.value) > _MAX_DIGITS:
            raise SpecError(f"a number of {len(node.value)} digits", file=file, line=line, key=_dotted(path))
        elif _HALF_CHARACTER.search(node.value):
            raise SpecError(
                "holds half a character, which no file or name can", file=file, line=line, key=_dotted(path)
            )


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _keys(path: KeyPath, node: yaml.MappingNode, file: Path | None) -> Iterator[tuple[KeyPath, int]]:
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise SpecError("a key must be a word", file=file, line=line)
        if key.tag not in (_TEXT, _MERGE):  # 1, null, and in YAML 1.1 also on, off, yes and no
            raise SpecError(
                f"YAML takes the key {key.value!r} for something else than text; quote it", file=file, line=line
            )
        if _HALF_CHARACTER.search(key.value):
            raise SpecError("a key holds half a character", file=file, line=line)
        if key.value in seen and key.tag != _MERGE:
            raise SpecError("given twice", file=file, line=line, key=_dotted((*path, key.value)))
        seen.add(key.value)
        yield (*path, str(key.value)), line
