"""Loggers, read back by other readers than those that wrote."""

import csv
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from jaxlightning.loggers import CSVLogger, JSONLLogger, Logger, TensorBoardLogger
from jaxlightning.loggers._logger import Follower, next_version

FILES = [CSVLogger, JSONLLogger, TensorBoardLogger]
NUMBERS = {"train/loss": 0.1 + 0.2, "train/accuracy": 1 / 3}


# Readers


def read_csv(logger):
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: float(cell) for name, cell in row.items() if cell not in ("", None)} for row in rows
    ]


def refuse_constants(name):
    raise ValueError(f"{name} is no JSON")


def read_jsonl(logger):
    lines = Path(logger.log_dir, "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line, parse_constant=refuse_constants) for line in lines]
    return [{name: float(value) for name, value in record.items()} for record in records]


def unmask(crc):
    rotated = (crc - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def events(logger):
    """All events in TensorBoard's order: file by file, in the order of their names."""
    for path in sorted(Path(logger.log_dir).glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            length, crc = struct.unpack_from("<QI", content)
            assert crc32c(content[:8]) == unmask(crc)
            data = content[12 : 12 + length]
            assert crc32c(data) == unmask(struct.unpack_from("<I", content, 12 + length)[0])
            content = content[16 + length :]
            yield Event.FromString(data)


def read_tensorboard(logger):
    """One record a step, as TensorBoard would show it.

    A restart, which is any start but the first, forgets what came later: see
    `_CheckForRestartAndMaybePurge` in its `plugin_event_accumulator.py`.
    """
    records, started = {}, False
    for event in events(logger):
        if event.session_log.status == SessionLog.START:
            if started:
                records = {step: record for step, record in records.items() if step < event.step}
            started = True
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                record = records.setdefault(event.step, {"step": event.step})
                record[value.tag] = value.simple_value
    return list(records.values())


READERS = {CSVLogger: read_csv, JSONLLogger: read_jsonl, TensorBoardLogger: read_tensorboard}


def assert_reads(logger, expected):
    logger.save()
    found = READERS[type(logger)](logger)
    assert [set(record) for record in found] == [set(record) for record in expected]
    exact = not isinstance(logger, TensorBoardLogger)  # Which holds float32.
    for record, want in zip(found, expected, strict=True):
        for name in want:
            np.testing.assert_allclose(record[name], want[name], rtol=0 if exact else 1e-6)
    logger.finalize("success")


# What is logged


@pytest.mark.parametrize("kind", FILES)
def test_metrics_at_their_steps(kind, tmp_path):
    logger = kind(tmp_path)
    logger.log_metrics(NUMBERS, 50)
    logger.log_metrics({"train/loss": 0.5, "train/accuracy": 1.0}, 100)
    # New names, another order, and a name that quoting has to survive.
    logger.log_metrics({'val/a, "b"': 2.0, "train/loss": 0.25}, 150)
    logger.log_metrics({"train/loss": 1e-30, "epoch": 3}, 2**31)
    expected = [
        {"step": 50, **NUMBERS},
        {"step": 100, "train/loss": 0.5, "train/accuracy": 1.0},
        {"step": 150, "train/loss": 0.25, 'val/a, "b"': 2.0},
        {"step": 2**31, "train/loss": 1e-30, "epoch": 3},
    ]
    assert_reads(logger, expected)
    logger.finalize("success")
    # The same run goes on, say with more epochs.
    logger.log_metrics({"epoch": 4}, 2**31 + 1)
    assert_reads(logger, [*expected, {"step": 2**31 + 1, "epoch": 4}])


def test_what_is_no_number_goes_to_tensorboards_experiment(tmp_path):
    """A histogram, a text and a mesh, in the file of the metrics; and nowhere on other processes
    than the first."""
    logger = TensorBoardLogger(tmp_path)
    for one in (logger, Follower(logger)):
        one.experiment.add_histogram("weights", np.arange(10.0), 7)
        one.experiment.add_text("note", "a word", global_step=7)
        one.experiment.add_mesh("mesh", np.zeros((1, 4, 3), np.float32), global_step=8)
        one.log_metrics(NUMBERS, 8)
        one.experiment.close()
    assert_reads(logger, [{"step": 8, **NUMBERS}])
    found = [
        (e.step, v.tag, v.WhichOneof("value")) for e in events(logger) for v in e.summary.value
    ]
    assert found[:3] == [
        (7, "weights", "histo"), (7, "note/text_summary", "tensor"), (8, "mesh_1", "tensor"),
    ]  # fmt: skip
    assert [tag for _, tag, kind in found if kind == "simple_value"] == [*NUMBERS]
    (histogram,) = (v.histo for e in events(logger) for v in e.summary.value if v.tag == "weights")
    assert (histogram.num, histogram.sum) == (10, 45)
    assert len(list(Path(logger.log_dir).iterdir())) == 1


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_logged_as_it_is(kind, value, tmp_path):
    logger = kind(tmp_path)
    logger.log_metrics({"loss": value}, 1)
    assert_reads(logger, [{"step": 1, "loss": value}])


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), jnp.float32(0.25)])
def test_numbers_of_any_make(kind, number, tmp_path):
    logger = kind(tmp_path)
    logger.log_metrics({"loss": number}, 3)
    assert_reads(logger, [{"step": 3, "loss": 0.25}])


