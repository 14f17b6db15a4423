"""The solver of who asks for none."""

import enum
import math

import jax
import jax.numpy as jnp

from gn_linear._kronecker import matrix_shape
from gn_linear._typing import Params
from gn_linear.preconditioners import Kronecker
from gn_linear.solvers._interface import Solver
from gn_linear.solvers.cg import CG

SMALL = 100
"""Parameters up to which plain conjugate gradients get far in their 50 steps."""
STEPS = 1
"""Inner steps with Kronecker factors: in the benchmarks more take fewer steps, but no fewer seconds."""


class Choice(enum.IntEnum):
    """Who chose the inner solver, and what for.

    Example:
        >>> import gn_linear as gnl
        >>> gnl.solvers.Choice(1).name
        'KRONECKER'
    """

    GIVEN = 0
    """By the caller."""
    KRONECKER = 1
    """By the package, since at least half of the parameters are weights of matrix products, as far as shapes tell."""
    PLAIN = 2
    """By the package, since there are few parameters or most are not in matrices."""

    @property
    def words(self) -> str:
        """The choice and its reason."""
        return {
            Choice.GIVEN: "the solver that was given",
            Choice.KRONECKER: f"CG({STEPS}) with Kronecker factors, chosen since most parameters are in matrices",
            Choice.PLAIN: "CG(), chosen since there are few parameters or most are not in matrices",
        }[self]


def choose(params: Params) -> tuple[Solver, Choice]:
    """The solver that ``gauss_newton`` takes for these parameters if none is given.

    Where at least half of more than 100 parameters are in arrays of two axes or more, both sides wider than 1: one step
    of conjugate gradients with Kronecker factors and momentum, which is KFAC with its exact learning rate and momentum.
    Otherwise ``CG()``. Only shapes are looked at. A weight that turns out not to be used in matrix products alone has
    its diagonal for a preconditioner.

    Args:
        params: the parameters that will be trained.

    Returns:
        The solver, and which case it is.

    Example:
        >>> import jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> solver, choice = gnl.solvers.choose({"w": jnp.zeros((20, 10)), "b": jnp.zeros(10)})
        >>> print(choice.words)
        CG(1) with Kronecker factors, chosen since most parameters are in matrices
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    count = sum(map(math.prod, shapes))
    inside = sum(math.prod(shape) for shape in shapes if min(matrix_shape(shape) or (0,)) > 1)
    if count <= SMALL or 2 * inside < count:
        return CG(), Choice.PLAIN
    return CG(max_steps=STEPS, rtol=0.0, preconditioner=Kronecker(), momentum=True), Choice.KRONECKER
