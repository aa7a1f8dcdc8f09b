"""Whatever may be a loader, and what may not: iterables, torch, lists, modules; NaN."""

import jax.numpy as jnp
import numpy as np
import pytest
from feeds import Numbers, Stateful, StatefulIterator, batch_of, feed, values
from tasks import Classifier, assert_close, assert_same, quiet, rows

from jaxlightning import Callback, DataLoader, DataModule


@pytest.mark.parametrize(
    "make",
    [
        lambda: [batch_of(i) for i in range(4)],
        lambda: tuple(batch_of(i) for i in range(4)),
        lambda: Numbers(4),
        lambda: Stateful(4),
        lambda: (batch_of(i) for i in range(4)),
        lambda: StatefulIterator(Numbers(4)),
        lambda: map(batch_of, range(4)),
        lambda: DataLoader({"x": np.repeat(np.arange(4.0), 2)[:, None]}, 2),
    ],
    ids=["list", "tuple", "iterable", "stateful", "generator", "iterator", "map", "DataLoader"],
)
def test_any_iterable_gives_all_its_batches_once(make):
    marked = list(feed(make()).marked(0))
    assert values(batch for batch, _ in marked) == [0, 1, 2, 3]
    assert [last for _, last in marked] == [False, False, False, True]


def test_an_iterable_is_iterated_anew_each_epoch_and_a_generator_goes_on():
    again = feed(Numbers(5), limit=3)
    assert [values(again.epoch(epoch)) for epoch in range(2)] == [[0, 1, 2], [0, 1, 2]]
    once = feed((batch_of(i) for i in range(9)), limit=3)
    assert [values(once.epoch(epoch)) for epoch in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_a_streaming_dataset_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    columns = {"x": [[float(i)] for i in range(5)]}
    stream = datasets.Dataset.from_dict(columns).to_iterable_dataset()
    found = list(feed(stream.with_format("numpy").batch(2)).epoch(0))
    assert values(found) == [0, 2, 4]
    assert [batch.shapes for batch in found] == [((2, 1),), ((2, 1),), ((1, 1),)]


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [(7, 1.0, 7), (7, 3, 3), (7, 9, 9 - 2), (7, 0.5, 3), (7, 0.01, 1), (7, 0, 0), (7, 0.0, 0)],
)
def test_limits(length, limit, expected):
    assert feed([batch_of(i) for i in range(length)], limit=limit).length == expected


def test_a_fraction_of_an_unknown_length():
    assert feed(Numbers(3), limit=2).length == 2
    assert feed(Numbers(3), limit=1.0).length is None
    with pytest.raises(ValueError, match=r"has no length, so 0\.5 of it is unknown\. Limit it wi"):
        feed(Numbers(3), limit=0.5)


class Foreign:
    """A loader of another library: any iterable, with an attribute of its own named `batches`."""

    def __init__(self, given):
        self.batches = given

    def __iter__(self):
        return iter(self.batches)


def test_an_attribute_that_is_no_method_is_no_protocol():
    batches = [rows(8)] * 2
    assert values(feed(Foreign([batch_of(1), batch_of(2)])).epoch(0)) == [1, 2]
    trainer = quiet(max_epochs=1)
    trainer.fit(Classifier(), Foreign(batches), Foreign(batches))
    assert trainer.global_step == 2


@pytest.mark.parametrize("make", [list, tuple])
def test_a_list_of_foreign_loaders_is_refused(make):
    several = make([Foreign([rows(8)]), Foreign([rows(8)])])
    with pytest.raises(
        TypeError,
        match=r"The val data is a list that holds a loader, a `Foreign`, .*Pass several loaders by "
        r'name: `\{"first": a',
    ):
        quiet(max_epochs=1).fit(Classifier(), DataLoader(rows(8), 8), several)


class Tensor:
    """An array of another library, which numpy can read."""

    def __init__(self, held):
        self.held = held

    def __array__(self, dtype=None):
        return self.held


