"""What a run was configured with, as text: compared when it is gone on with.

Arrays of the state are compared leaf by leaf when a checkpoint is read. What is left is all that
is static: fields of modules, numbers that optimizers and schedules keep in closures, functions by
their names.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

_DEEPEST = 32
_TRANSPARENT = ("chain.update_fn", "with_extra_args_support.update")
"""Optax's functions that only hold others, which a message is shorter without."""


def described(value: Any) -> Any:
    """`value` as JSON values that are equal where it was configured alike.

    Modules and dataclasses by their fields, functions by their names and what they close over,
    `functools.partial` by its arguments; arrays by dtype, shape and a checksum, abstract ones
    without; whatever else by its type. A changed body of a function is not noticed.
    """
    return _described(value, frozenset(), 0)


def _described(value: Any, above: frozenset[int], depth: int) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # NaN equals itself, and JSON's infinities stay out
    if id(value) in above or depth > _DEEPEST:
        return "..."
    inside = functools.partial(_described, above=above | {id(value)}, depth=depth + 1)
    if isinstance(value, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct):
        return _array(value)
    if isinstance(value, Mapping):
        return {str(key): inside(item) for key, item in value.items()}
    if isinstance(value, optax.GradientTransformation):
        return inside(value.update)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: inside(item) for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, list | tuple):
        return {str(number): inside(item) for number, item in enumerate(value)} or "()"
    if isinstance(value, set | frozenset):
        return sorted(map(str, map(inside, value)))
    if isinstance(value, type):
        return value.__qualname__
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return {type(value).__qualname__: {name: inside(x) for name, x in fields.items()}}
    if isinstance(value, functools.partial):
        return {"partial": inside([value.func, list(value.args), value.keywords])}
    if isinstance(value, types.MethodType):
        return {value.__func__.__qualname__: inside(value.__self__)}
    if isinstance(value, types.FunctionType):
        return _function(value, inside)
    wrapped = getattr(value, "__wrapped__", None)
    if callable(wrapped):
        return inside(wrapped)
    return getattr(value, "__qualname__", None) or getattr(
        value, "__name__", type(value).__qualname__
    )


def _function(value: types.FunctionType, inside: Any) -> Any:
    name = value.__qualname__.replace(".<locals>", "")
    held = {}
    for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            held[variable] = inside(cell.cell_contents)
        except ValueError:  # not assigned yet: a function that refers to itself
            continue
    defaults = {
        p.name: inside(p.default)
        for p in inspect.signature(value).parameters.values()
        if p.default is not p.empty and p.default is not None
    }
    found = defaults | held
    if name in _TRANSPARENT and len(found) == 1:
        return next(iter(found.values()))
    return {name: found} if found else name


def _array(value: Any) -> str:
    text = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer):
        return text
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return f"{text} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]}"


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that one has otherwise than the other."""
    before, after = _flat(saved), _flat(now)
    return [
        f"{name}: {before.get(name, 'absent')} in the checkpoint, {after.get(name, 'absent')} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{name}: ") if inner else {f"{prefix}{name}": value}
    return found
