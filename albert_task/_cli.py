"""The command line: `albert pretrain`, `finetune`, `evaluate`, `predict`, `fill-mask`, ….

Each command has a dataclass of options, of which every field is an option of the command line and
a key of the YAML file that `--config` names.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxlightning._checkpoint_files import CheckpointError
from jaxlightning._nearest import nearest

from ._files import write_text
from ._option import flag
from ._options import PretrainOptions


class _Parser(argparse.ArgumentParser):
    """Names the nearest option, or command, to one that does not exist."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            parser = _parsers(self).get(known.command, self)
            name = rest[0]
            if name.startswith("-"):
                name = name.split("=")[0]
                near = nearest(name, parser._option_string_actions)
                parser.error(f"there is no option `{name}`.{near}")
            near = "Name its option" if " " in name else "Quote what has spaces in it"
            parser.error(f"`{textwrap.shorten(name, 40)}` belongs to no option. {near}.")
        return known

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            listed = ", ".join(f"`{choice}`" for choice in action.choices)
            near = nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"`{value}` is none of {listed}.{near}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists all options.\n")


def _parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


# Commands


class _Command(NamedTuple):
    """A command: its options, what it does in a word and in full, and how it is run."""

    options: Callable[[], type[Any]]
    help: str
    description: str
    example: str
    run: Callable[[Any], int]
    goes_on: bool = False
    """Whether the same command goes on where it was interrupted."""
    inherited: Callable[[dict[str, Any]], dict[str, Any]] = lambda chosen: {}
    """Options that are kept with the model, by what has been chosen."""


def _finetune_options() -> type[Any]:
    from ._finetune_options import FinetuneOptions

    return FinetuneOptions


def _evaluate_options() -> type[Any]:
    from ._finetune_options import EvaluateOptions

    return EvaluateOptions


def _predict_options() -> type[Any]:
    from ._finetune_options import PredictOptions

    return PredictOptions


def _of_commands(name: str) -> Callable[[], type[Any]]:
    def options() -> type[Any]:
        from . import _commands

        return getattr(_commands, name)

    return options


def _run_of_commands(name: str) -> Callable[[Any], int]:
    def run(options: Any) -> int:
        from . import _commands

        return getattr(_commands, name)(options)

    return run


def _of_the_run(chosen: dict[str, Any]) -> dict[str, Any]:
    from ._finetune_options import ENCODING, EvaluateOptions, FinetuneOptions, config_of_run

    path = config_of_run(chosen.get("model", EvaluateOptions.model))
    kept = {} if path is None else _read(path, FinetuneOptions)
    return {name: value for name, value in kept.items() if name in ENCODING}


def _evaluate(options: Any) -> int:
    from ._finetune import evaluate

    return evaluate(options)


def _predict(options: Any) -> int:
    from ._finetune import predict

    return predict(options)


def _pretrain(options: PretrainOptions) -> int:
    with contextlib.ExitStack() as held:
        try:
            from ._pretrain import make_trainer, pretrain
            from ._run_folder import locked, run_folder
            from ._stages import prepare

            folder = run_folder(options.out)
            held.enter_context(locked(folder))
            trainer = make_trainer(options, folder)
            prepared = prepare(options)
            _save(options, folder)
        except (ValueError, OSError) as error:
            return _refused("pretrain", error)
        try:
            return pretrain(prepared, trainer)
        except (ValueError, OSError, CheckpointError) as error:
            if trainer.compile_s:
                raise
            return _refused("pretrain", error)  # before anything was computed: what was given


def _finetune(options: Any) -> int:
    from ._finetune import finetune, prepare_finetuning
    from ._run_folder import locked, run_folder

    folder = run_folder(options.out)
    with locked(folder):
        setting = prepare_finetuning(options, folder)
        _save(setting.options, folder)
        return finetune(setting)


_COMMANDS = {
    "pretrain": _Command(
        lambda: PretrainOptions,
        "pretrain on text",
        "Pretrains an ALBERT on text. The same command again goes on where it was interrupted, or "
        "says that it is done.",
        "albert pretrain --text 'corpus/*.txt' --model base --objective mlm+sop --ngram 3",
        _pretrain,
        goes_on=True,
    ),
    "finetune": _Command(
        _finetune_options,
        "teach a pretrained model a task, from examples",
        "Fine-tunes an ALBERT on examples, keeps the best epoch, and writes the model, its scores "
        "and its predictions. The same command again goes on where it was interrupted.",
        "albert finetune --task classification --model runs/pretrain --train train.tsv "
        "--validation dev.tsv",
        _finetune,
        goes_on=True,
    ),
    "evaluate": _Command(
        _evaluate_options,
        "score a fine-tuned model",
        "Scores a fine-tuned model on examples with labels.",
        "albert evaluate --model runs/finetune --data test.tsv",
        _evaluate,
        inherited=_of_the_run,
    ),
    "predict": _Command(
        _predict_options,
        "let a fine-tuned model label examples",
        "Prints, or writes, what a fine-tuned model makes of examples: a JSON object a line.",
        "albert predict --model runs/finetune --data new.tsv --out labels.jsonl",
        _predict,
        inherited=_of_the_run,
    ),
    "fill-mask": _Command(
        _of_commands("FillMaskOptions"),
        "guess what stands behind [MASK]",
        "Prints the likeliest pieces for each [MASK], or how likely texts are.",
        "albert fill-mask --model runs/pretrain --text 'the quick [MASK] fox'",
        _run_of_commands("fill_masks"),
    ),
    "answer": _Command(
        _of_commands("AnswerOptions"),
        "answer a question from a text",
        "Prints the likeliest answers to a question, out of a text.",
        "albert answer --model runs/squad --question 'Who wrote it?' --context article.txt",
        _run_of_commands("answer"),
        inherited=_of_the_run,
    ),
    "export": _Command(
        _of_commands("ExportOptions"),
        "write a model for Hugging Face's libraries",
        "Writes a model, such as that of a run in progress, as config.json, model.safetensors and "
        "tokenizer.json.",
        "albert export --model runs/pretrain --out my-albert",
        _run_of_commands("export"),
    ),
    "plan": _Command(
        _of_commands("PlanOptions"),
        "what training takes on devices that need not be there",
        "Compiles a training step for virtual devices and tells memory, FLOPs, communication and "
        "an estimate of the time.",
        "albert plan --model xxlarge --mesh data=64,fsdp=16 --device h100",
        _run_of_commands("plan"),
    ),
}


