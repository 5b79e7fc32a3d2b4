"""A run is one training job, whatever breaks on the way, and whoever else has jobs of such names."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher import ConflictError, Run, State, manifest, submit
from launcher.cli.app import main
from launcher.errors import CapacityError, SpecError, UnreachableError
from launcher.ledger import Ledger
from launcher.run import refresh, runs
from launcher.sagemaker.request import PLAN_SHA, RUN
from launcher.stores import open_store
from tests.cli_tool import COMMAND
from tests.sagemaker_site import SageMakerSite, make_site, name_of
from tests.services.aws import AwsCloud

CREATE = "CreateTrainingJob"


@pytest.fixture
def site(aws: AwsCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SageMakerSite:
    monkeypatch.chdir(tmp_path)
    return make_site(aws, tmp_path)


def look(seconds_later: float = 0.0) -> None:
    """As `cvlaunch runs` does."""
    ledger = Ledger()
    assert refresh(ledger.all(), ledger=ledger, now=lambda: time.time() + seconds_later) == []


# -- cut off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "posts"), [("before", 2), ("after", 2)])
def test_an_answer_that_is_lost_once_is_asked_for_again(site: SageMakerSite, when: Any, posts: int) -> None:
    """The second call meets the name in use, by a job that is ours."""
    site.cloud.cut(CREATE, when)
    run = site.send()
    assert (run.record.state, name_of(run), site.cloud.names) == (State.QUEUED, run.id, [run.id])
    assert site.cloud.count(CREATE) == posts
    assert site.cloud.count("ListTags") == (when == "after")


def test_a_call_that_never_arrives_is_in_doubt_and_then_not_submitted(site: SageMakerSite) -> None:
    site.cloud.cut(CREATE, times=None)
    error = site.refused()
    (run,) = runs()
    assert isinstance(error, UnreachableError)
    assert f"whether {run.id} was submitted is not known" in str(error)
    assert f"cvlaunch submit --resume {run.id}" in str(error)
    for later, state in ((0, State.SENDING), (30, State.SENDING), (61, State.NOT_SUBMITTED)):
        look(later)
        assert Run(run.id).record.state is state
    site.cloud.heal()
    sent = Run(run.id).resume()
    assert (name_of(sent), site.cloud.names) == (run.id, [run.id])


def test_a_call_whose_answers_are_all_lost_is_adopted(site: SageMakerSite, capfd: pytest.CaptureFixture[str]) -> None:
    site.cloud.cut(CREATE, "after")
    error = site.refused(sleep=lambda _: site.cloud.cut(CREATE, "before", times=None))
    assert isinstance(error, UnreachableError)
    (run,) = runs()
    assert (run.record.state, site.cloud.names) == (State.SENDING, [run.id])
    assert main(["runs"]) == 0
    assert f"{run.id}  STARTING" in capfd.readouterr().out
    assert name_of(Run(run.id)) == run.id
    assert main(["submit", "--resume", run.id]) == 2
    assert "needs no resuming" in capfd.readouterr().err
    assert site.cloud.names == [run.id]


AFTERWARDS: dict[str, Callable[[AwsCloud], None]] = {
    "keys expire": lambda cloud: cloud.expire(cloud.access_key),
    "keys are revoked": lambda cloud: cloud.revoke(cloud.access_key),
    "the job itself has used up the quota": lambda cloud: cloud.fail(
        CREATE, "ResourceLimitExceeded", "The account-level service limit 'x' is 1 Instances", times=None
    ),
    "its tags are hidden": lambda cloud: cloud.fail("ListTags", "AccessDeniedException", "no", times=None),
    "it can't be described": lambda cloud: cloud.fail("DescribeTrainingJob", "AccessDeniedException", "no", times=None),
}


@pytest.mark.parametrize("what", AFTERWARDS)
def test_a_no_that_follows_a_lost_answer_is_no_refusal(site: SageMakerSite, what: str) -> None:
    """The job is there; to say NOT_SUBMITTED would be to forget it."""
    site.cloud.cut(CREATE, "after")
    error = site.refused(sleep=lambda _: AFTERWARDS[what](site.cloud))
    assert isinstance(error, UnreachableError) and "was submitted is not known" in str(error)
    (run,) = runs()
    assert (run.record.state, site.cloud.names) == (State.SENDING, [run.id])
    site.cloud.heal()
    assert run.status().state is State.STARTING


def test_a_no_that_comes_first_is_one(site: SageMakerSite) -> None:
    site.cloud.fail(CREATE, "ResourceLimitExceeded", "The account-level service limit 'x' is 1 Instances", times=None)
    assert isinstance(site.refused(), CapacityError)
    (run,) = runs()
    assert (run.record.state, site.cloud.names) == (State.NOT_SUBMITTED, [])


# -- names in use -----------------------------------------------------------------------------------------------------


def theirs(site: SageMakerSite, name: str, **tags: str) -> None:
    """A job that somebody has made by hand."""
    body = site.cloud.posted(name_of(site.send(ledger=Ledger(site.project / "theirs"))))
    listed = [{"Key": key.replace("_", "-"), "Value": value} for key, value in tags.items()]
    site.cloud.client("sagemaker").create_training_job(**{**body, "TrainingJobName": name, "Tags": listed})


@pytest.mark.parametrize("tags", [{}, {"cvlaunch_run": "another-1"}, {"cvlaunch_run": "mine-1"}])
def test_a_name_that_is_somebody_else_s(site: SageMakerSite, tags: dict[str, str], capfd: Any) -> None:
    theirs(site, "mine-1", **tags)
    before = site.cloud.job("mine-1")
    site.write()
    assert main(["submit", "job.yaml", "--target", "aws", "--run-id", "mine-1"]) == 7
    said = capfd.readouterr().err
    assert "region eu-west-1 has another training job mine-1; choose another --run-id, or delete that one" in said
    assert site.cloud.job("mine-1") == before and site.cloud.names.count("mine-1") == 1
    assert Run("mine-1").record.state is State.NOT_SUBMITTED


def test_a_name_in_use_by_a_job_that_aws_does_not_show_is_in_doubt(site: SageMakerSite) -> None:
    site.cloud.cut(CREATE, "after")
    site.cloud.fail("DescribeTrainingJob", "ValidationException", "Requested resource not found.")
    assert isinstance(site.refused(), UnreachableError)
    (run,) = runs()
    assert (run.record.state, site.cloud.names) == (State.SENDING, [run.id])
    assert run.status().state is State.STARTING and site.cloud.names == [run.id]


def test_the_same_run_id_with_another_plan(site: SageMakerSite) -> None:
    mine = site.send(run_id="mine-1")
    before = (site.cloud.posted("mine-1"), site.cloud.tags("mine-1"), site.cloud.job("mine-1"))
    error = site.refused({}, {"command": ["false"]}, run_id="mine-1", ledger=Ledger(site.project / "other"))
    assert isinstance(error, ConflictError) and error.exit_code == 7
    assert (site.cloud.posted("mine-1"), site.cloud.tags("mine-1"), site.cloud.job("mine-1")) == before
    assert site.cloud.tags("mine-1")[PLAN_SHA] == mine.record.plan["plan_sha"]


def test_two_who_send_one_run_at_once(site: SageMakerSite) -> None:
    """Their ledgers know nothing of each other."""
    job = site.write()
    ledgers = [Ledger(site.project / f"ledger-{number}") for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        sent = list(pool.map(lambda ledger: submit(job, target="aws", run_id="twice-1", ledger=ledger), ledgers))
    assert {name_of(run) for run in sent} == {"twice-1"}
    assert site.cloud.names == ["twice-1"]
    assert site.cloud.count(CREATE, status=200) == 1 and site.cloud.count(CREATE) == 4


# -- killed -----------------------------------------------------------------------------------------------------------


def stored(site: SageMakerSite, run_id: str) -> bool:
    puts = [call for call in site.cloud.calls if (call.operation, call.status) == ("PutObject", 200)]
    return any(f"/{run_id}/" in call.path for call in puts)


def in_state(run_id: str, state: State) -> bool:
    ledger = Ledger()
    return run_id in ledger and ledger.get(run_id).state is state


MOMENTS: dict[str, Callable[[SageMakerSite, str], bool]] = {
    "killed-entered": lambda site, run_id: run_id in Ledger(),
    "killed-stored": stored,
    "killed-sending": lambda site, run_id: in_state(run_id, State.SENDING),
    "killed-created": lambda site, run_id: run_id in site.cloud.names,
    "killed-noted": lambda site, run_id: in_state(run_id, State.QUEUED),
}


def submit_and_kill(site: SageMakerSite, run_id: str) -> None:
    """kill -9 at its moment."""
    command = [*COMMAND, "submit", "job.yaml", "--target", "aws", "--run-id", run_id]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not MOMENTS[run_id](site, run_id):
        time.sleep(0.0005)
    process.kill()
    process.wait()


def test_killed_at_any_moment(site: SageMakerSite) -> None:
    site.write()
    threads = [threading.Thread(target=submit_and_kill, args=[site, run_id]) for run_id in MOMENTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    look()
    look(61)
    left = {run.id: run.record.state for run in runs()}
    assert set(left) == set(MOMENTS)
    assert left["killed-created"] is left["killed-noted"] is State.STARTING
    lacking = [run_id for run_id, state in left.items() if state is State.NOT_SUBMITTED]
    assert sorted(site.cloud.names) == sorted(set(left) - set(lacking))
    for run_id in lacking:
        if stored(site, run_id):
            assert name_of(Run(run_id).resume()) == run_id
        else:
            with pytest.raises(SpecError, match=r"job\.json was stored; submit the job file again"):
                Run(run_id).resume()


# -- sent again -------------------------------------------------------------------------------------------------------


def test_a_failed_run_goes_on_as_a_second_job(site: SageMakerSite, capfd: pytest.CaptureFixture[str]) -> None:
    run = site.send()
    first, second = run.id, f"{run.id}-2"
    site.cloud.finish(first, "Failed", reason="AlgorithmError: out of luck, exit code: 3")
    assert (run.status().state, run.status().exit_code) == (State.FAILED, 3)
    run = run.resume()
    posted = site.cloud.posted(second)
    assert (name_of(run), site.cloud.names) == (second, [first, second])
    assert posted["Environment"] == {**site.cloud.posted(first)["Environment"], "CVLAUNCH_SUBMISSION": "2"}
    for key in ("CheckpointConfig", "OutputDataConfig", "AlgorithmSpecification"):
        assert posted[key] == site.cloud.posted(first)[key], "its checkpoints are restored, its results join the first"
    tags = site.cloud.tags(second)
    assert (tags[RUN], tags[PLAN_SHA]) == (run.id, run.record.plan["plan_sha"])
    status = run.status()
    assert (status.state, status.attempt) == (State.RESTARTING, 2)
    site.cloud.say(first, "old news")
    site.cloud.say(second, "news")
    site.cloud.finish(second)
    assert (run.status().state, run.status().attempt) == (State.SUCCEEDED, 2)
    assert main(["logs", run.id]) == 0
    assert "news" in (said := capfd.readouterr().out) and "old news" not in said


def test_a_foreign_image_with_as_many_variables_as_there_can_be_is_sent_again(site: SageMakerSite) -> None:
    variables = {f"V{number}": "x" for number in range(100)}
    first = site.send({}, {"runner": "none", "env": variables})
    for number in (2, 3):
        site.cloud.finish(name_of(first), "Failed", reason="AlgorithmError: , exit code: 1")
        assert first.status().attempt == number - 1
        first = first.resume()
        assert name_of(first) == f"{first.id}-{number}" and first.status().attempt == number
        assert site.cloud.posted(name_of(first))["Environment"] == variables
    site.cloud.finish(name_of(first))
    first.remove(remote=True)
    assert site.cloud.names == []


def test_both_jobs_go_with_the_run(site: SageMakerSite) -> None:
    run = site.send()
    for name in (run.id, f"{run.id}-2", f"{run.id}-3"):
        site.cloud.finish(name, "Failed", reason="AlgorithmError: , exit code: 1")
        assert run.status().state is State.FAILED
        run = run.resume() if not name.endswith("-3") else run
    assert len(site.cloud.names) == 3
    theirs(site, f"{run.id}-more")
    site.cloud.finish(f"{run.id}-more")
    left = {name for name in site.cloud.names if not name.startswith(run.id)} | {f"{run.id}-more"}
    assert main(["rm", run.id, "--remote", "--yes"]) == 0
    assert set(site.cloud.names) == left
    assert list(open_store(run.output).list()) == []


def test_a_run_that_was_deleted_is_lost_and_sent_again(site: SageMakerSite) -> None:
    run = site.send()
    site.cloud.finish(run.id, "Failed", reason="InternalServerError: We encountered an internal error.")
    site.cloud.client("sagemaker").delete_training_job(TrainingJobName=run.id)
    look()
    assert Run(run.id).record.last_status.native == "gone"
    look(601)
    assert Run(run.id).record.state is State.LOST
    assert name_of(Run(run.id).resume()) == f"{run.id}-2"


def test_a_second_submission_that_did_not_arrive(site: SageMakerSite) -> None:
    """What is found is the first job, whose end is told again; no name is used for two jobs."""
    run = site.send()
    site.cloud.finish(run.id, "Failed", reason="AlgorithmError: , exit code: 1")
    run.status()
    ledger = Ledger()
    ledger.update(run.id, state=State.SENDING, handle=None, owner={}, attempt=2)
    look()
    assert (ledger.get(run.id).state, ledger.get(run.id).attempt) == (State.FAILED, 2)
    assert name_of(Run(run.id).resume()) == f"{run.id}-3"
    assert site.cloud.names == [run.id, f"{run.id}-3"]


def test_a_second_submission_whose_answer_is_lost(site: SageMakerSite) -> None:
    run = site.send()
    site.cloud.finish(run.id, "Failed", reason="AlgorithmError: , exit code: 1")
    run.status()
    site.cloud.cut(CREATE, "after")
    assert name_of(run.resume()) == f"{run.id}-2"
    Ledger().update(run.id, state=State.SENDING, handle=None, owner={})
    look()
    assert (name_of(Run(run.id)), Run(run.id).record.state) == (f"{run.id}-2", State.RESTARTING)
    assert site.cloud.names == [run.id, f"{run.id}-2"]


def test_a_run_whose_name_is_the_beginning_of_another(site: SageMakerSite) -> None:
    """`exp-2` is what a second job of `exp` would be called."""
    site.send(run_id="exp")
    other = site.send({}, {"command": ["false"]}, run_id="exp-2")
    Ledger().update("exp", state=State.SENDING, handle=None, owner={})
    look()
    assert name_of(Run("exp")) == "exp" and name_of(Run("exp-2")) == "exp-2"
    site.cloud.finish("exp", "Failed", reason="AlgorithmError: , exit code: 1")
    Run("exp").status()
    with pytest.raises(ConflictError, match="another training job exp-2"):
        Run("exp").resume()
    Ledger().update("exp", state=State.FAILED, handle="sagemaker://aws/exp", attempt=2)
    third = Run("exp").resume()
    assert name_of(third) == "exp-3"
    site.cloud.finish("exp-3", "Failed", reason="AlgorithmError: , exit code: 1")
    site.cloud.finish("exp-2")
    third.remove(remote=True)
    assert site.cloud.names == ["exp-2"] and other.status().state is State.SUCCEEDED


# -- requests ---------------------------------------------------------------------------------------------------------


def test_requests_before_a_job_is_made(site: SageMakerSite) -> None:
    """job.json, and the manifest of each channel."""
    data = site.project / "data"
    (data / "cats").mkdir(parents=True)
    (data / "cats/1.txt").write_text("cat")
    for channel in ("train", "val"):
        manifest.push(data, open_store(f"s3://{site.bucket}/{channel}"))
    job = {"data": {channel: f"s3://{site.bucket}/{channel}" for channel in ("train", "val")}}
    asked = site.asked(lambda: site.send({}, job))
    assert sorted(asked) == [CREATE, "GetObject", "GetObject", "PutObject"] and asked[-1] == CREATE
    asked = site.asked(site.send)
    assert asked == ["PutObject", CREATE]
    body = site.cloud.posted(runs()[0].id)
    assert json.loads(site.cloud.account.read(site.bucket, f"runs/{body['TrainingJobName']}/input/config/job.json"))


def test_rendering_asks_for_nothing(site: SageMakerSite, capfd: pytest.CaptureFixture[str]) -> None:
    site.write({}, {"data": {"train": f"s3://{site.bucket}/train"}})
    assert site.asked(lambda: main(["render", "job.yaml", "--target", "aws"])) == []
    assert json.loads(capfd.readouterr().out)["TrainingJobName"]
