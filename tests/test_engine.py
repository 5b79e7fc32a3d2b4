"""Container engines: their words become our errors, their images one form; docker at the wire, podman for real."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.engine import BuildOptions, Engine, build_error, engine_error, find_engine
from launcher.errors import (
    AuthError,
    CapacityError,
    CvlaunchError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from tests.fake_engine import FakeEngine
from tests.services.podman import locked, podman

STEP = 'Error: building at STEP "RUN make": while running runtime: exit status 2'


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine.install(tmp_path / "bin")
    engine.answer("info", out="[name=seccomp,profile=default]")
    monkeypatch.setenv("PATH", str(engine.folder))
    return engine


# -- words ------------------------------------------------------------------------------------------------------------

WORDS = [
    # podman 4.3
    ("Error: trying to reuse blob sha256:1 at destination: checking whether a blob sha256:1 exists in h/team/a: "
     "unauthorized: authentication required", AuthError, "login"),
    ("Error: writing blob: initiating layer upload to /v2/team/a/blobs/uploads/ in h: StatusCode: 405, Method not "
     "allowed", AuthError, "push elsewhere"),
    ("Error: trying to reuse blob sha256:1 at destination: pinging container registry h:1: Get \"http://h:1/v2/\": "
     "dial tcp h:1: connect: connection refused", UnreachableError, "does not answer"),
    ("Error: localhost/nope:1: image not known", SpecError, "check its name"),
    ("Error: initializing source docker://h/nope:1: reading manifest 1 in h/nope: manifest unknown: manifest unknown",
     SpecError, "check its name"),
    # docker 20.10 and 28
    ("no basic auth credentials", AuthError, "login"),
    ("denied: Your authorization token has expired. Reauthenticate and try again.", AuthError, "right to push"),
    ('error parsing HTTP 405 response body: invalid character \'M\' looking for beginning of value: "Method not allowed'
     '\\n"', AuthError, "push elsewhere"),
    ('Get "http://127.0.0.1:1/v2/": dial tcp 127.0.0.1:1: connect: connection refused', UnreachableError, "address"),
    ("Error response from daemon: manifest for h/no:1 not found: manifest unknown: manifest unknown", SpecError, "tag"),
    ("Error response from daemon: pull access denied for busybx, repository does not exist or may require 'docker "
     "login': denied: requested access to the resource is denied", SpecError, "check its name"),
    ("An image does not exist locally with the tag: h/nope", SpecError, "check its name"),
    ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
     UnreachableError, "systemctl start docker"),
    ("permission denied while trying to connect to the Docker daemon socket", AuthError, "join its group"),
    ("toomanyrequests: You have reached your pull rate limit", UnreachableError, "come back later"),
    ("write /var/lib/docker/tmp/x: no space left on device", CapacityError, "free some space"),
    ("the cow jumped over the moon", SpecError, "failed: the cow"),
]  # fmt: skip


@pytest.mark.parametrize(("output", "kind", "says"), WORDS, ids=[words[0][:40] for words in WORDS])
def test_an_engine_s_words_become_our_errors(output: str, kind: type[CvlaunchError], says: str) -> None:
    error = engine_error("podman", "push", f"Getting image source signatures\n{output}\n")
    assert type(error) is kind
    assert says in str(error) and "\n" not in str(error) and "Getting image" not in str(error)


BUILDS = [
    # a step of the Dockerfile prints what looks like a registry's words
    (f"denied: connection refused\n{STEP}", SpecError, "/x/Dockerfile: a step failed"),
    ("#5 [2/2] RUN make\n#5 0.312 make: *** no rule\n#5 ERROR: executor failed running [/bin/sh -c make]: exit code: 2",
     SpecError, "  make: *** no rule"),
    ('ERROR: failed to solve: process "/bin/sh -c make" did not complete successfully: exit code: 2', SpecError,
     "exit code: 2"),
    ('Error: building at STEP "COPY nope /": checking on sources under "/x": copier: stat: "/nope": no such file or '
     "directory", SpecError, "/x/Dockerfile: a step failed"),
    ("failed to compute cache key: \"/nope\" not found: not found", SpecError, "/x/Dockerfile: a step failed"),
    ("failed to solve with frontend dockerfile.v0: failed to create LLB definition: dockerfile parse error line 2: "
     "unknown instruction: RUNX", SpecError, "RUNX"),
    (f"cp: error writing 'x': No space left on device\n{STEP}", CapacityError, "free some space"),
    ("Error: creating build container: initializing source docker://h/nope:1: pinging container registry h: dial tcp: "
     "connect: connection refused", UnreachableError, "does not answer"),
    ("Error: creating build container: initializing source docker://localhost/nope:1: pinging container registry "
     'localhost: Get "https://localhost/v2/": connect: connection refused', SpecError, "it has no such image"),
    ('failed to solve: failed to do request: Head "http://localhost/v2/nope/manifests/1": connect: connection refused',
     SpecError, "it has no such image"),
    ("Error: creating build container: initializing source docker://h/nope:1: reading manifest 1 in h/nope: manifest "
     "unknown", SpecError, "check its name"),
]  # fmt: skip


def test_of_a_failed_step_only_its_own_lines_are_shown() -> None:
    """BuildKit of Docker 20.10, as it is."""
    output = """\
