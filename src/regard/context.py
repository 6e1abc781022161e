"""What a context window no longer sees, in numbers; and results of chunks made one."""

from .analysis.context_loss import Unseen, unseen, unseen_mass, unseen_recorded
from .ops.merging import stitch

__all__ = ["Unseen", "stitch", "unseen", "unseen_mass", "unseen_recorded"]
