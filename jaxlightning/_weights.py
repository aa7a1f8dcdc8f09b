"""A task's arrays out of a checkpoint: all of them, or parts that are taken on purpose."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ._checkpoint_arrays import is_scalar, named_leaves
from ._checkpoint_files import CheckpointError
from ._checkpoint_read import is_spec, key_implementation, load_arrays, read_manifest
from ._init import TaskSource
from ._listing import listed
from ._safetensors import read_safetensors
from ._say import say
from ._task import TaskModule

_T = TypeVar("_T", bound=TaskModule)


def load_weights(path: str | os.PathLike[str], task: _T) -> _T:
    """`task` with the arrays of a checkpoint, in the task's dtypes.

    **Arguments:**

    - `path`: a checkpoint, of a whole run or of weights only, or a file of `export_weights`. Where
      the run evaluated other parameters than it trained, an average, it has those.
    - `task`: a task of the same structure; its arrays may be abstract.

    **Raises:** `ValueError` that lists what is missing and what has another shape or kind.
    """
    arrays = stored_arrays(path)
    named = [(name, leaf) for name, leaf in named_leaves(task) if is_spec(leaf)]
    wrong = [f"{name}: missing" for name, _ in named if name not in arrays]
    wrong += _misfits(arrays, dict(named))
    if wrong:
        raise ValueError(
            f"The checkpoint `{path}` does not fit `{type(task).__name__}`:{listed(wrong)}\n"
            "Build the task as it was, or take parts on purpose: `warm_start(path, task, "
            "include=...)`."
        )
    return _filled(task, arrays)


def warm_start(
    path: str | os.PathLike[str],
    task: _T,
    *,
    include: str | None = None,
    exclude: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> _T:
    """`task` with some arrays of a checkpoint, and its own where there is none. Prints which.

        task = warm_start("runs/a/step_0000001000", Classifier(key), include="^encoder/")

    **Arguments:**

    - `path`: as for `load_weights`.
    - `include`, `exclude`: regular expressions, searched in the checkpoint's paths of leaves, such
      as `encoder/layers/0/weight`: which to take, by default all, and which of these not.
    - `rename`: replacements (`re.sub`), in this order, that turn a path in the checkpoint into one
      in `task`: `{"^bert/": "albert/"}`.

    **Raises:** `ValueError` where an array that is to be taken does not fit, and for an expression
    that finds nothing: parts that are not wanted have to be excluded by name.
    """
    arrays = stored_arrays(path)
    for argument, pattern in (("include", include), ("exclude", exclude)):
        if pattern is not None:
            _check_finds(f"{argument}={pattern!r}", pattern, arrays, path)
    taken = {
        name: array
        for name, array in arrays.items()
        if re.search(include or "", name) and not (exclude and re.search(exclude, name))
    }
    for pattern, replacement in (rename or {}).items():
        _check_finds(f"rename={{{pattern!r}: {replacement!r}}}", pattern, taken, path)
        taken = _renamed(taken, pattern, replacement)
    leaves = {name: leaf for name, leaf in named_leaves(task) if is_spec(leaf)}
    fitting = {name: array for name, array in taken.items() if name in leaves}
    wrong = _misfits(fitting, leaves)
    if wrong:
        raise ValueError(
            f"Parts of `{path}` do not fit `{type(task).__name__}`:{listed(wrong)}\nLeave them "
            "out: `exclude=...`, a regular expression on their paths in the checkpoint."
        )
    if not fitting:
        raise ValueError(
            f"Nothing of `{path}` belongs into `{type(task).__name__}`: what was to be taken is "
            f"like {_examples(taken)}, and the task has {_examples(leaves)}. Write `rename={{...}}`"
            ", from the checkpoint's paths to the task's."
        )
    say(_report(path, arrays, taken, fitting, leaves))
    return _filled(task, fitting)


def load_from_checkpoint(
    kind: type[_T], path: str | os.PathLike[str], make: Callable[..., _T], changed: dict[str, Any]
) -> _T:
    """See `TaskModule.load_from_checkpoint`. `make(hyperparameters, key)` builds the task."""
    manifest = read_manifest(path)
    name = manifest.metadata.get("task")
    if name != kind.__qualname__:
        raise ValueError(
            f"The checkpoint `{path}` is of a `{name}`, and this is "
            f"`{kind.__qualname__}.load_from_checkpoint`. Call that of its own class, or take its "
            "arrays on purpose: `warm_start(path, task)`."
        )
    stored_hyperparameters = manifest.metadata.get("hyperparameters")
    if not isinstance(stored_hyperparameters, dict):
        raise CheckpointError(
            f"The checkpoint `{path}` holds no hyper-parameters, so `{name}` can't be made of them."
            f" Make it, and load its arrays: `load_weights({str(path)!r}, task)`."
        )
    hyperparameters = {**with_tuples(stored_hyperparameters), **changed}
    task: Any = TaskSource(lambda key: make(hyperparameters, key)).task
    stored = manifest.scalars
    scalars = {f"task/{name}": leaf for name, leaf in named_leaves(task) if is_scalar(leaf)}
    wrong = [
        f"{name.removeprefix('task/')}: {stored[name]!r} in the checkpoint, {leaf!r} here"
        for name, leaf in scalars.items()
        if repr(stored.get(name, leaf)) != repr(leaf)
    ]
    if wrong:
        raise ValueError(
            f"The checkpoint `{path}` is of a `{kind.__name__}` with other numbers:{listed(wrong)}"
            f"\nSay what differs: `{kind.__name__}.load_from_checkpoint(path, name=value)`."
        )
    loaded: _T = load_weights(path, task)
    return loaded


def stored_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a task, on the host, by their paths in it: as they are evaluated."""
    if Path(path).is_file():
        return read_safetensors(path)
    arrays = load_arrays(path, include=_OF_THE_TASK)
    if evaluated := read_manifest(path).metadata.get("evaluated"):
        averages = load_arrays(path, include=f"^{re.escape(evaluated)}/")
        arrays |= {f"task{name.removeprefix(evaluated)}": x for name, x in averages.items()}
    return {re.sub(_OF_THE_TASK, "", name): array for name, array in arrays.items()}


