"""Iterative linearisation over periods, rules and lengths of the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gn_linear._typing import shown
from gn_linear.experiments._engine import Cell
from gn_linear.experiments._methods import Method, is_planned, iterative, planned_steps
from gn_linear.experiments._setup import Bar, Progress, fingerprint, make_engine, run_cells, settings
from gn_linear.experiments.problem import Problem
from gn_linear.experiments.records import Records, Row, Store
from gn_linear.periods import LONGEST_PERIOD, Context, Rule, as_rule, check_steps, every


def period_sweep(
    problem: Problem,
    optimiser: optax.GradientTransformation,
    periods: Sequence[int | None],
    *,
    steps: int,
    seeds: int | Sequence[int],
    folder: Any = None,
    measurements: int = 16,
    progress: Progress = True,
) -> Records:
    r"""Train by iterative linearisation with each of several periods.

    .. math::
        g_t = J(\theta_s)^T \, \nabla \ell\bigl(f_\mathrm{lin}(\theta_t; \theta_s)\bigr), \qquad
        \theta_s \leftarrow \theta_t \text{ if } t \bmod K = 0

    stands in front of the optimiser. Initial parameters and minibatches of a seed are the same for every period. All
    seeds of a period run side by side, and one compilation serves all periods.

    Args:
        problem: the model, the loss and the data.
        optimiser: any optax transform; ``gn_linear.iterative_linearisation`` is put in front of it.
        periods: the periods K, at least 1; None never linearises anew after the start.
        steps: T, the optimiser's steps in each run.
        seeds: how many, or which.
        folder: where to keep the records: each period as soon as it is finished, as lines of JSON, and all of them as
            CSV at the end. A later call with the same arguments goes on where this one was stopped. None keeps nothing.
        measurements: how many re-linearisations of a run are measured at most, the first and the end among them; at
            least 2. The others are spread evenly in the logarithm of their number.
        progress: whether to show a bar (of tqdm, if it is installed), or a function that is called with the steps done
            so far and all steps.

    Returns:
        The records; a run that diverged has ``finite`` False and no values.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, a period comes twice, or the folder belongs to other settings.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(-1.0, 1.0, 16)[:, None]
        >>> problem = gnl.experiments.Problem(
        ...     predict=lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"],
        ...     init=lambda key: {"in": jax.random.normal(key, (1, 4)), "out": jnp.ones((4, 1))},
        ...     loss=gnl.losses.squared_error,
        ...     inputs=x,
        ...     targets=x**2,
        ... )
        >>> records = gnl.experiments.period_sweep(problem, optax.sgd(0.1), [1, 10, None], steps=30, seeds=2)
        >>> for row in records.runs[::2]:
        ...     print(row["rule"], row["feature_updates"])
        every 1 30
        every 10 3
        never 1

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """
    return _periods("period_sweep", problem, optimiser, periods, [steps], seeds, folder, (measurements, progress))


def phase_diagram(
    problem: Problem,
    optimiser: optax.GradientTransformation,
    *,
    steps: Sequence[int],
    periods: Sequence[int | None],
    seeds: int | Sequence[int],
    folder: Any = None,
    measurements: int = 16,
    progress: Progress = True,
) -> Records:
    r"""The table over the length of the run T and the period K.

    A run to T is the beginning of every longer one of the same period, so that each period is trained once, to the
    largest T; the records are those of separate sweeps.

    Args:
        problem: the model, the loss and the data.
        optimiser: any optax transform; ``gn_linear.iterative_linearisation`` is put in front of it. A learning rate
            schedule is that of the longest run.
        steps: the lengths T, different from each other.
        periods: the periods K, at least 1; None never linearises anew after the start.
        seeds: how many, or which.
        folder: as in :func:`period_sweep`.
        measurements: as in :func:`period_sweep`, of the run to each T.
        progress: as in :func:`period_sweep`.

    Returns:
        The records, for each period those of all lengths; ``seconds`` are those to T.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range or comes twice, or the folder belongs to other settings.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(-1.0, 1.0, 16)[:, None]
        >>> problem = gnl.experiments.Problem(
        ...     predict=lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"],
        ...     init=lambda key: {"in": jax.random.normal(key, (1, 4)), "out": jnp.ones((4, 1))},
        ...     loss=gnl.losses.squared_error,
        ...     inputs=x,
        ...     targets=x**2,
        ... )
        >>> records = gnl.experiments.phase_diagram(problem, optax.sgd(0.1), steps=[10, 40], periods=[1, 20], seeds=1)
        >>> print([(row["period"], row["steps"], row["feature_updates"]) for row in records.runs])
        [(1, 10, 10), (1, 40, 40), (20, 10, 1), (20, 40, 2)]

    References:
        Goldwaser and Ge (2022), Understanding sparse feature updates in deep networks using iterative linearisation.
    """
    return _periods("phase_diagram", problem, optimiser, periods, steps, seeds, folder, (measurements, progress))


def schedules(
    problem: Problem,
    optimiser: optax.GradientTransformation,
    rules: Mapping[str, Rule | Callable[[Context], Any]],
    *,
    steps: int,
    seeds: int | Sequence[int],
    folder: Any = None,
    measurements: int = 16,
    progress: Progress = True,
) -> Records:
    r"""Train by iterative linearisation with each of several rules of re-linearisation.

    Rules of the number of the step alone (``every``, ``at``, ``early_then_sparse``, and ``stop_after`` one of these)
    move the anchors of all seeds together. With any other rule each seed moves its own, at the cost of both sides of
    the transform's branches at every step; it is measured at the first re-linearisation from each of so many steps on,
    which are spread evenly in their logarithm.

    Args:
        problem: the model, the loss and the data.
        optimiser: any optax transform; ``gn_linear.iterative_linearisation`` is put in front of it.
        rules: the rules by the names that they have in the records; each of ``gn_linear.periods``, or a function of its
            ``Context``.
        steps: T, the optimiser's steps in each run.
        seeds: how many, or which.
        folder: as in :func:`period_sweep`; a plain function is told by its name alone.
        measurements: as in :func:`period_sweep`.
        progress: as in :func:`period_sweep`.

    Returns:
        The records.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or the folder belongs to other settings.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import gn_linear as gnl
        >>> x = jnp.linspace(-1.0, 1.0, 16)[:, None]
        >>> problem = gnl.experiments.Problem(
        ...     predict=lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"],
        ...     init=lambda key: {"in": jax.random.normal(key, (1, 4)), "out": jnp.ones((4, 1))},
        ...     loss=gnl.losses.squared_error,
        ...     inputs=x,
        ...     targets=x**2,
        ... )
        >>> rules = {"early": gnl.periods.early_then_sparse(1, 5, 100), "uniform": gnl.periods.every(5)}
        >>> records = gnl.experiments.schedules(problem, optax.sgd(0.1), rules, steps=30, seeds=1)
        >>> print([(row["rule"], row["feature_updates"]) for row in records.runs])
        [('early', 5), ('uniform', 6)]

    References:
        Fort et al. (2020), Deep learning versus kernel learning: an empirical study of loss landscape geometry and the
        time evolution of the neural tangent kernel, where the kernel moves most in the first epochs.
    """
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(
            f"rules must be a dict of names and rules of gn_linear.periods, at least one, but is {shown(rules)}."
        )
    known = {str(name): as_rule(rule, f"rules[{name!r}]") for name, rule in rules.items()}
    engine = make_engine(problem, optimiser, seeds, measurements, [steps])
    planned = iterative(problem, optimiser)
    cells = [_cell_of_rule(planned, problem, optimiser, name, rule, steps) for name, rule in known.items()]
    about = settings(engine, optimiser, "schedules", [steps])
    about["rules"] = {name: f"{shown(rule)} {fingerprint(rule)}" for name, rule in known.items()}
    store = Store(folder, about, len(engine.seeds))
    with Bar(progress, steps * len(cells), "schedules") as bar:
        engine.bar = bar
        records = run_cells(engine, cells, store, bar)
    store.finish(records)
    return records


def cell_of_period(
    experiment: str, method: Method, period: int | None, lengths: Sequence[int], **labels: float | None
) -> Cell:
    """The cell of one period.

    Args:
        experiment: what the records call the experiment.
        method: iterative linearisation, whose knob is the rule.
        period: None for never.
        lengths: of the runs, ascending.
        **labels: what is known of damping and learning rate.

    Returns:
        The cell.
    """
    text = "never" if period is None else f"every {period}"
    knob = every(jnp.asarray(LONGEST_PERIOD if period is None else period, jnp.int32))

    def stops(length: int) -> list[int]:
        return list(range(0, length, length if period is None else period))

    return Cell(method, knob, labelled(experiment, method.name, text, period, **labels), tuple(lengths), stops)


def labelled(
    experiment: str,
    method: str,
    rule: str,
    period: int | None,
    damping: float | None = None,
    learning_rate: float | None = None,
) -> Row:
    """The columns that tell a cell."""
    known = {"experiment": experiment, "method": method, "rule": rule, "period": period}
    return {**known, "damping": damping, "learning_rate": learning_rate}


def check_periods(periods: Any, never: bool = True) -> tuple[int | None, ...]:
    """The periods as ints.

    Args:
        periods: what a user gave.
        never: whether None is a period.

    Returns:
        The same.

    Raises:
        TypeError: they are no sequence, or one is no integer.
        ValueError: one is out of range, or comes twice.
    """
    if not isinstance(periods, Sequence) or isinstance(periods, str) or not periods:
        also = ", or None for never" if never else ""
        raise TypeError(f"periods must be a list of ints{also}, at least one, but is {shown(periods)}.")
    for number, period in enumerate(periods):
        if period is not None or not never:
            check_steps(period, f"periods[{number}]")
    found = tuple(None if period is None else int(period) for period in periods)
    if len(set(found)) < len(found):
        raise ValueError(f"periods must differ from each other, but are {shown(periods)}; leave out the repeated ones.")
    return found


def _periods(
    experiment: str,
    problem: Problem,
    optimiser: optax.GradientTransformation,
    periods: Any,
    steps: Any,
    seeds: Any,
    folder: Any,
    options: tuple[int, Progress],
) -> Records:
    """All periods, each at all lengths of the run."""
    measurements, progress = options
    periods, lengths = check_periods(periods), _lengths(steps)
    engine = make_engine(problem, optimiser, seeds, measurements, lengths)
    method = iterative(problem, optimiser)
    cells = [cell_of_period(experiment, method, period, lengths) for period in periods]
    store = Store(folder, settings(engine, optimiser, experiment, lengths), len(engine.seeds) * len(lengths))
    with Bar(progress, lengths[-1] * len(cells), experiment) as bar:
        engine.bar = bar
        records = run_cells(engine, cells, store, bar)
    store.finish(records)
    return records


def _lengths(steps: Any) -> tuple[int, ...]:
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps or len(set(map(str, steps))) < len(steps):
        raise TypeError(f"steps must be a list of different ints, at least one, but is {shown(steps)}.")
    for number, count in enumerate(steps):
        check_steps(count, f"steps[{number}]" if len(steps) > 1 else "steps")
    return tuple(sorted(int(count) for count in steps))


def _cell_of_rule(planned: Method, problem: Problem, optimiser: Any, name: str, rule: Rule, steps: int) -> Cell:
    period = int(rule.k) if isinstance(rule, every) else None
    labels = labelled("schedules", planned.name, name, period)
    if not is_planned(rule):
        return Cell(iterative(problem, optimiser, rule), None, labels, (steps,), None)
    return Cell(planned, jax.tree.map(jnp.asarray, rule), labels, (steps,), lambda length: planned_steps(rule, length))
