"""Sentence order beside masked language modelling, packed rows, and logits in chunks."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albert
from tasks import quiet
from tiny_albert import TINY, rows

from albert_task import AlbertForMaskedLM, AlbertForPreTraining, SpecialIds, WordStarts
from albert_task._losses import cross_entropy, scored
from albert_task._rows import Rows
from jaxlightning import DataLoader

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def task():
    return tiny_albert.scrambled(AlbertForPreTraining.init(TINY, jax.random.key(0)))


@eqx.filter_jit
def step(task, batch):
    return task.training_step(batch, key=KEY)


def with_labels(tokens, seed=0):
    generator = np.random.default_rng(seed)
    chosen = (generator.random(tokens.shape) < 0.3) & (tokens > 4)
    return np.where(chosen, tokens, -100).astype(np.int32)


def test_both_losses_by_hand(task):
    tokens = rows(4)
    order = np.asarray([0, 1, -100, 1], np.int32)
    batch = {"input_ids": tokens, "labels": with_labels(tokens), "sentence_order_label": order}
    losses, metrics = step(task, jax.tree.map(jnp.asarray, batch))
    assert set(losses) == {"mlm", "sop"}
    hidden = task.hidden(Rows.read(jax.tree.map(jnp.asarray, batch), TINY))
    pooler = jax.tree.map(np.asarray, task.albert.pooler)
    pooled = np.tanh(np.asarray(hidden)[:, 0] @ pooler.weight + pooler.bias)
    logits = pooled @ np.asarray(task.sop.weight) + np.asarray(task.sop.bias)
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), np.maximum(order, 0)]
    known = order >= 0
    np.testing.assert_allclose(losses["sop"].compute(), nll[known].mean(), rtol=1e-5)
    right = (logits.argmax(1) == order)[known].mean()
    np.testing.assert_allclose(metrics["sop_accuracy"].compute(), right)
    plain = AlbertForMaskedLM.of(albert=task.albert, head=task.head)
    alone, _ = step(
        plain, jax.tree.map(jnp.asarray, {k: batch[k] for k in ("input_ids", "labels")})
    )
    np.testing.assert_allclose(losses["mlm"].compute(), alone.compute(), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["perplexity"].compute(), math.exp(losses["mlm"].compute()), rtol=1e-5
    )


@pytest.mark.long
def test_packed_rows_lose_what_their_texts_lose(task):
    """Token by token and text by text: what stands beside a text changes nothing."""
    generator = np.random.default_rng(1)
    lengths = [(5, 9, 6), (20,), (4, 4, 4, 8), (12, 7)]
    orders = [(0, 1, 1), (0,), (1, -100, 0, 1), (-100, 0)]
    packed = {
        name: np.zeros((4, 20), np.int32)
        for name in ("input_ids", "token_type_ids", "segment_ids", "position_ids")
    }
    packed["labels"] = np.full((4, 20), -100, np.int32)
    packed["sentence_order_label"] = np.full((4, 4), -100, np.int32)
    alone = []
    for row, sizes in enumerate(lengths):
        at = 0
        for number, size in enumerate(sizes):
            ids = np.concatenate([[2], generator.integers(5, 40, size - 2), [3]]).astype(np.int32)
            types = (np.arange(size) >= size // 2).astype(np.int32)
            labels = with_labels(ids[None], seed=row)[0]
            part = slice(at, at + size)
            packed["input_ids"][row, part] = ids
            packed["token_type_ids"][row, part] = types
            packed["segment_ids"][row, part] = number + 1
            packed["position_ids"][row, part] = np.arange(size)
            packed["labels"][row, part] = labels
            packed["sentence_order_label"][row, number] = orders[row][number]
            alone.append((row, part, ids, types, labels, orders[row][number]))
            at += size
    batch = jax.tree.map(jnp.asarray, packed)
    hidden = task.hidden(Rows.read(batch, TINY))
    logits = task.logits(batch)
    order_logits = task.order_logits(hidden, batch["segment_ids"], 4)
    total = {"mlm": 0.0, "sop": 0.0}
    weight = {"mlm": 0.0, "sop": 0.0}
    for row, part, ids, types, labels, order in alone:
        one = {"input_ids": ids[None], "token_type_ids": types[None], "labels": labels[None]}
        one = jax.tree.map(
            jnp.asarray, one | {"sentence_order_label": np.asarray([order], np.int32)}
        )
        np.testing.assert_allclose(logits[row, part], task.logits(one)[0], atol=1e-4)
        text = int(packed["segment_ids"][row, part.start]) - 1
        own = task.order_logits(task.hidden(Rows.read(one, TINY)))[0, 0]
        np.testing.assert_allclose(order_logits[row, text], own, atol=1e-4)
        losses, _ = task.training_step(one, key=KEY)
        for name, loss in losses.items():
            total[name] += float(loss.total)
            weight[name] += float(loss.weight)
    losses, _ = step(task, batch)
    for name, loss in losses.items():
        assert float(loss.weight) == weight[name]
        np.testing.assert_allclose(loss.total, total[name], rtol=1e-4)


@pytest.mark.long
def test_it_learns_the_order():
    """Segments that count up, swapped or not: told by which comes first."""
    generator = np.random.default_rng(0)
    count = 256
    first = generator.integers(5, 20, (count, 4))
    second = generator.integers(20, 40, (count, 4))
    order = generator.integers(0, 2, count).astype(np.int32)
    swapped = order[:, None] == 1
    a, b = np.where(swapped, second, first), np.where(swapped, first, second)
    ends = np.full((count, 1), 3)
    tokens = np.concatenate([np.full((count, 1), 2), a, ends, b, ends], axis=1).astype(np.int32)
    types = np.tile(([0] * 6 + [1] * 5), (count, 1)).astype(np.int32)
    data = {"input_ids": tokens, "token_type_ids": types, "sentence_order_label": order}
    starts = WordStarts.from_table([True] * 40)
    task = AlbertForPreTraining.init(
        TINY, KEY, optimizer="muon", learning_rate=1e-2, max_ngram=2, word_starts=starts
    )
    trainer = quiet(max_epochs=25)
    loader = DataLoader(data, 32, shuffle=True)
    task = trainer.fit(task, loader)
    found = quiet().validate(task, DataLoader(data, 64))
    assert found["val/sop_accuracy"] > 0.95
    assert {"val/mlm", "val/sop", "val/loss", "val/perplexity"} <= set(found)
    np.testing.assert_allclose(found["val/loss"], found["val/mlm"] + found["val/sop"], rtol=1e-5)


@pytest.mark.parametrize(
    ("order", "more", "message"),
    [
        (None, {}, "needs `sentence_order_label` in each batch"),
        (np.zeros((4, 2), np.int32), {}, r"shape \(4, 2\), but for 4 rows it has to be \(batch,\)"),
        (np.zeros(3, np.int32), {}, r"shape \(3,\), but for 4 rows"),
        (
            np.zeros(4, np.int32),
            {"segment_ids": np.ones((4, 12), np.int32)},
            r"has to be \(batch, texts\), as there are `segment_ids`",
        ),
    ],
)
def test_orders_that_do_not_fit(task, order, more, message):
    batch = {"input_ids": rows(4)} | more
    if order is not None:
        batch["sentence_order_label"] = order
    with pytest.raises(ValueError, match=message):
        task.training_step(jax.tree.map(jnp.asarray, batch), key=KEY)


def test_hyperparameters_make_the_same_task_again():
    starts = WordStarts.from_table([n % 3 > 0 for n in range(40)])
    task = AlbertForPreTraining.init(
        TINY,
        KEY,
        special=SpecialIds(0, 1, 5, 6, 7),
        word_starts=starts,
        max_ngram=3,
        predictions=3,
        frozen=("embeddings",),
    )
    stored = json.loads(json.dumps(task.hyperparameters()))
    again = AlbertForPreTraining.from_hyperparameters(stored, KEY)
    assert jax.tree.structure(again) == jax.tree.structure(task)
    np.testing.assert_array_equal(again.word_starts.table(), starts.table())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": 0}, "`predictions=0` has to be at least 1"),
        ({"max_ngram": 0}, "`max_ngram=0` has to be at least 1"),
        ({"word_starts": WordStarts.from_table([True] * 8)}, "is of a tokenizer of 8 pieces"),
        (
            {"frozen": ("encoder",)},
            r"`encoder` freezes nothing: no parameter's path has it in it. Paths are",
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        AlbertForPreTraining.init(TINY, KEY, **options)


# Logits in chunks


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.long), 9, 12, 1000])
def test_chunks_change_nothing(task, chunk):
    hidden = jax.random.normal(KEY, (3, 7, TINY.hidden_size))
    labels = jax.random.randint(KEY, (3, 7), 0, TINY.vocab_size)
    words = task.albert.embeddings.words

    def loss(head, words, hidden, chunk):
        found = scored(head, words, hidden, labels, chunk)
        return jnp.square(found.nll).sum(), found

    @eqx.filter_jit
    def run(chunk):
        with_gradient = eqx.filter_value_and_grad(lambda parts: loss(*parts, chunk), has_aux=True)
        return with_gradient((task.head, words, hidden))

    (_, found), gradients = run(chunk)
    logits = task.head(hidden, words)
    np.testing.assert_allclose(found.nll, cross_entropy(logits, labels), rtol=1e-5)
    np.testing.assert_array_equal(found.best, logits.argmax(-1))
    (_, _), whole = run(10**6)
    for mine, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=1e-5)


def test_no_more_logits_than_a_chunk(task):
    """The largest array of the program, its gradient included."""
    hidden = jnp.zeros((4, 50, TINY.hidden_size))
    labels = jnp.zeros((4, 50), jnp.int32)

    def largest(chunk):
        @jax.grad
        def gradient(hidden):
            words = task.albert.embeddings.words
            return scored(task.head, words, hidden, labels, chunk).nll.sum()

        sizes = []
        inner = [jax.make_jaxpr(gradient)(hidden).jaxpr]
        while inner:
            jaxpr = inner.pop()
            for equation in jaxpr.eqns:
                sizes += [
                    math.prod(v.aval.shape) for v in equation.outvars if v.aval.shape[-1:] == (40,)
                ]
                inner += [p.jaxpr for p in equation.params.values() if hasattr(p, "jaxpr")]
                inner += [p for p in equation.params.values() if hasattr(p, "eqns")]
        return max(sizes)

    assert largest(1000) == 4 * 50 * TINY.vocab_size
    assert largest(40) == 40 * TINY.vocab_size
