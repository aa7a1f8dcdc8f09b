"""Fine-tuning: from a model and examples to a better model, its scores and its predictions.

FOLDER/model/               the best model, with its tokenizer; transformers loads it too
FOLDER/result.json          scores of each seed, their mean and spread
FOLDER/predictions.jsonl    what the best model makes of the validation examples
FOLDER/config.yaml          all options as they were in effect
FOLDER/run.json             what may not change in between
FOLDER/seed_N/              logs, and checkpoints until `result.json` is there
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlightning import Callback, Precision, Trainer, load_weights
from jaxlightning._say import say
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
from ._features import label_names
from ._files import read_json, write_json, write_rows
from ._finetune_options import DataOptions, EvaluateOptions, FinetuneOptions, PredictOptions
from ._kinds import Kind, QuestionAnswering, check_writable, kind_of, predicted
from ._model_names import model_folder
from ._optimizers import has
from ._options import devices_of
from ._rows import check_vocabulary
from ._run_folder import as_json, begin_run, check_same_run
from ._tables import Table
from ._tokenizer import load_tokenizer, special_ids, tokenizer_hash

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
    identity: dict[str, Any]

    @property
    def metric(self) -> str:
        """By which the best epoch is found; more is better."""
        return self.kind.judged_by(self.config.labels)


def prepare_finetuning(options: FinetuneOptions, folder: Path) -> Setting:
    """Reads and encodes. What cannot work fails here, before anything is computed on a device.

    **Raises:** `ValueError` and `OSError` with what is wrong and what to write instead.
    """
    config = _config(options)
    tokenizer = model_tokenizer(options, options.model, random=options.random)
    if options.model in _PRESETS:
        pad = special_ids(tokenizer).pad
        config = dataclasses.replace(
            config, vocab_size=tokenizer.get_vocab_size(), pad_token_id=pad
        )
    check_vocabulary(tokenizer.get_vocab_size(), config)
    kind = options.kind(options.task, config.max_position_embeddings)
    assert options.train is not None
    train = kind.read(options.train)
    validation = None if options.validation is None else kind.read(options.validation)
    sources = [train, validation] if kind.labels_anywhere and validation is not None else [train]
    labels = _labels(config, kind, sources, options)
    config = dataclasses.replace(config, labels=labels, problem_type=kind.problem_type)
    encoded = kind.encode(train, tokenizer, labels)
    if isinstance(kind, QuestionAnswering):
        options = dataclasses.replace(options, may_be_none=kind.may_be_none)
    if options.limit is not None:
        encoded = encoded.select(np.arange(min(options.limit, len(encoded))))
    held_out = None
    if validation is not None:
        held_out = Examples(validation, kind.encode(validation, tokenizer, labels))
    examples = Examples(train, encoded)
    identity = _identity(options, config, tokenizer) | {
        name: one and kind.fingerprint(one.source, one.encoded)
        for name, one in (("train", examples), ("validation", held_out))
    }
    check_same_run(folder, identity)
    _say_columns(train)
    for one in (examples, held_out):
        if one is not None:
            _say_cut(kind, one.source, one.encoded)
    _say_unlearnt(kind, train, validation)
    return Setting(options, folder, kind, tokenizer, config, examples, held_out, identity)


def _say_columns(source: Any) -> None:
    """What has been read of a table, which nobody named: a wrong guess is to be seen."""
    if isinstance(source, Table):
        say(source.usage())


def _say_cut(kind: Kind, source: Any, encoded: Encoded) -> None:
    if encoded.cut:
        say(
            f"{encoded.cut:,} of {len(encoded):,} examples of `{source.source}` are longer than "
            f"{kind.max_length} tokens, and cut; see `--max-length`."
        )


def _say_unlearnt(kind: Kind, train: Any, validation: Any) -> None:
    """Labels that no example to learn from has, where they may be new."""
    if not kind.labels_anywhere or validation is None:
        return
    known, found = (label_names([one], kind.columns, kind.name) for one in (train, validation))
    new = [label for label in found if label not in known]
    if new:
        listed = ", ".join(f"`{label}`" for label in new)
        say(f"Only the validation examples have {listed}, which cannot be learnt.")


_FREE = ("train", "validation", "tokenizer", "model", "out", "devices", "seeds")
"""Options that may change when a run goes on. What the files hold counts, not where they lie."""


def _identity(
    options: FinetuneOptions, config: AlbertConfig, tokenizer: Tokenizer
) -> dict[str, Any]:
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE}
    return as_json(
        {
            "command": "finetune",
            **kept,
            "lr": peak(options, config),
            "tokenizer": tokenizer_hash(tokenizer),
            "model": options.fingerprint,
            "labels": config.labels,
        }
    )


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
    """Trains with each seed, keeps the best, and reports; or goes on where it was interrupted.

    **Returns:** the exit status.
    """
    options, folder = setting.options, setting.folder
    begin_run(folder, setting.identity)
    results: list[dict[str, Any]] = []
    for seed in itertools.count(options.seed):
        if len(results) >= options.seeds and _finished(folder, seed) is None:
            break  # those that an earlier start has finished count, even if fewer are asked for now
        results.append(_one_seed(setting, seed, results))
    best = max(results, key=lambda result: _value(setting, result))  # the first of equal ones
    model = folder / "model"
    if setting.validation is not None:
        task = from_pretrained(model)
        found = predicted(_quiet(options), task, setting.validation.encoded, options.batch_size)
        rows = setting.kind.rows(found, *_of(setting.validation), setting.config.labels)
        write_rows(folder / "predictions.jsonl", rows)
    summary = summarised(results)
    content = {"summary": summary, "best_seed": best["seed"], "seeds": results}
    write_json(folder / "result.json", content)
    print(report(summary, results, model))
    return 0


def _of(examples: Examples) -> tuple[Any, Encoded]:
    return examples.source, examples.encoded


def _value(setting: Setting, result: dict[str, Any]) -> float:
    """What a run is judged by; more is better."""
    scores = result["scores"]
    if not scores:
        return -result["train_loss"]
    name = "f1" if setting.options.task == "qa" else setting.metric
    return scores.get(name, next(iter(scores.values())))


def _folder_of(run: Path, seed: int) -> Path:
    return run / f"seed_{seed}"


def _finished(run: Path, seed: int) -> dict[str, Any] | None:
    """What came of a seed, if it is done."""
    return read_json(_folder_of(run, seed) / "result.json")


def _one_seed(setting: Setting, seed: int, others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What came of a seed. Its model is kept if it is better than those of `others`."""
    options = setting.options
    folder = _folder_of(setting.folder, seed)
    done = _finished(setting.folder, seed)
    if done is not None:
        say(f"Seed {seed} is done: {done['steps']:,} steps.")
        return done
    encoded = setting.train.encoded
    loader = BucketLoader(encoded, options.batch_size, shuffle=True, seed=seed)
    validation = None
    if setting.validation is not None:
        validation = BucketLoader(setting.validation.encoded, options.batch_size)
    saved = ModelCheckpoint(
        folder / "checkpoints",
        "epoch={epoch}",
        auto_insert_metric_name=False,
        monitor=None if validation is None else f"val/{setting.metric}",
        mode="max",
        save_top_k=1,
        save_last=True,
        save_on_exception=True,
    )
    trainer = _trainer(setting, folder, seed, saved, log_every=min(10, len(loader)))
    initial = initial_task(setting, seed, _steps(options, len(loader)))
    task: Any = trainer.fit(initial, loader, validation, resume="auto")
    loss = trainer.callback_metrics.get("train/loss", math.nan)
    if not math.isfinite(loss):
        raise ValueError(
            f"Seed {seed} has learnt nothing: its loss is not finite. Lower `--lr`, or write "
            "`--precision 32-true`."
        )
    scores: dict[str, float] = {}
    if setting.validation is not None:
        if saved.best_model_path:
            task = load_weights(saved.best_model_path, task)
        found = predicted(_quiet(options), task, setting.validation.encoded, options.batch_size)
        scores = setting.kind.scores(found, *_of(setting.validation), setting.config.labels)
    result = {"seed": seed, "steps": trainer.global_step, "train_loss": loss, "scores": scores}
    if all(_value(setting, result) > _value(setting, other) for other in others):
        save_pretrained(task, setting.folder / "model", setting.tokenizer)
    write_json(folder / "result.json", result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def _steps(options: FinetuneOptions, batches: int) -> int:
    return -(-batches // options.accumulate) * options.epochs


def initial_task(setting: Setting, seed: int, steps: int) -> AlbertTask:
    """The task before its first step."""
    options, config = setting.options, setting.config
    recipe: dict[str, Any] = {
        "optimizer": options.optimizer,
        "learning_rate": peak(options, config),
        "weight_decay": options.weight_decay,
        "warmup_steps": min(int(options.warmup * steps), steps - 1),
        "total_steps": steps,
        "b2": 0.999 if has(options.optimizer, "b2") else None,
        "layer_decay": options.layer_decay,
        "frozen": options.freeze,
        "unfreeze_every": options.unfreeze_every,
    }
    key = jax.random.key(seed)
    if options.random:
        return setting.kind.task.init(config, key, **recipe)
    fields = dataclasses.asdict(config)
    return from_pretrained(options.folder, setting.kind.task, key=key, **fields, **recipe)


def peak(options: FinetuneOptions, config: AlbertConfig) -> float:
    """The highest learning rate."""
    return options.lr or (_PEAK if config.hidden_size >= _WIDE else _NARROW_PEAK)


def _trainer(
    setting: Setting, folder: Path, seed: int, saved: ModelCheckpoint, log_every: int
) -> Trainer:
    options = setting.options
    logs: dict[str, Any] = {"save_dir": folder, "name": "", "version": "logs"}
    stopping: list[Callback] = []
    if options.patience is not None:
        stopping = [EarlyStopping(f"val/{setting.metric}", mode="max", patience=options.patience)]
    return Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip or None,
        precision=_precision(options),
        devices=devices_of(options.devices),
        num_sanity_val_steps=0,
        log_every_n_steps=log_every,
        seed=seed,
        callbacks=[
            LearningRateMonitor(),
            SkipNonFinite(),
            ThroughputMonitor(tokens=lambda batch: batch["input_ids"].size),
            TQDMProgressBar(metrics=("train/loss", f"val/{setting.metric}")),
            *stopping,
            saved,
        ],
        logger=[TensorBoardLogger(**logs), CSVLogger(**logs)],
        default_root_dir=folder,
        enable_model_summary=False,
    )


def _precision(options: DataOptions) -> Precision:
    """What examples have in fractions are numbers to predict, which 16 bits would round."""
    return Precision.named(options.precision)._replace(inputs=jnp.float32)


def _quiet(options: DataOptions) -> Trainer:
    """A trainer that predicts, and logs nothing."""
    return Trainer(
        precision=_precision(options),
        devices=devices_of(options.devices),
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
    spread = lambda one: f" ± {one['spread']:.4f} over {len(results)} seeds"
    scores = {
        name: f"{one['mean']:.4f}" + (spread(one) if len(results) > 1 else "")
        for name, one in summary.items()
    }
    return "\n" + _listed(scores | {"model": str(model)})


def _listed(values: dict[str, str]) -> str:
    """A line each, the values below one another."""
    width = max(24, *(len(name) + 2 for name in values))
    return "\n".join(f"{name:<{width}}{value}" for name, value in values.items())


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
    _say_columns(source)
    _say_cut(kind, source, examples)
    found = predicted(_quiet(options), task, examples, options.batch_size)
    scores = kind.scores(found, source, examples, task.config.labels)
    print(_listed({name: f"{value:.4f}" for name, value in scores.items()}))
    return 0


def predict(options: PredictOptions) -> int:
    """Writes, or prints, what the model makes of examples."""
    import json

    if options.out is not None:
        check_writable(Path(options.out))
    task, kind, tokenizer = _opened(options)
    assert options.data is not None
    source = kind.read(options.data, labelled=False)
    examples = kind.encode(source, tokenizer, task.config.labels, labelled=False)
    _say_columns(source)
    _say_cut(kind, source, examples)
    found = predicted(_quiet(options), task, examples, options.batch_size)
    rows = kind.rows(found, source, examples, task.config.labels)
    if options.out is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        write_rows(Path(options.out), rows)
    return 0
