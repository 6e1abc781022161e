"""16,384 tokens of attention with its weights in sight; the N × N matrix is never there."""

import torch

import regard
from regard import Causal, First, Received, TopK, Window

torch.manual_seed(0)
query = torch.randn(1, 4, 16384, 64)  # (batch, heads, q_len, dim)
key, value = torch.randn(1, 2, 16384, 64), torch.randn(1, 2, 16384, 64)

mask = Causal() & (Window(1024) | First(4))
out, (top, received) = regard.attention(query, key, value, mask=mask, observe=[TopK(8), Received()])
print(out.shape)
print(top)
print(received)
