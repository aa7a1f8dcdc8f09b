"""Weights to and from Hugging Face's names, held against what their model was recorded to do."""

import dataclasses
import json
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albert
from safetensors.numpy import load_file, save_file
from tiny_albert import TINY, numpy_albert, rows, tensors

from albert_task import (
    Albert,
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    from_pretrained,
    from_tensors,
    save_pretrained,
    to_tensors,
)

RECORDED = json.loads((Path(__file__).parent / "torch_albert.json").read_text())


class Recording:
    """One recorded case: their configuration, names, shapes and results, and our model."""

    def __init__(self, case):
        self.config = AlbertConfig.from_dict(case["config"])
        self.shapes = {name: tuple(shape) for name, shape in case["shapes"].items()}
        self.tensors = tensors(self.shapes)
        self.task = from_tensors(self.tensors, blank(self.config))
        self.batch = {k: jnp.asarray(v, jnp.int32) for k, v in case["batch"].items()}
        self.case = case


def blank(config, **options):
    """A task of shapes only."""
    init = lambda: AlbertForMaskedLM.init(config, jax.random.key(0), **options)
    return eqx.filter_eval_shape(init)


@pytest.fixture(scope="module", params=["shared", "groups"])
def recording(request):
    return Recording(RECORDED[request.param])


@pytest.fixture(scope="module")
def task():
    return tiny_albert.task()


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_names_and_shapes_are_theirs(recording):
    ours = to_tensors(recording.task)
    assert {name: array.shape for name, array in ours.items()} == recording.shapes
    assert_equal(ours, recording.tensors)
    assert all(array.flags.c_contiguous for array in ours.values())