def test_arrays_of_other_libraries_become_numpys():
    """By a copy: nobody could forbid their owner to write to them."""
    held = np.ones((2, 1), np.float32)
    batches = feed([{"x": Tensor(held)}, {"x": Tensor(2 * held)}]).epoch(0)
    first = next(batches)
    held[:] = 7
    assert values([first, *batches]) == [1, 2]


def test_a_loader_of_torch():
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    whole = rows(20)
    columns = data.TensorDataset(*(torch.from_numpy(column) for column in whole.values()))
    by_name = lambda rows_: dict(zip(whole, data.default_collate(rows_), strict=True))
    loader = data.DataLoader(columns, 8, collate_fn=by_name)
    found = quiet(max_epochs=1, on_recompile="ignore").fit(Classifier(), loader)
    assert_same(found, quiet(max_epochs=1).fit(Classifier(), DataLoader(whole, 8)))


def test_a_loader_whose_length_raises():
    """As that of torch's `DataLoader` over a stream."""

    class Stream(Numbers):
        def __len__(self):
            raise TypeError("object of type 'Stream' has no len()")

    assert feed(Stream(3)).length is None
    with pytest.raises(ValueError, match=r"`overfit_batches=0\.5` is a fraction, but .* no length"):
        quiet(max_epochs=1, overfit_batches=0.5).fit(Classifier(), Stream(3))


# NaN


def test_infinities_may_be_meant():
    bias = np.array([[-np.inf], [np.inf]], np.float32)
    assert feed([{"x": bias}]).length == 1


@pytest.mark.parametrize("overfit", [0, 1])
def test_nan_may_be_allowed_and_is_hidden_by_a_weight_of_zero(overfit):
    coded, clean = rows(8), rows(8)
    coded["x"][~coded["mask"]] = np.nan
    clean["x"][~clean["mask"]] = 0
    fit = lambda **arguments: quiet(max_epochs=2, overfit_batches=overfit).fit(
        Coded(), DataLoader(**arguments, batch_size=8)
    )
    with pytest.raises(ValueError, match="The first training batch holds NaN: `x` has it at"):
        fit(source=coded)
    assert_close(fit(source=coded, allow_nan=True), fit(source=clean))


class Coded(Classifier):
    """Missing values are NaN, and left out of the loss."""

    def training_step(self, batch, *, key):
        missing = jnp.isnan(batch["x"])
        filled = batch | {"x": jnp.where(missing, 0, batch["x"])}
        return super().training_step(filled, key=key)


# Data modules


def test_a_data_module_with_several_validation_loaders():
    told: list = []

    class Several(DataModule):
        def prepare_data(self):
            told.append("prepare_data")

        def setup(self, stage):
            told.append(f"setup {stage}")

        def train_dataloader(self):
            return DataLoader(rows(16), 8)

        def val_dataloader(self):
            return {"seen": DataLoader(rows(16), 8), "unseen": DataLoader(rows(9, seed=5), 4)}

        def teardown(self, stage):
            told.append(f"teardown {stage}")

    numbers: list = []

    class Watches(Callback):
        def on_validation_batch_end(self, trainer, outputs, batch, batch_idx, dataloader_idx):
            numbers.append((dataloader_idx, batch_idx))

    module, trainer = Several(), quiet(max_epochs=1, callbacks=Watches())
    trained = trainer.fit(Classifier(), module)
    assert told == ["prepare_data", "setup fit", "teardown fit"]
    assert numbers == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert trainer.num_val_batches == [2, 3]
    alone = quiet().validate(trained, DataLoader(rows(9, seed=5), 9))
    assert trainer.callback_metrics["val/unseen/loss"] == pytest.approx(alone["val/loss"], abs=1e-6)


def test_a_generator_for_validation_is_refused():
    with pytest.raises(TypeError, match=r"The validation data is a `generator`, which gives its"):
        quiet(max_epochs=1).fit(Classifier(), DataLoader(rows(), 8), (b for b in [rows(4)]))
