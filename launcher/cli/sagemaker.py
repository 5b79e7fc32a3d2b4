"""What `targets probe`, `targets policy` and `login` do with targets of SageMaker."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.out import Column, Out
from launcher.errors import AuthError, UnsupportedError

if TYPE_CHECKING:
    from launcher.sagemaker.probe import Probe
    from launcher.sagemaker.target import SageMakerTarget
    from launcher.targets import Selected

__all__ = ["login", "nothing_to_set_up", "policy", "probe", "target_by", "target_of"]

_DEFAULT_NAME = "aws"


def target_of(selected: Selected) -> SageMakerTarget:
    from launcher.sagemaker.target import SageMakerTarget

    target = selected.target
    if not isinstance(target, SageMakerTarget):
        raise UnsupportedError(f"the {selected.backend.name} backend is not SageMaker", key=selected.name)
    return target


def target_by(profile: str | None, region: str | None) -> SageMakerTarget:
    """What options say."""
    from launcher.sagemaker.target import SageMakerTarget

    return SageMakerTarget(profile=profile, region=region)


def nothing_to_set_up(selected: Selected) -> UnsupportedError:
    return UnsupportedError(
        f"there is nothing to set up in SageMaker: `cvlaunch targets probe {selected.name}` says what the account"
        f" lacks, `cvlaunch targets policy {selected.name}` prints the rights that it needs",
        key=selected.name,
    )


# ---- login


def login(selected: Selected, out: Out) -> None:
    """Logs in where there is something to log in to, and asks AWS who that is."""
    from launcher.sagemaker.client import Account
    from launcher.sagemaker.login import way_in
    from launcher.sagemaker.probe import caller_of

    target = target_of(selected)
    account, way = Account(target.access, selected.name).hasty(), way_in(target.profile)
    if way.command:
        _run(way.command)
    else:
        out.note(f"there is nothing to log in to: the identity is {way.source}")
    try:
        caller = caller_of(account)
    except AuthError as error:
        raise AuthError(f"AWS does not take {way.source} ({error.__cause__ or error}): {way.remedy}") from error
    out.note(f"{account.where}: you are {caller.arn}")


def _run(command: Sequence[str]) -> None:
    """In the terminal: it shows an address and a code, or opens a browser."""
    said = " ".join(command)
    if shutil.which(command[0]) is None:
        raise UnsupportedError(
            f"`{said}` needs AWS's own program: pip install awscli, or version 2 from https://aws.amazon.com/cli"
        )
    code = subprocess.run(command, check=False).returncode
    if code:
        raise AuthError(f"`{said}` ended with code {code}: see what it says")


# ---- policies


def policy(selected: Selected, of: str | None, *, secrets: Sequence[str], keys: Sequence[str]) -> None:
    """Prints all policies as one document, or one of them as IAM takes it."""
    from launcher.sagemaker.client import Account
    from launcher.sagemaker.policy import document, place_of, role_needs, submitter_needs, trust_policy

    target = target_of(selected)
    region = Account(target.access, selected.name).region
    place = place_of(target, region, data=_data(selected.name), secrets=secrets, keys=keys)
    documents = {
        "submitter": document(submitter_needs(place)),
        "role": document(role_needs(place)),
        "trust": trust_policy(),
    }
    click.echo(json.dumps(documents[of] if of else documents, indent=2))
    for key, known in (("role", target.role), ("output", target.output)):
        if not known:
            click.echo(f"the target has no {key}: put yours where it says REPLACE-ME", err=True)


def _data(name: str) -> list[str]:
    """Places of all datasets for this target."""
    from launcher.targets import load_targets

    datasets = load_targets(Path.cwd()).datasets.values()
    return [place for places in datasets if (place := places.get(name) or places.get("default"))]


# ---- probe


def probe(name: str | None, target: SageMakerTarget, *, write: bool, out: Out) -> None:
    from launcher.sagemaker.client import Account
    from launcher.sagemaker.probe import as_target
    from launcher.sagemaker.probe import probe as look_at

    name = name or _name(target.profile)
    found = look_at(Account(target.access, name), target)
    keys = as_target(found, target)
    if out.as_json:
        out.document({"account": dataclasses.asdict(found), "target": {name: keys}})
    else:
        _show(found, out)
        out.data(f"\n{_yaml(name, keys)}".rstrip())
    if write:
        from launcher.cli.targetsfile import add_target

        lacking = [key for key in ("role", "output") if key not in keys]
        still = f"; it still lacks `{'` and `'.join(lacking)}`" if lacking else ""
        out.note(f"added to {add_target(Path.cwd(), name, keys)}{still}")


def _name(profile: str | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (profile or "").lower()).strip("-")[:24].strip("-") or _DEFAULT_NAME


def _yaml(name: str, keys: Mapping[str, object]) -> str:
    from launcher.cli.targetsfile import target_block

    notes = {"role": "role: arn:aws:iam::ACCOUNT:role/NAME", "output": "output: s3://BUCKET/runs"}
    lacking = "".join(f"    # {note}\n" for key, note in notes.items() if key not in keys)
    return f"# targets.yaml\ntargets:\n{target_block(name, keys)}{lacking}"


def _show(found: Probe, out: Out) -> None:
    out.fields(dict(_facts(found)))
    sections: Sequence[tuple[list[Column], list[tuple[str, ...]]]] = (
        (
            _QUOTA_COLUMNS,
            [(q.name, q.gpus, str(q.on_demand), str(q.spot), str(q.warm_pool)) for q in found.quotas or ()],
        ),
        (_SERVICE_COLUMNS, [(s.name, s.purpose, s.answer) for s in found.services]),
        (_PROBLEM_COLUMNS, [("refused" if p.fatal else "note", p.thing, p.message) for p in found.problems]),
    )
    for columns, rows in sections:
        if rows:
            out.data("")
            out.table(columns, rows)


_QUOTA_COLUMNS = [
    Column("INSTANCES"),
    Column("GPUS"),
    Column("ON DEMAND", right=True),
    Column("SPOT", right=True),
    Column("WARM POOL", right=True),
]
_SERVICE_COLUMNS = [Column("SERVICE"), Column("FOR"), Column("ANSWERS")]
_PROBLEM_COLUMNS = [Column("PROBLEM"), Column("WITH"), Column("WHAT, AND THE WAY OUT", whole=False)]


def _facts(found: Probe) -> Iterator[tuple[str, str]]:
    from launcher.quantities import format_duration

    yield "region", found.region
    yield "account", found.account
    yield "you", found.user
    yield "role", _role(found)
    region = found.bucket_region
    yield "output", f"{found.output}{f' (bucket in {region})' if region else ''}" if found.output else "none"
    there = {True: "is there", False: "the first job makes it", None: "unknown"}
    yield "log group", f"{found.log_group} ({there[found.logs]})"
    if found.quotas is None:
        yield "quotas", "hidden from you"
    elif not found.quotas:
        yield "quotas", "none of instances with GPUs"
    if found.longest_run is not None:
        yield "longest job", format_duration(found.longest_run)


def _role(found: Probe) -> str:
    if not found.role:
        return "none"
    trusted = {True: "SageMaker may take it", False: "can't be used", None: "can't be looked at"}
    return f"{found.role} ({trusted[found.trusted]})"
