"""ALBERT's optimizers held against google-research/albert's arithmetic, written out in numpy."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_albert
from tasks import quiet
from tiny_albert import GROUPS, TINY, rows

from albert_task import AlbertForMaskedLM, AlbertForSequenceClassification, Recipe
from albert_task._optimizers import OPTIMIZERS
from jaxlightning import DataLoader
from jaxlightning.parallel import leaf_path

NUMBERS = {"learning_rate": 0.1, "weight_decay": 0.3, "b1": 0.9, "b2": 0.999, "eps": 1e-6}


def reference_rate(step, peak, total, warmup, power=1.0):
    """`create_optimizer` of `optimization.py`: decay from step 0, and a warm-up in its place."""
    rate = peak * (1 - min(step, total) / total) ** power
    return peak * step / warmup if step < warmup else rate


def reference_step(params, grads, state, step, rate, lamb):
    """`LAMBOptimizer.apply_gradients` and `AdamWeightDecayOptimizer.apply_gradients`."""
    norm = np.sqrt(sum(np.square(g).sum() for g in grads.values()))
    grads = {name: g * min(1.0, 1.0 / norm) for name, g in grads.items()}
    after = {}
    for name, p in params.items():
        m, v = state.get(name, (np.zeros_like(p), np.zeros_like(p)))
        m = NUMBERS["b1"] * m + (1 - NUMBERS["b1"]) * grads[name]
        v = NUMBERS["b2"] * v + (1 - NUMBERS["b2"]) * np.square(grads[name])
        state[name] = (m, v)
        update = m / (np.sqrt(v) + NUMBERS["eps"])
        excluded = "norm" in name or "bias" in name
        ratio = 1.0
        if not excluded:
            update = update + NUMBERS["weight_decay"] * p
        if lamb and not excluded:
            p_norm, u_norm = np.linalg.norm(p), np.linalg.norm(update)
            ratio = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
        after[name] = p - ratio * rate * update
    return after


@pytest.mark.parametrize("name", ["adamw_reference", "lamb_reference"])
@pytest.mark.parametrize("schedule", ["constant", "polynomial"])
def test_three_steps(name, schedule):
    generator = np.random.default_rng(0)
    shapes = {
        "dense/weight": (4, 3),
        "dense/bias": (3,),
        "norm/weight": (4,),
        "zero/weight": (2, 2),
    }
    params = {n: generator.normal(size=shape) for n, shape in shapes.items()}
    params["zero/weight"][:] = 0
    steps = {}
    if schedule == "polynomial":
        steps = {"schedule": schedule, "total_steps": 5, "warmup_steps": 2, "power": 2.0}
    recipe = Recipe(name, **NUMBERS, **steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), recipe.build())
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    opt_state, state = tx.init(ours), {}
    for step in range(3):
        grads = {n: generator.normal(size=shape) for n, shape in shapes.items()}
        updates, opt_state = tx.update(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), opt_state, ours
        )
        ours = optax.apply_updates(ours, updates)
        rate = 0.1 if schedule == "constant" else reference_rate(step, 0.1, 5, 2, 2.0)
        params = reference_step(params, grads, state, step, rate, name == "lamb_reference")
        for n, p in params.items():
            np.testing.assert_allclose(ours[n], p, rtol=2e-5, atol=1e-6, err_msg=f"{n} {step}")


def test_the_jump_after_the_warm_up():
    rate = Recipe(schedule="polynomial", total_steps=100, warmup_steps=10)._schedule()
    found = [float(rate(jnp.int32(step))) for step in range(101)]
    expected = [reference_rate(step, 1e-3, 100, 10) for step in range(101)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[9] == pytest.approx(0.9e-3)
    assert found[10] == pytest.approx(0.9e-3)
    assert found[100] == 0


def test_the_rate_for_the_batch_in_use():
    assert Recipe(learning_rate=1.76e-3, batch_size=4096).peak == 1.76e-3
    assert Recipe(learning_rate=1.76e-3, batch_size=64).peak == pytest.approx(1.76e-3 / 8)
    tx = Recipe("sgd", learning_rate=1.0, batch_size=64, b1=0.0, weight_decay=0.0).build()
    grads = {"w": jnp.ones((2, 2))}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["w"], -1 / 8)


@pytest.fixture(scope="module")
def classifier():
    return AlbertForSequenceClassification.init(GROUPS, jax.random.key(0))


def test_stages_learn_at_their_rates(classifier):
    """Heads and pooler at 1, the last group at 1/2, the first at 1/4, embeddings at 1/8."""
    recipe = Recipe("sgd", learning_rate=1.0, b1=0.0, weight_decay=0.0, layer_decay=0.5)
    tx = recipe.build(groups=2)
    params = jax.tree.map(jnp.ones_like, eqx.filter(classifier, eqx.is_inexact_array))
    updates, _ = tx.update(params, tx.init(params), params)
    table = {row.path: row for row in recipe.table(classifier)}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = leaf_path(path)
        rate = 1.0
        if "groups/1/" in name:
            rate = 0.5
        elif "groups/0/" in name:
            rate = 0.25
        elif "embeddings" in name or "mapping" in name:
            rate = 0.125
        np.testing.assert_allclose(update, -rate, err_msg=name)
        assert table[name].rate == rate


def test_gradual_unfreezing(classifier):
    recipe = Recipe("sgd", learning_rate=1.0, b1=0.0, weight_decay=0.0, unfreeze_every=2)
    tx = recipe.build(groups=2)
    params = jax.tree.map(jnp.ones_like, eqx.filter(classifier, eqx.is_inexact_array))
    state = tx.init(params)
    table = {row.path: row.from_step for row in recipe.table(classifier)}
    assert set(table.values()) == {0, 2, 4, 6}
    for step in range(8):
        updates, state = tx.update(params, state, params)
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            learns = step >= table[leaf_path(path)]
            np.testing.assert_array_equal(update, -1.0 if learns else 0.0)


def test_stages_count_what_is_frozen_too():
    """The first group keeps its rate when the last one is frozen."""
    how = dict(optimizer="sgd", learning_rate=1.0, b1=0.0, weight_decay=0.0, layer_decay=0.5)
    task = AlbertForSequenceClassification.init(
        GROUPS, jax.random.key(0), frozen=("groups/1",), **how
    )
    params = jax.tree.map(jnp.ones_like, eqx.filter(task, task.trainable()))
    tx = task.configure_optimizers()
    updates, _ = tx.update(params, tx.init(params), params)
    table = {row.path: row for row in task.recipe.table(task)}
    found = {
        leaf_path(path): -float(x.ravel()[0])
        for path, x in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {name: row.rate for name, row in table.items() if row.trained} == found
    assert {rate for name, rate in found.items() if "groups/0" in name} == {0.25}


def test_momentum_reaches_every_optimizer():
    """The second step goes another way with another momentum; Muon's own is 0.95."""
    params = {"w": jnp.eye(4) + 0.1, "b": jnp.ones(4)}
    draw = np.random.default_rng(0).normal
    grads = [{"w": jnp.asarray(draw(size=(4, 4)), jnp.float32), "b": params["b"]} for _ in "ab"]

    def second(name, b1):
        tx = Recipe(name, learning_rate=0.1, b1=b1).build()
        state = tx.init(params)
        for grad in grads:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(grad, state, params)
        return np.asarray(updates["w"])

    for name in OPTIMIZERS:
        if name != "adafactor":  # which has none
            assert np.abs(second(name, None) - second(name, 0.1)).max() > 1e-4, name
            own = 0.95 if name == "muon" else 0.9
            np.testing.assert_array_equal(second(name, None), second(name, own))


