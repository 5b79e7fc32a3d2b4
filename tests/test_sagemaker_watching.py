"""SageMaker's runs as their users see them: many at once in a storm, every word of AWS, whatever keys and wherever."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.tokens
import pytest

from launcher import Run, State
from launcher.backends.base import Backend, Handle
from launcher.backends.sagemaker import SageMakerBackend
from launcher.cli.app import main
from launcher.errors import AuthError, SpecError, UnreachableError
from launcher.ledger import Ledger, RunRecord
from launcher.run import refresh, render
from launcher.sagemaker.target import SageMakerTarget
from launcher.status import Status
from launcher.stores import open_store
from launcher.submission import OpenBackends
from tests.sagemaker_site import IMAGE, SageMakerSite, make_site, name_of
from tests.services.aws import REGION, AwsCloud
from tests.services.s3 import make_certificate

Json = dict[str, Any]
LIST, DESCRIBE = "ListTrainingJobs", "DescribeTrainingJob"


@pytest.fixture
def site(aws: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SageMakerSite:
    monkeypatch.chdir(tmp_path)
    return make_site(aws, tmp_path)


def until(met: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := met()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


# -- many -------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


@dataclasses.dataclass(frozen=True)
class OneBackend(OpenBackends):
    backend: Backend

    def of(self, record: RunRecord) -> Backend:
        return self.backend


@dataclasses.dataclass(frozen=True)
class Crowd:
    """Runs in one ledger. theirs: names of somebody else's jobs."""

    site: SageMakerSite
    ledger: Ledger
    names: Sequence[str]
    clock: Clock
    backend: SageMakerBackend

    def poll(self) -> Counter[str]:
        """As `cvlaunch runs` does; what was asked for."""
        before = len(self.site.cloud.calls)
        refresh(self.ledger.all(), ledger=self.ledger, backends=OneBackend(self.backend))
        return Counter(call.operation for call in self.site.cloud.calls[before:])

    def states(self) -> Counter[tuple[State, str, int]]:
        found = [record.last_status for record in self.ledger.all()]
        return Counter((status.state, status.reason, status.attempt) for status in found)


def post(cloud: AwsCloud, bodies: Sequence[Json]) -> None:
    """Without boto3, which takes three times as long."""
    credential = f"{cloud.access_key}/20261122/{cloud.region}/sagemaker/aws4_request"
    headers = {
        "X-Amz-Target": "SageMaker.CreateTrainingJob",
        "Content-Type": "application/x-amz-json-1.1",
        "Authorization": f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0",
    }
    for body in bodies:
        connection = http.client.HTTPConnection(urlsplit(cloud.endpoint).netloc)
        connection.request("POST", "/", json.dumps(body), headers)
        assert connection.getresponse().read()
        connection.close()


def crowd_of(site: SageMakerSite, names: Sequence[str], theirs: Sequence[str] = ()) -> Crowd:
    run = site.send()
    model = {key: value for key, value in site.cloud.posted(run.id).items() if key != "Tags"}
    post(site.cloud, [_named(model, name) for pair in _mixed(names, theirs) for name in pair])
    ledger, target = Ledger(site.project / "ledger", site.project / "cache"), run.record
    ledger.create_many(
        [
            dataclasses.replace(
                target, run_id=name[:39].rstrip("-"), handle=f"sagemaker://aws/{name}", state=State.QUEUED, status={}
            )
            for name in names
        ]
    )
    clock = Clock()
    backend = SageMakerBackend(SageMakerTarget(**site.target), "aws", clock=lambda: clock.now, sleep=clock.sleep)
    return Crowd(site, ledger, names, clock, backend)


def _named(model: Json, name: str) -> Json:
    again = {"CVLAUNCH_SUBMISSION": "2"} if re.search("-521v[0-9a-f]{6}-2$", name) else {}
    return {**model, "TrainingJobName": name, "Environment": {**model["Environment"], **again}}


