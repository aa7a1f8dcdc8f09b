"""`validate`, `test` and `predict` against whole-data computations in numpy."""

import jax
import numpy as np
import pytest
from tasks import Classifier, arrays, hand_loss, quiet, rows

from jaxlightning import Callback, DataLoader, DataModule, Trainer
from jaxlightning.callbacks import LambdaCallback


def whole(task, data):
    """The loss and accuracy over all of `data` at once."""
    logits = np.asarray(jax.vmap(task.net)(data["x"]))
    right = (logits.argmax(1) == data["y"])[data["mask"]]
    return float(hand_loss(task.net, data)), right.mean()


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("size", [7, 8, 100])
def test_evaluation_is_exact_whatever_the_batches(devices, size):
    """One smaller batch at the end, which several devices do not divide."""
    data, task = rows(45), Classifier()
    loss, accuracy = whole(task, data)
    trainer = quiet(devices=devices, on_recompile="raise")
    found = trainer.validate(task, DataLoader(data, size))
    assert found == pytest.approx({"val/loss": loss, "val/accuracy": accuracy}, abs=1e-6)
    found = trainer.test(task, DataLoader(data, size))
    assert found == pytest.approx({"test/loss": loss, "test/accuracy": accuracy}, abs=1e-6)
    logits = trainer.predict(task, DataLoader(data, size))
    np.testing.assert_allclose(logits, jax.vmap(task.net)(data["x"]), atol=1e-6)


def test_more_batches_than_one_piece_of_sums():
    data, task = rows(150), Classifier()
    found = quiet().validate(task, DataLoader(data, 1))
    assert found["val/loss"] == pytest.approx(whole(task, data)[0], abs=1e-6)


def test_several_loaders_by_name():
    a, b, task = rows(20, seed=1), rows(12, seed=2), Classifier()
    loaders = {"a": DataLoader(a, 8), "b": DataLoader(b, 8)}
    found = quiet().validate(task, loaders)
    assert found["val/a/loss"] == pytest.approx(whole(task, a)[0], abs=1e-6)
    assert found["val/b/loss"] == pytest.approx(whole(task, b)[0], abs=1e-6)
    predictions = quiet().predict(task, loaders)
    assert {name: x.shape for name, x in predictions.items()} == {"a": (20, 3), "b": (12, 3)}

    trainer = quiet(max_epochs=1)
    trained = trainer.fit(task, DataLoader(a, 8), loaders)
    assert trainer.callback_metrics["val/b/loss"] == pytest.approx(whole(trained, b)[0], abs=1e-6)
    found = quiet().validate(task, [DataLoader(a, 8), DataLoader(b, 8)])
    assert sorted(found) == ["val/0/accuracy", "val/0/loss", "val/1/accuracy", "val/1/loss"]


def test_validation_in_a_fit_is_in_inference_mode():
    data, task = rows(30), Classifier(dropout=0.9)
    trainer = quiet(max_epochs=1)
    trained = trainer.fit(task, DataLoader(data, 8), DataLoader(data, 8))
    loss, accuracy = whole(trained, data)
    assert trainer.callback_metrics["val/loss"] == pytest.approx(loss, abs=1e-6)
    assert trainer.callback_metrics["val/accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_of_the_latest_fit_without_a_task():
    data = rows(30)
    trainer = quiet(max_epochs=1)
    trained = trainer.fit(Classifier(), DataLoader(data, 8))
    found = trainer.validate(dataloaders=DataLoader(data, 8))
    assert found["val/loss"] == pytest.approx(whole(trained, data)[0], abs=1e-6)
    with pytest.raises(ValueError, match="nothing has been fitted"):
        quiet().validate(dataloaders=DataLoader(data, 8))


def test_predictions_can_be_left_to_callbacks():
    data, task, written = rows(20), Classifier(), []

    class Writes(Callback):
        def on_predict_batch_end(self, trainer, outputs, batch, batch_idx, dataloader_idx):
            written.append(np.asarray(outputs))

    trainer = quiet(callbacks=Writes())
    assert trainer.predict(task, DataLoader(data, 8), return_predictions=False) is None
    np.testing.assert_allclose(np.concatenate(written), jax.vmap(task.net)(data["x"]), atol=1e-6)


def test_of_a_data_module():
    class Module(DataModule):
        def setup(self, stage):
            self.stage = stage

        def train_dataloader(self):
            return DataLoader(rows(16), 8)

        def test_dataloader(self):
            return DataLoader(rows(16), 8)

    module = Module()
    found = quiet().test(Classifier(), module)
    assert module.stage == "test"
    assert sorted(found) == ["test/accuracy", "test/loss"]
    with pytest.raises(NotImplementedError, match="has no `predict_dataloader`"):
        quiet().predict(Classifier(), module)


def test_weights_of_a_checkpoint(tmp_path):
    data = DataLoader(rows(), 8)
    trainer = Trainer(
        max_epochs=1,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trained = trainer.fit(Classifier(), data)
    expected = trainer.validate(trained, data)
    assert trainer.validate(Classifier(), data, ckpt_path="last") == expected
    best = trainer.checkpoint_callback.best_model_path
    assert quiet().validate(Classifier(), data, ckpt_path=best) == expected
    from jaxlightning import load_weights

    for a, b in zip(arrays(load_weights(best, Classifier())), arrays(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_optax_is_what_the_hand_written_loss_uses():
    """The oracle of this file against numpy."""
    data, task = rows(10), Classifier()
    logits = np.asarray(jax.vmap(task.net)(data["x"]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    nll = -logp[np.arange(10), data["y"]][data["mask"]].mean()
    assert hand_loss(task.net, data) == pytest.approx(nll, abs=1e-6)


def test_programs_are_compiled_once_for_all_calls():
    trainer, task = quiet(), Classifier()
    scores = [trainer.validate(task, DataLoader(rows(seed=seed), 8)) for seed in (0, 1)]
    seconds = trainer.compile_s
    scores.append(trainer.validate(task, DataLoader(rows(seed=0), 8)))
    assert trainer.compile_s == seconds
    assert scores[0] == scores[2] != scores[1]
    assert trainer.validate(task, DataLoader(rows(seed=0), 5)) == pytest.approx(scores[0])
    assert trainer.num_recompiles == 0


def test_refuses_an_entry_point_inside_another():
    def nested(trainer):
        trainer.validate(trainer.task, DataLoader(rows(), 8))

    trainer = quiet(max_epochs=1, callbacks=LambdaCallback(on_train_end=nested))
    with pytest.raises(RuntimeError, match="`validate` was called during `fit`"):
        trainer.fit(Classifier(), DataLoader(rows(), 8))
    trainer.validate(Classifier(), DataLoader(rows(), 8))
