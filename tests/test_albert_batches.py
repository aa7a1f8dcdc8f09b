"""Batches of ALBERT's tasks that cannot be, and vocabularies that do not fit."""

import dataclasses
import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albert
from tasks import quiet
from tiny_albert import TINY, rows

from albert_task import (
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    check_tokens,
    check_vocabulary,
    special_ids,
    train_tokenizer,
)
from albert_task._rows import Rows, check_numbers
from jaxlightning import DataLoader

KEY = jax.random.key(7)
ONE = dataclasses.replace(TINY, num_hidden_layers=1)
"""One layer, which compiles sooner."""


def fit(batch):
    quiet(max_steps=1).fit(tiny_albert.task(ONE), DataLoader(batch, 2))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"text": rows(2)}, KeyError, r"looked up `tokens`.* keys are \['text'\]"),
        ({"token": rows(2)}, ValueError, "read no `token` in a batch. Did you mean `tokens`"),
        (
            {"input_ids": rows(2), "attention_masks": rows(2)},
            ValueError,
            "read no `attention_masks` in a batch. Did you mean `attention_mask`",
        ),
        (
            {"input_ids": rows(2), "attention_mask": rows(2, 11)},
            ValueError,
            r"`attention_mask` is \(2, 11\), and that of `input_ids` is \(2, 12\), but has to",
        ),
        ({"tokens": rows(2)[:, 0]}, ValueError, r"`tokens` is \(2,\), but has to be \(batch, seq"),
        ({"tokens": np.float32(rows(2))}, ValueError, "type `float32`, but has to hold integers"),
        ({"tokens": rows(2, 21)}, ValueError, "The rows have 21 tokens, but .* positions for 20"),
    ],
    ids=["none", "token", "masks", "shapes", "rank", "float", "long"],
)
def test_batches_that_cannot_be(batch, error, message):
    with pytest.raises(error, match=message):
        fit(batch)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tokens": 40},
            r"`tokens` has 40 at \[1, 3\], but has to lie between 0 and 39 here. The m",
        ),
        ({"tokens": -1}, r"`tokens` has -1 at \[1, 3\]"),
        ({"token_type_ids": 2}, r"`token_type_ids` has 2 at \[1, 3\], .* between 0 and 1 here\.\n"),
        ({"position_ids": 20}, r"`position_ids` has 20 at"),
        ({"labels": 40}, r"`labels` has 40 at .* and 39 here, or be -100 where there is none\.\n"),
        ({"labels": -1}, r"`labels` has -1 at"),
    ],
    ids=str,
)
def test_numbers_that_the_model_does_not_have(changed, message):
    """Where they are, and in which batch, before a step takes them."""
    batch = {"tokens": rows(6)} | {name: rows(6) % 2 for name in changed if name != "tokens"}
    for name, number in changed.items():
        batch[name][5, 3] = number
    trainer = quiet(max_epochs=1)
    with pytest.raises(ValueError, match=message) as caught:
        trainer.fit(tiny_albert.task(ONE), DataLoader(batch, 2))
    assert caught.value.__notes__ == ["Raised by the training data in batch 2 of epoch 0."]
    assert trainer.global_step == 2
    for entry in (trainer.validate, trainer.predict):
        with pytest.raises(ValueError, match=message):
            entry(tiny_albert.task(ONE), DataLoader(batch, 2))


@pytest.mark.parametrize(
    ("kind", "config", "batch", "message"),
    [
        (
            AlbertForSequenceClassification,
            {},
            {"labels": [0, 2]},
            r"2 at \[1\], .* between 0 and 1 ",
        ),
        (AlbertForSequenceClassification, {"labels": ("a",)}, {"labels": [0.5, 7.0]}, None),
        (
            AlbertForTokenClassification,
            {"labels": ("O", "B-x", "I-x")},
            {"labels": [[3]]},
            "and 2 ",
        ),
        (AlbertForMultipleChoice, {}, {"tokens": [[[5], [5], [5]]], "labels": [3]}, "0 and 2 "),
        (AlbertForPreTraining, {}, {"sentence_order_label": [2]}, "`sentence_order_label` has 2 "),
        (AlbertForQuestionAnswering, {}, {"start_positions": [99]}, None),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_labels_that_the_heads_do_not_have(kind, config, batch, message):
    task = kind.init(dataclasses.replace(ONE, **config), KEY)
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        task.check_batch(arrays)


def test_labels_of_what_counts_nothing_may_be_anything():
    labels = np.asarray([[-100, 3], [41, -7]])
    check_numbers({"labels": labels, "example_weight": np.asarray([1.0, 0.0])}, {"labels": 40})
    with pytest.raises(ValueError, match=r"`labels` has 41 at \[1, 0\]"):
        check_numbers({"labels": labels}, {"labels": 40})


def test_lists_are_no_arrays():
    with pytest.raises(ValueError, match=r"`tokens` is a `list`. Make it an array: `np.asarray"):
        Rows.read({"tokens": [[2, 3]]}, TINY)


def test_further_keys_are_let_through():
    tokens = jnp.asarray(rows())
    more = {"special_tokens_mask": tokens, "idx": tokens[:, 0], "sentence_order_label": tokens}
    assert Rows.read({"input_ids": tokens} | more, TINY).tokens is tokens


def test_tokens_are_checked_on_the_host():
    check_tokens(rows(), TINY)
    wrong = rows()
    wrong[2, 3] = 40
    message = (
        r"`tokens` has 40 at \[2, 3\], but has to lie between 0 and 39 here. The model is made"
    )
    with pytest.raises(ValueError, match=message):
        check_tokens(wrong, TINY)
    wrong[2, 3] = -1
    with pytest.raises(ValueError, match=r"`tokens` has -1 at"):
        check_tokens(wrong, TINY)
    with pytest.raises(ValueError, match=r"The rows have 21 tokens, .*=20`. Cut the rows"):
        check_tokens(rows(1, 21), TINY)


def test_vocabularies_are_compared():
    check_vocabulary(40, TINY)
    with pytest.raises(
        ValueError, match=r"is larger than the model's: 41 pieces, .*`vocab_size=40`"
    ):
        check_vocabulary(41, TINY)
    with pytest.raises(ValueError, match=r"is smaller than the model's: 39 pieces"):
        check_vocabulary(39, TINY)


def test_the_default_special_tokens_are_our_tokenizers():
    tokenizer = train_tokenizer(["a small text of a few words"] * 3, 30)
    assert AlbertForMaskedLM.init(TINY, KEY).special == special_ids(tokenizer)


@pytest.mark.parametrize(
    ("labels", "problem", "wanted"),
    [
        ((4, 8), None, r"(4,)"),
        ((4,), "multi_label_classification", r"(4, 3)"),
        ((4, 2), "regression", r"(4, 3)"),
    ],
)
def test_labels_of_another_shape(labels, problem, wanted):
    config = dataclasses.replace(TINY, labels=("a", "b", "c"), problem_type=problem)
    one = AlbertForSequenceClassification.init(config, jax.random.key(0))
    batch = {"input_ids": jnp.asarray(rows()), "labels": jnp.zeros(labels, jnp.int32)}
    message = f"The shape of the batch's `labels` is {labels}, but here it has to be {wanted}."
    with pytest.raises(ValueError, match=re.escape(message)):
        one.training_step(batch, key=jax.random.key(0))
