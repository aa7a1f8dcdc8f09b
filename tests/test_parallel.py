"""Meshes, rules, and that a run is the same on one device and on several.

`test_fit.py` holds several devices against one for masked losses, smaller last batches and
accumulation; here is how arrays are placed, and what else must not depend on it.
"""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from tasks import Classifier, TwoLosses, assert_close, assert_same, quiet, rows

from jaxlightning import Callback, DataLoader, Mean, TaskModule
from jaxlightning.parallel import Placement, fsdp, make_mesh, pick_devices, strategy_rules

P = PartitionSpec


# Meshes


@pytest.mark.parametrize(
    ("devices", "indices"),
    [("auto", [0, 1, 2, 3]), (-1, [0, 1, 2, 3]), (2, [0, 1]), ([3, 1], [3, 1])],
)
def test_devices(devices, indices):
    assert pick_devices(devices) == [jax.devices()[i] for i in indices]
    assert quiet(devices=devices).mesh.devices.tolist() == pick_devices(devices)


def test_devices_themselves():
    last = jax.devices()[-1]
    assert pick_devices([last]) == [last]
    trainer = quiet(max_epochs=1, devices=[last])
    trained = trainer.fit(Classifier(), DataLoader(rows(8), 8))
    assert {leaf.device for leaf in jax.tree.leaves(eqx.filter(trained, eqx.is_array))} == {last}


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (None, {"data": 4}),
        ({"data": -1}, {"data": 4}),
        ({"data": 2, "fsdp": -1}, {"data": 2, "fsdp": 2}),
        ({"fsdp": -1, "tensor": 1}, {"fsdp": 4, "tensor": 1}),
        ({"data": 1, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 2}),
    ],
)
def test_meshes(shape, sizes):
    mesh = make_mesh(jax.devices(), shape)
    assert dict(mesh.shape) == sizes
    assert mesh.devices.flatten().tolist() == jax.devices()
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_of_ones_own():
    own = Mesh(np.asarray(jax.devices()).reshape(2, 2)[::-1], ("data", "tensor"))
    mesh = quiet(mesh=own, devices="auto").mesh
    assert mesh.devices.tolist() == own.devices.tolist()
    assert mesh.axis_names == ("data", "tensor")
    # `jax.make_mesh` makes Explicit axes, under which sharded parameters raise.
    explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    assert set(quiet(mesh=explicit, devices="auto").mesh.axis_types) == {AxisType.Auto}
    with pytest.raises(ValueError, match="`mesh` has an unknown axis `model`; the axes are"):
        quiet(mesh=Mesh(np.asarray(jax.devices()), ("model",)), devices="auto")


def test_fsdp_brings_its_own_mesh():
    assert dict(quiet(devices=4, strategy="fsdp").mesh.shape) == {"fsdp": 4}


# Rules


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 32), P("fsdp")),
        ((32, 64), P(None, "fsdp")),
        ((64, 33), P("fsdp")),
        ((33, 64), P(None, "fsdp")),
        ((3, 4096), P(None, "fsdp")),
        ((33, 35), P()),  # nothing divides
        ((8, 8), P()),  # too small to be worth it
        ((), P()),
    ],
)
def test_fsdp_shards_the_largest_axis_that_divides(shape, spec):
    assert fsdp(shape, make_mesh(jax.devices(), {"fsdp": 4})) == spec
    assert fsdp(shape, make_mesh(jax.devices(), {"data": 4})) == P()


def placement(shape, *rules):
    return Placement(make_mesh(jax.devices(), shape), rules)


def test_the_first_rule_that_finds_a_path_decides():
    rules = [("head/weight", P("tensor")), ("weight", P(None, "tensor"))]
    placed = placement({"data": 2, "tensor": 2}, *rules)
    specs = {
        "task/head/weight": P("tensor"),
        "task/body/weight": P(None, "tensor"),
        "task/body/bias": P(),
    }
    for path, spec in specs.items():
        assert placed.of_leaf(path, (4, 4)).spec == spec, path
    # A rule of more axes than a leaf has is for another leaf, such as a parameter's own.
    assert placed.of_leaf("opt_state/head/weight/count", ()).spec == P()


