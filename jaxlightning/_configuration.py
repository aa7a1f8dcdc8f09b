"""What a run was configured with, as JSON values: compared when it is gone on with.

Arrays of the state are compared leaf by leaf when a checkpoint is read. What is left is all that
is static: fields of modules, numbers that optimizers and schedules keep in closures, attributes
of objects, functions by their names; and what a loader does with its rows.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import itertools
import json
import math
import pathlib
import re
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

DECIDING_FLAGS = ("jax_enable_x64", "jax_threefry_partitionable")
"""Settings of JAX that make another run of a run: of other dtypes, with other random numbers."""
ROUNDING_FLAGS = ("jax_default_matmul_precision",)
"""Settings of JAX on which the last digits depend."""
FLAGS = DECIDING_FLAGS + ROUNDING_FLAGS

BYTES = 2**20
"""The most that is looked at of an array."""
_LONG = 100  # items, or characters: of more, a checksum
_VERY_LONG = 10_000  # items: of more, some
_BEARABLE = 2**17  # characters
_DEEPEST = 32
_MOST = 50_000  # values in all: milliseconds, and an end to graphs of objects

# The exceptions.

_BY_TEXT = (
    complex, range, slice, np.dtype, pathlib.PurePath, re.Pattern, datetime.date, datetime.time,
    datetime.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID,
)  # fmt: skip
"""Values whose text is all there is to say of them."""
_BY_NAME = (
    type, types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType,
    types.WrapperDescriptorType, np.ufunc, jnp.ufunc,
)  # fmt: skip
_BY_TYPE = {
    "jaxlightning._trainer.Trainer", "jaxlightning._callback.Callback", "logging.Logger",
    "datasets.arrow_dataset.Dataset",
    "transformers.tokenization_utils_base.PreTrainedTokenizerBase",
}  # fmt: skip
"""Objects with attributes that change while they are used, or that name places in a machine."""
_WRAPPERS = ("equinox", "functools", "jax", "jaxlib", "numpy")
"""Whose objects may be told by the function that is their `__wrapped__`."""
_CHECKERS = ("beartype", "jaxtyping", "typeguard")
_TRANSPARENT = ("chain.update_fn", "with_extra_args_support.update")
"""Optax's functions that only hold others, which a message is shorter without."""


def described(value: Any, most: int = BYTES) -> Any:
    """`value` as JSON values that are equal where it was configured alike, in any process.

    Containers by their items, modules, dataclasses and other objects by their attributes,
    functions by their names, defaults and what they close over, `functools.partial` by its
    arguments too. Of long texts and containers it is a checksum. Of an array it is the dtype, the
    shape and a checksum of at most `most` bytes that are evenly spaced; of one on a device that
    is larger, or that is a leaf of an `eqx.Module`, dtype and shape only: what modules hold is
    the state, which is restored, or was made as that is.

    Neither properties nor `__repr__` of anybody are called, and nothing is looked at twice where
    objects refer to each other in a circle. What functions do is not looked at.
    """
    return _Walk(most).described(value)


