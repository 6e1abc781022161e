"""Attention by Triton, a block at a time: keys in pages, and blocks that another kernel spoiled.

Modules *_kernel import triton, once one is launched.
"""
