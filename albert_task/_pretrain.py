"""The pretraining job: from encoded text to a trained model, a table and filled-in masks."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from jaxlightning import Callback, Trainer, load_weights
from jaxlightning._flops import matmul_peak
from jaxlightning._hardware import device_peak
from jaxlightning.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    LearningRateMonitor,
    LearningRateSchedule,
    ModelCheckpoint,
    SkipNonFinite,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from jaxlightning.loggers import CSVLogger, TensorBoardLogger

from ._convert import from_pretrained, save_pretrained
from ._demonstration import demonstrated, described
from ._files import read_json, write_json
from ._options import PretrainOptions, devices_of
from ._pretraining_task import AlbertForPreTraining
from ._run_folder import begin_run
from ._stages import Prepared
from ._tasks import AlbertForMaskedLM
from ._tokenizer import WordStarts

_SHOWN = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")


def pretrain(prepared: Prepared, trainer: Trainer) -> int:
    """Trains, or goes on, or says that the run is done; then reports.

    Ctrl-C saves the state of the step it comes in, and the process ends with status 130.

    **Returns:** the exit status.
    """
    options, folder = prepared.options, prepared.folder
    result = finished(folder, options)
    if result is None:
        result = _trained(prepared, trainer)
    else:
        on = f"`--model {folder} --out FOLDER`" if options.timed else "raise `--steps`"
        print(
            f"This run is done: {result['steps']:,} steps{_because(result)}. To go on from it, "
            f"{on}; to begin anew, choose another `--out` or delete `{folder}`."
        )
    print(report(result))
    return 0


def finished(folder: Path, options: PretrainOptions) -> dict[str, Any] | None:
    """What the run came to, if there is nothing left to train."""
    result = read_json(folder / "result.json")
    if result is None:
        return None
    if options.epochs is None:
        done = result["steps"] >= options.max_steps
    else:
        done = result["epochs"] >= options.epochs
    stopped = result["stopped"] is not None and result["limits"] == _limits(options)
    return result if done or stopped else None


def _limits(options: PretrainOptions) -> dict[str, Any]:
    """What may end a run early."""
    return {"max_time": options.max_time, "patience": options.patience}


# Training


def make_trainer(options: PretrainOptions, folder: Path) -> Trainer:
    """The trainer that the options ask for.

    **Raises:** `ValueError` for what this machine or the Trainer refuses.
    """
    logs: dict[str, Any] = {"save_dir": folder, "name": "", "version": "logs"}
    return Trainer(
        max_steps=options.max_steps,
        max_epochs=options.epochs or -1,
        max_time=options.max_time,
        val_check_interval=options.eval_interval * options.accumulate,  # in batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=options.log_interval,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip or None,
        precision=options.precision,
        devices=devices_of(options.devices),
        strategy=options.strategy,
        steps_per_dispatch=options.steps_per_dispatch,
        deterministic=options.deterministic,
        detect_anomaly=options.detect_anomaly,
        profiler="jax" if options.profile else None,
        seed=options.seed,
        callbacks=_callbacks(options, folder),
        logger=[TensorBoardLogger(**logs), CSVLogger(**logs)],
        default_root_dir=folder,
    )


def _callbacks(options: PretrainOptions, folder: Path) -> list[Callback]:
    stopping: list[Callback] = []
    if options.patience is not None:
        stopping = [EarlyStopping("val/loss", patience=options.patience)]
    schedule: list[Callback] = []
    if options.schedule != "reference":  # which is the recipe's own
        schedule = [LearningRateSchedule(options.schedule, warmup=options.warmup_amount)]
    averages = [] if options.ema is None else [ExponentialMovingAverage(options.ema)]
    return [
        *schedule,
        *averages,
        LearningRateMonitor(),
        SkipNonFinite(),
        ThroughputMonitor(tokens=lambda batch: batch["input_ids"].size),
        Timer(),
        TQDMProgressBar(whole=True, metrics=_SHOWN),
        *stopping,
        ModelCheckpoint(
            folder / "checkpoints",
            "step={step}",
            auto_insert_metric_name=False,
            monitor="val/loss",
            every_n_train_steps=options.eval_interval,
            save_top_k=options.keep,
            save_last=True,
            save_on_exception=True,
        ),
    ]


def new_task(
    key: PRNGKeyArray, prepared: Prepared, frequencies: Float[np.ndarray, " vocab"]
) -> AlbertForMaskedLM:
    """The task before its first step.

    Where weights are random, the head's bias starts as the log of the pieces' frequencies, so that
    the run begins at the unigram entropy and spends no step on learning how common each piece is.
    """
    options = prepared.options
    kind = AlbertForPreTraining if options.objective == "mlm+sop" else AlbertForMaskedLM
    recipe: dict[str, Any] = {}
    if options.schedule == "reference":
        recipe = {
            "schedule": "polynomial",
            "total_steps": options.max_steps,
            "warmup_steps": round(
                options.warmup * (options.max_steps if options.warmup < 1 else 1)
            ),
        }
    recipe |= dict(
        special=prepared.data.store.special,
        mask_rate=options.mask_probability,
        predictions=options.predictions,
        max_ngram=max(1, options.ngram),
        word_starts=WordStarts.of(prepared.tokenizer) if options.ngram else None,
        optimizer=options.optimizer,
        learning_rate=options.peak,
        batch_size=options.batch_size * options.accumulate if options.scale_lr else None,
        weight_decay=options.weight_decay,
        b1=options.b1,
        b2=options.b2,
    )
    if not options.random:
        fields = dataclasses.asdict(prepared.config)
        return from_pretrained(options.folder, kind, key=key, **fields, **recipe)
    task = kind.init(prepared.config, key, **recipe)
    bias = jnp.log(jnp.asarray(frequencies, jnp.float32))
    return eqx.tree_at(lambda task: task.head.bias, task, bias)


def _smoothed(counts: Int[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    smoothed = counts + 0.5
    return smoothed / smoothed.sum()


def _trained(prepared: Prepared, trainer: Trainer) -> dict[str, Any]:
    """Trains, and writes down what there is to say about it."""
    data, options = prepared.data, prepared.options
    baseline = data.baseline()
    frequencies = _smoothed(data.counts())
    make = lambda key: new_task(key, prepared, frequencies)
    # Weights that are read are no constants to compile: only random ones are made inside jit.
    initial = make if options.random else make(jax.random.key(options.seed))
    begin_run(prepared.folder, prepared.identity)
    task: Any = trainer.fit(initial, datamodule=data, resume="auto")
    saved = trainer.checkpoint_callback
    scores, path = _scores(task, prepared), saved.last_model_path
    best = saved.best_model_score
    goes_back = best is not None and best < scores["val/loss"]
    if goes_back:
        path = saved.best_model_path
        task = load_weights(path, task)
        scores = _scores(task, prepared)
    model = prepared.folder / "model"
    save_pretrained(task, model, prepared.tokenizer)
    steps = trainer.global_step
    result = {
        "model": str(model),
        "steps": steps,
        "epochs": trainer.current_epoch,
        "stopped": trainer.stop_reason,
        "limits": _limits(options),
        "val_loss": scores["val/loss"],
        "val_mlm": scores.get("val/mlm", scores["val/loss"]),
        "val_accuracy": scores["val/accuracy"],
        "val_perplexity": scores["val/perplexity"],
        "val_sop_accuracy": scores.get("val/sop_accuracy"),
        "baseline": baseline._asdict() | {"piece": prepared.tokenizer.id_to_token(baseline.piece)},
        "parameters": sum(x.size for x in jax.tree.leaves(eqx.filter(task, eqx.is_array))),
        "tokens": steps * options.batch_size * options.accumulate * options.seq_len,
        "seconds": _timer(trainer).time_elapsed("train"),
        **_speed(trainer),
        "logs": trainer.log_dir,
        "checkpoint": path,
        "is_last": not goes_back,
        "filled": [],
    }
    write_json(prepared.folder / "result.json", result)  # which no demonstration may prevent
    result["filled"] = demonstrated(task, prepared)
    write_json(prepared.folder / "result.json", result)
    return result


def _scores(task: AlbertForMaskedLM, prepared: Prepared) -> dict[str, float]:
    """The validation, by a trainer of its own, which logs nothing."""
    options = prepared.options
    quiet = Trainer(
        precision=options.precision,
        devices=devices_of(options.devices),
        strategy=options.strategy,
        seed=options.seed,
        callbacks=[TQDMProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return quiet.validate(task, datamodule=prepared.data)


def _timer(trainer: Trainer) -> Timer:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Timer))


def _speed(trainer: Trainer) -> dict[str, Any]:
    """Medians over all that was logged, earlier starts of the run included."""
    with Path(trainer.log_dir or "", CSVLogger.file_name).open(newline="") as file:
        rows = list(csv.DictReader(file))

    def median(name: str) -> float | None:
        values = [float(row[name]) for row in rows if row.get(name)]
        return statistics.median(values) if values else None

    flops, share = median("throughput/flops_per_s"), median("throughput/mfu")
    peak = flops / share if flops and share else None
    dtype = trainer.precision.compute
    published = device_peak(trainer.mesh.devices.flat[0].device_kind, dtype)
    if peak and published is None and jax.process_count() == 1:
        # Measured before training, perhaps while the machine was busy: the better of two counts.
        peak = max(peak, matmul_peak(dtype=dtype))
    return {
        "tokens_per_s": median("throughput/tokens_per_s"),
        "mfu": flops / peak if flops and peak else None,
        "peak": peak,
        "peak_measured": published is None,
    }


# The report


def report(result: dict[str, Any]) -> str:
    """The table, and what the model fills in."""
    base = result["baseline"]
    rows = [
        ("", "model", "unigram baseline"),
        (
            "validation loss",
            f"{result['val_mlm']:.3f}",
            f"{base['cross_entropy']:.3f} (entropy of the text {base['entropy']:.3f})",
        ),
        (
            "masked accuracy",
            f"{result['val_accuracy']:.1%}",
            f"{base['accuracy']:.1%} (always `{base['piece']}`)",
        ),
    ]
    rows.append(("perplexity", f"{result['val_perplexity']:.1f}", ""))
    if result["val_sop_accuracy"] is not None:
        rows.append(("sentence order", f"{result['val_sop_accuracy']:.1%}", "50.0%"))
    width = max(len(value) for _, value, _ in rows) + 2
    lines = ["", *(f"{name:<17}{value:<{width}}{other}" for name, value, other in rows), ""]
    facts = {
        "model": f"{result['parameters']:,} parameters",
        "training": _duration(result),
        "speed": _described_speed(result),
        "logs": f"{result['logs']} (tensorboard --logdir {result['logs']})",
        "checkpoint": f"{result['checkpoint']} (the {_which(result)})",
        "for fine-tuning": result["model"],
    }
    lines += [f"{name:<17}{value}" for name, value in facts.items() if value]
    lines += ["", "What the model fills in:"] if result["filled"] else []
    return "\n".join([*lines, *described(result["filled"])])


def _which(result: dict[str, Any]) -> str:
    return "last one" if result["is_last"] else "one of the best validation, as the last is worse"


def _duration(result: dict[str, Any]) -> str:
    minutes, seconds = divmod(round(result["seconds"]), 60)
    return (
        f"{result['steps']:,} steps, {result['tokens'] / 1e6:,.2f} M tokens in {minutes} min "
        f"{seconds} s{_because(result)}"
    )


def _because(result: dict[str, Any]) -> str:
    return "" if result["stopped"] is None else f" (stopped: {result['stopped']})"


def _described_speed(result: dict[str, Any]) -> str:
    if result["tokens_per_s"] is None:
        return ""
    source = "a measured matrix product's" if result["peak_measured"] else "the published"
    return (
        f"{result['tokens_per_s']:,.0f} tokens/s, MFU {result['mfu']:.1%} of {source} "
        f"{result['peak'] / 1e9:,.0f} GFLOP/s"
    )
