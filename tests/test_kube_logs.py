"""Logs of a run: each line once, in its node's order, from pods and store, wherever one stopped, whatever breaks."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

from launcher.backends.base import LogLine
from launcher.errors import SpecError, UnreachableError
from launcher.kube.client import Access, Cluster
from launcher.kube.logs import run_logs
from launcher.stores import Store
from tests.log_lines import (
    NOON,
    ONE,
    RUN,
    TWO,
    Folder,
    Read,
    Story,
    check_resuming,
    folder_in,
    hello,
    parsed,
    random_attempts,
    stamp,
    tagged,
    texts,
)
from tests.services.kube import KubeCluster


@dataclass
class Pod:
    """lines: (kubelet's seconds after noon, text). cut: how many of its lines a stream gives before it breaks."""

    name: str = "p1"
    lines: list[tuple[float, str]] = field(default_factory=list)
    node: int = 0
    created: float = 0
    state: str = "terminated"
    earlier: list[tuple[float, str]] | None = None
    command: bool = True
    cuts: list[int] = field(default_factory=list)
    broken: bool = False
    refusal: str = ""

    def say(self, *texts: str, at: float | None = None) -> Pod:
        """at: kubelet's time; a millisecond after the runner's stamp otherwise."""
        for text in texts:
            own = datetime.fromisoformat(text[:24]).timestamp() - NOON if text[:2] == "20" else 0.0
            self.lines.append((own + 0.001 if at is None else at, text))
        return self

    @property
    def json(self) -> dict[str, Any]:
        restarts = 0 if self.earlier is None else 1
        container = {"name": "train", "state": {self.state: {}}, "restartCount": restarts}
        return {
            "metadata": {
                "name": self.name,
                "uid": f"uid-{self.name}",
                "creationTimestamp": stamp(NOON + self.created)[:19] + "Z",
                "labels": {"cvlaunch/run-id": RUN},
                "annotations": {"batch.kubernetes.io/job-completion-index": str(self.node)},
            },
            "spec": {"containers": [{"name": "train", **({"command": ["cvlaunch-run"]} if self.command else {})}]},
            "status": {"containerStatuses": [container], "phase": "Running"},
        }


class Api:
    """Lists pods and gives their logs, as the API server and kubelet do."""

    def __init__(self) -> None:
        self.pods: list[Pod] = []
        self.asked: list[dict[str, str]] = []
        self.over = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                api._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=lambda: self.http.serve_forever(poll_interval=0.02))

    def _answer(self, to: BaseHTTPRequestHandler) -> None:
        url = urlsplit(to.path)
        if not url.path.endswith("/log"):
            assert dict(parse_qsl(url.query))["labelSelector"] == f"cvlaunch/run-id={RUN}"
            return _whole(to, 200, json.dumps({"items": [pod.json for pod in self.pods]}).encode())
        name, query = url.path.split("/")[-2], dict(parse_qsl(url.query))
        self.asked.append({"pod": name, **query})
        pod = next((pod for pod in self.pods if pod.name == name), None)
        if pod is None:
            return _refusal(to, 404, f'pods "{name}" not found')
        if pod.refusal:
            return _refusal(to, 400, pod.refusal)
        if pod.broken:
            return _refusal(to, 500, "dial tcp 10.0.0.3:10250: connect: no route to host")
        assert query["timestamps"] == "true"
        assert query["container"] == "train"
        return self._log(to, pod, query)

    def _log(self, to: BaseHTTPRequestHandler, pod: Pod, query: Mapping[str, str]) -> None:
        lines = (pod.earlier or []) if query.get("previous") else pod.lines
        follow = query.get("follow") == "true"
        cut = pod.cuts.pop(0) if pod.cuts else None
        since = datetime.fromisoformat(query["sinceTime"]).timestamp() if "sinceTime" in query else 0.0
        to.send_response(200)
        to.send_header("Transfer-Encoding", "chunked")
        to.end_headers()
        sent, at = 0, 0
        while True:
            for seconds, text in lines[at:]:
                if NOON + seconds >= since:
                    if sent == cut:  # in the middle of a line
                        _chunk(to, stamp(NOON + seconds, 9).encode())
                        to.close_connection = True
                        return
                    _chunk(to, f"{stamp(NOON + seconds, 9)} {text}\n".encode())
                    sent += 1
                at += 1
            if cut is not None:
                to.close_connection = True
                return
            if not follow or pod.state != "running" or self.over.wait(0.01):
                break
        _chunk(to, b"")


