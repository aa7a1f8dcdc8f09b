"""The pure steps: free functions from a state and a batch to a state and metrics.

Everything the Trainer compiles is here, and can be called without a Trainer:

    step = TrainStep(spec, tx)
    state, metrics = jax.jit(step)(state, batch)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ._callback import Bus, InsideStep
from ._metrics import Mean, Metric
from ._outputs import Outputs, as_metrics, read_outputs
from ._per_shard import draws_on_shards, gradients_per_shard
from ._precision import Precision, cast, cast_task
from ._state import LossScale, TrainState
from ._task import TaskModule
from .parallel import Placement
from .parallel._context import gathered
from .parallel._randomness import NotByRows

_Carry = TypeVar("_Carry")
_M = TypeVar("_M", bound=Metric)

Weights = dict[str, Float[Array, ""]]
Across = Callable[[Weights], Weights]

TRAIN, VALIDATE, TEST, PREDICT, INIT = range(5)
"""The streams of randomness: `fold_in(fold_in(root, stream), step)`."""


def step_key(root: PRNGKeyArray, stream: int, step: Int[Array, ""] | int) -> PRNGKeyArray:
    """The key of one step of one stream. A function, never carried."""
    return jax.random.fold_in(jax.random.fold_in(root, stream), step)


def total_loss(terms: dict[str, Mean], weights: Weights | None = None) -> Float[Array, ""]:
    """The sum over terms of total / weight, differentiable in the totals only.

    `weights` are those of the whole global batch, by default the terms' own. A term of weight 0
    counts as 0.
    """
    loss = jnp.float32(0.0)
    for name, term in terms.items():
        weight = jax.lax.stop_gradient(term.weight if weights is None else weights[name])
        loss += jnp.where(weight == 0, 0.0, term.total / jnp.where(weight == 0, 1.0, weight))
    return loss


def keep_where(accepted: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` where `accepted`, else bitwise `old`."""

    def one(a: Any, b: Any) -> Any:
        return jnp.where(accepted, a, b) if eqx.is_array(a) else a

    return jax.tree.map(one, new, old)


