"""Reads a replay capsule, and believes nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._batch_structure import with_structure
from ._capsule import CAPSULE, suggested_task, why_a_function
from ._checkpoint import CheckpointError, CheckpointMismatch
from ._checkpoint_arrays import named_leaves
from ._checkpoint_manifest import DTYPES, typed, versions
from ._checkpoint_read import load_arrays, read_checkpoint, read_manifest
from ._configuration import FLAGS
from ._precision import Precision
from ._state import TrainState
from ._whereabouts import StepBatches

_MALFORMED = (
    KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError
)  # fmt: skip


class ReplayError(CheckpointError):
    """A capsule's step can't be run again."""


class Capsule:
    """A capsule whose manifest has been verified and makes sense.

    **Raises:** `ReplayError` for a checkpoint that is none, `CheckpointDamaged`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder).absolute()
        self.manifest = read_manifest(self.path)
        if CAPSULE not in self.manifest.metadata:
            raise ReplayError(
                f"`{self.path}` is a checkpoint, and no replay capsule. Capsules are written by "
                "the callback `ReplayCapsule()`, by default into the folder `capsules` of a run."
            )
        try:
            self._read(self.manifest.metadata[CAPSULE])
        except _MALFORMED as error:
            raise ReplayError(
                f"`{self.path}` is no replay capsule that `ReplayCapsule` has written: "
                f"{type(error).__name__}: {error!s:.200}."
            ) from error

    def _read(self, content: dict[str, Any]) -> None:
        self.step = int(content["step"])
        self.steps = [_steps(entry) for entry in content["steps"]]
        self.rows = [_rows(entry) for entry in content["steps"]]
        self.error = f"{content['error']['type']}: {content['error']['message']}"
        self.task = str(content["task"]["name"])
        self.suggested, self.why_a_function = suggested_task(content), why_a_function(content)
        self.hyperparameters = dict(content["hyperparameters"])
        self.precision = _precision(content["precision"])
        self.accumulate = int(content["accumulate_grad_batches"])
        total = content["total_steps"]
        self.total_steps = None if total is None else int(total)
        self._clip = (
            typed(content["gradient_clip_val"], float, int, NoneType),
            typed(content["gradient_clip_algorithm"], str, NoneType),
        )
        self._seed = int(content["seed"])
        self._has_state = bool(content["state"])
        self._checkpoint = typed(content["checkpoint"], str, NoneType)
        self._lost = typed(content["batch"]["lost"], str, NoneType)
        self.reproduced = typed(content["batch"]["reproduced"], bool, NoneType)
        self._structure = content["batch"]["structure"]
        self._devices = int(content["devices"]), str(content["platform"])
        self._flags = {name: content["flags"][name] for name in FLAGS}

    def arguments(self) -> dict[str, Any]:
        """Those of the run's Trainer that change what a step computes."""
        return {
            "precision": self.precision,
            "accumulate_grad_batches": self.accumulate,
            "gradient_clip_val": self._clip[0],
            "gradient_clip_algorithm": self._clip[1],
            "seed": self._seed,
        }

    def differences(self) -> Iterator[str]:
        """What is not here as it was there, and may change what a step computes."""
        devices = len(jax.devices()), jax.default_backend()
        pairs = [(name, self.manifest.versions.get(name), now) for name, now in versions().items()]
        pairs += [(name, then, getattr(jax.config, name)) for name, then in self._flags.items()]
        pairs += [("platform", self._devices[1], devices[1])]
        for name, then, now in pairs:
            if then != now:
                yield f"{name} {now} ({then} there)"

    def batches(self, sample: PyTree = None) -> list[list[PyTree]]:
        """The batches of each step, on the host. `sample` has their structure.

        **Raises:** `ReplayError` where they are lost, or of a structure that nobody knows.
        """
        if self._lost is not None:
            raise ReplayError(
                f"`{self.path}` holds no batch, because {self._lost}. Give `fit` a loader that can "
                "be read again, such as a `DataLoader`."
            )
        arrays = load_arrays(self.path, include=r"^steps/")
        try:
            counts = _counts(arrays)
            if len(counts) != len(self.steps):
                raise ValueError(f"there are those of {len(counts)} steps, not {len(self.steps)}")
            like = sample
            if sample is None:
                like = with_structure(self._structure, 0)
        except _MALFORMED as error:
            raise ReplayError(
                f"The batches of `{self.path}` can't be put together: {error}. Say how with "
                "`--task` and a function that returns `(trainer, task, batch)`, of which any batch "
                "will do."
            ) from error
        steps = [[like] * count for count in counts]
        names = [name for name, _ in named_leaves({"steps": steps})]
        if sorted(names) != sorted(arrays):
            raise ReplayError(
                f"The batches of `{self.path}` have the leaves {sorted(arrays)[:4]}, but the batch "
                f"that the task came with has {sorted(names)[:4]}."
            )
        leaves = [_as_batch(arrays[name], self.manifest.arrays[name].prng) for name in names]
        restored: list[list[PyTree]] = jax.tree.unflatten(jax.tree.structure(steps), leaves)
        return restored

    def state(
        self, like: TrainState, batches: list[list[PyTree]], checkpoint: Any
    ) -> tuple[TrainState, list[str]]:
        """The state before the step, restored strictly, and what has to be said of it.

        The checkpoint that the capsule names may be anywhere: it is only read, and verified as
        every checkpoint is. Which one that is, is said in any case.

        **Raises:** `CheckpointMismatch` for another state than `like`.
        """
        if self._has_state and checkpoint is None:
            return self._strictly({"state": like, "steps": batches})["state"], []
        path = self._checkpoint if checkpoint is None else checkpoint
        if path is None:
            raise ReplayError(
                f"`{self.path}` holds no state: it had been given to the step that failed, and "
                "there was no checkpoint. Name one, if there is, with `--checkpoint PATH`; or let "
                "the run fail again with `Trainer(detect_anomaly=True)`, which keeps the state."
            )
        try:
            state = _part_of_checkpoint(Path(path), like)
        except CheckpointMismatch:
            raise
        except (CheckpointError, OSError, ValueError) as error:  # a null character in the path
            if checkpoint is not None:
                raise
            raise ReplayError(
                f"`{self.path}` says that the state is that of `{path}`, which can't be read: "
                f"{error} If it lies elsewhere now, name it with `--checkpoint PATH`."
            ) from error
        behind = self.step - 1 - int(state.step)
        number = jnp.asarray(self.step - 1, state.step.dtype)
        apart = f", {abs(behind)} steps {'earlier' if behind > 0 else 'later'}" if behind else ""
        return state.replace(step=number), [f"The state is that of `{path}`{apart}."]

    def _strictly(self, like: PyTree) -> PyTree:
        try:
            return read_checkpoint(self.path, like)[0]
        except CheckpointMismatch as error:
            if not self.why_a_function:
                raise
            raise ReplayError(
                f"{error}\nThe task's class alone is not enough here: {self.why_a_function}. Write "
                f"`--task {self.suggested}`, where FUNCTION returns `(trainer, task)` as the run "
                "has them."
            ) from error


