"""Kernels: compiled code behind a plain C interface, and Triton's. They know pointers and sizes."""
