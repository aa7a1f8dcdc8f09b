"""The commands for a model that is there: fill in masks, answer, export, plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from ._config import _PRESETS, REMATS
from ._convert import from_pretrained, save_pretrained
from ._files import read_json
from ._fill_mask import fill_mask, pseudo_perplexity
from ._finetune_options import DataOptions
from ._kinds import KINDS, QuestionAnswering, predicted
from ._model_names import NamesModel, check_model
from ._option import check_values, option
from ._options import PRECISIONS
from ._pretraining_task import AlbertForPreTraining
from ._question_answering import AlbertForQuestionAnswering
from ._rows import check_vocabulary
from ._run_folder import run_folder
from ._squad import Question
from ._tasks import AlbertForMaskedLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MODEL = "a pretrained model: the folder of a run, of a Hugging Face model, or a name on the hub"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillMaskOptions:
    """The options of `albert fill-mask`."""

    text: tuple[str, ...] = option(
        (), "texts with a [MASK] where to guess", group="texts", nargs="+", metavar="TEXT"
    )
    model: str = option("runs/pretrain", _MODEL, group="model", metavar="FOLDER")
    tokenizer: str | None = option(
        None,
        "a spiece.model or tokenizer.json (default: the model's)",
        group="model",
        metavar="FILE",
    )
    top_k: int = option(5, "guesses for each [MASK]", group="texts", type=int, least=1)
    score: bool = option(
        False,
        "print each text's pseudo-perplexity in place of guesses",
        group="texts",
        action="store_true",
    )

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("Give a text: `--text 'the quick [MASK] fox'`.")
        check_values(self)


def fill_masks(options: FillMaskOptions) -> int:
    """Prints what the model puts in place of each [MASK]."""
    task = from_pretrained(options.model)
    if not isinstance(task, AlbertForMaskedLM):
        raise ValueError(
            f"`{options.model}` is a `{type(task).__name__}`, which fills in no masks. Give a "
            "pretrained model, such as the folder of `albert pretrain`."
        )
    tokenizer = _tokenizer(options.model, options.tokenizer)
    for text in options.text:
        if options.score:
            print(f"{pseudo_perplexity(task, tokenizer, text):10.2f}  {text}")
            continue
        found = fill_mask(task, tokenizer, text, options.top_k)
        print(found.text)
        for guesses in found.guesses:
            print(f"    {', '.join(map(str, guesses))}")
    return 0


def _tokenizer(model: str, given: str | None) -> Tokenizer:
    from ._finetune import model_tokenizer

    return model_tokenizer(DataOptions(tokenizer=given), model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(DataOptions):
    """The options of `albert answer`."""

    question: str | None = option(None, "what is asked", group="data", metavar="TEXT")
    context: str | None = option(
        None, "the text that may hold the answer, or a file with it", group="data", metavar="TEXT"
    )
    model: str = option(
        "runs/finetune", "a model fine-tuned with --task qa", group="data", metavar="FOLDER"
    )
    top_k: int = option(3, "answers to print", group="data", type=int, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("question", "context"):
            if not (getattr(self, name) or "").strip():
                raise ValueError(f"There is no {name}. Give one: `--{name} TEXT`.")


def answer(options: AnswerOptions) -> int:
    """Prints the likeliest answers."""
    from ._finetune import _quiet

    task = from_pretrained(options.model)
    if not isinstance(task, AlbertForQuestionAnswering):
        raise ValueError(
            f"`{options.model}` is a `{type(task).__name__}`, which answers no questions. Give a "
            "model that was fine-tuned with `albert finetune --task qa`."
        )
    tokenizer = _tokenizer(options.model, options.tokenizer)
    check_vocabulary(tokenizer.get_vocab_size(), task.config)
    kind = options.kind("qa", task.config.max_position_embeddings)
    assert isinstance(kind, QuestionAnswering)
    assert options.question is not None
    assert options.context is not None
    asked = [Question("0", options.question, _context(options.context))]
    examples = kind.encode(asked, tokenizer, (), labelled=False)
    found = predicted(_quiet(options), task, examples, min(options.batch_size, len(examples)))
    said = kind.answers(found, examples)["0"]
    print(said.text or "(no answer)")
    for one in said.candidates[: options.top_k]:
        print(f"    {one.probability:6.1%}  {one.text or '(no answer)'}")
    return 0


def _context(given: str) -> str:
    """The text that is meant: itself, or what the file of that name holds."""
    if len(given.split()) > 1 and (len(given) > 255 or not Path(given).is_file()):
        return given
    try:
        text = Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"The file `{given}` is no text in UTF-8.") from None
    except OSError:
        raise ValueError(
            f"`--context {given}` is a single word, and no file that can be read. Give a text of "
            "several words, or a file with it."
        ) from None
    if not text.strip():
        raise ValueError(f"The file `{given}` is empty.")
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `albert export`."""

    model: str = option(
        "runs/pretrain",
        "the folder of a run (of `albert pretrain` also of one that has not ended), or any model "
        "that can be loaded",
        group="model",
        metavar="FOLDER",
    )
    out: str = option("exported", "where to write it", group="model", metavar="FOLDER")
    tokenizer: str | None = option(
        None,
        "a spiece.model or tokenizer.json (default: the model's)",
        group="model",
        metavar="FILE",
    )
    max_shard_size: int = option(
        5_000_000_000, "bytes of a file of weights at most", group="model", type=int, least=1
    )

    def __post_init__(self) -> None:
        if (Path(self.out) / "run.json").is_file():
            raise ValueError(f"`{self.out}` is a run's folder. Choose another: `--out FOLDER`.")
        check_values(self)


