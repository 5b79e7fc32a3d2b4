"""Places to run jobs: targets.yaml of the project, then of the user, then the built-in one of each backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from launcher import paths
from launcher.backends import load_backend, names
from launcher.backends.base import Backend, BaseTarget
from launcher.errors import SpecError, nearest
from launcher.jobfile import validate
from launcher.stores import Store, open_store
from launcher.yamlfile import Document, KeyPath, parse_yaml, read_yaml, with_value

__all__ = ["FILE_NAME", "Selected", "Targets", "load_targets"]

FILE_NAME = "targets.yaml"
_PREFIX = "CVLAUNCH_TARGETS__"
_DATASET_PREFIX = "CVLAUNCH_DATASETS__"


class _File(BaseModel):
    """targets.yaml; each target is checked by its own backend's model when it is used."""

    model_config = ConfigDict(extra="forbid")

    default: str | None = Field(None, description="target used when neither --target nor --backend is given")
    datasets: dict[str, dict[str, str]] = Field(default_factory=dict, description="name → target or default → place")
    targets: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """A target that was chosen, and the backend that it is for."""

    name: str
    target: BaseTarget
    backend: type[Backend]
    folder: Path
    """Relative paths of the target start here."""

    def open(self) -> Backend:
        return self.backend(self.target, self.name)

    def store(self, uri: str) -> Store:
        """As this target reaches it: with its endpoint, region and profile, and also where it alone can."""
        return self.open().store(uri) or open_store(uri, self.target.storage.options)


@dataclass(frozen=True)
class _Entry:
    """variables: key path in the target → variable of the environment that its value came from."""

    content: Mapping[str, Any]
    document: Document | None
    variables: Mapping[KeyPath, str] = field(default_factory=dict)

    def overridden(self, keys: KeyPath, variable: str, value: Any) -> _Entry:
        return _Entry(with_value(self.content, keys, value), self.document, {**self.variables, keys: variable})


@dataclass(frozen=True)
class Targets:
    """All targets there are. datasets: name → target name or `default` → place."""

    entries: Mapping[str, _Entry] = field(default_factory=dict)
    datasets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    default: str = "local"

    def names(self) -> list[str]:
        return sorted({*self.entries, *names()})

    def source(self, name: str) -> str:
        """Where a target is defined, for people: `FILE:LINE`, or that it is built in."""
        entry = self.entries.get(name)
        if entry is None:
            return "built in"
        if entry.document is None:
            return "the environment"
        line = entry.document.line(("targets", name))
        return f"{entry.document.file}:{line}" if line else str(entry.document.file)

    def select(self, *, target: str | None = None, backend: str | None = None) -> Selected:
        """By name; or the one target of a backend; or the default. SpecError lists what there is."""
        if target is not None:
            selected = self._named(target)
            if backend is not None and selected.target.backend != backend:
                raise SpecError(f"target {target!r} is of backend {selected.target.backend!r}, not {backend!r}")
            return selected
        return self._of_backend(backend) if backend is not None else self._named(self.default)

    def _named(self, name: str) -> Selected:
        entry = self.entries.get(name)
        if entry is None:
            if name not in names():
                known = self.names()
                raise SpecError(
                    f"unknown target {name!r}; there are {', '.join(known)}{nearest(name, known)}", key="--target"
                )
            entry = _Entry({"backend": name}, None)
        return _checked(name, entry)

    def _of_backend(self, backend: str) -> Selected:
        load_backend(backend)
        matching = sorted(n for n, e in self.entries.items() if e.content.get("backend") == backend)
        if len(matching) > 1:
            raise SpecError(
                f"{len(matching)} targets are of backend {backend!r}: {', '.join(matching)}; choose one with --target",
                key="--backend",
            )
        return self._named(matching[0] if matching else backend)

    def placed(self, error: SpecError, name: str) -> SpecError:
        """An error that names a key of this target, with the place where the key is written."""
        entry = self.entries.get(name)
        if entry is None or entry.document is None or error.key is None:
            return error
        keys = ("targets", name, *error.key.split("."))
        document = entry.document
        placed = type(error)(error.message, file=document.file, line=document.line(keys), key=".".join(keys))
        return _blamed(placed, name, entry).with_traceback(error.__traceback__)

    def place_of(self, dataset: str, target: str) -> str:
        """Where a dataset is for a target. SpecError if it is nowhere that this target knows."""
        places = self.datasets[dataset]
        place = places.get(target) or places.get("default")
        if place is None:
            raise SpecError(
                f"dataset {dataset!r} has no place for target {target!r}; it has {', '.join(places) or 'none'}; "
                f"add `{target}:` or `default:` in {FILE_NAME}"
            )
        return place


