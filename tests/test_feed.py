"""From a loader to the devices: read ahead, checked, resumed."""

import itertools
import json
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feeds import Numbers, Stateful, StatefulIterator, Stops, batch_of, feed, values
from tasks import Classifier, assert_same, quiet, rows

from jaxlightning import DataLoader
from jaxlightning.callbacks import ModelCheckpoint
from jaxlightning.data._iterator_state import decode_state, encode_state
from jaxlightning.parallel import Placement


class BytesIterator(StatefulIterator):
    """Whose state is opaque, as that of Grain's `DataLoader`."""

    def get_state(self):
        return b"\xff" + bytes([self.at["next"]])

    def set_state(self, state):
        self.at = {"next": state[1]}


class OfBytes(Stateful):
    def __iter__(self):
        self.iterations += 1
        return BytesIterator(self)


# What is read, when, and how far ahead


def test_batches_are_on_the_device_and_frozen():
    batch = batch_of(3)
    (found,) = feed([batch]).epoch(0)
    assert isinstance(found.leaves[0], jax.Array)
    assert found.batch["x"] is found.leaves[0]
    assert found.shapes == ((2, 1),)
    with pytest.raises(ValueError, match="read-only"):
        batch["x"][0] = 4  # on CPU, the array on the device may be this very buffer


def aligned(rows):
    """A buffer that a device on CPU would go on reading."""
    held = np.zeros(rows * 4 + 64, np.uint8)
    start = -held.ctypes.data % 64
    return held, held[start : start + rows * 4].view(np.float32).reshape(rows, 1)


def test_a_loader_that_writes_into_its_batch_again_is_told():
    class Reuses(Numbers):
        def __iter__(self):
            buffer = np.zeros((16, 1), np.float32)
            for i in range(self.count):
                buffer[:] = i
                yield {"x": buffer}

    batches = feed(Reuses(3)).epoch(0)
    assert values([next(batches)]) == [0]
    with pytest.raises(ValueError, match="read-only") as caught:
        next(batches)
    assert caught.value.__notes__ == ["Raised by the training data in batch 1 of epoch 0."]


@pytest.mark.parametrize("whole", [True, False])
def test_a_loader_may_give_views_of_one_buffer(whole):
    """Which are copied: to forbid writing through the view would not forbid it to the owner."""

    class Views(Numbers):
        def __iter__(self):
            self.held, buffer = aligned(16)
            for i in range(self.count):
                buffer[:] = i
                yield {"x": buffer if whole else buffer[:8]}

    loader = Views(5)
    found = list(feed(loader).epoch(0))
    loader.held[:] = 255
    assert values(found) == [0, 1, 2, 3, 4]


def test_each_batch_is_looked_at_on_the_host():
    seen = []

    def check(batch):
        assert isinstance(batch["x"], np.ndarray)
        seen.append(int(batch["x"][0, 0]))
        if seen[-1] == 3:
            raise ValueError("There is no 3.")

    batches = feed(Numbers(5), check=check).epoch(0)
    assert values([next(batches) for _ in range(3)]) == [0, 1, 2]
    with pytest.raises(ValueError, match="There is no 3") as caught:
        next(batches)
    assert caught.value.__notes__ == ["Raised by the training data in batch 3 of epoch 0."]
    assert seen == [0, 0, 1, 2, 3]  # the first also before anything is compiled


def test_of_batches_on_the_device_only_the_first_is_looked_at():
    """To fetch the others would wait for whatever computes them."""
    seen = []
    batches = [{"x": jnp.full((2, 1), i)} for i in (1, 2)]
    feed(batches, check=lambda batch: seen.append(type(batch["x"])))
    assert seen == [np.ndarray]


def test_slices_of_the_users_array_leave_it_as_it_was():
    x = np.arange(8, dtype=np.float32).reshape(8, 1)
    found = list(feed([{"x": x[i : i + 4]} for i in (0, 4)]).epoch(0))
    x *= 0
    assert values(found) == [0, 4]


