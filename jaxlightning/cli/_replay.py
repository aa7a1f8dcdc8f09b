"""`jaxlightning replay FOLDER --task MODULE:NAME`: runs the step of a capsule again."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .._checkpoint_files import CheckpointError
from .._importing import nothing_trains
from ._script import named, needs_arguments

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
    task = _called(named(arguments.task, "--task", "to replay a step"))
    found = replay(arguments.folder, task, checkpoint=arguments.checkpoint)
    print(found)
    return 0 if found.failed else 1


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
    if needs_arguments(found):
        return found
    name = getattr(found, "__name__", "it")
    instead = "return `(trainer, task)` before it trains"
    with nothing_trains(f"`{name}` was asked for the run of which a step is replayed", instead):
        return found()
