"""Folders of a claim beyond a store's promises (test_stores.py): links, cut connections, full disks, the pod's life."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import AuthError, CapacityError, IntegrityError, SpecError, UnreachableError
from launcher.kube import serve
from launcher.kube.client import Access, Cluster
from launcher.kube.helper import HelperSpec
from launcher.kube.volume import FolderClient, VolumeStore, open_volume, split_uri
from launcher.kube.words import HELPER
from launcher.stores import open_store
from tests.distant_stores import *  # noqa: F403 what is promised of both kinds
from tests.services.kube import KubeCluster
from tests.volume_fixtures import FileServer, file_server, whole_machine  # noqa: F401


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "it's $HOME & é?%" / "runs"


@pytest.fixture
def store(whole_machine: FolderClient, root: Path) -> VolumeStore:  # noqa: F811
    return VolumeStore("claim", str(root).lstrip("/"), whole_machine)


def part_files(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part")) if folder.exists() else []


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# -- what is where ----------------------------------------------------------------------------------------------------

URIS = {
    "pvc://claim": ("claim", ""),
    "pvc://claim/": ("claim", ""),
    "pvc://claim/runs": ("claim", "runs"),
    "pvc://my.claim-1/a b/c/": ("my.claim-1", "a b/c"),
    "pvc://": None,
    "pvc:///runs": None,
    "pvc://Claim/runs": None,
    "pvc://claim/../x": None,
    "pvc://claim//x": None,
    "pvc://claim/a\nb": None,
    "s3://claim/x": None,
}


@pytest.mark.parametrize("uri", URIS)
def test_uris(uri: str) -> None:
    expected = URIS[uri]
    if expected:
        assert split_uri(uri) == expected
    else:
        with pytest.raises(SpecError, match="one looks like pvc://claim/runs"):
            split_uri(uri)


def test_uri_and_place(store: VolumeStore, root: Path) -> None:
    assert store.uri == f"pvc://claim{root}"
    assert VolumeStore("claim", "", store.client).uri == "pvc://claim"
    assert store.local_path() is None
    assert store.local_path("a") is None
    with pytest.raises(SpecError, match="is not a folder of a claim"):
        VolumeStore("claim", "../x", store.client)


def test_entries_are_those_of_the_folder_itself(store: VolumeStore, root: Path, tmp_path: Path) -> None:
    for path in ("output/a", ".hidden", "output/.b.part/c", "output.txt", "output-2/x"):
        store.write(path, b"12345")
    (root / "link").symlink_to("output/a")
    for number in range(100):
        (root / f"at-{number}").touch()
        os.utime(root / f"at-{number}", ns=(0, 1_600_000_000_000_000_001 + number * 12_345_678_901_234_567))
    folder = open_store(str(root))
    assert list(store.list()) == list(folder.list())
    assert list(store.list("output")) == list(folder.list("output"))
    assert store.head("output/a") == folder.head("output/a")
    assert store.download("output/a", tmp_path / "x") == folder.head("output/a")
    assert store.head("output") is None


def test_part_files_pipes_and_what_is_no_folder_are_not_listed(store: VolumeStore, root: Path) -> None:
    (root / "sub").mkdir(parents=True)
    (root / ".metrics.jsonl.1-2.part").write_text("half")
    (root / "file").write_text("1")
    os.mkfifo(root / "pipe")
    assert [entry.path for entry in store.list()] == ["file"]
    assert list(store.list("file")) == []
    assert list(store.list("no/such")) == []
    with pytest.raises(FileNotFoundError):
        store.read("pipe")


def test_thousands_of_files(store: VolumeStore, root: Path) -> None:
    for number in range(3000):
        path = root / f"{number % 7}/{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths = [entry.path for entry in store.list()]
    assert paths == sorted(str(path.relative_to(root)) for path in root.rglob("*.txt"))
    store.delete(paths)
    assert list(store.list()) == []


def test_what_is_empty_goes(store: VolumeStore, root: Path) -> None:
    """A removed run leaves no folders on the claim; what is beside it stays."""
    other = root.parent / "other"
    other.mkdir(parents=True)
    for path in ("output/logs/a.log", "model/b", "c"):
        store.write(path, b"x")
    store.delete(["output/logs/a.log", "model/b"])
    assert [path.name for path in root.iterdir()] == ["c"]
    store.delete(["c"])
    assert not root.exists() and other.is_dir()


def test_hostile_names_there_are_refused(store: VolumeStore, root: Path) -> None:
    root.mkdir(parents=True)
    for name in (b"a\nb", b"\xff"):
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        path.touch()
        with pytest.raises(IntegrityError, match="can't be brought to a folder"):
            list(store.list())
        path.unlink()


def test_links_lead_nowhere_else(store: VolumeStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (root / "data").mkdir(parents=True)
    (root / "data/real").write_text("1")
    (root / "inner").symlink_to("data/real")
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to("loop")
    assert [entry.path for entry in store.list()] == ["data/real", "inner"]
    assert store.read("inner") == b"1"
    calls: list[Callable[[], object]] = [
        lambda: store.read("file"),
        lambda: store.read_range("file", 3, 2),
        lambda: store.head("link/secret"),
        lambda: list(store.list("link")),
        lambda: store.download("file", tmp_path / "x"),
        lambda: store.write("link/x", b""),
        lambda: store.delete(["link/secret"]),
    ]
    for call in calls:
        with pytest.raises(SpecError, match="symbolic link"):
            call()
    store.write("file", b"replaces the link")
    assert [path.read_text() for path in outside.iterdir()] == ["secret"]
    assert store.read("file") == b"replaces the link"


def test_nothing_leads_out_of_the_claim(tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "way").symlink_to(tmp_path)
    (tmp_path / "claim-2").mkdir()
    (tmp_path / "claim-2" / "secret").write_text("secret")
    with file_server(tmp_path / "claim") as server, contextlib.closing(server.client()) as client:
        with pytest.raises(SpecError, match="symbolic link"):
            VolumeStore("claim", "way/claim-2", client).read("secret")
        for query in (
            "path=../claim-2/secret",
            "root=../claim-2&path=secret",
            "path=/etc/passwd",
            "path=way%00",
        ):
            with client.exchange("GET", f"/file?{query}", {}, (), fresh=False) as answer:
                assert answer.status == 400
                assert answer.read() == b""


def test_a_run_in_place_has_no_segments(tmp_path: Path) -> None:
    with file_server(tmp_path) as server, contextlib.closing(server.client()) as client:
        store = VolumeStore("claim", "run", client, in_place=True)
        assert list(store.list("segments")) == []
        with pytest.raises(FileNotFoundError):
            store.read("segments/metrics.jsonl/seg-000000000000")
        assert server.connections == 0


def unsent(connection: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


# -- connections ------------------------------------------------------------------------------------------------------


class Relay:
    """Passes bytes on to a server. limits: for each connection, after how many of them it is cut; later ones are whole.

    up: what the limits count: bytes to the server, or from it. at_limit: called before a connection is cut.
    """

    def __init__(
        self, server: FileServer, limits: list[int], *, up: bool = False, at_limit: Callable[[], object] = lambda: None
    ) -> None:
        self._server, self._limits, self._up, self._at_limit = server, limits, up, at_limit
        self.passed = 0

    def connect(self) -> socket.socket:
        limit = self._limits.pop(0) if self._limits else 1 << 60
        ours, theirs = socket.socketpair()
        there = self._server.connect()
        cut = threading.Event()
        ways = [(theirs, there, self._up), (there, theirs, not self._up)]
        threads = [threading.Thread(target=self._pass, args=(*way, limit, cut)) for way in ways]
        for thread in threads:
            thread.start()
        threading.Thread(target=self._close, args=(threads, theirs, there)).start()
        return ours

    def _pass(self, source: socket.socket, to: socket.socket, counted: bool, limit: int, cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(min(limit, 1 << 16)):
                to.sendall(data)
                if counted:
                    self.passed += len(data)
                    limit -= len(data)
                    if not limit:
                        self._at_limit()
                        break
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _close(self, threads: list[threading.Thread], *ends: socket.socket) -> None:
        for thread in threads:
            thread.join()
        for end in ends:
            end.close()

    def store(self) -> VolumeStore:
        return VolumeStore("claim", "run", FolderClient(self.connect, sleep=lambda seconds: None))


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    """The folder that is served as a claim."""
    (tmp_path / "claim").mkdir()
    return tmp_path / "claim"


@pytest.fixture
def server(claim: Path) -> Iterator[FileServer]:
    with file_server(claim) as server:
        yield server


CONTENT = os.urandom(3 << 20)


def test_one_connection_does(server: FileServer) -> None:
    with contextlib.closing(server.client()) as client:
        store = VolumeStore("claim", "run", client)
        for number in range(20):
            store.write(str(number), b"1")
            assert store.read(str(number)) == b"1"
            assert store.head(str(number)) is not None
            assert store.head(f"no-{number}") is None
        assert len(list(store.list())) == 20
    assert server.connections == 1


def test_a_download_goes_on_where_it_broke(server: FileServer, claim: Path, tmp_path: Path) -> None:
    (claim / "run").mkdir()
    (claim / "run/a").write_bytes(CONTENT)
    relay = Relay(server, [1 << 19] * 5)
    store = relay.store()
    store.download("a", tmp_path / "home/a")
    store.client.close()
    assert (tmp_path / "home/a").read_bytes() == CONTENT
    assert relay.passed < len(CONTENT) + 10_000


def test_a_file_that_is_replaced_while_it_comes(server: FileServer, claim: Path, tmp_path: Path) -> None:
    (claim / "run").mkdir()
    (claim / "run/a").write_bytes(bytes(len(CONTENT)))
    os.utime(claim / "run/a", (1_600_000_000, 1_600_000_000))  # clocks of file systems tick some hundred times a second
    store = Relay(server, [1 << 20], at_limit=lambda: (claim / "run/a").write_bytes(CONTENT)).store()
    entry = store.download("a", tmp_path / "home/a")
    store.client.close()
    assert (tmp_path / "home/a").read_bytes() == CONTENT
    assert entry == open_store(str(claim / "run")).head("a")


def test_a_download_of_what_is_gone_meanwhile_leaves_nothing(server: FileServer, claim: Path, tmp_path: Path) -> None:
    (claim / "run").mkdir()
    (claim / "run/a").write_bytes(CONTENT)
    store = Relay(server, [1 << 20], at_limit=(claim / "run/a").unlink).store()
    with contextlib.closing(store.client), pytest.raises(FileNotFoundError):
        store.download("a", tmp_path / "home/a")
    assert list((tmp_path / "home").iterdir()) == []


def test_everything_that_may_is_sent_again(server: FileServer, claim: Path, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(CONTENT)
    store = Relay(server, [1 << 20, 1 << 20], up=True).store()
    store.write("a", tmp_path / "local")
    store.client.close()
    assert (claim / "run/a").read_bytes() == CONTENT
    wait_for(lambda: not part_files(claim / "run"))  # of what was cut off
    calls: list[Callable[[], object]] = [
        lambda: store.read("a"),
        lambda: store.head("a"),
        lambda: list(store.list()),
        lambda: store.delete(["a"]),
    ]
    for call in calls:
        store = Relay(server, [10, 40], up=False).store()
        call()
        store.client.close()
    assert not (claim / "run").exists()


def test_a_connection_that_always_breaks(server: FileServer) -> None:
    store = Relay(server, [10] * 50).store()
    with pytest.raises(UnreachableError, match=r"pvc://claim/run: the connection breaks again and again \("):
        store.write("a", b"1")


def test_nobody_there(server: FileServer) -> None:
    server.process.terminate()
    server.process.wait()
    with pytest.raises(UnreachableError, match=r"again and again .*refused"):
        VolumeStore("claim", "run", server.client()).read("a")


def test_who_may_not_be_second_is_not_sent_again(server: FileServer, claim: Path) -> None:
    relay = Relay(server, [1 << 20], up=True)
    store = relay.store()
    with contextlib.closing(store.client), pytest.raises(UnreachableError, match=r"run/owner: .*there or not: look"):
        store.write("owner", CONTENT, if_absent=True)
    wait_for(lambda: (claim / "run").exists() and list((claim / "run").iterdir()) == [])


def test_who_may_not_be_second_takes_no_stale_connection(server: FileServer, claim: Path) -> None:
    store = Relay(server, [600]).store()
    with contextlib.closing(store.client):
        for number in range(3):
            store.write(f"{number}", b"1")
        store.client._idle[0].sock.shutdown(socket.SHUT_RDWR)
        store.write("owner", b"1", if_absent=True)
    assert (claim / "run/owner").read_bytes() == b"1"


# -- what goes wrong there --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.needs("root")
def test_a_full_disk_on_either_side(small_disk: Path, store: VolumeStore, tmp_path: Path) -> None:
    there = VolumeStore("claim", str(small_disk / "runs").lstrip("/"), store.client)
    (tmp_path / "source").write_bytes(bytes(64 << 20))
    for if_absent in (False, True):
        with pytest.raises(CapacityError, match=r"/runs/big: the disk is full: make room"):
            there.write("big", tmp_path / "source", if_absent=if_absent)
    wait_for(lambda: not part_files(small_disk / "runs"))
    assert list((small_disk / "runs").iterdir()) == []
    store.write("big", bytes(3 << 20))
    with pytest.raises(CapacityError, match="the disk is full"):
        store.download("big", small_disk / "home/big")


@pytest.mark.needs("root")
def test_a_folder_of_somebody_else(claim: Path, tmp_path: Path) -> None:
    for folder in (claim, *claim.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    (claim / "private").mkdir(mode=0o700)
    (claim / "private/a").write_text("1")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with file_server(claim, *nobody) as server, contextlib.closing(server.client()) as client:
        store = VolumeStore("claim", "private", client)
        calls: list[Callable[[], object]] = [
            store.check_writable,
            lambda: store.read("a"),
            lambda: store.head("a"),
            lambda: list(store.list()),
            lambda: store.download("a", tmp_path / "x"),
            lambda: store.delete(["a"]),
        ]
        for call in calls:
            with pytest.raises(AuthError, match=r"pvc://claim/private.*: no permission on this folder: ask its owner"):
                call()


@pytest.mark.needs("root")
def test_a_read_only_file_system(small_disk: Path, store: VolumeStore) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(AuthError, match="this file system is read-only: choose another folder"):
        VolumeStore("claim", str(small_disk / "runs").lstrip("/"), store.client).check_writable()


def test_files_and_folders_in_the_way(store: VolumeStore, root: Path, tmp_path: Path) -> None:
    store.write("file", b"")
    store.write("folder/x", b"")
    calls: list[Callable[[], object]] = [
        lambda: store.write("file/x", b""),
        lambda: store.write("file/x", b"", if_absent=True),
        lambda: store.write("folder", b""),
        lambda: store.read("folder"),
        lambda: store.read("file/x"),
        lambda: store.delete(["folder"]),
        lambda: store.download("folder", tmp_path / "x"),
        lambda: store.write("n" * 300, b""),
    ]
    for call in calls:
        with pytest.raises(SpecError, match=r"choose another path"):
            call()
    with pytest.raises(FileExistsError):
        store.write("folder", b"", if_absent=True)
    assert [entry.path for entry in store.list()] == ["file", "folder/x"]
    assert part_files(root) == []


def test_a_file_that_shrinks_is_no_upload(server: FileServer, claim: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT * 10)
    with contextlib.closing(server.connect()) as held:
        connections = [held]
        store = VolumeStore("claim", "run", FolderClient(connections.pop))
        server.process.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(store.write, "a", source)
            wait_for(lambda: unsent(held))  # buffers are full
            os.truncate(source, 1 << 10)
            server.process.send_signal(signal.SIGCONT)
            with pytest.raises(IntegrityError, match=r"'a' in pvc://claim/run was cut short while"):
                call.result(60)
    wait_for(lambda: (claim / "run").exists() and list((claim / "run").iterdir()) == [])


# -- its end ----------------------------------------------------------------------------------------------------------


def test_it_ends_by_itself_when_nobody_asks(claim: Path) -> None:
    with file_server(claim, idle_s=2) as server, contextlib.closing(server.client()) as client:
        store = VolumeStore("claim", "", client)
        begun = time.monotonic()
        while time.monotonic() < begun + 3:
            store.write("a", b"1")
            time.sleep(0.05)
        assert server.process.poll() is None
        assert server.process.wait(60) == 0


def test_it_is_not_idle_while_bytes_come(claim: Path) -> None:
    with file_server(claim, idle_s=2) as server, contextlib.closing(server.connect()) as connection:
        connection.sendall(b"PUT /file?path=a HTTP/1.1\r\nContent-Length: 8\r\n\r\n")
        for _ in range(8):
            time.sleep(0.3)
            connection.sendall(b"x")
        assert connection.recv(1000).startswith(b"HTTP/1.1 201 ")


def test_it_goes_at_once_when_told_to(server: FileServer) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0  # else it would be ten minutes


def test_any_python_3_can_run_it() -> None:
    text = Path(serve.__file__).read_text()
    ast.parse(text, feature_version=(3, 8))
    assert "$(" not in text  # which Kubernetes would fill in


# -- the pod ----------------------------------------------------------------------------------------------------------

in_pods = pytest.mark.needs("podman")
PULLED = "registry.example.com/trainer:1"
"""What the tests' pods are told to pull."""


