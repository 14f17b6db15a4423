"""K steps of any optax optimiser on the linearised problem: iterative linearisation as an inner solver.

What differs from a run of the optimiser:
- the model is linearised once; each step costs one Jacobian-vector and one vector-Jacobian product;
- gradients are the incoming one plus what the step has changed in it, so that any incoming gradient is understood;
- an update that is not finite ends the block at the step before it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gn_linear import _tree
from gn_linear._linearise import linearise
from gn_linear._typing import Count, Flag, Number, Params, Scalar, check_count, check_number, shown
from gn_linear._xla_cpu import fence
from gn_linear.curvature import LinearisedProblem, curvature_scale, damping_unit, l2_times, penalty
from gn_linear.solvers._interface import Result, Solver, Status

FACTORS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""The multiples of a block's step among which the line search chooses."""


class FirstOrderState(NamedTuple):
    """What FirstOrder carries from block to block.

    Attributes:
        optimiser: the state of the inner optimiser.
        previous: the last solution, for the warm start; None without one.
    """

    optimiser: Any
    previous: Any


class _Prepared(NamedTuple):
    problem: LinearisedProblem
    rhs: Params
    gradient: Callable[[Count, Params], Params]
    state: FirstOrderState


class _Carry(NamedTuple):
    step: Params
    optimiser: Any
    count: Count
    sound: Flag


