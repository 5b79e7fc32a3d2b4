"""Quantities as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.quantities import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (1024, 1024),
        ("512", 512),
        ("16Gi", 16 * 2**30),
        ("16GiB", 16 * 2**30),
        ("64GB", 64 * 10**9),
        ("64G", 64 * 10**9),
        ("1.5 Ki", 1536),
        (" 2tb ", 2 * 10**12),
        ("100B", 100),
    ],
)
def test_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "Gi", "-1", -1, "16Xi", "1e3", "1,5G", True, False, 1.5, [1], None, {}, "9" * 500, 10**400, "8192Pi", 2**63],
)
def test_not_a_size(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90),
        (0.5, 0.5),
        ("45s", 45),
        ("90m", 5400),
        ("12h", 43200),
        ("1h30m", 5400),
        ("1d 2h", 93600),
        ("1.5h", 5400),
    ],
)
def test_duration(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert isinstance(parse_duration(text), float)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "12",
        "h",
        "30m1h",
        "-5m",
        "0s",
        0,
        -1,
        True,
        [1],
        None,
        "11000d",
        float("nan"),
        float("inf"),
        10**400,
        "9" * 400 + "h",
    ],
)
def test_not_a_duration(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**50, "3072.0 TiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (185, "3m 05s"), (7800, "2h 10m"), (273600, "3d 04h")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers())))
def test_anything_else_is_a_value_error(value: object) -> None:
    """pydantic turns ValueError into an error of the file; anything else would be a traceback."""
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(ValueError):
            assert parse(value) >= 0  # type: ignore[operator]
