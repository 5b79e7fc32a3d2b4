"""Stores: one set of promises for folders, memory, moto and rclone; hostile paths; every error in our words."""

from __future__ import annotations

import dataclasses
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import stores
from launcher.errors import (
    AuthError,
    CapacityError,
    IntegrityError,
    SpecError,
    UnreachableError,
    UnsupportedError,
)
from launcher.kube.volume import VolumeStore
from launcher.stores import StorageOptions, Store, open_store
from launcher.stores.object_errors import Operation, object_errors
from launcher.stores.remote import RemoteStore
from tests.s3_fixtures import Bucket
from tests.services.s3 import S3Server, make_certificate, rclone_server
from tests.volume_fixtures import whole_machine  # noqa: F401


@pytest.fixture(
    params=[
        "folder",
        "memory",
        "moto",
        "rclone",
        pytest.param("ssh", marks=pytest.mark.needs("sshd", "root")),
        "volume",
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "not" / "there" / "yet"))
    if request.param == "memory":
        return open_store(f"memory://{tmp_path.name}/runs/shapes-1")
    if request.param == "ssh":
        return RemoteStore(request.getfixturevalue("ssh_host"), str(tmp_path / "not" / "there" / "yet"))
    if request.param == "volume":
        client = request.getfixturevalue("whole_machine")
        return VolumeStore("claim", str(tmp_path / "not" / "there" / "yet").lstrip("/"), client)
    bucket: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return bucket.store()


# -- what every store promises ----------------------------------------------------------------------------------------


def test_read_what_was_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"from a file")
    store.write("output/result.json", b"old")
    store.write("output/result.json", b"{}")
    store.write("model/weights #1 é%20.bin", tmp_path / "local")
    store.write("empty", b"")
    assert store.read("output/result.json") == b"{}"
    assert store.read("model/weights #1 é%20.bin") == b"from a file"
    assert store.read("empty") == b""


def test_head_tells_size_time_and_change(store: Store) -> None:
    store.write("a", b"12345")
    first = store.head("a")
    store.write("a", b"54321")
    second = store.head("a")
    assert first is not None
    assert second is not None
    assert (first.path, first.size) == ("a", 5)
    assert abs(first.modified - time.time()) < 60
    assert first.etag != second.etag
    assert store.head("b") is None
    assert store.head("a/b") is None


def test_list_is_sorted_relative_and_by_folder(store: Store) -> None:
    for path in ("a/c", "a-b", "a/b/d", "ab/x", "z"):
        store.write(path, b"1")
    assert [entry.path for entry in store.list()] == ["a-b", "a/b/d", "a/c", "ab/x", "z"]
    assert [entry.path for entry in store.list("a")] == ["a/b/d", "a/c"]
    assert list(store.list("nothing")) == []
    assert [entry.etag for entry in store.list()] == [store.head(e.path).etag for e in store.list()]  # type: ignore[union-attr]


def test_stores_below_one_another_see_their_own_paths(store: Store) -> None:
    if isinstance(store, stores.FolderStore):
        inner = open_store(stores.join_uri(store.uri, "a b"))
    elif isinstance(store, RemoteStore | VolumeStore):
        inner = dataclasses.replace(store, root=f"{store.root}/a b")
    else:
        inner = dataclasses.replace(store, prefix=store.prefix + "/a b")  # type: ignore[attr-defined]
    store.write("a b/c", b"1")
    store.write("other", b"1")
    assert [entry.path for entry in inner.list()] == ["c"]
    assert inner.uri.startswith(store.uri)


RANGES = [(0, None, b"0123456789"), (4, None, b"456789"), (4, 6, b"45"), (8, 99, b"89"), (0, 2, b"01")]
RANGES += [(10, None, b""), (10, 12, b""), (99, None, b""), (99, 120, b""), (5, 5, b""), (5, 3, b"")]


@pytest.mark.parametrize(("start", "end", "expected"), RANGES)
def test_ranges(store: Store, start: int, end: int | None, expected: bytes) -> None:
    store.write("a", b"0123456789")
    assert store.read_range("a", start, end) == expected


