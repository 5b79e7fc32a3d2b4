"""What is brought in: channels, code, the newest checkpoint, earlier metrics."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import threading
from pathlib import Path

import pytest

from launcher import manifest
from launcher.contract import METRICS, Channel, Code, complete_checkpoint
from launcher.stores import Store, file_uri, open_store
from launcher.sync import Cursor, read_appended, sync_run
from tests.runner_world import RunnerWorld, python, until
from tests.s3_fixtures import Bucket

LIST = """
train = ml.channel("train")
print("files:", sorted(p.relative_to(train).as_posix() for p in train.rglob("*") if p.is_file()))
"""


@pytest.fixture
def world(tmp_path: Path) -> RunnerWorld:
    return RunnerWorld(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for number in range(30):
        path = folder / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (number + 1))
    return folder


def channel(folder: Path, access: str = "staged") -> Channel:
    """The channel, with a manifest beside the data."""
    found = manifest.scan(folder)
    manifest.write(open_store(str(folder)), found)
    return Channel("train", file_uri(folder), access, found.fingerprint, found.count, found.size)


@pytest.mark.parametrize("access", ["staged", "path"])
def test_channel_comes_in(world: RunnerWorld, data: Path, access: str) -> None:
    job = world.job(python(LIST), channels=(channel(data, access),))
    ended = world.end(job)
    assert ended.code == 0 and "'class0/0.png', 'class0/12.png'" in ended.output
    assert (world.run / "input/data/train").is_symlink() == (access == "path")


def test_staging_goes_on_where_it_was_killed(world: RunnerWorld, data: Path) -> None:
    staged = world.run / "input/data/train"
    shutil.copytree(data / "class1", staged / "class1")
    (staged / "class2").mkdir()
    (staged / "class2/2.png").write_bytes(b"torn")
    ended = world.end(world.job(python(LIST), channels=(channel(data),)))
    assert ended.code == 0 and "21 of 31 files" in ended.output
    assert (staged / "class2/2.png").read_bytes() == (data / "class2/2.png").read_bytes() != b"torn"


@pytest.mark.parametrize(
    ("access", "damage", "message"),
    [
        ("staged", "missing", "class0/0.png: missing"),
        ("staged", "longer", "class0/0.png: 2 bytes, the manifest says 1"),
        ("staged", "pushed", "the job was submitted with"),
        ("staged", "bare", "has no .cvlaunch-manifest.json"),
        ("path", "missing", "class0/0.png: missing"),
        ("mounted", "longer", "class0/0.png: 2 bytes, the manifest says 1"),
    ],
)
def test_channel_that_is_not_the_one_submitted(
    world: RunnerWorld, data: Path, access: str, damage: str, message: str
) -> None:
    train = channel(data, access)
    image = data / "class0/0.png"
    if damage == "missing":
        image.unlink()
    elif damage == "longer":
        image.write_bytes(b"ab")
    elif damage == "pushed":
        image.write_bytes(b"z")
        channel(data)
    else:
        (data / ".cvlaunch-manifest.json").unlink()
    if access == "mounted":
        shutil.copytree(data, world.run / "input/data/train")
    ended = world.end(world.job(python("print('ran')"), channels=(train,)))
    assert ended.code == 64 and "channel train" in ended.output and message in ended.output
    assert "ran" not in ended.output and world.result["state"] == "FAILED"


def test_data_that_does_not_fit(world: RunnerWorld, data: Path) -> None:
    train = Channel("train", file_uri(data), "staged", size=1 << 60)
    ended = world.end(world.job(python("print('ran')"), channels=(train,)))
    assert (
        ended.code == 64 and "the job's data needs" in ended.output and "TiB free" in ended.output.replace("GiB", "TiB")
    )


def test_channel_name_that_leads_out(world: RunnerWorld, data: Path) -> None:
    ended = world.end(world.job(python("print('ran')"), channels=(Channel("../../x", file_uri(data)),)))
    assert ended.code == 64 and "'..'" in ended.output


# -- code -------------------------------------------------------------------------------------------------------------


def archive(files: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return data.getvalue()


def place_code(world: RunnerWorld, files: dict[str, str], **facts: str) -> Code:
    content = archive(files)
    (world.run / "input").mkdir(parents=True)
    (world.run / "input/code.tar.gz").write_bytes(content)
    return Code(hashlib.sha256(content).hexdigest(), len(content), **facts)


@pytest.mark.parametrize("in_place", [True, False])
def test_code_is_unpacked_and_is_on_the_commands_path_alone(tmp_path: Path, in_place: bool) -> None:
    """A module called `json` in the user's code must not reach the runner."""
    world = RunnerWorld(tmp_path, in_place=in_place)
    code = place_code(world, {"mine.py": "x = 5", "json.py": "raise SystemExit(9)"})
    ended = world.end(world.job(("python3", "-c", "import mine, os; print('mine', mine.x, os.getcwd())"), code=code))
    assert ended.code == 0 and f"mine 5 {world.root / 'code'}" in ended.output


