"""Preconditioners of conjugate gradients: cheap approximate inverses of the damped Gauss-Newton matrix."""

from gn_linear.preconditioners._interface import Preconditioner
from gn_linear.preconditioners.jacobi import Jacobi, JacobiState
from gn_linear.preconditioners.kronecker import Kronecker, KroneckerState
from gn_linear.preconditioners.nystrom import Nystrom, NystromState
from gn_linear.preconditioners.subsample import Subsample, SubsampleState

__all__ = [
    "Jacobi",
    "JacobiState",
    "Kronecker",
    "KroneckerState",
    "Nystrom",
    "NystromState",
    "Preconditioner",
    "Subsample",
    "SubsampleState",
]
