"""Flax modules in tasks, against the same modules in loops written by hand with Flax alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from jaxlightning import DataLoader, Mean, Precision, TaskModule, Trainer, TrainState
from jaxlightning._step import MicroBatches, TrainStep
from jaxlightning._task import trainable_spec
from jaxlightning.callbacks import ModelCheckpoint
from jaxlightning.flax import NNX, Linen

KEY = jax.random.key(0)
SAMPLE = jax.ShapeDtypeStruct((1, 4), jnp.float32)


@pytest.fixture(autouse=True)
def promotions_of_optax_and_flax():
    """Both mix dtypes and ranks freely, so the suite's strict mode is off here."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


FLOAT32 = Precision()


def batch(seed=0, rows=16):
    generator = np.random.default_rng(seed)
    x = generator.normal(5.0, 3.0, size=(rows, 4)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(generator.integers(0, 3, size=rows))}


def nll(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


class NNXModel(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.hidden(self.norm(x)))))

    def features(self, x):
        return nnx.relu(self.hidden(self.norm(x)))


class LinenModel(nn.Module):
    rate: float = 0.0

    def setup(self):
        self.norm = nn.BatchNorm(momentum=0.9)
        self.hidden = nn.Dense(8)
        self.dropout = nn.Dropout(self.rate)
        self.head = nn.Dense(3)

    def __call__(self, x, train: bool):
        x = self.features(x, train=train)
        return self.head(self.dropout(x, deterministic=not train))

    def features(self, x, train: bool):
        return nn.relu(self.hidden(self.norm(x, use_running_average=not train)))


class EquinoxModel(eqx.Module):
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch", momentum=0.9)
        self.head = eqx.nn.Linear(4, 3, key=key)

    def __call__(self, x, state):
        x, state = self.norm(x, state)
        return self.head(x), state


class FlaxTask(TaskModule):
    net: NNX | Linen

    def configure_optimizers(self):
        return optax.adamw(1e-2)

    def training_step(self, batch, *, key):
        logits, net = self.net(batch["x"], key=key)
        task = eqx.tree_at(lambda t: t.net, self, net)
        return Mean.over(nll(logits, batch["y"])), {}, task