@dataclass(frozen=True)
class Claimed:
    """A namespace with a claim `data`."""

    kube: KubeCluster
    namespace: str

    def claim(self, name: str, *modes: str, **spec: str) -> None:
        request = {"resources": {"requests": {"storage": "1Gi"}}, "accessModes": list(modes) or ["ReadWriteMany"]}
        body = {"metadata": {"name": name}, "spec": {**request, **spec}}
        self.kube.create("PersistentVolumeClaim", self.namespace, body)

    def pod(self, name: str, claim: str, **spec: object) -> str:
        """One of a claim that is on a node, whose name is returned, and starts one day."""
        volume = {"name": "data", "persistentVolumeClaim": {"claimName": claim}}
        own = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        common = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        container = {"name": "train", "image": "registry.example.com/later:1", "securityContext": own}
        pod = {"containers": [container], "volumes": [volume], "securityContext": common, **spec}
        body = {"metadata": {"name": name}, "spec": pod}
        self.kube.create("Pod", self.namespace, body)
        bound = self.kube.wait_for("Pod", self.namespace, name, lambda found: found["spec"].get("nodeName"))
        return str(bound["spec"]["nodeName"])

    def pods(self) -> list[dict[str, Any]]:
        return [pod for pod in self.kube.pods(self.namespace) if HELPER in pod["metadata"].get("labels", {})]

    @property
    def asked_for(self) -> int:
        """Jobs, whether they were made or not."""
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        return sum((request.method, request.path) == ("POST", path) for request in self.kube.requests)

    @contextlib.contextmanager
    def store(
        self, claim: str = "data", path: str = "runs", *, wait_s: float = 180.0, **options: Any
    ) -> Iterator[VolumeStore]:
        known: dict[str, Any] = {"image": lambda: PULLED, "run_as_user": 12345, "fs_group": 12345, **options}
        cluster = Cluster(Access(namespace=self.namespace))
        store = open_volume(cluster, HelperSpec(claim, **known), path, wait_s=wait_s)
        with contextlib.closing(cluster), contextlib.closing(store.client):
            yield store


