"""A program that stands for a container engine: it notes how it was called and answers from a table.

For what no engine of this machine can show: other versions, log-ins to clouds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Call", "FakeEngine"]

_PROGRAM = """\
#!{python}
import json, sys
answers = json.load(open({answers!r}))
words = sys.argv[1:]
reads = "--password-stdin" in words
with open({calls!r}, "a") as file:
    file.write(json.dumps([words, sys.stdin.read() if reads else ""]) + "\\n")
for answer in answers:
    if words[:len(answer["words"])] == answer["words"] and answer["times"] != 0:
        answer["times"] -= 1
        json.dump(answers, open({answers!r}, "w"))
        sys.stdout.buffer.write(bytes.fromhex(answer["out"]))
        sys.stderr.write(answer["err"])
        raise SystemExit(answer["code"])
raise SystemExit("unexpected: " + " ".join(words))
"""


@dataclass(frozen=True)
class Call:
    words: tuple[str, ...]
    stdin: str


@dataclass(frozen=True)
class FakeEngine:
    """folder: for PATH. Of the answers that fit the first words, the first one that is not used up is given."""

    folder: Path

    @classmethod
    def install(cls, folder: Path, name: str = "docker") -> FakeEngine:
        folder.mkdir(parents=True, exist_ok=True)
        program, engine = folder / name, cls(folder)
        text = _PROGRAM.format(python=sys.executable, answers=str(engine._answers), calls=str(engine._calls))
        program.write_text(text)
        program.chmod(0o755)
        engine._answers.write_text("[]")
        return engine

    @property
    def _answers(self) -> Path:
        return self.folder / "answers.json"

    @property
    def _calls(self) -> Path:
        return self.folder / "calls.jsonl"

    def answer(self, *words: str, out: str | bytes = "", err: str = "", code: int = 0, times: int = -1) -> None:
        content = out if isinstance(out, bytes) else out.encode()
        answers = json.loads(self._answers.read_text())
        answers.append({"words": words, "out": content.hex(), "err": err, "code": code, "times": times})
        self._answers.write_text(json.dumps(answers))

    def has_image(self, reference: str, **facts: Any) -> None:
        self.answer("image", "inspect", reference, out=json.dumps([inspected(**facts)]))

    @property
    def calls(self) -> list[Call]:
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [Call(tuple(words), stdin) for words, stdin in map(json.loads, lines)]

    def called(self, *words: str) -> list[Call]:
        return [call for call in self.calls if call.words[: len(words)] == words]


def inspected(
    *, id: str = "sha256:" + "c" * 64, config: Mapping[str, Any] = {}, digests: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """What `docker image inspect` says of one image."""
    about = {"Id": id, "RepoTags": ["x:1"], "RepoDigests": list(digests), "Size": 10, "Os": "linux"}
    return {**about, "Architecture": "amd64", "RootFS": {"Layers": ["sha256:l"]}, "Config": dict(config), **more}
