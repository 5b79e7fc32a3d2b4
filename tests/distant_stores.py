"""Promises of stores on other machines, whose tests have a fixture `store`."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.stores import Store
from launcher.sync import sync_run

__all__ = ["test_a_run_comes_home", "test_one_of_many_is_first"]


def test_one_of_many_is_first(store: Store) -> None:
    def claim(number: int) -> bool:
        try:
            store.write("owner", str(number).encode() * 9999, if_absent=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert won.count(True) == 1
    assert store.read("owner") == str(won.index(True)).encode() * 9999
    assert [entry.path for entry in store.list()] == ["owner"]


def test_a_run_comes_home(store: Store, tmp_path: Path) -> None:
    tree = {f"output/logs/rank-{n}.txt": os.urandom(1000) for n in range(30)} | {"model/weights": os.urandom(3 << 20)}
    for path, content in tree.items():
        store.write(path, content)
    sync_run(store, tmp_path / "home")
    for path, content in tree.items():
        assert (tmp_path / "home" / path).read_bytes() == content
    store.write("output/logs/rank-0.txt", b"longer now")
    sync_run(store, tmp_path / "home")
    assert (tmp_path / "home/output/logs/rank-0.txt").read_bytes() == b"longer now"
