"""A small checkpoint with all that one can have, and conversions of it."""

from pathlib import Path
from typing import Any

from expertmesh.convert.run import Conversion, convert, prepare
from tests.support.files import TINY, random_checkpoint

# Low ranks that are multiples of 16, as whole blocks of rows are to be had; an MTP layer; a bias.
SMALL: dict[str, Any] = TINY | {
    "q_lora_rank": 32, "kv_lora_rank": 16, "num_nextn_predict_layers": 1, "attention_bias": True,
    "intermediate_size": 96, "moe_intermediate_size": 32,
}  # fmt: skip
SHARD = 60_000


def source(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    random_checkpoint(folder, SMALL | fields)
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (folder / ".cache").write_text("hidden", encoding="utf-8")
    return folder


def made(folder: Path, to: str, out: Path, shard_size: int = SHARD) -> Conversion:
    c = prepare(folder, to, out, shard_size)
    convert(c)
    return c


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
