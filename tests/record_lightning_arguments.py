"""Records what PyTorch Lightning's Trainer does for its arguments about length and frequency.

The suite does not run this: `test_arguments.py` holds our Trainer against the recording. To record
again, in an environment with `pytorch-lightning`:

    python tests/record_lightning_arguments.py > tests/lightning_arguments.json

A run is a string, one letter an event: `S` sanity check starts, `E` epoch starts, `t` optimizer
step, `V` validation starts, `v` validation batch, `L` training loader asked for, `X` epoch ends.
The training data has five batches, the validation data three.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch

TRAINING, VALIDATION = 5, 3
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
NO_SANITY: dict[str, Any] = {"num_sanity_val_steps": 0}
TWO: dict[str, Any] = {"max_epochs": 2, **NO_SANITY}
CASES: list[dict[str, Any]] = [
    {"max_epochs": 2},
    {"max_epochs": 0, **NO_SANITY},
    {"max_steps": 0, **NO_SANITY},
    {"max_steps": 7, **NO_SANITY},
    {"max_steps": 5, **NO_SANITY},
    {"max_steps": 7, "max_epochs": 1, **NO_SANITY},
    {"max_steps": 11, "max_epochs": -1, **NO_SANITY},
    {"max_epochs": 4, "min_epochs": 2, "stops_at_step": 1, **NO_SANITY},
    {"max_epochs": 4, "min_steps": 7, "stops_at_step": 1, **NO_SANITY},
    {"max_epochs": 4, "min_epochs": 1, "min_steps": 8, "stops_at_step": 2, **NO_SANITY},
    {"limit_train_batches": 3, **TWO},
    {"limit_train_batches": 1, **TWO},
    {"limit_train_batches": 0.5, **TWO},
    {"limit_train_batches": 99, **TWO},
    {"limit_val_batches": 2, **TWO},
    {"limit_val_batches": 1, **TWO},
    {"limit_val_batches": 0.7, **TWO},
    {"limit_val_batches": 0, **TWO},
    {"val_check_interval": 2, **TWO},
    {"val_check_interval": 1, **TWO},
    {"val_check_interval": 5, **TWO},
    {"val_check_interval": 0.5, **TWO},
    {"val_check_interval": 0.25, **TWO},
    {"check_val_every_n_epoch": 2, "max_epochs": 5, **NO_SANITY},
    {"check_val_every_n_epoch": 2, "val_check_interval": 2, "max_epochs": 4, **NO_SANITY},
    {"check_val_every_n_epoch": None, "val_check_interval": 3, **TWO},
    {"check_val_every_n_epoch": None, "val_check_interval": 7, "max_epochs": 3, **NO_SANITY},
    {"num_sanity_val_steps": 1, "max_epochs": 1},
    {"num_sanity_val_steps": -1, "max_epochs": 1},
    {"num_sanity_val_steps": 99, "max_epochs": 1},
    {"num_sanity_val_steps": -1, "limit_val_batches": 1, "max_epochs": 1},
    {"overfit_batches": 2, **TWO},
    {"overfit_batches": 2, "max_epochs": 1},
    {"fast_dev_run": True},
    {"fast_dev_run": 2},
    {"fast_dev_run": 2, "max_epochs": 7, "val_check_interval": 1, "num_sanity_val_steps": 1},
    {"accumulate_grad_batches": 2, **TWO},
    {"accumulate_grad_batches": 5, **TWO},
    {"accumulate_grad_batches": 9, **TWO},
    {"accumulate_grad_batches": 2, "max_steps": 4, **NO_SANITY},
    {"accumulate_grad_batches": 2, "limit_train_batches": 4, **TWO},
    {"accumulate_grad_batches": 2, "val_check_interval": 4, **TWO},
    {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3, **NO_SANITY},
    {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 5, **NO_SANITY},
    {"barebones": True, "max_epochs": 2},
]


class Writes(pl.Callback):
    """Writes events down, and asks for an end after a number of steps."""

    def __init__(self, stops_at_step: int | None):
        self.events = ""
        self.stops_at_step = stops_at_step
        self.step = 0

    def on_sanity_check_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.events += "S"

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.events += "E"

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.events += "X"

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.events += "t" * (trainer.global_step - self.step)
        self.step = trainer.global_step
        if self.step == self.stops_at_step:
            trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.events += "" if trainer.sanity_checking else "V"

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.events += "v"


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, writes: Writes):
        super().__init__()
        self.writes = writes

    def train_dataloader(self) -> Any:
        self.writes.events += "L"
        return torch.utils.data.DataLoader(torch.ones(TRAINING, 3))

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(VALIDATION, 3))


def record(case: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: value for name, value in case.items() if name != "stops_at_step"}
    writes = Writes(case.get("stops_at_step"))
    quiet = {} if "barebones" in case else {"log_every_n_steps": 1}
    pl.Trainer(callbacks=[writes], **QUIET, **quiet, **arguments).fit(
        Linear(), datamodule=Data(writes)
    )
    return {"arguments": case, "events": writes.events}


def main() -> None:
    warnings.filterwarnings("ignore")
    versions = {"pytorch-lightning": pl.__version__, "torch": torch.__version__}
    arguments = list(inspect.signature(pl.Trainer).parameters)
    recorded = {"versions": versions, "arguments": arguments, "runs": list(map(record, CASES))}
    json.dump(recorded, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
