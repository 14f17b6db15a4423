"""A physics-informed network for Poisson's equation: seconds to an error of the solution.

-(u_aa + u_bb) = 2 pi^2 sin(pi a) sin(pi b) on the unit square, u = 0 on its boundary: 900 interior and 120 boundary
points, a perceptron 2-32-32-1 with tanh, 1,185 parameters, full batch; in single and in double precision. The loss is
1/2 the mean squared residual of the equation plus that of the boundary; the Laplacian comes from nested
differentiation. The error is that of the solution on 41 x 41 other points, in the 2-norm, relative to the solution.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contest, foreign, methods, networks, standings
from benchmarks.contest import Contest
from benchmarks.host import Entry, Instance
from benchmarks.problems import poisson_solution, poisson_source
from benchmarks.settings import Settings
from benchmarks.standings import Goal
from benchmarks.suites import Results

X64 = False  # each contest has its own precision
SEEDS, QUICK_SEEDS = 5, 2

WIDTHS, INTERIOR, BOUNDARY, GRID = (2, 32, 32, 1), 900, 120, 41
SINGLE, DOUBLE = "pinn, float32", "pinn, float64"
METRICS: dict[str, str] = dict.fromkeys((SINGLE, DOUBLE), "relative error of the solution in the 2-norm")
GOALS = (
    *(Goal(name, target, ratio) for name in (SINGLE, DOUBLE) for target, ratio in ((1e-2, 1), (1e-3, 1.5))),
    Goal(DOUBLE, 1e-4, None),
)
OURS: tuple[Entry, ...] = (methods.DEFAULTS, *methods.SUBSAMPLE)
PEERS: tuple[Entry, ...] = (methods.ADAM, methods.SGD, methods.LBFGS, methods.NLLS_GRAM_CG, foreign.RANDNGD)


def instance(seed: int, dtype: Any) -> Instance:
    """Draws the points and the first parameters.

    Args:
        seed: of both.
        dtype: of both.

    Returns:
        The instance; boundary points are spread over the four sides alike.
    """
    generator = np.random.default_rng(seed)
    interior = generator.uniform(size=(INTERIOR, 2))
    along, side = generator.uniform(size=BOUNDARY), np.arange(BOUNDARY) % 4
    boundary = np.where((side % 2 == 0)[:, None], np.stack([along, side // 2], 1), np.stack([side // 2, along], 1))
    points = {"interior": interior, "boundary": boundary}
    targets = {"interior": poisson_source(interior), "boundary": np.zeros((BOUNDARY, 1))}
    params = networks.init_mlp(jax.random.key(seed), WIDTHS, networks.LECUN)
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), Instance(params, (points, targets)))


def error(params: Any, held: Any) -> jax.Array:
    """Returns the relative error of the solution, shape ().

    Args:
        params: of the network.
        held: points (n, 2).

    Returns:
        The error.
    """
    solution = poisson_solution(held)
    return jnp.linalg.norm(networks.mlp(jnp.tanh)(params, held) - solution) / jnp.linalg.norm(solution)


def contests() -> list[Contest]:
    """Returns the two contests."""
    ticks = np.linspace(0, 1, GRID)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    return [
        Contest(
            name,
            "poisson",
            functools.partial(instance, dtype=dtype),
            measure=error,
            held=lambda seed, dtype=dtype: grid.astype(dtype),
            targets=targets,
            entries=(*OURS, *PEERS),
            x64=dtype is np.float64,
            seconds=6.0,
            tuning=1,  # for most methods take the whole of their seconds
        )
        for name, dtype, targets in ((SINGLE, np.float32, (1e-2, 1e-3)), (DOUBLE, np.float64, (1e-2, 1e-3, 1e-4)))
    ]


def run(settings: Settings) -> Results:
    """Tunes the methods and lets them race.

    Args:
        settings: what the command line asked for.

    Returns:
        See `benchmarks.contest.run`, with the reason why kfac-jax takes no part.
    """
    results = contest.run(contests(), settings)
    results["skipped"] += [
        {
            "contest": name,
            "method": "kfac-jax",
            "why": "its blocks do not cover layers inside a differentiated residual",
        }
        for name in (SINGLE, DOUBLE)
    ]
    return results


table = functools.partial(standings.table, goals=GOALS, metrics=METRICS)
figure = functools.partial(
    standings.figure, title="Poisson's equation on the unit square, perceptron 2-32-32-1", metrics=METRICS
)
