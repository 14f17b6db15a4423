"""Kronecker factors of each layer: KFAC as a preconditioner of conjugate gradients on the exact Gauss-Newton matrix."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _kronecker, _tree
from gn_linear._inverse import inverse
from gn_linear._typing import Count, Number, Params, Scalar, check_count, check_number
from gn_linear.curvature import LinearisedProblem, l2_times
from gn_linear.preconditioners._interface import Preconditioner

_SLOWEST = 20  # steps between two refreshes at most
_SHARE = 2.2  # gradients that refreshes may cost in each step
_INVERSION = 6  # operations of an inversion, in cubes of the width: fewer, but slower than those of a product


class Sides(NamedTuple):
    r"""Two factors of a weight, or their inverses: (rows + 1, rows + 1) and (columns + 1, columns + 1).

    The last row and column belong to the bias of the layer. Of a side of more than ``widest`` rows there is the
    diagonal and a product with signs, :math:`(\operatorname{diag} A, A \Omega)`; of its inverse,
    :math:`I / s - V V^\top`, a column of :math:`1 / s` and V.
    """

    left: jax.Array
    right: jax.Array


class KroneckerState(NamedTuple):
    """Running averages of the factors, and their damped inverses.

    Attributes:
        factors: for each leaf of the parameters its ``Sides``, or None if it is a vector.
        inverses: the same, inverted with the damping of the last refresh.
        diagonal: of what has no factors, like the parameters; a running average.
        penalty: the mean coefficient of the penalty of each leaf.
        count: steps so far, without those whose factors were not finite.
        age: steps since the last refresh.
    """

    factors: tuple[Any, ...]
    inverses: tuple[Any, ...]
    diagonal: Params
    penalty: tuple[Scalar, ...]
    count: Count
    age: Count


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker(Preconditioner):
    r"""A Kronecker product for each layer, damped in both factors.

    .. math::
        M_\mathrm{layer} = \left(A + \pi \sqrt\mu I\right) \otimes \left(B + \tfrac{\sqrt\mu}{\pi} I\right), \quad
        A = \mathrm{E}[a a^\top], \quad B = \textstyle\sum b b^\top, \quad
        \pi^2 = \frac{\mathrm{tr}(A) / \dim A}{\mathrm{tr}(B) / \dim B},

    with the inputs :math:`a` of the layer, extended by 1 for its bias, and the cotangents :math:`b` of its results,
    pulled back from random signs through a square root of the loss's Hessian (exact for one output). The network is
    not registered: its trace tells where each weight enters. What enters in no matrix product or convolution alone has
    its diagonal instead. Factors wider than ``widest`` are known by their products with ``rank`` random signs,
    :math:`A \approx A \Omega (\Omega^\top A \Omega)^{-1} \Omega^\top A`, and the rest of their trace is spread evenly,
    so that nothing of the cube of a width is computed. The averages forget as fast as the batches allow: a batch
    of r rows weighs :math:`r / (r + \mathrm{memory} \cdot \mathrm{width})`.

    Attributes:
        samples: random sign vectors a refresh, a backward pass each; static.
        memory: how many rows for each entry of width the averages remember; 0 takes the last batch alone.
        every: steps between two refreshes; None takes as many as it needs for refreshes to cost about two gradients a
            step, 20 at most and fewer in the first steps; static.
        widest: the widest factor that is kept as a matrix; static.
        rank: of the approximation of wider ones; static.
        seed: of the signs; static.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> import gn_linear as gnl
        >>> solver = gnl.solvers.CG(max_steps=3, preconditioner=gnl.preconditioners.Kronecker(), momentum=True)

    References:
        Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature, sections 3
        and 6.3; Grosse and Martens (2016), A Kronecker-factored approximate Fisher matrix for convolution layers; Tropp
        et al. (2017), Fixed-rank approximation of a positive-semidefinite matrix from streaming data.
    """

    samples: int = dataclasses.field(default=1, metadata={"static": True})
    memory: Number = 1.0
    every: int | None = dataclasses.field(default=None, metadata={"static": True})
    widest: int = dataclasses.field(default=128, metadata={"static": True})
    rank: int = dataclasses.field(default=64, metadata={"static": True})
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        check_number(self.memory, "memory")
        if self.every is not None:
            check_count(self.every, "every")
        check_count(self.widest, "widest", minimum=0)
        check_count(self.rank, "rank")

    @property
    def form(self) -> _kronecker.Form:
        """How factors are kept."""
        return _kronecker.Form(self.widest, self.rank)

    def init(self, params: Params) -> KroneckerState:
        """No curvature seen yet."""

        def sides(leaf: Any) -> Sides | None:
            matrix = _kronecker.matrix_shape(jnp.shape(leaf))
            if matrix is None:
                return None
            dtype = _tree.at_least_float32(jnp.result_type(leaf))
            return Sides(*(jnp.zeros(self.form.shape(n), dtype) for n in matrix))

        leaves = jax.tree.leaves(params)
        factors = tuple(map(sides, leaves))
        zeros = tuple(jnp.zeros([], _tree.at_least_float32(jnp.result_type(leaf))) for leaf in leaves)
        count = jnp.zeros([], jnp.int32)
        return KroneckerState(factors, factors, _tree.solve_zeros(params), zeros, count, count)

    def refresh(self, problem: LinearisedProblem, state: KroneckerState) -> KroneckerState:
        """Take in this step's factors if it is time; factors that are not finite are left out."""
        every = self._period(problem)
        if every == 1:
            return self._refreshed(problem, state)
        # The factors of the first steps are soon out of date.
        due = state.age >= jnp.minimum(every - 1, state.count // 4)
        return jax.lax.cond(
            due | (state.count == 0),
            lambda: self._refreshed(problem, state),
            lambda: state._replace(count=state.count + 1, age=state.age + 1),
        )

    def inverse(
        self, problem: LinearisedProblem, state: KroneckerState, damping: Scalar
    ) -> tuple[Callable[[Params], Params], KroneckerState]:
        """The factors inverted, if they are new, and the function that applies them."""
        blocks = problem.layers.blocks

        def inverted() -> tuple[Any, ...]:
            weights = [block.weight for block in blocks]
            dampings = [state.penalty[k] + damping.astype(state.penalty[k].dtype) for k in weights]
            found = dict(zip(weights, _inverted([state.factors[k] for k in weights], dampings, self.form), strict=True))
            return tuple(found.get(k, old) for k, old in enumerate(state.inverses))

        fresh = self._period(problem) == 1
        inverses = inverted() if fresh else jax.lax.cond(state.age == 0, inverted, lambda: state.inverses)
        structure = jax.tree.structure(problem.params)
        diagonals = jax.tree.leaves(state.diagonal)
        inside = {leaf for block in blocks for leaf in (block.weight, block.bias)}

        def apply(residual: Params) -> Params:
            leaves = jax.tree.leaves(residual)
            found = list(leaves)
            for k, leaf in enumerate(leaves):
                if k not in inside:
                    found[k] = leaf / _positive(diagonals[k] + state.penalty[k] + damping.astype(leaf.dtype))
            for block in blocks:
                _solve_block(block, inverses[block.weight], leaves, found, self.form)
            return jax.tree.unflatten(structure, found)

        return apply, state._replace(inverses=inverses)

    def _period(self, problem: LinearisedProblem) -> int:
        """Steps between two refreshes."""
        if self.every is not None:
            return self.every
        leaves = [jnp.shape(leaf) for leaf in jax.tree.leaves(problem.params)]
        refresh, gradient = 0, 0
        for block in problem.layers.blocks:
            matrix = _kronecker.matrix_shape(leaves[block.weight])
            rows = problem.layers.rows(block)
            for n in matrix or ():
                refresh += 4 * rows * n * self.rank if self.form.sketches(n) else 2 * rows * n**2 + _INVERSION * n**3
            gradient += 6 * rows * math.prod(leaves[block.weight])
        return min(max(math.ceil((refresh + self.samples * gradient / 2) / max(_SHARE * gradient, 1)), 1), _SLOWEST)

    def _refreshed(self, problem: LinearisedProblem, state: KroneckerState) -> KroneckerState:
        seed = jnp.uint32(self.seed) + state.count.astype(jnp.uint32) * jnp.uint32(1013)
        moments, squares = problem.moments(seed, self.samples, self.form)
        first = state.count == 0
        usable = _tree.all_finite(([(m.left, m.right) for m in moments.values()], squares))

        def averaged(old: jax.Array, new: jax.Array, weight: float | jax.Array) -> jax.Array:
            new = new.astype(old.dtype)
            moved = old + jnp.asarray(weight, old.dtype) * (new - old)
            return jnp.where(usable, jnp.where(first, new, moved), old)

        factors = list(state.factors)
        for k, found in moments.items():
            factors[k] = Sides(
                *(
                    averaged(old, new, found.rows / (found.rows + self.memory * (len(new) - 1)))
                    for old, new in zip(state.factors[k], (found.left, found.right), strict=True)
                )
            )
        old = jax.tree.leaves(state.diagonal)
        diagonal = [averaged(o, s, 1 / (1 + 10 * self.memory)) for o, s in zip(old, squares, strict=True)]
        ones = jax.tree.map(jnp.ones_like, state.diagonal)
        penalty = tuple(jnp.mean(leaf) for leaf in jax.tree.leaves(l2_times(problem.l2, ones)))
        return KroneckerState(
            factors=tuple(factors),
            inverses=state.inverses,
            diagonal=jax.tree.unflatten(jax.tree.structure(state.diagonal), diagonal),
            penalty=penalty,
            count=state.count + usable.astype(state.count.dtype),
            age=jnp.zeros_like(state.age),
        )


def _inverted(factors: list[Sides], dampings: list[Scalar], form: _kronecker.Form) -> list[Sides]:
    """Factors with their shares of the damping, inverted; those of one width together, since each is little work."""
    sides, shifts = [], []
    for pair, damping in zip(factors, dampings, strict=True):
        means = [form.trace(side) / max(len(side) - 1, 1) for side in pair]
        usable = (means[0] > 0) & (means[1] > 0)
        ratio = jnp.where(usable, jnp.sqrt(means[0] / jnp.where(usable, means[1], 1)), 1)
        for side, mean, share in zip(pair, means, (ratio, 1 / ratio), strict=True):
            # Rounding makes factors of smooth activations indefinite by that much.
            floor = jnp.finfo(side.dtype).eps * len(side) * mean
            sides.append(side)
            shifts.append(_positive(jnp.maximum(jnp.sqrt(damping) * share, floor)))
    alike: dict[Any, list[int]] = {}
    for k, side in enumerate(sides):
        alike.setdefault((None if form.is_sketch(side) else len(side), side.dtype), []).append(k)
    found = {}
    for (width, dtype), members in alike.items():
        those, theirs = [sides[k] for k in members], [shifts[k] for k in members]
        if width is None:
            inverses = _inverted_sketches(those, theirs, form)
        else:
            eye = jnp.eye(width, dtype=dtype)
            inverses = inverse(jnp.stack([side + shift * eye for side, shift in zip(those, theirs, strict=True)]))
        found.update(zip(members, inverses, strict=True))
    return [Sides(found[k], found[k + 1]) for k in range(0, len(sides), 2)]


def _inverted_sketches(sides: list[jax.Array], shifts: list[Scalar], form: _kronecker.Form) -> list[jax.Array]:
    # With Y = A Omega and X = Y (Omega^T Y)^(-1/2) it is (X X^T + s I)^-1 = I / s - V V^T,
    # V = s^(-1/2) X (X^T X + s I)^(-1/2). The difference is positive above the rounding of V, hence the least s.
    dtype = sides[0].dtype
    eps, eye = jnp.finfo(dtype).eps, jnp.eye(form.rank, dtype=dtype)
    cores = []
    for side in sides:
        core = _times(form.directions(side).T, side[:, 1:])
        # What the root of an inverse loses to rounding grows as this lift falls; here both errors are alike.
        lift = _positive((eps / form.rank) ** 0.5 * jnp.trace(core))
        cores.append(0.5 * (core + core.T) + lift * eye)
    roots, scales = [], []
    for side, shift, core in zip(sides, shifts, jnp.linalg.cholesky(inverse(jnp.stack(cores))), strict=True):
        roots.append(_times(side[:, 1:], core))
        whole = form.trace(side)
        rest = jnp.maximum(whole - jnp.sum(jnp.square(roots[-1])), 0) / (len(side) - 1 - form.rank)
        scales.append(shift + jnp.maximum(rest, 2 * eps ** (2 / 3) * whole))
    inner = inverse(jnp.stack([_times(x.T, x) + scale * eye for x, scale in zip(roots, scales, strict=True)]))
    return [
        jnp.concatenate([jnp.full_like(x[:, :1], 1 / scale), _times(x, half) / jnp.sqrt(scale)], axis=1)
        for x, scale, half in zip(roots, scales, jnp.linalg.cholesky(inner), strict=True)
    ]


def _times(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")


def _positive(x: jax.Array) -> jax.Array:
    """1 in place of zeros: there is no curvature, and no scale to damp it by."""
    return jnp.where(x > 0, x, jnp.ones_like(x))


def _solve_block(
    block: _kronecker.Block, sides: Sides, residual: list[Any], found: list[Any], form: _kronecker.Form
) -> None:
    """Apply both inverses to a weight and its bias, side by side as one matrix."""
    weight = residual[block.weight]
    rows, columns = (len(side) - 1 for side in sides)
    matrix = jnp.pad(weight.reshape(rows, columns), ((0, 1), (0, 1)))
    place = (slice(0, -1), -1) if block.transposed else (-1, slice(0, -1))
    if block.bias is not None:
        matrix = matrix.at[place].set(residual[block.bias].reshape(-1))
    matrix = _solved(sides.right, _solved(sides.left, matrix, form).T, form).T
    found[block.weight] = matrix[:-1, :-1].reshape(weight.shape)
    if block.bias is not None:
        found[block.bias] = matrix[place].reshape(residual[block.bias].shape)


def _solved(side: jax.Array, matrix: jax.Array, form: _kronecker.Form) -> jax.Array:
    """The product of an inverse with a matrix."""
    if not form.is_sketch(side):
        return side @ matrix
    return side[:, :1] * matrix - side[:, 1:] @ (side[:, 1:].T @ matrix)