def test_files_in_detail(tmp_path):
    table, lines = CSVLogger(tmp_path), JSONLLogger(tmp_path)
    for logger in (table, lines):
        logger.log_metrics({"a": 0.5}, 1)
        logger.log_metrics({"b": math.inf, "epoch": 2}, 2)
        logger.finalize("success")
    assert Path(table.log_dir, "metrics.csv").read_text() == ("step,a,b,epoch\n1,0.5,,\n2,,inf,2\n")
    assert Path(lines.log_dir, "metrics.jsonl").read_text() == (
        '{"step": 1, "a": 0.5}\n{"step": 2, "b": "Infinity", "epoch": 2}\n'
    )


@pytest.mark.parametrize("kind", FILES)
def test_a_metric_named_step_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"A metric is named `step`.*under another name"):
        kind(tmp_path).log_metrics({"step": 1.0}, 1)


def test_values_beyond_float32_reach_tensorboard_as_infinity(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1e300}, 1)
    assert_reads(logger, [{"step": 1, "loss": math.inf}])


# Hyper-parameters

PARAMS = {
    "lr": 1e-3,
    "steps": 10,
    "nesterov": True,
    "model": {"layers": [1, 2], "activation": jnp.tanh, "dropout": None},
    "clip": math.inf,
    "root": Path("data"),
    "scale": np.float32(0.5),
    "dtype": np.dtype("float32"),
}
AS_JSON = {
    "lr": 1e-3,
    "steps": 10,
    "nesterov": True,
    "model": {"layers": [1, 2], "activation": "tanh", "dropout": None},
    "clip": "Infinity",
    "root": "data",
    "scale": 0.5,
    "dtype": "float32",
}


@pytest.mark.parametrize("kind", FILES)
def test_hyperparameters_as_json(kind, tmp_path):
    logger = kind(tmp_path)
    logger.log_hyperparams(PARAMS)
    logger.finalize("success")
    text = Path(logger.log_dir, "hparams.json").read_text()
    assert json.loads(text, parse_constant=refuse_constants) == AS_JSON


