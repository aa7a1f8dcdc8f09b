"""A configuration as JSON values: equal where it was configured alike, in any process."""

import dataclasses
import enum
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader, _configuration, _fit
from jaxlightning._checkpoint_manifest import plain
from jaxlightning._configuration import described, differences
from jaxlightning._optim import per_field
from jaxlightning.callbacks import (
    ExponentialMovingAverage,
    GradientClipping,
    LearningRateSchedule,
    ModelCheckpoint,
    ReduceLROnPlateau,
)

ROOT = Path(__file__).resolve().parents[1]


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


class Rate:
    def __init__(self, rate=0.1):
        self._rate = rate

    def __call__(self, count):
        return self._rate


class Slower(Rate):
    pass


class Plain:
    def method(self): ...

    @classmethod
    def kind(cls): ...


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    size: int


def function(x, scale=2, *, axis=None, shift=0):
    return x


def closing(value):
    def inner():
        return value

    return inner


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            [1, (2.5, None), {"a": np.float32(0.5), 3: True}],
            [1, [2.5, None], {"a": 0.5, "3": True}],
        ),
        (float("nan"), "nan"),
        (complex(1, 2), "(1+2j)"),
        (slice(1, 2), "slice(1, 2, None)"),
        (Color.RED, "Color.RED"),
        (Level.LOW, "Level.LOW"),
        (frozenset({"b", "a", 3}), ["a", "b", 3]),
        (int, "int"),
        (len, "len"),
        (np.exp, "exp"),
        (jnp.add, "add"),
        (jnp.exp, "exp"),
        (jax.nn.relu, "relu"),
        (jax.nn.gelu, {"gelu": {"approximate": True}}),
        (jnp.bfloat16, "bfloat16"),
        (np.dtype("int8"), "int8"),
        (jnp.dtype(jnp.bfloat16), "bfloat16"),
        (json, "json"),
        (object(), "object"),
        (function, {"function": {"scale": 2, "shift": 0}}),
        (jax.jit(function), {"function": {"scale": 2, "shift": 0}}),
        (eqx.filter_jit(function), {"function": {"scale": 2, "shift": 0}}),
        (functools.lru_cache(function), {"function": {"scale": 2, "shift": 0}}),
        (functools.partial(function, 1, scale=3), {"function": {"scale": 3, "shift": 0, "0": 1}}),
        (functools.partial(np.exp, 1), {"exp": {"0": 1}}),
        (closing(3), {"closing.inner": {"value": 3}}),
        (Rate(0.2), {"Rate": {"_rate": 0.2}}),
        (Rate(0.2).__call__, {"Rate.__call__": {"_rate": 0.2}}),
        (Slower(0.2).__call__, {"Rate.__call__": {"Slower": {"_rate": 0.2}}}),
        (Plain().method, "Plain.method"),
        (Plain.kind, "Plain.kind"),
        (Slotted(3), {"Slotted": {"size": 3}}),
        (PartitionSpec("data", None), {"PartitionSpec": ["data", None]}),
        (jax.ShapeDtypeStruct((2, 3), jnp.int8), "int8[2, 3]"),
        (jax.eval_shape(lambda: jax.random.key(0)), "key<fry>[]"),
        (Path("a/b"), "a/b"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values(value, expected):
    assert described(value) == expected
    json.dumps(described(value))


@pytest.mark.parametrize(
    ("one", "other", "start"),
    [
        (b"xy", b"xz", "bytes of 2 "),
        ("x" * 200, "y" * 200, "str of 200 "),
        (list(range(1000)), list(range(1, 1001)), "list of 1000 "),
        (dict.fromkeys(range(200)), dict.fromkeys(range(1, 201)), "dict of 200 "),
        (set(range(200)), set(range(1, 201)), "set of 200 "),
        (np.arange(6).reshape(2, 3), np.arange(6, 0, -1).reshape(2, 3), "int64[2, 3] "),
        (np.array(["a", 1], object), np.array(["a", 2], object), "object[2] "),
        (jnp.zeros(3), jnp.ones(3), "float32[3] "),
        (jax.random.key(1), jax.random.key(2), "key<fry>[] "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_long_has_a_checksum(one, other, start):
    assert described(one).startswith(start)
    assert described(one) != described(other)


def test_long_lists_of_parts_are_told_part_by_part():
    """The graph of a Flax module is one list of hundreds."""
    parts = [[f"layer {i}", {"size": i}] for i in range(300)]
    other = [*parts[:200], ["layer 200", {"size": 0}], *parts[201:]]
    assert differences({"x": described(parts)}, {"x": described(other)}) == [
        "x: 200: 1: size: 200 in the checkpoint, 0 now"
    ]
    many = [[i, {"size": "x" * 90}] for i in range(2000)]
    assert described(many).startswith("list of 2000 ")


def test_a_sharding_is_told_by_axes_and_not_by_devices():
    """A run may go on with more or fewer: that is warned of."""
    spec = PartitionSpec("data")
    two, four = (jax.make_mesh((n,), ("data",)) for n in (2, 4))
    found = described(NamedSharding(two, spec))
    assert found == described(NamedSharding(four, spec))
    assert found != described(NamedSharding(four, PartitionSpec()))
    model = NamedSharding(jax.make_mesh((2,), ("model",)), PartitionSpec("model"))
    assert found == {"NamedSharding": [{"Mesh": ["data"]}, {"PartitionSpec": ["data"]}]}
    assert described(model) != found


def test_keys_are_told_as_values_are():
    """Not by `str`, which has addresses in it."""
    table = {jnp.float32: 1, len: 2, (lambda: 0): 3, (lambda: 1): 4, object(): 5, (1, "a"): 6}
    name = "test_keys_are_told_as_values_are.<lambda>"
    assert described(table) == {
        "float32": 1, "len": 2, name: 3, f"{name} 2": 4, "object": 5, '[1, "a"]': 6
    }  # fmt: skip


def test_nothing_of_the_users_is_run():
    class Touchy:
        __slots__ = ("__dict__", "absent", "slot")

        def __init__(self):
            self.slot, self.own = 1, 2

        def __repr__(self):
            raise AssertionError("called")

        __str__ = __hash__ = __eq__ = __len__ = __iter__ = __getattr__ = __call__ = __repr__

        @property
        def lazy(self):
            raise AssertionError("called")

        @functools.cached_property
        def derived(self):
            return 3

    touchy = Touchy()
    before = described(touchy)
    assert before == {"test_nothing_of_the_users_is_run.<locals>.Touchy": {"slot": 1, "own": 2}}
    assert touchy.derived == 3
    assert described(touchy) == before


def test_circles_and_graphs_end():
    looped: list = [1]
    looped.append(looped)
    assert described(looped) == [1, "..."]
    nodes = [SimpleNamespace(number=i) for i in range(12)]
    for node in nodes:
        node.others = [other for other in nodes if other is not node]
    assert len(json.dumps(described(nodes[0]))) < 3_000_000
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    assert "..." in json.dumps(described(deep))
    held = None
    for _ in range(100):
        held = SimpleNamespace(held=functools.partial(closing(held), [held]))
    assert "..." in json.dumps(plain({"fixed": {"task": described(held)}}))
    assert described(list(range(10**6))).startswith("list of 1000000 ")


def test_a_trainer_that_is_held_is_not_looked_into():
    """Its attributes are those of one run."""
    trainer = quiet(max_epochs=1)
    assert described(closing(trainer)) == {"closing.inner": {"value": "Trainer"}}
    callback = GradientClipping(1.0)
    assert described(callback) == "GradientClipping"


# Optimizers


def changed(one, other):
    return differences({"optimizer": described(one)}, {"optimizer": described(other)})


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda x: optax.MultiSteps(optax.adam(x), 2), "_opt: 1: scale.update_fn: step_size: -"),
        (
            lambda x: optax.MultiSteps(optax.adam(x), 2).gradient_transformation(),
            "MultiSteps.update: _opt: 1: scale.update_fn: step_size: -",
        ),
        (lambda x: optax.adam(Rate(x)), "learning_rate: Rate: _rate: "),
        (lambda x: optax.adam(Rate(x).__call__), "learning_rate: Rate.__call__: _rate: "),
        (lambda x: optax.adam(jax.jit(Rate(x))), "learning_rate: Rate: _rate: "),
        (
            lambda x: optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(x)),
            "optimizer: 1: inject_hyperparams.wrapped_transform.update_fn: numeric_hps: ",
        ),
        (
            lambda x: optax.with_extra_args_support(optax.sgd(x)),
            "optimizer: 1: scale.update_fn: step_size: -",
        ),
        (
            lambda x: per_field({"net": optax.sgd(x)}),
            "per_field.update: txs: net: 1: scale.update_fn: step_size: -",
        ),
    ],
)
def test_another_rate_is_noticed(make, line):
    found = changed(make(0.1), make(0.2))[-1]  # twice where jaxtyping holds a function twice
    assert line in found
    assert found.endswith(("0.1 in the checkpoint, 0.2 now", "0.1 in the checkpoint, -0.2 now"))
    assert not changed(make(0.1), make(0.1))