def test_what_is_missing(store: Store, tmp_path: Path) -> None:
    for call in (store.read, lambda p: store.read_range(p, 3), lambda p: store.download(p, tmp_path / "to" / "x")):
        with pytest.raises(FileNotFoundError) as caught:
            call("no/such")
        assert "Debug source" not in str(caught.value)
    store.write("a", b"1")
    store.delete(["a", "no/such"])
    store.delete([])
    assert list(store.list()) == []
    assert not (tmp_path / "to" / "x").exists()


def test_second_writer_is_refused(store: Store) -> None:
    store.write("owner", b"first", if_absent=True)
    with pytest.raises(FileExistsError):
        store.write("owner", b"second", if_absent=True)
    assert store.read("owner") == b"first"


def test_download_leaves_one_complete_file(store: Store, tmp_path: Path) -> None:
    content = os.urandom(9 << 20)  # more than one part of an upload
    store.write("checkpoints/1/weights", content)
    to = tmp_path / "home" / "deep" / "weights"
    entry = store.download("checkpoints/1/weights", to)
    assert to.read_bytes() == content
    assert entry == store.head("checkpoints/1/weights")
    assert [path.name for path in to.parent.iterdir()] == ["weights"]


def test_writable_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert list(store.list()) == []


HOSTILE = [
    "",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a//b",
    "a/",
    "./a",
    "a\\..\\b",
    "a\0b",
    "a\nb",
    "C:/x",
    "\udcff",
]


@pytest.mark.parametrize("path", HOSTILE)
def test_paths_that_leave_the_folder_are_refused(store: Store, path: str, tmp_path: Path) -> None:
    calls = [store.head, store.read, lambda p: store.write(p, b""), lambda p: store.read_range(p, 1)]
    calls += [lambda p: store.download(p, tmp_path / "x"), lambda p: store.delete([p])]
    for call in calls:
        with pytest.raises(SpecError):
            call(path)
    if path:
        with pytest.raises(SpecError):
            list(store.list(path))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=30) | st.lists(st.sampled_from(["..", ".", "a", "", "/", "\\", "C:"])).map("/".join))
def test_a_path_that_passes_stays_below_its_root(path: str) -> None:
    if stores.bad_path(path) is None:
        full = os.path.normpath(f"/root/folder/{path}")
        assert full.startswith("/root/folder/")
        path.encode()


# -- folders ----------------------------------------------------------------------------------------------------------


def test_links_out_of_a_folder_are_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    root = tmp_path / "store"
    (root / "data").mkdir(parents=True)
    (root / "data" / "real").write_text("1")
    (root / "inner").symlink_to("data/real")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file").symlink_to(tmp_path / "outside" / "secret")
    (root / "loop").symlink_to("loop")
    store = open_store(str(root))
    assert [entry.path for entry in store.list()] == ["data/real", "inner"]
    for call in (lambda: store.write("link/x", b""), lambda: store.read("link/secret"), lambda: store.read("file")):
        with pytest.raises(SpecError, match="symbolic link"):
            call()
    store.write("file", b"replaces the link")
    assert (tmp_path / "outside" / "secret").read_text() == "secret"
    assert list((tmp_path / "outside").iterdir()) == [tmp_path / "outside" / "secret"]


def test_one_of_many_processes_is_first(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom launcher.stores import open_store\n"
        "store = open_store(sys.argv[1])\nsys.stdin.readline()\n"
        "for n in range(50):\n"
        "    try:\n        store.write(f'owner-{n}', sys.argv[2].encode() * 9999, if_absent=True)\n"
        "    except FileExistsError:\n        continue\n"
        "    print(n)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "s")]
    writers = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in range(4)
    ]
    for writer in writers:
        writer.stdin.write("\n")  # type: ignore[union-attr]
        writer.stdin.flush()  # type: ignore[union-attr]
    won = [int(line) for writer in writers for line in writer.communicate()[0].split()]
    assert sorted(won) == list(range(50))
    contents = [path.read_text() for path in (tmp_path / "s").iterdir()]
    assert len(contents) == 50
    assert all(len(text) == 9999 and len(set(text)) == 1 for text in contents)


