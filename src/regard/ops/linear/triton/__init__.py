"""Linear attention by Triton on CUDA. Modules *_kernel import triton, once one is launched."""
