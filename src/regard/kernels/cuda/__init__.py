"""Triton kernels: the weights from q, k and lse. `reading` is the way in; nothing imports triton
until a kernel is launched.
"""
