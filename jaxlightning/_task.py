"""What a user writes: the model and its objective, as pure methods on a pytree."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .parallel._rules import Rule

if TYPE_CHECKING:
    from ._callback import Callback
    from ._state import TrainState

_T = TypeVar("_T", bound="TaskModule")
_BUFFER = "jaxlightning_buffer"


class NotOfHyperparameters(TypeError):
    """A class can't be made of stored hyper-parameters alone: it takes `argument` too."""

    def __init__(self, message: str, argument: str):
        super().__init__(message)
        self.argument = argument


_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def buffer(**kwargs: Any) -> Any:
    """Declares a field whose arrays are part of the task but never trained.

        class Tracker(TaskModule):
            net: eqx.nn.MLP
            target: eqx.nn.MLP = jaxlightning.buffer()

    A step changes buffers by returning `(loss, metrics, task)`. Takes the arguments of
    `equinox.field`.
    """
    metadata = {**kwargs.pop("metadata", {}), _BUFFER: True}
    return eqx.field(metadata=metadata, **kwargs)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` is a floating-point or complex array, concrete or abstract."""
    array = isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    return array and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _trainable_flags(tree: PyTree) -> list[bool]:
    count = len(jax.tree.leaves(tree))
    if isinstance(tree, eqx.nn.State | eqx.nn.StateIndex):
        return [False] * count
    children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    if len(children) == 1 and children[0][1] is tree:
        return [is_inexact(tree)]
    buffers: set[str] = set()
    if isinstance(tree, eqx.Module):
        buffers = {f.name for f in dataclasses.fields(tree) if f.metadata.get(_BUFFER)}
    flags: list[bool] = []
    for path, child in children:
        if buffers and getattr(path[0], "name", None) in buffers:
            flags += [False] * len(jax.tree.leaves(child))
        else:
            flags += _trainable_flags(child)
    return flags


class TaskModule(eqx.Module):
    """A model and its objective. The task *is* the pytree that is trained.

        class Classifier(TaskModule):
            net: eqx.nn.MLP
            lr: float = eqx.field(static=True, default=1e-3)

            def training_step(self, batch, *, key):
                logits = jax.vmap(self.net)(batch["x"])
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
                return Mean.over(nll), {"accuracy": Accuracy.of(logits, batch["y"])}

            def configure_optimizers(self):
                return optax.adamw(self.lr)

    All methods are pure: they are traced once and compiled.
    """

    independent_examples: ClassVar[bool] = False
    """Whether examples do not see each other: each loss and metric is a sum over examples of what
    depends on one of them alone. Not so for batch normalisation, in-batch negatives or mixup.

    Results do not depend on it, but on several devices it saves time: where it is true, each takes
    the gradients of its own rows, and they are reduced once a step, not in every micro-batch or
    turn of a scan. Losses and metrics are then `Mean.over(...)` and the like, and no scalars.
    """
    gathered_in_scan: ClassVar[Sequence[str]] = ()
    """The paths of layers that are stacked along a leading axis and gathered one by one, in the
    scan over them, with [`gather_layer`][]. All other parameters are gathered once a step."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _explaining_fields(cls.__init__)  # type: ignore[method-assign]

    def training_step(self, batch: PyTree, *, key: PRNGKeyArray) -> Any:
        """The loss of one batch.

        **Returns:** `loss`, `(loss, metrics)` or `(loss, metrics, task)`.

        - `loss` is a [`Mean`][], a dict of Means (their sum is minimised, each is logged), or a
          scalar, which counts as a Mean of weight 1.
        - `metrics` maps names to metrics or scalars.
        - `task` hands back advanced buffers, such as batch-norm statistics. Only leaves that are
          not trainable are taken from it.
        """
        raise NotImplementedError(
            f"`{type(self).__name__}` has no `training_step`. Write "
            "`def training_step(self, batch, *, key): ...` and return a loss."
        )

    def validation_step(self, batch: PyTree, *, key: PRNGKeyArray) -> Any:
        """As `training_step`, in inference mode. `key` depends on the batch's index only, so
        that every validation asks the same questions."""
        return self.training_step(batch, key=key)

    def test_step(self, batch: PyTree, *, key: PRNGKeyArray) -> Any:
        """As `validation_step`, which is the default."""
        return self.validation_step(batch, key=key)

    def predict_step(self, batch: PyTree, *, key: PRNGKeyArray) -> PyTree:
        """Predictions: a pytree of arrays whose leading axis is the batch's."""
        raise NotImplementedError(
            f"`{type(self).__name__}` has no `predict_step`. Write "
            "`def predict_step(self, batch, *, key): ...` and return a pytree of arrays."
        )

    def check_batch(self, batch: PyTree) -> None:
        """Looks at the numbers of a batch, which a compiled step cannot do.

            def check_batch(self, batch):
                if batch["y"].max() >= self.classes:
                    raise ValueError(f"There is no class {batch['y'].max()}.")

        Called on the host, with numpy's arrays, of each batch that is read, in the thread that
        reads ahead; of several processes, each sees its own rows. Not called of batches whose
        arrays lie on the devices already, but for the first. An error that it raises ends the run
        where the batch would have been taken, and is told which batch that was.
        """

    def train_step(
        self, state: TrainState, batch: PyTree, *, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Any]]:
        """Override this to own the update (GANs, reinforcement learning).

        **Returns:** the state with `task` and `opt_state` replaced, and metrics. The step's
        counter and the metrics' sums are the Trainer's.
        """
        raise NotImplementedError

    def configure_optimizers(
        self,
    ) -> optax.GradientTransformation | dict[str, optax.GradientTransformation]:
        """An optax transformation, or a dict from this task's field names to transformations,
        each of which updates the trainable leaves of its field."""
        raise NotImplementedError(
            f"`{type(self).__name__}` has no `configure_optimizers`. Write "
            "`def configure_optimizers(self): return optax.adamw(1e-3)`."
        )

    def configure_callbacks(self) -> Sequence[Callback]:
        """Callbacks that this task brings along. One of the Trainer's of the same type wins."""
        return ()

    def trainable(self) -> PyTree[bool]:
        """Which leaves are trained: a pytree of bools, or a prefix of one.

        The default is every inexact array that is not a buffer. Override to freeze parts:

            def trainable(self):
                return eqx.tree_at(lambda t: t.encoder, super().trainable(), False)

        Fixed for a fit. Buffers are never trained, whatever this says.
        """
        return jax.tree.unflatten(jax.tree.structure(self), _trainable_flags(self))

    def partition_rules(self) -> Sequence[Rule]:
        """Rules `(regex on the leaf's path, PartitionSpec)` that precede the strategy's.

            def partition_rules(self):
                return [("ffn/weight", PartitionSpec(None, "tensor"))]

        A spec may be a function of the leaf's shape and the mesh. Axes that a run's mesh lacks are
        left out, so the rules can stay whatever the run.
        """
        return ()

    def hyperparameters(self) -> dict[str, Any]:
        """What is logged and stored as hyper-parameters: by default the static fields whose
        values JSON can hold. See `from_hyperparameters`."""
        found = {}
        for field in dataclasses.fields(self):
            if field.metadata.get("static"):
                value = getattr(self, field.name)
                if dataclasses.is_dataclass(value) and not isinstance(value, type):
                    value = dataclasses.asdict(value)
                if _is_json(value):
                    found[field.name] = value
        return found

    @classmethod
    def from_hyperparameters(
        cls: type[_T], hyperparameters: Mapping[str, Any], key: PRNGKeyArray
    ) -> _T:
        """The task that `hyperparameters()` describes, newly initialised.

        By default the class is called with those hyper-parameters that it takes, and with `key`
        if it takes that. Override both methods together where a task is made in another way.

        **Raises:** `TypeError` where the class has to be called with more.
        """
        takes = inspect.signature(cls).parameters.values()
        any_name = any(p.kind is p.VAR_KEYWORD for p in takes)
        known = {p.name for p in takes}
        given = {k: v for k, v in hyperparameters.items() if any_name or k in known}
        given |= {"key": key} if "key" in known else {}
        absent = [
            p.name
            for p in takes
            if p.default is p.empty and p.name not in given and p.kind not in _ANY_NUMBER
        ]
        if absent:
            raise NotOfHyperparameters(
                f"`{cls.__name__}` can't be made of its hyper-parameters {sorted(hyperparameters)}"
                f" alone, since it has to be called with `{absent[0]}`. Say how it is made: "
                f"`{cls.__name__}.load_from_checkpoint(path, make=lambda hyperparameters, key: "
                f"{cls.__name__}(...))`, or override `from_hyperparameters`.",
                absent[0],
            )
        return cls(**given)

    @classmethod
    def load_from_checkpoint(
        cls: type[_T],
        path: str | os.PathLike[str],
        /,
        *,
        make: Callable[[dict[str, Any], PRNGKeyArray], _T] | None = None,
        **changed: Any,
    ) -> _T:
        """The trained task out of a checkpoint, of a whole run or of weights only.

            task = Classifier.load_from_checkpoint("runs/a/checkpoints/step_0000001000")

        Its structure comes from the stored hyper-parameters. The initialiser is traced for that,
        once and without computing anything; all arrays come from the checkpoint. Where the run
        evaluated an average of its parameters, the task has that.

        **Arguments:**

        - `make`: a function of the hyper-parameters and a key, in place of `from_hyperparameters`.
        - `changed`: hyper-parameters that replace stored ones, or add to them. One that is named
          `make` can be changed by `make=` only: in that function.

        **Raises:** `ValueError` for the checkpoint of another class (what a checkpoint names is
        never imported), and where arrays or numbers of the task differ.
        """
        from ._weights import load_from_checkpoint

        return load_from_checkpoint(cls, path, make or cls.from_hyperparameters, changed)


def _explaining_fields(init: Callable[..., None]) -> Callable[..., None]:
    """`init`, which says how fields are declared where it sets one that is not."""

    @functools.wraps(init)
    def explained(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except dataclasses.FrozenInstanceError as error:
            error.add_note(
                "The fields of a `TaskModule` are declared in its class, as in a dataclass: "
                "`net: eqx.nn.MLP`, or for what is no array `lr: float = eqx.field(static=True)`."
            )
            raise

    return explained


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)


def trainable_spec(task: TaskModule) -> PyTree[bool]:
    """`task.trainable()` as one bool a leaf, never true for a buffer."""
    allowed = jax.tree.unflatten(jax.tree.structure(task), _trainable_flags(task))
    asked = task.trainable()
    try:
        spec = jax.tree.map(
            lambda ask, sub: jax.tree.map(lambda ok: bool(ask) and ok, sub), asked, allowed
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{type(task).__name__}.trainable()` has to return a pytree of bools with the task's "
            "structure, or a prefix of it. Start from `super().trainable()` and change parts with "
            f"`eqx.tree_at`. ({error})"
        ) from error
    if not any(jax.tree.leaves(spec)):
        raise ValueError(
            f"`{type(task).__name__}` has no trainable leaves: every array is a buffer, "
            "an integer, or excluded by `trainable()`."
        )
    return spec
