"""A failed step run again: in this process, and by `jaxlightning replay` in another."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replay_job  # type: ignore[import-not-found]
from capsules import ORDER, STEP, content, fail  # type: ignore[import-not-found]
from replay_job import Fails, data, line_of
from tasks import quiet

from jaxlightning import Callback
from jaxlightning._capsule import CAPSULE, how_to_replay
from jaxlightning._capsule_read import ReplayError
from jaxlightning._checkpoint import CheckpointError, CheckpointStore
from jaxlightning._checkpoint_read import load_arrays
from jaxlightning._replay import replay
from jaxlightning.cli import main

JOB = Path(replay_job.__file__)


@pytest.fixture(scope="module")
def capsules(tmp_path_factory):
    """Capsules by what went wrong."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = fail(tmp_path_factory.mktemp(kind), Fails(kind))[0]
        return made[kind]

    return make


# Run again

EXPECTED = {
    "log": ("nan", "loss", "log", "log(-2.9", "log"),
    "quotient": ("nan", "loss", "div", "div(0, 0) = nan", "quotient"),
    "overflow": ("inf", "loss", "exp", "exp(1", "overflow"),
    "difference": ("nan", "loss", "sub", "sub(inf, inf) = nan", "difference"),
    "root": ("nan", "gradient", "mul", "mul(0, inf) = nan", "root"),
    "optimizer": ("nan", "update", "div", "div(0, 0) = nan", "optimizer"),
    "random": ("nan", "loss", "log", "log(-0.", "random"),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_operation_is_found(capsules, kind):
    again = replay(capsules(kind), Fails)
    expected, group, name, entry, line = EXPECTED[kind]
    assert (again.kind, again.group, again.operation.name) == (expected, group, name)
    assert again.operation.entry.startswith(entry)
    assert again.operation.frames[-1].file == str(JOB)
    assert again.operation.frames[-1].line == line_of(line)


def test_the_infinities_that_a_nan_is_made_of_are_found(capsules):
    (infinity,) = replay(capsules("difference"), Fails).infinities
    assert infinity.operation.entry.startswith("exp(200) = inf")
    assert infinity.operation.frames[-1].line == line_of("overflow")
    again = replay(capsules("root"), Fails)
    assert [taint.operation.name for taint in again.infinities] == ["div"]
    assert again.infinities[0].operation.frames[-1].line == line_of("root")
    assert "`jnp.where` chooses between values, but adds up the derivatives" in str(again)


def test_what_fails_only_when_it_is_compiled_is_told_apart(capsules, monkeypatch):
    monkeypatch.setattr("jaxlightning._replay._watched", lambda *arguments: [])
    again = replay(capsules("log"), Fails)
    assert again.kind == "compiled"
    assert "by operation, everything is finite; compiled, it is not. Its loss is nan." in str(again)

    def broken(*arguments):
        raise RuntimeError("out of registers")

    monkeypatch.setattr("jaxlightning._fit.FitRun.tried", broken)
    again = replay(capsules("log"), Fails)
    assert again.kind == "compiled"
    assert "it fails only where it is compiled, with RuntimeError: out of registers" in str(again)


def test_nan_in_the_batch_is_named_with_its_row(capsules):
    again = replay(capsules("nan"), Fails)
    at = ORDER.index(17) % 4
    assert (again.kind, again.group, again.operation) == ("nan", "loss", None)
    assert f"in `x` of the batch at [{at}, 0], which is row 17 of the source" in str(again)


class Spoils(Callback):
    """Puts NaN into the state, as a bug would."""

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            state = trainer.state
            task = jax.tree.map(lambda w: w * jnp.nan, state.task.w)
            trainer.task = type(state.task).with_w(state.task, task)


class Spoilt(Fails):
    def with_w(self, w):
        import equinox as eqx

        return eqx.tree_at(lambda task: task.w, self, w)


def test_nan_in_the_state_is_named(tmp_path):
    path, _, _ = fail(tmp_path, Spoilt("nan"), [data("log", 4, slice(0))] * 8, [Spoils()])
    again = replay(path, Spoilt)
    assert again.given == "`task/w` of the state before the step"
    assert "NaN was there before the step: in `task/w` of the state" in str(again)


def test_callbacks_that_wrap_the_optimizer_have_to_be_there(tmp_path):
    trainer, task = replay_job.wrapped()
    clip = {"gradient_clip_val": 1.0}
    path, error, _ = fail(tmp_path, task, callbacks=trainer._given_callbacks[:2], **clip)
    assert "FUNCTION returns `(trainer, task)` as this run has them: the optimizer is" in str(
        error.__notes__
    )
    with pytest.raises(ReplayError, match="`ExponentialMovingAverage` and `LearningRateSchedule`"):
        replay(path, Fails)
    with pytest.raises(ReplayError, match=r"gradient_clip_val: 1.0 in the capsule, None here"):
        replay(path, (quiet(max_epochs=1), task))
    assert replay(path, replay_job.wrapped()).operation.name == "log"


# From the command line, and from strangers


def run(capsys, *arguments):
    """`(exit code, standard output, standard error)`."""
    code = main(["replay", *map(str, arguments)])
    return (code, *capsys.readouterr())


def test_a_second_process_names_operation_and_line(capsules):
    command = [Path(sys.executable).parent / "jaxlightning", "replay", capsules("log")]
    spec = f"{JOB}:Fails"
    done = subprocess.run([*command, "--task", spec], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"Step {STEP} of `Fails`, batch {STEP - 1} of epoch 0 (rows " in done.stdout
    assert "It had failed with NonFiniteSteps: In a step the loss" in done.stdout
    assert "NaN first appears in the forward pass, and reaches the loss." in done.stdout
    assert f"replay_job.py:{line_of('log')}, in `Fails.log`" in done.stdout
    assert "log(-2.9" in done.stdout


def test_without_a_task_nothing_is_imported(capsules, capsys, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("import pathlib; pathlib.Path('harm').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    metadata = content(capsules("log"))
    metadata["task"] = {"module": "planted", "name": "Task", "file": "planted.py"}
    with CheckpointStore(tmp_path) as store:
        path = store.save(1, {}, {CAPSULE: metadata}, wait=True)
    code, out, err = run(capsys, path)
    assert (code, out) == (2, "")
    assert "nothing is imported because a file names it" in err
    assert f"jaxlightning replay {path} --task planted:Task" in err
    assert "planted" not in sys.modules
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Fails", "has to be MODULE:NAME, such as `train.py:Classifier`"),
        ("nowhere.py:Fails", "There is no file `nowhere.py`"),
        ("no.where:Fails", "There is no module `no`. For a file, write its path"),
        ("replay_job:Missing", "`replay_job` has no `Missing`"),
        ("replay_job:BAD", "Name the class of a task, a function `key -> task`"),
        ("replay_job:Path", "names the class `Path`"),
    ],
)
def test_tasks_that_are_none(capsules, capsys, spec, message):
    code, _, err = run(capsys, capsules("log"), "--task", spec)
    assert code == 2
    assert message in err


def test_functions_name_tasks_too(capsules, capsys, monkeypatch):
    monkeypatch.setattr(replay_job, "make", lambda key: Fails("log", key), raising=False)
    monkeypatch.setattr(
        replay_job, "both", lambda: (quiet(max_epochs=1), Fails("log")), raising=False
    )
    for name in ("make", "both"):
        code, out, _ = run(capsys, capsules("log"), "--task", f"replay_job:{name}")
        assert code == 0
        assert "It is made by `log`" in out
    with pytest.raises(ReplayError, match=r"a tuple of \(Fails, int\). Return `\(trainer, task\)`"):
        replay(capsules("log"), (Fails("log"), 3))


def test_tampered_and_foreign_folders_are_refused(capsules, capsys, tmp_path):
    path = Path(capsules("log"))
    arrays = next(path.glob("arrays*"))
    whole = arrays.read_bytes()
    try:
        arrays.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        code, _, err = run(capsys, path, "--task", "replay_job:Fails")
        assert code == 2
        assert "is damaged" in err
    finally:
        arrays.write_bytes(whole)
    with CheckpointStore(tmp_path) as store:
        other = store.save(1, {"w": np.zeros(2)}, {}, wait=True)
        assert "is a checkpoint, and no replay capsule" in run(capsys, other)[2]
        for number, (key, value) in enumerate(STRANGE):
            metadata = content(path) | {key: value}
            strange = store.save(number, {}, {CAPSULE: metadata}, wait=True)
            code, _, err = run(capsys, strange, "--task", "replay_job:Fails")
            assert code == 2
            assert "no replay capsule that `ReplayCapsule` has written" in err
    assert run(capsys, tmp_path / "absent")[0] == 2


STRANGE = [
    ("step", "many"),
    ("steps", 3),
    ("steps", [{"step": 1}]),
    ("error", None),
    ("precision", {"params": "os.system"}),
    ("precision", {"evil": "float32"}),
    ("hyperparameters", 7),
    ("batch", {}),
    ("flags", {}),
    ("task", []),
    ("task", {"module": 3, "name": "Task", "file": None}),
    ("checkpoint", 3),
    ("checkpoint", ["a"]),
    ("step", float("inf")),
    ("steps", [{"step": 1, "epoch": 0, "first": 0, "stop": 1, "rows": [[1], [2]]}]),
    ("gradient_clip_val", "1"),
    ("batch", {"lost": 3, "reproduced": None, "structure": None}),
]


def test_arguments_that_no_trainer_takes_are_refused(capsules, capsys, tmp_path):
    metadata = content(capsules("log")) | {"accumulate_grad_batches": -2}
    with CheckpointStore(tmp_path) as store:
        path = store.save(1, {}, {CAPSULE: metadata}, wait=True)
    code, _, err = run(capsys, path, "--task", "replay_job:Fails")
    assert code == 2
    assert f"`{path}` was written by a Trainer that there can't be: `accumulate_grad" in err


PLANTED = "Task; touch harm #"


@pytest.mark.parametrize(
    ("task", "suggested"),
    [
        ({"module": "m", "name": PLANTED, "file": None}, "m:NAME"),
        ({"module": "m$(touch harm)", "name": "Task", "file": None}, "MODULE:Task"),
        ({"module": "a.b", "name": "Outer.Task", "file": None}, "a.b:Outer.Task"),
        ({"module": "__main__", "name": "Task", "file": "a b;c.py"}, "'a b;c.py:Task'"),
        ({"module": "__main__", "name": "Task", "file": "a\n.py"}, "FILE:Task"),
    ],
)
def test_the_command_to_paste_runs_nothing_else(
    capsules, capsys, tmp_path, monkeypatch, task, suggested
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "$(touch harm); x"
    metadata = content(capsules("log")) | {"task": task}
    with CheckpointStore(folder) as store:
        path = store.save(1, {}, {CAPSULE: metadata}, wait=True)
    _, _, err = run(capsys, path)
    (command,) = [line.strip() for line in err.splitlines() if line.startswith("    ")]
    assert command == f"jaxlightning replay {shlex.quote(str(path))} --task {suggested}"
    assert command == how_to_replay(path).splitlines()[1].strip()
    shell = subprocess.run(
        ["sh", "-c", f"jaxlightning() {{ printf '%s\\n' \"$@\"; }}; {command}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout.splitlines() == ["replay", str(path), "--task", *shlex.split(suggested)]
    assert not list(tmp_path.rglob("harm"))


def test_a_file_does_not_stand_in_for_a_module_of_python(capsules, tmp_path):
    """`random.py` names the task, and everybody else still gets Python's `random`."""
    source = """
import pickle
from beside import number
from replay_job import Fails

assert __name__ != "__main__"

class Task(Fails):
    pass

def make(key):
    return Task("log", key)

assert pickle.loads(pickle.dumps(Task)) is Task
assert number == 3
"""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "random.py").write_text(source)
    (folder / "beside.py").write_text("number = 3\n")
    check = f"""
import random, sys
sys.path.insert(0, {str(JOB.parent)!r})
from jaxlightning.cli import main
code = main(["replay", {str(capsules("log"))!r}, "--task", "mine/random.py:make"])
assert sys.modules["random"] is random and random.randint(3, 3) == 3
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "NaN first appears in the forward pass" in done.stdout


def test_structures_that_are_none(capsules, tmp_path):
    path = capsules("log")
    tree = {"steps": [[{"x": load_arrays(path)["steps/0/0/x"]}]]}
    deep = json.loads("[" * 60 + "]" * 60)
    with CheckpointStore(tmp_path) as store:
        for number, structure in enumerate(({"dict": 3}, "tree", {"set": []}, deep, {"list": []})):
            metadata = content(path)
            metadata["batch"]["structure"] = structure
            strange = store.save(number, tree, {CAPSULE: metadata}, wait=True)
            with pytest.raises(CheckpointError):
                replay(strange, Fails)
