"""Runs a program operation by operation, and knows where each value that is not finite came from.

A NaN is of interest only where it goes on to something that matters: what `jnp.where` discards, and
the infinity of a mask that softmax turns into zeros, are meant. So nothing is raised when one
appears. Every value that is not finite remembers what it was made of, and whoever has one that
should not be there asks for its origins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from ._flops import ELEMENTWISE
from ._operation import Link, Operation, OperationFailed, observed, place

_CALLS = {
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "jit", "pjit", "remat2",
}  # fmt: skip
"""Operations that run one program on all of their operands."""

_ALSO_ELEMENTWISE = {"convert_element_type", "copy", "stop_gradient"}


class Taint:
    """That a value is not finite, and what it was made of."""

    def __init__(
        self,
        nan: bool,
        inf: bool,
        parents: Sequence[Taint] = (),
        operation: Operation | None = None,
        given: str | None = None,
    ):
        self.nan, self.inf = nan, inf
        self.parents = tuple(parents)
        self.operation = operation
        """The one that made it; `None` for a part, or a collection, of its parents."""
        self.given = given
        """What it is called, if it was there from the start."""

    def origins(self, kind: str) -> list[Taint]:
        """Where the NaN (`kind="nan"`), or the infinity (`"inf"`), came into being: in the order of
        execution, and what was there from the start before that if it is NaN. A given infinity may
        well be meant, so it comes last."""
        found: list[Taint] = []
        seen: set[int] = set()
        left = [self]
        while left:
            taint = left.pop()
            if id(taint) in seen:
                continue
            seen.add(id(taint))
            older = [parent for parent in taint.parents if getattr(parent, kind)]
            left += older
            if not older:
                found.append(taint)
        start = -1.0 if kind == "nan" else math.inf
        return sorted(found, key=lambda t: t.operation.order if t.operation else start)


class Value(NamedTuple):
    array: Any
    taint: Taint | None = None
    """`None`: it is finite."""


def given(array: Any, name: str | Callable[[list[int]], str]) -> Value:
    """A value that is there from the start. `name` may depend on the place of what is wrong."""
    nan, inf = _troubles(array)
    if not (nan or inf):
        return Value(array)
    if not isinstance(name, str):
        host = np.asarray(array)
        name = name(place(np.isnan(host) if nan else np.isinf(host)))
    return Value(array, Taint(nan, inf, given=name))


def run_watched(program: ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
    """The results of a program on these operands, each operation carried out alone.

    An operation with a program inside, such as a scan, is carried out as one, and step by step
    only where its results are not finite.

    **Raises:** `OperationFailed` where one raises.
    """
    return _Run().program(program, list(operands), ())


class _Run:
    def __init__(self) -> None:
        self.count = 0

    def program(self, program: Any, operands: list[Value], chain: tuple[Link, ...]) -> list[Value]:
        jaxpr = getattr(program, "jaxpr", program)
        held: dict[Any, Value] = dict(zip(jaxpr.invars, operands, strict=True))
        for var, constant in zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True):
            held[var] = given(constant, "a constant of the program")
        dead = _last_uses(jaxpr)
        for number, eqn in enumerate(jaxpr.eqns):
            read = [_read(held, atom) for atom in eqn.invars]
            results = self.equation(jaxpr, eqn, read, chain)
            held.update(zip(eqn.outvars, results, strict=True))
            for var in dead[number]:
                held.pop(var, None)
        return [_read(held, atom) for atom in jaxpr.outvars]

    def equation(
        self, jaxpr: Any, eqn: Any, operands: list[Value], chain: tuple[Link, ...]
    ) -> list[Value]:
        self.count += 1
        order = self.count
        arrays = [operand.array for operand in operands]
        chain = (*chain, Link(eqn))
        try:
            results = _alone(jaxpr, eqn, arrays)
        except Exception as error:
            self.inside(eqn, operands, chain)  # which raises where it is to blame
            raise OperationFailed(observed(chain, order, arrays, [])) from error
        troubles = list(map(_troubles, results))
        if not any(nan or inf for nan, inf in troubles):
            return list(map(Value, results))
        taints = self.inside(eqn, operands, chain)
        if taints is None:
            taints = [None] * len(results)
        values = []
        for result, (nan, inf), taint in zip(results, troubles, taints, strict=True):
            if (nan or inf) and taint is None:
                parents = _contributing(eqn.primitive.name, operands, result)
                new_nan = nan and not any(parent.nan for parent in parents)
                new_inf = inf and not any(parent.inf for parent in parents)
                made = observed(chain, order, arrays, [result]) if new_nan or new_inf else None
                taint = Taint(nan, inf, parents, made)
            values.append(Value(result, taint if nan or inf else None))
        return values

    # Programs inside operations

    def inside(
        self, eqn: Any, operands: list[Value], chain: tuple[Link, ...]
    ) -> list[Taint | None] | None:
        """Why the results of an operation are not finite, if a program inside it says so."""
        name, parameters = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.scan(eqn, operands, chain)
        if name == "while":
            return self.loop(parameters, operands, chain)
        if name == "cond":
            branch = int(np.clip(operands[0].array, 0, len(parameters["branches"]) - 1))
            return self.taints(parameters["branches"][branch], operands[1:], chain)
        programs = [x for x in parameters.values() if isinstance(x, ClosedJaxpr | Jaxpr)]
        if name not in _CALLS or len(programs) != 1:
            return None
        return self.taints(programs[0], operands, chain)

    def taints(
        self, program: Any, operands: list[Value], chain: tuple[Link, ...]
    ) -> list[Taint | None]:
        return [value.taint for value in self.program(program, operands, chain)]

    def scan(self, eqn: Any, operands: list[Value], chain: tuple[Link, ...]) -> list[Taint | None]:
        parameters = eqn.params
        first, second = _constants_and_carry(eqn)
        constants, carry = operands[:first], operands[first : first + second]
        stacked = operands[first + second :]
        collected: list[list[Taint]] = []
        steps = range(parameters["length"])
        for step in reversed(steps) if parameters["reverse"] else steps:
            here = (*chain[:-1], Link(chain[-1].eqn, step))
            slices = [_slice(value, step) for value in stacked]
            results = self.program(parameters["jaxpr"], [*constants, *carry, *slices], here)
            carry = results[:second]
            collected = collected or [[] for _ in results[second:]]
            for taints, result in zip(collected, results[second:], strict=True):
                taints += [result.taint] if result.taint else []
        return [*(value.taint for value in carry), *map(_together, collected)]

    def loop(
        self, parameters: Any, operands: list[Value], chain: tuple[Link, ...]
    ) -> list[Taint | None]:
        first, second = parameters["cond_nconsts"], parameters["body_nconsts"]
        asked, constants = operands[:first], operands[first : first + second]
        carry = operands[first + second :]
        step = 0
        while True:
            here = (*chain[:-1], Link(chain[-1].eqn, step))
            if not self.program(parameters["cond_jaxpr"], [*asked, *carry], here)[0].array:
                return [value.taint for value in carry]
            carry = self.program(parameters["body_jaxpr"], [*constants, *carry], here)
            step += 1


def _alone(jaxpr: Any, eqn: Any, arrays: list[Any]) -> list[Any]:
    """The results of one equation of a program."""
    operands = {
        atom: array
        for atom, array in zip(eqn.invars, arrays, strict=True)
        if not isinstance(atom, Literal)
    }
    alone = jaxpr.replace(constvars=[], invars=list(operands), outvars=eqn.outvars, eqns=[eqn])
    return list(jaxpr_as_fun(ClosedJaxpr(alone, []))(*operands.values()))


def _constants_and_carry(scan: Any) -> tuple[int, int]:
    """How many of the operands of a scan are constants, and how many are carried on.

    JAX has said so in other parameters with each version; but only what is cut into steps has an
    axis more outside.
    """
    program = scan.params["jaxpr"]
    inner = getattr(program, "jaxpr", program)

    def whole(outside: Any, inside: Any) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    carry = whole(scan.outvars, inner.outvars)
    return whole(scan.invars, inner.invars) - carry, carry


def _read(held: dict[Any, Value], atom: Any) -> Value:
    if isinstance(atom, Literal):
        aval: Any = atom.aval
        return given(jnp.asarray(atom.val, aval.dtype), f"the constant {atom.val}")
    return held[atom]


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation the variables that nobody reads after it."""
    kept = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    dead: list[list[Any]] = [[] for _ in jaxpr.eqns]
    for number in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[number]
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, Literal) and atom not in kept:
                kept.add(atom)
                dead[number].append(atom)
    return dead


