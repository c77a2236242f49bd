"""The inner gradient of `fla.ops.titans`, as fla-core 0.6.0 has it, in the place of `titans.inner.inner_gradient`."""

from torch import Tensor

from titans.inner import norm


def gradient_of_fla(y: Tensor, target: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """The first term of the gradient, D e, is not divided by D times the standard deviation."""
    x, r = norm(y, eps)
    e = (x * w + b - target) * w
    return y.shape[-1] * e - r * (e.mean(-1, keepdim=True) + x * (e * x).mean(-1, keepdim=True))
