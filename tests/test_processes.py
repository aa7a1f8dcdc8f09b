"""Jobs of several real processes, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import processes_job
import pytest

from jaxlightning import Trainer, cli
from jaxlightning._checkpoint import find_checkpoints, verify_checkpoint
from jaxlightning.callbacks import ReplayCapsule
from jaxlightning.cli._launch import environment
from jaxlightning.cli._runs import RunError
from jaxlightning.parallel import _processes as processes

JOB = Path(__file__).parent / "processes_job.py"
PATIENCE_S = 120


def launch(folder, options, count=2, devices=2, **variables):
    """A job through `jaxlightning launch`: its exit code, output, and what each process saw."""
    command = [sys.executable, "-m", "jaxlightning", "launch", "--processes", str(count)]
    command += ["--devices", str(devices), "--grace", "5", str(JOB), str(folder)]
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [*command, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | variables,
    )
    seen = [folder / f"process-{number}.json" for number in range(count)]
    return done, [json.loads(path.read_text()) for path in seen if path.exists()]


def alone(folder, options):
    """The same run in this process, on four devices."""
    folder.mkdir(exist_ok=True)
    processes_job.main(folder, options)
    return json.loads((folder / "process-0.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("one") / "run", {})


def test_two_processes_are_one_run(tmp_path, one):
    """Losses, parameters, validation and predictions; who reads what, logs what and saves what;
    and a single process goes on from what two have saved."""
    done, seen = launch(tmp_path / "run", {})
    assert done.returncode == 0, done.stderr[-3000:]
    for process in seen:
        np.testing.assert_allclose(process["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(process["parameters"], one["parameters"], rtol=1e-5)
        assert process["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
        assert process["predicted"] == [20, 3]
    # Each reads its half of every batch: of a whole epoch, all rows are read, each once.
    halves = [[row for batch in process["read"][-12:-6] for row in batch] for process in seen]
    assert [len(half) for half in halves] == [48, 48]
    assert sorted(halves[0] + halves[1]) == list(range(96))
    assert sum(map(len, seen[0]["read"])) * 2 == sum(map(len, one["read"]))
    # Only the first one logs and speaks.
    (log,) = (tmp_path / "run" / "logs").rglob("metrics.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()].count(2) == 1
    assert "[0] FSDP over 4 devices" in done.stderr
    assert "[1] FSDP" not in done.stderr
    # Each writes what it holds.
    checkpoints = find_checkpoints(tmp_path / "run" / "checkpoints")
    assert [entry.step for entry in checkpoints] == [4, 8, 12]
    sizes = []
    for entry in checkpoints:
        files = verify_checkpoint(entry.path).files
        assert sorted(files) == [f"arrays-0000{n}-of-00002.safetensors" for n in (0, 1)]
        sizes = [file.size - file.header_size for file in files.values()]
    assert max(sizes) < 1.1 * min(sizes)
    # One process of four devices goes on from step 8.
    later = tmp_path / "run" / "checkpoints" / checkpoints[-1].path.name
    later.rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match="goes on from"):
        resumed = alone(tmp_path / "run", {"resume": "auto", "mesh": {"data": 2, "fsdp": 2}})
    np.testing.assert_allclose(resumed["losses"], one["losses"][8:], rtol=1e-5)
    assert resumed["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], rel=1e-5)


@pytest.mark.long
def test_four_processes_go_on_from_one(tmp_path, one):
    alone(tmp_path / "run", {"steps": 4})
    done, seen = launch(tmp_path / "run", {"resume": "auto", "steps": 12}, 4, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(seen) == 4
    for process in seen:
        np.testing.assert_allclose(process["losses"], one["losses"][4:], rtol=1e-5)
        # Its rows of the eight batches that were left, and two looks at how batches are shaped.
        assert sum(map(len, process["read"])) == 4 * (8 + 2)


@pytest.mark.slow
def test_processes_go_back_together(tmp_path):
    done, seen = launch(tmp_path / "run", {"rewinds": True})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[0] It was asked for. Went back 3 steps to step 4" in done.stderr
    one = alone(tmp_path / "one", {"rewinds": True})
    assert len(one["losses"]) == 15
    for process in seen:
        np.testing.assert_allclose(process["losses"], one["losses"], rtol=1e-5)


def test_a_capsule_is_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match=r"`ReplayCapsule` keeps the state .* and this job has 2"):
        ReplayCapsule(tmp_path).on_fit_start(Trainer(logger=False))


@pytest.mark.long
def test_sigterm_to_one_saves_the_same_step_on_all(tmp_path):
    done, seen = launch(tmp_path / "run", {"steps": 5000, "strike": [6, 1, "SIGTERM"]})
    assert done.returncode == 143, done.stderr[-3000:]
    assert "first of 2 to fail" not in done.stderr
    steps = {process["step"] for process in seen}
    assert len(steps) == 1
    latest = find_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert latest.step in steps
    assert len(verify_checkpoint(latest.path).files) == 2
    assert f"[0] SIGTERM: saved step {latest.step}" in done.stderr
    done, again = launch(tmp_path / "run", {"steps": latest.step + 3, "resume": "auto"})
    assert done.returncode == 0, done.stderr[-3000:]
    whole = alone(tmp_path / "whole", {"steps": latest.step + 3})
    for process in again:
        np.testing.assert_allclose(process["losses"], whole["losses"][-3:], rtol=1e-4)


@pytest.mark.long
def test_sigkill_of_one_ends_all_with_a_message(tmp_path):
    done, _ = launch(
        tmp_path / "run",
        {"steps": 5000, "strike": [9, 1, "SIGKILL"]},
        JAXLIGHTNING_HEARTBEAT_TIMEOUT_S="10",
    )
    assert done.returncode == 137
    told = done.stderr[done.stderr.index("\njaxlightning: process") :]
    assert "process 1 was ended by SIGKILL, the first of 2 to fail" in told
    intact = find_checkpoints(tmp_path / "run" / "checkpoints")
    assert 4 in {verify_checkpoint(entry.path).step for entry in intact}


@pytest.mark.long
def test_a_failure_of_one_is_told_last(tmp_path):
    done, seen = launch(tmp_path / "run", {"steps": 5000, "strike": [3, 1, "raise"]})
    assert done.returncode == 1
    told = done.stderr[done.stderr.index("\njaxlightning: process") :]
    assert "process 1 exited with 1, the first of 2 to fail; the others were ended." in told
    assert "  RuntimeError: struck on purpose" in told
    assert seen[-1]["step"] == 3


@pytest.mark.long
def test_processes_that_disagree_are_told_what_differs(tmp_path):
    done, seen = launch(tmp_path / "run", {"apart": 5})
    assert done.returncode == 1
    # The first to end takes the others along, perhaps before they have said the same.
    told = done.stderr.replace('"', "")
    assert "]   argument `max_steps`: process 0 has 12, process 1 has 17" in told
    assert "The processes of this job do not run the same thing" in told
    assert all(process["losses"] == [] for process in seen)


SCRIPT = "from jaxlightning import Trainer; Trainer(logger=False)"


def script(text, **variables):
    return subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
    )


def test_a_coordinator_that_cannot_be_reached():
    port = processes.free_port()
    done = script(
        SCRIPT,
        JAXLIGHTNING_COORDINATOR=f"127.0.0.1:{port}",
        JAXLIGHTNING_PROCESSES="2",
        JAXLIGHTNING_PROCESS="1",
        JAXLIGHTNING_START_TIMEOUT_S="2",
    )
    assert done.returncode == 1
    assert "did not get to the others of its job within 2 s" in done.stderr
    assert f"looked for process 0 at `127.0.0.1:{port}`" in done.stderr


def test_jax_that_was_used_before_is_too_late():
    done = script(
        f"import jax; jax.devices(); {SCRIPT}",
        JAXLIGHTNING_COORDINATOR=f"127.0.0.1:{processes.free_port()}",
        JAXLIGHTNING_PROCESSES="2",
        JAXLIGHTNING_PROCESS="0",
    )
    assert done.returncode == 1
    assert "JAX was used before the `Trainer` was made" in done.stderr
    assert "`jaxlightning launch`" in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PROCESSES": "2"}, "`JAXLIGHTNING_PROCESSES` is set, but not `JAXLIGHTNING_COORDINATOR`"),
        (
            {"COORDINATOR": "a:1", "PROCESSES": "2", "PROCESS": "2"},
            "`JAXLIGHTNING_PROCESS=2` has to be from 0 to 1",
        ),
        (
            {"COORDINATOR": "here", "PROCESSES": "2", "PROCESS": "1"},
            "`JAXLIGHTNING_COORDINATOR=here` has to be `host:port`",
        ),
        (
            {"COORDINATOR": "a:1", "PROCESSES": "two", "PROCESS": "1"},
            "`JAXLIGHTNING_PROCESSES=two` has to be an integer",
        ),
    ],
)
def test_variables_that_make_no_job(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(f"JAXLIGHTNING_{name}", value)
    with pytest.raises(RuntimeError) as caught:
        processes.initialise()
    assert message in str(caught.value)


def test_a_process_alone_is_no_job(monkeypatch):
    processes.initialise()
    for name, value in {"COORDINATOR": "a:1", "PROCESSES": "1", "PROCESS": "0"}.items():
        monkeypatch.setenv(f"JAXLIGHTNING_{name}", value)
    processes.initialise()
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.gather("a", "mine") == ["mine"]
    assert processes.share("a", "mine") == "mine"
    assert processes.all_or_none("a", None) is None
    assert processes.all_or_none("a", ValueError("bad")) == "ValueError: bad"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, None),
        (
            {
                "SLURM_JOB_ID": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NODELIST": "a",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            {},
        ),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "a"}, None),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, {}),
    ],
)
def test_clusters_that_jax_finds_by_itself(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.append(given))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    processes.initialise()
    times = {"initialization_timeout": 120, "heartbeat_timeout_seconds": 30}
    assert asked == ([] if expected is None else [expected | times])


def test_each_process_gets_a_gpu(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [environment(n, 2, 1234, None) for n in (0, 1)]
    assert [x["CUDA_VISIBLE_DEVICES"] for x in found] == ["0", "1"]
    assert {x["JAXLIGHTNING_COORDINATOR"] for x in found} == {"127.0.0.1:1234"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert environment(1, 2, 1234, None)["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(RunError, match="has 2 GPUs for 3 processes"):
        environment(0, 3, 1234, None)
    on_cpu = environment(1, 2, 1234, 3)
    assert (on_cpu["JAX_PLATFORMS"], on_cpu["JAX_NUM_CPU_DEVICES"]) == ("cpu", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0", str(JOB)], "`--processes 0` has to be at least 1."),
        (["--processes", "2", "--devices", "0", str(JOB)], "`--devices 0` has to be at least 1."),
        (["--processes", "2", "none.py"], "There is no script `none.py`."),
    ],
)
def test_what_cannot_be_launched(arguments, message, capsys):
    assert cli.main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err
