"""Builds the wheel and uses it alone: no checkout on the path, only the core dependencies, a folder elsewhere."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")

JOB = """\
name: from-the-wheel
command: [python3, -c, "import os, pathlib; pathlib.Path(os.environ['CVLAUNCH_MODEL'], 'it').write_text('ran')"]
"""

INSIDE = """
import sys
from pathlib import Path
import launcher
from launcher import paths
here = Path(launcher.__file__).parent
assert "site-packages" in here.parts, here
assert paths.templates_folder() == here / "_templates", paths.templates_folder()
assert (paths.templates_folder() / "local/process.json.j2").is_file()
assert (paths.trainer_folder() / "cvtrainer/__main__.py").is_file()
assert (here / "py.typed").is_file()
for name in ("torch", "boto3", "kubernetes"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is installed: this environment proves nothing")
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="cvlaunch-wheel-") as scratch:
        folder = Path(scratch)
        run(UV, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", ROOT)
        (wheel,) = (folder / "dist").glob("*.whl")
        show(wheel)
        run(UV, "venv", "--quiet", "--python", sys.executable, folder / "venv")
        run(UV, "pip", "install", "--quiet", "--python", folder / "venv/bin/python", wheel)
        use(folder)
    print("the wheel works alone")


def show(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    stray = [
        n for n in names if n.startswith(("tests/", "templates/", "trainer_image/")) or n.endswith((".pyc", ".png"))
    ]
    assert not stray, f"the wheel holds {stray[:5]}"
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {len(names)} files")


def use(folder: Path) -> None:
    """As a user with a job file would."""
    project = folder / "project"
    project.mkdir()
    (project / "job.yaml").write_text(JOB)
    environ = {"PATH": f"{folder}/venv/bin:/usr/bin:/bin", "HOME": str(folder / "home")}
    run(folder / "venv/bin/python", "-c", INSIDE, cwd=project, env=environ)
    cvlaunch = folder / "venv/bin/cvlaunch"
    run(cvlaunch, "--version", cwd=project, env=environ)
    run(cvlaunch, "render", "job.yaml", "--backend", "local", cwd=project, env=environ)
    run(cvlaunch, "submit", "job.yaml", "--backend", "local", "--follow", "--sync", "runs", cwd=project, env=environ)
    (model,) = project.glob("runs/*/model/it")
    assert model.read_text() == "ran"
    run(cvlaunch, "report", "last", cwd=project, env=environ)
    sent = [cvlaunch, "submit", "job.yaml", "--backend", "kubernetes", "--set", "output=s3://b/x", "--set", "image=x"]
    refused = subprocess.run(sent, cwd=project, env=environ, capture_output=True, text=True, check=False)
    assert "pip install 'cvlaunch[kubernetes]'" in refused.stderr, refused.stderr


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command], check=False, cwd=cwd, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