def _chunk(to: BaseHTTPRequestHandler, data: bytes) -> None:
    try:
        to.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
    except OSError:
        to.close_connection = True


def _whole(to: BaseHTTPRequestHandler, status: int, data: bytes) -> None:
    to.send_response(status)
    to.send_header("Content-Length", str(len(data)))
    to.end_headers()
    to.wfile.write(data)


def _refusal(to: BaseHTTPRequestHandler, status: int, message: str) -> None:
    _whole(to, status, json.dumps({"kind": "Status", "code": status, "message": message}).encode())


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    api.thread.start()
    try:
        yield api
    finally:
        api.over.set()
        api.http.shutdown()
        api.thread.join()
        api.http.server_close()


@pytest.fixture
def cluster(api: Api, tmp_path: Path) -> Iterator[Cluster]:
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "k",
                "contexts": [{"name": "k", "context": {"cluster": "c"}}],
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{api.http.server_port}"}}],
            }
        )
    )
    cluster = Cluster(Access(kubeconfig=str(path)), sleep=lambda _: None)
    yield cluster
    cluster.close()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return folder_in(tmp_path)


@pytest.fixture
def read(cluster: Cluster, folder: Folder) -> Read:
    def read(since: str = "", **how: Any) -> list[LogLine]:
        return list(run_logs(cluster, RUN, folder, since=since, **how))

    return read


def test_one_pod(api: Api, read: Read, folder: Folder) -> None:
    api.pods = [Pod().say(*ONE)]
    lines = check_resuming(read)
    assert texts(lines) == [f"{RUN}, attempt 1", *(f"line {number}" for number in range(8)), "bye"]
    assert [(line.rank, line.node, line.attempt, line.time) for line in lines[:2]] == [
        ("-", 0, 1, NOON),
        ("0", 0, 1, NOON + 1),
    ]
    assert folder.asked == 0


def test_the_same_cursor_in_pods_and_store(api: Api, read: Read, folder: Folder) -> None:
    folder.put(*ONE)
    folder.put(*TWO, attempt=2)
    api.pods = [Pod("p1").say(*ONE), Pod("p2", created=100).say(*TWO)]
    from_pods = check_resuming(read)
    assert folder.asked == 0
    api.pods = []
    assert check_resuming(read) == from_pods
    half = from_pods[5].cursor
    assert read(since=half) == from_pods[6:]
    api.pods = [Pod("p2", created=100).say(*TWO)]
    assert check_resuming(read) == from_pods


def test_resuming_asks_for_a_window_alone(api: Api, read: Read) -> None:
    api.pods = [Pod().say(hello(1, 0), *(tagged(f"line {number}", number) for number in range(1, 100)))]
    cursor = read()[-10].cursor
    api.asked.clear()
    assert len(read(since=cursor)) == 9
    head, window = api.asked
    assert "sinceTime" not in head
    assert datetime.fromisoformat(window["sinceTime"]).timestamp() == NOON + 85


def test_a_log_whose_beginning_was_rotated_away(api: Api, read: Read, folder: Folder) -> None:
    """Kubelet keeps 10 MiB; the store has the beginning, and not yet the end."""
    for earlier in ((), ONE):
        attempt = 2 if earlier else 1
        lines = TWO if earlier else ONE
        if earlier:
            folder.put(*ONE)
        folder.put(*lines[:3], attempt=attempt)
        api.pods = [Pod().say(*lines[1:])]
        found = check_resuming(read)
        assert texts(found) == texts(parsed([*earlier, *lines]))
        assert {line.attempt for line in found} == {1, attempt}
    folder.put(TWO[0], attempt=2)
    assert texts(check_resuming(read)) == texts(parsed([*ONE, *TWO]))


def test_a_pod_that_was_replaced_and_is_gone(api: Api, read: Read, folder: Folder) -> None:
    folder.put(*ONE)
    api.pods = [Pod("p2").say(*TWO)]
    lines = check_resuming(read)
    assert texts(lines) == texts(parsed([*ONE, *TWO]))
    assert [line.attempt for line in lines] == [1] * len(ONE) + [2] * len(TWO)


def test_clocks_that_differ_lose_nothing(api: Api, read: Read, folder: Folder) -> None:
    """The second node's clock is behind: what it says counts by attempt."""
    folder.put(*(tagged(text, 200 + number) for number, text in enumerate("abc")))
    api.pods = [Pod("p2").say(*TWO)]
    assert texts(check_resuming(read)) == ["a", "b", "c", *texts(parsed(TWO))]


