"""`shm`: memory at /dev/shm for what is in a cluster or in a file already."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from launcher.cli.options import ask, json_option, target_option
from launcher.cli.out import Column, Out, clean
from launcher.errors import ConflictError, SpecError, UnreachableError, UnsupportedError, nearest

if TYPE_CHECKING:
    from launcher.kube.client import Access, Cluster
    from launcher.kube.podspecs import Kind
    from launcher.kube.shmcheck import Finding
    from launcher.kube.shmpatch import Change

__all__ = ["shm"]

F = TypeVar("F", bound=Callable[..., Any])
Json = dict[str, Any]
Plan = Callable[[Json], "Change"]

_TRIES = 5
"""For an object that somebody else changes at the same time."""


@dataclass(frozen=True)
class _Way:
    """How a cluster is to be reached, as the options say."""

    target: str | None
    context: str | None
    namespace: str | None
    kubeconfig: str | None

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


def _way_options(command: F) -> F:
    """--target, or --context, --namespace and --kubeconfig; the command gets them as `way`."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        target: str | None,
        context: str | None,
        namespace: str | None,
        kubeconfig: str | None,
        **values: Any,
    ) -> Any:
        return command(*args, way=_Way(target, context, namespace, kubeconfig), **values)

    options = (
        click.option("--kubeconfig", metavar="FILE", help="Else $KUBECONFIG, or ~/.kube/config."),
        click.option("-n", "--namespace", metavar="NAME", help="Else the target's, or the context's."),
        click.option("--context", metavar="NAME", help="Of the kubeconfig; else the target's, or the current one."),
        target_option,
    )
    return functools.reduce(lambda inner, option: option(inner), options, wrapped)  # type: ignore[return-value]


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of --size: bytes."""
    from launcher.quantities import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


@click.group()
def shm() -> None:
    """Look at and set /dev/shm of what is in a cluster already.

    Of a workbench of OpenShift AI, a Deployment, a StatefulSet, a Pod... that cvlaunch has not made. PyTorch's data
    loaders share memory there, and a container gets 64 MiB of it unless somebody asks for more.
    """


@shm.command()
@click.argument("what", metavar="[KIND/NAME]", required=False)
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Patch manifests in a file (-: standard input) and print them, instead of what is in a cluster.",
)
@click.option(
    "--size", callback=_size, metavar="SIZE", help="The most it may take: 2Gi. It counts into the memory limit."
)
@click.option("--container", metavar="NAME", help="Which one; else the one that works, sidecars left aside.")
@click.option("--use-volume", metavar="NAME", help="Mount this volume there, whatever it is.")
@click.option("--replace", is_flag=True, help="Take /dev/shm from a volume that is no memory.")
@click.option("--undo", is_flag=True, help="Take back what cvlaunch has changed.")
@click.option("--dry-run", is_flag=True, help="Show the difference and change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@_way_options
@json_option
def patch(
    *,
    what: str | None,
    file: Path | None,
    size: int | None,
    container: str | None,
    use_volume: str | None,
    replace: bool,
    undo: bool,
    dry_run: bool,
    yes: bool,
    way: _Way,
    out: Out,
) -> None:
    """Give an object memory at /dev/shm.

    KIND/NAME is notebook/my-workbench, deployment/x, sts/x, ds/x, cronjob/x. Shows the difference, says what restarts,
    and asks. A volume of memory that is mounted elsewhere is moved, else one is added. May be repeated: what is as
    asked stays as it is. Jobs and Pods can't be changed in a cluster: patch their files.

    With -f all objects of a file that have a pod, or KIND/NAME alone; all else in it stays to the byte.
    """
    from launcher.kube.shmpatch import plan_patch, plan_undo

    if undo and (size, container, use_volume, replace) != (None, None, None, False):
        raise SpecError("it takes back all that was changed; leave the other options out", key="--undo")
    plan: Plan = plan_undo
    if not undo:
        plan = functools.partial(plan_patch, size=size, container=container, use_volume=use_volume, replace=replace)
    if file is not None:
        _patch_file(file, plan, what, dry_run=dry_run, way=way, out=out)
    elif what is None:
        raise click.UsageError("give KIND/NAME, as notebook/my-workbench, or -f FILE", click.get_current_context())
    else:
        with _reached(way) as cluster:
            _patch_live(cluster, plan, *_kind_and_name(what), dry_run=dry_run, yes=yes, out=out)


@shm.command()
@click.option("--size", callback=_size, metavar="SIZE", help="What a PyTorch workload shall have; else more than 64Mi.")
@_way_options
@json_option
def check(*, size: int | None, way: _Way, out: Out) -> int:
    """List pods with their /dev/shm, and mark those with too little.

    That is less than asked in a container that seems to load data with PyTorch: it has a GPU, it is a workbench, or its
    image or command says so. Exits with 1 if there is one.
    """
    from launcher.kube.shmcheck import check_pod
    from launcher.kube.words import HELPER

    with _reached(way) as cluster:
        others = f"!{HELPER}"  # than those that serve a claim to us for a moment
        pods = sorted(cluster.list(cluster.path("pods"), labels=others), key=lambda pod: str(pod["metadata"]["name"]))
        found = [finding for pod in pods for finding in check_pod(pod, least=size)]
        where = cluster.where
    few = [finding for finding in found if finding.too_little]
    if out.as_json:
        out.document([dataclasses.asdict(finding) for finding in found])
    elif not found:
        out.note(f"no pods in {where}")
    else:
        _print_findings(found, few, out)
    return 1 if few else 0


def _print_findings(found: Sequence[Finding], few: Sequence[Finding], out: Out) -> None:
    columns = [
        Column("POD"),
        Column("CONTAINER"),
        Column("/DEV/SHM"),
        Column("", style=lambda word: "red"),
        Column("LOADS DATA", whole=False),
        Column("MADE BY", whole=False),
    ]
    mark = {True: "too little", False: ""}
    out.table(columns, [(f.pod, f.container, f.words, mark[f.too_little], f.loads, f.owner) for f in found])
    for owner in dict.fromkeys(finding.owner for finding in few if " " not in finding.owner):
        out.note(f"more for it: cvlaunch shm patch {owner} --size 2Gi")


# -- clusters


class _reached:  # noqa: N801 - a context manager
    """The cluster, until its connections are let go."""

    def __init__(self, way: _Way) -> None:
        from launcher.kube.client import Cluster

        self._cluster = Cluster(_access(way), way.target or "")

    def __enter__(self) -> Cluster:
        return self._cluster

    def __exit__(self, *error: object) -> None:
        self._cluster.close()


def _access(way: _Way) -> Access:
    from launcher.kube.client import Access

    own = Access(context=way.context, kubeconfig=way.kubeconfig, namespace=way.namespace)
    if way.target is None:
        return own
    from launcher.kube.target import KubernetesTarget
    from launcher.targets import load_targets

    target = load_targets(Path.cwd()).select(target=way.target).target
    if not isinstance(target, KubernetesTarget):
        raise UnsupportedError(
            f"target {way.target} is of backend {target.backend}; pods are in targets of kubernetes and openshift",
            key="--target",
        )
    said = {key: value for key, value in dataclasses.asdict(own).items() if value}
    return dataclasses.replace(target.access, **said)


def _kind_and_name(what: str) -> tuple[Kind, str]:
    from launcher.kube.podspecs import kind_named

    kind, slash, name = what.partition("/")
    if not (slash and kind and name) or "/" in name:
        raise SpecError(f"{what!r} is no KIND/NAME; it looks like notebook/my-workbench")
    return kind_named(kind), name


def _patch_live(cluster: Cluster, plan: Plan, kind: Kind, name: str, *, dry_run: bool, yes: bool, out: Out) -> None:
    """Reads, shows, asks, writes; from the beginning where somebody else has written in between.

    Asks again only if that makes another change of it.
    """
    from launcher.kube.shmpatch import refuse_fixed

    agreed: tuple[Json, ...] = ()
    for _ in range(_TRIES):
        obj = _read(cluster, kind, name)
        change = plan(obj)
        if not change.operations:
            return _tell(change, out, applied=False)
        refuse_fixed(obj)
        if change.operations[1:] != agreed:  # the first one is the test of the version
            _show(change, out)
            if dry_run:
                return _tell(change, out, applied=False)
            if not yes:
                ask(f"patch {change.what} in {cluster.where}?")
            agreed = change.operations[1:]
        with contextlib.suppress(ConflictError):
            if cluster.patch(cluster.path(kind.resource, name), list(change.operations), form="json") is not None:
                return _tell(change, out, applied=True)
    raise UnreachableError(f"{kind.word}/{name} in {cluster.where} changes faster than it can be patched: try again")


def _read(cluster: Cluster, kind: Kind, name: str) -> Json:
    found = cluster.get(cluster.path(kind.resource, name))
    if found is not None:
        return found
    names = [str(obj["metadata"]["name"]) for obj in cluster.list(cluster.path(kind.resource))]
    there = (
        f"there are {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "there is none at all"
    )
    raise SpecError(f"no {kind.word}/{name} in {cluster.where}{nearest(name, names) or ';'} {there}")


def _show(change: Change, out: Out) -> None:
    """What is going to change, and what that does."""
    from launcher.kube.shmpatch import effect

    if not out.as_json:
        before, after = ({"spec": obj.get("spec")} for obj in (change.before, change.after))
        _print_diff(_yaml(before), _yaml(after), change.what, out)
    for sentence in (*change.done, *change.left):
        out.note(clean(sentence, colours=False))
    if said := effect(change.before):
        out.note(said)


def _tell(change: Change, out: Out, *, applied: bool) -> None:
    """How it ended. Sentences about a change were printed before."""
    if out.as_json:
        out.document(_json(change, applied=applied))
    elif applied and change.undone:
        out.note(f"{change.what} is as it was before")
    elif applied:
        out.note(f"patched {change.what}; --undo takes it back")
    elif not change.operations:
        out.note(_nothing(change))


def _nothing(change: Change) -> str:
    return f"{change.what}: nothing to do; {'; '.join(change.left) or 'it is as asked'}"


def _json(change: Change, *, applied: bool) -> Json:
    from launcher.kube.shmpatch import effect

    return {
        "object": change.what,
        "operations": change.operations,
        "done": change.done,
        "left": change.left,
        "effect": effect(change.before),
        "applied": applied,
    }


def _yaml(value: object) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6))


def _print_diff(before: str, after: str, name: str, out: Out) -> None:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), name, f"{name}, patched", lineterm="")
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in lines:
        text = clean(line, colours=False)
        out.data(click.style(text, fg=_COLOURS.get(line[0])) if colours else text)


_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


# -- files


def _patch_file(file: Path, plan: Plan, what: str | None, *, dry_run: bool, way: _Way, out: Out) -> None:
    from launcher.kube.shmfiles import patch_text

    if way:
        raise SpecError("a file is not in a cluster; leave --target and the like out", key="--file")
    name, text = _read_file(file)
    chosen = _chooser(what)
    patched = patch_text(text, plan, file=name, chosen=chosen)
    if not patched.changes:
        missing = f"{name} has no {what}" if what else f"{name} has nothing with a pod that can be patched"
        if what:
            raise SpecError(missing)
        out.warn(f"{missing}; it comes out as it is")
    for change in patched.changes:
        _note_change(change, out)
    if out.as_json:
        out.document([_json(change, applied=not dry_run) for change in patched.changes])
    elif dry_run:
        _print_diff(text, patched.text, name, out)
    else:
        click.echo(patched.text.encode(), nl=False)


def _chooser(what: str | None) -> Callable[[Json], bool]:
    from launcher.kube.podspecs import kind_of, name_of

    if what is None:
        return lambda obj: True
    wanted = _kind_and_name(what)
    return lambda obj: (kind_of(obj), name_of(obj)) == wanted


def _read_file(file: Path) -> tuple[str, str]:
    """Its name for messages, and its text."""
    here = str(file) != "-"
    data = file.read_bytes() if here else sys.stdin.buffer.read()
    name = str(file) if here else "standard input"
    try:
        return name, data.decode()
    except UnicodeDecodeError:
        raise SpecError("not a text file (UTF-8)", file=name) from None


def _note_change(change: Change, out: Out) -> None:
    if not change.operations:
        out.note(clean(_nothing(change), colours=False))
        return
    for sentence in (*change.done, *change.left):
        out.note(clean(f"{change.what}: {sentence}", colours=False))
