"""`jaxlightning replay FOLDER --task MODULE:NAME`: runs the step of a capsule again."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from .._checkpoint_files import CheckpointError
from .._importing import nothing_trains

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Adds `replay` to the subparsers of the command line."""
    parser = commands.add_parser(
        "replay", help="run a failed step again, and say in which operation it fails"
    )
    parser.add_argument("folder", type=Path, help="what the callback `ReplayCapsule` wrote")
    parser.add_argument(
        "--task",
        metavar="MODULE:NAME",
        help="the task's class; a function `key -> task`; or a function without arguments that "
        "returns `(trainer, task)`. MODULE is a module or a path to a file, and is imported, so "
        "that training has to be under `if __name__ == '__main__':`, which does not run",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="take the state from it, if the capsule has none"
    )
    parser.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    """Exit code 1 where the step does not fail again."""
    from .._capsule_read import Capsule
    from .._replay import replay

    capsule = Capsule(arguments.folder)
    if arguments.task is None:
        folder = shlex.quote(str(arguments.folder))
        raise CheckpointError(
            f"Which task is it? `{capsule.path}` says `{capsule.task}`, but nothing is imported "
            "because a file names it. If you trust that, write\n"
            f"    jaxlightning replay {folder} --task {capsule.suggested}"
            + (
                f"\nwhere FUNCTION returns `(trainer, task)` as the run has them, since "
                f"{capsule.why_a_function}."
                if capsule.why_a_function
                else ""
            )
        )
    task = _called(_named(arguments.task))
    found = replay(arguments.folder, task, checkpoint=arguments.checkpoint)
    print(found)
    return 0 if found.failed else 1


def _named(spec: str) -> Any:
    """What `module:name` or `path/to/file.py:name` stands for.

    **Raises:** `CheckpointError` where there is no such thing. Errors of the module itself pass.
    """
    module, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise CheckpointError(
            f"`--task {spec}` has to be MODULE:NAME, such as `train.py:Classifier` or "
            "`package.module:make`."
        )
    guard = 'put the training under `if __name__ == "__main__":`'
    with nothing_trains(f"`{module}` was imported to replay a step", guard):
        found: Any = _file(Path(module)) if module.endswith(".py") else _module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise CheckpointError(f"`{module}` has no `{name}`.")
        found = getattr(found, part)
    return found


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


def _module(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise CheckpointError(
            f"There is no module `{error.name}`. For a file, write its path: "
            f"`--task {name.replace('.', '/')}.py:NAME`."
        ) from error


def _called(found: Any) -> Any:
    """What `replay` takes: functions without arguments are called for it."""
    from .._task import TaskModule

    if isinstance(found, type) and issubclass(found, TaskModule):
        return found
    if isinstance(found, type) or not callable(found):
        what = f"the class `{found.__name__}`" if isinstance(found, type) else repr(found)
        raise CheckpointError(
            f"`--task` names {what}. Name the class of a task, a function `key -> task`, or a "
            "function without arguments that returns `(trainer, task)`."
        )
    required = [
        p
        for p in inspect.signature(found).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if required:
        return found
    name = getattr(found, "__name__", "it")
    instead = "return `(trainer, task)` before it trains"
    with nothing_trains(f"`{name}` was asked for the run of which a step is replayed", instead):
        return found()
