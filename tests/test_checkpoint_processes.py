"""Checkpoints in real processes: full disks, folders that cannot be written, two runs in one
folder, and processes that end while a save is under way."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks._checkpoint_job import LARGE, SMALL, tree
from jaxlightning._checkpoint import (
    CheckpointStore,
    find_checkpoints,
    read_checkpoint,
    restore_latest,
    verify_checkpoint,
)

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
JOB = [sys.executable, "-m", "benchmarks._checkpoint_job", "ours"]
FIT = [sys.executable, str(ROOT / "tests" / "checkpoint_fit_job.py")]
FIRST, SECOND, THIRD = (f"step_000000000{step}" for step in (1, 2, 3))


def run(command, folder, *arguments):
    done = subprocess.run(
        [*command, str(folder), *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def check_intact(folder, **sizes):
    """Exactly these steps are there, and hold what was saved; nothing else lies about."""
    steps = {f"step_{int(name[1:]):010d}": size for name, size in sizes.items()}
    assert sorted(os.listdir(folder)) == ["LOCK", *steps]
    for name, size in steps.items():
        saved = tree(int(name[-1]), size)
        found, _ = read_checkpoint(folder / name, jax.eval_shape(lambda saved=saved: saved))
        np.testing.assert_array_equal(found["x"], saved["x"])


# Ends


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("exit", 0), ("raise", 1)])
def test_a_save_under_way_is_finished_however_the_script_ends(tmp_path, how, code):
    """Nothing has reached the disk when the main thread comes to its end, and nobody waited."""
    folder = tmp_path / "run"
    returned, out, errors = run(JOB, folder, "leave", how, "--held")
    assert (returned, json.loads(out)) == (code, {"left": how})
    assert errors.count("RuntimeError: the training failed") == (how == "raise")
    check_intact(folder, s1=SMALL, s2=LARGE)


def test_a_process_that_is_gone_at_once_leaves_the_one_before(tmp_path):
    """`os._exit`, a kill: whatever was under way is swept away by the next run."""
    folder = tmp_path / "run"
    assert run(JOB, folder, "leave", "_exit", "--held")[0] == 0
    (torn,) = folder.glob(".tmp-*")
    assert not (torn / "COMMIT").exists()
    assert restore_latest(folder, tree(0, SMALL)).path == folder / FIRST
    check_intact(folder, s1=SMALL)


@pytest.mark.parametrize("how", ["end", "exit", "raise"])
def test_a_save_that_is_lost_is_no_success(tmp_path, how):
    """Nobody asked, so the exit code has to say it, and the log what was lost and why."""
    folder = tmp_path / "run"
    returned, _, errors = run(JOB, folder, "lose", how)
    assert returned == 1
    assert f"SaveFailed: The checkpoint `{folder / SECOND}` was not saved" in errors
    assert "File too large" in errors
    assert "Those saved before it are as they were." in errors
    check_intact(folder, s1=SMALL)


# Full disks


@contextlib.contextmanager
def small_disk(folder, *options):
    """A file system in memory, which only root may mount."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(["size=3m", *options]), "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def check_full(folder, how, reason):
    returned, out, errors = run(JOB, folder, "full", how)
    assert returned == 0, errors
    found = json.loads(out)
    assert found["failed"].startswith(f"SaveFailed: The checkpoint `{folder / SECOND}` was not")
    assert reason in found["failed"]
    assert found["left"] == ["LOCK", FIRST]  # not half a checkpoint that holds the disk
    assert found["next save"] is None
    check_intact(folder, s1=SMALL, s3=SMALL)


def test_a_file_that_may_not_grow(tmp_path):
    check_full(tmp_path / "run", "limit", "File too large")


def test_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        check_full(disk / "run", "ballast", "No space left on device")


@pytest.mark.long
def test_a_fit_whose_checkpoint_is_lost_fails(tmp_path):
    """With the one before it intact, from which the run then goes on."""
    folder = tmp_path / "run"
    returned, out, errors = run(FIT, folder, "--limit", "100")
    assert returned == 1
    assert out.split() == ["1", "2", "3", "4", "5", "6"]
    assert "epoch=0-step=4` was not saved" in errors
    assert [entry.step for entry in find_checkpoints(folder)] == [2]
    verify_checkpoint(folder / "epoch=0-step=2")
    returned, out, errors = run(FIT, folder)
    assert (returned, out.split()) == (0, ["3", "4", "5", "6", "7", "through"])
    assert [entry.step for entry in find_checkpoints(folder)] == [2, 4, 6]


def test_the_last_save_of_a_fit_is_waited_for(tmp_path):
    """One that fails after the last step is a failure of the fit too."""
    returned, out, errors = run(FIT, tmp_path, "--limit", "100", "--at", "6")
    assert returned == 1
    assert out.split() == ["1", "2", "3", "4", "5", "6", "7"]
    assert "was not saved" in errors


