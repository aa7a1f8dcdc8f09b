"""The structure of a batch as JSON values: how the arrays of a file belong together."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import PyTree

_LEAF = "leaf"


def structure_of(batch: PyTree) -> Any:
    """Dicts with string keys, lists, tuples and None; of other nodes only the type's name."""
    if batch is None:
        return None
    if type(batch) is dict and all(type(key) is str for key in batch):
        return {"dict": {key: structure_of(item) for key, item in batch.items()}}
    for kind in (list, tuple):
        if type(batch) is kind:
            return {kind.__name__: [structure_of(item) for item in batch]}
    if jax.tree_util.all_leaves([batch]):
        return _LEAF
    return {"node": f"{type(batch).__module__}.{type(batch).__qualname__}"}


def with_structure(structure: Any, leaf: Any) -> PyTree:
    """A tree of that structure with `leaf` at each leaf.

    **Raises:** `ValueError` where it has nodes that a file can't make, or where it is none.
    """
    if structure is None:
        return None
    if structure == _LEAF:
        return leaf
    match structure:
        case {"dict": dict(items)} if len(structure) == 1:
            return {key: with_structure(item, leaf) for key, item in items.items()}
        case {"list": list(items)} if len(structure) == 1:
            return [with_structure(item, leaf) for item in items]
        case {"tuple": list(items)} if len(structure) == 1:
            return tuple(with_structure(item, leaf) for item in items)
        case {"node": str(name)} if len(structure) == 1:
            raise ValueError(f"its batches hold a `{name}`")
    raise ValueError(f"`{structure!r:.80}` is no structure of a batch")
