"""The runner under SageMaker's rules: job.json by URI, folders that the platform moves, no network, packed weights."""

from __future__ import annotations

import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher import contract
from launcher.contract import MIRROR, Channel, Code, JobFile, sha256_file
from launcher.ledger import Ledger, RunRecord
from launcher.status import State
from launcher.stores import FolderStore, file_uri
from launcher.submission import prepare
from launcher.sync import read_appended, sync_run
from tests.runner_world import AS_SOMEONE, RunnerWorld, Running, folder_of_another, python, until
from tests.s3_fixtures import Bucket
from tests.services.aws import AwsCloud

ARN = "arn:aws:sagemaker:eu-west-1:123456789012:training-job/shapes-1"
JOB = {"TRAINING_JOB_NAME": "shapes-1", "TRAINING_JOB_ARN": ARN}
MOVED = {"checkpoints": "platform", "model": "platform", "output": "runner"}
ISOLATED = dict.fromkeys(contract.OUTPUT_FOLDERS, "platform")

ONE_STEP = """
from launcher.contract import newest_checkpoint
newest = newest_checkpoint(ml.checkpoints)
step = int(newest.name) + 1 if newest else 1
print("step", step, flush=True)
metrics(step, loss=1 / step)
(ml.model / "best.pt").write_text(f"model of step {step}")
checkpoint(step)
def stop(*_):
    leave(75); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if step == 1:
    ready()
    time.sleep(60)
"""


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path, in_place=False)


def machine_is_taken(world: RunnerWorld) -> None:
    """Spot: /opt/ml is fresh, but for the checkpoints that the platform restores."""
    world.root.rename(taken := world.folder / "taken")
    markers = shutil.ignore_patterns("*.sagemaker-uploading", "*.sagemaker-uploaded")  # which don't leave
    shutil.copytree(taken / "checkpoints", world.root / "checkpoints", ignore=markers)
    shutil.rmtree(taken)


def preempted(world: RunnerWorld, job: JobFile, **env: str) -> Running:
    running = world.start(job, env={**JOB, **env}).printed("ready").signal()
    assert running.end().code == 75
    return running


# -- job.json ---------------------------------------------------------------------------------------------------------


def stored_job(world: RunnerWorld, bucket: Bucket, command: tuple[str, ...]) -> dict[str, str]:
    """Puts job.json where the client does; the variables that a training job gets."""
    options = bucket.server.options.to_mapping()
    job = world.job(command, output=f"{bucket.uri}/runs", storage=options)
    bucket.store().write(contract.JOB, job.to_bytes())
    return {
        "CVLAUNCH_JOB": f"{bucket.uri}/runs/shapes-1/{contract.JOB}",
        "CVLAUNCH_STORAGE": json.dumps(options),
        **JOB,
    }


def test_the_job_comes_from_the_output_store(world: RunnerWorld, moto_bucket: Bucket) -> None:
    command = python(
        "print('found', os.environ['CVLAUNCH_NATIVE_ID'], [n for n in os.environ if n.endswith('_STORAGE')])"
    )
    ended = world.end(world.job(), env=stored_job(world, moto_bucket, command))
    assert ended.code == 0 and f"found {ARN} []" in ended.output
    assert json.loads(moto_bucket.store().read(contract.RESULT))["native_id"] == ARN


BAD_STORAGE: dict[str, tuple[dict[str, str], str]] = {
    "no JSON": ({"CVLAUNCH_STORAGE": "{"}, "CVLAUNCH_STORAGE is '{'; expected JSON like"),
    "a list": ({"CVLAUNCH_STORAGE": "[]"}, "expected JSON like"),
    "a number": ({"CVLAUNCH_STORAGE": '{"endpoint": 1}'}, "expected JSON like"),
    "a typo": ({"CVLAUNCH_STORAGE": '{"endpont": "x"}'}, "did you mean 'endpoint'"),
    "no such object": ({"CVLAUNCH_JOB": "s3://BUCKET/nowhere/job.json"}, "there is no such object; set CVLAUNCH_JOB"),
    "no such bucket": ({"CVLAUNCH_JOB": "s3://no-such-bucket/job.json"}, "there is no such bucket"),
}


@pytest.mark.parametrize("name", BAD_STORAGE)
def test_a_job_that_can_t_be_read_is_one_clear_line(world: RunnerWorld, moto_bucket: Bucket, name: str) -> None:
    """And the platform's failure file has it, though nobody made a folder for it."""
    changes, message = BAD_STORAGE[name]
    env = stored_job(world, moto_bucket, ("true",)) | {
        k: v.replace("BUCKET", moto_bucket.name) for k, v in changes.items()
    }
    ended = world.end(world.job(), env=env)
    assert ended.code == 64 and message in ended.output and "Traceback" not in ended.output
    assert message in (world.root / "output/failure").read_text()


