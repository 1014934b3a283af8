"""The op table: every op that the model calls, and which implementation runs on a device.

`reference` has each op in plain PyTorch and is the oracle; `eager` and `cpu` hold faster versions. A version is
chosen once, when the engine starts, from the device of the tensors. The model never asks.
"""

from expertmesh.kernels.table import AttentionRows, Kernels, Queries, Rotary, Routing, kernels_for

__all__ = ["AttentionRows", "Kernels", "Queries", "Rotary", "Routing", "kernels_for"]
