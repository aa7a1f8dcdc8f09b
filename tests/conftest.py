"""Strict modes, four virtual devices, and fixtures that several files use."""

import atexit
import os
import signal
import tempfile

import jax
import jaxtyping
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 4)
# Many tests train the same small models: what one of them has compiled serves those after it. Of
# this process only, because jax writes its files in place, and another could read half of one.
_CACHE = tempfile.TemporaryDirectory(prefix="jaxlightning-compiled-")
atexit.register(_CACHE.cleanup)
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def store(tmp_path):
    from jaxlightning._checkpoint import CheckpointStore

    with CheckpointStore(tmp_path / "run") as store:
        yield store


@pytest.fixture
def unchecked_types():
    """As users run it: annotations of arguments are checked in tests only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def jobs(tmp_path_factory):
    from jobs import Jobs

    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    jobs.close()


@pytest.fixture(scope="session")
def whole(jobs):
    """The results of those runs of `resume_job.py` that nobody cut, by task."""
    found = {}

    def of(task):
        if task not in found:
            job = jobs.run(jobs.folder / task, "--task", task)
            assert job.wait() == 0, job.err
            found[task] = job.result
        return found[task]

    return of


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The folder of a tiny ALBERT with random weights, and its tokenizer."""
    from tuning import save_tiny

    return save_tiny(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of examples of what is good and what is bad, to learn from and to be judged by."""
    from tuning import save_sentences

    return save_sentences(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def short_run(pretrained, data, tmp_path_factory):
    """The folder of a run of ten steps that nobody cut."""
    from tuning import short

    from albert_task._cli import main

    out = tmp_path_factory.mktemp("short") / "run"
    assert main(short(pretrained, data, out)) == 0
    return out