def computed_once(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """`flag`, which XLA would else compute again in each loop that reads it: for a verdict over
    all leaves in the update of each leaf, which made a small ALBERT's step half as long again to
    compile. A cumulative minimum is fused into no loop. (On CPUs XLA drops `optimization_barrier`
    before it fuses.)"""
    return jax.lax.cummin(jnp.stack([flag, flag]).astype(jnp.int32))[-1] > 0


class MicroBatches(NamedTuple):
    """The batches of one step under gradient accumulation: equal ones, then a smaller one."""

    equal: Sequence[PyTree]
    ragged: PyTree | None = None


class TrainStep(NamedTuple):
    """One optimizer step: `state, metrics = step(state, batch)`."""

    spec: PyTree[bool]
    """Which leaves of the task are trained; see `trainable_spec`."""
    tx: optax.GradientTransformationExtraArgs
    precision: Precision = Precision()
    bus: Bus = Bus(())
    collect: bool = True
    """Whether metrics are summed into the state."""
    placement: Placement | None = None
    """Where the state lives, on several devices."""

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Metric]]:
        """`batch` may be `MicroBatches`, over which the step accumulates exactly."""
        key = step_key(state.key, TRAIN, state.step)
        if owns_update(state.task):
            after, found = state.task.train_step(state, batch, key=key)
            metrics = as_metrics(found, "train_step")
            state = state.replace(task=after.task, opt_state=after.opt_state)
        else:
            state, metrics = self._update(state, batch, key)
        if self.collect:
            sums = {name: total.merge(metrics[name]) for name, total in state.metrics.items()}
            state = state.replace(metrics=sums)
        return state.replace(step=state.step + 1), metrics

    def _update(
        self, state: TrainState, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Metric]]:
        scale = None if state.loss_scale is None else state.loss_scale.scale
        grads, outputs = self._placed_gradients(state.task, batch, key, scale)
        params, buffers = eqx.partition(state.task, self.spec)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        loss = total_loss(outputs.terms)
        accepted = overflow = None
        loss_scale = state.loss_scale
        if loss_scale is not None:
            grads = jax.tree.map(lambda g: g / scale, grads)
            accepted = jnp.isfinite(optax.tree.norm(grads))
            # What a smaller scale may mend: the loss itself is not scaled.
            overflow = ~accepted & jnp.isfinite(loss) & (loss_scale.scale > LossScale.LEAST)
            loss_scale = loss_scale.adjusted(accepted)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats with counters
            updates, opt_state = self.tx.update(grads, state.opt_state, params, value=loss)
        view = InsideStep(state.step, loss, params, grads, updates, opt_state, None)
        if self.bus.judges:
            verdict = self.bus.accept_step(view)
            # An overflow of the loss scale is no fault of the batch.
            faultless = verdict if overflow is None else verdict | overflow
            if state.skipped is not None:
                if self.bus.max_in_a_row is not None:
                    goes_on = state.skipped.longest < self.bus.max_in_a_row
                    verdict, faultless = verdict & goes_on, faultless & goes_on
                state = state.replace(skipped=state.skipped.counted(faultless))
            loss_scale = keep_where(faultless, loss_scale, state.loss_scale)
            accepted = verdict if accepted is None else verdict & accepted
        advanced = buffers if outputs.task is None else self._buffers(outputs.task, buffers)
        new = eqx.combine(optax.apply_updates(params, updates), advanced)
        metrics = outputs.metrics
        if accepted is not None:
            accepted = computed_once(accepted)
            new = keep_where(accepted, new, state.task)
            opt_state = keep_where(accepted, opt_state, state.opt_state)
            empty = {name: metric.empty() for name, metric in metrics.items()}
            # Of a step that was not taken, what was measured still counts, unless it is no number.
            metrics = keep_where(accepted | jnp.isfinite(loss), metrics, empty)
        found = self.bus.inside_step(view._replace(skipped=state.skipped))
        observed = as_metrics(found, "inside_step")
        for name in sorted(observed.keys() & metrics.keys()):
            raise ValueError(
                f"Both the task and a callback's `inside_step` give a metric `{name}`. Rename one "
                "of them."
            )
        metrics = metrics | observed
        return state.replace(task=new, opt_state=opt_state, loss_scale=loss_scale), metrics

    def outputs(self, params: PyTree, buffers: PyTree, batch: PyTree, key: PRNGKeyArray) -> Outputs:
        """What `training_step` returns, of the parameters in the dtype of computation."""
        task = cast_task(eqx.combine(params, buffers), self.precision.compute)
        outputs = task.training_step(self.precision.of_batch(batch), key=key)
        name = f"{type(task).__name__}.training_step"
        return read_outputs(outputs, name, scalars=not task.independent_examples)

    def _buffers(self, task: TaskModule, buffers: PyTree) -> PyTree:
        """The buffers of a task handed back, in the dtypes they had."""
        advanced = eqx.partition(task, self.spec)[1]

        def one(new: Any, old: Any) -> Any:
            if not eqx.is_array(old):
                return old
            if new.shape != old.shape:
                raise ValueError(
                    f"The task that `training_step` returned has a buffer of shape {new.shape} "
                    f"where it had shape {old.shape}. Buffers keep their shapes."
                )
            return new.astype(old.dtype)

        return jax.tree.map(one, advanced, buffers)

    def _placed_gradients(
        self, task: TaskModule, batch: PyTree, key: PRNGKeyArray, scale: Float[Array, ""] | None
    ) -> tuple[PyTree, Outputs]:
        """`gradients`, with what is sharded gathered first, and reduced after."""
        if self.placement is None:
            return self.gradients(task, batch, key, scale)
        if task.independent_examples and self.placement.shards > 1:
            try:
                own = draws_on_shards(self, task, batch, key)
                return gradients_per_shard(self, own, task, batch, key, scale)
            except NotByRows:
                pass  # `explain_sharding` says why. As exact, and reduced more often.
        # Gathered in the dtype they are computed in.
        cast_first = cast_task(task, self.precision.compute)
        with gathered(self.placement, cast_first) as (task, scattered):
            grads, outputs = self.gradients(task, batch, key, scale)
        return scattered(grads), outputs

    def gradients(
        self,
        task: TaskModule,
        batch: PyTree,
        key: PRNGKeyArray,
        scale: Float[Array, ""] | None,
        across: Across | None = None,
    ) -> tuple[PyTree, Outputs]:
        """Gradients of the loss over a batch, or over all of `MicroBatches`.

        `across` sums the weights of losses over the parts of a batch that is taken in parts.
        """
        if isinstance(batch, MicroBatches):
            return self._accumulated(task, batch, key, scale, across)
        return self._gradients(task, batch, key, scale, across)

    def _gradients(
        self,
        task: TaskModule,
        batch: PyTree,
        key: PRNGKeyArray,
        scale: Float[Array, ""] | None,
        across: Across | None,
        weights: Weights | None = None,
    ) -> tuple[PyTree, Outputs]:
        """Gradients of the loss; a loss of given `weights` is one part of a larger batch's."""
        params, buffers = eqx.partition(task, self.spec)

        def objective(params: PyTree) -> tuple[Shaped[Array, ""], Outputs]:
            outputs = self.outputs(params, buffers, batch, key)
            total = weights
            if weights is None and across is not None:
                total = across(_weights(outputs.terms))
            loss = total_loss(outputs.terms, total)
            dynamic = None if outputs.task is None else eqx.filter(outputs.task, eqx.is_array)
            return loss if scale is None else loss * scale, outputs._replace(task=dynamic)

        grads, outputs = jax.grad(objective, has_aux=True)(params)
        # JAX's gradient of a complex array is the conjugate of the direction of steepest ascent.
        grads = jax.tree.map(lambda g: g.conj() if jnp.iscomplexobj(g) else g, grads)
        if outputs.task is not None:
            outputs = outputs._replace(task=eqx.combine(outputs.task, task))
        return grads, outputs

    def _accumulated(
        self,
        task: TaskModule,
        batches: MicroBatches,
        key: PRNGKeyArray,
        scale: Float[Array, ""] | None,
        across: Across | None,
    ) -> tuple[PyTree, Outputs]:
        """Gradients over several micro-batches, exactly as if they were one batch.

        The weights come first: the same `training_step`, of which XLA keeps what the weights
        need. Then every micro-batch's totals are differentiated over the whole batch's weights.
        """
        params, buffers = eqx.partition(task, self.spec)
        sample = batches.equal[0] if batches.equal else batches.ragged
        like = jax.eval_shape(
            lambda: eqx.filter(self.outputs(params, buffers, sample, key), eqx.is_array)
        )

        def weigh(weights: PyTree, batch: PyTree, key: PRNGKeyArray) -> PyTree:
            terms = self.outputs(params, buffers, batch, key).terms
            return {name: weights[name] + term.weight for name, term in terms.items()}

        zero = {name: jnp.float32(0.0) for name in like.terms}
        weights = _over_micro_batches(weigh, zero, batches, key)
        weights = weights if across is None else across(weights)

        def accumulate(carry: Any, batch: PyTree, key: PRNGKeyArray) -> Any:
            grads, metrics, terms, dynamic = carry
            now = eqx.combine(dynamic, task)
            more, outputs = self._gradients(now, batch, key, scale, across, weights)
            grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, more)
            metrics = {name: total.merge(outputs.metrics[name]) for name, total in metrics.items()}
            terms = {name: total.merge(outputs.terms[name]) for name, total in terms.items()}
            if outputs.task is not None:
                advanced = self._buffers(outputs.task, eqx.partition(now, self.spec)[1])
                dynamic = eqx.filter(eqx.combine(params, advanced), eqx.is_array)
            return grads, metrics, terms, dynamic

        def empty(metric: _M) -> _M:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metric).empty()

        carry = (
            jax.tree.map(lambda p: jnp.zeros(p.shape, _summing_dtype(p.dtype)), params),
            {name: empty(metric) for name, metric in like.metrics.items()},
            {name: empty(term) for name, term in like.terms.items()},
            eqx.filter(task, eqx.is_array),
        )
        grads, metrics, terms, dynamic = _over_micro_batches(accumulate, carry, batches, key)
        advanced = None if like.task is None else eqx.combine(dynamic, task)
        return grads, Outputs(terms, metrics, advanced)


