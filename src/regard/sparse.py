"""Sparse masks: patterns by position, layouts of blocks, and blocks chosen by content."""

from .call.sparse_masks import BigBird, BlockSparse, Chunks, Dilated, Fixed, Longformer, Strided
from .call.top_blocks import TopBlocks

__all__ = [
    "BigBird", "BlockSparse", "Chunks", "Dilated", "Fixed", "Longformer", "Strided", "TopBlocks",
]  # fmt: skip
