"""Ops of the table on torch_npu's fused ops, for Ascend (docs/accelerators.md).

Modules that import torch_npu are imported only where it is installed: `ops`, and `products`, `attention` and `moe`,
which are made of it. `contracts`, which says what its ops want, `cache` and `weights` need nothing.
"""
