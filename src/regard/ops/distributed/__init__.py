"""Attention over ranks that each hold a part of the sequence, on torch.distributed."""
