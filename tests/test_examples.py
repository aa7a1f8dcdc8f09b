"""Each example, shortened, reaches what it promises."""

import importlib
from pathlib import Path

import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_run_them(monkeypatch):
    """From the repository's root, without the suite's strict modes."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def options(tmp_path):
    return {
        "default_root_dir": tmp_path,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


@pytest.mark.parametrize(
    "name",
    [
        "digits_equinox",
        pytest.param("digits_nnx", marks=pytest.mark.long),
        pytest.param("digits_linen", marks=pytest.mark.long),
    ],
)
def test_digits_are_told_apart(name, options):
    example = importlib.import_module(f"examples.{name}")
    assert example.main(max_epochs=6, **options) > 0.95


@pytest.mark.long
def test_characters_are_predicted_better_than_by_frequency(options):
    from examples import char_model

    loss, entropy = char_model.main(max_epochs=2, limit=20, **options)
    assert 3.0 < entropy < 3.6
    assert loss < entropy - 0.3


@pytest.mark.long
def test_packed_documents_fill_their_rows(options):
    pytest.importorskip("grain")
    from examples import packed_grain

    found = packed_grain.main(max_epochs=2, limit=30, **options)
    assert found["filled"] > 0.85 > 0.7 > found["alone"]
    assert found["loss"] < 3.0


@pytest.mark.long
def test_the_gan_finds_the_ring(options):
    from examples import gan

    found = gan.main(max_epochs=20, **options)
    assert found["test/modes"] >= 6
    assert found["test/near_a_centre"] > 0.5


def test_the_callback_times_operations(options, tmp_path):
    from examples import profiling_callback

    milliseconds = profiling_callback.main(max_epochs=1, **options)
    assert list(milliseconds.values()) == sorted(milliseconds.values(), reverse=True)
    assert any("convolution" in name for name in milliseconds)
    assert sum(milliseconds.values()) > 0
    assert list(tmp_path.rglob("*.xplane.pb"))
