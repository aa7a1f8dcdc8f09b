"""The batch size that is found fits by the compiled program, and the next one does not."""

import jax
import jax.numpy as jnp
import pytest
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader, tuning
from jaxlightning._plan import PlannedBatches, abstract_task, compiled_step, peak_bytes, planned_run


def needed(trainer, task, count):
    batch = {
        "x": jax.ShapeDtypeStruct((count, 6), jnp.float32),
        "y": jax.ShapeDtypeStruct((count,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((count,), bool),
    }
    placement = trainer._placement_for(abstract_task(task))
    return peak_bytes(compiled_step(planned_run(trainer, task, PlannedBatches(batch), placement)))


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [{}, {"devices": 4, "strategy": "fsdp"}, {"accumulate_grad_batches": 2}],
    ids=str,
)
def test_the_largest_batch_that_fits(arguments, capfd):
    trainer, task = quiet(**arguments), Classifier(dropout=0.5)
    shards = trainer._placement.shards
    limit = needed(trainer, task, 3 * shards) + 10
    options = {"memory_bytes": limit, "share": 1.0, "most": 32, "check": False}
    found = tuning.batch_size(trainer, task, rows(4), **options)
    assert found % shards == 0
    assert 3 * shards <= found < 32
    assert needed(trainer, task, found) <= limit < needed(trainer, task, found + shards)
    assert f"Batches of {found} rows need {needed(trainer, task, found):,} of {limit:,} bytes" in (
        capfd.readouterr().err
    )


@pytest.mark.long
def test_no_step_is_executed_but_one(monkeypatch):
    steps = []

    class Told(Classifier):
        def training_step(self, batch, *, key):
            jax.debug.callback(lambda: steps.append(1))
            return super().training_step(batch, key=key)

    options = {"memory_bytes": 2**30, "most": 64}
    assert tuning.batch_size(quiet(), Told(), rows(8), check=False, **options) == 64
    assert steps == []
    assert tuning.batch_size(quiet(), Told(), rows(8), **options) == 64
    assert len(steps) == 1


@pytest.mark.long
def test_auto_is_settled_by_a_fit(monkeypatch):
    monkeypatch.setattr("jaxlightning.tuning._batch_size._memory", lambda trainer: 2**20)
    loader = DataLoader(rows(64), "auto", shuffle=True)
    with pytest.raises(ValueError, match=r"is settled by `Trainer.fit`, for training data only"):
        len(loader)
    trainer = quiet(max_epochs=1, devices=4)
    trainer.fit(Classifier(), loader)
    assert loader.batch_size == 64
    assert trainer.global_step == 1
    with pytest.raises(ValueError, match=r"is settled by `Trainer.fit`"):
        trainer.validate(Classifier(), DataLoader(rows(8), "auto"))


def test_this_machines_memory_is_the_limit():
    assert tuning.batch_size(quiet(), Classifier(), rows(8), most=16, check=False) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_bytes": 1000}, "A step on batches of 4 rows, one on each shard, needs .* bytes"),
        ({"most": 3}, "`most=3` has to be at least 4"),
        ({"share": 0.0}, r"`share=0.0` has to be more than 0 and at most 1"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        tuning.batch_size(quiet(devices=4), Classifier(), rows(8), **options)
