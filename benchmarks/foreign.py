"""The peers that need a process of their own: kfac-jax another JAX, randngd double precision everywhere.

Only modules that their environments have are imported here, and the peers themselves where they are used.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.host import Entry, Method
from benchmarks.problems import Problem


def kfac(problem: Problem, initial: float) -> Method:
    """Makes kfac-jax with adaptive damping and its exact learning rate and momentum.

    Args:
        problem: the model and loss.
        initial: the first damping.

    Returns:
        The method.
    """
    optimiser = _kfac_optimiser(problem.predict, problem.kind, problem.value)
    key = jax.random.PRNGKey(0)

    def init(params: Any, batch: Any) -> Any:
        # The optimiser overwrites what it is given, and compiles anew for a state whose damping is a number.
        params = jax.tree.map(jnp.copy, params)
        state = optimiser.init(params, key, batch)
        state.damping = jnp.asarray(initial, state.damping.dtype)
        return params, state, 0

    def step(carry: Any, batch: Any) -> Any:
        params, state, count = carry
        params, state, _ = optimiser.step(
            params, state, key, data_iterator=itertools.repeat(batch), global_step_int=count
        )
        return params, state, count + 1

    return Method(init, step)


@functools.cache
def _kfac_optimiser(predict: Callable[..., Any], kind: str, value: Callable[..., Any]) -> Any:
    """The optimiser, one for all dampings, since it takes 10 seconds to compile."""
    import kfac_jax

    def registered(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        outputs = predict(params, inputs)
        if kind == "squares":
            kfac_jax.register_squared_error_loss(outputs, targets, weight=0.5)
        else:
            kfac_jax.register_softmax_cross_entropy_loss(outputs, targets)
        return value(params, inputs, targets)

    return kfac_jax.Optimizer(
        jax.value_and_grad(registered),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        num_burnin_steps=0,
        min_damping=KFAC_LEAST_DAMPING,
        damping_adaptation_decay=KFAC_DECAY,
    )


def randngd(problem: Problem, setting: tuple[str, str]) -> Method:
    """Makes randngd's natural gradient descent with its Armijo line search, in float64.

    Args:
        problem: the model and the squared error.
        setting: "full", a dense solve, or "nystrom", preconditioned conjugate gradients; and the rule of the damping,
            "eigenvalue" or "gain ratio".

    Returns:
        The method.
    """
    import randngd as package

    solve, rule = setting
    damping = package.EigenvalueDamping() if rule == "eigenvalue" else package.LevenbergMarquardt()
    options: dict[str, Any] = {"autodiff_mode": "bwd"}
    none = frozenset()

    def solver_of(params: Any, batch: Any) -> tuple[Any, Any]:
        terms = _terms(problem, batch)
        if solve == "full":
            metric = package.metrics.gauss_newton(terms, params, representation="full")
            preconditioner = package.NGDFull(metric, damping=damping, key=0)
        else:
            metric = package.metrics.gauss_newton(terms, params)
            preconditioner = package.NystromNGD(metric, ell_max=RANKS[-1], ell_levels=RANKS, damping=damping, key=0)
        return package.ngd_solver(preconditioner), lambda p, args: (problem.value(p, *batch), None)

    def init(params: Any, batch: Any) -> Any:
        params, batch = _double(params), _double(batch)
        solver, fn = solver_of(params, batch)
        value = jax.ShapeDtypeStruct((), jnp.float64)
        return params, solver.init(fn, params, None, options, value, None, none)

    def step(carry: Any, batch: Any) -> Any:
        batch = _double(batch)
        solver, fn = solver_of(carry[0], batch)
        params, state, _ = solver.step(fn, carry[0], None, options, carry[1], none)
        return params, state

    return Method(init, step)


def _terms(problem: Problem, batch: Any) -> list[Any]:
    """Residuals at one point with their points, as randngd takes them; constants do not matter for its metric."""
    inputs, _ = batch
    if problem.term is None:
        return [(lambda params, point: problem.predict(params, point[None])[0, 0], inputs)]
    return [(term, inputs[name]) for name, term in problem.term.items()]


def _double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


KFAC_LEAST_DAMPING = 1e-12
KFAC_DECAY = 0.7
RANKS = (20, 50, 100, 200)

KFAC = Entry("kfac-jax", kfac, (1e-5, 1e-4, 1e-3, 1e-2), compiled="itself", place="kfac", warm_up=12)
RANDNGD = Entry(
    "randngd",
    randngd,
    (("full", "eigenvalue"), ("full", "gain ratio"), ("nystrom", "eigenvalue"), ("nystrom", "gain ratio")),
    compiled="static",
    place="double",
)
