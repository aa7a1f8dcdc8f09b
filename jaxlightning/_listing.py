"""Many things in a message: the first ones, and how many more there are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

SHOWN = 20
"""How many lines a message lists."""


def listed(lines: Collection[str], indent: str = "  ", most: int = SHOWN) -> str:
    """Each on a line of its own, after a line break."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n{indent}{line}" for line in [*islice(lines, most), *more])


def counted(numbers: Sequence[int], most: int = 8) -> str:
    """`3, 1, 4, and 5 more`."""
    more = f", and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more
