"""What a Trainer tells callbacks and users about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from ._arguments import Arguments
from ._callback import Bus, Callback, Checkpoint
from ._evaluate import Evaluator
from ._explain import Sharding, explain_sharding
from ._fit import FitRun
from ._schedule import Position, Schedule, describe_schedule
from ._state import TrainState
from ._stream import Numbers
from ._task import TaskModule
from .data import Feed

if TYPE_CHECKING:
    from ._plan import Plan


class Facts:
    """The attributes of a `Trainer` that describe where it is; `Trainer` sets what they read."""

    _arguments: Arguments
    _bus: Bus
    _run: FitRun
    _schedule: Schedule
    _evaluator: Evaluator
    _start: Position
    _asked: dict[str, Any]
    _val_feeds: dict[str, Feed]
    _eval_feeds: dict[str, dict[str, Feed]]
    callback_metrics: Numbers
    loggers: list[Any]
    stage: str | None

    def explain_schedule(self, steps: int) -> str:
        """Which hook fires at which of the next steps, or, after a fit, of its first steps.

        Blocks of `steps_per_dispatch` steps also end where a batch has another shape.
        """
        if self._run is None:
            raise RuntimeError(
                "`explain_schedule` needs to know the data. Call it after `fit`, or in a hook such "
                "as `on_train_start`."
            )
        over = self._schedule.finished(self._position)
        start = Position() if over else self._position
        block = self._arguments.steps_per_dispatch
        plan = self._schedule.explain(steps, start, block, self._bus.needs_state)
        return describe_schedule(plan)

    def explain_sharding(
        self, task: Any, batch: PyTree | None = None, *, warn_above: int = 2**26
    ) -> Sharding:
        """How the state of a fit of `task` is sharded, leaf by leaf, and why: a table, as text.

            print(trainer.explain_sharding(task, batch))

        Nothing is computed. What callbacks add to the optimizer, such as an average, is sharded
        as the parameters are.

        **Arguments:**

        - `batch`: one of the training data, or an abstract one. With it, the last line says
          whether gradients are taken on each shard of a batch and reduced once, or why not.
        - `warn_above`: each leaf of more bytes that is whole on several devices is warned of.
        """
        trainer: Any = self
        return explain_sharding(trainer, task, batch, warn_above)

    def plan(
        self,
        task: Any,
        batch: PyTree,
        *,
        mesh: Mapping[str, int] | None = None,
        device: str | Any = None,
    ) -> Plan:
        """What a step of `task` needs and takes, on devices that need not be there.

            print(trainer.plan(task, batch, mesh={"data": 64, "fsdp": 16}, device="h100"))

        Memory by part and whether it fits, FLOPs, collectives, an estimate of the time, and what
        would help. The step is compiled for virtual CPU devices, and nothing is computed.

        **Arguments:**

        - `task`: as in `fit`; for a large one a function `key -> task`, which is not run.
        - `batch`: a global batch, or an abstract one: `jax.ShapeDtypeStruct`s.
        - `mesh`: the sizes of all axes; by default those of the trainer's.
        - `device`: such as `"h100"`, `"a100-80g"` or `"tpu-v5p"`, or a `Hardware`.

        **Raises:** `ValueError` for a batch that the mesh does not divide, or an unknown device.
        """
        from ._plan import plan

        trainer: Any = self
        return plan(trainer, task, batch, mesh, device)

    @property
    def state(self) -> TrainState:
        """The state: a view that is valid until the next step."""
        if self._run is None:
            raise RuntimeError("There is no state before `fit` has set it up.")
        return self._run.state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._run.state = state

    @property
    def task(self) -> TaskModule:
        return self.state.task

    @task.setter
    def task(self, task: TaskModule) -> None:
        self.state = self.state.replace(task=task)

    @property
    def _position(self) -> Position:
        return self._start if self._run is None else self._run.position

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        return self._position.step

    @property
    def current_epoch(self) -> int:
        return self._position.epoch

    @property
    def is_last_batch(self) -> bool:
        return self._position.last

    @property
    def sanity_checking(self) -> bool:
        return self.stage == "sanity_check"

    @property
    def callbacks(self) -> list[Callback]:
        """All callbacks, in the order in which they are told."""
        return self._bus.callbacks

    @property
    def checkpoint_callback(self) -> Any:
        """The first callback that saves, or `None`."""
        return next((c for c in self.callbacks if isinstance(c, Checkpoint)), None)

    @property
    def early_stopping_callback(self) -> Any:
        """The first `EarlyStopping`, or `None`."""
        return next((c for c in self.callbacks if type(c).__name__ == "EarlyStopping"), None)

    @property
    def logger(self) -> Any:
        """The first logger, or `None`."""
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str | None:
        """The folder of the first logger that has one."""
        return next((x.log_dir for x in self.loggers if x.log_dir is not None), None)

    @property
    def progress_bar_metrics(self) -> Numbers:
        """The latest numbers, without the epochs' aggregates."""
        return {
            name: value
            for name, value in self.callback_metrics.items()
            if not name.endswith("_epoch") and np.ndim(value) == 0
        }

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole fit; infinity where nobody can know."""
        return self._schedule.total_steps

    @property
    def num_training_batches(self) -> int | float:
        """Loader batches in an epoch; infinity where the loader has no length."""
        length = self._schedule.epoch_batches
        return math.inf if length is None else length

    @property
    def num_val_batches(self) -> list[int | float]:
        return _lengths(self._val_feeds)

    @property
    def num_test_batches(self) -> list[int | float]:
        return _lengths(self._eval_feeds.get("test", {}))

    @property
    def num_predict_batches(self) -> list[int | float]:
        return _lengths(self._eval_feeds.get("predict", {}))

    @property
    def data_wait_s(self) -> float:
        """Seconds that training has waited for data."""
        return 0.0 if self._run is None else self._run.feed.wait_s

    @property
    def compile_s(self) -> float:
        """Seconds spent on compiling."""
        own = 0.0 if self._run is None else self._run.program.compile_s
        return own + self._evaluator.compile_s

    @property
    def num_recompiles(self) -> int:
        """Compilations that nothing had announced."""
        own = 0 if self._run is None else self._run.program.recompilations
        return own + self._evaluator.recompilations

    @property
    def train_batch_spec(self) -> PyTree:
        """The shapes and dtypes of a loader's batch."""
        return self._run.batch_spec

    def lower_train_step(self) -> jax.stages.Lowered:
        """The training step as it is compiled: `.as_text()` is its StableHLO."""
        return self._run.program.lower(*self._run.usual_arguments())

    def train_step_jaxpr(self) -> Any:
        """The training step, for the usual batch, as a jaxpr."""
        return jax.make_jaxpr(self._run._traced_step)(*self._run.usual_arguments())

    def __getattr__(self, name: str) -> Any:
        """The arguments, under their names: `trainer.max_epochs`."""
        arguments = self.__dict__.get("_arguments")
        if arguments is None or name.startswith("_") or not hasattr(arguments, name):
            raise AttributeError(f"`Trainer` has no attribute `{name}`.")
        return getattr(arguments, name)


def _lengths(feeds: dict[str, Feed]) -> list[int | float]:
    return [math.inf if feed.length is None else feed.length for feed in feeds.values()]
