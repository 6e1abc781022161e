"""Triton kernels: the weights from q, k and lse (`reading` is the way in), and linear attention's
recurrence (`linear`). Nothing imports triton until a kernel is launched.
"""
