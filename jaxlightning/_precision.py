"""Which dtype for what: three dtypes and one tree map."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ._task import TaskModule, is_inexact


class Precision(NamedTuple):
    """The dtypes of a run.

    `params` is how parameters, and so the optimizer's state, are stored; `compute` is what the
    task's methods see, floating-point leaves of the batch included unless `inputs` says otherwise;
    `output` is what predictions are turned into. Losses and metrics are always summed in float32.
    `scale_loss` turns on dynamic loss scaling, which float16 needs.

    bfloat16 keeps 3 digits: where targets of a regression need more, write
    `Precision(compute=jnp.bfloat16, inputs=jnp.float32)` and cast the inputs in the task.

    | name | params | compute | scaled |
    |---|---|---|---|
    | `"32-true"` | float32 | float32 | |
    | `"bf16-mixed"` | float32 | bfloat16 | |
    | `"bf16-true"` | bfloat16 | bfloat16 | |
    | `"16-mixed"` | float32 | float16 | yes |
    """

    params: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    output: DTypeLike = jnp.float32
    scale_loss: bool = False
    inputs: DTypeLike | None = None
    """Of the batch's floating-point leaves; by default that of `compute`."""

    def of_batch(self, batch: PyTree) -> PyTree:
        """The batch as the task's methods see it."""
        return cast(batch, self.compute if self.inputs is None else self.inputs)

    def names(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            name: value if value is None or isinstance(value, bool) else jnp.dtype(value).name
            for name, value in self._asdict().items()
        }

    @classmethod
    def named(cls, name: str | Precision) -> Precision:
        if isinstance(name, Precision):
            return name
        if not isinstance(name, str) or name not in _NAMED:
            means = [full for full in (f"{name}-mixed", f"{name}-true") if full in _NAMED]
            near = means or difflib.get_close_matches(str(name), _NAMED, n=1, cutoff=0.3)
            hint = f" Did you mean `{near[0]!r}`?" if near else ""
            if str(name) in ("64", "64-true"):
                hint = (
                    " Double precision is `Precision(*[jnp.float64] * 3)`, after "
                    '`jax.config.update("jax_enable_x64", True)`.'
                )
            raise ValueError(
                f"`precision={name!r}` is unknown; it is one of {', '.join(map(repr, _NAMED))}, or "
                f"a `Precision(params, compute, output)`.{hint}"
            )
        return _NAMED[name]


_NAMED: dict[str, Precision] = {
    "32-true": Precision(),
    "bf16-mixed": Precision(compute=jnp.bfloat16),
    "bf16-true": Precision(params=jnp.bfloat16, compute=jnp.bfloat16),
    "16-mixed": Precision(compute=jnp.float16, scale_loss=True),
}


def cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts floating-point leaves; leaves everything else, and what has the dtype already."""

    def one(leaf: Any) -> Any:
        changes = is_inexact(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if changes and leaf.dtype != dtype else leaf

    return jax.tree.map(one, tree)


def cast_task(task: TaskModule, dtype: DTypeLike) -> TaskModule:
    """Casts parameters, frozen ones too, but no buffers."""
    parameters, rest = eqx.partition(task, TaskModule.trainable(task))
    return eqx.combine(cast(parameters, dtype), rest)
