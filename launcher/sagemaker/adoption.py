"""Which run a training job is of, and what is known of one that was made without cvlaunch.

Such a job keeps its values in the ledger only as far as they can't be secrets: whoever may describe it reads all of
them, and many a token travels so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from launcher.backends.base import Adopted, Elsewhere, Handle, Output
from launcher.contract import ARTIFACTS, JOB, Channel, JobFile, canonical_json
from launcher.digest import text_digest
from launcher.errors import CvlaunchError, IntegrityError, SpecError, nearest
from launcher.masking import HIDDEN, mask_links, names_secret
from launcher.sagemaker.catalogue import instance_type
from launcher.sagemaker.client import Account, Json
from launcher.sagemaker.request import PLAN_SHA, RUN
from launcher.sagemaker.words import attempt_of
from launcher.stores import Store, join_uri

if TYPE_CHECKING:
    from botocore.model import Shape

__all__ = [
    "SUBMISSION",
    "adopt_foreign",
    "adopt_own",
    "has_runner",
    "job_name",
    "no_such_job",
    "own_run_id",
    "run_folder",
    "submission_of",
]

SUBMISSION = "CVLAUNCH_SUBMISSION"
"""Variable, for our runner, of a job that is not the first of its run."""

_JOB_VARIABLE, _SHA_VARIABLE = "CVLAUNCH_JOB", "CVLAUNCH_JOB_SHA256"

_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
_ARN = re.compile(r"arn:aws[a-z-]*:sagemaker:(?P<region>[a-z0-9-]+):\d{12}:training-job/(?P<name>[^/]+)")
_STAMP = re.compile(r"-(\d{4}(-\d\d){5}-\d{3}|\d{14})$")
"""What SageMaker's SDKs put behind the names of their jobs (version 2, version 3)."""
_MOST_KNOWN = 100

_DEFAULTS: Mapping[str, Sequence[object]] = {
    "CompressionType": ("None", "GZIP"),
    "EnableInterContainerTrafficEncryption": (False,),
    "EnableManagedSpotTraining": (False,),
    "EnableNetworkIsolation": (False,),
    "EnableSageMakerMetricsTimeSeries": (False,),
    "RecordWrapperType": ("None",),
}
"""What DescribeTrainingJob says of members that nobody gave; empty texts and lists besides."""


# -- which run it is of -----------------------------------------------------------------------------------------------


def job_name(text: str, account: Account) -> str:
    """Of a name or an ARN, as consoles show both. SpecError if it can be none, or the ARN's region is another."""
    if found := _ARN.fullmatch(text):
        if found["region"] != account.region:
            raise SpecError(
                f"{found['name']} is in region {found['region']}, and target {account.name} in {account.region}: name "
                f"a target with region: {found['region']}"
            )
        return found["name"]
    if not _NAME.fullmatch(text):
        raise SpecError(f"there is no training job {text!r}: a name has letters, digits and -, at most 63")
    return text


def no_such_job(account: Account, name: str) -> SpecError:
    hint = ""
    with contextlib.suppress(CvlaunchError):  # who may not list jobs gets no names
        hint = nearest(name, islice(_names_like(account, name), _MOST_KNOWN))
    return SpecError(
        f"there is no training job {name!r} in {account.where}{hint or ';'} one of another region needs a target with "
        "that `region`, one of another account a target with a `profile` of it"
    )


def _names_like(account: Account, name: str) -> Iterator[str]:
    """Of the newest jobs that begin alike."""
    answer = account.call(
        "sagemaker",
        "list_training_jobs",
        NameContains=name.partition("-")[0],
        SortBy="CreationTime",
        SortOrder="Descending",
        MaxResults=_MOST_KNOWN,
    )
    return (job["TrainingJobName"] for job in answer["TrainingJobSummaries"])


def own_run_id(job: Json, tags: Mapping[str, str]) -> str:
    """Of a job that cvlaunch has rendered; empty for all others. tags: may be none, where nobody may read them."""
    folder = run_folder(job)
    if not folder or not (RUN in tags or has_runner(job)):
        return ""
    return tags.get(RUN) or folder.rpartition("/")[2]


def has_runner(job: Json) -> bool:
    return _JOB_VARIABLE in (job.get("Environment") or {})


