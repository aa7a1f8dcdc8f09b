"""Records in which order PyTorch Lightning calls the hooks of a `Callback`.

The suite does not run this: it holds our own order against the recording. To record again, in an
environment with `pytorch-lightning`:

    python tests/record_lightning_hooks.py > tests/lightning_hook_order.json

Each run holds the arguments of the Trainer and the events in order: `hook`, or `hook 1` where the
hook is told of batch 1. In the runs with two callbacks an event is `name.hook`; the one called
`checkpoint` derives from Lightning's `Checkpoint` and comes first in the list it was given in.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

BATCHES = 2
EPOCHS = 2
HOOKS = [
    name
    for name, member in vars(pl.Callback).items()
    if inspect.isfunction(member) and not name.startswith("_")
]
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def recorder(events: list[str], prefix: str = "", base: type = pl.Callback) -> pl.Callback:
    """A callback that overrides every hook, so as to write down that it was called."""

    def overridden(hook: str) -> Any:
        names = list(inspect.signature(getattr(base, hook)).parameters)

        def record(self: Any, *args: Any, **kwargs: Any) -> Any:
            told = dict(zip(names[1:], args, strict=False)) | kwargs
            batch = f" {told['batch_idx']}" if "batch_idx" in told else ""
            events.append(f"{prefix}{hook}{batch}")
            return {"seen": len(events)} if hook == "state_dict" else None

        return record

    return type(f"Recorder{prefix}", (base,), {hook: overridden(hook) for hook in HOOKS})()


class StopAt(pl.Callback):
    """Asks for an end as a callback may, after a number of steps."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(3)


class Linear(pl.LightningModule):
    def __init__(self, fails_at_step: int | None = None):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.fails_at_step = fails_at_step

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at_step:
            raise RuntimeError("asked for")
        return self.layer(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Data())

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def run(trainer: pl.Trainer, entry: str, fails_at_step: int | None, **kwargs: Any) -> None:
    try:
        getattr(trainer, entry)(Linear(fails_at_step), **kwargs)
    except RuntimeError as error:
        if fails_at_step is None or "asked for" not in str(error):
            raise


def record(
    entry: str = "fit",
    *,
    fails_at_step: int | None = None,
    stops_at_step: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    events: list[str] = []
    callbacks = [recorder(events)]
    if stops_at_step is not None:
        callbacks.append(StopAt(stops_at_step))
    run(pl.Trainer(callbacks=callbacks, **QUIET, **arguments), entry, fails_at_step)
    return {
        "entry": entry,
        "fails_at_step": fails_at_step,
        "stops_at_step": stops_at_step,
        "trainer": arguments,
        "events": events,
    }


def record_two(**arguments: Any) -> dict[str, Any]:
    """A callback that saves, given first, and one that does not."""
    events: list[str] = []
    callbacks = [
        recorder(events, "checkpoint.", pl.callbacks.Checkpoint),
        recorder(events, "other."),
    ]
    quiet = QUIET | {"enable_checkpointing": True}
    pl.Trainer(callbacks=callbacks, **quiet, **arguments).fit(Linear())
    return {"entry": "fit", "trainer": arguments, "events": events}


def record_saving_and_resuming(**arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """One call of `save_checkpoint` after one epoch, and a fit that goes on from there."""
    saving: list[str] = []
    resuming: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.ckpt"
        first = pl.Trainer(callbacks=[recorder(saving)], max_epochs=1, **QUIET)
        first.fit(Linear())
        saving.clear()
        first.save_checkpoint(path)
        second = pl.Trainer(callbacks=[recorder(resuming)], **QUIET, **arguments)
        second.fit(Linear(), ckpt_path=path)
    return (
        {"entry": "save_checkpoint", "trainer": {"max_epochs": 1}, "events": saving},
        {"entry": "fit", "trainer": arguments, "events": resuming},
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    no_sanity: dict[str, Any] = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0}
    saving, resuming = record_saving_and_resuming(max_epochs=EPOCHS)
    runs = {
        "fit": record(max_epochs=EPOCHS),
        "fit_validating_every_batch": record(max_epochs=EPOCHS, val_check_interval=1),
        "fit_validating_every_second_epoch": record(**no_sanity, check_val_every_n_epoch=2),
        "fit_without_validation": record(max_epochs=EPOCHS, limit_val_batches=0),
        "fit_stopped_by_max_steps": record(max_steps=3, num_sanity_val_steps=0),
        "fit_stopped_by_callback": record(**no_sanity, stops_at_step=1),
        "fit_failing": record(**no_sanity, fails_at_step=1),
        "fit_resumed": resuming,
        "fit_with_checkpoint": record_two(max_epochs=1),
        "save_checkpoint": saving,
        "validate": record("validate"),
        "test": record("test"),
        "predict": record("predict"),
    }
    versions = {"pytorch-lightning": pl.__version__, "torch": torch.__version__}
    json.dump({"versions": versions, "hooks": HOOKS, "runs": runs}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