def test_a_rule_may_be_a_function_of_the_shape():
    tall = lambda shape, mesh: P("tensor") if shape[0] > 8 else P()
    placed = placement({"tensor": 4}, (".*", tall))
    assert placed.of_leaf("a", (16, 2)).spec == P("tensor")
    assert placed.of_leaf("a", (8, 2)).spec == P()


def test_axes_that_a_mesh_lacks_are_left_out_of_a_tasks_rules():
    """So that a task brings its rules along, and runs on any mesh."""
    rules = [("weight", P("tensor", ("data", "fsdp")))]
    for shape, spec in (
        ({"data": 4}, P(None, "data")),
        ({"data": 2, "fsdp": 2}, P(None, ("data", "fsdp"))),
        ({"tensor": 4}, P("tensor", None)),
    ):
        assert placement(shape, *rules).of_leaf("weight", (4, 4)).spec == spec


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match=re.escape("`partition_rules` shards `w` over an unknown")):
        placement(None, ("w", P("tensr")))
    with pytest.raises(ValueError, match="Did you mean `tensor`"):
        strategy_rules([("w", P("tensr"))])
    placed = placement({"tensor": 4}, ("w", P("tensor")))
    with pytest.raises(
        ValueError, match=r"The rule `w` shards `task/w` of shape \[6, 4\] as .* do"
    ):
        placed.of_leaf("task/w", (6, 4))


# Batches


@pytest.mark.parametrize(
    ("shape", "size", "shards"),
    [
        ({"data": 4}, 8, 4),
        ({"data": 2, "fsdp": 2}, 8, 4),
        ({"data": 2, "tensor": 2}, 8, 2),
        ({"tensor": 4}, 8, 1),
        ({"data": 4}, 7, 1),  # does not divide: whole on every device
    ],
)
def test_batches_are_split_over_the_data_axes(shape, size, shards):
    placed = placement(shape).put({"x": np.arange(size * 2.0, dtype=np.float32).reshape(size, 2)})
    pieces = {str(piece.index) for piece in placed["x"].addressable_shards}
    assert len(pieces) == shards
    assert {piece.data.shape[0] for piece in placed["x"].addressable_shards} == {size // shards}
    np.testing.assert_array_equal(placed["x"], np.arange(size * 2.0).reshape(size, 2))


def test_what_lies_right_already_is_left_alone():
    for devices in (1, 4):
        placed = Placement(make_mesh(jax.devices()[:devices], None))
        once = placed.put({"x": np.ones((4, 2), np.float32)})
        assert jax.tree.leaves(placed.put(once))[0] is once["x"]


# Runs


@pytest.fixture(scope="module")
def on_one():
    """What dropout and two masked losses come to on one device."""
    return dropped(devices=1)


@pytest.fixture(scope="module")
def on_four():
    return dropped(devices=4)


class Dropped(TwoLosses):
    """Dropout inside, and two losses of different weights."""

    def __init__(self):
        super().__init__(dropout=0.5)


def dropped(size=8, **arguments):
    trainer = quiet(max_epochs=1, **arguments)
    return trainer.fit(Dropped(), DataLoader(rows(20), size, shuffle=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"devices": [2, 0]},
        {"devices": 4, "strategy": "fsdp"},
        {"devices": 4, "mesh": {"data": 2, "tensor": 2}},
    ],
    ids=str,
)
def test_dropout_depends_on_the_example_and_not_on_its_device(on_one, arguments):
    """In whole batches, and in the last one of four, which is whole on every device."""
    assert_close(dropped(**arguments), on_one, 1e-5)


def test_micro_batches_on_several_devices_draw_what_they_draw_on_one():
    arguments = {"size": 4, "accumulate_grad_batches": 2}
    assert_close(dropped(devices=4, **arguments), dropped(devices=1, **arguments), 1e-5)


