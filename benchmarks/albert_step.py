"""ALBERT's training step beside transformers' torch model and its last one in Flax.

    python -m benchmarks.albert_step
    python -m benchmarks.albert_step --huge-pages --sequences 128 --rounds 3
    python -m benchmarks.albert_step --model xxlarge --precision bf16-mixed --sequences 512 --rows 8

On a CPU, in float32, ALBERT-base in batches of 8 × 128 and 2 × 512, 20 and 77 predictions a row,
AdamW. Each library has a process of its own; they take turns, and medians over rounds count.
`jaxlightning` draws its masks inside the step and computes logits at the masked places only;
`_lean` also has its layers in a loop and keeps matrix products alone for the backward pass;
`_given_labels` is lean, and computes exactly what its peers do: masks that are given, and logits at
all places. Others are taken by name, `--cases`: `_scan` has its layers in a loop and keeps all,
`_unrolled_labels` is `_given_labels` that is not lean, `_xla_attention` does without cuDNN.
Peers take part where transformers and torch are installed, and Flax where transformers is 4.57.
On a GPU torch's model is compiled. FLOPs are by formula; the peak is that of matrix products, which
take turns too: 4096 × 4096 in float32, 8192 × 8192 in bfloat16. `first_step_s` runs from the start
of the process to the end of its first step; `second_start_s` is the same with the programs of the
first start in JAX's persistent cache. `peak_mb` is the process's memory, or the GPU's,
`temporary_mb` what the step needs beside its arguments. Prints one JSON object a line.
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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ._albert_worker import Work, matmuls, predictions

OURS = ("jaxlightning", "jaxlightning_lean", "jaxlightning_given_labels")
ROWS = {128: 8, 512: 2}


def flops(work: Work, all_places: bool) -> float:
    """Of a step: three times the forward pass, whose products count 2 each."""
    from albert_task import AlbertConfig

    config: Any = AlbertConfig.preset(work.model)
    hidden, embedding = config.hidden_size, config.embedding_size
    layer = 2 * (4 * hidden**2 + 2 * hidden * config.intermediate_size) + 4 * work.seq * hidden
    token = config.num_hidden_layers * layer + 2 * embedding * hidden
    head = 2 * (hidden * embedding + embedding * config.vocab_size)
    places = work.seq if all_places else predictions(work.seq)
    return 3.0 * work.rows * (work.seq * token + places * head)


class Worker:
    """A process that takes steps when it is told to."""

    def __init__(self, case: str, work: Work, cache: str, huge_pages: bool):
        environment = dict(os.environ, TRANSFORMERS_VERBOSITY="error")
        # Several share a GPU.
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        command = [sys.executable, "-m", "benchmarks._albert_worker", case, *map(str, work)]
        self.case = case
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        start = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=self.errors,
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
            status = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read()[-2000:]
            raise SystemExit(f"The worker of {self.case} ended with {status}:\n{said}")
        return json.loads(line)


def available(precision: str) -> list[str]:
    """The cases that this machine can run, but for those that are asked for by name."""
    cases = list(OURS)
    if importlib.util.find_spec("transformers") is not None:
        cases += ["torch"] if importlib.util.find_spec("torch") else []
        has_flax = importlib.util.find_spec("transformers.modeling_flax_utils") is not None
        cases += ["flax"] if has_flax and precision == "32-true" else []
    return cases


def measured(work: Work, cases: list[str], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:

        def begin(case: str) -> Worker:
            return Worker(case, work, cache, options.huge_pages)

        # None is timed before all have compiled; the slowest to compile begins first.
        order = sorted([*cases, "matmul"], key=lambda case: case != "torch")
        with ThreadPoolExecutor(options.at_once) as pool:
            begun = list(pool.map(begin, order))
        workers = {worker.case: worker for worker in begun}
        for _ in range(options.rounds):
            for worker in workers.values():
                worker.take(options.steps)
        for worker in workers.values():
            worker.end()
        again: dict[str, Worker] = {}
        for case in cases if options.second_start else []:
            if case != "torch":
                again[case] = begin(case)
                again[case].end()
    medians = {case: statistics.median(worker.seconds) for case, worker in workers.items()}
    count, size = matmuls(work.precision)
    peak = count * 2 * size**3 / medians["matmul"]
    for case in cases:
        all_places = case in ("flax", "torch") or case.endswith("_labels")
        facts = {name: round(value, 2) for name, value in workers[case].facts.items()}
        half = "" if work.precision == "32-true" else f"/{work.precision}"
        told = {
            "benchmark": "albert_step",
            "case": f"{work.model}_{work.rows}x{work.seq}{half}/{case}"
            + "/huge_pages" * options.huge_pages,
            "tokens_per_s": round(work.rows * work.seq / medians[case], 1),
            **facts,
            **{
                f"ratio_to_{peer}": round(medians[peer] / medians[case], 3)
                for peer in ("flax", "torch")
                if peer in medians
            },
            "fraction_of_matmul_peak": round(flops(work, all_places) / medians[case] / peak, 3),
            "matmul_tflops": round(peak / 1e12, 3),
        }
        if case in again:
            told["second_start_s"] = round(again[case].facts["first_step_s"], 2)
        print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 512], choices=[128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="in a round")
    parser.add_argument("--model", default="base", choices=["base", "large", "xlarge", "xxlarge"])
    parser.add_argument("--rows", type=int, help=f"in a batch (default: {ROWS} by sequence)")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--cases", nargs="+", metavar="NAME")
    parser.add_argument(
        "--at-once", type=int, default=1, help="so many compile at once, and are slower at it"
    )
    parser.add_argument("--no-second-start", dest="second_start", action="store_false")
    parser.add_argument(
        "--huge-pages", action="store_true", help="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for all"
    )
    options = parser.parse_args()
    for seq in options.sequences:
        work = Work(options.rows or ROWS[seq], seq, options.model, options.precision)
        measured(work, options.cases or available(options.precision), options)


if __name__ == "__main__":
    main()
