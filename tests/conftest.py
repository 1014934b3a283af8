"""Settings of all tests, and checkpoints that several of them read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from expertmesh import LLM
from tests.support.files import TINY, write_tokenizer
from tests.support.files import random_checkpoint as write_random_checkpoint
from tests.support.reference import Pair, make_pair

# The same examples in every run; `--hypothesis-profile=search` looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums of floating-point numbers depend on how they are split over threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Name of a variant -> the model in transformers and its checkpoint, made once."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            made[name] = make_pair(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of a few thousand numbers, float32, with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, TINY)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tiny_folder: Path) -> LLM:
    """One engine for all tests that leave nothing running in it."""
    return LLM(tiny_folder, page_size=4, max_batch_requests=8)
