"""The options of fine-tuning, and of what one does with a model that was fine-tuned."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ._config import _PRESETS
from ._features import Columns
from ._files import read_json
from ._kinds import KINDS, Kind, QuestionAnswering
from ._model_names import NamesModel, check_model
from ._optimizers import OPTIMIZERS
from ._option import check_values, option
from ._options import PRECISIONS, devices_of

_DATA = (
    "a file (.tsv, .csv, .jsonl, .parquet, SQuAD's .json), a folder of a saved dataset, or "
    "`owner/name:split` on the hub"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How examples are read and encoded, and on what they are computed."""

    text_column: str | None = option(
        None,
        "the column of texts, or of questions (default: by the usual names)",
        group="data",
        metavar="NAME",
    )
    pair_column: str | None = option(
        None, "the column of second texts, of choices, or of contexts", group="data", metavar="NAME"
    )
    label_column: str | None = option(
        None, "the column of labels, or of answers", group="data", metavar="NAME"
    )
    max_length: int | None = option(
        None,
        "tokens of an example at most (default: 128, and 384 for questions)",
        group="data",
        type=int,
        least=8,
    )
    doc_stride: int = option(
        128,
        "of questions: tokens from one window of a long text to the next",
        group="data",
        type=int,
        least=1,
    )
    max_query_length: int = option(
        64, "of questions: tokens at most", group="data", type=int, least=1
    )
    n_best: int = option(
        20, "of questions: candidates that are considered", group="data", type=int, least=1
    )
    max_answer_length: int = option(
        30, "of questions: tokens of an answer at most", group="data", type=int, least=1
    )
    threshold: float = option(
        0.0,
        "of questions: by how much the score of no answer has to be higher to be taken",
        group="data",
        type=float,
    )
    may_be_none: bool = option(
        False,
        "of questions: there may be no answer (default: if some question learnt from has none)",
        group="data",
        action="store_true",
    )
    tokenizer: str | None = option(
        None,
        "a spiece.model or tokenizer.json (default: the model's own)",
        group="data",
        metavar="FILE",
    )
    batch_size: int = option(
        32, "examples in a batch, over all devices", group="computing", type=int, least=1
    )
    precision: str = option(
        "32-true", ", ".join(PRECISIONS), group="computing", metavar="NAME", one_of=PRECISIONS
    )
    devices: str = option("auto", "how many devices, or auto", group="computing", metavar="N")

    def __post_init__(self) -> None:
        check_values(self)
        devices_of(self.devices)

    def kind(self, name: str, longest: int) -> Kind:
        """The kind of that name with these options, for a model of so many positions."""
        columns = Columns(self.text_column, self.pair_column, self.label_column)
        room = longest // 8 * 8  # examples are padded to multiples of 8
        length = self.max_length or min(384 if name == "qa" else 128, room)
        if length > room:
            raise ValueError(
                f"`--max-length {length}` is longer than the positions of the model: it has "
                f"`max_position_embeddings={longest}`. Write {room} at most."
            )
        if KINDS[name] is QuestionAnswering:
            return QuestionAnswering(
                name,
                columns,
                length,
                doc_stride=self.doc_stride,
                max_query_length=self.max_query_length,
                n_best=self.n_best,
                max_answer_length=self.max_answer_length,
                threshold=self.threshold,
                may_be_none=self.may_be_none,
            )
        return KINDS[name](name, columns, length)


def config_of_run(model: str) -> Path | None:
    """The file of options of the run of `albert finetune` that a model is of, if there is one:
    `model` is the run's folder, or `model` in it."""
    path = Path(model).resolve()
    for folder in (path, path.parent) if path.name == "model" else (path,):
        run, options = read_json(folder / "run.json"), folder / "config.yaml"
        if run is not None and run.get("command") == "finetune" and options.is_file():
            return options
    return None


