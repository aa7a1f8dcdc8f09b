"""What `import jaxlightning` costs beside the imports every program of this kind makes.

    python -m benchmarks.import_time

Fresh interpreters take turns; medians count. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

CASES = {
    "equinox_optax": "import equinox, optax",
    "jaxlightning": "import equinox, optax, jaxlightning",
    "jaxlightning_callbacks": "import equinox, optax, jaxlightning.callbacks",
}


def seconds(statement: str) -> float:
    """A fresh interpreter's life for one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=11, help="how often each case is run")
    options = parser.parse_args(arguments)
    found: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case, statement in CASES.items():
            found[case].append(seconds(statement))
    unit = statistics.median(found["equinox_optax"])
    for case, measured in found.items():
        median = statistics.median(measured)
        row = {
            "benchmark": "import_time",
            "case": case,
            "seconds": round(median, 3),
            "more_than_equinox_optax": round(median - unit, 3),
            "ratio_to_equinox_optax": round(median / unit, 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
