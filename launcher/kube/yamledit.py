"""JSON patches on the text of YAML, where all that the patch does not touch stays to the byte.

A YAML library that reads and writes keeps comments, but neither indentation nor the form of scalars and flow style. So
the parser's marks say where a node stands in the text, and only that place is rewritten, one operation after the other.
JSON is YAML and is edited as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.errors import SpecError

__all__ = ["Batch", "Document", "Node", "Tree", "apply", "documents", "read_tree"]

_MERGE = "tag:yaml.org,2002:merge"
_ALIAS = "alias"
_LIST = "tag:yaml.org,2002:seq"
_KEYS = "tag:yaml.org,2002:map"
_MOST_NODES = 200_000
"""Of an object with its aliases written out."""
_MOST_STEPS = 1000
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]+|[0-9]+[KMGTPE]i")
_WORDS = {"yes", "no", "on", "off", "true", "false", "null"}
"""Texts that some YAML takes for something else."""


@dataclass(frozen=True, eq=False)
class Node:
    """A value and where it stands. content: a scalar's text, a list's items, or the pairs of keys.

    style: `|`, `>`, `'` or `"` of a scalar, `{` for flow style, `*` for an alias, whose `target` has the anchor.
    """

    start: int
    end: int
    line: int
    column: int
    end_column: int
    style: str
    tag: str
    content: str | tuple[Node, ...] | tuple[tuple[Node, Node], ...]
    target: Node | None = None

    @property
    def flow(self) -> bool:
        return self.style == "{"

    @property
    def real(self) -> Node:
        return self.target or self

    @property
    def text(self) -> str | None:
        """Of a scalar; None for a list or keys."""
        return self.real.content if isinstance(self.real.content, str) else None

    @property
    def items(self) -> tuple[Node, ...]:
        """Of a list."""
        return self.content if self.tag == _LIST else ()  # type: ignore[return-value]

    @property
    def pairs(self) -> tuple[tuple[Node, Node], ...]:
        """Of keys, the merges among them."""
        return self.content if self.tag == _KEYS else ()  # type: ignore[return-value]

    @property
    def own(self) -> Mapping[str, int]:
        """Key → its place in `pairs`. Of one that is given twice the last counts; one that is no word is left out."""
        return {key.text: i for i, (key, _) in enumerate(self.pairs) if key.text is not None and key.tag != _MERGE}

    @property
    def merged(self) -> Iterator[Node]:
        """What `<<` brings, the strongest first."""
        for key, value in self.pairs:
            if key.tag == _MERGE:
                yield from (one.real for one in (value.real.items or (value,)))

    def child(self, part: str | int) -> Node:
        """As it stands. LookupError."""
        if self.tag == _LIST:
            return self.items[int(part)]
        if part in self.own:
            return self.pairs[self.own[str(part)]][1]
        return next((found.child(part) for found in self.merged if found.has(part)), None) or _missing(part)

    def has(self, part: str | int) -> bool:
        try:
            return bool(self.child(part))
        except (LookupError, ValueError):
            return False

    def first(self, at: int) -> Node:
        """Where an item or a pair begins."""
        return self.pairs[at][0] if self.tag == _KEYS else self.items[at]

    def last(self, at: int) -> Node:
        """Where an item or a pair ends."""
        return self.pairs[at][1] if self.tag == _KEYS else self.items[at]

    @property
    def last_leaf(self) -> Node:
        """The end of a block has no mark of its own."""
        node = self
        while node.tag in (_LIST, _KEYS) and not node.flow and node.content:
            node = node.last(-1)
        return node


def _missing(part: str | int) -> Node:
    raise LookupError(part)


@dataclass(frozen=True)
class Document:
    """text: a document with all around it, up to the next one. line: its first, 0 is the file's first."""

    text: str
    line: int