def test_part_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".metrics.jsonl.1-2.part").write_text("half")
    (tmp_path / ".hidden").write_text("1")
    assert [entry.path for entry in open_store(str(tmp_path)).list()] == [".hidden"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "s"))
    store.write("a", b"old")
    with pytest.raises(FileNotFoundError):
        store.write("a", tmp_path / "missing")
    assert store.read("a") == b"old"
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["a"]


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may do anything; then be somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folder_without_permission_says_so(tmp_path: Path, as_nobody: None) -> None:
    closed = "/root/cvlaunch-test" if Path("/root").exists() else "/proc/cvlaunch-test"
    with pytest.raises(AuthError, match="no permission"):
        open_store(closed).check_writable()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path))
    for call in (lambda: store.write("file/x", b""), lambda: open_store(str(tmp_path / "file")).check_writable()):
        with pytest.raises((SpecError, FileExistsError)):
            call()
    with pytest.raises(SpecError):
        store.read("")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(small_disk: Path, tmp_path: Path, moto_bucket: Bucket) -> None:
    folder, bucket = open_store(str(tmp_path / "s")), moto_bucket.store()
    for store in (folder, bucket):
        store.write("big", bytes(3 << 20))
        with pytest.raises(CapacityError, match=r"big needs 3.0 MiB"):
            store.download("big", small_disk / "big")
        assert list(small_disk.iterdir()) == []
    with pytest.raises(CapacityError):
        open_store(str(small_disk)).write("x", bytes(3 << 20))
    assert list(small_disk.iterdir()) == []


# -- URIs and options -------------------------------------------------------------------------------------------------