def export(options: ExportOptions) -> int:
    """Writes a model as Hugging Face's libraries load it."""
    from ._tokenizer import load_tokenizer

    run = Path(options.model)
    task = _of_run(run)
    if task is not None:
        tokenizer = load_tokenizer(options.tokenizer or run)
    else:
        task = from_pretrained(options.model)
        tokenizer = _tokenizer(options.model, options.tokenizer)
    check_vocabulary(tokenizer.get_vocab_size(), task.config)
    folder = run_folder(options.out)
    replaces = (folder / "config.json").is_file()
    save_pretrained(task, folder, tokenizer, max_shard_size=options.max_shard_size)
    print(f"{type(task).__name__} in {options.out}{', in place of what was there' * replaces}")
    return 0


def _of_run(folder: Path) -> AlbertForMaskedLM | None:
    """The last checkpoint of a run of `albert pretrain` that has not ended, or goes on."""
    from jaxlightning._checkpoint import latest_checkpoint

    if not (folder / "checkpoints").is_dir():
        return None
    entry = latest_checkpoint(folder / "checkpoints")
    ended = read_json(folder / "result.json")
    if ended is not None and (entry is None or entry.step <= ended["steps"]):
        return None
    if entry is None:
        raise FileNotFoundError(f"There is no checkpoint in `{folder / 'checkpoints'}` yet.")
    pairs = (read_json(folder / "run.json") or {}).get("objective") == "mlm+sop"
    kind = AlbertForPreTraining if pairs else AlbertForMaskedLM
    return kind.load_from_checkpoint(entry.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(NamesModel):
    """The options of `albert plan`."""

    model: str = option(
        "base",
        f"{', '.join(_PRESETS)}, a config.json, or a model's folder or name",
        group="what",
        metavar="NAME_OR_FILE",
    )
    task: str = option(
        "pretraining",
        f"pretraining, mlm, {', '.join(KINDS)}",
        group="what",
        metavar="NAME",
        one_of=("pretraining", "mlm", *KINDS),
    )
    batch_size: int = option(
        4096, "rows in a batch, over all devices", group="what", type=int, least=1
    )
    seq_len: int = option(512, "tokens in a row", group="what", type=int, least=1)
    precision: str = option(
        "bf16-mixed", ", ".join(PRECISIONS), group="what", metavar="NAME", one_of=PRECISIONS
    )
    accumulate: int = option(1, "batches accumulated for one step", group="what", type=int, least=1)
    remat: str = option(
        "dots_with_no_batch_dims_saveable",
        "what layers keep for the backward pass; none: everything",
        group="what",
        metavar="NAME",
        one_of=REMATS,
    )
    scan_layers: bool = option(
        False, "the layers as a loop in the program", group="what", action="store_true"
    )
    mesh: str | None = option(
        None,
        "sizes of all axes, such as data=64,fsdp=16; by default this machine's devices",
        group="where",
        metavar="AXES",
    )
    device: str | None = option(
        None, "such as h100, a100-80g or tpu-v5p", group="where", metavar="NAME"
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_model(self.model)


def plan(options: PlanOptions) -> int:
    """Prints what a training step needs. Exit status 1 where it does not fit."""
    import jax.numpy as jnp

    from jaxlightning import Trainer
    from jaxlightning.cli._plan import _mesh

    changes: dict[str, Any] = {"remat": options.remat, "scan_layers": options.scan_layers}
    config = options.configured(**changes)
    shape = (options.batch_size, options.seq_len)
    of_rows = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    of_tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = {"input_ids": of_tokens}
    pretraining: dict[str, Any] = {"pretraining": AlbertForPreTraining, "mlm": AlbertForMaskedLM}
    kind: Any = pretraining.get(options.task)
    if options.task == "pretraining":
        batch |= {"token_type_ids": of_tokens, "sentence_order_label": of_rows}
    elif kind is None:
        kind = KINDS[options.task].task
        batch |= _labels(options.task, of_rows, of_tokens)
        if options.task == "choice":
            batch["input_ids"] = jax.ShapeDtypeStruct((shape[0], 4, shape[1]), jnp.int32)
    trainer = Trainer(
        precision=options.precision,
        accumulate_grad_batches=options.accumulate,
        logger=False,
        enable_checkpointing=False,
        max_steps=1,
    )
    task = lambda key: kind.init(config, key)  # traced, never computed
    found = trainer.plan(task, batch, mesh=_mesh(options.mesh), device=options.device)
    print(found)
    return 1 if found.fits is False else 0


def _labels(
    task: str, of_rows: jax.ShapeDtypeStruct, of_tokens: jax.ShapeDtypeStruct
) -> dict[str, jax.ShapeDtypeStruct]:
    if task == "qa":
        return {"start_positions": of_rows, "end_positions": of_rows}
    return {"labels": of_tokens if task == "tokens" else of_rows}
