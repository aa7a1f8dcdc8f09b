"""`jaxlightning compare` on real runs that part at a known step and leaf."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tasks import Classifier, quiet, rows

from jaxlightning import Callback, DataLoader
from jaxlightning.callbacks import Digest, ModelCheckpoint
from jaxlightning.cli import main
from jaxlightning.loggers import CSVLogger, JSONLLogger


def compare(capsys, *arguments):
    """`(exit code, lines of standard output, standard error)`."""
    code = main(["compare", *map(str, arguments)])
    out, errors = capsys.readouterr()
    return code, out.splitlines(), errors


BIAS = "task/net/layers/1/bias"


class Nudge(Callback):
    """Changes one element of one leaf, by default to the next number there is."""

    def __init__(self, step, by=0.0):
        self.step, self.by = step, by

    def needs_state(self, step):
        return step == self.step

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            task = trainer.task
            leaf = lambda task: task.net.layers[1].bias
            bias = np.asarray(leaf(task)).copy()
            bias[2] = np.nextafter(bias[2], np.float32(9)) + np.float32(self.by)
            trainer.task = jax.tree.map(lambda x: jnp.asarray(bias) if x is leaf(task) else x, task)


class Rows(Callback):
    """The step at which each row is used first."""

    def __init__(self):
        self.first = {}

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        for row in np.asarray(batch["row"]):
            self.first.setdefault(int(row), trainer.global_step)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run, the same again, and three that part from it."""
    root = tmp_path_factory.mktemp("runs")
    data = rows(48) | {"row": np.arange(48)}

    def fit(name, *callbacks, data=data, k=1):
        folder = root / name
        trainer = quiet(
            logger=[CSVLogger(folder, version="log"), JSONLLogger(folder, version="log")],
            max_steps=12,
            log_every_n_steps=4,
            enable_checkpointing=None,
            steps_per_dispatch=k,
            callbacks=[
                *callbacks,
                ModelCheckpoint(folder / "kept", every_n_train_steps=5, save_top_k=-1),
                Digest(),
            ],
        )
        trainer.fit(Classifier(), DataLoader(data, 4, shuffle=True, seed=3))

    used = Rows()
    fit("one", used)
    fit("again")
    fit("nudged-at-a-logged-step", Nudge(8))
    fit("nudged-between", Nudge(6, by=0.5))
    row = next(row for row, step in used.first.items() if step == 11 and data["mask"][row])
    x = data["x"].copy()
    x[row] += 1
    fit("row", data=data | {"x": x})
    return root


def test_equal_runs(runs, capsys):
    code, out, errors = compare(capsys, runs / "one", runs / "again")
    assert (code, errors) == (0, "")
    assert out == [
        "No difference in 4 digests, 2 steps with checkpoints, 3 logged steps.",
        "4 digests: all agree until step 12",
        "2 steps with checkpoints: all agree until step 10",
        "3 logged steps: all agree until step 12",
    ]


def test_one_element_of_one_leaf_at_a_logged_step(runs, capsys):
    code, out, _ = compare(capsys, runs / "one", runs / "nudged-at-a-logged-step")
    assert code == 1
    assert out[:3] == [
        f"The runs part after step 5, by step 8: `{BIAS}`.",
        "4 digests: all agree until step 4, part at step 8",
        f"  {BIAS}",
    ]
    assert "2 steps with checkpoints: all agree until step 5, part at step 10" in out
    differs = [line for line in out if line.startswith(f"  {BIAS}: ")]
    assert len(differs) == 1
    assert "elements differ, by " in differs[0]
    # The losses do not tell.
    assert out[-1] == "3 logged steps: all agree until step 12"


def test_a_change_between_logged_steps(runs, capsys):
    code, out, _ = compare(capsys, runs / "one", runs / "nudged-between")
    assert code == 1
    assert (
        out[0] == "The runs part after step 5, by step 8: `task/net/layers/0/weight` and 11 more."
    )
    assert out[1] == "4 digests: all agree until step 4, part at step 8"
    # From one element everything else follows; the order of leaves is that of the state.
    parts = [line.split("/")[0].strip() for line in out[2:14]]
    assert parts == ["task"] * 4 + ["opt_state"] * 8
    assert out[-2] == "3 logged steps: all agree until step 4, part at step 8"
    assert re.fullmatch(r"  train/loss: 0\.\d+ in the first, 0\.\d+ in the second", out[-1])


def test_one_row_of_the_data(runs, capsys):
    """The row is used first in step 11, and logged steps are 8 and 12."""
    code, out, _ = compare(capsys, runs / "one", runs / "row")
    assert code == 1
    assert out[0].startswith("The runs part after step 10, by step 12: `task/net/layers/0/weight`")
    assert "4 digests: all agree until step 8, part at step 12" in out
    assert "2 steps with checkpoints: all agree until step 10" in out
    assert "set up differently:" in out
    assert any(line.startswith("  metadata/fixed/train data/") for line in out)


def test_parts_of_runs_can_be_named(runs, capsys):
    one, other = runs / "one", runs / "nudged-between"
    code, out, _ = compare(capsys, one / "kept", other / "kept")
    assert code == 1
    assert out[0].startswith("The runs part after step 5, by step 10: ")
    assert len([line for line in out if not line.startswith("  ")]) == 2
    code, out, _ = compare(capsys, one / "jaxlightning_logs" / "log", one)
    assert code == 0
    assert out[-1] == "not compared: checkpoints, which only the second run has"
