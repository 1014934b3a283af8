"""Checkpoint folders as DeepSeek publishes them, made of random numbers or of holes."""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import expertmesh
from expertmesh.config import ModelConfig
from expertmesh.weights import DTYPE_BYTES, Weight, describe

CONFIGS = Path(expertmesh.__file__).parent / "planner" / "models"
FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3"}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

# A model of both kinds of layers, in the fields of the official files. Its vocabulary is larger than the
# tokenizer's below, as that of the real models is.
TINY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 280, "hidden_size": 48,
    "intermediate_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
    "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": None,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32",
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

# Where not 1: embeddings as large as what the layers add, attention and routing that are far from uniform.
GAINS = {"q_proj": 2.5, "q_b_proj": 2.5, "mlp.gate.weight": 2.0, "lm_head": 3.0}


def official_config(name: str) -> dict[str, Any]:
    """The published config.json of a model."""
    data: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def random_values(
    name: str, shape: Iterable[int], generator: torch.Generator, bias: float = 0.0, tied: bool = False
) -> Tensor:
    """Weights such that the choices of router and head have healthy margins and attention is not trivial."""
    noise = torch.randn(tuple(shape), generator=generator)
    if name.endswith("e_score_correction_bias"):
        return bias + 0.2 * noise
    if noise.ndim == 1:
        return 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
    if "embed_tokens" in name:
        return 0.4 * noise if tied else noise
    gain = next((g for part, g in GAINS.items() if part in name), 1.0)
    return noise * gain / noise.shape[-1] ** 0.5


def random_tensors(config: dict[str, Any], seed: int = 0, bias: float = 0.0) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint, in the types of the checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for weight in describe(ModelConfig.from_dict(config)):
        if weight.name.endswith("_scale_inv"):  # together the two have the size of an unquantised weight
            out[weight.name] = (0.5 + torch.rand(weight.shape, generator=generator)) / 64
            continue
        values = random_values(
            weight.name, weight.shape, generator, bias, bool(config.get("tie_word_embeddings"))
        )
        if weight.dtype == "float8_e4m3fn":
            values = values * 64
        out[weight.name] = values.to(getattr(torch, weight.dtype))
    return out


def dequantised(tensors: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """Float32 tensors without scales, element by element as section 3.3.2 of the V3 paper has it."""
    out = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = (torch.arange(n) // block for n in tensor.shape)
            out[name] = tensor.float() * scale[rows][:, columns]
        elif not name.endswith("_scale_inv"):
            out[name] = tensor.float()
    return out


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1
) -> None:
    """config.json and the tensors, in one file or in several with their index."""
    write_config(folder, config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, members in files.items():
        save_file({n: tensors[n] for n in members}, folder / file)
    write_index(folder, {n: file for file, members in files.items() for n in members})


def write_index(folder: Path, weight_map: dict[str, str], total: int = 0) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def random_checkpoint(
    folder: Path, config: dict[str, Any], seed: int = 0, shards: int = 1
) -> dict[str, Tensor]:
    tensors = random_tensors(config, seed)
    write_checkpoint(folder, config, tensors, shards)
    return tensors


def write_sparse(folder: Path, config: dict[str, Any], shards: int) -> None:
    """A whole checkpoint whose data is one hole a file: the sizes of a model without its disk space."""
    weights = describe(ModelConfig.from_dict(config))
    each = math.ceil(len(weights) / shards)
    write_config(folder, config)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        members = weights[number * each : (number + 1) * each]
        write_holes(folder / file, members)
        weight_map |= {w.name: file for w in members}
    write_index(folder, weight_map)


def write_holes(file: Path, weights: list[Weight]) -> None:
    header, end = {}, 0
    for w in weights:
        begin, end = end, end + w.numel * DTYPE_BYTES[w.dtype]
        header[w.name] = {"dtype": FORMAT_NAMES[w.dtype], "shape": w.shape, "data_offsets": [begin, end]}
    size = write_header(file, header)
    with file.open("r+b") as stream:
        stream.truncate(size + end)


def write_header(file: Path, header: object) -> int:
    """The beginning of a safetensors file; returns its length."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(data)) + data)
    return 8 + len(data)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<user>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<assistant>{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}{{ raise_exception('no such role: ' + m['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>")
MERGES = ("th", "the", "in", "ing", "st", "op")


def write_tokenizer(folder: Path, **config: Any) -> None:
    """Bytes, a few words, four special tokens: 4 + 256 + 6 ids. Characters beyond ASCII span several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters, *MERGES])}
    merges = [(m[:-1], m[-1]) for m in MERGES]
    rust = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    rust.save(str(folder / "tokenizer.json"))
    values = {
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config), encoding="utf-8")
