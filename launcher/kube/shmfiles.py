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
    try:
        tree = read_tree(document.text)
        changes = {path: change for path in _objects(tree) for change in _planned(tree, path, plan, chosen)}
        return Patched(_patched_text(tree, changes), tuple(changes.values()))
    except SpecError as error:
        line = document.line + (error.line or 1)
        raise type(error)(error.message, key=error.key, file=file, line=line) from error


def _objects(tree: Tree) -> Iterator[Path]:
    """Where objects stand that have a pod: the document itself, or items of a list."""
    if tree.root is None:
        return
    if tree.word(("kind",)).endswith("List") and tree.root.has("items"):
        paths: list[Path] = [("items", i) for i in range(len(tree.find(("items",)).items))]
    else:
        paths = [()]
    yield from (path for path in paths if kind_of(_type(tree, path)))


def _type(tree: Tree, path: Path) -> Json:
    return {key: tree.word((*path, key)) for key in ("apiVersion", "kind")}


def _planned(
    tree: Tree, path: Path, plan: Callable[[Json], Change], chosen: Callable[[Json], bool]
) -> Iterator[Change]:
    """One, or none. A SpecError has the object's line in the document."""
    try:
        obj = tree.value(path)
        if chosen(obj):
            yield plan(obj)
    except SpecError as error:
        line = error.line or tree.find(path).line + 1
        raise type(error)(error.message, key=error.key, line=line) from error


def _patched_text(tree: Tree, changes: dict[Path, Change]) -> str:
    text = apply(tree.text, [Batch(path, tuple(_edits(change))) for path, change in changes.items()])
    after = read_tree(text)
    if all(after.value(path) == change.after for path, change in changes.items()):
        return text
    raise SpecError("it can't be changed in its form: write it in the usual way")


def _edits(change: Change) -> Iterator[Json]:
    """Without the test of the version, which is for a cluster."""
    return (operation for operation in change.operations if operation["op"] != "test")