class Scheduled(Classifier):
    """Its schedule holds the task, and with it the parameters."""

    rate: float = eqx.field(static=True)
    table: np.ndarray

    def __init__(self, seed=0, rate=0.01, table=(1, 2)):
        super().__init__()
        keys = iter(jax.random.split(jax.random.key(seed), 8))
        again = lambda x: jax.random.normal(next(keys), x.shape)
        arrays, static = eqx.partition(self.net, eqx.is_array)
        self.net = eqx.combine(jax.tree.map(again, arrays), static)
        self.rate, self.table = rate, np.asarray(table)

    def schedule(self, count):
        return self.rate * 0.9**count

    def configure_optimizers(self):
        return optax.adam(lambda count: self.schedule(count))


def test_the_parameters_a_schedule_closes_over_are_no_configuration(monkeypatch):
    def refuse(*_):
        raise AssertionError("read")

    of = lambda task: task.configure_optimizers()
    base = Scheduled()
    (line,) = changed(of(base), of(Scheduled(rate=0.02)))
    assert "self: Scheduled: rate: 0.01 in the checkpoint, 0.02 now" in line
    (line,) = changed(of(base), of(Scheduled(table=(1, 3))))
    assert "self: Scheduled: table: int64[2] " in line
    plain = eqx.tree_at(lambda task: task.table, base, None)
    other = eqx.tree_at(lambda task: task.table, Scheduled(seed=1), None)
    monkeypatch.setattr(_configuration, "sampled", refuse)
    assert not changed(of(plain), of(other))
    assert not changed(optax.adam(plain.schedule), optax.adam(other.schedule))
    assert not changed(optax.adam(jax.jit(plain.schedule)), optax.adam(jax.jit(other.schedule)))
    trees = [jax.tree_util.Partial(lambda s, c: 0.1, task) for task in (plain, other)]
    assert not changed(*trees)
    # Nor is what is large read from the device.
    large = jnp.zeros(2**19)
    assert described(closing(large)) == {"closing.inner": {"value": "float32[524288]"}}


