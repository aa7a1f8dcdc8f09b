"""Rates against hand counts, on a clock that moves when told."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlightning.callbacks._throughput import peak_of  # type: ignore[import-not-found]
from steps import Regression, batches, quiet_trainer  # type: ignore[import-not-found]

from jaxlightning._hardware import device_peak
from jaxlightning._precision import Precision
from jaxlightning.callbacks import ThroughputMonitor, _throughput

BATCH = {"x": np.zeros((8, 5)), "y": np.zeros(8)}
PEAK = 1e6


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(_throughput, "perf_counter", lambda: clock.now)
    return clock


def fake_trainer(**changes):
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
    product = jax.make_jaxpr(lambda a: a @ a)(jax.ShapeDtypeStruct((10, 10), jnp.float32))
    values = dict(
        precision=Precision(),
        mesh=SimpleNamespace(
            devices=np.array([SimpleNamespace(device_kind="cpu", platform="cpu")]), size=1
        ),
        train_batch_spec=spec,
        accumulate_grad_batches=1,
        train_step_jaxpr=lambda: product,  # 2,000 FLOPs
        compile_s=3.0,
        data_wait_s=0.0,
    )
    return SimpleNamespace(**(values | changes))


def steps(monitor, trainer, clock, count, seconds=0.5, batch=BATCH):
    for i in range(count):
        clock.now += seconds
        monitor.on_train_batch_end(trainer, {}, batch, i)


def logged(monitor, trainer):
    metrics = {}
    monitor.on_log(trainer, metrics, 0)
    return {name.removeprefix("throughput/"): value for name, value in metrics.items()}


def started(trainer, **arguments):
    monitor = ThroughputMonitor(**({"peak_flops": PEAK} | arguments))
    monitor.on_fit_start(trainer)
    return monitor


def test_rates(clock):
    trainer = fake_trainer()
    monitor = started(trainer, tokens=lambda batch: batch["x"].size)
    steps(monitor, trainer, clock, 11)
    trainer.data_wait_s = 1.0
    assert logged(monitor, trainer) == pytest.approx(
        {
            "steps_per_s": 2.0,
            "examples_per_s": 16.0,
            "tokens_per_s": 80.0,
            "flops_per_s": 4000.0,
            "mfu": 4000.0 / PEAK,
            "data_wait": 0.2,
        }
    )


def test_a_smaller_batch_costs_its_share(clock):
    trainer = fake_trainer()
    monitor = started(trainer)
    steps(monitor, trainer, clock, 1)
    steps(monitor, trainer, clock, 1, batch={"x": np.zeros((2, 5)), "y": np.zeros(2)})
    rates = logged(monitor, trainer)
    assert (rates["examples_per_s"], rates["flops_per_s"]) == (4.0, 1000.0)


def test_accumulated_batches_are_one_step(clock):
    trainer = fake_trainer(accumulate_grad_batches=2)
    monitor = started(trainer)
    steps(monitor, trainer, clock, 5, batch=[BATCH, BATCH])
    rates = logged(monitor, trainer)
    assert (rates["steps_per_s"], rates["examples_per_s"]) == (2.0, 32.0)
    assert rates["flops_per_s"] == 4000.0
    # The last step of an epoch may have a single batch.
    steps(monitor, trainer, clock, 1, batch=[BATCH])
    assert logged(monitor, trainer)["examples_per_s"] == (4 * 16 + 8) / 2.5


def test_a_batch_may_itself_be_a_list(clock):
    batch = [np.zeros((8, 5)), np.zeros(8)]
    trainer = fake_trainer(train_batch_spec=batch)
    monitor = started(trainer)
    steps(monitor, trainer, clock, 3, batch=batch)
    assert logged(monitor, trainer)["examples_per_s"] == 16.0


def test_evaluation_and_compilation_do_not_count(clock):
    trainer = fake_trainer()
    monitor = started(trainer)
    steps(monitor, trainer, clock, 3)
    monitor.on_validation_start(trainer)
    clock.now += 100.0
    trainer.compile_s += 60.0  # the evaluation's own
    monitor.on_validation_end(trainer)
    clock.now += 7.0
    trainer.compile_s += 7.0
    steps(monitor, trainer, clock, 2)
    assert logged(monitor, trainer)["steps_per_s"] == pytest.approx(2.0)


def test_the_window_looks_back_on_so_many_steps(clock):
    trainer = fake_trainer()
    monitor = started(trainer, window=10)
    steps(monitor, trainer, clock, 6, seconds=1.0)
    assert logged(monitor, trainer)["steps_per_s"] == 1.0
    steps(monitor, trainer, clock, 5, seconds=0.1)
    # Back to the first step: ten steps.
    assert logged(monitor, trainer)["steps_per_s"] == pytest.approx(10 / 5.5)
    steps(monitor, trainer, clock, 5, seconds=0.1)
    # Back to the first boundary: ten steps, all of them fast.
    assert logged(monitor, trainer)["steps_per_s"] == pytest.approx(10.0)


def test_nothing_is_logged_before_there_is_a_rate(clock):
    trainer = fake_trainer()
    monitor = started(trainer)
    assert logged(monitor, trainer) == {}
    steps(monitor, trainer, clock, 1)
    assert logged(monitor, trainer) == {}


def test_a_new_loader_may_start_its_account_again(clock):
    trainer = fake_trainer(data_wait_s=5.0)
    monitor = started(trainer)
    steps(monitor, trainer, clock, 1)
    trainer.data_wait_s = 0.5
    steps(monitor, trainer, clock, 2)
    assert logged(monitor, trainer)["data_wait"] == 0.0


def mesh(kind, platform, count):
    device = SimpleNamespace(device_kind=kind, platform=platform)
    return SimpleNamespace(devices=np.array([device] * count), size=count)


def test_peaks_given_published_and_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(_throughput, "matmul_peak", lambda dtype: measured.append(dtype) or 7e9)
    _throughput._measured_peak.cache_clear()
    known = fake_trainer(
        mesh=mesh("NVIDIA H200", "gpu", 4), precision=Precision.named("bf16-mixed")
    )
    assert peak_of(known, None) == 4 * device_peak("NVIDIA H200", jnp.bfloat16)
    assert peak_of(known, 5.0) == 20.0
    assert measured == []
    # Virtual CPU devices share one machine; other unknown devices do not.
    assert peak_of(fake_trainer(mesh=mesh("cpu", "cpu", 4)), None) == 7e9
    assert peak_of(fake_trainer(mesh=mesh("Unheard of", "gpu", 4)), None) == 28e9
    assert measured == [jnp.float32]
    _throughput._measured_peak.cache_clear()


def test_in_a_fit():
    monitor = ThroughputMonitor(window=4, tokens=lambda batch: batch["x"].size, peak_flops=PEAK)
    seen = []
    monitor_log = monitor.on_log
    monitor.on_log = lambda *args: (monitor_log(*args), seen.append(args[1:]))
    trainer = quiet_trainer([monitor], log_every_n_steps=2)
    trainer.fit(Regression.initial(), list(batches(10)))
    assert [step for _, step in seen] == [2, 4, 6, 8, 10]
    rates = trainer.callback_metrics
    assert set(monitor.provides()) <= set(rates)
    per_step = {
        name: rates[f"throughput/{name}"] / rates["throughput/steps_per_s"]
        for name in ("examples_per_s", "tokens_per_s", "flops_per_s")
    }
    # Forward 2·4·2, and the weights' gradient: no input's.
    assert per_step == pytest.approx(
        {"examples_per_s": 4, "tokens_per_s": 8, "flops_per_s": 2 * 2 * 4 * 2}
    )
    assert 0 <= rates["throughput/data_wait"] <= 1


def test_refuses_nonsense():
    with pytest.raises(ValueError, match=r"`ThroughputMonitor\(window=0\)` has to be a positive"):
        ThroughputMonitor(window=0)
    with pytest.raises(ValueError, match="`989e12`"):
        ThroughputMonitor(peak_flops=-1.0)
