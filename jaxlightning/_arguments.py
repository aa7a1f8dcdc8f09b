"""The Trainer's arguments: checked together, once, and brought into the form the loop uses."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ._callback import Callback
from ._nearest import nearest
from ._precision import Precision
from .parallel import spec_axes, strategy_rules

LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")


OPTIONAL = (
    "max_epochs", "min_epochs", "min_steps", "check_val_every_n_epoch", "num_sanity_val_steps",
    "log_every_n_steps", "enable_checkpointing", "enable_progress_bar", "enable_model_summary",
)  # fmt: skip


@dataclasses.dataclass
class Arguments:
    """The arguments of `Trainer`, under the same names. `None` stands for the default."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: str | datetime.timedelta | dict[str, int] | None
    limit_train_batches: int | float
    limit_val_batches: int | float
    limit_test_batches: int | float
    limit_predict_batches: int | float
    val_check_interval: int | float
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | None
    log_every_n_steps: int | None
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    precision: str | Precision
    devices: int | str | Sequence[jax.Device | int]
    strategy: str | Sequence[Any]
    mesh: Mapping[str, int] | Mesh | None
    deterministic: bool
    fast_dev_run: bool | int
    overfit_batches: int | float
    detect_anomaly: bool
    profiler: Any
    barebones: bool
    callbacks: Callback | Sequence[Callback] | None
    logger: Any
    default_root_dir: str | os.PathLike[str] | None
    enable_checkpointing: bool | None
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    reload_dataloaders_every_n_epochs: int
    steps_per_dispatch: int
    on_recompile: str
    seed: int

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_switches()
        self._check_limits()
        self._check_combinations()
        Precision.named(self.precision)
        self._check_devices()
        if self.barebones:
            self._become_bare()
        if self.fast_dev_run:
            self._become_fast_dev_run(int(self.fast_dev_run))
        if self.max_epochs is None:
            self.max_epochs = 1000 if self.max_steps == -1 and self.max_time is None else -1
        if self.num_sanity_val_steps is None:
            self.num_sanity_val_steps = 2
        if self.log_every_n_steps is None:
            self.log_every_n_steps = 50
        for name in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
            if getattr(self, name) is None:
                setattr(self, name, True)

    def _check_counts(self) -> None:
        least = {
            "max_epochs": -1,
            "max_steps": -1,
            "min_epochs": 0,
            "min_steps": 0,
            "check_val_every_n_epoch": 1,
            "num_sanity_val_steps": -1,
            "log_every_n_steps": 1,
            "accumulate_grad_batches": 1,
            "reload_dataloaders_every_n_epochs": 0,
            "steps_per_dispatch": 1,
            "seed": 0,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                means = " (-1 means no limit)" if name in ("max_epochs", "max_steps") else ""
                raise ValueError(
                    f"`{name}={value!r}` has to be an integer of at least {smallest}{means}."
                )
        if self.seed >= 2**32:
            raise ValueError(
                f"`seed={self.seed}` has to be below 2**32: of larger ones JAX keeps 32 bits, so "
                "that different seeds would give the same run."
            )

    def _check_switches(self) -> None:
        switches = ("deterministic", "detect_anomaly", "barebones", *OPTIONAL[-3:])
        for name in switches:
            value = getattr(self, name)
            if not (isinstance(value, bool) or (value is None and name in OPTIONAL)):
                raise ValueError(f"`{name}={value!r}` has to be `True` or `False`.")
        if not isinstance(self.fast_dev_run, int) or self.fast_dev_run < 0:
            raise ValueError(
                f"`fast_dev_run={self.fast_dev_run!r}` has to be `True`, `False`, or a number of "
                "batches."
            )

        if not isinstance(self.default_root_dir, str | os.PathLike | None):
            raise TypeError(
                f"`default_root_dir={self.default_root_dir!r}` has to be the path of a folder."
            )

    def _check_limits(self) -> None:
        for name in (*LIMITS, "overfit_batches", "val_check_interval"):
            value = getattr(self, name)
            fraction = isinstance(value, float)
            fine = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            if not fine or (fraction and value > 1.0):
                raise ValueError(
                    f"`{name}={value!r}` has to be a number of batches (an integer) or a fraction "
                    "of them (a float from 0.0 to 1.0)."
                )
        if self.val_check_interval == 0:
            raise ValueError(
                "`val_check_interval=0` would never validate. To switch validation off, write "
                "`limit_val_batches=0`."
            )
        for name in ("limit_train_batches", "limit_val_batches"):
            if self.overfit_batches and getattr(self, name) != 1.0:
                raise ValueError(
                    f"`overfit_batches={self.overfit_batches}` and `{name}={getattr(self, name)}` "
                    "contradict each other: both say which batches are used. Write one of them."
                )

    def _check_devices(self) -> None:
        rules = strategy_rules(self.strategy)
        if isinstance(self.mesh, Mesh) and self.devices != "auto":
            raise ValueError(
                f"`mesh` is a `Mesh`, which has its devices, so `devices={self.devices!r}` "
                "contradicts it. Write one of them."
            )
        if self.strategy in ("fsdp", "tensor"):
            if self.mesh is None:
                self.mesh = {self.strategy: -1}
            if self.strategy not in self._axes:
                raise ValueError(
                    f'`strategy="{self.strategy}"` shards over the axis "{self.strategy}", which '
                    f"`mesh={self.mesh}` does not have. Write "
                    f'`mesh={{"{self.strategy}": -1}}`, or leave `mesh` out.'
                )
        for pattern, spec in rules:
            for axis in () if callable(spec) else spec_axes(spec):
                if axis not in self._axes:
                    raise ValueError(
                        f'`strategy` shards `{pattern}` over the axis "{axis}", which the mesh '
                        f'does not have; its axes are {self._axes}. Write `mesh={{"{axis}": -1}}`.'
                    )

    @property
    def _axes(self) -> list[str]:
        shape = self.mesh.axis_names if isinstance(self.mesh, Mesh) else self.mesh or ("data",)
        return list(shape) if isinstance(shape, Mapping | Sequence) else ["data"]

    def _check_combinations(self) -> None:
        def together(condition: bool, message: str) -> None:
            if condition:
                raise ValueError(message)

        together(
            self.max_steps > -1 and (self.min_steps or 0) > self.max_steps,
            f"`min_steps={self.min_steps}` is more than `max_steps={self.max_steps}`.",
        )
        together(
            self.max_epochs not in (None, -1) and (self.min_epochs or 0) > (self.max_epochs or 0),
            f"`min_epochs={self.min_epochs}` is more than `max_epochs={self.max_epochs}`.",
        )
        together(
            self.steps_per_dispatch > 1 and self.accumulate_grad_batches > 1,
            f"`steps_per_dispatch={self.steps_per_dispatch}` makes one program of several steps, "
            f"`accumulate_grad_batches={self.accumulate_grad_batches}` one step of several "
            "batches; only one of them can be more than 1.",
        )
        together(
            self.steps_per_dispatch > 1 and self.detect_anomaly,
            "`detect_anomaly=True` looks at the state after every step, which blocks of "
            f"`steps_per_dispatch={self.steps_per_dispatch}` steps do not have. Write "
            "`steps_per_dispatch=1`.",
        )
        together(
            self.detect_anomaly and Precision.named(self.precision).scale_loss,
            "`detect_anomaly=True` looks for NaN, which a scaled loss overflows to now and then. "
            'Look for it with `precision="32-true"`.',
        )
        together(
            self.gradient_clip_val is None and self.gradient_clip_algorithm is not None,
            f"`gradient_clip_algorithm={self.gradient_clip_algorithm!r}` clips nothing without "
            "`gradient_clip_val`. Write `gradient_clip_val=1.0`.",
        )
        together(
            self.gradient_clip_val is not None and not _is_positive(self.gradient_clip_val),
            f"`gradient_clip_val={self.gradient_clip_val!r}` has to be a positive number. To "
            "switch clipping off, write `gradient_clip_val=None`.",
        )
        together(
            self.gradient_clip_algorithm not in (None, "norm", "value"),
            f'`gradient_clip_algorithm={self.gradient_clip_algorithm!r}` is unknown; it is "norm" '
            'or "value".',
        )
        together(
            self.check_val_every_n_epoch is None and not isinstance(self.val_check_interval, int),
            "`check_val_every_n_epoch=None` counts batches across epochs, so `val_check_interval` "
            f"has to be a number of batches, not the fraction {self.val_check_interval}.",
        )
        together(
            self.on_recompile not in ("warn", "raise", "ignore"),
            f'`on_recompile={self.on_recompile!r}` is unknown; it is "warn", "raise" or "ignore".'
            + nearest(str(self.on_recompile), ("warn", "raise", "ignore")),
        )

    def _become_fast_dev_run(self, batches: int) -> None:
        """Lightning's meaning: a few batches of everything, and nothing is left behind."""
        for name in LIMITS:
            setattr(self, name, batches)
        self.max_steps, self.max_epochs, self.num_sanity_val_steps = batches, 1, 0
        self.val_check_interval, self.check_val_every_n_epoch = 1.0, 1
        self.log_every_n_steps = 1
        self.logger = self.enable_checkpointing = False

    def _become_bare(self) -> None:
        """Lightning's meaning: nothing that costs time, and an error for asking for it."""
        asked = {
            "logger": self.logger not in (None, False),
            "enable_checkpointing": bool(self.enable_checkpointing),
            "enable_progress_bar": bool(self.enable_progress_bar),
            "enable_model_summary": bool(self.enable_model_summary),
            "log_every_n_steps": bool(self.log_every_n_steps),
            "num_sanity_val_steps": bool(self.num_sanity_val_steps),
            "fast_dev_run": bool(self.fast_dev_run),
            "detect_anomaly": self.detect_anomaly,
            "profiler": self.profiler is not None,
        }
        for name, is_asked in asked.items():
            if is_asked:
                raise ValueError(
                    f"`barebones=True` leaves out all that costs time, so `{name}="
                    f"{getattr(self, name)!r}` contradicts it. Write one of them."
                )
        self.logger = self.enable_checkpointing = False
        self.enable_progress_bar = self.enable_model_summary = False
        self.num_sanity_val_steps = 0

    @property
    def steps_limit(self) -> int | None:
        return None if self.max_steps == -1 else self.max_steps

    @property
    def epochs_limit(self) -> int | None:
        return None if self.max_epochs == -1 else self.max_epochs


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


ELSEWHERE = {
    "accelerator": "JAX picks its platform itself: set the variable `JAX_PLATFORMS`",
    "gpus": "write `devices=`",
    "num_nodes": "processes are those of `jax.distributed`",
    "benchmark": "XLA tunes its kernels itself",
    "inference_mode": "evaluation never computes gradients",
    "use_distributed_sampler": "a `DataLoader` gives global batches, split over the devices",
    "model_registry": "`ModelCheckpoint` says where checkpoints go",
    "enable_autolog_hparams": "`TaskModule.hyperparameters` says what is logged",
    "sync_batchnorm": "statistics are those of the global batch already",
    "plugins": "there are none",
}
"""What takes the place of arguments that Lightning's Trainer has and ours has not."""
