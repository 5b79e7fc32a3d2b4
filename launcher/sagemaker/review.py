"""What a request means to people: what is wrong with it, at which key of theirs, and what it costs. Pure."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import BaseModel

from launcher.backends.base import Job, Remarks, asked_of_foreign
from launcher.errors import SpecError, UnsupportedError, nearest
from launcher.gpus import OLD_WORDS, is_old
from launcher.quantities import format_duration
from launcher.rules import RULES
from launcher.sagemaker.adoption import run_folder
from launcher.sagemaker.catalogue import instance_type
from launcher.sagemaker.catalogue import words as words_of_type
from launcher.sagemaker.client import Json
from launcher.sagemaker.limits import check_request, doubts
from launcher.sagemaker.policy import ecr_image
from launcher.sagemaker.request import RUN, is_accelerated, too_large
from launcher.sagemaker.target import LONGEST_RUN_S, SageMakerTarget

__all__ = ["STORE_WORDS", "at_key", "check_found_again", "review"]

_GRACE_S = RULES["sagemaker"].grace_s or 0.0
_CENTS_BELOW = 10


_FOREIGN = {
    "retries": "a foreign image (runner: none) has nobody to start it again; write retries: 0",
    "code": "a foreign image (runner: none) has nobody to bring it; build the code into the image",
    "secrets": "a foreign image (runner: none) has nobody to fetch them; let it read them with the job's role",
    "train": "the trainer is started by our runner; write runner: auto",
}
"""Key of the job → why a foreign image can't have it."""

_STORES = ("secretsmanager", "ssm")
STORE_WORDS = "store:secretsmanager:NAME or store:ssm:NAME"


def review(job: Job, request: Json, target: SageMakerTarget) -> Remarks:
    """SpecError for what SageMaker would refuse; what was chosen, and what it may cost."""
    _check_features(job, isolated=target.network_isolation)
    try:
        check_request(request)
        check_found_again(request, str(request["TrainingJobName"]))
    except SpecError as error:
        raise _at_change(error, job, target) from None
    return Remarks(
        notes=tuple(_costs(request)),
        warnings=(*_warnings(job, request, target), *doubts(request)),
        missing=tuple(_missing(job, target)),
    )


def check_found_again(request: Json, run_id: str) -> None:
    """SpecError where an overlay took away what a run is found by."""
    tags = {tag.get("Key"): tag.get("Value") for tag in request.get("Tags") or ()}
    folder = run_folder(request).rpartition("/")[2]
    if not request.get("TrainingJobName") == tags.get(RUN) == folder == run_id:
        raise SpecError(
            f"a run is found by TrainingJobName, by the tag {RUN} and by OutputDataConfig.S3OutputPath: leave them as "
            "they are",
            key="overlay",
        )


def _at_change(error: SpecError, job: Job, target: SageMakerTarget) -> SpecError:
    """At what changed the text, if the key that is wrong is written nowhere."""
    native = job.spec.native.get(target.backend) is not None
    if any(_is_written(model, error.key or "") for model in (job.spec, target)) or not _change(target, native=native):
        return error
    return SpecError(error.message, key=_change(target, native=native))


def _is_written(model: BaseModel, key: str) -> bool:
    first, _, rest = key.partition(".")
    if first not in model.model_fields_set:
        return False
    inner = getattr(model, first)
    return _is_written(inner, rest) if rest and isinstance(inner, BaseModel) else True


def _change(target: SageMakerTarget, *, native: bool) -> str:
    """The key by which the user changed the text."""
    if target.overlay is not None:
        return "overlay"
    return f"native.{target.backend}" if native else "templates" if target.templates else ""


_CAUSES: Mapping[str, str] = {
    r"assume role|\bRoleArn\b": "role",
    r"instance ?type": "instance_types",
    r"security ?group": "security_groups",
    r"subnet": "subnets",
    r"KmsKey|KMS key": "kms_key",
    r"TrainingImage|\bimage\b|\bECR\b": "image",
}
"""What CreateTrainingJob says → the user's key; the first that fits."""


def at_key(error: SpecError, request: Json, target: SageMakerTarget) -> SpecError:
    """Refusals of CreateTrainingJob at the key of the user that is meant."""
    if error.key == "overlay":  # botocore knows the member, and nobody where it came from
        return SpecError(error.message, key=_change(target, native=not target.templates))
    if error.key:
        return error
    channels = request.get("InputDataConfig") or ()
    places = {_place(channel): f"data.{channel['ChannelName']}" for channel in channels}
    places[request["OutputDataConfig"]["S3OutputPath"]] = "output"
    meant = next((key for uri, key in places.items() if uri and uri in error.message), None)
    said = next((key for pattern, key in _CAUSES.items() if re.search(pattern, error.message, re.IGNORECASE)), None)
    return SpecError(error.message, key=meant or said)


def _place(channel: Json) -> str:
    return str(channel.get("DataSource", {}).get("S3DataSource", {}).get("S3Uri", ""))


def _check_features(job: Job, *, isolated: bool) -> None:
    for key, why in asked_of_foreign(job, _FOREIGN):
        raise UnsupportedError(why, key=key)
    if isolated and job.spec.runner != "none" and (lacking := _out_of_reach(job)):
        key, way_out = lacking
        raise UnsupportedError(f"under network_isolation the job reaches nothing: {way_out}", key=key)
    for variable, reference in job.spec.secrets.items():
        _, store, name = (*reference.split(":", 2), "", "")[:3]
        if store not in _STORES:
            raise SpecError(f"{reference!r} is in no store of AWS; write {STORE_WORDS}", key=f"secrets.{variable}")
        if not name:
            raise SpecError(f"{reference!r} names no secret; write {STORE_WORDS}", key=f"secrets.{variable}")