@dataclass(frozen=True)
class Tree:
    """root: None for an empty document."""

    text: str
    root: Node | None

    def find(self, path: Sequence[str | int]) -> Node:
        """What an alias or a merge brings is found, too. LookupError."""
        if self.root is None:
            raise LookupError(path)
        node = self.root.real
        for part in path:
            node = node.child(part).real
        return node

    def value(self, path: Sequence[str | int] = ()) -> Any:
        """As JSON knows it: dates and keys are texts, aliases are written out, merges are merged."""
        return _plain(self.find(path), [_MOST_NODES])

    def word(self, path: Sequence[str | int]) -> str:
        """Empty where no scalar stands."""
        try:
            content = self.find(path).content
        except LookupError:
            content = ""
        return content if isinstance(content, str) else ""

    def aliases(self) -> Iterator[tuple[Node, Node]]:
        """Each with the node around it."""
        stack = [self.root] if self.root else []
        while stack:
            node = stack.pop()
            inner = [*node.items, *(part for pair in node.pairs for part in pair)]
            yield from ((one, node) for one in inner if one.target is not None)
            stack += inner


@dataclass(frozen=True)
class Batch:
    """operations: `add`, `replace` and `remove` of RFC 6902, on the object at `path`; `add` to a list appends."""

    path: tuple[str | int, ...]
    operations: tuple[dict[str, Any], ...]


def documents(text: str) -> list[Document]:
    """All documents of a file; their texts joined are the file's. SpecError for what is not YAML."""
    with _readable():
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        marks: list[Any] = [event.start_mark for event in events if isinstance(event, yaml.DocumentStartEvent)]
    starts = [0, *(mark.index - mark.column for mark in marks[1:])]
    ends = [*starts[1:], len(text)]
    return [
        Document(text[start:end], text.count("\n", 0, start)) for start, end in zip(starts, ends, strict=True) if end
    ]


def read_tree(text: str) -> Tree:
    """Of one document. SpecError for what is not YAML."""
    with _readable():
        return _Composer(text).tree()


def apply(text: str, batches: Sequence[Batch]) -> str:
    """The text of one document with its objects patched. SpecError where that is not possible in its form."""
    pending = [(batch, 0) for batch in batches if batch.operations]
    for _ in range(_MOST_STEPS):
        if not pending:
            return text
        text, pending = _step(text, pending)
    raise SpecError("it can't be changed in its form: write out its anchors and aliases")


def _step(text: str, pending: list[tuple[Batch, int]]) -> tuple[str, list[tuple[Batch, int]]]:
    """One operation of each batch, as far as they don't meet in the text."""
    tree = read_tree(text)
    site = _Site(tree, tuple(tree.aliases()))
    edits: list[_Edit] = []
    later: list[tuple[Batch, int]] = []
    for batch, at in pending:
        try:
            found, done = site.edits(batch, batch.operations[at])
        except (LookupError, ValueError) as error:
            raise SpecError("it can't be changed in its form: write its keys in the usual way") from error
        if any(edit.meets(other) for edit in found for other in edits):
            later.append((batch, at))
            continue
        edits += found
        at += done
        if at < len(batch.operations):
            later.append((batch, at))
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text, later


@dataclass(frozen=True)
class _Edit:
    """Characters from `start` to before `end` become `text`."""

    start: int
    end: int
    text: str

    def meets(self, other: _Edit) -> bool:
        return self.start <= other.end and other.start <= self.end


