"""`jaxlightning compare` on files made for it, some of which nobody should believe."""

import json
import os
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import saved
from jax.sharding import NamedSharding, PartitionSpec

from jaxlightning._checkpoint import CheckpointStore
from jaxlightning._digest import total_digest
from jaxlightning.cli import _runs, main
from jaxlightning.loggers import CSVLogger
from jaxlightning.parallel import make_mesh


def compare(capsys, *arguments):
    """`(exit code, lines of standard output, standard error)`."""
    code = main(["compare", *map(str, arguments)])
    out, errors = capsys.readouterr()
    return code, out.splitlines(), errors


# Where a run is


def digests(folder, **leaves):
    """Writes `digests.jsonl`: leaves as letters, one a step, each of which stands for a digest."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(max(map(len, leaves.values()))):
        found = {
            name.replace("_", "/"): text[step] * 16
            for name, text in leaves.items()
            if step < len(text) and text[step] != "-"
        }
        lines.append({"step": 10 * step, "digest": total_digest(found), "leaves": found})
    path = folder / "digests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_several_runs_below_a_folder(tmp_path, capsys):
    digests(tmp_path / "a" / "version_0", w="11")
    digests(tmp_path / "a" / "version_1", w="11")
    digests(tmp_path / "b" / "c" / "d" / "e", w="11")
    code, out, errors = compare(capsys, tmp_path / "a", tmp_path / "b")
    assert (code, out) == (2, [])
    assert errors == (
        f"jaxlightning: `{tmp_path}/a` has more than one run below it. Name one of them:\n"
        f"  {tmp_path}/a/version_0\n  {tmp_path}/a/version_1\n"
    )
    code, out, _ = compare(capsys, tmp_path / "a" / "version_0", tmp_path / "b")
    assert (code, out[0]) == (0, "No difference in 2 digests.")
    # What is in the folder itself comes before what is below it.
    digests(tmp_path / "a", w="11")
    assert compare(capsys, tmp_path / "a", tmp_path / "b")[0] == 0
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert compare(capsys, tmp_path / "link", tmp_path / "b")[0] == 0


def test_several_folders_of_checkpoints(tmp_path, capsys):
    for folder in ("a/x", "a/y", "b"):
        with CheckpointStore(tmp_path / folder) as store:
            saved(store, {"w": np.zeros(3)}, name="step_5", step=5)
    code, _, errors = compare(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 2
    assert "has more than one run below it. Name one of them:" in errors
    # Beside the logs of one run, both are of that run.
    digests(tmp_path / "a", w="1")
    code, out, _ = compare(capsys, tmp_path / "a", tmp_path / "b")
    assert (code, out[0]) == (0, "No difference in 1 step with checkpoints.")
    assert out[-1] == "not compared: digests, which only the first run has"


def test_what_is_no_run(tmp_path, capsys):
    run = digests(tmp_path / "run", w="1").parent
    code, out, errors = compare(capsys, run, tmp_path / "nowhere")
    assert (code, out) == (2, [])
    assert errors == (
        f"jaxlightning: `{tmp_path}/nowhere` is no folder. Name the folder of a run: the one with "
        "its logs, the one with its checkpoints, or one that has both below it.\n"
    )
    with CheckpointStore(tmp_path / "kept") as store:
        saved(store, {"w": np.zeros(3)}, name="step_5", step=5)
    code, _, errors = compare(capsys, run, tmp_path / "kept" / "step_5")
    assert code == 2
    assert "is a checkpoint, and no run. To compare two checkpoints: `jaxlightning" in errors
    (tmp_path / "empty").mkdir()
    code, _, errors = compare(capsys, run, tmp_path / "empty")
    assert code == 2
    assert "have no step in common" in errors
    assert "the first has digests, the second none of them. Train both with `callbacks=" in errors
    code, _, errors = compare(capsys, run, tmp_path / "kept")
    assert code == 2
    assert "the first has digests, the second checkpoints." in errors


def test_no_step_in_common(tmp_path, capsys):
    one = digests(tmp_path / "one", w="1")
    other = digests(tmp_path / "other", w="11")
    other.write_text(other.read_text().splitlines()[1] + "\n")
    code, _, errors = compare(capsys, one.parent, other.parent)
    assert code == 2
    assert "have no step in common" in errors


# Digests


@pytest.mark.parametrize(
    ("one", "other", "code", "expected"),
    [
        ({"w": "12"}, {"w": "123"}, 0, "No difference in 2 digests."),
        ({"w": "12"}, {"w": "13"}, 1, "The runs part after step 0, by step 10: `w`."),
        ({"w": "12"}, {"w": "22"}, 1, "The runs differ at step 0: `w`."),
        (
            {"w": "1", "b": "2"},
            {"w": "2", "b": "1"},
            1,
            "The runs differ at step 0: `w` and 1 more.",
        ),
        ({"w": "12", "b": "22"}, {"w": "12"}, 1, "The runs differ at step 0: `b`."),
        ({"w": "12"}, {"w": "12", "b": "-2"}, 1, "The runs part after step 0, by step 10: `b`."),
    ],
)
def test_digests(tmp_path, capsys, one, other, code, expected):
    paths = [digests(tmp_path / str(i), **leaves).parent for i, leaves in enumerate((one, other))]
    found, out, _ = compare(capsys, *paths)
    assert (found, out[0]) == (code, expected)
    assert compare(capsys, *reversed(paths))[0] == code


def test_leaves_that_one_run_lacks_are_told_apart(tmp_path, capsys):
    one = digests(tmp_path / "one", w="12", b="11", a="1").parent
    other = digests(tmp_path / "other", w="12", a="12", c="11").parent
    _, out, _ = compare(capsys, one, other)
    assert out[2:] == ["  b: only in the first", "  c: only in the second"]
    assert out[1] == "2 digests: nothing agrees, part at step 0"


def test_many_leaves_are_counted(tmp_path, capsys):
    names = [f"leaf{i:02}" for i in range(30)]
    one = digests(tmp_path / "one", **dict.fromkeys(names, "1")).parent
    other = digests(tmp_path / "other", **dict.fromkeys(names, "2")).parent
    _, out, _ = compare(capsys, one, other)
    assert out[0] == "The runs differ at step 0: `leaf00` and 29 more."
    assert out[2:] == [*(f"  {name}" for name in names[:20]), "  and 10 more"]


def test_a_last_line_that_was_cut_is_none(tmp_path, capsys):
    one = digests(tmp_path / "one", w="123")
    other = digests(tmp_path / "other", w="124")
    other.write_bytes(other.read_bytes()[:-1])
    code, out, _ = compare(capsys, one.parent, other.parent)
    assert (code, out[0]) == (0, "No difference in 2 digests.")


GOOD = {"step": 10, "leaves": {"w": "1" * 16}, "digest": total_digest({"w": "1" * 16})}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[" * 100_000, r"it is no JSON \(RecursionError\)"),
        (b'{"a":' * 100_000, r"it is no JSON \(RecursionError\)"),
        (b'{"step": ' + b"9" * 5000 + b"}", r"it is no JSON \(ValueError\)"),
        (b'{"step": 10', r"it is no JSON \(JSONDecodeError\)"),
        (b"", r"it is no JSON \(JSONDecodeError\)"),
        (pickle.dumps({"step": 10}), "it is no text in UTF-8"),
        (b"[]", "it is no object of `step`, `digest` and `leaves`"),
        (json.dumps(GOOD | {"step": 10**40}).encode(), "its `step` is no number of steps"),
        (json.dumps(GOOD | {"step": 1e999}).encode(), "its `step` is no number of steps"),
        (json.dumps(GOOD | {"digest": "0" * 16}).encode(), "is not that of its `leaves`"),
        (json.dumps(GOOD | {"step": 0}).encode(), "step 0 comes after step 0"),
    ],
)
def test_lines_that_nobody_should_believe(tmp_path, capsys, line, why):
    one, other = (digests(tmp_path / name, w="1") for name in ("one", "other"))
    one.write_bytes(one.read_bytes() + line + b"\n")
    code, out, errors = compare(capsys, one.parent, other.parent)
    assert (code, out) == (2, [])
    assert errors.startswith(f"jaxlightning: Line 2 of `{one}` cannot be read: ")
    assert re.search(why, errors)
    assert errors.endswith("writes no such line, so the file was damaged or changed.\n")


def test_a_line_without_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_runs, "LONGEST", 1000)
    one, other = (digests(tmp_path / name, w="1") for name in ("one", "other"))
    with open(one, "ab") as file:
        file.write(b"1" * 999)  # as a kill might leave it
    assert compare(capsys, one.parent, other.parent)[0] == 0
    with open(one, "ab") as file:
        file.write(b"1" * 999)
    code, _, errors = compare(capsys, one.parent, other.parent)
    assert code == 2
    assert "Line 2" in errors
    assert "it has more than 1,000 bytes" in errors


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_files_that_are_none(tmp_path, capsys, kind):
    """Neither followed nor waited for."""
    other = digests(tmp_path / "other", w="1")
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "digests.jsonl"
    {"link": lambda: path.symlink_to(other), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[
        kind
    ]()
    code, out, errors = compare(capsys, path.parent, other.parent)
    assert (code, out) == (2, [])
    assert "its `digests.jsonl` is a link or a folder, and has to be a file of its own" in errors


def test_links_below_a_run_are_not_followed(tmp_path, capsys):
    digests(tmp_path / "elsewhere", w="1")
    one = digests(tmp_path / "one" / "log", w="1").parent
    (tmp_path / "one" / "loop").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "out").symlink_to(tmp_path / "elsewhere")
    assert compare(capsys, one.parent, one)[0] == 0


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    one, other = digests(tmp_path / "one", w="1"), digests(tmp_path / "other", w="1")
    leaves = {"w\x1b[2J\ud800\n": "1" * 16}
    record = {"step": 0, "digest": total_digest(leaves), "leaves": leaves}
    one.write_text(json.dumps(record) + "\n")
    _, out, _ = compare(capsys, one.parent, other.parent)
    assert out[0] == "The runs differ at step 0: `w\\x1b[2J\\ud800\\n` and 1 more."


# Metrics


def metrics(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_metrics_are_compared_by_their_bits(tmp_path, capsys):
    next_to = float(np.nextafter(0.1, 1))
    one = metrics(
        tmp_path / "one",
        {"step": 1, "loss": 0.1, "nan": "NaN", "inf": "-Infinity", "count": 2**70},
        {"step": 2, "loss": 0.1},
        {"step": 2, "val": 1.0},
        {"step": 2, "loss": 0.2},
        {"step": 3, "zero": 0.0},
        {"step": 4, "loss": 0.1},
    )
    log = CSVLogger(tmp_path / "other", name="", version=".")
    log.log_metrics({"loss": 0.1, "nan": float("nan"), "inf": -float("inf"), "count": 2**70}, 1)
    log.log_metrics({"loss": 0.1}, 2)
    log.log_metrics({"val": 1.0}, 2)
    log.log_metrics({"loss": 0.2}, 2)
    log.finalize("success")
    other = tmp_path / "other"
    code, out, _ = compare(capsys, one, other)
    assert (code, out[0]) == (0, "No difference in 2 logged steps.")
    assert out[2:] == ["not compared: zero: only in the first"]
    log.log_metrics({"zero": -0.0}, 3)
    log.log_metrics({"loss": next_to}, 4)
    log.finalize("success")
    code, out, _ = compare(capsys, one, other)
    assert (code, out[0]) == (1, "The runs part after step 2, by step 3: `zero`.")
    assert out[2] == "  zero: 0.0 in the first, -0.0 in the second"
    metrics(tmp_path / "third", {"step": 2, "loss": 0.1}, {"step": 4, "loss": next_to})
    code, out, _ = compare(capsys, one, tmp_path / "third")
    assert (code, out[0]) == (1, "The runs differ at step 2: `loss`.")
    assert out[2] == "  loss: 0.1, 0.2 in the first, 0.1 in the second"


def test_what_measures_the_machine_is_not_compared(tmp_path, capsys):
    one = {"step": 1, "train/loss": 0.5, "throughput/mfu": 0.5, "host/x": 1.0, "my/seconds": 1.0}
    other = one | {"throughput/mfu": 0.25, "host/x": 2.0, "my/seconds": 2.0}
    paths = metrics(tmp_path / "one", one), metrics(tmp_path / "other", other)
    code, out, _ = compare(capsys, *paths)
    assert (code, out[0]) == (1, "The runs differ at step 1: `my/seconds`.")
    code, out, _ = compare(capsys, *paths, "--ignore", "seconds$")
    assert (code, out[0]) == (0, "No difference in 1 logged step.")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *map(str, paths), "--ignore", "("])
    assert stopped.value.code == 2
    assert "'(' is no regular expression: " in capsys.readouterr().err


def test_states_come_before_metrics(tmp_path, capsys):
    """Of the same step, and where metrics agreed although states had parted."""
    for name, w, loss in (("one", "1112", 0.1), ("other", "1123", 0.2)):
        digests(tmp_path / name, w=w)
        log = [{"step": 10, "loss": 0.5}, {"step": 20, "loss": loss}]
        metrics(tmp_path / name, *log)
    _, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert out[0] == "The runs part after step 10, by step 20: `w`."
    digests(tmp_path / "other", w="1112")
    _, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert out[0] == "The runs part after step 10, by step 20: `loss`."


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("metrics.jsonl", b"[" * 100_000, "it is no JSON (RecursionError)"),
        ("metrics.jsonl", b"[1]", "it is no object"),
        ("metrics.jsonl", b'{"step": 1, "x": true}', "it has a value that is no number"),
        ("metrics.jsonl", b'{"step": 1, "x": "os.system"}', "it has a value that is no number"),
        ("metrics.jsonl", b'{"x": 1}', "it has no `step`, or that is no number of steps"),
        ("metrics.jsonl", b'{"step": 1e999}', "it has no `step`, or that is no number of steps"),
        ("metrics.jsonl", b'{"step": -1}', "it has no `step`, or that is no number of steps"),
        ("metrics.csv", b"1,x,2", "it has 3 cells, and not 2"),
        ("metrics.csv", b"1,x", "it has a value that is no number"),
        ("metrics.csv", b",1", "it has no `step`, or that is no number of steps"),
        ("metrics.csv", b"1," + b"1" * 5000, "it has a value that is no number"),
        ("metrics.csv", b"1," + b"x" * 200_000, "it is no row of a table (field larger"),
    ],
)
def test_metrics_that_nobody_should_believe(tmp_path, capsys, name, content, why):
    first = {"metrics.jsonl": b'{"step": 0, "x": 1.0}\n', "metrics.csv": b"step,x\n"}[name]
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(first + content + b"\n")
    code, out, errors = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert (code, out) == (2, [])
    path = tmp_path / "one" / name
    assert errors.startswith(f"jaxlightning: Line 2 of `{path}` cannot be read: {why}")


# Checkpoints


def checkpoint(folder, step, tree, name=None, **metadata):
    with CheckpointStore(folder) as store:
        saved(store, tree, metadata, step, name or f"step_{step}")
    return folder


def test_checkpoints_of_common_steps(tmp_path, capsys):
    tree = {"task": {"w": np.arange(4.0), "b": np.ones(2)}, "metrics": np.float32(1)}
    other = {"task": {"w": np.arange(4.0), "b": np.float32([1, 2])}, "metrics": np.float32(2)}
    for step in (5, 10, 15):
        checkpoint(tmp_path / "one", step, tree, stream=None)
    checkpoint(tmp_path / "other", 5, tree | {"metrics": {"n": np.float32(2)}}, stream=None)
    checkpoint(tmp_path / "other", 10, other | {"more": np.zeros(1)}, stream=None)
    checkpoint(tmp_path / "other", 12, other, stream=None)
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert code == 1
    # `metrics` is a leaf here, and no sum below `metrics/`.
    assert out[0].startswith("The runs differ at step 5: ")


def test_sums_of_metrics_are_no_difference(tmp_path, capsys):
    for name, count in (("one", 1), ("other", 2)):
        tree = {"task": {"w": np.arange(4.0)}, "metrics": {"loss": np.float32(count)}}
        checkpoint(tmp_path / name, 5, tree)
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert (code, out[0]) == (0, "No difference in 1 step with checkpoints.")


def test_how_arrays_differ(tmp_path, capsys):
    base = {"a": np.arange(4.0), "b": np.ones(2), "c": np.ones(2), "same": np.ones(3)}
    changed = {"a": np.array([0, 1, 2, 3.5]), "b": np.ones(3), "d": np.ones(2), "same": np.ones(3)}
    checkpoint(tmp_path / "one", 5, base, stream=None, fixed={"seed": 1, "lr": 0.1})
    checkpoint(tmp_path / "other", 5, changed, stream=None, fixed={"seed": 2, "lr": 0.1})
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert code == 1
    assert out == [
        "The runs differ at step 5: `a` and 3 more.",
        "1 step with checkpoints: nothing agrees, part at step 5",
        "  a: 1 of 4 elements differ, by 0.5 at most",
        "  b: float64[2] in the first, float64[3] in the second",
        "  c: only in the first",
        "  d: only in the second",
        "set up differently:",
        "  metadata/fixed/seed: 1 in the first, 2 in the second",
    ]


def test_like_is_compared_with_like(tmp_path, capsys):
    """The weights alone may be an average, and of two of one step the later one counts."""
    checkpoint(tmp_path / "one", 5, {"task": {"w": np.zeros(2)}}, "early", stream=None)
    checkpoint(tmp_path / "one", 5, {"task": {"w": np.ones(2)}}, "late", stream=None)
    checkpoint(tmp_path / "one", 5, {"task": {"w": np.full(2, 7.0)}}, "weights")
    checkpoint(tmp_path / "other", 5, {"task": {"w": np.ones(2)}}, "whole", stream=None)
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert (code, out[0]) == (0, "No difference in 1 step with checkpoints.")
    checkpoint(tmp_path / "other", 5, {"task": {"w": np.full(2, 8.0)}}, "weights")
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert (code, out[2]) == (1, "  task/w: 2 of 2 elements differ, by 1 at most")


def test_arrays_that_were_cut_for_other_devices(tmp_path, capsys):
    mesh = make_mesh(jax.devices(), {"fsdp": 4})
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    checkpoint(tmp_path / "one", 5, {"w": jnp.asarray(x)})
    checkpoint(tmp_path / "four", 5, {"w": split})
    assert compare(capsys, tmp_path / "one", tmp_path / "four")[0] == 0
    checkpoint(tmp_path / "one", 6, {"w": jnp.asarray(x)})
    checkpoint(tmp_path / "four", 6, {"w": split.at[7, 3].add(1.0)})
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "four")
    assert (code, out[2]) == (1, "  w: 1 of 32 elements differ, by 1 at most")


def test_damaged_checkpoints_are_named_and_left_out(tmp_path, capsys):
    for name in ("one", "other"):
        for step in (5, 10):
            checkpoint(tmp_path / name, step, {"w": np.full(3, step)})
    (tmp_path / "one" / "step_10" / "COMMIT").write_bytes(pickle.dumps("x"))
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert code == 0
    assert out[-1] == f"not compared: `{tmp_path}/one/step_10`, which is damaged"
    # A bit of an array is not looked at, unless it is to be said how arrays differ.
    checkpoint(tmp_path / "other", 15, {"w": np.full(3, 2.0)})
    arrays = next((checkpoint(tmp_path / "one", 15, {"w": np.ones(3)}) / "step_15").glob("arrays*"))
    content = bytearray(arrays.read_bytes())
    content[-1] ^= 1
    arrays.write_bytes(content)
    code, out, _ = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert (code, out[0]) == (1, "The runs part after step 5, by step 15: `w`.")
    assert out[2].startswith("  w: other checksums; `")
    assert "do not match their checksum" in out[2]