@pytest.fixture
def forbidding() -> Iterator[str]:
    """An S3 that allows nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_role_that_may_not_read_it_is_told_the_permission(
    world: RunnerWorld, moto_bucket: Bucket, forbidding: str
) -> None:
    env = stored_job(world, moto_bucket, ("true",))
    ended = world.end(world.job(), env={**env, "CVLAUNCH_STORAGE": json.dumps({"endpoint": forbidding})})
    assert ended.code == 64 and "the job's role may not read its job.json: s3://" in ended.output
    assert "it needs s3:GetObject" in ended.output


# -- folders that the platform moves ----------------------------------------------------------------------------------


def test_a_spot_restart_goes_on_from_what_the_platform_restored(world: RunnerWorld) -> None:
    job = world.job(python(ONE_STEP), movers=MOVED)
    preempted(world, job)
    machine_is_taken(world)
    (world.root / "checkpoints/7").mkdir()
    (world.root / "checkpoints/7/weights").write_text("half")  # the platform syncs files, not checkpoints
    ended = world.end(job, env=JOB)
    assert ended.code == 0 and "step 2" in ended.output
    assert (world.result["attempt"], world.result["native_id"], world.result["upload"]) == (2, ARN, "complete")
    assert [json.loads(line)["step"] for line in world.read("output/metrics.jsonl").splitlines()] == [1, 2]
    assert "step 1" in world.log(1) and "step 2" in world.log(2)
    assert not (world.run / "checkpoints").exists() and not (world.run / "model").exists()
    assert (world.root / "checkpoints/2/complete.json").is_file() and (world.root / "model/best.pt").is_file()


MARKED = """
def checkpoint(step):
    folder = ml.checkpoints / str(step)
    folder.mkdir()
    for name in ("weights", "weights.sagemaker-uploading", "other.sagemaker-uploaded"):
        (folder / name).touch()
    complete_checkpoint(folder, step=step)
"""


def test_markers_of_the_platform_s_agent_are_no_part_of_a_checkpoint(world: RunnerWorld) -> None:
    job = world.job(python(MARKED + ONE_STEP), movers=MOVED)
    preempted(world, job)
    machine_is_taken(world)
    ended = world.end(job, env=JOB)
    assert ended.code == 0 and "step 2" in ended.output


def test_a_job_sent_again_is_the_next_attempt_only_when_it_says_so(world: RunnerWorld) -> None:
    job = world.job(python(ONE_STEP), movers=MOVED)
    preempted(world, job)
    machine_is_taken(world)
    other = {"TRAINING_JOB_ARN": f"{ARN}-2"}
    twice = world.end(job, env=other)
    assert twice.code == 0 and "submitted twice" in twice.output
    ended = world.end(job, env={**other, "CVLAUNCH_SUBMISSION": "2"})
    assert ended.code == 0 and "step 2" in ended.output
    assert (world.result["attempt"], world.result["native_id"]) == (2, f"{ARN}-2")


def hosts(world: RunnerWorld, node: int) -> None:
    names = ["127.0.0.1", "localhost"]
    path = world.root / "input/config/resourceconfig.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"current_host": names[node], "hosts": names, "network_interface_name": "lo"}))


@pytest.mark.parametrize("movers", [MOVED, ISOLATED])
def test_each_of_two_nodes_counts_its_own_attempts(tmp_path: Path, movers: dict[str, str]) -> None:
    """Both have the job's ARN and no count; the second leaves the first one's files alone."""
    worlds = [RunnerWorld(tmp_path, in_place=False, name=name) for name in ("first", "second")]
    program = ("sh", "-c", "echo $CVLAUNCH_NODE_RANK $CVLAUNCH_ATTEMPT")  # not python, which torchrun would start
    for attempt in (1, 2):
        for node, world in enumerate(worlds):
            hosts(world, node)
            ended = world.end(world.job(program, nodes=2, movers=movers), env=JOB)
            assert ended.code == 0 and f"{node} {attempt}" in ended.output
            world.root.rename(tmp_path / f"{attempt}-{node}")
            if movers is ISOLATED:
                shutil.copytree(tmp_path / f"{attempt}-{node}/checkpoints", world.root / "checkpoints")
    runs = [tmp_path / f"2-{node}" / MIRROR for node in (0, 1)] if movers is ISOLATED else [worlds[0].run] * 2
    assert json.loads((runs[0] / "owner").read_text())["attempt"] == 2
    assert json.loads((runs[1] / "nodes/1/output/result.json").read_text())["attempt"] == 2
    if movers is ISOLATED:
        assert {path.name for path in runs[1].iterdir()} == {"nodes"}
        packed = tmp_path / "2-1/output/data/.cvlaunch"
        assert {path.name for path in packed.iterdir()} == {"nodes"} and (packed / "nodes/1/started.json").is_file()


# -- no network -------------------------------------------------------------------------------------------------------


def platform_takes(world: RunnerWorld, store: FolderStore, job_name: str) -> None:
    """What SageMaker brings out at the end: output/data as an archive, checkpoints as they are."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.add(world.root / "output/data", ".")
    store.write(f"artifacts/{job_name}/output/output.tar.gz", data.getvalue())
    for path in (world.root / "checkpoints").rglob("*"):
        if path.is_file():
            store.write(path.relative_to(world.root).as_posix(), path)


