"""What can be chosen about a pretraining run: one field an option, checked when made."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ._config import _PRESETS, AlbertConfig
from ._model_names import NamesModel, check_model
from ._optimizers import OPTIMIZERS
from ._option import check_values, flag, option

OBJECTIVES = ("mlm", "mlm+sop")
SCHEDULES = (
    "reference",
    "constant",
    "linear",
    "cosine",
    "polynomial",
    "exponential",
    "inverse_sqrt",
)
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")

_PEAKS = {512: 4e-3, 1024: 5e-4, 2048: 3e-4}
"""The peak learning rate of models that are narrower than this."""
_WIDE_PEAK = 1e-4


_STEPS = 1500


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(NamesModel):
    """The options of `albert pretrain`, which has a `--vocab-size` for `vocab_size`, and so on.

    **Raises:** `ValueError` for a value that cannot be.
    """

    text: tuple[str, ...] = option(
        (),
        "files, folders or quoted globs of text (.txt, .jsonl, .parquet, .arrow); without it and "
        "--dataset, the English prose that Python and its packages bring along",
        group="data",
        nargs="+",
        metavar="GLOB",
    )
    dataset: str | None = option(
        None,
        "a dataset saved on disk, a folder of text, or a name on the hub",
        group="data",
        metavar="NAME_OR_FOLDER",
    )
    dataset_config: str | None = option(
        None, "which configuration of a hub dataset", group="data", metavar="NAME"
    )
    text_column: str | None = option(
        None, "the column that holds the text", group="data", metavar="NAME"
    )
    split: str | None = option(
        None,
        "which split of a dataset that has several (default: train)",
        group="data",
        metavar="NAME",
    )
    tokenizer: str | None = option(
        None,
        "a spiece.model or tokenizer.json; without it that of a --model with weights, or else one "
        "is trained on the text",
        group="data",
        metavar="FILE",
    )
    vocab_size: int | None = option(
        None,
        "pieces of the tokenizer that is trained (default 8000)",
        group="data",
        type=int,
        least=6,
    )
    val_fraction: float = option(
        0.05, "share of the tokens kept for validation", group="data", type=float, above=0, below=1
    )
    val_rows: int = option(1024, "rows a validation uses at most", group="data", type=int, least=1)

    weights: tuple[float, ...] = option(
        (),
        "mix the globs of --text by these weights, one each (default: all text alike)",
        group="data",
        nargs="+",
        type=float,
    )
    streaming: bool = option(
        False,
        "read a hub dataset as it comes, without a download of all of it first",
        group="data",
        action="store_true",
    )

    objective: str = option(
        "mlm",
        f"{' or '.join(OBJECTIVES)}: masked tokens alone, or also the order of two segments, as "
        "in the paper",
        group="objective",
        metavar="NAME",
        one_of=OBJECTIVES,
    )
    ngram: int = option(
        0,
        "mask up to so many whole words together, 3 in the paper; 0: single tokens",
        group="objective",
        type=int,
        least=0,
    )
    mask_probability: float = option(
        0.15,
        "share of the tokens that are to be predicted",
        group="objective",
        type=float,
        above=0,
        below=1,
    )
    predictions: int | None = option(
        None,
        "in place of that: so many in each row, such as 20 of 128",
        group="objective",
        type=int,
        least=1,
    )
    packed: bool = option(
        False,
        "fill rows with documents' own texts, which do not see each other, and no padding",
        group="objective",
        action="store_true",
    )
    short: float = option(
        0.1,
        "probability of a shorter text, with --objective mlm+sop or --packed",
        group="objective",
        type=float,
        least=0,
        below=1,
    )

    model: str = option(
        "small",
        f"{', '.join(_PRESETS)}, or a config.json, which begin with random weights; or what has "
        "weights to go on from: the folder of a run of `albert pretrain`, of a Hugging Face model, "
        "or a name on the hub",
        group="model and training",
        metavar="NAME_OR_FOLDER",
    )
    steps: int | None = option(
        None,
        "optimizer steps (default: 1500, where --epochs says nothing else)",
        group="model and training",
        type=int,
        least=1,
    )
    epochs: int | None = option(
        None,
        "passes over the text, in place of --steps",
        group="model and training",
        type=int,
        least=1,
    )
    batch_size: int = option(
        32, "rows in a batch, over all devices", group="model and training", type=int, least=1
    )
    seq_len: int = option(64, "tokens in a row", group="model and training", type=int, least=3)
    lr: float | None = option(
        None,
        "the peak learning rate (default: by the model's width, "
        f"{', '.join(f'{peak:g} below {width}' for width, peak in _PEAKS.items())}, then "
        f"{_WIDE_PEAK:g})",
        group="model and training",
        also=("--learning-rate",),
        type=float,
        above=0,
    )
    warmup: float = option(
        0.05,
        "the warm-up: below 1 a share of the run, otherwise steps",
        group="model and training",
        type=float,
        least=0,
    )
    schedule: str = option(
        "cosine",
        f"of the learning rate after the warm-up: {', '.join(SCHEDULES)}; `reference` is that of "
        "google-research/albert",
        group="model and training",
        metavar="NAME",
        one_of=SCHEDULES,
    )
    optimizer: str = option(
        "muon", ", ".join(OPTIMIZERS), group="model and training", metavar="NAME", one_of=OPTIMIZERS
    )
    scale_lr: bool = option(
        False,
        "--lr is meant for batches of 4,096 rows, and scaled by the square root for others",
        group="model and training",
        action="store_true",
    )
    ema: float | None = option(
        None,
        "keep an exponential moving average of the weights with this decay, and use it",
        group="model and training",
        type=float,
        least=0,
        below=1,
    )
    weight_decay: float = option(
        0.01, "decoupled weight decay", group="model and training", type=float, least=0
    )
    b1: float | None = option(
        None,
        "decay of the optimizer's first moment, or momentum (default: 0.9; 0.95 of Muon's)",
        group="model and training",
        type=float,
        least=0,
        below=1,
    )
    b2: float | None = option(
        None,
        "decay of the optimizer's second moment (default: 0.98)",
        group="model and training",
        type=float,
        least=0,
        below=1,
    )
    clip: float = option(
        1.0,
        "clip gradients to this global norm; 0: not at all",
        group="model and training",
        type=float,
        least=0,
    )
    dropout: float | None = option(
        None,
        "dropout in the model (default: what the model's configuration says)",
        group="model and training",
        type=float,
        least=0,
        below=1,
    )
    precision: str = option(
        "32-true",
        ", ".join(PRECISIONS),
        group="model and training",
        metavar="NAME",
        one_of=PRECISIONS,
    )
    accumulate: int = option(
        1, "batches accumulated for one step", group="model and training", type=int, least=1
    )
    steps_per_dispatch: int = option(
        1,
        "steps in one compiled program: faster where steps are very short",
        group="model and training",
        type=int,
        least=1,
    )
    devices: str = option(
        "auto", "how many devices, or auto", group="model and training", metavar="N"
    )
    strategy: str = option(
        "auto",
        "auto, ddp or fsdp",
        group="model and training",
        metavar="NAME",
        one_of=("auto", "ddp", "fsdp"),
    )
    seed: int = option(
        0,
        "of initial values, masks, order and split",
        group="model and training",
        type=int,
        least=0,
    )

    out: str = option("runs/pretrain", "the folder of the run", group="the run", metavar="FOLDER")
    eval_interval: int = option(
        500,
        "steps from one validation and checkpoint to the next",
        group="the run",
        type=int,
        least=1,
    )
    log_interval: int = option(
        25, "steps from one log entry to the next", group="the run", type=int, least=1
    )
    max_time: str | None = option(
        None,
        "stop after so much training, DD:HH:MM:SS; with more of it the same command goes on",
        group="the run",
        metavar="TIME",
    )
    patience: int | None = option(
        None,
        "stop after so many validations without improvement",
        group="the run",
        type=int,
        least=1,
    )
    keep: int = option(
        1,
        "checkpoints to keep, the best ones; the latest besides",
        group="the run",
        type=int,
        least=1,
    )
    deterministic: bool = option(
        False, "choose deterministic kernels on GPUs", group="the run", action="store_true"
    )
    detect_anomaly: bool = option(
        False,
        "on NaN, say in which operation it appears; slow",
        group="the run",
        action="store_true",
    )
    profile: bool = option(
        False, "trace some steps for TensorBoard and Perfetto", group="the run", action="store_true"
    )

    def __post_init__(self) -> None:
        check_values(self)
        check_model(self.model)
        devices_of(self.devices)
        if self.max_time is not None:
            from jaxlightning.callbacks._timer import (  # type: ignore[import-not-found]
                parse_duration,
            )

            parse_duration(self.max_time, "--max-time")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "steps", _STEPS)
        if self.epochs is not None and self.steps is not None:
            raise ValueError("`--steps` and `--epochs` are two lengths of the run. Give one.")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(
                f"`--warmup {self.warmup:g}` is neither a share below 1 nor a whole number of "
                "steps."
            )
        if self.steps is not None and self.warmup_amount >= self.steps:
            raise ValueError(
                f"`--warmup {self.warmup:g}` takes all of the `--steps {self.steps}`. Write a "
                "share such as `--warmup 0.05`."
            )
        if not all(weight > 0 for weight in self.weights):
            raise ValueError("All `--weights` have to be above 0.")
        if self.weights and len(self.weights) != len(self.text):
            raise ValueError(
                f"There are {len(self.weights)} `--weights`, but {len(self.text)} globs of "
                "`--text`. Give one weight for each."
            )
        if self.scale_lr and self.lr is None:
            raise ValueError("`--scale-lr` says what `--lr` is meant for: give both.")
        if self.streaming and not self.dataset:
            raise ValueError("`--streaming` says something about `--dataset`: give both.")
        if self.schedule == "reference" and self.epochs is not None:
            raise ValueError(
                "`--schedule reference` falls from the first step to the last, and so needs "
                "their number: `--steps N` in place of `--epochs`."
            )
        if self.predictions is not None and not self.predictions < self.seq_len:
            raise ValueError(
                f"`--predictions {self.predictions}` of rows of `--seq-len {self.seq_len}` "
                "leave nothing to predict from."
            )
        if self.text and self.dataset:
            raise ValueError("`--text` and `--dataset` are two sources of text. Give one of them.")
        for name, needs in (
            ("dataset_config", self.dataset),
            ("split", self.dataset),
            ("text_column", self.dataset or self.text),
        ):
            if getattr(self, name) is not None and not needs:
                raise ValueError(f"`{flag(name)}` says something about `--dataset`: give both.")

    @property
    def peak(self) -> float:
        """The peak learning rate: `lr`, or what suits a model of this width."""
        if self.lr is not None:
            return self.lr
        width = self.config().hidden_size
        return next((peak for limit, peak in _PEAKS.items() if width < limit), _WIDE_PEAK)

    @property
    def timed(self) -> bool:
        """Whether the learning rate depends on how long the run is to be."""
        lasting = self.schedule in ("constant", "inverse_sqrt")
        return not lasting or 0 < self.warmup < 1

    @property
    def own_vocab_size(self) -> int | None:
        """The vocabulary that the model insists on: only a preset takes any."""
        return None if self.model in _PRESETS else self.config().vocab_size

    @property
    def max_steps(self) -> int:
        """The limit in steps; -1 where it is `epochs`."""
        return -1 if self.steps is None else self.steps

    @property
    def warmup_amount(self) -> int | float:
        """A share of the run as a float, or else steps as an int."""
        return self.warmup if self.warmup < 1 else int(self.warmup)

    def config(self, vocab_size: int | None = None, pad_token_id: int = 0) -> AlbertConfig:
        """The model's configuration, for a tokenizer of `vocab_size` pieces with this padding.

        A preset takes the tokenizer's vocabulary; any other model has its own, which has to be
        the same.

        **Raises:** `ValueError` where vocabulary or positions do not suffice; `FileNotFoundError`
        where there is no model.
        """
        changes: dict[str, Any] = {}
        if self.dropout is not None:
            changes = dict.fromkeys(
                ("hidden_dropout_prob", "attention_probs_dropout_prob"), self.dropout
            )
        if self.model in _PRESETS and vocab_size is not None:
            changes |= {"vocab_size": vocab_size, "pad_token_id": pad_token_id}
        config = self.configured(**changes)
        if self.seq_len > config.max_position_embeddings:
            raise ValueError(
                f"`--seq-len {self.seq_len}` is longer than the positions of the model "
                f"`{self.model}`: it has `max_position_embeddings="
                f"{config.max_position_embeddings}`. Write `--seq-len "
                f"{config.max_position_embeddings}` or less."
            )
        if vocab_size is not None and config.vocab_size != vocab_size:
            size = "larger" if vocab_size > config.vocab_size else "smaller"
            raise ValueError(
                f"The tokenizer's vocabulary is {size} than the model's: {vocab_size} pieces, but "
                f"`{self.model}` has `vocab_size={config.vocab_size}`. Change one of the two, or "
                "pass the tokenizer that belongs to the model: `--tokenizer FILE`."
            )
        return config


def devices_of(text: str) -> str | int:
    """What `--devices` means to a Trainer. **Raises:** `ValueError` for what means nothing."""
    if text == "auto":
        return text
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise ValueError(f"`--devices {text}` is neither `auto` nor a number above 0.")
    return int(text)
