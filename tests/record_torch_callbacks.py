"""Records what callbacks of PyTorch Lightning and schedulers of PyTorch decide.

The suite does not run this: it holds our own decisions against the recording. To record again, in
an environment with `pytorch-lightning`:

    python tests/record_torch_callbacks.py > tests/torch_callbacks.json
"""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import torch
from pytorch_lightning.callbacks import EarlyStopping

STOPPING: list[dict[str, Any]] = [
    {},
    {"patience": 1},
    {"patience": 0},
    {"mode": "max"},
    {"min_delta": 0.1, "patience": 2},
    {"min_delta": 0.1, "patience": 2, "mode": "max"},
    {"stopping_threshold": 0.15, "patience": 10},
    {"stopping_threshold": 0.9, "mode": "max", "patience": 10},
    {"divergence_threshold": 0.95, "patience": 10},
    {"divergence_threshold": 0.1, "mode": "max", "patience": 10},
    {"check_finite": False, "patience": 2},
]
PLATEAU: list[dict[str, Any]] = [
    {"patience": 2},
    {"patience": 0, "factor": 0.5},
    {"patience": 1, "cooldown": 2, "factor": 0.5},
    {"patience": 1, "mode": "max", "threshold": 0.1},
    {"patience": 1, "threshold": 0.05, "threshold_mode": "abs"},
    {"patience": 1, "threshold": 0.05, "threshold_mode": "abs", "mode": "max"},
    {"patience": 0, "factor": 0.3, "min_lr": 0.05},
]
ONE_CYCLE: list[dict[str, Any]] = [
    {"total_steps": 50},
    {"total_steps": 40, "pct_start": 0.25, "div_factor": 10.0, "final_div_factor": 100.0},
]


def stopping(arguments: dict[str, Any], values: list[float]) -> list[Any]:
    """For each value until the stop: the count of checks without improvement, and the stop."""
    callback = EarlyStopping("loss", **arguments)
    decisions = []
    for value in values:
        metrics = {"loss": torch.tensor(value, dtype=torch.float64)}
        strategy = SimpleNamespace(reduce_boolean_decision=lambda stop, all: stop)
        trainer = SimpleNamespace(
            callback_metrics=metrics,
            should_stop=False,
            current_epoch=0,
            fast_dev_run=False,
            strategy=strategy,
            world_size=1,
        )
        callback._run_early_stopping_check(trainer)
        decisions.append([callback.wait_count, trainer.should_stop])
        if trainer.should_stop:
            break
    return decisions


def plateau(arguments: dict[str, Any], values: list[float]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **arguments)
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def one_cycle(arguments: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, **arguments)
    rates = []
    for _ in range(arguments["total_steps"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < arguments["total_steps"]:
            scheduler.step()
    return rates


def main() -> None:
    draw = random.Random(0)
    series = [[round(draw.random(), 2) for _ in range(20)] for _ in range(2)]
    series += [[1.0, 0.9, float("nan"), 0.95, float("inf"), 0.97, 0.5, 0.4]]
    series += [[1.0, 0.5, 0.25, 0.125] + [0.1] * 9]
    finite = [s for s in series if all(abs(v) < 10 for v in s)]
    found = {
        "stopping": [
            {"arguments": a, "values": s, "decisions": stopping(a, s)}
            for a in STOPPING
            for s in series
        ],
        "plateau": [
            {"arguments": a, "values": s, "rates": plateau(a, s)} for a in PLATEAU for s in finite
        ],
        "one_cycle": [{"arguments": a, "rates": one_cycle(a)} for a in ONE_CYCLE],
    }
    text = json.dumps(found).replace('{"arguments"', '\n{"arguments"')
    print(text)


if __name__ == "__main__":
    main()
