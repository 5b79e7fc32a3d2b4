"""Logs of a training job: each line once, in its node's order, from CloudWatch and store, wherever one stopped."""

from __future__ import annotations

import itertools
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.base import LogLine
from launcher.errors import AuthError, SpecError, UnreachableError
from launcher.sagemaker.client import LOG_GROUP, Access, Account
from launcher.sagemaker.logs import run_logs
from launcher.stores import open_store
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
    tagged,
    texts,
)
from tests.runner_world import RunnerWorld, python
from tests.services.aws import AwsCloud

END = tagged("SUCCEEDED, exit code 0", 4, "-")


class Streams:
    """What CloudWatch has of a job."""

    def __init__(self, aws: AwsCloud) -> None:
        self.aws, self.job = aws, f"digits-{secrets.token_hex(4)}"
        self._last: dict[str, float] = {}

    def say(self, *lines: str, node: int = 0, epoch: int = 1, at: float | None = None, job: str = "") -> None:
        """at: seconds after noon of the events; a millisecond after the runner's stamp otherwise."""
        stream = f"{job or self.job}/algo-{node + 1}-{epoch}"
        events = []
        for line in lines:
            own = datetime.fromisoformat(line[:24]).timestamp() + 0.001 if line[:2] == "20" else NOON
            when = self._last[stream] = max(self._last.get(stream, 0.0), own if at is None else NOON + at)
            events.append((round(when * 1000), line))
        self.aws.account.put_lines(LOG_GROUP, stream, events)

    def forget(self, stream: str = "") -> None:
        self.aws.account.remove_streams(LOG_GROUP, f"{self.job}/{stream}")


@pytest.fixture
def streams(aws: AwsCloud) -> Iterator[Streams]:
    streams = Streams(aws)
    yield streams
    streams.forget()


@pytest.fixture
def account(aws: AwsCloud) -> Account:
    """One that repeats no call: who reads logs is told at once what goes wrong."""
    return Account(Access(region=aws.region, endpoints={"logs": aws.endpoint}), attempts=1)


@pytest.fixture
def asked(account: Account) -> list[dict[str, Any]]:
    """What each GetLogEvents asked for."""
    found: list[dict[str, Any]] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        found.append(dict(params))

    account.client("logs").meta.events.register("before-parameter-build.logs.GetLogEvents", note)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return folder_in(tmp_path)


@pytest.fixture
def read(account: Account, streams: Streams, folder: Folder) -> Read:
    def read(since: str = "", **how: Any) -> list[LogLine]:
        return list(run_logs(account, streams.job, folder, since=since, **how))

    return read


def followed(read: Read, *steps: Callable[[], object], since: str = "", **how: Any) -> list[LogLine]:
    return read(since, ended=Story(*steps).ended, **{"sleep": lambda _: None, **how})


def wait() -> None:
    pass


# -- reading --------------------------------------------------------------------------------------------------------


def test_one_stream(streams: Streams, read: Read, folder: Folder) -> None:
    streams.say(*ONE)
    streams.say("not ours", job=f"{streams.job}-2")
    lines = check_resuming(read)
    assert texts(lines) == [f"{RUN}, attempt 1", *(f"line {number}" for number in range(8)), "bye"]
    assert [(line.rank, line.node, line.attempt, line.time) for line in lines[:2]] == [
        ("-", 0, 1, NOON),
        ("0", 0, 1, NOON + 1),
    ]
    assert folder.asked == 0


def test_the_same_cursor_in_cloudwatch_and_store(streams: Streams, read: Read, folder: Folder) -> None:
    folder.put(*ONE)
    folder.put(*TWO, attempt=2)
    streams.say(*ONE)
    streams.say(*TWO, epoch=100)
    from_cloudwatch = check_resuming(read)
    assert texts(from_cloudwatch) == texts(parsed([*ONE, *TWO]))
    assert [line.attempt for line in from_cloudwatch] == [1] * len(ONE) + [2] * len(TWO)
    assert folder.asked == 0
    streams.forget("algo-1-1")
    assert check_resuming(read) == from_cloudwatch
    streams.forget()
    assert check_resuming(read) == from_cloudwatch


