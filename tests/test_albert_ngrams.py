"""N-grams of whole words: their distribution against the exact one, by χ² with fixed keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from albert_task import SpecialIds, WordStarts, mask_tokens, train_tokenizer

SPECIAL = SpecialIds(0, 1, 2, 3, 4)
VOCAB = 100
STARTS = WordStarts.from_table([n < 50 or n % 2 == 0 for n in range(VOCAB)])
"""Half of the pieces from 50 on go on with a word."""

jitted = jax.jit(
    mask_tokens,
    static_argnames=(
        "mask_id", "special", "vocab_size", "rate", "predictions", "word_starts", "max_ngram",
    ),
)  # fmt: skip


def mask(tokens, seed=0, **options):
    how = {"mask_id": 4, "special": SPECIAL, "vocab_size": VOCAB, "max_ngram": 3} | options
    found = jitted(jnp.asarray(tokens), jax.random.key(seed), **how)
    return jax.tree.map(np.asarray, found)


def sentences(rows, seq, pieces=1, seed=0):
    """Rows of words of 1 to `pieces` pieces, between [CLS] and [SEP]."""
    generator = np.random.default_rng(seed)
    tokens = np.empty((rows, seq), np.int32)
    for row in tokens:
        line = [2]
        while len(line) < seq - 1:
            line.append(int(generator.integers(5, 50)))
            for _ in range(generator.integers(0, pieces)):
                line.append(int(generator.integers(25, 50)) * 2 + 1)
        row[:] = [*line[: seq - 1], 3]
    return tokens


def chosen_of(tokens, found):
    chosen = np.zeros(tokens.shape, bool)
    for row, positions, weights in zip(chosen, found.positions, found.weights, strict=True):
        row[positions[weights > 0]] = True
    return chosen


@pytest.mark.long
def test_lengths_are_drawn_by_one_over_n():
    """Of the n-gram that each row takes first: positions that go up by 1."""
    tokens = sentences(4000, 400)
    found = mask(tokens, predictions=12, word_starts=STARTS)
    together = np.diff(found.positions[:, :4], axis=1) == 1
    lengths = 1 + np.cumprod(together, axis=1).sum(1)
    # In 1 row of 400 the second one happens to follow it; there, it looks longer.
    counts = np.bincount(lengths, minlength=5)[1:]
    assert counts[3] < 0.01 * len(tokens)
    expected = counts[:3].sum() * np.asarray([6, 3, 2]) / 11
    assert chisquare(counts[:3], expected).pvalue > 1e-3


def test_lengths_exactly():
    """Of how the words are parted, before any are taken: the lengths are independent draws."""
    from albert_task._masking import _parted

    tokens = jnp.asarray(sentences(2000, 66))
    bits = jax.random.bits(jax.random.key(5), tokens.shape)
    new, starts = _parted(tokens, tokens > 4, None, STARTS, 3, bits)
    assert bool((starts == (tokens > 4)).all())
    lengths = []
    for row in np.asarray(new):
        begins = np.flatnonzero(row)
        lengths += np.diff(begins).tolist()  # but for the last, which the row's end cuts
    counts = np.bincount(lengths)[1:]
    assert len(counts) == 3
    # The last of a row is left out, which is a little longer: the mean is 18 / 11 words.
    assert chisquare(counts, np.sum(counts) * np.asarray([6, 3, 2]) / 11).pvalue > 1e-3


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_every_word_is_as_likely(max_ngram):
    tokens = np.tile(sentences(1, 34), (20_000, 1))
    chosen = chosen_of(tokens, mask(tokens, word_starts=STARTS, max_ngram=max_ngram, rate=0.15))
    counts = chosen.sum(0)[1:-1]
    assert chosen[:, [0, -1]].sum() == 0
    assert (chosen.sum(1) == 5).all()
    if max_ngram == 1:
        assert chisquare(counts).pvalue > 1e-3
    else:
        np.testing.assert_allclose(counts[1:-1] / counts[1:-1].mean(), 1, atol=0.05)


def test_words_are_whole_and_the_number_is_met():
    tokens = sentences(3000, 128, pieces=4)
    found = mask(tokens, predictions=20, word_starts=STARTS)
    chosen = chosen_of(tokens, found)
    assert (found.weights.sum(1) == 20).mean() > 0.99
    assert (found.weights.sum(1) >= 18).all()
    table = STARTS.table()
    within = ~table[tokens] & (tokens > 4)
    # Whoever goes on with a word is chosen where the piece before is, and only there.
    np.testing.assert_array_equal(chosen[:, 1:][within[:, 1:]], chosen[:, :-1][within[:, 1:]])


def test_a_number_that_no_whole_words_make_is_not_met():
    """All words of three pieces: 7 predictions are two words."""
    tokens = np.tile([[2, *[7, 51, 53] * 10, 3]], (50, 1)).astype(np.int32)
    found = mask(tokens, predictions=7, word_starts=STARTS)
    assert (found.weights.sum(1) == 6).all()
    np.testing.assert_array_equal(chosen_of(tokens, found).sum(1), 6)


def test_no_ngram_crosses_a_special_token_or_a_text():
    tokens = np.full((4000, 32), 7, np.int32)
    tokens[:, ::4] = 3
    segments = np.repeat(np.arange(1, 17), 2)[None] * np.ones((4000, 1), np.int32)
    kept = np.full((4000, 32), 7, np.int32)
    for rows, options in ((tokens, {}), (kept, {"segments": jnp.asarray(segments, jnp.int32)})):
        found = mask(rows, predictions=6, word_starts=STARTS, **options)
        # The first n-gram of each row stands alone at the front of its positions.
        first = found.positions[:, :3]
        together = (np.diff(first, axis=1) == 1).all(1)
        if options:
            texts = np.take_along_axis(segments, found.positions, 1)
            u = found.positions
            pairs = (np.diff(u, axis=1) == 1) & (np.diff(texts, axis=1) == 0)
            assert pairs.any()
            assert not together.mean() > 0.1
        else:
            assert (tokens[np.arange(4000)[:, None], first] == 7).all()


def test_an_ngram_is_replaced_as_one():
    """80 % [MASK], 10 % random, 10 % as they are: all tokens of an n-gram alike."""
    tokens = np.full((30_000, 40), 7, np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    found = mask(tokens, predictions=3, word_starts=STARTS)
    rows = np.arange(len(tokens))[:, None]
    shown = found.tokens[rows, found.positions]
    whole = (np.diff(found.positions, axis=1) == 1).all(1)  # three in a row: mostly one trigram
    kinds = np.where(shown == 4, 0, np.where(shown == 7, 2, 1))
    alike = (kinds == kinds[:, :1]).all(1)
    assert alike[whole].mean() > 0.93
    first = kinds[:, 0]
    counts = np.bincount(first, minlength=3)
    # A random token is the old one in 1 of 95 cases.
    expected = len(first) * np.asarray([0.8, 0.1 * 94 / 95, 0.1 + 0.1 / 95])
    assert chisquare(counts, expected).pvalue > 1e-3


def test_random_tokens_are_uniform_over_ordinary_ones():
    tokens = np.full((40_000, 16), 7, np.int32)
    found = mask(tokens, predictions=8, word_starts=STARTS)
    rows = np.arange(len(tokens))[:, None]
    shown = found.tokens[rows, found.positions].ravel()
    others = shown[(shown != 4) & (shown != 7)]
    counts = np.bincount(others, minlength=VOCAB)
    assert not counts[:5].any()
    counts = np.delete(counts, [0, 1, 2, 3, 4, 7])
    assert chisquare(counts).pvalue > 1e-3


def test_the_key_alone_decides():
    tokens = sentences(8, 64, pieces=3)
    one, same, other = (mask(tokens, seed, word_starts=STARTS) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.positions, same.positions)
    np.testing.assert_array_equal(one.tokens, same.tokens)
    assert (one.positions != other.positions).any()


def test_which_pieces_begin_a_word():
    tokenizer = train_tokenizer(["the cat's 1,000 cafés (and more) sat"] * 50, 60)
    starts = WordStarts.of(tokenizer)
    table = starts.table()
    assert len(table) == tokenizer.get_vocab_size() == starts.size
    for number, begins in enumerate(table):
        piece = tokenizer.id_to_token(number)
        if piece.startswith("▁"):
            assert begins
        elif piece.isalpha() and piece.isascii():
            assert not begins
        elif piece in {",", "(", ")", "1", "0", "é"}:
            assert begins
    assert WordStarts(*starts) == starts
