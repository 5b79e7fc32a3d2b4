"""What `make demo` promises, looked at after it: `.ci/run` does."""

from __future__ import annotations

from launcher import State, runs

_LEAST = 0.97


def main() -> None:
    run = runs()[0]
    accuracy = run.metrics().best("val/accuracy")[1]
    report = run.synced_folder() / "report.html"
    assert (run.record.name, run.status().state) == ("digits", State.SUCCEEDED)
    assert accuracy >= _LEAST, f"val/accuracy {accuracy}, less than {_LEAST}"
    assert report.is_file(), f"no {report}"
    print(f"{run.id}: val/accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
