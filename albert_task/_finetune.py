"""Fine-tuning: from a model and examples to a better model, its scores and its predictions.

FOLDER/model/               the best model, with its tokenizer; transformers loads it too
FOLDER/result.json          scores of each seed, their mean and spread
FOLDER/predictions.jsonl    what the best model makes of the validation examples
FOLDER/config.yaml          all options as they were in effect
FOLDER/seed_N/              checkpoints and logs
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxlightning import Callback, Trainer, load_weights
from jaxlightning.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    SkipNonFinite,
    ThroughputMonitor,
    TQDMProgressBar,
)
from jaxlightning.loggers import CSVLogger, TensorBoardLogger

from ._base import AlbertTask
from ._config import _PRESETS, AlbertConfig
from ._convert import from_pretrained, save_pretrained
from ._encoded import BucketLoader, Encoded
from ._finetune_options import DataOptions, EvaluateOptions, FinetuneOptions, PredictOptions
from ._kinds import Kind, kind_of, predicted, write_rows
from ._model_names import model_folder
from ._rows import check_vocabulary
from ._stages import write_json
from ._tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WIDE = 512  # what is narrower learns at `_NARROW_PEAK`
_PEAK, _NARROW_PEAK = 3e-5, 3e-4


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples as they were read, and as the model takes them."""

    source: Any
    encoded: Encoded


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that fine-tuning needs, checked."""

    options: FinetuneOptions
    folder: Path
    kind: Kind
    tokenizer: Tokenizer
    config: AlbertConfig
    train: Examples
    validation: Examples | None


def prepare_finetuning(options: FinetuneOptions, folder: Path) -> Setting:
    """Reads and encodes. What cannot work fails here, before anything is computed on a device.

    **Raises:** `ValueError` and `OSError` with what is wrong and what to write instead.
    """
    config = _config(options)
    tokenizer = model_tokenizer(options, options.model, random=options.random)
    if options.model in _PRESETS:
        config = dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size())
    check_vocabulary(tokenizer.get_vocab_size(), config)
    kind = options.kind(options.task, config.max_position_embeddings)
    assert options.train is not None
    train = kind.read(options.train)
    validation = None if options.validation is None else kind.read(options.validation)
    labels = _labels(config, kind, [s for s in (train, validation) if s is not None], options)
    config = dataclasses.replace(config, labels=labels, problem_type=kind.problem_type)
    encoded = kind.encode(train, tokenizer, labels)
    if options.limit is not None:
        encoded = encoded.select(np.arange(min(options.limit, len(encoded))))
    held_out = None
    if validation is not None:
        held_out = Examples(validation, kind.encode(validation, tokenizer, labels))
    return Setting(options, folder, kind, tokenizer, config, Examples(train, encoded), held_out)


def _config(options: FinetuneOptions) -> AlbertConfig:
    changes: dict[str, Any] = {}
    if options.dropout is not None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
        changes = dict.fromkeys(names, options.dropout)
    return options.configured(**changes)


def _labels(
    config: AlbertConfig, kind: Kind, sources: Sequence[Any], options: FinetuneOptions
) -> tuple[str, ...]:
    """The model's own labels where it has been fine-tuned for these, else those found."""
    found = kind.labels(sources)
    known = tuple(config.labels)
    fitting = set(found) <= set(known) and not options.random
    return known if found and fitting else found


def model_tokenizer(options: DataOptions, model: str, *, random: bool = False) -> Tokenizer:
    """The tokenizer that is given, or else the model's own.

    **Raises:** `FileNotFoundError` where there is none.
    """
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    if random:
        beside = Path(model).parent if Path(model).is_file() else None
        if beside is not None and any((beside / n).is_file() for n in _TOKENIZERS):
            return load_tokenizer(beside)
        raise FileNotFoundError(
            f"`--model {model}` has random weights and no tokenizer of its own. Give one: "
            "`--tokenizer FILE`, a tokenizer.json or spiece.model."
        )
    return load_tokenizer(model_folder(model))


_TOKENIZERS = ("tokenizer.json", "spiece.model")


# Training


def finetune(setting: Setting) -> int:
    """Trains with each seed, keeps the best, and reports.

    **Returns:** the exit status.
    """
    options, folder = setting.options, setting.folder
    results: list[dict[str, Any]] = []
    best: tuple[float, AlbertTask] | None = None
    for seed in range(options.seed, options.seed + options.seeds):
        task, result = _one_seed(setting, seed)
        results.append(result)
        value = _value(setting, result)
        if best is None or value > best[0]:
            best = (value, task)
    assert best is not None
    task = best[1]
    model = folder / "model"
    save_pretrained(task, model, setting.tokenizer)
    if setting.validation is not None:
        found = predicted(_quiet(options), task, setting.validation.encoded, options.batch_size)
        rows = setting.kind.rows(found, *_of(setting.validation), setting.config.labels)
        write_rows(folder / "predictions.jsonl", rows)
    summary = summarised(results)
    write_json(folder / "result.json", {"summary": summary, "seeds": results})
    print(report(summary, results, model))
    return 0


def _of(examples: Examples) -> tuple[Any, Encoded]:
    return examples.source, examples.encoded


def _value(setting: Setting, result: dict[str, Any]) -> float:
    """What a run is judged by; more is better."""
    scores = result["scores"]
    if not scores:
        return -result["train_loss"]
    name = setting.kind.monitor.removeprefix("val/")
    return scores.get("f1" if setting.options.task == "qa" else name, next(iter(scores.values())))


