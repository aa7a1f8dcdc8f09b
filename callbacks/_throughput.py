"""How fast a run is, and how much of the hardware it uses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxlightning._callback import Callback
from jaxlightning._flops import analyse_flops, matmul_peak
from jaxlightning._hardware import device_peak

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer

Counter = Callable[[PyTree], int]


class ThroughputMonitor(Callback):
    """Logs, at each log boundary, means over the last `window` steps and more:

    - `throughput/steps_per_s`, `throughput/examples_per_s`, `throughput/tokens_per_s`;
    - `throughput/flops_per_s`, of all devices, and `throughput/mfu`, its share of their peak;
    - `throughput/data_wait`, the share of the time spent waiting for data.

    Time is that of training: evaluation, compilation and what comes before the first step do not
    count. Nothing is read from the device; steps count when they are dispatched, a few before
    they have run. FLOPs are what the mathematics asks for, without recomputation (see
    [`ModelSummary`][] for how they are counted), so MFU is that of Chowdhery et al. 2022 (PaLM).

    **Arguments:**

    - `window`: how many steps a mean looks back on, at least; log intervals are not cut.
    - `examples`: the number of examples of a batch; by default, the length of the first axis.
    - `tokens`: the number of tokens of a batch. Both may look at shapes only, as the batch is on
      the device: `lambda batch: batch["tokens"].size`.
    - `peak_flops`: of one device, in FLOPs a second. By default what the vendor publishes for it;
      where that is unknown, such as on CPUs, a matrix product is measured at the start, which
      takes about a second.
    """

    def __init__(
        self,
        window: int = 100,
        examples: Counter | None = None,
        tokens: Counter | None = None,
        peak_flops: int | float | None = None,
    ):
        if not isinstance(window, int) or window < 1:
            raise ValueError(
                f"`ThroughputMonitor(window={window!r})` has to be a positive number of steps."
            )
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(
                f"`ThroughputMonitor(peak_flops={peak_flops!r})` has to be positive: FLOPs a "
                "second of one device, such as `989e12`."
            )
        self.window = window
        self._examples = examples or leading_axis
        self._tokens = tokens
        self._peak_flops = peak_flops
        self._marks: deque[_Mark] = deque()
        self._paused_s = 0.0
        self._paused_at = 0.0

    def provides(self) -> Sequence[str]:
        names = ["steps_per_s", "examples_per_s", "flops_per_s", "mfu", "data_wait"]
        if self._tokens is not None:
            names.append("tokens_per_s")
        return [f"throughput/{name}" for name in names]

    def on_fit_start(self, trainer: Trainer) -> None:
        self._peak = peak_of(trainer, self._peak_flops)
        self._accumulates = trainer.accumulate_grad_batches > 1
        usual = self._examples(trainer.train_batch_spec) * trainer.accumulate_grad_batches
        # A smaller last batch costs its share.
        self._flops_per_example = analyse_flops(trainer.train_step_jaxpr()).model / usual
        self._marks.clear()
        self._steps = self._seen = self._read = 0
        self._paused_s = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, outputs: Mapping[str, Any], batch: PyTree, batch_idx: int
    ) -> None:
        self._steps += 1
        for one in batch if self._accumulates else [batch]:
            self._seen += self._examples(one)
            if self._tokens is not None:
                self._read += self._tokens(one)
        if not self._marks:
            # The clock starts after the first step, which may have compiled.
            self._marks.append(self._mark(trainer))

    def on_validation_start(self, trainer: Trainer) -> None:
        # Compiling is no part of it, because it is taken off anyway.
        self._paused_at = perf_counter() - trainer.compile_s

    def on_validation_end(self, trainer: Trainer) -> None:
        self._paused_s += perf_counter() - trainer.compile_s - self._paused_at

    def on_log(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        if not self._marks:
            return
        now = self._mark(trainer)
        self._marks.append(now)
        while len(self._marks) > 2 and now.steps - self._marks[1].steps >= self.window:
            self._marks.popleft()
        metrics |= self._rates(self._marks[0], now)

    def _mark(self, trainer: Trainer) -> _Mark:
        idle = self._paused_s + trainer.compile_s
        clock = perf_counter() - idle
        return _Mark(clock, self._steps, self._seen, self._read, trainer.data_wait_s)

    def _rates(self, start: _Mark, end: _Mark) -> dict[str, float]:
        seconds = end.clock - start.clock
        if seconds <= 0 or end.steps == start.steps:
            return {}
        examples = (end.examples - start.examples) / seconds
        flops = examples * self._flops_per_example
        rates = {
            "steps_per_s": (end.steps - start.steps) / seconds,
            "examples_per_s": examples,
            "flops_per_s": flops,
            "mfu": flops / self._peak,
            "data_wait": min(1.0, max(0.0, end.waited_s - start.waited_s) / seconds),
        }
        if self._tokens is not None:
            rates["tokens_per_s"] = (end.tokens - start.tokens) / seconds
        return {f"throughput/{name}": rate for name, rate in rates.items()}


class _Mark(NamedTuple):
    """What had happened at one moment of the fit."""

    clock: float
    """Seconds of training."""
    steps: int
    examples: int
    tokens: int
    waited_s: float


def leading_axis(batch: PyTree) -> int:
    """The length of the first axis of a batch's arrays."""
    return jax.tree.leaves(batch)[0].shape[0]


def peak_of(trainer: Trainer, given: int | float | None) -> float:
    """The peak of all devices of the run in FLOPs a second: given for one of them, published, or
    else measured."""
    dtype = trainer.precision.compute
    device = trainer.mesh.devices.flat[0]
    one = given or device_peak(device.device_kind, dtype)
    if one is not None:
        return one * trainer.mesh.size
    # Virtual CPU devices share one machine, all of which a single product uses.
    machines = jax.process_count() if device.platform == "cpu" else trainer.mesh.size
    return _measured_peak(jnp.dtype(dtype).name) * machines


@lru_cache
def _measured_peak(dtype: str) -> float:
    return matmul_peak(dtype=jnp.dtype(dtype))
