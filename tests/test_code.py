"""Code archives: equal bytes for equal content, what belongs in them, and what never leaves the machine."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from launcher.code import IGNORE_FILE, build_archive
from launcher.errors import SpecError

HEADING = "-----BEGIN " + "PRIVATE KEY-----"
AWS_ID = "AKIA" + "Z7Q3W5X2Y4V6U8T0"
AWS_SECRET = "q7Zk1Lr9" * 5
GOLDEN = "b023a5bb40f322799e03e23b1bc18e13934e200618d0a3961e8b4217650251b8"

git = pytest.mark.needs("git")


def put(root: Path, **files: str) -> Path:
    """Files by name, with `__` for `/`."""
    for name, content in files.items():
        write(root / name.replace("__", "/"), content)
    return root


def write(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def run(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def repository(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    run(root, "init")
    write(root / "train.py", "print(1)\n")
    write(root / ".gitignore", "*.log\ndata/\n")
    run(root, "add", ".")
    run(root, "commit", "-m", "first")
    return root


def names(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def archived(root: Path, to: Path) -> list[str]:
    build_archive(root, to, requirements=None)
    return names(to)


def refusal(root: Path, to: Path, requirements: str | None = None) -> SpecError:
    with pytest.raises(SpecError) as caught:
        build_archive(root, to, requirements=requirements)
    assert not to.exists()
    assert caught.value.key is not None
    return caught.value


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "out" / "code.tar.gz"


# ---- bytes


def test_equal_content_gives_equal_bytes(tmp_path: Path, to: Path) -> None:
    first = put(tmp_path / "first", a="1", b__c="2", z="3")
    (first / "a").chmod(0o744)
    (first / "z").chmod(0o600)
    (first / "link").symlink_to("b/c")
    second = tmp_path / "second"
    for name in ("z", "b/c", "a"):
        write(second / name, (first / name).read_bytes())
        os.utime(second / name, (1, 1))
    (second / "link").symlink_to("b/c")
    (second / "a").chmod(0o755)
    (second / "z").chmod(0o664)
    if os.geteuid() == 0:
        os.chown(second / "a", 1234, 1234)
    one = build_archive(first, to, requirements=None)
    before = to.read_bytes()
    two = build_archive(second, to, requirements=None)
    assert (one, before) == (two, to.read_bytes())
    assert one.sha256 == hashlib.sha256(before).hexdigest()
    assert one.size == len(before)


def test_bytes_stay_the_same_from_release_to_release(tmp_path: Path, to: Path) -> None:
    """They are part of the job's digest; whatever zlib this Python has is no part of them."""
    put(tmp_path / "code", train__py="print(1)\n", data__x="y" * 100_000)
    assert build_archive(tmp_path / "code", to, requirements=None).sha256 == GOLDEN
    assert len(gzip.decompress(to.read_bytes())) == 112640


def test_names_modes_and_owners(tmp_path: Path, to: Path) -> None:
    root = put(tmp_path / "code", b="1", a="2", B="3", sub__c="4")
    write(root / "é ü\n.txt")
    write(root / ("long" * 40) / "name.py")
    (root / "a").chmod(0o700)
    (root / "b").chmod(0o666)
    (root / "up").symlink_to("sub/c")
    build_archive(root, to, requirements=None)
    assert names(to) == sorted(names(to), key=os.fsencode)
    with tarfile.open(to) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert [tar.getmember(name).mode for name in ("a", "b")] == [0o755, 0o644]
        assert (tar.getmember("up").issym(), tar.getmember("up").linkname) == (True, "sub/c")
        tar.extractall(tmp_path / "back", filter="data")
    assert (tmp_path / "back/é ü\n.txt").read_text() == "x"
    assert (tmp_path / "back/up").read_text() == "4"


