"""The Gauss-Newton matrix of a part of the batch, inverted; for networks that are differentiated by their inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gn_linear import _tree
from gn_linear._typing import Count, Params, Scalar, check_count
from gn_linear.curvature import LinearisedProblem, l2_times, linearised_problem, output_roots
from gn_linear.preconditioners._interface import Preconditioner

_ROUNDING = 10  # a damping below so many roundings of the trace is raised to that


class SubsampleState(NamedTuple):
    """What the examples of a step are drawn from.

    Attributes:
        count: steps so far.
    """

    count: Count


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subsample(Preconditioner):
    r"""The damped Gauss-Newton matrix of some of the examples, inverted exactly.

    .. math::
        M = A^\top A + D, \quad A = B_S^\top J_S, \quad D = \lambda + \mu, \qquad
        M^{-1} = D^{-1} - D^{-1} A^\top (I + A D^{-1} A^\top)^{-1} A D^{-1},

    with the Jacobian :math:`J_S` and the Hessian's root :math:`B_S` of a part :math:`S` of the batch, drawn anew at
    each step. It knows nothing of layers, and is made for physics-informed networks: their outputs are derivatives of
    the network, for which Kronecker factors are poor, and smooth, so that few points tell of the others. Old examples
    are no help there, since the matrix changes from step to step, so nothing is kept.

    A step costs the Jacobian of the part, :math:`\mathrm{rows}^2` times the number of parameters and
    :math:`\mathrm{rows}^3` operations, each further product next to nothing. Memory: ``rows`` copies of the parameters,
    twice.

    Attributes:
        rows: how many rows of the Jacobian to take, at least one example of each length of the outputs' axes; static.
        seed: of the draws; static.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range; or at the first step, no inputs have the leading axis of an output, so
            that examples cannot be drawn.

    Example:
        >>> import gn_linear as gnl
        >>> solver = gnl.solvers.CG(max_steps=5, rtol=0.0, preconditioner=gnl.preconditioners.Subsample(rows=128))

    References:
        Martens (2010), Deep learning via Hessian-free optimization, section 4.7; Roosta-Khorasani and Mahoney (2019),
        Sub-sampled Newton methods, section 2; Woodbury (1950), Inverting modified matrices.
    """

    rows: int = dataclasses.field(default=128, metadata={"static": True})
    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_count(self.rows, "rows")
        check_count(self.seed, "seed", minimum=0)

    def init(self, params: Params) -> SubsampleState:
        """No step yet."""
        del params
        return SubsampleState(jnp.zeros([], jnp.int32))

    def refresh(self, problem: LinearisedProblem, state: SubsampleState) -> SubsampleState:
        """Count the step."""
        del problem
        return SubsampleState(state.count + 1)

    def inverse(
        self, problem: LinearisedProblem, state: SubsampleState, damping: Scalar
    ) -> tuple[Callable[[Params], Params], SubsampleState]:
        """Form the matrix in the space of the outputs, and factorise it."""
        part = self.part(problem, state)
        rows = part.jacobian()
        dtype = rows.dtype
        _, root_transpose = output_roots(part, dtype)
        rows = jax.vmap(root_transpose, in_axes=1, out_axes=1)(rows)
        usable = jnp.all(jnp.isfinite(rows))
        rows = jnp.where(usable, rows, jnp.zeros_like(rows))
        ones = jax.tree.map(jnp.ones_like, _tree.solve_zeros(problem.params))
        diagonal = _tree.flatten(l2_times(problem.l2, ones), dtype) + damping.astype(dtype)
        diagonal = jnp.maximum(diagonal, _ROUNDING * jnp.finfo(dtype).eps * jnp.sum(jnp.square(rows)))
        diagonal = jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal))
        scale = 1 / jnp.sqrt(diagonal)
        rows = rows * scale
        kernel = jnp.matmul(rows, rows.T, precision="highest")
        lower = jnp.linalg.cholesky(kernel + jnp.eye(len(kernel), dtype=dtype), symmetrize_input=False)
        half = jax.scipy.linalg.solve_triangular(lower, rows, lower=True)

        def apply(residual: Params) -> Params:
            vector = scale * _tree.flatten(residual, dtype)
            seen = jnp.matmul(half, vector, precision="highest")
            return _tree.unflatten(scale * (vector - jnp.matmul(half.T, seen, precision="highest")), residual)

        return apply, state

    def part(self, problem: LinearisedProblem, state: SubsampleState) -> LinearisedProblem:
        """The problem of the examples of this step.

        Args:
            problem: that of the batch.
            state: from ``refresh``.

        Returns:
            The problem, whose matrix is on average that of the batch.

        Raises:
            ValueError: no inputs have the leading axis of an output.
        """
        if not self.follows(problem):
            raise ValueError(
                "preconditioners.Subsample draws examples along the leading axes of inputs, but the outputs of predict "
                f"do not follow. They are {_tree.described(problem.linearisation.outputs)}, the inputs "
                f"{_tree.described(problem.inputs)}. Give inputs the leading axes of the outputs, or use another "
                "preconditioner."
            )
        inputs, targets = self._cut(problem, jax.random.fold_in(jax.random.key(self.seed), state.count))
        return linearised_problem(problem.predict, problem.loss, problem.params, inputs, targets=targets, l2=problem.l2)

    def follows(self, problem: LinearisedProblem) -> bool:
        """Whether outputs become fewer as inputs do, so that examples can be drawn.

        Args:
            problem: that of the batch; only shapes are looked at.

        Returns:
            Whether each leading axis of the outputs is one of the inputs.
        """
        lengths = self._lengths(problem)

        def outputs(key: jax.Array) -> Any:
            return problem.predict(problem.params, self._cut(problem, key)[0])

        given = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(problem.inputs) if jnp.ndim(leaf)}
        if not given >= lengths.keys():
            return False
        found = jax.eval_shape(outputs, jax.random.key(0))
        expected = jax.tree.map(lambda x: (lengths[x.shape[0]], *x.shape[1:]), problem.linearisation.outputs)
        return jax.tree.map(lambda x: x.shape, found) == expected

    def _lengths(self, problem: LinearisedProblem) -> dict[int, int]:
        """How many are drawn from each length of the outputs' leading axes."""
        share = min(self.rows / max(problem.output_size, 1), 1.0)
        lengths = sorted({leaf.shape[0] for leaf in jax.tree.leaves(problem.linearisation.outputs)})
        return {n: max(round(n * share), min(n, 1)) for n in lengths}

    def _cut(self, problem: LinearisedProblem, key: jax.Array) -> tuple[Any, Any]:
        """The inputs and targets of the examples that a key draws."""
        drawn = {n: _drawn(jax.random.fold_in(key, n), n, count) for n, count in self._lengths(problem).items()}

        def cut(leaf: Any) -> Any:
            indices = drawn.get(jnp.shape(leaf)[0]) if jnp.ndim(leaf) else None
            return leaf if indices is None else _tree.whole(jnp.asarray(leaf))[indices]

        return jax.tree.map(cut, problem.inputs), jax.tree.map(cut, problem.targets)


def _drawn(key: jax.Array, length: int, count: int) -> jax.Array:
    """So many of the numbers below a length, one from each of as many equal parts."""
    if count >= length:
        return jnp.arange(length)
    places = (jnp.arange(count) + jax.random.uniform(key, (count,))) * (length / count)
    return jnp.minimum(places.astype(jnp.int32), length - 1)
