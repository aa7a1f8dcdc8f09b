"""What the README shows works."""

import inspect
import re
from pathlib import Path

import jax

from jaxlightning import Trainer, callbacks

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_complete_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) <= 35
    on_one_device = code.replace("Trainer(max", "Trainer(devices=1, max")
    assert on_one_device != code
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(on_one_device, "README.md", "exec"), {"__name__": "__main__"})
    found = re.search(r"'val/accuracy': ([\d.]+)", capsys.readouterr().out)
    assert float(found[1]) > 0.85


def test_importing_the_complete_example_trains_nothing():
    """What `jaxlightning replay --task train.py:Digits` does."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    found: dict[str, object] = {"__name__": "train"}
    exec(compile(code, "README.md", "exec"), found)
    assert "Digits" in found
    assert "trainer" not in found


def test_what_it_names_exists():
    arguments = set(inspect.signature(Trainer).parameters)
    named = re.findall(r"`Trainer\(([^`]*)\)` \|\n", README)
    assert named
    for call in named:
        assert set(re.findall(r"(\w+)=", call)) <= arguments
    for name in re.findall(r"`((?:LearningRate|ReduceLR|ModelCheck|EarlyStop)\w+)", README):
        assert hasattr(callbacks, name)