def mounted(world: RunnerWorld, job: JobFile) -> dict[str, str]:
    """The run's `input/` as the channel `cvlaunch`; the variables of a job that reaches nothing."""
    folder = world.root / "input/data/cvlaunch"
    (folder / "config").mkdir(parents=True)
    (folder / "config/job.json").write_bytes(job.to_bytes())
    if job.code:
        shutil.copy(world.folder / "code.tar.gz", folder)
    return {**JOB, "CVLAUNCH_JOB": str(folder / "config/job.json")}


def isolated_job(world: RunnerWorld, command: tuple[str, ...], **changes: object) -> JobFile:
    return world.job(command, output="s3://cannot-be-reached/runs", movers=ISOLATED, **changes)


DATA = "(ml.output / 'data').mkdir(parents=True, exist_ok=True); (ml.output / 'data/mine.csv').write_text('a,b')\n"


def test_without_network_everything_comes_home_all_the_same(world: RunnerWorld) -> None:
    """Two attempts of one job; the client sees the first while it runs, and both at the end."""
    store = FolderStore(world.folder / "store")
    job = isolated_job(world, python(DATA + ONE_STEP))
    running = world.start(job, env=mounted(world, job)).printed("ready")
    mirror = FolderStore(world.root / MIRROR)
    until(lambda: b'"step": 1' in read_appended(mirror, contract.METRICS)[0])
    assert running.signal().end().code == 75
    platform_takes(world, store, "shapes-1")
    assert json.loads((world.root / "output/data/.cvlaunch/output/result.json").read_text())["state"] == "PREEMPTED"
    machine_is_taken(world)
    ended = world.end(job, env=mounted(world, job))
    assert ended.code == 0 and "step 2" in ended.output
    platform_takes(world, store, "shapes-1")
    home = world.folder / "home"
    sync_run(store, home)
    steps = [json.loads(line)["step"] for line in (home / contract.METRICS).read_text().splitlines()]
    result = json.loads((home / contract.RESULT).read_text())
    assert steps == [1, 2] and (result["attempt"], result["state"], result["native_id"]) == (2, "SUCCEEDED", ARN)
    assert "step 1" in (home / "output/logs/attempt-1.node-0.log").read_text()
    assert (home / contract.JOB).read_bytes() == job.to_bytes() and (home / contract.STARTED).is_file()
    assert {path.name for path in (home / "output/data").iterdir()} == {"mine.csv"}
    assert not (home / MIRROR).exists() and (home / "checkpoints/2/complete.json").is_file()
    assert not (world.root / MIRROR / "output/data").exists()  # kept once


IN_PASSING = ("checkpoints/.9.part/weights", "checkpoints/9/weights.sagemaker-uploaded")
BESIDE = """
(ml.checkpoints / ".cvlaunch/output/logs").mkdir(parents=True, exist_ok=True)
(ml.checkpoints / ".cvlaunch/output/logs/attempt-1.node-0.log.sagemaker-uploaded").touch()
(ml.output / "mine.csv.sagemaker-uploading").touch()
"""


def test_what_the_platform_puts_beside_files_comes_nowhere(world: RunnerWorld) -> None:
    """Its agent syncs the mirror, too; what is half written is synced as it stands."""
    store = FolderStore(world.folder / "store")
    job = isolated_job(world, python(DATA + BESIDE))
    assert world.end(job, env=mounted(world, job)).code == 0
    platform_takes(world, store, "shapes-1")
    for path in IN_PASSING:
        store.write(path, b"w")
    home = world.folder / "home"
    sync_run(store, home)
    everything = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    assert "output/data/mine.csv" in everything and "output/logs/attempt-1.node-0.log" in everything
    packed = [path.name for path in (world.root / "output/data").rglob("*")]
    kept = [path.name for path in (world.root / MIRROR).rglob("*.sagemaker-*")]
    assert kept == ["attempt-1.node-0.log.sagemaker-uploaded"]
    assert not [name for name in (*everything, *packed) if ".sagemaker-" in name or ".part" in name]


