"""The pretraining job: from encoded text to a trained model, a table and filled-in masks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

from jaxlightning import Trainer
from jaxlightning._checkpoint import RunLocked
from jaxlightning._flops import device_peak, matmul_peak
from jaxlightning.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    LearningRateSchedule,
    ModelCheckpoint,
    ThroughputMonitor,
)
from jaxlightning.loggers import CSVLogger, TensorBoardLogger

from ._data import UnigramBaseline
from ._fill_mask import fill_mask
from ._options import PretrainOptions
from ._stages import Prepared, begin_run, write_json
from ._tasks import AlbertForMaskedLM

SENTENCES = (
    "the quick [MASK] fox jumps over the [MASK] dog.",
    "returns a new [MASK] with the same shape as the input.",
    "if the [MASK] does not exist, an error is [MASK].",
    "this function is [MASK] by default.",
    "the number of [MASK] in the list.",
)


def pretrain(prepared: Prepared) -> int:
    """Trains, or goes on, or says that the run is done; then reports.

    Ctrl-C saves the state of the step it comes in, and the process ends with status 130.

    **Returns:** the exit status.
    """
    options, folder = prepared.options, prepared.folder
    result = _finished(folder, options.steps)
    if result is None:
        result = _trained(prepared)
        write_json(folder / "result.json", result)
    else:
        print(
            f"This run is done: {result['steps']:,} steps. To go on, raise `--steps`; to begin "
            f"anew, choose another `--out` or delete `{folder}`."
        )
    print(report(result))
    return 0


def _finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """What the run came to, if there is nothing left to train."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    done = result["steps"] >= steps or result["stopped"] is not None
    return result if done else None
