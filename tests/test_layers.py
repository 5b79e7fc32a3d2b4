"""The house plan: a file imports only from rows below its own, and SDKs stand where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher

PACKAGE = Path(launcher.__file__).parent

ROWS = [
    "_version beside contract errors paths process quantities rules",
    "attempts digest engine gpus masking metrics remote secretfiles spec status tarfiles yamlfile",
    "containers credentials dataset jobfile shm",
    "stores",
    "backends.base manifest supervisor sync",
    "logfiles",
    "code image logplaces notify plan report runner starter supervised watch",
    "kube sagemaker slurm",
    "backends.container backends.kubernetes backends.local backends.sagemaker backends.slurm",
    "backends findings ledger",
    "targets",
    "resolve",
    "compare submission",
    "adopt rehearse rerun sweep",
    "run",
    "testing cli launcher",
]
"""One line a row, the lowest first. A package stands as a whole; the modules of `backends` have rows of their own."""

SDKS = {
    "boto3": ["credentials.aws"],
    "botocore": ["credentials.aws", "sagemaker"],
    "google": ["credentials.google"],
    "obstore": ["stores", "credentials.aws", "credentials.google"],
    "jinja2": ["plan", "report"],
    "kubernetes": ["kube"],
    "websocket": ["kube"],
    "torch": [],
    "ultralytics": [],
    "timm": [],
}
"""SDK → the only modules or packages that may import it."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "launcher"


def unit_of(module: str) -> str:
    """The name that ROWS knows: `runner.ranks` → `runner`; `backends.local` stays."""
    return module if module.startswith("backends.") else module.split(".")[0]


def row_of(module: str) -> int:
    rows = [i for i, row in enumerate(ROWS) if unit_of(module) in row.split()]
    assert rows, f"{module} has no row: give it one in {Path(__file__).name}"
    return rows[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at import time) for each import; `from launcher import x` counts as x where x is a module."""
    tree = ast.parse(path.read_text())
    for node, top in walk(tree, top=True):
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                as_path = PACKAGE.parent / inner.replace(".", "/")
                is_module = as_path.with_suffix(".py").is_file() or (as_path / "__init__.py").is_file()
                yield (inner if is_module else node.module), top


def walk(node: ast.AST, *, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child, top
        yield from walk(child, top=top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_rows_below(path: Path) -> None:
    module = name_of(path)
    for imported, _ in imports(path):
        if imported.split(".")[0] != "launcher" or imported == "launcher":
            continue
        other = imported.removeprefix("launcher.")
        if unit_of(other) != unit_of(module):
            assert row_of(other) < row_of(module), (
                f"{module} (row {row_of(module)}) imports {other} (row {row_of(other)})"
            )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_an_sdk_stands_in_its_own_file_and_is_imported_late(path: Path) -> None:
    module = name_of(path)
    for imported, top in imports(path):
        sdk = imported.split(".")[0]
        if sdk in SDKS:
            assert not top, f"{module} imports {sdk} at import time"
            assert any(module == home or module.startswith(f"{home}.") for home in SDKS[sdk]), f"{module} imports {sdk}"


def test_every_row_names_modules_that_are_there() -> None:
    known = {unit_of(name_of(path)) for path in MODULES}
    assert {name for row in ROWS for name in row.split()} <= known | {"backends"}


def test_import_and_help_load_nothing_heavy() -> None:
    heavy = ["boto3", "botocore", "google.cloud", "jinja2", "kubernetes", "obstore", "pydantic", "rich", "torch"]
    script = f"""
import sys, launcher
assert not [m for m in {heavy} if m in sys.modules], "import launcher"
from launcher.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert not [m for m in {heavy} if m in sys.modules], [m for m in {heavy} if m in sys.modules]
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def isort_key(name: str) -> tuple[bool, bool, str]:
    """CONSTANTS, then Classes, then functions: the order that ruff keeps, too."""
    return not name.isupper(), not name[:1].isupper(), name


def test_public_names_are_sorted_and_true() -> None:
    assert sorted(launcher.__all__, key=isort_key) == launcher.__all__
    assert [getattr(launcher, name) for name in launcher.__all__]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_all_is_sorted_and_true(path: Path) -> None:
    tree = ast.parse(path.read_text())
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    if listed:
        assert listed[0] == sorted(listed[0], key=isort_key)
        defined = {getattr(node, "name", None) for node in tree.body}
        defined |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        defined |= {
            alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
        }
        assert set(listed[0]) <= defined
