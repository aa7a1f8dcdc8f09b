"""The compiled step says to other devices what theory asks for, and nothing else."""

import equinox as eqx
import jax
import numpy as np
import pytest
from devices_job import albert, texts
from stacked import Layered, Transformer, series
from tasks import quiet

from jaxlightning import DataLoader
from jaxlightning.parallel._collectives import collectives, total_bytes

SCALARS = 64
"""Bytes that weights of losses, metrics and the like may take."""


def step_program(task, data, accumulate, **arguments):
    """The trainer after a step, and the collectives of its program."""
    trainer = quiet(max_steps=1, accumulate_grad_batches=accumulate, devices=4, **arguments)
    trainer.fit(task, DataLoader(data, 8))
    (program,) = trainer._run.program._compiled.values()
    return trainer, collectives(program)


def parameters(trainer):
    return jax.tree.leaves(eqx.filter(trainer.state.task, eqx.is_inexact_array))


def sharded(trainer):
    """The parameters that FSDP shards, and the rest."""
    leaves = parameters(trainer)
    return (
        [leaf for leaf in leaves if not leaf.sharding.is_fully_replicated],
        [leaf for leaf in leaves if leaf.sharding.is_fully_replicated],
    )


def shapes(leaves):
    return sorted(sorted(leaf.shape) for leaf in leaves)


def size(leaves):
    return sum(leaf.nbytes for leaf in leaves)


CASES = [
    pytest.param(lambda: Transformer("scanned"), series, id="scanned"),
    pytest.param(lambda: Transformer("unrolled"), series, id="unrolled"),
    pytest.param(albert, texts, id="albert", marks=pytest.mark.long),
]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.long), 4])
@pytest.mark.parametrize(("make", "data"), CASES)
def test_ddp_reduces_the_gradients_once(make, data, accumulate):
    trainer, found = step_program(make(), data(), accumulate, strategy="ddp")
    assert {c.kind for c in found} == {"all-reduce"}
    assert not any(c.in_loop for c in found)
    gradients = size(parameters(trainer))
    assert gradients <= total_bytes(found) <= gradients + SCALARS


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("make", "data"), CASES)
def test_fsdp_gathers_and_scatters_what_it_shards_once(make, data, accumulate):
    """ALBERT's layer, which is used twice, is gathered once a step, not once a layer; nothing of
    the batch or the logits is ever gathered."""
    trainer, found = step_program(make(), data(), accumulate, strategy="fsdp")
    assert {c.kind for c in found} == {"all-gather", "reduce-scatter", "all-reduce"}
    assert not any(c.in_loop for c in found)
    split, whole = sharded(trainer)
    gathers = [c for c in found if c.kind == "all-gather"]
    assert shapes(gather.arrays[0] for gather in gathers) == shapes(split)
    assert total_bytes(found, "reduce-scatter") == size(split) // 4
    assert len([c for c in found if c.kind == "reduce-scatter"]) == len(split)
    assert size(whole) <= total_bytes(found, "all-reduce") <= size(whole) + SCALARS


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_stack_is_gathered_in_its_scan_where_that_is_asked_for(accumulate):
    """A layer at a time: once forward, once again backward, and its gradient reduced there."""
    trainer, found = step_program(Layered(), series(), accumulate, strategy="fsdp")
    layers, width = trainer.state.task.blocks.bias.shape[0], 32
    inside = [c for c in found if c.in_loop]
    assert {c.kind for c in inside} == {"all-gather", "reduce-scatter"}
    matrices = width * (3 * width + width + 4 * width + 4 * width) * 4
    gathered, scattered = (total_bytes(inside, kind) for kind in ("all-gather", "reduce-scatter"))
    assert gathered == 2 * accumulate * layers * matrices
    assert scattered == accumulate * layers * matrices // 4
    arrays = eqx.filter(trainer.state.task.blocks, eqx.is_array)
    blocks = {leaf.shape for leaf in jax.tree.leaves(arrays)}
    for c in found:
        if not c.in_loop:
            assert not {array.shape for array in c.arrays} & (blocks - {(layers, 4 * width)})


@pytest.mark.long
def test_tensor_parallel_logits_and_embeddings_are_not_gathered():
    """Two reductions a layer in each direction, of activations (Megatron-LM, section 3), one for
    the embedding and one for the head; of logits only numbers a position."""
    trainer, found = step_program(albert(), texts(), 1, strategy="tensor")
    layers, positions, hidden = 2, 8 * 16, 32
    activations = [c for c in found if c.bytes >= positions * hidden * 4]
    assert {c.kind for c in activations} == {"all-reduce"}
    of_layers = [a for c in activations for a in c.arrays if np.prod(a.shape) == positions * hidden]
    # Forward, two a layer; backward, one of each of query, key and value, and one; one embedding.
    assert len(of_layers) == layers * (2 + 4) + 1
    vocabulary = trainer.state.task.config.vocab_size
    for c in found:
        for array in c.arrays:
            assert vocabulary not in array.shape
            assert vocabulary // 4 not in array.shape


def test_evaluation_gathers_each_parameter_once():
    trainer = quiet(devices=4, strategy="fsdp")
    task = Transformer("scanned")
    trainer.validate(task, DataLoader(series(16), 8))
    (program,) = trainer._evaluator._programs.values()
    (compiled,) = program.program._compiled.values()
    gathers = [c for c in collectives(compiled) if c.kind == "all-gather"]
    assert not any(c.in_loop for c in gathers)
    assert len(gathers) == len([c for c in gathers if c.bytes >= 4 * 2**10]) == 4


@pytest.mark.parametrize("devices", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 4))])
def test_bytes_a_device_fall_with_the_fsdp_axis(devices):
    """Parameters and optimizer's state, counted on the devices; on 8, see `test_devices.py`."""
    trainer = quiet(max_steps=1, devices=devices, mesh={"fsdp": devices}, strategy="fsdp")
    trainer.fit(Transformer(width=64), DataLoader(series(), 8))
    held = whole = 0
    for leaf in jax.tree.leaves((trainer.state.task, trainer.state.opt_state)):
        if eqx.is_array(leaf):
            held += leaf.addressable_shards[0].data.nbytes
            whole += leaf.nbytes
    assert held * devices == pytest.approx(whole, rel=0.1)
