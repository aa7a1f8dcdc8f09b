"""`jaxlightning plan MODULE:NAME`: what a run needs on devices that need not be there."""

from __future__ import annotations

import argparse
from typing import Any

from .._importing import nothing_trains
from ._runs import RunError
from ._script import named, needs_arguments


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="memory, work, talk and time of a run on a mesh that need not be there",
        description="Compiles the training step for virtual devices and tells, for one of them, "
        "bytes by part and whether they fit, FLOPs, collectives, an estimate of the time, and what "
        "would help. Nothing is trained.",
        epilog="Example: jaxlightning plan train.py:run --mesh data=64,fsdp=16 --device h100",
    )
    parser.add_argument(
        "run_of",
        metavar="MODULE:NAME",
        help="a function without arguments that returns `(trainer, task, batch)`, where `batch` is "
        "a global batch, an abstract one, or a `DataLoader`. MODULE is a module or a path to a "
        "file, and is imported, so that training has to be under `if __name__ == '__main__':`",
    )
    parser.add_argument("--mesh", help="sizes of all axes: data=64,fsdp=16; by default this one's")
    parser.add_argument("--device", help="such as h100, a100-80g or tpu-v5p")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.set_defaults(run=_plan)


def _plan(chosen: argparse.Namespace) -> int:
    """Exit code 1 where the run does not fit."""
    make = named(chosen.run_of, "plan", "to plan a run")
    if not callable(make) or isinstance(make, type):
        raise RunError(f"`{chosen.run_of}` is no function that returns `(trainer, task, batch)`.")
    if needs_arguments(make):
        raise RunError(
            f"`{chosen.run_of}` takes arguments. It has to be a function without any, which "
            "returns `(trainer, task, batch)`."
        )
    with nothing_trains("a run was asked for to be planned", "return it before it trains"):
        found = make()
    if not isinstance(found, tuple) or len(found) != 3:
        raise RunError(
            f"`{chosen.run_of}` returned a `{type(found).__name__}`. It has to return `(trainer, "
            "task, batch)`."
        )
    trainer, task, batch = found
    if callable(getattr(batch, "batches", None)):
        batch = next(iter(batch.batches(0, 0)))
    try:
        plan = trainer.plan(task, batch, mesh=_mesh(chosen.mesh), device=chosen.device)
    except ValueError as error:
        raise RunError(str(error)) from error
    print(plan.to_json() if chosen.json else plan)
    return 1 if plan.fits is False else 0


def _mesh(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and pair[1].strip().isdigit() for pair in pairs):
        raise RunError(f"`--mesh {text}` has to be sizes of axes: `--mesh data=64,fsdp=16`.")
    return {axis.strip(): int(size) for axis, size in pairs}
