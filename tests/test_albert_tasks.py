"""Masked language modelling as a task: its loss, its optimizer, its batches, and training it."""

import dataclasses
import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albert
from tasks import arrays, assert_same, quiet
from tiny_albert import DROPPING, GROUPS, TINY, labels, numpy_albert, numpy_head, rows

from albert_task import (
    Albert,
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    Recipe,
    SpecialIds,
    _losses,
    _tasks,
    mask_tokens,
)
from albert_task._layers import Dense, named_key
from albert_task._rows import Rows
from jaxlightning import Callback, DataLoader
from jaxlightning._precision import cast_task

KEY = jax.random.key(7)
ONE = dataclasses.replace(TINY, num_hidden_layers=1)
"""One layer, which compiles sooner."""


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_logits(task, tokens, mask=None):
    hidden = numpy_albert(task.albert, tokens, mask)
    return numpy_head(task.head, task.albert.embeddings.words, hidden)


@pytest.fixture(scope="module")
def task():
    return tiny_albert.task(ONE)


@eqx.filter_jit
def step(task, batch, key=KEY):
    """Loss and accuracy of one batch, as numbers."""
    loss, metrics = task.training_step(batch, key=key)
    return loss.compute(), metrics["accuracy"].compute()


logits_of = eqx.filter_jit(lambda task, batch: task.logits(batch))


# The loss


def test_the_loss_is_that_of_the_masked_tokens(task):
    tokens = rows()
    options = {"mask_id": 4, "special": task.special, "vocab_size": 40}
    mask = jax.jit(lambda x: mask_tokens(x, named_key(KEY, "masking"), where=x != 0, **options))
    masked = mask(jnp.asarray(tokens))
    shown, positions, goals, weights = map(np.asarray, masked)
    log_probs = log_softmax(numpy_logits(task, shown, tokens != 0))
    row, column = np.nonzero(weights)
    at = (row, positions[row, column])
    right = log_probs[at].argmax(-1) == goals[row, column]
    loss, accuracy = step(task, {"tokens": jnp.asarray(tokens)})
    np.testing.assert_allclose(loss, -log_probs[(*at, goals[row, column])].mean(), atol=1e-5)
    np.testing.assert_allclose(accuracy, right.mean(), atol=1e-6)


def test_given_labels_are_what_is_predicted(task):
    tokens = rows()
    goals = labels(tokens)
    log_probs = log_softmax(numpy_logits(task, tokens, tokens != 0))
    row, column = np.nonzero(goals != -100)
    expected = -log_probs[row, column, goals[row, column]].mean()
    loss, _ = step(task, {"tokens": jnp.asarray(tokens), "labels": jnp.asarray(goals)})
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_rows_of_padding_count_nothing(task):
    tokens = jnp.asarray(rows(padded=False))
    goals = jnp.asarray(labels(rows(padded=False)))
    more = lambda x, fill: jnp.concatenate([x, jnp.full((3, 12), fill, x.dtype)])
    loss, accuracy = step(task, {"tokens": tokens, "labels": goals})
    padded = {"tokens": more(tokens, 0), "labels": more(goals, -100)}
    np.testing.assert_allclose(step(task, padded), (loss, accuracy), atol=1e-6)
    nothing = step(task, {"tokens": jnp.zeros((4, 12), jnp.int32)})
    assert [float(x) for x in nothing] == [0.0, 0.0]


@pytest.mark.parametrize("labelled", [True, False])
def test_rows_of_no_weight_count_nothing(task, labelled):
    tokens = np.concatenate([rows(2), rows(2)])  # whose labels are the same where they are given
    batch = {"tokens": tokens} | ({"labels": labels(tokens)} if labelled else {})
    whole = {k: jnp.asarray(v) for k, v in batch.items()}
    metrics = jax.jit(lambda b: task.training_step(b, key=KEY)[0])
    loss = metrics(whole)
    half = metrics(whole | {"example_weight": jnp.asarray([1.0, 1.0, 0.0, 0.0])})
    assert float(half.weight) == float(loss.weight) / 2
    none = metrics(whole | {"example_weight": jnp.zeros(4)})
    assert float(none.weight) == float(none.total) == 0


