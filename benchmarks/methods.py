"""The methods of the contests that run on this package's JAX: ours, optax's, jaxopt's and nlls-gram's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.flatten_util import ravel_pytree

import gn_linear as gnl
from benchmarks.host import Entry, Method
from benchmarks.problems import Problem

PREFIX = "gn_linear"
LOSSES = {"squares": gnl.losses.squared_error, "classes": gnl.losses.softmax_cross_entropy}
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Settings of ours: the first damping, in multiples of the curvature scale."""


def ours(
    words: str,
    solver: gnl.solvers.Solver | None = None,
    settings: tuple[Any, ...] = DAMPINGS,
) -> Entry:
    """Makes an entry of `gauss_newton` that is tuned over its first damping.

    Args:
        words: its name behind the package's.
        solver: the solver, or None for the default.
        settings: first dampings.

    Returns:
        The entry.
    """
    options: dict[str, Any] = {} if solver is None else {"solver": solver}

    def make(problem: Problem, initial: Any) -> Method:
        damping = gnl.damping.LevenbergMarquardt(initial=initial)
        return transformed(problem, gnl.gauss_newton(problem.predict, LOSSES[problem.kind], damping=damping, **options))

    return Entry(f"{PREFIX}, {words}", make, settings)


def transformed(problem: Problem, optimiser: optax.GradientTransformationExtraArgs) -> Method:
    """Makes a method of one of our transforms.

    Args:
        problem: the model and loss.
        optimiser: the transform.

    Returns:
        The method, whose state is (params, optimiser state).
    """
    loss = LOSSES[problem.kind]

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        inputs, targets = batch
        grads = jax.grad(lambda p: loss(problem.predict(p, inputs), targets))(params)
        updates, state = optimiser.update(grads, state, params, inputs=inputs, targets=targets)
        return optax.apply_updates(params, updates), state

    return Method(lambda params, batch: (params, optimiser.init(params)), step)


def first_order(name: str, make: Callable[[Any], Any], settings: tuple[float, ...], steps: int = 5) -> Entry:
    """Makes an entry of an optax optimiser that needs nothing but gradients.

    Args:
        name: its name.
        make: from a learning rate to the optimiser.
        settings: learning rates.
        steps: steps in one turn.

    Returns:
        The entry.
    """

    def method(problem: Problem, rate: Any) -> Method:
        optimiser = make(rate)

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            updates, state = optimiser.update(jax.grad(problem.value)(params, *batch), state, params)
            return optax.apply_updates(params, updates), state

        return Method(lambda params, batch: (params, optimiser.init(params)), step)

    return Entry(name, method, settings, steps)


def lbfgs(problem: Problem, memory: int) -> Method:
    """Makes optax's L-BFGS with its zoom line search, which leaves value and gradient to the next step.

    Args:
        problem: the model and loss.
        memory: pairs that it keeps.

    Returns:
        The method, for full batches only.
    """
    optimiser = optax.lbfgs(memory_size=memory)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry

        def value_fn(p: Any) -> jax.Array:
            return problem.value(p, *batch)

        value, grads = optax.value_and_grad_from_state(value_fn)(params, state=state)
        updates, state = optimiser.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return Method(lambda params, batch: (params, optimiser.init(params)), step)


def nlls_gram(problem: Problem, initial: float, products: int | None = None) -> Method:
    """Makes nlls-gram's Levenberg-Marquardt, which factors the smaller of the two systems.

    Args:
        problem: the model and the squared error.
        initial: the first damping.
        products: most iterations of its conjugate gradients, which take the place of the factorisation.

    Returns:
        The method.
    """
    import nlls_gram as package

    options: dict[str, Any] = {}
    if products is not None:
        options = {"linear_solver": package.CG(package.IdentityPreconditioner(), maxiter=products)}
    solver = package.LevenbergMarquardt(
        lambda params, batch: _flat_residuals(problem, params, batch), init_damping=initial, **options
    )

    def step(carry: Any, batch: Any) -> Any:
        params, state, _ = solver.update(carry[0], carry[1], batch)
        return params, state

    return Method(lambda params, batch: (params, solver.init(params, batch)), step)