def test_arrays_that_are_no_leaves_of_a_module_count():
    class Held(eqx.Module):
        leaf: object
        fixed: object = eqx.field(static=True)

    of = lambda leaf, fixed: described(Held(leaf, fixed))
    one, two = jnp.zeros(2), jnp.ones(2)
    assert of(one, None) == of({"a": [one]}["a"][0], None) == of(two, None)
    assert of([one], None) == of([two], None)
    assert of(closing(one), None) != of(closing(two), None)
    assert of(SimpleNamespace(x=one), None) != of(SimpleNamespace(x=two), None)
    assert of(None, closing(one)) != of(None, closing(two))
    assert of(np.zeros(2), None) != of(np.ones(2), None)


# In a run


def saving(folder, **arguments):
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1)
    return quiet(**{"enable_checkpointing": None, "callbacks": saves, "max_epochs": 1} | arguments)


def loader():
    return DataLoader(rows(), 8, shuffle=True)


class Counting(Scheduled):
    """Its schedule holds a list that tracing appends to."""

    def configure_optimizers(self):
        calls = []

        def schedule(count):
            calls.append(1)
            return self.rate * 0.9**count

        return optax.adam(schedule)


def test_another_seed_and_a_schedule_that_was_traced_go_on(tmp_path, monkeypatch):
    described_now = []

    def counted(value):
        described_now.append(type(value).__name__)
        return described(value)

    monkeypatch.setattr(_fit, "described", counted)
    saving(tmp_path).fit(Counting(seed=0), loader())
    assert len(described_now) == 2  # the task and the optimizer, for several checkpoints
    longer = saving(tmp_path, max_epochs=2)
    longer.fit(Counting(seed=1), loader(), ckpt_path="last")
    assert longer.global_step == 10
    with pytest.raises(ValueError, match=r"task: Counting: rate: 0\.01 in the .*, 0\.02 now"):
        saving(tmp_path).fit(Counting(rate=0.02), loader(), ckpt_path="last")


