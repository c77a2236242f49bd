"""The chunk form in Triton."""

from titans.kernels.launch import backward, forward, kept, reason_against
from titans.kernels.tile import max_slots, storage

__all__ = ["backward", "forward", "kept", "max_slots", "reason_against", "storage"]
