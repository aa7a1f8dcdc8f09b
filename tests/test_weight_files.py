"""Weights in all the files there are, whole, in parts and damaged."""

import json
import pickle
import zipfile

import equinox as eqx
import jax
import numpy as np
import pytest
import tiny_albert
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from tiny_albert import TINY

from albert_task import (
    Albert,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    from_pretrained,
    from_tf_names,
    save_pretrained,
    to_tensors,
)
from albert_task import _convert as convert
from albert_task._torch_file import read_torch_file
from albert_task._weight_files import read_tensors


@pytest.fixture(scope="module")
def task():
    return tiny_albert.scrambled(AlbertForPreTraining.init(TINY, jax.random.key(0)))


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_parts_and_back_to_one_file(task, tmp_path):
    save_pretrained(task, tmp_path, max_shard_size=20_000)
    parts = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in to_tensors(task).values())
    again = from_pretrained(tmp_path)
    assert type(again) is AlbertForPreTraining
    assert_same(to_tensors(again), to_tensors(task))
    (tmp_path / parts[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names parts that are not there: `{parts[1]}`"):
        from_pretrained(tmp_path)
    save_pretrained(task, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert_same(to_tensors(from_pretrained(tmp_path)), to_tensors(task))


def test_an_index_that_lies(task, tmp_path):
    save_pretrained(task, tmp_path, max_shard_size=20_000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {first: "../x"}}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        from_pretrained(tmp_path)
    named = content["weight_map"] | {"more": content["weight_map"][first]}
    index.write_text(json.dumps({"weight_map": named}))
    with pytest.raises(ValueError, match="names tensors that are in no part: more"):
        from_pretrained(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index of a model's parts"):
        from_pretrained(tmp_path)


def flax_bytes(tensors):
    """What Flax's `to_bytes` gives for the same parameters."""
    flat = {}
    for name, array in tensors.items():
        *path, last = name.split(".")
        if last == "weight" and "LayerNorm" not in name and "layer_norm" not in name:
            last, array = ("embedding", array) if "_embeddings" in name else ("kernel", array.T)
        elif last == "weight":
            last = "scale"
        flat[(*path, last)] = array
    return msgpack_serialize(unflatten_dict(flat))


def test_flax(task, tmp_path):
    save_pretrained(task, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    data = flax_bytes(to_tensors(task))
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    assert_same(to_tensors(from_pretrained(tmp_path)), to_tensors(task))
    for broken in (data[:-100], b"", b"not msgpack"):
        (tmp_path / "flax_model.msgpack").write_bytes(broken)
        with pytest.raises(ValueError, match=r"cannot be read as Flax's msgpack|Missing"):
            from_pretrained(tmp_path)


def torch_archive(path, pickled, storages=None):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)


def state_pickle(count=6, size=(2, 3), stride=(3, 1), offset=0):
    """A `state_dict` of one tensor `w`, assembled by hand as `torch.save` pickles it."""
    numbers = lambda values: "(" + "".join(f"I{v}\n" for v in values) + "t"
    text = (
        "(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n("
        f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{count}\ntQ"
        f"I{offset}\n{numbers(size)}{numbers(stride)}I00\nccollections\nOrderedDict\n)RtRs."
    )
    return text.encode()


NESTED = (
    state_pickle(size=(10**9, 0), stride=(0, 0))
    .replace(b"(dS'w'\n", b"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n(")
    .replace(b")RtRs.", b")RtRI0\n(I1000000000\nt(I1\nttRs.")
)
"""An empty tensor as the storage of another, which would be whatever lies behind."""


def test_a_tensor_of_torch_by_hand(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    data = np.arange(6, dtype="<f4")
    torch_archive(path, state_pickle(), {"0": data.tobytes()})
    np.testing.assert_array_equal(read_torch_file(path)["w"], data.reshape(2, 3))
    torch_archive(path, state_pickle(size=(3, 2), stride=(1, 3)), {"0": data.tobytes()})
    np.testing.assert_array_equal(read_torch_file(path)["w"], data.reshape(2, 3).T)
    torch_archive(path, state_pickle(size=(2,), stride=(1,), offset=4), {"0": data.tobytes()})
    np.testing.assert_array_equal(read_torch_file(path)["w"], data[4:])


@pytest.mark.parametrize(
    ("pickled", "storage", "message"),
    [
        (state_pickle(size=(2, 4), stride=(4, 1)), 24, "a tensor reaches beyond its storage"),
        (state_pickle(offset=-1), 24, "a tensor's sizes are no numbers from 0 on"),
        (state_pickle(stride=(-3, 1)), 24, "a tensor's sizes are no numbers from 0 on"),
        (state_pickle(size=("'a'", 1)), 24, "is cut off or damaged"),
        (state_pickle(size=(10**9,), stride=(0,)), 24, "a tensor reaches beyond its storage"),
        (NESTED, 24, "a tensor is made of something that is no storage"),
        (state_pickle(), 20, "the storage 0 has 5 numbers, not 6"),
        (state_pickle()[:-20], 24, "is cut off or damaged"),
        (b"cos\nsystem\n(S'true'\ntR.", 24, "wants more than tensors: `(os|posix).system`"),
        (pickle.dumps([1, 2]), 24, "holds no `state_dict`"),
    ],
    ids=[
        "beyond",
        "before",
        "backwards",
        "text",
        "repeated",
        "nested",
        "short",
        "cut",
        "system",
        "list",
    ],
)
def test_files_of_torch_that_are_not_read(tmp_path, pickled, storage, message):
    path = tmp_path / "pytorch_model.bin"
    torch_archive(path, pickled, {"0": bytes(storage)})
    with pytest.raises(ValueError, match=message):
        read_torch_file(path)


def test_the_old_layout_of_torch(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({}, protocol=2))
    with pytest.raises(ValueError, match=r"layout of PyTorch before 1\.6.*torch\.save\("):
        read_tensors(tmp_path)


LAYER = "bert/encoder/transformer/group_0/inner_group_0"
TF_NAMES = {
    "bert/embeddings/word_embeddings": "albert.embeddings.word_embeddings.weight",
    "bert/embeddings/LayerNorm/gamma": "albert.embeddings.LayerNorm.weight",
    "bert/embeddings/LayerNorm/beta": "albert.embeddings.LayerNorm.bias",
    "bert/encoder/embedding_hidden_mapping_in/kernel": (
        "albert.encoder.embedding_hidden_mapping_in.weight"
    ),
    f"{LAYER}/attention_1/self/query/kernel": "{layer}.attention.query.weight",
    f"{LAYER}/attention_1/output/dense/bias": "{layer}.attention.dense.bias",
    f"{LAYER}/LayerNorm/gamma": "{layer}.attention.LayerNorm.weight",
    f"{LAYER}/LayerNorm_1/beta": "{layer}.full_layer_layer_norm.bias",
    f"{LAYER}/ffn_1/intermediate/dense/kernel": "{layer}.ffn.weight",
    f"{LAYER}/ffn_1/intermediate/output/dense/bias": "{layer}.ffn_output.bias",
    "bert/pooler/dense/kernel": "albert.pooler.weight",
    "cls/predictions/transform/dense/kernel": "predictions.dense.weight",
    "cls/predictions/transform/LayerNorm/gamma": "predictions.LayerNorm.weight",
    "cls/predictions/output_bias": "predictions.bias",
    "cls/seq_relationship/output_weights": "sop_classifier.classifier.weight",
    "cls/squad/output_weights": "qa_outputs.weight",
    "output_bias": "classifier.bias",
}


def test_names_of_tensorflow(task):
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    ours = to_tensors(task)
    for theirs, name in TF_NAMES.items():
        hf = name.format(layer=layer)
        array = ours.get(hf, np.arange(6.0).reshape(2, 3))
        given = array.T if theirs.endswith("/kernel") else array
        found = from_tf_names({theirs: given, f"{theirs}/adam_m": given, "global_step": 3})
        assert list(found) == [hf]
        np.testing.assert_array_equal(found[hf], array)
    with pytest.raises(ValueError, match="no variables of an ALBERT: `bert/encoder/layer_0/x`"):
        from_tf_names({"bert/encoder/layer_0/x": np.zeros(1)})


# Heads


def test_heads_that_are_not_there_begin_anew(task, tmp_path, capsys):
    save_pretrained(task, tmp_path)
    key = jax.random.key(5)
    loaded = AlbertForSequenceClassification.from_pretrained(
        tmp_path, key=key, labels=("a", "b", "c"), learning_rate=2e-5
    )
    said = capsys.readouterr().err
    assert "so begun with random weights: `classifier.weight`, `classifier.bias`." in said
    assert "of no use here: `predictions.LayerNorm.bias`" in said
    assert loaded.config.labels == ("a", "b", "c")
    assert loaded.recipe.learning_rate == 2e-5
    assert_same(to_tensors(loaded.albert), to_tensors(task.albert))
    config = loaded.config
    fresh = AlbertForSequenceClassification.init(config, key)
    np.testing.assert_array_equal(loaded.classifier.dense.weight, fresh.classifier.dense.weight)

    save_pretrained(loaded, tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is AlbertForSequenceClassification
    assert again.config == config
    assert_same(to_tensors(again), to_tensors(loaded))
    two = AlbertForSequenceClassification.from_pretrained(tmp_path, labels=("a", "b"))
    assert two.classifier.dense.bias.shape == (2,)


def test_a_bare_albert_there_and_back(task, tmp_path):
    save_pretrained(task.albert, tmp_path)
    assert_same(to_tensors(from_pretrained(tmp_path)), to_tensors(task.albert))
    poolerless = eqx.tree_at(lambda albert: albert.pooler, task.albert, None)
    save_pretrained(poolerless, tmp_path)
    assert from_pretrained(tmp_path, Albert).pooler is None
    loaded = AlbertForMaskedLM.from_pretrained(tmp_path)
    assert_same(to_tensors(loaded.albert), to_tensors(poolerless))


def test_an_encoder_that_is_not_whole_is_an_error(task, tmp_path):
    save_pretrained(task, tmp_path)
    with pytest.raises(ValueError, match=r"Of another shape: `albert\.embeddings\.position_emb"):
        AlbertForTokenClassification.from_pretrained(tmp_path, max_position_embeddings=30)


def test_models_of_another_kind(task, tmp_path):
    save_pretrained(task, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["AlbertForX"]}))
    with pytest.raises(ValueError, match="is of `AlbertForX`, which is none of the models here"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["FlaxAlbertForPreTraining"]})
    )
    assert type(from_pretrained(tmp_path)) is AlbertForPreTraining

    class Mine(AlbertForQuestionAnswering):
        pass

    with pytest.raises(ValueError, match="Hugging Face has no model for a `Mine`"):
        save_pretrained(Mine.init(TINY, jax.random.key(0)), tmp_path / "mine")


def test_nothing_is_half_written(task, tmp_path, monkeypatch):
    save_pretrained(task, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(task, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# The hub


def test_a_name_on_the_hub(task, tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, cache_dir, allow_patterns):
        asked.append((name, revision, cache_dir, "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    save_pretrained(task, tmp_path)
    loaded = from_pretrained("some/albert", revision="v2", cache_dir="kept")
    assert_same(to_tensors(loaded), to_tensors(task))
    assert asked == [("some/albert", "v2", "kept", False)]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "flax_model.msgpack").write_bytes(flax_bytes(to_tensors(task)))
    from_pretrained("some/albert")
    assert asked[1:] == [("some/albert", None, None, False), ("some/albert", None, None, True)]


def test_a_name_that_is_nothing(tmp_path, monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"no folder .*, and the hub did not.*no route"):
        convert.model_folder(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"is a file\. Give the folder of a model"):
        convert.model_folder(tmp_path / "file")
