"""N steps equal k steps, a signal, a new process and N-k steps, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "resume_job.py"


def run(folder, *options, check=None):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(JOB), str(folder), *map(str, options)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    if check is not None:
        assert done.returncode == check, done.stderr[-2000:]
    return done


def result(done):
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    found = {}

    def of(*options):
        if options not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[options] = result(run(folder, *options, check=0))
        return found[options]

    return of


CUTS = [
    ("SIGTERM", 143, 7, "step"),  # within a log interval, an epoch, between checkpoints
    # Of these there are more in `test_kills.py`, in processes that cost less.
    pytest.param("SIGINT", 130, 15, "validation", marks=pytest.mark.slow),
    pytest.param("SIGTERM", 143, 22, "epoch", marks=pytest.mark.slow),
    pytest.param("SIGKILL", -9, 13, "step", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "code", "step", "where"), CUTS)
def test_a_run_that_was_cut_goes_on_as_if_nothing_had_happened(
    tmp_path, uninterrupted, name, code, step, where
):
    cut = run(tmp_path, "--signal", name, "--step", step, "--where", where)
    assert cut.returncode == code, cut.stderr[-2000:]
    if code > 0:
        assert f"saved step {step}" in cut.stderr
        assert "The same command goes on from there." in cut.stderr
    resumed = result(run(tmp_path, check=0))
    assert resumed == uninterrupted()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("where", ["step", "validation", "validated", "epoch", "sanity"])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 8, 11, 12, 20, 22, 30, 33])
def test_wherever_it_is_cut(tmp_path, uninterrupted, name, where, step):
    run(tmp_path, "--signal", name, "--step", step, "--where", where)
    assert result(run(tmp_path, check=0)) == uninterrupted()


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [("--steps-per-dispatch", 4), ("--accumulate", 3)], ids=["blocks", "accumulation"]
)
def test_blocks_and_accumulation(tmp_path, uninterrupted, options):
    cut = run(tmp_path, *options, "--signal", "SIGTERM", "--step", 6)
    assert cut.returncode == 143, cut.stderr[-2000:]
    assert result(run(tmp_path, *options, check=0)) == uninterrupted(*options)


@pytest.mark.long
def test_a_finished_run_is_left_alone(tmp_path, uninterrupted):
    run(tmp_path, check=0)
    again = result(run(tmp_path, check=0))
    assert again["state"] == uninterrupted()["state"]
    assert again["step"] == 33