class _Walk:
    def __init__(self, most: int) -> None:
        self._most = most
        self._above: set[int] = set()
        self._count = 0

    def described(self, value: Any, leaf: bool = False) -> Any:
        """`leaf`: whether an array would be a leaf of a module here."""
        if isinstance(value, enum.Enum):
            name = value._name_ or str(value._value_)
            return f"{type(value).__qualname__}.{name}"
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            # A number, since 1.0 equals 1, into which optax may turn it while it is traced; but
            # NaN equals itself only as text.
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, str | bytes | bytearray):
            return _text(value)
        if isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
            return _array(value, self._most, leaf)
        if isinstance(value, _BY_TEXT):
            return str(value)
        if isinstance(value, _BY_NAME):
            return getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        self._count += 1
        if id(value) in self._above or len(self._above) > _DEEPEST or self._count > _MOST:
            return "..."
        self._above.add(id(value))
        try:
            return self._inside(value, leaf)
        finally:
            self._above.remove(id(value))

    def _inside(self, value: Any, leaf: bool) -> Any:
        if isinstance(value, optax.GradientTransformation):
            return self._transformation(value)
        if isinstance(value, dict | types.MappingProxyType):
            return self._items(_some(value.items(), len(value)), len(value), leaf)
        fields = getattr(type(value), "_fields", None)
        if isinstance(value, tuple) and fields is not None:
            return self._items(zip(fields, value, strict=True), 0, leaf)
        if isinstance(value, list | tuple):
            items = [self.described(item, leaf) for item in _some(value, len(value))]
            return _shortened(items, "list", len(value))
        if isinstance(value, set | frozenset):
            items = sorted((self.described(item) for item in value), key=_json)
            return _shortened(items, "set", len(value))
        if isinstance(value, functools.partial):
            return self._partial(value, leaf and isinstance(value, jax.tree_util.Partial))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, jax.sharding.Mesh):
            return {"Mesh": list(value.axis_names)}  # of how many devices: a run may change that
        if isinstance(value, jax.sharding.PartitionSpec):
            return {"PartitionSpec": self.described(list(value))}
        if isinstance(value, jax.sharding.NamedSharding):
            return {"NamedSharding": self.described([value.mesh, value.spec])}
        attributes = _attributes(value)
        if isinstance(value, types.MethodType):
            attributes = {"__func__": value.__func__, "__self__": value.__self__}
        if "__func__" in attributes and "__self__" in attributes:
            return self._method(attributes["__func__"], attributes["__self__"], leaf)
        wrapped = _wrapped(value)
        if wrapped is not None:
            return self.described(wrapped)
        return self._object(value, attributes, leaf)

    def _items(self, items: Iterable[tuple[Any, Any]], length: int, leaf: bool) -> Any:
        found: dict[str, Any] = {}
        for key, item in items:
            name = key if isinstance(key, str) else _key(self.described(key))
            unique, number = name, 1
            while unique in found:  # functions, say, of one name
                number += 1
                unique = f"{name} {number}"
            found[unique] = self.described(item, leaf)
        return _shortened(found, "dict", length)

    def _object(self, value: Any, attributes: dict[str, Any], leaf: bool) -> Any:
        kind = type(value)
        if any(f"{base.__module__}.{base.__qualname__}" in _BY_TYPE for base in kind.__mro__):
            return kind.__qualname__
        static = set()
        if dataclasses.is_dataclass(kind):
            fields = dataclasses.fields(kind)
            attributes = {f.name: attributes[f.name] for f in fields if f.name in attributes}
            static = {field.name for field in fields if field.metadata.get("static")}
        else:
            attributes = {name: x for name, x in attributes.items() if _tells(kind, name)}
        # In what JAX doesn't look into, arrays are no leaves.
        looks_into = leaf and not jax.tree_util.all_leaves([value])
        leaf = issubclass(kind, eqx.Module) or looks_into
        found = {
            name: self.described(item, leaf and name not in static)
            for name, item in attributes.items()
        }
        return {kind.__qualname__: found} if found else kind.__qualname__

    def _partial(self, value: functools.partial[Any], leaf: bool) -> Any:
        arguments = {str(number): item for number, item in enumerate(value.args)} | value.keywords
        held = {name: self.described(item, leaf) for name, item in arguments.items()}
        return _with(self.described(value.func), held)

    def _method(self, function: Any, owner: Any, leaf: bool) -> Any:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        found = self.described(owner, leaf)
        kind = name.rpartition(".")[0]
        if found == kind:
            return name
        # What the name says already need not be said again.
        return {name: found[kind] if isinstance(found, dict) and [*found] == [kind] else found}

    def _function(self, value: types.FunctionType) -> Any:
        value = _unchecked(value)
        name = value.__qualname__.replace(".<locals>", "")
        found = {key: self.described(item) for key, item in _held(value).items()}
        if name in _TRANSPARENT and len(found) == 1:
            return next(iter(found.values()))
        return {name: found} if found else name

    def _transformation(self, value: optax.GradientTransformation) -> Any:
        """By its update, and by what only `init` knows: that is in the restored state, so that
        another value would be ignored without a word."""
        init, update = _unchecked(value.init), _unchecked(value.update)
        if not (isinstance(init, types.FunctionType) and isinstance(update, types.FunctionType)):
            return self.described(update)
        first, then = _held(init), _held(update)
        if "init_fns" in first and "update_fns" in then:
            pairs = zip(first["init_fns"], then["update_fns"], strict=True)
            return [self.described(optax.GradientTransformation(*pair)) for pair in pairs]
        if update.__qualname__.replace(".<locals>", "") in _TRANSPARENT:
            return self.described(update)
        only = {name: item for name, item in first.items() if name not in then}
        held = {name: self.described(item) for name, item in only.items()}
        return _with(self.described(update), held)


def _with(function: Any, arguments: dict[str, Any]) -> Any:
    """A described function, which holds these too."""
    if not arguments:
        return function
    if isinstance(function, str):
        return {function: arguments}
    if isinstance(function, dict) and len(function) == 1:
        name, held = next(iter(function.items()))
        if isinstance(held, dict):
            return {name: held | arguments}
    return {"partial": function, "arguments": arguments}


