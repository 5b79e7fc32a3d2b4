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

    job: the content of job.json, inline or from Plan.files. env: variables of the container. gpus, cpus, memory,
    shm, disk: of one node, in bytes where they have a unit. timeout_s: the platform's own limit. secrets: variables
    or mounts that the platform fills from its own secrets.
    None: the platform has no words for it. Then the runner does it (`timeout_s`, `grace_s`), or the values travel
    beside the text (`secrets`), or nobody does, and `Backend.ignored` or `Backend.features` says so.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    job: Mapping[str, Any]
    gpus: int
    nodes: int
    image: str | None
    cpus: float | None
    memory: int | None
    shm: int | None
    disk: int | None
    grace_s: float | None
    timeout_s: float | None
    secrets: frozenset[str] | None


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

    def stored_secret(self, value: str) -> str:
        """A `store:` reference to this value; asked of worlds whose backend lacks Feature.SECRETS_CLIENT."""
        ...
