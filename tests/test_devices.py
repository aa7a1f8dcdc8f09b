"""One mesh: the same run on one device and on eight, and what is said of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from stacked import Layered, Sharded, Transformer, series
from tasks import Classifier, assert_close, quiet, refused, rows, says

from albert_task import AlbertConfig, AlbertForMaskedLM
from jaxlightning import DataLoader, Max, Mean, TaskModule
from jaxlightning.parallel import DATA_AXES, axis_size, constrain, gather_layer

JOB = Path(__file__).parent / "devices_job.py"
P = PartitionSpec
slow = pytest.mark.slow


# Equality


@pytest.mark.parametrize(
    ("task", "accumulate", "strategies"),
    [
        pytest.param("albert", 4, ["ddp", "fsdp x tensor"], marks=pytest.mark.long),
        pytest.param("transformer", 1, ["fsdp"], marks=pytest.mark.long),
        pytest.param("mlp", 4, ["ddp", "fsdp", "tensor"], marks=pytest.mark.long),
        ("mlp", 4, ["fsdp x tensor"]),
        *(
            pytest.param(task, accumulate, [], marks=slow)
            for task in ("albert", "transformer", "layered", "mlp")
            for accumulate in (1, 4)
        ),
    ],
    ids=str,
)
def test_eight_devices_equal_one_over_50_steps(task, accumulate, strategies):
    """Losses and parameters, with dropout, and with masks of unequal weight on each device."""
    done = subprocess.run(
        [sys.executable, str(JOB), task, str(accumulate), "50", *strategies],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert set(strategies or ["ddp", "fsdp", "tensor", "fsdp x tensor"]) < set(found)
    for name, (losses, parameters, first, last, _) in found.items():
        assert max(losses, parameters) < 1e-5, name
        assert last < first
    if task == "transformer":
        assert found["fsdp"][-1] * 8 == pytest.approx(1, rel=0.1)


# Who takes gradients how


class Normed(Classifier):
    """Whose examples see each other: the batch's own statistics."""

    def logits(self, batch, key):
        x = batch["x"]
        return jax.vmap(self.net)((x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True))


class Folding(Classifier):
    """Keys by the rows' places, which a shard does not know."""

    independent_examples = True

    def logits(self, batch, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(batch["x"])))
        noise = jax.vmap(lambda key: jax.random.normal(key, (6,)))(keys)
        return jax.vmap(self.net)(batch["x"] + 0.1 * noise)


@pytest.mark.long
@pytest.mark.parametrize("kind", [Normed, Folding])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_shards_cannot_do_is_as_exact(kind, accumulate):
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    data = DataLoader(rows(32), 8)
    one = quiet(**options).fit(kind(), data)
    assert_close(quiet(devices=4, **options).fit(kind(), data), one, 1e-6)
    fsdp = quiet(devices=4, strategy="fsdp", **options)
    assert_close(fsdp.fit(kind(), data), one, 1e-6)


@pytest.mark.parametrize(
    ("task", "rows_", "devices", "says_"),
    [
        (Sharded, 8, 4, "Gradients are taken on each of 4 shards of the batch, and reduced once"),
        (Normed, 8, 4, "in micro-batches and scans too: `Normed` does not say `independent_exa"),
        (Folding, 8, 4, "`Folding` folds the places of its rows into keys"),
        (Sharded, 6, 4, "`Sharded` has a batch that 4 shards do not divide."),
        (Sharded, 8, 1, "There is one device."),
    ],
)
def test_how_gradients_are_taken_is_explained(task, rows_, devices, says_):
    trainer = quiet(devices=devices)
    assert says_ in str(trainer.explain_sharding(task(), rows(rows_)))
    assert "pass `batch=`" in str(trainer.explain_sharding(task())) or devices == 1


def test_independent_examples_return_no_scalars():
    class Scalar(Classifier):
        independent_examples = True

        def training_step(self, batch, *, key):
            loss, metrics = super().training_step(batch, key=key)
            return loss, metrics | {"size": jnp.float32(1.0)}

    error = refused(ValueError, Scalar())
    assert "says `independent_examples = True`, but the `size` that `Scalar.training_step`" in says(
        error
    )
    assert "Return `Mean.over(values)`" in says(error)


