"""Entities in the tags of words, and how many of them are found."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlightning import F1

_GO_ON, _LAST = "IE", "ES"


def say_entities(labels: Iterable[str]) -> bool:
    """Whether labels say where entities begin and go on: `O`, `B-place`, `I-place`, and in
    schemes that have them `E-` for the last word and `S-` for the only one."""
    named = [label for label in labels if label != "O"]
    return bool(named) and all(re.fullmatch("[BIES]-.+", label) for label in named)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a sequence: what each is, its first word, and the one after its last.

    As in the shared task CoNLL-2003 (Tjong Kim Sang and De Meulder 2003) an `I-` that goes on with
    nothing of its kind begins an entity too.
    """
    found = set()
    kind, begun = "", 0
    for place, (before, tag) in enumerate(itertools.pairwise(["O", *tags, "O"])):
        if _goes_on(before, tag):
            continue
        if kind:
            found.add((kind, begun, place))
        kind, begun = _parts(tag)[1], place
    return found


def _parts(tag: str) -> tuple[str, str]:
    """Which word of an entity a tag is of, and of what kind it is."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def _goes_on(before: str, tag: str) -> bool:
    """Whether a word goes on with the entity of the word before it."""
    (prefix, kind), (then, same) = _parts(before), _parts(tag)
    return bool(kind) and prefix not in _LAST and then in _GO_ON and same == kind


def entity_scores(
    predictions: Iterable[Sequence[str]], truths: Iterable[Sequence[str]]
) -> dict[str, float]:
    """F1, precision and recall of whole entities, over all sequences, between 0 and 1: one counts
    as found where its kind and both its ends are right."""
    right = predicted = true = 0
    for prediction, truth in zip(predictions, truths, strict=True):
        ours, theirs = entities(prediction), entities(truth)
        right += len(ours & theirs)
        predicted += len(ours)
        true += len(theirs)
    return {
        "f1": 2 * right / max(predicted + true, 1),
        "precision": right / max(predicted, 1),
        "recall": right / max(true, 1),
    }


def entity_f1(
    predictions: Int[Array, "batch seq"],
    truths: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    labels: Sequence[str],
) -> F1:
    """The F1 of `entity_scores`, traced.

    **Arguments:**

    - `predictions`, `truths`: by their numbers in `labels`.
    - `weights`: what each word counts, 0 for tokens that begin none; of an entity its first word's.
    """
    follows = jnp.asarray([[_goes_on(before, tag) for tag in labels] for before in labels])
    kinds = [_parts(label)[1] for label in labels]
    kind_of = jnp.asarray([sorted({"", *kinds}).index(kind) for kind in kinds])
    known = weights > 0
    place = jnp.broadcast_to(jnp.arange(known.shape[1])[None], known.shape)
    before = jax.lax.cummax(jnp.where(known, place, -1), axis=1)
    before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def spans(
        tags: Int[Array, "batch seq"],
    ) -> tuple[Bool[Array, "batch seq"], Int[Array, "batch seq"], Int[Array, "batch seq"]]:
        """Where entities begin, of what kind, and which word is the first behind them."""
        previous = jnp.take_along_axis(tags, jnp.maximum(before, 0), axis=1)
        goes_on = (before >= 0) & follows[previous, tags]
        stops = jnp.where(known & ~goes_on, place, place.shape[1])
        after = jax.lax.cummin(stops, axis=1, reverse=True)
        after = jnp.pad(after[:, 1:], ((0, 0), (0, 1)), constant_values=place.shape[1])
        kind = kind_of[tags]
        return known & (kind > 0) & ~goes_on, kind, after

    ours, our_kind, our_end = spans(predictions)
    theirs, their_kind, their_end = spans(truths)
    right = ours & theirs & (our_kind == their_kind) & (our_end == their_end)
    count = lambda some: jnp.sum(jnp.where(some, weights, 0.0))[None]
    return F1(count(right), count(ours), count(theirs), "micro")
