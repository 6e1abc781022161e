"""A sequence on several ranks: cut it, compute on it, put results together."""

from .ops.distributed.decode import decode
from .ops.distributed.layout import balanced
from .ops.distributed.linear import linear_over_ranks
from .ops.distributed.results import Sharded
from .ops.distributed.shards import shard, unshard

__all__ = [
    "Sharded",
    "balanced",
    "decode",
    "linear_over_ranks",
    "shard",
    "unshard",
]
