"""The problems of Moré, Garbow and Hillstrom (1981), Testing unconstrained optimization software, by their formulas.

Each is a residual vector as a function of a parameter vector, a standard start, and the known minima of the sum of
squares, the lowest first. Numbers in the names of the functions are those of the paper.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """A problem of the table.

    Attributes:
        name: as in the paper.
        residuals: of a vector, a vector.
        start: the standard start.
        minima: known minimal sums of squares, the lowest first.
    """

    name: str
    residuals: Callable[[Any], Any]
    start: np.ndarray
    minima: tuple[float, ...]

    def started(self, factor: float) -> np.ndarray:
        """The start times a factor; a start at zero becomes the factor itself, as in MINPACK's tests."""
        if factor == 1 or np.any(self.start):
            return factor * self.start
        return np.full_like(self.start, factor)

    def solved(self, cost: float, *, lowest: bool = True) -> bool:
        """Whether half a known sum of squares is reached: to four digits, absolute where it is zero."""
        minima = self.minima[:1] if lowest else self.minima
        return any(abs(2 * cost - f) <= 1e-4 * (f if f > 0 else 1.0) for f in minima)


def numbers(text: str) -> np.ndarray:
    return np.array([float(word) for word in text.split()])


def rosenbrock_1(x):
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth_2(x):
    return jnp.stack(
        [-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]],
    )


def powell_badly_scaled_3(x):
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


def brown_badly_scaled_4(x):
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale_5(x):
    return jnp.array([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** jnp.arange(1, 4))


def jennrich_sampson_6(x):
    i = jnp.arange(1.0, 11.0)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


def helical_valley_7(x):
    turn = jnp.arctan(x[1] / x[0]) / (2 * jnp.pi) + jnp.where(x[0] < 0, 0.5, 0.0)
    return jnp.stack([10 * (x[2] - 10 * turn), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


BARD = numbers(".14 .18 .22 .25 .29 .32 .35 .39 .37 .58 .73 .96 1.34 2.10 4.39")


def bard_8(x):
    u = np.arange(1.0, 16.0)
    v = 16 - u
    return BARD - (x[0] + u / (v * x[1] + np.minimum(u, v) * x[2]))


GAUSSIAN = numbers(
    ".0009 .0044 .0175 .0540 .1295 .2420 .3521 .3989 .3521 .2420 .1295 .0540 .0175 .0044 .0009",
)


def gaussian_9(x):
    t = (8 - np.arange(1.0, 16.0)) / 2
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - GAUSSIAN


MEYER = numbers("34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872")


def meyer_10(x):
    t = 45 + 5 * np.arange(1.0, 17.0)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - MEYER


def gulf_11(x):
    t = np.arange(1.0, 100.0) / 100
    y = 25 + (-50 * np.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def box_12(x):
    t = np.arange(1.0, 11.0) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (np.exp(-t) - np.exp(-10 * t))


def powell_singular_13(x):
    a, b, c, d = x.reshape(-1, 4).T
    return jnp.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]).ravel()


def wood_14(x):
    return jnp.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            (x[1] - x[3]) / 10**0.5,
        ]
    )


KOWALIK = numbers(".1957 .1947 .1735 .1600 .0844 .0627 .0456 .0342 .0323 .0235 .0246")
KOWALIK_U = numbers("4 2 1 .5 .25 .167 .125 .1 .0833 .0714 .0625")


def kowalik_osborne_15(x):
    u = KOWALIK_U
    return KOWALIK - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis_16(x):
    t = np.arange(1.0, 21.0) / 5
    return (x[0] + t * x[1] - np.exp(t)) ** 2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2


OSBORNE_1 = numbers(
    ".844 .908 .932 .936 .925 .908 .881 .850 .818 .784 .751 .718 .685 .658 .628 .603 .580 .558 .538 .522 .506 .490 "
    ".478 .467 .457 .448 .438 .431 .424 .420 .414 .411 .406"
)


def osborne_17(x):
    t = 10 * np.arange(33.0)
    return OSBORNE_1 - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs_18(x):
    t = np.arange(1.0, 14.0) / 10
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