def test_masks_are_fresh_with_each_key_and_never_otherwise(task):
    batch = {"tokens": jnp.asarray(rows())}
    one, same = step(task, batch), step(task, batch)
    other = step(task, batch, jax.random.key(8))
    assert one == same
    assert one[0] != other[0]


def test_which_tokens_are_padding():
    """By the pad id, by an attention mask of any dtype, or by segments."""
    tokens = jnp.asarray(rows())
    own = tokens != 0
    for batch in (
        {"tokens": tokens},
        {"input_ids": tokens},
        {"tokens": jnp.where(own, tokens, 9), "attention_mask": own},
        {"tokens": jnp.where(own, tokens, 9), "attention_mask": own.astype(jnp.int32)},
        {"tokens": jnp.where(own, tokens, 9), "attention_mask": own.astype(jnp.float32)},
    ):
        found = Rows.read(batch, TINY)
        np.testing.assert_array_equal(found.own, own)
        np.testing.assert_array_equal(found.seen, own)
    segmented = Rows.read({"tokens": tokens, "segment_ids": own.astype(jnp.int32)}, TINY)
    np.testing.assert_array_equal(segmented.own, own)
    np.testing.assert_array_equal(segmented.seen, own[:, :, None] & own[:, None, :])


def test_packed_segments_are_separate_rows(task):
    """Two texts in one row, padded, against the two in rows of their own."""
    first, second = rows(1, 6, seed=1, padded=False), rows(1, 6, seed=2, padded=False)
    packed = np.concatenate([first, second, np.zeros((1, 4), np.int32)], axis=1)
    segments = np.repeat([[1, 2, 0]], [6, 6, 4], axis=1).astype(np.int32)
    places = np.concatenate([np.arange(6), np.arange(6), np.zeros(4, int)])[None].astype(np.int32)
    batch = {"tokens": packed, "segment_ids": segments, "position_ids": places}
    logits = logits_of(task, jax.tree.map(jnp.asarray, batch))
    alone = [logits_of(task, {"tokens": jnp.asarray(text)})[0] for text in (first, second)]
    np.testing.assert_allclose(logits[0, :12], np.concatenate(alone), atol=1e-5)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("chunk", [_losses.CHUNK, 6])
def test_predictions_are_the_likeliest_pieces(task, chunk, monkeypatch):
    monkeypatch.setattr(_tasks, "likeliest", partial(_losses.likeliest, chunk=chunk))
    tokens = rows(3, 8)
    found = quiet().predict(task, DataLoader({"tokens": tokens}, 3))
    log_probs = log_softmax(numpy_logits(task, tokens, tokens != 0))
    assert found["ids"].shape == found["log_probs"].shape == (3, 8, 5)
    np.testing.assert_allclose(found["log_probs"], -np.sort(-log_probs)[..., :5], atol=1e-4)
    chosen = np.take_along_axis(log_probs, np.asarray(found["ids"]), axis=-1)
    np.testing.assert_allclose(chosen, found["log_probs"], atol=1e-4)


@pytest.mark.long
def test_dropout_in_training_and_none_in_predictions(task):
    dropping = tiny_albert.task(dataclasses.replace(DROPPING, num_hidden_layers=1))
    batch = {"tokens": jnp.asarray(rows()), "labels": jnp.asarray(labels(rows()))}
    plain = step(task, batch)
    one, other = step(dropping, batch), step(dropping, batch, jax.random.key(8))
    assert len({float(loss) for loss, _ in (one, other, plain)}) == 3
    assert eqx.filter_eval_shape(dropping.logits, batch).shape == (4, 12, 40)  # needs no key


# Training it


