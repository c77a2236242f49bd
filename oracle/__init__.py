"""The exact results: the op's definition and its adjoint in high precision. Imports nothing from `titans`."""

from oracle.api import forward, gradient
from oracle.coefficients import coefficients
from oracle.inputs import Cotangents, Gradient, Inputs, Output, State
from oracle.precision import Unsettled, exact

__all__ = [
    "Cotangents",
    "Gradient",
    "Inputs",
    "Output",
    "State",
    "Unsettled",
    "coefficients",
    "exact",
    "forward",
    "gradient",
]
