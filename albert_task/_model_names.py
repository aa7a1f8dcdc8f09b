"""What names a model: a preset or a `config.json`, a folder with weights, or a name on the hub."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

from jaxlightning._nearest import nearest

from ._config import _PRESETS, AlbertConfig
from ._weight_files import FILES, read_tensors

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


class NamesModel:
    """What follows from the `model` that options name."""

    model: str

    @property
    def random(self) -> bool:
        """Whether the model begins with random weights: a preset or a `config.json` has none."""
        return self.model in _PRESETS or (
            Path(self.model).is_file() and self.model.endswith(".json")
        )

    @functools.cached_property
    def folder(self) -> Path:
        """`model_folder` of a model that has weights. The hub is asked once."""
        return model_folder(self.model)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The name of a preset; of any other model a hash of what its files hold."""
        if self.model in _PRESETS:
            return self.model
        found = hashlib.sha256(repr(self.configured()).encode())
        tensors = {} if self.random else read_tensors(self.folder)
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
        return f"{'configuration' if self.random else 'weights'} {found.hexdigest()[:16]}"

    def configured(self, **changes: Any) -> AlbertConfig:
        """The model's configuration, with some fields changed.

        **Raises:** `FileNotFoundError` where there is no model; `ValueError` for a configuration
        that cannot be.
        """
        if self.model in _PRESETS:
            return AlbertConfig.preset(self.model, **changes)
        path = Path(self.model) if self.random else config_file(self.folder)
        return dataclasses.replace(AlbertConfig.from_json(path), **changes)


def check_model(model: str) -> None:
    """**Raises:** `ValueError` where `--model` looks like a preset, or a file, that there is not.

    What else is no folder is taken for a name on the hub, which knows best.
    """
    if model in _PRESETS or Path(model).exists():
        return
    near = "" if "/" in model else nearest(model, _PRESETS)
    if near or model.endswith(".json"):
        listed = ", ".join(f"`{choice}`" for choice in _PRESETS)
        raise ValueError(
            f"`--model {model}` is no preset, file or folder. The presets are {listed}; any other "
            f"model is a `config.json`, the folder of a model, or a name on the hub.{near}"
        )


def config_file(folder: Path) -> Path:
    """The `config.json` of a model's folder.

    **Raises:** `FileNotFoundError` where there is none.
    """
    path = folder / "config.json"
    if path.is_file():
        return path
    if (folder / "run.json").is_file():
        now = ""
        if (folder / "checkpoints").is_dir():  # pretraining: fine-tuning has some for each seed
            now = (
                "; or, to write the model as it is now: "
                f"`albert export --model {folder} --out FOLDER`"
            )
        raise FileNotFoundError(f"The run in `{folder}` has not ended. Go on with it{now}.")
    raise FileNotFoundError(
        f"There is no `config.json` in `{folder}`. Give the folder of a run, or of a model: with "
        f"`config.json` and one of {', '.join(f'`{file}`' for file in FILES)}."
    )


def model_folder(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The folder of a model: `name` itself, or where the hub's model has been downloaded to.

    **Raises:** `FileNotFoundError` where there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        inner = path / "model"
        return inner if not (path / "config.json").is_file() and inner.is_dir() else path
    if path.exists():
        raise FileNotFoundError(f"`{path}` is a file. Give the folder of a model.")
    if str(name) in _PRESETS:
        raise FileNotFoundError(
            f"`{name}` is a size, and has no weights. Make a model of random ones: "
            f'`AlbertForMaskedLM.init(AlbertConfig.preset("{name}"), key)`.'
        )
    from huggingface_hub import snapshot_download

    patterns = ["config.json", *TOKENIZER_FILES, "*.safetensors", "*.index.json"]
    try:
        found = snapshot_download(
            str(name), revision=revision, cache_dir=cache_dir, allow_patterns=patterns
        )
        if not list(Path(found).glob("*.safetensors")):
            others = [*patterns, "pytorch_model*.bin", "flax_model.msgpack"]
            found = snapshot_download(
                str(name), revision=revision, cache_dir=cache_dir, allow_patterns=others
            )
    except Exception as error:
        what = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"There is no folder `{name}`, and the hub did not give a model of that name "
            f"({type(error).__name__}: {what})."
        ) from error
    return Path(found)
