"""How far a correct floating-point implementation may be from the oracle, element by element.

The error model and the numbered bounds are in oracle/README.md.
"""

from oracle.bounds.error_model import FLOAT32, FLOAT64, ErrorModel, arithmetic_for, kernel_arithmetic
from oracle.bounds.gates import CoefficientsRadius, coefficients_radius
from oracle.bounds.sequence import GradientRadius, Radius, forward_radius, gradient_radius

__all__ = [
    "FLOAT32",
    "FLOAT64",
    "CoefficientsRadius",
    "ErrorModel",
    "GradientRadius",
    "Radius",
    "arithmetic_for",
    "coefficients_radius",
    "forward_radius",
    "gradient_radius",
    "kernel_arithmetic",
]
