"""Weights to and from Hugging Face's ALBERT: their names, and theirs and ours in one table.

task = from_pretrained("albert-base-v2")   # a folder with config.json and model.safetensors
save_pretrained(task, "my-albert")         # which transformers then loads
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from ._config import AlbertConfig
from ._model import Albert
from ._tasks import AlbertForMaskedLM

_Model = TypeVar("_Model", Albert, AlbertForMaskedLM)

_LAYER = r"^\.groups\[(\d+)\]\[(\d+)\]"
_TABLE = [
    (r"^\.embeddings\.words$", "embeddings.word_embeddings.weight"),
    (r"^\.embeddings\.positions$", "embeddings.position_embeddings.weight"),
    (r"^\.embeddings\.token_types$", "embeddings.token_type_embeddings.weight"),
    (r"^\.embeddings\.norm\.", "embeddings.LayerNorm."),
    (r"^\.mapping\.", "encoder.embedding_hidden_mapping_in."),
    (_LAYER, r"encoder.albert_layer_groups.\1.albert_layers.\2"),
    (r"\.attention\.output\.", ".attention.dense."),
    (r"\.attention\.norm\.", ".attention.LayerNorm."),
    (r"(\.albert_layers\.\d+)\.norm\.", r"\1.full_layer_layer_norm."),
    (r"^\.pooler\.", "pooler."),
]
"""Path in `Albert` → Hugging Face's name in `AlbertModel`; all that match apply, in order."""

_HEAD = [
    (r"^\.head\.norm\.", "predictions.LayerNorm."),
    (r"^\.head\.", "predictions."),
    (r"^\.albert(?=\.)", ""),
]
"""The same for `AlbertForMaskedLM`. Names in its `albert` get the prefix `albert.`."""

_UNUSED = r"(albert\.)?(pooler\.|embeddings\.position_ids$)|sop_classifier\.|predictions\.decoder\."
"""What a checkpoint may hold besides: the pooler and sentence order of pretraining, positions as
integers, and the tied decoder, which repeats the word embeddings and the head's bias."""


def _arrays(model: Any) -> list[tuple[str, Any]]:
    arrays = eqx.filter(model, lambda leaf: eqx.is_array(leaf) or _is_abstract(leaf))
    leaves = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _name(path: str) -> str:
    prefix = "albert." if path.startswith(".albert.") else ""
    for pattern, name in (*_HEAD, *_TABLE):
        path = re.sub(pattern, name, path)
    return prefix + path


def _is_transposed(path: str, array: Any) -> bool:
    # PyTorch's Linear weights are (out, in). Embeddings, which are no `.weight` here, are not.
    return path.endswith(".weight") and array.ndim == 2


def to_tensors(model: Albert | AlbertForMaskedLM) -> dict[str, Shaped[np.ndarray, ...]]:
    """The arrays as Hugging Face's `state_dict` has them, by its names. Blocks on the device."""
    tensors = {}
    for path, leaf in _arrays(model):
        array = np.asarray(leaf)
        array = array.T if _is_transposed(path, array) else array
        tensors[_name(path)] = np.ascontiguousarray(array)
    return tensors


def from_tensors(tensors: Mapping[str, Any], like: _Model) -> _Model:
    """`like` with the arrays of a Hugging Face `state_dict`, cast to the dtypes `like` has.

    **Arguments:**

    - `tensors`: by name, whatever `numpy.asarray` takes, such as numpy arrays or PyTorch's on the
      CPU; they are copied. Of an `AlbertModel`, or of any model with one (then under `albert.`,
      whose heads are left out where `like` has none).
    - `like`: what to fill in; arrays or, from `equinox.filter_eval_shape`, their shapes.

    **Raises:** `ValueError` that lists what is missing, has another shape, or is left over.
    """
    tensors = _prefixed(tensors, like)
    used: set[str] = set()
    missing: list[str] = []
    misshaped: list[str] = []

    def filled(path: Any, leaf: Any) -> Any:
        if not (eqx.is_array(leaf) or _is_abstract(leaf)):
            return leaf
        place = jax.tree_util.keystr(path)
        name = _name(place)
        if name not in tensors:
            missing.append(f"`{name}` {_torch_shape(place, leaf)}")
            return leaf
        used.add(name)
        array = np.asarray(tensors[name])
        if array.shape != _torch_shape(place, leaf):
            misshaped.append(f"`{name}` is {array.shape}, not {_torch_shape(place, leaf)}")
            return leaf
        # A copy: `jnp.asarray` may share the memory, which a training step then gives away.
        return jnp.array(array.T if _is_transposed(place, leaf) else array, leaf.dtype)

    model = jax.tree_util.tree_map_with_path(filled, like)
    extra = [f"`{n}`" for n in tensors if n not in used and not re.match(_UNUSED, n)]
    untied = _untied(tensors) if isinstance(like, AlbertForMaskedLM) else []
    problems = [
        f"{what}: {', '.join(found)}."
        for what, found in (
            ("Missing", missing),
            ("Of another shape", misshaped),
            ("Left over", sorted(extra)),
            ("Not equal to what it is tied to here", untied),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"These tensors are not those of the `{type(like).__name__}` that the configuration "
            "describes.\n" + "\n".join(problems)
        )
    return model


def _torch_shape(path: str, leaf: Any) -> tuple[int, ...]:
    return leaf.shape[::-1] if _is_transposed(path, leaf) else leaf.shape


def _prefixed(tensors: Mapping[str, Any], like: Any) -> Mapping[str, Any]:
    """With the prefix `albert.` as `like` has it: with a head yes, without no."""
    inside = {name for name in tensors if name.startswith("albert.")}
    if isinstance(like, AlbertForMaskedLM):
        if inside:
            return tensors
        parts = ("embeddings.", "encoder.", "pooler.")
        return {f"albert.{n}" if n.startswith(parts) else n: t for n, t in tensors.items()}
    if not inside:
        return tensors
    return {name.removeprefix("albert."): tensors[name] for name in inside}


def _untied(tensors: Mapping[str, Any]) -> list[str]:
    ties = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }
    return [
        f"`{name}`"
        for name, other in ties.items()
        if name in tensors
        and other in tensors
        and not np.array_equal(tensors[name], tensors[other])
    ]


def from_pretrained(folder: str | Path, **options: Any) -> AlbertForMaskedLM:
    """A task from a folder as Hugging Face's `save_pretrained` writes it.

    **Arguments:**

    - `folder`: on this machine, with `config.json` and `model.safetensors`.
    - `options`: as of `AlbertForMaskedLM.init`.

    **Raises:** `FileNotFoundError` where a file is not there; `ValueError` as `from_tensors`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            pickled = (folder / "pytorch_model.bin").is_file()
            raise FileNotFoundError(
                f"There is no `{name}` in `{folder}`."
                + (
                    " There is a `pytorch_model.bin`, which is a pickle and is not read here. "
                    "Let transformers load and `save_pretrained` it: that gives safetensors."
                    if pickled
                    else " Give the folder of a model, with `config.json` and `model.safetensors`."
                )
            )
    config = AlbertConfig.from_json(folder / "config.json")
    like = eqx.filter_eval_shape(
        lambda key: AlbertForMaskedLM.init(config, key, **options), jax.random.key(0)
    )
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"`{folder / 'model.safetensors'}` is no safetensors file: {error}."
        ) from error
    return from_tensors(tensors, like)


def save_pretrained(task: AlbertForMaskedLM, folder: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` for Hugging Face's `AlbertForMaskedLM`."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**task.config.to_dict(), "architectures": ["AlbertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(to_tensors(task), folder / "model.safetensors", metadata={"format": "pt"})
