"""The profiler's window, read back from the files it writes."""

import gzip
import json

import pytest
from steps import Regression, batches, quiet_trainer  # type: ignore[import-not-found]

from jaxlightning.callbacks import Profiler


def fit(callback, folder, count=12, **arguments):
    callbacks = [] if callback is None else [callback]
    trainer = quiet_trainer(callbacks, default_root_dir=folder, **arguments)
    trainer.fit(Regression.initial(), list(batches(count)))
    return trainer


def marked_steps(folder):
    """The numbers of the steps in the one trace under `folder`."""
    (trace,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]


def test_a_window_of_steps_for_tensorboard_and_perfetto(tmp_path, capsys):
    fit(Profiler(start_step=4, num_steps=3), tmp_path)
    assert marked_steps(tmp_path) == [5, 6, 7]
    # What TensorBoard's profile plugin looks for.
    (planes,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert planes.stat().st_size > 0
    out = capsys.readouterr().out
    assert "Profiled steps 5 to 7." in out
    assert f"tensorboard --logdir {tmp_path}" in out
    assert "perfetto_trace.json.gz at https://ui.perfetto.dev" in out


def test_the_first_steps_of_a_fit(tmp_path):
    fit(Profiler(0, 2, dirpath=tmp_path / "here"), tmp_path)
    assert marked_steps(tmp_path / "here") == [1, 2]


def test_blocks_are_cut_at_the_window(tmp_path):
    profiler = Profiler(start_step=3, num_steps=4)
    fit(profiler, tmp_path, steps_per_dispatch=5)
    assert marked_steps(tmp_path) == [4, 5, 6, 7]
    assert [step for step in range(13) if profiler.needs_state(step)] == [3, 7]


def test_a_fit_that_ends_inside_the_window_is_still_written(tmp_path, capsys):
    fit(Profiler(start_step=2, num_steps=100), tmp_path, count=5)
    assert marked_steps(tmp_path)[:3] == [3, 4, 5]
    assert "Profiled steps 3 to 5." in capsys.readouterr().out


def test_a_fit_that_ends_before_the_window_writes_nothing(tmp_path, capsys):
    fit(Profiler(start_step=100), tmp_path, count=2)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


class Breaks(Profiler):
    def on_train_batch_start(self, trainer, batch, batch_idx):
        if batch_idx == 4:
            raise RuntimeError("broken")


def test_an_exception_inside_the_window_leaves_the_profiler_free(tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        fit(Breaks(start_step=1, num_steps=100), tmp_path)
    fit(Profiler(start_step=1, num_steps=1), tmp_path / "after")
    assert marked_steps(tmp_path / "after") == [2]


def test_as_an_argument_of_the_trainer(tmp_path):
    trainer = fit(None, tmp_path, profiler="jax", count=16)
    assert any(type(callback) is Profiler for callback in trainer.callbacks)
    assert marked_steps(tmp_path) == [11, 12, 13, 14, 15]


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="`start_step` of at least 0 and `num_steps` of at least"):
        Profiler(num_steps=0)