def test_hidden_and_logits_are_those_of_torch(recording):
    task, batch = recording.task, recording.batch
    hidden = task.albert(
        batch["input_ids"], mask=batch["input_ids"] != 0, token_types=batch["token_type_ids"]
    )
    np.testing.assert_allclose(hidden, recording.case["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(task.logits(batch), recording.case["logits"], rtol=0, atol=1e-4)


def test_loss_and_gradients_are_those_of_torch():
    """Of the shared model; `test_albert_torch.py` has the groups."""
    recording = Recording(RECORDED["shared"])

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def run(task):
        return task.training_step(recording.batch, key=jax.random.key(0))[0].compute()

    loss, gradients = run(recording.task)
    assert abs(float(loss) - recording.case["loss"]) < 1e-5
    norms = {name: np.linalg.norm(array) for name, array in to_tensors(gradients).items()}
    theirs = recording.case["gradient_norms"]
    assert set(norms) == set(theirs)
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_folder_there_and_back(task, tmp_path):
    save_pretrained(task, tmp_path / "deep" / "model")
    again = from_pretrained(tmp_path / "deep" / "model", learning_rate=3e-4, mask_rate=0.2)
    assert again.config == task.config
    assert (again.recipe.learning_rate, again.mask_rate) == (3e-4, 0.2)
    assert_equal(to_tensors(again), to_tensors(task))
    config = json.loads((tmp_path / "deep" / "model" / "config.json").read_text())
    assert config["architectures"] == ["AlbertForMaskedLM"]
    assert config["model_type"] == "albert"


def test_npz(task, tmp_path):
    np.savez(tmp_path / "model.npz", **to_tensors(task))
    with np.load(tmp_path / "model.npz") as file:
        assert_equal(to_tensors(from_tensors(file, blank(TINY))), to_tensors(task))


class Tensor:
    """What numpy sees of a PyTorch tensor."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


def test_a_state_dict_of_another_library(task):
    theirs = {name: Tensor(array) for name, array in to_tensors(task).items()}
    assert_equal(to_tensors(from_tensors(theirs, blank(TINY))), to_tensors(task))


def test_what_is_loaded_is_a_copy(task):
    theirs = {name: array.copy() for name, array in to_tensors(task).items()}
    loaded = from_tensors(theirs, blank(TINY))
    for array in theirs.values():
        array[...] = 0
    assert_equal(to_tensors(loaded), to_tensors(task))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_files(task, dtype, tmp_path):
    halved = {name: array.astype(dtype) for name, array in to_tensors(task).items()}
    save_pretrained(task, tmp_path)
    save_file(halved, tmp_path / "model.safetensors")
    loaded = to_tensors(from_pretrained(tmp_path))
    assert_equal(loaded, {name: array.astype(np.float32) for name, array in halved.items()})

    kept = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, task)
    save_pretrained(kept, tmp_path)
    assert_equal(load_file(tmp_path / "model.safetensors"), halved)


def test_a_model_without_a_head_takes_what_it_needs():
    whole = tiny_albert.albert(TINY)
    bare = to_tensors(whole)
    assert "pooler.weight" in bare
    prefixed = {f"albert.{name}": array for name, array in bare.items()}
    prefixed |= {"classifier.weight": np.zeros((3, 32), np.float32)}
    like = eqx.filter_eval_shape(lambda: Albert(TINY, key=jax.random.key(0)))
    for theirs in (bare, prefixed):
        assert_equal(to_tensors(from_tensors(theirs, like)), bare)
    poolerless = eqx.filter_eval_shape(lambda: Albert(TINY, key=jax.random.key(0), pooler=False))
    assert set(bare) - set(to_tensors(from_tensors(bare, poolerless))) == {
        "pooler.weight",
        "pooler.bias",
    }


def test_a_pretraining_checkpoint_has_more_than_we_need(task):
    ours = to_tensors(task)
    theirs = ours | {
        "albert.pooler.weight": np.zeros((32, 32), np.float32),
        "albert.pooler.bias": np.zeros(32, np.float32),
        "albert.embeddings.position_ids": np.arange(20)[None],
        "sop_classifier.classifier.weight": np.zeros((2, 32), np.float32),
        "sop_classifier.classifier.bias": np.zeros(2, np.float32),
        "predictions.decoder.weight": ours["albert.embeddings.word_embeddings.weight"],
        "predictions.decoder.bias": ours["predictions.bias"],
    }
    assert_equal(to_tensors(from_tensors(theirs, blank(TINY))), ours)


NAME = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"Missing: `{NAME}` \(64, 32\)\."),
        (lambda t: t.update({NAME: t[NAME].T}), rf"`{NAME}` is \(32, 64\), not \(64, 32\)\."),
        (lambda t: t.update(qa_outputs=t[NAME]), r"Left over: `qa_outputs`\."),
        (
            lambda t: t.update({"predictions.decoder.bias": t["predictions.bias"] + 1}),
            r"Not equal to what it is tied to here: `predictions.decoder.bias`\.",
        ),
    ],
    ids=["missing", "shape", "extra", "untied"],
)
def test_tensors_of_another_model(task, change, message):
    theirs = to_tensors(task)
    change(theirs)
    start = "These tensors are not those of the `AlbertForMaskedLM` that the configuration descri"
    with pytest.raises(ValueError, match=f"^{start}(?s:.)*{message}"):
        from_tensors(theirs, blank(TINY))


def test_a_headless_checkpoint_names_what_the_head_lacks(task):
    bare = to_tensors(task.albert)
    with pytest.raises(ValueError, match=r"Missing: `predictions.dense.weight` \(16, 32\), "):
        from_tensors(bare, blank(TINY))


def test_folders_without_a_model(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no `config.json` in .* Give the folder of a run"):
        from_pretrained(tmp_path)
    save_pretrained(task, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin` is no file of PyTorch's"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*none of `model.safetensors`, "):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (AlbertForSequenceClassification, {}, None),
        (AlbertForSequenceClassification, {"hidden_dropout_prob": 0.1}, None),
        (AlbertForSequenceClassification, {"labels": ("cat", "dog")}, "for the labels `no`, `yes`"),
        (AlbertForSequenceClassification, {"labels": ("yes", "no")}, "for the labels `no`, `yes`"),
        (
            AlbertForSequenceClassification,
            {"problem_type": "multi_label_classification"},
            "for `single_label_classification`",
        ),
        (AlbertForTokenClassification, {}, "that of `AlbertForSequenceClassification`"),
        (None, {"labels": ("cat", "dog")}, None),
    ],
)
def test_a_classifier_is_for_its_labels(tmp_path, capsys, kind, changes, said):
    """Another one begins anew, of equal shape or not. Without a class, labels are names."""
    config = dataclasses.replace(TINY, labels=("no", "yes"))
    one = AlbertForSequenceClassification.init(config, jax.random.key(0))
    save_pretrained(one, tmp_path)
    again = from_pretrained(tmp_path, kind, key=jax.random.key(1), **changes)
    same = np.array_equal(again.classifier.dense.weight, one.classifier.dense.weight)
    printed = capsys.readouterr().err
    assert same == (said is None)
    assert (said is None and "classifier" not in printed) or f"is {said}, and so its" in printed
    np.testing.assert_array_equal(again.albert.embeddings.words, one.albert.embeddings.words)


def test_numbered_labels_can_be_given_names(tmp_path):
    """`textattack/albert-base-v2-SST-2` is such a model."""
    one = AlbertForSequenceClassification.init(TINY, jax.random.key(0))
    save_pretrained(one, tmp_path)
    assert from_pretrained(tmp_path).config.labels == ("LABEL_0", "LABEL_1")
    again = AlbertForSequenceClassification.from_pretrained(tmp_path, labels=("no", "yes"))
    assert again.config.labels == ("no", "yes")
    np.testing.assert_array_equal(again.classifier.dense.weight, one.classifier.dense.weight)


def test_options_of_a_loaded_task_are_checked(task, tmp_path):
    save_pretrained(task, tmp_path)
    with pytest.raises(ValueError, match=r"no option `lr`"):
        from_pretrained(tmp_path, lr=1e-3)


def test_a_really_trained_albert():
    """A phoneme model's 12 shared layers, without a head or a pooler."""
    if "JAXLIGHTNING_DATA" not in os.environ:
        pytest.skip("JAXLIGHTNING_DATA does not point to a folder with `plbert`")
    folder = Path(os.environ["JAXLIGHTNING_DATA"]) / "plbert"
    config = AlbertConfig.from_json(folder / "config.json")
    like = eqx.filter_eval_shape(lambda: Albert(config, key=jax.random.key(0), pooler=False))
    with np.load(folder / "plbert_albert_dequantised.npz") as file:
        theirs = dict(file)
    albert = from_tensors(theirs, like)
    tokens = rows(2, 10, config.vocab_size)
    hidden = eqx.filter_jit(albert)(jnp.asarray(tokens), mask=jnp.asarray(tokens != 0))
    expected = numpy_albert(albert, tokens, tokens != 0)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-3)
    # Trained, not drawn: positions next to each other are alike.
    table = np.asarray(albert.embeddings.positions)[:256]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    near, far = (np.mean(np.sum(unit[:-k] * unit[k:], axis=1)) for k in (1, 100))
    assert near > far + 0.1


def test_the_folder_of_a_run_is_not_written_into(task, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"is a run's folder, which keeps its own\. Choose another"
    ):
        save_pretrained(task, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_size_is_no_model_with_weights():
    with pytest.raises(FileNotFoundError, match=r"`base` is a size, and has no weights\. .*preset"):
        from_pretrained("base")