@_tree.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstOrder(Solver):
    r"""K steps of any optax optimiser on the linearised problem, the inner loop of iterative linearisation.

    .. math::
        \min_d \; \ell(f + J d) + \tfrac12 \lambda \|\theta + d\|^2 + \langle b - \nabla F, d \rangle
        + \tfrac12 (\mu + \rho) \|d\|^2

    With :math:`u = \nabla \ell(f)` at the anchor :math:`\theta` and any incoming gradient :math:`b`, inner step k takes

    .. math::
        g_k = s \bigl( b + J^T (\nabla \ell(f + J d_k) - u) + (\lambda + \mu + \rho) \, d_k \bigr), \qquad
        d_{k+1} = d_k + \mathrm{optimiser}(g_k; \theta + d_k), \qquad d_0 = 0.

    The optimiser's state is kept from block to block, so that
    ``gauss_newton(predict, loss, solver=FirstOrder(opt, K), damping=0.0)`` and
    ``optax.chain(iterative_linearisation(predict, loss, period=K), opt)`` are the same run up to rounding, one step of
    the first against K of the second. Beside that run it offers damping, which under an adaptive policy follows the
    gain ratio, and refusal of bad blocks.

    The factor :math:`s = \sigma / (\sigma + \mu + \rho)`, with :math:`\sigma` the curvature scale along :math:`b`,
    leaves the solution where it is and shortens the steps as the damping grows. For the squared error
    :math:`\sigma \le \lambda_{\max}`, so that gradient steps which converge without damping converge with any; where a
    loss is saturated the scale is what the objective suggests instead. Without damping the factor is 1; otherwise it
    costs one Jacobian-vector product a block. Optimisers that normalise gradients, such as Adam, see little of it.

    K is the plan, not a cap: there is no tolerance, and a whole block reports ``Status.COMPLETED``. A block with an
    update that is not finite ends at the step before it, with the optimiser's state at that step, and reports
    ``Status.NON_FINITE`` and the number of steps before it. The optimiser itself may mend gradients that are not finite
    (``optax.zero_nans``). A refused block leaves the optimiser's state and the previous solution as they were, as it
    does the parameters: a momentum that led to a bad place is not kept. A block that an adaptive policy halves until
    it lowers the objective keeps the state of the whole block; so does one under a ``learning_rate`` of
    ``gauss_newton`` other than 1. Under ``damping.Path`` a block is run for each damping.

    Each inner step costs one Jacobian-vector and one vector-Jacobian product; kept are three vectors like the
    parameters, and the optimiser's own. Optimisers that ask for more than gradient and parameters, such as
    ``optax.lbfgs``, are not served. The solver is static but for its numbers: make the optimiser once and outside of
    ``jit``, since optax's are equal only to themselves.

    Attributes:
        optimiser: any ``optax.GradientTransformation``, which sees gradients and parameters in the dtypes of the solve
            (at least float32); static.
        steps: K, how many inner steps a block has; static.
        quadratic: whether the loss is replaced by its quadratic model at the anchor, with :math:`J^T H J d_k` in place
            of the difference above; static. Otherwise the inner problem is the loss of the linearised outputs itself
            (prox-linear). The two agree for the squared error.
        fresh_batches: whether each inner step has a batch of its own; static. ``inputs`` and ``targets`` of ``update``
            then have a leading axis of length K on every leaf, the incoming gradient must be that of the mean of the K
            losses, the loss a mean over examples, and objective, gain ratio and trial are those of all K batches at
            once, in memory too. Step k takes
            :math:`J_k^T \nabla \ell_k(f_k + J_k d_k) + \lambda (\theta + d_k) + (b - \nabla F) + (\mu + \rho) d_k`,
            times s, at one more forward pass.
        warm_start: the factor by which the previous solution is multiplied to start from; None starts from zero. With
            one inner step of gradient descent it is a momentum.
        proximal: the coefficient :math:`\rho` of a term :math:`\frac12 \rho \|d\|^2` beside that of the damping, in the
            same units.
        line_search: whether the block's step is multiplied by the best of 1, 1/2, 1/4, 1/8 and 1/16; static. Best is
            where the objective of the model itself, not linearised, is lowest on the batch of the solver, with the
            incoming gradient's own terms and without those of :math:`\mu` and :math:`\rho`. It costs five evaluations
            of the model side by side, with the memory of five forward passes.

    Raises:
        TypeError: ``optimiser`` is no optax transform, ``steps`` is not an int.
        ValueError: ``steps`` is below 1, ``warm_start`` or ``proximal`` is negative or not finite.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x, y = jnp.linspace(-1.0, 1.0, 16), jnp.linspace(0.0, 1.0, 16) ** 2
        >>> predict = lambda p, x: jnp.tanh(p["w"] * x + p["b"])
        >>> loss, inner = gnl.losses.squared_error, optax.adam(1e-2)
        >>> blocks = gnl.gauss_newton(predict, loss, solver=gnl.solvers.FirstOrder(inner, 10), damping=0.0)
        >>> steps = optax.chain(gnl.iterative_linearisation(predict, loss, period=10), inner)
        >>> def run(optimiser, count):
        ...     params = {"w": jnp.array(1.0), "b": jnp.array(0.0)}
        ...     state = optimiser.init(params)
        ...     for _ in range(count):
        ...         grads = jax.grad(lambda p: loss(predict(p, x), y))(params)
        ...         updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        ...         params = optax.apply_updates(params, updates)
        ...     return params
        >>> one, other = run(blocks, 3), run(steps, 30)
        >>> print(all(abs(one[name] - other[name]) < 1e-5 for name in one))
        True

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation;
        Drusvyatskiy and Lewis (2018), Error bounds, quadratic growth, and linear convergence of proximal methods; Abreu
        et al. (2025), The potential of second-order optimization for LLMs: a study with full Gauss-Newton,
        arXiv:2510.09378.
    """

    optimiser: optax.GradientTransformation = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})
    _: dataclasses.KW_ONLY
    quadratic: bool = dataclasses.field(default=False, metadata={"static": True})
    fresh_batches: bool = dataclasses.field(default=False, metadata={"static": True})
    warm_start: Number | None = None
    proximal: Number = 0.0
    line_search: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.optimiser, optax.GradientTransformation):
            raise TypeError(
                f"optimiser must be an optax transform, such as optax.adam(1e-3), but is {shown(self.optimiser)}."
            )
        check_count(self.steps, "steps")
        if self.warm_start is not None:
            check_number(self.warm_start, "warm_start")
        check_number(self.proximal, "proximal")

    @property
    def part_of_run(self) -> bool:
        """The inner optimiser's state is."""
        return True

    @property
    def batches(self) -> int | None:
        """One for each inner step, if they are fresh."""
        return self.steps if self.fresh_batches else None

    def init(self, params: Params) -> FirstOrderState:
        """The optimiser's first state; no previous solution yet."""
        inner = _tree.strongly_typed(self.optimiser.init(_tree.to_solve(params)))
        return FirstOrderState(inner, None if self.warm_start is None else _tree.solve_zeros(params))

    def prepare(self, problem: LinearisedProblem, rhs: Params, state: FirstOrderState) -> _Prepared:
        """Choose the inner gradient; with fresh batches, take the batches' own out of the right-hand side."""
        return _Prepared(problem, rhs, self._gradient(problem, rhs), state)

    def solve(self, prepared: _Prepared, damping: Scalar) -> Result:
        """A block of inner steps for one damping."""
        problem, state = prepared.problem, prepared.state
        optimiser = optax.with_extra_args_support(self.optimiser)
        anchor = _tree.to_solve(problem.params)
        shift = damping + jnp.asarray(self.proximal, damping.dtype)
        share = shortening(problem, prepared.rhs, shift)
        positive = ~(share <= 0)

        def step(index: Count, carry: _Carry) -> _Carry:
            gradient = _tree.scale(share, _tree.axpy(shift, carry.step, prepared.gradient(index, carry.step)))
            updates, inner = optimiser.update(gradient, carry.optimiser, _tree.add(anchor, carry.step))
            moved = _tree.add(carry.step, _tree.cast_like(updates, carry.step))
            sound = carry.sound & _tree.all_finite(moved)
            return _tree.where(sound, _Carry(moved, inner, carry.count + 1, sound), carry._replace(sound=sound))

        start = _tree.solve_zeros(problem.params)
        if self.warm_start is not None:
            start = _tree.scale(jnp.asarray(self.warm_start, damping.dtype), state.previous)
        carry = _Carry(start, state.optimiser, jnp.zeros([], jnp.int32), positive)
        end = jax.lax.fori_loop(0, self.steps, step, carry)
        solution = best_multiple(problem, prepared.rhs, end.step) if self.line_search else end.step
        status = jnp.where(end.sound, Status.COMPLETED, Status.NON_FINITE)
        status = jnp.where(positive, status, Status.NON_POSITIVE_CURVATURE).astype(jnp.int32)
        previous = None if self.warm_start is None else solution
        return Result(solution, FirstOrderState(end.optimiser, previous), end.count, status)

    def _gradient(self, problem: LinearisedProblem, rhs: Params) -> Callable[[Count, Params], Params]:
        """The gradient of the inner problem without damping, a function of the number of the step and of d."""
        if self.fresh_batches:
            own = _pulled_back(problem.linearisation.vjp, problem.output_gradient)
            penalised = l2_times(problem.l2, _tree.to_solve(problem.params))
            rest = _tree.subtract(rhs, _tree.add(own, penalised))
            return lambda index, step: _tree.add(self._on_fresh_batch(problem, index, step), rest)
        if self.quadratic:
            return lambda _, step: _tree.add(rhs, problem.product(step))
        linear = problem.linearisation

        def gradient(_: Count, step: Params) -> Params:
            moved = _tree.add(linear.outputs, linear.jvp(_tree.cast_like(step, problem.params)))
            change = _tree.subtract(problem.loss.gradient(moved, problem.targets), problem.output_gradient)
            return _tree.add(_tree.add(rhs, _pulled_back(linear.vjp, change)), l2_times(problem.l2, step))

        return gradient

    def _on_fresh_batch(self, problem: LinearisedProblem, index: Count, step: Params) -> Params:
        """The gradient on one batch of the stack, penalty included."""
        inputs = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), problem.inputs)
        targets = jax.tree.map(lambda y: _part(jnp.asarray(y), index, self.steps), problem.targets)
        linear = linearise(problem.predict, problem.params, inputs)
        tangent = linear.jvp(_tree.cast_like(step, problem.params))
        if self.quadratic:
            slope = problem.loss.gradient(linear.outputs, targets)
            slope = _tree.add(slope, problem.loss.hessian(linear.outputs, targets).product(tangent))
        else:
            slope = problem.loss.gradient(_tree.add(linear.outputs, tangent), targets)
        penalised = l2_times(problem.l2, _tree.add(_tree.to_solve(problem.params), step))
        return _tree.add(_pulled_back(linear.vjp, slope), penalised)


