"""What is true: the op's definition and its adjoint in high precision. Imports nothing from `titans`."""

from oracle.coefficients import coefficients
from oracle.formats import Unsettled, exact
from oracle.gradient import Cotangents, Gradient, gradient
from oracle.recurrence import Inputs, Output, State, forward

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
