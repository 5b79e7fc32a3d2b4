"""One run's folder, put together from places that aren't ours: to be read, never to be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from launcher.errors import UnsupportedError
from launcher.stores.base import Entry, Store
from launcher.stores.paths import check_path

__all__ = ["PlacesStore"]


class PlacesStore:
    """uri: names the whole. places: folder of the run → the store that stands there; none of them inside another."""

    def __init__(self, uri: str, places: Mapping[str, Store]) -> None:
        self.uri = uri
        self._places = dict(sorted(places.items(), key=lambda place: f"{place[0]}/"))

    def head(self, path: str) -> Entry | None:
        found = self._find(path)
        entry = found[0].head(found[1]) if found else None
        return dataclasses.replace(entry, path=path) if entry else None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        wanted = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        for folder, store in self._places.items():
            if f"{folder}/".startswith(wanted):
                yield from _below(folder, store.list())
            elif wanted.startswith(f"{folder}/"):
                yield from _below(folder, store.list(wanted.removeprefix(f"{folder}/").rstrip("/")))

    def read(self, path: str) -> bytes:
        store, rest = self._get(path)
        return store.read(rest)

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        store, rest = self._get(path)
        return store.read_range(rest, start, end)

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        raise self._not_ours()

    def download(self, path: str, to: Path) -> Entry:
        store, rest = self._get(path)
        return dataclasses.replace(store.download(rest, to), path=path)

    def delete(self, paths: Iterable[str]) -> None:
        raise self._not_ours()

    def local_path(self, path: str = "") -> Path | None:
        return None

    def check_writable(self) -> None:
        raise self._not_ours()

    def _not_ours(self) -> UnsupportedError:
        return UnsupportedError(f"{self.uri} is not cvlaunch's: it is read, never changed")

    def _get(self, path: str) -> tuple[Store, str]:
        if (found := self._find(path)) is None:
            raise FileNotFoundError(f"{self.uri} has no {path}")
        return found

    def _find(self, path: str) -> tuple[Store, str] | None:
        """The store that has it, and the path there."""
        check_path(path)
        return next(
            (
                (store, path.removeprefix(f"{folder}/"))
                for folder, store in self._places.items()
                if path.startswith(f"{folder}/")
            ),
            None,
        )


def _below(folder: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    return (dataclasses.replace(entry, path=f"{folder}/{entry.path}") for entry in entries)