def test_a_failure_without_network_is_packed_with_its_reason(world: RunnerWorld) -> None:
    job = isolated_job(world, python("print('last words'); leave(3, 'no such class'); sys.exit(3)"))
    assert world.end(job, env=mounted(world, job)).code == 3
    packed = world.root / "output/data/.cvlaunch/output"
    assert json.loads((packed / "result.json").read_text())["reason"] == "no such class"
    assert (world.root / "output/failure").read_text().startswith("no such class\n")
    assert "last words" in (packed / "logs/attempt-1.node-0.log").read_text()


def test_code_is_mounted_beside_the_job_file(world: RunnerWorld) -> None:
    archive = world.folder / "code.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("hello.py")
        text = b"print('from the archive')"
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    code = Code(sha256_file(archive), archive.stat().st_size)
    job = isolated_job(world, ("python3", "hello.py"), code=code)
    ended = world.end(job, env=mounted(world, job))
    assert ended.code == 0 and "from the archive" in ended.output
    shutil.rmtree(world.root)
    env = mounted(world, job)
    (world.root / "input/data/cvlaunch/code.tar.gz").unlink()
    ended = world.end(job, env=env)
    assert ended.code == 64 and "cvlaunch/code.tar.gz is missing" in ended.output


# -- weights out of an archive ----------------------------------------------------------------------------------------


def model_archive(*members: tuple[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


WEIGHTS = """
folder = Path(os.environ["CVLAUNCH_DATA_WEIGHTS"])
print("files", sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
print("same", folder == ml.channel("weights"), os.environ["SM_CHANNEL_WEIGHTS"] == str(folder))
"""


@pytest.mark.parametrize("access", ["staged", "mounted", "path"])
@pytest.mark.parametrize("beside", [[], ["output.tar.gz"], ["notes.txt"]])
def test_weights_that_a_platform_packed_are_unpacked(world: RunnerWorld, access: str, beside: list[str]) -> None:
    source = world.folder / "artifacts"
    source.mkdir()
    (source / "model.tar.gz").write_bytes(model_archive(("./best.pt", b"w"), ("deep/last.pt", b"l")))
    for name in beside:
        (source / name).write_text("else")
    if access == "mounted":
        shutil.copytree(source, world.root / "input/data/weights")
    job = world.job(python(WEIGHTS), channels=(Channel("weights", file_uri(source), access),), movers=MOVED)
    ended = world.end(job, env=JOB)
    plain = beside == ["notes.txt"]
    assert ended.code == 0 and "same True True" in ended.output
    assert f"files {['model.tar.gz', *beside] if plain else ['best.pt', 'deep/last.pt']}" in ended.output


def test_weights_that_would_lead_out_are_refused(world: RunnerWorld) -> None:
    folder = world.root / "input/data/weights"
    folder.mkdir(parents=True)
    (folder / "model.tar.gz").write_bytes(model_archive(("../../evil", b"w")))
    ended = world.end(world.job(python(WEIGHTS), channels=(Channel("weights", "s3://b/x", "mounted"),), movers=MOVED))
    assert ended.code == 64 and "nothing was unpacked" in ended.output and "files" not in ended.output


@pytest.mark.parametrize(
    ("left", "place"),
    [
        ([], "model"),
        (["model/best.pt", "artifacts/r/output/model.tar.gz"], "model"),
        (["artifacts/r/output/model.tar.gz", "artifacts/r-2/output/model.tar.gz"], "artifacts/r-2/output"),
        (["artifacts/r/output/model/best.pt"], "artifacts/r/output/model"),
        (["artifacts/r/output/output.tar.gz"], "model"),
    ],
)
def test_weights_of_a_run_are_found_where_the_platform_left_them(
    tmp_path: Path, moto_bucket: Bucket, left: list[str], place: str
) -> None:
    run = f"{moto_bucket.uri}/runs/digits-aaaaaaaaaa"
    for path in left:
        moto_bucket.store("runs/digits-aaaaaaaaaa").write(path, b"x")
    storage = moto_bucket.server.options.to_mapping()
    target = {"backend": "local", "output": f"{moto_bucket.uri}/runs", "storage": storage}
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"targets": {"aws": target}}))
    data = {"weights": "run://digits-aaaaaaaaaa/model"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "x", "command": ["true"], "data": data}))
    ledger = Ledger(tmp_path / "ledger")
    facts = {"owner": {}, "plan": {}, "target": target}
    record = RunRecord(
        "digits-aaaaaaaaaa", "d", 1.0, State.SUCCEEDED, "local", "aws", output=f"{moto_bucket.uri}/runs", **facts
    )
    ledger.create(record)
    with prepare(tmp_path / "job.yaml", target="aws", online=True, ledger=ledger) as prepared:
        assert [channel.uri for channel in prepared.job.channels] == [f"{run}/{place}"]