def test_tar_and_gunzip_read_it(tmp_path: Path, to: Path) -> None:
    build_archive(put(tmp_path / "code", a="1" * 200_000, b="2"), to, requirements=None)
    listed = subprocess.run(["tar", "tzf", to], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == ["a", "b"]


# ---- which files


def test_a_plain_folder_gives_all_but_leftovers(tmp_path: Path, to: Path) -> None:
    root = put(tmp_path / "code", a="1", __pycache____a="2")
    for name in (".venv/lib/x.py", "sub/__pycache__/y.pyc", ".git2/kept", "node_modules/z.js", "sub/kept"):
        write(root / name)
    os.mkfifo(root / "pipe")
    assert archived(root, to) == [".git2/kept", "a", "sub/kept"]


@git
def test_a_repository_gives_tracked_and_untracked_but_not_ignored(tmp_path: Path, to: Path) -> None:
    root = repository(tmp_path / "repo")
    put(root, new__py="1", data__big="2")
    write(root / "run.log")
    assert archived(root, to) == [".gitignore", "new/py", "train.py"]


@git
def test_a_folder_of_a_repository(tmp_path: Path, to: Path) -> None:
    root = repository(tmp_path / "repo")
    write(root / "src/a.py")
    write(root / "src/a.log")
    write(root / "src" / IGNORE_FILE, "/b.py\n")
    write(root / "src/b.py")
    write(root / "src/deep/b.py")
    run(root, "add", "src/b.py")
    assert archived(root / "src", to) == [IGNORE_FILE, "a.py", "deep/b.py"]


@git
def test_deleted_files_and_repositories_inside(tmp_path: Path, to: Path) -> None:
    root = repository(tmp_path / "repo")
    repository(root / "vendor" / "lib")
    (root / "train.py").unlink()
    write(root / "kept.py")
    assert archived(root, to) == [".gitignore", "kept.py", "vendor/lib/.gitignore", "vendor/lib/train.py"]


@git
def test_a_folder_replaced_by_a_link_is_not_followed(tmp_path: Path, to: Path) -> None:
    root = repository(tmp_path / "repo")
    write(root / "sub/secret.txt", "inside")
    run(root, "add", "sub")
    shutil.rmtree(root / "sub")
    write(root / "other/secret.txt", "other")
    (root / "sub").symlink_to("other")
    assert "sub/secret.txt" not in archived(root, to)


@git
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("in_git", [False, True])
def test_cvlaunchignore_is_a_gitignore(tmp_path: Path, to: Path, in_git: bool, tracked: bool) -> None:
    root = repository(tmp_path / "code") if in_git else tmp_path / "code"
    rules = "# comment\n*.bin\n!keep.bin\n/top\nfolder/\ndeep/**/x\n\\#odd\n"
    write(root / IGNORE_FILE, rules)
    out = ("a.bin", "sub/b.bin", "top", "folder/y", "sub/folder/z", "deep/1/2/x", "#odd")
    kept = ("keep.bin", "sub/top", "sub/keep.bin", "deep/1/y", ":(top)odd", "-dash", "sp ace\n")
    for name in (*out, *kept):
        write(root / name)
    if in_git and tracked:
        run(root, "add", "--force", ".")
    found = set(archived(root, to)) - {".gitignore", "train.py"}
    assert found == {*kept, IGNORE_FILE}


@git
def test_commit_and_dirty(tmp_path: Path, to: Path) -> None:
    root = repository(tmp_path / "repo")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    code = build_archive(root, to, requirements=None)
    assert (code.commit, code.dirty) == (head, False)
    write(root / "run.log")
    assert build_archive(root, to, requirements=None).dirty is False
    write(root / "new.py")
    assert build_archive(root, to, requirements=None).dirty is True


@git
def test_a_repository_without_commits(tmp_path: Path, to: Path) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    run(root, "init")
    write(root / "a")
    code = build_archive(root, to, requirements=None)
    assert (code.commit, code.dirty) == (None, True)


def test_outside_git_there_is_no_commit(tmp_path: Path, to: Path) -> None:
    code = build_archive(put(tmp_path / "code", a="1"), to, requirements=None)
    assert (code.commit, code.dirty) == (None, False)


@git
def test_a_broken_repository_is_not_taken_for_a_plain_folder(tmp_path: Path, to: Path) -> None:
    root = put(tmp_path / "code", a="1")
    (root / ".git").mkdir()
    assert "git ls-files failed" in str(refusal(root, to))


@git
def test_inside_a_git_hook(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git tells its hooks about *its* repository by variables."""
    other = repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    root = tmp_path / "repo"
    root.mkdir()
    monkeypatch.delenv("GIT_DIR")
    run(root, "init")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    write(root / "mine.py")
    assert archived(root, to) == ["mine.py"]


def test_the_archive_itself_is_no_part_of_it(tmp_path: Path) -> None:
    root = put(tmp_path / "code", a="1")
    first = build_archive(root, root / "code.tar.gz", requirements=None)
    assert build_archive(root, root / "code.tar.gz", requirements=None) == first
    assert names(root / "code.tar.gz") == ["a"]


def test_without_git_a_plain_folder_works_and_rules_are_an_error(
    tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put(tmp_path / "code", a="1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert archived(root, to) == ["a"]
    to.unlink()
    write(root / IGNORE_FILE, "b\n")
    assert "install git" in str(refusal(root, to))


# ---- what is refused


def test_no_folder_a_file_and_nothing_in_it(tmp_path: Path, to: Path) -> None:
    assert "no folder" in str(refusal(tmp_path / "none", to))
    assert "is a file" in str(refusal(write(tmp_path / "file"), to))
    (tmp_path / "empty").mkdir()
    error = refusal(tmp_path / "empty", to)
    assert "holds no files" in str(error)
    assert error.key == "code.root"


@pytest.mark.parametrize("target", ["../outside", "/etc/hostname", "sub/../../outside", "self/../../outside", "hop/x"])
def test_links_that_lead_outside(tmp_path: Path, to: Path, target: str) -> None:
    write(tmp_path / "outside")
    write(tmp_path / "beyond/x")
    root = put(tmp_path / "code", a="1", sub__b="2")
    (root / "self").symlink_to(".")
    (root / "hop").symlink_to("../beyond") if target == "hop/x" else None
    (root / "bad").symlink_to(target)
    error = refusal(root, to)
    assert f"bad -> {target}" in str(error)
    assert IGNORE_FILE in str(error)


def test_links_that_stay_inside(tmp_path: Path, to: Path) -> None:
    root = put(tmp_path / "code", a="1", sub__b="2")
    (root / "sub/up").symlink_to("../a")
    (root / "folder").symlink_to("sub")
    (root / "dangling").symlink_to("nowhere")
    assert archived(root, to) == ["a", "dangling", "folder", "sub/b", "sub/up"]


def test_too_large_names_the_largest(tmp_path: Path, to: Path) -> None:
    root = put(tmp_path / "code", small="1")
    for name, size in (("weights.pt", 40_000_000), ("video.mp4", 10_000_001)):
        with write(root / name).open("wb") as file:
            file.truncate(size)
    message = str(refusal(root, to))
    assert message.index("weights.pt (38.1 MiB)") < message.index("video.mp4") < message.index("small")
    assert IGNORE_FILE in message
    with (root / "weights.pt").open("wb") as file:
        file.truncate(39_999_998)
    assert len(archived(root, to)) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("server.pem", "x"),
        ("sub/id_rsa", "x"),
        ("id_rsa.bak", "x"),
        ("id_ed25519", "x"),
        ("tls.key", "x"),
        ("TLS.KEY", "x"),
        (".env", "x"),
        (".env.production", "x"),
        ("credentials", "x"),
        ("credentials.json", "x"),
        ("cert.p12", "x"),
        (".netrc", "x"),
        (".pypirc", "x"),
        ("notes.txt", f"{HEADING}\nMIIEvQIBADANBgkqhkiG9w0BAQ\n"),
        ("notes.py", f'KEY = """{HEADING.replace("PRIVATE", "RSA PRIVATE")}\nMIIEvQIBADANBgkqhkiG9w0BAQ\n"""'),
        ("split.py", f'KEY = ("{HEADING}\\n"\n    "MIIEvQIBADANBgkqhkiG9w0BAQ\\n")'),
        ("old", f"{HEADING.replace('PRIVATE', 'RSA PRIVATE')}\nProc-Type: 4,ENCRYPTED\n"),
        ("ssh", f"{HEADING.replace('PRIVATE', 'OPENSSH PRIVATE')}\nb3BlbnNzaC1rZXktdjEAAAAA\n"),
        ("config.ini", f"aws_access_key_id = {AWS_ID}\naws_secret_access_key = {AWS_SECRET}\n"),
        ("aws.py", f"boto3.client('s3', aws_access_key_id='{AWS_ID.replace('AKIA', 'ASIA')}', secret='{AWS_SECRET}')"),
        ("sa.json", '{"type": "service_account", "private_key": "whatever"}'),
    ],
    ids=lambda text: text if len(text) < 20 else "content",
)
def test_keys_are_refused(tmp_path: Path, to: Path, name: str, content: str) -> None:
    root = put(tmp_path / "code", a="1")
    write(root / name, content)
    message = str(refusal(root, to))
    assert f"\n  {name} (" in message
    assert IGNORE_FILE in message
    assert "MIIEvQ" not in message
    assert AWS_SECRET not in message
    if shutil.which("git"):
        write(root / IGNORE_FILE, name + "\n")
        assert archived(root, to) == [IGNORE_FILE, "a"]


def test_what_only_resembles_a_key_passes(tmp_path: Path, to: Path) -> None:
    root = tmp_path / "code"
    write(root / "credentials.py", "def login(): ...\n")
    write(root / ".env.example", "TOKEN=\n")
    write(root / "scan.py", f'if "{HEADING}" in text:\n    raise ValueError(text)\n')
    write(root / "public.txt", "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOC\n")
    write(root / "readme.md", f"id {AWS_ID} of commit 0123456789abcdef0123456789abcdef01234567\n")
    write(root / "docs.md", "AKIAIOSFODNN7EXAMPLE wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\n")
    write(root / "keys.json", '{"private_key": "path/to/key"}')
    assert len(archived(root, to)) == 7


def test_many_keys_are_counted(tmp_path: Path, to: Path) -> None:
    root = tmp_path / "code"
    for i in range(25):
        write(root / f"{i:02}.pem")
    message = str(refusal(root, to))
    assert "09.pem" in message
    assert "10.pem" not in message
    assert "and 15 more" in message


@git
def test_requirements_must_be_in_the_archive(tmp_path: Path, to: Path) -> None:
    root = put(tmp_path / "code", a="1", req__lock="numpy==2\n")
    assert build_archive(root, to, requirements="req/lock").requirements == "req/lock"
    to.unlink()
    error = refusal(root, to, "req.txt")
    assert "does not exist" in str(error)
    assert error.key == "code.requirements"
    write(root / IGNORE_FILE, "req/\n")
    assert f"is ignored by git or {IGNORE_FILE}" in str(refusal(root, to, "req/lock"))
