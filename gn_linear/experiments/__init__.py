"""Iterative linearisation on the user's own model, loss, data and optimiser, with tidy records of what it did.

Every column of the records says whose it is: f is the network, f_lin the network linearised at its last anchor. The two
can differ by tens of points of accuracy where the period is long.
"""

from gn_linear.experiments.comparison import side_by_side
from gn_linear.experiments.fewest import FewestUpdates, fewest_updates
from gn_linear.experiments.problem import Problem
from gn_linear.experiments.records import Records
from gn_linear.experiments.sweeps import period_sweep, phase_diagram, schedules

__all__ = [
    "FewestUpdates",
    "Problem",
    "Records",
    "fewest_updates",
    "period_sweep",
    "phase_diagram",
    "schedules",
    "side_by_side",
]
