"""The Trainer: devices, programs, the loop and the bus, behind four verbs."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from . import _setup as setting_up
from ._arguments import ELSEWHERE, Arguments
from ._callback import Bus, Callback
from ._checks import refuses_unknown
from ._entry import entered
from ._evaluate import Evaluator
from ._facts import Facts
from ._init import TaskSource
from ._loop import evaluate, fit_loop, predict, say_why_stopped, validate_in_fit
from ._precision import Precision, cast_task
from ._program import compiler_options
from ._resume import check_asked, go_back, resolve, restore
from ._saver import Saver, reserve
from ._schedule import Position, Schedule
from ._signals import Signals
from ._sources import Sources
from ._stream import MetricStream, NoStream, Numbers
from ._task import TaskModule
from ._weights import load_weights
from .data import DataModule, Feed
from .parallel import Placement, initialise, make_mesh, pick_devices, placed, strategy_rules

_Task = TypeVar("_Task", bound=TaskModule)


class Trainer(Facts):
    """Trains and evaluates tasks: `Trainer(max_epochs=3).fit(task, loader)`.

    Arguments have PyTorch Lightning's names and meanings where both have them.

    **How long**

    - `max_epochs`, `max_steps`: limits, -1 for none; 1000 epochs if neither is set. Steps are
      those of the optimizer.
    - `min_epochs`, `min_steps`: requests to stop wait until both are met.
    - `max_time`: `"DD:HH:MM:SS"`, a timedelta, or its arguments as a dict.

    **How much data**

    - `limit_{train,val,test,predict}_batches`: batches of a loader that are used at most: an
      integer, or a float that is a fraction.
    - `overfit_batches`: train on the first so many batches, unshuffled, and validate on them.
    - `fast_dev_run`: run so many batches of everything (`True`: 1) and leave nothing behind.
    - `reload_dataloaders_every_n_epochs`: ask the `DataModule` for new loaders.

    **When what happens**

    - `val_check_interval`: batches between validations, or a fraction of an epoch.
    - `check_val_every_n_epoch`: validate in every n-th epoch; `None`: count batches across epochs.
    - `num_sanity_val_steps`: batches of validation before training; -1: all.
    - `log_every_n_steps`: the length of a log interval. `explain_schedule(n)` shows all this.

    **The step**

    - `accumulate_grad_batches`: batches of one step, exactly as if they were one batch.
    - `gradient_clip_val`, `gradient_clip_algorithm`: `"norm"` (default) or `"value"`.
    - `precision`: `"32-true"`, `"bf16-mixed"`, `"bf16-true"`, `"16-mixed"`, or a `Precision`.
    - `steps_per_dispatch`: steps in one compiled program. Blocks end where somebody looks.
    - `deterministic`: choose deterministic kernels on GPU; CPUs and TPUs have no others.
    - `detect_anomaly`: check every step; on NaN say in which operation it appears. Slow.
    - `on_recompile`: `"warn"`, `"raise"` or `"ignore"`, when shapes change during a run.
    - `seed`: of all randomness, which is a function of it and the step.

    **Devices**

    - `devices`: `"auto"` or -1 (all), a count, or a list of devices or of their indices.
    - `mesh`: sizes of `"data"`, `"fsdp"`, `"context"`, `"tensor"`: `{"data": -1}`; or a `Mesh`.
    - `strategy`: `"auto"` (what the mesh's axes ask for), `"ddp"`, `"fsdp"`, `"tensor"` (the task's
      rules), or rules `(regex on a leaf's path, PartitionSpec)`. See `explain_sharding`, `plan`.

    **What listens**

    - `callbacks`, `logger` (`True`: TensorBoard), `profiler` (`"jax"` or a callback),
      `enable_checkpointing`, `enable_progress_bar`, `enable_model_summary`.
    - `default_root_dir`: where files go, by default the current folder.
    - `barebones`: none of these, and no metrics: only the loop.

    **Raises:** `ValueError` or `TypeError` for arguments that are wrong or contradict each other.
    """

    @refuses_unknown("Trainer", ELSEWHERE)
    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | datetime.timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        limit_test_batches: int | float = 1.0,
        limit_predict_batches: int | float = 1.0,
        val_check_interval: int | float = 1.0,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        precision: str | Precision = "32-true",
        devices: int | str | Sequence[jax.Device | int] = "auto",
        strategy: str | Sequence[Any] = "auto",
        mesh: Mapping[str, int] | Mesh | None = None,
        deterministic: bool = False,
        fast_dev_run: bool | int = False,
        overfit_batches: int | float = 0,
        detect_anomaly: bool = False,
        profiler: str | Callback | None = None,
        barebones: bool = False,
        callbacks: Callback | Sequence[Callback] | None = None,
        logger: Any = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        reload_dataloaders_every_n_epochs: int = 0,
        steps_per_dispatch: int = 1,
        on_recompile: str = "warn",
        seed: int = 0,
    ):
        given = {k: v for k, v in locals().items() if k != "self"}
        listed = setting_up.listed_callbacks(callbacks)
        self._arguments = Arguments(**given)
        setting_up.refuse_switched_off(self._arguments, listed)
        self._given_callbacks = [
            *listed,
            *setting_up.built_in_callbacks(self._arguments, listed),
        ]
        self.default_root_dir = os.fspath(default_root_dir or os.getcwd())
        self.loggers = setting_up.make_loggers(self._arguments.logger, self.default_root_dir)
        self._default_folder = ("default_root_dir",) if logger in (None, True) else ()
        initialise()
        self.mesh = make_mesh(pick_devices(devices), self._arguments.mesh)
        self._placement = Placement(self.mesh)
        self._compiler_options = compiler_options(deterministic, self.mesh.devices.flat[0].platform)
        self.precision = Precision.named(precision)
        self._evaluator = Evaluator(
            self._placement_for, self.precision, on_recompile, self._compiler_options
        )
        self._bus = Bus(self._given_callbacks)
        self._signals = Signals()
        self._saver = Saver()
        self._run = None  # type: ignore[assignment]
        self._start, self._asked = Position(), {}
        self._stream: MetricStream = NoStream()
        self._schedule = Schedule(None)
        self._sources: Sources = None  # type: ignore[assignment]
        self._check_batch: Callable[[PyTree], None] = lambda batch: None
        self._val_feeds: dict[str, Feed] = {}
        self._eval_feeds: dict[str, dict[str, Feed]] = {}
        self._callback_states: dict[str, Any] | None = None
        self._stage_entry: str | None = None
        self.stage: str | None = None
        self.should_stop = False
        self.stop_reason: str | None = None
        self._remembered_stop: str | None = None
        self._fitted: Any = None
        self.batch_idx = 0
        self.callback_metrics: Numbers = {}
        self.logged_metrics: Numbers = {}

    # The four verbs

    def fit(
        self,
        task: _Task | Callable[[PRNGKeyArray], _Task],
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        resume: str | None = None,
        allow_changes: bool = False,
    ) -> _Task:
        """Trains `task`, which is left alone, and returns the trained one.

        **Arguments:**

        - `task`: a task, or a function `key -> task`, which is then initialised inside jit, so
          that no device ever holds more than its share.
        - `train_dataloaders`: a `DataLoader`, any iterable of batches, or a `DataModule`.
        - `val_dataloaders`: the same, or several by name in a dict.
        - `ckpt_path`: `"last"`, `"best"` or a path: go on from there, or fail.
        - `resume`: `"auto"`: go on from the latest checkpoint, or start where there is none.
        - `allow_changes`: go on although data, optimizer or other configuration are not those of
          the checkpoint, with a warning that lists the differences. Parameters have to fit anyway;
          an optimizer's state that does not begins anew.

        A run that goes on is the run that it would have been, bit for bit, with the same versions
        of packages and on as many devices. Limits such as `max_epochs` may be raised.
        """
        check_asked(ckpt_path, resume, allow_changes)
        setting_up.refuse_nested(self, "fit")
        checkpoint = ckpt_path if resume is None else resume
        passed = {"train": train_dataloaders, "val": val_dataloaders}
        sources = Sources("fit", passed, datamodule)
        if self._arguments.reload_dataloaders_every_n_epochs and not sources.from_module:
            raise ValueError(
                "`reload_dataloaders_every_n_epochs` asks a `DataModule` for new loaders, but "
                "`fit` got loaders. Pass a `DataModule`."
            )
        source = TaskSource(task)
        self._begin_fit()
        self._fitted = task
        with entered(self, "fit", sources, source.task, checkpoint):
            reserve(self, make=False)
            path = None if checkpoint is None else go_back(self, checkpoint)
            feed = setting_up.open_data(self)
            self._run = run = setting_up.build_fit(self, source, task, feed)
            self._stream = stream = setting_up.make_stream(self, run)
            setting_up.check_agreement(self)
            if (
                checkpoint is None
                or restore(self, run, stream, checkpoint, path, allow_changes) is None
            ):
                run.initialise()
            reserve(self, make=True)
            self._signals.defer(saves=bool(self._arguments.enable_checkpointing))
            self._log_hyperparameters(source.task)
            self._bus.on_fit_start(self)
            run.compile(self._signals.poll)
            self._sanity_check()
            with self._stage_of("train"):
                self._bus.on_train_start(self)
                fit_loop(self, run, stream)
                run.wait()
                stream.flush()
                self._bus.on_checkpoint(self, "end")
                self._save_requested()
                self._bus.on_train_end(self)
            say_why_stopped(self, run)
            self._bus.on_fit_end(self)
            self._save_requested()
        trained: Any = self._bus.evaluation_task(self, self._run.state.task)
        return trained

    def validate(
        self,
        task: TaskModule | None = None,
        dataloaders: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> Numbers:
        """Evaluates `validation_step` over whole loaders; returns `{"val/...": number}`.

        `task` is by default that of the latest fit; `ckpt_path` (`"best"`, `"last"` or a path)
        loads its arrays first.
        """
        stage = ("validate", "validation", "val")
        return self._evaluate(*stage, task, dataloaders, datamodule, ckpt_path)

    def test(
        self,
        task: TaskModule | None = None,
        dataloaders: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> Numbers:
        """As `validate`, for `test_step`; returns `{"test/...": number}`."""
        stage = ("test", "test", "test")
        return self._evaluate(*stage, task, dataloaders, datamodule, ckpt_path)

    def predict(
        self,
        task: TaskModule | None = None,
        dataloaders: Any = None,
        *,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        return_predictions: bool = True,
    ) -> Any:
        """Runs `predict_step` over whole loaders.

        **Returns:** what the step returns, as numpy arrays over all examples; by name for several
        loaders. `None` without `return_predictions`, for callbacks that write predictions.
        """
        with self._evaluating("predict", "predict", task, dataloaders, datamodule, ckpt_path) as (
            concrete,
            key,
        ):
            found = predict(self, self._eval_feeds["predict"], concrete, key, return_predictions)
        if not return_predictions:
            return None
        return found[""] if list(found) == [""] else found

    def _evaluate(
        self, entry: str, stage: str, kind: str, task: Any, loaders: Any, module: Any, path: Any
    ) -> Numbers:
        with self._evaluating(entry, kind, task, loaders, module, path) as (concrete, key):
            return evaluate(self, stage, self._eval_feeds[kind], concrete, key)

    @contextlib.contextmanager
    def _evaluating(
        self, entry: str, kind: str, task: Any, loaders: Any, module: Any, path: Any
    ) -> Iterator[tuple[TaskModule, PRNGKeyArray]]:
        """Around an evaluation: the task on the devices, the data opened."""
        setting_up.refuse_nested(self, entry)
        sources = Sources(entry, {kind: loaders}, module)
        fitted = task is None
        if task is None:
            if self._run is None:
                raise ValueError(
                    f"`{entry}` got no task, and nothing has been fitted. Pass a task."
                )
            task = self._bus.evaluation_task(self, self._run.state.task)
        if not isinstance(task, TaskModule):
            what = f"class `{task.__name__}`" if isinstance(task, type) else type(task).__name__
            raise TypeError(f"`{entry}` got the {what} as its task. Pass a `TaskModule`.")
        found_by_version = path if path in ("best", "last") else None
        with entered(self, entry, sources, task, found_by_version):
            if path is not None:
                task = load_weights(resolve(self, path), task)
            if not fitted or path is not None:
                task = self._placed_task(task)
            limit = getattr(self._arguments, f"limit_{kind}_batches")
            feeds = setting_up.make_feeds(self, sources.loaders(kind), kind, limit)
            if not feeds:
                raise ValueError(
                    f"`{entry}` has nothing to do: there are no {kind} loaders, or "
                    f"`limit_{kind}_batches` is 0."
                )
            self._eval_feeds[kind] = feeds
            (key,) = placed([jax.random.key(self.seed)], [self._placement.replicated])
            self._signals.defer(saves=False)
            with self._stage_of(entry):
                yield task, key

    def _placed_task(self, task: TaskModule) -> TaskModule:
        task = cast_task(task, self.precision.params)
        arrays, static = eqx.partition(task, eqx.is_array)
        shardings = self._placement_for(task).of_state({"task": arrays})
        leaves, structure = jax.tree.flatten(arrays)
        return eqx.combine(jax.tree.unflatten(structure, placed(leaves, shardings)), static)

    def _placement_for(self, task: TaskModule, mesh: Mesh | None = None) -> Placement:
        strategy = strategy_rules(self._arguments.strategy)
        rules = [*task.partition_rules(), *strategy]
        return Placement(mesh or self.mesh, rules, task.gathered_in_scan)

    # The parts of a fit

    def _begin_fit(self) -> None:
        self.should_stop, self.stop_reason, self._remembered_stop = False, None, None
        self._run = None  # type: ignore[assignment]
        self._start = Position()
        self._callback_states = None
        self.callback_metrics, self.logged_metrics = {}, {}

    def _log_hyperparameters(self, task: TaskModule) -> None:
        if self.loggers:
            parameters = setting_up.hyperparameters(self, task)
            for logger in self.loggers:
                logger.log_hyperparams(parameters)

    def _sanity_check(self) -> None:
        steps = self._arguments.num_sanity_val_steps
        if not steps or not self._val_feeds:
            return
        self._bus.on_sanity_check_start(self)
        validate_in_fit(self, self._run, limit=steps if steps > 0 else 2**31)
        self._bus.on_sanity_check_end(self)

    def _reload_data(self) -> None:
        every = self._arguments.reload_dataloaders_every_n_epochs
        if every and self.current_epoch - self._asked["position"]["epoch"] >= every:
            self._reopen_data()
            self._run.compile(self._signals.poll)

    def _reopen_data(self) -> None:
        replaced = setting_up.open_feeds(self)
        self._run.go_on_with(setting_up.open_data(self))
        kept = [feed.loader for feed in setting_up.open_feeds(self)]
        for feed in replaced:
            if not any(feed.loader is loader for loader in kept):
                feed.close()
        self._run.plan(self._schedule, self._bus.needs_state)

    @contextlib.contextmanager
    def _stage_of(self, stage: str) -> Iterator[None]:
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before

    # What the loop asks

    def _is_over(self) -> bool:
        at = self._run.position
        if self._schedule.finished(at):
            return True
        return self.should_stop and self._schedule.may_stop(at)

    def _validation_due(self) -> bool:
        """By the schedule, or, as in Lightning, because the fit is about to be stopped."""
        at, schedule = self._run.position, self._schedule
        if schedule.validates_at(at):
            return True
        if not (self.should_stop and schedule.validates and schedule.may_stop(at)):
            return False
        return schedule.val_epochs is None or (at.epoch + 1) % schedule.val_epochs == 0

    def _deliver(self, numbers: Numbers, step: int) -> None:
        """The metrics of a log interval have reached the host."""
        self.callback_metrics |= numbers
        self._bus.on_log(self, numbers, step)
        self._record(numbers, step)

    def _record(self, numbers: Numbers, step: int | None = None) -> None:
        """Makes numbers known to callbacks and loggers."""
        if not numbers:
            return
        step = self.global_step if step is None else step
        self.callback_metrics |= numbers
        scalars = {name: value for name, value in numbers.items() if np.ndim(value) == 0}
        self.logged_metrics = scalars
        for logger in self.loggers:
            logger.log_metrics(scalars, step)

    def _save_requested(self) -> None:
        if self._saver.asked:
            self._signals.check()
            self._stream.flush()
            self._saver.save(self)

    # For callbacks and users

    def stop(self, reason: str, *, remembered: bool = True) -> None:
        """Asks the fit to stop after this step, once `min_epochs` and `min_steps` are met.

        A run that goes on from a checkpoint of later is asked again, unless it is not to be
        `remembered`: by callbacks that decide anew from their own state.
        """
        self.should_stop, self.stop_reason = True, reason
        self._remembered_stop = reason if remembered else self._remembered_stop

    def rewind(self, step: int, reason: str) -> None:
        """Asks the fit to go back, after this step, to the latest checkpoint of `step` or before.

        It goes on from there with the data that comes now: the batches taken since are skipped,
        also by a run that resumes later. Undone are the state, the callbacks' decisions (see
        `Callback.take_back`), what was logged, and requests to stop; checkpoints of this run that
        were taken in between are deleted. Validation and whatever else is due now is due still.
        Where there is no such checkpoint, that is warned of, and the fit goes on as it is.

        **Arguments:**

        - `reason`: a sentence to be printed with what was done.
        """
        if self._stage_entry != "fit" or self._run is None:
            raise RuntimeError("`rewind` takes a fit back, and none is under way.")
        before = self._run.rewind_request
        if before is None or step < before[0]:
            self._run.rewind_request = step, reason

    def log(self, name: str, value: Any) -> None:
        """Logs one number now, at the current step. A value on the device is waited for."""
        self.log_dict({name: value})

    def log_dict(self, metrics: Mapping[str, Any]) -> None:
        """Logs several numbers now, at the current step."""
        self._record({name: float(value) for name, value in metrics.items()})

    def save_checkpoint(self, path: str | os.PathLike[str], weights_only: bool = False) -> None:
        """Saves to the folder `path`.

        During a fit it is taken after the current step and all that it causes, and blocks for the
        copy to the host only. At other times it is on the disk on return.
        """
        if self._run is None:
            raise RuntimeError("There is nothing to save before `fit`.")
        self._saver.request(path, weights_only)
        if self._stage_entry != "fit":
            self._saver.save_now(self)

    def wait_for_checkpoints(self) -> None:
        """Returns when all checkpoints are on the disk."""
        self._saver.wait()

    def delete_checkpoint(self, path: str | os.PathLike[str]) -> None:
        self._saver.delete(path)
