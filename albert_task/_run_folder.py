"""The folder of a run: one process works in it, and it keeps the run that was begun there.

FOLDER/run.json          what the run is made of; see `check_same_run`
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlightning._checkpoint_files import RunLock, RunLocked

from ._files import read_json, write_json
from ._option import flag


def run_folder(path: str | Path) -> Path:
    """Makes the folder of a run.

    **Raises:** `OSError` where nothing can be written into it.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"Nothing can be written into the folder `{folder}`: {error.strerror}. "
            "Choose another one: `--out FOLDER`."
        ) from None
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from working in the folder of the run.

    **Raises:** `ValueError` where one does already.
    """
    try:
        lock = RunLock(folder)
    except RunLocked as error:
        raise ValueError(f"{error} Here that is `--out FOLDER`.") from None
    try:
        yield
    finally:
        lock.release()


# The run's identity


def check_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """**Raises:** `ValueError` where training in `folder` began with other options or text."""
    before = read_json(folder / "run.json")
    if before is None:
        return
    was, now = (one.get("command", "pretrain") for one in (before, identity))
    if was != now:
        raise ValueError(
            f"`{folder}` holds a run of `albert {was}`. Choose another folder for `albert {now}`: "
            "`--out FOLDER`."
        )
    differences = [
        f"{_named(name)} was {before.get(name)!r} and is {value!r}"
        for name, value in identity.items()
        if before.get(name, value) != value
    ]
    if differences:
        raise ValueError(
            f"The run in `{folder}` was begun with other options: {'; '.join(differences)}. Go on "
            "with the same ones, choose another folder (`--out FOLDER`), or delete this one."
            + _to_begin_with(folder)
        )


def _to_begin_with(folder: Path) -> str:
    """How another run begins with the weights of this one."""
    if (folder / "model").is_dir():
        return f" Its weights can be begun with: `--model {folder}`."
    if (folder / "checkpoints").is_dir():
        write = f"albert export --model {folder} --out EXPORTED"
        return f" Its weights can be begun with: `{write}`, then `--model EXPORTED`."
    return ""


def _named(name: str) -> str:
    if name in ("text", "tokenizer"):
        return f"the {name}'s fingerprint"
    if name in ("train", "validation"):
        return f"the fingerprint of `{flag(name)}`"
    return "the list of labels" if name == "labels" else f"`{flag(name)}`"


def begin_run(folder: Path, identity: dict[str, Any]) -> None:
    """Writes down what the run is made of."""
    write_json(folder / "run.json", identity)


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    """`content` as `read_json` gives it back: tuples as lists."""
    return json.loads(json.dumps(content))
