"""What a model puts in the place of `[MASK]`, and how the text reads then."""

import dataclasses
import json

import equinox as eqx
import numpy as np
import pytest
import tiny_albert
from tiny_albert import TINY, numpy_albert, numpy_head
from tokenizers import Tokenizer

from albert_task import fill_mask, pseudo_perplexity, special_ids, train_tokenizer
from albert_task._fill_mask import Guess

LINES = [
    "the quick brown fox jumps over the lazy dog.",
    "a dog is not as quick as a fox, and a fox is not as lazy as a dog.",
    "over and over the brown dog jumps, quick as the fox is lazy.",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LINES, 43)


@pytest.fixture(scope="module")
def task(tokenizer):
    config = dataclasses.replace(
        TINY, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=40
    )
    return tiny_albert.task(config)


def insisting(task, tokenizer, piece):
    """The task, with `piece` likeliest everywhere."""
    bias = task.head.bias.at[tokenizer.token_to_id(piece)].set(100.0)
    return eqx.tree_at(lambda t: t.head.bias, task, bias)


def swapped(tokenizer):
    """The same tokenizer, but that `<pad>` and `<unk>` have each other's ids."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary[0], vocabulary[1] = vocabulary[1], vocabulary[0]
    content["model"]["unk_id"] = 0
    for token in content["added_tokens"]:
        token["id"] = {0: 1, 1: 0}.get(token["id"], token["id"])
    return Tokenizer.from_str(json.dumps(content))


def test_surprise_does_not_depend_on_what_fills_up(task, tokenizer):
    text = "the quick fox"
    found = pseudo_perplexity(task, tokenizer, text)
    assert pseudo_perplexity(task, swapped(tokenizer), text) == pytest.approx(found, rel=1e-6)


def test_unknown_pieces_surprise(task, tokenizer):
    assert 1 in tokenizer.encode("the fox 龘").ids
    assert pseudo_perplexity(task, tokenizer, "龘") > 1
    unlikely = eqx.tree_at(lambda t: t.head.bias, task, task.head.bias.at[1].set(-50.0))
    assert pseudo_perplexity(unlikely, tokenizer, "the fox 龘") > 1e3


@pytest.mark.parametrize("words", [3, 24], ids=["short", "as long as it can be"])
def test_guesses_are_the_models(task, tokenizer, words):
    """Held against numpy, where nothing is padded; of two blanks each is guessed on its own."""
    text = " fox".join(["the [MASK]", *[""] * words]) + " as [MASK]."
    tokens = np.asarray([tokenizer.encode(text).ids])
    words = task.albert.embeddings.words
    logits = numpy_head(task.head, words, numpy_albert(task.albert, tokens))[0]
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exp / exp.sum(-1, keepdims=True)
    probabilities[:, list(special_ids(tokenizer))] = 0
    filled = fill_mask(task, tokenizer, text, top_k=4)
    blanks = np.flatnonzero(tokens[0] == 4)
    assert len(filled.guesses) == len(blanks) == 2
    for at, guesses in zip(blanks, filled.guesses, strict=True):
        best = np.argsort(-probabilities[at])[:4]
        assert [guess.piece for guess in guesses] == [tokenizer.id_to_token(i) for i in best]
        found = [guess.probability for guess in guesses]
        np.testing.assert_allclose(found, probabilities[at, best], rtol=1e-3)


def test_special_tokens_are_never_guessed(task, tokenizer):
    for piece in ("[SEP]", "[MASK]", "<unk>"):
        filled = fill_mask(insisting(task, tokenizer, piece), tokenizer, "a [MASK]", top_k=38)
        guessed = {guess.piece for guess in filled.guesses[0]}
        assert not guessed & {"<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"}
        assert len(guessed) == 38


@pytest.mark.parametrize(
    ("piece", "text", "expected"),
    [
        ("▁fox", "The quick [MASK] jumps.", "The quick fox jumps."),
        ("▁fox", "[MASK] jumps", "fox jumps"),
        ("▁fox", "  [MASK] jumps", "  fox jumps"),
        ("▁fox", "the\n[MASK].", "the\nfox."),
        ("▁fox", "the[MASK].", "the fox."),
        ("▁fox", "a [MASK] [MASK], [MASK]", "a fox fox, fox"),
        ("s", "the fox [MASK] É", "the foxs É"),
        ("s", "[MASK] is", "s is"),
        ("▁", "the [MASK] fox", "the  fox"),
    ],
)
def test_how_the_text_reads(task, tokenizer, piece, text, expected):
    assert tokenizer.token_to_id(piece) is not None
    assert fill_mask(insisting(task, tokenizer, piece), tokenizer, text).text == expected


@pytest.mark.parametrize(
    ("text", "top_k", "message"),
    [
        ("the fox", 5, r"There is no `\[MASK\]` in the text 'the fox'. Write one where to guess"),
        ("[MASK]" + " fox" * 60, 5, r"The rows have \d+ tokens, but .*_embeddings=40`. Cut"),
        ("a [MASK]", 0, r"`top_k=0` has to lie between 1 and the number of pieces that are not"),
        ("a [MASK]", 39, r"`top_k=39` has to lie between 1 .* special, 38\."),
    ],
)
def test_what_cannot_be_filled(task, tokenizer, text, top_k, message):
    with pytest.raises(ValueError, match=message):
        fill_mask(task, tokenizer, text, top_k)


def test_a_tokenizer_of_another_model(tokenizer):
    with pytest.raises(ValueError, match="vocabulary is larger than the model's"):
        fill_mask(tiny_albert.task(), tokenizer, "a [MASK]")


def test_a_guess_reads_as_a_word():
    shown = [str(Guess(piece, 0.125)) for piece in ("▁fox", "es", "▁")]
    assert shown == ["fox 12.5%", "es 12.5%", "▁ 12.5%"]