class EquinoxTask(TaskModule):
    net: EquinoxModel
    state: eqx.nn.State

    def training_step(self, batch, *, key):
        run = jax.vmap(self.net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, state = run(batch["x"], self.state)
        task = eqx.tree_at(lambda t: t.state, self, state)
        return Mean.over(nll(logits, batch["y"])), {}, task


class HeadOnly(FlaxTask):
    def trainable(self):
        return eqx.tree_at(lambda t: t.net.params["hidden"], super().trainable(), False)


def nnx_task(rate=0.0, kind=FlaxTask):
    return kind(NNX(NNXModel(nnx.Rngs(0), rate)))


def linen_task(rate=0.0, kind=FlaxTask):
    return kind(Linen(LinenModel(rate), SAMPLE, key=KEY))


def equinox_task():
    return EquinoxTask(*eqx.nn.make_with_state(EquinoxModel)(KEY))


def running_mean(task):
    if isinstance(task, EquinoxTask):
        return task.state.get(task.net.norm.batch_state_index)[0]
    found = [
        x for x in jax.tree_util.tree_flatten_with_path(task.net.buffers)[0] if "mean" in str(x)
    ]
    return found[0][1]


def train(task, batches, tx, precision=FLOAT32):
    """The task and the optimizer's state after one step a batch."""
    spec = trainable_spec(task)
    tx = optax.with_extra_args_support(tx)
    opt_state = tx.init(eqx.filter(task, spec))
    state = TrainState(jnp.int32(0), jax.random.key(1), task, opt_state, {})
    step = eqx.filter_jit(TrainStep(spec, tx, precision))
    for each in batches:
        state, _ = step(state, each)
    return state.task, state.opt_state


@pytest.mark.parametrize("make", [equinox_task, nnx_task, linen_task])
def test_running_mean_moves_and_has_no_optimizer_slot(make):
    task = make()
    same = batch()
    expected = np.asarray(same["x"]).mean(0)
    before = np.asarray(running_mean(task))
    trained, opt_state = train(task, [same] * 60, optax.adam(1e-3))
    if not isinstance(task, EquinoxTask):
        np.testing.assert_array_equal(before, 0)
    np.testing.assert_allclose(running_mean(trained), expected, rtol=0.01)
    # Adam keeps two moments for every parameter and one count.
    parameters = {
        equinox_task: 2 + 2,  # The norm's scale and shift, the head's weight and bias.
        nnx_task: 2 + 2 + 2,
        linen_task: 2 + 2 + 2,
    }[make]
    assert len(jax.tree.leaves(opt_state)) == 2 * parameters + 1
    paths = [str(path) for path, _ in jax.tree_util.tree_flatten_with_path(opt_state)[0]]
    assert not any("state" in path.split("net")[-1] or "buffers" in path for path in paths)


def test_three_steps_of_nnx_equal_flaxs_own_optimizer():
    model = NNXModel(nnx.Rngs(0))
    batches = [batch(seed) for seed in range(3)]
    trained, _ = train(FlaxTask(NNX(model)), batches, optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(lambda model: nll(model(batch["x"]), batch["y"]).mean())(model)
        optimizer.update(model, grads)

    for each in batches:
        step(model, optimizer, each)
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, trained.net.params, expected)
    close(running_mean(trained), model.norm.mean.get_value())
    x = batches[0]["x"]
    close(trained.net.module()(x), model(x))


def test_three_steps_of_linen_equal_a_loop_by_hand():
    task = linen_task()
    batches = [batch(seed) for seed in range(3)]
    trained, _ = train(task, batches, optax.adamw(1e-2))
    model, tx = LinenModel(), optax.adamw(1e-2)
    params, stats = task.net.params, task.net.buffers["batch_stats"]
    opt_state = tx.init(params)

    def loss(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        logits, advanced = model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return nll(logits, batch["y"]).mean(), advanced["batch_stats"]

    @jax.jit
    def step(params, stats, opt_state, batch):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    for each in batches:
        params, stats, opt_state = step(params, stats, opt_state, each)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, trained.net.variables, {"params": params, "batch_stats": stats})


@pytest.mark.parametrize("make", [nnx_task, linen_task])
def test_frozen_parts_keep_their_bits(make):
    task = make(kind=HeadOnly)
    trained, opt_state = train(task, [batch()] * 3, optax.adamw(1e-2))
    before, after = task.net.params, trained.net.params
    jax.tree.map(np.testing.assert_array_equal, after["hidden"], before["hidden"])
    moved = (first := lambda p: jax.tree.leaves(p["head"])[1])(after) != first(before)
    assert bool(moved.all())
    assert len(jax.tree.leaves(opt_state)) == 2 * (2 + 2) + 1


@pytest.mark.parametrize("make", [equinox_task, nnx_task, linen_task])
def test_inference_uses_running_statistics_and_leaves_them(make):
    task, _ = train(make(), [batch()] * 30, optax.sgd(0.0))
    other = batch(seed=1)
    mode = eqx.nn.inference_mode(task)
    evaluate = eqx.filter_jit(lambda task, batch: task.training_step(batch, key=KEY))
    whole, _, after = evaluate(mode, other)
    np.testing.assert_array_equal(running_mean(after), running_mean(task))
    # With running statistics a row's loss does not depend on the rows beside it.
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], other) for i in range(16)]
    alone = [evaluate(mode, row)[0].compute() for row in rows]
    np.testing.assert_allclose(whole.compute(), np.mean(alone), rtol=1e-5)
    in_training = evaluate(eqx.nn.inference_mode(mode, value=False), other)[0]
    assert abs(in_training.compute() - whole.compute()) > 1e-4


@pytest.mark.parametrize("make", [nnx_task, linen_task])
def test_inference_normalises_as_the_formula_says(make):
    task, _ = train(make(), [batch()] * 30, optax.sgd(0.0))
    net = eqx.nn.inference_mode(task).net
    x = np.asarray(batch(seed=1)["x"])
    stats = net.buffers["norm"] if "norm" in net.buffers else net.buffers["batch_stats"]["norm"]
    normal = (x - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    hidden = net.params["hidden"]
    expected = np.maximum(normal @ np.asarray(hidden["kernel"]) + np.asarray(hidden["bias"]), 0)
    features, _ = net(jnp.asarray(x), method="features")
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [nnx_task, linen_task])
def test_dropout_is_a_function_of_the_key(make):
    net = make(rate=0.5).net
    x = batch()["x"]
    first, advanced = net(x, key=jax.random.key(1))
    # Nothing is counted: the advanced module draws the same from the same key, and legacy keys
    # draw what typed ones do.
    np.testing.assert_array_equal(advanced(x, key=jax.random.key(1))[0], first)
    np.testing.assert_array_equal(net(x, key=jax.random.PRNGKey(1))[0], first)
    assert not np.array_equal(net(x, key=jax.random.key(2))[0], first)