def _held(function: types.FunctionType) -> dict[str, Any]:
    """The defaults of a function, but `None`, and what it closes over."""
    code = function.__code__
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    named = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
    named |= function.__kwdefaults__ or {}
    found = {name: value for name, value in named.items() if value is not None}
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[variable] = cell.cell_contents
        except ValueError:  # not assigned yet: a function that refers to itself
            continue
    return found


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds in its `__dict__` and slots, without running any code of its own."""
    found: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__):
        if "__slots__" in vars(kind):
            for name, member in vars(kind).items():
                if isinstance(member, types.MemberDescriptorType):
                    try:
                        found[name] = member.__get__(value)
                    except AttributeError:  # not assigned
                        continue
    try:
        return found | object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return found


def _tells(kind: type, name: str) -> bool:
    """Whether an attribute is configuration, and not kept for speed, or Python's own."""
    if name == "__wrapped__":
        return True
    if name == "_hash" or (name.startswith("__") and name.endswith("__")):
        return False
    for base in kind.__mro__:
        if name in vars(base):
            return not isinstance(vars(base)[name], functools.cached_property)
    return True


def _wrapped(value: Any) -> Any:
    """The function inside one that is jitted, vectorised, cached or has its own derivative."""
    known = type(value).__module__.partition(".")[0] in _WRAPPERS
    return getattr(value, "__wrapped__", None) if known else None


def _unchecked(value: Any) -> Any:
    """The function that checks of types were put around, which hold addresses in their names."""
    while isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__"):
        made_by = str(value.__globals__.get("__name__")).partition(".")[0]
        if made_by not in _CHECKERS and not value.__code__.co_filename.startswith("<@beartype"):
            break
        value = value.__wrapped__
    return value


def _array(value: Any, most: int, leaf: bool) -> str:
    text = f"{value.dtype}{list(value.shape)}"
    if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer):
        return text
    if isinstance(value, jax.Array):
        if leaf or not value.is_fully_addressable or value.is_deleted():
            return text
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if value.nbytes > most:
            return text
    return f"{text} {_hash(sampled(np.asarray(value), most))}"


def sampled(array: np.ndarray, most: int) -> bytes:
    """Values of an array that are evenly spaced, and at most that many bytes."""
    step = max(1, -(-array.nbytes // max(most, 1)))
    values = array.flat[::step]
    if array.dtype.hasobject:  # whose bytes are addresses
        return _json([described(value) for value in values.tolist()]).encode()
    return values.tobytes()


def _text(value: str | bytes | bytearray) -> str:
    if isinstance(value, str) and len(value) <= _LONG:
        return value
    content = value.encode(errors="surrogatepass") if isinstance(value, str) else bytes(value)
    return f"{type(value).__name__} of {len(value)} {_hash(content)}"


def _some(items: Iterable[Any], length: int) -> Iterable[Any]:
    """Items of a container, evenly spaced where there are too many."""
    return itertools.islice(items, 0, None, 1 + length // _VERY_LONG)


def _shortened(items: list[Any] | dict[str, Any], kind: str, length: int) -> Any:
    """A checksum instead of a long container; unless its items are parts of a model, say, whose
    differences few lines tell, and can be borne in every checkpoint."""
    if length <= _LONG:
        return items
    text = _json(items)
    values = items.values() if isinstance(items, dict) else items
    parts = all(isinstance(item, dict | list) for item in values)
    if parts and len(text) <= _BEARABLE and length <= _VERY_LONG:
        return items
    return f"{kind} of {length} {_hash(text)}"


def _key(found: Any) -> str:
    return found if isinstance(found, str) else _json(found)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _hash(content: bytes | str) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that one has otherwise than the other."""
    return sorted(_apart("", saved, now))


_ABSENT = "absent"


def _apart(name: str, before: Any, after: Any) -> Iterator[str]:
    one, other = _inner(before), _inner(after)
    plain = [
        value
        for value, inner in ((before, one), (after, other))
        if not inner and value not in (_ABSENT, {}, [])
    ]
    if plain or not (one or other):
        if before != after:
            yield f"{name}: {_brief(before)} in the checkpoint, {_brief(after)} now"
        return
    if len(one) == len(other) == 1 and one.keys() != other.keys():
        (kind, held), (other_kind, holds) = *one.items(), *other.items()
        if _inner(held) and _inner(holds):  # another class, whose fields may well be the same
            yield f"{name}: {kind} in the checkpoint, {other_kind} now"
            yield from _apart(f"{name}: {other_kind}", held, holds)
            return
    for key in one.keys() | other.keys():
        inner = ": ".join(filter(None, (name, key)))
        yield from _apart(inner, one.get(key, _ABSENT), other.get(key, _ABSENT))


def _inner(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    return {str(i): item for i, item in enumerate(value)} if isinstance(value, list) else {}


def _brief(value: Any) -> str:
    """A class with its fields by its name."""
    inner = _inner(value)
    return f"{next(iter(inner))}(...)" if inner else str(value)