# Folders


def test_a_folder_on_a_read_only_disk_is_found_before_the_first_step(tmp_path):
    with small_disk(tmp_path / "disk", "ro") as disk:
        returned, out, errors = run(FIT, disk / "run")
        assert returned == 1
        assert out == ""
        assert f"The folder `{disk}` cannot be written (Read-only file system)" in errors
        assert "Trainer(default_root_dir=...)" in errors
        returned, _, errors = run(JOB, disk / "run", "open")
        assert returned == 1
        assert f"The folder `{disk / 'run'}` cannot be written (Read-only file system)" in errors


def test_what_is_on_a_disk_that_became_read_only_is_still_read(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        with CheckpointStore(disk / "run") as store:
            store.save(1, tree(1, SMALL), {}, wait=True)
        remount = ["mount", "-o", "remount,ro", str(disk)]
        subprocess.run(remount, check=True)
        assert restore_latest(disk / "run", tree(0, SMALL)).path == disk / "run" / FIRST


@pytest.fixture
def holder(tmp_path):
    """A process that has a folder, with its pid."""
    process = subprocess.Popen(
        [*JOB, str(tmp_path / "run"), "hold"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    with process:
        yield tmp_path / "run", json.loads(process.stdout.readline())["pid"], process
        process.kill()


def test_a_second_run_in_a_folder_is_refused_with_the_pid_of_the_first(holder):
    folder, pid, process = holder
    for command, arguments in ((JOB, ["open"]), (FIT, [])):
        returned, out, errors = run(command, folder, *arguments)
        assert (returned, out) == (1, "")  # not a step was taken
        assert f"RunLocked: `{folder}` is in use by process {pid} on `" in errors
        assert "Trainer(default_root_dir=...)" in errors
    check_intact(folder, s1=SMALL)
    process.kill()  # the kernel lets go of the lock, whatever the file says
    process.wait()
    assert json.loads((folder / "LOCK").read_text())["pid"] == pid
    with CheckpointStore(folder) as store:
        assert store.latest().step == 1


# Processes that were forked


WORKER = f"""
import atexit, json, multiprocessing, os, sys, threading, warnings
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import jaxlightning._checkpoint_save as saving
from jaxlightning._checkpoint import CheckpointStore

publish = saving.publish

def save(folder, how):
    begun = threading.Event()

    def late(*paths):
        begun.set()
        threading.Event().wait(0.5)  # the worker is at its end by then
        if how == "full":
            raise OSError(28, "No space left on device")
        publish(*paths)

    saving.publish = late
    CheckpointStore(folder).save(1, {{"x": np.zeros(3)}}, {{}})
    begun.wait()
    if how == "raise":
        raise RuntimeError("the worker failed")
    if how == "exit":
        sys.exit(0)

def fork(folder):
    held = threading.Event()
    saving.publish = lambda *paths: (held.wait(), publish(*paths))
    store = CheckpointStore(folder)
    store.save(1, {{"x": np.zeros(3)}}, {{}})
    pid = os.fork()
    if pid == 0:
        try:
            with store:
                sys.exit(0)
        finally:
            atexit._run_exitfuncs()  # not more of the end: there JAX itself waits for threads
            os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    held.set()
    store.close()

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of forking with threads
    how, folder, *method = sys.argv[1:]
    if how == "fork":
        fork(folder)
    else:
        worker = multiprocessing.get_context(*method).Process(target=save, args=(folder, how))
        worker.start()
        worker.join()
        print(worker.exitcode)
"""


def work(tmp_path, how, *method):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    returned, out, errors = run([sys.executable, str(script), how], tmp_path / "run", *method)
    assert returned == 0, errors
    return int(out), errors


def test_a_forked_child_does_not_wait_for_its_parents_save(tmp_path):
    """It has not got the threads, neither where it closes the store nor at its end."""
    assert work(tmp_path, "fork")[0] == 7
    assert [entry.step for entry in find_checkpoints(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("method", "how", "code"),
    [
        ("fork", "end", 0),
        ("spawn", "end", 0),
        ("forkserver", "exit", 0),
        ("forkserver", "raise", 1),
    ],
)
def test_a_worker_finishes_its_save(tmp_path, method, how, code):
    """Though `multiprocessing` ends its processes without what `atexit` has registered."""
    returned, errors = work(tmp_path, how, method)
    assert returned == code, errors
    assert errors.count("RuntimeError: the worker failed") == (how == "raise")
    assert [entry.step for entry in find_checkpoints(tmp_path / "run")] == [1]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_whose_save_is_lost_is_no_success(tmp_path, method):
    returned, errors = work(tmp_path, "full", method)
    assert returned == 1
    assert "step_0000000001` was not saved ([Errno 28] No space left on device)" in errors
