"""From what the user wants to a complete, frozen Job. The only step before submit that does I/O."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from launcher import manifest, shm
from launcher._version import __version__
from launcher.backends.base import Backend, Feature, Image, Job, disk_for_data, features_missing
from launcher.code import build_archive
from launcher.contract import WEIGHTS_CHANNEL, Channel, Code
from launcher.dataset import check_channel
from launcher.digest import job_digest
from launcher.errors import SpecError, UnsupportedError, nearest
from launcher.gpus import OLD_WORDS, is_old
from launcher.image import NAME as TRAINER
from launcher.image import Wanted, pin
from launcher.ledger import Ledger
from launcher.plan import transport_of
from launcher.quantities import format_size
from launcher.spec import JobSpec
from launcher.stores import file_uri, is_uri, join_uri, open_store, path_of, scheme
from launcher.sync import newest_model
from launcher.targets import Selected, Targets

__all__ = ["digest_of", "resolve", "train_of"]

_RUN_URI = "run://"
_TARGET_PATH = "target:"


def resolve(
    spec: JobSpec,
    selected: Selected,
    *,
    folder: Path,
    targets: Targets,
    scratch: Path,
    ledger: Ledger,
    online: bool = True,
    make: Callable[[str], None] | None = None,
) -> Job:
    """folder: what relative paths of the job start from. scratch: gets the code archive.

    online: read manifests from stores; otherwise what is not on this machine stays as written, with a warning.
    make: builds, pulls and pushes the image where that is missing, and gets the lines of the engine that does it;
    None: the image is looked for on this machine, and nothing is made.
    """
    backend = selected.open()
    _check_features(spec, backend)
    output = _output(spec, selected, backend, folder=folder)
    resolver = _Resolver(spec, selected, backend, folder, targets, ledger, output, online)
    places = dict(spec.data)
    if spec.train and spec.train.init:
        places[WEIGHTS_CHANNEL] = spec.train.init
    channels = tuple(resolver.channel(name, place) for name, place in sorted(places.items()))
    code, archive = _code(spec, folder, scratch)
    shm_bytes, shm_warnings = _shm(spec, backend)
    image = _image(spec, selected, backend, folder=folder, make=make)
    return Job(
        spec=spec,
        target_name=selected.name,
        target=selected.target,
        output=output,
        channels=channels,
        image=image,
        code=code,
        code_archive=archive,
        train=train_of(spec),
        command=spec.command,
        digest=digest_of(spec, channels=channels, code=code, image=image),
        shm=shm_bytes,
        disk=_disk(spec, channels),
        storage=selected.target.storage.options.portable().to_mapping(),
        unpinned=(*resolver.unpinned(channels), *_unpinned(spec, image, code)),
        warnings=(*_ignored(spec, backend), *_old_gpus(spec, backend), *shm_warnings, *resolver.warnings),
        version=__version__,
    )


def digest_of(spec: JobSpec, *, channels: Iterable[Channel], code: Code | None, image: Image | None) -> str:
    """The job digest of a resolved job."""
    return job_digest(
        command=spec.command,
        train=train_of(spec),
        env=spec.env,
        secrets=spec.secrets,
        channels=channels,
        code=code,
        image=image.config_digest if image else None,
        nodes=spec.resources.nodes,
        gpus=spec.resources.gpus,
        processes=spec.resources.processes_per_node,
    )


def _check_features(spec: JobSpec, backend: Backend) -> None:
    resources = spec.resources
    wanted = {
        Feature.GPUS: ("resources.gpus", resources.gpus > 0),
        Feature.MULTI_NODE: ("resources.nodes", resources.nodes > 1),
        Feature.SHM: ("resources.shm", resources.shm != "auto"),
        Feature.SPOT: ("resources.spot", resources.spot),
        Feature.RESTART: ("resources.spot", resources.spot),
        Feature.MAX_WAIT: ("resources.max_wait", resources.max_wait is not None),
        Feature.SECRETS_CLIENT: ("secrets", any(not r.startswith("store:") for r in spec.secrets.values())),
        Feature.SECRETS_STORE: ("secrets", any(r.startswith("store:") for r in spec.secrets.values())),
        Feature.CONTAINER: ("runner", spec.runner == "none"),
    }
    for feature, reason in features_missing(type(backend), [f for f, (_, asked) in wanted.items() if asked]):
        raise UnsupportedError(f"the {backend.name} backend has no {feature}: {reason}", key=wanted[feature][0])
    if backend.rules.container and not (spec.image or spec.build):
        raise SpecError(
            f"the {backend.name} backend runs containers; give image or build; cvlaunch-trainer is the image "
            "of the built-in trainer",
            key="image",
        )
    foreign = sorted(set(spec.native) - {backend.name})
    if foreign:
        raise UnsupportedError(
            f"the job has native settings of {', '.join(foreign)}, so it can't go to {backend.name}",
            key="native",
        )


def _ignored(spec: JobSpec, backend: Backend) -> Iterator[str]:
    """What the user wrote, and the backend does nothing with."""
    for key, reason in backend.ignored.items():
        if _is_written(spec, key):
            yield f"{key} has no effect on the {backend.name} backend: {reason}"


def _old_gpus(spec: JobSpec, backend: Backend) -> Iterator[str]:
    """Acceptable ones that would end a training. What is built from a folder brings a torch of its own."""
    if spec.train and backend.rules.container and not spec.build and "resources.gpu" not in backend.ignored:
        yield from (f"resources.gpu: {model} is {OLD_WORDS}" for model in spec.resources.gpu if is_old(model))


def _is_written(spec: JobSpec, key: str) -> bool:
    """Whether the job says something else there than the default."""
    *path, last = key.split(".")
    model: BaseModel = functools.reduce(getattr, path, spec)
    return bool(getattr(model, last) != type(model).model_fields[last].default)


def _output(spec: JobSpec, selected: Selected, backend: Backend, *, folder: Path) -> str:
    """A relative folder starts where it is written: at the job file's, or at that of targets.yaml.

    On another machine only an absolute path says which one is meant.
    """
    written, start = (spec.output, folder) if spec.output else (selected.target.output, selected.folder)
    written = written or backend.placeholders.get("output")
    if not written:
        raise SpecError(
            f"target {selected.name!r} doesn't say where runs are kept; add output: s3://bucket/prefix", key="output"
        )
    if is_uri(written):
        transport_of(backend, written)
        return written.rstrip("/")
    if reached_by := selected.target.reached_by:
        if not written.startswith("/"):
            raise SpecError(f"{written!r} is not an absolute path on {reached_by}; write one", key="output")
        return f"{reached_by}{written.rstrip('/')}"
    return file_uri((start / Path(written).expanduser()).absolute())


def train_of(spec: JobSpec) -> dict[str, Any] | None:
    """With defaults filled in; where weights come from is a channel, so that it counts by content."""
    if spec.train is None:
        return None
    return {
        **spec.train.model_dump(mode="json", exclude={"init"}),
        "init": WEIGHTS_CHANNEL if spec.train.init else None,
    }


def _code(spec: JobSpec, folder: Path, scratch: Path) -> tuple[Code | None, str | None]:
    if spec.code is None:
        return None, None
    archive = scratch / "code.tar.gz"
    root = folder / Path(spec.code.root).expanduser()
    return build_archive(root, archive, requirements=spec.code.requirements), str(archive)


def _image(
    spec: JobSpec,
    selected: Selected,
    backend: Backend,
    *,
    folder: Path,
    make: Callable[[str], None] | None,
) -> Image | None:
    if not backend.rules.container:
        return None
    engine = getattr(selected.target, "engine", None)  # a key of targets whose jobs an engine of this machine runs
    wanted = Wanted(
        target=selected.name,
        image=spec.image,
        folder=folder / Path(spec.build).expanduser() if spec.build else None,
        here=engine is not None,
        files=selected.target.has_image_files,
        registry=selected.target.registry,
        engine=engine,
        profile=selected.target.storage.profile,
    )
    try:
        return pin(wanted, make=make)
    except SpecError as error:
        placed = type(error)(error.message, key="build" if spec.build else "image")
        raise placed.with_traceback(error.__traceback__) from error


def _shm(spec: JobSpec, backend: Backend) -> tuple[int | None, tuple[str, ...]]:
    """(bytes, warnings); auto is what the trainer's loaders need. Nobody knows the need of a command: it gets a good
    deal where the platform would give too little, else None.

    Shared memory counts as the container's memory, so that auto takes half of it at most.
    """
    resources, there = spec.resources, backend.rules.shm
    given = None if resources.shm == "auto" else resources.shm
    if spec.train is None:
        usual = shm.of_command(resources.memory) if there.how and there.size is not None else None
        return given or usual, ()
    loaders = shm.Loaders.of_train(spec.train.model_dump(), resources.processes_per_node, gpus=resources.gpus)
    size = shm.rounded_need(loaders.need()) if given is None else given
    if given is None and resources.memory is not None and there.how:
        size = min(size, resources.memory // 2)
    if size >= loaders.need():
        return size, ()
    half = ", half of resources.memory," if given is None else ""
    return size, (
        f"resources.shm: {format_size(size)}{half} is less than the data loaders need ({loaders}); "
        "the runner lowers prefetch and workers",
    )


def _disk(spec: JobSpec, channels: tuple[Channel, ...]) -> int:
    """Bytes; auto is 1.2 × the channels that are copied + 20 GiB: what is on a volume of the cluster stays there."""
    if spec.resources.disk != "auto":
        return spec.resources.disk
    return disk_for_data(channel.size for channel in channels if scheme(channel.uri) != "pvc") + (20 << 30)


def _unpinned(spec: JobSpec, image: Image | None, code: Code | None) -> Iterator[str]:
    if image is None:
        yield "image: a process runs in an environment that no digest covers"
    elif image.config_digest is None:
        yield _why_unpinned(spec, image)
    if code and code.dirty:
        yield "code: the working tree had changes that are not committed (the archive itself is pinned)"


def _why_unpinned(spec: JobSpec, image: Image) -> str:
    if spec.build:
        folder = shlex.quote(spec.build)
        return f"build: {image.reference} is not pinned; submit builds it, and: cvlaunch image build {folder}"
    if spec.image == TRAINER:
        return f"image: {image.reference} is not pinned; submit builds it, and: cvlaunch image build"
    if image.reference.startswith("/"):
        return f"image: nothing says what is in {image.reference}; write NAME@sha256:DIGEST"
    if image.digest:
        return f"image: {image.reference} is fixed, but the digest of its configuration is not known on this machine"
    return f"image: {image.reference} is not pinned; push it with cvlaunch image push, or write NAME@sha256:DIGEST"


def _typed(uri: str, target: str) -> str:
    """As it is typed in a shell, with the target that a claim is reached through."""
    place = shlex.quote(str(path_of(uri)) if scheme(uri) == "file" else uri)
    return f"{place} --target {shlex.quote(target)}" if scheme(uri) == "pvc" else place


def _key_of(spec: JobSpec, channel: str) -> str:
    """The key of the job file that says where a channel is."""
    return "train.init" if channel == WEIGHTS_CHANNEL and spec.train and spec.train.init else f"data.{channel}"


@dataclasses.dataclass
class _Resolver:
    """Finds the place of each channel for one target."""

    spec: JobSpec
    selected: Selected
    backend: Backend
    folder: Path
    targets: Targets
    ledger: Ledger
    output: str
    online: bool
    warnings: list[str] = dataclasses.field(default_factory=list)

    def channel(self, name: str, written: str) -> Channel:
        place = self._from_dataset(name, written)
        if place.startswith(_RUN_URI):
            place = self._from_run(name, place)
        if (reached_by := self.selected.target.reached_by) and place.startswith(f"{reached_by}/"):
            place = _TARGET_PATH + place.removeprefix(reached_by)
        if place.startswith(_TARGET_PATH):
            path = place.removeprefix(_TARGET_PATH)
            if not path.startswith("/"):
                raise SpecError(f"{place!r} needs an absolute path after target:", key=self._key(name))
            return self._described(name, file_uri(Path(path)), "file")
        if is_uri(place):
            return self._described(name, place, scheme(place))
        return self._client_folder(name, written, self.folder / Path(place).expanduser())

    def _from_dataset(self, name: str, written: str) -> str:
        """`shapes/train` where `shapes` is a dataset; anything else stays as it is."""
        first, _, rest = written.partition("/")
        if is_uri(written) or written.startswith((_TARGET_PATH, ".", "~", "/")):
            return written
        if first in self.targets.datasets:
            try:
                base = self.targets.place_of(first, self.selected.name)
            except SpecError as error:
                raise SpecError(error.message, key=self._key(name)) from None
            if base.startswith("/"):  # places of datasets are seen from the target
                base = _TARGET_PATH + base
            return f"{base.rstrip('/')}/{rest}" if rest else base
        if not (self.folder / written).exists():
            known = sorted(self.targets.datasets)
            hint = nearest(first, known) or (f"; datasets: {', '.join(known)}" if known else "; no dataset is defined")
            raise SpecError(
                f"{written!r} is neither a folder in {self.folder} nor a dataset{hint}", key=self._key(name)
            )
        return written

    def _from_run(self, name: str, place: str) -> str:
        run_id, _, path = place.removeprefix(_RUN_URI).partition("/")
        try:
            record = self.ledger.find(run_id)
        except SpecError as error:
            raise SpecError(error.message, key=self._key(name)) from None
        folder = record.folder
        if record.made_elsewhere:
            return join_uri(folder, path)
        packed = self._packed_model(name, folder) if path.rstrip("/") in ("", "model") else None
        return join_uri(folder, packed or path or "model")

    def _packed_model(self, name: str, folder: str) -> str | None:
        """Where SageMaker left the model of the run in `folder`, which has none at its usual place."""
        if not self.online or scheme(folder) != "s3":
            return None
        try:
            store = self.backend.store(folder) or open_store(folder, self.selected.target.storage.options)
            return None if any(store.list("model")) else newest_model(store)
        except SpecError as error:
            raise SpecError(error.message, key=self._key(name)) from error

    def _client_folder(self, name: str, written: str, path: Path) -> Channel:
        path = path.absolute()
        if not self.sees_this_machine():
            raise SpecError(
                f"{written!r} is a folder of this machine, which target {self.selected.name!r} can't see; "
                f"push it with --push-data, or write the place that this makes: cvlaunch data push "
                f"{shlex.quote(str(path))} {_typed(self._place_for(name), self.selected.name)}",
                key=self._key(name),
            )
        return self._described(name, file_uri(path), "client")

    def _place_for(self, name: str) -> str:
        """Where data of this machine could be brought for the target."""
        base = self.output if scheme(self.output) != "file" else "s3://BUCKET/PREFIX"
        return join_uri(base, "_data", f"{self.spec.name}-{name}")  # no run id starts with _

    def _described(self, name: str, uri: str, kind: str) -> Channel:
        accesses = self._accesses()
        if kind not in accesses:
            raise SpecError(
                f"{uri} can't be read by target {self.selected.name!r}; it reads {', '.join(sorted(accesses))}",
                key=self._key(name),
            )
        if scheme(uri) == "file" and self.sees_this_machine():
            self._check_folder(name, path_of(uri))
        channel = Channel(name, uri, accesses[kind])
        place = self._seen_from_here(uri)
        if not self.online and scheme(place) != "file":
            self.warnings.append(f"{self._key(name)}: {place} was not looked at; --resolve reads its fingerprint")
            return channel
        found = self._manifest(name, place)
        if found is None:
            return channel
        return dataclasses.replace(channel, fingerprint=found.fingerprint, files=found.count, size=found.size)

    def _seen_from_here(self, uri: str) -> str:
        """A folder of the target, as this machine reaches it."""
        reached_by = self.selected.target.reached_by
        return f"{reached_by}{path_of(uri)}" if reached_by and scheme(uri) == "file" else uri

    def _manifest(self, name: str, uri: str) -> manifest.Manifest | None:
        if scheme(uri) == "file" and not path_of(uri).is_dir():  # a path that only the target sees
            return None
        try:
            return manifest.read(self.backend.store(uri) or open_store(uri, self.selected.target.storage.options))
        except SpecError as error:
            raise SpecError(error.message, key=self._key(name)) from error

    def unpinned(self, channels: Iterable[Channel]) -> Iterator[str]:
        """Those whose contents nothing vouches for, each with the way out."""
        for channel in channels:
            if channel.fingerprint is None:
                yield f"{self._key(channel.name)}: {self._why_unpinned(channel)}"

    def _why_unpinned(self, channel: Channel) -> str:
        typed = _typed(channel.uri, self.selected.name)
        if scheme(channel.uri) == "file":
            return f"no manifest; write one with: cvlaunch data fingerprint {typed}"
        if not self.online:
            return "it was not looked at; --resolve reads its fingerprint"
        if channel.name == WEIGHTS_CHANNEL:  # a run's own files, mostly, which nobody pushes
            return "no manifest"
        return f"no manifest; bring the data there with: cvlaunch data push FOLDER {typed}"

    def _check_folder(self, name: str, path: Path) -> None:
        if self.spec.train is not None and name in ("train", "val"):
            check_channel(path, self.spec.train, channel=name)
        elif not path.is_dir():
            raise SpecError(f"no folder {path}", key=self._key(name))

    def _key(self, name: str) -> str:
        return _key_of(self.spec, name)

    def sees_this_machine(self) -> bool:
        """Whether a path means the same folder there and here."""
        return "client" in self._accesses() and self.selected.target.reached_by is None

    def _accesses(self) -> Mapping[str, str]:
        return transport_of(self.backend, self.output).channels