# -- grace ------------------------------------------------------------------------------------------------------------


def test_no_more_grace_is_counted_on_than_the_platform_gives(world: RunnerWorld) -> None:
    stubborn = python("signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)")
    running = world.start(world.job(stubborn, grace_s=300), env={**JOB, "CVLAUNCH_GRACE": "15"}).printed("ready")
    ended = running.signal().end()
    assert ended.code == 137 and ended.seconds < 15


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_grace_that_is_no_time(world: RunnerWorld, text: str) -> None:
    ended = world.end(world.job(("true",)), env={"CVLAUNCH_GRACE": text})
    assert ended.code == 64 and f"CVLAUNCH_GRACE is '{text}'; expected seconds" in ended.output


# -- region -----------------------------------------------------------------------------------------------------------

REGIONS = "print('regions', os.environ.get('AWS_REGION'), os.environ.get('AWS_DEFAULT_REGION'))"


@pytest.mark.parametrize(
    ("env", "job_env", "regions"),
    [
        ({}, {}, "eu-west-1 eu-west-1"),
        (
            {"TRAINING_JOB_ARN": ARN.replace("arn:aws:", "arn:aws-cn:").replace("eu-west-1", "cn-north-1")},
            {},
            "cn-north-1 cn-north-1",
        ),
        ({"AWS_REGION": "us-west-2"}, {}, "us-west-2 us-west-2"),
        ({}, {"AWS_DEFAULT_REGION": "us-west-2"}, "us-west-2 us-west-2"),
        ({"TRAINING_JOB_ARN": "shapes-1"}, {}, "None None"),
    ],
)
def test_the_region_is_the_job_s(
    world: RunnerWorld, env: dict[str, str], job_env: dict[str, str], regions: str
) -> None:
    """SageMaker promises the job's ARN and no AWS_REGION."""
    ended = world.end(world.job(python(REGIONS), movers=MOVED, env=job_env), env={**JOB, **env})
    assert ended.code == 0 and f"regions {regions}\n" in ended.output


def test_stores_and_secrets_are_those_of_the_job_s_region(
    world: RunnerWorld, aws: AwsCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    aws.client("secretsmanager").create_secret(Name="token", SecretString="of Secrets Manager")
    aws.client("ssm").put_parameter(Name="/token", Value="of SSM", Type="SecureString")
    bucket = aws.bucket()
    secrets = {"ONE": "store:secretsmanager:token", "TWO": "store:ssm:/token"}
    job = world.job(
        python("print(len(os.environ['ONE']), len(os.environ['TWO']))"), output=f"{bucket}/runs", secrets=secrets
    )
    ended = world.end(job, env=JOB)
    assert ended.code == 0 and "18 6" in ended.output, ended.output
    assert b"SUCCEEDED" in (aws.account.read(bucket.removeprefix("s3://"), f"runs/shapes-1/{contract.RESULT}") or b"")


# -- folders of root's ------------------------------------------------------------------------------------------------


@pytest.mark.needs("root", "unshare")
@pytest.mark.parametrize("closed", [".", "checkpoints", "model", "output"])
@pytest.mark.parametrize("movers", [MOVED, ISOLATED])
def test_folders_that_only_root_can_write_are_no_place_for_results(
    world: RunnerWorld, closed: str, movers: dict[str, str]
) -> None:
    """As of an image whose USER is another: elsewhere, checkpoints and model would be lost."""
    if closed != ".":
        world.root.mkdir()
    folder = folder_of_another(world.root / closed)
    env = {**JOB, "TMPDIR": str(world.folder)}
    ended = world.end(world.job(python("print('ran')"), movers=movers), prefix=AS_SOMEONE, env=env)
    assert ended.code == 64 and "ran" not in ended.output and "Traceback" not in ended.output
    assert f"uid 12345 can't write to {folder}" in ended.output and "`USER 0`" in ended.output
