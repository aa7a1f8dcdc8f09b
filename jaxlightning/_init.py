"""The first state of a run: built inside one non-donating program, sharded from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import PRNGKeyArray, PyTree

from ._metrics import Metric
from ._precision import Precision, cast_task
from ._state import LossScale, Skipped, TrainState
from ._step import INIT, step_key
from ._task import TaskModule, trainable_spec
from .parallel import leaf_path


class TaskSource:
    """A task, or a function `key -> task` that will make it: abstract now, concrete inside jit.

    The function is traced once and that trace is used from then on, because two runs of an
    initialiser may give trees that do not compare equal (those of `eqx.nn.BatchNorm` do not).
    """

    def __init__(self, source: TaskModule | Callable[[PRNGKeyArray], TaskModule]):
        if isinstance(source, TaskModule):
            _check_shared(source)
            self.given, static = eqx.partition(source, eqx.is_array)
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.given)
            self._make: Callable[[PyTree, PRNGKeyArray], PyTree] = _copied
        else:
            abstract, static, self._make = _traced(source)
            self.given = None
        self.task: TaskModule = eqx.combine(abstract, static)
        """The task with abstract arrays."""
        self._static = static

    def make(self, given: PyTree, key: PRNGKeyArray) -> TaskModule:
        """The task, inside jit. `given` is `self.given`, passed as an argument."""
        return eqx.combine(self._make(given, key), self._static)


def _copied(given: PyTree, key: PRNGKeyArray) -> PyTree:
    # Without the copy JAX hands inputs through, and donating the state would delete them.
    return jax.tree.map(jnp.copy, given)


def _traced(source: Any) -> tuple[PyTree, PyTree, Callable[[PyTree, PRNGKeyArray], PyTree]]:
    is_model = isinstance(source, eqx.Module) and bool(jax.tree.leaves(source))
    if isinstance(source, type) or is_model or not callable(source):
        what = f"the class `{source.__name__}`" if isinstance(source, type) else f"`{source!r}`"
        if is_model:
            what = f"a `{type(source).__name__}`, which is a model, but says nothing of a loss"
        raise TypeError(
            f"The task is {what}. Pass an instance of a `TaskModule`, or a function of a key that "
            "returns one: `lambda key: Classifier(key=key)`."
        )
    static: Any = None

    def arrays(key: PRNGKeyArray) -> PyTree:
        nonlocal static
        try:
            task = source(key)
        except Exception as error:
            error.add_note("Raised by the function that was passed as the task.")
            raise
        if not isinstance(task, TaskModule):
            raise TypeError(
                f"The function that was passed as the task returned a `{type(task).__name__}`. It "
                "has to return a `TaskModule`."
            )
        dynamic, static = eqx.partition(task, eqx.is_array)
        return dynamic

    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr, abstract = jax.make_jaxpr(arrays, return_shape=True)(key)
    structure = jax.tree.structure(abstract)

    def make(given: PyTree, key: PRNGKeyArray) -> PyTree:
        return jax.tree.unflatten(structure, jaxpr_as_fun(jaxpr)(key))

    return abstract, static, make


def _check_shared(task: TaskModule) -> None:
    seen: dict[int, str] = {}
    trained = jax.tree.leaves(trainable_spec(task))
    leaves = jax.tree_util.tree_flatten_with_path(task)[0]
    for (path, leaf), is_trained in zip(leaves, trained, strict=True):
        if not is_trained:
            continue
        name = leaf_path(path)
        if id(leaf) in seen:
            raise ValueError(
                f"`{seen[id(leaf)]}` and `{name}` of `{type(task).__name__}` are the same array, "
                "but would be trained apart. Tie them with `eqx.nn.Shared`, or copy one with "
                "`jnp.copy`."
            )
        seen[id(leaf)] = name


def call_configured(function: Callable[..., Any], task: TaskModule, method: str) -> Any:
    """Calls a task's method outside jit, and explains what abstract arrays can't do there."""
    try:
        return function()
    except TypeError as error:
        if "ShapeDtypeStruct" not in str(error):
            raise
        raise TypeError(
            f"`{type(task).__name__}.{method}` needs the values of arrays, but the task is "
            "initialised later, inside jit, as a function `key -> task` was passed. Keep what it "
            "needs in static fields, or pass an initialised task."
        ) from error


def state_builder(
    source: TaskSource, spec: PyTree[bool], tx: Any, precision: Precision, *, counts_skipped: bool
) -> Callable[[PyTree, PRNGKeyArray], TrainState]:
    """The function of `(source.given, root key)` that builds the state, all but its metrics."""

    def build(given: PyTree, root: PRNGKeyArray) -> TrainState:
        task = cast_task(source.make(given, step_key(root, INIT, 0)), precision.params)
        opt_state = tx.init(eqx.filter(task, spec))
        state = TrainState(
            step=jnp.int32(0),
            key=jnp.copy(root),
            task=task,
            opt_state=opt_state,
            metrics={},
            loss_scale=LossScale.initial() if precision.scale_loss else None,
            skipped=Skipped.none() if counts_skipped else None,
        )
        return jax.tree.map(strong, state)

    return build


def strong(leaf: Any) -> Any:
    """An array without its weak type, which the first step would change: a recompilation."""
    if isinstance(leaf, jax.Array) and getattr(leaf, "weak_type", False):
        return jax.lax.convert_element_type(leaf, leaf.dtype)
    return leaf


def empty_metrics(like: dict[str, Metric]) -> dict[str, Metric]:
    """Neutral elements, inside or outside jit, from abstract metrics."""
    return {
        name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metric).empty()
        for name, metric in like.items()
    }
