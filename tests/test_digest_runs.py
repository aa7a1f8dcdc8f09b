"""`Digest` in runs: what it records, that a resumed run records the same, and what it costs."""

import functools
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digests import reference
from tasks import FEATURES, fit_with_one_slow_step, quiet, rows

from jaxlightning import Callback, DataLoader, Mean, TaskModule, buffer
from jaxlightning._digest import DigestRecord, named_arrays
from jaxlightning.callbacks import Digest, ModelCheckpoint
from jaxlightning.loggers import CSVLogger


class Noisy(TaskModule):
    """Two parameters, a buffer, noise, momentum: little to compile."""

    weight: jax.Array
    bias: jax.Array
    lr: float = eqx.field(static=True)
    seen: jax.Array = buffer()

    def __init__(self, lr=0.1, scale=1.0):
        self.weight = scale * jnp.linspace(-1, 1, FEATURES * 8).reshape(FEATURES, 8)
        self.bias, self.seen, self.lr = jnp.zeros(8), jnp.float32(0), lr

    def training_step(self, batch, *, key):
        out = batch["x"] @ self.weight + self.bias[None] + jax.random.normal(key, (4, 8))
        task = eqx.tree_at(lambda task: task.seen, self, self.seen + 1)
        return Mean.over(out**2), {}, task

    def configure_optimizers(self):
        return optax.sgd(self.lr, momentum=0.9)


def read(folder):
    lines = (Path(folder) / "digests.jsonl").read_text().splitlines()
    return [DigestRecord.of_json(json.loads(line)) for line in lines]


class Keeps(Callback):
    """The digests of the states at some steps, computed apart and on the host."""

    def __init__(self):
        self.found = {}

    def on_train_start(self, trainer):
        self.on_checkpoint(trainer, "step")

    def on_checkpoint(self, trainer, point):
        arrays = named_arrays(trainer.state)
        self.found[trainer.global_step] = {
            name: reference(*on_host(array))
            for name, array in arrays.items()
            if not name.startswith("metrics/")
        }

    def needs_state(self, step):
        return True


def on_host(array):
    prng = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    if prng:
        return np.asarray(jax.random.key_data(array)), f"keys[] of `{jax.random.key_impl(array)}`"
    host = np.asarray(array)
    return host, f"{host.dtype.name}[{','.join(map(str, host.shape))}]"


def fit(folder, *callbacks, steps=12, every=4, task=None, data=None, resume=None, **arguments):
    trainer = quiet(
        default_root_dir=folder,
        max_steps=steps,
        log_every_n_steps=every,
        callbacks=[*callbacks, Digest()],
        **arguments,
    )
    loader = DataLoader(rows(40) if data is None else data, 4, shuffle=True, seed=1)
    trainer.fit(task or Noisy(), loader, resume=resume)
    return trainer


def test_records_are_the_digests_of_the_states(tmp_path):
    keeps = Keeps()
    fit(tmp_path, keeps)
    found = read(tmp_path)
    assert [record.step for record in found] == [0, 4, 8, 12]
    for record in found:
        assert record.leaves == keeps.found[record.step]
    kinds = {name.split("/")[0] for name in found[0].leaves}
    assert kinds == {"step", "key", "task", "opt_state"}
    assert found[0].leaves["key"] == found[3].leaves["key"]
    assert len({record.leaves["task/weight"] for record in found}) == 4
    counts = [record.leaves["task/seen"] for record in found]
    assert counts == [reference(np.float32(step), "float32[]") for step in (0, 4, 8, 12)]


class Saves(ModelCheckpoint):
    def __init__(self, folder):
        super().__init__(Path(folder) / "checkpoints", every_n_train_steps=3, save_top_k=-1)


