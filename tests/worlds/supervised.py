"""What the worlds of this machine share."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from launcher.supervisor import SupervisorFolder


def supervise_again(folder: Path, plan_text: str) -> None:
    """A second supervisor with the same plan, in a folder where the first one's lock does not stop it, to its end."""
    again = SupervisorFolder(folder)
    again.path.mkdir(parents=True)
    again.plan.write_text(plan_text)
    command = [sys.executable, "-m", "launcher.supervisor", str(again.path)]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    while again.exit() is None:
        time.sleep(0.05)
