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
from gn_linear._linearise import Linearisation, linearise, linearised
from gn_linear._refusal import Refusal

__version__ = "0.1.0"

__all__ = [
    "FilteredStepsInfo",
    "GaussNewtonInfo",
    "GaussNewtonState",
    "IterativeLinearisationState",
    "Linearisation",
    "LinearisationInfo",
    "Refusal",
    "anchor",
    "damping",
    "diagnostics",
    "experiments",
    "filtered_predictions",
    "filtered_steps",
    "filters",
    "gauss_newton",
    "info",
    "iterative_linearisation",
    "linearise",
    "linearised",
    "losses",
    "periods",
    "plotting",
    "preconditioners",
    "solvers",
    "wrappers",
]
