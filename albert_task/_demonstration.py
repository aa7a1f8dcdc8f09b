"""What a pretrained model fills into sentences, for people to look at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._fill_mask import Guess, fill_mask
from ._stages import Prepared
from ._tasks import AlbertForMaskedLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SENTENCES = (
    "the quick [MASK] fox jumps over the [MASK] dog.",
    "returns a new [MASK] with the same shape as the input.",
    "if the [MASK] does not exist, an error is [MASK].",
    "this function is [MASK] by default.",
    "the number of [MASK] in the list.",
)
"""For the corpus that Python brings along."""
_TOKENS = 24
_WORDS = 3


class Blanked(NamedTuple):
    """A text with a [MASK], and the word that stood there, if somebody knows."""

    text: str
    word: str | None


def demonstrated(task: AlbertForMaskedLM, prepared: Prepared) -> list[dict[str, Any]]:
    """For each text it, the text filled in, the guesses, and the word that was there: of the
    held-out text, or `SENTENCES` for the corpus that nobody chose."""
    chosen = prepared.options.text or prepared.options.dataset
    found = held_out(prepared) if chosen else (Blanked(one, None) for one in SENTENCES)
    room = prepared.config.max_position_embeddings
    tokenizer = prepared.tokenizer
    return [
        _filled(task, tokenizer, one)
        for one in found
        if len(tokenizer.encode(one.text).ids) <= room
    ]


def _filled(task: AlbertForMaskedLM, tokenizer: Tokenizer, blanked: Blanked) -> dict[str, Any]:
    filled = fill_mask(task, tokenizer, blanked.text, top_k=3)
    return {**blanked._asdict(), "filled": filled.text, "guesses": filled.guesses}


def held_out(prepared: Prepared) -> list[Blanked]:
    """Beginnings of some of the rows that validations use."""
    batch = next(iter(prepared.data.val_dataloader()))
    tokens = batch["tokens" if "tokens" in batch else "input_ids"]
    segments = batch.get("segment_ids", np.ones_like(tokens))
    beginnings = (row[of == 1][:_TOKENS].tolist() for row, of in zip(tokens, segments, strict=True))
    found = (blanked(prepared.tokenizer.decode(ids)) for ids in beginnings)
    return [one for one in found if one is not None][: len(SENTENCES)]


def blanked(text: str) -> Blanked | None:
    """`text` without the word in its middle; `None` where there are few words."""
    words = [match.span() for match in re.finditer(r"\w{3,}", text)]
    if len(words) < _WORDS:
        return None
    start, end = min(words, key=lambda span: abs(sum(span) - len(text)))
    return Blanked(f"{text[:start]}[MASK]{text[end:]}", text[start:end])


def described(filled: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a report."""
    for one in filled:
        there = "" if one["word"] is None else f"    (there was: {one['word']})"
        yield f"  {one['text']}{there}"
        for guesses in one["guesses"]:
            yield f"      {', '.join(str(Guess(*guess)) for guess in guesses)}"
