"""YAML files: the line of every key, and what is refused before anything is built from it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import SpecError
from launcher.yamlfile import parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_are_exact(tmp_path: Path) -> None:
    text = "#\n\nname: x\ntrain:\n  task: classify\n\n  epochs: 3\ncommand:\n- a\n- - b\n  - c\nf: {k: 1,\n  l: 2}\n"
    document = read_yaml(write(tmp_path, text))
    expected = {
        ("name",): 3, ("train",): 4, ("train", "task"): 5, ("train", "epochs"): 7, ("command",): 8, ("command", 0): 9,
        ("command", 1): 10, ("command", 1, 1): 11, ("f", "k"): 12, ("f", "l"): 13,
    }  # fmt: skip
    assert {path: document.line(path) for path in expected} == expected


def test_line_of_what_is_not_there_is_that_of_its_parent(tmp_path: Path) -> None:
    document = read_yaml(write(tmp_path, "a: 1\nb:\n  c: 2\n"))
    assert document.line(("b", "missing", "deeper")) == 2
    assert document.line(("missing",)) is None


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", None, "expected keys and values, found nothing"),
        ("# only a comment\n", None, "found nothing"),
        ("- a\n- b\n", None, "found a list"),
        ("just text", None, "found a str"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", None, "not a text file"),
        (b"a: \x00", None, "not YAML"),
        ("a: 'open\nb: 1\n", 3, "not YAML"),
        ("a: 1\n b: 2\n", 2, "not YAML"),
        ("a: 1\n\tb: 2\n", 2, "not YAML"),
        ("a: *nowhere\n", 1, "undefined alias"),
        ("---\na: 1\n---\nb: 1\n", 3, "another document"),
        ("a: 1\nb: 2\na: 3\n", 3, "given twice"),
        ("a:\n  b: 1\n  b: 2\n", 3, "a.b: given twice"),
        ("? [a]\n: b\n", 1, "a key must be a word"),
        ("a: 1\non: push\n", 2, "the key 'on'"),
        ("a: {1: x}\n", 1, "the key '1'"),
        ("a: " + "[" * 500 + "]" * 500, None, "nested more than 50 levels"),
        ("a: " + "[" * 60 + "]" * 60, 1, "nested more than 50 levels"),
        ("".join("  " * i + "k:\n" for i in range(500)), None, "nested more than 50 levels"),
        ("a: &a [*a]\n", 1, "nested more than 50 levels"),
        (BOMB, None, "aliases expand"),
        ("a: 1\nb: 0x" + "f" * 9000, 2, "b: a number of 9002 digits"),
        ("a: 2026-99-99\n", None, "not YAML"),
        ("a: !!bool maybe\n", None, "not YAML"),
        ("a: !!int ''\n", None, "not YAML"),
        ("a: !!timestamp x\n", None, "not YAML"),
        ("a: !!python/object/apply:os.system [exit]\n", 1, "could not determine a constructor"),
        ('a:\n  b: "\\ud800"\n', 2, "a.b: holds half a character"),
        ('a: 1\n"\\udfff": 1\n', 2, "a key holds half a character"),
        ("a: =\n", 1, "could not determine a constructor"),
        ("a: " + "x" * (1 << 20), None, "larger than 1 MiB"),
    ],
)
def test_refused(tmp_path: Path, content: str | bytes, line: int | None, message: str) -> None:
    path = write(tmp_path, content)
    began = time.monotonic()
    with pytest.raises(SpecError) as caught:
        read_yaml(path)
    assert message in str(caught.value)
    assert caught.value.line == line
    assert caught.value.file == str(path)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert time.monotonic() - began < 30


def test_not_there_and_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        read_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(SpecError, match="directory"):
        read_yaml(tmp_path)
    with pytest.raises(SpecError, match="can't be read"):
        read_yaml(tmp_path / ("x" * 300))


def test_aliases_and_merges_that_people_mean_work() -> None:
    content, lines = parse_yaml("base: &b {x: 1, y: 2}\nother:\n  <<: *b\n  y: 3\n")
    assert content["other"] == {"x": 1, "y": 3}
    assert lines["other", "y"] == 4


PIECES = st.lists(
    st.sampled_from(
        [
            *(
                "a",
                "b: ",
                "- ",
                "\n",
                "  ",
                "[",
                "]",
                "{",
                "}",
                ",",
                ": ",
                "? ",
                "&x ",
                "*x",
                "<<: ",
                "! ",
                "|\n",
                ">\n",
            ),
            *("!!int ", "!!bool ", "!!set ", "!!timestamp ", "!!binary ", "!!float ", "!!omap ", "!!null ", "!!str "),
            *(
                "'",
                '"',
                "#",
                "%YAML 1.2\n",
                "---\n",
                "...\n",
                "0x_",
                "1:60",
                "2026-01-99",
                ".inf",
                "\t",
                "\\x",
                "=",
                "~",
            ),
            *("\u2028", "\x85", "é"),
        ]
    ),
    max_size=30,
).map("".join)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.one_of(
        st.binary(max_size=200),
        PIECES.map(str.encode),
        st.text(st.characters(codec="utf-8"), max_size=80).map(str.encode),
    )
)
def test_any_bytes_are_a_mapping_or_a_spec_error(tmp_path: Path, content: bytes) -> None:
    try:
        assert isinstance(read_yaml(write(tmp_path, content)).content, dict)
    except SpecError as error:
        assert error.file
