"""A configuration of functions around which checks of types were put."""

import optax
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

from jaxlightning._configuration import described


def test_checks_of_types_are_seen_through():
    """Their wrappers, of jaxtyping and beartype, have names with addresses in them."""

    def schedule(rate):
        def value(count: Float[Array, ""]) -> Float[Array, ""]:
            return rate * count

        return value

    def checked(rate):
        return jaxtyped(typechecker=beartype)(schedule(rate))

    assert described(checked(0.1)) == described(schedule(0.1))
    assert described(checked(0.1)) != described(checked(0.2))
    assert "beartype" not in str(described(optax.adam(checked(0.1))))
