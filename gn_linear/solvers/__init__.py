"""Inner solvers of the damped linearised problem."""

from gn_linear.solvers._interface import Result, Solver, Status
from gn_linear.solvers.cg import CG, CGState

__all__ = ["CG", "CGState", "Result", "Solver", "Status"]