ENCODING = (
    "max_length",
    "doc_stride",
    "max_query_length",
    "n_best",
    "max_answer_length",
    "threshold",
    "may_be_none",
)
"""Options by which a model is used as it was trained: by default as in its run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(DataOptions, NamesModel):
    """The options of `albert finetune`.

    **Raises:** `ValueError` for a value that cannot be.
    """

    task: str = option(
        "classification",
        "classification (of one or two texts), multilabel (any number of labels a text, parted by "
        "commas), regression (a number a text or pair), tokens (a label a word), choice (the "
        "right one of several texts), qa (answers in a text, as SQuAD)",
        group="data",
        metavar="NAME",
        one_of=KINDS,
    )
    train: str | None = option(
        None, f"examples to learn from: {_DATA}", group="data", metavar="DATA"
    )
    validation: str | None = option(
        None,
        "examples to choose the best epoch by, in the same forms",
        group="data",
        metavar="DATA",
    )
    limit: int | None = option(
        None, "learn from so many of the examples, the first ones", group="data", type=int, least=1
    )
    model: str = option(
        "base",
        "the folder of a run of `albert pretrain`, of a Hugging Face model, or a name on the hub; "
        f"random weights: {', '.join(_PRESETS)}, or a config.json",
        group="model and training",
        metavar="NAME_OR_FOLDER",
    )
    epochs: int = option(
        3, "passes over the examples", group="model and training", type=int, least=1
    )
    lr: float | None = option(
        None,
        "the peak learning rate (default: 3e-5; 3e-4 for models less than 512 wide)",
        group="model and training",
        also=("--learning-rate",),
        type=float,
        above=0,
    )
    warmup: float = option(
        0.1,
        "share of the run over which it rises",
        group="model and training",
        type=float,
        least=0,
    )
    optimizer: str = option(
        "adamw",
        ", ".join(OPTIMIZERS),
        group="model and training",
        metavar="NAME",
        one_of=OPTIMIZERS,
    )
    weight_decay: float = option(
        0.01, "decoupled weight decay", group="model and training", type=float, least=0
    )
    clip: float = option(
        1.0,
        "clip gradients to this global norm; 0: not at all",
        group="model and training",
        type=float,
        least=0,
    )
    accumulate: int = option(
        1, "batches accumulated for one step", group="model and training", type=int, least=1
    )
    dropout: float | None = option(
        None,
        "dropout in the model (default: what its configuration says)",
        group="model and training",
        type=float,
        least=0,
        below=1,
    )
    layer_decay: float = option(
        1.0,
        "learning rate of each stage further from the output, times as fast",
        group="model and training",
        type=float,
        above=0,
    )
    freeze: tuple[str, ...] = option(
        (),
        "regular expressions of parameters that are not trained, such as embeddings",
        group="model and training",
        nargs="+",
        metavar="REGEX",
    )
    unfreeze_every: int = option(
        0,
        "gradual unfreezing: steps from one stage to the next",
        group="model and training",
        type=int,
        least=0,
    )
    patience: int | None = option(
        None,
        "stop after so many epochs without improvement on the validation examples",
        group="model and training",
        type=int,
        least=1,
    )
    seed: int = option(0, "of new weights, dropout and order", group="the run", type=int, least=0)
    seeds: int = option(
        1,
        "train so many times, with seeds from --seed on; the best one is kept",
        group="the run",
        type=int,
        least=1,
    )
    out: str = option("runs/finetune", "the folder of the run", group="the run", metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train is None:
            raise ValueError("There is nothing to learn from. Give some examples: `--train FILE`.")
        check_model(self.model)
        if not self.warmup < 1:
            raise ValueError(f"`--warmup {self.warmup}` is a share of the run: write one below 1.")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"`--freeze '{pattern}'` is no regular expression: {error}."
                ) from None
        if self.patience is not None and self.validation is None:
            raise ValueError(
                "`--patience` counts epochs without improvement on validation examples. Give "
                "some: `--validation FILE`."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """The options of `albert evaluate`."""

    model: str = option(
        "runs/finetune", "a fine-tuned model: its folder or name", group="data", metavar="FOLDER"
    )
    data: str | None = option(None, f"examples with labels: {_DATA}", group="data", metavar="DATA")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise ValueError("There is nothing to evaluate on. Give some examples: `--data FILE`.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(EvaluateOptions):
    """The options of `albert predict`."""

    data: str | None = option(None, f"examples: {_DATA}", group="data", metavar="DATA")
    out: str | None = option(
        None, "write a JSON object a line here (default: print)", group="data", metavar="FILE"
    )
