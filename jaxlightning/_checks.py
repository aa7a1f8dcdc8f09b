"""What can be known to be wrong before any data is read or anything is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from jaxtyping import PyTree

from ._nearest import nearest
from ._task import TaskModule

_Function = TypeVar("_Function", bound=Callable[..., Any])


@contextlib.contextmanager
def traced(task: TaskModule, method: str, batch: PyTree) -> Iterator[None]:
    """Around the tracing of a step method: says what a wrong batch or signature looks like."""
    _check_signature(task, method)
    name = f"`{type(task).__name__}.{method}`"
    try:
        yield
    except Exception as error:
        if isinstance(error, AttributeError) and isinstance(error.obj, TaskModule):
            for names, advice in _ELSEWHERE.items():
                if error.name in names.split():
                    raise AttributeError(
                        f"{name} uses `self.{error.name}`, but a task is pure and has none. "
                        f"{advice}"
                    ) from error
        if isinstance(error, dataclasses.FrozenInstanceError):
            field = "".join(re.findall(r"'(\w+)'", str(error)))
            raise dataclasses.FrozenInstanceError(
                f"{name} sets `{field}`, but a task is not changed in place. A number to log is "
                f'returned: `return loss, {{"{field}": ...}}`. What the next step is to find '
                f"changed is a field `{field}: jax.Array = jaxlightning.buffer()`, of which "
                "`training_step` hands a new one back: `return loss, metrics, "
                f"eqx.tree_at(lambda task: task.{field}, self, {field})`."
            ) from error
        absent = isinstance(error, KeyError) and isinstance(batch, dict) and error.args
        if not absent or error.args[0] in batch:
            error.add_note(f"Raised while {name} was traced, before any compute.")
            raise
        wanted, keys = error.args[0], sorted(map(str, batch))
        raise KeyError(
            f"{name} looked up `{wanted}`, which its batch does not have: its keys are {keys}."
            f"{nearest(str(wanted), keys)}"
        ) from error


_ELSEWHERE = {
    "log log_dict": 'Return what is to be logged: `return loss, {"accuracy": ...}`.',
    "trainer current_epoch global_step logger": "A `Callback` gets the trainer in every hook.",
    "device dtype": "Arrays are where they have to be, in the dtypes of `precision`.",
}
"""What a LightningModule has and a task has not."""


def _check_signature(task: TaskModule, method: str) -> None:
    takes = inspect.signature(getattr(task, method))
    gets = ["state", "batch"] if method == "train_step" else ["batch"]
    try:
        takes.bind(*gets, key=None)
    except TypeError:
        raise TypeError(
            f"`{type(task).__name__}.{method}` takes {takes}, but is called with "
            f"({', '.join(gets)}, key=key). Write `def {method}(self, {', '.join(gets)}, *, key): "
            "...`; use `key` for dropout, or ignore it."
        ) from None


def refuses_unknown(what: str, elsewhere: Mapping[str, str]) -> Callable[[_Function], _Function]:
    """Makes the `__init__` of `what` say of an argument that it does not have which one may be
    meant, or what there is `elsewhere` in its place.

    Python's own error names no other. With `**unknown` type checkers would find none.
    """

    def refusing(init: _Function) -> _Function:
        known = [*inspect.signature(init).parameters][1:]

        @functools.wraps(init)
        def checked(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    said = f" ({elsewhere[name]}.)" if name in elsewhere else nearest(name, known)
                    raise TypeError(f"`{what}` has no argument `{name}`.{said}")
            return init(*args, **given)

        return cast(_Function, checked)

    return refusing


def check_monitors(monitors: Iterable[str], known: Iterable[str]) -> None:
    """**Raises:** `ValueError` for a monitor that no step produces."""
    known = sorted(known)
    for name in monitors:
        if name not in known:
            raise ValueError(
                f"`monitor={name!r}` is a metric that no step of this run produces; there are "
                f"{', '.join(f'`{n}`' for n in known) or 'none'}.{nearest(name, known)} "
                "A callback that logs it itself says so in `provides()`."
            )
