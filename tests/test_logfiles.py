"""Log files read while they grow: every line once, from wherever a reader stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.logfiles import follow_logs, parse_line
from launcher.stores import Store, open_store
from launcher.sync import segment_path

FIRST = "output/logs/attempt-1.node-0.log"
OTHER = "nodes/1/output/logs/attempt-1.node-1.log"
SECOND = "output/logs/attempt-2.node-0.log"


def line(text: str, second: int = 0) -> bytes:
    return f"2026-11-21T10:00:{second:02}.000Z [0] {text}\n".encode()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def put_whole(store: Store, path: str, data: bytes) -> None:
    store.write(path, data)


def put_segments(store: Store, path: str, data: bytes) -> None:
    """Cut anywhere, in the middle of lines, too."""
    for start in range(0, len(data), 50):
        store.write(segment_path(path, start), data[start : start + 50])


@pytest.mark.parametrize("put", [put_whole, put_segments])
def test_going_on_after_any_line(store: Store, put: Callable[[Store, str, bytes], None]) -> None:
    for path in (FIRST, OTHER, SECOND):
        put(store, path, b"".join(line(f"{path} {number}", number) for number in range(5)))
    lines = list(follow_logs(store))
    expected = [f"{path} {number}" for path in (FIRST, OTHER, SECOND) for number in range(5)]
    assert [found.text for found in lines] == expected
    assert [(found.attempt, found.node) for found in lines[::5]] == [(1, 0), (1, 1), (2, 0)]
    for number, seen in enumerate(lines, 1):
        assert list(follow_logs(store, since=seen.cursor)) == lines[number:]


def test_going_on_in_the_whole_file_after_the_segments_are_gone(store: Store) -> None:
    data = b"".join(line(f"line {number}", number) for number in range(5))
    put_segments(store, FIRST, data)
    lines = list(follow_logs(store))
    put_whole(store, FIRST, data)
    store.delete([entry.path for entry in store.list("segments")])
    for number, seen in enumerate(lines, 1):
        assert [found.text for found in follow_logs(store, since=seen.cursor)] == [f.text for f in lines[number:]]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1d", "\x1e", "\r"])
def test_a_line_ends_at_a_line_feed_alone(store: Store, inside: str) -> None:
    store.write(FIRST, line(f"one{inside}line") + line("another"))
    assert [found.text for found in follow_logs(store)] == [f"one{inside}line", "another"]


def test_half_a_line_waits_for_the_rest(store: Store) -> None:
    whole, torn = line("whole"), line("torn")
    store.write(FIRST, whole + torn[:-3])
    (seen,) = follow_logs(store)
    assert seen.text == "whole"
    store.write(FIRST, whole + torn)
    assert [found.text for found in follow_logs(store, since=seen.cursor)] == ["torn"]


def test_a_line_that_was_cut_off_is_given_at_the_end(store: Store) -> None:
    store.write(FIRST, line("whole") + line("cut off")[:-5])
    assert [found.text for found in follow_logs(store, ended=lambda: True)] == ["whole", "cut"]


def test_following_gives_each_line_once_until_the_end(store: Store) -> None:
    data = b"".join(line(f"line {number}", number) for number in range(6))
    sizes = iter(range(7, len(data), 31))
    store.write(FIRST, data[:1])
    done = False

    def grow(_: float) -> None:
        nonlocal done
        size = next(sizes, None)
        done = size is None
        store.write(FIRST, data[:size])

    found = [found.text for found in follow_logs(store, ended=lambda: done, sleep=grow)]
    assert found == [f"line {number}" for number in range(6)]


@pytest.mark.parametrize(
    ("written", "text", "rank", "time"),
    [
        ("2026-11-21T10:00:00.500Z [3] hello", "hello", "3", 1795255200.5),
        ("2026-11-21T10:00:00Z [-] ", "", "-", 1795255200.0),
        ("Traceback (most recent call last):", "Traceback (most recent call last):", "-", None),
    ],
)
def test_a_line_s_parts(written: str, text: str, rank: str, time: float | None) -> None:
    found = parse_line(written)
    assert (found.text, found.rank, found.time) == (text, rank, time)
