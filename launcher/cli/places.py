"""`targets`, `backends`, `templates`: where jobs can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from launcher.backends import load_backend, names
from launcher.backends.base import Feature, Support
from launcher.cli.clusters import policy, probe, setup
from launcher.cli.options import complete_backends, complete_targets, json_option, quiet_option
from launcher.cli.out import Column, Out
from launcher.errors import CvlaunchError, UnsupportedError
from launcher.targets import Selected, Targets, load_targets

__all__ = ["backends", "targets", "templates"]


@click.command()
@click.argument("backend", shell_complete=complete_backends, nargs=-1)
@json_option
def backends(*, backend: tuple[str, ...], out: Out) -> None:
    """Show what each platform can do.

    A table of features, with the reason and the way out where one is missing. BACKEND... shows only these.
    """
    found = {name: _features(name) for name in backend or names()}
    if out.as_json:
        out.document({name: _features_json(features) for name, features in found.items()})
        return
    columns = [
        Column("BACKEND"),
        Column("FEATURE", whole=False),
        Column("", style=_yes_style),
        Column("WHY", whole=False),
    ]
    rows = [row for name, features in found.items() for row in _rows(name, features)]
    out.table(columns, rows)


def _features(name: str) -> dict[Feature, Support] | str:
    """Or why the backend can't be used as it is."""
    try:
        return dict(load_backend(name).features)
    except UnsupportedError as error:
        return error.message


def _features_json(features: dict[Feature, Support] | str) -> dict[str, Any]:
    if isinstance(features, str):
        return {"usable": False, "reason": features, "features": {}}
    return {
        "usable": True,
        "reason": "",
        "features": {f.name.lower(): {"supported": s.supported, "reason": s.reason} for f, s in features.items()},
    }


def _rows(name: str, features: dict[Feature, Support] | str) -> list[tuple[str, ...]]:
    if isinstance(features, str):
        return [(name, "", "no", features)]
    return [(name, str(f), "yes" if s.supported else "no", s.reason) for f, s in features.items()]


def _yes_style(text: str) -> str:
    return "green" if text == "yes" else "yellow"


@click.group(invoke_without_command=True)
@click.pass_context
def targets(ctx: click.Context) -> None:
    """List, show and set up the places to run jobs.

    They come from targets.yaml of this folder or one above it, then from that of the user; every backend also has a
    built-in target of its own name.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_targets)


@targets.command("list")
@json_option
def list_targets(out: Out) -> None:
    """Names, backends, outputs and where each is defined."""
    known = load_targets(Path.cwd())
    found = [_target_facts(known, name) for name in known.names()]
    if out.as_json:
        out.document(found)
        return
    columns = [Column("TARGET"), Column("BACKEND"), Column("OUTPUT", whole=False), Column("DEFINED IN", whole=False)]
    marked = [(f"{t['name']} *" if t["default"] else t["name"], t["backend"], t["output"], t["source"]) for t in found]
    out.table(columns, marked)
    out.note("* is used when neither --target nor --backend is given")


def _target_facts(known: Targets, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": name, "default": name == known.default, "source": known.source(name)}
    try:
        selected = known.select(target=name)
    except CvlaunchError as error:  # a broken one must not hide the others
        return {**facts, "backend": "", "output": "", "error": str(error), "source": f"{facts['source']}: {error}"}
    return {**facts, "backend": selected.backend.name, "output": selected.target.output or "", "error": None}


@targets.command("show")
@click.argument("name", shell_complete=complete_targets)
@json_option
def show_target(name: str, out: Out) -> None:
    """All keys of one target, with defaults."""
    known = load_targets(Path.cwd())
    selected = known.select(target=name)
    if out.as_json:
        out.document({"name": name, "source": known.source(name), "keys": _keys(selected)})
        return
    import yaml

    out.data(f"# {name}, from {known.source(name)}")
    out.data(yaml.safe_dump(_keys(selected), sort_keys=False, allow_unicode=True).rstrip())


def _keys(selected: Selected) -> dict[str, Any]:
    """A webhook's address often holds its password, so only its machine is shown."""
    keys = selected.target.model_dump(mode="json", exclude_none=True)
    webhook = keys.get("notify", {}).get("webhook")
    if webhook:
        scheme, _, rest = webhook.partition("://")
        keys["notify"]["webhook"] = f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}/..."
    return keys


targets.add_command(setup)
targets.add_command(probe)
targets.add_command(policy)


@click.group()
def templates() -> None:
    """Show a platform's template, or copy it to change it.

    A target's key `templates` names the folder with your own; files missing there are taken from cvlaunch.
    """


@templates.command("show")
@click.argument("backend", shell_complete=complete_backends)
def show_template(backend: str) -> None:
    """Print the template of BACKEND."""
    from launcher.plan import load_template

    click.echo(load_template(load_backend(backend)), nl=False)


@templates.command("eject")
@click.argument("backend", shell_complete=complete_backends)
@click.argument("to", metavar="[FOLDER]", type=click.Path(path_type=Path), default=Path("templates"))
@quiet_option
def eject_template(backend: str, to: Path, out: Out) -> None:
    """Copy the template of BACKEND to FOLDER/BACKEND (templates/BACKEND), to be changed there."""
    from launcher.plan import eject_templates

    out.data(str(eject_templates(load_backend(backend), to)))
    out.note(f"use it: write `templates: {to}` in the target")