def test_a_view_that_nobody_shares_is_not_copied(monkeypatch):
    given: list = []
    put = Placement.put
    monkeypatch.setattr(
        Placement, "put", lambda self, leaves: given.extend(leaves) or put(self, leaves)
    )
    loader = DataLoader(
        {"x": np.ones(8, np.float32)}, 4, transform=lambda b: {"x": b["x"][:, None]}
    )
    list(feed(loader).epoch(0))
    assert [leaf.base is not None for leaf in given] == [True, True]
    assert not any(leaf.flags.writeable for leaf in given)


def test_batches_that_lie_on_the_device_already_are_passed_through():
    batches = [{"x": jax.device_put(jnp.ones((2, 1)) * i, jax.devices()[0])} for i in range(3)]
    before = threading.active_count()
    found = list(feed(batches).epoch(0, 1))
    assert [batch.leaves[0] is given["x"] for batch, given in zip(found, batches[1:], strict=True)]
    assert all(b.leaves[0] is g["x"] for b, g in zip(found, batches[1:], strict=True))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("rows_", "prefetch", "depth"), [(2**18, 1, 1), (2**18, 3, 3), (2, 2, 16)], ids=str
)
def test_the_thread_reads_ahead_and_no_further(rows_, prefetch, depth):
    """So many batches as asked for; of small ones more, because changing threads costs too."""
    reads, taken, ahead = threading.Semaphore(0), 0, []

    class Watched(Numbers):
        def __iter__(self):
            for i in range(self.count):
                ahead.append(i + 1 - taken)
                reads.release()
                yield batch_of(i, rows_)

    source = feed(Watched(60), prefetch=prefetch)
    reads.acquire()
    ahead.clear()
    batches = source.epoch(0)
    found = [next(batches)]
    taken = 1
    for _ in range(depth):  # though nobody asks for more than the first
        assert reads.acquire(timeout=30)
    for batch in batches:
        taken += 1
        found.append(batch)
    assert values(found) == list(range(60))
    # A batch makes room for another just before it is counted here.
    assert max(ahead) <= depth + 1


def test_an_exception_of_the_loader_is_raised_where_its_batch_would_come():
    class Breaks(Numbers):
        def __iter__(self):
            yield batch_of(0)
            yield batch_of(1)
            raise ZeroDivisionError("in the loader")

    batches = feed(Breaks(3)).epoch(0)
    assert values([next(batches), next(batches)]) == [0, 1]
    with pytest.raises(ZeroDivisionError, match="in the loader"):
        next(batches)


def test_the_thread_ends_when_the_epoch_is_left_early():
    batches = feed(Numbers(1000)).epoch(0)
    next(batches)
    (thread,) = [t for t in threading.enumerate() if t.name == "jaxlightning-feed"]
    batches.close()
    assert not thread.is_alive()  # so that it can't read while the next epoch does


def test_a_thread_that_hangs_in_the_loader_hangs_nobody_else(monkeypatch):
    monkeypatch.setattr("jaxlightning.data._read_ahead._JOIN_S", 0.01)
    loader = Waits()
    batches = feed(loader).epoch(0)
    next(batches)
    (thread,) = [t for t in threading.enumerate() if t.name == "jaxlightning-feed"]
    batches.close()
    assert thread.is_alive()
    loader.go.set()
    thread.join(30)
    assert not thread.is_alive()


class Waits(Numbers):
    """Whose second batch does not come before `go` is set."""

    def __init__(self):
        super().__init__(2)
        self.go = threading.Event()

    def __iter__(self):
        yield batch_of(0)
        self.go.wait(30)
        yield batch_of(1)


def test_waiting_for_data_is_measured():
    loader = Waits()
    source = feed(loader, poll=loader.go.set)  # asked while waiting only
    assert source.wait_s == 0
    assert values(source.epoch(0)) == [0, 1]
    assert source.wait_s > 0


