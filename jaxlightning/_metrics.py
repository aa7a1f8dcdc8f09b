"""Metrics: pytrees that are summed on the device and turned into numbers at the end.

    Mean.over(nll, where=mask).merge(Mean.over(more)).compute()

A metric holds sums, not averages, so merging parts gives what the whole would have given, however
the data was cut into batches, shards or micro-batches.
"""

from __future__ import annotations

import abc
import operator
from types import ModuleType
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

__all__ = ["Last", "Max", "Mean", "Metric", "Min", "Sum", "TotalLoss"]

Scalar = Float[Array | np.ndarray | np.floating, ""]
Entries = Shaped[ArrayLike, "..."]
"""Any shape. Methods check shapes themselves, and say what to write instead."""
Weights = Float[Array, "..."]
_M = TypeVar("_M", bound="Metric")


class Metric(eqx.Module):
    """What can be measured in parts: a commutative monoid (up to rounding) and a number.

    Subclasses declare arrays as fields and are made by a classmethod `of`. On the device the
    fields are float32; the host merges log intervals in numpy's float64, so `merge` and `compute`
    take either kind of array.
    """

    def merge(self: _M, other: _M) -> _M:
        """The metric over this one's data, then `other`'s. By default, field by field, a sum."""
        self._check(other)
        return jax.tree.map(operator.add, self, other)

    def empty(self: _M) -> _M:
        """The neutral element of `merge`, in the shapes and dtypes of this metric's arrays.

        Only shapes and dtypes are looked at, so a template filled with anything will do.
        """
        return jax.tree.map(lambda x: full_like(x, 0.0), self)

    @abc.abstractmethod
    def compute(self) -> Any:
        """The number (or array) itself."""

    def _check(self, other: Any) -> None:
        name = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(
                f"`{name}.merge` got a `{type(other).__name__}`. Only metrics of the same kind can "
                f"be merged; pass a `{name}`."
            )
        if _structure(other) != _structure(self):
            raise ValueError(
                f"`{name}.merge` got a metric that was made otherwise:\n  {other}\ninstead of\n"
                f"  {self}\nMake both with the same arguments of `{name}.of`."
            )


def _structure(metric: Metric) -> Any:
    leaves, structure = jax.tree.flatten(metric)
    return structure, [np.shape(leaf) for leaf in leaves]


class Mean(Metric):
    """A weighted mean: `total / weight`, and 0 where the weight is 0. Also the type of a loss.

    `0.5 * mean` scales the total only, which is what weighing a loss means. `+` is not defined:
    it could mean the sum of two losses or the mean over both's data.
    """

    total: Scalar
    weight: Scalar

    __array_ufunc__ = None  # So that `np.float32(0.5) * mean` is ours too.

    @classmethod
    def over(cls, values: Entries, where: Entries | None = None) -> Mean:
        """The mean of all entries of `values`, weighed by `where` (booleans or weights).

        What has weight 0 counts nothing, be it NaN.

        **Raises:** `ValueError` if `where` has another shape than `values`; `TypeError` for
        integers and booleans, which have no gradient.
        """
        values = _floating(values, "Mean.over")
        return cls(*weighted(values, where, "Mean.over"))

    @classmethod
    def of(cls, value: Entries) -> Mean:
        """One number, of weight 1."""
        value = _floating(value, "Mean.of")
        if value.shape != ():
            raise ValueError(
                f"`Mean.of` got an array of shape {value.shape}, but takes one number. For the "
                "mean of its entries, write `Mean.over(values)`."
            )
        return cls(value, jnp.float32(1.0))

    def compute(self) -> Scalar:
        return divide(self.total, self.weight)

    def __mul__(self, factor: Any) -> Mean:
        if isinstance(factor, Metric):
            return NotImplemented
        return Mean(self.total * factor, self.weight)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Mean:
        if isinstance(divisor, Metric):
            return NotImplemented
        return Mean(self.total / divisor, self.weight)

    def __add__(self, other: Any) -> None:
        raise TypeError(
            "`+` is not defined for a `Mean`. To minimise the sum of several losses, return a dict "
            'of them: `{"mlm": mlm, "sop": sop}`. For the mean over the data of both, write '
            "`a.merge(b)`."
        )

    __radd__ = __add__


