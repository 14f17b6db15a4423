"""Small regression, full batch: seconds to a loss, next to optax, jaxopt, kfac-jax, nlls-gram and randngd.

1,000 points of a smooth function of two variables, a perceptron 2-64-64-1 with tanh, 4,417 parameters; in single and in
double precision. The loss is 1/2 the mean squared residual.
"""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks import contest, data, foreign, methods, networks, standings
from benchmarks.contest import Contest
from benchmarks.host import Entry, Instance
from benchmarks.problems import PROBLEMS
from benchmarks.settings import Settings
from benchmarks.standings import Goal
from benchmarks.suites import Results

X64 = False  # each contest has its own precision
SEEDS, QUICK_SEEDS = 5, 2

WIDTHS, POINTS = (2, 64, 64, 1), 1000
TARGETS = (1e-4, 1e-6, 1e-8)
SINGLE, DOUBLE = "regression, float32", "regression, float64"
METRICS: dict[str, str] = dict.fromkeys((SINGLE, DOUBLE), "loss, 1/2 the mean squared residual")
GOALS = tuple(
    Goal(name, target, ratio)
    for name, ratios in ((SINGLE, (1, 1.5, 2)), (DOUBLE, (1, 1, 1.5)))
    for target, ratio in zip(TARGETS, ratios, strict=True)
)
OURS: tuple[Entry, ...] = (methods.DEFAULTS, *methods.KRONECKER)
PEERS: tuple[Entry, ...] = (
    methods.ADAM,
    methods.SGD,
    methods.LBFGS,
    methods.JAXOPT,
    methods.NLLS_GRAM,
    foreign.KFAC,
    foreign.RANDNGD,
)


def instance(seed: int, dtype: Any) -> Instance:
    """Draws the points and the first parameters.

    Args:
        seed: of both.
        dtype: of both.

    Returns:
        The instance.
    """
    batch = tuple(part.astype(dtype) for part in data.smooth_function(POINTS, seed))
    params = networks.init_mlp(jax.random.key(seed), WIDTHS, networks.LECUN)
    return Instance(jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params), batch)


def contests() -> list[Contest]:
    """Returns the two contests."""
    problem = PROBLEMS["regression"]
    return [
        Contest(
            name,
            "regression",
            functools.partial(instance, dtype=dtype),
            measure=lambda params, held: problem.value(params, *held),
            held=lambda seed, dtype=dtype: instance(seed, dtype).batch,
            targets=TARGETS,
            entries=(*OURS, *PEERS),
            x64=dtype is np.float64,
        )
        for name, dtype in ((SINGLE, np.float32), (DOUBLE, np.float64))
    ]


def run(settings: Settings) -> Results:
    """Tunes the methods and lets them race.

    Args:
        settings: what the command line asked for.

    Returns:
        See `benchmarks.contest.run`.
    """
    return contest.run(contests(), settings)


table = functools.partial(standings.table, goals=GOALS, metrics=METRICS)
figure = functools.partial(
    standings.figure, title="1,000 points of a smooth function, perceptron 2-64-64-1", metrics=METRICS
)