def test_blocks_on_several_devices_equal_steps_on_one(on_one):
    assert_close(dropped(devices=4, steps_per_dispatch=3), on_one, 1e-5)


def test_two_runs_on_the_same_devices_are_bitwise_equal(on_one, on_four):
    assert_close(on_four, on_one, 1e-5)
    assert_same(dropped(devices=4), on_four)


class Wide(TaskModule):
    """With one large matrix, a vector and a statistic of the whole batch."""

    weight: jax.Array
    bias: jax.Array

    def training_step(self, batch, *, key):
        x = batch["x"] - batch["x"].mean(0, keepdims=True)
        out = jnp.tanh(x @ self.weight + self.bias[None])
        return Mean.over(jnp.square(out.sum(1) - 1.0))

    def configure_optimizers(self):
        return optax.adam(0.01)


def wide(rules=()):
    class Ruled(Wide):
        def partition_rules(self):
            return rules

    weight = np.random.default_rng(0).normal(size=(6, 1024)).astype(np.float32) / 30
    return Ruled(jnp.asarray(weight), jnp.zeros(1024, jnp.float32))


def fit_wide(rules=(), **arguments):
    trainer = quiet(max_epochs=1, **arguments)
    return trainer, trainer.fit(wide(rules), DataLoader({"x": rows(16)["x"]}, 8))


def bytes_a_device(tree):
    """By counting what is on each device, not by what a sharding says."""
    found: dict = {}
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)):
        for shard in leaf.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return set(found.values())


def test_fsdp_keeps_a_share_of_parameters_and_optimizer_state_on_each_device():
    one, expected = fit_wide(devices=1)
    whole = 4 * 7 * 1024
    trainer, trained = fit_wide(devices=4, strategy="fsdp")
    assert bytes_a_device(one.state.task) == {whole}
    assert bytes_a_device(trainer.state.task) == {whole // 4}
    assert bytes_a_device(trainer.state.opt_state) == {2 * whole // 4}
    assert_close(trained, expected, 1e-5)
    ddp, trained = fit_wide(devices=4, strategy="ddp")
    assert bytes_a_device(ddp.state.task) == {whole}
    assert_close(trained, expected, 1e-5)


def test_rules_of_a_task_and_of_the_strategy():
    """Those of the task come first; the optimizer's state follows by its paths."""
    mesh = {"data": 2, "tensor": 2}
    trainer, trained = fit_wide([("weight", P(None, "tensor"))], devices=4, mesh=mesh)
    assert trainer.state.task.weight.sharding.spec == P(None, "tensor")
    assert bytes_a_device(trainer.state.task) == {4 * 1024 * (3 + 1)}
    assert bytes_a_device(trainer.state.opt_state) == {2 * 4 * 1024 * (3 + 1)}
    assert_close(trained, fit_wide(devices=1)[1], 1e-5)
    strategy = [(".*", P("tensor"))]
    trainer, _ = fit_wide([("weight", P())], devices=4, mesh=mesh, strategy=strategy)
    assert trainer.state.task.weight.sharding.is_fully_replicated
    assert trainer.state.task.bias.sharding.spec == P("tensor")


def test_fsdp_state_is_sharded_from_the_start():
    """A lazily initialised task is never whole on a device."""
    seen = []

    class Looks(Callback):
        def on_fit_start(self, trainer):
            seen.extend(bytes_a_device(trainer.state.task))

    trainer = quiet(max_epochs=1, devices=4, strategy="fsdp", callbacks=Looks())
    trainer.fit(lambda key: wide(), DataLoader({"x": rows(8)["x"]}, 8))
    assert seen == [7 * 1024]


def test_validation_and_prediction_of_a_sharded_task():
    trainer, trained = fit_wide(devices=4, strategy="fsdp")
    data = DataLoader({"x": rows(10)["x"]}, 4)
    expected = quiet(devices=1).validate(jax.device_put(trained, jax.devices()[0]), data)
    assert trainer.validate(trained, data) == pytest.approx(expected, rel=1e-6)
    assert trainer.validate(dataloaders=data) == pytest.approx(expected, rel=1e-6)
