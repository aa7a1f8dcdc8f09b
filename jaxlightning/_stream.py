"""Metrics on their way from the device to the host, one log interval late.

The compiled step sums metrics into the state. Where an interval ends, the loop takes these sums
out of the state; they are read when the *next* interval ends, so nobody waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import numpy as np

from ._classification import Perplexity
from ._metrics import Mean, Metric, TotalLoss
from ._say import warn

Sums = dict[str, Metric]
Numbers = dict[str, Any]
"""Floats by name; arrays where a metric computes one."""


def start_reading(sums: Sums) -> None:
    """Starts the copy to the host, without waiting for it."""
    for leaf in jax.tree.leaves(sums):
        leaf.copy_to_host_async()


def read(pieces: Sequence[Sums]) -> list[Sums]:
    """The one place where metrics are read: waits for the device. Floats become float64, so that
    merging many intervals loses nothing."""

    def widened(leaf: Any) -> Any:
        array = np.asarray(leaf)
        floating = np.issubdtype(array.dtype, np.floating) or array.dtype.kind == "V"
        return array.astype(np.float64) if floating else array

    return jax.tree.map(widened, jax.device_get(list(pieces)))


def merged(pieces: Sequence[Sums]) -> Sums:
    """Several parts as one; nothing of nothing."""
    if not pieces:
        return {}
    return {name: reduce(lambda a, b: a.merge(b), [p[name] for p in pieces]) for name in pieces[0]}


def computed(sums: Sums, prefix: str, suffix: str = "") -> Numbers:
    """What the metrics come to, under the names they are logged by.

    A loss over nothing, such as an interval of refused steps, is NaN here: whoever monitors it
    would take the 0 of `Mean.compute` for the best there ever was.
    """

    def number(metric: Metric) -> Any:
        array = np.asarray(metric.compute())
        if array.ndim:
            return array
        return math.nan if _is_void(metric) else float(array)

    return {f"{prefix}{name}{suffix}": number(sums[name]) for name in sums}


def _is_void(metric: Metric) -> bool:
    means = metric.terms.values() if isinstance(metric, TotalLoss) else [metric]
    return all(isinstance(mean, Mean | Perplexity) and mean.weight == 0 for mean in means)


class MetricStream:
    """Delivers each interval's metrics when the next one ends, or when asked to `flush`.

    **Arguments:**

    - `take`: takes the sums of the open interval out of the state.
    - `log_every`: the steps of an interval. Intervals follow the global step.
    - `deliver`: called with the numbers of an interval and the step at which it ended.
    """

    def __init__(
        self,
        take: Callable[[], Sums],
        log_every: int,
        deliver: Callable[[Numbers, int], None],
    ):
        self._take = take
        self._log_every = log_every
        self._deliver = deliver
        self._boundary = 0
        self._open: list[Sums] = []
        self._ended: tuple[int, list[Sums]] | None = None
        self._epoch: Sums = {}
        self._warned = False

    def after_step(self, step: int) -> None:
        """Where an interval ends with this step: starts reading it, delivers the one before."""
        if step % self._log_every or step == self._boundary:
            return
        self.flush()  # first, as it may raise: then this boundary is still to come
        self._boundary = step
        self._take_piece()
        self._ended = (step, self._open)
        self._open = []

    def _take_piece(self) -> None:
        piece = self._take()
        start_reading(piece)
        self._open.append(piece)

    def flush(self) -> None:
        """Delivers what is complete. Waits for the device."""
        if self._ended is not None:
            step, pieces = self._ended
            sums = self._settle(pieces)
            self._ended = None
            self._deliver(computed(sums, "train/"), step)

    def end_epoch(self, step: int, keep: bool = False) -> Numbers:
        """The epoch's aggregates. Waits for the device. A part of an interval that lies in this
        epoch is kept for the interval's own record; with `keep` the epoch goes on."""
        self.flush()
        if step != self._boundary:
            self._take_piece()
        self._open = [self._settle(self._open)] if self._open else []
        epoch = self._epoch
        if not keep:
            self._epoch = {}
        return computed(epoch, "train/", "_epoch")

    def _settle(self, pieces: list[Sums]) -> Sums:
        """Reads pieces, counts those that are new into the epoch, and merges them."""
        new = [piece for piece in pieces if _on_device(piece)]
        fresh = read(new)
        self._watch(fresh)
        self._epoch = merged([self._epoch, *fresh] if self._epoch else fresh)
        held = [piece for piece in pieces if not _on_device(piece)]
        return merged([*held, *fresh])

    def _watch(self, fresh: list[Sums]) -> None:
        """Warns, once, of a loss that is not finite, which one over nothing is not here."""
        if self._warned:
            return
        losses = [np.asarray(sums["loss"].compute()) for sums in fresh if "loss" in sums]
        bad = [loss for loss in losses if not np.isfinite(loss).all()]
        if bad:
            self._warned = True
            warn(
                f"The training loss is {bad[0]}. `Trainer(detect_anomaly=True)` says in which "
                "operation NaN appears; the callback `SkipNonFinite()` refuses such steps, and "
                "`ReplayCapsule()` keeps one for `jaxlightning replay`."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that is not yet delivered, as JSON values. Waits for the device."""
        ended = None
        if self._ended is not None:
            step, pieces = self._ended
            pieces = [self._settle(pieces)]
            self._ended = (step, pieces)
            ended = {"step": step, "sums": _to_json(pieces[0])}
        if self._open:
            self._open = [self._settle(self._open)]
        return {
            "boundary": self._boundary,
            "ended": ended,
            "open": _to_json(self._open[0]) if self._open else None,
            "epoch": _to_json(self._epoch) if self._epoch else None,
        }

    def load_state_dict(self, state: dict[str, Any], like: Sums) -> None:
        """`like`: metrics of the right structure."""
        self._boundary = state["boundary"]
        ended, open_, epoch = state["ended"], state["open"], state["epoch"]
        self._ended = None
        if ended is not None:
            self._ended = (ended["step"], [_from_json(ended["sums"], like)])
        self._open = [] if open_ is None else [_from_json(open_, like)]
        self._epoch = {} if epoch is None else _from_json(epoch, like)


class NoStream(MetricStream):
    """In place of a stream where nothing is collected (`barebones=True`)."""

    def __init__(self) -> None:
        super().__init__(dict, 1, lambda numbers, step: None)

    def after_step(self, step: int) -> None: ...
    def end_epoch(self, step: int, keep: bool = False) -> Numbers:
        return {}


def _on_device(sums: Sums) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(sums))


def _to_json(sums: Sums) -> list[dict[str, Any]]:
    def one(leaf: np.ndarray | np.generic) -> dict[str, Any]:
        array = np.asarray(leaf)
        exact = [x.hex() if isinstance(x, float) else x for x in array.ravel().tolist()]
        return {"dtype": array.dtype.name, "shape": list(array.shape), "values": exact}

    return [one(leaf) for leaf in jax.tree.leaves(sums)]


def _from_json(leaves: list[dict[str, Any]], like: Sums) -> Sums:
    def one(leaf: dict[str, Any]) -> np.ndarray:
        values = [float.fromhex(x) if isinstance(x, str) else x for x in leaf["values"]]
        return np.asarray(values, leaf["dtype"]).reshape(leaf["shape"])

    return jax.tree.unflatten(jax.tree.structure(like), list(map(one, leaves)))
