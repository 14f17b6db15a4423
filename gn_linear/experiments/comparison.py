"""Gauss-Newton, prox-linear and iterative linearisation on a common axis."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from gn_linear._typing import Number, check_number
from gn_linear.experiments._engine import Cell
from gn_linear.experiments._methods import blocks, gradient_descent, iterative
from gn_linear.experiments._setup import Bar, Progress, make_engine, run_cells, settings
from gn_linear.experiments.problem import Problem
from gn_linear.experiments.records import Records, Store
from gn_linear.experiments.sweeps import cell_of_period, check_periods, labelled
from gn_linear.solvers import FirstOrder


def side_by_side(
    problem: Problem,
    *,
    learning_rate: Number,
    periods: Sequence[int],
    steps: int,
    seeds: int | Sequence[int],
    folder: Any = None,
    measurements: int = 16,
    progress: Progress = True,
) -> Records:
    r"""Gauss-Newton, prox-linear and iterative linearisation on the common axis of the damping.

    .. math:: \mu = \frac{1}{\eta K}

    For each period K there are T / K feature updates, by three methods: Gauss-Newton steps with the damping
    :math:`\mu`, solved by conjugate gradients to a residual of 1e-6; prox-linear steps, that is K gradient steps on the
    loss of the linearised model, as ``gauss_newton`` with ``FirstOrder(optax.sgd(eta), K)`` takes them; and iterative
    linearisation with the period K in front of ``optax.sgd(eta)``. The last two are the same run up to rounding on the
    full batch; with minibatches a prox-linear block keeps its batch, while iterative linearisation draws one at every
    step. Plain gradient descent over T steps, in the records with the period 1, is what they are held against.

    Args:
        problem: the model, the loss and the data.
        learning_rate: :math:`\eta`, positive.
        periods: the periods K, each a divisor of ``steps``.
        steps: T, gradient steps of a run; T / K Gauss-Newton steps stand for as many. The records count them so.
        seeds: how many, or which.
        folder: as in :func:`period_sweep`.
        measurements: as in :func:`period_sweep`.
        progress: as in :func:`period_sweep`.

    Returns:
        The records, with ``damping`` :math:`\mu` and ``learning_rate`` :math:`\eta`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, a period does not divide ``steps``, or the folder belongs to other
            settings.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(-1.0, 1.0, 16)[:, None]
        >>> problem = gnl.experiments.Problem(
        ...     predict=lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"],
        ...     init=lambda key: {"in": jax.random.normal(key, (1, 4)), "out": jnp.ones((4, 1))},
        ...     loss=gnl.losses.squared_error,
        ...     inputs=x,
        ...     targets=x**2,
        ... )
        >>> records = gnl.experiments.side_by_side(problem, learning_rate=0.1, periods=[10], steps=20, seeds=1)
        >>> for row in records.runs:
        ...     print(row["method"], row["damping"], row["feature_updates"])
        gradient descent 10.0 20
        gauss-newton 1.0 2
        prox-linear 1.0 2
        iterative linearisation 1.0 2

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation;
        Abreu et al. (2025), The potential of second-order optimization for LLMs: a study with full Gauss-Newton.
    """
    check_number(learning_rate, "learning_rate", positive=True)
    rate = float(learning_rate)
    optimiser = optax.sgd(rate)
    engine = make_engine(problem, optimiser, seeds, measurements, [steps])
    cells = [_blocks(gradient_descent(problem, optimiser), None, 1, steps, rate)]
    newton, linear = blocks(problem), iterative(problem, optimiser)
    for period in check_periods(periods, never=False):
        if period is None or steps % period:
            raise ValueError(
                f"periods must divide steps, so that all methods make as many feature updates, but {period} does not "
                f"divide {steps}; use another number of steps or other periods."
            )
        damping = jnp.asarray(1 / (rate * period))
        proximal = blocks(problem, FirstOrder(optimiser, period))
        cells += [
            _blocks(newton, damping, period, steps, rate),
            _blocks(proximal, None, period, steps, rate),
            cell_of_period("side_by_side", linear, period, [steps], damping=1 / (rate * period), learning_rate=rate),
        ]
    store = Store(folder, settings(engine, optimiser, "side_by_side", [steps]), len(engine.seeds))
    with Bar(progress, steps * len(cells), "side_by_side") as bar:
        engine.bar = bar
        records = run_cells(engine, cells, store, bar)
    store.finish(records)
    return records


def _blocks(method: Any, knob: Any, period: int, steps: int, rate: float) -> Cell:
    """The cell of a method that linearises at each of its steps, which stand for a period each."""
    labels = labelled("side_by_side", method.name, f"every {period}", period, 1 / (rate * period), rate)
    return Cell(method, knob, labels, (steps // period,), lambda length: list(range(length)), period)
