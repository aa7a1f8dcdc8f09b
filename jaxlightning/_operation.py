"""One operation of a program as it was carried out: on what, with what result, and whose it is."""

from __future__ import annotations

import linecache
import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from ._flops import ELEMENTWISE


class Link(NamedTuple):
    """An equation on the way from the whole program to an operation, and, of a loop, which round
    it was in."""

    eqn: Any
    step: int | None = None


class Frame(NamedTuple):
    """A line of Python."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        path = os.path.relpath(self.file) if _is_inside(self.file, os.getcwd()) else self.file
        code = linecache.getline(self.file, self.line).strip()
        return f"{path}:{self.line}, in `{self.function}`" + (f"\n    {code}" if code else "")


class Operation(NamedTuple):
    """An operation, described: its arrays are not kept."""

    name: str
    order: int
    """Its number among all that were carried out."""
    operands: tuple[str, ...]
    results: tuple[str, ...]
    entry: str
    """Of an elementwise operation the first entry that is not finite: `log(-1.5) = nan`."""
    frames: tuple[Frame, ...]
    """The innermost line of the user's, and before it, if it is another, that of a library."""
    rounds: tuple[int, ...]
    """Which rounds of loops around it, counted from 0, from the outermost."""
    inside: tuple[str, ...]
    """Names of jitted functions around it, such as `norm`."""

    def __str__(self) -> str:
        lines = [f"`{self.name}`" + "".join(f" in `{name}`" for name in reversed(self.inside))]
        lines[0] += "".join(f", in round {step} of a loop" for step in self.rounds)
        lines += [f"at {frame}" for frame in self.frames]
        lines += [f"of {operand}" for operand in self.operands]
        lines += [f"which gives {result}" for result in self.results]
        lines += [self.entry] if self.entry else []
        return "\n".join(lines).replace("\n", "\n  ")


class OperationFailed(Exception):
    """An operation raised; `__cause__` says what."""

    def __init__(self, operation: Operation):
        super().__init__(f"`{operation.name}` raised an error.")
        self.operation = operation


def observed(
    chain: Sequence[Link], order: int, operands: Sequence[Any], results: Sequence[Any]
) -> Operation:
    """The operation at the end of `chain`."""
    name = chain[-1].eqn.primitive.name
    return Operation(
        name=name,
        order=order,
        operands=tuple(map(summary, operands)),
        results=tuple(map(summary, results)),
        entry=_first_bad_entry(name, operands, results[0]) if results else "",
        frames=_frames(chain),
        rounds=tuple(link.step for link in chain if link.step is not None),
        inside=tuple(link.eqn.params["name"] for link in chain[:-1] if _is_jit(link.eqn)),
    )


def _is_jit(eqn: Any) -> bool:
    return eqn.primitive.name in ("jit", "pjit")


def summary(array: Any) -> str:
    """`float32[4,3], from -0.31 to 1.2, 2 zeros, 1 NaN, first at [2, 1]`."""
    text = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
    if not jnp.issubdtype(array.dtype, jnp.number):
        return text
    host = np.asarray(array)
    wide = host.astype(np.complex128 if np.iscomplexobj(host) else np.float64)
    finite = np.isfinite(wide)
    if wide.size == 1:
        return f"{text}, {wide.item():.6g}"
    parts = [text]
    if finite.any() and not np.iscomplexobj(wide):
        low, high = wide[finite].min(), wide[finite].max()
        parts.append(f"all {low:.6g}" if low == high else f"from {low:.6g} to {high:.6g}")
    zeros = int((wide == 0).sum())
    if 0 < zeros < wide.size:
        parts.append(f"{zeros:,} zero{'s' if zeros > 1 else ''}")
    for found, what in ((np.isnan(wide), "NaN"), (np.isinf(wide), "infinite")):
        if found.any():
            parts.append(f"{found.sum():,} of {wide.size:,} {what}, first at {place(found)}")
    return ", ".join(parts)


def place(found: np.ndarray) -> list[int]:
    """The indices of the first true entry."""
    return [int(index) for index in np.argwhere(found)[0]]


def _first_bad_entry(name: str, operands: Sequence[Any], result: Any) -> str:
    host = np.asarray(result)
    if name not in ELEMENTWISE or not jnp.issubdtype(result.dtype, jnp.inexact):
        return ""
    bad = np.isnan(host) if np.isnan(host).any() else np.isinf(host)
    if not bad.any():
        return ""
    at = np.unravel_index(int(np.argmax(bad)), host.shape)
    try:
        values = [np.broadcast_to(np.asarray(x), host.shape)[at] for x in operands]
    except ValueError:
        return ""
    called = ", ".join(f"{value.item():.6g}" for value in values)
    where = f" at {list(map(int, at))}" if at else ""
    return f"{name}({called}) = {host[at].item():.6g}{where}"


# Whose line it is


def _frames(chain: Sequence[Link]) -> tuple[Frame, ...]:
    """Frames of an equation end where the function begins that JAX has made a program of, so the
    innermost equation that knows one of the user's says most."""
    found: tuple[Frame, ...] = ()
    for link in chain:
        frames = [frame for frame in _traceback(link.eqn) if _owner(frame.file) != "jax"]
        users = [frame for frame in frames if _owner(frame.file) == "user"]
        if users:
            found = tuple(dict.fromkeys((frames[0], users[0])))
        elif frames and not found:
            found = (frames[0],)
    return found


def _traceback(eqn: Any) -> list[Frame]:
    """From the innermost frame outwards."""
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    return [Frame(f.file_name, f.line_num, f.function_name) for f in frames]


@cache
def _owner(file: str) -> str:
    """`"jax"`, `"library"` or `"user"`."""
    if _is_inside(file, *_folders(jax, jaxlib)) or file.startswith("<"):
        return "jax"
    paths = sysconfig.get_paths()
    libraries = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    ours = [str(Path(__file__).parent), *_own_callbacks()]
    known = [*_folders(eqx, optax), *ours, *libraries]
    return "library" if _is_inside(file, *known) else "user"


def _folders(*modules: Any) -> list[str]:
    return [str(Path(module.__file__).parent) for module in modules]


def _own_callbacks() -> list[str]:
    import jaxlightning.callbacks

    return _folders(jaxlightning.callbacks)


def _is_inside(file: str, *folders: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)
