"""langchain's standard tests of a chat model, for ChatOpenAI and a server of ours; run by `tests.clients.run`."""

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestServed(ChatModelIntegrationTests):
    """The demo model tells tales: it calls a tool where the request forces it to, and reads no pictures."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "gpt-4o",
            "base_url": os.environ["TEST_API_BASE_URL"],
            "api_key": "none",
            "max_tokens": 160,
            "temperature": 1.0,
            "seed": 1,
            "stream_usage": True,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "gpt-4o-mini"