def test_requirements(world: RunnerWorld) -> None:
    wheel = io.BytesIO()
    import zipfile

    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("wanted.py", "x = 7")
        file.writestr("wanted-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: wanted\nVersion: 1.0\n")
        file.writestr("wanted-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("wanted-1.0.dist-info/RECORD", "")
    path = world.folder / "wanted-1.0-py3-none-any.whl"
    path.write_bytes(wheel.getvalue())
    code = place_code(world, {"req.lock": str(path)}, requirements="req.lock")
    ended = world.end(
        world.job(python("import wanted; print('wanted', wanted.x)"), code=code), env={"PIP_NO_INDEX": "1"}
    )
    assert ended.code == 0 and "wanted 7" in ended.output


def test_requirements_that_do_not_exist(world: RunnerWorld) -> None:
    code = place_code(world, {"req.lock": "no-such-package-of-ours"}, requirements="req.lock")
    ended = world.end(world.job(python("print('ran')"), code=code), env={"PIP_NO_INDEX": "1"})
    assert ended.code == 64 and "can't be installed" in ended.output and "no-such-package-of-ours" in ended.output


@pytest.mark.parametrize(("name", "message"), [("../evil.py", "can't be unpacked"), ("fine.py", "is not the one")])
def test_code_that_is_wrong(world: RunnerWorld, name: str, message: str) -> None:
    code = place_code(world, {name: "x"})
    if name == "fine.py":
        code = Code("0" * 64, 1)
    ended = world.end(world.job(python("print('ran')"), code=code))
    assert ended.code == 64 and message in ended.output and not list(world.folder.rglob("evil.py"))


# -- what earlier attempts left ---------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / str(step)
    path.mkdir(parents=True)
    (path / "weights").write_text(f"step {step}")
    complete_checkpoint(path, step=step)
    return path


def test_newest_checkpoint_that_checks_comes_in_alone(tmp_path: Path) -> None:
    world = RunnerWorld(tmp_path, in_place=False)
    checkpoint(world.run, 9)
    checkpoint(world.run, 100)
    (checkpoint(world.run, 200) / "weights").write_text("damaged")
    (checkpoint(world.run, 300) / "complete.json").unlink()
    ended = world.end(world.job(python("print(sorted(p.name for p in ml.checkpoints.iterdir()))")))
    assert "resuming from checkpoint 100" in ended.output and "['100']" in ended.output


SECOND_LOG = "output/logs/attempt-2.node-0.log"


def test_second_machine_goes_on_with_checkpoint_and_metrics(tmp_path: Path) -> None:
    program = """
step = max([int(p.name) for p in ml.checkpoints.iterdir()], default=0)
print("from step", step, "after", len(ml.metrics.read_text().splitlines()) if ml.metrics.exists() else 0, flush=True)
metrics(step + 1, loss=1 / (step + 1))
checkpoint(step + 1)
ready()
time.sleep(60 if step < 2 else 0)
"""
    store = open_store(str(RunnerWorld(tmp_path).run))
    for attempt, kill in ((1, False), (2, True), (3, False)):
        world = RunnerWorld(tmp_path, in_place=False, name=str(attempt))
        job = world.job(python(program))
        running = world.start(job, env={"CVLAUNCH_ATTEMPT": str(attempt)}).printed("ready")
        if kill:  # the machine is gone; what has left so far has to do
            until((world.run / "checkpoints/2/complete.json").exists)
            until(lambda sent=world.run / "segments/output/metrics.jsonl": list(sent.glob("seg-*")))
            until(lambda: b"from step 1" in read_appended(store, SECOND_LOG)[0])
            running.process.kill()
            running.process.wait()
        elif attempt == 1:
            assert running.signal().end().code == 75
        assert f"from step {attempt - 1} after {attempt - 1}" in running.log.read_text()
    assert running.end().code == 0
    steps = [json.loads(line)["step"] for line in world.read("output/metrics.jsonl").splitlines()]
    assert steps == [1, 2, 3] and not list((world.run / "segments").rglob("seg-*"))
    assert "from step 1" in world.log(2)  # joined for the attempt that couldn't
    assert world.result["state"] == "SUCCEEDED" and world.result["attempt"] == 3


class Follower:
    """Reads a file all along, as `cvlaunch` does, and keeps what it was given."""

    def __init__(self, store: Store, path: str) -> None:
        self.got, self._store, self._path, self._cursor = b"", store, path, Cursor()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.05):
            self.look()

    def look(self) -> None:
        data, self._cursor = read_appended(self._store, self._path, since=self._cursor)
        self.got += data

    def end(self) -> None:
        self._end.set()
        self._thread.join()
        self.look()


