"""A Flax NNX module as a part of a task."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray, PyTree

from jaxlightning._task import buffer

Path = tuple[Any, ...]


def described(thing: Any) -> str:
    """`a `Model``, or `the class `Model`` where an instance was forgotten."""
    if isinstance(thing, type):
        return f"the class `{thing.__name__}`"
    return f"a `{type(thing).__name__}`"


class NNX(eqx.Module):
    """A Flax NNX module as a pytree: its `nnx.Param`s are trained, all else are buffers.

        class Classifier(TaskModule):
            net: NNX

            def training_step(self, batch, *, key):
                logits, net = self.net(batch["x"], key=key)
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
                return Mean.over(nll), {}, eqx.tree_at(lambda t: t.net, self, net)

        task = Classifier(NNX(Model(rngs=nnx.Rngs(0))))

    Random streams (`nnx.Rngs`) are no state here: every call starts them from its `key`, so that
    randomness is a function of the step. In inference mode (`eqx.nn.inference_mode`) the module
    runs after `module.eval()`; otherwise as it was given, where a layer that was never told
    whether to train does.
    """

    graphdef: Any = eqx.field(static=True, repr=False)
    streams: tuple[tuple[Path, bool, tuple[int, ...]], ...] = eqx.field(static=True, repr=False)
    """For each variable of a random stream: its path, whether it is the key, its shape."""
    params: PyTree
    inference: bool
    buffers: PyTree = buffer()

    def __init__(self, module: Any):
        if not isinstance(module, nnx.Module):
            raise TypeError(
                f"`NNX` takes a `flax.nnx.Module`, but got {described(module)}. Write "
                "`NNX(Model(rngs=nnx.Rngs(0)))`; for a Linen module, use `Linen`."
            )
        self.graphdef, params, streams, buffers = _split(module)
        self.streams = tuple(
            (path, isinstance(variable, nnx.RngKey), variable.get_value().shape)
            for path, variable in nnx.to_flat_state(streams)
        )
        self.params = nnx.to_pure_dict(params)
        self.buffers = nnx.to_pure_dict(buffers)
        self.inference = False

    def module(self, key: PRNGKeyArray | None = None) -> Any:
        """The Flax module with the current parameters and buffers.

        Each of its random streams starts from `key` and its own number; by default from seed 0.
        """
        if key is None:
            key = jax.random.key(0)
        elif not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        flat: dict[Path, Any] = {}
        for number, (path, is_key, shape) in enumerate(self.streams):
            # Layers hold forks of one stream: without a number each they would draw alike.
            own = jax.random.fold_in(key, number)
            own = jax.random.split(own, shape) if shape else own
            flat[path] = own if is_key else jnp.zeros(shape, jnp.uint32)
        rngs = nnx.traversals.unflatten_mapping(flat)
        return nnx.merge(self.graphdef, self.params, rngs, self.buffers)

    def __call__(
        self,
        *args: Any,
        key: PRNGKeyArray | None = None,
        method: str = "__call__",
        **kwargs: Any,
    ) -> tuple[Any, NNX]:
        """Calls the module's `method`.

        **Returns:** what the method returns, and this module with its buffers advanced.

        **Raises:** `ValueError` where the module draws random numbers without a `key`, or comes
        out of the call with other attributes or variables than before.
        """
        module = self.module(key)
        _set_mode(module, self.inference)
        before, counts = nnx.graphdef(module), _counts(module)
        outputs = getattr(module, method)(*args, **kwargs)
        nnx.pop(module, nnx.Intermediate)
        if nnx.graphdef(module) != before:
            raise ValueError(
                f"`{type(module).__name__}.{method}` changed an attribute or made a variable. "
                "What a step changes has to be a variable that exists from the start: write "
                "`self.calls = nnx.Variable(jnp.array(0))` in `__init__` and "
                "`self.calls[...] += 1` here."
            )
        if key is None and any(a is not b for a, b in zip(_counts(module), counts, strict=True)):
            raise ValueError(
                f"`{type(module).__name__}.{method}` draws random numbers, but was called without "
                "a key. Write `outputs, net = self.net(x, key=key)`."
            )
        buffers = nnx.to_pure_dict(_split(module)[3])
        return outputs, eqx.tree_at(lambda net: net.buffers, self, buffers)


def _split(module: nnx.Module) -> Any:
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _set_mode(module: nnx.Module, inference: bool) -> None:
    if inference:
        module.eval()
        return
    for _, node in nnx.iter_graph(module):
        for switch in ("deterministic", "use_running_average"):
            if getattr(node, switch, False) is None:
                setattr(node, switch, False)


def _counts(module: nnx.Module) -> list[Any]:
    """How often each random stream was drawn from; the very arrays, which drawing replaces."""
    return [count.get_value() for _, count in nnx.to_flat_state(nnx.state(module, nnx.RngCount))]
