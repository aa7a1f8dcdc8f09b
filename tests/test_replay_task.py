"""What `--task` of `jaxlightning replay` may name, and what is said where it names another thing;
how what a step raises is told."""

from pathlib import Path

import equinox as eqx
import jax
import pytest
import replay_job  # type: ignore[import-not-found]
from capsules import fail  # type: ignore[import-not-found]
from replay_job import Fails, line_of
from tasks import quiet

from jaxlightning import TaskModule
from jaxlightning._capsule_read import ReplayError
from jaxlightning._replay import replay
from jaxlightning._replay_report import raised
from jaxlightning.cli import main

JOB = Path(replay_job.__file__)


@pytest.fixture(scope="module")
def capsule(tmp_path_factory):
    """Of a step whose `eqx.error_if` raised."""
    folder = tmp_path_factory.mktemp("refused")
    return fail(folder, Fails("refused"), error=Exception, detect_anomaly=True)[0]


# What trains


def test_a_script_that_is_not_guarded_does_not_train_again(capsule, tmp_path, monkeypatch, capsys):
    script = """
from pathlib import Path
from replay_job import Fails, loader, quiet

def run():
    quiet(max_epochs=1).{entry}(Fails("log"), loader("log"))
    Path("trained").touch()
"""
    monkeypatch.chdir(tmp_path)
    for entry in ("fit", "validate", "test", "predict"):
        Path("bare.py").write_text(script.format(entry=entry) + "\nrun()\n")
        assert main(["replay", capsule, "--task", "bare.py:Fails"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == (
            f"jaxlightning: `{entry}` was called while `bare.py` was imported to replay a step: "
            'put the training under `if __name__ == "__main__":`.\n'
        )
    Path("bare.py").write_text(script.format(entry="fit"))
    assert main(["replay", capsule, "--task", "bare.py:run"]) == 2
    assert "`run` was asked for the run of which a step is replayed: return `(trainer, task)`" in (
        capsys.readouterr().err
    )
    assert not Path("trained").exists()


def test_afterwards_one_may_train_in_the_same_process(capsule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bare.py").write_text("raise KeyError('broken')")
    with pytest.raises(KeyError, match="broken"):
        main(["replay", capsule, "--task", "bare.py:Fails"])
    with pytest.raises(ValueError, match="`fit` got no data"):
        quiet(max_epochs=1).fit(Fails("log"))


# Which class


class Other(TaskModule):
    """A class of another name."""


class Needs(TaskModule):
    """A class that is called with an array, as many are."""

    net: jax.Array
    kind: str = eqx.field(static=True)


def test_a_class_that_needs_arguments_says_what_to_write(capsule, monkeypatch, capsys):
    Needs.__qualname__ = "Fails"
    monkeypatch.setattr(replay_job, "Needs", Needs, raising=False)
    assert main(["replay", capsule, "--task", "replay_job:Needs"]) == 2
    assert capsys.readouterr().err == (
        "jaxlightning: `Needs` can't be made of the capsule's hyper-parameters ['kind'] alone, "
        "since it has to be called with `net`. In the file of the task, which is `f.py` here, "
        "write `def make(key): return Needs(...)`, as the run has it, and `--task f.py:make`.\n"
    )


def test_another_class_is_told_first(capsule):
    with pytest.raises(ReplayError, match=r"is of `Fails`, and not of `Other`\. Name that class"):
        replay(capsule, Other)


# What was raised


def test_of_what_a_step_raises_the_message_and_the_users_line_are_told(capsule, capsys):
    assert main(["replay", capsule, "--task", f"{JOB}:Fails"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    _, failed, again, where, at, code, *_ = out.splitlines()
    assert failed == "  It had failed with negative weight!"
    assert again == "Run again, it fails with negative weight!"
    assert where.startswith("It is raised by `pure_callback`")
    assert at.endswith(f"replay_job.py:{line_of('refused')}, in `Fails.refused`")
    assert "eqx.error_if" in code
    assert len(out) < 1000


def test_messages_are_freed_of_what_is_around_them():
    frames = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n'
    inside = f"JaxRuntimeError: INTERNAL: CpuCallback error: {frames}ValueError: two\nlines"
    assert raised(inside) == "ValueError: two\nlines"
    assert raised(RuntimeError("no Traceback")) == "RuntimeError: no Traceback"
    assert raised(f"JaxRuntimeError: {frames}_EquinoxRuntimeError: a\n\nb\n\n\n{'-' * 20}\nAn") == (
        "a\n\nb"
    )
