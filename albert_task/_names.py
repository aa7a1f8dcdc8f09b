"""Hugging Face's names of ALBERT's tensors, and ours, in one table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from ._base import AlbertTask
from ._model import Albert

Model = TypeVar("Model", Albert, AlbertTask)

_BODY = [
    (r"^\.embeddings\.words$", "embeddings.word_embeddings.weight"),
    (r"^\.embeddings\.positions$", "embeddings.position_embeddings.weight"),
    (r"^\.embeddings\.token_types$", "embeddings.token_type_embeddings.weight"),
    (r"^\.embeddings\.norm\.", "embeddings.LayerNorm."),
    (r"^\.mapping\.", "encoder.embedding_hidden_mapping_in."),
    (r"^\.groups\[(\d+)\]\[(\d+)\]", r"encoder.albert_layer_groups.\1.albert_layers.\2"),
    (r"\.attention\.output\.", ".attention.dense."),
    (r"\.attention\.norm\.", ".attention.LayerNorm."),
    (r"(\.albert_layers\.\d+)\.norm\.", r"\1.full_layer_layer_norm."),
    (r"^\.pooler\.", "pooler."),
]
"""Path in `Albert` → Hugging Face's name in `AlbertModel`; all that match apply, in order."""

_HEADS = [
    (r"^\.head\.norm\.", "predictions.LayerNorm."),
    (r"^\.head\.", "predictions."),
    (r"^\.sop\.", "sop_classifier.classifier."),
    (r"^\.classifier\.dense\.", "classifier."),
    (r"^\.outputs\.", "qa_outputs."),
    (r"^\.albert(?=\.)", ""),
]
"""The same for tasks. Names in their `albert` get the prefix `albert.`."""

_REPEATED = r"(albert\.)?embeddings\.position_ids$|predictions\.decoder\.|predictions\.bias_$"
"""What says nothing new: positions as integers, and the decoder, tied to the word embeddings."""

_HEAD_NAMES = r"predictions\.|sop_classifier\.|classifier\.|qa_outputs\.|(albert\.)?pooler\."
"""Heads, and the pooler, which some have: what another task may lack."""

_TIES = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}


def arrays(model: Any) -> list[tuple[str, Any]]:
    """Paths and arrays, or their shapes."""
    kept = eqx.filter(model, lambda leaf: eqx.is_array(leaf) or _is_abstract(leaf))
    leaves = jax.tree_util.tree_flatten_with_path(kept)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def name_of(path: str) -> str:
    """Hugging Face's name of the array at a path."""
    prefix = "albert." if path.startswith(".albert.") else ""
    for pattern, name in (*_HEADS, *_BODY):
        path = re.sub(pattern, name, path)
    return prefix + path


def _is_transposed(path: str, array: Any) -> bool:
    # PyTorch's Linear weights are (out, in). Embeddings, which are no `.weight` here, are not.
    return path.endswith(".weight") and array.ndim == 2


def to_tensors(model: Albert | AlbertTask) -> dict[str, Shaped[np.ndarray, ...]]:
    """The arrays as Hugging Face's `state_dict` has them, by its names. Blocks on the device."""
    tensors = {}
    for path, leaf in arrays(model):
        array = np.asarray(leaf)
        array = array.T if _is_transposed(path, array) else array
        tensors[name_of(path)] = np.ascontiguousarray(array)
    return tensors


