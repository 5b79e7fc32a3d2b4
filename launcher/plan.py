"""From a resolved job to the text that is sent. The one file that knows Jinja2."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.backends.base import Backend, Job, Output, Plan, Remarks, Reviews, Transport
from launcher.contract import CODE, JOB, JobFile
from launcher.digest import text_digest
from launcher.errors import SpecError, UnsupportedError
from launcher.paths import templates_folder
from launcher.shm import shm_words
from launcher.stores import join_uri, scheme

if TYPE_CHECKING:
    import jinja2

__all__ = ["dump_yaml", "eject_templates", "job_file", "load_template", "make_plan", "transport_of"]

PLACEHOLDER = "REPLACE-ME"

_Overlay = Mapping[str, Any] | list[Any]


def load_template(backend: type[Backend], folder: str | None = None) -> str:
    """The template's text: from `folder/<backend>/` where it is there, else from the package that has the backend."""
    places = [Path(folder).expanduser()] if folder else []
    places.append(_own_templates(backend))
    for place in places:
        path = place / backend.template
        if path.is_file():
            return _read_text(path)
    raise SpecError(f"no template {backend.template} in {', '.join(map(str, places))}")


def _own_templates(backend: type[Backend]) -> Path:
    """Ours, or a plug-in's: `templates` beside its module."""
    beside = Path(sys.modules[backend.__module__].__file__ or "").parent / "templates"
    return beside if (beside / backend.template).is_file() else templates_folder()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError("not a text file (UTF-8)", file=path) from None


def eject_templates(backend: type[Backend], to: Path) -> Path:
    """Copies our templates of one backend into their folder below `to`, to be changed there. Overwrites nothing."""
    folder = Path(backend.template).parent
    source, copy = _own_templates(backend) / folder, to / folder
    if copy.exists():
        raise SpecError(f"{copy} is there already; remove it, or edit it as it is")
    shutil.copytree(source, copy)
    return copy


def transport_of(backend: Backend, output: str) -> Transport:
    """Who moves what, for this place of output."""
    table = backend.transports
    transport = table.get(scheme(output))
    if transport is None:
        raise UnsupportedError(
            f"the {backend.name} backend can't write to {output}; it knows {', '.join(sorted(table))}", key="output"
        )
    return transport


def job_file(backend: Backend, job: Job, run_id: str) -> JobFile:
    """job.json of this run."""
    spec, resources = job.spec, job.spec.resources
    return JobFile(
        run_id=run_id,
        name=spec.name,
        job_digest=job.digest,
        output=job.output,
        command=job.command,
        train=job.train,
        env=spec.env,
        secrets=spec.secrets,
        channels=job.channels,
        code=job.code,
        image=dataclasses.asdict(job.image) if job.image else None,
        nodes=resources.nodes,
        gpus=resources.gpus,
        processes=resources.processes_per_node,
        movers=transport_of(backend, job.output).movers,
        retries=spec.retries,
        max_attempts=spec.max_attempts,
        timeout_s=resources.timeout,
        grace_s=resources.grace,
        tags=spec.tags,
        storage=job.storage,
        cvlaunch=job.version,
    )


def make_plan(job: Job, backend: Backend, run_id: str, *, template: str) -> Plan:
    """Pure: the same arguments give the same bytes. template: the text from `load_template`."""
    described = job_file(backend, job, run_id)
    text = _render(template, backend.context(job, run_id, described), name=backend.template)
    text = _with_overlays(text, backend.form, job.target.overlay, job.spec.native.get(backend.name))
    remarks = backend.review(job, text) if isinstance(backend, Reviews) else Remarks()
    files: dict[str, bytes | str] = {} if backend.inline_job else {JOB: described.to_bytes()}
    if job.code_archive:
        files[CODE] = job.code_archive
    missing = (*_placeholders(backend, template, job.output), *remarks.missing)
    shm = _shm(job, backend)
    return Plan(
        run_id=run_id,
        backend=backend.name,
        text=text,
        files=files,
        job_digest=job.digest,
        plan_sha=text_digest(text),
        outputs=(Output(join_uri(job.output, run_id)),),
        shm=shm,
        notes=remarks.notes,
        unpinned=job.unpinned,
        warnings=(
            *job.warnings,
            *remarks.warnings,
            *([shm] if _shm_is_short(job, backend) else []),
            *(f"{where} must be given before this can be sent" for where in missing),
        ),
        placeholders=missing,
    )