def run_folder(job: Json) -> str:
    """URI of the run's folder; empty for a job that is none of ours."""
    place = str(_member(job, "OutputDataConfig").get("S3OutputPath", ""))
    return place.removesuffix(f"/{ARTIFACTS}") if place.endswith(f"/{ARTIFACTS}") else ""


def submission_of(job: Json) -> int:
    """How often the run had been sent when this job was. Variables of others may say anything."""
    if not has_runner(job):
        return attempt_of(str(job.get("TrainingJobName", "")), run_folder(job).rpartition("/")[2]) or 1
    said = str(job["Environment"].get(SUBMISSION, ""))
    return int(said) if re.fullmatch(r"[1-9]\d{0,8}", said, re.ASCII) else 1


def adopt_own(handle: Handle, job: Json, tags: Mapping[str, str], *, store: Store, account: Account) -> Adopted:
    """store: the run's folder."""
    described = _job_file(job, store)
    if tags.get(RUN, described.run_id) != described.run_id:
        raise SpecError(f"{handle.native} has the tag {RUN}={tags[RUN]}, and its {JOB} is of {described.run_id}")
    sent = _as_sent(job, {name: value for name, value in tags.items() if name != PLAN_SHA}, account)
    sent["TrainingJobName"] = described.run_id
    sent.get("Environment", {}).pop(SUBMISSION, None)
    attempt = attempt_of(handle.native, described.run_id) or submission_of(job)
    return Adopted(handle, _text(sent), described, has_runner(job), attempt)


def _job_file(job: Json, store: Store) -> JobFile:
    try:
        data = store.read(JOB)
    except FileNotFoundError:
        raise SpecError(f"{store.uri} has no {JOB}, which the run is known by: put it there, as render says") from None
    wanted = (job.get("Environment") or {}).get(_SHA_VARIABLE)
    if wanted and hashlib.sha256(data).hexdigest() != wanted:
        raise IntegrityError(f"{store.uri}/{JOB} is not the one that {job['TrainingJobName']} was sent with")
    try:
        found = JobFile.from_bytes(data)
    except ValueError as error:
        raise SpecError(f"{store.uri}/{JOB} can't be read: {error}") from error
    if join_uri(found.output, found.run_id) != store.uri:
        raise SpecError(f"{store.uri}/{JOB} is of a run in {join_uri(found.output, found.run_id)}: it was copied")
    return found


# -- what is known of another -----------------------------------------------------------------------------------------


def adopt_foreign(handle: Handle, job: Json, tags: Mapping[str, str], *, account: Account) -> Adopted:
    """A job of SageMaker's SDK, the console or another tool."""
    name = handle.native
    sent = _without_secrets(_as_sent(job, tags, account))
    outputs = tuple(_outputs(job))
    made = Elsewhere(str(job["TrainingJobArn"]), job["CreationTime"].timestamp(), outputs)
    return Adopted(handle, _text(sent), _known(name, sent, outputs[0].uri), elsewhere=made, notes=_notes(outputs, sent))


def _outputs(job: Json) -> Iterator[Output]:
    """Where the platform leaves things, by the folders that a run of ours would have them in."""
    name = job["TrainingJobName"]
    artifacts = str(_member(job, "OutputDataConfig").get("S3OutputPath", "")).rstrip("/")
    yield Output(f"{artifacts}/{name}/output", into=f"{ARTIFACTS}/{name}/output")
    if checkpoints := _member(job, "CheckpointConfig").get("S3Uri"):
        yield Output(checkpoints.rstrip("/"), into="checkpoints")


def _known(name: str, sent: Json, output: str) -> JobFile:
    algorithm, asked = _member(sent, "AlgorithmSpecification"), _member(sent, "ResourceConfig")
    same = {key: value for key, value in sent.items() if key not in ("TrainingJobName", "Tags")}
    types = list(_types(asked))
    known = instance_type(types[0][0]) if types else None
    return JobFile(
        run_id="",
        name=_STAMP.sub("", name),
        job_digest=text_digest(canonical_json(same).decode()),
        output=output,
        command=(*algorithm.get("ContainerEntrypoint", ()), *algorithm.get("ContainerArguments", ())) or None,
        env=sent.get("Environment", {}),
        channels=tuple(_channels(sent)),
        image=_image(str(algorithm.get("TrainingImage") or algorithm.get("AlgorithmName") or "")),
        nodes=sum(count for _, count in types) or 1,
        gpus=known.gpus if known else 0,
        movers={"checkpoints": "platform", "model": "platform", "output": "platform"},
        timeout_s=_member(sent, "StoppingCondition").get("MaxRuntimeInSeconds"),
        tags={tag["Key"]: tag["Value"] for tag in sent.get("Tags", ())},
    )