@pytest.mark.parametrize("seed", range(8))
def test_a_place_is_the_same_wherever_the_lines_come_from(
    streams: Streams, read: Read, folder: Folder, seed: int
) -> None:
    """Streams that are there, that expired, and that lost their beginning; pages of any size."""
    chance = random.Random(seed)
    attempts = random_attempts(chance)
    for number, lines in enumerate(attempts, 1):
        folder.put(*lines, attempt=number)

    def keep(first: int, skip: int = 0) -> None:
        streams.forget()
        for number, lines in enumerate(attempts[first:], first):
            streams.say(*lines[skip if number == first else 0 :], epoch=100 + number)

    expired = chance.randrange(len(attempts))
    ways = [(0, 0), (len(attempts), 0), (1, 0), (expired, chance.randrange(len(attempts[expired])))]
    readings = []
    for way in ways:
        keep(*way)
        readings.append(read(page=chance.choice([2, 3, 7, 50])))
    assert texts(readings[0]) == texts(parsed([line for lines in attempts for line in lines]))
    for lines in readings[1:]:
        assert lines == readings[0]
    for number in chance.sample(range(len(readings[0])), min(len(readings[0]), 6)):
        keep(*chance.choice(ways))
        assert read(since=readings[0][number].cursor) == readings[0][number + 1 :]


@pytest.mark.parametrize("page", [1, 2, 3, 10])
def test_pages(streams: Streams, read: Read, page: int) -> None:
    """Also those that are empty before the end."""
    streams.say(*ONE)
    whole = read()
    streams.aws.log_pages(empty=2)
    assert read(page=page) == whole
    assert read(since=whole[4].cursor, page=page) == whole[5:]


def test_resuming_asks_for_a_window_alone(streams: Streams, read: Read, asked: list[dict[str, Any]]) -> None:
    streams.say(hello(1, 0), *(tagged(f"line {number}", number) for number in range(1, 100)))
    cursor = read()[-10].cursor
    asked.clear()
    assert len(read(since=cursor)) == 9
    head, *window = asked
    assert head["limit"] <= 200
    assert {page["startTime"] for page in window} == {round((NOON + 85) * 1000)}


def test_a_stream_whose_beginning_has_expired(streams: Streams, read: Read, folder: Folder) -> None:
    folder.put(*ONE)
    folder.put(*TWO[:3], attempt=2)
    streams.say(*TWO[1:])
    found = check_resuming(read)
    assert texts(found) == texts(parsed([*ONE, *TWO]))
    assert [line.attempt for line in found] == [1] * len(ONE) + [2] * len(TWO)


def test_a_stream_that_is_empty(streams: Streams, read: Read, folder: Folder) -> None:
    streams.say()
    assert read() == []
    folder.put(*ONE)
    assert texts(check_resuming(read)) == texts(parsed(ONE))


def test_stamps_out_of_order(streams: Streams, read: Read, folder: Folder) -> None:
    """Two threads of the runner, one millisecond."""
    lines = [hello(1, 0), tagged("a", 1.001), tagged("b", 1.0), tagged("c", 1.001), tagged("d", 1.0), tagged("e", 2)]
    folder.put(*lines)
    streams.say(*lines, at=2.5)
    from_cloudwatch = check_resuming(read)
    assert texts(from_cloudwatch)[1:] == list("abcde")
    streams.forget()
    assert check_resuming(read) == from_cloudwatch


