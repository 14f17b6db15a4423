"""What is measured of a network at its parameters: its empirical neural tangent kernel, its curvature, its motion."""

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
from gn_linear.diagnostics.linearisation import ParameterMotion, linearisation_error, parameter_motion
from gn_linear.diagnostics.ntk import empirical_ntk, ntk_by_leaf, ntk_diagonal, ntk_vector_product
from gn_linear.diagnostics.spectra import (
    Spectrum,
    StableLearningRate,
    as_linear_operator,
    largest_stable_learning_rate,
    ntk_as_linear_operator,
    spectrum,
)
from gn_linear.diagnostics.structure import StructureReport, structure_report

__all__ = [
    "ParameterMotion",
    "Spectrum",
    "StableLearningRate",
    "StructureReport",
    "as_linear_operator",
    "cka",
    "condition_number",
    "effective_dimension",
    "effective_rank",
    "empirical_ntk",
    "kernel_distance",
    "kernel_regression",
    "kernel_velocity",
    "largest_stable_learning_rate",
    "linearisation_error",
    "ntk_as_linear_operator",
    "ntk_by_leaf",
    "ntk_diagonal",
    "ntk_vector_product",
    "parameter_motion",
    "spectrum",
    "spectrum_decay",
    "structure_report",
    "target_alignment",
]
