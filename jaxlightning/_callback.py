"""The callback bus: what may listen to a run, and in which order it is told.

    class PrintLoss(Callback):
        def on_log(self, trainer, metrics, step):
            print(step, metrics["train/loss"])

    Trainer(callbacks=[PrintLoss()]).fit(task, data)

Hooks on the host carry PyTorch Lightning's names. Three hooks are traced: `wrap_optimizer`,
`inside_step` and `accept_step` become part of the one compiled step. A hook that nobody overrides
costs nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import optax
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ._say import warn
from ._signals import Interrupted

if TYPE_CHECKING:
    from ._state import Skipped
    from ._task import TaskModule
    from ._trainer import Trainer

__all__ = ["Bus", "Callback", "Checkpoint", "InsideStep"]


class InsideStep(NamedTuple):
    """What a traced hook sees of the step it is part of. All leaves are tracers."""

    step: Int[Array, ""]
    loss: Shaped[Array, ""]
    params: PyTree
    """The trainable leaves before the update; `None` elsewhere."""
    grads: PyTree
    """Gradients of `loss`, in the parameters' structure, unscaled and unclipped."""
    updates: PyTree
    """What the optimizer adds to `params`."""
    opt_state: PyTree
    """The optimizer's state after the update."""
    skipped: Skipped | None
    """Counts of steps refused so far, this one included; `None` inside `accept_step`."""


