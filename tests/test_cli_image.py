"""`cvlaunch image` as a process of its own: the reference alone on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.image import folder_recipe
from tests.cli_tool import COMMAND, cli, cli_json
from tests.fake_engine import FakeEngine
from tests.image_fixtures import with_images
from tests.services.podman import podman


@pytest.fixture
def folder(tmp_path: Path, base_image: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Dockerfile of a small image, whose tags are removed at the end."""
    made = tmp_path / f"cvlaunch-test-cli-{os.getpid()}"
    made.mkdir()
    (made / "code").write_text(str(tmp_path))
    (made / "Dockerfile").write_text(
        f'ARG BASE={base_image}\nFROM ${{BASE}}\nARG WORD=none\nRUN echo "the word is ${{WORD}}" > /word\n'
        'COPY code /code\nENTRYPOINT ["cvlaunch-run"]\nLABEL io.cvlaunch.contract="1"\n'
    )
    monkeypatch.setenv("CVLAUNCH_ENGINE", "podman")
    yield made
    tags = podman("images", "--format={{.Repository}}:{{.Tag}}", "--filter=label=io.cvlaunch.content").splitlines()
    for tag in tags:
        if made.name in tag:
            podman("rmi", "--force", tag, check=False)


@with_images
def test_build_prints_the_reference_alone(folder: Path, tmp_path: Path) -> None:
    first = cli("image", "build", folder, cwd=tmp_path)
    reference = folder_recipe(folder).reference
    assert (first.returncode, first.stdout) == (0, f"{reference}\n"), first.stderr
    assert "COPY code /code" in first.stderr and "\nbuilt in " in first.stderr
    again = cli("image", "build", folder, cwd=tmp_path)
    assert again.stdout == first.stdout
    assert len(again.stderr.splitlines()) == 1 and again.stderr.startswith("unchanged, so it was not built again: ")
    assert cli("image", "build", folder, "--force", "--quiet", cwd=tmp_path).stderr == ""
    facts = cli_json("image", "build", folder, cwd=tmp_path)
    assert set(facts) == {"reference", "config_digest", "size", "layers", "seconds", "rebuilt"}
    assert facts["rebuilt"] is False and facts["config_digest"].startswith("sha256:") and len(facts["layers"]) == 3


@with_images
def test_the_engine_s_options_stand_behind_two_dashes(folder: Path, tmp_path: Path) -> None:
    done = cli("image", "build", folder, "--", "--build-arg", "WORD=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        podman("run", "--rm", "--network=none", "--entrypoint=cat", done.stdout.strip(), "/word") == "the word is here"
    )
    wrong = cli("image", "build", folder, "--", "--no-such-option", cwd=tmp_path)
    assert wrong.returncode == 2 and "no-such-option" in wrong.stderr


