"""What names a model: a preset or a `config.json`, a folder with weights, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from jaxlightning._checks import nearest

from ._config import _PRESETS

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


def is_configuration(model: str) -> bool:
    """Whether a `--model` is a preset or a `config.json`, and so begins with random weights."""
    return model in _PRESETS or (Path(model).is_file() and model.endswith(".json"))


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


def model_folder(
    name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The folder of a model: `name` itself, or where the hub's model has been downloaded to.

    **Raises:** `FileNotFoundError` where there is neither.
    """
    path = Path(name)
    if path.is_dir():
        inner = path / "model"
        return inner if not (path / "config.json").is_file() and inner.is_dir() else path
    if path.exists():
        raise FileNotFoundError(f"`{path}` is a file. Give the folder of a model.")
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
        raise FileNotFoundError(
            f"`{name}` is no folder here, and the hub did not give a model of that name: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Path(found)