@pytest.fixture
def claimed(kube: KubeCluster) -> Claimed:
    claimed = Claimed(kube, kube.namespace(pod_security="restricted"))
    claimed.claim("data")
    return claimed


@pytest.fixture
def with_image(claimed: Claimed, trainer_image: str) -> Claimed:
    claimed.kube.serve_image(PULLED, image=trainer_image)
    return claimed


@in_pods
def test_a_pod_that_every_cluster_takes(with_image: Claimed, tmp_path: Path) -> None:
    with with_image.store(pull_secrets=["pull"], tolerations=[{"key": "spot", "operator": "Exists"}]) as store:
        store.write("a/b", CONTENT)
        store.download("a/b", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == CONTENT
        folder = with_image.kube.volume_folder(with_image.namespace, "data")
        assert list(store.list()) == list(open_store(str(folder / "runs")).list())
        (pod,) = with_image.pods()
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]
        assert {"key": "spot", "operator": "Exists"} in pod["spec"]["tolerations"]
        assert (folder / "runs/a/b").stat().st_uid == 12345


@in_pods
def test_a_pod_that_openshift_takes(kube: KubeCluster, trainer_image: str) -> None:
    kube.serve_image(PULLED, image=trainer_image)
    claimed = Claimed(kube, kube.namespace(openshift=True, pod_security="restricted"))
    claimed.claim("data")
    with claimed.store(run_as_user=None, fs_group=None) as store:
        store.check_writable()
    body = kube.posted("Job", claimed.namespace, kube.objects("jobs", claimed.namespace)[0]["metadata"]["name"])
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & body["spec"]["template"]["spec"]["securityContext"].keys()


