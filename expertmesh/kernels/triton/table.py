"""All kernels by name."""

from expertmesh.kernels.triton import decode, experts, gate, permute, prefill, prologue, quantise
from expertmesh.kernels.triton.kernel import Kernel


def tiled(size: int, tile: int) -> int:
    """How many tiles hold so many rows or columns."""
    return -(-size // tile)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            prologue.mla_down,
            grid=lambda a: (tiled(a["T"], a["BLOCK_T"]), tiled(a["X"], a["BLOCK_X"])),
            outputs=("low_TX",),
        ),
        Kernel(
            prologue.mla_norm,
            grid=lambda a: (a["q_TQ"].shape[0],),
            outputs=("c_q_TQ", "c_kv_TC", "k_TP"),
            products=False,
        ),
        Kernel(
            prologue.mla_up,
            grid=lambda a: (a["H"], tiled(a["T"], a["BLOCK_T"])),
            outputs=("query_THX", "cache_SX"),
        ),
        Kernel(
            decode.mla_decode,
            grid=lambda a: (a["query_BHX"].shape[0], tiled(a["H"], a["BLOCK_H"]), a["S"]),
            outputs=("part_BHSC", "lse_BHS"),
        ),
        Kernel(
            decode.mla_merge,
            grid=lambda a: (a["H"], tiled(a["B"], a["BLOCK_B"])),
            outputs=("out_BHV",),
        ),
        Kernel(
            prefill.mla_expand,
            grid=lambda a: (tiled(a["L"], a["G"]), tiled(a["X"], a["BLOCK_X"])),
            outputs=("up_LX",),
        ),
        Kernel(
            prefill.mla_prefill,
            grid=lambda a: (a["H"], tiled(a["T"], a["BLOCK_T"])),
            outputs=("out_THV",),
        ),
        Kernel(
            gate.router_scores,
            grid=lambda a: (tiled(a["T"], a["BLOCK_T"]), tiled(a["E"], a["BLOCK_E"]), a["PARTS"]),
            outputs=("logits_PTE",),
        ),
        Kernel(
            gate.gate,
            grid=lambda a: (tiled(a["T"], a["BLOCK_T"]),),
            outputs=("experts_TK", "weights_TK"),
            products=False,
        ),
        Kernel(
            permute.expert_order,
            # One even without rows: somebody has to write the offsets.
            grid=lambda a: (max(1, tiled(a["P"], a["BLOCK_P"])),),
            outputs=("order_P", "place_P", "offsets_N"),
            products=False,
        ),
        Kernel(
            permute.permute, grid=lambda a: (min(a["P"], a["PROGRAMS"]),), outputs=("y_PD",), products=False
        ),
        Kernel(
            permute.unpermute,
            grid=lambda a: (min(a["R"], a["PROGRAMS"]),),
            outputs=("out_RD",),
            products=False,
        ),
        Kernel(
            quantise.quantise,
            grid=lambda a: (min(a["P"], a["PROGRAMS"]),),
            outputs=("y_PD", "scale_PG"),
            products=False,
        ),
        Kernel(
            quantise.dequantise,
            grid=lambda a: (min(a["T"], a["PROGRAMS"]),),
            outputs=("y_TD",),
            products=False,
        ),
        *(
            Kernel(
                function,
                grid=lambda a: (a["PROGRAMS"] if a["S"] else 0,),
                outputs=outputs,
                variant=variant,
            )
            for function, outputs in ((experts.gate_up, ("h_PI", "h_scale")), (experts.down, ("y_PD",)))
            for variant in ("", "_int8", "_fp8", "_bytes")
        ),
    )
}
