"""What `least_squares` returns: the fit, its statistics and its report."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gn_linear import _tree
from gn_linear._outcome import MESSAGES, Outcome
from gn_linear._typing import Count, Params, Scalar, check_number, shown


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    r"""The end of a fit by :func:`gn_linear.least_squares`; a pytree, so it goes through ``jit`` and ``vmap``.

    The statistics take the residuals for independent, of equal variance :math:`\sigma^2` after weighting, and linear
    in the parameters as far as their errors reach: with :math:`J` at the solution and :math:`m` residuals for
    :math:`n` parameters that are not frozen,

    .. math:: \mathrm{cov} = \sigma^2 (J^T J)^{-1}, \qquad \sigma^2 = \frac{2 \cdot \text{cost}}{m - n}.

    Attributes:
        params: like the start.
        residuals: as the function returned them, unweighted.
        cost: half the weighted sum of squares, or the sum of the robust loss.
        gradient: of the cost, like the parameters.
        gradient_norm: the largest entry of the gradient of the cost among parameters that can move.
        steps: searches for a step, each at one Jacobian.
        status: a ``gn_linear.Outcome``.
        evaluations: of the residuals, without those for derivatives.
        jacobian: of the weighted residuals, with a robust loss times the root of its curvature, shape (m, n); where
            data came in chunks a triangle with the same :math:`J^T J`; None where it was never formed.
        at_bounds: which parameters are held by a bound, bools like the parameters.
        solver: the name of the inner solver, and why it was chosen.
        frozen: which of the raveled parameters were; static.
        count: the number of residuals; static.
    """

    params: Params
    residuals: Any
    cost: Scalar
    gradient: Params
    gradient_norm: Scalar
    steps: Count
    status: Count
    evaluations: Count
    jacobian: jax.Array | None
    at_bounds: Any
    solver: str = dataclasses.field(metadata={"static": True})
    frozen: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})

    @property
    def success(self) -> Any:
        """Whether the fit converged."""
        return self.status > 0

    @property
    def message(self) -> str:
        """Why the fit ended, in words; not for use inside ``jit``."""
        return MESSAGES[Outcome(int(self.status))]

    @property
    def degrees_of_freedom(self) -> int:
        """Residuals less parameters that are not frozen."""
        return self.count - self.frozen.count(False)

    def covariance(self, *, absolute: bool = False) -> jax.Array:
        r"""The covariance of the parameters, raveled leaf after leaf.

        Columns of :math:`J` are brought to norm one before its rank is judged. Rows and columns of parameters that the
        data do not determine are infinite, those of frozen ones zero.

        Args:
            absolute: whether residuals are in units of their standard deviations (weights :math:`1/\sigma_i^2`), so
                that :math:`\sigma^2 = 1`; as ``absolute_sigma`` of scipy.

        Returns:
            Shape (parameters, parameters).

        Raises:
            ValueError: no Jacobian was formed.
        """
        if self.jacobian is None:
            raise ValueError(
                f"jacobian is None, since the solver ({self.solver}) forms none, so there is no covariance; pass a "
                "dense solver such as solver=gn_linear.solvers.QR() to least_squares."
            )
        free = ~np.array(self.frozen, bool)
        matrix = self.jacobian * free
        largest = jnp.max(jnp.abs(matrix), axis=0, initial=0.0)
        peak = jnp.where(largest > 0, largest, jnp.ones_like(largest))
        norms = peak * jnp.sqrt(jnp.sum((matrix / peak) ** 2, axis=0))
        unit = jnp.where(norms > 0, norms, jnp.ones_like(norms))
        _, values, rows = jnp.linalg.svd(matrix / unit, full_matrices=len(self.frozen) > self.count)
        values = jnp.concatenate([values, jnp.zeros(max(rows.shape[0] - len(values), 0), values.dtype)])
        rounding = max(matrix.shape) * jnp.finfo(matrix.dtype).eps
        seen = values > rounding * jnp.max(values, initial=0.0)
        inverse = jnp.where(seen, 1 / jnp.where(seen, values, jnp.ones_like(values)), jnp.zeros_like(values))
        roots = rows.T * inverse / unit[:, None]
        # A direction without data makes every parameter with a part in it unknown.
        unseen = jnp.sum(jnp.where(seen[:, None], jnp.zeros_like(rows), rows) ** 2, axis=0)
        unknown = free & (unseen > rounding)
        variance = jnp.ones_like(self.cost) if absolute else self._variance()
        spread = jnp.sqrt(variance).astype(roots.dtype) * roots
        found = jnp.matmul(spread, spread.T, precision="highest")
        found = jnp.where(unknown[:, None] | unknown[None, :], jnp.inf, found)
        return jnp.where(free[:, None] & free[None, :], found, jnp.zeros_like(found))

    def standard_errors(self, *, absolute: bool = False) -> Params:
        """The square roots of the diagonal of the covariance.

        Args:
            absolute: as in ``covariance``.

        Returns:
            A pytree like the parameters.
        """
        return _tree.unflatten(jnp.sqrt(jnp.diag(self.covariance(absolute=absolute))), self.params)

    def confidence_intervals(self, level: float = 0.95, *, absolute: bool = False) -> tuple[Params, Params]:
        """Intervals that cover each parameter with this probability, by Student's distribution.

        Args:
            level: the probability, between 0 and 1.
            absolute: as in ``covariance``; then by the normal distribution.

        Returns:
            The lower and the upper ends, pytrees like the parameters.

        Raises:
            ValueError: ``level`` is not between 0 and 1.
        """
        number = check_number(level, "level", also=" below 1", positive=True)
        if number is None or number >= 1:
            raise ValueError(f"level must be a number between 0 and 1, such as 0.95, but is {shown(level)}.")
        from scipy import special

        tail, left = (1 + number) / 2, self.degrees_of_freedom
        width = special.ndtri(tail) if absolute else special.stdtrit(max(left, 0), tail) if left > 0 else np.inf
        half = jax.tree.map(
            lambda e: jnp.where(e == 0, e, e * jnp.asarray(width, e.dtype)), self.standard_errors(absolute=absolute)
        )
        return jax.tree.map(jnp.subtract, self.params, half), jax.tree.map(jnp.add, self.params, half)

    def report(self) -> str:
        """The fit in one block of text: parameters with standard errors, cost, steps and why it ended.

        Returns:
            Several lines; not for use inside ``jit``.

        Raises:
            ValueError: the solution is that of several fits.
        """
        if np.ndim(self.status):
            raise ValueError(
                f"status has shape {np.shape(self.status)}, so these are several fits, and a report is of one; call it "
                "on jax.tree.map(lambda x: x[i], solution)."
            )
        errors = None if self.jacobian is None else self.standard_errors()
        state = Outcome(int(self.status))
        head = [
            f"Least squares: {self.message} ({state.name})",
            f"cost {float(self.cost):.6g}, gradient {float(self.gradient_norm):.1e}, {self.count} residuals, "
            f"{self.degrees_of_freedom} degrees of freedom",
            f"{int(self.steps)} steps, {int(self.evaluations)} evaluations; solver: {self.solver}",
        ]
        return "\n".join([*head, *_lines(self, errors)])

    def as_scipy(self) -> Any:
        """The fit as ``scipy.optimize.least_squares`` returns it.

        Returns:
            A ``scipy.optimize.OptimizeResult`` with raveled parameters and residuals.
        """
        from scipy.optimize import OptimizeResult

        def raveled(tree: Any) -> np.ndarray:
            return np.concatenate([np.zeros(0), *(np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))])

        held = raveled(self.at_bounds).astype(int)
        return OptimizeResult(
            x=raveled(self.params),
            cost=float(self.cost),
            fun=raveled(self.residuals),
            grad=raveled(self.gradient),
            jac=None if self.jacobian is None else np.asarray(self.jacobian),
            optimality=float(self.gradient_norm),
            active_mask=held,
            nfev=int(self.evaluations),
            njev=int(self.steps),
            status=int(self.status),
            message=self.message,
            success=bool(self.success),
        )

    def _variance(self) -> Scalar:
        left = self.degrees_of_freedom
        return 2 * self.cost / left if left > 0 else jnp.full_like(self.cost, jnp.inf)


LONGEST = 20
"""How many parameters a report lists."""


def _lines(solution: Solution, errors: Params | None) -> list[str]:
    """A line for each parameter."""
    values, held = jax.tree_util.tree_leaves_with_path(solution.params), jax.tree.leaves(solution.at_bounds)
    spreads = [None] * len(values) if errors is None else jax.tree.leaves(errors)
    rows, place = [], 0
    for (path, leaf), spread, bound in zip(values, spreads, held, strict=True):
        name = jax.tree_util.keystr(path) or "params"
        for index in np.ndindex(np.shape(leaf)):
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            note = " (frozen)" if solution.frozen[place] else " (at its bound)" if bool(bound[index]) else ""
            place += 1
            if len(rows) < LONGEST:
                value = f"{float(leaf[index]):.7g}"
                error = "" if spread is None or solution.frozen[place - 1] else f" +- {float(spread[index]):.3g}"
                rows.append((label, value + error + note))
    width = max((len(label) for label, _ in rows), default=0)
    more = [f"  and {place - len(rows)} more"] if place > len(rows) else []
    return [f"  {label:<{width}}  {text}" for label, text in rows] + more