def test_nodes(streams: Streams, read: Read, folder: Folder) -> None:
    for node in (0, 1, 2):
        lines = [hello(1, 0, f", node {node} of 3"), *(tagged(f"n{node} {i}", 1 + i, str(node)) for i in range(3))]
        folder.put(*lines, node=node)
        if node != 2:  # its stream is not there
            streams.say(*lines, node=node)
    lines = read()
    assert [line.node for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    assert [line.text for line in lines if line.rank != "-"] == [f"n{n} {i}" for n in range(3) for i in range(3)]
    for number, line in enumerate(lines, 1):
        assert read(since=line.cursor) == lines[number:]
    streams.forget()
    assert read() == lines


def test_many_hosts(streams: Streams, read: Read) -> None:
    """Streams are listed in pages of 50, and by name: algo-10 before algo-2."""
    for node in range(60):
        streams.say(hello(1, 0, f", node {node} of 60"), node=node)
    assert [line.node for line in read()] == list(range(60))


def test_what_no_runner_tagged_has_the_event_s_time(account: Account, streams: Streams) -> None:
    """A job that was made elsewhere: no store, and each start of an instance is an attempt."""
    for number in range(6):
        streams.say(f"line {number}", epoch=9, at=number // 2)
    streams.say("again", epoch=10, at=20)

    def read(since: str = "") -> list[LogLine]:
        return list(run_logs(account, streams.job, lambda: None, since=since, has_runner=False))

    lines = check_resuming(read)
    assert [(line.text, line.time) for line in lines[:6]] == [(f"line {n}", NOON + n // 2) for n in range(6)]
    assert {line.rank for line in lines} == {"0"}, "not the runner's"
    assert [line.attempt for line in lines] == [1] * 6 + [2]
    assert texts(list(run_logs(account, streams.job, lambda: None))) == texts(lines), "even if nobody knows"


def test_lines_of_any_kind(streams: Streams, read: Read, folder: Folder) -> None:
    """An event is a line, whatever is in it."""
    odd = ["\u2028 and \x85", "\x1b[31mred\x1b[0m", "\x00\ufffd", "x" * 200_000, "", "ends in a break\n"]
    streams.say(hello(1, 0), *(tagged(text, 1) for text in odd))
    folder.put(hello(1, 0), *(tagged(text.removesuffix("\n"), 1) for text in odd))
    from_cloudwatch = check_resuming(read)
    assert [line.text for line in from_cloudwatch[1:]] == [text.removesuffix("\n") for text in odd]
    streams.forget()
    assert read() == from_cloudwatch


def test_what_stands_before_the_runner_s_hello(streams: Streams, read: Read, folder: Folder) -> None:
    """It waits: of a job that goes on with a run only the hello says which attempt it is."""
    folder.put(*ONE)
    remarks = ["ld.so: something cannot be preloaded", tagged("the folder /opt/ml is small", 99, "-")]
    seen: list[int] = []
    steps = [lambda: streams.say(*remarks, at=99.5), lambda: seen.append(folder.asked), wait]
    found = followed(read, *steps, lambda: streams.say(*TWO), wait)
    assert texts(found) == texts([*parsed(ONE), LogLine(remarks[0]), *parsed([remarks[1], *TWO])])
    assert [line.attempt for line in found] == [1] * len(ONE) + [2] * (len(TWO) + 2)
    assert seen == [0]
    assert check_resuming(read) == found


def test_nothing_anywhere(account: Account, read: Read) -> None:
    """Nor is the group there before the first container writes."""
    assert read() == []
    assert list(run_logs(account, "digits-9", lambda: None)) == []


@pytest.mark.parametrize("since", ["printed:4", "[]", '{"0": 4}', '{"a": [1, 2, 3]}'])
def test_a_cursor_of_something_else(read: Read, since: str) -> None:
    with pytest.raises(SpecError, match="is no place in these logs"):
        read(since=since)


# -- following ------------------------------------------------------------------------------------------------------


def test_following_from_the_queue_to_a_second_attempt(streams: Streams, read: Read, folder: Folder) -> None:
    """Managed spot: another instance, another stream."""
    end = tagged("SUCCEEDED, exit code 0", 103, "-")
    found = followed(
        read,
        *[wait] * 3,
        *(lambda line=line: streams.say(line) for line in ONE),  # type: ignore[misc]
        *[wait] * 5,
        *(lambda line=line: streams.say(line, epoch=100) for line in [*TWO, end]),  # type: ignore[misc]
        *[wait] * 4,
    )
    assert texts(found) == texts(parsed([*ONE, *TWO, end]))
    assert [line.attempt for line in found] == [1] * len(ONE) + [2] * (len(TWO) + 1)
    assert folder.asked == 0
    assert read() == found
    for number in (0, 4, len(ONE) - 1, len(ONE), len(ONE) + 2):
        assert followed(read, wait, wait, since=found[number].cursor) == found[number + 1 :]


def test_following_hosts_that_come_one_after_another(streams: Streams, account: Account) -> None:
    """The first one's lines don't wait for the others."""
    seen: list[LogLine] = []
    states = []

    def say(number: int, *nodes: int) -> Callable[[], None]:
        def step() -> None:
            states.append([line.text for line in seen])
            for node in nodes:
                first = [hello(1, 0, f", node {node} of 2")] if number == 2 * node else []
                streams.say(*first, tagged(f"n{node} {number}", 1 + number, str(node)), node=node)

        return step

    story = Story(say(0, 0), say(1, 0), say(2, 0, 1), say(3, 0, 1), *[wait] * 4)
    for line in run_logs(account, streams.job, lambda: None, ended=story.ended, sleep=lambda _: None):
        seen.append(line)
    assert "n0 0" in states[1]
    for node, first in ((0, 0), (1, 2)):
        mine = [line.text for line in seen if line.rank == str(node)]
        assert mine == [f"n{node} {number}" for number in range(first, 4)]


def test_lines_that_appear_after_the_end(streams: Streams, read: Read, folder: Folder) -> None:
    """CloudWatch is some seconds late; the runner's last word ends the waiting, and the store is not read."""
    streams.say(*ONE[:3])
    late = iter([lambda: streams.say(*ONE[3:6]), lambda: streams.say(*ONE[6:], END)])
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 1:
            next(late, wait)()

    assert texts(followed(read, wait, sleep=sleep)) == texts(parsed([*ONE, END]))
    assert len(slept) == 3
    assert folder.asked == 0


def test_what_a_real_runner_prints(streams: Streams, account: Account, tmp_path: Path) -> None:
    """Its hello and its last word are known: nobody waits, and the store, which has the same places, is not read."""
    world = RunnerWorld(tmp_path / "world")
    for attempt, code in enumerate(("print('one'); checkpoint(1); sys.exit(75)", "print('two')"), 1):
        ended = world.end(world.job(python(code)), env={"CVLAUNCH_LOG": "tagged", "CVLAUNCH_ATTEMPT": str(attempt)})
        streams.say(*ended.output.splitlines(), epoch=attempt)
    store = Folder(open_store(str(world.run)))
    slept: list[float] = []
    lines = list(run_logs(account, streams.job, store, ended=Story(wait).ended, sleep=slept.append))
    assert [(line.text, line.attempt) for line in lines if line.rank == "0"] == [("one", 1), ("two", 2)]
    assert store.asked == 0
    assert len(slept) == 1
    streams.forget()
    assert list(run_logs(account, streams.job, store)) == lines


def test_the_end_of_a_runner_that_was_killed(streams: Streams, read: Read, folder: Folder) -> None:
    """Its last lines may be in either place; nobody waits for long."""
    for in_cloudwatch, in_store in ((ONE, ONE[:4]), (ONE[:4], ONE), (ONE, ONE)):
        streams.forget()
        streams.say(*in_cloudwatch)
        folder.put(*in_store)
        slept: list[float] = []
        assert texts(followed(read, wait, sleep=slept.append)) == texts(parsed(ONE))
        assert sum(slept) < 10


def test_following_what_has_ended_long_ago(streams: Streams, read: Read) -> None:
    streams.say(*ONE)
    slept: list[float] = []
    assert texts(followed(read, sleep=slept.append)) == texts(parsed(ONE))
    assert slept == []


def test_streams_that_expire_under_a_reader(streams: Streams, read: Read, folder: Folder) -> None:
    found = followed(read, lambda: streams.say(*ONE[:5]), wait, lambda: (streams.forget(), folder.put(*ONE)), wait)
    assert texts(found) == texts(parsed(ONE))


def test_a_human_pace(streams: Streams, read: Read) -> None:
    """Ten minutes of a job that says nothing, then two of a line every two seconds."""
    slept: list[float] = []
    streams.say(hello(1, 0))

    def calls() -> tuple[int, int, float]:
        aws = streams.aws
        return aws.count("DescribeLogStreams"), aws.count("GetLogEvents"), sum(slept)

    marks = []
    steps = [
        *[wait] * 60,
        lambda: marks.append(calls()),
        *(lambda number=number: streams.say(tagged("line", 1 + number)) for number in range(60)),  # type: ignore[misc]
        lambda: marks.append(calls()),
    ]
    assert len(followed(read, *steps, sleep=slept.append)) == 61
    (looks, gets, quiet), (looks_later, gets_later, later) = marks
    assert max(slept) == 10
    assert quiet > 500
    assert gets <= 62 + 2
    assert looks <= 61
    assert later - quiet <= 10 + 2 * 60 + 1
    assert gets_later - gets <= 2 * 61
    assert looks_later - looks <= 6


def test_following_in_a_thread(streams: Streams, account: Account, read: Read) -> None:
    """Lines come while pages are read."""
    lines = [hello(1, 0), *(tagged(f"line {number}", 1 + number / 8) for number in range(60)), END]
    over = threading.Event()

    def write() -> None:
        for at in range(0, len(lines), 5):
            streams.say(*lines[at : at + 5])
            over.wait(0.01)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    found = read(ended=over.is_set, every=0.005, page=3)
    writer.join()
    assert texts(found) == texts(parsed(lines))
    assert read() == found


def test_leaving_in_the_middle(streams: Streams, account: Account, folder: Folder) -> None:
    streams.say(*ONE)
    lines = run_logs(account, streams.job, folder, ended=lambda: False)
    assert len(list(itertools.islice(lines, 3))) == 3
    lines.close()  # type: ignore[attr-defined]


# -- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["DescribeLogStreams", "GetLogEvents"])
def test_where_we_may_not_read_logs_the_store_serves_alone(
    streams: Streams, account: Account, read: Read, folder: Folder, operation: str
) -> None:
    """While the job runs, too; from a cursor of CloudWatch's lines, even if the store has not come so far yet."""
    folder.put(*ONE)
    folder.put(*TWO, attempt=2)
    streams.say(*ONE)
    streams.say(*TWO, epoch=2)
    whole = read()
    text = f"User: arn:aws:iam::123456789012:user/me is not authorized to perform: logs:{operation}"
    streams.aws.fail(operation, "AccessDeniedException", text, times=None)
    assert check_resuming(read) == whole
    folder.store.delete(["output/logs/attempt-2.node-0.log"])
    folder.put(*ONE[:3])
    grow = [lambda: folder.put(*ONE[:6]), wait, lambda: folder.put(*ONE), lambda: folder.put(*TWO, attempt=2)]
    found = followed(read, *grow, since=whole[4].cursor)
    assert texts(found) == texts(parsed([*ONE[5:], *TWO]))
    for how in ({"store": lambda: None}, {"store": folder, "has_runner": False}):
        with pytest.raises(AuthError, match=f"logs:{operation}"):
            list(run_logs(account, streams.job, **how))  # type: ignore[arg-type]


def test_a_permission_that_is_taken_away(streams: Streams, read: Read, folder: Folder) -> None:
    def deny() -> None:
        streams.aws.fail("GetLogEvents", "AccessDeniedException", "no", times=None)
        folder.put(*ONE)

    found = followed(read, lambda: streams.say(*ONE[:5]), wait, deny, wait)
    assert texts(found) == texts(parsed(ONE))


def test_keys_that_have_expired_are_not_passed_over(streams: Streams, read: Read, folder: Folder) -> None:
    folder.put(*ONE)
    streams.aws.expire(streams.aws.access_key)
    with pytest.raises(AuthError, match="expired"):
        read()


def test_throttling_in_the_middle(streams: Streams, read: Read) -> None:
    """It passes."""
    streams.say(*ONE)

    def storm() -> None:
        streams.aws.throttle("*", times=3)

    assert texts(followed(read, wait, storm, *[wait] * 5, page=3)) == texts(parsed(ONE))


def test_a_service_that_is_away(streams: Streams, read: Read) -> None:
    """A follower bears it for a while; whoever asks once is told."""
    streams.say(*ONE[:6])

    def away(times: int) -> Callable[[], None]:
        return lambda: streams.aws.fail("GetLogEvents", "ServiceUnavailableException", "later", times=times)

    found = followed(read, away(2), wait, wait, away(3), lambda: streams.say(*ONE[6:]), *[wait] * 4, page=3)
    assert texts(found) == texts(parsed(ONE))
    for number in (2, 7):
        some = followed(read, away(2), *[wait] * 4, since=found[number].cursor, page=2)
        assert some == found[number + 1 :]
    with pytest.raises(UnreachableError):
        followed(read, away(4), *[wait] * 9)
    away(1)()
    with pytest.raises(UnreachableError):
        read()


def test_a_page_that_fails_in_the_middle(streams: Streams, read: Read, account: Account) -> None:
    """Nothing is lost and nothing comes twice, whichever page it is, and whether one resumes or not."""
    streams.say(*ONE, END)
    whole = read()
    count = iter(range(1000))
    fails: set[int] = set()

    def note(**_: Any) -> None:
        if next(count) in fails:
            streams.aws.fail("GetLogEvents", "ServiceUnavailableException", "later")

    account.client("logs").meta.events.register("before-parameter-build.logs.GetLogEvents", note)
    for failing, since in itertools.product(range(6), ("", whole[5].cursor)):
        count, fails = iter(range(1000)), {failing}
        found = followed(read, *[wait] * 5, since=since, page=3)
        assert found == (whole[6:] if since else whole)


@pytest.mark.parametrize("failing", range(4))
def test_a_token_that_has_expired(streams: Streams, read: Read, account: Account, failing: int) -> None:
    """They last 24 hours: the stream is read again from about the last line on, whichever page fails then."""
    fails = 0
    given: set[str] = set()
    expired: set[str] = set()

    def ask(params: dict[str, Any], **_: Any) -> None:
        nonlocal fails
        fails -= 1
        if fails == 0:
            streams.aws.fail("GetLogEvents", "ServiceUnavailableException", "later")
        if params.get("nextToken") in expired:
            params["nextToken"] = "expired"
            expired.clear()
            fails = failing
        given.add(params.get("nextToken", ""))

    def expire() -> None:
        expired.update(given - {""})

    account.client("logs").meta.events.register("before-parameter-build.logs.GetLogEvents", ask)
    streams.say(*ONE[:6])
    steps = (wait, expire, wait, lambda: (streams.say(*ONE[6:]), expire()), wait, wait)
    assert texts(followed(read, *steps, page=2)) == texts(parsed(ONE))
    assert "expired" in given
    streams.aws.fail("GetLogEvents", "InvalidParameterException", "limit", times=1)
    with pytest.raises(SpecError, match="limit"):
        read()


def test_a_store_that_is_away(streams: Streams, account: Account) -> None:
    """Asked for what is there alone, and never passed over in silence."""

    def away() -> Any:
        raise UnreachableError("s3://bucket: the service did not answer: try again")

    streams.say(*ONE)
    assert texts(list(run_logs(account, streams.job, away))) == texts(parsed(ONE))
    streams.forget()
    streams.say(*TWO)
    for ended in (None, lambda: False):
        with pytest.raises(UnreachableError, match="s3://bucket"):
            list(run_logs(account, streams.job, away, ended=ended, sleep=lambda _: None))