def _parser(only: str | None = None) -> _Parser:
    """The whole parser; of the commands but `only`, the names alone."""
    parser = _Parser(prog="albert", description="ALBERT with jaxlightning.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=f"Example: {command.example}",
        )
        if name == only:
            _add_options(sub, command.options())
    return parser


def _add_options(parser: _Parser, options: type[Any]) -> None:
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        default = "" if field.default in (None, (), False) else " (default %(default)s)"
        groups[name].add_argument(
            flag(field.name),
            *field.metadata["also"],
            dest=field.name,
            default=argparse.SUPPRESS,
            help=field.metadata["help"].replace("%", "%%")
            + default.replace("%(default)s", str(field.default)),
            **field.metadata["how"],
        )
    files = parser.add_argument_group("configuration")
    files.add_argument(
        "--config", metavar="FILE", help="a YAML file of options; those given beside it win"
    )
    files.add_argument(
        "--print-config", action="store_true", help="print the effective options, and end"
    )


_INSTEAD = [
    (one, other)
    for pair in (("steps", "epochs"), ("text", "dataset"))
    for one, other in (pair, pair[::-1])
]
"""Options of which one that is given takes the place of the other in a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 for what the user can put right."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    only = next((one for one in arguments if one in _COMMANDS), None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot write is no reason to end
            stream.reconfigure(errors="backslashreplace")
    parser = _parser(only)
    given = vars(parser.parse_args(arguments))
    name = given.pop("command")
    if name is None:
        parser.print_help()
        return 2
    file, prints = given.pop("config"), given.pop("print_config")
    command = _COMMANDS[name]
    try:
        kind = command.options()
        stored = {} if file is None else _read(Path(file), kind)
        for one, other in _INSTEAD:
            if one in given and other not in given:
                stored.pop(other, None)
        chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in (stored | given).items()}
        options = kind(**(command.inherited(chosen) | chosen))
        if prints:
            print(_yaml(options), end="")
        status = 0 if prints else command.run(options)
        sys.stdout.flush()
        return status
    except (KeyboardInterrupt, SystemExit) as stop:  # a signal, after which the Trainer has saved
        again = " The same command goes on from there." if command.goes_on else ""
        print(f"\nInterrupted.{again}", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    except BrokenPipeError:  # who reads has had enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not written
        return 1
    except (ValueError, OSError, CheckpointError) as error:
        return _refused(name, error)
    except FloatingPointError as error:  # what SkipNonFinite ends a run with
        _refused(name, f"{error}\nHere the learning rate is `--lr`, and `--clip` clips.")
        return 1


def _refused(name: str, why: object) -> int:
    print(f"albert {name}: {why}", file=sys.stderr)
    return 2


# Files of options


def _read(path: Path, kind: type[Any]) -> dict[str, Any]:
    """The options in a YAML file.

    **Raises:** `ValueError` for a file that is none, and options that do not exist or have
    another type.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"There is no file of options `{path}`.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"`{path}` is no YAML file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` has to hold options, such as `steps: 1000`.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    found = {}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in fields:
            raise ValueError(f"`{path}`: there is no option `{name}`.{nearest(key, fields)}")
        if value is None:  # left empty: the default
            continue
        found[key] = _typed(path, key, value, fields[key])
    return found


def _typed(path: Path, name: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    how = field.metadata["how"]
    wanted = bool if how.get("action") == "store_true" else how.get("type", str)
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and "nargs" not in how:
        raise ValueError(f"`{path}`: `{name}` is one value, not a list.")
    read: list[Any] = []
    for one in values:
        number = wanted is float and isinstance(one, int) and not isinstance(one, bool)
        if not (number or type(one) is wanted):
            if wanted is float and isinstance(one, str):  # YAML takes 1e-3 for a word
                with contextlib.suppress(ValueError):
                    read.append(float(one))
                    continue
            if name == "max_time" and isinstance(one, int):  # YAML's base 60
                raise ValueError(f'`{path}`: put `{name}` in quotes: `{name}: "00:12:00:00"`.')
            if wanted is str and isinstance(one, int | float) and not isinstance(one, bool):
                read.append(str(one))
                continue
            raise ValueError(
                f"`{path}`: `{name}: {one!r}` has to be of type `{wanted.__name__}`, and is "
                f"`{type(one).__name__}`."
            )
        if isinstance(one, str) and one.startswith("~"):  # as a shell does it
            one = os.path.expanduser(one)
        read.append(float(one) if number else one)
    return tuple(read) if "nargs" in how else read[0]


def _yaml(options: Any) -> str:
    """All options, as `--config` reads them."""
    import yaml

    content = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options).items()
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _save(options: Any, folder: Path) -> None:
    write_text(folder / "config.yaml", _yaml(options))
