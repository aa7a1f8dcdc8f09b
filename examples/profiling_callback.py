"""A callback of one's own: profiles a few steps and says which operations took the time.

    python -m examples.profiling_callback

The trace itself lies in the run's folder, for TensorBoard's profile tab and Perfetto.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jax

from examples._digits import Digits
from examples.digits_equinox import initialise
from jaxlightning import Callback, Trainer


class OperationProfile(Callback):
    """Profiles `steps` steps, from global step `first` on."""

    def __init__(self, first: int = 10, steps: int = 5):
        self.first, self.last = first, first + steps
        self.milliseconds: dict[str, float] = {}

    def needs_state(self, step):
        # With `steps_per_dispatch`, blocks of steps end where the window begins and ends.
        return step in (self.first, self.last)

    def on_train_batch_start(self, trainer, batch, batch_idx):
        if trainer.global_step == self.first:
            jax.block_until_ready(trainer.state)  # Steps before the window may still run.
            self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "operations"
            jax.profiler.start_trace(str(self.folder))

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == self.last:
            jax.block_until_ready(trainer.state)
            jax.profiler.stop_trace()
            self.milliseconds = milliseconds_by_operation(self.folder)


def milliseconds_by_operation(folder: Path) -> dict[str, float]:
    """The time of each operation of the compiled program, over all devices, largest first."""
    total: collections.Counter[str] = collections.Counter()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                if any(name == "hlo_op" for name, _ in event.stats):
                    total[event.name] += event.duration_ns / 1e6
    return dict(total.most_common())


def main(max_epochs: int = 2, **options: Any) -> dict[str, float]:
    """Milliseconds by operation."""
    profile = OperationProfile()
    Trainer(max_epochs=max_epochs, callbacks=[profile], **options).fit(initialise, Digits())
    return profile.milliseconds


if __name__ == "__main__":
    for operation, spent in list(main(default_root_dir="runs/profiling_callback").items())[:10]:
        print(f"{spent:8.2f} ms  {operation}")