def test_describing_albert_reads_no_array_and_is_short(monkeypatch):
    from albert_task import AlbertConfig, AlbertForMaskedLM

    def refuse(*_):
        raise AssertionError("read")

    monkeypatch.setattr(_configuration, "sampled", refuse)
    task = jax.eval_shape(
        lambda key: AlbertForMaskedLM.init(AlbertConfig(), key), jax.random.key(0)
    )
    assert len(json.dumps(described(task))) < 20_000


# In two processes


def everything():
    """Descriptions of what is made here, anew in each process."""
    from flax import linen, nnx

    from jaxlightning.flax import NNX, Linen

    task = Classifier()
    trained = eqx.filter(task, eqx.is_inexact_array)
    cosine = optax.cosine_decay_schedule(1e-3, 100)
    by_rank = lambda tree: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", tree)
    is_matrix = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    parts = {"a": optax.adam(cosine), "b": optax.set_to_zero()}
    sets = frozenset({"alpha", "beta", "gamma", Color.RED, 3})
    inject = optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "eps"))
    optimizers = {
        "multi_transform": optax.multi_transform(parts, by_rank),
        "partition": optax.partition(parts, by_rank(trained)),
        "inject": optax.inject_hyperparams(optax.adamw)(cosine, weight_decay=0.1),
        "inject static": inject(1e-3),
        "mask": optax.adamw(cosine, mask=is_matrix),
        "mask tree": optax.adamw(1e-3, mask=is_matrix(trained)),
        "muon": optax.contrib.muon(1e-3),
        "adafactor": optax.adafactor(1e-3),
        "lamb": optax.lamb(1e-3),
        "schedule_free": optax.contrib.schedule_free_adamw(1e-3),
        "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
        "multi steps": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
        "jitted": optax.adam(jax.jit(lambda count: 1e-3 * jnp.exp(-count / 10.0))),
        "closing": optax.adam(lambda count: len(sets) * len(str(task)) * Rate(0.1)(count)),
    }
    trainer = SimpleNamespace(fast_dev_run=False, estimated_stepping_batches=100)
    for callback in (
        LearningRateSchedule(cosine),
        LearningRateSchedule("one_cycle", warmup=5),
        ExponentialMovingAverage(),
        GradientClipping(1.0),
        ReduceLROnPlateau("train/loss"),
    ):
        made = callback.wrap_optimizer(trainer, optax.adam(1e-3))
        optimizers[f"{type(callback).__name__} {len(optimizers)}"] = made

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 8, rngs=rngs, kernel_init=nnx.initializers.normal(0.02))
            self.bn, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    class Module(linen.Module):
        names: frozenset = sets

        @linen.compact
        def __call__(self, x, train=True):
            x = linen.Dense(8, kernel_init=linen.initializers.normal(0.02))(x)
            return linen.BatchNorm(use_running_average=not train)(x)

    norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
    tasks = {
        "mlp": task,
        "batch norm": (norm, eqx.nn.State(norm)),
        "nnx": NNX(Model(nnx.Rngs(0))),
        "linen": Linen(Module(), np.ones((1, 4), np.float32), key=jax.random.key(0)),
    }
    transforms = {
        "object": SimpleNamespace(sets=sets, function=len, rng=np.random.default_rng(0)),
        "partial": functools.partial(function, scale=sets, shift=lambda x: x),
        "keys": {jnp.float32: 1, len: 2, (lambda x: x): 3, object(): 4, sets: 5},
        "values": (sets, Color.RED, np.dtype("int8"), jax.nn.gelu, complex(1, 2), b"xx"),
        "module": eqx.Module,
    }
    static = {name: eqx.filter(tree, eqx.is_array, inverse=True) for name, tree in tasks.items()}
    found = {
        name: described(optax.with_extra_args_support(tx)) for name, tx in optimizers.items()
    } | {name: described(value) for name, value in (static | tasks | transforms).items()}
    return found | {"loader": DataLoader(rows(), 8, transform=transforms["partial"]).fingerprint()}


SCRIPT = """
import json, sys
sys.path.insert(0, "tests")
from test_configuration import everything
print(json.dumps(everything(), indent=1), end="")
"""


@pytest.mark.long
def test_processes_with_other_hash_seeds_agree():
    pytest.importorskip("flax")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "77")
    ]
    (one, error), (other, _) = (process.communicate(timeout=240) for process in processes)
    assert one, error
    assert one == other
    assert "0x" not in one
    assert '"..."' not in one
