"""Images, real: built once, pushed to real registries that say yes and no, pinned in jobs."""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from launcher.backends.base import Job, Transport
from launcher.backends.local import LocalBackend, LocalTarget
from launcher.credentials import aws, google
from launcher.engine import Engine, find_engine
from launcher.errors import AuthError, CapacityError, CvlaunchError, SpecError, UnreachableError
from launcher.image import (
    Built,
    Recipe,
    build,
    folder_recipe,
    make_wheel,
    pull,
    push,
    recall,
    trainer_recipe,
)
from launcher.ledger import Ledger
from launcher.resolve import resolve
from launcher.rules import ContainerRules
from launcher.spec import JobSpec
from launcher.targets import Selected, Targets
from tests.fake_engine import FakeEngine
from tests.image_fixtures import with_images
from tests.s3_fixtures import Bucket
from tests.services.podman import podman
from tests.services.registry import registry_server

ROOT = Path(__file__).parent.parent


def silent(line: str) -> None:
    pass


# -- the wheel --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_what_git_knows_of(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "launcher", "templates", "trainer_image"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    moved = {"templates/": "launcher/_templates/", "trainer_image/": "launcher/_trainer_image/"}
    wanted = {
        next((new + name.removeprefix(old) for old, new in moved.items() if name.startswith(old)), name)
        for name in listed
        if (ROOT / name).is_file()
    }
    names = zipfile.ZipFile(make_wheel(tmp_path)).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert "launcher/_templates/local/process.json.j2" in names and "launcher/_trainer_image/Dockerfile" in names


def test_the_record_is_true(tmp_path: Path) -> None:
    wheel = zipfile.ZipFile(make_wheel(tmp_path))
    (record,) = [name for name in wheel.namelist() if name.endswith("/RECORD")]
    for name, digest, size in csv.reader(io.StringIO(wheel.read(record).decode())):
        if name != record:
            data = wheel.read(name)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={hashed}", len(data)), name


def test_an_installed_wheel_makes_itself_again(tmp_path: Path) -> None:
    """Byte for byte, though it has no git, other times and compiled files around."""
    first = make_wheel(tmp_path)
    uv = Path(sys.executable).with_name("uv")
    installed = tmp_path / "installed"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", "--target", installed, first], check=True
    )
    (installed / "launcher/.hidden").touch()
    script = (
        "import sys; from pathlib import Path; import launcher; from launcher.image import make_wheel\n"
        "from launcher.runner import main\n"
        f"assert launcher.__file__.startswith({str(installed)!r})\n"
        "make_wheel(Path(sys.argv[1]))"
    )
    again = tmp_path / "again"
    again.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run([sys.executable, "-c", script, again], cwd=tmp_path, env=environment, check=True)
    assert (again / first.name).read_bytes() == first.read_bytes()
    assert (installed / "bin/cvlaunch-run").is_file()


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "My image"
    (made / "sub").mkdir(parents=True)
    (made / "Dockerfile").write_text("ARG BASE=debian:12\nFROM ${BASE}\nARG MORE\nCOPY . /x\n")
    (made / "a").write_text("a")
    (made / "sub/b").write_text("b")
    return made