def test_layers_that_share_a_stream_draw_differently():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Dropout(0.5, rngs=rngs)
            self.b = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.a(x) > 0, self.b(x) > 0

    (a, b), _ = NNX(Twice(nnx.Rngs(0)))(jnp.ones(1000), key=KEY)
    assert 400 < int((a == b).sum()) < 600


def test_streams_split_over_layers_that_are_scanned():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return nnx.Dropout(0.5, rngs=rngs)

            self.layers = make(rngs)

        def __call__(self, x):
            run = nnx.scan(lambda layer, x: (x, layer(x) > 0), in_axes=(0, nnx.Carry))
            return run(self.layers, x)[1]

    kept, _ = NNX(Deep(nnx.Rngs(0)))(jnp.ones(1000), key=KEY)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert 400 < int((kept[i] == kept[j]).sum()) < 600


@pytest.mark.parametrize("make", [nnx_task, linen_task])
def test_randomness_without_a_key_is_an_error(make):
    net = make(rate=0.5).net
    x = batch()["x"]
    with pytest.raises(ValueError, match=r"Model.__call__` draws random numbers.*key=key\)`"):
        net(x)
    eqx.nn.inference_mode(net)(x)
    make(rate=0.0).net(x)


def test_what_a_call_changes_has_to_be_a_variable():
    class Counts(nnx.Module):
        def __init__(self, rngs):
            self.calls = 0
            self.seen = nnx.Variable(jnp.array(0))

        def __call__(self, x):
            self.seen[...] += x.shape[0]
            return x

        def wrong(self, x):
            self.calls += 1
            return x

    net = NNX(Counts(nnx.Rngs(0)))
    x, net = net(jnp.ones((3, 2)))
    assert int(net(x)[1].buffers["seen"]) == 6
    with pytest.raises(ValueError, match=r"Counts.wrong` changed an attribute.*nnx\.Variable"):
        net(x, method="wrong")


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_sown_intermediates_are_dropped():
    class Sows(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "x", x)
            return x

    net = NNX(Sows())
    _, advanced = net(jnp.ones(2))
    assert jax.tree.structure(advanced) == jax.tree.structure(net)

    class LinenSows(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            return nn.Dense(2)(x)

    net = Linen(LinenSows(), SAMPLE, key=KEY)
    assert net.buffers == {}
    assert jax.tree.structure(net(jnp.ones((1, 4)))[1]) == jax.tree.structure(net)


def test_shared_parameters_of_nnx_stay_one_leaf():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    net = NNX(Tied(nnx.Rngs(0)))
    assert len(jax.tree.leaves(net.params)) == 2
    module = net.module()
    assert module.a is module.b


def test_layers_never_told_their_mode_train():
    attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
    net = NNX(attention)
    x = jax.random.normal(KEY, (1, 5, 8))
    assert not np.array_equal(net(x, key=jax.random.key(1))[0], net(x, key=jax.random.key(2))[0])
    net = eqx.nn.inference_mode(net)
    np.testing.assert_array_equal(
        net(x, key=jax.random.key(1))[0], net(x, key=jax.random.key(2))[0]
    )


class ByArgument(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool):
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=deterministic)


class ByField(nn.Module):
    training: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.training)(nn.Dense(4)(x))


@pytest.mark.parametrize("model", [ByArgument(), ByField(), LinenModel(0.5)])
def test_linen_modules_are_told_whether_to_train(model):
    net = Linen(model, SAMPLE, key=KEY)
    x = batch()["x"]
    one, two = jax.random.split(KEY)
    assert not np.array_equal(net(x, key=one)[0], net(x, key=two)[0])
    mode = eqx.nn.inference_mode(net)
    np.testing.assert_array_equal(mode(x, key=one)[0], mode(x, key=two)[0])