def repetitions(count, seed=0):
    """Rows of one word again and again: what is masked can be read off its neighbours."""
    word = np.random.default_rng(seed).integers(5, 17, (count, 1)).astype(np.int32)
    tokens = np.repeat(word, 12, axis=1)
    tokens[:, 0], tokens[:, -1] = 2, 3
    return {"input_ids": tokens}


LEARNABLE = dataclasses.replace(ONE, vocab_size=17, max_position_embeddings=12)


class Steps(Callback):
    """Every step's loss."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.losses.append(np.asarray(outputs["loss"]))


@pytest.fixture(scope="module")
def training():
    """A short training: the task before and after, its losses, and validations of it."""
    before = AlbertForMaskedLM.init(
        LEARNABLE, KEY, learning_rate=1e-2, warmup_steps=20, total_steps=300
    )
    validation = DataLoader(repetitions(32, seed=1), 16)
    steps = Steps()
    trainer = quiet(max_steps=300, callbacks=steps)  # ten epochs
    after = trainer.fit(before, DataLoader(repetitions(960), 32, shuffle=True), validation)
    found = dict(trainer.callback_metrics)
    return before, after, steps.losses, found, trainer.validate(after, validation)


def test_training_learns_what_there_is_to_learn(training):
    before, after, losses, found, _ = training
    assert len(losses) == 300
    assert np.mean(losses[:5]) > 2.2  # chance is ln 12 = 2.48
    assert np.mean(losses[-20:]) < 0.5
    assert found["val/loss"] < 0.5
    assert found["val/accuracy"] > 0.9
    moved = [not np.array_equal(a, b) for a, b in zip(arrays(before), arrays(after), strict=True)]
    assert all(moved)


def test_every_validation_asks_the_same(training):
    """One at the end of training, one after it, a third in another Trainer."""
    _, after, _, found, again = training
    assert again == {
        f"val/{name}": found[f"val/{name}"] for name in ("loss", "accuracy", "perplexity")
    }
    assert quiet().validate(after, DataLoader(repetitions(32, seed=1), 16)) == again


@pytest.mark.long
def test_labels_that_are_no_class_make_the_loss_nan(task):
    """And not a number that looks like a loss: 7 of two classes, or -1 where -100 is meant."""
    tokens = rows(2)
    for wrong in (-1, task.config.vocab_size):
        labels = np.full(tokens.shape, -100, np.int32)
        labels[:, 3] = 7
        batch = {"input_ids": jnp.asarray(tokens), "labels": jnp.asarray(labels)}
        loss, _ = task.training_step(batch, key=KEY)
        assert np.isfinite(loss.compute())
        batch["labels"] = batch["labels"].at[0, 4].set(wrong)
        loss, _ = task.training_step(batch, key=KEY)
        assert np.isnan(loss.compute())


def test_bf16_mixed_has_float32_logits_and_loss(task, monkeypatch):
    seen = {}
    call, entropy = Albert.__call__, _losses.cross_entropy

    def hidden_of(self, *args, **kwargs):
        hidden = call(self, *args, **kwargs)
        seen["hidden"] = hidden.dtype
        return hidden

    def entropy_of(logits, goals):
        seen["logits"] = logits.dtype
        return entropy(logits, goals)

    precision = quiet(precision="bf16-mixed").precision
    low = cast_task(task, precision.compute)
    assert {array.dtype for array in arrays(low)} == {np.dtype(jnp.bfloat16)}
    batch = {"tokens": jnp.asarray(rows())}
    exact, _ = step(task, batch)
    monkeypatch.setattr(Albert, "__call__", hidden_of)
    monkeypatch.setattr(_losses, "cross_entropy", entropy_of)
    loss, _ = step(low, batch)
    assert seen == {"logits": jnp.float32, "hidden": jnp.bfloat16}
    assert loss.dtype == jnp.float32
    assert loss != loss.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(loss, exact, rtol=0.02)


def narrow(module, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, module)


def test_chunks_add_up_their_gradients_in_float32(task):
    """Of a thousand chunks, where bfloat16 would lose what each adds."""
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(1, 1000, TINY.hidden_size)), jnp.float32)
    goals = jnp.asarray(generator.integers(5, 40, (1, 1000)))

    def gradient(dtype, chunk):
        def loss(head, words):
            return _losses.scored(head, words, hidden.astype(dtype), goals, chunk).nll.sum()

        weights = narrow(task.head, dtype), task.albert.embeddings.words.astype(dtype)
        return jax.jit(jax.grad(loss, argnums=1))(*weights).astype(jnp.float32)

    exact = gradient(jnp.float32, 1000)
    off = jnp.linalg.norm(gradient(jnp.bfloat16, 1) - exact) / jnp.linalg.norm(exact)
    assert off < 0.01


def test_the_gradient_of_few_classes_is_float32s():
    """Probabilities less labels nearly cancel: rounded to bfloat16, they would be a sixth off."""
    task = AlbertForPreTraining.init(ONE, KEY)
    tokens = rows(64, padded=False)
    orders = np.random.default_rng(0).integers(0, 2, 64)
    batch = {"tokens": tokens, "labels": labels(tokens), "sentence_order_label": orders}
    batch = jax.tree.map(jnp.asarray, batch)
    params, static = eqx.partition(task, eqx.is_inexact_array)

    def gradient(dtype):
        def loss(params):
            cast = cast_task(eqx.combine(params, static), dtype)
            return cast.training_step(batch, key=KEY)[0]["sop"].compute()

        return jax.jit(jax.grad(loss))(params)

    narrow, exact = gradient(jnp.bfloat16), gradient(jnp.float32)
    for of in (lambda task: task.sop.bias, lambda task: task.albert.pooler.bias):
        off = jnp.linalg.norm(of(narrow) - of(exact)) / jnp.linalg.norm(of(exact))
        assert off < 0.02


def test_biases_add_up_their_gradients_in_float32():
    dense = narrow(Dense(4, 2, TINY, key=KEY), jnp.bfloat16)
    x = jnp.ones((16, 1024, 4), jnp.bfloat16)
    found = jax.jit(jax.grad(lambda dense: dense(x).astype(jnp.float32).sum()))(dense)
    np.testing.assert_array_equal(found.bias.astype(jnp.float32), 16384)


# Its optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_decay_and_trust_ratios_are_for_matrices_only(task, name):
    """One step from given gradients, by hand: what biases and norms scale by is left alone."""
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "b1": 0.9, "b2": 0.99, "eps": 1e-6}
    tx = Recipe(optimizer=name, **options).build()
    params = eqx.filter(task, eqx.is_inexact_array)
    grads = eqx.filter(tiny_albert.scrambled(task, 5), eqx.is_inexact_array)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    names = jax.tree_util.tree_flatten_with_path(params)[0]
    for (path, p), g, u in zip(
        names, jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True
    ):
        place = jax.tree_util.keystr(path)
        decayed = not (place.endswith(".bias") or "norm" in place)
        p, g = np.asarray(p, np.float64), np.asarray(g, np.float64)
        expected = g / (np.abs(g) + 1e-6)  # Adam's first step, corrected for bias
        if decayed:
            expected = expected + 0.5 * p
            if name == "lamb":
                expected = expected * np.linalg.norm(p) / np.linalg.norm(expected)
        np.testing.assert_allclose(u, -0.1 * expected, rtol=1e-4, atol=1e-6, err_msg=place)


def test_muon_is_for_the_layers_matrices_and_adam_for_the_rest(task):
    """One step: matrices turn towards the nearest orthogonal one (by SVD), the rest as in Adam."""
    tx = Recipe("muon", learning_rate=0.1, weight_decay=0.0, b1=0.9, b2=0.99).build()
    params = eqx.filter(task, eqx.is_inexact_array)
    grads = eqx.filter(tiny_albert.scrambled(task, 5), eqx.is_inexact_array)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    found = jax.tree_util.tree_flatten_with_path(updates)[0]
    for (path, u), g in zip(found, jax.tree.leaves(grads), strict=True):
        place = jax.tree_util.keystr(path)
        g = np.asarray(g, np.float64)
        if g.ndim == 2 and "embeddings" not in place:
            left, _, right = np.linalg.svd(g, full_matrices=False)
            nearest = left @ right
            alike = np.sum(-u * nearest) / np.linalg.norm(u) / np.linalg.norm(nearest)
            assert alike > 0.95, place
            # Newton and Schulz's five rounds leave singular values between 0.7 and 1.2.
            assert 0.6 < np.linalg.norm(u) / (0.1 * 0.2 * np.sqrt(g.size)) < 1.3, place
        else:
            np.testing.assert_allclose(np.sign(u), -np.sign(g), err_msg=place)


@pytest.mark.parametrize("name", ["adafactor", "lion", "sgd", "muon"])
def test_other_optimizers_decay_the_same(name):
    """Without a gradient what remains is the decay, scaled by the learning rate."""
    params = {"weight": jnp.full((3, 4), 2.0), "bias": jnp.full(4, 2.0)}
    tx = Recipe(optimizer=name, learning_rate=0.1, weight_decay=0.5).build()
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["weight"], np.full((3, 4), -0.1), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.zeros(4))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1]),
        ({"total_steps": 4}, [1, 0.75, 0.5, 0.25, 0, 0, 0]),
        ({"warmup_steps": 2, "total_steps": 6}, [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_the_learning_rate(options, expected):
    """Read from the steps that plain descent on a constant gradient takes."""
    tx = Recipe("sgd", learning_rate=0.1, weight_decay=0.0, b1=0.0, **options).build()
    params = {"w": jnp.zeros(1)}
    state, steps = tx.init(params), []
    for _ in expected:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update({"w": jnp.ones(1)}, state, params)
        steps.append(-float(updates["w"][0]) / 0.1)
    np.testing.assert_allclose(steps, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "`optimizer='adam'` is unknown; .*Did you mean `adamw`"),
        ({"learning_rate": 0.0}, "`learning_rate=0.0` has to be above 0"),
        ({"weight_decay": -1.0}, "`weight_decay=-1.0` has to be at least 0"),
        ({"warmup_steps": -1}, "`warmup_steps=-1` has to be at least 0"),
        ({"warmup_steps": 9, "total_steps": 9}, "`warmup_steps=9` takes all of `total_steps=9`"),
        ({"learning_rat": 1.0}, "no option `learning_rat`. Did you mean `learning_rate`"),
        ({"mask_rate": 1.0}, "`mask_rate=1.0` has to lie between 0 and 1"),
        ({"top_k": 41}, "`top_k=41` has to lie between 1 and `vocab_size=40`"),
        ({"special": SpecialIds(0, 1, 2, 3, 40)}, "token 40 is no id of .*`vocab_size=40`. Pass"),
        ({"special": SpecialIds(1, 0, 2, 3, 4)}, "pads with 1, but .*`pad_token_id=0`"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        AlbertForMaskedLM.init(TINY, KEY, **options)


def test_hyperparameters_make_the_same_task_again():
    options = {
        "special": SpecialIds(0, 1, 5, 6, 7),
        "mask_rate": 0.2,
        "top_k": 3,
        "optimizer": "lamb",
        "total_steps": 50,
    }
    task = AlbertForMaskedLM.init(GROUPS, KEY, **options)
    stored = json.loads(json.dumps(task.hyperparameters()))
    fields = {field.name for field in dataclasses.fields(AlbertConfig)}
    config = AlbertConfig.from_dict({name: stored.pop(name) for name in fields})
    special = SpecialIds(**stored.pop("special"))
    again = AlbertForMaskedLM.init(config, KEY, special=special, **stored)
    assert jax.tree.structure(again) == jax.tree.structure(task)
    assert_same(again, task)
