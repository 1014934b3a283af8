"""Kernels of accelerators in Triton: one source for CUDA and Ascend (docs/accelerators.md).

Modules that import triton are imported only where it is installed: `table` and all that it names. `tiles` needs
nothing.
"""
