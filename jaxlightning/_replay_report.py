"""What running a step again has shown, and how it is told."""

from __future__ import annotations

import re
from typing import NamedTuple

from ._capsule_read import Capsule
from ._listing import counted
from ._operation import Operation
from ._provenance import Taint

_WHERE = {
    "loss": "in the forward pass, and reaches the loss",
    "gradient": "in the backward pass: the loss is finite, but not the gradient of `{}`",
    "update": "in the optimizer: the gradients are finite, but not the update of `{}`",
    "optimizer": "in the optimizer: the updates are finite, but not its state `{}`",
    "task": "in the new task: the updates are finite, but not `{}`",
    "metric": "in the metric `{}` alone",
}
_CHOOSES = (
    "`jnp.where` chooses between values, but adds up the derivatives of both, times 0 for the one "
    "that was not chosen, and 0 times infinity is NaN. If that is what happens here, choose before "
    "the operation: `jnp.sqrt(jnp.where(x > 0, x, 1.0))`."
)


_TRACEBACK = re.compile(r"\A[^\n]*Traceback \(most recent call last\):\n(?:[ \t][^\n]*\n|\n)*")
_OF_EQUINOX = re.compile(r"_EquinoxRuntimeError: (.*?)(?:\n\n+-{10,}\n.*)?", re.DOTALL)


def raised(error: BaseException | str | None) -> str:
    """What somebody's code raised: its type and its message.

    What a callback on the host raises comes out of a compiled program as a traceback, in the
    message of an error of the runtime's; `eqx.error_if` adds to that how to be read better.
    """
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    text = _TRACEBACK.sub("", text, count=1).strip()
    equinox = _OF_EQUINOX.fullmatch(text)
    return equinox[1] if equinox else text


class Replayed(NamedTuple):
    """The outcome of `replay`. `str` tells all of it."""

    capsule: Capsule
    notes: tuple[str, ...] = ()
    number: int = 0
    """Which of the capsule's steps, if it has several."""
    kind: str | None = None
    """`"nan"`, `"inf"` or `"error"`; `"compiled"`, where the step fails only when compiled; `None`,
    where it does not fail."""
    group: str = ""
    """What is not finite: `"loss"`, `"gradient"`, `"update"`, `"optimizer"`, `"task"` or
    `"metric"`."""
    path: str = ""
    """Which leaf of it."""
    operation: Operation | None = None
    """Where it appears; `None` where it was there before."""
    given: str | None = None
    """Where it was, if it was there before."""
    infinities: tuple[Taint, ...] = ()
    """Of a NaN that is made of infinities, where those come from."""
    others: int = 0
    """How many other operations make some of it, independently of this one."""
    error: str = ""
    """See `raised`."""
    loss: float | None = None
    """Of the compiled step, where run by operations it does not fail."""

    @property
    def failed(self) -> bool:
        return self.kind is not None

    def __str__(self) -> str:
        parts = [self._step(), self._context(), self._verdict(), self._causes()]
        return "\n".join(line for part in parts for line in part)

    def _step(self) -> list[str]:
        capsule = self.capsule
        batches = capsule.steps[self.number]
        where = "" if batches is None else f", {batches}"
        failed = raised(capsule.error).splitlines() or [""]
        return [
            f"Step {capsule.step + self.number} of `{capsule.task}`{where}{self._rows()}",
            f"  It had failed with {failed[0]}",
        ]

    def _rows(self) -> str:
        rows = self.capsule.rows[self.number]
        return (
            "" if rows is None else f" (rows {counted([row for batch in rows for row in batch])})"
        )

    def _context(self) -> list[str]:
        lines = [f"  {note}" for note in self.notes]
        if changed := list(self.capsule.differences()):
            lines.append(f"  Here are other versions or settings: {', '.join(changed)}.")
        if self.capsule.reproduced is False:
            lines.append(
                "  The batch had been read from the loader again, and the step was finite with it: "
                "the loader does not give the same batches twice."
            )
        return lines

    def _verdict(self) -> list[str]:
        loss = "" if self.loss is None else f" Its loss is {self.loss:.6g}."
        if self.kind is None:
            return [f"Run again, operation by operation and compiled, it does not fail.{loss}"]
        if self.kind == "compiled" and self.error:
            return [f"Run again, it fails only where it is compiled, with {self.error}"]
        if self.kind == "compiled":
            return [
                f"Run operation by operation, everything is finite; compiled, it is not.{loss} The "
                "compiler orders and fuses operations, and keeps other roundings."
            ]
        if self.kind == "error":
            return [f"Run again, it fails with {self.error}", f"It is raised by {self.operation}"]
        what = "NaN" if self.kind == "nan" else "Infinity"
        where = _WHERE[self.group].format(self.path)
        if self.operation is None:
            return [f"{what} was there before the step: in {self.given}.", f"It appears {where}."]
        return [f"{what} first appears {where}.", f"It is made by {self.operation}"]

    def _causes(self) -> list[str]:
        lines = []
        for taint in self.infinities:
            made = f"in {taint.given}" if taint.operation is None else f"made by {taint.operation}"
            lines.append(f"The infinity is {made}")
        if self.group == "gradient" and self.operation and self.operation.name in ("mul", "div"):
            lines.append(_CHOOSES)
        if self.others:
            lines.append(f"{self.others} more make some of it, independently and later.")
        return lines
