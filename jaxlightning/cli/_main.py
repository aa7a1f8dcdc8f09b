"""The entry point of the command line.

A command is a module with `add_command(commands)`, which adds a parser whose default `run` takes
the parsed arguments and returns the exit code: 0, or 1 where what was asked has the answer no.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .._checkpoint_files import CheckpointError
from . import _checkpoint, _compare, _launch, _plan, _replay
from ._runs import RunError
from ._terminal import printable_only

_COMMANDS = (_checkpoint, _compare, _launch, _plan, _replay)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, 2 where the command could not be carried out."""
    about = "Starts runs, and looks into finished ones."
    parser = argparse.ArgumentParser(prog="jaxlightning", description=about)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_command(commands)
    chosen = parser.parse_args(arguments)
    with printable_only():
        try:
            code: int = chosen.run(chosen)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read this, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (CheckpointError, RunError, OSError) as error:
            print(f"jaxlightning: {error}", file=sys.stderr)
            return 2
    return code