CHANGES: Mapping[str, tuple[bool, Callable[[Path], object]]] = {
    "content": (True, lambda f: (f / "sub/b").write_text("c")),
    "a new file": (True, lambda f: (f / "c").touch()),
    "an empty folder": (True, lambda f: (f / "empty").mkdir()),
    "a name": (True, lambda f: (f / "a").rename(f / "A")),
    "a mode": (True, lambda f: (f / "a").chmod(0o755)),
    "a link": (True, lambda f: (f / "l").symlink_to("a")),
    "the Dockerfile": (True, lambda f: (f / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\n")),
    "a time": (False, lambda f: os.utime(f / "a", (0, 0))),
    "nothing": (False, lambda f: None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_tag_follows_from_what_goes_in(folder: Path, what: str) -> None:
    changes, change = CHANGES[what]
    before = folder_recipe(folder)
    change(folder)
    after = folder_recipe(folder)
    assert (after.tag != before.tag) is changes
    assert after.repository == "localhost/my-image" and len(after.tag) == 12


@pytest.mark.parametrize(
    ("how", "counts"),
    [
        ({"base": "debian:13"}, True),
        ({"platform": "linux/arm64"}, True),
        ({"options": ["--build-arg", "MORE=1"]}, True),
        ({"options": ["--target=first"]}, True),
        ({"options": ["--secret", "id=x,src=/y", "-v", "/a:/b", "--network=host", "--no-cache"]}, False),
        ({"options": []}, False),
    ],
)
def test_arguments_count_and_means_do_not(folder: Path, how: dict[str, object], counts: bool) -> None:
    assert (folder_recipe(folder, **how).tag != folder_recipe(folder).tag) is counts  # type: ignore[arg-type]


def test_the_environment_chooses_for_submit_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVLAUNCH_BASE_IMAGE", "mirror/debian:12")
    monkeypatch.setenv("CVLAUNCH_BUILD_OPTIONS", "--build-arg 'MORE=a b' --secret id=x")
    for recipe in (folder_recipe(folder), trainer_recipe()):
        assert recipe.args["BASE"] == "mirror/debian:12"
        assert recipe.options == ("--build-arg", "MORE=a b", "--secret", "id=x")
    assert trainer_recipe().tag == trainer_recipe(base="mirror/debian:12").tag != trainer_recipe(options=[]).tag
    (folder / "Dockerfile").write_text("FROM scratch\n")
    assert "BASE" not in folder_recipe(folder).args


def test_the_trainer_s_context_holds_three_files() -> None:
    recipe = trainer_recipe()
    with recipe.context() as context:
        names = sorted(path.name for path in context.iterdir())
        assert names == ["Dockerfile", f"cvlaunch-{recipe.args['VERSION']}-py3-none-any.whl", "requirements.lock"]
    assert not context.exists()
    assert recipe.reference == f"localhost/cvlaunch-trainer:{recipe.tag}" == trainer_recipe().reference


def test_a_folder_may_start_from_our_image(folder: Path) -> None:
    (folder / "Dockerfile").write_text("ARG TRAINER\nFROM ${TRAINER}\n")
    assert folder_recipe(folder).args == {"TRAINER": trainer_recipe().reference}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"name": "Registry/X"}, "'Registry/X' is no name for an image"),
        ({"name": "x:1"}, "the tag is ours"),
        ({"dockerfile": Path("/no/such/file")}, "no file /no/such/file"),
    ],
)
def test_a_folder_that_can_t_be_built_says_why(folder: Path, how: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        folder_recipe(folder, **how)  # type: ignore[arg-type]
    (folder / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(SpecError, match="has no `ARG BASE`"):
        folder_recipe(folder, base="x")
    (folder / "Dockerfile").unlink()
    with pytest.raises(SpecError, match="holds no Dockerfile"):
        folder_recipe(folder)
    with pytest.raises(SpecError, match="no folder"):
        folder_recipe(folder / "none")


IGNORES = ["*.log\n# no\n\n!keep.log\nsub/*/deep\n**/cache\n/top\n", "sub\n", "*\n!a\n!sub/other/*\n", "s?b\n[ab]\n"]


@pytest.mark.needs("podman")
@pytest.mark.usefixtures("images_alone")
@pytest.mark.parametrize("rules", IGNORES, ids=range(len(IGNORES)))
def test_what_is_ignored_is_what_the_engine_ignores(tmp_path: Path, rules: str) -> None:
    """The image says what podman got; each of these files changes the tag, and none of the others does."""
    files = [
        "a", "b", "x.log", "keep.log", "sub/y.log", "sub/one/deep/f", "sub/other/f", "sub/cache/g", "cache", "top",
        "sub/top",
    ]  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /context/\n")
    (tmp_path / ".dockerignore").write_text(rules)
    tag = f"localhost/cvlaunch-test-ignore:{os.getpid()}"
    podman("build", "--tag", tag, tmp_path)
    try:
        inside = _files_in(tag)
    finally:
        podman("rmi", "--force", tag)
    before = folder_recipe(tmp_path).tag
    counting = set()
    for name in files:
        (tmp_path / name).write_text("changed")
        if folder_recipe(tmp_path).tag != before:
            counting.add(name)
        (tmp_path / name).write_text(name)
    assert counting == inside & set(files) != set(files)


def _files_in(tag: str) -> set[str]:
    name = podman("create", tag, "none")
    try:
        exported = subprocess.run(["podman", "export", name], capture_output=True, check=True).stdout
    finally:
        podman("rm", name)
    with tarfile.open(fileobj=io.BytesIO(exported)) as archive:
        return {m.name.removeprefix("context/") for m in archive if m.isfile() and m.name.startswith("context/")}


def test_a_file_counts_if_any_engine_gets_it(folder: Path) -> None:
    """Podman reads .containerignore, Docker does not."""
    (folder / ".containerignore").write_text("a\n")
    before = folder_recipe(folder).tag
    (folder / "a").write_text("changed")
    assert folder_recipe(folder).tag != before
    (folder / ".dockerignore").write_text("a\n")
    before = folder_recipe(folder).tag
    (folder / "a").write_text("changed again")
    assert folder_recipe(folder).tag == before


# -- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Engine:
    return find_engine("podman")


@pytest.fixture
def made() -> Iterator[list[str]]:
    """References to remove at the end."""
    references: list[str] = []
    yield references
    for reference in reversed(references):
        podman("rmi", "--force", reference, check=False)


@dataclasses.dataclass
class Project:
    """A folder whose image is small; its tags are removed at the end."""

    folder: Path
    engine: Engine
    made: list[str]

    def recipe(self) -> Recipe:
        found = folder_recipe(self.folder, name=f"cvlaunch-test-{self.folder.parent.name}".lower().replace("_", "-"))
        self.made.append(found.reference)
        return found

    def build(self, *, force: bool = False, say: Callable[[str], None] = silent) -> Built:
        return build(self.recipe(), self.engine, say=say, force=force)


@pytest.fixture
def project(tmp_path: Path, engine: Engine, made: list[str], base_image: str) -> Project:
    where = tmp_path / "image"
    where.mkdir()
    (where / "Dockerfile").write_text(
        f'FROM {base_image}\nCOPY code /code\nENTRYPOINT ["cvlaunch-run"]\nLABEL io.cvlaunch.contract="1"\n'
    )
    (where / "code").write_text(f"unlike any other: {tmp_path}")
    return Project(where, engine, made)


@with_images
def test_an_image_is_built_once(project: Project) -> None:
    lines: list[str] = []
    first = project.build(say=lines.append)
    assert first.rebuilt and first.seconds > 0 and any("COPY code" in line for line in lines)
    assert first.image.labels["io.cvlaunch.content"] == project.recipe().digest
    again = project.build(say=lambda line: pytest.fail(f"built again: {line}"))
    assert not again.rebuilt and again.image == first.image
    assert project.build(force=True).rebuilt
    (project.folder / "code").write_text("changed")
    other = project.build()
    assert other.rebuilt and other.reference != first.reference
    assert other.image.config_digest != first.image.config_digest


@with_images
def test_of_two_at_once_one_builds(project: Project, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    dockerfile, wait = project.folder / "Dockerfile", "RUN while [ ! -e /mnt/go ]; do sleep 0.1; done"
    dockerfile.write_text(dockerfile.read_text().replace("COPY", f"{wait}\nCOPY"))
    recipe = dataclasses.replace(project.recipe(), options=(f"--volume={gate}:/mnt",))
    waiting, lines, done = f"another process builds {recipe.reference}; waiting for it", list[str](), list[Built]()
    threads = [
        threading.Thread(target=lambda: done.append(build(recipe, project.engine, say=lines.append))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    try:
        _until(lambda: lines.count(waiting) == 2)
    finally:
        (gate / "go").touch()
        for thread in threads:
            thread.join()
    assert sorted(built.rebuilt for built in done) == [False, False, True]
    assert sum("COPY code" in line for line in lines) == 1
    assert lines.count(waiting) == 2


@with_images
def test_our_image_comes_before_one_that_starts_from_it(project: Project, trainer_image_here: str) -> None:
    (project.folder / "Dockerfile").write_text("ARG TRAINER\nFROM ${TRAINER}\nCOPY code /code\n")
    built = project.build()
    assert built.image.entrypoint == ("cvlaunch-run",)
    ours = project.engine.image(trainer_image_here)
    assert ours is not None and built.image.layers[: len(ours.layers)] == ours.layers


@with_images
def test_ctrl_c_ends_the_engine_and_leaves_nothing(project: Project) -> None:
    pause, base = f"6{os.getpid()}", project.build().reference
    (project.folder / "Dockerfile").write_text(f"FROM {base}\nRUN sleep {pause}\n")
    recipe = project.recipe()
    command = [sys.executable, "-m", "launcher.cli", "image", "build", project.folder, "--engine", "podman"]
    name = ["--name", recipe.repository.removeprefix("localhost/")]
    with subprocess.Popen([*command, *name], stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        _until(lambda: _sleeps(pause))
        assert _working_containers(base)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130 and said.rstrip().endswith("cvlaunch: interrupted")
    _until(lambda: not _sleeps(pause) and not _working_containers(base))
    assert project.engine.image(recipe.reference) is None


def _working_containers(base: str) -> list[str]:
    """What Podman keeps while it builds upon an image."""
    listed = podman("ps", "--all", "--external", "--format={{.Image}}").splitlines()
    return [image for image in listed if image == base]


def _sleeps(seconds: str) -> bool:
    wanted = f"sleep\0{seconds}\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == wanted:
                return True
    return False


def _until(holds: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


FAILURES = {
    "a step": (
        "RUN echo first; echo 'unauthorized: connection refused' >&2; exit 3",
        SpecError,
        "  unauthorized: conn",
    ),
    "a file": ("COPY nothing /", SpecError, "nothing"),
    "a word": ("RUNX x", SpecError, "RUNX"),
    "a stage": ("COPY --from=127.0.0.1:1/x / /", UnreachableError, "does not answer"),
}


@with_images
@pytest.mark.parametrize("what", FAILURES)
def test_a_dockerfile_that_fails_is_named(project: Project, what: str) -> None:
    line, kind, says = FAILURES[what]
    dockerfile = project.folder / "Dockerfile"
    dockerfile.write_text(dockerfile.read_text() + line + "\n")
    with pytest.raises(kind) as caught:
        project.build()
    assert says in str(caught.value)
    if kind is SpecError:
        assert str(caught.value).startswith(f"{dockerfile}: a step failed; podman said last:")
    assert project.engine.image(project.recipe().reference) is None


@pytest.mark.needs("podman", "root")
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, context, real = Path(tempfile.mkdtemp(dir="/tmp")), tmp_path / "context", shutil.which("podman")
    context.mkdir()
    (context / "blob").write_bytes(os.urandom(30_000_000))
    (context / "Dockerfile").write_text("FROM scratch\nCOPY blob /blob\n")
    wrapper = tmp_path / "bin/podman"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} --root {small}/r --runroot {small}/o --storage-driver vfs "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small], check=True)
    try:
        with pytest.raises(CapacityError, match=r"^podman build: .*no space left on device; free some space") as caught:
            build(folder_recipe(context), find_engine("podman"), say=silent)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
        small.rmdir()


# -- registries -------------------------------------------------------------------------------------------------------


@with_images
def test_a_push_says_the_digest_that_the_registry_has(project: Project, registry: str) -> None:
    built = project.build()
    pushed = push(project.engine, built.reference, f"{registry}/team/x", say=silent)
    project.made.append(pushed.reference)
    tag = built.reference.rpartition(":")[2]
    assert pushed.reference == f"{registry}/team/x:{tag}"
    digest, config = _manifest(registry, "team/x", tag)
    assert (pushed.digest, pushed.config_digest) == (digest, config)
    assert pushed.config_digest == built.image.config_digest, "the same before and after"
    assert pushed.pinned == f"{registry}/team/x@{digest}"
    assert recall(pushed.reference) == recall(pushed.pinned) == pushed
    podman("rmi", "--force", built.reference, pushed.reference)
    back = pull(project.engine, pushed.pinned, say=silent)
    project.made.append(pushed.pinned)
    assert back.config_digest == pushed.config_digest


def _manifest(registry: str, repository: str, tag: str) -> tuple[str, str]:
    """(its digest, the configuration's) as the registry serves it."""
    kinds = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    connection = http.client.HTTPConnection(registry)
    connection.request("GET", f"/v2/{repository}/manifests/{tag}", headers={"Accept": kinds})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    assert answer.headers["Docker-Content-Digest"] == "sha256:" + hashlib.sha256(content).hexdigest()
    return answer.headers["Docker-Content-Digest"], json.loads(content)["config"]["digest"]


@with_images
def test_registries_that_say_no(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = project.build().reference
    with (
        registry_server(tmp_path / "closed", login=("me", "secret")) as closed,
        registry_server(tmp_path / "frozen", read_only=True) as frozen,
    ):
        configuration = closed.configuration.read_text() + frozen.configuration.read_text()
        (tmp_path / "registries.conf").write_text(
            f'{configuration}[[registry]]\nlocation = "127.0.0.1:1"\ninsecure = true\n'
        )
        monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
        (tmp_path / "auth.json").write_text("{}")
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
        cases: list[tuple[str, type[CvlaunchError], str]] = [
            (f"{closed.address}/x", AuthError, f"unauthorized.*log in to the registry: podman login {closed.address}$"),
            (f"{frozen.address}/x", AuthError, "405.*the registry takes no such request"),
            ("127.0.0.1:1/x", UnreachableError, "connection refused.*does not answer"),
        ]
        for to, kind, says in cases:
            with pytest.raises(kind, match=says) as caught:
                push(project.engine, reference, to, say=silent)
            assert type(caught.value) is kind and "\n" not in str(caught.value)
            assert recall(f"{to}:{reference.rpartition(':')[2]}") is None
        with pytest.raises(AuthError, match=f"podman login {closed.address}"):
            pull(project.engine, f"{closed.address}/x:1", say=silent)
        project.engine.login(closed.address, "me", "secret")
        pushed = push(project.engine, reference, f"{closed.address}/x:mine", say=silent)
        project.made.append(pushed.reference)
        with pytest.raises(SpecError, match=r"manifest unknown.*check its name and tag"):
            pull(project.engine, f"{closed.address}/x:other", say=silent)


@with_images
@pytest.mark.parametrize(
    ("source", "to", "says"),
    [
        ("localhost/cvlaunch-test-nothing:1", "127.0.0.1:1/x", "podman has no image localhost/cvlaunch-test-nothing:1"),
        (None, "localhost/x", "names no registry"),
        (None, f"h.example/x@sha256:{'0' * 64}", "names a digest"),
        (None, "h.example/UPPER", "is no image"),
        (None, "-v", "is no image"),
    ],
)
def test_what_can_t_be_pushed(project: Project, source: str | None, to: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        push(project.engine, source or project.build().reference, to, say=silent)


INSTALLATION = ("launcher", "templates", "trainer_image")


@with_images
def test_a_change_of_the_trainer_pushes_little(
    tmp_path: Path, base_image: str, registry_process: object, registry: str, made: list[str]
) -> None:
    """The real Dockerfile and wheel with a short lock, so that this takes seconds; the layers below stay."""
    from tests.services.image import host_options

    source = tmp_path / "source"
    for name in INSTALLATION:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    _shorten_lock(source / "trainer_image/requirements.lock")
    name = f"cvlaunch-test-little-{os.getpid()}"

    def build_and_push() -> int:
        """Bytes that the registry got."""
        before = registry_process.size  # type: ignore[attr-defined]
        run = [sys.executable, "-m", "launcher.cli", "image"]
        env = {**os.environ, "PYTHONPATH": str(source), "CVLAUNCH_ENGINE": "podman"}
        how = ["--base", base_image, "--name", name, "--", *host_options()]
        done = subprocess.run([*run, "build", *how], cwd=source, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.append(done.stdout.strip())
        to = f"{registry}/little"
        subprocess.run([*run, "push", made[-1], to], cwd=source, env=env, capture_output=True, check=True)
        made.append(f"{to}:{made[-1].rpartition(':')[2]}")
        return registry_process.size - before  # type: ignore[attr-defined]

    whole = build_and_push()
    trainer = source / "trainer_image/cvtrainer/classify.py"
    trainer.write_text(trainer.read_text() + "\nCHANGED = True\n")
    change = build_and_push()
    print(f"whole image {whole / 1e6:.1f} MB, change of the trainer {change / 1e6:.2f} MB")
    assert 100_000 < change < 5_000_000 < 20_000_000 < whole
    assert made[0] != made[2]


def _shorten_lock(path: Path) -> None:
    """One small package a part; the lines of each are as they were."""
    keep = {"tools": ("uv==",), "torch": ("idna==",), "packages": ("click==",)}
    part, keeps, lines = "", False, list[str]()
    for line in path.read_text().splitlines(keepends=True):
        if line.startswith("# --- "):
            part = line.split()[2]
        elif not line.startswith((" ", "#")):
            keeps = line.startswith(keep.get(part, ("",)))
        if line.startswith("#") or keeps:
            lines.append(line)
    path.write_text("".join(lines))


# -- log-ins ----------------------------------------------------------------------------------------------------------

ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine.install(tmp_path / "bin")
    fake.answer("info", out="[]")
    fake.answer("tag")
    fake.has_image("x:1")
    monkeypatch.setenv("PATH", str(fake.folder))
    return fake


def test_ecr_gets_a_log_in_where_the_engine_has_none(
    docker: FakeEngine, moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is AWS's (moto's here), the log-in goes to the program's standard input, the push is made again."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_bucket.server.endpoint)
    docker.answer("push", err="no basic auth credentials", code=1, times=1)
    docker.answer("login", out="Login Succeeded")
    docker.answer("push", out=f"1: digest: sha256:{'d' * 64} size: 9")
    lines: list[str] = []
    pushed = push(find_engine("docker"), "x:1", f"{ECR}/team/x", say=lines.append)
    assert pushed.pinned == f"{ECR}/team/x@sha256:{'d' * 64}"
    (login,) = docker.called("login")
    assert login.words == ("login", "--username", "AWS", "--password-stdin", ECR)
    user, password = aws.ecr_login(ECR) or ("", "")
    assert (user, login.stdin) == ("AWS", password) and len(password) > 5
    assert all(password not in " ".join(call.words) for call in docker.calls) and password not in "\n".join(lines)
    assert [call.words[0] for call in docker.calls][-5:] == ["tag", "push", "login", "tag", "push"]


def test_an_engine_that_is_logged_in_is_left_alone(docker: FakeEngine) -> None:
    docker.answer("push", out=f"1: digest: sha256:{'d' * 64} size: 9")
    push(find_engine("docker"), "x:1", f"{ECR}/team/x", say=silent)
    assert not docker.called("login")


def test_a_refusal_after_the_log_in_stands(
    docker: FakeEngine, moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_bucket.server.endpoint)
    docker.answer("push", err="denied: not authorized to perform ecr:InitiateLayerUpload", code=1)
    docker.answer("login")
    with pytest.raises(AuthError, match="ecr:InitiateLayerUpload"):
        push(find_engine("docker"), "x:1", f"{ECR}/team/x", say=silent)
    assert len(docker.called("push")) == 2


def test_without_an_identity_the_way_out_is_said(docker: FakeEngine, clean_aws: Path) -> None:
    docker.answer("push", err="no basic auth credentials", code=1)
    with pytest.raises(AuthError, match="AWS"):
        push(find_engine("docker"), "x:1", f"{ECR}/team/x", say=silent)
    with pytest.raises(AuthError, match="gcloud auth application-default login"):
        push(find_engine("docker"), "x:1", "europe-docker.pkg.dev/project/repo/x", say=silent)
    with pytest.raises(AuthError, match=r"docker login registry\.example\.com$"):
        push(find_engine("docker"), "x:1", "registry.example.com/x", say=silent)
    assert not docker.called("login")


@pytest.mark.parametrize(
    "host", ["ecr.example.com", "evil.com/123456789012.dkr.ecr.eu-west-1.amazonaws.com", f"{ECR}.evil.com"]
)
def test_no_token_is_asked_for_other_hosts(host: str) -> None:
    assert aws.ecr_login(host) is None
    assert google.registry_login(host) is None
    assert google.registry_login("docker.pkg.dev.evil.com") is None


# -- pins -------------------------------------------------------------------------------------------------------------


class HereTarget(LocalTarget):
    engine: str = "auto"


class Here(LocalBackend):
    """Like `container`: images come from this machine's engine."""

    Target = HereTarget
    rules = ContainerRules(container=True)
    ignored: Mapping[str, str] = {}


class Far(Here):
    """Like a cloud: it pulls."""

    Target = LocalTarget
    transports = {"s3": Transport({"s3": "staged"}, LocalBackend.transports["s3"].movers)}  # noqa: RUF012


def resolved(
    backend: type[Here], tmp_path: Path, *, registry: str | None = None, make: bool = False, **keys: object
) -> Job:
    target = backend.Target(output="s3://bucket/runs", registry=registry)
    spec = JobSpec.model_validate({"name": "x", "command": ["true"], **keys})
    return resolve(
        spec,
        Selected("there", target, backend, tmp_path),
        folder=tmp_path,
        targets=Targets(),
        scratch=tmp_path,
        ledger=Ledger(tmp_path / "ledger"),
        make=silent if make else None,
    )


@with_images
def test_the_same_job_before_and_after_the_push(
    project: Project, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVLAUNCH_ENGINE", "podman")
    place, folder = f"{registry}/jobs", f"./{project.folder.name}"
    reference = folder_recipe(project.folder).reference
    project.made += [reference, f"{place}:{reference.rpartition(':')[2]}"]
    before = resolved(Far, tmp_path, registry=place, build=folder)
    assert before.image is not None and before.image.config_digest is None
    assert before.image.reference == f"{place}:{reference.rpartition(':')[2]}"
    assert any(reason.startswith("build: ") and "cvlaunch image build ./image" in reason for reason in before.unpinned)
    here = resolved(Here, tmp_path, build=folder, make=True)
    assert here.image is not None and here.image.reference == reference and here.unpinned == ()
    built = resolved(Far, tmp_path, registry=place, build=folder)
    sent = resolved(Far, tmp_path, registry=place, build=folder, make=True)
    after = resolved(Far, tmp_path, registry=place, build=folder)
    assert sent.image is not None and sent.image.reference == f"{place}@{sent.image.digest}"
    assert sent.image == after.image and sent.image.config_digest == here.image.config_digest
    assert len({job.digest for job in (here, built, sent, after)}) == 1 and before.digest != sent.digest
    by_digest = resolved(Far, tmp_path, image=sent.image.reference)
    assert by_digest.image == sent.image and by_digest.digest == sent.digest


@with_images
def test_what_was_pushed_needs_no_engine_later(
    project: Project, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = project.build()
    pushed = push(project.engine, built.reference, f"{registry}/y:stable", say=silent)
    project.made.append(pushed.reference)
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(tmp_path))
        job = resolved(Far, tmp_path, image=pushed.reference, make=True)
    assert job.image is not None and job.image.reference == pushed.pinned
    assert job.image.config_digest == built.image.config_digest and job.unpinned == ()


@with_images
def test_an_engine_is_asked_once_about_an_image_by_digest(
    project: Project, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, name = project.build(), f"{registry}/w"
    podman("tag", built.reference, f"{name}:1")
    project.made.append(f"{name}:1")
    reference = f"{name}@{podman('image', 'inspect', '--format={{.Digest}}', f'{name}:1')}"
    seen = resolved(Far, tmp_path, image=reference)
    assert seen.image is not None and seen.image.config_digest == built.image.config_digest
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(tmp_path))
        assert resolved(Far, tmp_path, image=reference).image == seen.image
        assert "is fixed, but" in resolved(Far, tmp_path, image=f"{name}@sha256:{'1' * 64}").unpinned[0]


@with_images
def test_what_is_not_here_is_pulled_to_be_sent_only(
    project: Project, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVLAUNCH_ENGINE", "podman")
    pushed = push(project.engine, project.build().reference, f"{registry}/z:1", say=silent)
    podman("rmi", "--force", pushed.reference, project.made[0])
    seen = resolved(Here, tmp_path, image=pushed.reference)
    assert seen.image is not None and seen.image.config_digest is None
    assert project.engine.image(pushed.reference) is None
    sent = resolved(Here, tmp_path, image=pushed.reference, make=True)
    project.made.append(pushed.reference)
    assert sent.image is not None and sent.image.config_digest == pushed.config_digest
    with pytest.raises(SpecError, match=r"^image: podman pull: .*manifest unknown"):
        resolved(Here, tmp_path, image=f"{registry}/z:2", make=True)
    with pytest.raises(SpecError, match=r"^image: podman has no image localhost/cvlaunch-test-none:1, and no registry"):
        resolved(Here, tmp_path, image="localhost/cvlaunch-test-none:1", make=True)


@pytest.mark.parametrize("backend", [Here, Far])
def test_render_needs_no_engine(backend: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for path in (str(tmp_path / "bin"), str(FakeEngine.install(tmp_path / "asleep").folder)):
        monkeypatch.setenv("PATH", path)
        reference = trainer_recipe().reference
        ours = resolved(backend, tmp_path, image="cvlaunch-trainer", registry="h.example/jobs")
        tag = reference.rpartition(":")[2]
        assert ours.image is not None
        assert ours.image.reference == (reference if backend is Here else f"h.example/jobs:{tag}")
        assert ours.unpinned == (
            f"image: {ours.image.reference} is not pinned; submit builds it, and: cvlaunch image build",
        )
        named = resolved(backend, tmp_path, image="h.example/x:1")
        assert (
            named.image is not None and named.image.reference == "h.example/x:1" and named.image.config_digest is None
        )
        assert named.unpinned[0].startswith("image: h.example/x:1 is not pinned; push it with")
        fixed = resolved(backend, tmp_path, image=f"h.example/x@sha256:{'1' * 64}")
        assert fixed.image is not None and fixed.image.digest == f"sha256:{'1' * 64}"
        assert "is fixed, but" in fixed.unpinned[0]


def test_what_can_t_reach_a_platform_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "folder").mkdir()
    cases: list[tuple[type, dict[str, str], str]] = [
        (
            Far,
            {"image": "cvlaunch-trainer"},
            r"^image: target 'there' does not say where.*add registry: HOST/REPOSITORY",
        ),
        (
            Far,
            {"image": "localhost/x:1"},
            r"^image: localhost/x:1 is on this machine only; push it: cvlaunch image push",
        ),
        (Far, {"build": "folder"}, r"^build: .*/folder holds no Dockerfile"),
        (Here, {"build": "nowhere"}, r"^build: no folder .*/nowhere"),
        (Here, {"image": "h.example/x:1"}, r"^image: docker or podman is not installed here"),
        (Here, {"image": "Not An Image"}, r"^image: 'Not An Image' is no image"),
    ]
    for backend, keys, says in cases:
        with pytest.raises(SpecError, match=says):
            resolved(backend, tmp_path, make=True, **keys)


def test_a_process_has_no_image(tmp_path: Path) -> None:
    assert resolved(LocalBackend, tmp_path, image="x", make=True).image is None
