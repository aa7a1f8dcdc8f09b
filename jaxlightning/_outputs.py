"""What a task's step may return, read once and checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from ._metrics import Mean, Metric, TotalLoss
from ._task import TaskModule


class Outputs(NamedTuple):
    terms: dict[str, Mean]
    """The loss: its one Mean under `"loss"`, or several by name."""
    metrics: dict[str, Metric]
    """Everything to log, the loss included."""
    task: TaskModule | None
    """The task handed back, for its buffers."""


def read_outputs(outputs: Any, method: str, *, scalars: bool = True) -> Outputs:
    """Reads `loss`, `(loss, metrics)` or `(loss, metrics, task)` as returned by `method`.

    `scalars`: whether a loss or a metric may be a bare one, which stands for the whole batch.

    **Raises:** `ValueError` or `TypeError`, at trace time, for anything else.
    """
    loss, metrics, task = outputs, dict[str, Any](), None
    if isinstance(outputs, tuple) and not isinstance(outputs, Metric):
        if len(outputs) == 2:
            loss, metrics = outputs
        elif len(outputs) == 3:
            loss, metrics, task = outputs
        else:
            raise ValueError(
                f"`{method}` returned a tuple of {len(outputs)}. Return `loss`, `(loss, metrics)` "
                "or `(loss, metrics, task)`."
            )
    if not isinstance(metrics, dict):
        raise TypeError(
            f"`{method}` returned metrics of type `{type(metrics).__name__}`. Return a dict from "
            'names to metrics, such as `{"accuracy": Accuracy.of(logits, labels)}`.'
        )
    if task is not None and not isinstance(task, TaskModule):
        raise TypeError(
            f"The third thing `{method}` returned is a `{type(task).__name__}`. It has to be the "
            "task with its advanced buffers: `eqx.tree_at(lambda t: t.state, self, state)`."
        )
    if not scalars:
        terms_given = loss if isinstance(loss, dict) else {"loss": loss}
        for name, value in {**terms_given, **metrics}.items():
            if not isinstance(value, Metric):
                raise ValueError(
                    f"The task says `independent_examples = True`, but the `{name}` that "
                    f"`{method}` returned is a scalar, which does not say how many examples it "
                    "is of. Return `Mean.over(values)`, with a value for each example; for what "
                    "depends on none, `Last.of(value)`."
                )
    if isinstance(loss, dict):
        if not loss:
            raise ValueError(f"`{method}` returned an empty dict as its loss.")
        if "loss" in loss:
            raise ValueError(
                f'`{method}` returned a dict with a "loss". Here every entry of such a dict is a '
                'loss that is minimised. Write `return loss, {"accuracy": ...}`, or rename it.'
            )
        terms = {name: _loss_term(value, method, f'["{name}"]') for name, value in loss.items()}
        logged: dict[str, Metric] = {"loss": TotalLoss(terms), **terms}
    else:
        terms = {"loss": _loss_term(loss, method, "")}
        logged = dict(terms)
    twice = sorted(set(logged) & set(metrics))
    if twice:
        raise ValueError(
            f'`{method}` returned a metric named "{twice[0]}", which is the name of its loss. '
            "Give it another name."
        )
    return Outputs(terms, logged | as_metrics(metrics, method), task)


def _loss_term(value: Any, method: str, where: str) -> Mean:
    if isinstance(value, Metric) and not isinstance(value, Mean):
        raise TypeError(
            f"The loss{where} that `{method}` returned is a `{type(value).__name__}`. A loss is a "
            "`Mean` (of per-example losses: `Mean.over(nll)`), a dict of Means, or a scalar."
        )
    array = value.total if isinstance(value, Mean) else value
    if not isinstance(array, jax.Array | np.ndarray | np.generic | float | int):
        raise TypeError(
            f"The loss{where} that `{method}` returned is a `{type(value).__name__}`. Return a "
            "`Mean`, a dict of Means, or a scalar array."
        )
    array = jnp.asarray(array)
    if array.shape != ():
        raise ValueError(
            f"The loss{where} that `{method}` returned has shape {array.shape}, but a loss is a "
            "scalar. For one loss an example, return `Mean.over(losses)`."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"The loss{where} that `{method}` returned has dtype {array.dtype}, which has no "
            "gradient. Compute it in floating point."
        )
    if isinstance(value, Mean):
        return Mean(_f32(value.total), _f32(value.weight))
    return Mean.of(_f32(array))


def _f32(x: Any) -> Shaped[Array, ""]:
    return jnp.asarray(x).astype(jnp.float32)


def as_metrics(found: dict[str, Any], source: str) -> dict[str, Metric]:
    """Metrics as they are; scalars as Means of weight 1."""
    metrics: dict[str, Metric] = {}
    for name, value in found.items():
        if isinstance(value, Metric):
            metrics[name] = value
            continue
        shape = jnp.shape(value)
        if shape != ():
            raise ValueError(
                f'The metric "{name}" of `{source}` is an array of shape {shape}. Return a metric, '
                "such as `Mean.over(values)`, or a scalar."
            )
        metrics[name] = Mean.of(_f32(value))
    return metrics
