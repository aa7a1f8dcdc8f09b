"""Names of checkpoints, made from templates such as `"{epoch}-{step}-{val/loss:.2f}"`."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

_ALLOWED = re.compile(r"[A-Za-z0-9._=-]*")
"""What the checkpoint store takes as a name."""
_OTHERS = re.compile(r"[^A-Za-z0-9._=-]+")


class FilenameTemplate:
    """A template in the syntax of `str.format`, whose fields are names of metrics.

    With `insert_names`, `{epoch}` gives `epoch=3` rather than `3`. What a name may not hold (as
    the `/` of `val/loss`) becomes `_`.
    """

    def __init__(self, template: str, insert_names: bool):
        self.template = template
        self._insert_names = insert_names
        try:
            parts = list(string.Formatter().parse(template))
            for _, _, spec, _ in parts:
                format(0.0 if not spec or spec[-1] != "d" else 0, spec or "")
        except ValueError as error:
            raise ValueError(
                f'`filename="{template}"` is no valid template: {error}. Write one such as '
                '`"{epoch}-{step}-{val/loss:.2f}"`.'
            ) from error
        for text, name, _, conversion in parts:
            if not _ALLOWED.fullmatch(text) or name == "" or conversion:
                raise ValueError(
                    f'`filename="{template}"`: between fields only letters, digits and `._=-` '
                    "may stand, and every field is the name of a metric: "
                    '`"{epoch}-{step}-{val/loss:.2f}"`.'
                )
        self._parts = [(text, name, spec or "") for text, name, spec, _ in parts]
        first = self.format({name: 0 for name in self.fields})[:1]
        if not re.fullmatch("[A-Za-z0-9]", first):
            raise ValueError(
                f'`filename="{template}"` has to begin with a letter, a digit or a field.'
            )

    @property
    def fields(self) -> list[str]:
        return [name for _, name, _ in self._parts if name is not None]

    def format(self, values: Mapping[str, Any]) -> str:
        """The name for these values. What is missing is `nan`: it is not known yet."""
        text = ""
        for literal, name, spec in self._parts:
            text += literal
            if name is not None:
                label = f"{name}=" if self._insert_names else ""
                text += _OTHERS.sub("_", f"{label}{_formatted(values.get(name), spec)}")
        return text


def _formatted(value: float | int | None, spec: str) -> str:
    if value is None:
        return "nan"
    if spec.endswith("d"):
        return format(int(value), spec)
    return format(value, spec)
