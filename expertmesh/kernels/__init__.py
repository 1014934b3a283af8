"""The op table: every op that the model calls, and which implementation runs on a device.

`reference` has each op in plain PyTorch and is the oracle; other modules hold faster versions of some. A version is
chosen once, when the engine starts, from the device of the tensors. The model never asks.
"""

from expertmesh.kernels.table import AttentionRows, Kernels, Rotary, Routing, kernels_for

__all__ = ["AttentionRows", "Kernels", "Rotary", "Routing", "kernels_for"]