def _one_seed(setting: Setting, seed: int) -> tuple[AlbertTask, dict[str, Any]]:
    options = setting.options
    folder = setting.folder / f"seed_{seed}"
    # All that these hold can be made again; a run is not resumed, because it is short.
    shutil.rmtree(folder, ignore_errors=True)
    encoded = setting.train.encoded
    loader = BucketLoader(encoded, options.batch_size, shuffle=True, seed=seed)
    validation = None
    if setting.validation is not None:
        validation = BucketLoader(setting.validation.encoded, options.batch_size)
    saved = ModelCheckpoint(
        folder / "checkpoints",
        "epoch={epoch}",
        auto_insert_metric_name=False,
        monitor=None if validation is None else setting.kind.monitor,
        mode=setting.kind.best,
        save_top_k=1,
        save_weights_only=True,
    )
    trainer = _trainer(setting, folder, seed, saved)
    initial = initial_task(setting, seed, _steps(options, len(loader)))
    task: Any = trainer.fit(initial, loader, validation)
    loss = float(trainer.callback_metrics["train/loss"])
    scores: dict[str, float] = {}
    if setting.validation is not None:
        if saved.best_model_path:
            task = load_weights(saved.best_model_path, task)
        found = predicted(_quiet(options), task, setting.validation.encoded, options.batch_size)
        scores = setting.kind.scores(found, *_of(setting.validation), setting.config.labels)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    steps = trainer.global_step
    return task, {"seed": seed, "steps": steps, "train_loss": loss, "scores": scores}


def _steps(options: FinetuneOptions, batches: int) -> int:
    return -(-batches // options.accumulate) * options.epochs


def initial_task(setting: Setting, seed: int, steps: int) -> AlbertTask:
    """The task before its first step."""
    options, config = setting.options, setting.config
    peak = options.lr or (_PEAK if config.hidden_size >= _WIDE else _NARROW_PEAK)
    recipe: dict[str, Any] = {
        "optimizer": options.optimizer,
        "learning_rate": peak,
        "weight_decay": options.weight_decay,
        "warmup_steps": min(int(options.warmup * steps), steps - 1),
        "total_steps": steps,
        "b2": 0.999,
        "layer_decay": options.layer_decay,
        "frozen": options.freeze,
        "unfreeze_every": options.unfreeze_every,
    }
    key = jax.random.key(seed)
    if options.random:
        return setting.kind.task.init(config, key, **recipe)
    fields = dataclasses.asdict(config)
    return from_pretrained(options.folder, setting.kind.task, key=key, **fields, **recipe)


def _trainer(setting: Setting, folder: Path, seed: int, saved: ModelCheckpoint) -> Trainer:
    options = setting.options
    logs: dict[str, Any] = {"save_dir": folder, "name": "", "version": "logs"}
    stopping: list[Callback] = []
    if options.patience is not None:
        monitor, mode = setting.kind.monitor, setting.kind.best
        stopping = [EarlyStopping(monitor, mode=mode, patience=options.patience)]
    return Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip or None,
        precision=options.precision,
        devices=_devices(options),
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        seed=seed,
        callbacks=[
            LearningRateMonitor(),
            SkipNonFinite(),
            ThroughputMonitor(tokens=lambda batch: batch["input_ids"].size),
            TQDMProgressBar(metrics=("train/loss", setting.kind.monitor)),
            *stopping,
            saved,
        ],
        logger=[TensorBoardLogger(**logs), CSVLogger(**logs)],
        default_root_dir=folder,
        enable_model_summary=False,
    )


def _devices(options: DataOptions) -> str | int:
    return options.devices if options.devices == "auto" else int(options.devices)


def _quiet(options: DataOptions) -> Trainer:
    """A trainer that predicts, and logs nothing."""
    return Trainer(
        precision=options.precision,
        devices=_devices(options),
        callbacks=[TQDMProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


# The report


def summarised(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread (the standard deviation) of each score over seeds."""
    names = results[0]["scores"]
    values = {name: [result["scores"][name] for result in results] for name in names}
    return {
        name: {
            "mean": statistics.fmean(found),
            "spread": statistics.stdev(found) if len(found) > 1 else 0.0,
        }
        for name, found in values.items()
    }


def report(
    summary: dict[str, dict[str, float]], results: Sequence[dict[str, Any]], model: Path
) -> str:
    """What came of it, for people."""
    lines = [""]
    for name, one in summary.items():
        spread = f" ± {one['spread']:.4f} over {len(results)} seeds" if len(results) > 1 else ""
        lines.append(f"{name:<24}{one['mean']:.4f}{spread}")
    lines.append(f"{'model':<24}{model}")
    return "\n".join(lines)


# What one does with a model that was fine-tuned


def _opened(options: EvaluateOptions) -> tuple[AlbertTask, Kind, Tokenizer]:
    task = from_pretrained(options.model)
    tokenizer = model_tokenizer(options, options.model)
    check_vocabulary(tokenizer.get_vocab_size(), task.config)
    return task, options.kind(kind_of(task), task.config.max_position_embeddings), tokenizer


def evaluate(options: EvaluateOptions) -> int:
    """Prints the scores on examples with labels."""
    task, kind, tokenizer = _opened(options)
    assert options.data is not None
    source = kind.read(options.data)
    examples = kind.encode(source, tokenizer, task.config.labels)
    found = predicted(_quiet(options), task, examples, options.batch_size)
    for name, value in kind.scores(found, source, examples, task.config.labels).items():
        print(f"{name:<24}{value:.4f}")
    return 0


def predict(options: PredictOptions) -> int:
    """Writes, or prints, what the model makes of examples."""
    import json

    task, kind, tokenizer = _opened(options)
    assert options.data is not None
    source = kind.read(options.data, labelled=False)
    examples = kind.encode(source, tokenizer, task.config.labels, labelled=False)
    found = predicted(_quiet(options), task, examples, options.batch_size)
    rows = kind.rows(found, source, examples, task.config.labels)
    if options.out is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        write_rows(Path(options.out), rows)
    return 0
