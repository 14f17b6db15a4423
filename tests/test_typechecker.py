"""The checks of annotations that all other tests run under."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Float, TypeCheckError

from tests.typechecker import checked


@checked
def scaled(x: Float[jax.Array, "n"], y: Float[jax.Array, "n"], *rest: int, by: float = 1.0, **others: str) -> jax.Array:
    return x + y if by else "nothing"


def test_what_the_annotations_say_passes():
    x = jnp.ones(3)
    assert scaled(x, y=x, by=2.0, name="a").shape == scaled(x, x, 1, 2).shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((jnp.ones(3), jnp.ones(4)), {}),  # one name, two lengths
        ((jnp.ones((3, 1)), jnp.ones(3)), {}),
        ((jnp.ones(3, int), jnp.ones(3, int)), {}),
        ((jnp.ones(3), jnp.ones(3), "rest"), {}),
        ((jnp.ones(3), jnp.ones(3)), {"by": "two"}),
        ((jnp.ones(3), jnp.ones(3)), {"other": 1}),
        ((jnp.ones(3), jnp.ones(3)), {"by": 0.0}),  # what it returns
    ],
)
def test_anything_else_does_not(arguments, keywords):
    with pytest.raises(TypeCheckError):
        scaled(*arguments, **keywords)
