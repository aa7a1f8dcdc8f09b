"""What a run would need on devices that need not be there: memory, work, talk and time.

The training step is compiled for as many virtual CPU devices as the mesh has. Its shapes, shardings
and collectives are those it would have elsewhere; its temporaries are those of a CPU, on which
half precision is computed in float32 and attention is not fused: an estimate, and mostly too high.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._flops import analyse_flops
from ._hardware import HARDWARE, Hardware, hardware
from ._setup import bus_for, make_run
from .data._loader import abstract, check_leading_axes
from .parallel import Placement, make_mesh
from .parallel._collectives import Collective, collectives

if TYPE_CHECKING:
    from ._fit import FitRun
    from ._trainer import Trainer


MOST_DEVICES = 2048
"""XLA's client for CPUs takes more to be those of other processes."""


class Talk(NamedTuple):
    """All collectives of a kind in a step."""

    kind: str
    times: int
    bytes: int
    """Of their results, on a device."""
    seconds: float | None
    """What they would take alone; `None` without a device to ask of."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step, in numbers. `str()` gives a table, `as_dict()` what JSON can hold.

    Bytes are those of one device, counts and FLOPs those of one optimizer step.
    """

    mesh: dict[str, int]
    device: str | None
    rows: int
    """Examples of a step, over all devices and micro-batches."""
    precision: str
    parameters: int
    optimizer: int
    rest: int
    """The rest of the state: buffers, keys, sums of metrics."""
    batch: int
    temporaries: int
    """Activations, gradients, gathered parameters: an estimate, see `estimated`."""
    peak: int
    """Arguments, temporaries, and results that are not written into arguments."""
    memory: int | None
    """What the device has."""
    flops: int
    """Over all devices; matrix products only, and scans with their lengths."""
    recomputed: int
    """Of these, what `jax.checkpoint` computes again."""
    talk: tuple[Talk, ...]
    replicated: tuple[tuple[str, int], ...]
    """The largest leaves that are whole on every device, and their bytes."""
    compute_s: float | None
    memory_s: float | None
    talk_s: float | None
    estimated: tuple[str, ...]
    """What a compilation for CPUs can't know: sentences."""
    advice: tuple[str, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device's memory; `None` without a device."""
        return None if self.memory is None else self.peak <= self.memory

    @property
    def step_s(self) -> float | None:
        """Seconds of a step by the roofline (Williams et al. 2009): the longer one of computing
        and moving data, then talking, which is not overlapped."""
        if self.compute_s is None or self.memory_s is None or self.talk_s is None:
            return None
        return max(self.compute_s, self.memory_s) + self.talk_s

    @property
    def overlapped_s(self) -> float | None:
        """The same where all of it overlaps: nothing is faster."""
        if self.compute_s is None or self.memory_s is None or self.talk_s is None:
            return None
        return max(self.compute_s, self.memory_s, self.talk_s)

    @property
    def mfu(self) -> float | None:
        """The share of the peak that the model's own FLOPs reach in `step_s`."""
        if self.step_s is None or self.compute_s is None:
            return None
        return self.compute_s * (1 - self.recomputed / max(self.flops, 1)) / self.step_s

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        found = dataclasses.asdict(self)
        found["talk"] = [talk._asdict() for talk in self.talk]
        found["replicated"] = dict(self.replicated)
        found |= {"devices": self.devices, "fits": self.fits, "mfu": self.mfu}
        return found | {"step_s": self.step_s, "overlapped_s": self.overlapped_s}

    def to_json(self) -> str:
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        lines = [
            f"{self.devices:,} devices{f' ({self.device})' if self.device else ''}, mesh "
            f"{self.mesh}, {self.rows:,} examples a step, {self.precision}",
            "",
            "bytes a device",
        ]
        parts = {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "rest of the state": self.rest,
            "batch": self.batch,
            "temporaries": self.temporaries,
            "peak": self.peak,
        }
        mark = {"temporaries": "  (estimate)", "peak": "  (estimate)"} if self.estimated else {}
        lines += [f"  {k:<20}{_binary(v):>12}{mark.get(k, '')}" for k, v in parts.items()]
        if self.memory is not None:
            verdict = "fits" if self.fits else "DOES NOT FIT"
            lines.append(f"  {'memory':<20}{_binary(self.memory):>12}  {verdict}")
        lines += ["", "a step", f"  {'FLOPs':<20}{self.flops:>12.4g}"]
        for talk in self.talk:
            took = "" if talk.seconds is None else f"  {talk.seconds * 1e3:.3g} ms"
            lines.append(f"  {talk.kind:<20}{_binary(talk.bytes):>12}  in {talk.times:,}{took}")
        if self.step_s is not None:
            for name, seconds in (
                ("computing", self.compute_s),
                ("moving data", self.memory_s),
                ("talking", self.talk_s),
                ("estimated step", self.step_s),
                ("if all overlaps", self.overlapped_s),
            ):
                lines.append(f"  {name:<20}{(seconds or 0) * 1e3:>9.3g} ms")
            lines.append(f"  {'MFU':<20}{self.mfu or 0:>12.1%}")
        if self.replicated:
            lines += ["", "largest leaves that are whole on every device"]
            lines += [f"  {path:<60}{_binary(size):>12}" for path, size in self.replicated]
        for title, sentences in (("estimated", self.estimated), ("what would help", self.advice)):
            if sentences:
                lines += ["", title, *(f"  {sentence}" for sentence in sentences)]
        return "\n".join(lines)


def plan(
    trainer: Trainer,
    task: Any,
    batch: PyTree,
    mesh: Mapping[str, int] | None,
    device: str | Hardware | None,
) -> Plan:
    """As `Trainer.plan`, which documents it."""
    known = hardware(device) if isinstance(device, str) else device
    shape = dict(trainer.mesh.shape) if mesh is None else dict(mesh)
    for axis, size in shape.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"`plan` got the size {size!r} for the axis `{axis}` of its mesh. Write all sizes, "
                "as positive integers: there are no devices that could tell what -1 is."
            )
    count = math.prod(shape.values())
    if count > MOST_DEVICES:
        raise ValueError(
            f"The mesh {shape} has {count:,} devices, and {MOST_DEVICES:,} is the most that can be "
            "planned. What each device holds and computes does not depend on `data`, as long as "
            "it has as many rows: divide `data` and the rows of the batch by the same number."
        )
    placement = trainer._placement_for(
        abstract_task(task), make_mesh(virtual_devices(count), shape)
    )
    feed = PlannedBatches(batch)
    if feed.rows % placement.shards:
        raise ValueError(
            f"The batch of {feed.rows} rows can't be split into {placement.shards} equal parts, "
            f"over the mesh {shape}. Pass a global batch of "
            f"{-(-feed.rows // placement.shards) * placement.shards} rows, which may be abstract: "
            "`jax.ShapeDtypeStruct((rows, ...), dtype)`."
        )
    run = planned_run(trainer, task, feed, placement)
    compiled = compiled_step(run)
    return _described(trainer, run, compiled, feed, known, device)


