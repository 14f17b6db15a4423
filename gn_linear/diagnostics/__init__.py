"""What is measured of a network: the empirical neural tangent kernel, what it is made of, and how it moves."""

from gn_linear.diagnostics.kernels import (
    cka,
    condition_number,
    effective_dimension,
    effective_rank,
    kernel_distance,
    kernel_regression,
    kernel_velocity,
    spectrum_decay,
    target_alignment,
)
from gn_linear.diagnostics.ntk import empirical_ntk, ntk_vector_product
from gn_linear.diagnostics.structure import StructureReport, structure_report

__all__ = [
    "StructureReport",
    "cka",
    "condition_number",
    "effective_dimension",
    "effective_rank",
    "empirical_ntk",
    "kernel_distance",
    "kernel_regression",
    "kernel_velocity",
    "ntk_vector_product",
    "spectrum_decay",
    "structure_report",
    "target_alignment",
]
