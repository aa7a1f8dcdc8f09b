"""The summary against hand counts: parameters, bytes, and FLOPs by part."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jaxlightning.callbacks._summary import flops_by_part, scaled, summarise  # type: ignore[import-not-found]

from jaxlightning._flops import analyse_flops
from jaxlightning._metrics import Mean
from jaxlightning._precision import Precision
from jaxlightning._state import TrainState
from jaxlightning._step import MicroBatches, TrainStep
from jaxlightning._task import TaskModule, buffer, trainable_spec
from jaxlightning.callbacks import ModelSummary

EXAMPLES = 5


class Net(TaskModule):
    encoder: eqx.nn.MLP
    head: eqx.nn.Linear
    scale: jax.Array
    count: jax.Array = buffer()

    @classmethod
    def initial(cls):
        one, two = jax.random.split(jax.random.key(0))
        encoder = eqx.nn.MLP(4, 8, 16, depth=1, key=one)
        return cls(encoder, eqx.nn.Linear(8, 3, key=two), jnp.ones((3, 3)), jnp.zeros(7, jnp.int8))

    def training_step(self, batch, *, key):
        out = jax.vmap(self.head)(jax.vmap(self.encoder)(batch["x"])) @ self.scale
        return Mean.over((out**2).sum(1))

    def configure_optimizers(self):
        return optax.sgd(0.1)


class Frozen(Net):
    def trainable(self):
        return eqx.tree_at(lambda t: t.encoder, super().trainable(), False)


SPEC = {"x": jax.ShapeDtypeStruct((EXAMPLES, 4), jnp.float32)}


def jaxpr(task, accumulate=1):
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    spec = trainable_spec(task)
    opt_state = tx.init(eqx.filter(task, spec))
    state = TrainState(jnp.int32(0), jax.random.key(0), task, opt_state, {})
    step = TrainStep(spec, tx, collect=False)
    batch = SPEC if accumulate == 1 else MicroBatches([SPEC] * accumulate)
    return eqx.filter_make_jaxpr(step)(state, batch)[0]


def fake_trainer(task, accumulate=1):
    return SimpleNamespace(
        task=task,
        train_batch_spec=SPEC,
        precision=Precision(),
        accumulate_grad_batches=accumulate,
        steps_per_dispatch=1,
        train_step_jaxpr=lambda: jaxpr(task, accumulate),
    )


# Products of a forward pass, two operations a multiply-add.
HIDDEN, OUT = 2 * EXAMPLES * 4 * 16, 2 * EXAMPLES * 16 * 8
HEAD, SCALE = 2 * EXAMPLES * 8 * 3, 2 * EXAMPLES * 3 * 3


def test_counts_and_flops_by_part():
    task = Net.initial()
    parts = flops_by_part(task, SPEC, Precision())
    flops = analyse_flops(jaxpr(task))
    summary = summarise(task, 1, flops, parts)
    encoder, head = summary.parts
    assert (encoder.path, encoder.type) == (".encoder", "MLP")
    assert (head.path, head.type) == (".head", "Linear")
    assert encoder.parameters == encoder.trainable == 4 * 16 + 16 + 16 * 8 + 8
    assert head.parameters == 8 * 3 + 3
    assert (encoder.bytes, head.bytes) == (4 * encoder.parameters, 4 * head.parameters)
    # Backward: the gradient of each weight, and of each input but the batch's.
    assert encoder.flops == 2 * HIDDEN + 3 * OUT
    assert head.flops == 3 * HEAD
    total = summary.total
    assert total.parameters == encoder.parameters + head.parameters + 9
    assert total.buffers == 7
    assert total.bytes == 4 * total.parameters + 7
    assert total.flops == encoder.flops + head.flops + 3 * SCALE


def test_depth():
    task = Net.initial()
    flops = analyse_flops(jaxpr(task))
    paths = lambda depth: [p.path for p in summarise(task, depth, flops, {}).parts]
    assert paths(0) == []
    assert paths(1) == [".encoder", ".head"]
    assert paths(2) == [".encoder", ".encoder.layers", ".head"]
    assert paths(-1) == [
        ".encoder",
        ".encoder.layers",
        ".encoder.layers[0]",
        ".encoder.layers[1]",
        ".head",
    ]
    parts = {".encoder.layers[0]": 3, ".encoder.layers[1]": 4, ".encoder": 5}
    rows = {p.path: p.flops for p in summarise(task, -1, flops, parts).parts}
    assert rows[".encoder"] == 12
    assert rows[".encoder.layers"] == 7
    assert rows[".encoder.layers[1]"] == 4
    assert rows[".head"] == 0


def test_frozen_parts_have_no_trainable_parameters_and_cost_less():
    task = Frozen(**vars(Net.initial()))
    parts = flops_by_part(task, SPEC, Precision())
    encoder, head = summarise(task, 1, analyse_flops(jaxpr(task)), parts).parts
    assert (encoder.trainable, head.trainable) == (0, 27)
    assert encoder.parameters == 216
    # Forward only; and of the head, the weights' gradient but not the input's.
    assert encoder.flops == HIDDEN + OUT
    assert head.flops == 2 * HEAD


def test_accumulation_counts_all_micro_batches_and_no_second_forward_pass():
    task = Net.initial()
    once = flops_by_part(task, SPEC, Precision())
    assert flops_by_part(task, SPEC, Precision(), 3) == {k: 3 * v for k, v in once.items()}


def test_prints_once_when_a_fit_starts(capsys):
    ModelSummary().on_fit_start(fake_trainer(Net.initial()))
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == [
        "part",
        "type",
        "parameters",
        "trainable",
        "bytes",
        "FLOPs",
        "a",
        "step",
    ]
    assert out[2].split() == [".encoder", "MLP", "216", "216", "864", "B", "5.12", "k"]
    assert out[5].split() == ["total", "Net", "252", "252", "1.01", "kB", "6.11", "k"]
    assert out[6] == "7 further numbers are buffers, which are never trained."
    assert len({len(line) for line in out[:6]}) == 1


def test_a_task_that_owns_its_update_has_a_total_only():
    class Own(Net):
        def train_step(self, state, batch, *, key):
            return state, {}

    task = Own(**vars(Net.initial()))
    assert flops_by_part(task, SPEC, Precision()) is None
    summary = summarise(task, 1, analyse_flops(jaxpr(task)), None)
    assert [part.flops for part in summary.parts] == [None, None]
    assert ".encoder" in str(summary)


def test_recomputation_and_unknown_loops_are_remarked():
    flops = analyse_flops(jaxpr(Net.initial()))
    text = str(summarise(Net.initial(), 0, flops._replace(recomputed=flops.total // 4), {}))
    assert "25% of the FLOPs are recomputation" in text
    text = str(summarise(Net.initial(), 0, flops._replace(unbounded_loops=2), {}))
    assert "2 loops of unknown length" in text


class Normalised(TaskModule):
    norm: eqx.nn.BatchNorm
    state: eqx.nn.State
    linear: eqx.nn.Linear

    @classmethod
    def initial(cls):
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
        return cls(norm, state, eqx.nn.Linear(4, 4, key=jax.random.key(0)))

    def training_step(self, batch, *, key):
        one = lambda x, state: self.norm(jax.nn.relu(self.linear(x)), state)
        out, state = jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            batch["x"], self.state
        )
        return Mean.over(out.sum(1)), {}, eqx.tree_at(lambda t: t.state, self, state)


def test_batch_norm_statistics_are_buffers_and_marking_keeps_them():
    task = Normalised.initial()
    parts = flops_by_part(task, SPEC, Precision())
    assert parts[".linear"] == 2 * (2 * EXAMPLES * 4 * 4)
    summary = summarise(task, 1, analyse_flops(jaxpr(task)), parts)
    assert summary.total.parameters == 8 + 20
    assert summary.total.buffers >= 8
    # A container of arrays has no methods that work could be booked to.
    assert {part.path: part.flops is None for part in summary.parts} == {
        ".norm": False,
        ".state": True,
        ".linear": False,
    }


def test_bytes_follow_the_dtype():
    halves = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, Net.initial()
    )
    flops = analyse_flops(jaxpr(Net.initial()))
    assert summarise(halves, 0, flops, {}).total.bytes == 2 * 252 + 7


def test_scaled():
    numbers = [0, 999, 999.6, 1000, 46_734_336, 222.4e9]
    assert [scaled(n, "B") for n in numbers] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 kB",
        "46.7 MB",
        "222 GB",
    ]
    assert scaled(1.23e12, "") == "1.23 T"


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="`ModelSummary\\(max_depth=-2\\)` has to be a number"):
        ModelSummary(-2)
