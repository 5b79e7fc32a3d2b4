"""A backend whose calls fail as a network's do: before the job has arrived, or after. Jobs run on this machine."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from launcher.backends.base import BaseTarget, Feature, Handle, Plan, Support
from launcher.backends.local import LocalBackend, LocalTarget
from launcher.errors import AuthError, CapacityError, UnreachableError
from launcher.paths import templates_folder

ERRORS: dict[str, Callable[[], BaseException]] = {
    "unreachable": lambda: UnreachableError("the platform did not answer"),
    "reset": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "interrupted": KeyboardInterrupt,
    "no room": lambda: CapacityError("quota of 4 GPUs is used up"),
    "no identity": lambda: AuthError("the token has expired"),
}


class DoubtfulTarget(LocalTarget):
    backend: Literal["doubtful"] = "doubtful"  # type: ignore[assignment]
    error: str = Field("", description="key of ERRORS; none: the call succeeds")
    arrives: bool = Field(False, description="whether the job arrives all the same")


class DoubtfulBackend(LocalBackend):
    name: ClassVar[str] = "doubtful"
    Target: ClassVar[type[BaseTarget]] = DoubtfulTarget
    template: ClassVar[str] = "doubtful/process.json.j2"
    doubt_s: ClassVar[float] = 300.0
    features: ClassVar[Mapping[Feature, Support]] = {
        **LocalBackend.features,
        Feature.EXEC: Support(False, "it is not sure where it runs; look at its logs"),
    }
    target: DoubtfulTarget

    def submit(self, plan: Plan, secrets: Mapping[str, str], *, attempt: int = 1) -> Handle:
        error = ERRORS.get(self.target.error)
        if error is None or self.target.arrives:
            handle = super().submit(plan, secrets, attempt=attempt)
        if error is not None:
            raise error()
        return dataclasses.replace(handle)


def install(folder: Path) -> None:
    """The files of an installed distribution with this entry point; `folder` goes on sys.path."""
    info = folder / "doubtful-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doubtful\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cvlaunch.backends]\ndoubtful = doubtful_plugin:DoubtfulBackend\n")
    (folder / "doubtful_plugin.py").write_text(Path(__file__).read_text(encoding="utf-8"))
    shutil.copytree(templates_folder() / "local", folder / "templates/doubtful")