def _shm(job: Job, backend: Backend) -> str:
    there = backend.rules.shm
    return shm_words(job.shm, backend.name, how=there.how, size=there.size, source=there.source)


def _shm_is_short(job: Job, backend: Backend) -> bool:
    """Whether the platform fixes it at less than the job asks for."""
    there = backend.rules.shm
    return not there.how and there.size is not None and (job.shm or 0) > there.size


def _placeholders(backend: Backend, template: str, output: str) -> Iterator[str]:
    """What nobody has given yet: keys of the target that a stand-in fills, and where else REPLACE-ME was left.

    Only the target and the template are looked at: in a job's own values the word means what the user wants.
    """
    for key, stand_in in backend.placeholders.items():
        if getattr(backend.target, key) is None and (key != "output" or output == stand_in):
            yield f"the key {key} of target {backend.target_name!r} ({stand_in})"
    for place, value in _texts(backend.target.model_dump(mode="json")):
        if PLACEHOLDER in value:
            yield f"the key {place} of target {backend.target_name!r} ({value})"
    if PLACEHOLDER in template:
        yield f"{PLACEHOLDER} in the template {backend.template}"


def _texts(content: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of each text in nested keys and lists."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _texts(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _texts(value, f"{place}.{number}")


class _Filtered(str):
    """Text that has passed a filter and so can't break out of its place."""

    __slots__ = ()


def _tojson(value: object) -> _Filtered:
    """Means the same in YAML, which takes some characters for line ends and forbids others."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    return _Filtered(_NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value} has no JSON form")  # for an undefined name, Jinja's own error comes first


def _sh(value: object) -> _Filtered:
    return _Filtered(shlex.quote(str(value)))


def _only_filtered(value: object) -> object:
    if not isinstance(value, _Filtered):
        raise SpecError(
            f"a template prints {value!r} without a filter; write {{{{ name | tojson }}}} or {{{{ name | sh }}}}"
        )
    return value


def _render(template: str, context: Mapping[str, object], *, name: str) -> str:
    import jinja2

    try:
        return _compiled(template).render(context)
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(f"not a Jinja template: {error.message}", file=name, line=error.lineno) from error
    except jinja2.TemplateError as error:
        raise SpecError(f"the template can't be filled: {error}", file=name) from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Kept, because compiling takes a hundred times as long as filling, and a sweep fills one template many times."""
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 not HTML: `finalize` refuses what no filter has passed
        undefined=jinja2.StrictUndefined,
        finalize=_only_filtered,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        newline_sequence="\n",
    )
    environment.filters = {"tojson": _tojson, "sh": _sh}
    return environment.from_string(template)


def _with_overlays(text: str, form: str, overlay: _Overlay | None, native: _Overlay | None) -> str:
    """overlay: the target's. native: the job's own, for this backend."""
    overlays = {"overlay": overlay, "native": native}
    if form == "script":
        if key := next((key for key, changes in overlays.items() if changes is not None), None):
            raise UnsupportedError(f"a script takes no {key}; use a template of your own", key=key)
        return text
    try:
        content = json.loads(text) if form == "json" else list(yaml.safe_load_all(text))
    except (ValueError, yaml.YAMLError) as error:
        raise SpecError(f"the template did not give {form.upper()}: {error}", key="templates") from error
    if form == "json":
        return json.dumps(_patched(content, overlays), indent=2, ensure_ascii=False) + "\n"
    return dump_yaml([_patched(content[0], overlays), *content[1:]])


def dump_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """The form of every text in YAML, by which equal documents are equal texts."""
    return str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6))


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stand as blocks, so that people can read them."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _patched(content: Any, overlays: Mapping[str, _Overlay | None]) -> Any:
    for key, overlay in overlays.items():
        if isinstance(overlay, Mapping):
            content = _merge(content, overlay)
        elif overlay is not None:
            content = _json_patched(content, overlay, key)
    return content


def _json_patched(content: Any, patch: Sequence[Any], key: str) -> Any:
    import jsonpatch

    try:
        return jsonpatch.apply_patch(content, patch)
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
        said = re.sub(r" in \{.*", " there", str(error), flags=re.DOTALL)  # it has all of the text
        raise SpecError(f"the JSON patch does not apply: {said}", key=key) from error


def _merge(content: Any, patch: Any) -> Any:
    """RFC 7396, JSON merge patch."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(content) if isinstance(content, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged
