"""Train the tokenizer and pack the texts of the three domains into rows of tokens.

    python -m training.data --english DIR --chinese DIR [--code DIR] --data DIR --demo expertmesh/demo

Writes `DIR/train.npy` [rows, ROW] and `DIR/heldout-<domain>.npy` (uint16), `DIR/data.json` with the counts, and
config.json, generation_config.json, tokenizer.json and tokenizer_config.json into the demo folder.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training import texts
from training.config import CONTEXT, MODEL_CONFIG, VOCAB

ROW = CONTEXT + 2  # a row predicts CONTEXT next tokens and, for MTP, CONTEXT next-next tokens
SPECIAL = [texts.BOS, texts.EOS, texts.PAD, texts.USER, texts.ASSISTANT]
# The three splits of DeepSeek-V3's tokenizer: digits in groups of up to 3, CJK runs apart, then words and marks.
_SPLITS = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
# DeepSeek-R1's template reduced to text turns: the system text first, thoughts of past answers left out.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% if ns.system %}{% set ns.system = ns.system + '\n\n' + message['content'] %}"
    "{% else %}{% set ns.system = message['content'] %}{% endif %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = (content.split('</think>') | last).lstrip('\n') %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


def train_tokenizer(documents: dict[str, list[texts.Document]]) -> Tokenizer:
    """Byte-level BPE of VOCAB tokens; Chinese counts twice so that its characters get tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2,  # the two thinking tags are added afterwards
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        document.text for name in texts.DOMAINS for document in documents[name] if not document.held_out
    ]
    corpus += [document.text for document in documents["chinese"] if not document.held_out]
    tokenizer.train_from_iterator(corpus, trainer)
    thinking = [AddedToken(tag, special=False, normalized=False) for tag in (texts.THINK, texts.END_THINK)]
    tokenizer.add_tokens(thinking)
    bos = tokenizer.token_to_id(texts.BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{texts.BOS} $A",
                pair=f"{texts.BOS} $A {texts.BOS}:1 $B:1",
                special_tokens=[(texts.BOS, bos)],
            ),
        ]
    )
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, {VOCAB} were asked for")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and its config with the chat template, and the model's configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in (texts.BOS, texts.EOS, texts.PAD)}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": texts.BOS,
        "eos_token": texts.EOS,
        "pad_token": texts.PAD,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    config = {**MODEL_CONFIG, "bos_token_id": ids[texts.BOS], "eos_token_id": ids[texts.EOS]}
    generation = {
        "_from_model_config": True,
        "bos_token_id": ids[texts.BOS],
        "eos_token_id": ids[texts.EOS],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", config),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, items: list[str], seed: int) -> np.ndarray:
    """Shuffled documents as one stream of tokens, each between bos and eos."""
    order = list(items)
    random.Random(seed).shuffle(order)
    eos = tokenizer.token_to_id(texts.EOS)
    encoded = tokenizer.encode_batch(order)  # adds bos
    return np.concatenate([np.array([*item.ids, eos], dtype=np.uint16) for item in encoded])


def rows_of(stream: np.ndarray) -> np.ndarray:
    """Cut a stream into rows of ROW tokens that overlap by two: [rows, ROW]."""
    count = (len(stream) - 2) // CONTEXT
    return np.stack([stream[i * CONTEXT : i * CONTEXT + ROW] for i in range(count)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--english", type=Path, required=True, help="folder of plain-text books")
    parser.add_argument("--chinese", type=Path, required=True, help="folder of poems")
    parser.add_argument(
        "--code", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="Python sources"
    )
    parser.add_argument("--data", type=Path, required=True, help="output folder of token rows")
    parser.add_argument(
        "--demo", type=Path, default=Path("expertmesh/demo"), help="output folder of the model"
    )
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    folders = {"english": args.english, "chinese": args.chinese, "code": args.code}
    documents = {name: texts.load_domain(name, folder) for name, folder in folders.items()}
    tokenizer = train_tokenizer(documents)
    save_tokenizer(tokenizer, args.demo)
    args.data.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    packed: dict[str, np.ndarray] = {}
    facts: dict[str, dict[str, float]] = {}
    for name in texts.DOMAINS:
        train = [item for item in documents[name] if not item.held_out]
        held = [item.text for item in documents[name] if item.held_out]
        plain = sum(len(item.text) for item in train)
        chat = texts.chat_documents(train, rng, int(plain * 0.10))
        stream = encode(tokenizer, [item.text for item in train] + chat, args.seed)
        packed[name] = rows_of(stream)
        held_stream = encode(tokenizer, held, args.seed)
        np.save(args.data / f"heldout-{name}.npy", held_stream)
        facts[name] = {
            "documents": len(train),
            "characters": plain,
            "chat_documents": len(chat),
            "chat_characters": sum(map(len, chat)),
            "tokens": len(stream),
            "heldout_documents": len(held),
            "heldout_characters": sum(map(len, held)),
            "heldout_tokens": len(held_stream),
            "characters_per_token": round(sum(map(len, held)) / len(held_stream), 3),
        }
    # Equal parts of tokens: rows alternate between the domains; shorter domains start over, reshuffled.
    longest = max(len(rows) for rows in packed.values())
    columns: list[np.ndarray] = []
    for number, name in enumerate(texts.DOMAINS):
        generator = np.random.default_rng(args.seed + number)
        passes = [generator.permutation(len(packed[name])) for _ in range(-(-longest // len(packed[name])))]
        columns.append(packed[name][np.concatenate(passes)[:longest]])
    train_rows = np.stack(columns, axis=1).reshape(-1, ROW)
    np.save(args.data / "train.npy", train_rows)
    (args.data / "data.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2), train_rows.shape)


if __name__ == "__main__":
    main()