@functools.lru_cache(maxsize=4)
def virtual_devices(count: int) -> list[jax.Device]:
    """So many CPU devices, which nothing is run on, beside those that JAX has."""
    from jaxlib import xla_client

    client: Any = xla_client.make_cpu_client(num_devices=count)
    devices: list[jax.Device] = client.devices()
    return devices


class PlannedBatches:
    """Stands for a `Feed` that gives batches like one, of which only the shapes matter."""

    counted, length, wait_s = True, None, 0.0

    def __init__(self, batch: PyTree):
        check_leading_axes(batch, "The batch for `plan`", scalars=False)
        self.spec = jax.tree.map(
            lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else abstract(x), batch
        )
        self.structure: Any = jax.tree.structure(self.spec)
        self.shapes = [self.spec]
        self.rows = jax.tree.leaves(self.spec)[0].shape[0]

    @property
    def bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.spec))


def abstract_task(task: Any) -> Any:
    """A task, or the one that a function makes, with abstract arrays."""
    from ._init import TaskSource

    return TaskSource(task).task


def planned_run(trainer: Trainer, task: Any, feed: Any, placement: Placement) -> FitRun:
    """A run of `task` that is only looked at."""
    from ._init import TaskSource

    source = TaskSource(task)
    before = trainer._bus
    trainer._bus = bus_for(trainer, source.task)
    try:
        return make_run(trainer, source, task, feed, placement)
    finally:
        trainer._bus = before


