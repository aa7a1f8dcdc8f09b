"""What is wrong is said before any compute: what was got, what was expected, what to write.

Text, vocabularies and positions are in `test_pretrain_cli.py`, arguments of the Trainer in
`test_arguments_refused.py`, sources of a `DataLoader` in `test_loader.py`, and exceptions in
callbacks in `test_callback_errors.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from naming import named
from tasks import Classifier, notes, quiet, refused, rows, says

from jaxlightning import Callback, DataLoader, DataModule, Mean, TaskModule, Trainer, buffer
from jaxlightning.callbacks import EarlyStopping, ModelCheckpoint, ReduceLROnPlateau

BATCH = rows(8)


class Stepped(Classifier):
    """Whose training step is a function of the task and the batch."""

    step: object = eqx.field(static=True)

    def __init__(self, step):
        super().__init__()
        self.step = step

    def training_step(self, batch, *, key):
        return self.step(self, batch)


# Data


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([], ValueError, "The training data is empty: its loader, a `list`, gave no batch."),
        (iter(()), ValueError, "The training data is empty: its loader, a `tuple_iterator`, gave"),
        ([{"x": np.ones((0, 6))}], ValueError, "The first training batch is empty: `x` has no row"),
        (
            BATCH,
            TypeError,
            "is a dict, which means several loaders by name, but its entry 'x' is a",
        ),
        (
            np.ones(3),
            TypeError,
            "The train data is a `ndarray`, which is no loader. Pass a `DataLo",
        ),
        ("rows.csv", TypeError, "The train data is a `str`, which is no loader."),
        (3, TypeError, "The train data is a `int`, which is no loader."),
        (DataLoader, TypeError, "The train data is a `type`, which is no loader."),
        (
            {"a": DataLoader(BATCH, 4), "b": DataLoader(BATCH, 4)},
            ValueError,
            "There has to be one training loader. Mix several sources inside one loader.",
        ),
        ({}, ValueError, "There is no training data. Pass a `DataLoader`, any iterable"),
        (DataModule(), NotImplementedError, "`DataModule` has no `train_dataloader`. Write one"),
    ],
    ids=named,
)
def test_no_data(data, kind, message):
    assert message in says(refused(kind, Classifier(), data))


def test_no_data_at_all():
    for verb in ("fit", "validate", "test", "predict"):
        with pytest.raises(ValueError, match=rf"`{verb}` got no data\. .*`trainer\.{verb}\(task, "):
            getattr(quiet(), verb)(Classifier())


def test_data_twice():
    module, loader = DataModule(), DataLoader(BATCH, 4)
    with pytest.raises(ValueError, match="`fit` got a `DataModule` and train loaders"):
        quiet().fit(Classifier(), loader, datamodule=module)
    with pytest.raises(ValueError, match="`fit` got a `DataModule` and val loaders"):
        quiet().fit(Classifier(), module, loader)
    with pytest.raises(ValueError, match="`fit` got two `DataModule`s"):
        quiet().fit(Classifier(), module, datamodule=module)


@pytest.mark.usefixtures("unchecked_types")
def test_a_loader_where_a_data_module_is_expected():
    with pytest.raises(TypeError, match="`datamodule` is a `DataLoader`; it has to be a `DataModu"):
        quiet().test(Classifier(), datamodule=DataLoader(BATCH, 4))


def test_no_validation_data():
    error = refused(ValueError, Classifier(), None, [])
    assert says(error).startswith("The validation data is empty: its loader, a `list`, gave no")
    two = {"full": DataLoader(BATCH, 4), "empty": []}
    assert "The validation 'empty' data is empty" in says(
        refused(ValueError, Classifier(), None, two)
    )


def test_a_batch_without_the_keys_the_task_needs():
    batch = {"x": BATCH["x"], "labels": BATCH["y"], "mask": BATCH["mask"]}
    error = refused(KeyError, Classifier(), [batch])
    assert says(error) == (
        "`Classifier.training_step` looked up `y`, which its batch does not have: its keys are "
        "['labels', 'mask', 'x']."
    )
    near = {"xs": BATCH["x"], "y": BATCH["y"], "mask": BATCH["mask"]}
    assert says(refused(KeyError, Classifier(), [near])).endswith("Did you mean `xs`?")
    error = refused(KeyError, Classifier(), [BATCH], [near])
    assert says(error).startswith("`Classifier.validation_step` looked up `x`")
    with pytest.raises(KeyError, match=r"`Classifier\.predict_step` looked up `x`"):
        quiet().predict(Classifier(), [near])


def test_a_key_error_of_the_tasks_own_shows_where_it_comes_from():
    """Which dict a key was looked up in nobody can say, so the original error is shown too."""

    def looks_up(task, batch):
        return {"a": 1}["b"]

    error = refused(KeyError, Stepped(looks_up))
    assert isinstance(error.__cause__, KeyError)
    assert error.__cause__.args == ("b",)

    def knows(task, batch):
        return {"a": 1}["x"]  # which the batch has

    error = refused(KeyError, Stepped(knows))
    assert error.args == ("x",)
    assert notes(error) == ["Raised while `Stepped.training_step` was traced, before any compute."]


def test_leaves_whose_leading_axes_differ():
    batch = BATCH | {"y": BATCH["y"][:5]}
    error = refused(ValueError, Classifier(), [batch])
    assert says(error) == (
        "The first training batch has leaves whose leading axes differ (`mask`: 8, `x`: 8, "
        "`y`: 5). The leading axis is the batch's and has to be equal in all leaves."
    )
    error = refused(ValueError, Classifier(), [BATCH], [batch])
    assert says(error).startswith("The first validation batch has leaves whose leading axes differ")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_nan_in_the_first_batch(dtype):
    x = BATCH["x"].astype(dtype)
    x[2, 3] = np.nan
    error = refused(ValueError, Classifier(), [{"deep": {"x": x}}])
    assert says(error) == (
        "The first training batch holds NaN: `deep/x` has it at [2, 3]. Clean the data, or, if it "
        "stands for values that the task leaves out, write `DataLoader(..., allow_nan=True)`, or "
        "give your loader that attribute."
    )


def test_text_in_a_batch():
    error = refused(TypeError, Classifier(), [BATCH | {"name": np.array(["a"] * 8)}])
    assert "has the leaf `name` of dtype <U1, which no device can hold" in says(error)


def test_a_step_that_only_a_smaller_batch_does_not_fit():
    eights = Stepped(lambda task, batch: Mean.over(jnp.ones(8) * batch["x"].sum(1)))
    with pytest.raises(TypeError) as caught:
        quiet(max_epochs=1).fit(eights, DataLoader(rows(20), 8))
    (note,) = [note for note in notes(caught.value) if "JAX has removed" not in note]
    assert note.startswith("Raised while the training step was traced anew, for a batch of another")
    assert "float32[8,6] -> float32[4,6]" in note
    assert "Take their number from the batch" in note


# The task


def loss(value):
    return Stepped(lambda task, batch: value(batch))


X = lambda batch: batch["x"].sum(1)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (X, ValueError, "The loss that `Stepped.training_step` returned has shape (4,), but a"),
        (X, ValueError, "is a scalar. For one loss an example, return `Mean.over(losses)`."),
        (
            lambda b: {"nll": X(b)},
            ValueError,
            'The loss["nll"] that `Stepped.training_step` returned has shape (4,)',
        ),
        (lambda b: b["y"].sum(), ValueError, "has dtype int32, which has no gradient. Compute"),
        (lambda b: b["mask"].all(), ValueError, "has dtype bool, which has no gradient."),
        (
            lambda b: Mean.over(b["y"]),
            TypeError,
            "`Mean.over` got values of dtype int32, which have no gradient, so they cannot be",
        ),
        (lambda b: None, TypeError, "is a `NoneType`. Return a `Mean`, a dict of Means, or a"),
        (lambda b: "low", TypeError, "is a `str`. Return a `Mean`, a dict of Means, or a scalar"),
        (lambda b: {}, ValueError, "`Stepped.training_step` returned an empty dict as its loss."),
        (lambda b: (1.0,), ValueError, "returned a tuple of 1. Return `loss`, `(loss, metrics)`"),
        (lambda b: (1.0, X(b).sum()), TypeError, "Return a dict from names to metrics, such as `{"),
        (lambda b: (1.0, {"m": X(b)}), ValueError, 'The metric "m" of `Stepped.training_step` is'),
        (lambda b: {"loss": 1.0, "acc": 1.0}, ValueError, 'Write `return loss, {"accuracy": ...}`'),
        (lambda b: (1.0, {"loss": 1.0}), ValueError, 'a metric named "loss", which is the name of'),
        (lambda b: (1.0, {}, 3), TypeError, "The third thing `Stepped.training_step` returned"),
    ],
)  # fmt: skip
def test_a_loss_that_is_none(value, kind, message):
    error = refused(kind, loss(value))
    assert message in says(error)
    assert notes(error) == ["Raised while `Stepped.training_step` was traced, before any compute."]


def test_the_loss_of_a_validation_step():
    class Validated(Classifier):
        def validation_step(self, batch, *, key):
            return X(batch)

    error = refused(ValueError, Validated(), None, DataLoader(BATCH, 4))
    assert "The loss that `Validated.validation_step` returned has shape (4,)" in says(error)


def test_what_a_lightning_module_has_and_a_task_has_not():
    class Logs(Classifier):
        def training_step(self, batch, *, key):
            self.log("accuracy", 1.0)

    assert says(refused(AttributeError, Logs())) == (
        "`Logs.training_step` uses `self.log`, but a task is pure and has none. Return what is to "
        'be logged: `return loss, {"accuracy": ...}`.'
    )

    class Schedules(Classifier):
        def configure_optimizers(self):
            return {"optimizer": optax.sgd(0.1), "lr_scheduler": None}

    assert "returned a `NoneType` as `lr_scheduler`." in says(refused(TypeError, Schedules()))


@pytest.mark.parametrize("method", ["training_step", "validation_step"])
def test_a_task_changed_in_place(method):
    def sets(self, batch, *, key):
        self.noise = 0.2

    task = type("Noisy", (Classifier,), {method: sets})()
    assert says(refused(AttributeError, task, None, DataLoader(BATCH, 4))) == (
        f"`Noisy.{method}` sets `noise`, but a task is not changed in place. A number to log is "
        'returned: `return loss, {"noise": ...}`. What the next step is to find changed is a field '
        "`noise: jax.Array = jaxlightning.buffer()`, of which `training_step` hands a new one "
        "back: `return loss, metrics, eqx.tree_at(lambda task: task.noise, self, noise)`."
    )


def test_what_is_advised_for_it_changes_the_task():
    class Noisy(Classifier):
        noise: jax.Array = buffer()

        def __init__(self):
            super().__init__()
            self.noise = jnp.float32(0.0)

        def training_step(self, batch, *, key):
            loss, metrics = super().training_step(batch, key=key)
            noise = self.noise + 0.25
            return loss, metrics, eqx.tree_at(lambda task: task.noise, self, noise)

    assert quiet(max_steps=3).fit(Noisy(), DataLoader(BATCH, 4)).noise == 0.75


def test_a_step_written_for_another_framework():
    class Torchlike(Classifier):
        def training_step(self, batch, batch_idx):
            return 0.0

    assert says(refused(TypeError, Torchlike())) == (
        "`Torchlike.training_step` takes (batch, batch_idx), but is called with (batch, key=key). "
        "Write `def training_step(self, batch, *, key): ...`; use `key` for dropout, or ignore it."
    )


class Bare(TaskModule):
    weight: jax.Array
    count: jax.Array = buffer()


def test_methods_that_are_missing():
    bare = Bare(jnp.ones(3), jnp.int32(0))
    error = refused(NotImplementedError, bare)
    assert says(error).startswith("`Bare` has no `configure_optimizers`. Write `def configure_opt")

    class Optimized(Bare):
        def configure_optimizers(self):
            return optax.sgd(0.1)

    error = refused(NotImplementedError, Optimized(jnp.ones(3), jnp.int32(0)))
    assert says(error).startswith("`Optimized` has no `training_step`. Write `def training_step(")
    with pytest.raises(NotImplementedError, match="`Bare` has no `predict_step`"):
        quiet().predict(bare, [BATCH])


def test_nothing_to_train():
    class Frozen(Classifier):
        def trainable(self):
            return False

    assert says(refused(ValueError, Frozen())).startswith("`Frozen` has no trainable leaves: every")

    class Wrong(Classifier):
        def trainable(self):
            return {"net": True}

    assert "has to return a pytree of bools with the task's structure" in says(
        refused(ValueError, Wrong())
    )


@pytest.mark.parametrize(
    ("optimizers", "kind", "message"),
    [
        (None, TypeError, "returned a `NoneType`. Return an optax transformation such as"),
        ({"nett": optax.sgd(0.1)}, ValueError, "those are ['net']. Did you mean `net`?"),
        ({}, ValueError, "has no optimizer for the field `net`. Add one, or freeze the field in"),
    ],
)
def test_optimizers(optimizers, kind, message):
    class Optimized(Classifier):
        def configure_optimizers(self):
            return optimizers

    assert message in says(refused(kind, Optimized()))


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (
            Classifier,
            TypeError,
            "The task is the class `Classifier`. Pass an instance of a `TaskMod",
        ),
        (None, TypeError, "The task is `None`. Pass an instance of a `TaskModule`, or a function"),
        (Classifier().net, TypeError, "The task is a `MLP`, which is a model, but says nothing of"),
        (lambda key: 3, TypeError, "The function that was passed as the task returned a `int`."),
    ],
    ids=["class", "none", "model", "function"],
)
@pytest.mark.usefixtures("unchecked_types")
def test_no_task(task, kind, message):
    assert message in says(refused(kind, task))
    if not callable(task) or isinstance(task, type):
        with pytest.raises(TypeError, match=r"as its task\. Pass a `TaskModule`"):
            quiet().test(task or 3, [BATCH])


def test_an_exception_in_the_initialiser():
    def broken(key):
        raise ZeroDivisionError("by design")

    error = refused(ZeroDivisionError, broken)
    assert notes(error) == ["Raised by the function that was passed as the task."]


def test_one_array_in_two_places():
    class Tied(Classifier):
        other: jax.Array

        def __init__(self):
            super().__init__()
            self.other = self.net.layers[0].weight

    assert says(refused(ValueError, Tied())) == (
        "`net/layers/0/weight` and `other` of `Tied` are the same array, but would be trained "
        "apart. Tie them with `eqx.nn.Shared`, or copy one with `jnp.copy`."
    )


# Monitors


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("val/los"),
        ModelCheckpoint(monitor="val/los"),
        ReduceLROnPlateau("val/los"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_monitor_that_no_step_produces(callback):
    checkpoints = None if isinstance(callback, ModelCheckpoint) else False
    error = refused(
        ValueError, Classifier(), val=DataLoader(BATCH, 4), callbacks=callback,
        enable_checkpointing=checkpoints,
    )  # fmt: skip
    assert says(error) == (
        "`monitor='val/los'` is a metric that no step of this run produces; there are "
        "`train/accuracy`, `train/accuracy_epoch`, `train/loss`, `train/loss_epoch`, "
        "`val/accuracy`, `val/loss`. Did you mean `val/loss`? A callback that logs it itself says "
        "so in `provides()`."
    )


def test_a_monitor_of_lightnings_spelling_and_one_of_several_loaders():
    loader = DataLoader(BATCH, 4)
    error = refused(ValueError, Classifier(), None, loader, callbacks=EarlyStopping("val_loss"))
    assert "Did you mean `val/loss`" in says(error)
    loaders = {"a": loader, "b": loader}
    error = refused(ValueError, Classifier(), None, loaders, callbacks=EarlyStopping("val/loss"))
    assert "Did you mean `val/b/loss` or `val/a/loss`" in says(error)


def test_a_monitor_of_a_validation_that_there_is_none_of():
    error = refused(ValueError, Classifier(), callbacks=EarlyStopping("val/loss"))
    assert "`train/loss`" in says(error)
    assert "`val/" not in says(error).split("there are")[1]


def test_a_monitor_that_a_callback_provides_is_fine():
    class Provides(Callback):
        def provides(self):
            return ["val/perplexity"]

        def on_validation_epoch_end(self, trainer):
            trainer.log("val/perplexity", np.exp(trainer.callback_metrics["val/loss"]))

    callbacks = [Provides(), EarlyStopping("val/perplexity", patience=0, min_delta=1e9)]
    trainer = quiet(max_epochs=5, callbacks=callbacks)
    trainer.fit(Classifier(), DataLoader(BATCH, 4), DataLoader(BATCH, 4))
    assert trainer.current_epoch == 2


# Files


@pytest.mark.parametrize("checkpoints", [True, False])
def test_an_output_folder_that_cannot_be_written(tmp_path, checkpoints):
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "runs"
    trainer = Trainer(
        max_epochs=1,
        devices=1,
        default_root_dir=root,
        logger=None if not checkpoints else False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    error = refused(OSError, Classifier(), trainer=trainer)
    assert str(tmp_path / "file") in str(error)
    assert "`default_root_dir=" in str(error) or "Trainer(default_root_dir=" in str(error)


def test_a_field_that_is_not_declared():
    """As in a class for Lightning."""

    class Undeclared(TaskModule):
        def __init__(self, lr):
            self.lr = lr

    with pytest.raises(AttributeError, match="cannot assign to field 'lr'") as caught:
        Undeclared(1e-3)
    assert "declared in its class, as in a dataclass: `net: eqx.nn.MLP`" in notes(caught.value)[0]