_OF_THE_TASK = r"^(task/|\.task(?=\W)|\['task'\])"
"""How names of a task's leaves begin, in a state or alone; the long ones stand for names that
would read alike (`named_leaves`)."""


def _misfits(arrays: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> list[str]:
    """A line for each array that is there and can't become the leaf of its name."""
    wrong = []
    for name, leaf in leaves.items():
        if name not in arrays:
            continue
        array = arrays[name]
        dtype, shape = leaf.dtype, leaf.shape
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            like = jax.eval_shape(jax.random.key_data, leaf)
            dtype, shape = like.dtype, like.shape
        if array.shape != shape:
            wrong.append(f"{name}: {array.shape} in the checkpoint, {shape} here")
        elif _kind(array.dtype) != _kind(dtype):
            wrong.append(f"{name}: {array.dtype} in the checkpoint, {dtype} here")
    return wrong


def _kind(dtype: Any) -> Any:
    """What a dtype may be cast within: one floating-point dtype into another, and no more."""
    return "floating" if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(dtype)


def _filled(task: _T, arrays: Mapping[str, np.ndarray]) -> _T:
    leaves = [
        _like(arrays[name], leaf) if name in arrays and is_spec(leaf) else leaf
        for name, leaf in named_leaves(task)
    ]
    return jax.tree.unflatten(jax.tree.structure(task), leaves)


def _like(array: np.ndarray, leaf: Any) -> jax.Array:
    """An array of a checkpoint as a leaf of the dtype of `leaf`, which may be keys."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=key_implementation(leaf))
    return jnp.asarray(array, leaf.dtype)


def _renamed(
    arrays: Mapping[str, np.ndarray], pattern: str, replacement: str
) -> dict[str, np.ndarray]:
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        new = re.sub(pattern, replacement, name)
        if new in renamed:
            raise ValueError(
                f"`rename={{{pattern!r}: {replacement!r}}}` makes two arrays `{new}`, one of them "
                f"`{name}`. Exclude one, or rename them apart."
            )
        renamed[new] = array
    return renamed


def _check_finds(what: str, pattern: str, arrays: Mapping[str, Any], path: Any) -> None:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{what}` is no regular expression: {error}. To search for the text as it is, write "
            f"`re.escape({pattern!r})`."
        ) from error
    if not any(map(expression.search, arrays)):
        raise ValueError(
            f"`{what}` finds nothing in `{path}`, where paths are like {_examples(arrays)}."
        )


def _report(
    path: Any,
    arrays: Mapping[str, Any],
    taken: Mapping[str, np.ndarray],
    fitting: Mapping[str, np.ndarray],
    leaves: Mapping[str, Any],
) -> str:
    cast = [
        f"{name}: {fitting[name].dtype} to {leaf.dtype}"
        for name, leaf in leaves.items()
        if name in fitting and "key<" not in str(leaf.dtype) and fitting[name].dtype != leaf.dtype
    ]
    parts: dict[str, Collection[Any]] = {
        "taken": fitting,
        "cast": cast,
        "with no place in the task": taken.keys() - fitting.keys(),
        "left in the checkpoint": range(len(arrays) - len(taken)),
        "of the task's own": leaves.keys() - fitting.keys(),
    }
    lines = [f"Warm start from `{path}`:"]
    for what, names in parts.items():
        if names:
            shown = "" if isinstance(names, range) else listed(sorted(names), indent="    ")
            lines.append(f"  {len(names)} {what}{shown}")
    return "\n".join(lines)


def _examples(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in list(names)[:3]) or "nothing"


def with_tuples(value: Any) -> Any:
    """JSON's lists as tuples: static fields have to have a hash, which lists have not."""
    if isinstance(value, dict):
        return {name: with_tuples(item) for name, item in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value