def test_uris(tmp_path: Path) -> None:
    odd = tmp_path / "a b#é%"
    assert stores.path_of(stores.file_uri(odd)) == odd
    assert stores.path_of(stores.join_uri(stores.file_uri(tmp_path), "a b#é%")) == odd
    assert open_store(stores.file_uri(odd)).local_path() == odd
    assert open_store(stores.file_uri(odd)).uri == stores.file_uri(odd)
    assert stores.join_uri("s3://b/runs/", "a b", "c/d") == "s3://b/runs/a b/c/d"
    assert stores.join_uri("/data", "x") == "/data/x"
    assert [stores.scheme(u) for u in ("s3://b", "/x", "~/x", "GS://b", "C:\\x")] == [
        "s3",
        "file",
        "file",
        "gs",
        "file",
    ]
    assert [stores.is_uri(u) for u in ("s3://b", "/x", "pvc://c/x", "a:b", "target:/x")] == [
        True,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(SpecError):
        stores.join_uri("s3://b", "../other")
    with pytest.raises(SpecError):
        stores.path_of("file://server/share")


BAD_URIS = {
    "s3a://b/x": "did you mean 's3'",
    "azure://b/x": "file://, gs://, memory://, s3://",
    "s3:///x": "has no bucket",
    "s3://b/../x": "'..'",
    "s3://b//x": "absolute",
    "s3://b c/x": "has no bucket",
}


@pytest.mark.parametrize("uri", BAD_URIS)
def test_bad_uris(uri: str) -> None:
    with pytest.raises(SpecError) as caught:
        open_store(uri)
    assert BAD_URIS[uri] in str(caught.value)


def test_options_travel_without_profile(tmp_path: Path) -> None:
    certificate, _ = make_certificate(tmp_path)
    options = StorageOptions("http://minio:9000", "gra", "work", str(certificate), anonymous=True)
    assert StorageOptions.from_mapping(options.to_mapping()) == dataclasses.replace(options, profile=None)
    assert options.portable().ca_bundle == certificate.read_text()
    assert StorageOptions().to_mapping() == {}
    with pytest.raises(SpecError, match="did you mean 'endpoint'"):
        StorageOptions.from_mapping({"endpont": "x"})
    with pytest.raises(SpecError, match="not a storage option"):
        StorageOptions.from_mapping({"secret_access_key": "x"})


def test_memory_is_one_place_for_the_process() -> None:
    open_store("memory://shared/a").write("x", b"1")
    assert open_store("memory://shared").read("a/x") == b"1"
    assert open_store("memory://other").head("a/x") is None


def test_a_folder_needs_no_library(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom launcher.stores import open_store\n"
        "store = open_store(sys.argv[1])\nstore.write('x', b'1')\nlist(store.list())\n"
        "heavy = {'obstore', 'boto3', 'botocore', 'google.auth', 'stamina', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "store")], check=True)


# -- S3 as it is ------------------------------------------------------------------------------------------------------


def test_one_of_many_threads_is_first_on_s3(moto_bucket: Bucket) -> None:
    store, won = moto_bucket.store(), []
    barrier = threading.Barrier(8)

    def claim(n: int) -> None:
        barrier.wait()
        try:
            store.write("owner", str(n).encode(), if_absent=True)
        except FileExistsError:
            return
        won.append(str(n).encode())

    threads = [threading.Thread(target=claim, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [store.read("owner")]


def test_folder_markers_are_no_files(moto_bucket: Bucket) -> None:
    client = moto_bucket.server.client()
    for key in ("runs/shapes-1/model/", "runs/shapes-1/model/a"):
        client.put_object(Bucket=moto_bucket.name, Key=key, Body=b"" if key.endswith("/") else b"1")
    assert [entry.path for entry in moto_bucket.store().list()] == ["model/a"]


@pytest.mark.parametrize("key", ["x/../../../etc/passwd", "x//y", "x/./y", "x\\..\\y"])
def test_hostile_keys_are_refused(moto_bucket: Bucket, key: str) -> None:
    moto_bucket.server.client().put_object(Bucket=moto_bucket.name, Key=f"runs/shapes-1/{key}", Body=b"1")
    with pytest.raises(IntegrityError, match="can't be brought to a folder"):
        list(moto_bucket.store().list())


def test_a_missing_bucket_is_named(moto_bucket: Bucket, rclone_bucket: Bucket) -> None:
    for bucket in (moto_bucket, rclone_bucket):
        store = open_store("s3://no-such-bucket/x", bucket.server.options)
        for call in (store.check_writable, lambda: store.read("a"), lambda: list(store.list())):  # noqa: B023
            with pytest.raises(SpecError, match=r"s3://no-such-bucket.*there is no such bucket"):
                call()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_an_auth_error(rclone_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "WRONGWRONGWRONGWRONG")
    store = rclone_bucket.store()
    calls = {
        "write": store.check_writable,
        "read": lambda: store.read("a"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete(["a"]),
    }
    for operation, call in calls.items():
        with pytest.raises(AuthError) as caught:
            call()
        assert rclone_bucket.uri in str(caught.value)
        assert f"can't {operation}" in str(caught.value)
        assert "WRONG" not in str(caught.value)
    with pytest.raises(AuthError, match="s3:GetObject"):  # a HEAD has no body that could say more
        store.head("a")


def test_private_ca(tmp_path: Path, clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rclone_server(tmp_path / "tls", certificate=make_certificate(tmp_path)) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        options = server.options
        for good in (options, options.portable()):
            store = open_store("s3://bucket/x", good)
            store.write("a", b"over TLS")
            assert store.read("a") == b"over TLS"
        with pytest.raises(SpecError, match="ca_bundle"):
            open_store("s3://bucket/x", dataclasses.replace(options, ca_bundle=None), patience_s=0.5).read("a")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(server.ca_bundle))
        assert open_store("s3://bucket/x", dataclasses.replace(options, ca_bundle=None)).read("a") == b"over TLS"
    with pytest.raises(SpecError, match="ca_bundle"):
        open_store("s3://bucket/x", StorageOptions(ca_bundle=str(tmp_path / "missing")))


def test_nobody_there(clean_aws: Path, monkeypatch: pytest.MonkeyPatch, moto_s3: S3Server) -> None:
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://b/x", StorageOptions("http://127.0.0.1:1"), patience_s=0.3)
    for call in (lambda: store.read("a"), store.check_writable, lambda: list(store.list())):
        with pytest.raises(UnreachableError, match=r"s3://b/x.*did not answer: try again"):
            call()


def test_the_option_beats_the_environment(moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    moto_bucket.store().check_writable()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_bucket.server.endpoint)
    open_store(moto_bucket.uri).check_writable()


class _Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with what its path says: /bucket/403, /bucket/503-SlowDown; /bucket/broken-3 ends three bodies early."""

    protocol_version = "HTTP/1.1"
    broken = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        word = self.path.split("?")[0].rsplit("/", 1)[-1]
        if word.startswith("broken"):
            self._body(broken=type(self).broken < int(word.split("-")[1]))
            return
        status, _, code = word.partition("-")
        body = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET  # noqa: N815

    def _body(self, *, broken: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Tue, 15 Nov 2022 12:45:26 GMT")
        self.end_headers()
        self.wfile.write(b"z" * (50 if broken else 100))
        if broken:
            type(self).broken += 1
            self.close_connection = True


@pytest.fixture
def scripted(clean_aws: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Scripted)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    _Scripted.broken = 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a" * 20)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b" * 40)
    yield open_store("s3://bucket/x", StorageOptions(f"http://127.0.0.1:{server.server_address[1]}"), patience_s=0)
    server.shutdown()
    thread.join()
    server.server_close()


ANSWERS = {
    "301": (SpecError, "set `region`"),
    "400-AuthorizationHeaderMalformed": (SpecError, "set `region`"),
    "400-ExpiredToken": (AuthError, "log in again"),
    "400-KeyTooLongError": (SpecError, "shorten"),
    "400-Whatever": (SpecError, "refused the request"),
    "401": (AuthError, "refused the credentials"),
    "403": (AuthError, "s3:GetObject"),
    "403-AccessDenied": (AuthError, "s3:GetObject"),
    "403-InvalidAccessKeyId": (AuthError, "check that they belong"),
    "403-QuotaExceeded": (CapacityError, "quota"),
    "403-RequestTimeTooSkewed": (AuthError, "clock"),
    "403-SignatureDoesNotMatch": (AuthError, "check that they belong"),
    "404": (FileNotFoundError, "no such object"),
    "404-NoSuchBucket": (SpecError, "no such bucket"),
    "404-NoSuchKey": (FileNotFoundError, "no such object"),
    "429": (UnreachableError, "try again"),
    "500-InternalError": (UnreachableError, "try again"),
    "501-NotImplemented": (UnsupportedError, "choose another"),
    "503-SlowDown": (UnreachableError, "try again"),
    "507": (CapacityError, "no room"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_answer_of_a_service_in_our_words(scripted: Store, answer: str) -> None:
    kind, words = ANSWERS[answer]
    with pytest.raises(kind) as caught:
        scripted.read(answer)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert "s3://bucket" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert caught.value.__cause__ is not None


def test_a_refused_write_names_the_permission(scripted: Store) -> None:
    with pytest.raises(AuthError, match=r"s3://bucket/x/403: can't write: .*s3:PutObject"):
        scripted.write("403", b"")


def test_a_broken_download_is_repeated(scripted: Store, tmp_path: Path) -> None:
    scripted.download("broken-2", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"z" * 100


def test_a_download_that_stays_broken_leaves_nothing(scripted: Store, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError):
        scripted.download("broken-9", tmp_path / "home" / "x")
    assert list((tmp_path / "home").iterdir()) == []


def _obstore_errors() -> dict[str, tuple[Exception, type[Exception]]]:
    from obstore import exceptions as theirs

    return {
        "AlreadyExistsError": (theirs.AlreadyExistsError("x"), FileExistsError),
        "BaseError": (theirs.BaseError("x"), UnreachableError),
        "GenericError": (theirs.GenericError("no creds: PUT http://169.254.169.254/latest 403"), AuthError),
        "InvalidPathError": (theirs.InvalidPathError("x"), IntegrityError),
        "JoinError": (theirs.JoinError("x"), UnreachableError),
        "NotModifiedError": (theirs.NotModifiedError("x"), UnreachableError),
        "NotSupportedError": (theirs.NotSupportedError("x"), UnsupportedError),
        "PermissionDeniedError": (theirs.PermissionDeniedError("lacked the necessary privileges"), AuthError),
        "PreconditionError": (theirs.PreconditionError("x"), FileExistsError),
        "UnauthenticatedError": (theirs.UnauthenticatedError("AWS credential provider: AuthError: log in"), AuthError),
        "UnknownConfigurationKeyError": (theirs.UnknownConfigurationKeyError("x"), SpecError),
    }


@pytest.mark.parametrize("name", sorted(_obstore_errors()))
def test_every_error_of_obstore_in_our_words(name: str) -> None:
    theirs, ours = _obstore_errors()[name]
    with pytest.raises(ours) as caught, object_errors("gs://bucket", Operation.WRITE, path="gs://bucket/x"):
        raise theirs
    assert type(caught.value) is ours
    assert "gs://bucket" in str(caught.value)
    assert caught.value.__cause__ is theirs


def test_no_error_of_obstore_is_forgotten() -> None:
    from obstore import exceptions as theirs

    names = {name for name in vars(theirs) if name.endswith("Error")}
    assert names - set(_obstore_errors()) <= {"NotFoundError"}  # obstore raises FileNotFoundError in its place
