"""Pipelines of Grain: what they give, exact resume, what is noticed, what goes wrong."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from feeds import Stops, feed, values
from tasks import Classifier, assert_same, quiet, rows

from jaxlightning import Callback, DataLoader
from jaxlightning.callbacks import ModelCheckpoint
from jaxlightning.data._iterator_state import decode_state, encode_state

grain = pytest.importorskip("grain")


def numbered(count=12, seed=0):
    """A `MapDataset` of rows that can be told apart."""
    return grain.MapDataset.range(count).seed(seed).map(lambda i: {"x": np.full(1, i, np.float32)})


class Row:
    """A source: a row of a classification for each number."""

    def __init__(self, count=44):
        self.rows = rows(count)

    def __repr__(self):  # Grain's `DataLoader` compares it
        return f"Row({len(self)})"

    def __len__(self):
        return len(self.rows["y"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.rows.items()}


FEW = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def shuffled(seed=1):
    return grain.MapDataset.source(Row()).seed(seed).shuffle().batch(4)


def documents(count=70):
    generator = np.random.default_rng(0)
    return [
        {"ids": generator.integers(1, 50, size=size).astype(np.int32)}
        for size in generator.integers(1, 6, size=count)
    ]


def as_row(packed):
    """A packed row as one of the classification."""
    ids = packed["ids"]
    return {"x": ids.astype(np.float32) / 50, "y": np.int32(ids.sum() % 3), "mask": ids[0] != 7}


def first_fit(seed=1, repeat=True):
    pipeline = grain.MapDataset.source(documents()).seed(seed).shuffle()
    pipeline = (pipeline.repeat() if repeat else pipeline).to_iter_dataset(FEW)
    pack = grain.experimental.FirstFitPackIterDataset
    packed = pack(pipeline, length_struct={"ids": 6}, num_packing_bins=5)
    return packed.map(as_row).batch(4, drop_remainder=True)


def concatenated(seed=1):
    pipeline = grain.MapDataset.source(documents()).seed(seed).shuffle().to_iter_dataset(FEW)
    split = grain.experimental.ConcatThenSplitIterDataset(pipeline, length_struct={"ids": 6})
    return split.map(as_row).batch(4, drop_remainder=True)


def loader_of_grain(seed=1):
    sampler = grain.samplers.IndexSampler(44, shuffle=True, seed=seed, num_epochs=1)
    batch = grain.transforms.Batch(4, drop_remainder=True)
    return grain.DataLoader(data_source=Row(), sampler=sampler, operations=[batch])


def in_processes(seed=1, workers=2):
    """The rows of `shuffled`, in a list, so that the workers need not import this file."""
    row = Row()
    pipeline = grain.MapDataset.source([row[i] for i in range(len(row))]).seed(seed).shuffle()
    options = grain.MultiprocessingOptions(num_workers=workers)
    return pipeline.batch(4).repeat().to_iter_dataset(FEW).mp_prefetch(options)


# What a pipeline gives


def test_a_map_dataset_is_iterated_and_not_asked_by_index():
    pipeline = numbered().shuffle().batch(5)
    source = feed(pipeline)
    assert source.length == 3
    expected = [batch["x"][0, 0] for batch in pipeline]
    assert values(source.epoch(0)) == expected


def test_each_epoch_of_a_map_dataset_is_one_of_its_own():
    pipeline = numbered().shuffle().batch(5)
    source = feed(pipeline)
    whole = [batch["x"].ravel().tolist() for batch in pipeline.repeat(3)]
    found = [
        np.asarray(batch.leaves[0]).ravel().tolist()
        for epoch in range(3)
        for batch in source.epoch(epoch)
    ]
    assert found == whole
    assert whole[:3] != whole[3:6]


def test_the_last_smaller_batch_of_a_map_dataset_is_announced():
    sizes = lambda pipeline: [shape["x"].shape[0] for shape in feed(pipeline).shapes]
    assert sizes(numbered().batch(5)) == [5, 2]
    assert sizes(numbered().batch(5, drop_remainder=True)) == [5]
    assert sizes(numbered().batch(4)) == [4]
    assert sizes(numbered().to_iter_dataset().batch(5)) == [5]
    pipeline = grain.MapDataset.source(Row(14)).batch(4)
    trainer = quiet(max_epochs=2, on_recompile="raise")
    trainer.fit(Classifier(), pipeline)
    assert trainer.global_step == 8


def test_an_iter_dataset_begins_anew_in_every_epoch():
    source = feed(numbered().to_iter_dataset().batch(5))
    assert source.length is None
    assert [values(source.epoch(epoch)) for epoch in range(2)] == [[0, 5, 10]] * 2


@pytest.mark.parametrize("make", [concatenated, loader_of_grain])
def test_the_same_order_in_every_epoch_is_no_shuffling(make):
    source = feed(make())
    first = given(source.epoch(0))
    with pytest.warns(UserWarning, match=r"is shuffled, but a `\w+` of Grain .* Write `\.repeat\("):
        assert given(source.epoch(1)) == first


@pytest.mark.parametrize("kind", ["MapDataset", "IterDataset", "DataLoader"])
def test_a_pipeline_without_an_end_goes_on_over_the_epochs_of_training(kind):
    """And starts anew where epoch 0 is read again, as validation does."""
    if kind == "DataLoader":
        sampler = grain.samplers.IndexSampler(8)
        row = Number()
        batch = grain.transforms.Batch(2)
        pipeline = grain.DataLoader(data_source=row, sampler=sampler, operations=[batch])
    else:
        pipeline = numbered(8).repeat().batch(2)
        pipeline = pipeline.to_iter_dataset() if kind == "IterDataset" else pipeline
    with pytest.raises(ValueError, match=r"has no length, so 0\.5 of it is unknown"):
        feed(pipeline, limit=0.5)
    source = feed(pipeline, limit=3)
    epochs = [values(source.epoch(epoch)) for epoch in range(3)]
    assert epochs == [[0, 2, 4], [6, 0, 2], [4, 6, 0]]
    assert values(source.epoch(0)) == [0, 2, 4]


class Number:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": np.full(1, index, np.float32)}


def test_what_is_filtered_does_not_count():
    pipeline = grain.MapDataset.range(6).map(lambda i: {"x": np.full((2, 1), i, np.float32)})
    source = feed(pipeline.filter(lambda row: row["x"][0, 0] != 3))
    assert source.length is None
    assert [values(source.epoch(epoch)) for epoch in range(2)] == [[0, 1, 2, 4, 5]] * 2


def test_a_pipeline_is_no_source_of_our_loader():
    with pytest.raises(TypeError, match=r"is a `\w*MapDataset` of Grain, .* Pass it as the loader"):
        DataLoader(grain.MapDataset.range(4), 2)


def test_limits_overfitting_and_validation():
    taken: list = []

    class Watches(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            taken.append(np.asarray(batch["y"]).tolist())

    pipeline = shuffled()
    trainer = quiet(max_epochs=2, limit_train_batches=3, callbacks=[Watches()])
    trained = trainer.fit(Classifier(), pipeline, {"map": shuffled(), "iter": concatenated()})
    assert trainer.num_val_batches[0] == 11
    both = [batch["y"].tolist() for batch in pipeline.repeat(2)]
    assert taken == both[:3] + both[11:14]

    again = quiet(limit_val_batches=4).validate(trained, first_fit())
    assert again == quiet(limit_val_batches=4).validate(trained, first_fit())

    taken.clear()
    quiet(max_epochs=3, overfit_batches=2, callbacks=[Watches()]).fit(Classifier(), pipeline)
    assert taken == both[:2] * 3


# Resume

PIPELINES = {
    "MapDataset": shuffled,
    "repeated": lambda: shuffled().repeat().to_iter_dataset(FEW),
    "first fit": first_fit,
    "concatenated": concatenated,
    "in a thread": lambda: grain.experimental.ThreadPrefetchIterDataset(
        first_fit(), prefetch_buffer_size=3
    ),
    "window": lambda: grain.experimental.WindowShuffleIterDataset(
        shuffled().repeat().to_iter_dataset(FEW), window_size=5, seed=2
    ),
    "DataLoader": loader_of_grain,
    "iterator": lambda: iter(first_fit()),
}


def given(batches):
    return [[np.asarray(leaf).tolist() for leaf in batch.leaves] for batch in batches]


@pytest.mark.parametrize("kind", PIPELINES)
def test_from_any_position_the_rest_follows(kind):
    """With the state as a checkpoint keeps it, as JSON."""
    make = PIPELINES[kind]
    whole = list(feed(make(), limit=9).epoch(0))
    rest = given(whole)
    assert len(whole) >= 7
    for taken in range(1, len(whole)):
        state = decode_state(json.loads(json.dumps(encode_state(whole[taken - 1].state))))
        source = feed(make(), limit=9)
        source.go_on(taken, state)
        assert given(source.epoch(0, taken)) == rest[taken:]


def fit(folder, pipeline, *more, **options):
    """In epochs of six batches, with a checkpoint in the middle and at the end of each."""
    saves = ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1)
    length = {"max_steps": 16, "max_epochs": None, "limit_train_batches": 6}
    trainer = quiet(enable_checkpointing=None, callbacks=[saves, *more], **length)
    return trainer.fit(Classifier(dropout=0.3), pipeline, **options), trainer


def is_resumed_exactly(folder, make):
    """Gone on with in the middle of the first epoch, and then at the end of the second."""
    whole, uncut = fit(folder / "whole", make())
    with pytest.raises(InterruptedError):
        fit(folder / "cut", make(), Stops(5))
    with pytest.raises(InterruptedError):
        fit(folder / "cut", make(), Stops(13), resume="auto")
    resumed, trainer = fit(folder / "cut", make(), resume="auto")
    assert trainer.global_step == uncut.global_step == 16
    assert_same(resumed, whole)


@pytest.mark.parametrize("kind", ["MapDataset", "repeated", "first fit"])
def test_a_fit_is_resumed_exactly(tmp_path, kind, no_waiting_for_the_disk):
    is_resumed_exactly(tmp_path, PIPELINES[kind])


# What is noticed


def test_a_changed_pipeline_is_an_error_that_lists_what_changed(tmp_path, no_waiting_for_the_disk):
    with pytest.raises(InterruptedError):
        fit(tmp_path, shuffled().repeat(), Stops(4))
    other = grain.MapDataset.source(Row(36)).seed(2).shuffle().batch(5).repeat()
    with pytest.raises(ValueError, match="changed since the checkpoint") as caught:
        fit(tmp_path, other, resume="auto")
    told = str(caught.value)
    for line in (
        "train data: SourceMapDataset: source: rows: 44 in the checkpoint, 36 now",
        "train data: WithSeedMapDataset: seed_rng_seed: 1 in the checkpoint, 2 now",
        "train data: BatchMapDataset: batch_size: 4 in the checkpoint, 5 now",
    ):
        assert line in told
    assert "train data: first batch: " in told
    assert "RepeatMapDataset" not in told


def described(pipeline):
    return feed(pipeline, limit=2).fingerprint()


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_fingerprint_of_a_pipeline_is_the_same_again(kind):
    make = PIPELINES[kind]
    assert json.dumps(described(make())) == json.dumps(described(make()))
    assert "0x" not in json.dumps(described(make()))
    if kind != "MapDataset":  # whose own iterator would read 500 batches ahead
        assert json.dumps(described(iter(make()))) == json.dumps(described(iter(make())))


@pytest.mark.parametrize(
    "other",
    [
        lambda: first_fit(seed=2),
        lambda: first_fit(repeat=False),
        lambda: first_fit().map(dict),
        lambda: grain.experimental.LimitIterDataset(first_fit(), count=5),
        concatenated,
        lambda: pack_into(4),
    ],
    ids=["seed", "repeat", "map", "limit", "kind", "bins"],
)
def test_the_fingerprint_tells_another_pipeline(other):
    assert described(other()) != described(first_fit())
    assert described(iter(other())) != described(iter(first_fit()))


def pack_into(bins):
    pipeline = grain.MapDataset.source(documents()).seed(1).shuffle().repeat()
    pack = grain.experimental.FirstFitPackIterDataset
    packed = pack(pipeline.to_iter_dataset(FEW), length_struct={"ids": 6}, num_packing_bins=bins)
    return packed.map(as_row).batch(4, drop_remainder=True)


def test_how_fast_a_pipeline_reads_is_no_part_of_its_fingerprint():
    slow, fast = (
        numbered().to_iter_dataset(grain.ReadOptions(num_threads=n, prefetch_buffer_size=n))
        for n in (1, 3)
    )
    ahead = grain.experimental.ThreadPrefetchIterDataset
    batches = lambda rows, ahead_: ahead(rows.batch(2), prefetch_buffer_size=ahead_)
    assert described(batches(slow, 1)) == described(batches(fast, 2))


# What goes wrong


def picky(row):
    if row["x"][0] == 9:
        raise ArithmeticError("nine")
    return row


def own_notes(error):
    return [note for note in error.__notes__ if "Grain has removed its internal" not in note]


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_exception_in_map_names_the_row(epoch):
    pipeline = numbered(seed=5).shuffle()
    order = [batch["x"].ravel().tolist() for batch in pipeline.batch(4).repeat(2)]
    number = next(i for i, batch in enumerate(order[3 * epoch :][:3]) if 9 in batch)
    assert number > 0  # at 0 the feed itself could not be made
    with pytest.raises(ArithmeticError, match="nine") as caught:
        list(feed(pipeline.map(picky).batch(4)).epoch(epoch))
    assert own_notes(caught.value) == [
        f"Raised by the training data in batch {number} of epoch {epoch}.",
        "The row that fails is row 9 of the source, a `range`.",
    ]


def test_an_exception_in_the_first_batch_is_explained_too():
    class Broken(Number):
        def __getitem__(self, index):
            return [][index]

    with pytest.raises(IndexError) as caught:
        feed(grain.MapDataset.source(Broken()).shuffle(seed=1).repeat().batch(2), limit=4)
    assert own_notes(caught.value)[0] == "Raised by the training data in batch 0 of epoch 0."
    assert "of the source, a `Broken`." in own_notes(caught.value)[1]


def test_an_exception_in_an_iter_dataset_stops_the_run():
    pipeline = numbered().to_iter_dataset(FEW).map(picky).batch(4)
    batches = feed(pipeline).epoch(0)
    assert values([next(batches), next(batches)]) == [0, 4]
    with pytest.raises(ArithmeticError, match="nine") as caught:
        next(batches)
    assert own_notes(caught.value) == ["Raised by the training data in batch 2 of epoch 0."]
    assert list(batches) == []  # though Grain would go on after it


def test_an_empty_pipeline_is_an_error():
    with pytest.raises(ValueError, match=r"The training data is empty: its loader, a `Batch\w+`,"):
        feed(numbered().filter(lambda row: False).to_iter_dataset(FEW).batch(2))


# Worker processes: they take seconds to start, so that there are few tests

SCRIPT = """
    import sys
    sys.path.insert(0, "tests")
    import jax
    from tasks import Classifier, quiet
    from test_grain import in_processes

    pipeline = in_processes(workers=1)
    fit = lambda given: quiet(max_steps=3, limit_train_batches=2).fit(Classifier(), given)
    fit(pipeline)
    given = iter(pipeline)
    fit(given)
    jax.given = given  # which outlives this module
    print("done")
"""


@pytest.mark.long
def test_a_script_needs_nothing_for_workers_and_prints_nothing_at_exit():
    """Grain alone wants absl's flags to be parsed, and complains where the interpreter ends."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.long
def test_worker_processes(tmp_path, no_waiting_for_the_disk):
    """The same data as without, resumed exactly in the middle, a killed one named."""
    killed: list = []

    class Kills(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                (victim, *_) = [
                    p for p in multiprocessing.active_children() if p.name.startswith("grain-")
                ]
                killed.append(victim.pid)
                os.kill(victim.pid, signal.SIGKILL)

    whole, _ = fit(tmp_path / "whole", shuffled().repeat())
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9") as caught:
        fit(tmp_path / "cut", in_processes(), Kills())
    name = "The worker process {} of Grain, `grain-process-prefetch-ProcessPrefetchDatasetIterator"
    note = own_notes(caught.value)[1]
    assert note.startswith(name.format(*killed))
    assert "died by signal 9 (Killed). The system kills processes where memory runs short." in note
    resumed, trainer = fit(tmp_path / "cut", in_processes(), resume="auto")
    assert trainer.global_step == 16
    assert_same(resumed, whole)
    assert not multiprocessing.active_children()
