"""The description of a checkpoint against what is known of the published ones."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError, ModelConfig
from expertmesh.weights import Shard, Weight, count_parameters, describe
from tests.support.files import TINY, official_config

# Numbers in all tensors, as the model hub counts them, and what of them is not in the description: Moonlight and
# Kimi K2 carry a rotary table in every layer, hidden size / heads / 2 numbers each, that no engine reads.
PUBLISHED = {
    "deepseek-v3": (684_531_386_000, 0),
    "deepseek-v2": (235_741_434_880, 0),
    "deepseek-v2-lite": (15_706_484_224, 0),
    "moonlight-16b-a3b": (15_960_111_936, 27 * 2048 // 16 // 2),
    "kimi-k2": (1_026_470_731_056, 61 * 7168 // 64 // 2),
}


def described(name: str) -> list[Weight]:
    return describe(ModelConfig.from_dict(official_config(name)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_is_the_published_one(name: str) -> None:
    total, rotary = PUBLISHED[name]
    assert sum(count_parameters(described(name)).values()) + rotary == total


def test_types_and_tensors_of_v3() -> None:
    weights = described("deepseek-v3")
    assert len(weights) == 91_991
    assert count_parameters(weights) == {
        "float8_e4m3fn": 680_571_043_840, "bfloat16": 3_918_786_560, "float32": 41_555_600,
    }  # fmt: skip


def test_types_and_tensors_of_kimi_k2() -> None:
    """139,644 published tensors with 61 rotary tables; payload of 1,029,173,256,720 bytes with 2 bytes for each of
    their numbers."""
    weights = described("kimi-k2")
    counts = count_parameters(weights)
    assert len(weights) + 61 == 139_644
    rotary = PUBLISHED["kimi-k2"][1]
    payload = counts["float8_e4m3fn"] + 2 * (counts["bfloat16"] + rotary) + 4 * counts["float32"]
    assert payload == 1_029_173_256_720


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_unique(name: str) -> None:
    counts = Counter(w.name for w in described(name))
    assert counts.most_common(1)[0][1] == 1


# Samples of the published index and headers of DeepSeek-V3: one tensor of each kind.
V3_TENSORS: dict[str, tuple[tuple[int, ...], str]] = {
    "model.embed_tokens.weight": ((129280, 7168), "bfloat16"),
    "model.layers.0.self_attn.q_a_proj.weight": ((1536, 7168), "float8_e4m3fn"),
    "model.layers.0.self_attn.q_a_proj.weight_scale_inv": ((12, 56), "float32"),
    "model.layers.0.self_attn.q_a_layernorm.weight": ((1536,), "bfloat16"),
    "model.layers.0.self_attn.q_b_proj.weight": ((24576, 1536), "float8_e4m3fn"),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), "float8_e4m3fn"),
    # 576 rows are four and a half blocks.
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ((5, 56), "float32"),
    "model.layers.0.self_attn.kv_a_layernorm.weight": ((512,), "bfloat16"),
    "model.layers.0.self_attn.kv_b_proj.weight": ((32768, 512), "float8_e4m3fn"),
    "model.layers.0.self_attn.o_proj.weight": ((7168, 16384), "float8_e4m3fn"),
    "model.layers.2.mlp.gate_proj.weight": ((18432, 7168), "float8_e4m3fn"),
    "model.layers.2.mlp.down_proj.weight_scale_inv": ((56, 144), "float32"),
    "model.layers.3.mlp.gate.weight": ((256, 7168), "bfloat16"),
    "model.layers.3.mlp.gate.e_score_correction_bias": ((256,), "float32"),
    "model.layers.3.mlp.experts.255.down_proj.weight": ((7168, 2048), "float8_e4m3fn"),
    "model.layers.3.mlp.experts.255.down_proj.weight_scale_inv": ((56, 16), "float32"),
    "model.layers.60.mlp.shared_experts.up_proj.weight": ((2048, 7168), "float8_e4m3fn"),
    "model.layers.60.post_attention_layernorm.weight": ((7168,), "bfloat16"),
    "model.norm.weight": ((7168,), "bfloat16"),
    "lm_head.weight": ((129280, 7168), "bfloat16"),
    "model.layers.61.embed_tokens.weight": ((129280, 7168), "bfloat16"),
    "model.layers.61.enorm.weight": ((7168,), "bfloat16"),
    "model.layers.61.hnorm.weight": ((7168,), "bfloat16"),
    "model.layers.61.eh_proj.weight": ((7168, 14336), "bfloat16"),
    "model.layers.61.mlp.experts.0.gate_proj.weight": ((2048, 7168), "float8_e4m3fn"),
    "model.layers.61.input_layernorm.weight": ((7168,), "bfloat16"),
    "model.layers.61.shared_head.norm.weight": ((7168,), "bfloat16"),
    "model.layers.61.shared_head.head.weight": ((129280, 7168), "bfloat16"),
}  # fmt: skip


def test_tensors_of_v3() -> None:
    weights = {w.name: w for w in described("deepseek-v3")}
    assert {n: (weights[n].shape, weights[n].dtype) for n in V3_TENSORS} == V3_TENSORS
    assert not any(n.startswith("model.layers.62.") for n in weights)
    assert "model.layers.2.mlp.gate.weight" not in weights
    # What is never quantised has no scales.
    plain = ("embed_tokens", "layernorm", "norm", "gate.weight", "lm_head", "eh_proj", "head.weight")
    assert not [n for n in weights if n.endswith("_scale_inv") and any(f"{p}_" in n for p in plain)]


def test_v2_lite_has_no_low_rank_queries_and_no_bias() -> None:
    names = {w.name for w in described("deepseek-v2-lite")}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not [n for n in names if "q_a_" in n or "q_b_" in n or "correction_bias" in n or "scale_inv" in n]


def test_kinds_splits_and_experts() -> None:
    weights = {w.name: w for w in described("deepseek-v3")}
    prefix = "model.layers.5"
    split = {
        "self_attn.q_a_proj": None, "self_attn.q_b_proj": 0, "self_attn.kv_b_proj": 0, "self_attn.o_proj": 1,
        "mlp.experts.7.gate_proj": None, "mlp.shared_experts.down_proj": None,
    }  # fmt: skip
    assert {n: weights[f"{prefix}.{n}.weight"].split for n in split} == split
    assert [weights[f"model.layers.0.mlp.{n}_proj.weight"].split for n in ("gate", "up", "down")] == [0, 0, 1]
    assert weights["lm_head.weight"].split == weights["model.embed_tokens.weight"].split == 0
    routed = [w for w in weights.values() if w.kind == "routed"]
    assert all(w.expert is not None and w.layer in range(3, 62) for w in routed)
    assert len(routed) == 59 * 256 * 6
    assert all(w.expert is None for w in weights.values() if w.kind != "routed")


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": 0}]
)
def test_tied_embeddings_have_no_head(changes: dict[str, object]) -> None:
    plain = {w.name for w in describe(ModelConfig.from_dict(TINY | changes))}
    tied = {w.name for w in describe(ModelConfig.from_dict(TINY | changes | {"tie_word_embeddings": True}))}
    assert plain - tied == {"lm_head.weight"} and not tied - plain


def test_attention_biases() -> None:
    names = {w.name for w in describe(ModelConfig.from_dict(TINY | {"attention_bias": True}))}
    biases = {
        n.removeprefix("model.layers.0.self_attn.") for n in names if "layers.0." in n and n.endswith(".bias")
    }
    assert biases == {"q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias"}


# --- Shard


@given(size=st.integers(1, 64), tp=st.integers(1, 8))
def test_shards_cover_an_axis_once(size: int, tp: int) -> None:
    shards = [Shard({}, rank, tp) for rank in range(tp)]
    if size % tp:
        with pytest.raises(InputError, match=f"heads {size} does not divide by the TP group's size {tp}"):
            shards[0].part(size, "heads")
        return
    assert [i for shard in shards for i in shard.part(size, "heads")] == list(range(size))


def test_whole_shard() -> None:
    shard = Shard.whole(ModelConfig.from_dict(TINY))
    assert shard.slots == {1: tuple(range(8))} and shard.tp_size == 1
