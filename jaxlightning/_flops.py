"""Floating-point operations of a program, counted on its jaxpr.

XLA's own `cost_analysis()` counts the body of a loop once, which is wrong by the depth of the model
wherever layers are scanned (jax#18672). Here scans count with their length.

The convention is that of model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B):
matrix products and convolutions only, two operations a multiply-add.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import DTypeLike

_T = TypeVar("_T")

_MARK = "part="
_PART = re.compile(_MARK + r"([^/()]*)")

ELEMENTWISE = {
    "abs", "acos", "add", "add_any", "and", "asin", "atan2", "ceil", "clamp", "cos", "div", "eq",
    "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite",
    "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not",
    "or", "pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub",
    "tan", "tanh",
}  # fmt: skip
_REDUCTIONS = {
    "argmax", "argmin", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "reduce_and",
    "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
}  # fmt: skip


class FlopCount(NamedTuple):
    """FLOPs of one run of a program, over all devices."""

    total: int
    """All that is executed."""
    recomputed: int
    """Of these, what `jax.checkpoint` computes a second time in the backward pass."""
    parts: dict[str, int]
    """`total` by part of a tree marked with `mark_parts`; unmarked work is under `""`."""
    unbounded_loops: int
    """Loops with matrix products whose trip count the program does not know. Counted as
    `while_trips` trips."""

    @property
    def model(self) -> int:
        """What the mathematics asks for: `total` less `recomputed`. The numerator of MFU."""
        return self.total - self.recomputed


def analyse_flops(
    program: Any, *args: Any, elementwise: bool = False, while_trips: int = 1
) -> FlopCount:
    """Counts a program's floating-point operations. Computes nothing.

    **Arguments:**

    - `program`: a jaxpr, or a function, which is traced on `args` (arrays or
      `jax.ShapeDtypeStruct`).
    - `elementwise`: whether element-wise operations and reductions count too, as one operation
      an element. The default is matrix products and convolutions only.
    - `while_trips`: how often the body of a `while_loop` runs. A loop with static bounds is a
      scan, whose length is known.

    Branches of a `cond` count as the most expensive one, `shard_map` as the sum over devices.
    Work whose result nobody uses is not counted: XLA removes it.
    """
    closed = program if hasattr(program, "eqns") else eqx.filter_make_jaxpr(program)(*args)[0]
    jaxpr: Any = getattr(closed, "jaxpr", closed)
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    walk = _Walk(elementwise, while_trips)
    counts = walk.jaxpr(live, "")
    recomputed = sum(flops for (_, again), flops in counts.items() if again)
    parts: Counter[str] = Counter()
    for (part, _), flops in counts.items():
        parts[part] += flops
    return FlopCount(sum(counts.values()), recomputed, dict(parts), walk.unbounded)


def count_flops(program: Any, *args: Any, elementwise: bool = False, while_trips: int = 1) -> int:
    """The `total` of `analyse_flops`, which has the arguments."""
    return analyse_flops(program, *args, elementwise=elementwise, while_trips=while_trips).total


_Counts = Counter[tuple[str, bool]]
"""By (part, whether it is recomputed)."""


class _Walk:
    def __init__(self, elementwise: bool, while_trips: int):
        self.elementwise = elementwise
        self.while_trips = while_trips
        self.unbounded = 0

    def jaxpr(self, jaxpr: Any, scope: str) -> _Counts:
        counts: _Counts = Counter()
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            # Inner jaxprs name their scopes relative to the equation that holds them.
            here = f"{scope}/{eqn.source_info.name_stack}"
            for key, flops in self.equation(eqn, here).items():
                counts[key] += flops
        return counts

    def equation(self, eqn: Any, scope: str) -> _Counts:
        name, params = eqn.primitive.name, eqn.params
        if name == "cond":
            return max((self.jaxpr(b, scope) for b in params["branches"]), key=_sum)
        inner: _Counts = Counter()
        for sub in jaxprs_in_params(params):
            inner.update(self.jaxpr(sub, scope))
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "while":
            times = self.while_trips
            self.unbounded += any(inner.values())
        elif name == "shard_map":
            times = _manual_devices(params)
        elif name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        if inner:
            return Counter({key: flops * times for key, flops in inner.items()})
        flops = self.primitive(name, eqn)
        return Counter({_key(scope): flops}) if flops else Counter()

    def primitive(self, name: str, eqn: Any) -> int:
        if name == "dot_general":
            return _dot_general(eqn)
        if name == "ragged_dot_general":
            return _ragged_dot(eqn)
        if name == "conv_general_dilated":
            return _convolution(eqn)
        if self.elementwise and name in ELEMENTWISE:
            return math.prod(eqn.outvars[0].aval.shape)
        if self.elementwise and name in _REDUCTIONS:
            return math.prod(eqn.invars[0].aval.shape)
        return 0


def _sum(counts: _Counts) -> int:
    return sum(counts.values())


def _key(scope: str) -> tuple[str, bool]:
    parts = _PART.findall(scope)
    return parts[-1] if parts else "", "rematted_computation" in scope


def _manual_devices(params: dict[str, Any]) -> int:
    mesh = params["mesh"]
    return math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _ragged_dot(eqn: Any) -> int:
    # Each row meets the matrix of its own group only.
    dimensions = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = dimensions.dot_dimension_numbers
    lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    groups = math.prod(rhs[i] for i in dimensions.rhs_group_dimensions)
    out = math.prod(eqn.outvars[0].aval.shape)
    if dimensions.lhs_ragged_dimensions[0] in contracted:
        groups = eqn.invars[2].aval.shape[-1]
        return 2 * out * math.prod(lhs[i] for i in contracted) // groups
    return 2 * out * math.prod(lhs[i] for i in contracted) * (1 if groups else 0)


def _convolution(eqn: Any) -> int:
    """Multiply-adds with real elements: neither padding nor the zeros of a dilated input count,
    so that both backward convolutions cost what the forward one does."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    out = eqn.outvars[0].aval.shape
    # Spatial dimensions follow two others in the specifications.
    products = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    for i, (stride, (low, _), lhs_dilation, rhs_dilation) in enumerate(
        zip(
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ):
        outputs = np.arange(out[numbers.out_spec[2 + i]])[:, None]
        taps = np.arange(rhs[numbers.rhs_spec[2 + i]])
        position = outputs * stride + taps * rhs_dilation - low
        last = (lhs[numbers.lhs_spec[2 + i]] - 1) * lhs_dilation
        real = (position >= 0) & (position <= last) & (position % lhs_dilation == 0)
        products *= int(real.sum())
    return products


# Parts


def submodules(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The direct children of a module, a list or a dict that are not leaves, with their paths."""
    children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    for keys, child in children:
        if child is not tree and not jax.tree_util.all_leaves([child]):
            yield path + jax.tree_util.keystr(keys), child


def mark_parts(tree: _T) -> _T:
    """A copy of an `eqx.Module` whose submodules run under a `jax.named_scope` of their path.

    The path is what `analyse_flops` books FLOPs under. A part's methods are booked to it
    wherever they are called from, in the backward pass and inside transformations too. The
    innermost part wins. The submodules of the copy are of subclasses of their classes, so
    `isinstance` holds but the tree's structure is another.
    """
    return _marked(tree, "")


def _marked(node: Any, path: str) -> Any:
    if isinstance(node, eqx.nn.State | eqx.nn.StateIndex):
        return node  # Equinox compares their types exactly, and they compute nothing.
    if not isinstance(node, eqx.Module):
        if jax.tree_util.all_leaves([node]):
            return node
        leaves, structure = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        named = [_marked(child, path + jax.tree_util.keystr(keys)) for keys, child in leaves]
        return jax.tree.unflatten(structure, named)
    cls = type(node)
    new: Any = object.__new__(_scoped_class(cls, path) if path else cls)
    for name in cls.__dataclass_fields__:
        if hasattr(node, name):
            object.__setattr__(new, name, _marked(getattr(node, name), f"{path}.{name}"))
    return new


def _scoped_class(cls: type, path: str) -> type:
    methods: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    for base in cls.__mro__[: cls.__mro__.index(eqx.Module)]:
        for name in vars(base):
            function = getattr(cls, name, None)
            own = name == "__call__" or not name.startswith("__")
            if own and inspect.isfunction(function) and not _is_static(cls, name):
                methods.setdefault(name, _scoped(function, _MARK + path))
    return type(cls)(cls.__name__, (cls,), methods)


def _is_static(cls: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(cls, name), staticmethod | classmethod)


def _scoped(function: Callable[..., Any], scope: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(scope):
            return function(*args, **kwargs)

    return run


# Peak


def matmul_peak(
    n: int | None = None, dtype: DTypeLike = jnp.float32, *, repeats: int = 7, chain: int = 4
) -> float:
    """Measures what one device does of FLOPs a second in square matrix products.

    Blocks, and takes a second or so. A practical ceiling for MFU where nobody publishes a
    peak, such as on CPUs.

    **Arguments:**

    - `n`: the matrices' size; by default 1024 on CPU and 8192 elsewhere.
    - `dtype`: of operands and result.
    - `repeats`: measurements, of which the fastest counts: whatever disturbs one only slows it.
    - `chain`: products in one dispatch.
    """
    if n is None:
        n = 1024 if jax.default_backend() == "cpu" else 8192

    @jax.jit
    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(chain):
            b = a @ b
        return b

    key = jax.random.key(0)
    a = (jax.random.normal(key, (n, n)) / math.sqrt(n)).astype(dtype)
    jax.block_until_ready(products(a, a))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(products(a, a))
        seconds.append(time.perf_counter() - start)
    return chain * 2 * n**3 / min(seconds)
