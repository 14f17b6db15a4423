"""Inner solvers of the damped linearised problem."""

from gn_linear.solvers._interface import Result, Solver, Status
from gn_linear.solvers.cg import CG, CGState
from gn_linear.solvers.choice import Both, ByStructure, Choice, choose
from gn_linear.solvers.cholesky import Cholesky, CholeskyState
from gn_linear.solvers.first_order import FirstOrder, FirstOrderState
from gn_linear.solvers.lanczos import Lanczos, LanczosState
from gn_linear.solvers.qr import QR

__all__ = [
    "Both",
    "ByStructure",
    "CG",
    "CGState",
    "Choice",
    "Cholesky",
    "CholeskyState",
    "FirstOrder",
    "FirstOrderState",
    "Lanczos",
    "LanczosState",
    "QR",
    "Result",
    "Solver",
    "Status",
    "choose",
]
