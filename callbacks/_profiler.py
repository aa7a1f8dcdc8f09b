"""A window of steps through JAX's profiler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PyTree

from jaxlightning._callback import Callback

from ._announce import announce

if TYPE_CHECKING:
    from jaxlightning._trainer import Trainer


class Profiler(Callback):
    """Records what host and devices do during `num_steps` steps, on CPU, GPU and TPU.

    The trace can be read in two ways, which the callback prints when it is written:
    TensorBoard's profile tab (`pip install tensorboard xprof`), as it lies in the run's
    `plugins/profile` folder, and https://ui.perfetto.dev, which opens its
    `perfetto_trace.json.gz`. Every step is marked as such.

    It waits for the device before the window and after it, so that the window holds just its
    steps; other steps cost nothing.

    **Arguments:**

    - `start_step`: how many steps of this fit come before the window; the first ones are not
      typical.
    - `num_steps`: steps in the window.
    - `dirpath`: where to write; by default the logger's folder.
    - `python`: whether to record every Python call too, which slows the host down.
    """

    def __init__(
        self,
        start_step: int = 10,
        num_steps: int = 5,
        dirpath: str | Path | None = None,
        python: bool = False,
    ):
        if start_step < 0 or num_steps < 1:
            raise ValueError(
                "`Profiler` takes a `start_step` of at least 0 and `num_steps` of at least 1, not "
                f"{start_step!r} and {num_steps!r}."
            )
        self.start_step = start_step
        self.num_steps = num_steps
        self.dirpath = dirpath
        self.python = python
        self._first = -1
        self._folder: Path | None = None
        self._mark: jax.profiler.StepTraceAnnotation | None = None

    def needs_state(self, step: int) -> bool:
        return step in (self._first, self._first + self.num_steps)

    def on_train_start(self, trainer: Trainer) -> None:
        self._first = trainer.global_step + self.start_step
        if self.start_step == 0:
            self._start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, outputs: Mapping[str, Any], batch: PyTree, batch_idx: int
    ) -> None:
        if trainer.global_step == self._first and self._folder is None:
            self._start(trainer)
        elif trainer.global_step == self._first + self.num_steps:
            self._stop(trainer)
        elif self._folder is not None:
            self._next_mark(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        if self._folder is not None:
            self._end_mark()
            jax.profiler.stop_trace()
            self._folder = None

    def _start(self, trainer: Trainer) -> None:
        jax.block_until_ready(trainer.state)
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = int(self.python)
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self._next_mark(trainer)

    def _next_mark(self, trainer: Trainer) -> None:
        self._end_mark()
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=trainer.global_step + 1)
        self._mark.__enter__()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _stop(self, trainer: Trainer) -> None:
        if self._folder is None:
            return
        self._end_mark()
        jax.block_until_ready(trainer.state)
        jax.profiler.stop_trace()
        trace = max(self._folder.glob("plugins/profile/*/perfetto_trace.json.gz"))
        announce(
            f"Profiled steps {self._first + 1} to {trainer.global_step}. Open {trace} at "
            "https://ui.perfetto.dev, or see them in the profile tab of "
            f"`tensorboard --logdir {self._folder}` (`pip install tensorboard xprof`)."
        )
        self._folder = None