@pytest.mark.parametrize("name", ["adamw", "adamw_reference"])
def test_moments_are_in_float32(name):
    """In bfloat16 0.999 is 1, and the second moment would never decay."""
    tx = Recipe(name, learning_rate=0.1, b1=0.0, b2=0.999, weight_decay=0.0).build()
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    state = tx.init(params)
    for step in range(201):
        grad = jax.tree.map(lambda x: x if step == 0 else 0 * x, params)  # noqa: B023
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grad, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    nu = next(x for x in jax.tree.leaves(state[0]) if 0 < float(jnp.max(x)) < 0.01)
    np.testing.assert_allclose(nu, 0.001 * 0.999**200, rtol=1e-3)


@pytest.mark.long
def test_what_is_frozen_stays_and_has_no_state():
    task = AlbertForMaskedLM.init(
        TINY, jax.random.key(0), frozen=("embeddings", "attention/query"), weight_decay=0.5
    )
    before = dict(leaves(task))
    trainer = quiet(max_steps=2)
    after = dict(leaves(trainer.fit(task, DataLoader({"input_ids": rows(8)}, 4))))
    for name, array in before.items():
        frozen = "embeddings" in name or "attention/query" in name
        assert np.array_equal(array, after[name]) == frozen, name
    table = {row.path: row for row in task.recipe.table(task)}
    assert not table["albert/embeddings/words"].trained
    assert not table["albert/embeddings/words"].decays


