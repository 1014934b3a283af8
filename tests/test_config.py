"""config.json: official files and those of transformers 5, everything that can be wrong with one, and EngineConfig."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config

from expertmesh import EngineConfig, InputError, ModelConfig
from expertmesh.config import Yarn, cache_bytes_per_token
from expertmesh.config.engine import parse_size
from expertmesh.kernels.types import rotary_table
from tests.support.files import CONFIGS, FP8, TINY, official_config
from tests.support.oracle import turns

OFFICIAL = sorted(path.stem for path in CONFIGS.glob("*.json"))
V3 = ModelConfig.from_dict(official_config("deepseek-v3"))


def test_fields_of_v3() -> None:
    assert (V3.hidden_size, V3.num_hidden_layers, V3.n_routed_experts) == (7168, 61, 256)
    assert (V3.qk_head_dim, V3.latent_dim) == (192, 576)
    assert V3.moe_layers == tuple(range(3, 61)) and V3.is_moe(61)
    assert (V3.scoring_func, V3.topk_method, V3.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    assert (V3.dtype, V3.fp8_block) == ("bfloat16", (128, 128))
    assert (V3.bos_token_id, V3.eos_token_ids) == (0, (1,))
    assert V3.yarn == Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)


def test_attention_scale_of_v3() -> None:
    """By hand: (128 + 64) ** -0.5 * (0.1 * ln 40 + 1) ** 2, cosines unscaled since the two mscales are equal."""
    assert V3.softmax_scale == pytest.approx(0.1352337788608801)
    assert V3.yarn is not None and V3.yarn.rotary_scale == 1.0


def test_fields_of_v2_lite() -> None:
    lite = ModelConfig.from_dict(official_config("deepseek-v2-lite"))
    assert (lite.scoring_func, lite.topk_method, lite.q_lora_rank) == ("softmax", "greedy", None)
    assert lite.fp8_block is None and lite.num_nextn_predict_layers == 0
    assert lite.eos_token_ids == (100001,)


@pytest.mark.parametrize("name", OFFICIAL)
def test_rotary_table_of_official_models(name: str) -> None:
    """Against complex numbers in float64, over the positions that float32 angles hold well."""
    data = official_config(name)
    expected = torch.from_numpy(turns(data, 4096))
    cos, sin = rotary_table(ModelConfig.from_dict(data), 4096)
    torch.testing.assert_close(cos, expected.real.float(), atol=5e-4, rtol=0)
    torch.testing.assert_close(sin, expected.imag.float(), atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_file_and_what_transformers_makes_of_it_say_the_same(name: str, tmp_path: Path) -> None:
    """transformers 5 renames the fields of rotary positions and the type."""
    data = official_config(name)
    theirs = (DeepseekV3Config if "V3" in data["architectures"][0] else DeepseekV2Config).from_dict(data)
    theirs.save_pretrained(tmp_path)
    ours, reread = ModelConfig.from_dict(data), ModelConfig.from_folder(tmp_path)
    assert reread.yarn is not None or name.startswith("moonlight")
    # What transformers does not write: it has no fields for them, and the family's defaults apply.
    assert replace(reread, fp8_block=ours.fp8_block) == ours


def test_v3_without_optional_fields_has_the_familys_defaults() -> None:
    optional = {
        "topk_method",
        "scoring_func",
        "norm_topk_prob",
        "rope_scaling",
        "torch_dtype",
        "eos_token_id",
    }
    config = ModelConfig.from_dict({k: v for k, v in TINY.items() if k not in optional})
    assert (config.topk_method, config.scoring_func, config.norm_topk_prob) == ("noaux_tc", "sigmoid", True)
    assert (config.yarn, config.dtype, config.eos_token_ids) == (None, "bfloat16", ())


def test_null_means_absent() -> None:
    """The files of V2 say null for groups, quantisation and q_lora."""
    config = ModelConfig.from_dict(TINY | {"n_group": None, "topk_group": None, "quantization_config": None})
    assert (config.n_group, config.topk_group, config.fp8_block) == (1, 1, None)
    assert ModelConfig.from_dict(TINY | {"q_lora_rank": None}).q_lora_rank is None


def test_several_end_tokens() -> None:
    assert ModelConfig.from_dict(TINY | {"eos_token_id": [5, 7]}).eos_token_ids == (5, 7)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_yarn_that_does_not_extend_scales_nothing(factor: float) -> None:
    yarn = Yarn(factor, 64, mscale=1.0, mscale_all_dim=0.7)
    assert (yarn.rotary_scale, yarn.softmax_scale) == (1.0, 1.0)


def test_yarn_without_factor_takes_the_ratio_of_lengths() -> None:
    rope = {"type": "yarn", "original_max_position_embeddings": 64}
    yarn = ModelConfig.from_dict(TINY | {"rope_scaling": rope}).yarn
    assert yarn is not None and yarn.factor == 512 / 64


def test_a_model_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        V3.vocab_size = 1  # type: ignore[misc]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported.*DeepseekV3"),
    "no_architecture": ({"architectures": None}, "architecture"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "scoring": ({"scoring_func": "tanh"}, "scoring_func 'tanh'"),
    "topk_method": ({"topk_method": "best"}, "topk_method 'best'"),
    "negative": ({"hidden_size": -4}, "hidden_size is -4"),
    "text": ({"hidden_size": "big"}, "hidden_size is 'big'"),
    "fraction": ({"vocab_size": 10.5}, "vocab_size is 10.5"),
    "boolean": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "too_many_experts": ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8"),
    "no_experts_chosen": ({"num_experts_per_tok": 0}, "num_experts_per_tok 0 of 8"),
    "uneven_groups": ({"n_group": 3}, "n_group 3 does not divide n_routed_experts 8"),
    "too_many_groups": ({"topk_group": 5}, "topk_group 5 of 4"),
    "small_groups": ({"topk_group": 1}, "1 groups hold fewer than 3 experts"),
    "odd_rope": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
    "rope_type": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
    "yarn_without_length": ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
    "quantisation": ({"quantization_config": {"quant_method": "awq"}}, "quantisation 'awq'"),
    "fp8_without_blocks": ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
    "no_moe_frequency": ({"moe_layer_freq": 0}, "moe_layer_freq"),
    "empty_blocks": ({"quantization_config": FP8 | {"weight_block_size": [0, 128]}}, "weight_block_size"),
    "no_rope": ({"qk_rope_head_dim": 0}, "qk_rope_head_dim"),
    "theta_text": ({"rope_theta": "large"}, "rope_theta"),
    "eps_text": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    "scaling_text": ({"rope_scaling": "yarn"}, "rope"),
    "eos_text": ({"eos_token_id": "</s>"}, "eos_token_id"),
    "q_lora_text": ({"q_lora_rank": "x"}, "q_lora_rank"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_field_is_named(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict(TINY | changes, "somewhere/config.json")


def test_all_missing_fields_are_named_at_once() -> None:
    data = {k: v for k, v in TINY.items() if k not in ("vocab_size", "kv_lora_rank", "v_head_dim")}
    with pytest.raises(InputError, match=r"here: fields are missing: vocab_size, kv_lora_rank, v_head_dim"):
        ModelConfig.from_dict(data, "here")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
rope_fields = [
    "type",
    "rope_type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "mscale",
    "rope_theta",
]
rope_values = st.fixed_dictionaries(
    {}, optional={name: json_values | st.just("yarn") for name in rope_fields}
)
quantisations = st.fixed_dictionaries({"quant_method": st.just("fp8"), "weight_block_size": json_values})


@given(
    st.sampled_from([*TINY, "rope_parameters", "quantization_config", "dtype"]),
    json_values | rope_values | quantisations,
)
def test_any_value_of_any_field_is_used_or_refused(name: str, value: Any) -> None:
    """Never another error than InputError, whatever a file says."""
    try:
        config = ModelConfig.from_dict(TINY | {name: value})
    except InputError as error:
        assert str(error).startswith("config.json: ")
    else:
        assert config.softmax_scale > 0
        assert len(config.moe_layers) <= config.num_hidden_layers


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file"):
        ModelConfig.from_folder(tmp_path / "file")


BROKEN = [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b'{"a": 1}}', b"[" * 200_000]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_broken_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


# --- EngineConfig

MODEL = ModelConfig.from_dict(TINY)


def test_resolve_fills_everything_in_and_leaves_the_original() -> None:
    config = EngineConfig()
    resolved = config.resolve(MODEL, 1 << 40)
    assert config == EngineConfig()
    assert resolved.dtype == "float32" and resolved.max_context == 512
    assert resolved.chunk == config.max_batch_tokens
    assert resolved.cache_tokens == 64 * 512
    assert resolved.resolve(MODEL, 0) == resolved


@pytest.mark.parametrize(
    ("stored", "computed"), [("float32",) * 2, ("bfloat16",) * 2, ("float16", "bfloat16")]
)
def test_auto_follows_the_checkpoint(stored: str, computed: str) -> None:
    model = ModelConfig.from_dict(TINY | {"torch_dtype": stored})
    assert EngineConfig().resolve(model, 1 << 30).dtype == computed
    assert EngineConfig(dtype="float32").resolve(model, 1 << 30).dtype == "float32"


def test_cache_takes_at_most_half_of_what_is_free_and_a_gigabyte() -> None:
    per_token = cache_bytes_per_token(V3, "bfloat16")
    assert per_token == 61 * 576 * 2
    large = EngineConfig().resolve(V3, 1 << 50)
    assert large.cache_tokens is not None and large.max_context is not None
    assert (1 << 30) - 32 * per_token <= large.cache_tokens * per_token <= (1 << 30) + 32 * per_token
    small = EngineConfig().resolve(V3, 1000 * per_token)
    assert small.cache_tokens == 512 and small.max_context == 512  # whole pages, and no longer than they hold
    assert EngineConfig().resolve(V3, 0).cache_tokens == 32


def test_context_is_no_longer_than_the_cache() -> None:
    resolved = EngineConfig(cache_tokens=50, page_size=16).resolve(MODEL, 1 << 30)
    assert (resolved.cache_tokens, resolved.max_context) == (64, 64)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GB", 64 * 10**9), ("512MiB", 512 << 20), ("1.5 kb", 1500), ("7", 7), ("7B", 7), ("2t", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("memory_per_rank", text) == size


@pytest.mark.parametrize("text", ["", "much", "0", "0.1", "-1", "1e9", "64i", "64 GB each", "1" * 16])
def test_text_that_is_no_size(text: Any) -> None:
    with pytest.raises(InputError, match=r"memory_per_rank is .*, not a size like 64GB, 512MiB or 1000000"):
        EngineConfig(memory_per_rank=text)


@given(weights=st.integers(0, 10**9), more=st.integers(0, 10**7), page=st.integers(1, 100))
def test_the_cache_takes_what_the_weights_leave(weights: int, more: int, page: int) -> None:
    each = cache_bytes_per_token(MODEL, "float32") * page
    config = EngineConfig(memory_per_rank=str(weights + each + more), page_size=page).within(MODEL, weights)
    assert config.memory_per_rank is None and config.cache_tokens is not None
    assert config.cache_tokens % page == 0
    assert 0 <= each + more - config.cache_tokens // page * each < each


def test_memory_that_leaves_no_room_for_a_page() -> None:
    each = cache_bytes_per_token(MODEL, "float32") * 32
    with pytest.raises(
        InputError, match=f"the weights of a rank take 1000 bytes and a page of the cache {each}"
    ):
        EngineConfig(memory_per_rank=str(999 + each)).within(MODEL, 1000)
    with pytest.raises(InputError, match="memory_per_rank settles cache_tokens; give one or the other"):
        EngineConfig(memory_per_rank="1GB", cache_tokens=7)
    assert EngineConfig(cache_tokens=7).within(MODEL, 1000) == EngineConfig(cache_tokens=7)


def test_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="max_context 513 is more than the model's 512"):
        EngineConfig(max_context=513).resolve(MODEL, 1 << 30)


def test_pages_are_what_kernels_read_best() -> None:
    assert EngineConfig().resolve(MODEL, 1 << 30).page_size == 32
    assert EngineConfig().paged(128, (128, 16)).page_size == 128
    assert EngineConfig(page_size=16).paged(128, (128, 16)).page_size == 16
    assert EngineConfig(page_size=5).paged(32, ()).page_size == 5
    with pytest.raises(
        InputError, match=r"^page_size is 5, but kernels here read pages of 128 or 16 tokens alone$"
    ):
        EngineConfig(page_size=5).paged(128, (128, 16))


@pytest.mark.parametrize(
    "name", ["max_context", "max_batch_tokens", "max_batch_requests", "chunk", "page_size", "cache_tokens"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "7"])
def test_engine_option_that_is_no_count(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is "):
        EngineConfig(**{name: value})


def test_other_wrong_engine_options() -> None:
    with pytest.raises(InputError, match="dtype 'int8'"):
        EngineConfig(dtype="int8")
    for wrong in ("", "sometimes", "on", "even "):
        with pytest.raises(InputError, match=f"split '{wrong}' is not one of auto, now, last, even"):
            EngineConfig(split=wrong)
    for wrong in (
        "",
        "on",
        "every",
        "every=",
        "every=0",
        "every=-3",
        "every=1.5",
        "every=4 ",
        "every=" + 10 * "9",
    ):
        with pytest.raises(InputError, match=f"rebalance '{wrong}' is not one of auto, off, every=STEPS"):
            EngineConfig(rebalance=wrong)
    with pytest.raises(InputError, match="max_batch_tokens 3 is less than max_batch_requests 4"):
        EngineConfig(max_batch_tokens=3, max_batch_requests=4)


@pytest.mark.parametrize("split", ["auto", "now", "last", "even"])
@pytest.mark.parametrize("rebalance", ["auto", "off", "every=1", "every=250", "every=999999999"])
def test_ways_to_split_and_rebalance(split: str, rebalance: str) -> None:
    config = EngineConfig(split=split, rebalance=rebalance)
    assert (config.split, config.rebalance) == (split, rebalance)


def test_official_configs_are_json_objects() -> None:
    assert len(OFFICIAL) == 5
    assert all(isinstance(json.loads((CONFIGS / f"{name}.json").read_text()), dict) for name in OFFICIAL)
