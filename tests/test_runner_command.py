"""The command's environment: folders that can be written, whatever the disk and the user."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.contract import JobFile, Layout
from launcher.runner.command import command_environment
from launcher.runner.ranks import find_ranks
from launcher.runner.root import scratch_folder

NOWHERE = "/dev/null/tmp"
"""Not even root can write here."""
HOMES = ("HOME", "TORCH_HOME", "HF_HOME", "MPLCONFIGDIR", "YOLO_CONFIG_DIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")


def environment(folder: Path, environ: Mapping[str, str], *, scratch: Path | None = None) -> dict[str, str]:
    scratch = scratch or folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    job = JobFile(run_id="shapes-1", name="shapes", job_digest="0" * 64, output=folder.as_uri(), command=("true",))
    ranks = find_ranks(1, {}, folder)
    return command_environment(
        job,
        Layout(folder),
        environ=environ,
        secrets={},
        ranks=ranks,
        attempt=1,
        scratch=scratch,
        python_path=(),
    )


def below(variables: Mapping[str, str], folder: Path) -> set[str]:
    return {name for name, value in variables.items() if Path(value).is_relative_to(folder)}


def test_what_works_is_left_alone(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    found = environment(tmp_path / "root", environ)
    assert {name: found[name] for name in environ} == environ
    assert "TORCH_HOME" not in found and "TMPDIR" not in environment(tmp_path, {"HOME": str(tmp_path)})


@pytest.mark.parametrize("home", [None, "", NOWHERE])
def test_a_home_that_can_t_be_written(tmp_path: Path, home: str | None) -> None:
    given = {"HF_HOME": "/models", **({} if home is None else {"HOME": home})}
    found = environment(tmp_path, given)
    assert Path(found["HOME"]).is_dir() and "HOME" in below(found, tmp_path / "scratch")
    assert found["HF_HOME"] == "/models", "what the user says counts"


def test_caches_beside_a_home_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.cache").write_text("a file in the way")
    found = environment(tmp_path, {"HOME": str(tmp_path / "home")})
    assert below({n: found[n] for n in HOMES if n in found}, tmp_path / "scratch") == {
        "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME",
    }  # fmt: skip


def test_caches_of_the_trainer_image_stay_out_of_home(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "CVLAUNCH_SCRATCH_CACHES": "1", "HF_HOME": "/models"}
    found = environment(tmp_path / "root", environ, scratch=tmp_path / "scratch")
    assert below({n: found[n] for n in HOMES}, tmp_path / "scratch") == {*HOMES} - {"HOME", "HF_HOME"}
    assert found["HOME"] == str(tmp_path) and list(tmp_path.glob(".*")) == []


def test_temporary_files_where_tmp_can_t_be_written(tmp_path: Path) -> None:
    root = Path("/tmp") / f"cv{os.getpid()}"
    try:
        found = environment(root, {"HOME": "/", "TMPDIR": NOWHERE})
        assert found["TMPDIR"] == str(root / "scratch/tmp")
        assert list(Path(found["TMPDIR"]).iterdir()) == []
    finally:
        for folder in (root / "scratch/tmp", root / "scratch/home", root / "scratch", root):
            if folder.is_dir():
                folder.rmdir()


def test_sockets_can_stand_in_the_temporary_folder(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90) / f".scratch-{os.getpid()}"
    found = environment(tmp_path, {"HOME": "/", "TMPDIR": NOWHERE}, scratch=deep)
    folder = Path(found["TMPDIR"])
    try:
        assert folder.is_dir() and folder.name == f"scratch-{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "listener-of-a-data-loader"))
    finally:
        (folder / "listener-of-a-data-loader").unlink(missing_ok=True)
        folder.rmdir()


def test_scratch_without_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tempfile itself is told that nothing can be written, as on a read-only disk."""
    monkeypatch.setattr("tempfile.tempdir", NOWHERE)
    first, second = scratch_folder(Layout(tmp_path)), scratch_folder(Layout(tmp_path))
    assert first.is_dir() and first.parent == second.parent == tmp_path
    assert first != second, "two nodes that share a root must not share what one of them removes"
