"""What is measured of a network at its parameters: the empirical neural tangent kernel, and what it is made of."""

from gn_linear.diagnostics.ntk import empirical_ntk, ntk_vector_product
from gn_linear.diagnostics.structure import StructureReport, structure_report

__all__ = ["StructureReport", "empirical_ntk", "ntk_vector_product", "structure_report"]
