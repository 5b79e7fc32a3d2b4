"""What all tests share: a home of their own, services that may be missing, golden files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.services.podman import configure, podman_works
from tests.services.slurm import slurm_works

pytest.register_assert_rewrite("launcher.testing.conformance", "tests.distant_stores")
hypothesis.settings.register_profile(
    "of any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("of any speed")
pytest_plugins = [
    "tests.s3_fixtures",
    "tests.image_fixtures",
    "tests.slurm_fixtures",
    "tests.ssh_fixtures",
    "tests.kube_fixtures",
    "tests.aws_fixtures",
]

_ALL = os.environ.get("CVLAUNCH_TEST_ALL") == "1"


def _can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(
            ["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
        ).returncode
        == 0
    )


_NEEDS = {
    "root": lambda: os.geteuid() == 0,
    "unshare": _can_unshare,
    "git": lambda: shutil.which("git") is not None,
    "linux": lambda: sys.platform == "linux",
    "podman": podman_works,
    "debootstrap": lambda: os.geteuid() == 0 and shutil.which("debootstrap") is not None,
    "docker-registry": lambda: shutil.which("docker-registry") is not None,
    "slurm": slurm_works,
    "sshd": lambda: all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("ssh", "sshd")),
    "charliecloud": lambda: shutil.which("ch-run") is not None,
    "shellcheck": lambda: shutil.which("shellcheck") is not None,
}
"""Name of a need → whether this machine meets it."""

_not_run: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write the golden files anew")


def pytest_configure(config: pytest.Config) -> None:
    configure()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; Ctrl-C is tested all the same
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", f"needs(*names): what the machine must have: {', '.join(_NEEDS)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        missing = [name for name in mark.args if not _NEEDS[name]()]
        if missing and _ALL:
            pytest.fail(f"this machine lacks {', '.join(missing)}, and CVLAUNCH_TEST_ALL=1 takes no excuse")
        if missing:
            pytest.skip(f"not run here: needs {', '.join(missing)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    total = sum(reasons.values())
    detail = "".join(f"; {count} {reason}" for reason, count in reasons.items())
    terminalreporter.write_line(f"cvlaunch: {total} tests could not be run on this machine{detail}")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user of its own for each test, for this process and for those that it starts."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    for variable in ("DATA", "CACHE", "CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{variable}_HOME", str(folder / variable.lower()))
    for name in [n for n in os.environ if n.startswith(("CVLAUNCH_", "AWS_", "GOOGLE_")) and n != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    yield folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.config.getoption("--renew-golden"))


class Golden:
    """Compares a text with `tests/golden/<name>`; --renew-golden writes it."""

    def __init__(self, renew: bool) -> None:
        self._renew = renew

    def check(self, name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if self._renew:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden file {name}: pytest --renew-golden writes it"
        assert text == path.read_text(), f"{name} has changed; pytest --renew-golden accepts that"