def _mixed(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[Sequence[str]]:
    share = len(theirs) / len(ours)
    for number, name in enumerate(ours):
        yield [name, *theirs[round(number * share) : round((number + 1) * share)]]


ENDS: list[tuple[str, dict[str, str], tuple[State, str, int]]] = [
    ("Completed", {}, (State.SUCCEEDED, "", 1)),
    ("Failed", {"reason": "AlgorithmError: out of luck, exit code: 3"}, (State.FAILED, "out of luck", 1)),
    ("Stopped", {}, (State.CANCELLED, "", 1)),
    (
        "Stopped",
        {"secondary": "MaxRuntimeExceeded"},
        (State.TIMED_OUT, "SageMaker's limit of the running time was reached", 1),
    ),
]


def storm(cloud: AwsCloud) -> None:
    """Always the same one."""
    cloud.heal(), cloud.throttle(LIST, share=0.5), cloud.throttle(DESCRIBE, share=0.5)


def test_500_runs_in_a_storm(site: SageMakerSite) -> None:
    """Of three slugs, a fifth of them sent twice, among jobs of others with such names."""
    slugs = ("digits", "digits-large", "pets")
    names = [f"{slugs[number % 3]}-521v{number:06x}{'-2' if number % 5 == 0 else ''}" for number in range(500)]
    theirs = [f"{slugs[number % 3]}-521v{number:06x}-theirs" for number in range(200)]
    crowd = crowd_of(site, names, theirs)
    cloud = site.cloud
    storm(cloud)

    asked = crowd.poll()
    assert crowd.states() == {
        (State.STARTING, "instances are being prepared", 1): 400,
        (State.STARTING, "instances are being prepared", 2): 100,
    }
    assert asked[DESCRIBE] == 0 and cloud.count(LIST, status=200) <= 9, "three lists, of some 230 each"

    for number, name in enumerate(names[:200]):
        status, how, _ = ENDS[number % 4]
        cloud.finish(name, status, **how)
    for _ in range(10):  # ten calls about one of them may all be sent away: it is asked for again
        if cloud.count(DESCRIBE, status=200) < 200:
            crowd.poll()
    assert cloud.count(DESCRIBE, status=200) == 200, "each that has ended, once"
    found = crowd.states()
    for number, (_, _, (state, reason, _)) in enumerate(ENDS):
        ended = [found[state, reason, attempt] for attempt in (1, 2)]
        assert ended == [40, 10], (number, found)
    assert sum(found.values()) == 500 and found[State.STARTING, "instances are being prepared", 1] == 240

    for name in names[200:]:
        cloud.enter(name, "Training")
    storm(cloud)
    asked = crowd.poll()
    assert crowd.states()[State.RUNNING, "", 1] == 240
    assert asked[DESCRIBE] == 0, "what had ended before is asked for no more"
    lists = cloud.count(LIST)
    assert crowd.clock.now >= (lists - 1) * 0.5, "never more than two a second"


def test_a_run_that_can_t_be_described_hides_no_other(site: SageMakerSite) -> None:
    names = [f"digits-521v{number:06x}" for number in range(8)]
    crowd = crowd_of(site, names)
    for name in names:
        site.cloud.finish(name)
    site.cloud.throttle(DESCRIBE, times=40)
    crowd.poll()
    found = crowd.states()
    assert sum(found.values()) == 8 and found[State.SUCCEEDED, "", 1] >= 4
    assert {state for state, _, _ in found} <= {State.SUCCEEDED, State.FINALIZING}
    crowd.poll()
    assert crowd.states() == {(State.SUCCEEDED, "", 1): 8}


def test_two_lists_a_second(site: SageMakerSite) -> None:
    names = [f"{slug}-521v{number:06x}" for slug in ("one", "two", "three") for number in range(2)]
    backend = SageMakerBackend(SageMakerTarget(**site.target), "aws")
    post(site.cloud, [{**site.cloud.posted(site.send().id), "TrainingJobName": name, "Tags": []} for name in names])
    found = backend.status([Handle("sagemaker", "aws", name) for name in names])
    assert {status.state for status in found.values()} == {State.STARTING}
    times = [call.time for call in site.cloud.calls if call.operation == LIST]
    assert len(times) == 3 and all(later - earlier > 0.4 for earlier, later in itertools.pairwise(times)), times


def test_two_runs_among_very_many_jobs_of_others(site: SageMakerSite) -> None:
    ours = ["digits-521v000000", "digits-621v000000"]
    crowd = crowd_of(site, ours[:1], [f"digits-521v{number:06x}" for number in range(1, 150)])
    post(site.cloud, [{**site.cloud.posted(ours[0]), "TrainingJobName": ours[1]}])
    found = crowd.backend.status([Handle("sagemaker", "aws", name) for name in ours])
    assert len(found) == 2
    assert (site.cloud.count(LIST), site.cloud.count(DESCRIBE)) == (1, 1), "one page, and then by name"


def test_a_job_that_may_not_be_seen_hides_no_other(site: SageMakerSite) -> None:
    runs = [site.send({}, {"name": name}) for name in ("one", "other")]  # which no list has together
    for run in runs:
        site.cloud.finish(name_of(run))
    site.cloud.fail(
        DESCRIBE, "AccessDeniedException", "not authorized to perform: sagemaker:DescribeTrainingJob", times=1
    )
    found = list(site.backend().status([run.handle for run in runs if run.handle]).values())
    assert sorted((status.state, status.native) for status in found) == [
        (State.SUCCEEDED, "Completed"), (State.UNKNOWN, "elsewhere"),
    ]  # fmt: skip
    assert any("sagemaker:DescribeTrainingJob" in status.reason for status in found)
    site.cloud.fail(
        DESCRIBE, "AccessDeniedException", "not authorized to perform: sagemaker:DescribeTrainingJob", times=2
    )
    with pytest.raises(AuthError):
        site.backend().status([run.handle for run in runs if run.handle])


def test_names_that_nobody_can_list(site: SageMakerSite) -> None:
    """Chosen with --run-id, of one run only, of none."""
    names = ["exp-1", "exp-2", "x-521v000001"]
    crowd = crowd_of(site, names)
    found = crowd.backend.status([Handle("sagemaker", "aws", name) for name in (*names, "exp-3")])
    assert [status.native for status in found.values()] == ["InProgress/Starting"] * 3 + ["gone"]
    assert {status.attempt for status in found.values()} == {1}
    assert crowd.backend.status([]) == {}


# -- what AWS says ----------------------------------------------------------------------------------------------------

Told = Callable[[AwsCloud, str], object]


def enters(phase: str, message: str = "") -> Told:
    return lambda cloud, name: cloud.enter(name, phase, message)


def ends(status: str, secondary: str = "", reason: str = "") -> Told:
    return lambda cloud, name: cloud.finish(name, status, secondary=secondary, reason=reason)


def gives_up(cloud: AwsCloud, name: str) -> None:
    cloud.enter(name, "Pending")
    cloud.age(name, 1800)
    cloud.finish(name, "Stopped")


INTERNAL = "InternalServerError: We encountered an internal error. Please try again."
NO_ROOM = "capacity: it could not run in the time that it may wait"
SAID: dict[str, tuple[Told, State, str, str]] = {
    "waits": (enters("Pending"), State.QUEUED, "InProgress/Pending", "waits for instances: Waiting for capacity"),
    "waits while starting": (
        enters("Starting", "Insufficient capacity error from EC2 while launching instances, retrying!"),
        State.QUEUED,
        "InProgress/Starting",
        "Insufficient capacity error from EC2",
    ),
    "waited in vain": (gives_up, State.ERROR, "Stopped", NO_ROOM),
    "spot in vain": (ends("Stopped", "MaxWaitTimeExceeded"), State.ERROR, "Stopped/MaxWaitTimeExceeded", NO_ROOM),
    "time is up": (
        ends("Stopped", "MaxRuntimeExceeded"),
        State.TIMED_OUT,
        "Stopped/MaxRuntimeExceeded",
        "SageMaker's limit of the running time",
    ),
    "uploading": (enters("Uploading"), State.FINALIZING, "InProgress/Uploading", "packed and copied"),
    "interrupted": (enters("Interrupted"), State.RESTARTING, "InProgress/Interrupted", "taken away"),
    "restarting": (enters("Restarting"), State.RESTARTING, "InProgress/Restarting", "starts it again"),
    "stopping": (enters("Stopping"), State.STOPPING, "InProgress/Stopping", ""),
    "stopped in the console": (ends("Stopped"), State.CANCELLED, "Stopped", ""),
    "internal": (ends("Failed", "", INTERNAL), State.ERROR, "Failed", "retries_by_platform in the target does that"),
    "a new word": (enters("Thinking"), State.RUNNING, "InProgress/Thinking", "SageMaker says Thinking"),
}


@pytest.mark.parametrize("what", SAID)
def test_what_aws_says(site: SageMakerSite, what: str) -> None:
    told, state, native, reason = SAID[what]
    run = site.send({}, {"resources": {"gpus": 1, "max_wait": "30m"}})
    told(site.cloud, run.id)
    status = run.status()
    assert (status.state, status.native) == (state, native) and reason in status.reason
    assert refresh([run.record], ledger=Ledger(), now=lambda: time.time() + 3600) == []
    assert Run(run.id).record.state is state, "an hour later, too"


def test_no_room_where_instances_are_asked_for(aws: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    site = make_site(aws, tmp_path, scripted=False)
    for how, state in (("pend", State.QUEUED), ("fail", State.ERROR)):
        aws.no_capacity("ml.g4dn.xlarge", how=how)  # type: ignore[arg-type]
        run = site.send({}, {"resources": {"gpus": 1, "gpu": "T4"}})
        status = until(lambda run=run, state=state: (found := run.status()).state is state and found)  # type: ignore[misc]
        assert "capacity" in status.reason
    assert "try again later, name more GPUs in resources.gpu, or another region" in status.reason
    assert status.reason.startswith("capacity: CapacityError: Unable to provision requested ML compute capacity.")


RESULT = {"state": "FAILED", "exit_code": 3, "reason": "out of luck", "attempt": 2, "native_id": ""}
LEFT: dict[str, tuple[Json | None, tuple[State, str, int | None, int]]] = {
    "failed": (RESULT, (State.FAILED, "out of luck", 3, 2)),
    "succeeded": ({**RESULT, "state": "SUCCEEDED", "exit_code": 0, "reason": ""}, (State.SUCCEEDED, "", 0, 2)),
    "nothing": (None, (State.UNKNOWN, "region eu-west-1 has no training job {}", None, 1)),
    "nonsense": ({"state": 1}, (State.UNKNOWN, "region eu-west-1 has no training job {}", None, 1)),
}


@pytest.mark.parametrize("what", LEFT)
def test_a_job_that_somebody_has_deleted(site: SageMakerSite, what: str) -> None:
    """What the runner has left tells of its end."""
    left, (state, reason, code, attempt) = LEFT[what]
    run = site.send()
    if left is not None:
        open_store(run.output).write("output/result.json", json.dumps(left).encode())
    site.cloud.finish(run.id, "Failed", reason="AlgorithmError: , exit code: 3")
    site.cloud.client("sagemaker").delete_training_job(TrainingJobName=run.id)
    status = run.status()
    assert (status.state, status.reason, status.exit_code, status.attempt) == (
        state,
        reason.format(run.id),
        code,
        attempt,
    )


def test_the_end_in_result_json_is_of_this_job(site: SageMakerSite) -> None:
    run = site.send()
    result = {**RESULT, "native_id": site.cloud.job(run.id)["TrainingJobArn"]}
    open_store(run.output).write("output/result.json", json.dumps(result).encode())
    site.cloud.finish(run.id, "Failed", reason="AlgorithmError: something else, exit code: 1")
    status = run.status()
    assert (status.state, status.exit_code, status.reason, status.attempt) == (State.FAILED, 3, "out of luck", 2)
    again = run.resume()
    site.cloud.finish(name_of(again), "Failed", reason="AlgorithmError: something else, exit code: 1")
    status = again.status()
    assert (status.exit_code, status.reason, status.attempt) == (1, "something else", 2), "not that of the first"


# -- keys -------------------------------------------------------------------------------------------------------------

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MINE = "AKIAMINEMINEMINEMINE"


def write_keys(home: Path, name: str = "default", key: str = MINE, mode: int = 0o600) -> Path:
    file = home / ".aws/credentials"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")
    file.chmod(mode)
    return file


def write_config(home: Path, text: str) -> None:
    (home / ".aws").mkdir(exist_ok=True)
    with (home / ".aws/config").open("a") as file:
        file.write(text)


@pytest.fixture
def keyless(site: SageMakerSite, monkeypatch: pytest.MonkeyPatch) -> SageMakerSite:
    """No keys in the environment."""
    for name in KEYS:
        monkeypatch.delenv(name)
    return site


def assume(site: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_keys(home, "base")
    role = site.cloud.role("submitter")
    write_config(home, f"[profile lab]\nrole_arn = {role}\nsource_profile = base\nregion = {REGION}\n")


def sign_in(site: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    cache = str(home / ".aws/sso/cache")
    monkeypatch.setattr(botocore.tokens.SSOTokenProvider, "_SSO_TOKEN_CACHE_DIR", cache)
    return site.cloud.sign_in(home, "lab")


PROFILES: dict[str, Callable[[SageMakerSite, Path, pytest.MonkeyPatch], object]] = {"assumed": assume, "sso": sign_in}


@pytest.mark.parametrize("how", PROFILES)
def test_a_profile_for_everything(
    keyless: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, how: str
) -> None:
    site = keyless
    PROFILES[how](site, home, monkeypatch)
    site.write({"profile": "lab", "region": None})
    before = len(site.cloud.calls)
    assert main(["submit", "job.yaml", "--target", "aws", "--run-id", "mine-1"]) == 0
    site.cloud.say("mine-1", "news")
    bucket = site.cloud.account
    bucket.write(site.bucket, "runs/mine-1/output/metrics.jsonl", b"{}\n")
    site.cloud.finish("mine-1")
    for command in (["status", "mine-1"], ["logs", "mine-1"], ["sync", "mine-1"]):
        assert main(command) == 0, capfd.readouterr()
    said = capfd.readouterr()
    assert "SUCCEEDED" in said.out and "news" in said.out
    assert (site.project / "runs/mine-1/output/metrics.jsonl").read_text() == "{}\n"
    calls = [call for call in site.cloud.calls[before:] if call.operation not in ("AssumeRole", "GetRoleCredentials")]
    assert {call.service for call in calls} == {"sagemaker", "s3", "logs"}
    assert {call.status for call in calls} <= {200, 206, 404}
    assert all(call.access_key.startswith("ASIA") for call in calls), calls
    taken = [call for call in site.cloud.calls[before:] if call.operation in ("AssumeRole", "GetRoleCredentials")]
    assert len(taken) <= 8, "not for each call"


def test_a_role_is_taken_once_for_many_ends(
    keyless: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of which is read in S3; an MFA device would be asked for each time."""
    site = keyless
    assume(site, home, monkeypatch)
    site = dataclasses.replace(site, target={**site.target, "profile": "lab"})
    names = [f"digits-521v{number:06x}" for number in range(20)]
    crowd = crowd_of(site, names)
    for name in names:
        site.cloud.finish(name)
    asked = crowd.poll()
    assert asked == {LIST: 1, DESCRIBE: 20, "GetObject": 20, "AssumeRole": 1}, "for SageMaker; S3 had it before"


def test_who_may_not_write_may_watch(site: SageMakerSite) -> None:
    """A colleague, whose wish for quick news nobody hears then."""
    run = site.send()
    site.cloud.fail("PutObject", "AccessDenied", "Access Denied", status=403, times=None)
    site.cloud.finish(run.id)
    assert [event.state for event in run.follow() if isinstance(event, Status)] == [State.SUCCEEDED]


@pytest.mark.parametrize("services", [True, False])
def test_a_profile_that_says_where_aws_is(
    keyless: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch, services: bool
) -> None:
    site = keyless
    url = site.cloud.endpoint
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    write_keys(home, "lab")
    nested = "".join(f"{name} =\n  endpoint_url = {url}\n" for name in ("s3", "sagemaker", "cloudwatch_logs"))
    where = "services = here\n[services here]\n" + nested if services else f"endpoint_url = {url}\n"
    write_config(home, f"[profile lab]\nregion = {REGION}\n{where}")
    run = site.send({"profile": "lab", "region": None})
    assert run.status().state is State.STARTING
    site.cloud.say(run.id, "news")
    site.cloud.finish(run.id)
    assert [line.text for line in run.logs()] == ["news"]


def test_keys_that_somebody_renews_while_we_wait(keyless: SageMakerSite, home: Path, capfd: Any) -> None:
    site = keyless
    write_keys(home)
    run = site.send()
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(main(["wait", run.id])))
    waiting.start()
    until(lambda: site.cloud.count(DESCRIBE))
    write_keys(home, key="AKIANEWNEWNEWNEWNEWN")
    site.cloud.expire(MINE)
    seen = len(site.cloud.calls)
    until(lambda: any(call.access_key == "AKIANEWNEWNEWNEWNEWN" for call in site.cloud.calls[seen:]))
    site.cloud.finish(run.id)
    waiting.join()
    assert codes == [0]
    assert f"{run.id}  SUCCEEDED" in capfd.readouterr().out


@pytest.mark.parametrize("how", ["expire", "revoke"])
def test_keys_that_are_replaced_between_two_looks(keyless: SageMakerSite, home: Path, how: str) -> None:
    site = keyless
    write_keys(home)
    run = site.send()
    assert run.status().state is State.STARTING
    getattr(site.cloud, how)(MINE)
    with pytest.raises(AuthError):
        run.status()
    write_keys(home, key="AKIANEWNEWNEWNEWNEWN")
    assert run.status().state is State.STARTING


@pytest.mark.parametrize("command", ["wait", "watch"])
def test_keys_that_nobody_renews(site: SageMakerSite, capfd: Any, command: str) -> None:
    run = site.send()
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(main([command, run.id])))
    waiting.start()
    until(lambda: site.cloud.count(DESCRIBE))
    site.cloud.expire(site.cloud.access_key)
    waiting.join()
    said = capfd.readouterr().err
    assert codes == [4]
    assert re.search("credentials .*have expired: (set new ones|log in again)", said)
    assert f"cvlaunch {command} {run.id}" in said
    assert Run(run.id).record.state is State.STARTING


@pytest.mark.parametrize("later", [False, True], ids=["another process", "this process"])
def test_a_login_that_ends(
    keyless: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, later: bool
) -> None:
    site = keyless
    token = sign_in(site, home, monkeypatch)
    run = site.send({"profile": "lab", "region": None})
    assert run.status().state is State.STARTING
    site.cloud.sign_out(token)
    for key in {call.access_key for call in site.cloud.calls if call.access_key.startswith("ASIA")}:
        site.cloud.expire(key)
    if later:
        with pytest.raises(AuthError, match="aws sso login --profile lab"):
            run.status()
        return
    assert main(["wait", run.id]) == 4
    (line,) = capfd.readouterr().err.splitlines()
    assert "aws sso login --profile lab" in line and f"cvlaunch wait {run.id}" in line


def test_a_role_that_stands_on_a_login(
    keyless: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The way out names the profile that can be logged in to."""
    site = keyless
    token = sign_in(site, home, monkeypatch)
    role = site.cloud.role("submitter")
    write_config(home, f"[profile team]\nrole_arn = {role}\nsource_profile = lab\nregion = {REGION}\n")
    run = site.send({"profile": "team", "region": None})
    site.cloud.sign_out(token)
    assert main(["wait", run.id]) == 4
    assert "aws sso login --profile lab" in capfd.readouterr().err


Prepare = Callable[[SageMakerSite, Path, pytest.MonkeyPatch], object]


def skewed(code: str, message: str) -> Prepare:
    return lambda site, home, patch: site.cloud.fail("*", code, message, status=403, times=None)


EARLY = "Signature not yet current: 20261122T130000Z is still later than 20261122T125500Z"
LATE = "Signature expired: 20261122T120000Z is now earlier than 20261122T125500Z"
WRONG: dict[str, tuple[Prepare, Json, type[Exception], str]] = {
    "unknown profile": (
        lambda site, home, patch: write_keys(home, "labs"),
        {"profile": "lab"},
        SpecError,
        r"targets.yaml:\d+: targets.aws.profile: the AWS profile 'lab' is not in ~/.aws \(there: labs\); did you mean",
    ),
    "readable by others": (
        lambda site, home, patch: write_keys(home, mode=0o644),
        {},
        AuthError,
        r"credentials.*chmod 600",
    ),
    "none": (lambda site, home, patch: None, {}, AuthError, "no AWS credentials found: set AWS_ACCESS_KEY_ID and"),
    "a profile without keys": (
        lambda site, home, patch: write_config(home, "[profile lab]\nregion = eu-west-1\n"),
        {"profile": "lab"},
        AuthError,
        "the AWS profile 'lab' has no credentials: run: aws configure --profile lab",
    ),
    "no region": (
        lambda site, home, patch: (write_keys(home), patch.delenv("AWS_REGION"), patch.delenv("AWS_DEFAULT_REGION")),
        {"region": None},
        SpecError,
        r"targets.yaml:\d+: targets.aws.region: nothing says which region target 'aws' is in: add region: eu-west-1",
    ),
    "a program that fails": (
        lambda site, home, patch: write_config(home, "[profile lab]\ncredential_process = false\n"),
        {"profile": "lab"},
        AuthError,
        "AWS gave profile 'lab' no credentials: .*",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_an_identity(
    keyless: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    prepare, target, kind, said = WRONG[what]
    prepare(keyless, home, monkeypatch)
    error = keyless.refused(target)
    assert isinstance(error, kind)
    assert re.search(said, str(error), re.DOTALL), str(error)
    assert keyless.cloud.names == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("InvalidSignatureException", EARLY),
        ("InvalidSignatureException", LATE),
        ("SignatureDoesNotMatch", LATE),
        ("RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
        ("RequestExpired", "Request has expired."),
    ],
)
def test_a_clock_that_is_wrong(site: SageMakerSite, code: str, message: str) -> None:
    run = site.send()
    site.cloud.fail(DESCRIBE, code, message, status=403)
    with pytest.raises(AuthError, match="the clock of this machine is wrong, says AWS"):
        run.status()


# -- places -----------------------------------------------------------------------------------------------------------


def test_endpoints_of_a_target(site: SageMakerSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    run = site.send({"endpoints": dict.fromkeys(("sagemaker", "s3", "logs"), site.cloud.endpoint)})
    site.cloud.say(run.id, "news")
    site.cloud.finish(run.id)
    assert run.status().state is State.SUCCEEDED
    assert [line.text for line in run.logs()] == ["news"]
    variables = site.cloud.posted(run.id)["Environment"]
    assert "endpoint" not in json.loads(variables["CVLAUNCH_STORAGE"]), "how you reach S3 is nothing to a job"


def test_an_endpoint_of_jobs_travels(site: SageMakerSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """You may have another one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", site.cloud.endpoint)
    endpoints, storage = {"s3": site.cloud.endpoint}, {"endpoint": "https://s3.inside.example.com"}
    run = site.send({"endpoints": endpoints, "storage": storage})
    variables = site.cloud.posted(run.id)["Environment"]
    assert json.loads(variables["CVLAUNCH_STORAGE"])["endpoint"] == storage["endpoint"]


def test_a_private_authority(site: SageMakerSite, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make_certificate(site.project)
    with site.cloud.behind_tls(certificate, key) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        error = site.refused({"endpoints": {"s3": site.cloud.endpoint}})
        assert isinstance(error, SpecError) and "ca_bundle: the certificate of AWS (sagemaker, region" in str(error)
        run = site.send({"storage": {"ca_bundle": str(certificate)}})
        assert run.status().state is State.STARTING
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert site.send().status().state is State.STARTING


def test_nobody_is_there(site: SageMakerSite) -> None:
    error = site.refused({"endpoints": {"sagemaker": "http://127.0.0.1:9"}})
    assert isinstance(error, UnreachableError)
    assert "AWS (sagemaker, region eu-west-1) did not answer" in str(error)


REGIONS: dict[str, tuple[dict[str, str | None], str, str]] = {
    "of the target": ({"AWS_REGION": "us-west-2"}, "eu-central-1", "eu-central-1"),
    "of the environment": ({"AWS_REGION": "us-west-2", "AWS_DEFAULT_REGION": "us-east-1"}, "", "us-west-2"),
    "of the environment, as it was": ({"AWS_REGION": None, "AWS_DEFAULT_REGION": "us-east-1"}, "", "us-east-1"),
    "of the profile": ({"AWS_REGION": None, "AWS_DEFAULT_REGION": None}, "", "ap-south-1"),
}


@pytest.mark.parametrize("which", REGIONS)
def test_regions(site: SageMakerSite, home: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    environment, written, region = REGIONS[which]
    write_config(home, "[default]\nregion = ap-south-1\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    bucket = site.cloud.bucket(f"in-{region}-{site.bucket}", region=region)
    before = len(site.cloud.calls)
    image = IMAGE.replace(REGION, region)
    site.cloud.serve_image(image, image="none")
    run = site.send({"region": written or None, "output": f"{bucket}/runs"}, {"image": image})
    assert site.cloud.job(run.id)["TrainingJobArn"].split(":")[3] == region
    assert run.status().state is State.STARTING
    assert {call.region for call in site.cloud.calls[before:]} == {region}


@pytest.mark.parametrize(
    ("partition", "region", "domain"),
    [("aws-cn", "cn-north-1", "amazonaws.com.cn"), ("aws-us-gov", "us-gov-west-1", "amazonaws.com")],
)
def test_other_partitions(site: SageMakerSite, partition: str, region: str, domain: str) -> None:
    role = f"arn:{partition}:iam::123456789012:role/trainer"
    image = f"123456789012.dkr.ecr.{region}.{domain}/team/trainer:1"
    plan = render(site.write({"region": region, "role": role}, {"image": image}), target="aws")
    assert plan.placeholders == () and json.loads(plan.text)["RoleArn"] == role