class Crashes(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file of a run of blocks that nobody cut, and of one without blocks."""

    @functools.cache
    def of(block):
        folder = tmp_path_factory.mktemp("whole")
        fit(folder, Saves(folder), steps=24, enable_checkpointing=None, steps_per_dispatch=block)
        return (folder / "digests.jsonl").read_bytes()

    return of


@pytest.mark.parametrize(("crash", "block"), [(5, 1), (9, 1), (14, 5)])
def test_a_resumed_run_writes_the_same_file(tmp_path, whole, crash, block):
    run = functools.partial(
        fit, tmp_path, steps=24, enable_checkpointing=None, steps_per_dispatch=block
    )
    with pytest.raises(RuntimeError, match="killed"):
        run(Saves(tmp_path), Crashes(crash))
    # What was under way is not lost. Lines that are none go, the last of them cut by a kill.
    assert [record.step for record in read(tmp_path)] == list(range(0, crash, 4))
    with open(tmp_path / "digests.jsonl", "ab") as file:
        file.write(b"[" * 100_000 + b'\n{"step": 8')
    run(Saves(tmp_path), resume="auto")
    assert (tmp_path / "digests.jsonl").read_bytes() == whole(block)


def test_records_of_steps_that_are_replayed_are_replaced(tmp_path, whole):
    run = functools.partial(fit, tmp_path, enable_checkpointing=None)
    run(Saves(tmp_path), steps=24)
    for path in (tmp_path / "checkpoints").glob("*step=[12]*"):
        shutil.rmtree(path)  # all after step 9
    run(Saves(tmp_path), steps=10, resume="auto")
    assert [record.step for record in read(tmp_path)] == [0, 4, 8]
    run(Saves(tmp_path), steps=24, resume="auto")
    assert (tmp_path / "digests.jsonl").read_bytes() == whole(1)


def test_a_run_from_the_start_replaces_an_older_file(tmp_path):
    fit(tmp_path)
    fit(tmp_path, steps=4, task=Noisy(scale=2.0))
    assert [record.step for record in read(tmp_path)] == [0, 4]


def test_going_back_in_the_middle_of_a_run(tmp_path):
    """As `Trainer.rewind` does it: the checkpoint's state is loaded, and its step settled again."""
    digest = Digest()
    trainer = quiet(default_root_dir=tmp_path, max_steps=8, log_every_n_steps=4, callbacks=digest)
    trainer.fit(Noisy(), DataLoader(rows(32), 4))
    first, second, third = read(tmp_path)
    digest.load_state_dict({"delivered": 0, "undelivered": second.as_json()})
    assert read(tmp_path) == [first]
    assert digest.state_dict() == {"delivered": 0, "undelivered": second.as_json()}
    trainer._run.position.step = 4
    digest.on_checkpoint(trainer, "step")  # of the state as it is now; the record is kept
    assert digest.state_dict() == {"delivered": 0, "undelivered": second.as_json()}
    trainer._run.position.step = 8
    digest.on_checkpoint(trainer, "step")
    assert read(tmp_path) == [first, second]
    assert digest.state_dict() == {"delivered": 4, "undelivered": third.as_json()}
    digest.teardown(trainer, "fit")


def test_a_sharded_run_has_the_digests_of_one_device_where_values_are_equal(tmp_path):
    frozen = lambda: Noisy(lr=0.0)  # Gradients are equal to tolerance, parameters exactly.
    fit(tmp_path / "one", steps=4, task=frozen())
    fit(tmp_path / "four", steps=4, task=frozen(), devices=4, strategy="fsdp", mesh={"fsdp": 4})
    (start, one), (same_start, four) = read(tmp_path / "one"), read(tmp_path / "four")
    assert start == same_start
    names = [name for name in one.leaves if not name.startswith("opt_state")]
    assert [one.leaves[name] for name in names] == [four.leaves[name] for name in names]
    assert one.digest != start.digest


def test_where_the_file_goes(tmp_path):
    logger = CSVLogger(tmp_path, version="log")
    fit(tmp_path / "elsewhere", steps=4, logger=logger)
    assert len(read(logger.log_dir)) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_fast_dev_run_leaves_nothing(tmp_path):
    fit(tmp_path, steps=-1, every=None, fast_dev_run=2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .* `Trainer\(default_root_dir=...\)`"):
        fit(tmp_path / "file")


# What it costs


def test_each_digest_is_read_an_interval_late(tmp_path, monkeypatch):
    read_at = []
    taken = digest_module()._Taken

    def late(self):
        read_at.append((self.step, trainer.global_step))
        return original(self)

    original = taken.read
    monkeypatch.setattr(taken, "read", late)
    trainer = quiet(
        default_root_dir=tmp_path, max_steps=14, log_every_n_steps=4, callbacks=Digest()
    )
    trainer.fit(Noisy(), DataLoader(rows(80), 4))
    assert read_at == [(0, 4), (4, 8), (8, 12), (12, 14)]


def digest_module():
    import jaxlightning.callbacks._digest as module  # type: ignore[import-not-found]

    return module


class Watches(Callback):
    """Whether the step that was just taken had already run when all had heard of it."""

    def __init__(self):
        self.ready = {}

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.latest = outputs._leaves[0]

    def on_checkpoint(self, trainer, point):
        if point == "step":
            self.ready[trainer.global_step] = self.latest.is_ready()


@pytest.mark.parametrize("k", [1, 2])
def test_the_host_does_not_wait_for_the_step_that_it_digests(tmp_path, k):
    watches = Watches()
    trainer = quiet(
        default_root_dir=tmp_path,
        max_steps=6,
        log_every_n_steps=4,
        callbacks=[Digest(), watches],
        steps_per_dispatch=k,
    )
    fit_with_one_slow_step(trainer, slow=3, steps=8)
    assert watches.ready[4] is False


@pytest.mark.parametrize("k", [1, 4])
def test_nothing_compiles_after_the_start(tmp_path, k):
    compiled, marks = [], {}

    def listen(event, duration, **kwargs):
        if "compile" in event:
            compiled.append(event)

    class Marks(Callback):
        def on_checkpoint(self, trainer, point):
            marks[trainer.global_step] = len(compiled)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fit(tmp_path, Marks(), steps=16, steps_per_dispatch=k)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert marks[4] == marks[16] > 0


def test_the_state_stays_donated(tmp_path):
    """The digest holds no reference to what it has read."""
    held = []

    class Holds(Callback):
        def on_checkpoint(self, trainer, point):
            if point == "step":
                held.append(jax.tree.leaves(eqx.filter(trainer.state.task, eqx.is_array))[0])

    fit(tmp_path, Holds(), steps=6, every=2)
    assert [leaf.is_deleted() for leaf in held] == [True] * 5 + [False]
