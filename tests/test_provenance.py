"""Where a value that is not finite came from: the operation that made it, and no other."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlightning._operation import OperationFailed, summary
from jaxlightning._provenance import given, run_watched


def watched(function, *arguments):
    """The results of `function`, with their taints; arguments are called `argument 0`, ..."""
    program = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree.leaves(arguments)
    values = run_watched(program, [given(x, f"argument {i}") for i, x in enumerate(leaves)])
    expected = jax.tree.leaves(function(*arguments))
    for value, array in zip(values, expected, strict=True):
        np.testing.assert_allclose(value.array, array, rtol=1e-6)
        assert (value.taint is None) == bool(np.isfinite(array).all())
    return values


def origin(function, *arguments, kind="nan"):
    (value,) = watched(function, *arguments)
    return value.taint.origins(kind)[0]


def line_of(function, mark):
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if line.rstrip().endswith(f"# {mark}"))


X = jnp.array([1.0, 0.5, -2.0])


def test_what_is_discarded_is_no_trouble():
    def function(x):
        masked = jnp.where(x > 0, x, -jnp.inf)
        return jax.nn.softmax(masked) + jnp.where(x > 0, jnp.log(x), 0.0)

    (value,) = watched(function, X)
    assert value.taint is None


def test_the_infinity_of_a_mask_is_not_the_culprit():
    def function(x):
        scores = jnp.exp(100 * x)  # overflow
        return jnp.where(x > 0, scores, -jnp.inf).max()

    found = origin(function, X, kind="inf").operation
    assert found.entry == "exp(100) = inf at [0]"
    assert found.frames[-1].line == line_of(function, "overflow")

    def differences(x):
        masked = jnp.where(x > 0, x, -jnp.inf)
        return jnp.log(x - 0.7) + 0 * jnp.exp(masked)  # logarithm

    found = origin(differences, X).operation
    assert found.entry.startswith("log(-0.2) = nan")
    assert found.frames[-1].line == line_of(differences, "logarithm")


def test_a_row_that_is_masked_as_a_whole_is_one():
    def function(x):
        masked = jnp.where(x > 5, x, -jnp.inf)
        return jax.nn.softmax(masked)  # softmax

    taint = origin(function, X)
    assert taint.operation.entry == "sub(-inf, -inf) = nan at [0]"
    assert taint.operation.frames[-1].line == line_of(function, "softmax")
    (parent, *_) = taint.parents
    (constant, *_) = parent.origins("inf")
    assert constant.given == "the constant -inf"


def test_what_was_there_before_comes_first_if_it_is_nan_and_last_if_not():
    def function(x, y):
        return jnp.log(x) + y

    assert origin(function, X, X * jnp.nan).given == "argument 1"
    assert origin(function, X * 0, X * jnp.inf, kind="inf").operation.name == "log"


def test_loops_say_in_which_round():
    def body(carry, x):
        carry = carry - x
        return carry, jnp.log(carry)  # body

    for reverse in (False, True):
        scanned = lambda x, r=reverse: jax.lax.scan(body, jnp.float32(2), x, reverse=r)[1]
        found = origin(scanned, jnp.array([0.5, 1.0, 1.0])).operation
        assert found.rounds == (2,) if not reverse else (0,)
        assert found.frames[-1].line == line_of(body, "body")

    def shrink(carry):
        return carry[0] + 1, jnp.sqrt(carry[1] - 1)  # loop

    found = origin(
        lambda x: jax.lax.while_loop(lambda c: c[0] < 4, shrink, (0, x))[1], jnp.float32(2.5)
    )
    assert found.operation.rounds == (2,)
    assert found.operation.frames[-1].line == line_of(shrink, "loop")


def test_programs_inside_operations_are_entered():
    def branch(x):
        return jnp.log(x)  # branch

    @jax.jit
    def jitted(x):
        return branch(x) + 1

    remembered = jax.checkpoint(branch)
    chosen = lambda x: jax.lax.cond(x[0] > 0, branch, lambda x: x, x)
    for function in (jitted, remembered, chosen, jax.jit(lambda x: jitted(chosen(x) * 0 + x))):
        found = origin(function, X).operation
        assert found.entry == "log(-2) = nan at [2]"
        assert found.frames[-1].line == line_of(branch, "branch")


def test_a_cached_program_does_not_lend_its_first_callers_line():
    def function(x):
        first = jnp.var(x)  # before
        return first + jnp.var(x * 1e30)  # after

    found = origin(function, X, kind="inf").operation
    assert (found.name, found.inside) == ("square", ("_var",))
    assert found.frames[-1].line == line_of(function, "after")
    assert str(found).startswith("`square` in `_var`")


def test_the_derivative_at_a_corner():
    def norm(x):
        return jnp.sqrt((x * x).sum())  # norm

    found = origin(jax.grad(norm), jnp.zeros(3)).operation
    assert (found.name, found.entry) == ("mul", "mul(0, inf) = nan at [0]")


def test_an_operation_that_raises_is_named():
    def check(x):
        if x < 0:
            raise ValueError("negative")
        return x

    def body(carry, x):
        kind = jax.ShapeDtypeStruct((), jnp.float32)
        return carry, jax.pure_callback(check, kind, x)  # callback

    program = jax.make_jaxpr(lambda x: jax.lax.scan(body, 0.0, x)[1])(X)
    with pytest.raises(OperationFailed) as caught:
        run_watched(program, [given(X, "x")])
    assert caught.value.operation.name == "pure_callback"
    assert caught.value.operation.rounds == (2,)
    assert caught.value.operation.frames[-1].line == line_of(body, "callback")
    assert "negative" in str(caught.value.__cause__)


def test_low_precision_and_complex_numbers():
    found = origin(lambda x: jnp.exp(x * 100), X.astype(jnp.bfloat16), kind="inf")
    assert found.operation.entry == "exp(100) = inf at [0]"
    found = origin(lambda x: x * 1e30, 1e30 * X.astype(jnp.complex64), kind="inf")
    assert found.operation.name == "mul"


def test_arrays_are_summed_up():
    x = np.array([[1.5, 0.0], [np.nan, -np.inf]], np.float32)
    expected = (
        "float32[2,2], from 0 to 1.5, 1 zero, 1 of 4 NaN, first at [1, 0], "
        "1 of 4 infinite, first at [1, 1]"
    )
    assert summary(x) == expected
    assert summary(np.zeros(3, np.int32)) == "int32[3], all 0"
    assert summary(np.float32(2)) == "float32[], 2"
    assert summary(jax.random.key(0)) == "key<fry>[]"
    assert summary(np.ones(2, bool)) == "bool[2]"
    assert summary(np.zeros((0, 3), np.float32)) == "float32[0,3]"