def _weights(terms: dict[str, Mean]) -> Weights:
    return {n: jax.lax.stop_gradient(jnp.asarray(term.weight)) for n, term in terms.items()}


def _summing_dtype(dtype: Any) -> Any:
    """At least float32, in which many bfloat16 gradients can be added."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def owns_update(task: TaskModule) -> bool:
    """Whether the task overrides `train_step`."""
    return type(task).train_step is not TaskModule.train_step


def _over_micro_batches(
    step: Callable[[_Carry, PyTree, PRNGKeyArray], _Carry],
    carry: _Carry,
    batches: MicroBatches,
    key: PRNGKeyArray,
) -> _Carry:
    count = len(batches.equal)
    if count:
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches.equal)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
        carry, _ = jax.lax.scan(lambda c, x: (step(c, *x), None), carry, (stacked, keys))
    if batches.ragged is not None:
        carry = step(carry, batches.ragged, jax.random.fold_in(key, count))
    return carry


def block_of_steps(
    step: TrainStep, state: TrainState, batches: Sequence[PyTree], count: Int[Array, ""]
) -> tuple[TrainState, dict[str, Metric]]:
    """`count` steps in one program, on the first `count` of `batches`.

    The loop's length is traced, so where a run is cut into blocks never changes a bit.

    **Returns:** the state after the last step, and each step's metrics, stacked.
    """
    dynamic, static = eqx.partition(state, eqx.is_array)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)

    def one(i: Any, carry: Any) -> Any:
        dynamic, outputs = carry
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), stacked)
        state, metrics = step(eqx.combine(dynamic, static), batch)
        write = lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, i, 0)
        return eqx.filter(state, eqx.is_array), jax.tree.map(write, outputs, metrics)

    like = jax.eval_shape(lambda: step(state, batches[0])[1])
    outputs = jax.tree.map(lambda x: jnp.zeros((len(batches), *x.shape), x.dtype), like)
    dynamic, outputs = jax.lax.fori_loop(0, count, one, (dynamic, outputs))
    return eqx.combine(dynamic, static), outputs


class EvalStep(NamedTuple):
    """One evaluation step: `metrics = step(task, root, batch, index)`."""

    stage: str
    """`"validation"`, `"test"` or `"predict"`."""
    precision: Precision = Precision()
    placement: Placement | None = None

    def __call__(
        self, task: TaskModule, root: PRNGKeyArray, batch: PyTree, index: Int[Array, ""] | int
    ) -> Any:
        """`task` in inference mode; `index` is the batch's, on which alone its key depends.

        **Returns:** metrics, the loss included; for `"predict"`, the predictions.
        """
        stream = {"validation": VALIDATE, "test": TEST, "predict": PREDICT}[self.stage]
        key = step_key(root, stream, index)
        task = cast_task(task, self.precision.compute)
        batch = self.precision.of_batch(batch)
        with gathered(self.placement, task) as (task, _):
            found = getattr(task, f"{self.stage}_step")(batch, key=key)
        if self.stage == "predict":
            return cast(found, self.precision.output)
        return read_outputs(found, f"{type(task).__name__}.{self.stage}_step").metrics