def _types(asked: Json) -> Iterator[tuple[str, int]]:
    """Type and count of its instances; of several acceptable ones, of the first."""
    for group in asked.get("InstanceGroups") or (asked.get("InstancePreferences") or [asked])[:1]:
        if "InstanceType" in group:
            yield group["InstanceType"], int(group.get("InstanceCount") or 1)


def _image(reference: str) -> dict[str, str | None] | None:
    digest = reference.partition("@")[2] or None
    return {"reference": reference, "digest": digest, "config_digest": None} if reference else None


def _channels(sent: Json) -> Iterator[Channel]:
    for channel in sent.get("InputDataConfig", ()):
        source = _member(channel, "DataSource")
        objects, files = _member(source, "S3DataSource"), _member(source, "FileSystemDataSource")
        mounted = f"{files.get('FileSystemType', '').lower()}://{files.get('FileSystemId')}{files.get('DirectoryPath')}"
        uri = objects.get("S3Uri") or (mounted if files else _member(source, "DatasetSource").get("DatasetArn", ""))
        yield Channel(channel["ChannelName"], uri, "mounted")


def _notes(outputs: Sequence[Output], sent: Json) -> tuple[str, ...]:
    hidden = sorted(
        name
        for members in ("Environment", "HyperParameters")
        for name, value in sent.get(members, {}).items()
        if value == HIDDEN
    )
    says = ["made without cvlaunch: status, logs, sync and cancel know it; it can't be sent again, nor deleted"]
    says += [f"{output.into}: {output.uri}" for output in outputs[1:]]
    says += [f"not kept, because named like secrets: {', '.join(hidden)}"] if hidden else []
    return tuple(says)


# -- the request ------------------------------------------------------------------------------------------------------


def _as_sent(job: Json, tags: Mapping[str, str], account: Account) -> Json:
    """What CreateTrainingJob takes of an answer to DescribeTrainingJob, without what SageMaker has added."""
    model = account.client("sagemaker").meta.service_model
    sent: Json = _kept(job, model.operation_model("CreateTrainingJob").input_shape)
    found = [{"Key": name, "Value": value} for name, value in tags.items() if not name.startswith("aws:")]
    return {**sent, "Tags": found} if found else sent


def _kept(value: Any, shape: Shape) -> Any:
    if shape.type_name == "structure":
        there = {name: _kept(value[name], member) for name, member in shape.members.items() if name in value}
        return {
            name: item
            for name, item in there.items()
            if item not in (None, "", [], {}) and item not in _DEFAULTS.get(name, ())
        }
    return [_kept(item, shape.member) for item in value] if shape.type_name == "list" else value


def _without_secrets(sent: Json) -> Json:
    changed: Json = {}
    for name in ("Environment", "HyperParameters"):
        if name in sent:
            changed[name] = {key: HIDDEN if names_secret(key) else mask_links(text) for key, text in sent[name].items()}
    algorithm = dict(_member(sent, "AlgorithmSpecification"))
    for name in ("ContainerEntrypoint", "ContainerArguments"):
        if name in algorithm:
            algorithm[name] = list(_plain_arguments(algorithm[name]))
    return {**sent, **changed, "AlgorithmSpecification": algorithm}


def _plain_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """`--token X` and `--token=X` without X."""
    hidden = False
    for text in arguments:
        name, equals, _ = text.partition("=")
        option = name.startswith("-")
        if hidden and not option:
            yield HIDDEN
        elif equals and " " not in name and names_secret(name):
            yield f"{name}={HIDDEN}"
        else:
            yield mask_links(text)
        hidden = option and not equals and names_secret(name)


def _text(sent: Json) -> str:
    """As `aws sagemaker create-training-job --cli-input-json` takes it."""
    return json.dumps(sent, indent=2, ensure_ascii=False) + "\n"


def _member(value: Json, name: str) -> Json:
    found: Json = value.get(name) or {}
    return found