@in_pods
@pytest.mark.parametrize("openshift", [True, False])
def test_a_start_leaves_the_files_of_a_claim_alone(kube: KubeCluster, trainer_image: str, openshift: bool) -> None:
    """Whose root is the group's already: with millions of files a change of each takes hours."""
    kube.serve_image(PULLED, image=trainer_image)
    claimed = Claimed(kube, kube.namespace(openshift=openshift, pod_security="restricted"))
    claimed.claim("data")
    folder, group = kube.volume_folder(claimed.namespace, "data"), 1000650000 if openshift else 12345
    (folder / "old").write_bytes(b"1")
    os.chown(folder, 0, group)
    folder.chmod(0o2775)
    keys = {"run_as_user": None, "fs_group": None} if openshift else {}
    with claimed.store(path="", **keys) as store:
        assert store.read("old") == b"1"
    assert (folder / "old").stat().st_gid == 0


SECOND = """
import sys
from launcher.kube.client import Access, Cluster
from launcher.kube.helper import HelperSpec
from launcher.kube.volume import open_volume
spec = HelperSpec("data", image=lambda: sys.argv[2], run_as_user=12345, fs_group=12345)
store = open_volume(Cluster(Access(namespace=sys.argv[1])), spec, "")
store.write("second", b"2")
print(store.read("first") if store.head("first") else "")
store.client.close()
"""