@pytest.mark.parametrize(("status", "code"), [("success", 1), ("failed", 2), ("interrupted", 2)])
def test_hyperparameters_in_tensorboard(status, code, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams(PARAMS)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize(status)
    sessions = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(logger)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    start = sessions["_hparams_/session_start_info"].session_start_info
    found = {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()}
    assert found == {
        "lr": 1e-3,
        "steps": 10.0,
        "nesterov": True,
        "model/layers": "[1, 2]",
        "model/activation": "tanh",
        "model/dropout": "None",
        "clip": "Infinity",
        "root": "data",
        "scale": 0.5,
        "dtype": "float32",
    }
    # api.proto of TensorBoard: 1 is success, 2 failure.
    assert sessions["_hparams_/session_end_info"].session_end_info.status == code


# Folders and versions


def test_loggers_of_a_run_share_a_folder_and_runs_do_not(tmp_path):
    for run in range(2):
        loggers = [kind(tmp_path, "name") for kind in FILES]
        assert not any(logger.is_settled for logger in loggers)
        assert [logger.version for logger in loggers] == [run] * 3
        assert all(logger.is_settled for logger in loggers)
        assert list(tmp_path.rglob(f"version_{run}")) == []
        for logger in loggers:
            logger.log_metrics({"run": run}, 1)
            logger.finalize("success")
            assert Path(logger.log_dir) == tmp_path / "name" / f"version_{run}"
    for logger in loggers:
        assert_reads(logger, [{"step": 1, "run": 1}])
    assert next_version(tmp_path, "name") == 2
    assert next_version(tmp_path, "other") == next_version(tmp_path / "none", "") == 0


def test_versions_of_ones_own(tmp_path):
    (tmp_path / "logs" / "version_6").mkdir(parents=True)
    (tmp_path / "logs" / "version_x").mkdir()
    (tmp_path / "logs" / "9").mkdir()
    assert CSVLogger(tmp_path, "logs").version == 7
    assert CSVLogger(tmp_path, "logs", 3).log_dir == str(tmp_path / "logs" / "version_3")
    assert CSVLogger(tmp_path, "logs", "mine").log_dir == str(tmp_path / "logs" / "mine")
    assert CSVLogger(tmp_path, "", 3).log_dir == str(tmp_path / "version_3")
    resumed = CSVLogger(tmp_path, "logs")
    resumed.version = 6
    assert resumed.log_dir == str(tmp_path / "logs" / "version_6")


@pytest.mark.parametrize("kind", FILES)
def test_nothing_is_on_the_disk_before_the_first_write(kind, tmp_path):
    logger = kind(tmp_path / "new")
    logger.check()
    logger.resume(5, {})
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_that_cannot_be_written_is_named_before_training(kind, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    message = (
        rf"`{kind.__name__}` cannot write to its folder, `save_dir='.*file/deep'`: `.*file` is not "
        r"a folder\. Write `save_dir=` with"
    )
    with pytest.raises(NotADirectoryError, match=message):
        kind(tmp_path / "file" / "deep").check()
    with pytest.raises(OSError, match="cannot write to its folder"):
        kind(tmp_path / "file").log_metrics({"a": 1.0}, 1)
    with pytest.raises(NotADirectoryError, match=r"`default_root_dir='.*file'`"):
        kind(tmp_path / "file").check("default_root_dir")
    # Permissions do not bind root, as which tests may run.
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path))
    with pytest.raises(PermissionError, match=f"no permission to write to `{tmp_path}`"):
        kind(tmp_path / "new" / "deep").check()
    assert asked == [str(tmp_path)]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CSVLogger("~/logs").log_dir.startswith(str(tmp_path))


# Resuming


@pytest.mark.parametrize("kind", FILES)
def test_resume_forgets_what_came_after_the_checkpoint(kind, tmp_path):
    before = kind(tmp_path)
    for step in (10, 20, 30, 40):
        before.log_metrics({"loss": 1 / step}, step)
    before.log_metrics({"late": 1.0}, 40)
    before.finalize("failed")
    after = kind(tmp_path)
    after.version = before.version
    after.resume(20, {})
    for step in (30, 40):
        after.log_metrics({"loss": 2 / step}, step)
    assert_reads(
        after,
        [
            {"step": 10, "loss": 1 / 10},
            {"step": 20, "loss": 1 / 20},
            {"step": 30, "loss": 2 / 30},
            {"step": 40, "loss": 2 / 40},
        ],
    )


@pytest.mark.parametrize("kind", FILES)
def test_records_of_the_checkpoints_own_step_are_told_apart(kind, tmp_path):
    """What the end of an epoch logs after the checkpoint is logged again by the resumed run."""
    before = kind(tmp_path)
    before.log_metrics({"loss": 0.5}, 10)
    before.log_metrics({"loss": 0.25}, 20)
    before.log_metrics({"val": 0.125}, 20)
    state = json.loads(json.dumps(before.state_dict()))
    before.log_metrics({"epoch": 1.0, "stale": 1.0}, 20)
    before.log_metrics({"loss": 8.0}, 30)
    before.finalize("failed")
    for _ in range(2):  # a run that is killed at once is resumed again
        after = kind(tmp_path)
        after.version = before.version
        after.resume(20, state)
        assert after.state_dict() == state
        after.finalize("failed")
    after.log_metrics({"epoch": 2.0}, 20)
    of_twenty = [{"loss": 0.25}, {"val": 0.125}, {"epoch": 2.0}]
    if kind is TensorBoardLogger:
        of_twenty = [{name: value for record in of_twenty for name, value in record.items()}]
    records = [{"step": 20, **record} for record in of_twenty]
    assert_reads(after, [{"step": 10, "loss": 0.5}, *records])


