"""Inner solvers of the damped linearised problem."""

from gn_linear.solvers._interface import Result, Solver, Status
from gn_linear.solvers.cg import CG, CGState
from gn_linear.solvers.first_order import FirstOrder, FirstOrderState
from gn_linear.solvers.lanczos import Lanczos, LanczosState

__all__ = ["CG", "CGState", "FirstOrder", "FirstOrderState", "Lanczos", "LanczosState", "Result", "Solver", "Status"]