class Callback:
    """Base class of everything that listens to a run. Override what you need.

    Every hook gets the [`Trainer`][] first. `trainer.state` is a view that is valid during the
    call: its buffers are donated to the next step. To keep arrays, copy them
    (`jax.tree.map(jnp.copy, trainer.state)`).
    """

    outermost: bool = False
    """Whether `wrap_optimizer` is applied after that of all other callbacks."""
    max_in_a_row: int | None = None
    """Of one with `accept_step`: after so many refused steps, one after the other, none is taken
    any more, so that the state stays as it was when the host hears of them."""

    # Lifecycle

    def setup(self, trainer: Trainer, stage: str) -> None:
        """Before anything else. `stage`: `"fit"`, `"validate"`, `"test"` or `"predict"`."""

    def teardown(self, trainer: Trainer, stage: str) -> None:
        """After everything else, also after an exception."""

    def on_fit_start(self, trainer: Trainer) -> None: ...
    def on_fit_end(self, trainer: Trainer) -> None: ...
    def on_sanity_check_start(self, trainer: Trainer) -> None: ...
    def on_sanity_check_end(self, trainer: Trainer) -> None: ...
    def on_train_start(self, trainer: Trainer) -> None: ...
    def on_train_end(self, trainer: Trainer) -> None: ...
    def on_train_epoch_start(self, trainer: Trainer) -> None: ...
    def on_train_epoch_end(self, trainer: Trainer) -> None: ...

    def on_train_batch_start(self, trainer: Trainer, batch: PyTree, batch_idx: int) -> None:
        """Before a step is dispatched; in a block of `steps_per_dispatch`, after all of it was.

        `batch` is on the device; with accumulation, a list, also of one.
        """

    def on_train_batch_end(
        self, trainer: Trainer, outputs: Mapping[str, Any], batch: PyTree, batch_idx: int
    ) -> None:
        """After a step was dispatched, most likely before it has run.

        `outputs` maps names to this step's metrics, on the device. Reading them here
        (`float(outputs["loss"])`) waits for the device at every step: use `on_log` instead.
        """

    def on_validation_start(self, trainer: Trainer) -> None: ...
    def on_validation_end(self, trainer: Trainer) -> None: ...
    def on_validation_epoch_start(self, trainer: Trainer) -> None: ...
    def on_validation_epoch_end(self, trainer: Trainer) -> None: ...
    def on_validation_batch_start(
        self, trainer: Trainer, batch: PyTree, batch_idx: int, dataloader_idx: int
    ) -> None: ...
    def on_validation_batch_end(
        self, trainer: Trainer, outputs: Any, batch: PyTree, batch_idx: int, dataloader_idx: int
    ) -> None: ...

    def on_test_start(self, trainer: Trainer) -> None: ...
    def on_test_end(self, trainer: Trainer) -> None: ...
    def on_test_epoch_start(self, trainer: Trainer) -> None: ...
    def on_test_epoch_end(self, trainer: Trainer) -> None: ...
    def on_test_batch_start(
        self, trainer: Trainer, batch: PyTree, batch_idx: int, dataloader_idx: int
    ) -> None: ...
    def on_test_batch_end(
        self, trainer: Trainer, outputs: Any, batch: PyTree, batch_idx: int, dataloader_idx: int
    ) -> None: ...

    def on_predict_start(self, trainer: Trainer) -> None: ...
    def on_predict_end(self, trainer: Trainer) -> None: ...
    def on_predict_epoch_start(self, trainer: Trainer) -> None: ...
    def on_predict_epoch_end(self, trainer: Trainer) -> None: ...
    def on_predict_batch_start(
        self, trainer: Trainer, batch: PyTree, batch_idx: int, dataloader_idx: int
    ) -> None: ...
    def on_predict_batch_end(
        self, trainer: Trainer, outputs: Any, batch: PyTree, batch_idx: int, dataloader_idx: int
    ) -> None: ...

    def on_exception(self, trainer: Trainer, exception: BaseException) -> None: ...

    # Ours

    def on_log(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        """The metrics of the log interval that ended at `step`, on the host.

        Delivered one interval late (so that nobody waits for the device), or earlier where
        something forces them: validation, a checkpoint, the end of an epoch or of the fit.
        Entries added to `metrics` reach the loggers too.
        """

    def on_checkpoint(self, trainer: Trainer, point: str) -> None:
        """The one place to save. `point` says what has just been settled:

        - `"step"`: a step and all it caused (log, validation);
        - `"epoch"`: an epoch, `on_train_epoch_end` included;
        - `"end"`: the fit, before `on_train_end`;
        - `"exception"`: nothing; an exception is under way.
        """

    # State

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint. Has to differ between instances."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def take_back(self, state: dict[str, Any]) -> None:
        """As `load_state_dict`, in the middle of a run that goes back to a checkpoint (see
        `Trainer.rewind`). Override it to keep what is true of the process, such as time spent."""
        self.load_state_dict(state)

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None: ...

    # Declarations

    def needs_state(self, step: int) -> bool:
        """Whether this callback reads or replaces `trainer.state` after global step `step`.

        Blocks of `steps_per_dispatch` steps end there.
        """
        return False

    def monitors(self) -> Sequence[str]:
        """Names of the metrics this callback depends on. Checked before any data is read."""
        return ()

    def provides(self) -> Sequence[str]:
        """Names of metrics that this callback logs itself, so that others may monitor them."""
        return ()

    def evaluation_task(self, trainer: Trainer, task: TaskModule) -> TaskModule:
        """The task that is evaluated, and returned by `fit`, in place of `task`."""
        return task

    # Traced

    def wrap_optimizer(
        self, trainer: Trainer, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Optax composition: clipping, schedules, averaging, freezing."""
        return tx

    def inside_step(self, view: InsideStep) -> dict[str, Any]:
        """Metrics (or scalars, which are averaged) computed inside the compiled step."""
        return {}

    def accept_step(self, view: InsideStep) -> Bool[Array, ""]:
        """Whether the step counts. Where this is false, parameters, optimizer state and buffers
        stay bitwise as they were."""
        raise NotImplementedError


class Checkpoint(Callback):
    """Marks callbacks that save. They are told last, whatever their place in the list."""


def overrides(callback: Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(Callback, hook)


_NOT_BROADCAST = {
    "state_key", "state_dict", "load_state_dict", "take_back", "needs_state", "monitors",
    "provides", "evaluation_task",
    "wrap_optimizer", "inside_step", "accept_step", "outermost",
}  # fmt: skip
_HOOKS = [
    name for name in vars(Callback) if not name.startswith("_") and name not in _NOT_BROADCAST
]


def _nobody(*args: Any) -> None:
    pass


def _check_signature(callback: Callback, hook: str) -> None:
    """**Raises:** `TypeError` for a hook that can't take what it will be called with, such as one
    written for Lightning, where the module comes second."""
    takes = inspect.signature(getattr(callback, hook))
    gets = list(inspect.signature(getattr(Callback, hook)).parameters)[1:]
    try:
        takes.bind(*gets)
    except TypeError:
        raise TypeError(
            f"The hook `{hook}` of `{type(callback).__qualname__}` takes {takes}, but is called "
            f"with ({', '.join(gets)}). Write `def {hook}({', '.join(['self', *gets])}): ...`."
        ) from None


@contextlib.contextmanager
def _blamed(callback: Callback, hook: str) -> Iterator[None]:
    """Around a hook that is not broadcast: says whose it was that raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by the callback `{type(callback).__qualname__}` in `{hook}`.")
        raise


def _broadcast(hook: str, listeners: Sequence[Callback]) -> Callable[..., None]:
    calls = [(getattr(callback, hook), callback) for callback in listeners]

    def emit(trainer: Trainer, *args: Any) -> None:
        callback: Callback | None = None
        try:
            for call, callback in calls:  # noqa: B007 (the note below names it)
                try:
                    call(trainer, *args)
                except Interrupted:
                    # A run of another Trainer in this hook was interrupted. This one knows, and
                    # ends where it can be saved exactly, which is not within a hook.
                    if not trainer._signals.deferring:
                        raise
        except Exception as error:
            error.add_note(
                f"Raised by the callback `{type(callback).__qualname__}` in its hook `{hook}` at "
                f"global step {trainer.global_step} (epoch {trainer.current_epoch})."
            )
            raise

    return emit


class Bus(Callback):
    """Several callbacks as one: each hook calls that hook of those callbacks that override it."""

    def __init__(self, callbacks: Sequence[Callback]):
        last = [c for c in callbacks if isinstance(c, Checkpoint)]
        self.callbacks = [*(c for c in callbacks if not isinstance(c, Checkpoint)), *last]
        for hook in _HOOKS:
            listeners = [c for c in self.callbacks if overrides(c, hook)]
            for callback in listeners:
                _check_signature(callback, hook)
            setattr(self, hook, _broadcast(hook, listeners) if listeners else _nobody)
        self._state_readers = [c for c in self.callbacks if overrides(c, "needs_state")]
        self.observers = [c for c in self.callbacks if overrides(c, "inside_step")]
        self.judges = [c for c in self.callbacks if overrides(c, "accept_step")]
        limits = [c.max_in_a_row for c in self.judges if c.max_in_a_row is not None]
        self.max_in_a_row = min(limits, default=None)
        self.saves = any(overrides(c, "on_checkpoint") for c in self.callbacks)
        keys = [c.state_key for c in self.callbacks if overrides(c, "state_dict")]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(
                f"Two callbacks have the same `state_key`, `{twice[0]}`, so a checkpoint could not "
                "tell their states apart. Give them different arguments, or override `state_key`."
            )

    def needs_state(self, step: int) -> bool:
        callback: Callback | None = None
        try:
            for callback in self._state_readers:
                if callback.needs_state(step):
                    return True
        except Exception as error:
            # Asked at every step: a context manager would cost more than the question.
            error.add_note(
                f"Raised by the callback `{type(callback).__qualname__}` in `needs_state({step})`."
            )
            raise
        return False

    def monitors(self) -> list[str]:
        return self._declared("monitors")

    def provides(self) -> list[str]:
        return self._declared("provides")

    def _declared(self, what: str) -> list[str]:
        found: list[str] = []
        for callback in self.callbacks:
            with _blamed(callback, what):
                found += getattr(callback, what)()
        return found

    def evaluation_task(self, trainer: Trainer, task: TaskModule) -> TaskModule:
        for callback in self.callbacks:
            with _blamed(callback, "evaluation_task"):
                task = callback.evaluation_task(trainer, task)
        return task

    def wrap_optimizer(
        self, trainer: Trainer, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        for callback in sorted(self.callbacks, key=lambda c: c.outermost):
            with _blamed(callback, "wrap_optimizer"):
                tx = callback.wrap_optimizer(trainer, tx)
                if not isinstance(tx, optax.GradientTransformation):
                    raise TypeError(
                        f"It returned a `{type(tx).__name__}`. Return an optax transformation: "
                        "the one that was given, or one around it."
                    )
        return tx

    def inside_step(self, view: InsideStep) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for callback in self.observers:
            with _blamed(callback, "inside_step"):
                found |= callback.inside_step(view)
        return found

    def accept_step(self, view: InsideStep) -> Bool[Array, ""]:
        verdicts = []
        for judge in self.judges:
            with _blamed(judge, "accept_step"):
                verdicts.append(judge.accept_step(view))
        return reduce(operator.and_, verdicts)

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for callback in self.callbacks:
            if overrides(callback, "state_dict"):
                with _blamed(callback, "state_dict"):
                    found[callback.state_key] = callback.state_dict()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warns of states that no callback takes: their decisions start afresh."""
        if lost := sorted(set(state) - {callback.state_key for callback in self.callbacks}):
            warn(
                f"The checkpoint has the states of callbacks that this run does not have: "
                f"{', '.join(f'`{key}`' for key in lost)}. If one of them was only changed, it "
                "starts afresh.",
            )
        for callback in self.callbacks:
            if callback.state_key in state:
                with _blamed(callback, "load_state_dict"):
                    callback.load_state_dict(state[callback.state_key])

    def take_back(self, state: dict[str, Any]) -> None:
        for callback in self.callbacks:
            if callback.state_key in state:
                with _blamed(callback, "take_back"):
                    callback.take_back(state[callback.state_key])