def compiled_step(run: FitRun) -> jax.stages.Compiled:
    """The program of its usual step."""
    return run.program.lower(*run.usual_arguments()).compile()


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program needs on a device: arguments, temporaries, and what of its results is not
    written into arguments."""
    found: Any = compiled.memory_analysis()
    return int(
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def _described(
    trainer: Trainer,
    run: FitRun,
    compiled: jax.stages.Compiled,
    feed: PlannedBatches,
    known: Hardware | None,
    device: str | Hardware | None,
) -> Plan:
    placement = run.placement
    held: dict[str, int] = defaultdict(int)
    replicated = []
    for path, leaf, sharding in zip(run.paths, run.like, run.shardings, strict=True):
        data = leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, leaf)
        size = data.size * data.dtype.itemsize
        share = math.prod(sharding.shard_shape(leaf.shape)) / max(leaf.size, 1)
        field = path.split("/", 1)[0]
        is_parameter = field == "task" and jnp.issubdtype(leaf.dtype, jnp.inexact)
        kind = "parameters" if is_parameter else field if field == "opt_state" else "rest"
        held[kind] += round(size * share)
        if share == 1 and size >= 2**10:
            replicated.append((path, size))
    replicated.sort(key=lambda pair: -pair[1])
    memory: Any = compiled.memory_analysis()
    jaxpr = jax.make_jaxpr(run._traced_step)(*run.usual_arguments())
    flops = analyse_flops(jaxpr)
    precision = trainer.precision
    found = _as_gathered(collectives(compiled), precision.compute)
    compute = compute_s = memory_s = talk_s = None
    if known is not None:
        compute = known.peak(precision.compute)
        compute_s = flops.total / placement.mesh.size / compute
        # Each byte at least once: what is kept, and temporaries written and read.
        traffic = memory.argument_size_in_bytes + memory.output_size_in_bytes
        memory_s = (traffic + 2 * memory.temp_size_in_bytes) / known.bandwidth
        talk_s = sum(_seconds(c, known) for c in found)
    accumulate = trainer._arguments.accumulate_grad_batches
    made = Plan(
        mesh=dict(placement.mesh.shape),
        device=_name(device),
        rows=feed.rows * accumulate,
        precision=_precision_name(trainer),
        parameters=held["parameters"],
        optimizer=held["opt_state"],
        rest=held["rest"],
        batch=feed.bytes * accumulate // placement.shards,
        temporaries=int(memory.temp_size_in_bytes),
        peak=peak_bytes(compiled),
        memory=None if known is None else int(known.memory),
        flops=flops.total,
        recomputed=flops.recomputed,
        talk=_by_kind(found, known),
        replicated=tuple(replicated[:5]) if placement.mesh.size > 1 else (),
        compute_s=compute_s,
        memory_s=memory_s,
        talk_s=talk_s,
        estimated=_estimated(precision, known),
        advice=(),
    )
    return dataclasses.replace(made, advice=tuple(_advice(made, trainer, run)))


def _name(device: str | Hardware | None) -> str | None:
    if not isinstance(device, Hardware):
        return device
    return next((name for name, known in HARDWARE.items() if known == device), "custom")


def _precision_name(trainer: Trainer) -> str:
    given = trainer._arguments.precision
    return given if isinstance(given, str) else str(jnp.dtype(given.compute).name)


def _as_gathered(found: list[Collective], dtype: Any) -> list[Collective]:
    """The collectives, with gathers in the dtype of computation, which a CPU gathers wider."""
    size = jnp.dtype(dtype).itemsize
    if size >= 4:
        return found
    narrow = lambda array: array._replace(dtype=f"u{8 * size}") if array.dtype == "f32" else array
    return [
        c._replace(arrays=tuple(map(narrow, c.arrays))) if c.kind == "all-gather" else c
        for c in found
    ]


def _seconds(c: Collective, known: Hardware) -> float:
    """Of a ring through its devices; groups that reach beyond a node go over the network."""
    link = known.link if c.span <= known.node else known.network
    return c.moved * (c.times or 1) / link


def _by_kind(found: list[Collective], known: Hardware | None) -> tuple[Talk, ...]:
    kinds = dict.fromkeys(c.kind for c in found)
    return tuple(
        Talk(
            kind,
            sum(c.times or 1 for c in found if c.kind == kind),
            sum(c.bytes * (c.times or 1) for c in found if c.kind == kind),
            None if known is None else sum(_seconds(c, known) for c in found if c.kind == kind),
        )
        for kind in kinds
    )


def _estimated(precision: Any, known: Hardware | None) -> tuple[str, ...]:
    told = [
        "Temporaries are those of a program for CPUs: attention is not fused there, and other "
        "compilers order operations otherwise."
    ]
    if jnp.dtype(precision.compute).itemsize < 4:
        told.append(
            "CPUs compute half precision in float32, so temporaries may be up to twice too high. "
            "Gathers are counted in half precision, in which they would be."
        )
    if known is not None:
        told.append(
            "Times are bounds by the vendor's peaks. Collectives are rings, not overlapped with "
            "anything; groups that reach beyond a node run at the network's speed."
        )
    return tuple(told)


def _advice(made: Plan, trainer: Trainer, run: FitRun) -> list[str]:
    """What would help, with its estimated effect."""
    told = []
    fsdp, data = made.mesh.get("fsdp", 1), made.mesh.get("data", 1)
    state = made.parameters + made.optimizer
    if made.fits is False:
        assert made.memory is not None
        gathered = 2 * made.parameters * fsdp  # whole, and their gradients
        activations = max(made.temporaries - gathered, 0)
        fixed = made.peak - activations
        room = made.memory - fixed
        if activations and room > 0:
            parts = 2 ** math.ceil(math.log2(activations / room))
            rows = made.rows // parts // trainer._arguments.accumulate_grad_batches
            told.append(
                f"Micro-batches: batches of {max(rows, 1):,} rows with "
                f"`accumulate_grad_batches={parts * trainer._arguments.accumulate_grad_batches}` "
                f"need about {_binary(fixed + activations // parts)} a device."
            )
        if activations > made.peak // 4 and made.recomputed == 0:
            told.append(
                "Rematerialisation: `jax.checkpoint` around each layer keeps its input only, of "
                f"about {_binary(activations)} of activations, for about a third more FLOPs."
            )
        if data > 1:
            told.append(
                f"Another mesh: `fsdp={fsdp * data}` instead of `data` keeps about "
                f"{_binary(made.peak - state + state // data)} a device."
            )
    elif made.mesh.get("fsdp", 1) == 1 and made.devices > 1 and state > made.peak // 4:
        told.append(
            f'FSDP: `strategy="fsdp"` would keep {_binary(state // made.devices)} instead of '
            f"{_binary(state)} of parameters and optimizer state on each device."
        )
    if made.talk_s is not None and made.compute_s is not None and made.talk_s > made.compute_s > 0:
        told.append(
            f"Larger batches: devices talk for {made.talk_s * 1e3:.3g} ms and compute for "
            f"{made.compute_s * 1e3:.3g} ms. Gradients are reduced once a step, so with "
            f"{math.ceil(made.talk_s / made.compute_s)} times the rows a step "
            "(`accumulate_grad_batches`, or larger batches) both would take equally long."
        )
    if made.memory_s is not None and made.compute_s and made.memory_s > 2 * made.compute_s:
        told.append(
            f"The step is bound by memory: moving data takes {made.memory_s / made.compute_s:.1f} "
            "times as long as computing. Half precision, fused attention and larger matrices help."
        )
    return told


def _binary(value: int) -> str:
    """`value` bytes with three digits and a binary prefix."""
    number, prefixes = float(value), iter(("", "Ki", "Mi", "Gi", "Ti", "Pi"))
    prefix = next(prefixes)
    while number >= 1000:
        number /= 1024
        prefix = next(prefixes)
    return re.sub(r"\.0+$", "", f"{number:.3g}") + f" {prefix}B"
