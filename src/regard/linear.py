"""What `regard.linear_attention` takes and gives: random features, and its state."""

from .ops.linear import Favor, LinearState

__all__ = ["Favor", "LinearState"]