@pytest.mark.parametrize("kind", [CSVLogger, JSONLLogger])
@pytest.mark.parametrize("resume", [True, False])
def test_a_last_line_cut_anywhere_is_dropped(kind, resume, tmp_path):
    whole = kind(tmp_path, version="whole")
    whole.log_metrics({"loss": 0.125, "näme": 1.0}, 10)
    whole.log_metrics({"loss": 0.25, "näme": 2.0}, 20)
    whole.finalize("success")
    content = Path(whole.log_dir, whole.file_name).read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(content)):
        logger = kind(tmp_path, version=f"cut_{cut}")
        path = Path(logger.path(logger.file_name))
        path.write_bytes(content[:cut])
        if resume:
            logger.resume(30, {})
            assert path.read_bytes() == content[:last]
        logger.log_metrics({"loss": 0.5, "näme": 3.0}, 30)
        assert_reads(
            logger,
            [{"step": 10, "loss": 0.125, "näme": 1.0}, {"step": 30, "loss": 0.5, "näme": 3.0}],
        )


def test_lines_that_cannot_be_read_are_dropped_on_resume(tmp_path):
    lines, table = JSONLLogger(tmp_path), CSVLogger(tmp_path)
    Path(lines.path("metrics.jsonl")).write_bytes(
        b'{"step": 1}\n\0\0\n[1]\n{"a": 1}\n{"step": 2}\n'
    )
    Path(table.path("metrics.csv")).write_bytes(b"step,a\n1,0.5\n\0\0\n2\n2,0.25\n")
    lines.resume(2, {})
    table.resume(2, {})
    assert_reads(lines, [{"step": 1}, {"step": 2}])
    assert_reads(table, [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25}])
    Path(table.path("metrics.csv")).write_bytes(b"")
    empty = CSVLogger(tmp_path, version=0)
    empty.resume(2, {})
    empty.log_metrics({"a": 1.0}, 3)
    assert_reads(empty, [{"step": 3, "a": 1.0}])


def test_event_files_of_one_second_do_not_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    for step in range(12):
        logger = TensorBoardLogger(tmp_path, version=0)
        logger.log_metrics({"loss": step}, step)
        logger.finalize("success")
    assert_reads(logger, [{"step": step, "loss": step} for step in range(12)])


def test_what_was_logged_survives_a_kill(tmp_path):
    # TensorBoard's file is buffered until `save`, which is called before every checkpoint.
    script = f"""
import os
from jaxlightning.loggers import CSVLogger, JSONLLogger, TensorBoardLogger
for kind in (CSVLogger, JSONLLogger, TensorBoardLogger):
    logger = kind({str(tmp_path)!r}, version=0)
    logger.log_metrics({{"loss": 0.5}}, 1)
    if kind is TensorBoardLogger:
        logger.save()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    for kind in FILES:
        assert_reads(kind(tmp_path, version=0), [{"step": 1, "loss": 0.5}])


# Loggers of one's own


def test_a_logger_needs_two_methods():
    class Memory(Logger):
        def __init__(self):
            self.found = []

        def log_hyperparams(self, params):
            self.found.append(params)

        def log_metrics(self, metrics, step):
            self.found.append((step, metrics))

    memory = Memory()
    memory.check()
    memory.log_hyperparams({"lr": 1.0})
    memory.log_metrics({"loss": 0.5}, 3)
    memory.save()
    memory.resume(1, {})
    memory.finalize("success")
    assert memory.found == [{"lr": 1.0}, (3, {"loss": 0.5})]
    assert (memory.name, memory.version, memory.log_dir) == ("", None, None)


def test_tensorboardx_is_imported_by_its_logger_only():
    script = (
        "import sys; from jaxlightning.loggers import *; "
        "assert not any(m in sys.modules for m in ('tensorboardX', 'google.protobuf'))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
