"""ALBERT-base's training step beside transformers' torch model and its last one in Flax.

    python -m benchmarks.albert_step
    python -m benchmarks.albert_step --huge-pages --sequences 128 --rounds 3

On a CPU, in float32, batches of 8 × 128 and 2 × 512, 20 and 77 predictions a row, AdamW. Each
library has a process of its own; they take turns, and medians over rounds count. `jaxlightning`
draws its masks inside the step and computes logits at the masked places only; `_lean` also has its
layers in a loop and keeps matrix products alone for the backward pass; `_given_labels` is lean, and
computes exactly what its peers do: masks that are given, and logits at all places. Peers take part
where transformers 4.57 and torch are installed. FLOPs are by formula, the peak is that of a product
of 4096 × 4096 matrices, which takes turns too. `first_step_s` runs from the start of the process to
the end of its first step; the case `second_start` has the programs of the first in JAX's persistent
cache. `peak_mb` is the process's memory, `temporary_mb` what the step needs beside its arguments.
Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from ._albert_worker import predictions

OURS = ("jaxlightning", "jaxlightning_lean", "jaxlightning_given_labels")
ROWS = {128: 8, 512: 2}


def flops(rows: int, seq: int, places: int) -> float:
    """Of a step of ALBERT-base: three times the forward pass, whose products count 2 each."""
    hidden, inner, layers, embedding, vocab = 768, 3072, 12, 128, 30_000
    layer = 2 * (4 * hidden**2 + 2 * hidden * inner) + 4 * seq * hidden
    token = layers * layer + 2 * embedding * hidden
    head = 2 * (hidden * embedding + embedding * vocab)
    return 3.0 * rows * (seq * token + places * head)


class Worker:
    """A process that takes steps when it is told to."""

    def __init__(self, case: str, seq: int, cache: str, huge_pages: bool):
        environment = dict(os.environ, TRANSFORMERS_VERBOSITY="error")
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        command = [
            sys.executable,
            "-m",
            "benchmarks._albert_worker",
            case,
            str(ROWS[seq]),
            str(seq),
        ]
        self.case = case
        start = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.facts: dict[str, float] = self._read()
        self.facts["first_step_s"] = time.perf_counter() - start
        self.seconds: list[float] = []

    def take(self, steps: int) -> None:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        self.seconds.append(self._read() / steps)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.facts["peak_mb"] = self._read()
        self.process.wait()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The worker of {self.case} ended with {self.process.wait()}.")
        return json.loads(line)


def measured(seq: int, rounds: int, huge_pages: bool) -> None:
    cases = list(OURS)
    if importlib.util.find_spec("transformers") is not None:
        cases += ["torch"] if importlib.util.find_spec("torch") else []
        cases += ["flax"] if importlib.util.find_spec("transformers.modeling_flax_utils") else []
    with tempfile.TemporaryDirectory() as cache:
        # One after the other, so that none compiles while another is timed.
        workers = {case: Worker(case, seq, cache, huge_pages) for case in [*cases, "matmul"]}
        for _ in range(rounds):
            for worker in workers.values():
                worker.take(2)
        for worker in workers.values():
            worker.end()
        again = {case: Worker(case, seq, cache, huge_pages) for case in cases if case != "torch"}
        for worker in again.values():
            worker.end()
    medians = {case: statistics.median(worker.seconds) for case, worker in workers.items()}
    peak = 2 * 4096**3 / medians["matmul"]
    rows = ROWS[seq]
    for case in cases:
        all_places = case in ("flax", "torch", "jaxlightning_given_labels")
        work = flops(rows, seq, seq if all_places else predictions(seq))
        facts = {name: round(value, 2) for name, value in workers[case].facts.items()}
        told = {
            "benchmark": "albert_step",
            "case": f"base_{rows}x{seq}/{case}" + "/huge_pages" * huge_pages,
            "tokens_per_s": round(rows * seq / medians[case], 1),
            **facts,
            **{
                f"ratio_to_{peer}": round(medians[peer] / medians[case], 3)
                for peer in ("flax", "torch")
                if peer in medians
            },
            "fraction_of_matmul_peak": round(work / medians[case] / peak, 3),
        }
        if case in again:
            told["second_start_s"] = round(again[case].facts["first_step_s"], 2)
        print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 512], choices=[128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--huge-pages", action="store_true", help="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for all"
    )
    options = parser.parse_args()
    for seq in options.sequences:
        measured(seq, options.rounds, options.huge_pages)


if __name__ == "__main__":
    main()