class _readable:  # noqa: N801 - a context manager
    """What PyYAML raises becomes a SpecError with its line, 1 is the first."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, yaml.MarkedYAMLError):
            mark = error.problem_mark or error.context_mark
            raise SpecError(f"not YAML: {error.problem}", line=mark.line + 1 if mark else None) from error
        if isinstance(error, yaml.YAMLError):
            raise SpecError(f"not YAML: {str(error).splitlines()[0]}") from error
        if isinstance(error, RecursionError):
            raise SpecError("nested too deep") from error


# -- nodes


class _Composer:
    """Builds the tree from the parser's events."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchors: dict[str, Node] = {}
        self._resolver = yaml.SafeLoader("")

    def tree(self) -> Tree:
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                root = self._node(next(self._events))
                return Tree(self._text, root)
        return Tree(self._text, None)

    def _node(self, event: yaml.Event) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if isinstance(event, yaml.ScalarEvent):
            node = self._made(event, event, style=event.style or "", tag=self._tag(event), content=event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            items, end = self._until_end()
            node = self._made(event, end, style="{" if event.flow_style else "", tag=_LIST, content=tuple(items))
        else:
            parts, end = self._until_end()
            pairs = tuple(zip(parts[::2], parts[1::2], strict=True))
            style = "{" if getattr(event, "flow_style", False) else ""
            node = self._made(event, end, style=style, tag=_KEYS, content=pairs)
        if anchor := getattr(event, "anchor", None):
            self._anchors[anchor] = node
        return node

    def _until_end(self) -> tuple[list[Node], yaml.Event]:
        nodes: list[Node] = []
        for event in self._events:
            if isinstance(event, yaml.CollectionEndEvent):
                return nodes, event
            nodes.append(self._node(event))
        raise LookupError

    def _alias(self, event: Any) -> Node:
        target = self._anchors.get(event.anchor)
        if target is None:
            raise SpecError(f"no anchor &{event.anchor} stands before its alias", line=event.start_mark.line + 1)
        return self._made(event, event, style="*", tag=_ALIAS, content="", target=target)

    def _made(self, first: Any, last: Any, **what: Any) -> Node:
        start, end = first.start_mark, last.end_mark
        return Node(start.index, end.index, start.line, self._column(first), end.column, **what)

    def _column(self, event: Any) -> int:
        """Of a block's keys or dashes, which stand behind or below an anchor."""
        if not isinstance(event, yaml.CollectionStartEvent) or event.flow_style:
            return int(event.start_mark.column)
        inner: Any = event.end_mark
        behind_dash = isinstance(event, yaml.SequenceStartEvent) and self._text[inner.index] != "-"
        return int(inner.column) - behind_dash

    def _tag(self, event: yaml.ScalarEvent) -> str:
        if event.tag is not None and event.tag != "!":
            return str(event.tag)
        return str(self._resolver.resolve(yaml.ScalarNode, event.value, event.implicit))  # type: ignore[no-untyped-call]


def _plain(node: Node, left: list[int]) -> Any:
    """left: how many values it may still have, in a list of one."""
    left[0] -= 1
    if left[0] < 0:
        raise SpecError(f"its aliases expand to more than {_MOST_NODES} values")
    node = node.real
    if node.tag == _LIST:
        return [_plain(item, left) for item in node.items]
    if node.tag == _KEYS:
        brought: dict[str, Any] = {}
        for found in node.merged:
            brought = _plain(found, left) | brought if found.tag == _KEYS else brought
        return brought | {key: _plain(node.pairs[at][1], left) for key, at in node.own.items()}
    return _scalar(node)


def _scalar(node: Node) -> Any:
    text = node.text or ""
    made = yaml.ScalarNode(node.tag, text)
    try:
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return yaml.SafeLoader.bool_values[text.lower()]
            case "int":
                return yaml.SafeLoader("").construct_yaml_int(made)
            case "float":
                return yaml.SafeLoader("").construct_yaml_float(made)
    except (LookupError, ValueError):
        pass
    return text


# -- places in the text


@dataclass(frozen=True)
class _Site:
    """A tree that is about to be edited, with its aliases and the nodes around them."""

    tree: Tree
    aliases: tuple[tuple[Node, Node], ...]

    def edits(self, batch: Batch, operation: dict[str, Any]) -> tuple[list[_Edit], bool]:
        """What to rewrite, and whether that does the operation or only clears its way."""
        path = (*batch.path, *_parts(operation["path"]))
        clearing = self._clearing(path)
        if clearing:
            return clearing, False
        parent = self.tree.find(path[:-1])
        if operation["op"] == "remove":
            return [self._remove(parent, path)], True
        if parent.tag == _LIST:
            return [self._append(parent, path, operation["value"])], True
        return [self._put(parent, path, operation["value"])], True

    def _clearing(self, path: Sequence[str | int]) -> list[_Edit]:
        """Aliases and merges on the way to what changes become copies, so that nothing else changes with it."""
        node = self.tree.root or _missing("")
        for at, part in enumerate(path):
            found = self._aliases_of(node)
            if found or part == "-" or (at == len(path) - 1 and not node.has(part)):
                return found
            if node.tag == _KEYS and part not in node.own:
                return [self._put_new(node, str(part), self.tree.value(path[: at + 1]))]
            child = node.child(part)
            if child.target is not None:
                return [self._written_out(child, node)]
            node = child
        return self._aliases_of(node)

    def _aliases_of(self, node: Node) -> list[_Edit]:
        return [self._written_out(alias, parent) for alias, parent in self.aliases if alias.target is node]

    def _written_out(self, alias: Node, parent: Node) -> _Edit:
        value = _plain(alias, [_MOST_NODES])
        if not parent.flow and value and isinstance(value, dict | list):
            return self._replace_by_block(alias, parent, value)
        return _Edit(alias.start, alias.end, self._flow(value))

    def _flow(self, value: Any, style: str = "") -> str:
        """On one line; as JSON where the document is JSON."""
        root = self.tree.root
        json_like = bool(root and root.flow and root.content and root.first(0).style == '"')
        return _flow(value, style=style, json_like=json_like)

    @property
    def _newline(self) -> str:
        return "\r\n" if "\r\n" in self.tree.text else "\n"

    # keys

    def _put(self, parent: Node, path: Sequence[str | int], value: Any) -> _Edit:
        name = str(path[-1])
        if name not in parent.own:
            return self._filled(parent, path, {name: value}) or self._put_new(parent, name, value)
        old = parent.child(name)
        if not parent.flow and value and isinstance(value, dict | list):
            return self._replace_by_block(old, parent, value)
        space = " " if old.start == old.end else ""
        return _Edit(old.start, old.end, space + self._flow(value, old.style))

    def _put_new(self, parent: Node, name: str, value: Any) -> _Edit:
        if parent.flow:
            return self._put_in_flow(parent, self._flow({name: value})[1:-1])
        return self._insert_lines(parent, _block({name: value}))

    def _filled(self, node: Node, path: Sequence[str | int], value: Any) -> _Edit | None:
        """`volumes: []` becomes a block, where what stands around it is one."""
        around = self.tree.find(path[:-2]) if len(path) > 1 else None
        if node.content or around is None or around.flow:
            return None
        return self._replace_by_block(node, around, value)

    def _replace_by_block(self, old: Node, parent: Node, value: Any) -> _Edit:
        lines, start = _block(value), old.start
        if parent.tag == _LIST:
            return _Edit(start, old.end, self._lines(lines, old.column).strip())
        while self.tree.text[start - 1] == " ":
            start -= 1
        line_end = len(self.tree.text[: old.end] + self.tree.text[old.end :].partition("\n")[0].rstrip("\r"))
        comment = self.tree.text[old.end : line_end]
        return _Edit(start, line_end, comment + self._newline + self._lines(lines, parent.column + 2).rstrip())

    # lists

    def _append(self, parent: Node, path: Sequence[str | int], value: Any) -> _Edit:
        filled = self._filled(parent, path, [value])
        if filled:
            return filled
        if parent.flow:
            return self._put_in_flow(parent, self._flow(value))
        lines = [f"- {self._flow(value)}"] if parent.items[-1].real.flow else _block([value])
        return self._insert_lines(parent, lines)

    def _put_in_flow(self, parent: Node, text: str) -> _Edit:
        """At the end, on a line of its own where the others have one."""
        if not parent.content:
            return _Edit(parent.start + 1, parent.start + 1, text)
        first, end = parent.first(0), parent.last(-1).end
        space = self._newline + " " * first.column if first.line > parent.line else " "
        return _Edit(end, end, f",{space}{text}")

    def _insert_lines(self, parent: Node, lines: Sequence[str]) -> _Edit:
        """Below the last line of a block."""
        at = self._below(parent)
        open_line = at > 0 and self.tree.text[at - 1] != "\n"
        return _Edit(at, at, (self._newline if open_line else "") + self._lines(lines, parent.column))

    def _lines(self, lines: Sequence[str], column: int) -> str:
        return "".join(f"{' ' * column}{line}{self._newline}" for line in lines)

    def _below(self, node: Node) -> int:
        """The beginning of the line after the node's last one, or the end of the text."""
        leaf = node.last_leaf
        if leaf.style in ("|", ">"):
            return leaf.end - leaf.end_column
        end = self.tree.text.find("\n", leaf.end)
        return len(self.tree.text) if end < 0 else end + 1

    # removing

    def _remove(self, parent: Node, path: Sequence[str | int]) -> _Edit:
        at = int(path[-1]) if parent.tag == _LIST else parent.own[str(path[-1])]
        if parent.flow:
            return self._remove_from_flow(parent, at)
        if len(parent.content) == 1:
            return self._emptied(parent, path)
        begin = self._dash(parent, at) if parent.tag == _LIST else parent.first(at).start
        line_start = self.tree.text.rfind("\n", 0, begin) + 1
        if self.tree.text[line_start:begin].strip():
            return self._remove_behind_dash(begin, self._below(parent.last(at)), parent.first(at + 1).start)
        return _Edit(line_start, self._below(parent.last(at)), "")

    def _remove_behind_dash(self, begin: int, below: int, following: int) -> _Edit:
        """The next key moves up, unless a comment stands before it. below: the beginning of the next line."""
        if not self.tree.text[below:following].strip():
            return _Edit(begin, following, "")
        return _Edit(begin, below - len(self._newline), "")

    def _remove_from_flow(self, parent: Node, at: int) -> _Edit:
        first, last = parent.first(at), parent.last(at)
        if at + 1 < len(parent.content):
            return _Edit(first.start, parent.first(at + 1).start, "")
        return _Edit(parent.last(at - 1).end if at else first.start, last.end, "")

    def _emptied(self, node: Node, path: Sequence[str | int]) -> _Edit:
        empty = "[]" if node.tag == _LIST else "{}"
        end, around = node.last_leaf.end, self.tree.find(path[:-2])
        if around.tag == _LIST:
            return _Edit(node.start, end, empty)
        start = around.first(around.own[str(path[-2])]).end
        behind_key = self.tree.text[start + 1 : end].partition("\n")[0].rstrip()
        comment = behind_key if behind_key.lstrip().startswith("#") else ""
        return _Edit(start, end, f": {empty}{comment}")

    def _dash(self, parent: Node, at: int) -> int:
        """Where the dash of an item stands: on its line, or above it."""
        line_start = self.tree.text.rfind("\n", 0, parent.items[at].start) + 1
        while self.tree.text[line_start + parent.column] != "-":
            line_start = self.tree.text.rindex("\n", 0, line_start - 1) + 1
        return line_start + parent.column


def _parts(pointer: str) -> Iterator[str]:
    """RFC 6901."""
    return (part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:])


# -- new text


def _block(value: Any) -> list[str]:
    """Lines of a list or of keys, in block style with lists as kubectl prints them."""
    if isinstance(value, list):
        return [line for item in value for line in _item(item)]
    return [line for key, inner in value.items() for line in _pair(str(key), inner)]


def _item(value: Any) -> list[str]:
    first, *others = _block(value) if isinstance(value, dict | list) and value else [_flow(value)]
    return [f"- {first}", *(f"  {line}" for line in others)]


def _pair(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict | list) or not value:
        return [f"{_text(key)}: {_flow(value)}"]
    indent = "" if isinstance(value, list) else "  "
    return [f"{_text(key)}:", *(f"{indent}{line}" for line in _block(value))]


def _flow(value: Any, *, style: str = "", json_like: bool = False) -> str:
    """On one line. style: of the scalar whose place it takes."""
    if json_like:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(key))}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _text(value, style) if isinstance(value, str) else json.dumps(value)


def _text(value: str, style: str = "") -> str:
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    if plain and style not in ("'", '"'):
        return value
    if style == '"' or not value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    return "'" + value.replace("'", "''") + "'"
