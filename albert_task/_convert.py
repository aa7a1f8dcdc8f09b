"""Models to and from folders as Hugging Face's libraries write them.

    task = AlbertForMaskedLM.from_pretrained("albert/albert-base-v2")
    save_pretrained(task, "my-albert", tokenizer)   # which transformers then loads

`docs/albert_weights.md` has the files, the names of tensors, and Google's own checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray, Shaped

from jaxlightning._say import say

from ._base import AlbertTask
from ._classification import (
    AlbertForMultipleChoice,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
)
from ._config import AlbertConfig, unnamed_labels
from ._files import whole, write_json, write_text
from ._model import Albert
from ._model_names import TOKENIZER_FILES, config_file, model_folder
from ._names import from_tensors, lacking, to_tensors, unread
from ._pretraining_task import AlbertForPreTraining
from ._question_answering import AlbertForQuestionAnswering
from ._tasks import AlbertForMaskedLM
from ._tokenizer import load_tokenizer, tokenizer_config
from ._weight_files import read_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODELS: Mapping[str, type[Albert] | type[AlbertTask]] = {
    "AlbertModel": Albert,
    "AlbertForPreTraining": AlbertForPreTraining,
    "AlbertForMaskedLM": AlbertForMaskedLM,
    "AlbertForSequenceClassification": AlbertForSequenceClassification,
    "AlbertForTokenClassification": AlbertForTokenClassification,
    "AlbertForMultipleChoice": AlbertForMultipleChoice,
    "AlbertForQuestionAnswering": AlbertForQuestionAnswering,
}
"""Hugging Face's names of models, and ours, which are the same."""

_SHARD = 5_000_000_000  # bytes, as in transformers