def test_metrics_of_shards_are_merged_as_they_merge():
    """Also those whose merge is no sum; the log and the epoch are those of one device."""

    class Measured(Sharded):
        def training_step(self, batch, *, key):
            loss, logits = super().training_step(batch, key=key), self.logits(batch, key)
            return loss, {"largest": Max.of(logits), "y": Mean.over(batch["y"].astype(float))}

    class Plain(Measured):
        independent_examples = False

    found = []
    for kind, devices in ((Measured, 4), (Plain, 1), (Measured, 3)):
        trainer = quiet(max_epochs=1, devices=devices, log_every_n_steps=1)
        trainer.fit(kind(), DataLoader(rows(24), 12))
        found.append(trainer.callback_metrics)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert found[0]["train/largest"] > 0.1


@pytest.mark.long
def test_mixed_precision_and_loss_scaling_on_shards():
    for precision, tolerance in (("bf16-mixed", 2e-3), ("16-mixed", 2e-3)):
        options = {"max_epochs": 1, "precision": precision}
        data = DataLoader(rows(32), 8)
        one = quiet(**options).fit(Sharded(), data)
        several = quiet(devices=4, strategy="fsdp", **options)
        assert_close(several.fit(Sharded(), data), one, tolerance)


# Stacked layers


@pytest.mark.long
def test_layers_are_gathered_one_by_one():
    """The stack's own axis is never sharded, and results are those of one device."""
    trainer = quiet(max_steps=3, devices=4, strategy="fsdp")
    trained = trainer.fit(Layered(layers=4), DataLoader(series(), 8))
    for leaf in jax.tree.leaves(eqx.filter(trained.blocks, eqx.is_array)):
        assert not leaf.sharding.spec or leaf.sharding.spec[0] is None
    assert trained.blocks.ffn.sharding.spec == P(None, None, "fsdp")
    one = quiet(max_steps=3).fit(Transformer(layers=4), DataLoader(series(), 8))
    assert_close(trained, one, 1e-5)


@pytest.mark.long
def test_a_gathered_stack_holds_one_layer():
    """Peak bytes a device stay below those of gathering everything, by more than half of it."""
    peaks = []
    for task in (Layered(layers=8, width=64), Transformer(layers=8, width=64)):
        trainer = quiet(max_steps=1, devices=4, strategy="fsdp")
        trainer.fit(task, DataLoader(series(), 4))
        (program,) = trainer._run.program._compiled.values()
        peaks.append(program.memory_analysis().temp_size_in_bytes)
    whole = 4 * sum(x.size for x in jax.tree.leaves(eqx.filter(task.blocks, eqx.is_array)))
    assert peaks[0] < peaks[1] - whole / 2


# What is said inside a task


def test_constrain_is_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert constrain(x, DATA_AXES, "context") is x
    assert gather_layer({"w": x}, "blocks")["w"] is x
    assert axis_size("context") == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("dat",), 'the unknown axis "dat"; the axes are .* Did you mean `data`?'),
        ((None, None, "data"), r"3 entries for an array of 2 axes, of shape \(2, 3\)"),
    ],
)
def test_constrain_refuses_what_cannot_be(axes, message):
    with pytest.raises(ValueError, match=message):
        constrain(jnp.ones((2, 3)), *axes)


def test_activations_are_sharded_where_the_task_asks():
    seen = []

    class Asking(Classifier):
        def logits(self, batch, key):
            x = constrain(batch["x"], DATA_AXES, "context")
            seen.append(axis_size("context"))
            jax.debug.inspect_array_sharding(x, callback=seen.append)
            return jax.vmap(self.net)(x)

    trainer = quiet(max_steps=1, devices=4, mesh={"data": 2, "context": 2})
    trainer.fit(Asking(), DataLoader(rows(8), 8))
    assert 2 in seen
    assert 1 not in seen
    shardings = [x for x in seen if not isinstance(x, int)]
    assert shardings
    assert {x.shard_shape((8, 6)) for x in shardings} == {(4, 3)}


# explain_sharding