OSBORNE_2 = numbers(
    "1.366 1.191 1.112 1.013 .991 .885 .831 .847 .786 .725 .746 .679 .608 .655 .616 .606 .602 .626 .651 .724 .649 .649 "
    ".694 .644 .624 .661 .612 .558 .533 .495 .500 .423 .395 .375 .372 .391 .396 .405 .428 .429 .523 .562 .607 .653 "
    ".672 .708 .633 .668 .645 .632 .591 .559 .597 .625 .739 .710 .729 .720 .636 .581 .428 .292 .162 .098 .054"
)


def osborne_19(x):
    t = np.arange(65.0) / 10
    bumps = x[1:4] * jnp.exp(-((t[:, None] - x[8:11]) ** 2) * x[5:8])
    return OSBORNE_2 - (x[0] * jnp.exp(-t * x[4]) + jnp.sum(bumps, axis=1))


def watson_20(x):
    t = np.arange(1.0, 30.0)[:, None] / 29
    j = np.arange(len(x))
    slope = (j[1:] * t ** (j[1:] - 1)) @ x[1:]
    return jnp.concatenate([slope - (t**j @ x) ** 2 - 1, jnp.stack([x[0], x[1] - x[0] ** 2 - 1])])


def extended_rosenbrock_21(x):
    return jnp.concatenate([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


def penalty_23(x):
    return jnp.concatenate([1e-5**0.5 * (x - 1), (x @ x - 0.25)[None]])


def penalty_24(x):
    n, a = len(x), 1e-5**0.5
    i = np.arange(2.0, n + 1)
    y = np.exp(i / 10) + np.exp((i - 1) / 10)
    return jnp.concatenate(
        [
            x[:1] - 0.2,
            a * (jnp.exp(x[1:] / 10) + jnp.exp(x[:-1] / 10) - y),
            a * (jnp.exp(x[1:] / 10) - np.exp(-1 / 10)),
            (np.arange(n, 0.0, -1) @ x**2 - 1)[None],
        ]
    )


def variably_dimensioned_25(x):
    s = np.arange(1.0, len(x) + 1) @ (x - 1)
    return jnp.concatenate([x - 1, jnp.stack([s, s**2])])


def trigonometric_26(x):
    i = np.arange(1.0, len(x) + 1)
    return len(x) - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear_27(x):
    n = len(x)
    return jnp.concatenate([x[:-1] + jnp.sum(x) - (n + 1), (jnp.prod(x) - 1)[None]])


def discrete_boundary_28(x):
    h = 1 / (len(x) + 1)
    t = h * np.arange(1.0, len(x) + 1)
    padded = jnp.pad(x, 1)
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2


def discrete_integral_29(x):
    n = len(x)
    h = 1 / (n + 1)
    t = h * np.arange(1.0, n + 1)
    kernel = np.where(t[None, :] <= t[:, None], (1 - t[:, None]) * t[None, :], t[:, None] * (1 - t[None, :]))
    return x + h / 2 * kernel @ (x + t + 1) ** 3


def broyden_tridiagonal_30(x):
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded_31(x):
    i = np.arange(len(x))
    band = (i[:, None] - i <= 5) & (i - i[:, None] <= 1) & (i != i[:, None])
    return x * (2 + 5 * x**2) + 1 - band.astype(float) @ (x * (1 + x))


ROWS = 10  # of the linear problems


def linear_full_rank_32(x):
    return jnp.pad(x, (0, ROWS - len(x))) - 2 / ROWS * jnp.sum(x) - 1


def linear_rank_one_33(x):
    return np.arange(1.0, ROWS + 1) * (np.arange(1.0, len(x) + 1) @ x) - 1


def linear_rank_one_with_zeros_34(x):
    i = np.arange(ROWS) * (np.arange(ROWS) < ROWS - 1)
    return i * (np.arange(2.0, len(x)) @ x[1:-1]) - 1


def chebyquad_35(x):
    y = 2 * x - 1
    values = [jnp.ones_like(y), y]
    for _ in range(len(x) - 1):
        values.append(2 * y * values[-1] - values[-2])
    i = np.arange(1, len(x) + 1)
    integrals = np.where(i % 2 == 0, -1.0 / (i**2 - 1 + (i == 1)), 0.0)
    return jnp.mean(jnp.stack(values[1:]), axis=1) - integrals


def counted(n: int) -> np.ndarray:
    """1, ..., n."""
    return np.arange(1.0, n + 1)


T10 = counted(10) / 11
OSBORNE_2_START = numbers("1.3 .65 .65 .7 .6 3 5 7 2 4.5 5.5")

_TABLE: list[tuple[Callable[[Any], Any], Any, tuple[float, ...]]] = [
    (rosenbrock_1, [-1.2, 1], (0,)),
    (freudenstein_roth_2, [0.5, -2], (0, 48.98425)),
    (powell_badly_scaled_3, [0, 1], (0,)),
    (brown_badly_scaled_4, [1, 1], (0,)),
    (beale_5, [1, 1], (0,)),
    (jennrich_sampson_6, [0.3, 0.4], (124.3622,)),
    (helical_valley_7, [-1, 0, 0], (0,)),
    (bard_8, [1, 1, 1], (8.214877e-3, 17.42869)),
    (gaussian_9, [0.4, 1, 0], (1.127933e-8,)),
    (meyer_10, [0.02, 4000, 250], (87.94586,)),
    (gulf_11, [5, 2.5, 0.15], (0,)),
    (box_12, [0, 10, 20], (0,)),
    (powell_singular_13, [3, -1, 0, 1], (0,)),
    (wood_14, [-3, -1, -3, -1], (0,)),
    (kowalik_osborne_15, [0.25, 0.39, 0.415, 0.39], (3.075056e-4, 1.027340e-3)),
    (brown_dennis_16, [25, 5, -5, -1], (85822.20,)),
    (osborne_17, [0.5, 1.5, -1, 0.01, 0.02], (5.464895e-5,)),
    (biggs_18, [1, 2, 1, 1, 1, 1], (0, 5.655650e-3)),
    (osborne_19, OSBORNE_2_START, (4.013774e-2,)),
    (watson_20, np.zeros(6), (2.287670e-3,)),
    (extended_rosenbrock_21, [-1.2, 1] * 5, (0,)),
    (penalty_23, counted(4), (2.249978e-5,)),
    (penalty_24, np.full(4, 0.5), (9.376293e-6,)),
    (variably_dimensioned_25, 1 - counted(10) / 10, (0,)),
    (trigonometric_26, np.full(10, 0.1), (0, 2.795061e-5)),
    (brown_almost_linear_27, np.full(10, 0.5), (0, 1)),
    (discrete_boundary_28, T10 * (T10 - 1), (0,)),
    (discrete_integral_29, T10 * (T10 - 1), (0,)),
    (broyden_tridiagonal_30, -np.ones(10), (0,)),
    (broyden_banded_31, -np.ones(10), (0,)),
    (linear_full_rank_32, np.ones(5), (ROWS - 5,)),
    (linear_rank_one_33, np.ones(5), (ROWS * (ROWS - 1) / (2 * (2 * ROWS + 1)),)),
    (linear_rank_one_with_zeros_34, np.ones(5), ((ROWS**2 + 3 * ROWS - 6) / (2 * (2 * ROWS - 3)),)),
    (chebyquad_35, counted(8) / 9, (3.516874e-3,)),
]

PROBLEMS = [Problem(f.__name__, f, np.asarray(start, float), tuple(map(float, minima))) for f, start, minima in _TABLE]
FACTORS = (1.0, 10.0, 100.0)

WIDTH = max(len(problem.start) for problem in PROBLEMS)
HEIGHT = max(np.shape(problem.residuals(jnp.asarray(problem.start)))[0] for problem in PROBLEMS)


def padded_start(problem: Problem, factor: float) -> np.ndarray:
    """The start in a vector that has room for every problem of the table."""
    return np.pad(problem.started(factor), (0, WIDTH - len(problem.start)))


def any_residuals(x: Any, index: Any, problems: Sequence[Problem] = tuple(PROBLEMS)) -> Any:
    """The residuals of the problem of this number, padded, so that one compilation serves the whole table."""

    def branch(problem: Problem) -> Callable[[Any], Any]:
        def residuals(x: Any) -> Any:
            found = problem.residuals(x[: len(problem.start)])
            return jnp.pad(found, (0, HEIGHT - len(found)))

        return residuals

    return jax.lax.switch(index, [branch(problem) for problem in problems], x)