#3 [internal] load metadata for localhost/cvbase:12
#3 sha256:2cf88ef20d0a2abcbf20a66cbbcc9654562bf4fe0e3048e63529d85eeae7e0af
#3 DONE 0.0s
#4 [1/2] FROM localhost/cvbase:12
#4 CACHED
#5 [2/2] RUN echo one; exit 3
#5 0.301 one
#5 ERROR: executor failed running [/bin/sh -c echo one; exit 3]: exit code: 3
------
 > [2/2] RUN echo one; exit 3:
#5 0.301 one
------
executor failed running [/bin/sh -c echo one; exit 3]: exit code: 3"""
    _, *shown = str(build_error("docker", output, "/x/Dockerfile")).splitlines()
    assert shown == ["  one", "  one", "  executor failed running [/bin/sh -c echo one; exit 3]: exit code: 3"]


@pytest.mark.parametrize(("output", "kind", "says"), BUILDS, ids=[words[0][:40] for words in BUILDS])
def test_a_failed_build_blames_the_dockerfile_or_else_what_is_to_blame(
    output: str, kind: type[CvlaunchError], says: str
) -> None:
    error = build_error("podman", output, "/x/Dockerfile")
    assert type(error) is kind
    assert says in str(error)


# -- which one --------------------------------------------------------------------------------------------------------


def test_no_engine_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="docker or podman or buildah is not installed"):
        find_engine(builds=True)
    with pytest.raises(UnsupportedError, match="podman is not installed"):
        find_engine("podman")
    with pytest.raises(SpecError, match="'dokcer' is no engine to run containers with; there are docker, podman"):
        find_engine("dokcer")
    with pytest.raises(SpecError, match="'buildah' is no engine to run"):
        find_engine("buildah")


def test_one_that_does_not_run_is_said_unless_another_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = FakeEngine.install(tmp_path / "asleep")
    asleep.answer(
        "info", err="Cannot connect to the Docker daemon at unix:///nope. Is the docker daemon running?", code=1
    )
    awake = FakeEngine.install(tmp_path / "awake", "podman")
    awake.answer("info", out="false\n")
    monkeypatch.setenv("PATH", f"{asleep.folder}")
    with pytest.raises(UnreachableError, match="systemctl start docker"):
        find_engine()
    monkeypatch.setenv("PATH", f"{asleep.folder}:{awake.folder}")
    assert find_engine().name == "podman"
    with pytest.raises(UnreachableError):
        find_engine("docker")
    monkeypatch.setenv("CVLAUNCH_ENGINE", "docker")
    with pytest.raises(UnreachableError):
        find_engine()


# -- docker at the wire -----------------------------------------------------------------------------------------------

OPTIONS = BuildOptions(
    "localhost/x:1",
    Path("/x/Dockerfile"),
    "linux/amd64",
    args={"BASE": "debian:12"},
    labels={"a": "b c"},
    more=("--secret", "id=s"),
)
SAID = (
    "--tag", "localhost/x:1", "--file", "/x/Dockerfile", "--platform", "linux/amd64", "--build-arg", "BASE=debian:12",
    "--label", "a=b c", "--secret", "id=s", "/context",
)  # fmt: skip


def test_docker_builds_with_buildx(docker: FakeEngine) -> None:
    docker.answer("buildx", "version", out="v0.20")
    docker.answer("buildx", "build")
    find_engine("docker").build(Path("/context"), OPTIONS, say=lambda line: None)
    (call,) = docker.called("buildx", "build")
    assert call.words == ("buildx", "build", "--load", "--provenance=false", "--progress=plain", *SAID)


def test_docker_builds_without_buildx_where_buildkit_is_inside(docker: FakeEngine) -> None:
    docker.answer("buildx", err="docker: 'buildx' is not a docker command.", code=1)
    docker.answer("build")
    find_engine("docker").build(Path("/context"), OPTIONS, say=lambda line: None)
    assert docker.called("build")[0].words == ("build", "--progress=plain", *SAID)


def test_docker_says_the_digest_of_what_it_pushed(docker: FakeEngine) -> None:
    docker.answer("tag")
    docker.answer("push", out=f"The push refers to repository [h/x]\n1: digest: sha256:{'d' * 64} size: 943\n")
    lines: list[str] = []
    assert find_engine("docker").push("x:1", "h/x:1", options=(), say=lines.append) == f"sha256:{'d' * 64}"
    assert [call.words for call in docker.calls[-2:]] == [("tag", "x:1", "h/x:1"), ("push", "h/x:1")]
    assert lines[0] == "The push refers to repository [h/x]"


def test_a_push_without_a_digest_is_no_success(docker: FakeEngine) -> None:
    docker.answer("tag")
    docker.answer("push", out="all good")
    with pytest.raises(SpecError, match="does not say its digest"):
        find_engine("docker").push("x:1", "h/x:1", options=(), say=lambda line: None)


def test_a_password_goes_through_standard_input(docker: FakeEngine) -> None:
    docker.answer("login")
    find_engine("docker").login("h:5000", "me", "canary")
    (call,) = docker.called("login")
    assert call.stdin == "canary" and "canary" not in " ".join(call.words)
    assert call.words == ("login", "--username", "me", "--password-stdin", "h:5000")


def test_docker_s_containerd_store_is_asked_for_the_configuration(docker: FakeEngine) -> None:
    """There, an image is called by its manifest, whose digest is another one in each registry."""
    index, config = "sha256:" + "1" * 64, "2" * 64
    kind = "application/vnd.oci.image.index.v1+json"
    docker.has_image("x:1", id=index, Descriptor={"mediaType": kind, "digest": index})
    docker.answer("image", "save", out=_saved(config), times=1)
    for _ in range(2):  # the second answer is known
        image = find_engine("docker").image("x:1")
        assert image is not None and image.config_digest == f"sha256:{config}"
    assert [call.words for call in docker.called("image", "save")] == [("image", "save", index)]


def _saved(config: str) -> bytes:
    content = json.dumps([{"Config": f"blobs/sha256/{config}", "RepoTags": ["x:1"], "Layers": []}]).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in {"blobs/sha256/layer": b"x" * 100_000, "manifest.json": content}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def test_an_archive_without_a_manifest_is_an_error(docker: FakeEngine) -> None:
    image = "sha256:" + "1" * 64
    docker.has_image("x:1", id=image, Descriptor={"mediaType": "application/vnd.oci.image.manifest.v1+json"})
    docker.answer("image", "save", err="no such image", code=1)
    with pytest.raises(SpecError, match="does not say what"):
        find_engine("docker").image("x:1")


def test_an_engine_that_is_gone_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="can't be started: No such file"):
        Engine("podman", str(tmp_path / "podman")).read("info")


# -- podman for real --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image with a file and an entry point."""
    folder, tag = tmp_path_factory.mktemp("small"), f"localhost/cvlaunch-test-engine:{os.getpid()}"
    (folder / "note").write_text("read me")
    (folder / "Dockerfile").write_text(
        f'FROM {base_image}\nCOPY note /opt/note\nUSER 1000\nENTRYPOINT ["cvlaunch-run", "--"]\nLABEL some="thing"\n'
    )
    with locked("images"):
        podman("build", "--tag", tag, folder)
    yield tag
    with locked("images"):
        podman("rmi", "--force", tag)


@pytest.mark.needs("podman", "debootstrap")
def test_an_image_and_what_is_in_it(small: str) -> None:
    engine = find_engine("podman")
    image = engine.image(small)
    assert image is not None
    assert image.config_digest == "sha256:" + podman("image", "inspect", "--format={{.Id}}", small)
    assert (image.names, image.user, image.platform) == ((small,), "1000", "linux/amd64")
    assert image.entrypoint == ("cvlaunch-run", "--") and image.labels["some"] == "thing"
    assert len(image.layers) == 2 and image.size > 10_000_000
    sizes = [step.size for step in engine.steps(small) if step.size]
    assert len(sizes) == 2 and sizes[0] < 10_000 < 10_000_000 < sizes[1]
    before = podman("ps", "--all", "--quiet", "--filter", f"ancestor={small}")
    assert engine.file_in(small, "/opt/note") == b"read me"
    assert engine.file_in(small, "/opt/nothing") is None
    assert podman("ps", "--all", "--quiet", "--filter", f"ancestor={small}") == before == ""


@pytest.mark.needs("podman")
def test_an_image_that_is_not_there() -> None:
    assert find_engine("podman").image("localhost/cvlaunch-test-nothing:1") is None