@in_pods
def test_two_processes_share_a_pod(with_image: Claimed) -> None:
    command = [sys.executable, "-c", SECOND, with_image.namespace, PULLED]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as second, with_image.store(path="") as store:
        store.write("first", b"1")
        assert second.wait(180) == 0
        assert store.read("second") == b"2"
    assert len(with_image.pods()) == 1
    asked = []
    with with_image.store(image=lambda: asked.append(1) or PULLED) as store:  # type: ignore[func-returns-value]
        assert store.head("first") is None
    assert asked == []


@in_pods
def test_a_pod_that_ended_by_itself_is_made_again(with_image: Claimed) -> None:
    with with_image.store(idle_s=2) as store:
        store.write("a", b"1")
        with_image.kube.wait(lambda: any(pod["status"]["phase"] == "Succeeded" for pod in with_image.pods()))
        assert store.read("a") == b"1"
    assert with_image.asked_for > 1


@in_pods
def test_a_pod_that_is_killed_in_the_middle_is_made_again(with_image: Claimed) -> None:
    with with_image.store() as store:
        store.write("a", b"1")
        (pod,) = with_image.pods()
        with_image.kube.kill_container(with_image.namespace, pod["metadata"]["name"])
        with_image.kube.wait(lambda: with_image.pods()[0]["status"]["phase"] == "Failed")
        store.write("a", b"2")
        assert store.read("a") == b"2"
    assert with_image.asked_for == 2


