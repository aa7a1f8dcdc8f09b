"""Between two log intervals nothing is read from the device, and nothing is compiled."""

import threading

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from tasks import Classifier, fit_with_one_slow_step, quiet, rows

from jaxlightning import Callback, DataLoader
from jaxlightning import _stream as stream_module
from jaxlightning._fit import RUN_AHEAD, FitRun
from jaxlightning.callbacks import ModelCheckpoint, TQDMProgressBar
from jaxlightning.loggers import CSVLogger, TensorBoardLogger


class Guarded:
    """A leaf on the device that may be waited for, but read by the sanctioned reader only."""

    allowed = False
    reads = 0

    def __init__(self, like):
        self.shape, self.dtype, self.ndim = like.shape, like.dtype, like.ndim

    def _refuse(self, *args, **kwargs):
        raise AssertionError("A metric was read outside the sanctioned reader.")

    __float__ = __int__ = __bool__ = __index__ = __len__ = __iter__ = item = tolist = _refuse

    def __array__(self, *args, **kwargs):
        if not Guarded.allowed:
            self._refuse()
        Guarded.reads += 1
        return np.ones(self.shape, self.dtype)

    def block_until_ready(self):
        return self

    def copy_to_host_async(self): ...


def loaded(tmp_path, **arguments):
    """A Trainer with all that usually listens."""
    bar = TQDMProgressBar()
    return quiet(
        logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path)],
        callbacks=[bar, ModelCheckpoint(dirpath=tmp_path / "checkpoints")],
        enable_checkpointing=None,
        enable_progress_bar=None,
        log_every_n_steps=5,
        max_epochs=1,
        **arguments,
    )


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("k", [1, 4])
def test_nothing_reads_a_metric_but_the_one_reader(monkeypatch, tmp_path, k):
    """The real loop with everything attached, around a stub in place of the compiled step."""

    class Stubbed(FitRun):
        def compile(self, poll):
            first, last = self._metric_range
            guarded = lambda leaves: [Guarded(leaf) for leaf in leaves]
            outputs = guarded(jax.tree.leaves(self.metrics_like))
            empties = self._fresh
            self.leaves[first:last] = guarded(self.leaves[first:last])
            self._fresh = lambda: guarded(empties())
            self.program = type("Stub", (), {"__call__": lambda s, a, b: (list(a), outputs)})()
            self.program.compile_s = self.program.recompilations = 0

    read = stream_module.read

    def sanctioned(pieces):
        Guarded.allowed = True
        try:
            return read(pieces)
        finally:
            Guarded.allowed = False

    monkeypatch.setattr(stream_module, "read", sanctioned)
    monkeypatch.setattr("jaxlightning._setup.FitRun", Stubbed)
    monkeypatch.setattr(stream_module, "_on_device", lambda sums: _has_guard(sums))
    monkeypatch.setattr("jaxlightning._trainer.Trainer._save_requested", lambda self: None)
    Guarded.reads = 0
    trainer = loaded(tmp_path, steps_per_dispatch=k)
    trainer.fit(Classifier(), DataLoader(rows(96), 4))
    # Five intervals of the 24 steps (the last one cut by the epoch's end), two metrics of two
    # leaves each.
    assert Guarded.reads == 5 * 4
    with pytest.raises(AssertionError, match="outside the sanctioned reader"):
        float(Guarded(jnp.ones(())))


def _has_guard(sums):
    return any(isinstance(leaf, Guarded) for leaf in jax.tree.leaves(sums))


@pytest.mark.parametrize("k", [1, 4])
def test_nothing_compiles_after_the_first_interval(tmp_path, k):
    compiled, at_boundary = [], []

    def listen(event, duration, **kwargs):
        if "compile" in event:
            compiled.append(event)

    class Marks(Callback):
        def on_checkpoint(self, trainer, point):
            if point == "step" and trainer.global_step in (10, 40):
                at_boundary.append(len(compiled))

        def needs_state(self, step):
            return step in (10, 40)

    trainer = loaded(tmp_path, steps_per_dispatch=k)
    trainer._given_callbacks.append(Marks())
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        trainer.fit(Classifier(dropout=0.1), DataLoader(rows(200), 4))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) > 0
    assert at_boundary[0] == at_boundary[1]


def test_hooks_reach_the_run_ahead_bound_before_the_first_step_has_ended():
    """And never go beyond it: then the host waits."""
    first: list = []
    ready: list[bool] = []

    class Watches(Callback):
        def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
            leaf = outputs._leaves[0]
            first.append(leaf)
            ready.append(first[0].is_ready())
            if len(first) > RUN_AHEAD:
                assert first[-1 - RUN_AHEAD].is_ready()

    fit_with_one_slow_step(quiet(max_epochs=1, callbacks=Watches()), slow=0, steps=12)
    assert ready[:RUN_AHEAD] == [False] * RUN_AHEAD
    assert len(ready) == 12


def test_barebones_collects_nothing():
    trainer = quiet(
        max_epochs=1,
        barebones=True,
        enable_checkpointing=None,
        enable_progress_bar=None,
        enable_model_summary=None,
        num_sanity_val_steps=None,
        logger=None,
    )
    trainer.fit(Classifier(), DataLoader(rows(), 8))
    assert trainer.callback_metrics == {}
    assert trainer.state.metrics == {}
    assert trainer.global_step == 5


def test_the_import_costs_little():
    """No test of time: what `import jaxlightning` loads beyond equinox and optax is its own."""
    import subprocess
    import sys

    code = (
        "import equinox, optax, sys; before = set(sys.modules); import jaxlightning;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"jaxlightning", "difflib", "contextlib", "queue", "_queue", "fcntl", "csv", "_csv"}
    foreign = {"tqdm", "tensorboardX", "datasets", "flax", "orbax", "safetensors", "tokenizers"}
    loaded_ = set(out.stdout.split())
    assert not loaded_ & foreign
    assert len(loaded_ - allowed) < 20, loaded_


def test_threads_end_with_the_fit():
    before = threading.active_count()
    quiet(max_epochs=2).fit(Classifier(), DataLoader(rows(), 8))
    for thread in threading.enumerate():
        if thread.name == "jaxlightning-feed":
            thread.join(5)
    assert threading.active_count() <= before
