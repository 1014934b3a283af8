"""A random checkpoint behind a real server on a free port."""

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
import torch
import transformers
import uvicorn
from fastapi import FastAPI

from expertmesh import LLM
from expertmesh.config import ModelConfig
from expertmesh.engine.intake import Intake
from expertmesh.engine.telemetry import Telemetry
from expertmesh.launch.channel import Channel
from expertmesh.llm import demo_model
from expertmesh.server.app import create_app
from expertmesh.server.front import Front
from expertmesh.server.line import Line
from expertmesh.server.pump import Pump
from expertmesh.server.settings import Settings
from expertmesh.server.worker import Worker
from tests.server.scripted import ScriptedWorker, template

NAME = "tiny"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    make_folder(path)
    return path


def make_folder(path: Path) -> None:
    """A random model with the tokenizer and the chat template of the demo model."""
    config = transformers.DeepseekV3Config(
        vocab_size=8192, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=16,
        q_lora_rank=24, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=16, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo_model() / name, path)


@pytest.fixture
def new_llm(folder: Path) -> Callable[..., LLM]:
    """An engine of one's own, to do to it what others must not see."""
    return partial(LLM, folder, max_batch_requests=8, page_size=4)


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    """The engine behind `url`."""
    return LLM(folder, max_batch_requests=8, page_size=4)


@pytest.fixture(scope="session")
def url(llm: LLM) -> Iterator[str]:
    """Address of a server that all tests share."""
    with serving(llm) as address:
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    with connect(url) as found:
        yield found


@pytest.fixture(scope="session")
def script_server(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ScriptedWorker, str]]:
    """A server of a model in the form of DeepSeek-V3.1 that says what it is told, and its address."""
    path = tmp_path_factory.mktemp("scripted")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, path)
    shutil.copy(template("deepseek_v31"), path / "chat_template.jinja")
    intake = Intake.of(path, ModelConfig.from_folder(path))
    worker = ScriptedWorker(intake)
    with serving_app(create_app(intake, cast(Worker, worker), [NAME])) as url:
        yield worker, url


@pytest.fixture
def script(script_server: tuple[ScriptedWorker, str]) -> ScriptedWorker:
    worker, _ = script_server
    worker.text, worker.fails = "Yes.", -1
    return worker


@pytest.fixture
def script_url(script_server: tuple[ScriptedWorker, str]) -> str:
    return script_server[1]


@contextmanager
def serving_app(app: FastAPI) -> Iterator[str]:
    """A server of an application in a thread. Leaving ends it and waits for the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[str]:
    """Both sides of a server, each in a thread instead of a process. Leaving stops it as a signal does, and waits for
    the end."""
    near, far = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    given = Settings(**{"folder": str(llm.folder), "names": (NAME,), "grace": 10.0} | settings)
    pump = Pump(llm.engine, lambda frame: line.send(frame), given.grace, given.linger, Telemetry(llm.engine))
    line = Line(Channel(near), pump.put)
    front = Front(given, far, listener)
    threads = [
        threading.Thread(target=lambda: asyncio.run(front.run())),
        threading.Thread(target=pump.run, args=({},)),
    ]
    for thread in threads:
        thread.start()
    try:
        while httpx.get(f"{url}/ready").status_code != 200:
            time.sleep(0.01)
        yield url
    finally:
        pump.put({"do": "drain"})
        for thread in threads:
            thread.join()
        line.close()


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def pages_held(llm: LLM) -> int:
    cache = llm.engine.scheduler.schedulers[0].cache
    return cache.pages - cache.free
