"""What `save_pretrained` leaves in a folder: the tokenizer, and nothing of two models."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_albert
from safetensors.numpy import load_file, save_file
from tiny_albert import TINY

from albert_task import (
    Albert,
    AlbertForMaskedLM,
    from_pretrained,
    load_tokenizer,
    save_pretrained,
    train_tokenizer,
)
from albert_task._names import to_tensors


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox jumps over the lazy dog."] * 20, 40)


@pytest.fixture(scope="module")
def task():
    return tiny_albert.task()


def assert_holds(folder, task):
    found = to_tensors(from_pretrained(folder))
    for name, array in to_tensors(task).items():
        np.testing.assert_array_equal(found[name], array)


# The tokenizer


@pytest.mark.parametrize("given", ["tokenizer", "file", "folder", "whole folder"])
def test_a_tokenizer_is_written_and_taken_as_it_is(task, tokenizer, given, tmp_path):
    """Not as transformers 5 takes an ALBERT's: with a normalisation of its own."""
    place = tmp_path / "place"
    place.mkdir()
    tokenizer.save(str(place / "tokenizer.json"))
    own = {"tokenizer_class": "Another"}
    if given == "whole folder":
        (place / "tokenizer_config.json").write_text(json.dumps(own))
    of = {"tokenizer": tokenizer, "file": place / "tokenizer.json"}.get(given, place)
    save_pretrained(task, tmp_path / "model", of)
    written = load_tokenizer(tmp_path / "model")
    assert written.encode("the fox").ids == tokenizer.encode("the fox").ids
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    if given == "whole folder":
        assert config == own
    else:
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (config["mask_token"], config["model_max_length"]) == ("[MASK]", 20)


def test_a_tokenizer_that_is_not_there_is_missed_before_anything_is_written(task, tmp_path):
    for place in (tmp_path / "none", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="tokenizer"):
            save_pretrained(task, tmp_path / "model", place)
    assert not (tmp_path / "model").exists()


# Two saves into one folder


def test_a_save_that_is_interrupted_leaves_the_model_before(task, tmp_path, monkeypatch):
    other = tiny_albert.task(seed=1)
    save_pretrained(task, tmp_path, max_shard_size=20_000)
    count = 0

    def fails(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        save_file(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", fails)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(other, tmp_path, max_shard_size=20_000)
    assert_holds(tmp_path, task)
    save_pretrained(other, tmp_path, max_shard_size=20_000)
    assert_holds(tmp_path, other)


def test_parts_of_another_number_do_not_stay(task, tmp_path):
    for size in (20_000, 40_000, 10**9, 20_000):
        save_pretrained(task, tmp_path, max_shard_size=size)
        weights = {path.name for path in tmp_path.glob("*.safetensors")}
        index = tmp_path / "model.safetensors.index.json"
        if size == 10**9:
            assert weights == {"model.safetensors"}
            assert not index.exists()
        else:
            assert weights == set(json.loads(index.read_text())["weight_map"].values())
        assert_holds(tmp_path, task)


# What is no such model


def changed(task, folder, **arrays):
    save_pretrained(task, folder)
    tensors = load_file(folder / "model.safetensors") | arrays
    save_file(tensors, folder / "model.safetensors")


def test_of_a_bare_albert_nothing_is_passed_over(tmp_path):
    model = tiny_albert.albert(TINY)
    changed(model, tmp_path, **{"pooler.weight": np.zeros((32, 5), np.float32)})
    with pytest.raises(ValueError, match=r"`pooler.weight` is \(32, 5\), not \(32, 32\)"):
        from_pretrained(tmp_path)


def test_what_is_in_a_task_beside_its_albert(task, tmp_path, capsys):
    changed(task, tmp_path, **{"junk.weight": np.zeros(3, np.float32)})
    for kind in (Albert, AlbertForMaskedLM):
        with pytest.raises(ValueError, match=r"Left over: `junk.weight`"):
            from_pretrained(tmp_path, kind)
    save_pretrained(task, tmp_path)
    assert from_pretrained(tmp_path, Albert).pooler is None
    assert "but of no use here: `predictions." in capsys.readouterr().err


def test_weights_that_are_integers(task, tmp_path):
    changed(task, tmp_path, **{"predictions.bias": np.zeros(40, np.int8)})
    with pytest.raises(ValueError, match=r"of a quantised model: `predictions.bias` holds int8"):
        from_pretrained(tmp_path)


def test_numbers_that_numpy_has_not(task, tmp_path):
    save_pretrained(task, tmp_path)
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"holds numbers of a kind that is not read|Missing"):
        from_pretrained(tmp_path)


def test_an_index_of_files_of_another_format(task, tmp_path):
    save_pretrained(task, tmp_path, max_shard_size=20_000)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.ckpt"}}))
    with pytest.raises(ValueError, match=r"names files of another format: model.ckpt"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": "3"}, "`num_labels='3'` has to be an integer"),
        ({"architectures": 5}, "is of `5`, which is none of the models here"),
        ({"architectures": "AlbertForMaskedLM", "classifier_dropout": None}, None),
    ],
    ids=str,
)
def test_configurations_of_other_hands(task, tmp_path, changes, message):
    save_pretrained(task, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if message is None:
        assert_holds(tmp_path, task)
    else:
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)


def test_a_home_folder(task, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pretrained(task, tmp_path / "model")
    assert from_pretrained("~/model").config == task.config