def _steps(entry: Any) -> StepBatches | None:
    if entry is None:
        return None
    return StepBatches(*(int(entry[name]) for name in StepBatches._fields))


def _rows(entry: Any) -> list[list[int]] | None:
    """Of each batch of a step, if its rows are known."""
    if entry is None or entry["rows"] is None:
        return None
    rows = [[int(row) for row in batch] for batch in entry["rows"]]
    if len(rows) != int(entry["stop"]) - int(entry["first"]):
        raise ValueError(f"it has the rows of {len(rows)} batches")
    return rows


def _precision(content: dict[str, Any]) -> Precision:
    values: dict[str, Any] = {}
    for name, value in content.items():
        known = value is None or isinstance(value, bool) or value in DTYPES
        if name not in Precision._fields or not known:
            raise ValueError(f"`precision` can't be {content}")
        values[name] = jnp.dtype(value).type if isinstance(value, str) else value
    return Precision(**values)


def _counts(arrays: dict[str, np.ndarray]) -> list[int]:
    """How many batches each step has, by the names of their leaves, `steps/0/1/...`."""
    found: dict[int, set[int]] = {}
    for name in arrays:
        _, step, batch, *_ = name.split("/")
        found.setdefault(int(step), set()).add(int(batch))
    if sorted(found) != list(range(len(found))):
        raise ValueError("a step is missing")
    return [len(found[step]) for step in range(len(found))]


def _as_batch(array: np.ndarray, prng: str | None) -> Any:
    return array if prng is None else jax.random.wrap_key_data(jnp.asarray(array), impl=prng)


def _part_of_checkpoint(path: Path, like: TrainState) -> TrainState:
    """The state of a run's checkpoint, strictly, but for sums of metrics and counts of steps that
    were refused: those have nothing to do with a step."""
    wanted = dict(named_leaves(like))
    apart = {
        name: np.empty(array.shape, array.dtype)
        for name, array in read_manifest(path).arrays.items()
        if name.startswith(("metrics/", "skipped/"))
    }
    tree, _ = read_checkpoint(path, wanted | apart)
    state: TrainState = jax.tree.unflatten(jax.tree.structure(like), [tree[n] for n in wanted])
    return state