def from_pretrained(
    name: str | Path,
    kind: type[Any] | None = None,
    *,
    key: PRNGKeyArray | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Any:
    """A model or task out of a folder or of the hub, as Hugging Face's `save_pretrained` writes it.

    **Arguments:**

    - `name`: a folder with `config.json` and weights (`_weight_files.FILES`, whole or in parts),
      the folder of a run of `albert pretrain` or `albert finetune`, or a name on the hub.
    - `kind`: the class, `Albert` or one of the tasks; by default the one that `config.json` names.
      Heads that the weights lack, or have in another shape, and a classifier of other labels or
      of another kind, begin with random weights, which is said; by default that is an error, and
      `labels` are only names.
    - `key`: of those random weights.
    - `revision`, `cache_dir`: of the hub's model, and where downloads are kept.
    - `options`: as of the task's `init`, and fields of `AlbertConfig` that replace the file's:
      `labels=("negative", "positive")`, `hidden_dropout_prob=0.1`.

    **Raises:** `FileNotFoundError` where a file is not there, or the hub has no such model;
    `ValueError` for files that cannot be read, and for tensors that are not those of the model,
    with a list of what is missing, has another shape, or is left over.
    """
    folder = model_folder(name, revision=revision, cache_dir=cache_dir)
    path = config_file(folder)
    saved = AlbertConfig.from_json(path)
    named = kind or _named_kind(path)
    fields = {field.name for field in dataclasses.fields(AlbertConfig)}
    changes = {key: options.pop(key) for key in sorted(fields & set(options))}
    config = dataclasses.replace(saved, **changes)
    tensors = read_tensors(folder)
    foreign = None if kind is None else _classifies_other(path, saved, kind, config)
    if foreign and any(name.startswith("classifier.") for name in tensors):
        say(f"The classifier in `{folder}` is {foreign}, and so its weights are not used.")
        tensors = {n: t for n, t in tensors.items() if not n.startswith("classifier.")}
    if named is Albert:
        like = eqx.filter_eval_shape(lambda key: Albert(config, key=key), jax.random.key(0))
        if not any(re.match(r"(albert\.)?pooler\.", name) for name in tensors):
            like = eqx.tree_at(lambda model: model.pooler, like, None)
        model = from_tensors(tensors, like, source=str(folder))
        _report(folder, [], unread(tensors, like))
        return model
    init = lambda key: named.init(config, key, **options)
    like = eqx.filter_eval_shape(init, jax.random.key(0))
    fresh = lacking(tensors, like) if kind is not None else []
    if fresh:
        like = init(jax.random.key(0) if key is None else key)
    task = from_tensors(tensors, like, fresh=fresh, source=str(folder))
    _report(folder, fresh, unread(tensors, like))
    return task


_CLASSIFIERS = (
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertForMultipleChoice,
)
"""The tasks whose heads have the same names, and may have the same shapes."""


def _classifies_other(
    path: Path, saved: AlbertConfig, kind: type[Any], config: AlbertConfig
) -> str | None:
    """What a saved classifier is for, where it is not for what is asked; labels that were only
    numbered may get names."""
    if not issubclass(kind, _CLASSIFIERS):
        return None
    names = _architectures(path)
    of = _first_known(names)
    if of is None or not issubclass(kind, of):
        return f"that of {' or '.join(f'`{_plain(name)}`' for name in names)}"
    if issubclass(kind, AlbertForMultipleChoice):
        return None
    if issubclass(kind, AlbertForSequenceClassification) and saved.problem != config.problem:
        return f"for `{saved.problem}`"
    if saved.labels not in (config.labels, unnamed_labels(len(config.labels))):
        return f"for the labels {', '.join(f'`{label}`' for label in saved.labels)}"
    return None


def _report(folder: Path, fresh: list[str], left_out: list[str]) -> None:
    if fresh:
        listed = ", ".join(f"`{name}`" for name in fresh)
        say(f"Not in `{folder}`, and so begun with random weights: {listed}.")
    if left_out:
        listed = ", ".join(f"`{name}`" for name in left_out)
        say(f"In `{folder}`, but of no use here: {listed}.")


def _architectures(path: Path) -> list[Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    names = content.get("architectures") or ["AlbertForMaskedLM"]
    return names if isinstance(names, list) else [names]


def _plain(name: Any) -> str:
    return str(name).removeprefix("Flax").removeprefix("TF")


def _first_known(names: list[Any]) -> type[Any] | None:
    return next((MODELS[one] for one in map(_plain, names) if one in MODELS), None)


def _named_kind(path: Path) -> Any:
    names = _architectures(path)
    found = _first_known(names)
    if found is not None:
        return found
    raise ValueError(
        f"`{path}` is of {', '.join(f'`{name}`' for name in names)}, which is none of the models "
        f"here: {', '.join(f'`{name}`' for name in MODELS)}. To take its ALBERT for one of them: "
        "`AlbertForSequenceClassification.from_pretrained(...)`."
    )


def save_pretrained(
    model: Albert | AlbertTask,
    folder: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    *,
    max_shard_size: int = _SHARD,
) -> None:
    """Writes `config.json` and `model.safetensors` for the Hugging Face class of the same name.

    Each file is whole or not there. Blocks on the device.

    **Arguments:**

    - `tokenizer`: written as `tokenizer.json`, or the place of one: a file, or a folder, whose
      tokenizer's files are copied. A `tokenizer_config.json` keeps transformers from taking a
      normalisation of its own.
    - `max_shard_size`: bytes; larger models are parted, with `model.safetensors.index.json`.

    **Raises:** `ValueError` for a model that Hugging Face has not, and for the folder of a run;
    `FileNotFoundError` where there is no such tokenizer.
    """
    folder = Path(folder)
    if (folder / "run.json").is_file():
        raise ValueError(f"`{folder}` is a run's folder, which keeps its own. Choose another one.")
    kind = next((name for name, of in MODELS.items() if type(model) is of), None)
    if kind is None:
        raise ValueError(
            f"Hugging Face has no model for a `{type(model).__name__}`. Save its `albert`, or a "
            f"task of {', '.join(f'`{name}`' for name in MODELS)}."
        )
    copied: list[Path] = []
    if isinstance(tokenizer, str | Path):
        place = Path(tokenizer)
        tokenizer = load_tokenizer(place)
        copied = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(to_tensors(model), folder, max_shard_size)
    write_json(folder / "config.json", {**model.config.to_dict(), "architectures": [kind]})
    for path in copied:
        with whole(folder / path.name) as scratch:
            shutil.copyfile(path, scratch)
    if tokenizer is not None and not copied:
        write_text(folder / "tokenizer.json", tokenizer.to_str())
    if tokenizer is not None and "tokenizer_config.json" not in {path.name for path in copied}:
        write_json(
            folder / "tokenizer_config.json", tokenizer_config(model.config.max_position_embeddings)
        )


def _save_tensors(tensors: dict[str, Shaped[np.ndarray, ...]], folder: Path, limit: int) -> None:
    from safetensors.numpy import save_file

    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    single = len(shards) == 1
    names = [
        "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    index = folder / "model.safetensors.index.json"
    with contextlib.ExitStack() as stack:
        for name, shard in zip(names, shards, strict=True):
            scratch = stack.enter_context(whole(folder / name))
            save_file(shard, scratch, metadata={"format": "pt"})
        index.unlink(missing_ok=True)  # it would name parts of two models
    if not single:
        places = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        total = sum(array.nbytes for array in tensors.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": places})
    for path in (folder / "model.safetensors", *folder.glob("model-*-of-*.safetensors")):
        if path.name not in names:
            path.unlink(missing_ok=True)
