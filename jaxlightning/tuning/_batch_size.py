"""The largest batch that fits: by what compiled programs say they need, not by running out."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._plan import PlannedBatches, abstract_task, compiled_step, peak_bytes, planned_run
from .._say import say
from ..data import DataLoader

if TYPE_CHECKING:
    from .._trainer import Trainer


def batch_size(
    trainer: Trainer,
    task: Any,
    batch: PyTree,
    *,
    memory_bytes: int | None = None,
    share: float = 0.9,
    most: int = 2**16,
    check: bool = True,
) -> int:
    """The largest number of rows in a global batch with which a training step fits the memory.

        rows = tuning.batch_size(trainer, task, example)
        trainer.fit(task, DataLoader(data, rows, shuffle=True))

    A step is compiled for batches of several sizes, in a binary search, and asked what it needs
    on a device: arguments, temporaries, and results that are not written into arguments, with
    sharding, rematerialisation and micro-batches as the trainer has them. No step is executed,
    so nothing runs out of memory; but for one, with rows of zeros and of the size that was found,
    to see that the machine at hand agrees.

    **Arguments:**

    - `batch`: a batch of any size, of the shapes that the data has, or an abstract one.
    - `memory_bytes`: of each device; by default what the device says that it has, on CPU what
      the machine has to spare, shared by its devices.
    - `share`: how much of it may be used: other programs, and fragments of memory, take some.
    - `most`: rows that are not exceeded.
    - `check`: whether to execute that one step.

    **Returns:** a multiple of the number of shards of a batch.

    **Raises:** `ValueError` where one row on each shard does not fit.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share={share}` has to be more than 0 and at most 1.")
    limit = int((_memory(trainer) if memory_bytes is None else memory_bytes) * share)
    like = PlannedBatches(batch)
    placement = trainer._placement_for(abstract_task(task))
    shards = placement.shards
    if most < shards:
        raise ValueError(f"`most={most}` has to be at least {shards}: a row for each shard.")

    @functools.cache
    def needed(parts: int) -> int:
        run = planned_run(
            trainer, task, PlannedBatches(_of_rows(like.spec, parts * shards)), placement
        )
        return peak_bytes(compiled_step(run))

    least = needed(1)
    if least > limit:
        raise ValueError(
            f"A step on batches of {shards} rows, one on each shard, needs {least:,} bytes of a "
            f"device, and {limit:,} may be used. Shard the model over more devices "
            '(`strategy="fsdp"`), or rematerialise its activations (`jax.checkpoint`).'
        )
    fits, fails = 1, most // shards + 1
    while fits * 2 < fails:  # upwards first: large programs are not compiled in vain
        if needed(fits * 2) > limit:
            fails = fits * 2
            break
        fits *= 2
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if needed(middle) <= limit:
            fits = middle
        else:
            fails = middle
    rows = fits * shards
    if check:
        _run_once(trainer, task, _of_rows(like.spec, rows))
    say(f"Batches of {rows} rows need {needed(fits):,} of {limit:,} bytes a device.")
    return rows


def _of_rows(spec: PyTree, rows: int) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), spec)


def _memory(trainer: Trainer) -> int:
    """Bytes of a device that nothing uses yet."""
    device = trainer.mesh.local_devices[0]
    stats: Any = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // len(trainer.mesh.local_devices)


def _run_once(trainer: Trainer, task: Any, batch: PyTree) -> None:
    """A step on rows of zeros, in a trainer of its own: what it raises, passes."""
    given = {
        name: getattr(trainer._arguments, name)
        for name in ("precision", "strategy", "mesh", "devices", "accumulate_grad_batches", "seed")
    }
    once = type(trainer)(**given, max_steps=1, barebones=True)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    once.fit(task, DataLoader(zeros, rows))