def test_what_the_call_says_about_the_mode_wins():
    net = Linen(ByArgument(), SAMPLE, key=KEY)
    x = batch()["x"]
    expected, _ = eqx.nn.inference_mode(net)(x)
    np.testing.assert_array_equal(net(x, deterministic=True)[0], expected)


def test_a_linen_module_that_holds_a_list():
    net = Linen(nn.Sequential([nn.Dense(3), nn.relu]), SAMPLE, key=KEY)
    x = batch()["x"]
    dense = net.params["layers_0"]
    expected = np.maximum(
        np.asarray(x) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]), 0
    )
    run = eqx.filter_jit(lambda net, x: net(x)[0])
    np.testing.assert_allclose(run(net, x), expected, rtol=1e-5)
    again = Linen(nn.Sequential([nn.Dense(3), nn.relu]), SAMPLE, key=KEY)
    assert jax.tree.structure(again) == jax.tree.structure(net)
    other = Linen(nn.Sequential([nn.Dense(3), nn.gelu]), SAMPLE, key=KEY)
    assert jax.tree.structure(other) != jax.tree.structure(net)


def test_linen_variables_are_those_of_init():
    # The key is split as the adapter does, so that the comparison is exact.
    params, dropout = jax.random.split(KEY)
    rngs = {"params": params, "dropout": dropout}
    expected = LinenModel().init(rngs, jnp.zeros((1, 4)), train=True)
    net = Linen(LinenModel(), SAMPLE, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, net.variables, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda key: NNX(NNXModel(nnx.Rngs(key))),
        lambda key: Linen(LinenModel(), SAMPLE, key=key),
    ],
)
def test_made_inside_jit_and_in_the_abstract(make):
    eager, jitted = make(KEY), eqx.filter_jit(make)(KEY)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager.params, jitted.params
    )
    abstract = jax.tree.leaves(eqx.filter_eval_shape(make, KEY))
    assert [np.shape(x) for x in abstract] == [np.shape(x) for x in jax.tree.leaves(eager)]


@pytest.mark.parametrize("make", [nnx_task, linen_task])
def test_buffers_stay_float32_in_mixed_precision(make):
    precision = Precision.named("bf16-mixed")
    trained, _ = train(make(), [batch()] * 5, optax.adam(1e-3), precision)
    mean = running_mean(trained)
    assert mean.dtype == jnp.float32
    x = np.asarray(batch()["x"]).mean(0)
    np.testing.assert_allclose(mean, x * (1 - 0.9**5), rtol=0.02)


@pytest.mark.parametrize("make", [nnx_task, linen_task])
def test_micro_batches_advance_buffers_one_by_one(make):
    parts = [batch(seed) for seed in range(3)]
    trained, _ = train(make(), [MicroBatches(parts)], optax.sgd(0.0))
    one_by_one, _ = train(make(), parts, optax.sgd(0.0))
    np.testing.assert_allclose(running_mean(trained), running_mean(one_by_one), rtol=1e-5)


@pytest.mark.parametrize("make", [nnx_task, linen_task])
def test_a_resumed_fit_is_the_uninterrupted_one(make, tmp_path):
    loader = DataLoader(jax.tree.map(np.asarray, batch(rows=32)), batch_size=16, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)

    def trainer(epochs, folder):
        keep = ModelCheckpoint(save_last=True)
        return Trainer(
            max_epochs=epochs, callbacks=keep, default_root_dir=folder, devices=1, **quiet
        )

    straight = trainer(2, tmp_path / "straight").fit(make(rate=0.5), loader)
    trainer(1, tmp_path / "cut").fit(make(rate=0.5), loader)
    resumed = trainer(2, tmp_path / "cut").fit(make(rate=0.5), loader, resume="auto")
    jax.tree.map(np.testing.assert_array_equal, resumed.net.params, straight.net.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.net.buffers, straight.net.buffers)
    assert np.abs(running_mean(resumed)).min() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NNX(NNXModel), "`NNX` takes a `flax.nnx.Module`, but got the class `NNXModel`"),
        (lambda: NNX(LinenModel()), "got a `LinenModel`.*for a Linen module, use `Linen`"),
        (
            lambda: Linen(NNXModel(nnx.Rngs(0)), SAMPLE, key=KEY),
            "`Linen` takes a `flax.linen.Module`, but got a `NNXModel`.*use `NNX`",
        ),
    ],
)
def test_other_things_than_flax_modules_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()
