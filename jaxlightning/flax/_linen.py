"""A Flax Linen module as a part of a task."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import equinox as eqx
import jax
from flax import linen
from flax.core import meta, unfreeze
from flax.errors import InvalidRngError
from jaxtyping import PRNGKeyArray, PyTree

from jaxlightning._task import buffer

from ._nnx import described

TRAINING = ("train", "training", "is_training")
INFERENCE = ("deterministic", "use_running_average", "inference")
"""What Linen modules call the argument, or the field, that tells them whether they train."""


class Definition:
    """A Linen module that can be compared and hashed, as what is static has to be.

    Linen refuses to hash a module that holds a list, such as `nn.Sequential([...])`.
    """

    def __init__(self, module: linen.Module):
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Definition) and self.module == other.module

    def __hash__(self) -> int:
        return hash(type(self.module))

    def __repr__(self) -> str:
        return type(self.module).__name__


class Linen(eqx.Module):
    """A Flax Linen module with its variables: `params` are trained, other collections are buffers.

        class Classifier(TaskModule):
            net: Linen

            def training_step(self, batch, *, key):
                logits, net = self.net(batch["x"], key=key)
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
                return Mean.over(nll), {}, eqx.tree_at(lambda t: t.net, self, net)

        sample = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
        task = Classifier(Linen(Model(), sample, key=key))

    The variables are initialised from the shapes of `args` and `kwargs`, which are what the
    module is called with: arrays or `jax.ShapeDtypeStruct`s. Nothing is computed from them.

    Linen tells a module by an argument whether it trains. Where the method that is called has one
    named `train`, `training`, `is_training`, `deterministic`, `use_running_average` or
    `inference`, or else the module has such a field, it is given what `eqx.nn.inference_mode` set,
    unless the call says it itself.
    """

    definition: Definition = eqx.field(static=True)
    params: PyTree
    inference: bool
    buffers: dict[str, PyTree] = buffer()

    def __init__(
        self,
        module: Any,
        *args: Any,
        key: PRNGKeyArray,
        method: str = "__call__",
        **kwargs: Any,
    ):
        if not isinstance(module, linen.Module):
            raise TypeError(
                f"`Linen` takes a `flax.linen.Module`, but got {described(module)}. Write "
                "`Linen(Model(), sample, key=key)`; for an NNX module, use `NNX`."
            )
        self.definition = Definition(module)
        module, kwargs = _with_mode(module, method, kwargs, inference=False)
        variables = module.lazy_init(_rngs(key), *args, method=_method(module, method), **kwargs)
        collections = unfreeze(meta.unbox(variables))
        self.params = collections.pop("params", {})
        collections.pop("intermediates", None)
        self.buffers = collections
        self.inference = False

    @property
    def module(self) -> Any:
        """The Flax module, which goes with `variables`."""
        return self.definition.module

    @property
    def variables(self) -> dict[str, PyTree]:
        """All collections, as `module.apply` takes them."""
        return {"params": self.params, **self.buffers}

    def __call__(
        self,
        *args: Any,
        key: PRNGKeyArray | None = None,
        method: str = "__call__",
        **kwargs: Any,
    ) -> tuple[Any, Linen]:
        """Calls the module's `method`.

        **Returns:** what the method returns, and this module with its buffers advanced.

        **Raises:** `ValueError` where the module draws random numbers without a `key`.
        """
        module, kwargs = _with_mode(self.module, method, kwargs, self.inference)
        try:
            outputs, advanced = module.apply(
                self.variables,
                *args,
                rngs=None if key is None else _rngs(key),
                mutable=list(self.buffers),
                method=_method(module, method),
                **kwargs,
            )
        except InvalidRngError as error:
            raise ValueError(
                f"`{type(module).__name__}.{method}` draws random numbers, but was called without "
                "a key. Write `outputs, net = self.net(x, key=key)`."
            ) from error
        buffers = self.buffers | unfreeze(meta.unbox(advanced))
        return outputs, eqx.tree_at(lambda net: net.buffers, self, buffers)


def _rngs(key: PRNGKeyArray) -> dict[str, PRNGKeyArray]:
    # Linen folds in each layer's path, and draws streams of any other name from `params`.
    # `dropout` is there for modules that ask `has_rng("dropout")`.
    params, dropout = jax.random.split(key)
    return {"params": params, "dropout": dropout}


def _method(module: linen.Module, name: str) -> Any:
    return getattr(type(module), name)


def _with_mode(
    module: linen.Module, method: str, kwargs: dict[str, Any], inference: bool
) -> tuple[linen.Module, dict[str, Any]]:
    """The module and the call's arguments, told whether to train."""
    mode = {name: not inference for name in TRAINING} | {name: inference for name in INFERENCE}
    arguments = inspect.signature(_method(module, method)).parameters
    asked = {name: value for name, value in mode.items() if name in arguments}
    if asked:
        return module, asked | kwargs
    fields = {field.name for field in dataclasses.fields(module)}
    told: dict[str, Any] = {name: value for name, value in mode.items() if name in fields}
    return (module.clone(**told) if told else module), kwargs