def from_tensors(
    tensors: Mapping[str, Any], like: Model, *, fresh: Iterable[str] = (), source: str = ""
) -> Model:
    """`like` with the arrays of a Hugging Face `state_dict`, cast to the dtypes `like` has.

    **Arguments:**

    - `tensors`: by name, whatever `numpy.asarray` takes, such as numpy arrays or PyTorch's on the
      CPU; they are copied. Of an `AlbertModel`, or of any model with one (then under `albert.`).
      Heads and a pooler that `like` has not are left out.
    - `like`: what to fill in; arrays or, from `equinox.filter_eval_shape`, their shapes.
    - `fresh`: names that may be missing, or have another shape: `like` keeps its own arrays.
    - `source`: where the tensors are from, for messages.

    **Raises:** `ValueError` that lists what is missing, has another shape, or is left over.
    """
    tensors = _prefixed(tensors, like)
    allowed = set(fresh)
    used: set[str] = set()
    missing: list[str] = []
    misshaped: list[str] = []
    foreign_kinds: list[str] = []

    def filled(path: Any, leaf: Any) -> Any:
        if not (eqx.is_array(leaf) or _is_abstract(leaf)):
            return leaf
        place = jax.tree_util.keystr(path)
        name, shape = name_of(place), _torch_shape(place, leaf)
        array = None if name not in tensors else np.asarray(tensors[name])
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            used.add(name)
            foreign_kinds.append(f"`{name}` holds {array.dtype}")
        elif array is not None and array.shape == shape:
            used.add(name)
            # A copy: `jnp.asarray` may share the memory, which a training step then gives away.
            return jnp.array(array.T if _is_transposed(place, leaf) else array, leaf.dtype)
        if name not in allowed and array is None:
            missing.append(f"`{name}` {shape}")
        elif name not in allowed:
            assert array is not None
            used.add(name)
            misshaped.append(f"`{name}` is {array.shape}, not {shape}")
        return leaf

    model = jax.tree_util.tree_map_with_path(filled, like)
    foreign = re.compile(f"{_REPEATED}|{_HEAD_NAMES}")
    extra = [f"`{n}`" for n in tensors if n not in used and not foreign.match(n)]
    untied = _untied(tensors) if hasattr(like, "head") else []
    problems = [
        f"{what}: {', '.join(found)}."
        for what, found in (
            ("Missing", missing),
            ("Of another shape", misshaped),
            ("No numbers with a fraction, such as of a quantised model", foreign_kinds),
            ("Left over", sorted(extra)),
            ("Not equal to what it is tied to here", untied),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"{f'The tensors of `{source}`' if source else 'These tensors'} are not those of the "
            f"`{type(like).__name__}` that the configuration describes.\n" + "\n".join(problems)
        )
    return model


def lacking(tensors: Mapping[str, Any], like: Albert | AlbertTask) -> list[str]:
    """The heads' (and pooler's) tensors that are not there, or have another shape: those that a
    new task begins with its own."""
    tensors = _prefixed(tensors, like)
    found = []
    for path, leaf in arrays(like):
        name = name_of(path)
        absent = name not in tensors or tuple(tensors[name].shape) != _torch_shape(path, leaf)
        if absent and re.match(_HEAD_NAMES, name):
            found.append(name)
    return found


def unread(tensors: Mapping[str, Any], like: Albert | AlbertTask) -> list[str]:
    """The heads' (and pooler's) tensors that `like` has no place for."""
    known = {name_of(path) for path, _ in arrays(like)}
    names = set(_prefixed(tensors, like)) - known
    return sorted(n for n in names if re.match(_HEAD_NAMES, n) and not re.match(_REPEATED, n))


def _torch_shape(path: str, leaf: Any) -> tuple[int, ...]:
    return leaf.shape[::-1] if _is_transposed(path, leaf) else leaf.shape


def _prefixed(tensors: Mapping[str, Any], like: Any) -> Mapping[str, Any]:
    """With the prefix `albert.` as `like` has it: a task yes, an `Albert` no."""
    inside = {name for name in tensors if name.startswith("albert.")}
    if isinstance(like, AlbertTask):
        if inside:
            return tensors
        parts = ("embeddings.", "encoder.", "pooler.")
        return {f"albert.{n}" if n.startswith(parts) else n: t for n, t in tensors.items()}
    if not inside:
        return tensors
    return {name.removeprefix("albert."): tensor for name, tensor in tensors.items()}


def _untied(tensors: Mapping[str, Any]) -> list[str]:
    return [
        f"`{name}`"
        for name, other in _TIES.items()
        if name in tensors
        and other in tensors
        and not np.array_equal(tensors[name], tensors[other])
    ]