def _out_of_reach(job: Job) -> tuple[str, str] | None:
    """Key and way out of what nobody can bring to a job without network."""
    if job.code and job.code.requirements:
        return "code.requirements", "build these packages into the image"
    return ("secrets", "leave them out") if job.spec.secrets else None


def _costs(request: Json) -> Iterator[str]:
    """Which machines, and what they cost by the hour and at most."""
    spot, choices = request.get("EnableManagedSpotTraining"), _choices(request.get("ResourceConfig") or {})
    for name, count in itertools.chain.from_iterable(choices):
        known = instance_type(name)
        many = f"{count} × " if count > 1 else ""
        yield f"instance: {many}{words_of_type(known) if known else name}{', spot' if spot else ''}"
    yield from _at_most(choices, request)


def _choices(resources: Json) -> list[list[tuple[str, int]]]:
    """Of which SageMaker takes one: type and count of the instances that it has."""
    groups = resources.get("InstanceGroups")
    found = [groups] if groups else [[item] for item in resources.get("InstancePreferences") or (resources,)]
    usual = resources.get("InstanceCount") or 1
    named = ([(item.get("InstanceType"), item.get("InstanceCount") or usual) for item in each] for each in found)
    return [[(str(name), int(count)) for name, count in each] for each in named if all(name for name, _ in each)]


def _at_most(choices: Sequence[Sequence[tuple[str, int]]], request: Json) -> Iterator[str]:
    prices = [price for choice in choices if (price := _price(choice)) is not None]
    longest = (request.get("StoppingCondition") or {}).get("MaxRuntimeInSeconds")
    if prices and longest:
        most = max(prices) * longest / 3600
        limit = format_duration(longest)
        cheaper = "; spot costs less" if request.get("EnableManagedSpotTraining") else ""
        amount = f"{most:.2f}" if most < _CENTS_BELOW else f"{math.ceil(most)}"
        yield f"cost: at most about ${amount} if it runs until SageMaker's limit, {limit}{cheaper}"


def _price(choice: Sequence[tuple[str, int]]) -> float | None:
    """Of an hour; None if that of one type is unknown."""
    prices = [(known.price, count) for name, count in choice if (known := instance_type(name))]
    if len(prices) < len(choice) or any(price is None for price, _ in prices):
        return None
    return sum((price or 0.0) * count for price, count in prices)


def _warnings(job: Job, request: Json, target: SageMakerTarget) -> Iterator[str]:
    resources = job.spec.resources
    for kind in () if target.instance_types else too_large(job, target):
        yield f"{kind.gpu} comes {kind.gpus} at a time ({kind.name}) and is passed over; instance_types can name it"
    chosen = request.get("ResourceConfig") or {}
    names = [item.get("InstanceType", "") for item in chosen.get("InstancePreferences") or (chosen,)]
    for name in names:
        known = instance_type(name)
        if known and known.gpus > resources.gpus:
            yield f"{name} has {known.gpus} GPUs, of which the job uses {resources.gpus}"
        elif known and known.gpus < resources.gpus:
            yield f"{name} has {known.gpus} GPUs, fewer than resources.gpus: {resources.gpus}"
    yield from _doubtful_places(job, target)
    yield from _old_types(job, names)
    if (resources.timeout or 0) > LONGEST_RUN_S:
        yield f"resources.timeout: SageMaker ends every job after {format_duration(LONGEST_RUN_S)}"
    if resources.grace > _GRACE_S:
        yield f"resources.grace: SageMaker gives {format_duration(_GRACE_S)}, whatever the job asks for"
    if resources.max_wait is not None and not resources.spot and not any(map(is_accelerated, names)):
        yield "resources.max_wait has no effect: jobs without GPUs don't wait for room, they fail"
    if resources.spot and len(resources.gpu) > 1:
        yield f"resources.gpu: spot jobs name one instance type, here {names[0]}"


def _old_types(job: Job, names: Iterable[str]) -> Iterator[str]:
    """Those that `instance_types` or an overlay names; what resources.gpu names is warned of on all platforms."""
    if job.train is None or job.spec.build or any(map(is_old, job.spec.resources.gpu)):
        return
    for known in filter(None, map(instance_type, names)):
        if is_old(known.gpu):
            yield f"instance_types: the {known.gpu} of {known.name} is {OLD_WORDS}"


def _doubtful_places(job: Job, target: SageMakerTarget) -> Iterator[str]:
    """What is somewhere else than the job, or is said of what the job doesn't have."""
    found = ecr_image(job.image.reference) if job.image else None
    if found and target.region and found.region != target.region:
        yield f"image: it is in ECR of {found.region}, and the job runs in {target.region}: push it to ECR there"
    names = [channel.name for channel in job.channels]
    for name in target.input_modes:
        if name not in names and (hint := nearest(name, names)):
            yield f"input_modes: the job has no channel {name!r}{hint}"


def _missing(job: Job, target: SageMakerTarget) -> Iterable[str]:
    reference = job.image.reference if job.image else ""
    if target.image_access == "Platform" and ecr_image(reference) is None:
        return [
            f"an image in ECR ({reference} is none; with `registry` in the target, such as "
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com/trainer, submit pushes it)"
        ]
    return []
