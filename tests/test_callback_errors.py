"""An exception in a user's callback: which callback, which hook, which step; nothing hides it."""

import pytest
from tasks import Classifier, notes, quiet, refused, rows, says

from jaxlightning import Callback, DataLoader, DataModule

BATCH = rows(8)


class Fails(Callback):
    """Raises in one hook."""

    def __init__(self, hook, at=0):
        def fail(trainer, *args):
            if trainer.global_step == at:
                raise LookupError("in the callback")

        self.fail = fail
        # Looked up on the type, as all hooks are.
        self.__class__ = type("Fails", (Callback,), {hook: lambda self, *args: fail(*args)})


@pytest.mark.parametrize(
    ("hook", "step", "epoch"),
    [
        ("setup", 0, 0),
        ("on_fit_start", 0, 0),
        ("on_train_batch_start", 1, 0),
        ("on_train_batch_end", 3, 1),
        ("on_validation_batch_end", 2, 0),
        ("on_train_epoch_end", 4, 1),
        ("on_log", 4, 1),
        ("on_checkpoint", 2, 0),
        ("on_fit_end", 4, 2),
    ],
)
def test_an_exception_in_a_callback_names_it_its_hook_and_the_step(hook, step, epoch):
    loader = DataLoader(BATCH, 4)
    trainer = quiet(max_epochs=2, callbacks=[Callback(), Fails(hook, step)], log_every_n_steps=1)
    with pytest.raises(LookupError, match="in the callback") as caught:
        trainer.fit(Classifier(), loader, loader)
    assert notes(caught.value)[0] == (
        f"Raised by the callback `Fails` in its hook `{hook}` at global step {step} "
        f"(epoch {epoch})."
    )


@pytest.mark.parametrize("hook", ["monitors", "provides", "inside_step", "wrap_optimizer"])
def test_an_exception_in_what_a_callback_declares_or_traces(hook):
    def fail(self, *args):
        raise LookupError("in the callback")

    callback = type("Declares", (Callback,), {hook: fail})()
    error = refused(LookupError, Classifier(), callbacks=callback)
    assert f"Raised by the callback `Declares` in `{hook}`." in notes(error)


def test_an_optimizer_that_is_not_returned():
    callback = type("Forgets", (Callback,), {"wrap_optimizer": lambda self, trainer, tx: None})()
    error = refused(TypeError, Classifier(), callbacks=callback)
    assert "It returned a `NoneType`. Return an optax transformation" in str(error)
    assert "Raised by the callback `Forgets` in `wrap_optimizer`." in notes(error)


def test_an_exception_in_needs_state():
    class Asked(Callback):
        def needs_state(self, step):
            return {1: False}[step]

    with pytest.raises(KeyError) as caught:
        quiet(max_epochs=2, callbacks=Asked()).fit(Classifier(), DataLoader(BATCH, 4))
    (note,) = notes(caught.value)
    assert note == f"Raised by the callback `{Asked.__qualname__}` in `needs_state(2)`."


def test_what_fails_while_a_failure_is_handled_is_noted_and_hides_nothing():
    ended = []

    class Careless(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            raise LookupError("the first")

        def on_exception(self, trainer, exception):
            raise OSError("while told")

        def teardown(self, trainer, stage):
            raise RuntimeError("while torn down")

    class Data(DataModule):
        def train_dataloader(self):
            return DataLoader(BATCH, 4)

        def teardown(self, stage):
            ended.append(stage)

    with pytest.raises(LookupError, match="the first") as caught:
        quiet(max_epochs=1, callbacks=Careless()).fit(Classifier(), Data())
    assert notes(caught.value)[1:] == [
        "While this was handled, OSError: while told",
        "While this was handled, RuntimeError: while torn down",
    ]
    assert ended == ["fit"]


def test_a_failing_teardown_is_an_error_of_its_own():
    class Careless(Callback):
        def teardown(self, trainer, stage):
            raise RuntimeError("while torn down")

    with pytest.raises(RuntimeError, match="while torn down") as caught:
        quiet(max_epochs=1, callbacks=Careless()).fit(Classifier(), DataLoader(BATCH, 4))
    assert "in its hook `teardown` at global step 2" in notes(caught.value)[0]


def test_a_hook_with_lightnings_signature():
    class Torchlike(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx): ...

    with pytest.raises(TypeError) as caught:
        quiet(callbacks=Torchlike())
    assert says(caught.value) == (
        "The hook `on_train_batch_end` of `Torchlike` takes (trainer, pl_module, outputs, batch, "
        "batch_idx), but is called with (trainer, outputs, batch, batch_idx). Write "
        "`def on_train_batch_end(self, trainer, outputs, batch, batch_idx): ...`."
    ).replace("`Torchlike`", f"`{Torchlike.__qualname__}`")


def test_a_hook_that_is_misspelt():
    class Misspelt(Callback):
        def on_train_batch_ends(self, trainer, outputs, batch, batch_idx): ...

    with pytest.warns(
        UserWarning, match=r"on_train_batch_ends` looks like .* `on_train_batch_end`"
    ):
        quiet(callbacks=Misspelt())


def test_a_hook_that_only_lightning_has_names_what_there_is_here():
    class Ported(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer): ...

    with pytest.warns(
        UserWarning, match=r"In its place there is `inside_step\(view\)`, .*`wrap_opt"
    ):
        quiet(callbacks=Ported())