def shortening(problem: LinearisedProblem, rhs: Params, shift: Scalar) -> Scalar:
    """The factor by which damping shortens the gradients of the inner problem.

    Args:
        problem: the linearised problem.
        rhs: the gradient that is solved for, in the dtypes of the solve.
        shift: the damping in all.

    Returns:
        1 without damping, less with it; 0 if the damping is so negative that no step goes down.
    """

    def share() -> Scalar:
        unit = damping_unit(problem, rhs, curvature_scale(problem, rhs)).astype(shift.dtype)
        inside = unit + shift
        known = jnp.where(inside > 0, unit / inside, jnp.zeros_like(inside))
        return jnp.where(jnp.isfinite(inside), jnp.where(unit > 0, known, jnp.ones_like(unit)), inside)

    return jax.lax.cond(shift == 0, lambda: jnp.ones_like(shift), share)


def best_multiple(problem: LinearisedProblem, rhs: Params, step: Params) -> Params:
    """The multiple of a step at whose end the objective of the model itself is lowest.

    Args:
        problem: the linearised problem, whose model and batch are evaluated.
        rhs: the gradient that the step was solved for, in the dtypes of the solve.
        step: the step, likewise.

    Returns:
        One of ``FACTORS`` times the step; the step itself if no value is finite.
    """
    rest = problem.reductions(rhs, step).rest

    def objective(factor: Scalar) -> Scalar:
        shorter = _tree.cast_like(_tree.scale(factor, step), problem.params)
        point = optax.apply_updates(problem.params, shorter)
        value = problem.loss(fence(problem.predict(point, problem.inputs)), problem.targets)
        return _tree.total(value, penalty(problem.l2, point), factor * rest)

    factors = jnp.asarray(FACTORS, rest.dtype)
    values = jax.vmap(objective)(factors)
    return _tree.scale(factors[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))], step)


def _pulled_back(vjp: Callable[[Any], Params], vector: Any) -> Params:
    return _tree.to_solve(vjp(vector))


def _part(stack: jax.Array, index: Count, parts: int) -> jax.Array:
    """One of so many equal parts of the leading axis."""
    size = stack.shape[0] // parts
    return jax.lax.dynamic_slice_in_dim(stack, index * size, size)
