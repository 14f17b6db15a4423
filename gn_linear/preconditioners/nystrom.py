"""The largest eigenpairs of the Gauss-Newton matrix from a random sketch, whatever the model is made of."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Params, Scalar, check_count
from gn_linear.curvature import LinearisedProblem
from gn_linear.preconditioners._interface import Preconditioner

_AT_ONCE = 8  # products of a sketch that are computed side by side


class NystromState(NamedTuple):
    """Approximate eigenpairs of the undamped matrix.

    Attributes:
        vectors: orthonormal, like the parameters with a leading axis of ``rank``, or of the
            number of parameters if that is less; zero where there is none.
        values: their eigenvalues, falling, shape (rank,).
        count: steps so far.
        age: steps since the last sketch.
    """

    vectors: Params
    values: jax.Array
    count: Count
    age: Count


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nystrom(Preconditioner):
    r"""A randomised Nystrom approximation of the Gauss-Newton matrix, with the damping added.

    .. math::
        G \approx U \Lambda U^\top = Y (\Omega^\top Y)^{-1} Y^\top, \quad Y = G \Omega, \qquad
        M^{-1} = (\lambda_k + \mu) \, U (\Lambda + \mu I)^{-1} U^\top + (I - U U^\top),

    with random :math:`\Omega`. Of the pairs in the sketch those count whose eigenvalue exceeds the damping, so that its
    rank adapts to the spectrum: :math:`\lambda_k` is the least of them. A sketch costs ``rank`` products and is used
    for ``every`` steps; its vectors take the memory of ``rank`` copies of the parameters. It knows nothing of layers,
    and pays where a few eigenvalues stand out of the others, above the damping.

    Attributes:
        rank: of the sketch; static.
        every: steps between two sketches; static.
        seed: of the random vectors; static.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range.

    Example:
        >>> import gn_linear as gnl
        >>> solver = gnl.solvers.CG(preconditioner=gnl.preconditioners.Nystrom(rank=20))

    References:
        Frangella, Tropp and Udell (2023), Randomized Nystrom preconditioning, algorithms 2.1 and 5.3.
    """

    rank: int = dataclasses.field(default=20, metadata={"static": True})
    every: int = dataclasses.field(default=10, metadata={"static": True})
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_count(self.rank, "rank")
        check_count(self.every, "every")
        check_count(self.seed, "seed", minimum=0)

    def init(self, params: Params) -> NystromState:
        """No curvature seen yet."""
        rank = self._rank(params)
        zeros = jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), x.dtype), _tree.solve_zeros(params))
        count = jnp.zeros([], jnp.int32)
        return NystromState(zeros, jnp.zeros([rank], _tree.scalar_dtype(params)), count, count)

    def refresh(self, problem: LinearisedProblem, state: NystromState) -> NystromState:
        """Sketch the matrix if it is time; a sketch that is not finite is left out."""
        older = state._replace(count=state.count + 1, age=state.age + 1)

        def sketched() -> NystromState:
            vectors, values = self._sketch(problem, state.count)
            usable = _tree.all_finite((vectors, values))
            fresh = NystromState(vectors, values, state.count + 1, jnp.zeros_like(state.age))
            return _tree.where(usable, fresh, older)

        due = (state.count == 0) | (state.age + 1 >= self.every)
        return jax.lax.cond(due, sketched, lambda: older)

    def inverse(
        self, problem: LinearisedProblem, state: NystromState, damping: Scalar
    ) -> tuple[Callable[[Params], Params], NystromState]:
        """Divide the part of a residual in the span of the pairs, and leave the rest as it is."""
        del problem
        counted = state.values > damping
        least = jnp.min(jnp.where(counted, state.values, jnp.inf))
        least = jnp.where(jnp.isfinite(least), least, jnp.zeros_like(least))
        safe = jnp.where(counted, state.values + damping, jnp.ones_like(state.values))
        weights = jnp.where(counted, (least + damping) / safe - 1, jnp.zeros_like(safe))

        def apply(residual: Params) -> Params:
            parts = jax.vmap(lambda u: _tree.dot(u, residual))(state.vectors)
            return _tree.add(residual, _combined(state.vectors, weights * parts))

        return apply, state

    def _rank(self, params: Params) -> int:
        return min(self.rank, sum(leaf.size for leaf in jax.tree.leaves(params)))

    def _sketch(self, problem: LinearisedProblem, count: Count) -> tuple[Params, jax.Array]:
        """The eigenpairs of the Nystrom approximation, those of rounding size set to zero."""
        rank = self._rank(problem.params)
        key = jax.random.fold_in(jax.random.key(self.seed), count)
        leaves, structure = jax.tree.flatten(_tree.solve_zeros(problem.params))
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, (rank, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
        test = _orthonormal(jax.tree.unflatten(structure, drawn))
        image = jax.lax.map(problem.product, test, batch_size=min(rank, _AT_ONCE))
        # A shift of rounding size makes the small matrix positive definite, and is taken back from the eigenvalues.
        shift = jnp.finfo(_tree.scalar_dtype(image)).eps * jnp.sqrt(_tree.dot(image, image))
        shift = jnp.where(shift > 0, shift, jnp.ones_like(shift))
        image = jax.tree.map(lambda y, x: y + shift.astype(y.dtype) * x, image, test)
        small = _inner(test, image)
        lower = jnp.linalg.cholesky((small + small.T) / 2)
        half = _combined(image, jax.scipy.linalg.solve_triangular(lower, jnp.eye(rank, dtype=lower.dtype), lower=True))
        squares, rotation = jnp.linalg.eigh(_inner(half, half))
        squares, rotation = squares[::-1], rotation[:, ::-1]
        kept = squares > rank * jnp.finfo(squares.dtype).eps * squares[0]
        scales = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, squares, 1)), 0)
        values = jnp.where(kept, jnp.maximum(squares - shift, 0), 0)
        return _combined(half, (rotation * scales).T), values


def _inner(x: Params, y: Params) -> jax.Array:
    """Inner products of all vectors of two stacks, shape (rank, rank)."""
    return jax.vmap(lambda a: jax.vmap(lambda b: _tree.dot(a, b))(y))(x)


def _combined(stack: Params, weights: jax.Array) -> Params:
    """The sum of a stack's vectors with weights (rank,), or a stack of such sums with weights (sums, rank)."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1, precision="highest"), stack)


def _orthonormal(stack: Params) -> Params:
    """A stack of vectors made orthonormal, by two rounds of Cholesky's QR."""
    for _ in range(2):
        lower = jnp.linalg.cholesky(_inner(stack, stack))
        eye = jnp.eye(len(lower), dtype=lower.dtype)
        stack = _combined(stack, jax.scipy.linalg.solve_triangular(lower, eye, lower=True))
    return stack