def leaves(task):
    arrays = eqx.filter(task, eqx.is_inexact_array)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        yield leaf_path(path), np.asarray(leaf)


def test_the_table():
    task = tiny_albert.task()
    recipe = Recipe("lamb_reference", learning_rate=1e-3, frozen=("token_types",))
    found = {row.path: row for row in recipe.table(task)}
    assert set(found) == {name for name, _ in leaves(task)}
    for path, row in found.items():
        matrix = len(row.shape) > 1
        assert row.decays == row.adapts == (matrix and row.trained), path
    text = recipe.describe(task)
    assert len(text.splitlines()) == len(found) + 1
    (line,) = (line for line in text.splitlines() if "token_types" in line)
    assert line.split()[1:] == ["2×16", "no", "no", "frozen", "0"]
    (line,) = (line for line in text.splitlines() if "embeddings/words" in line)
    assert line.split()[1:] == ["40×16", "yes", "yes", "1.00e-03", "0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "`schedule='cosine'` is unknown; it is one of `linear`, `polyn"),
        ({"schedule": "polynomial"}, "falls to 0 at the end of the run. Say where that is"),
        ({"layer_decay": 0.0}, "`layer_decay=0.0` has to be above 0"),
        ({"batch_size": 0}, "`batch_size=0` has to be at least 1"),
        ({"unfreeze_every": -1}, "`unfreeze_every=-1` has to be at least 0"),
        ({"optimizer": "lamb_referense"}, "Did you mean `lamb_reference`"),
        ({"eps": 0.0}, "`eps=0.0` has to be above 0"),
        ({"learning_rate": float("inf")}, "`learning_rate=inf` has to be above 0, and finite"),
        ({"learning_rate": "1e-3"}, "`learning_rate='1e-3'` has to be a number"),
        ({"b1": -1.0}, "`b1=-1.0` has to be at least 0, and below 1"),
        ({"b2": 1.0}, "`b2=1.0` has to be at least 0, and below 1"),
        ({"optimizer": "adafactor", "b1": 0.9}, "`adafactor` has no `b1`"),
        ({"optimizer": "sgd", "b2": 0.9}, "`sgd` has no `b2`"),
        ({"power": 2.0}, "exponent of the schedule `polynomial`, but this is `schedule='linear'`"),
        ({"frozen": "embeddings"}, r"has to be a tuple of .*: `frozen=\('embeddings',\)`"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe(**options).check()


def test_muon_goes_without_cudnns_attention():
    """With which it fails on GPUs; what is asked for by name is taken anyway."""

    def attention(optimizer, asked):
        config = dataclasses.replace(TINY, attention=asked)
        return AlbertForMaskedLM.init(
            config, jax.random.key(0), optimizer=optimizer
        ).config.attention

    assert attention("muon", "auto") == "xla"
    assert attention("adamw", "auto") == "auto"
    assert attention("muon", "cudnn") == "cudnn"
