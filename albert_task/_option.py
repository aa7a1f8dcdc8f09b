"""An option of a command: a field with its help, and the values that it may have."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any

from jaxlightning._nearest import nearest


def option(
    default: Any,
    help: str,
    *,
    group: str,
    also: tuple[str, ...] = (),
    one_of: Iterable[str] = (),
    least: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
    **how: Any,
) -> Any:
    """A field that is also an option of the command line.

    **Arguments:**

    - `also`: further names of it.
    - `one_of`, `least`, `above`, `below`: what `check_values` wants of a value that is not `None`.
    - `how`: goes to `add_argument`. The `metavar` of numbers is N or X.
    """
    if "type" in how:
        how.setdefault("metavar", {int: "N", float: "X"}[how["type"]])
    bounds = {"at least": least, "above": above, "below": below}
    metadata = {
        "help": help,
        "group": group,
        "also": also,
        "one_of": tuple(one_of),
        "bounds": {words: bound for words, bound in bounds.items() if bound is not None},
        "how": how,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command line's name of an option."""
    return "--" + name.replace("_", "-")


def check_values(options: Any) -> None:
    """**Raises:** `ValueError` for a value that its option may not have."""
    for field in dataclasses.fields(options):
        value, known = getattr(options, field.name), field.metadata["one_of"]
        if value is None:
            continue
        _check_sound(flag(field.name), value)
        if known and value not in known:
            listed = ", ".join(f"`{choice}`" for choice in known)
            raise ValueError(
                f"`{flag(field.name)} {value}` is unknown; it is one of {listed}."
                f"{nearest(value, known)}"
            )
        bounds = field.metadata["bounds"]
        if not all(_HOLDS[words](value, bound) for words, bound in bounds.items()):
            wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items())
            raise ValueError(f"`{flag(field.name)} {value}` has to be {wanted}.")


def _check_sound(name: str, value: Any) -> None:
    for one in value if isinstance(value, tuple) else (value,):
        if one == "":  # such as of a shell's variable that is not set
            raise ValueError(f"`{name}` has an empty value.")
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"`{name} {one}` has to be a finite number.")


_HOLDS = {  # not with NaN
    "at least": operator.ge,
    "above": operator.gt,
    "below": operator.lt,
}