def test_waiting_for_data_may_be_interrupted():
    def poll():
        if next(polls) == 3:
            raise InterruptedError

    loader, polls = Waits(), itertools.count()
    try:
        with pytest.raises(InterruptedError):
            list(feed(loader, poll=poll).epoch(0))
    finally:
        loader.go.set()


# Announced shapes


def test_shapes_of_a_list_are_those_of_its_batches():
    batches = [batch_of(0, 4), batch_of(1, 4), batch_of(2, 3)]
    sizes = lambda **arguments: [shape["x"].shape[0] for shape in feed(batches, **arguments).shapes]
    assert sizes() == [4, 3]
    assert sizes(limit=2) == [4]


def test_shapes_of_a_loader_are_announced_unless_the_limit_cuts_them_off():
    loader = DataLoader({"x": np.zeros((10, 1), np.float32)}, 4)
    sizes = lambda **arguments: [shape["x"].shape[0] for shape in feed(loader, **arguments).shapes]
    assert sizes() == [4, 2]
    assert sizes(limit=3) == [4, 2]
    assert sizes(limit=2) == [4]


def test_shapes_are_read_once():
    """Each look at `batch_shapes` reads two batches, and every validation looks."""
    reads = []

    class Source:
        def __len__(self):
            return 10

        def __getitem__(self, rows):
            reads.append(len(rows))
            return {"x": np.zeros((len(rows), 1), np.float32)}

    source = feed(DataLoader(Source(), 4))
    first = source.shapes
    before = len(reads)
    assert source.shapes == first
    assert len(reads) == before


# Batches that are wrong


def test_batches_have_to_be_alike():
    other = {"x": batch_of(1)["x"], "y": batch_of(1)["x"]}
    with pytest.raises(ValueError, match=r"A training batch has the structure .*'x': \*, 'y': \*"):
        list(feed([batch_of(0), other]).epoch(0))


def test_a_later_batch_whose_leaves_differ_in_size():
    pair = lambda a, b: {"x": np.ones((a, 1), np.float32), "y": np.ones(b, np.float32)}
    with pytest.raises(ValueError, match=r"A training batch has leaves .*\(`x`: 2, `y`: 3\)"):
        list(feed([pair(2, 2), pair(2, 3)]).epoch(0))


def test_a_length_that_is_not_true_is_noticed():
    class Boasts(Numbers):
        def __len__(self):
            return self.count + 2

    with pytest.raises(ValueError, match=r"says that it has 5 batches \(`__len__`\), but gave 3"):
        list(feed(Boasts(3)).marked(0))


def test_more_batches_than_the_length_says_are_not_taken():
    class Modest(Numbers):
        def __len__(self):
            return self.count - 2

    marked = list(feed(Modest(5)).marked(0))
    assert values(batch for batch, _ in marked) == [0, 1, 2]
    assert [last for _, last in marked] == [False, False, True]


# Going on in the middle


def test_a_list_goes_on_without_a_word():
    batches = [batch_of(i) for i in range(5)]
    assert values(feed(batches).epoch(0, 3)) == [3, 4]


def test_an_iterable_is_replayed_and_says_what_that_costs():
    source = feed(Numbers(6))
    with pytest.warns(UserWarning, match=r"`Numbers`, .* to go on, 4 batches are read and thrown"):
        assert values(source.epoch(0, 4)) == [4, 5]


def test_a_one_pass_iterator_is_replayed_over_all_epochs():
    source = feed((batch_of(i) for i in range(20)), limit=5)
    source.go_on(12, None)  # two epochs, and two batches of the third
    with pytest.warns(UserWarning, match="12 batches are read and thrown away"):
        assert values(source.epoch(2, 2)) == [12, 13, 14]
    assert values(source.epoch(3)) == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("kind", [Stateful, OfBytes])
