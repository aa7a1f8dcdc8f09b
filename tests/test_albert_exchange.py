"""All heads side by side with transformers' classes, torch's and the last of Flax's.

Needs `torch` and `transformers` (of 4.57 for Flax); `test_weight_files.py` has the files without.
"""

import dataclasses
import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_albert import GROUPS, TINY, rows

from albert_task import (
    AlbertConfig,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    from_pretrained,
    save_pretrained,
    train_tokenizer,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the extra `peers`)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (the extra `peers`)"
)
pytestmark = pytest.mark.filterwarnings("default")

LABELS = {"id2label": {0: "bad", 1: "so so", 2: "good"}}
TWO = ("AlbertForPreTraining", "AlbertForQuestionAnswering")
"""Whose heads have two outputs, which transformers takes from the number of labels."""
KINDS = {
    "AlbertForPreTraining": AlbertForPreTraining,
    "AlbertForSequenceClassification": AlbertForSequenceClassification,
    "AlbertForTokenClassification": AlbertForTokenClassification,
    "AlbertForMultipleChoice": AlbertForMultipleChoice,
    "AlbertForQuestionAnswering": AlbertForQuestionAnswering,
}


def theirs(kind, config, **more):
    torch.manual_seed(0)
    fields = config.to_dict() | {"classifier_dropout_prob": 0.0} | more
    model = getattr(transformers, kind)(transformers.AlbertConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs(kind, config):
    tokens = rows(6, 18, config.vocab_size)
    types = np.zeros_like(tokens)
    types[:, 9:] = 1
    batch = {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).astype(np.int32),
        "token_type_ids": types,
    }
    if kind == "AlbertForMultipleChoice":
        batch = {name: array.reshape(2, 3, 18) for name, array in batch.items()}
    return batch


def goals(kind, batch, classes=3):
    generator = np.random.default_rng(3)
    ids = batch["input_ids"]
    if kind == "AlbertForTokenClassification":
        labels = generator.integers(0, classes, ids.shape)
        return {"labels": np.where(ids == 0, -100, labels)}
    if kind == "AlbertForQuestionAnswering":
        starts, ends = generator.integers(0, 14, (2, len(ids)))
        return {"start_positions": starts, "end_positions": ends}
    if kind == "AlbertForPreTraining":
        labels = np.where(generator.random(ids.shape) < 0.3, ids, -100)
        labels[0, 1] = ids[0, 1]
        return {"labels": labels, "sentence_order_label": np.arange(len(ids)) % 2}
    return {"labels": generator.integers(0, classes, len(ids))}


def to_jax(batch):
    return {
        k: jnp.asarray(v, jnp.int32 if v.dtype.kind == "i" else jnp.float32)
        for k, v in batch.items()
    }


def to_torch(batch):
    return {
        k: torch.tensor(v) if v.dtype.kind == "f" else torch.tensor(v).long()
        for k, v in batch.items()
    }


@eqx.filter_jit
def outputs(task, batch):
    if isinstance(task, AlbertForPreTraining):
        from albert_task._rows import Rows

        hidden = task.hidden(Rows.read(batch, task.config))
        return task.logits(batch), task.order_logits(hidden)[:, 0]
    found = eqx.nn.inference_mode(task).predict_step(batch, key=jax.random.key(0))
    return tuple(found.values())


@eqx.filter_jit
def loss_of(task, batch):
    loss, _ = eqx.nn.inference_mode(task).training_step(batch, key=jax.random.key(0))
    return sum(x.compute() for x in loss.values()) if isinstance(loss, dict) else loss.compute()


def numbers(found):
    if hasattr(found, "prediction_logits"):
        return found.prediction_logits, found.sop_logits
    if hasattr(found, "start_logits"):
        return found.start_logits, found.end_logits
    return (found.logits,)


