"""The router and the experts on torch_npu's fused ops. Signatures and shapes are documented in `kernels.table`,
semantics in `kernels.reference`.

Nothing waits for the host: how many rows each expert has stays on the card.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from expertmesh.kernels import reference
from expertmesh.kernels.npu.ops import Ops
from expertmesh.kernels.npu.products import Products, Rows
from expertmesh.kernels.npu.weights import Matrix
from expertmesh.kernels.types import Routing


class Moe:
    def __init__(self, ops: Ops, products: Products) -> None:
        self._ops, self._products = ops, products

    def router(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        logits, r = torch_linear(x_TD.float(), weight_ED), routing
        groups, kept = (1, 1) if r.method == "greedy" else (r.groups, r.groups_per_token)
        sigmoid = r.scoring == "sigmoid"
        # The op divides by the sum of the weights of sigmoids, and only by theirs.
        if r.normalise != sigmoid or logits.shape[1] // groups <= 2 or not logits.shape[0]:
            return reference.route(logits, bias_E, r)
        weights, experts, _ = self._ops.call(
            "npu_moe_gating_top_k", logits, k=r.experts_per_token, bias=bias_E, k_group=kept, group_count=groups,
            # V3 judges a group by its two best experts, V2 by the best one.
            group_select_mode=int(r.method == "noaux_tc"), renorm=0, norm_type=int(sigmoid),
            routed_scaling_factor=r.scale, eps=1e-20,
        )  # fmt: skip
        return experts.to(torch.int64), weights

    def experts(
        self, x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up_SID: Matrix, down_SDI: Matrix
    ) -> Tensor:
        """Choices that are not mine go to a slot behind mine, out of the range that is looked at."""
        (R, K), S = slots_RK.shape, down_SDI.shape[0]
        if not R or not S:
            return torch.zeros_like(x_RD)
        rows, place, counts, scales = self._ops.call(
            "npu_moe_init_routing_v2", x_RD, slots_RK.masked_fill(slots_RK < 0, S).to(torch.int32),
            active_num=R * K, expert_num=S + 1, drop_pad_mode=0, expert_tokens_num_type=1, expert_tokens_num_flag=True,
            quant_mode=1 if gate_up_SID.quantised else -1, active_expert_range=[0, S], row_idx_type=0,
        )  # fmt: skip
        x = Rows(rows, scales if gate_up_SID.quantised else None, x_RD.dtype)
        both = self._grouped(x, gate_up_SID, counts)
        y = self._grouped(self._products.activated(both, down_SDI, counts), down_SDI, counts)
        # Mode 3 takes places in the order of rows, and passes over those of choices that are not mine, which are -1.
        # Its results are experts times capacity: here as many experts as there are choices, with one row each.
        out = self._ops.call(
            "npu_moe_finalize_routing", y.unsqueeze(1), skip1=None, skip2=None, bias=None,
            scales=weights_RK.to(y.dtype), expanded_src_to_dst_row=place, export_for_source_row=None, drop_pad_mode=3,
        )  # fmt: skip
        return cast(Tensor, out)

    def _grouped(self, x: Rows, weight: Matrix, counts_S: Tensor) -> Tensor:
        """Each group's rows times its matrix. Of one group the count is its end, and that is all the op takes."""
        scales = {"scale": [weight.scales], "per_token_scale": [x.scales]} if weight.quantised else {}
        (found,) = self._ops.call(
            "npu_grouped_matmul", x=[x.numbers], weight=[weight.data], **scales, group_list=counts_S, split_item=2,
            group_type=0, group_list_type=int(counts_S.shape[0] > 1), output_dtype=x.dtype,
        )  # fmt: skip
        return cast(Tensor, found)
