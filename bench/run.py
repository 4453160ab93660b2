"""Runs the benchmarks and writes the report: ``python -m bench.run``, or ``make bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from pytest_benchmark.utils import get_commit_info

from bench import report

_HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases only, a tenth of the time each")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="cases to run, as pytest's -k")
    parser.add_argument("--out", type=Path, help="the JSON; default: bench/results/COMMIT.json")
    arguments = parser.parse_args()

    commit = get_commit_info()["id"][:7]  # type: ignore[no-untyped-call]
    out = arguments.out or _HERE / "results" / f"{commit}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    options = ["-vv", "-k", arguments.k, "--benchmark-disable-gc", f"--benchmark-json={out}"]
    options += ["--benchmark-columns=median,iqr,rounds"]
    code = pytest.main([str(_HERE), *options, *(["--quick"] if arguments.quick else [])])
    if code != pytest.ExitCode.OK:
        sys.exit(f"bench: a case failed, so there is no report; what was measured is in {out}")
    report.write(out)


if __name__ == "__main__":
    main()
