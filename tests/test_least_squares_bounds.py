"""Bounds of `least_squares` on random problems, against scipy and the conditions of Karush, Kuhn and Tucker."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import gn_linear as gnl
from tests.support import flat, tolerance

RESIDUALS, PARAMETERS = 6, 3
ROOT = np.sqrt(tolerance(np.float64))
"""How near a fit at the defaults comes to the parameters; the cost and the cosines come nearer by as much again."""


def tree(vector: Any) -> Any:
    return {"one": vector[0], "two": vector[1:]}


def residuals(p: Any, matrix: Any, targets: Any, bend: Any) -> Any:
    """Linear in the parameters where ``bend`` is zero."""
    line = matrix @ jnp.concatenate([p["one"][None], p["two"]])
    return {"all": line + bend * jnp.sin(line) - targets}


@jax.jit
def fit(start: Any, lower: Any, upper: Any, *args: Any) -> gnl.Solution:
    return gnl.least_squares(residuals, start, args=args, options=gnl.Options(lower=lower, upper=upper))


SIDES = st.sampled_from(["free", "left", "right", "wide", "tight", "equal"])


@st.composite
def boxes(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower bounds, upper bounds and a start in the box, on a bound or outside."""
    lower, upper, start = np.full(PARAMETERS, -np.inf), np.full(PARAMETERS, np.inf), np.zeros(PARAMETERS)
    for i in range(PARAMETERS):
        side, middle = draw(SIDES), draw(st.floats(-1.0, 1.0, allow_subnormal=False))
        if side in {"left", "wide", "tight", "equal"}:
            lower[i] = middle
        if side == "right":
            upper[i] = middle
        if side in {"wide", "tight", "equal"}:
            upper[i] = middle + {"wide": 1.0, "tight": 1e-9, "equal": 0.0}[side]
        start[i] = middle + draw(st.sampled_from([-1.0, 0.0, 0.5]))
    return lower, upper, start


@settings(max_examples=200, deadline=None, derandomize=True)
@given(box=boxes(), seed=st.integers(0, 2**16), bend=st.sampled_from([0.0, 0.3, 0.9]))
def test_bounded_fits_end_in_minima(box, seed, bend):
    lower, upper, start = box
    rng = np.random.default_rng(seed)
    matrix, targets = rng.normal(size=(RESIDUALS, PARAMETERS)), rng.normal(size=RESIDUALS)
    found = fit(tree(start), tree(lower), tree(upper), matrix, targets, bend)
    x, slope = flat(found.params), flat(found.gradient)
    assert found.success, found.message
    assert np.all((x >= lower) & (x <= upper))

    # Where a bound holds a parameter the cost falls beyond it, and it is level along all others.
    held = flat(found.at_bounds).astype(bool)
    assert np.array_equal(held, (x <= lower) & (slope > 0) | (x >= upper) & (slope < 0))
    size = np.linalg.norm(flat(found.residuals)) * np.linalg.norm(flat(found.jacobian).reshape(matrix.shape), axis=0)
    near = (x - lower < ROOT) | (upper - x < ROOT)
    assert np.all(np.abs(slope)[~held & ~near] <= ROOT * size[~held & ~near])

    free = lower < upper  # scipy takes no equal bounds

    def at(p: np.ndarray) -> np.ndarray:
        line = matrix[:, free] @ p + matrix[:, ~free] @ lower[~free]
        return line + bend * np.sin(line) - targets

    def derivative(p: np.ndarray) -> Any:
        line = matrix[:, free] @ p + matrix[:, ~free] @ lower[~free]
        return matrix[:, free] * (1 + bend * np.cos(line))[:, None]

    # From there scipy finds nothing lower; a linear problem has one minimum, which it also finds from afar.
    for begin in [x] if bend else [x, start]:
        if np.any(free):
            box = (lower[free], upper[free])
            peer = scipy.optimize.least_squares(
                at, np.clip(begin[free], *box), derivative, bounds=box, xtol=1e-15, ftol=1e-15, gtol=1e-15
            )
            assert float(found.cost) <= peer.cost * (1 + ROOT)
