"""Functions compiled ahead of time, once for each signature of their arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ._say import warn

Leaf = jax.Array | np.ndarray | jax.ShapeDtypeStruct


class RecompilationWarning(UserWarning):
    """A program had to be compiled again for arguments nobody had announced."""


def describe(leaf: Leaf) -> str:
    """`float32[8,32]`, with its weak type and sharding where they are out of the ordinary."""
    text = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    weak = ", weak type" if getattr(leaf, "weak_type", False) else ""
    sharding = getattr(leaf, "sharding", None)
    spec = getattr(sharding, "spec", None)
    return text + weak + (f", sharded {spec}" if spec else "")


def compiler_options(deterministic: bool, platform: str) -> dict[str, Any] | None:
    """What XLA is told for `deterministic=True`. Only GPUs have kernels that are not."""
    return {"xla_gpu_deterministic_ops": True} if deterministic and platform == "gpu" else None


class Program:
    """A compiled function of a tree of arrays that is kept (donated) and a tree that varies.

    Called with leaves, because flattening a large state costs more than dispatching a step.
    A call whose varying leaves have a new signature compiles again; unless that signature had
    been announced through `compile`, `on_recompile` decides: `"warn"`, `"raise"`, `"ignore"`.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        donate: bool,
        on_recompile: str = "warn",
        out_shardings: Any = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.name = name
        self._function = function
        self._jit = jax.jit(
            function,
            donate_argnums=(0,) if donate else (),
            **({} if out_shardings is None else {"out_shardings": out_shardings}),
        )
        self._on_recompile = on_recompile
        self._options = compiler_options or None
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._descriptions: dict[Any, list[str]] = {}
        self._last: Callable[..., Any] | None = None
        self.compiling = False
        """Whether a compilation is under way, or failed."""
        self.compile_s = 0.0
        self.recompilations = 0

    def lower(self, kept: Sequence[Leaf], varying: PyTree) -> jax.stages.Lowered:
        return self._jit.lower(kept, varying)

    def compile(self, kept: Sequence[Leaf], varying: PyTree) -> jax.stages.Compiled:
        """Compiles for these arguments, abstract or not, and expects such calls from now on."""
        signature = self._signature(varying)
        if signature not in self._compiled:
            start = time.perf_counter()
            self.compiling = True
            try:
                lowered = self.lower(kept, varying)
            except Exception as error:
                if self._descriptions:
                    error.add_note(self._of_another_shape(varying))
                raise
            self._compiled[signature] = lowered.compile(self._options)
            self.compiling = False
            self._descriptions[signature] = list(map(describe, jax.tree.leaves(varying)))
            self.compile_s += time.perf_counter() - start
        self._last = self._last or self._compiled[signature]
        return self._compiled[signature]

    def __call__(self, kept: Sequence[jax.Array], varying: PyTree) -> Any:
        try:
            return self._last(kept, varying)  # type: ignore[misc]
        except (TypeError, ValueError):
            # Compiled programs refuse other shapes, dtypes, structures and shardings before
            # anything is donated.
            signature = self._signature(varying)
            known = self._compiled.get(signature)
            if known is not None and known is self._last:
                raise
            if known is None:
                if self._compiled:
                    self._recompiling(varying)
                known = self.compile(kept, varying)
            self._last = known
            return known(kept, varying)

    def _signature(self, varying: PyTree) -> Any:
        leaves, structure = jax.tree.flatten(varying)
        return structure, tuple(map(describe, leaves))

    def _of_another_shape(self, varying: PyTree) -> str:
        return (
            f"Raised while the {self.name} was traced anew, for a batch of another shape:\n"
            f"{self._changes(varying)}\n"
            "Fewer rows are the last ones of an epoch. Take their number from the batch, as "
            '`len(batch["x"])`, or leave them out: `DataLoader(..., drop_last=True)`.'
        )

    def _changes(self, varying: PyTree) -> str:
        """How it differs from what was compiled last."""
        paths = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(varying)[0]
        ]
        new = list(map(describe, jax.tree.leaves(varying)))
        old = list(self._descriptions.values())[-1]
        if len(old) == len(new):
            changes = [
                f"  {p or 'the leaf'}: {a} -> {b}"
                for p, a, b in zip(paths, old, new, strict=True)
                if a != b
            ]
        else:
            changes = [f"  {len(old)} leaves -> {len(new)} leaves: {', '.join(paths)}"]
        return "\n".join(changes or ["  the tree's structure"])

    def _recompiling(self, varying: PyTree) -> None:
        self.recompilations += 1
        if self._on_recompile == "ignore":
            return
        message = (
            f"The {self.name} has to be compiled again, because its batch changed:\n"
            f"{self._changes(varying)}\n"
            "Make all batches alike, or announce their shapes (`batch_shapes` of the loader)."
        )
        if self._on_recompile == "raise":
            raise RuntimeError(message)
        warn(message, RecompilationWarning)
