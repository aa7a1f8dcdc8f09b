"""Strict modes, four virtual devices, and fixtures that several files use."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
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