@in_pods
def test_it_goes_where_the_claim_is_in_use(with_image: Claimed) -> None:
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    with_image.kube.add_node("far", taints=[taint])
    with_image.claim("alone", "ReadWriteOnce")
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    where = {"nodeSelector": {"kubernetes.io/hostname": "far"}, "tolerations": tolerations}
    assert with_image.pod("train", "alone", **where) == "far"
    with with_image.store("alone") as store:
        store.write("a", b"1")
    (pod,) = with_image.pods()
    assert pod["spec"]["nodeName"] == "far"
    assert pod["spec"]["containers"][0]["command"][-1] == "30.0"


@in_pods
def test_an_image_without_python(claimed: Claimed, base_image: str) -> None:
    image, words = "registry.example.com/debian:1", r"did not start: .*python3.*: take an image with Python 3.8"
    claimed.kube.serve_image(image, image=base_image)
    with claimed.store(image=lambda: image) as store, pytest.raises(SpecError, match=words):
        store.read("a")
    assert claimed.asked_for == 1


def test_a_claim_that_only_one_pod_may_use(claimed: Claimed) -> None:
    claimed.claim("one", "ReadWriteOncePod")
    claimed.pod("train", "one")
    with (
        claimed.store("one") as store,
        pytest.raises(CapacityError, match="ReadWriteOncePod and pod train uses it: wait"),
    ):
        store.read("a")
    assert claimed.asked_for == 0