def jaxopt_lm(problem: Problem, initial: float) -> Method:
    """Makes jaxopt's LevenbergMarquardt with conjugate gradients, on flat parameters since it takes no pytrees.

    Args:
        problem: the model and the squared error.
        initial: the first damping.

    Returns:
        The method.
    """
    import jaxopt

    def prepared(params: Any) -> tuple[jax.Array, Callable[..., Any], Any]:
        flat, unravel = ravel_pytree(params)
        solver = jaxopt.LevenbergMarquardt(
            lambda vector, batch: _flat_residuals(problem, unravel(vector), batch), damping_parameter=initial
        )
        return flat, unravel, solver

    def init(params: Any, batch: Any) -> Any:
        flat, _, solver = prepared(params)
        return params, solver.init_state(flat, batch)

    def step(carry: Any, batch: Any) -> Any:
        flat, unravel, solver = prepared(carry[0])
        flat, state = solver.update(flat, carry[1], batch)
        return unravel(flat), state

    return Method(init, step)


def _flat_residuals(problem: Problem, params: Any, batch: Any) -> jax.Array:
    """The residuals, half the sum of whose squares is the loss, as one vector."""
    return ravel_pytree(problem.residuals(params, *batch))[0]


def momentum(rate: Any) -> optax.GradientTransformation:
    """Returns gradient descent with Nesterov's momentum of 0.9."""
    return optax.sgd(rate, momentum=0.9, nesterov=True)


def kronecker(inner_steps: int) -> Entry:
    """Makes an entry of conjugate gradients with Kronecker factors and momentum.

    Args:
        inner_steps: of each step.

    Returns:
        The entry.
    """
    solver = gnl.solvers.CG(
        max_steps=inner_steps, rtol=0.0, preconditioner=gnl.preconditioners.Kronecker(), momentum=True
    )
    return ours(f"Kronecker, CG({inner_steps})", solver)


def subsample(rows: int, inner_steps: int) -> Entry:
    """Makes an entry of conjugate gradients with a part of the batch for a preconditioner, and momentum.

    Args:
        rows: of the Jacobian.
        inner_steps: of each step.

    Returns:
        The entry.
    """
    solver = gnl.solvers.CG(
        max_steps=inner_steps, rtol=0.0, preconditioner=gnl.preconditioners.Subsample(rows=rows), momentum=True
    )
    return ours(f"{rows} rows, CG({inner_steps})", solver)


DEFAULTS = ours("default solver")
KRONECKER = (kronecker(2), kronecker(3))
SUBSAMPLE = (subsample(128, 2),)
"""Fewer rows than by default."""
CHOLESKY = ours("Cholesky", gnl.solvers.Cholesky())
ADAM = first_order("optax adam", optax.adam, (1e-3, 3e-3, 1e-2, 3e-2))
SGD = first_order("optax sgd, momentum", momentum, (3e-3, 1e-2, 3e-2, 1e-1))
ADAM_SHORT, SGD_SHORT = ADAM._replace(steps=2), SGD._replace(steps=2)
"""For networks whose steps are long: fewer in one turn."""
LBFGS = Entry("optax lbfgs", lbfgs, (5, 10, 20, 40), compiled="static", steps=2)
JAXOPT = Entry("jaxopt LevenbergMarquardt", jaxopt_lm, (1e-6, 1e-4, 1e-2, 1.0), compiled="static")
NLLS_GRAM_CG = Entry(
    "nlls-gram, CG", functools.partial(nlls_gram, products=100), (1e-5, 1e-3, 1e-1, 10.0), compiled="static"
)
"""For residuals whose dense Jacobian takes too much memory: it does not know that examples are independent."""
NLLS_GRAM = Entry("nlls-gram", nlls_gram, (1e-5, 1e-3, 1e-1, 10.0), compiled="static")