@pytest.mark.long
def test_explain_sharding_lists_every_leaf():
    trainer = quiet(devices=4, mesh={"fsdp": 2, "tensor": 2}, strategy="fsdp")
    found = trainer.explain_sharding(Sharded())
    by_path = {leaf.path: leaf for leaf in found.leaves}
    weight = by_path["task/net/layers/1/weight"]
    assert weight.shape == (256, 256)
    assert weight.bytes == 4 * 256 * 256
    assert weight.spec == P("fsdp", "tensor")
    assert weight.bytes_a_device == 256 * 256
    assert weight.why == "rule `net/layers/1/weight$` and fsdp"
    assert by_path["opt_state/0/mu/net/layers/1/weight"].spec == weight.spec
    assert by_path["task/net/layers/2/bias"].why == "small: fewer than 1,024 numbers"
    assert by_path["task/net/layers/0/weight"].why.startswith("rule")
    assert "13" not in by_path["step"].why
    state = trainer.fit(Sharded(), DataLoader(rows(8), 8)) and trainer.state
    on_device = {
        "task/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.task)[0]
        if eqx.is_array(leaf)
    }
    for path, leaf in on_device.items():
        (shard, *_) = leaf.addressable_shards
        assert by_path[path].bytes_a_device == shard.data.nbytes, path
    assert re.search(r"mesh {'fsdp': 2, 'tensor': 2}", str(found))
    assert f"{found.bytes_a_device:,} bytes a device of {found.bytes:,}" in str(found)


def test_axes_that_do_not_divide_are_explained():
    task = wide(6, 1031)
    (leaf,) = [
        leaf
        for leaf in quiet(devices=4, strategy="fsdp").explain_sharding(task).leaves
        if leaf.path == "task/weight"
    ]
    assert leaf.why == "no axis that 4 divides"
    assert leaf.is_replicated


class OneMatrix(TaskModule):
    weight: jax.Array

    def training_step(self, batch, *, key):
        return Mean.over(jnp.square(batch["x"] @ self.weight).sum(1))

    def configure_optimizers(self):
        return optax.sgd(0.01)


def wide(*shape):
    return OneMatrix(jnp.asarray(np.zeros(shape, np.float32)))


def test_large_replicated_leaves_are_warned_of():
    trainer = quiet(devices=4)
    with pytest.warns(UserWarning, match="`task/weight` is whole on each of 4 devices, and takes"):
        trainer.explain_sharding(wide(6, 2048), warn_above=2**10)
    trainer.explain_sharding(wide(6, 2048))
    quiet(devices=1).explain_sharding(wide(6, 2048), warn_above=2**10)


def test_fsdp_says_what_it_shards(capfd):
    quiet(max_steps=1, devices=4, strategy="fsdp").fit(Sharded(), DataLoader(rows(8), 8))
    assert re.search(
        r"FSDP over 4 devices shards 6 of \d+ arrays, 9\d\.\d% of the state",
        (capfd.readouterr().err),
    )


# Bad input


def test_a_rule_that_finds_nothing_is_refused():
    error = refused(
        ValueError, Classifier(), devices=4, mesh={"tensor": 4}, strategy=[("nte", P("tensor"))]
    )
    assert "The rule `nte` finds no leaf: it is searched for (`re.search`) in the paths" in says(
        error
    )
    with pytest.raises(ValueError, match="The rule `nte` finds no leaf"):
        quiet(devices=4, strategy=[("nte", P("data"))]).explain_sharding(Classifier())


def test_heads_that_tensor_does_not_divide():
    config = AlbertConfig(vocab_size=64, hidden_size=48, num_attention_heads=3)
    task = lambda key: AlbertForMaskedLM.init(config, key)
    with pytest.raises(ValueError, match="size 4, which does not divide the `num_attention_heads"):
        quiet(devices=4, strategy="tensor").explain_sharding(task)


def test_tensor_needs_rules():
    error = refused(ValueError, Classifier(), devices=4, strategy="tensor")
    assert 'no rule of `Classifier.partition_rules` shards over the axis "tensor"' in says(error)


def test_batches_that_do_not_divide_get_a_sentence():
    trainer = quiet(max_steps=1, devices=4)
    with pytest.warns(UserWarning, match="have 6 rows, which the mesh {'data': 4} can't split"):
        trainer.fit(Classifier(), DataLoader(rows(6), 6))