class Sum(Metric):
    """A sum, such as a count of tokens.

    In float32 on the device, within one log interval, so counts are exact up to 2²⁴ there.
    """

    total: Scalar

    @classmethod
    def of(cls, values: Entries, where: Entries | None = None) -> Sum:
        """The sum of all entries of `values`, each times its `where`."""
        values = jnp.asarray(values, jnp.float32)
        return cls(weighted(values, where, "Sum.of")[0])

    def compute(self) -> Scalar:
        return self.total


class Last(Metric):
    """The latest value, such as a learning rate; NaN where there is none."""

    value: Scalar
    seen: Scalar
    """1 where there is a value, else 0."""

    @classmethod
    def of(cls, value: Entries) -> Last:
        return cls(jnp.asarray(value, jnp.float32), jnp.float32(1.0))

    def merge(self, other: Last) -> Last:
        self._check(other)
        xp = namespace(self, other)
        value = xp.where(other.seen > 0, other.value, self.value)
        return Last(value, xp.maximum(self.seen, other.seen))

    def compute(self) -> Scalar:
        return namespace(self).where(self.seen > 0, self.value, np.nan)


class Max(Metric):
    """The largest value; minus infinity where there is none, NaN where one is NaN."""

    value: Scalar

    @classmethod
    def of(cls, values: Entries, where: Entries | None = None) -> Max:
        """The largest entry of `values` whose `where` is not 0."""
        values = jnp.asarray(values, jnp.float32)
        counted = weights_of(where, values.shape, "Max.of") != 0
        return cls(jnp.max(values, initial=-jnp.inf, where=counted))

    def merge(self, other: Max) -> Max:
        self._check(other)
        return Max(namespace(self, other).maximum(self.value, other.value))

    def empty(self) -> Max:
        return Max(full_like(self.value, -np.inf))

    def compute(self) -> Scalar:
        return self.value


class Min(Metric):
    """The smallest value; infinity where there is none, NaN where one is NaN."""

    value: Scalar

    @classmethod
    def of(cls, values: Entries, where: Entries | None = None) -> Min:
        """The smallest entry of `values` whose `where` is not 0."""
        values = jnp.asarray(values, jnp.float32)
        counted = weights_of(where, values.shape, "Min.of") != 0
        return cls(jnp.min(values, initial=jnp.inf, where=counted))

    def merge(self, other: Min) -> Min:
        self._check(other)
        return Min(namespace(self, other).minimum(self.value, other.value))

    def empty(self) -> Min:
        return Min(full_like(self.value, np.inf))

    def compute(self) -> Scalar:
        return self.value


class TotalLoss(Metric):
    """The loss of a task that returns several: the sum of its terms' means."""

    terms: dict[str, Mean]

    def compute(self) -> Any:
        return sum(term.compute() for term in self.terms.values())


# What metrics are written with


def namespace(*trees: Any) -> ModuleType:
    """`jax.numpy` if any leaf is JAX's, else `numpy`."""
    return jnp if any(isinstance(x, jax.Array) for x in jax.tree.leaves(trees)) else np


def full_like(x: Any, value: float) -> Any:
    return namespace(x).full_like(x, value)


def divide(a: Any, b: Any) -> Any:
    """`a / b`, and 0 where `b` is 0. Neither a warning nor a NaN gradient comes of it."""
    xp = namespace(a, b)
    return xp.where(b == 0, 0.0, a / xp.where(b == 0, 1.0, b))


def weighted(values: Weights, where: Entries | None, method: str) -> tuple[Scalar, Scalar]:
    """Σ values·where and Σ where. A weight of 0 hides even NaN."""
    if where is None:
        return values.sum(), jnp.float32(values.size)
    weights = weights_of(where, values.shape, method)
    return jnp.sum(jnp.where(weights == 0, 0.0, values) * weights), weights.sum()


def weights_of(where: Entries | None, shape: tuple[int, ...], method: str) -> Weights:
    """`where` as float32 weights of `shape`; ones if it is `None`."""
    if where is None:
        return jnp.ones(shape, jnp.float32)
    where = jnp.asarray(where)
    if where.shape != shape:
        raise ValueError(
            f"`{method}` got `where` of shape {where.shape} for values of shape {shape}. They have "
            f"to be the same; write `where=jnp.broadcast_to(where, {shape})` if that is what you "
            "mean."
        )
    return where.astype(jnp.float32)


def _floating(values: Entries, method: str) -> Weights:
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(
            f"`{method}` got values of dtype {values.dtype}, which have no gradient, so they "
            "cannot be a loss. If they are only logged, write `values.astype(jnp.float32)`."
        )
    return values.astype(jnp.float32)
