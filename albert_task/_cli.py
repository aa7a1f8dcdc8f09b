"""The command line: `albert pretrain ...`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxlightning._checkpoint_files import CheckpointError

from ._options import PretrainOptions, flag, nearest


class _Parser(argparse.ArgumentParser):
    """Names the nearest option, or command, to one that does not exist."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            parser = _commands(self).get(known.command, self)
            name = rest[0].split("=")[0]
            if name.startswith("-"):
                near = nearest(name, parser._option_string_actions)
                parser.error(f"there is no option `{name}`.{near}")
            parser.error(f"`{rest[0]}` belongs to no option. Quote what has spaces in it.")
        return known

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists all options.\n")


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _parser() -> _Parser:
    parser = _Parser(prog="albert", description="ALBERT with jaxlightning.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain with masked language modelling",
        description="Pretrains an ALBERT on text with masked language modelling. The same command "
        "again goes on where it was interrupted, or says that it is done.",
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(PretrainOptions):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = pretrain.add_argument_group(name)
        default = "" if field.default in (None, (), False) else " (default %(default)s)"
        groups[name].add_argument(
            flag(field.name),
            *field.metadata["also"],
            default=field.default,
            help=field.metadata["help"].replace("%", "%%") + default,
            **field.metadata["how"],
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 for what the user can put right."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if given.pop("command") is None:
        parser.print_help()
        return 2
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    try:
        return _pretrain(given)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130


def _pretrain(given: dict[str, Any]) -> int:
    with contextlib.ExitStack() as held:
        try:
            options = PretrainOptions(**given)
            from ._pretrain import make_trainer, pretrain
            from ._stages import locked, prepare, run_folder

            folder = run_folder(options.out)
            held.enter_context(locked(folder))
            trainer = make_trainer(options, folder)
            prepared = prepare(options)
        except (ValueError, OSError) as error:
            return _refused(error)
        try:
            return pretrain(prepared, trainer)
        except (ValueError, OSError, CheckpointError) as error:
            if trainer.compile_s:
                raise
            return _refused(error)  # before anything was computed: something that was given
        except SystemExit as stop:  # a signal, after which the Trainer has saved
            print("The same command goes on from there.", file=sys.stderr)
            return int(stop.code or 0)


def _refused(error: Exception) -> int:
    print(f"albert pretrain: {error}", file=sys.stderr)
    return 2
