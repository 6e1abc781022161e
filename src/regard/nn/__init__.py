"""Modules around `regard.attention`: multi-head attention, positions, blocks, `Transformer`."""

from . import functional
from .blocks import Block, BlockSeen, FeedForward
from .linear import DeltaAttention, LinearAttention
from .multihead import Memory, MultiHeadAttention
from .positions import (
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    RelativePositions,
    Rotary,
    SinusoidalPositions,
    YaRNScaling,
)
from .transformer import Decoder, Encoder, Transformer, TransformerSeen

__all__ = [
    "Block",
    "BlockSeen",
    "Decoder",
    "DeltaAttention",
    "Encoder",
    "FeedForward",
    "LearnedPositions",
    "LinearAttention",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPEScaling",
    "Memory",
    "MultiHeadAttention",
    "NTKScaling",
    "RelativePositions",
    "Rotary",
    "SinusoidalPositions",
    "Transformer",
    "TransformerSeen",
    "YaRNScaling",
    "functional",
]