@with_images
def test_push_prints_the_reference_by_digest(folder: Path, registry: str, tmp_path: Path) -> None:
    built = cli("image", "build", folder, cwd=tmp_path).stdout.strip()
    done = cli("image", "push", built, f"{registry}/{folder.name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, _, digest = done.stdout.strip().partition("@")
    assert (name, len(digest)) == (f"{registry}/{folder.name}", 71)
    assert f"pushed {name}:{built.rpartition(':')[2]}" in done.stderr
    facts = cli_json("image", "push", built, f"{registry}/{folder.name}:x", cwd=tmp_path)
    assert facts["reference"] == f"{name}:x" and facts["pinned"] == f"{name}@{facts['digest']}"
    seen = cli_json("image", "inspect", built, cwd=tmp_path)
    assert seen["config_digest"] == facts["config_digest"] and facts["pinned"] in seen["pinned"]


WARNINGS = [
    ("", "linux/amd64", []),
    ("ENTRYPOINT []\n", "linux/amd64", ["its entry point is not cvlaunch-run"]),
    ("LABEL io.cvlaunch.contract=0\n", "linux/amd64", ["it speaks contract 0, this cvlaunch speaks 1"]),
    ("USER 1000\n", "linux/amd64", ["it sets USER 1000"]),
    ("", "linux/arm64", ["it is for linux/arm64"]),
]


@with_images
@pytest.mark.parametrize(("line", "platform", "warnings"), WARNINGS, ids=["fine", "entry", "contract", "user", "arm"])
def test_inspect_warns_of_what_jobs_will_meet(
    folder: Path, tmp_path: Path, line: str, platform: str, warnings: list[str]
) -> None:
    """Nothing of another platform has to run to be built."""
    text = (folder / "Dockerfile").read_text() + line
    (folder / "Dockerfile").write_text(
        text if platform == "linux/amd64" else f"FROM scratch\n{text.split('word', 2)[-1]}"
    )
    if platform != "linux/amd64":
        entry = 'ENTRYPOINT ["cvlaunch-run"]\nLABEL io.cvlaunch.contract="1"\n'
        (folder / "Dockerfile").write_text(f"FROM scratch\nCOPY code /code\n{entry}")
    built = cli("image", "build", folder, "--platform", platform, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    seen = cli_json("image", "inspect", built.stdout.strip(), cwd=tmp_path)
    assert [text[: len(start)] for text, start in zip(seen["warnings"], warnings, strict=True)] == warnings
    assert (seen["platform"], seen["packages"]) == (platform, None)
    shown = cli("image", "inspect", built.stdout.strip(), cwd=tmp_path)
    assert shown.returncode == 0 and "config digest" in shown.stdout and "MADE BY" in shown.stdout
    assert shown.stderr.count("warning: ") == len(warnings)


@with_images
def test_inspect_knows_our_image(trainer_image_here: str, tmp_path: Path) -> None:
    seen = cli_json("image", "inspect", "cvlaunch-trainer", cwd=tmp_path)
    assert (seen["reference"], seen["warnings"], seen["contract"]) == (trainer_image_here, [], "1")
    assert seen["packages"] > 50 and len(seen["layers"]) >= 5 and seen["user"] == ""


@with_images
def test_one_live_line_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    """Lines of the engine pass by in it; the reference goes to the pipe."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, "image", "build", str(folder)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert process.stdout is not None
        assert process.stdout.read().strip() == folder_recipe(folder).reference
    assert process.returncode == 0
    assert b"built in" in shown and shown.count(b"\n") < 10


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["push"], 2, "give [IMAGE] TO; see: cvlaunch image push --help"),
        (["push", "a", "b", "c"], 2, "give [IMAGE] TO"),
        (["build", "--file", "x"], 2, "--file needs FOLDER"),
        (["build", "nowhere"], 2, "no folder nowhere to build an image from"),
        (["build", "--engine", "dokcer"], 2, "'dokcer' is no engine to build images with"),
        (["build"], 2, "no container engine was found on PATH"),
        (["inspect", "x:1"], 2, "no container engine was found on PATH"),
        (["push", "x:1", "h.example/x"], 2, "no container engine was found on PATH"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = cli("image", *arguments, cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_engine_that_is_not_running(tmp_path: Path) -> None:
    asleep = FakeEngine.install(tmp_path / "bin")
    asleep.answer(
        "info", err="Cannot connect to the Docker daemon at unix:///nope. Is the docker daemon running?", code=1
    )
    done = cli("image", "build", cwd=tmp_path, env={"PATH": str(asleep.folder)})
    assert done.returncode == 6 and "systemctl start docker" in done.stderr and len(done.stderr.splitlines()) == 1


def test_json_of_a_failure_is_empty(tmp_path: Path) -> None:
    done = cli("image", "inspect", "x:1", "--json", cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert done.stdout == "" and done.returncode == 2


def test_help_loads_no_engine() -> None:
    script = (
        "import sys\nfrom launcher.cli import main\n"
        "try:\n    main(['image', 'build', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not [m for m in ('launcher.engine', 'launcher.image', 'boto3') if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_json_keys_of_a_push_are_those_of_the_note(tmp_path: Path) -> None:
    """A fake engine shows what is asked of one, word by word."""
    fake = FakeEngine.install(tmp_path / "bin")
    fake.answer("info", out="[]")
    fake.answer("tag")
    fake.has_image("x:1")
    fake.answer("push", out=f"1: digest: sha256:{'d' * 64} size: 9")
    done = cli(
        "image", "push", "x:1", "h.example/x", "--json", "--", "--disable-content-trust", cwd=tmp_path,
        env={"PATH": str(fake.folder)},
    )  # fmt: skip
    assert set(json.loads(done.stdout)) == {"reference", "digest", "config_digest", "pinned"}
    assert fake.called("push")[0].words == ("push", "--disable-content-trust", "h.example/x:1")
