"""Hooks are called in PyTorch Lightning's order, wherever both have the hook.

`lightning_hook_order.json` is a recording of Lightning itself, made by
`record_lightning_hooks.py`.
"""

import inspect
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlightning import Callback, DataLoader, DataModule, Mean, TaskModule, Trainer
from jaxlightning._callback import Checkpoint

RECORDED = json.loads((Path(__file__).parent / "lightning_hook_order.json").read_text())
RUNS = RECORDED["runs"]
FUSED = "the gradient and the update are one compiled program"
LEFT_OUT = {
    "on_before_zero_grad": FUSED,
    "on_before_backward": FUSED,
    "on_after_backward": FUSED,
    "on_before_optimizer_step": FUSED,
}
OURS = {
    "on_log": "metrics reach the host an interval late",
    "on_checkpoint": "the one place to save",
}
HOOKS = [
    name
    for name, member in vars(Callback).items()
    if inspect.isfunction(member)
    and (name.startswith("on_") or name in ("setup", "teardown", "state_dict", "load_state_dict"))
]


def recorder(events, prefix="", base=Callback, stops_at_step=None):
    """A callback that overrides every hook, so as to write down that it was called."""

    def overridden(hook):
        names = list(inspect.signature(getattr(Callback, hook)).parameters)

        def record(self, *args):
            told = dict(zip(names[1:], args, strict=True))
            batch = f" {told['batch_idx']}" if "batch_idx" in told else ""
            events.append(f"{prefix}{hook}{batch}")
            trainer = told.get("trainer")
            if hook == "on_train_batch_end" and trainer.global_step == stops_at_step:
                trainer.should_stop = True
            return {"seen": len(events)} if hook == "state_dict" else None

        return record

    return type(f"Recorder {prefix}", (base,), {hook: overridden(hook) for hook in HOOKS})()


class Line(TaskModule):
    weight: jax.Array = eqx.field(converter=jnp.asarray)

    def training_step(self, batch, *, key):
        return Mean.over(batch["x"] @ self.weight)

    def predict_step(self, batch, *, key):
        return batch["x"] @ self.weight

    def configure_optimizers(self):
        return optax.sgd(0.1)


class TwoBatches(DataModule):
    def train_dataloader(self):
        return DataLoader({"x": np.ones((4, 3), np.float32)}, 2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def line():
    return Line(np.ones(3, np.float32))


def quiet(callbacks, tmp_path, **arguments):
    return Trainer(
        callbacks=callbacks,
        devices=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False} | arguments,
    )


def shared(events, skipped=frozenset({"state_dict"})):
    """The events of hooks that both have; by default without `state_dict`, which we also ask
    for before a validation, so that a signal during it can be saved as of its start."""
    skipped = LEFT_OUT.keys() | OURS.keys() | skipped
    return [event for event in events if event.split()[0].rpartition(".")[2] not in skipped]


def test_the_document_has_every_hook_with_its_arguments():
    takes = {
        name: [*inspect.signature(member).parameters][1:]
        for name, member in vars(Callback).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    table = (Path(__file__).parent.parent / "docs/callbacks.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \| (.*?)\| ", table, re.MULTILINE)
    listed = [
        (name, re.findall(r"\w+", arguments))
        for names, arguments in rows
        for name in re.findall(r"\w+", names)
    ]
    assert listed == list(takes.items())


def test_every_hook_is_lightnings_or_explained():
    assert sorted(set(RECORDED["hooks"]) - set(HOOKS)) == sorted(LEFT_OUT)
    assert sorted(set(HOOKS) - set(RECORDED["hooks"])) == sorted(OURS)


@pytest.mark.parametrize(
    "name",
    [
        "fit",
        "fit_validating_every_batch",
        "fit_validating_every_second_epoch",
        "fit_without_validation",
        "fit_stopped_by_max_steps",
        "fit_stopped_by_callback",
        "validate",
        "test",
        "predict",
    ],
)
def test_order(name, tmp_path):
    run = RUNS[name]
    events = []
    callback = recorder(events, stops_at_step=run["stops_at_step"])
    trainer = quiet([callback], tmp_path, **run["trainer"])
    getattr(trainer, run["entry"])(line(), TwoBatches())
    assert shared(events) == shared(run["events"])


def test_order_of_an_exception(tmp_path):
    run = RUNS["fit_failing"]
    events = []

    class Fails(Callback):
        def on_train_batch_start(self, trainer, batch, batch_idx):
            if trainer.global_step == run["fails_at_step"]:
                raise RuntimeError("asked for")

    trainer = quiet([recorder(events), Fails()], tmp_path, **run["trainer"])
    with pytest.raises(RuntimeError, match="asked for"):
        trainer.fit(line(), TwoBatches())
    # Lightning tears nothing down after an exception; we do, so that callbacks can close files.
    assert shared(events) == [*shared(run["events"]), "teardown"]


def test_callbacks_that_save_come_last(tmp_path):
    run = RUNS["fit_with_checkpoint"]
    events = []
    callbacks = [recorder(events, "checkpoint.", Checkpoint), recorder(events, "other.")]
    quiet(callbacks, tmp_path, enable_checkpointing=True, **run["trainer"]).fit(
        line(), TwoBatches()
    )
    assert shared(events) == shared(run["events"])


def test_order_of_saving_and_resuming(tmp_path):
    events = []
    first = quiet([recorder(events)], tmp_path, **RUNS["save_checkpoint"]["trainer"])
    first.fit(line(), TwoBatches())
    events.clear()
    first.save_checkpoint(tmp_path / "one")
    first.wait_for_checkpoints()
    assert shared(events, frozenset()) == RUNS["save_checkpoint"]["events"]

    run = RUNS["fit_resumed"]
    events.clear()
    second = quiet([recorder(events)], tmp_path, **run["trainer"])
    second.fit(line(), TwoBatches(), ckpt_path=tmp_path / "one")
    assert shared(events) == shared(run["events"])
