"""What a test needs to know of a platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from launcher.backends.base import Handle

__all__ = ["ContainerFacts", "World"]


@dataclass(frozen=True)
class ContainerFacts:
    """What a rendering says about the container, read back by the platform's own rules.

    job: the content of job.json, inline or from Plan.files. env: variables of the container. gpus: on one node.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    job: Mapping[str, Any]
    gpus: int
    nodes: int


class World(Protocol):
    """A platform under test."""

    @property
    def backend(self) -> str:
        """The registry's name."""
        ...

    @property
    def target(self) -> Mapping[str, Any]:
        """The entry for targets.yaml that leads to this world."""
        ...

    @property
    def settings(self) -> Sequence[str]:
        """What a job needs here besides, such as `image=...`; in the form of --set."""
        ...

    @property
    def patience(self) -> float:
        """Seconds in which a job of a second has surely ended here."""
        ...

    def python(self) -> str:
        """The interpreter that a command finds in the job's environment."""
        ...

    def facts(self, text: str, files: Mapping[str, bytes | str]) -> ContainerFacts:
        """Reads a rendering back."""
        ...

    def sent(self, handle: Handle) -> str:
        """The text that reached the platform."""
        ...

    def submit_again(self, handle: Handle) -> None:
        """Makes the platform start the same job a second time, as a doubled submission would."""
        ...

    def preempt(self, handle: Handle) -> None:
        """Takes the machine away, with the platform's signal and grace; it comes back."""
        ...
