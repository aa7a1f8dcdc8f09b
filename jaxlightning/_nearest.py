"""What a misspelt name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?`, with the nearest name and those that are nearly as near; or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not near:
        return ""
    alike = difflib.SequenceMatcher(None, near[0], name).ratio()
    near = difflib.get_close_matches(name, near, n=3, cutoff=0.9 * alike)
    return f" Did you mean {' or '.join(f'`{n}`' for n in near)}?"
