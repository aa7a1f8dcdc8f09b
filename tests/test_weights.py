"""Tasks out of checkpoints: rebuilt from hyper-parameters, filled whole, or filled in part."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks import CLASSES, FEATURES, Classifier, assert_same, quiet, rows

from jaxlightning import (
    CheckpointError,
    DataLoader,
    Mean,
    TaskModule,
    buffer,
    export_weights,
    load_weights,
    warm_start,
)
from jaxlightning._checkpoint import CheckpointStore
from jaxlightning.callbacks import ExponentialMovingAverage

DATA = rows(16)


class Net(TaskModule):
    """A task whose initialiser counts its runs, with a buffer and a tuple of sizes."""

    layers: list[eqx.nn.Linear]
    sizes: tuple[int, ...] = eqx.field(static=True)
    lr: float = eqx.field(static=True)
    seen: jax.Array = buffer()

    runs = 0

    def __init__(self, sizes, key, lr=0.1):
        Net.runs += 1
        keys = jax.random.split(key, len(sizes) + 1)
        widths = (FEATURES, *sizes, CLASSES)
        self.layers = [
            eqx.nn.Linear(a, b, key=k)
            for a, b, k in zip(widths[:-1], widths[1:], keys, strict=True)
        ]
        self.seen = jnp.int32(0)
        self.sizes = sizes
        self.lr = lr

    def training_step(self, batch, *, key):
        x = batch["x"]
        for layer in self.layers:
            x = jnp.tanh(jax.vmap(layer)(x))
        nll = optax.softmax_cross_entropy_with_integer_labels(x, batch["y"])
        return Mean.over(nll), {}, eqx.tree_at(lambda t: t.seen, self, self.seen + 1)

    def configure_optimizers(self):
        return optax.sgd(self.lr)


def trained(folder, task, **arguments):
    """A task after three steps, and the folder of its weights."""
    trainer = quiet(max_steps=3, **arguments)
    task = trainer.fit(task, DataLoader(DATA, 4))
    trainer.save_checkpoint(folder / "whole")
    trainer.save_checkpoint(folder / "weights", weights_only=True)
    return task


def bits(task):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(task, eqx.is_array))]


# Rebuilding


@pytest.mark.parametrize("name", ["whole", "weights"])
def test_a_task_is_rebuilt_and_its_initialiser_is_traced_once(tmp_path, name):
    task = trained(tmp_path, Net((4, 5), jax.random.key(7)))
    Net.runs = 0
    loaded = Net.load_from_checkpoint(tmp_path / name)
    assert Net.runs == 1
    assert loaded.sizes == (4, 5)
    assert int(loaded.seen) == 3
    assert bits(loaded) == bits(task)
    assert jax.tree.structure(loaded) == jax.tree.structure(task)


def test_hyper_parameters_may_be_changed(tmp_path):
    task = trained(tmp_path, Net((4,), jax.random.key(7)))
    loaded = Net.load_from_checkpoint(tmp_path / "whole", lr=0.5)
    assert loaded.lr == 0.5
    assert bits(loaded) == bits(task)
    with pytest.raises(ValueError, match=r"layers/1/weight: \(3, 4\) in the checkpoint, \(3, 6\)"):
        Net.load_from_checkpoint(tmp_path / "whole", sizes=(6,))


def test_a_hyper_parameter_may_be_called_as_arguments_are(tmp_path):
    class Reads(Net):
        path: str = eqx.field(static=True, default="here")
        make: str = eqx.field(static=True, default="old")

        def __init__(self, sizes, key, path="here", make="old"):
            super().__init__(sizes, key)
            self.path, self.make = path, make

    task = trained(tmp_path, Reads((4,), jax.random.key(7)))
    where = tmp_path / "whole"
    loaded = Reads.load_from_checkpoint(where, path="there")
    assert (loaded.path, loaded.make) == ("there", "old")
    loaded = Reads.load_from_checkpoint(
        where, make=lambda given, key: Reads(given["sizes"], key, given["path"], "new")
    )
    assert (loaded.path, loaded.make) == ("here", "new")
    assert bits(loaded) == bits(task)


@pytest.mark.parametrize("hyperparameters", [{}, {"hyperparameters": [1]}])
def test_a_checkpoint_without_hyper_parameters(tmp_path, hyperparameters):
    with CheckpointStore(tmp_path) as store:
        path = store.save(1, {"w": np.zeros(2)}, {"task": "Net", **hyperparameters}, wait=True)
    with pytest.raises(CheckpointError, match=r"holds no hyper-parameters.*`load_weights\('/"):
        Net.load_from_checkpoint(path)


def test_the_average_that_was_evaluated_is_what_is_loaded(tmp_path):
    average = ExponentialMovingAverage(0.5)
    task = trained(tmp_path, Net((4,), jax.random.key(7)), callbacks=average)
    for name in ("whole", "weights"):
        assert bits(Net.load_from_checkpoint(tmp_path / name)) == bits(task)


def test_numbers_that_differ_are_named_and_can_be_given(tmp_path):
    task = trained(tmp_path, Classifier(dropout=0.25))
    with pytest.raises(ValueError, match=r"dropout/p: 0\.25 in the checkpoint, 0\.0 here") as error:
        Classifier.load_from_checkpoint(tmp_path / "whole")
    assert "`Classifier.load_from_checkpoint(path, name=value)`" in str(error.value)
    assert_same(Classifier.load_from_checkpoint(tmp_path / "whole", dropout=0.25), task)


class Given(TaskModule):
    """A task that is called with its network."""

    net: eqx.nn.MLP
    lr: float = eqx.field(static=True, default=0.1)

    training_step = Classifier.training_step
    configure_optimizers = Classifier.configure_optimizers

    def logits(self, batch, key):
        return jax.vmap(self.net)(batch["x"])


def mlp(key):
    return eqx.nn.MLP(FEATURES, CLASSES, 8, 1, key=key)


def test_a_task_that_needs_more_than_numbers_says_so_and_takes_a_function(tmp_path):
    task = trained(tmp_path, Given(mlp(jax.random.key(1)), lr=0.2))
    with pytest.raises(TypeError, match=r"has to be called with `net`.*load_from_checkpoint\(path"):
        Given.load_from_checkpoint(tmp_path / "whole")
    loaded = Given.load_from_checkpoint(
        tmp_path / "whole", make=lambda given, key: Given(mlp(key), **given)
    )
    assert loaded.lr == 0.2
    assert_same(loaded, task)


def test_the_checkpoint_of_another_class_is_refused(tmp_path):
    trained(tmp_path, Net((4,), jax.random.key(7)))
    with pytest.raises(ValueError, match=r"is of a `Net`, and this is `Classifier\.load_from"):
        Classifier.load_from_checkpoint(tmp_path / "whole")


@pytest.mark.long
def test_albert_is_rebuilt(tmp_path):
    from albert_task import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig.preset("tiny", num_hidden_groups=2)
    task = AlbertForMaskedLM.init(config, jax.random.key(0), learning_rate=0.1, mask_rate=0.2)
    trainer = quiet(max_steps=1)
    tokens = np.arange(5, 69, dtype=np.int32).reshape(4, 16)
    task = trainer.fit(task, DataLoader({"input_ids": tokens}, 4))
    trainer.save_checkpoint(tmp_path / "albert")
    loaded = AlbertForMaskedLM.load_from_checkpoint(tmp_path / "albert")
    assert (loaded.config, loaded.mask_rate, loaded.recipe) == (config, 0.2, task.recipe)
    assert loaded.special == task.special
    assert bits(loaded) == bits(task)


# Exported files


def test_an_exported_file_is_loaded(tmp_path):
    task = trained(tmp_path, Net((4,), jax.random.key(7)))
    export_weights(tmp_path / "w.safetensors", task)
    assert bits(load_weights(tmp_path / "w.safetensors", Net((4,), jax.random.key(1)))) == bits(
        task
    )


def test_narrow_floats_are_loaded_from_a_file(tmp_path):
    task = eqx.tree_at(
        lambda t: t.layers[0].weight,
        Net((4,), jax.random.key(7)),
        replace_fn=lambda w: w.astype(jnp.float8_e4m3fn),
    )
    export_weights(tmp_path / "w.safetensors", task)
    assert bits(load_weights(tmp_path / "w.safetensors", task)) == bits(task)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file/w", "file/more/w"):
        with pytest.raises(OSError, match=r"The folder `.*` can't be made .* so `w` can't be"):
            export_weights(tmp_path / path, Net((4,), jax.random.key(7)))


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "w").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(Exception, match=r"is no safetensors file .* `export_weights` has written"):
        load_weights(tmp_path / "w", Net((4,), jax.random.key(7)))


def test_names_that_read_alike_are_told_apart(tmp_path):
    class Named(Classifier):
        parts: dict

        def __init__(self):
            super().__init__()
            self.parts = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}

    task = trained(tmp_path, Named())
    other = jax.tree.map(lambda x: x + 1 if eqx.is_inexact_array(x) else x, Named())
    for name in ("whole", "weights"):
        assert_same(load_weights(tmp_path / name, other), task)


# Parts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return folder / "whole", trained(folder, Net((4, 5), jax.random.key(7)))


def weights(task):
    return [layer.weight for layer in task.layers]


def test_a_part_is_taken_and_what_was_is_said(source, capsys):
    path, task = source
    fresh = Net((4, 9), jax.random.key(1))
    warm = warm_start(path, fresh, include="^layers/0/", exclude="bias$")
    assert (weights(warm)[0] == weights(task)[0]).all()
    assert (warm.layers[0].bias == fresh.layers[0].bias).all()
    assert (weights(warm)[2] == weights(fresh)[2]).all()
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"Warm start from `{path}`:",
        "  1 taken",
        "    layers/0/weight",
        "  6 left in the checkpoint",
        "  6 of the task's own",
        "    layers/0/bias",
        "    layers/1/bias",
        "    layers/1/weight",
        "    layers/2/bias",
        "    layers/2/weight",
        "    seen",
    ]


def test_what_does_not_fit_has_to_be_excluded(source):
    path, _ = source
    fresh = Net((4, 9), jax.random.key(1))
    with pytest.raises(ValueError, match=r"layers/1/weight: \(5, 4\) in the checkpoint") as error:
        warm_start(path, fresh)
    assert "Leave them out: `exclude=...`" in str(error.value)
    assert "layers/0" not in str(error.value)
    warm = warm_start(path, fresh, exclude="layers/[12]/")
    assert int(warm.seen) == 3


def test_paths_are_renamed_in_order(source, capsys):
    path, task = source
    fresh = Net((4, 5), jax.random.key(1))
    swap = {"^layers/0/": "was-0/", "^layers/(.)/": r"layers/other-\1/", "^was-0/": "layers/0/"}
    warm = warm_start(path, fresh, rename=swap)
    assert (weights(warm)[0] == weights(task)[0]).all()
    assert (weights(warm)[1] == weights(fresh)[1]).all()
    said = capsys.readouterr().err
    assert "  4 with no place in the task\n    layers/other-1/bias" in said
    with pytest.raises(ValueError, match="makes two arrays `layers/0/weight`, one of them"):
        warm_start(path, fresh, rename={"layers/.": "layers/0"})


def test_floats_are_cast_and_told_and_others_are_not(source, capsys):
    path, task = source
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x,
        Net((4, 5), jax.random.key(1)),
    )
    warm = warm_start(path, half)
    assert (weights(warm)[0] == weights(task)[0].astype(jnp.bfloat16)).all()
    assert "  6 cast\n    layers/0/bias: float32 to bfloat16" in capsys.readouterr().err
    floating = eqx.tree_at(lambda t: t.seen, half, jnp.float32(0))
    with pytest.raises(ValueError, match="seen: int32 in the checkpoint, float32 here"):
        warm_start(path, floating)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "^head/"}, r"`include='\^head/'` finds nothing in .* like `layers/0/weight`"),
        ({"exclude": "^head/"}, r"`exclude='\^head/'` finds nothing"),
        ({"rename": {"^a/": "b/"}}, r"`rename=\{'\^a/': 'b/'\}` finds nothing"),
        ({"include": "(one"}, r"`include='\(one'` is no regular expression: missing \)"),
        ({"exclude": "(one"}, r"`exclude='\(one'` is no .* write `re\.escape\('\(one'\)`"),
        ({"rename": {"[": "b"}}, r"`rename=\{'\[': 'b'\}` is no regular expression"),
        ({"rename": {"^": "x/"}}, r"Nothing of .* belongs into `Net`.* like `x/layers/0/weight`"),
    ],
)
def test_an_expression_that_finds_nothing(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        warm_start(source[0], Net((4, 5), jax.random.key(1)), **arguments)


def test_a_warm_start_goes_into_a_fit(source):
    path, task = source
    warm = warm_start(path, Net((4, 5), jax.random.key(1)))
    assert bits(warm) == bits(task)
    again = quiet(max_steps=1).fit(warm, DataLoader(DATA, 4))
    assert int(again.seen) == 4
    inside = quiet(max_steps=1).fit(
        lambda key: warm_start(path, Net((4, 5), key)), DataLoader(DATA, 4)
    )
    assert bits(inside) == bits(again)
