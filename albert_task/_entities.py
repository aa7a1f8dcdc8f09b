"""Entities in the tags of words, and how many of them are found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, of = tag.partition("-")
        if kind and not (prefix in _GO_ON and of == kind):
            found.add((kind, begun, place))
            kind = ""
        if of and not kind:
            kind, begun = of, place
        if prefix in _LAST:
            found.add((kind, begun, place + 1))
            kind = ""
    return found


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
