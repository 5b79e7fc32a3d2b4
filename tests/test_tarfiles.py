from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launcher.tarfiles import check_member, extract_tar

Member = tuple[str, bytes | str, bytes]


def archive(path: Path, *members: Member) -> Path:
    """(name, content or link, type)"""
    with tarfile.open(path, "w") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o4777 if name.endswith(".sh") else 0o600
            if isinstance(content, str):
                info.linkname = content
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def extract(path: Path, folder: Path) -> None:
    with tarfile.open(path) as tar:
        extract_tar(tar, folder)


def test_files_folders_and_links_come_out_with_plain_modes(tmp_path: Path) -> None:
    members: list[Member] = [
        ("link", "deep/run.sh", tarfile.SYMTYPE),
        ("deep", b"", tarfile.DIRTYPE),
        ("deep/run.sh", b"run", tarfile.REGTYPE),
        ("deep/up", "../plain", tarfile.SYMTYPE),
        ("plain", b"text", tarfile.REGTYPE),
    ]
    extract(archive(tmp_path / "a.tar", *members), tmp_path / "out")
    assert (tmp_path / "out/link").read_bytes() == b"run"
    assert (tmp_path / "out/deep/up").read_bytes() == b"text"
    assert (tmp_path / "out/deep/run.sh").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out/plain").stat().st_mode & 0o7777 == 0o644


OUT: dict[str, list[Member]] = {
    "up": [("../evil", b"1", tarfile.REGTYPE)],
    "up again": [("a/../../evil", b"1", tarfile.REGTYPE)],
    "absolute": [("/tmp/evil", b"1", tarfile.REGTYPE)],
    "link up": [("evil", "../outside", tarfile.SYMTYPE)],
    "absolute link": [("evil", "/etc/passwd", tarfile.SYMTYPE)],
    "hard link": [("evil", "../outside", tarfile.LNKTYPE)],
    "device": [("evil", b"", tarfile.CHRTYPE)],
    "pipe": [("evil", b"", tarfile.FIFOTYPE)],
    "through a link": [("a", ".", tarfile.SYMTYPE), ("a/evil", b"1", tarfile.REGTYPE)],
    "link by link": [
        ("a/b/c", b"", tarfile.DIRTYPE),
        ("a/b/here", "c", tarfile.SYMTYPE),
        ("a/b/c/top", "../../..", tarfile.SYMTYPE),
        ("evil", "a/b/here/top/../outside", tarfile.SYMTYPE),
    ],
    "in it twice": [("evil", b"1", tarfile.REGTYPE), ("evil", b"2", tarfile.REGTYPE)],
}


@pytest.mark.parametrize("name", OUT)
def test_what_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("secret")
    path = archive(tmp_path / "a.tar", *OUT[name])
    with pytest.raises(tarfile.TarError):
        extract(path, tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/evil").exists()
    assert (tmp_path / "outside").read_text() == "secret"


def test_the_standard_library_s_filter_refuses_the_same(tmp_path: Path) -> None:
    """Where this Python has it: the names alone, which are looked at before anything is written."""
    if not hasattr(tarfile, "data_filter"):
        pytest.skip("not run here: needs Python 3.11.4")
    for name in ("up", "link up", "absolute link", "hard link", "device", "pipe"):
        with tarfile.open(archive(tmp_path / f"{name}.tar", *OUT[name])) as tar:
            member = tar.getmembers()[0]
        with pytest.raises(tarfile.TarError):
            check_member(member)
        with pytest.raises(tarfile.FilterError):
            tarfile.data_filter(member, str(tmp_path / "out"))


def test_nothing_of_later_pythons_is_used() -> None:
    """Debian 12's Python is 3.11.2, and runs the trainer image."""
    root = Path(__file__).parents[1]
    words = ["data_filter", 'filter="data"', "filter='data'"]
    found = [p.name for p in (root / "launcher").rglob("*.py") if any(word in p.read_text() for word in words)]
    assert found == []
    assert sys.version_info >= (3, 11)
    assert (
        subprocess.run([sys.executable, "-c", "import launcher.tarfiles"], check=True, env=os.environ).returncode == 0
    )
