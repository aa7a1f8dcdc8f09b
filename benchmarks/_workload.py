"""What every case of `benchmarks.loop_overhead` trains: the same network on the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

FEATURES, WIDTH, CLASSES, BATCH = 8, 16, 4, 16
LEARNING_RATE = 1e-3


def network() -> eqx.nn.MLP:
    """So small that a step is mostly what happens around it."""
    return eqx.nn.MLP(FEATURES, CLASSES, WIDTH, depth=2, key=jax.random.key(0))


class Workload:
    """An epoch of `steps` batches `{"x": float32[16,8], "y": int32[16]}`.

    `from_host` says whether a case is to feed numpy rows to the device while it trains; otherwise
    it gets the batches there.
    """

    def __init__(self, steps: int, *, from_host: bool):
        generator = np.random.default_rng(0)
        rows = steps * BATCH
        self.steps = steps
        self.from_host = from_host
        self.x = generator.standard_normal((rows, FEATURES), np.float32)
        self.y = generator.integers(0, CLASSES, rows, dtype=np.int32)

    def slices(self) -> Iterator[dict[str, np.ndarray]]:
        """An epoch of numpy batches."""
        for start in range(0, len(self.x), BATCH):
            rows = slice(start, start + BATCH)
            yield {"x": self.x[rows], "y": self.y[rows]}

    @cached_property
    def resident(self) -> list[PyTree]:
        """An epoch of batches on the device."""
        return [jax.device_put(batch) for batch in self.slices()]

    def batches(self) -> Iterator[PyTree]:
        """An epoch, from where this workload says."""
        return self.slices() if self.from_host else iter(self.resident)