def load_targets(folder: Path, environ: Mapping[str, str] | None = None) -> Targets:
    """From `folder` or the nearest folder above it, then the user's; a name in the first hides the second's."""
    found = [
        path for path in (_above(folder), paths.config_folder() / FILE_NAME) if path is not None and path.is_file()
    ]
    files = [(document, validate(_File, document)) for document in map(read_yaml, found)]
    entries: dict[str, _Entry] = {}
    datasets: dict[str, Mapping[str, str]] = {}
    for document, file in reversed(files):
        entries |= {name: _Entry(content, document) for name, content in file.targets.items()}
        datasets |= file.datasets
    environ = os.environ if environ is None else environ
    for variable, name, keys in _overrides(environ, _PREFIX, lambda: [*entries, *names()]):
        old = entries.get(name, _Entry({"backend": name}, None))
        entries[name] = old.overridden(keys, variable, _value_of(variable, environ[variable]))
    for variable, name, keys in _overrides(environ, _DATASET_PREFIX, lambda: list(datasets)):
        if len(keys) > 1:
            raise SpecError(f"expected {_DATASET_PREFIX}NAME__TARGET", key=variable)
        datasets[name] = {**datasets.get(name, {}), str(keys[0]): environ[variable]}
    default = next((file.default for _, file in files if file.default), "local")
    return Targets(entries, datasets, default)


def _above(folder: Path) -> Path | None:
    folder = folder.absolute()
    return next((f / FILE_NAME for f in (folder, *folder.parents) if (f / FILE_NAME).is_file()), None)


def _overrides(
    environ: Mapping[str, str], prefix: str, known: Callable[[], Sequence[str]]
) -> Iterator[tuple[str, str, KeyPath]]:
    """The variable `CVLAUNCH_TARGETS__HPC__PARTITION` → (it, "hpc", ("partition",)).

    known: names, asked for where there is such a variable: plug-ins are looked for in every package that is installed.
    """
    for variable in sorted(environ):
        if not variable.startswith(prefix):
            continue
        name, *keys = variable.removeprefix(prefix).lower().split("__")
        if not name or not keys or not all(keys):
            raise SpecError(f"expected {prefix}NAME__KEY", key=variable)
        real = next((k for k in known() if k.lower().replace("-", "_") == name.replace("-", "_")), name)
        yield variable, real, tuple(keys)


def _value_of(variable: str, written: str) -> Any:
    """Read as YAML, like the same words in targets.yaml."""
    try:
        return parse_yaml(written)[0]
    except SpecError as error:
        raise SpecError(f"its value can't be read; quote it ({error.message})", key=variable) from None


def _checked(name: str, entry: _Entry) -> Selected:
    document = entry.document or Document(Path(f"the built-in target {name}"), {})
    folder = entry.document.file.absolute().parent if entry.document else Path.cwd()
    backend_name = entry.content.get("backend")
    if not isinstance(backend_name, str):
        raise SpecError(
            f"the backend is missing; there are {', '.join(names())}",
            file=document.file,
            line=document.line(("targets", name)),
            key=f"targets.{name}.backend",
        )
    try:
        backend = load_backend(backend_name)
        target = validate(backend.Target, document, at=("targets", name), content=entry.content)
    except SpecError as error:
        raise _blamed(error, name, entry) from None
    return Selected(name, target, backend, folder)


def _blamed(error: SpecError, name: str, entry: _Entry) -> SpecError:
    """The same error at the variable that the value came from, if one gave it, not at a line of a file."""
    place = f"{(error.key or '').removeprefix(f'targets.{name}.')}."
    for keys, variable in entry.variables.items():
        if place.startswith(".".join(map(str, keys)) + "."):
            return type(error)(error.message, key=variable)
    return error