def test_a_claim_that_is_not_there(claimed: Claimed) -> None:
    words = r"there is no claim 'dta'; did you mean 'data'\?; there are data"
    with claimed.store("dta") as store, pytest.raises(SpecError, match=words):
        store.write("a", b"1")
    assert claimed.asked_for == 0


def test_what_keeps_it_from_starting(kube: KubeCluster, claimed: Claimed) -> None:
    full = Claimed(kube, kube.namespace(quota={"requests.cpu": "0"}))
    full.claim("data")
    denied = Claimed(kube, kube.namespace(pod_security="restricted"))
    denied.claim("data")
    claimed.claim("unbound", storageClassName="manual")
    claimed.claim("no-class", storageClassName="nothing")
    cases: list[tuple[Claimed, str, float, type[Exception], str]] = [
        (full, "data", 180, CapacityError, "did not start: .*exceeded quota.*: wait, or ask for more quota"),
        (claimed, "data", 5, SpecError, r"within 5s: its image can't be pulled: .*correct the image"),
        (claimed, "unbound", 3, CapacityError, "unbound .*waiting for a volume to be created.*: choose another claim"),
        (claimed, "no-class", 3, CapacityError, 'storageclass.storage.k8s.io "nothing" not found'),
    ]
    for place, claim, wait_s, kind, words in cases:
        with (
            place.store(claim, image=lambda: "registry.example.com/none:1", wait_s=wait_s) as store,
            pytest.raises(kind, match=words) as caught,
        ):
            store.read("a")
        assert type(caught.value) is kind
        assert f"claim {claim}" in str(caught.value)
        assert kube.objects("jobs", place.namespace) == []
    kube.deny("no images from there")
    with denied.store() as store, pytest.raises(SpecError, match=r"no images from there.*administrators"):
        store.read("a")


def test_what_the_user_may_not(claimed: Claimed) -> None:
    for verb, resource in (("create", "jobs"), ("get", "persistentvolumeclaims"), ("list", "pods")):
        claimed.kube.forbid(verb, resource)
        with claimed.store(wait_s=1) as store, pytest.raises(AuthError, match=resource):
            store.read("a")
        claimed.kube.allow()


SIDECAR = ["bash", "-c", "trap 'exit 0' TERM; sleep infinity & wait"]


@pytest.fixture
def meshed(with_image: Claimed, base_image: str) -> Claimed:
    """A sidecar comes before each pod's own container, and its name before the container's."""
    with_image.kube.serve_image("registry.example.com/proxy:1", image=base_image)
    with_image.kube.inject("istio-proxy", image="registry.example.com/proxy:1", args=SIDECAR)
    return with_image


@in_pods
def test_a_sidecar_is_not_taken_for_the_pod(meshed: Claimed) -> None:
    """It serves while the sidecar is the first that runs, and is made again when its container has ended."""
    with meshed.store(idle_s=2) as store:
        store.write("a", b"1")
        (pod,) = meshed.pods()
        assert [one["name"] for one in pod["spec"]["containers"]] == ["istio-proxy", "volume"]
        meshed.kube.wait(lambda: "terminated" in meshed.pods()[0]["status"]["containerStatuses"][1]["state"])
        assert meshed.pods()[0]["status"]["phase"] == "Running"
        assert store.read("a") == b"1"
    assert meshed.asked_for == 2