def test_states_are_those_of_the_batches_and_not_of_the_thread_ahead(kind):
    source = kind(8)
    batches = list(feed(source, prefetch=8).epoch(0))
    for number, batch in enumerate(batches[:-1], 1):
        other = kind(8)
        resumed = feed(other)
        other.read = 0
        resumed.go_on(number, batch.state)
        assert values(resumed.epoch(0, number)) == list(range(number, 8))
        assert other.read == 8 - number  # nothing was replayed


def test_an_iterator_with_a_state_goes_on_over_epochs():
    source = feed(StatefulIterator(Numbers(10)), limit=4)
    list(source.epoch(0))
    state = next(iter(source.epoch(1))).state
    resumed = feed(StatefulIterator(Numbers(10)), limit=4)
    resumed.go_on(5, state)
    assert values(resumed.epoch(1, 1)) == [5, 6, 7]
    assert values(resumed.epoch(2)) == [8, 9]


class Batches:
    """An iterable of the rows of a classification; with an iterator of one's choice."""

    def __init__(self, stateful):
        self.count, self.read, self.stateful = 7, 0, stateful
        self.rows = list(DataLoader(rows(28), 4))

    def __iter__(self):
        numbers = StatefulIterator(self) if self.stateful else range(self.count)
        return RowsOf(self, numbers) if self.stateful else (self.rows[i] for i in numbers)


class RowsOf(StatefulIterator):
    def __init__(self, of, numbers):
        super().__init__(of)
        self.numbers = numbers

    def __next__(self):
        return self.of.rows[int(super().__next__()["x"][0, 0])]


@pytest.mark.parametrize("stateful", [True, False])
def test_a_fit_on_an_iterable_resumes_exactly(tmp_path, stateful):
    """With a length that nobody knows, so that the loop reads one batch ahead."""

    def fit(*more, **options):
        saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1)
        trainer = quiet(
            max_epochs=2, enable_checkpointing=None, callbacks=[saves, *more], on_recompile="raise"
        )
        return trainer.fit(Classifier(dropout=0.3), Batches(stateful), **options)

    whole = quiet(max_epochs=2).fit(Classifier(dropout=0.3), Batches(stateful))
    with pytest.raises(InterruptedError):
        fit(Stops(11))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(fit(resume="auto"), whole)
    told = [str(w.message) for w in caught if "thrown away" in str(w.message)]
    assert len(told) == (0 if stateful else 1)


# The states of iterators in a checkpoint


@pytest.mark.parametrize(
    "state",
    [
        None,
        {"next_index": 3, "deep": [1, 2.5, None, True, "x"]},
        {"slices": {"ids": (-1, -1)}, "nested": [((1,), [2])]},
        {1: "a", (2, 3): {"~tuple": 4}, None: b"\x00\xff"},
        b"opaque",
        {"~bytes": "not ours"},
    ],
    ids=str,
)
def test_states_come_back_as_they_were(state):
    back = decode_state(json.loads(json.dumps(encode_state(state))))
    assert back == state
    assert repr(back) == repr(state)  # tuples are no lists, keys no strings


def test_states_may_hold_arrays():
    state = {
        "x": np.arange(6, dtype=np.int16).reshape(2, 3),
        "n": np.int64(7),
        "f": np.float32(0.1),
    }
    back = decode_state(json.loads(json.dumps(encode_state(state))))
    np.testing.assert_array_equal(back["x"], state["x"])
    assert back["x"].dtype == np.int16
    assert back["x"].flags.writeable
    assert (type(back["n"]), back["n"]) == (np.int64, 7)
    assert (type(back["f"]), back["f"]) == (np.float32, np.float32(0.1))


def test_a_state_that_no_checkpoint_can_keep():
    with pytest.raises(TypeError, match=r"holds a `set`, which a checkpoint can't keep\. Let its"):
        encode_state({"seen": {1, 2}})
