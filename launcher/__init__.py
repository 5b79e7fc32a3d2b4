"""cvlaunch: one computer-vision training job, many places to run it, one result.

from launcher import submit
run = submit("job.yaml", backend="local")
run.wait()
run.sync("results")
run.metrics()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from launcher._version import __version__

if TYPE_CHECKING:
    from launcher.errors import (
        AuthError,
        CapacityError,
        ConflictError,
        CvlaunchError,
        IntegrityError,
        JobFailedError,
        SpecError,
        UnreachableError,
        UnsupportedError,
    )
    from launcher.metrics import Metrics
    from launcher.run import Run, attach, render, runs, submit, submit_many
    from launcher.spec import JobSpec
    from launcher.status import State, Status

__all__ = [
    "AuthError",
    "CapacityError",
    "ConflictError",
    "CvlaunchError",
    "IntegrityError",
    "JobFailedError",
    "JobSpec",
    "Metrics",
    "Run",
    "SpecError",
    "State",
    "Status",
    "UnreachableError",
    "UnsupportedError",
    "__version__",
    "attach",
    "render",
    "runs",
    "submit",
    "submit_many",
]

_HOMES = {
    "JobSpec": "spec",
    "Metrics": "metrics",
    "Run": "run",
    "State": "status",
    "Status": "status",
    "attach": "run",
    "render": "run",
    "runs": "run",
    "submit": "run",
    "submit_many": "run",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import launcher` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'launcher' has no attribute {name!r}")
    module = importlib.import_module(f"launcher.{_HOMES.get(name, 'errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
