"""Files of manifests: each object in them patched, and all the rest left to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import SpecError
from launcher.kube.podspecs import kind_of
from launcher.kube.yamledit import Batch, Document, Tree, apply, documents, read_tree

if TYPE_CHECKING:
    from launcher.kube.shmpatch import Change

__all__ = ["Patched", "patch_text"]

Json = dict[str, Any]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Patched:
    """changes: of each object that was looked at, in the file's order."""

    text: str
    changes: tuple[Change, ...]


def patch_text(
    text: str,
    plan: Callable[[Json], Change],
    *,
    file: str = "",
    chosen: Callable[[Json], bool] = lambda obj: True,
) -> Patched:
    """A file of YAML or JSON with any number of documents, and lists in them.

    plan: says what to change; it is asked about objects of the kinds that have a pod, those that are `chosen`. Other
    objects pass. Raises SpecError, with file and line, also for what `plan` raises.
    """
    try:
        found = documents(text)
    except SpecError as error:
        helm = "; a template of Helm must be rendered first" if "{{" in text else ""
        raise SpecError(error.message + helm, file=file, line=error.line) from error
    parts = [_patch_document(document, plan, chosen, file) for document in found]
    return Patched("".join(part.text for part in parts), tuple(change for part in parts for change in part.changes))


def _patch_document(
    document: Document, plan: Callable[[Json], Change], chosen: Callable[[Json], bool], file: str
) -> Patched:
    tree = read_tree(document.text)
    changes: dict[Path, Change] = {}
    for path in _objects(tree):
        line = document.line + tree.find(path).line + 1
        try:
            obj = tree.value(path)
            if kind_of(obj) and chosen(obj):
                changes[path] = plan(obj)
        except SpecError as error:
            raise type(error)(error.message, key=error.key, file=file, line=line) from error
    return Patched(_patched_text(tree, changes, document.line, file), tuple(changes.values()))


def _objects(tree: Tree) -> Iterator[Path]:
    """Where objects stand that may be of use: the document itself, or the items of a list."""
    if tree.root is None:
        return
    kind = _word(tree, "kind")
    if not kind.endswith("List"):
        yield ()
        return
    items = tree.find(("items",)).items if tree.root.has("items") else ()
    yield from (("items", i) for i in range(len(items)))


def _word(tree: Tree, key: str) -> str:
    """Of the document; empty if it is none."""
    return tree.find((key,)).text if tree.root and tree.root.has(key) else ""


def _patched_text(tree: Tree, changes: dict[Path, Change], line: int, file: str) -> str:
    batches = [Batch(path, tuple(_edits(change))) for path, change in changes.items()]
    try:
        text = apply(tree.text, batches)
        after = read_tree(text)
        if all(after.value(path) == change.after for path, change in changes.items()):
            return text
    except SpecError as error:
        raise SpecError(error.message, file=file, line=line + 1) from error
    raise SpecError("it can't be changed in its form: write it in the usual way", file=file, line=line + 1)


def _edits(change: Change) -> Iterator[Json]:
    """Without the test of the version, which is for a cluster."""
    return (operation for operation in change.operations if operation["op"] != "test")