@in_pods
def test_a_pod_with_a_sidecar_that_can_t_serve_says_why(meshed: Claimed, base_image: str) -> None:
    meshed.kube.serve_image("registry.example.com/debian:1", image=base_image)
    words = r"did not start: .*python3.*: take an image with Python 3.8"
    image = {"image": lambda: "registry.example.com/debian:1"}
    with meshed.store(**image) as store, pytest.raises(SpecError, match=words):
        store.read("a")
    assert meshed.asked_for == 1


@in_pods
def test_it_is_made_as_the_target_s_pods_are(meshed: Claimed) -> None:
    """A label keeps the sidecar out, as it does for runs."""
    account = {"metadata": {"name": "trainer"}}
    meshed.kube.create("ServiceAccount", meshed.namespace, account)
    target = {
        "labels": {"sidecar.istio.io/inject": "false", "team": "vision"},
        "annotations": {"linkerd.io/inject": "disabled"},
        "node_selector": {"kubernetes.io/hostname": "plain"},
        "service_account": "trainer",
        "priority_class": "high",
    }
    with meshed.store(**target) as store:
        store.check_writable()
    (pod,) = meshed.pods()
    assert [one["name"] for one in pod["spec"]["containers"]] == ["volume"]
    assert pod["metadata"]["labels"]["team"] == "vision"
    assert pod["metadata"]["annotations"]["linkerd.io/inject"] == "disabled"
    spec = pod["spec"]
    assert (spec["nodeName"], spec["serviceAccountName"], spec["priorityClassName"]) == ("plain", "trainer", "high")
    assert spec["automountServiceAccountToken"] is False


# -- Kueue ------------------------------------------------------------------------------------------------------------


def local_queue(place: Claimed, name: str) -> None:
    place.kube.create("LocalQueue", place.namespace, {"metadata": {"name": name}, "spec": {"clusterQueue": "all"}})


def test_a_queue_that_does_not_let_it_in(claimed: Claimed) -> None:
    """Kueue gives Jobs without a queue to the LocalQueue `default`; that is said long before the pod is given up."""
    local_queue(claimed, "default")
    words = (
        r"did not start: within 15s: it waits in queue default: couldn't assign flavors .* insufficient unused quota "
        r".*: wait, or ask for a queue with room for 100m of CPU and 128Mi$"
    )
    begun = time.monotonic()
    with claimed.store() as store, pytest.raises(CapacityError, match=words):
        store.read("a")
    assert time.monotonic() - begun < 90
    assert claimed.kube.objects("jobs", claimed.namespace) == []


def test_a_kueue_that_takes_all_jobs(claimed: Claimed) -> None:
    claimed.kube.manage_all_jobs()
    words = r"Kueue holds it back, as it is in no queue: name a LocalQueue in the target's `queue`"
    with claimed.store(wait_s=3) as store, pytest.raises(CapacityError, match=words):
        store.read("a")


@in_pods
def test_it_waits_in_no_queue_where_kueue_lets_it(with_image: Claimed) -> None:
    """Behind runs that wait for GPUs it would wait for hours."""
    local_queue(with_image, "vision")
    with with_image.store(queue="vision") as store:
        store.check_writable()


@in_pods
def test_a_kueue_that_takes_all_jobs_gets_the_target_s_queue(with_image: Claimed) -> None:
    local_queue(with_image, "vision")
    with_image.kube.manage_all_jobs()
    with ThreadPoolExecutor() as pool, with_image.store(queue="vision") as store:
        written = pool.submit(store.check_writable)
        (job,) = with_image.kube.wait(lambda: with_image.kube.objects("jobs", with_image.namespace))
        with_image.kube.wait_for("job", with_image.namespace, job["metadata"]["name"], in_vision)
        with_image.kube.admit(with_image.namespace, job["metadata"]["name"])
        written.result(180)


def in_vision(job: dict[str, Any]) -> bool:
    return bool(job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") == "vision")
