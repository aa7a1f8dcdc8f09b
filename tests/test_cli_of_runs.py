"""`jaxlightning checkpoint` on what two runs have saved, and on folders that are no checkpoints."""

import re
import shutil

import pytest
from tasks import Classifier, quiet, rows

from jaxlightning import DataLoader
from jaxlightning._checkpoint import CheckpointDamaged, CheckpointError, read_metadata
from jaxlightning.callbacks import ModelCheckpoint, ThroughputMonitor
from jaxlightning.cli import main
from jaxlightning.loggers import CSVLogger


def run(capsys, *arguments):
    """`(exit code, standard output, standard error)`."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs that compute the same."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("one", "other"):
        quiet(
            max_epochs=1,
            enable_checkpointing=None,
            callbacks=[ThroughputMonitor(), ModelCheckpoint(root / name / "saved", "{step}")],
            logger=CSVLogger(root / name, version=f"of_{name}"),
            log_every_n_steps=1,
        ).fit(Classifier(), DataLoader(rows(8), 4))
    return root


def test_diff_of_two_runs_that_compute_the_same(runs, capsys):
    one, other = sorted(runs.rglob("step=2"))
    assert read_metadata(one)["run"] != read_metadata(other)["run"]
    assert read_metadata(one)["loggers"] != read_metadata(other)["loggers"]
    assert run(capsys, "checkpoint", "diff", one, other) == (0, "No difference.\n", "")


def test_of_a_folder_that_has_checkpoints_below_it_these_are_named(runs, capsys):
    below = [path.relative_to(runs) for path in sorted(runs.rglob("step=2"))]
    whole = f"`{runs}` is no checkpoint; below it there are `{below[0]}`, `{below[1]}`."
    one = f"`{runs / 'one'}` is no checkpoint; below it there is `{below[0].relative_to('one')}`."
    for command in (["checkpoint", "verify"], ["checkpoint", "inspect"], ["replay"]):
        assert run(capsys, *command, runs) == (2, "", f"jaxlightning: {whole}\n")
    diff = run(capsys, "checkpoint", "diff", runs / "one", runs / below[1])
    assert diff == (2, "", f"jaxlightning: {one}\n")
    with pytest.raises(CheckpointError, match=re.escape(one)):
        Classifier.load_from_checkpoint(runs / "one")
    with pytest.raises(CheckpointError, match=re.escape(one)):
        quiet(max_epochs=1).fit(Classifier(), DataLoader(rows(8), 4), ckpt_path=runs / "one")
    for number in range(3):
        shutil.copytree(runs / below[0], runs / "many" / f"step={number}")
    with pytest.raises(CheckpointError, match=r"are `step=0`, `step=1`, `step=2`\.$"):
        read_metadata(runs / "many")
    (runs / "many" / "step=3").mkdir()
    with pytest.raises(CheckpointError, match=r"`step=2` and more\.$"):
        read_metadata(runs / "many")
    with pytest.raises(CheckpointDamaged, match="its file `COMMIT` is missing"):
        read_metadata(runs / "many" / "step=3")
