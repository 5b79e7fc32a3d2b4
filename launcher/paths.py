"""Folders of this machine: where cvlaunch keeps its own files, and where its data files are installed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cache_folder", "config_folder", "data_folder", "templates_folder", "trainer_folder"]


def _package_data(name: str) -> Path:
    """`launcher/_<name>` in a wheel; `<name>` beside the package in a checkout and in an editable install."""
    package = Path(__file__).parent
    shipped = package / f"_{name}"
    return shipped if shipped.is_dir() else package.parent / name


def templates_folder() -> Path:
    return _package_data("templates")


def trainer_folder() -> Path:
    """Holds the package `cvtrainer`."""
    return _package_data("trainer_image")


def data_folder() -> Path:
    """The ledger and local runs: $XDG_DATA_HOME/cvlaunch."""
    import platformdirs

    return platformdirs.user_data_path("cvlaunch", appauthor=False)


def cache_folder() -> Path:
    """What can be rebuilt: $XDG_CACHE_HOME/cvlaunch."""
    import platformdirs

    return platformdirs.user_cache_path("cvlaunch", appauthor=False)


def config_folder() -> Path:
    """The user's targets.yaml: $XDG_CONFIG_HOME/cvlaunch."""
    import platformdirs

    return platformdirs.user_config_path("cvlaunch", appauthor=False)