def test_a_container_that_was_started_again(api: Api, read: Read, folder: Folder) -> None:
    pod = Pod("p").say(*TWO)
    pod.earlier = Pod().say(*ONE).lines
    api.pods = [pod]
    assert texts(check_resuming(read)) == texts(parsed([*ONE, *TWO]))
    assert folder.asked == 0


def test_stamps_out_of_order(api: Api, read: Read, folder: Folder) -> None:
    """Two threads of the runner, one millisecond."""
    lines = [hello(1, 0), tagged("a", 1.001), tagged("b", 1.0), tagged("c", 1.001), tagged("d", 1.0), tagged("e", 2)]
    folder.put(*lines)
    api.pods = [Pod().say(lines[0]).say(*lines[1:], at=2.5)]
    from_pods = check_resuming(read)
    assert texts(from_pods)[1:] == list("abcde")
    api.pods = []
    assert check_resuming(read) == from_pods


def test_nodes(api: Api, read: Read, folder: Folder) -> None:
    for node in (0, 1, 2):
        lines = [hello(1, 0, f", node {node} of 3"), *(tagged(f"n{node} {i}", 1 + i, str(node)) for i in range(3))]
        folder.put(*lines, node=node)
        if node != 2:  # its pod is gone
            api.pods.append(Pod(f"p{node}", node=node).say(*lines))
    lines = read()
    assert [line.node for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    assert [line.text for line in lines if line.rank != "-"] == [f"n{n} {i}" for n in range(3) for i in range(3)]
    for number, line in enumerate(lines, 1):
        assert read(since=line.cursor) == lines[number:]
    api.pods = []
    assert read() == lines


@pytest.mark.parametrize("command", [True, False], ids=["runner did not start", "runner: none"])
def test_what_no_runner_tagged_has_kubelet_s_time(api: Api, read: Read, command: bool) -> None:
    pod = Pod(command=command)
    for number in range(6):
        pod.say(f"line {number}", at=number // 2)
    api.pods = [pod]
    lines = check_resuming(read)
    assert [(line.text, line.time) for line in lines] == [(f"line {n}", NOON + n // 2) for n in range(6)]
    assert {line.rank for line in lines} == {"0"}, "not the runner's"


def test_a_banner_before_the_runner(api: Api, read: Read) -> None:
    api.pods = [Pod().say("== PyTorch ==", "NVIDIA", at=-1).say(*ONE)]
    assert texts(check_resuming(read))[:3] == ["== PyTorch ==", "NVIDIA", f"{RUN}, attempt 1"]


@pytest.mark.parametrize(
    "refusal",
    [
        'container "train" in pod "p1" is waiting to start: ContainerCreating',
        'previous terminated container "train" in pod "p1" not found',
    ],
)
def test_a_container_without_a_log(api: Api, read: Read, folder: Folder, refusal: str) -> None:
    folder.put(*ONE)
    api.pods = [Pod(refusal=refusal)]
    assert texts(read()) == texts(parsed(ONE))


def test_a_log_that_we_may_not_see(api: Api, read: Read) -> None:
    api.pods = [Pod(refusal="container train is not valid for pod p1")]
    with pytest.raises(SpecError, match="not valid"):
        read()


def test_a_node_that_is_away_and_a_log_that_is_lost(api: Api, read: Read, folder: Folder) -> None:
    folder.put(*ONE)
    folder.put(*TWO, attempt=2)
    lost = Pod("p1")
    lost.lines = []
    for first in (Pod("p1", broken=True), lost):
        api.pods = [first, Pod("p2", created=100).say(*TWO)]
        assert texts(read()) == texts(parsed([*ONE, *TWO]))
    api.pods = [Pod("p1").say(*ONE), Pod("p2", created=100, broken=True)]
    assert texts(check_resuming(read)) == texts(parsed([*ONE, *TWO]))


def test_a_store_that_is_away(api: Api, cluster: Cluster) -> None:
    """Asked for what is there alone, and never passed over in silence."""

    def away() -> Store:
        raise UnreachableError("s3://bucket: the service did not answer: try again")

    api.pods = [Pod().say(*ONE)]
    assert texts(list(run_logs(cluster, RUN, away))) == texts(parsed(ONE))
    api.pods = [Pod("p2").say(*TWO)]
    for ended in (None, lambda: False):
        with pytest.raises(UnreachableError, match="s3://bucket"):
            list(run_logs(cluster, RUN, away, ended=ended))


def test_nothing_anywhere(read: Read) -> None:
    assert read() == []


def test_the_run_s_folder_is_not_known_any_more(cluster: Cluster) -> None:
    assert list(run_logs(cluster, RUN, lambda: None)) == []


@pytest.mark.parametrize("since", ["printed:4", "[]", '{"0": 4}', '{"a": [1, 2, 3]}'])
def test_a_cursor_of_something_else(read: Read, since: str) -> None:
    with pytest.raises(SpecError, match="is no place in these logs"):
        read(since=since)


@pytest.mark.parametrize("seed", range(12))
def test_a_place_is_the_same_wherever_the_lines_come_from(api: Api, read: Read, folder: Folder, seed: int) -> None:
    """Attempts with many lines a millisecond, some out of order; pods that are gone and logs that were rotated."""
    chance = random.Random(seed)
    attempts = random_attempts(chance)
    for number, lines in enumerate(attempts, 1):
        folder.put(*lines, attempt=number)
    kept = [Pod(f"p{number}", created=number).say(*lines) for number, lines in enumerate(attempts)]
    rotated = chance.randint(0, len(attempts) - 1)
    late = [Pod(f"p{rotated}", lines=kept[rotated].lines[chance.randint(0, len(attempts[rotated])) :])]
    places = [kept, [], kept[1:], [*late, *kept[rotated + 1 :]]]
    readings = []
    for pods in places:
        api.pods = pods
        readings.append(read())
    assert texts(readings[0]) == texts(parsed([line for lines in attempts for line in lines]))
    for lines in readings[1:]:
        assert lines == readings[0]
    for number in chance.sample(range(len(readings[0])), min(len(readings[0]), 6)):
        api.pods = chance.choice(places)
        assert read(since=readings[0][number].cursor) == readings[0][number + 1 :]


# -- following ------------------------------------------------------------------------------------------------------


def followed(read: Read, *steps: Callable[[], object], since: str = "") -> list[LogLine]:
    return read(since, ended=Story(*steps).ended, sleep=lambda _: None, silence_s=0.1)


def test_following_through_cuts(api: Api, read: Read) -> None:
    """A stream breaks in the middle of lines, again and again."""
    lines = [hello(1, 0), *(tagged(f"line {number}", 1 + number / 8) for number in range(30))]
    pod = Pod(state="running", cuts=[1, 9, 9, 9, 9, 9, 9, 9, 9]).say(*lines)
    api.pods = [pod]

    def end() -> None:
        pod.state = "terminated"

    found = followed(read, *[lambda: None] * 8, end)
    assert texts(found) == texts(parsed(lines))
    assert [line.cursor for line in found] == [line.cursor for line in read()]
    assert any("sinceTime" in asked for asked in api.asked if "follow" in asked)
    for number in (1, 15):
        pod.state, pod.cuts = "running", [3, 20, 20, 20, 20, 20]
        assert followed(read, *[lambda: None] * 6, end, since=found[number].cursor) == found[number + 1 :]


def test_following_from_the_queue_to_a_second_attempt(api: Api, read: Read, folder: Folder) -> None:
    first, second = Pod("p1", state="waiting"), Pod("p2", state="waiting", created=100)

    def set_state(pod: Pod, state: str) -> None:
        pod.state = state

    found = followed(
        read,
        lambda: None,
        lambda: api.pods.append(first),
        lambda: None,
        lambda: (first.say(*ONE[:4]), set_state(first, "terminated")),
        lambda: folder.put(*ONE),
        lambda: (api.pods.remove(first), api.pods.append(second)),
        lambda: (second.say(*TWO), set_state(second, "terminated")),
        lambda: None,
    )
    assert texts(found) == texts(parsed([*ONE, *TWO]))
    assert [line.attempt for line in found] == [1] * len(ONE) + [2] * len(TWO)


def test_following_a_pod_that_vanishes(api: Api, read: Read, folder: Folder) -> None:
    """What it said last is in the store."""
    pod = Pod(state="running", cuts=[4]).say(*ONE)
    api.pods = [pod]
    found = followed(read, lambda: None, lambda: (api.pods.clear(), folder.put(*ONE)), lambda: None)
    assert texts(found) == texts(parsed(ONE))
    assert folder.asked == 1


def test_reading_through_cuts(api: Api, read: Read) -> None:
    pod = Pod().say(*ONE)
    api.pods = [pod]
    whole = read()
    for cuts in ([0, 0], [2, 2, 2, 4], [1, 0, 0, 2]):
        pod.cuts = list(cuts)
        assert read() == whole
        pod.cuts = list(cuts)
        assert read(since=whole[4].cursor) == whole[5:]


def test_following_several_nodes(api: Api, read: Read) -> None:
    pods = [Pod(f"p{node}", node=node, state="running").say(hello(1, 0, f", node {node} of 2")) for node in (0, 1)]
    api.pods = pods

    def say(number: int) -> None:
        for pod in pods:
            pod.say(tagged(f"n{pod.node} {number}", 1 + number, str(pod.node)))

    def end() -> None:
        for pod in pods:
            pod.state = "terminated"

    found = followed(read, *(lambda number=number: say(number) for number in range(5)), end)  # type: ignore[misc]
    for node in (0, 1):
        assert [line.text for line in found if line.rank == str(node)] == [f"n{node} {number}" for number in range(5)]
    assert not any("follow" in asked for asked in api.asked)


def test_leaving_in_the_middle_closes_the_stream(api: Api, cluster: Cluster, folder: Folder) -> None:
    api.pods = [Pod(state="running").say(*ONE)]
    lines = run_logs(cluster, RUN, folder, ended=lambda: False)
    assert len(list(itertools.islice(lines, 3))) == 3
    lines.close()  # type: ignore[attr-defined]
    api.over.set()


def test_a_stream_that_falls_silent_is_asked_for_again(api: Api, cluster: Cluster, folder: Folder) -> None:
    """As after a rotation: what comes then is in a new file, which the stream does not know."""
    pod = Pod(state="running").say(*ONE[:5])
    api.pods = [pod]
    found: list[LogLine] = []
    looks = itertools.count()

    def ended() -> bool:
        if len(found) == 5:
            pod.lines = Pod().say(*ONE[4:]).lines
        return len(found) == len(ONE) or next(looks) > 100

    for line in run_logs(cluster, RUN, folder, ended=ended, sleep=lambda _: None, silence_s=0.1):
        assert "follow" in api.asked[-1]
        found.append(line)
    assert texts(found) == texts(parsed(ONE))


def test_lines_of_a_stream_equal_those_of_a_reading(api: Api, read: Read) -> None:
    pod = Pod(state="running").say(*ONE)
    api.pods = [pod]

    def end() -> None:
        pod.state = "terminated"

    threading.Timer(0.1, end).start()
    streamed = followed(read, lambda: None)
    assert streamed == read()


# -- real pods ------------------------------------------------------------------------------------------------------

RUNNER = f"""
import datetime, pathlib, sys, time
count = pathlib.Path("/opt/ml/count")
attempt = len(count.read_text()) + 1 if count.exists() else 1
count.write_text("x" * attempt)
def say(tag, text):
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")[:23]
    print(now + "Z [" + tag + "] " + text, flush=True)
say("-", "{RUN}, attempt " + str(attempt) + "; root /opt/ml")
for number in range(40):
    say("0", "line " + str(attempt) + "." + str(number))
    time.sleep(0.01 if number % 4 == 0 else 0)
sys.exit(attempt == 1)
"""


@pytest.mark.needs("podman", "debootstrap")
def test_in_a_pod_that_is_started_again(kube: KubeCluster, trainer_image: str, folder: Folder) -> None:
    kube.serve_image("registry.example.com/trainer:1", image=trainer_image)
    namespace = kube.namespace()
    container = {
        "name": "train",
        "image": "registry.example.com/trainer:1",
        "command": ["python3", "-c", RUNNER],
        "volumeMounts": [{"name": "ml", "mountPath": "/opt/ml"}],
    }
    spec = {"containers": [container], "volumes": [{"name": "ml", "emptyDir": {}}], "restartPolicy": "OnFailure"}
    kube.create("Pod", namespace, {"metadata": {"name": "p", "labels": {"cvlaunch/run-id": RUN}}, "spec": spec})
    kube.cut_logs(after=7, times=5)
    cluster = Cluster(Access(namespace=namespace))

    def over() -> bool:
        found = kube.get("Pod", namespace, "p")
        return found is not None and found["status"].get("phase") == "Succeeded"

    followed = list(run_logs(cluster, RUN, folder, ended=over, every=0.02))
    assert [line.text for line in followed if line.rank == "0"] == [f"line {a}.{n}" for a in (1, 2) for n in range(40)]
    assert list(run_logs(cluster, RUN, folder)) == followed
    assert list(run_logs(cluster, RUN, folder, since=followed[30].cursor)) == followed[31:]
    assert folder.asked == 0
    cluster.close()