def _troubles(array: Any) -> tuple[bool, bool]:
    """Whether there is NaN in it, and whether there are infinities."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return False, False
    host = np.asarray(array)
    if np.isfinite(host).all():
        return False, False
    return bool(np.isnan(host).any()), bool(np.isinf(host).any())


def _contributing(name: str, operands: list[Value], result: Any) -> list[Taint]:
    """The taints of operands that a result's may have come from.

    Of an elementwise operation only where the result is not finite: another entry of an operand
    may well be the infinity of a mask.
    """
    tainted = [operand for operand in operands if operand.taint is not None]
    if name not in ELEMENTWISE | _ALSO_ELEMENTWISE:
        return [operand.taint for operand in tainted if operand.taint]
    bad = ~np.isfinite(np.asarray(result))
    found = []
    for number, operand in enumerate(operands):
        if operand.taint is None:
            continue
        where = bad
        if name == "select_n":
            where = bad & (np.asarray(operands[0].array).astype(int) == number - 1)
        entries = np.broadcast_to(np.asarray(operand.array), bad.shape)[where]
        nan, inf = bool(np.isnan(entries).any()), bool(np.isinf(entries).any())
        if nan or inf:
            found.append(Taint(nan, inf, [operand.taint]))
    return found


def _slice(value: Value, index: int) -> Value:
    array = value.array[index]
    nan, inf = (False, False) if value.taint is None else _troubles(array)
    return Value(array, Taint(nan, inf, [value.taint]) if value.taint and (nan or inf) else None)


def _together(taints: list[Taint]) -> Taint | None:
    if not taints:
        return None
    return Taint(any(t.nan for t in taints), any(t.inf for t in taints), taints)
