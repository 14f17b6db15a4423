"""Second-order optimisation for JAX: damped Gauss-Newton and iterative linearisation as optax transforms."""

from gn_linear import (
    damping,
    diagnostics,
    experiments,
    filters,
    losses,
    periods,
    plotting,
    preconditioners,
    robust,
    solvers,
    wrappers,
)
from gn_linear._filtered_steps import FilteredStepsInfo, filtered_predictions, filtered_steps
from gn_linear._gauss_newton import GaussNewtonInfo, GaussNewtonState, gauss_newton
from gn_linear._inspect import anchor, info
from gn_linear._iterative_linearisation import (
    IterativeLinearisationState,
    LinearisationInfo,
    iterative_linearisation,
)
from gn_linear._least_squares import curve_fit, least_squares
from gn_linear._linearise import Linearisation, linearise, linearised
from gn_linear._options import Options
from gn_linear._outcome import Outcome
from gn_linear._refusal import Refusal
from gn_linear._solution import Solution

__version__ = "0.1.0"

__all__ = [
    "FilteredStepsInfo",
    "GaussNewtonInfo",
    "GaussNewtonState",
    "IterativeLinearisationState",
    "Linearisation",
    "LinearisationInfo",
    "Options",
    "Outcome",
    "Refusal",
    "Solution",
    "anchor",
    "curve_fit",
    "damping",
    "diagnostics",
    "experiments",
    "filtered_predictions",
    "filtered_steps",
    "filters",
    "gauss_newton",
    "info",
    "iterative_linearisation",
    "least_squares",
    "linearise",
    "linearised",
    "losses",
    "periods",
    "plotting",
    "preconditioners",
    "robust",
    "solvers",
    "wrappers",
]
