"""Memory: the host's against psutil's account, the devices' from what their allocator says."""

from types import SimpleNamespace

import jax
import numpy as np
import psutil
import pytest
from jaxlightning.callbacks._device_stats import host_memory  # type: ignore[import-not-found]
from steps import Regression, batches, quiet_trainer  # type: ignore[import-not-found]

from jaxlightning.callbacks import DeviceStatsMonitor


def test_host_memory_is_what_the_system_says():
    found = host_memory()
    held = psutil.Process().memory_info().rss
    assert found["host/bytes_in_use"] == pytest.approx(held, rel=0.05)
    assert found["host/peak_bytes_in_use"] >= 0.95 * held
    ballast = np.ones(2**24)
    assert host_memory()["host/bytes_in_use"] > found["host/bytes_in_use"] + ballast.nbytes * 0.9


def device(number, stats):
    return SimpleNamespace(id=number, platform="cuda", memory_stats=lambda: stats)


def test_devices_that_count_are_logged(capsys):
    stats = {"bytes_in_use": 10, "peak_bytes_in_use": 20, "bytes_limit": 80, "num_allocs": 5}
    devices = [device(0, stats), device(3, stats | {"bytes_in_use": 11})]
    trainer = SimpleNamespace(mesh=SimpleNamespace(local_devices=devices))
    monitor = DeviceStatsMonitor()
    monitor.on_fit_start(trainer)
    metrics = {"train/loss": 1.0}
    monitor.on_log(trainer, metrics, 50)
    assert {name: value for name, value in metrics.items() if not name.startswith("host/")} == {
        "train/loss": 1.0,
        "device/0/bytes_in_use": 10.0,
        "device/0/peak_bytes_in_use": 20.0,
        "device/0/bytes_limit": 80.0,
        "device/3/bytes_in_use": 11.0,
        "device/3/peak_bytes_in_use": 20.0,
        "device/3/bytes_limit": 80.0,
    }
    assert capsys.readouterr().out == ""


def test_on_cpu_only_the_host_is_logged_which_is_said(capsys):
    if jax.devices()[0].memory_stats():
        pytest.skip("this device counts its memory")
    trainer = quiet_trainer([DeviceStatsMonitor()], devices=2, log_every_n_steps=2)
    trainer.fit(Regression.initial(), list(batches(6)))
    assert "`cpu` backend does not count memory, so only the host's" in capsys.readouterr().out
    assert trainer.callback_metrics["host/bytes_in_use"] > 2**20
    assert not any(name.startswith("device/") for name in trainer.callback_metrics)