def assert_close(ours, other):
    for mine, their in zip(ours, numbers(other), strict=True):
        their = their.detach().numpy() if hasattr(their, "detach") else np.asarray(their)
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [TINY, GROUPS], ids=["shared", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_each_computes_and_loses_there_and_here(kind, config, tmp_path):
    names = {0: "first", 1: "second"} if kind in TWO else LABELS["id2label"]
    other = theirs(kind, config, id2label=names)
    other.save_pretrained(tmp_path / "theirs", safe_serialization=config is TINY)
    task = from_pretrained(tmp_path / "theirs")
    assert type(task) is KINDS[kind]
    assert task.config.labels == tuple(names.values())
    batch = inputs(kind, config)
    assert_close(outputs(task, to_jax(batch)), other(**to_torch(batch)))

    batch |= goals(kind, batch)
    found = other(**to_torch(batch))
    np.testing.assert_allclose(loss_of(task, to_jax(batch)), found.loss.item(), rtol=1e-5)

    save_pretrained(task, tmp_path / "ours")
    again, report = getattr(transformers, kind).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    tied = ("predictions.decoder.",)
    assert not report["unexpected_keys"]
    assert not [n for n in report["missing_keys"] if not n.startswith(tied)]
    assert again.config.id2label == names
    again.eval()
    batch = inputs(kind, config)
    assert_close(outputs(task, to_jax(batch)), again(**to_torch(batch)))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems_of_sequences(problem, tmp_path):
    kind = "AlbertForSequenceClassification"
    names = {"num_labels": 1} if problem == "regression" else LABELS
    other = theirs(kind, TINY, problem_type=problem, **names)
    other.save_pretrained(tmp_path)
    task = from_pretrained(tmp_path)
    assert task.problem_type == problem
    batch = inputs(kind, TINY)
    many = problem != "regression"
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2, (6, 3)) if many else generator.normal(size=6)
    batch["labels"] = values.astype(np.float32)
    found = other(**to_torch(batch))
    np.testing.assert_allclose(loss_of(task, to_jax(batch)), found.loss.item(), rtol=1e-5)


def has_flax():
    return importlib.util.find_spec("transformers.modeling_flax_utils") is not None


@pytest.mark.skipif(not has_flax(), reason="transformers has no Flax models since 5")
@pytest.mark.parametrize("kind", [*KINDS, "AlbertForMaskedLM"])
def test_the_last_flax_models(kind, tmp_path):
    names = {} if kind in TWO else LABELS
    config = transformers.AlbertConfig(**GROUPS.to_dict(), **names)
    batch = inputs(kind, GROUPS)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        other = getattr(transformers, f"Flax{kind}")(config, seed=1)
        found = other(**{name: array.astype("i4") for name, array in batch.items()})
    other.save_pretrained(tmp_path)
    assert (tmp_path / "flax_model.msgpack").is_file()
    task = from_pretrained(tmp_path)
    if kind == "AlbertForMaskedLM":
        assert_close((task.logits(to_jax(batch)),), found)
    else:
        assert_close(outputs(task, to_jax(batch)), found)


def test_transformers_takes_the_tokenizer_as_it_is(tmp_path):
    """Also version 5, which for an ALBERT would have a normalisation of its own."""
    text = ["naïve café déjà vu", "the fox, 11,423 times"] * 20
    tokenizer = train_tokenizer(text, 60)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.get_vocab_size())
    save_pretrained(AlbertForPreTraining.init(config, jax.random.key(0)), tmp_path, tokenizer)
    there = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for one in (*text[:2], "naïve[MASK].", "x [MASK] vu ", "  déjà\tvu"):
        assert there(one)["input_ids"] == tokenizer.encode(one).ids, one
    pair = tokenizer.encode("the fox", "vu")
    assert there("the fox", "vu")["token_type_ids"] == pair.type_ids


def test_names_that_transformers_parts(tmp_path):
    other = theirs("AlbertForQuestionAnswering", TINY)
    other.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    batch = inputs("AlbertForQuestionAnswering", TINY)
    task = from_pretrained(tmp_path)
    assert isinstance(task.config, AlbertConfig)
    assert_close(outputs(task, to_jax(batch)), other(**to_torch(batch)))