def test_resumed_run_is_followed_and_synced_byte_for_byte(tmp_path: Path, moto_bucket: Bucket) -> None:
    """The first attempt is preempted in the middle of a line; the second begins on an empty machine."""
    program = """
def lines(*steps):
    with ml.metrics.open("a") as file:
        file.writelines(f"step {step}\\n" for step in steps)
def stop(*_):
    with ml.metrics.open("a") as file:
        file.write("to")
    checkpoint(5)
    leave(75)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if not (ml.checkpoints / "5").exists():
    lines(0, 1, 2, 3, 4, 5)
    time.sleep(60)
with ml.metrics.open("a") as file:
    file.write("rn\\n")
lines(6, 7, 8, 9, 10)
while not (ml.root / "go").exists():
    time.sleep(0.05)
lines(11, 12, 13, 14, 15)
"""
    first, last = ("".join(f"step {n}\n" for n in range(*span)).encode() for span in ((6,), (6, 16)))
    store, dest = moto_bucket.store(), tmp_path / "home"
    follower = Follower(store, METRICS)

    def synced() -> bytes:
        sync_run(store, dest)
        return (dest / METRICS).read_bytes()

    try:
        for attempt in (1, 2):
            world = RunnerWorld(tmp_path, in_place=False, output=f"{moto_bucket.uri}/runs", name=str(attempt))
            job = world.job(python(program), storage=moto_bucket.server.options.to_mapping())
            running = world.start(job, env={"CVLAUNCH_ATTEMPT": str(attempt), "CVLAUNCH_NATIVE_ID": "1"})
            if attempt == 1:
                until(lambda: follower.got == first)
                assert synced() == first
                assert running.signal().end().code == 75
                assert synced() == first + b"to"
            else:
                until(lambda: follower.got.endswith(b"step 10\n"))
                assert synced() == follower.got
                (world.root / "go").touch()
                assert running.end().code == 0
    finally:
        follower.end()
    assert synced() == follower.got == store.read(METRICS) == first + b"torn\n" + last
    assert not list(store.list("segments"))
