"""What a command is told by `MODULE:NAME`: something of a script of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from .._checkpoint_files import CheckpointError
from .._importing import nothing_trains


def named(spec: str, option: str, why: str) -> Any:
    """What `module:name` or `path/to/file.py:name` stands for.

    **Arguments:**

    - `option`: where `spec` was written, and `why` the module is imported, for messages.

    **Raises:** `CheckpointError` where there is no such thing. Errors of the module itself pass.
    """
    module, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise CheckpointError(
            f"`{option} {spec}` has to be MODULE:NAME, such as `train.py:Classifier` or "
            "`package.module:make`."
        )
    guard = 'put the training under `if __name__ == "__main__":`'
    with nothing_trains(f"`{module}` was imported {why}", guard):
        found: Any = _file(Path(module)) if module.endswith(".py") else _module(module, option)
    for part in name.split("."):
        if not hasattr(found, part):
            raise CheckpointError(f"`{module}` has no `{name}`.")
        found = getattr(found, part)
    return found


def needs_arguments(function: Any) -> bool:
    """Whether a function cannot be called without any."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False


def _file(path: Path) -> Any:
    """A file as a module, which finds the modules beside it. Its name is one that no other module
    has: a `random.py` must not stand in for Python's. So it is not `__main__` either."""
    if not path.is_file():
        raise CheckpointError(f"There is no file `{path}`.")
    sys.path.insert(0, str(path.absolute().parent))
    name = f"_replayed_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(name: str, option: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise CheckpointError(
            f"There is no module `{error.name}`. For a file, write its path: "
            f"`{option} {name.replace('.', '/')}.py:NAME`."
        ) from error
